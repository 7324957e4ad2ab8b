"""Disks with snapshots. The judge is qemu-img, and beside it the bytes that the history of writes leaves."""

from __future__ import annotations

import itertools
import os
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from holdfast.disk import BlockSource
from holdfast.errors import SourceChanged, SourceError, SourceFormat, SourceUnsupported
from holdfast.esxi.layout import TextOutput, restore_layout
from holdfast.esxi.ranges import MAX_READ_BYTES, ReaderSource
from holdfast.esxi.raw import RawSource
from holdfast.esxi.vmdk.chain import ChainSource
from holdfast.esxi.vmdk.cowd import open_cowd
from holdfast.esxi.vmdk.joined import JoinedSource, Piece
from holdfast.esxi.vmdk.open import open_vmdk
from holdfast.esxi.vmdk.sesparse import open_sesparse

SECTOR = 512
MIB = 1 << 20


def placed(source: ChainSource, size: int) -> bytes:
    """The disk, put together by its placements alone: what a host's agent does."""
    data = bytearray(b"\xa5" * size)
    position = 0
    for start, end, file, offset in source.placements(0, size):
        assert start == position < end
        position = end
        if file is None:
            data[start:end] = bytes(end - start)
        else:
            file.read_into(offset, memoryview(data)[start:end])
    assert position == size
    return bytes(data)


@pytest.mark.parametrize("kinds", ["c", "s", "ccc", "sss", "scsc", "cssccs"])
@pytest.mark.parametrize("round_", range(3))
def test_a_chain_is_what_was_written(round_, kinds, history, qemu_img, content, tmp_path) -> None:
    seed = round_ * 1000 + sum(kinds.encode())
    sectors = [9 * 2048, 40 * 2048 + 3, 16 * 2048][round_]
    if "s" in kinds:
        sectors = sectors // 8 * 8
    vm = history(seed, sectors, kinds)
    opened = open_vmdk(str(vm.top))
    assert isinstance(opened.disk.source, ChainSource)
    expected = bytes(vm.state)
    content.check(opened.disk.source, expected, seed=seed)
    assert placed(opened.disk.source, len(expected)) == expected
    assert {os.path.basename(member) for member in opened.members} == set(os.listdir(vm.folder))
    assert [os.path.basename(path) for path in opened.parents] == list(reversed(vm.names[:-1]))
    opened.disk.source.close()
    qemu_img("convert", "-f", "vmdk", "-O", "raw", vm.top, tmp_path / "qemu.raw")
    assert (tmp_path / "qemu.raw").read_bytes() == expected


def test_what_is_known_of_a_delta_disk_comes_from_its_base(history, qemu_img, tmp_path, content) -> None:
    vm = history(5, 4096, "ss")
    opened = open_vmdk(str(vm.top))
    info = opened.disk.info
    assert (info.name, info.flat_name, info.create_type) == (
        "vm-000002.vmdk",
        "vm-000002-flat.vmdk",
        "seSparse",
    )
    assert (info.adapter, info.uuid) == ("pvscsi", "6000c295f147b6a31fb21bd9e7ae2d9c")
    (flat, text) = restore_layout("disk", [info], [], [], "original")
    assert isinstance(text, TextOutput)
    (tmp_path / text.path).write_bytes(text.data)
    (tmp_path / flat.path).write_bytes(content.of(opened.disk.source))
    opened.disk.source.close()
    assert b'createType="vmfs"' in text.data
    assert b"CID=00000002\nparentCID=ffffffff" in text.data
    assert text.data.count(b"ddb.longContentID") == 1
    answer = qemu_img("compare", "-f", "vmdk", "-F", "vmdk", tmp_path / text.path, vm.top)
    assert "identical" in answer


def test_zeros_in_a_cowd_log_hide_the_parent(history, content) -> None:
    """An entry 1, which qemu-img does not know."""
    for seed in range(4):
        vm = history(seed, 9000, "ccc", cowd_zeros=True)
        opened = open_vmdk(str(vm.top))
        content.check(opened.disk.source, bytes(vm.state), seed=seed)
        opened.disk.source.close()


