"""Redo logs and whole chains of them, written by hand: qemu-img reads these formats, but makes none of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest

SECTOR = 512
ENTRIES = 4096
GRAIN = 4096
ZERO = b""  # stands for a grain that is marked as zeros
UNMAPPED = b"unmapped"


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
