"""Cost of an incremental backup by change map: a 1 TiB sparse disk with 100 GiB of data and 64 changed blocks.

usage: python -m benchmarks.change_map [--data-gib 100] [--changes 64] [--folder DIR]

The disk is computed, not stored (no file system here has room for it): its bytes follow from their offset, so the
second, timed process sees the same disk with 64 blocks changed. What was backed up is compared with the disk at the
changed places and at others, and the tree with one made by reading a part of the disk again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from holdfast.disk import ChangeMap, DiskInfo, Machine, SourceDisk
from holdfast.repo.backup import BackupOptions
from holdfast.repo.repository import Repository
from holdfast.units import GIB, KIB, MIB, TIB

SIZE = 1 * TIB
STRIPE = 64 * MIB  # data comes in pieces of this size, spread evenly
BLOCK = 4 * KIB


class ComputedDisk:
    """Text-like data with a stamp in every MiB, in stripes with holes between them.

    Args:
        data_bytes: how much of the disk is data.
        changed: offsets of blocks that hold other bytes than at first.
    """

    def __init__(self, data_bytes: int, changed: frozenset[int]) -> None:
        rng = random.Random(11)
        words = [rng.randbytes(6).hex() for _ in range(4000)]
        text = " ".join(rng.choice(words) for _ in range(600_000)).encode()
        self._text = memoryview(text)[: 4 * MIB].toreadonly()
        self._stripes = data_bytes // STRIPE
        self._spacing = SIZE // self._stripes // STRIPE * STRIPE
        self._changed = changed

    @property
    def size_bytes(self) -> int:
        """1 TiB."""
        return SIZE

    def block_offset(self, number: int) -> int:
        """The offset of some block of data."""
        stripe, block = divmod(number % (self._stripes * (STRIPE // BLOCK)), STRIPE // BLOCK)
        return stripe * self._spacing + block * BLOCK

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The stripes."""
        for stripe in range(start // self._spacing, min(self._stripes, -(-end // self._spacing))):
            first = max(start, stripe * self._spacing)
            last = min(end, stripe * self._spacing + STRIPE)
            if first < last:
                yield first, last - first

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Computes the bytes."""
        end = offset + len(buffer)
        at = offset
        while at < end:
            inside = at % len(self._text)
            length = min(len(self._text) - inside, end - at)
            buffer[at - offset : at - offset + length] = self._text[inside : inside + length]
            at += length
        for stamp in range(-(-offset // MIB) * MIB, end - 7, MIB):
            buffer[stamp - offset : stamp - offset + 8] = stamp.to_bytes(8, "little")
        for change in self._changed:
            if offset <= change and change + BLOCK <= end:
                noise = random.Random(change).randbytes(BLOCK)
                buffer[change - offset : change - offset + BLOCK] = noise

    def close(self) -> None:
        """Nothing is open."""


def machine(data_bytes: int, changes: int) -> tuple[Machine, list[int], ComputedDisk]:
    """The disk after some changes, and where they are."""
    plain = ComputedDisk(data_bytes, frozenset())
    rng = random.Random(3)
    places = sorted({plain.block_offset(rng.randrange(1 << 40)) for _ in range(changes)})
    disk = ComputedDisk(data_bytes, frozenset(places))
    info = DiskInfo(name="big.raw", size_bytes=SIZE, format="raw")
    return Machine("disk", "big", "", "computed", (SourceDisk(info, disk),)), places, disk


def incremental(path: str, data_bytes: int, changes: int) -> None:
    """The timed process: opens the repository and backs up by change map."""
    began = time.perf_counter()
    there, places, disk = machine(data_bytes, changes)
    made = time.perf_counter() - began
    began = time.perf_counter()
    with Repository.open(path) as repository:
        changed = ChangeMap.of([(place, BLOCK) for place in places], SIZE)
        base = repository.resolve("big@latest")
        summary = repository.backup(there, BackupOptions(changes={"big.raw": changed}, base=base))
        seconds = time.perf_counter() - began
        assert summary.bytes_read == changed.changed_bytes, "more was read than has changed"
        with repository.open_disk("big@latest", "big.raw") as stored:
            rng = random.Random(5)
            for place in places + [disk.block_offset(rng.randrange(1 << 40)) for _ in range(200)]:
                expected = bytearray(BLOCK)
                disk.read_into(place, memoryview(expected))
                assert stored.pread(place, BLOCK) == expected, f"wrong bytes at {place}"
    print(
        json.dumps(
            {
                "backup_s": round(seconds, 3),
                "making_the_disk_s": round(made, 3),
                "bytes_read": summary.bytes_read,
                "bytes_stored": summary.bytes_stored,
                "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-gib", type=int, default=100)
    parser.add_argument("--changes", type=int, default=64)
    parser.add_argument("--folder", help="where to put the repository (default: a temporary folder)")
    parser.add_argument("--incremental", metavar="REPO", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data_bytes = arguments.data_gib * GIB
    if arguments.incremental:
        incremental(arguments.incremental, data_bytes, arguments.changes)
        return
    folder = tempfile.mkdtemp(prefix="holdfast-change-map-", dir=arguments.folder)
    try:
        with Repository.init(folder + "/repo") as repository:
            began = time.perf_counter()
            repository.backup(machine(data_bytes, 0)[0])
            first_s = time.perf_counter() - began
        command = [sys.executable, "-m", "benchmarks.change_map", "--incremental", folder + "/repo"]
        command += ["--data-gib", str(arguments.data_gib), "--changes", str(arguments.changes)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        whole_s = time.perf_counter() - began
        print(
            json.dumps(
                {"first_s": round(first_s, 1), "process_s": round(whole_s, 2), **json.loads(done.stdout)}
            )
        )
        with Repository.open(folder + "/repo") as repository:
            assert repository.check().clean
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
