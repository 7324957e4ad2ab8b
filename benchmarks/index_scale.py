"""How the index scales: rates and sizes for 1, 10, 50 million records, filled as backups fill it.

usage: python -m benchmarks.index_scale [--millions 1 10] [--batch 1500] [--folder DIR]

Each batch is what a session commits (about 100 MB of new chunks); ids are uniformly random, as hashes are.
The result is checked: every id that is looked up must be found at the place where it was put.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import tempfile
import time

import numpy as np

from holdfast.ids import PackId, RecordId, RepositoryId
from holdfast.repo.format.rows import PackState
from holdfast.repo.index import Batch, NewRecord, PackProgress
from holdfast.repo.lmdb_index import LmdbIndex

STORED, PLAIN = 25_000, 65_536


def ids_of(batch: int, count: int) -> list[RecordId]:
    """`count` ids that only depend on the number of the batch."""
    raw = np.random.default_rng(batch).bytes(32 * count)
    return [RecordId(raw[at : at + 32]) for at in range(0, 32 * count, 32)]


def fill(index: LmdbIndex, first: int, last: int, size: int) -> float:
    """Commits batches [first, last); returns seconds."""
    began = time.perf_counter()
    for number in range(first, last):
        pack = PackId((number // 7 + 1).to_bytes(16, "big"))
        base = 64 + number % 7 * size * STORED
        records = [NewRecord(i, pack, base + at * STORED, STORED - 72, PLAIN, 1) for at, i in enumerate(ids_of(number, size))]
        index.commit(Batch(None, 0, records=records, packs=[PackProgress(pack, base + size * STORED, PackState.OPEN, 0)]))
    return time.perf_counter() - began


def anonymous_bytes() -> int:
    """Resident memory without the mapped index (which is the kernel's page cache)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def measure(index: LmdbIndex, folder: str, batches: int, size: int, fill_s: float, filled: int) -> dict[str, float]:
    """Figures of the index as it is now."""
    rng = random.Random(1)
    asked = [rng.randrange(batches) for _ in range(60)]
    wanted = [(i, at) for number in asked for at, i in enumerate(ids_of(number, size))]
    rng.shuffle(wanted)
    began = time.perf_counter()
    for first in range(0, len(wanted), 256):
        part = wanted[first : first + 256]
        for (_, at), place in zip(part, index.lookup([i for i, _ in part]), strict=True):
            assert place is not None and place.stored_bytes == STORED - 72 and (place.offset - 64) // STORED % size == at
    hit_s = time.perf_counter() - began
    absent = [RecordId(os.urandom(32)) for _ in range(50_000)]
    began = time.perf_counter()
    for first in range(0, len(absent), 256):
        assert not any(index.lookup(absent[first : first + 256]))
    miss_s = time.perf_counter() - began
    began, after, scanned = time.perf_counter(), None, 0
    while scanned < 500_000 and (page := index.scan(after, 10_000)):
        after, scanned = page[-1][0], scanned + len(page)
    scan_s = time.perf_counter() - began
    used = index.figures().used_bytes
    count = batches * size
    return {
        "records": count,
        "insert_per_s": filled / fill_s,
        "lookup_hit_per_s": len(wanted) / hit_s,
        "lookup_miss_per_s": len(absent) / miss_s,
        "scan_per_s": scanned / scan_s,
        "file_bytes": os.path.getsize(os.path.join(folder, "data.mdb")),
        "used_bytes_per_record": used / count,
        "rss_anon_bytes": anonymous_bytes(),
        "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Prints one JSON object per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, nargs="+", default=[1.0])
    parser.add_argument("--batch", type=int, default=1500, help="records per commit")
    parser.add_argument("--folder", help="where to put the index (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="holdfast-index-", dir=arguments.folder)
    try:
        repository = RepositoryId(b"benchmark-index!")
        index = LmdbIndex(folder, repository, create=True)
        done = 0
        for millions in sorted(arguments.millions):
            batches = int(millions * 1e6) // arguments.batch
            fill_s = fill(index, done, batches, arguments.batch)
            filled, done = (batches - done) * arguments.batch, batches
            index.close()
            began = time.perf_counter()
            index = LmdbIndex(folder, repository)
            open_s = time.perf_counter() - began
            figures = measure(index, folder, batches, arguments.batch, fill_s, filled)
            print(json.dumps({"millions": millions, "open_s": open_s, **{k: round(v, 1) for k, v in figures.items()}}), flush=True)
        index.close()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
