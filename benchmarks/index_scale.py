"""How the index scales: 1, 10 and 50 million chunks, and what a backup costs in such a repository.

    python -m benchmarks.index_scale [--millions 1 10 50] [--batch 1500] [--folder FOLDER] [--output FILE]

Each size gets a repository of its own whose index is loaded in key order by this tool (no packs exist: a
backup of new data needs none of the old ones). It is loaded in two passes, every second key first, so that
pages are as full as random insertion would leave them, not packed; what is measured afterwards is done as
backups do it:

- insertion: batches of new records with uniformly random ids, as a session commits them;
- lookup: of present and of absent ids, in groups like those of a segment, in random order; of absent ids
  also before anything of the index is in the page cache;
- scan: rows in key order, as a collection sweeps them;
- open: the time until an index that was closed answers its first lookup;
- backup: the command line backs up 1 GiB of new data into the repository.

Each looked-up id must be found at the place where it was put, and the backup is restored and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import lmdb
import numpy as np

from benchmarks.machine import PROJECT, describe
from benchmarks.measure import compare_files, run, warm
from holdfast.ids import PackId, RecordId, RepositoryId
from holdfast.repo.format.rows import (
    PackRow,
    PackState,
    Place,
    encode_counter,
    encode_pack_row,
    encode_place,
    pack_key,
)
from holdfast.repo.index import Batch, NewRecord, PackProgress
from holdfast.repo.lmdb_index import LmdbIndex

__all__ = ["main"]

STORED, PLAIN = 25_000, 65_536
_RECORD = STORED + 72
_PER_PACK = 10_000
_PART = 250_000
"""Ids are made by parts: part p has the ids whose first 32 bits lie in the p-th share of their range."""

_MAP_BYTES = 64 << 30
_EPOCH = 1


def _part_ids(part: int, parts: int, count: int) -> list[bytes]:
    """The sorted ids of one part; they only depend on its number."""
    rng = np.random.default_rng(part)
    raw = np.frombuffer(rng.bytes(32 * count), np.uint8).reshape(count, 32).copy()
    share = (1 << 64) // parts
    heads = np.sort(rng.integers(0, share, count, np.uint64)) + np.uint64(part * share)
    raw[:, :8] = heads.astype(">u8").view(np.uint8).reshape(count, 8)
    text = raw.tobytes()
    return sorted(text[at : at + 32] for at in range(0, 32 * count, 32))


def _place(number: int) -> Place:
    """Where the record with this number in key order is: packs hold them in an order unlike that of the keys."""
    slot = number * 7_919 % _PER_PACK
    return Place(number // _PER_PACK + 1, 64 + slot * _RECORD, STORED, PLAIN, _EPOCH, 1)


def _load(folder: str, parts: int) -> float:
    """Fills the tables of a new, empty index; returns seconds."""
    began = time.perf_counter()
    env = lmdb.open(
        folder, map_size=_MAP_BYTES, max_dbs=8, create=False, sync=False, writemap=False, meminit=False
    )
    chunks, packs, meta = (env.open_db(name, create=False) for name in (b"chunks", b"packs", b"meta"))
    for odd in (0, 1):
        for part in range(parts):
            ids = _part_ids(part, parts, _PART)
            base = part * _PART
            rows = [
                (ids[at], encode_place(RecordId(ids[at]), _place(base + at))) for at in range(odd, _PART, 2)
            ]
            with env.begin(write=True, db=chunks) as txn:
                txn.cursor(chunks).putmulti(rows, append=not odd)
    with env.begin(write=True) as txn:
        total = parts * _PART // _PER_PACK
        size = 64 + _PER_PACK * _RECORD
        for number in range(1, total + 1):
            row = PackRow(
                number=number,
                id=PackId(number.to_bytes(16, "big")),
                state=PackState.SEALED,
                committed_bytes=size,
                records=_PER_PACK,
                dead_records=0,
                live_bytes=size - 64,
                dead_bytes=0,
                created=1,
                verified=0,
            )
            txn.put(pack_key(number), encode_pack_row(row), db=packs)
        txn.put(b"next_pack", encode_counter(b"next_pack", total + 1), db=meta)
    env.sync(True)
    env.close()
    return time.perf_counter() - began


def _memory() -> dict[str, int]:
    wanted = {"RssAnon": "anon_bytes", "RssFile": "mapped_bytes"}
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {ours: int(fields[theirs].split()[0]) * 1024 for theirs, ours in wanted.items()}


@dataclass(frozen=True, slots=True)
class _Rates:
    open_s: float
    lookup_miss_cold_per_s: float
    lookup_hit_per_s: float
    lookup_miss_per_s: float
    scan_per_s: float
    insert_per_s: float
    anon_bytes: int
    mapped_bytes: int


def _drop_cache(folder: str) -> None:
    """Lets the kernel forget what it has cached of the files in a folder."""
    os.sync()
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _miss(index: LmdbIndex, count: int, group: int) -> float:
    """Seconds for `count` lookups of ids that are not there."""
    absent = [RecordId(os.urandom(32)) for _ in range(count)]
    began = time.perf_counter()
    for first in range(0, count, group):
        if any(index.lookup(absent[first : first + group])):
            raise AssertionError("a record was found that was never put")
    return time.perf_counter() - began


def measure_index(folder: str, repository: RepositoryId, parts: int, batch: int, group: int = 256) -> _Rates:
    """Rates of an index that `_load` has filled."""
    rng = random.Random(1)
    wanted: list[tuple[RecordId, Place]] = []
    for part in rng.sample(range(parts), min(parts, 40)):
        ids = _part_ids(part, parts, _PART)
        some = rng.sample(range(_PART), 5_000 if parts >= 40 else 40_000)
        wanted += [(RecordId(ids[at]), _place(part * _PART + at)) for at in some]
    rng.shuffle(wanted)
    _drop_cache(folder)
    began = time.perf_counter()
    index = LmdbIndex(folder, repository)
    index.lookup([wanted[0][0]])
    open_s = time.perf_counter() - began
    cold_s = _miss(index, 2_000, group)
    warm([folder])
    began = time.perf_counter()
    for first in range(0, len(wanted), group):
        asked = wanted[first : first + group]
        if index.lookup([record for record, _ in asked]) != [place for _, place in asked]:
            raise AssertionError("a record was not found where it is")
    hit_s = time.perf_counter() - began
    miss_s = _miss(index, 100_000, group)
    began, after, scanned = time.perf_counter(), None, 0
    while scanned < 500_000 and (page := index.scan(after, 10_000)):
        after, scanned = page[-1][0], scanned + len(page)
    scan_s = time.perf_counter() - began
    inserted, insert_s = 0, 0.0
    pack, length = PackId(os.urandom(16)), 64
    while inserted < 60_000:
        raw = os.urandom(32 * batch)
        records = [
            NewRecord(RecordId(raw[32 * at : 32 * at + 32]), pack, length + at * _RECORD, STORED, PLAIN, 1)
            for at in range(batch)
        ]
        length += batch * _RECORD
        progress = [PackProgress(pack, length, PackState.SEALED, 1)]
        began = time.perf_counter()
        index.commit(Batch(None, 0, records=records, packs=progress))
        insert_s += time.perf_counter() - began
        inserted += batch
    memory = _memory()
    index.close()
    return _Rates(
        open_s=open_s,
        lookup_miss_cold_per_s=2_000 / cold_s,
        lookup_hit_per_s=len(wanted) / hit_s,
        lookup_miss_per_s=100_000 / miss_s,
        scan_per_s=scanned / scan_s,
        insert_per_s=inserted / insert_s,
        anon_bytes=memory["anon_bytes"],
        mapped_bytes=memory["mapped_bytes"],
    )


def _backup(program: str, repository: str, work: str, size: int) -> dict[str, float]:
    """Backs up `size` bytes of new data by the command line, and proves it by a restore."""
    image = os.path.join(work, "new.raw")
    with open(image, "wb") as file:
        file.writelines(os.urandom(1 << 24) for _ in range(size >> 24))
    os.sync()
    warm([image])
    usage = run([program, "backup", "-r", repository, image, "--vm", "new", "--json"])
    restored = os.path.join(work, "restored.raw")
    run([program, "restore", "-r", repository, "new@latest", restored])
    compare_files(image, restored)
    os.unlink(image)
    os.unlink(restored)
    return {
        "backup_s": usage.wall_s,
        "backup_cpu_s": usage.cpu_s,
        "backup_anon_bytes": usage.anon_peak_bytes,
        "backup_rss_bytes": usage.rss_peak_bytes,
    }


def one_size(
    millions: float, batch: int, folder: str | None, program: str, new_bytes: int
) -> dict[str, float]:
    """All figures of one size."""
    parts = max(1, round(millions * 1e6) // _PART)
    with tempfile.TemporaryDirectory(prefix="holdfast-index-", dir=folder) as work:
        repository = os.path.join(work, "repository")
        place = os.path.join(repository, "index")
        _init(program, repository)
        baseline = _backup(program, repository, work, new_bytes)
        shutil.rmtree(repository)
        own = _init(program, repository)
        load_s = _load(place, parts)
        # a process of its own, so that its memory is that of the index's user alone
        output = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.index_scale",
                "--measure",
                place,
                own.hex(),
                str(parts),
                str(batch),
            ],
            cwd=PROJECT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        index = LmdbIndex(place, own)
        figures = index.figures()
        index.close()
        return {
            "records": figures.records,
            "load_s": load_s,
            "used_bytes": figures.used_bytes,
            "bytes_per_record": figures.used_bytes / figures.records,
            **json.loads(output),
            **_backup(program, repository, work, new_bytes),
            "backup_into_empty_s": baseline["backup_s"],
        }


def _init(program: str, repository: str) -> RepositoryId:
    made = run([program, "init", "-r", repository, "--encryption", "none", "--json"])
    return RepositoryId(bytes.fromhex(json.loads(made.output)["id"]))


def _numbers(text: Sequence[str]) -> Iterator[int]:
    return (int(word) for word in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[1.0])
    parser.add_argument("--batch", type=int, default=1500, help="records per commit")
    parser.add_argument("--folder", help="where to put the repositories (default: a temporary folder)")
    parser.add_argument("--new-mib", type=int, default=1024, help="size of the backup into each")
    parser.add_argument("--holdfast", default=os.path.join(os.path.dirname(sys.executable), "holdfast"))
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        place, own, *numbers = arguments.measure
        parts, batch = _numbers(numbers)
        print(json.dumps(asdict(measure_index(place, RepositoryId(bytes.fromhex(own)), parts, batch))))
        return
    machine = describe(arguments.folder or tempfile.gettempdir())
    sizes = []
    for millions in sorted(arguments.millions):
        sizes.append(
            one_size(millions, arguments.batch, arguments.folder, arguments.holdfast, arguments.new_mib << 20)
        )
        print(json.dumps({k: round(v, 3) for k, v in sizes[-1].items()}), flush=True)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(
                {"machine": machine, "new_bytes": arguments.new_mib << 20, "sizes": sizes}, file, indent=1
            )
            file.write("\n")


if __name__ == "__main__":
    main()
