"""Disks that are cut and hashed where they lie: the same trees as reading them here, and only the unknown travels."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from holdfast.chunker import PUBLISHED_SEED, ChunkerParams, make_chunker
from holdfast.disk import Cutting, DiskInfo, Expect, Machine, ScannedSegment, SourceDisk, parts_digest
from holdfast.errors import SourceError
from holdfast.repo.backup import BackupOptions
from holdfast.repo.format.record import Kind
from holdfast.repo.repository import InitOptions, Repository
from holdfast.units import KIB, MIB

SEGMENT = 1 * MIB
PASSWORD = "correct horse"


class FarDisk:
    """A disk elsewhere: extents can be asked for; whoever reads its bytes through the source fails the test."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if end > start:
            yield start, end - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError("bytes were read past the scanner")

    def close(self) -> None:
        pass


@dataclass
class Traffic:
    """What has travelled."""

    segments: int = 0
    expected: int = 0
    parts: int = 0
    chunks: int = 0
    fetched_bytes: int = 0


@dataclass
class Scanner:
    """Scans bytes in memory with the engine's own chunkers, and counts what is asked for."""

    data: bytes
    traffic: Traffic = field(default_factory=Traffic)
    knows: bool = True

    def can_cut(self, cutting: Cutting) -> bool:
        return self.knows

    def scan(self, offset: int, length: int, cutting: Cutting, expect: Expect) -> ScannedSegment:
        chunker = make_chunker(ChunkerParams(cutting.name, cutting.size_bytes), cutting.seed)
        self.traffic.segments += 1
        segment = self.data[offset : offset + length]
        lengths = chunker.cut(memoryview(segment))
        pieces, at = [], 0
        for part in lengths:
            if part > 0:
                pieces.append(segment[at : at + part])
            at += abs(part)
        made = self.made(lengths, pieces)
        if pieces and expect(offset, length) == made.digest:
            self.traffic.expected += 1
        return made

    def made(self, lengths: list[int], pieces: list[bytes]) -> ScannedSegment:
        return Scanned(lengths, pieces, self.traffic)


class Scanned:
    def __init__(self, lengths: list[int], pieces: list[bytes], traffic: Traffic) -> None:
        self.lengths = lengths
        self.pieces = pieces
        self.hashes = [hashlib.sha256(piece).digest() for piece in pieces]
        self.digest = parts_digest(lengths, self.hashes) if pieces else bytes(32)
        self.chunks = len(pieces)
        self.data_bytes = sum(map(len, pieces))
        self._traffic = traffic

    def parts(self) -> tuple[Sequence[int], Sequence[bytes]]:
        self._traffic.parts += 1
        return self.lengths, self.hashes

    def fetch(self, numbers: Sequence[int]) -> Iterator[bytes]:
        assert list(numbers) == sorted(set(numbers))
        for number in numbers:
            if number < len(self.pieces):
                self._traffic.chunks += 1
                self._traffic.fetched_bytes += len(self.pieces[number])
                yield self.pieces[number]


def far(scanner: Scanner, name: str = "vm") -> Machine:
    info = DiskInfo(name="disk.raw", size_bytes=len(scanner.data), format="raw")
    return Machine("disk", name, "", "memory", (SourceDisk(info, FarDisk(scanner.data), scanner),))


def guest(rng: random.Random, size: int) -> bytearray:
    shared = [rng.randbytes(4096) for _ in range(8)]
    blocks: list[bytes] = []
    while len(blocks) * 4096 < size:
        run, kind = rng.randrange(1, 40), rng.random()
        if kind < 0.25:
            blocks += [bytes(4096)] * run
        elif kind < 0.5:
            blocks += [rng.choice(shared)] * run
        else:
            blocks += [rng.randbytes(4096) for _ in range(run)]
    return bytearray(b"".join(blocks)[:size])