def test_holes_of_the_base_stay_holes(history) -> None:
    vm = history(1, 64 * 2048)
    vm.snapshot("SESPARSE")
    opened = open_vmdk(str(vm.top))
    found = sum(length for _, length in opened.disk.source.data_extents(0, 64 * MIB))
    used = sum(bool(vm.state[at : at + 65536].strip(b"\0")) for at in range(0, 64 * MIB, 65536)) * 65536
    assert found <= used + 64 * 4096
    opened.disk.source.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_snapshots_that_qemu_img_made(depth, tmp_path, qemu_img, scatter, content) -> None:
    """Hosted delta disks: the one kind of chain that somebody else writes here."""
    qemu_img("create", "-f", "vmdk", tmp_path / "d0.vmdk", "20M")
    expected = bytearray(20 * MIB)
    rng = random.Random(depth)
    for level in range(depth + 1):
        name = tmp_path / f"d{level}.vmdk"
        if level:
            qemu_img("create", "-f", "vmdk", "-b", f"d{level - 1}.vmdk", "-F", "vmdk", name)
        commands = []
        for _ in range(5):
            at, byte = rng.randrange(20 * MIB // SECTOR - 200) * SECTOR, rng.randrange(1, 256)
            expected[at : at + 200 * SECTOR] = bytes([byte]) * (200 * SECTOR)
            commands += ["-c", f"write -P {byte} {at} {200 * SECTOR}"]
        os.spawnvp(os.P_WAIT, "qemu-io", ["qemu-io", "-f", "vmdk", *commands, str(name)])
    opened = open_vmdk(str(tmp_path / f"d{depth}.vmdk"))
    assert len(opened.parents) == depth
    content.check(opened.disk.source, bytes(expected))
    opened.disk.source.close()


# What the chain is made of


def test_a_parent_where_it_was_on_its_host_is_found_beside(history, content) -> None:
    vm = history(3, 4096, "c")
    text = vm.top.read_text().replace('Hint="vm.vmdk"', 'Hint="/vmfs/volumes/5e0026d9/vm/vm.vmdk"')
    vm.top.write_text(text)
    opened = open_vmdk(str(vm.top))
    assert content.of(opened.disk.source) == vm.state
    opened.disk.source.close()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "parentCID=7475b330",
            "parentCID=7475b331",
            "was changed after the snapshot: its content id is 7475b330",
        ),
        ('Hint="vm.vmdk"', 'Hint="absent.vmdk"', "parent 'absent.vmdk' is missing"),
        ('Hint="vm.vmdk"', 'Hint="/etc/passwd"', "parent '/etc/passwd' lies outside"),
        ('Hint="vm.vmdk"', 'Hint="../vm.vmdk2"', "lies outside"),
        ('Hint="vm.vmdk"', 'Hint="vm-flat.vmdk"', "data of a disk without its descriptor"),
        ('Hint="vm.vmdk"', 'Hint="vm-000001.vmdk"', "comes back to"),
        ('Hint="vm.vmdk"', 'Hint="nul\0l.vmdk"', "names no extent"),
        ("RW 4096", "RW 4097", "is a redo log for a disk of 2097152 bytes, but 2097664"),
    ],
)
def test_chains_that_do_not_belong_together(old, new, words, history) -> None:
    vm = history(3, 4096, "c")
    text = vm.top.read_text()
    assert old in text
    vm.top.write_text(text.replace(old, new))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceError, match=words):
        open_vmdk(str(vm.top))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_parent_of_another_size_is_refused(history) -> None:
    vm = history(3, 4096, "c")
    base = vm.folder / "vm.vmdk"
    base.write_text(base.read_text().replace("RW 4096", "RW 4095"))
    with pytest.raises(
        SourceFormat, match=r"redo log is for a disk of 2097152 bytes, but its parent has 2096640"
    ):
        open_vmdk(str(vm.top))


def test_a_chain_without_end_is_refused(tmp_path, redo_logs) -> None:
    for number in range(70):
        parent = f"d{number + 1}.vmdk"
        (tmp_path / f"d{number}.vmdk").write_text(
            redo_logs.descriptor("VMFSSPARSE", "x-delta.vmdk", 8, number, number + 1, parent)
        )
    with pytest.raises(SourceFormat, match="longer than 64"):
        open_vmdk(str(tmp_path / "d0.vmdk"))


# Hostile bytes


