"""What the tests of `holdfast.esxi` share: images, made by qemu-img or by hand, and a check of sources.

qemu-img is the independent oracle for VMDK. It is never skipped: where it is missing, tests fail.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest

from holdfast.disk import BlockSource

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB

# Of redo logs, which qemu-img reads, but does not make.
ENTRIES = 4096
GRAIN = 4096
ZERO = b""  # stands for a grain that is marked as zeros
UNMAPPED = b"unmapped"


class Memory:
    """Bytes as a BlockSource."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if start < end:
            yield start, end - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset >= 0
        assert offset + buffer.nbytes <= len(self.data)
        buffer[:] = self.data[offset : offset + buffer.nbytes]

    def close(self) -> None:
        pass


class Content:
    """Reads sources, and holds them to the contract of `BlockSource`."""

    @staticmethod
    def of(source: BlockSource, start: int = 0, end: int | None = None) -> bytes:
        data = bytearray(b"\xa5" * ((source.size_bytes if end is None else end) - start))
        source.read_into(start, memoryview(data))
        return bytes(data)

    def check(self, source: BlockSource, expected: bytes, *, seed: int = 0) -> None:
        """The source is equal to `expected`, however it is read, and tells its extents rightly."""
        print("seed", seed)
        rng = random.Random(seed)
        size = len(expected)
        assert source.size_bytes == size
        assert self.of(source) == expected
        ranges = [(0, size), (size, size), (0, 1), (size - 1, size)]
        for _ in range(40):
            start = rng.randrange(size)
            ranges.append((start, min(size, start + rng.choice([1, 511, 4096, 65536, 65537, 3 * MIB]))))
        with ThreadPoolExecutor(4) as threads:
            for (start, end), data in zip(
                ranges, threads.map(lambda r: self.of(source, *r), ranges), strict=True
            ):
                assert data == expected[start:end]
        for start, end in ranges:
            self.check_extents(source, expected, start, end)

    @staticmethod
    def check_extents(source: BlockSource, expected: bytes, start: int, end: int) -> None:
        position = start
        for offset, length in source.data_extents(start, end):
            assert length > 0
            assert position <= offset <= offset + length <= end
            assert not expected[position:offset].strip(b"\0"), (
                f"data in [{position}, {offset}) is said to be a hole"
            )
            position = offset + length
        assert not expected[position:end].strip(b"\0"), f"data in [{position}, {end}) is said to be a hole"


