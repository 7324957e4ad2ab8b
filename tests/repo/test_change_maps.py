"""A backup by change map makes the same tree as reading everything, and reads only what the map names."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.disk import ChangeMap, DiskInfo, Machine, SourceDisk
from holdfast.errors import UsageError
from holdfast.repo.backup import BackupOptions
from holdfast.repo.repository import InitOptions, Repository
from holdfast.units import KIB, MIB

SEGMENT = 1 * MIB


class CountingSource:
    """A disk in memory that notes which ranges were read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read: list[tuple[int, int]] = []

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if end > start:
            yield start, end - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def close(self) -> None:
        pass


def machine(data: bytes, name: str = "vm") -> tuple[Machine, CountingSource]:
    source = CountingSource(data)
    info = DiskInfo(name="disk.raw", size_bytes=len(data), format="raw")
    return Machine("disk", name, "", "memory", (SourceDisk(info, source),)), source


def guest(rng: random.Random, size: int) -> bytearray:
    """Blocks of noise, of repeated content and of zeros, in runs."""
    shared = [rng.randbytes(4096) for _ in range(8)]
    blocks: list[bytes] = []
    while len(blocks) * 4096 < size:
        run = rng.randrange(1, 40)
        kind = rng.random()
        if kind < 0.25:
            blocks += [bytes(4096)] * run
        elif kind < 0.5:
            blocks += [rng.choice(shared)] * run
        else:
            blocks += [rng.randbytes(4096) for _ in range(run)]
    return bytearray(b"".join(blocks)[:size])


def change(rng: random.Random, data: bytearray) -> list[tuple[int, int]]:
    """Changes some ranges in place; returns extents that cover them, some too wide."""
    extents = []
    for _ in range(rng.randrange(0, 8)):
        length = rng.choice([1, 512, 4096, 5000, 64 * KIB, 300 * KIB])
        offset = rng.randrange(len(data))
        length = min(length, len(data) - offset)
        data[offset : offset + length] = bytes(length) if rng.random() < 0.3 else rng.randbytes(length)
        wider = rng.choice([0, 0, 512, 70 * KIB])
        first = max(0, offset - wider)
        extents.append((first, min(len(data), offset + length + wider) - first))
    return extents


@pytest.mark.parametrize("chunker", ["aligned", "fixed"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_a_full_read(tmp_path: Path, chunker: str, seed: int) -> None:
    rng = random.Random(seed)
    options = InitOptions(chunker=chunker, chunk_size_bytes=64 * KIB, segment_bytes=SEGMENT)
    size = rng.choice(
        [3 * SEGMENT, 5 * SEGMENT + 12_800, 300 * SEGMENT + 512 if seed == 0 else 2 * SEGMENT + 1]
    )
    data = guest(rng, size)
    with (
        Repository.init(str(tmp_path / "mapped"), options) as mapped,
        Repository.init(str(tmp_path / "full"), options) as full,
    ):
        mapped.backup(machine(bytes(data))[0])
        for _ in range(3):
            extents = change(rng, data)
            there, source = machine(bytes(data))
            asked = BackupOptions(changes={"disk.raw": ChangeMap.of(extents, size)}, base=mapped.points()[-1])
            summary = mapped.backup(there, asked)
            full.backup(machine(bytes(data))[0])
            new = mapped.points()[-1].manifest.disks[0]
            assert new.tree.root == full.points()[-1].manifest.disks[0].tree.root
            assert new.read == "cbt"
            covered = bytearray(size)
            for offset, length in extents:
                covered[offset : offset + length] = b"\1" * length
            for offset, length in source.read:
                assert all(covered[offset : offset + length]), "an unchanged area was read"
            assert summary.bytes_read == sum(length for _, length in source.read)
        with mapped.open_disk(mapped.points()[-1], "disk.raw") as disk:
            assert disk.read() == data
        assert mapped.check(read_data=True).clean


@pytest.mark.parametrize("new_size", [2 * SEGMENT, 3 * SEGMENT + 4096, 7 * SEGMENT, 400 * SEGMENT])
def test_a_resized_disk(tmp_path: Path, new_size: int) -> None:
    rng = random.Random(new_size)
    old = guest(rng, 4 * SEGMENT + 1024)
    new = bytearray(new_size)
    new[: min(len(old), new_size)] = old[:new_size]
    new[5000:5010] = b"0123456789"
    if new_size > len(old):
        new[-3:] = b"end"
    extents = [(5000, 10)] + ([(len(old), new_size - len(old))] if new_size > len(old) else [])
    with Repository.init(str(tmp_path / "r"), InitOptions(segment_bytes=SEGMENT)) as repository:
        repository.backup(machine(bytes(old))[0])
        base = repository.points()[-1]
        asked = BackupOptions(changes={"disk.raw": ChangeMap.of(extents, new_size)}, base=base)
        repository.backup(machine(bytes(new))[0], asked)
        with repository.open_disk(repository.points()[-1], "disk.raw") as disk:
            assert disk.read() == new
        assert repository.check(read_data=True).clean


def test_cost_follows_the_change(tmp_path: Path) -> None:
    """A large, sparse disk with 64 changed blocks: what is read and stored is of the order of the change."""
    size = 4096 * SEGMENT
    path = tmp_path / "big.raw"
    rng = random.Random(5)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(64):
            file.seek(rng.randrange(size // 4096) * 4096)
            file.write(rng.randbytes(4096))
    from holdfast.esxi.folder import open_machine

    with Repository.init(str(tmp_path / "r"), InitOptions(segment_bytes=SEGMENT)) as repository:
        repository.backup(open_machine(str(path)))
        extents = []
        with path.open("r+b") as file:
            for _ in range(16):
                offset = rng.randrange(size // 4096) * 4096
                file.seek(offset)
                file.write(rng.randbytes(4096))
                extents.append((offset, 4096))
        asked = BackupOptions(changes={"big.raw": ChangeMap.of(extents, size)}, base=repository.points()[-1])
        summary = repository.backup(open_machine(str(path)), asked)
        assert summary.bytes_read == sum(length for _, length in ChangeMap.of(extents, size).extents)
        assert summary.bytes_stored < 16 * 60 * KIB
        with repository.open_disk(repository.points()[-1], "big.raw") as disk, path.open("rb") as file:
            for offset, length in extents:
                file.seek(offset)
                assert disk.pread(offset, length) == file.read(length)


def test_a_map_needs_a_point_of_the_same_vm(tmp_path: Path) -> None:
    with Repository.init(str(tmp_path / "r"), InitOptions(segment_bytes=SEGMENT)) as repository:
        repository.backup(machine(bytes(5000), "one")[0])
        repository.backup(machine(bytes(5000), "two")[0])
        other = repository.resolve("two@latest")
        empty = ChangeMap.of([], 5000)
        with pytest.raises(UsageError, match="another VM"):
            repository.backup(
                machine(bytes(5000), "one")[0], BackupOptions(changes={"disk.raw": empty}, base=other)
            )
        mine = repository.resolve("one@latest")
        with pytest.raises(UsageError, match="does not have"):
            repository.backup(machine(bytes(5000), "one")[0], BackupOptions(changes={"x": empty}, base=mine))
    with pytest.raises(UsageError, match="not inside"):
        ChangeMap.of([(4096, 4096)], 5000)