@pytest.mark.parametrize(
    ("wrong", "words", "error"),
    [
        ({"magic": b"DWOC"}, "no header of a redo log", SourceFormat),
        ({"version": 2}, "version 2", SourceUnsupported),
        ({"capacity": 0}, "capacity of 0", SourceFormat),
        ({"grain": 0}, "grains of 0", SourceFormat),
        ({"grain": 3}, "grains of 3", SourceFormat),
        ({"grain": 1 << 31}, "grains of", SourceFormat),
        ({"directory_at": 3}, "lie in the header", SourceFormat),
        ({"directory_at": 0xFFFFFFFF}, "past the end", SourceFormat),
        ({"entries": 0}, "has 0 entries", SourceFormat),
        ({"capacity": 0xFFFFFFFF}, "has 3 entries", SourceFormat),
        ({"capacity": 0xFFFFFFFF, "entries": 0xFFFFFFFF}, "past the end", SourceFormat),
    ],
)
def test_cowd_headers_that_make_no_sense(wrong, words, error, redo_logs, memory) -> None:
    data = bytes(redo_logs.cowd(3 * 4096, {1: b"x" * 512}, wrong=wrong))
    with pytest.raises(error, match=words):
        open_cowd(memory(data), "x")
    for length in (0, 4, 2047, 2048):
        with pytest.raises(SourceFormat, match="past the end"):
            open_cowd(memory(bytes(redo_logs.cowd(3 * 4096, {1: b"x" * 512}))[:length]), "x")


@pytest.mark.parametrize(
    ("wrong", "words", "error"),
    [
        ({"magic": 1}, "no header of a redo log", SourceFormat),
        ({"version": 0x100000001}, "version 0x100000001", SourceUnsupported),
        ({"capacity": 0}, "capacity of 0", SourceFormat),
        ({"capacity": 1 << 60}, "capacity of", SourceFormat),
        ({"capacity": 1 << 37}, "past the end", SourceFormat),
        ({"grain": 0}, "grains of 0", SourceUnsupported),
        ({"table": 0}, "tables of 0", SourceUnsupported),
        ({"table": 1 << 63}, "tables of", SourceUnsupported),
        ({"volatile_at": 1 << 63}, "past the end", SourceFormat),
        ({"volatile_at": 2}, "no volatile header", SourceFormat),
        ({"directory_at": 1 << 63}, "directory are said to lie at", SourceFormat),
        ({"directory_at": 1 << 50}, "past the end", SourceFormat),
        ({"directory_at": 0}, "directory are said to lie at", SourceFormat),
        ({"directory_at": 1}, "directory makes no sense", SourceFormat),
        ({"tables_at": 1 << 62}, "tables are said to lie at", SourceFormat),
        ({"grains_at": 1 << 62}, "grains are said to lie at", SourceFormat),
    ],
)
def test_sesparse_headers_that_make_no_sense(wrong, words, error, redo_logs, memory) -> None:
    data = bytes(redo_logs.sesparse(3 * 4096 * 8, {1: b"x" * 4096}, wrong=wrong))
    with pytest.raises(error, match=words):
        open_sesparse(memory(data), "x")


def test_a_log_with_a_journal_is_refused(redo_logs, memory) -> None:
    with pytest.raises(SourceFormat, match="journal") as caught:
        open_sesparse(memory(bytes(redo_logs.sesparse(4096, {}, replay=1))), "x")
    assert "power" in caught.value.hint


@pytest.mark.parametrize("entry", [5, 0xFFFFFFFF, 2, 3, 4])
def test_a_cowd_grain_that_is_not_in_the_file(entry, redo_logs, memory) -> None:
    data = redo_logs.cowd(4096, {7: b"x" * 512})
    (table,) = struct.unpack_from("<I", data, 4 * SECTOR)
    struct.pack_into("<I", data, table * SECTOR + 4 * 9, entry if entry != 5 else len(data) // SECTOR)
    log = open_cowd(memory(bytes(data)), "x")
    with pytest.raises(SourceFormat, match=r"grain at byte 4608 .* not where its data is"):
        list(log.runs(0, 1))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3 << 60 | 1 << 48, "grain at byte 36864 of the disk"),
        (3 << 60 | 0x0000FFFFFFFFFFFF, "makes no sense"),
        (3 << 60 | (1 << 36) - 1, "grain at byte 36864 of the disk"),
        (4 << 60, "makes no sense"),
        (0xF << 60, "makes no sense"),
        (1, "makes no sense"),
    ],
)
def test_an_sesparse_entry_that_makes_no_sense(entry, words, redo_logs, memory) -> None:
    data = redo_logs.sesparse(4096 * 8, {7: b"x" * 4096})
    struct.pack_into("<Q", data, 17 * SECTOR + 8 * 9, entry)
    log = open_sesparse(memory(bytes(data)), "x")
    with pytest.raises(SourceFormat, match=words):
        list(log.runs(0, 1))


