"""The agent in a process of its own, from bootstrap to end, on every Python here; and its near side against liars."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from holdfast.chunker import PUBLISHED_SEED, ChunkerParams, make_chunker
from holdfast.disk import parts_digest
from holdfast.errors import (
    HoldfastError,
    LinkError,
    LinkLost,
    LinkTimeout,
    SourceError,
    SourceNotFound,
    SourceUnreadable,
)
from holdfast.esxi.agent import frames
from holdfast.esxi.agent.bundle import bootstrap_command, program
from holdfast.esxi.agent.frames import Piece
from holdfast.esxi.agent_answers import Found, runs_of
from holdfast.esxi.agent_link import AgentLink
from holdfast.esxi.ranges import ReaderSource
from holdfast.esxi.vmdk.chain import ChainSource
from holdfast.esxi.vmdk.cowd import open_cowd
from holdfast.esxi.vmdk.joined import JoinedSource
from holdfast.esxi.vmdk.joined import Piece as JoinedPiece
from holdfast.esxi.vmdk.sesparse import open_sesparse

KIB = 1 << 10
MIB = 1 << 20
FAR = Path(frames.__file__).parent


def image(path: Path, size: int, seed: int) -> bytes:
    """A disk with noise, repetitions, zeros that are written and holes that are not."""
    print("seed", seed)
    rng = random.Random(seed)
    data = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        at = 0
        while at < size:
            length = min(rng.choice([1, 4096, 5000, 65536, 300_000, MIB]), size - at)
            kind = rng.randrange(4)
            if kind:
                unit = rng.randbytes(length) if kind == 1 else rng.randbytes(64) * (length // 64 + 1)
                data[at : at + length] = bytes(length) if kind == 3 else unit[:length]
                file.seek(at)
                file.write(data[at : at + length])
            at += length
    return bytes(data)


def cut_here(name: str, chunk_size: int, data: bytes) -> Found:
    parts = make_chunker(ChunkerParams(name, chunk_size)).cut(memoryview(data))
    hashes, at = [], 0
    for part in parts:
        if part > 0:
            hashes.append(hashlib.sha256(data[at : at + part]).digest())
        at += abs(part)
    data_bytes = sum(part for part in parts if part > 0)
    digest = parts_digest(parts, hashes)
    return Found(0, digest, len(hashes), data_bytes, parts=tuple(parts), hashes=tuple(hashes))


# What is sent


def test_the_far_side_needs_no_more_than_python_3_5() -> None:
    import holdfast.chunker.aligned_plain as plain

    files = [
        plain.__file__,
        *(
            str(FAR / f"{name}.py")
            for name in (
                "frames",
                "cuts",
                "files",
                "deflating",
                "naming",
                "ownvmx",
                "gate",
                "allowed",
                "tools",
                "serve",
            )
        ),
    ]
    done = subprocess.run(
        [Path(sys.executable).parent / "vermin", "--no-tips", "--target=3.5-", "--violations", *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3.5" in done.stdout


def test_what_is_sent_is_small() -> None:
    assert len(bootstrap_command()) < 4096
    assert len(program()) < len(program(limited=True)) < 32 * KIB


def test_the_near_side_starts_past_a_banner_and_says_what_is_wrong(start, pipes) -> None:
    link, _ = start(before="echo 'The time and date of this login have been sent to the system logs.'; ")
    assert link.hello.chunkers == ("aligned", "fixed")
    for command, words in (
        ("echo sh: python3: not found", "python3: not found"),
        ("true", "nothing was said"),
    ):
        with pytest.raises(LinkError, match=words):
            AgentLink.start(pipes(command))
    with pytest.raises(LinkError, match="something else"):
        AgentLink.start(pipes("yes"))


def test_a_damaged_program_is_not_run(pipes) -> None:
    far = pipes(bootstrap_command(sys.executable))
    while frames.READY not in far.read(4096):
        pass
    far.write(program()[:-1] + b"!")
    far.end_input()
    assert far.process.wait(20) == 9


# Disks


@pytest.mark.parametrize("size", [1, 4095, 4096 * 7, 3 * MIB + 4097, 5 * MIB])
def test_cuts_and_hashes_are_those_of_the_engine(size, each_python, start, tmp_path) -> None:
    data = image(tmp_path / "disk", size, size)
    link, _ = start(each_python)
    file = link.open(str(tmp_path / "disk"))
    assert file.size_bytes == size
    for name, chunk_size in (
        ("aligned", 16 * KIB),
        ("aligned", 64 * KIB),
        ("aligned", MIB),
        ("fixed", 4 * KIB),
        ("fixed", MIB),
    ):
        cutter = link.cutter(name, chunk_size, PUBLISHED_SEED)
        segment = 2 * MIB
        starts = range(0, size, segment)
        found = list(link.scan(cutter, (file.piece(at, at, min(segment, size - at)) for at in starts)))
        assert [one.label for one in found] == list(starts)
        for one in found:
            expected = cut_here(name, chunk_size, data[one.label : one.label + segment])
            assert (one.parts, one.hashes) == (expected.parts, expected.hashes)
        again = (
            file.piece(one.label, one.label, min(segment, size - one.label), one.digest) for one in found
        )
        for one, before in zip(link.scan(cutter, again), found, strict=True):
            assert one.same
            assert (one.digest, one.chunks, one.data_bytes) == (
                before.digest,
                before.chunks,
                before.data_bytes,
            )


@pytest.mark.parametrize("case", range(12))
def test_cuts_of_many_kinds_of_data(case) -> None:
    """In this process: many more cases than a process each would allow."""
    from holdfast.chunker import aligned_plain
    from holdfast.esxi.agent.cuts import AlignedCutter, FixedCutter

    rng = random.Random(case)
    blocks = [bytes(4096), rng.randbytes(4096), b"\0" * 4095 + b"x", b"\xff" * 4096, rng.randbytes(64) * 64]
    data = b"".join(rng.choices(blocks, weights=[6, 5, 1, 1, 2], k=rng.randrange(1, 2000)))
    data += rng.choice([b"", b"\0", rng.randbytes(rng.randrange(4096)), bytes(4000)])
    size = 16 * KIB << rng.randrange(0, 9)
    seed = rng.randbytes(32)
    here = make_chunker(ChunkerParams("aligned", size), seed).cut(memoryview(data))
    assert AlignedCutter(aligned_plain, size, seed).cut(memoryview(data)) == here
    size = 4 * KIB << rng.randrange(0, 13)
    here = make_chunker(ChunkerParams("fixed", size)).cut(memoryview(data))
    assert FixedCutter(size).cut(memoryview(data)) == here


def test_a_chain_is_scanned_where_it_lies(start, history, tmp_path) -> None:
    """Tables are read over the link by our readers, data stays there and is cut by the map."""
    vm = history(21, 40 * 2048, "scs")
    link, _ = start()
    handles = {}

    def source(name: str) -> ReaderSource:
        file = link.open(str(vm.folder / name))
        made = ReaderSource(file, name)
        handles[id(made)] = file.handle
        return made

    logs = [
        open_sesparse(source("vm-000003-sesparse.vmdk"), "3"),
        open_cowd(source("vm-000002-delta.vmdk"), "2"),
        open_sesparse(source("vm-000001-sesparse.vmdk"), "1"),
    ]
    size = vm.sectors * 512
    chain = ChainSource(logs, JoinedSource([JoinedPiece(size, source("vm-flat.vmdk"))]))
    cutter = link.cutter("aligned", 64 * KIB, PUBLISHED_SEED)

    def runs(start: int, length: int) -> list[tuple[int, int, int]]:
        return runs_of(chain.placements(start, start + length), lambda file: handles[id(file)])

    segment = 16 * MIB
    pieces = [Piece(at, runs(at, min(segment, size - at))) for at in range(0, size, segment)]
    for one in link.scan(cutter, pieces):
        expected = cut_here("aligned", 64 * KIB, bytes(vm.state[one.label : one.label + segment]))
        assert (one.parts, one.hashes) == (expected.parts, expected.hashes)
    whole = b"".join(
        link.fetch(Piece(0, runs(at, min(5 * MIB, size - at))) for at in range(0, size, 5 * MIB))
    )
    assert whole == vm.state
    (digest,) = link.hashes([Piece(5, runs(MIB - 77, MIB))])
    assert digest == hashlib.sha256(vm.state[MIB - 77 : 2 * MIB - 77]).digest()


@pytest.mark.parametrize("codec", [frames.RAW, frames.ZLIB, frames.AUTO])
def test_fetching(codec, start, tmp_path) -> None:
    data = image(tmp_path / "disk", 9 * MIB + 5, 4)
    link, _ = start()
    file = link.open(str(tmp_path / "disk"))
    ranges = [(0, 1), (5, 4096), (MIB - 3, 5 * MIB), (9 * MIB, 5), (0, 9 * MIB + 5)]
    before = link.received_bytes
    got = list(link.fetch([file.piece(0, *one) for one in ranges], codec=codec))
    assert got == [data[at : at + length] for at, length in ranges]
    sent = sum(map(len, got))
    assert link.received_bytes - before < sent * (0.8 if codec == frames.ZLIB else 1.01)
    assert file.read(9 * MIB, 100) == data[9 * MIB :]
    assert file.read(10 * MIB, 100) == b""


def test_an_unchanged_disk_costs_next_to_nothing(start, tmp_path) -> None:
    size = 128 * MIB
    with (tmp_path / "disk").open("wb") as file:
        for at in range(0, size, 8 * MIB):
            file.seek(at)
            file.write(os.urandom(4 * MIB))
        file.truncate(size)
    link, _ = start()
    far = link.open(str(tmp_path / "disk"))
    cutter = link.cutter("aligned", 64 * KIB, PUBLISHED_SEED)
    first = list(link.scan(cutter, (far.piece(at, at, 16 * MIB) for at in range(0, size, 16 * MIB))))
    before = link.sent_bytes + link.received_bytes
    again = link.scan(cutter, (far.piece(one.label, one.label, 16 * MIB, one.digest) for one in first))
    assert all(one.same for one in again)
    cost = link.sent_bytes + link.received_bytes - before
    assert cost < size * 0.0001, f"{cost} bytes"
    assert cost < 200 * len(first)


def test_memory_stays_under_64_mib(start, tmp_path) -> None:
    size = 160 * MIB
    with (tmp_path / "disk").open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    link, far = start()
    disk = link.open(str(tmp_path / "disk"))
    cutter = link.cutter("aligned", 64 * KIB, PUBLISHED_SEED)
    for _ in link.scan(cutter, (disk.piece(at, at, 16 * MIB) for at in range(0, size, 16 * MIB))):
        pass
    fetched = link.fetch(disk.piece(at, at, 512 * KIB) for at in range(0, size, 512 * KIB))
    next(fetched)
    time.sleep(0.5)  # not to wait for something, but to give the agent a chance to pile up answers
    assert sum(map(len, fetched)) == size - 512 * KIB
    status = Path(f"/proc/{far.process.pid}/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak < 64 * KIB, f"{peak} KiB"


def test_writing_back(start, tmp_path) -> None:
    data = bytearray(image(tmp_path / "disk", 4 * MIB, 9))
    link, _ = start()
    file = link.open(str(tmp_path / "disk"), writable=True)
    rng = random.Random(1)
    for at in range(0, 4 * MIB, 100_000):
        part = rng.randbytes(min(50_000, 4 * MIB - at))
        data[at : at + len(part)] = part
        file.write(at, part)
    file.sync()
    assert (tmp_path / "disk").read_bytes() == data
    pieces = [file.piece(at, at, MIB) for at in range(0, 4 * MIB, MIB)]
    assert list(link.hashes(pieces)) == [
        hashlib.sha256(data[at : at + MIB]).digest() for at in range(0, 4 * MIB, MIB)
    ]
    file.close()
    file.close()
    only_read = link.open(str(tmp_path / "disk"))
    only_read.write(0, b"x")
    with pytest.raises(SourceUnreadable):
        only_read.sync()


def test_looking_around(start, tmp_path) -> None:
    (tmp_path / "größe VM").mkdir()
    (tmp_path / "größe VM" / "a'b.vmx").write_bytes(b"123")
    link, _ = start()
    (entry,) = link.list_folder(str(tmp_path / "größe VM"))
    assert (entry.name, entry.size_bytes) == ("a'b.vmx", 3)
    assert link.stat(str(tmp_path / "größe VM" / "a'b.vmx")).size_bytes == 3
    for wrong in (link.stat, link.list_folder, link.open):
        with pytest.raises(SourceNotFound, match="absent"):
            wrong(str(tmp_path / "absent"))
    with pytest.raises(SourceUnreadable, match="not a file"):
        link.open("/dev/zero")
    with pytest.raises(SourceError, match="fastcdc"):
        link.cutter("fastcdc", 65536, PUBLISHED_SEED)
    with pytest.raises(SourceError, match="power of two"):
        link.cutter("aligned", 65537, PUBLISHED_SEED)


def test_one_range_that_can_not_be_read_does_not_end_the_link(start, tmp_path) -> None:
    image(tmp_path / "disk", MIB, 3)
    link, _ = start()
    file = link.open(str(tmp_path / "disk"))
    cutter = link.cutter("fixed", 4096, PUBLISHED_SEED)
    with pytest.raises(SourceUnreadable, match="ends before byte"):
        list(link.scan(cutter, [file.piece(1, 0, 100), file.piece(2, MIB - 10, 100)]))
    with pytest.raises(SourceUnreadable, match="handle 77"):
        list(link.fetch([Piece(1, [(10, 77, 0)])]))
    with pytest.raises(SourceError):
        list(link.scan(99, [file.piece(1, 0, 100)]))
    os.truncate(tmp_path / "disk", MIB // 2)
    with pytest.raises(SourceUnreadable, match="ends"):
        list(link.scan(cutter, [file.piece(1, 0, MIB)]))
    assert len(list(link.scan(cutter, [file.piece(1, 0, 100)]))) == 1


def test_the_pace_can_be_limited(start, tmp_path) -> None:
    image(tmp_path / "disk", 4 * MIB, 3)
    link, _ = start()
    file = link.open(str(tmp_path / "disk"))
    link.set_pace(8 * MIB)
    begin = time.monotonic()
    list(link.fetch([file.piece(0, 0, 4 * MIB)]))
    assert time.monotonic() - begin > 0.3


# Ends and faults


@pytest.mark.parametrize("busy", [False, True])
def test_the_agent_ends_with_its_input(busy, start, tmp_path) -> None:
    image(tmp_path / "disk", 8 * MIB, 3)
    link, far = start()
    file = link.open(str(tmp_path / "disk"))
    if busy:  # in the middle of a request that would take minutes
        link.set_pace(16 * KIB)
        pieces = [file.piece(at, at, MIB) for at in range(0, 8 * MIB, MIB)]
        link._ask(frames.FETCH, b"\1" + frames.pack_pieces(pieces))
    far.end_input()
    begin = time.monotonic()
    assert far.process.wait(5) == 0
    assert time.monotonic() - begin < 5


def test_a_killed_agent_is_noticed(start, tmp_path) -> None:
    image(tmp_path / "disk", 8 * MIB, 3)
    link, far = start()
    file = link.open(str(tmp_path / "disk"))
    link.set_pace(MIB)
    fetched = link.fetch(file.piece(at, at, MIB) for at in range(0, 8 * MIB, MIB))
    next(fetched)
    far.process.kill()
    with pytest.raises(LinkLost) as caught:
        list(fetched)
    assert "memory" in caught.value.hint
    with pytest.raises(LinkLost):
        link.stat("/")


def test_a_silent_agent_is_given_up(start, tmp_path) -> None:
    image(tmp_path / "disk", MIB, 3)
    link, _ = start()
    file = link.open(str(tmp_path / "disk"))
    link.set_pace(1)
    link._silence_s = 0.3
    with pytest.raises(LinkTimeout, match="said nothing"):
        list(link.fetch([file.piece(0, 0, MIB)]))


GOOD = frames.pack(frames.STAT, 5, b"{}") + b"{}"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 16,
        b"HF" + b"\xff" * 40,
        GOOD[:-1] + b"]",
        GOOD[:10] + b"\xff" + GOOD[11:],
        frames.pack(99, 5, b"") + b"",
        frames.pack(frames.SCAN, 5, b"\0\0\0\0" + b"x" * 9) + b"\0\0\0\0" + b"x" * 9,
        frames.pack(frames.FETCH, 5, b"") + b"",
        frames.pack(frames.STAT, 0, b"{}") + b"{}",
        frames.pack(frames.STAT, 5, b"zz", frames.DEFLATED) + b"zz",
        GOOD[:7],
    ],
)
def test_garbage_ends_the_agent(garbage, start) -> None:
    _, far = start()
    far.write(garbage)
    if len(garbage) < 16:
        far.end_input()
    assert far.process.wait(5) == 3


def test_bombs_are_not_inflated(start) -> None:
    bomb = zlib.compress(bytes(64 * MIB), 9)
    _, far = start()
    far.write(frames.pack(frames.STAT, 5, bomb, frames.DEFLATED) + bomb)
    assert far.process.wait(5) == 3


def test_requests_that_make_no_sense_are_answered(start) -> None:
    link, _ = start()
    for kind, payload in (
        (frames.STAT, b"[]"),
        (frames.OPEN, b"\xff"),
        (frames.CLOSE, b"x"),
        (frames.WRITE, b"x"),
        (frames.PACE, b"{}"),
    ):
        with pytest.raises(SourceError, match="makes no sense"):
            list(link._answers(link._ask(kind, payload)))
    assert link.stat("/").name == ""


class Liar:
    """An agent that answers every request with the same frames."""

    def __init__(self, *answers: tuple[int, bytes, int]) -> None:
        self.answers = answers
        self.out = bytearray(b"hello\n\n" + frames.READY + b" 3.8\n")
        self.requests = 0

    def read(self, limit_bytes: int) -> bytes:
        deadline = time.monotonic() + 5
        while not self.out and time.monotonic() < deadline:
            time.sleep(0.001)
        data = bytes(self.out[:limit_bytes])
        del self.out[:limit_bytes]
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes) -> None:
        if not data.startswith(frames.MAGIC):
            return
        request = frames.HEADER.unpack_from(data)[3]
        self.requests += 1
        hello = b'{"version": 1, "python": "3.8", "chunkers": ["aligned"], "holes": true}'
        answers = self.answers if self.requests > 1 else ((frames.RESULT, hello, frames.LAST),)
        for kind, payload, flags in answers:
            self.out += frames.pack(kind, request, payload, flags) + payload

    def close(self) -> None:
        pass


def summary(label: int = 1, what: int = frames.PARTS, *parts: int, hashes: bytes = b"") -> bytes:
    return frames.SUMMARY.pack(label, what, len(parts)) + struct.pack(f"<{len(parts)}i", *parts) + hashes


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"short", summary(2, frames.HOLE), summary(1, frames.SAME), summary(1, 9), summary(1, frames.PARTS),
        summary(1, frames.PARTS, 99, hashes=bytes(32)), summary(1, frames.PARTS, 100), summary(1, frames.PARTS, 0, 100, hashes=bytes(32)),
        summary(1, frames.PARTS, 200, -100, hashes=bytes(32)), frames.SUMMARY.pack(1, frames.PARTS, 1 << 31),
    ],
)  # fmt: skip
def test_summaries_that_lie(payload) -> None:
    link = AgentLink.start(Liar((frames.SEGMENT, payload, frames.LAST)))
    with pytest.raises(LinkError, match="does not keep to the protocol"):
        list(link.scan(0, [Piece(1, [(100, 0, 0)])]))


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"x", frames.RECORD.pack(0, 0, 100, 99) + bytes(99), frames.RECORD.pack(0, 0, 100, 100) + bytes(99),
        frames.RECORD.pack(7, 0, 100, 100) + bytes(100), frames.RECORD.pack(0, 0, 101, 101) + bytes(101),
        frames.RECORD.pack(0, 5, 100, 100) + bytes(100), frames.RECORD.pack(0, 1, 100, 3) + b"xyz",
        frames.RECORD.pack(0, 1, 100, len(zlib.compress(bytes(99)))) + zlib.compress(bytes(99)),
        frames.RECORD.pack(0, 1, 100, len(zlib.compress(bytes(MIB)))) + zlib.compress(bytes(MIB)),
        2 * (frames.RECORD.pack(0, 0, 100, 100) + bytes(100)),
    ],
)  # fmt: skip
def test_records_that_lie(payload) -> None:
    link = AgentLink.start(Liar((frames.DATA, payload, frames.LAST)))
    with pytest.raises(LinkError, match="does not keep to the protocol"):
        list(link.fetch([Piece(1, [(100, 0, 0)])]))


@pytest.mark.parametrize(
    "answer",
    [(frames.RESULT, b"[", frames.LAST), (frames.RESULT, b"[]", frames.LAST), (frames.RESULT, b'{"size": -1, "mode": 1, "mtime": 1}', frames.LAST),
     (frames.FAILED, b"[]", frames.LAST), (frames.FAILED, b'{"errno": "x", "message": 5}', frames.LAST)],
)  # fmt: skip
def test_answers_that_lie(answer) -> None:
    with pytest.raises(HoldfastError):
        AgentLink.start(Liar(answer)).stat("/")


def test_an_answer_that_nobody_asked_for_ends_the_link() -> None:
    liar = Liar((frames.RESULT, b"{}", frames.LAST), (frames.RESULT, b"{}", frames.LAST))
    link = AgentLink.start(liar)
    with pytest.raises(LinkError):
        for _ in range(3):
            link.set_pace(0)


def test_errors_of_the_host_are_ours(start) -> None:
    said = b'{"errno": %d, "message": "Device or resource busy", "path": "/vmfs/x-flat.vmdk"}' % errno.EBUSY
    link = AgentLink.start(Liar((frames.FAILED, said, frames.LAST)))
    with pytest.raises(SourceUnreadable, match=r"/vmfs/x-flat\.vmdk can not be read \(Device") as caught:
        link.open("/vmfs/x-flat.vmdk")
    assert "snapshot" in caught.value.hint