class Sparse:
    """Hosted sparse extents, written by hand from the published format."""

    def build(
        self,
        grains: dict[int, bytes],
        *,
        capacity: int = 1024,
        grain: int = 16,
        entries: int = 8,
        flags: int = 0b1,
        version: int = 1,
        descriptor: str | None = None,
        compressed: bool = False,
        footer: bool = False,
        zeros: tuple[int, ...] = (),
        wrong: Mapping[str, int | bytes] = MappingProxyType({}),
    ) -> bytes:
        """An extent with the given grains. `zeros` are marked as zero grains; `wrong` replaces header fields."""
        if descriptor is None:
            descriptor = self.descriptor(capacity)
        text = descriptor.encode().ljust(2 * SECTOR, b"\0") if descriptor else b""
        if zeros:
            flags |= 0b100
            version = max(version, 2)
        if compressed:
            flags |= 0x30000
        tables_count = -(-capacity // (grain * entries))
        body = bytearray(SECTOR) + bytearray(text)

        def pad() -> None:
            body.extend(bytes(-len(body) % SECTOR))

        directory_at = 0
        if not footer:
            directory_at = len(body) // SECTOR
            body.extend(bytes(4 * tables_count))
            pad()
            places = []
            for _ in range(tables_count):
                places.append(len(body) // SECTOR)
                body.extend(bytes(4 * entries))
                pad()
        tables = [[0] * entries for _ in range(tables_count)]
        for number in zeros:
            tables[number // entries][number % entries] = 1
        for number, data in sorted(grains.items()):
            tables[number // entries][number % entries] = len(body) // SECTOR
            assert len(data) <= grain * SECTOR
            if compressed:
                stream = zlib.compress(data.ljust(grain * SECTOR, b"\0"))
                body.extend(struct.pack("<QI", number * grain, len(stream)) + stream)
                pad()
            else:
                body.extend(data.ljust(grain * SECTOR, b"\0"))
        if footer:
            places = []
            for table in tables:
                pad()
                places.append(len(body) // SECTOR if any(table) else 0)
                if any(table):
                    body.extend(struct.pack(f"<{entries}I", *table))
            pad()
            directory_at = len(body) // SECTOR
            body.extend(struct.pack(f"<{tables_count}I", *places))
            pad()
        else:
            for place, table in zip(places, tables, strict=True):
                struct.pack_into(f"<{entries}I", body, place * SECTOR, *table)
            used = [place if any(table) else 0 for place, table in zip(places, tables, strict=True)]
            struct.pack_into(f"<{tables_count}I", body, directory_at * SECTOR, *used)
        fields: dict[str, int | bytes] = {
            "magic": b"KDMV",
            "version": version,
            "flags": flags,
            "capacity": capacity,
            "grain": grain,
            "descriptor_at": 1 if text else 0,
            "descriptor_length": len(text) // SECTOR,
            "entries": entries,
            "redundant_at": 0,
            "directory_at": directory_at,
            "overhead": 0,
            "unclean": 0,
            "newlines": b"\n \r\n",
            "algorithm": 1 if compressed else 0,
        }
        layout = struct.Struct("<4sIIQQQQIQQQB4sH")
        if footer:
            body.extend(struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\0"))  # the footer's marker
            body.extend(layout.pack(*(fields).values()).ljust(SECTOR, b"\0"))
            body.extend(bytes(SECTOR))  # end of stream
            fields["directory_at"] = 0xFFFFFFFFFFFFFFFF
        layout.pack_into(body, 0, *(fields | dict(wrong)).values())
        return bytes(body)

    @staticmethod
    def descriptor(capacity: int) -> str:
        return (
            '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'
            f'RW {capacity} SPARSE "disk.vmdk"\nddb.adapterType = "lsilogic"\n'
        )

    @staticmethod
    def content(grains: dict[int, bytes], *, capacity: int = 1024, grain: int = 16) -> bytes:
        """The disk that `build` describes."""
        disk = bytearray(capacity * SECTOR)
        for number, data in grains.items():
            start = number * grain * SECTOR
            disk[start : start + len(data)] = data
        return bytes(disk[: capacity * SECTOR])


class RedoLogs:
    """Writers of redo logs. Grains and tables are placed in a random order, as a guest's writes would."""

    @staticmethod
    def cowd(
        capacity: int,
        sectors: Mapping[int, bytes],
        seed: int = 0,
        wrong: Mapping[str, int | bytes] = MappingProxyType({}),
    ) -> bytearray:
        """A COWD log of a disk of `capacity` sectors; `sectors` are those that it has."""
        rng = random.Random(seed)
        count = -(-capacity // ENTRIES)
        tables = sorted({number // ENTRIES for number in sectors})
        rng.shuffle(tables)
        numbers = sorted(sectors)
        if rng.random() < 0.5:
            rng.shuffle(numbers)
        out = bytearray(4 * SECTOR + -(-count * 4 // SECTOR) * SECTOR)
        directory, entries = [0] * count, {table: [0] * ENTRIES for table in tables}
        for table in tables:
            directory[table] = len(out) // SECTOR
            out += bytes(ENTRIES * 4)
        for number in numbers:
            table, entry = divmod(number, ENTRIES)
            if sectors[number] == ZERO:
                entries[table][entry] = 1
                continue
            entries[table][entry] = len(out) // SECTOR
            out += sectors[number]
        for table in tables:
            struct.pack_into(f"<{ENTRIES}I", out, directory[table] * SECTOR, *entries[table])
        fields: dict[str, int | bytes] = {
            "magic": b"COWD", "version": 1, "flags": 3, "capacity": capacity, "grain": 1, "directory_at": 4,
            "entries": count, "next_free": len(out) // SECTOR,
        }  # fmt: skip
        struct.pack_into("<4sIIIIIII", out, 0, *(fields | dict(wrong)).values())
        struct.pack_into(f"<{count}I", out, 4 * SECTOR, *directory)
        return out

    @staticmethod
    def sesparse(
        capacity: int,
        grains: Mapping[int, bytes],
        seed: int = 0,
        wrong: Mapping[str, int] = MappingProxyType({}),
        replay: int = 0,
    ) -> bytearray:
        """An SESparse log of a disk of `capacity` sectors; `grains` of 4 KiB are those that it has."""
        rng = random.Random(seed)
        count = -(-capacity // (8 * ENTRIES))
        tables = sorted({number // ENTRIES for number in grains})
        rng.shuffle(tables)
        numbers = sorted(grains)
        if rng.random() < 0.5:
            rng.shuffle(numbers)
        directory_sectors = max(1, -(-count * 8 // SECTOR))
        tables_at = 16 + directory_sectors
        tables_sectors = count * 64
        grains_at = -(-(tables_at + tables_sectors + 8) // 8) * 8
        entries = {table: [0] * ENTRIES for table in tables}
        used = 0
        data = bytearray()
        for number in numbers:
            table, entry = divmod(number, ENTRIES)
            content = grains[number]
            if content == ZERO:
                entries[table][entry] = 2 << 60
            elif content == UNMAPPED:
                entries[table][entry] = 1 << 60 | rng.randrange(1 << 60)
            else:
                entries[table][entry] = 3 << 60 | (used & 0xFFF) << 48 | used >> 12
                data += content
                used += 1
        fields = {
            "magic": 0xCAFEBABE, "version": 0x200000001, "capacity": capacity, "grain": 8, "table": 64, "flags": 0,
            "r1": 0, "r2": 0, "r3": 0, "r4": 0, "volatile_at": 1, "volatile": 1, "journal_header_at": 2,
            "journal_header": 2, "journal_at": 8, "journal": 8, "directory_at": 16, "directory": directory_sectors,
            "tables_at": tables_at, "tables": tables_sectors, "bitmap_at": grains_at - 8, "bitmap": 4,
            "backmap_at": grains_at - 4, "backmap": 4, "grains_at": grains_at, "grains": used * 8,
        }  # fmt: skip
        out = bytearray(grains_at * SECTOR) + data
        struct.pack_into("<26Q", out, 0, *(fields | dict(wrong)).values())
        struct.pack_into("<4Q", out, SECTOR, 0xCAFECAFE, len(tables), 0, replay)
        for place, table in enumerate(tables):
            struct.pack_into("<Q", out, 16 * SECTOR + table * 8, 1 << 60 | place)
            struct.pack_into(f"<{ENTRIES}Q", out, tables_at * SECTOR + place * ENTRIES * 8, *entries[table])
        return out

    @staticmethod
    def descriptor(
        kind: str, extent: str, sectors: int, cid: int, parent_cid: int = 0xFFFFFFFF, parent: str = ""
    ) -> str:
        create = {"VMFSSPARSE": "vmfsSparse", "SESPARSE": "seSparse", "VMFS": "vmfs"}[kind]
        lines = [
            "# Disk DescriptorFile", "version=1", 'encoding="UTF-8"', f"CID={cid:08x}", f"parentCID={parent_cid:08x}",
            f'createType="{create}"', *([f'parentFileNameHint="{parent}"'] if parent else []), "# Extent description",
            f'RW {sectors} {kind} "{extent}"', "# The Disk Data Base ", "#DDB", "",
            f'ddb.longContentID = "{cid:032x}"',
        ]  # fmt: skip
        if not parent:
            lines += [
                'ddb.adapterType = "pvscsi"', 'ddb.uuid = "60 00 C2 95 f1 47 b6 a3-1f b2 1b d9 e7 ae 2d 9c"',
                'ddb.virtualHWVersion = "14"',
            ]  # fmt: skip
        return "\n".join(lines) + "\n"


@dataclass
class History:
    """A disk that is written to, with a snapshot now and then, as a folder of files and as the bytes that it holds."""

    folder: Path
    sectors: int
    rng: random.Random
    cowd_zeros: bool = False
    state: bytearray = field(default_factory=bytearray)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.state = bytearray(self.sectors * SECTOR)
        for _ in range(self.rng.randrange(1, 8)):
            self._write(self._place())
        with (self.folder / "vm-flat.vmdk").open("wb") as file:
            file.truncate(len(self.state))
            for at in range(0, len(self.state), 65536):
                if self.state[at : at + 65536].strip(b"\0"):
                    file.seek(at)
                    file.write(self.state[at : at + 65536])
        self._describe("vm.vmdk", RedoLogs.descriptor("VMFS", "vm-flat.vmdk", self.sectors, 0x7475B330))

    @property
    def top(self) -> Path:
        return self.folder / self.names[-1]

    def snapshot(self, kind: str) -> None:
        """A snapshot, and writes after it, in a redo log of the given kind."""
        number = len(self.names)
        name, suffix = f"vm-{number:06}", {"VMFSSPARSE": "delta", "SESPARSE": "sesparse"}[kind]
        unit = SECTOR if kind == "VMFSSPARSE" else GRAIN
        written: dict[int, bytes] = {}
        for _ in range(self.rng.randrange(0, 9)):
            start, length = self._place()
            emptied = unit == GRAIN or self.cowd_zeros
            if emptied and self.rng.random() < 0.25:
                start, length = start // unit * unit, -(-length // unit) * unit
                length = min(length, len(self.state) // unit * unit - start)
                self.state[start : start + length] = bytes(length)
                mark = ZERO if unit == SECTOR else self.rng.choice([ZERO, UNMAPPED])
                written.update({at // unit: mark for at in range(start, start + length, unit)})
                continue
            self._write((start, length))
            for unit_number in range(start // unit, -(-(start + length) // unit)):
                written[unit_number] = b"."
        for unit_number, mark in written.items():
            if mark == b".":
                written[unit_number] = bytes(self.state[unit_number * unit : (unit_number + 1) * unit]).ljust(
                    unit, b"\0"
                )
        write = RedoLogs.cowd if unit == SECTOR else RedoLogs.sesparse
        log = f"{name}-{suffix}.vmdk"
        (self.folder / log).write_bytes(write(self.sectors, written, self.rng.randrange(1 << 30)))
        parent_cid = 0x7475B330 if number == 1 else number - 1
        self._describe(
            f"{name}.vmdk", RedoLogs.descriptor(kind, log, self.sectors, number, parent_cid, self.names[-1])
        )

    def _describe(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        self.names.append(name)

    def _place(self) -> tuple[int, int]:
        start = self.rng.randrange(self.sectors)
        length = min(self.rng.choice([1, 1, 7, 8, 64, 1000, 5000]), self.sectors - start)
        return start * SECTOR, length * SECTOR

    def _write(self, place: tuple[int, int]) -> None:
        start, length = place
        self.state[start : start + length] = self.rng.randbytes(length)


@pytest.fixture(scope="session")
def qemu_img() -> Callable[..., str]:
    """Runs qemu-img and returns what it printed."""

    def run(*arguments: str | os.PathLike[str]) -> str:
        if shutil.which("qemu-img") is None:
            pytest.fail("qemu-img is missing: install qemu-utils (`make test` does it when run as root)")
        done = subprocess.run(
            ["qemu-img", *arguments], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def content() -> Content:
    return Content()


@pytest.fixture(scope="session")
def sparse() -> Sparse:
    return Sparse()


@pytest.fixture(scope="session")
def memory() -> type[Memory]:
    return Memory


@pytest.fixture(scope="session")
def scatter() -> Callable[..., None]:
    """Makes a sparse file with random data at odd places."""

    def make(path: Path, size: int, *, pieces: int = 12, seed: int = 1) -> None:
        print("seed", seed)
        rng = random.Random(seed)
        with path.open("wb") as file:
            file.truncate(size)
            for _ in range(pieces):
                length = rng.choice([1, 7, 511, 512, 4095, 65536, 100_001, 300_000])
                file.seek(rng.randrange(size - length))
                file.write(rng.randbytes(length))

    return make


@pytest.fixture
def flat_vm(tmp_path: Path) -> Path:
    """A small VM folder as ESXi leaves it: .vmx, .nvram, a log, descriptor and flat."""
    folder = tmp_path / "web1"
    folder.mkdir()
    (folder / "web1.vmx").write_text(
        '.encoding = "UTF-8"\ndisplayName = "Web One"\nuuid.bios = "56 4d 89 0e 68 65 d4 86-22 78 80 af 60 16 e0 e0"\n'
        'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "web1.vmdk"\nscsi0:0.deviceType = "scsi-hardDisk"\n'
    )
    (folder / "web1.nvram").write_bytes(b"MRVN" + bytes(1000))
    (folder / "vmware.log").write_text("a log\n")
    (folder / "web1.vmdk").write_text(vmfs_descriptor("web1-flat.vmdk", 128))
    with (folder / "web1-flat.vmdk").open("wb") as file:
        file.truncate(128 * SECTOR)
        file.seek(4096)
        file.write(b"guest" * 100)
    return folder


def vmfs_descriptor(flat_name: str, sectors: int, **extra: str) -> str:
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        "CID=7475b330",
        "parentCID=ffffffff",
        'createType="vmfs"',
        "",
        "# Extent description",
        f'RW {sectors} VMFS "{flat_name}"',
        "",
        "# The Disk Data Base ",
        "#DDB",
        "",
        'ddb.adapterType = "lsilogic"',
        'ddb.geometry.cylinders = "5"',
        'ddb.geometry.heads = "255"',
        'ddb.geometry.sectors = "63"',
        'ddb.longContentID = "dc2d48eb61aee3399ed03ee37475b330"',
        'ddb.thinProvisioned = "1"',
        'ddb.uuid = "60 00 C2 95 f1 47 b6 a3-1f b2 1b d9 e7 ae 2d 9c"',
        'ddb.virtualHWVersion = "14"',
    ]
    lines += [f'{key}="{value}"' for key, value in extra.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def vmfs_text() -> Callable[..., str]:
    return vmfs_descriptor


@pytest.fixture(scope="session")
def redo_logs() -> type[RedoLogs]:
    return RedoLogs


@pytest.fixture
def history(tmp_path: Path) -> Callable[..., History]:
    def make(seed: int, sectors: int, kinds: str = "", **more: bool) -> History:
        """`kinds`: one letter per snapshot, c for COWD and s for SESparse."""
        print("seed", seed)
        made = History(tmp_path / f"vm{seed}", sectors, random.Random(seed), **more)
        for kind in kinds:
            made.snapshot("VMFSSPARSE" if kind == "c" else "SESPARSE")
        return made

    return make