@pytest.mark.parametrize("kind", ["cowd", "sesparse"])
def test_damaged_logs_end_in_errors_of_ours(kind, redo_logs, memory) -> None:
    """Bytes at random in the tables: data or an error, always in order and without a gap."""
    rng = random.Random(7)
    unit = 512 if kind == "cowd" else 4096
    capacity = 3 * 4096 * unit // SECTOR
    good = getattr(redo_logs, kind)(capacity, dict.fromkeys((0, 1, 5000, 12287), b"x" * unit))
    open_log = open_cowd if kind == "cowd" else open_sesparse
    errors = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice([rng.randrange(512), rng.randrange(len(data))])
            data[at] = rng.randrange(256)
        try:
            log = open_log(memory(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])), "x")
            position = 0
            for start, end, place in log.runs(0, log.size_bytes):
                assert start == position < end
                assert place < 0 or place + end - start <= len(data)
                position = end
            assert position == log.size_bytes
        except SourceError:
            errors += 1
    assert errors > 30


def test_memory_is_bounded_on_large_disks(redo_logs, tmp_path) -> None:
    """2 TiB with a redo log that has all its tables: 16 MiB in the file for each 2 GiB."""
    capacity = (2 << 40) // SECTOR - SECTOR
    tables = -(-capacity // 4096)
    path = tmp_path / "x-delta.vmdk"
    with path.open("wb") as file:
        header = redo_logs.cowd(4096, {}, wrong={"capacity": capacity, "entries": tables})
        file.write(header[:2048])
        first = 4 + -(-tables * 4 // SECTOR)
        file.write(b"".join(struct.pack("<I", first) for _ in range(tables)))
        file.truncate((first + 32) * SECTOR)
    log = open_cowd(RawSource(str(path)), "x")
    tracemalloc.start()
    assert sum(1 for _ in log.runs(0, 6 << 30)) >= 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    log.close()
    assert peak < 12 * MIB, peak
    assert len(log._tables) <= 64


# Files that are elsewhere


class Far:
    """A file behind a connection: answers in pieces, and counts what it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size_bytes = len(data)
        self.asked: list[tuple[int, int]] = []
        self.closed = 0

    def read(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        return self.data[offset : offset + min(length, 100_000)]

    def close(self) -> None:
        self.closed += 1


def far_chain(vm) -> tuple[ChainSource, list[Far]]:
    far: list[Far] = []

    def source(path: Path) -> BlockSource:
        far.append(Far(path.read_bytes()))
        return ReaderSource(far[-1], path.name)

    logs = []
    for name in reversed(vm.names[1:]):
        stem = vm.folder / name.removesuffix(".vmdk")
        delta, se = Path(f"{stem}-delta.vmdk"), Path(f"{stem}-sesparse.vmdk")
        logs.append(open_cowd(source(delta), "d") if delta.exists() else open_sesparse(source(se), "s"))
    base = JoinedSource([Piece(vm.sectors * SECTOR, source(vm.folder / "vm-flat.vmdk"))])
    return ChainSource(logs, base), far


def test_the_same_chain_over_a_connection(history, content) -> None:
    vm = history(11, 40 * 2048, "scs")
    chain, far = far_chain(vm)
    content.check(chain, bytes(vm.state))
    assert max(length for file in far for _, length in file.asked) <= MAX_READ_BYTES
    chain.close()
    chain.close()
    assert all(file.closed for file in far)


def test_tables_are_asked_for_once(history) -> None:
    vm = history(12, 40 * 2048, "s")
    chain, (log, _) = far_chain(vm)
    for _ in range(3):
        list(chain.placements(0, chain.size_bytes))
    assert len(log.asked) == len(set(log.asked)) <= 3 + 3
    chain.close()


def test_readers_that_answer_wrongly(memory) -> None:
    class Odd(Far):
        def read(self, offset: int, length: int) -> bytes:
            return self.answer

    for answer, error, words in (
        (b"", SourceChanged, "became shorter"),
        (b"x" * 11, SourceFormat, "11 bytes were sent"),
    ):
        odd = Odd(b"x" * 100)
        odd.answer = answer
        with pytest.raises(error, match=words):
            ReaderSource(odd, "far").read_into(0, memoryview(bytearray(10)))


def test_runs_join_neighbours(redo_logs, memory) -> None:
    sectors = dict.fromkeys(itertools.chain(range(10, 20), range(4090, 4100)), b"x" * 512)
    for seed in range(20):
        log = open_cowd(memory(bytes(redo_logs.cowd(8192, sectors, seed))), "x")
        runs = list(log.runs(10 * 512, 20 * 512))
        if len(runs) == 1:
            break
    assert [(start, end) for start, end, _ in runs] == [(5120, 10240)], "never in order?"
    assert [run[:2] for run in log.runs(5121, 5123)] == [(5121, 5123)]