@pytest.fixture(params=["aligned", "fixed", "aligned encrypted"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    chunker, _, encrypted = request.param.partition(" ")
    options = InitOptions(
        cipher="aes256-gcm" if encrypted else None,
        chunker=chunker,
        chunk_size_bytes=16 * KIB,
        segment_bytes=SEGMENT,
    )
    with Repository.init(str(tmp_path / "repo"), options, password=PASSWORD if encrypted else None) as made:
        yield made


def content(repository: Repository, point: str = "vm@latest") -> bytes:
    with repository.open_disk(point, "disk.raw") as disk:
        return disk.read()


def back_up(repository: Repository, data: bytes, name: str = "vm") -> Traffic:
    scanner = Scanner(bytes(data))
    # With one worker, no two ask for the same chunk at the same time.
    repository.backup(far(scanner, name), BackupOptions(workers=1))
    assert content(repository, f"{name}@latest") == data
    return scanner.traffic


def test_the_tree_is_that_of_reading_the_disk_here(repository: Repository, rng: random.Random) -> None:
    data = bytes(guest(rng, 5 * MIB + 4096 * 3 + 512))
    back_up(repository, data)
    scanned = repository.resolve("vm@latest").manifest.disks[0]

    class Here(FarDisk):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = self.data[offset : offset + len(buffer)]

    info = DiskInfo(name="disk.raw", size_bytes=len(data), format="raw")
    summary = repository.backup(Machine("disk", "vm", "", "memory", (SourceDisk(info, Here(data)),)))
    assert summary.chunks_new == 0
    read = repository.resolve("vm@latest").manifest.disks[0]
    assert read.tree == scanned.tree
    assert (scanned.read, read.read) == ("hash", "full")


def test_only_what_is_unknown_travels(repository: Repository, rng: random.Random) -> None:
    data = guest(rng, 8 * MIB)
    first = back_up(repository, data)
    assert first.segments == first.parts == 8
    assert 0 < first.fetched_bytes <= len(data)
    again = back_up(repository, data)
    assert (again.segments, again.parts, again.chunks) == (8, 0, 0)
    data[3 * MIB + 40960 : 3 * MIB + 40960 + 512] = rng.randbytes(512)
    changed = back_up(repository, data)
    assert changed.parts == 1
    assert 0 < changed.fetched_bytes <= 256 * KIB
    other = back_up(repository, data, "other")
    assert (other.parts, other.chunks) == (0, 0), "another VM with the same content"
    moved = data[MIB : 2 * MIB] + data[:MIB] + data[2 * MIB :]
    swapped = back_up(repository, moved)
    assert (swapped.parts, swapped.chunks) == (0, 0), "leaves are known wherever they are"


def test_what_did_not_change_is_as_expected(repository: Repository, rng: random.Random) -> None:
    data = guest(rng, 6 * MIB) + rng.randbytes(5 * 4096)
    assert back_up(repository, data).expected == 0
    assert back_up(repository, data).expected == 7
    data[2 * MIB : 2 * MIB + 4096] = rng.randbytes(4096)
    assert back_up(repository, data).expected == 6
    assert back_up(repository, data).expected == 7, "what is new is expected the next time"
    assert back_up(repository, data + rng.randbytes(4096)).expected == 6, (
        "the last segment has another length"
    )


def test_what_is_as_expected_costs_no_question_for_each_segment(
    repository: Repository, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = guest(rng, 16 * MIB)
    back_up(repository, data)
    back_up(repository, data)
    index = repository._index()
    asked: list[int] = []
    lookup, aliases = index.lookup, index.aliases
    monkeypatch.setattr(index, "lookup", lambda ids: asked.append(len(ids)) or lookup(ids))
    monkeypatch.setattr(index, "aliases", lambda names: asked.append(len(names)) or aliases(names))
    repository.backup(far(Scanner(bytes(data))), BackupOptions(workers=1))
    assert len(asked) < 8, "with 16 segments"
    assert repository.check(read_data=True).error() is None


def test_names_that_an_older_version_has_written_are_completed(
    repository: Repository, rng: random.Random
) -> None:
    data = guest(rng, 4 * MIB)
    back_up(repository, data)
    index = repository._index()
    index.drop_aliases([name for name, _ in index.scan_aliases(b"", 10_000) if len(name) == 32])
    again = back_up(repository, data)
    assert (again.expected, again.parts) == (0, 0)
    assert back_up(repository, data).expected == 4


def test_nothing_is_expected_of_what_may_lack_something(repository: Repository, rng: random.Random) -> None:
    data = guest(rng, 4 * MIB)
    back_up(repository, data)
    index = repository._index()
    leaf, place = next(
        (record, place) for record, place in index.scan(None, 100_000) if place.kind == Kind.CHUNK
    )
    index.drop({leaf: (place.pack, place.offset)})
    traffic = back_up(repository, data)
    assert (traffic.expected, traffic.chunks) == (0, 1), "the lost chunk is stored anew"


def test_with_all_workers(repository: Repository, rng: random.Random) -> None:
    data = guest(rng, 16 * MIB)
    for _ in range(3):
        repository.backup(far(Scanner(bytes(data))))
        assert content(repository) == data
        at = rng.randrange(len(data) - 5000)
        data[at : at + 5000] = rng.randbytes(5000)


def test_a_repeated_chunk_travels_once(repository: Repository, rng: random.Random) -> None:
    piece = rng.randbytes(64 * KIB)
    traffic = back_up(repository, piece * 16)
    assert traffic.fetched_bytes < 4 * len(piece)


def test_empty_disks_and_holes_cost_nothing(repository: Repository) -> None:
    traffic = back_up(repository, bytes(4 * MIB))
    assert (traffic.parts, traffic.chunks) == (0, 0)


def test_a_scanner_that_cuts_otherwise_is_not_asked(repository: Repository, rng: random.Random) -> None:
    scanner = Scanner(bytes(guest(rng, MIB)), knows=False)
    with pytest.raises(AssertionError, match="past the scanner"):
        repository.backup(far(scanner))
    assert scanner.traffic.segments == 0


def test_what_was_collected_travels_again(repository: Repository, rng: random.Random) -> None:
    data = guest(rng, 4 * MIB)
    first = back_up(repository, data)
    index = repository._index()
    assert len(index.scan_aliases(b"", 10_000)) > 4
    repository.forget([repository.resolve("vm@latest")])
    repository.collect()
    assert index.scan_aliases(b"", 10_000) == [], "names of what is gone go with it"
    assert back_up(repository, data).fetched_bytes == first.fetched_bytes


def test_names_of_what_is_gone_do_no_harm(repository: Repository, rng: random.Random) -> None:
    """Even if a collection was interrupted before it let go of them."""
    data = guest(rng, 4 * MIB)
    first = back_up(repository, data)
    index = repository._index()
    gone = {}
    for record, place in index.scan(None, 100_000):
        if place.kind in (Kind.CHUNK, Kind.NODE):
            gone[record] = (place.pack, place.offset)
    repository.forget([repository.resolve("vm@latest")])
    index.begin_collection()
    index.sweep(list(gone), 2**32)
    assert back_up(repository, data).fetched_bytes == first.fetched_bytes


def test_after_a_rebuilt_index_bytes_travel_but_nothing_is_stored_twice(
    repository: Repository, rng: random.Random
) -> None:
    data = guest(rng, 4 * MIB)
    first = back_up(repository, data)
    repository.rebuild_index()
    scanner = Scanner(bytes(data))
    summary = repository.backup(far(scanner), BackupOptions(workers=1))
    assert scanner.traffic.fetched_bytes == first.fetched_bytes
    assert summary.chunks_new == 0
    assert back_up(repository, data).chunks == 0


def test_a_dry_run_stores_nothing_and_says_what_would_travel(
    repository: Repository, rng: random.Random
) -> None:
    data = bytes(guest(rng, 3 * MIB))
    summary = repository.backup(far(Scanner(data)), BackupOptions(dry_run=True))
    assert summary.chunks_new > 0
    assert repository.points() == []
    assert repository._index().scan_aliases(b"", 10) == []


def test_plain_hashes_are_not_in_an_encrypted_index(repository: Repository, rng: random.Random) -> None:
    data = bytes(guest(rng, 2 * MIB))
    back_up(repository, data)
    keys = repository.unlock()
    names = {name for name, _ in repository._index().scan_aliases(b"", 100_000)}
    scan = Scanner(data).scan(0, SEGMENT, cutting(repository), lambda _offset, _length: None)
    _, hashes = scan.parts()
    assert keys.alias(Kind.CHUNK, hashes[0]) in names
    assert not names & {digest[:16] for digest in hashes}
    known = dict(repository._index().scan_aliases(b"", 100_000))
    digests = {value for name, value in known.items() if len(name) == 32}
    assert len(digests) == 2
    assert (scan.digest in digests) == (keys.cipher is None)


def cutting(repository: Repository) -> Cutting:
    config, keys = repository.config, repository.unlock()
    return Cutting(config.chunker, config.chunk_size_bytes, keys.chunker_seed or PUBLISHED_SEED)


# --- a scanner that lies


class Lying(Scanner):
    def __init__(self, data: bytes, how: str) -> None:
        super().__init__(data)
        self.how = how

    def made(self, lengths: list[int], pieces: list[bytes]) -> ScannedSegment:
        scanned = Scanned(lengths, pieces, self.traffic)
        if self.how == "bytes":
            scanned.pieces = [bytes(len(piece)) for piece in pieces]
        elif self.how == "shorter":
            scanned.pieces = [piece[:-1] for piece in pieces]
        elif self.how == "fewer chunks":
            scanned.pieces = pieces[:-1]
        elif self.how == "another chunk":
            scanned.pieces = [piece[::-1] for piece in pieces]
        elif self.how == "digest":
            scanned.digest = hashlib.sha256(b"other").digest()
        elif self.how == "too long":
            scanned.lengths = [*lengths, 4096]
            scanned.hashes = [*scanned.hashes, bytes(32)]
            scanned.digest = parts_digest(scanned.lengths, scanned.hashes)
        elif self.how == "more hashes":
            scanned.hashes = [*scanned.hashes, bytes(32)]
            scanned.digest = parts_digest(scanned.lengths, scanned.hashes)
        return scanned


@pytest.mark.parametrize(
    "how", ["bytes", "shorter", "fewer chunks", "another chunk", "digest", "too long", "more hashes"]
)
def test_a_lie_ends_the_backup_and_spoils_nothing(
    repository: Repository, rng: random.Random, how: str
) -> None:
    data = guest(rng, 3 * MIB)
    back_up(repository, data)
    data[:MIB] = rng.randbytes(MIB)
    with pytest.raises(SourceError):
        repository.backup(far(Lying(bytes(data), how)))
    assert len(repository.points()) == 1
    back_up(repository, data)
    assert not repository.check(read_data=True).findings
