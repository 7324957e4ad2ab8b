"""What keeping costs in a large repository: planning a prune, collecting, and collecting beside a backup.

    python -m benchmarks.collection [--millions 10] [--folder FOLDER] [--output FILE]

Two repositories are made by `benchmarks/synthetic.py`. The large one has many VMs with histories in which 1.5 % of the
segments change from point to point:

- plan: listing all points and judging them by a policy, in a process of its own;
- explain: the bytes that each point alone needs, computed from the trees;
- backup: new random data by the command line, alone and beside a collection;
- gc: after the oldest tenth of all points was forgotten, alone and beside the backup.

The other one is one VM with 100 points that differ by 1 %; one of them is forgotten and collected.

After each collection the index is read: what has to be left (known from how the repository was made) must all be
there, and of what had to go at most so much as a Bloom filter may keep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.index_scale import _drop_cache
from benchmarks.machine import PROJECT, describe
from benchmarks.measure import CommandFailed, run, warm
from benchmarks.synthetic import STORED_BYTES, Made, Shape, make
from holdfast.ids import ID_BYTES
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind
from holdfast.repo.format.rows import PLACE_BYTES
from holdfast.repo.gc import CollectOptions
from holdfast.repo.repository import InitOptions, Repository
from holdfast.repo.retention import Candidate, Policy, plan_retention

__all__ = ["follow_change", "large", "main", "shape_of"]

_MOST_KEPT = 0.004
"""Share of the garbage that the Bloom filter may keep; it is made for 0.1 %."""


def shape_of(millions: float, points: int = 1000) -> Shape:
    """A repository of so many million chunks; each tenth segment of a disk is hot."""
    vms = 40 if points >= 200 else 4
    each = points // vms
    segments = 12
    while (
        Shape(vms, each, segments, max(1, segments * 15 // 1000), max(2, segments // 10), 36).chunks
        < millions * 1e6
    ):
        segments += max(1, segments // 50)
    return Shape(vms, each, segments, max(1, segments * 15 // 1000), max(2, segments // 10), 36)


def one_percent(gib: int, points: int = 100) -> Shape:
    """One disk of so many GiB, of which always the same 1 % changes from point to point."""
    segments = gib * 64
    changed = max(1, segments // 100)
    return Shape(1, points, segments, changed, changed, 180)


# --- children: each is measured as a process of its own


def _io() -> dict[str, int]:
    with open("/proc/self/io", encoding="ascii") as file:
        return {line.partition(":")[0]: int(line.partition(":")[2]) for line in file}


def _plan(path: str) -> dict[str, Any]:
    """Lists all points and judges them."""
    began = time.perf_counter()
    with Repository.open(path) as repository:
        points = repository.points()
        listed = time.perf_counter()
        pinned = repository.pinned()
        candidates = [
            Candidate(
                bytes(point.id),
                point.manifest.time,
                point.received_ms // 1000,
                point.manifest.vm_uuid,
                point.id in pinned,
                0,
                point.manifest.labels,
            )
            for point in points
        ]
        verdicts = plan_retention(candidates, Policy(daily=7, weekly=4), now=int(time.time()), zone=UTC)
    return {
        "points": len(points),
        "removed": sum(not verdict.kept for verdict in verdicts),
        "list_s": listed - began,
        "plan_s": time.perf_counter() - began,
    }


def _explain(path: str) -> dict[str, Any]:
    began = time.perf_counter()
    with Repository.open(path) as repository:
        sizes = repository.exclusive_bytes(repository.points())
    return {
        "explain_s": time.perf_counter() - began,
        "sizes": {point.hex(): size for point, size in sizes.items()},
    }


def _collect(path: str) -> dict[str, Any]:
    phases: dict[str, float] = {}

    def note(phase: str, _done: int, _total: int) -> None:
        phases.setdefault(phase, time.perf_counter())

    began, before = time.perf_counter(), _io()
    with Repository.open(path) as repository:
        # No pack is written anew: there are no payloads that could be.
        report = repository.collect(CollectOptions(compact_below=0.0, on_progress=note))
    ended, after = time.perf_counter(), _io()
    found = asdict(report)
    starts = sorted(phases.items(), key=lambda item: item[1])
    ends = [*(at for _, at in starts[1:]), ended]
    return {
        **{
            key: found[key]
            for key in ("points", "nodes", "records", "dropped_bytes", "freed_bytes", "dead_bytes")
        },
        "collect_s": ended - began,
        "phases_s": {name: end - at for (name, at), end in zip(starts, ends, strict=True)},
        "io": {key: after[key] - before[key] for key in ("rchar", "wchar", "read_bytes", "write_bytes")},
    }


_CHILDREN = {"plan": _plan, "explain": _explain, "collect": _collect}


def _command(do: str, path: str, nice: int = 0) -> list[str]:
    prefix = ["nice", "-n", str(nice)] if nice else []
    return [*prefix, sys.executable, "-m", "benchmarks.collection", "--child", do, path]


def _child(do: str, path: str, nice: int = 0) -> dict[str, Any]:
    """Runs a child; adds what it took as a process."""
    usage = run(_command(do, path, nice), folder=str(PROJECT), sync=False)
    return {
        **json.loads(usage.output.splitlines()[-1]),
        "process_s": usage.wall_s,
        "cpu_s": usage.cpu_s,
        "anon_bytes": usage.anon_peak_bytes,
        "rss_bytes": usage.rss_peak_bytes,
    }


# --- correctness


def _rows(path: str) -> tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]:
    """All ids of the index and their kinds."""
    keys, kinds, after = [], [], None
    with Repository.open(path) as repository:
        index = repository._index()  # noqa: SLF001 - what is left is for nobody else to see
        while True:
            some, values = index.scan_rows(after, 200_000)
            if not some:
                return np.concatenate(keys), np.concatenate(kinds)
            keys.append(np.frombuffer(some, "V32"))
            kinds.append(np.frombuffer(values, np.uint8).reshape(-1, PLACE_BYTES)[:, 20].copy())
            after = some[-ID_BYTES:]  # type: ignore[assignment]


def verify(
    path: str, made: Made, before: npt.NDArray[np.bool_], kept: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Holds what is left against what has to be.

    Args:
        before, kept: by VM and point, those that there were and those that are left.

    Raises:
        CommandFailed: something that is needed is gone, or too much that is not needed is left.
    """
    keys, kinds = _rows(path)
    ours = kinds != Kind.MARK
    heads = np.sort(np.frombuffer(keys[ours].tobytes(), "<u8").reshape(-1, 4)[:, 0])

    def count(ids: npt.NDArray[np.void] | list[bytes]) -> int:
        asked = np.frombuffer(b"".join(ids) if isinstance(ids, list) else ids.tobytes(), "<u8")
        asked = asked.reshape(-1, 4)[:, 0]
        return int((heads[np.minimum(np.searchsorted(heads, asked), len(heads) - 1)] == asked).sum())

    had, had_chunks = made.needed(before)
    need, need_chunks = made.needed(kept)
    if count(made.chunk_ids[need_chunks]) != need_chunks.sum() or count(list(need)) != len(need):
        raise CommandFailed("a collection has dropped what a restore point needs")
    garbage = had_chunks & ~need_chunks
    doomed = len(had - need) + int(garbage.sum())
    left = count(made.chunk_ids[garbage]) + (count(list(had - need)) if had - need else 0)
    if left > max(5, _MOST_KEPT * doomed):
        raise CommandFailed(f"a collection has left {left} of {doomed} records that nothing needs")
    return {
        "needed_records": len(need) + int(need_chunks.sum()),
        "doomed_records": doomed,
        "left_records": left,
    }


def _forget(path: str, made: Made, chosen: npt.NDArray[np.bool_]) -> float:
    """Forgets points; returns seconds."""
    ids = {made.point_ids[vm, at] for vm, at in np.argwhere(chosen).tolist()}
    began = time.perf_counter()
    with Repository.open(path) as repository:
        repository.forget([point for point in repository.points() if point.id in ids])
    return time.perf_counter() - began


def _new_image(path: str, size: int) -> None:
    with open(path, "wb") as file:
        file.writelines(os.urandom(1 << 24) for _ in range(size >> 24))
    os.sync()
    warm([path])


# --- the two cases


def large(folder: str, shape: Shape, new_bytes: int, program: str) -> dict[str, Any]:
    """Plan, explain, collect, and collect beside a backup."""
    path = os.path.join(folder, "large")
    began = time.perf_counter()
    with Repository.init(path, InitOptions()) as repository:
        own = repository.config.id
    made = make(path, own, shape)
    found: dict[str, Any] = {
        "shape": asdict(shape),
        "chunks": shape.chunks,
        "all_points": shape.vms * shape.points,
        "nodes_bytes": made.node_bytes,
        "make_s": time.perf_counter() - began,
    }
    found["plan"] = _child("plan", path)
    explained = _child("explain", path)
    everything = np.ones((shape.vms, shape.points), bool)
    alone = everything.copy()
    alone[0, 0] = False
    _, chunks = made.needed(alone)
    lost = int((~chunks).sum()) * (STORED_BYTES + RECORD_HEADER_BYTES)
    if not lost <= explained.pop("sizes")[made.point_ids[0, 0].hex()] <= lost + made.node_bytes:
        raise CommandFailed("what a point alone needs was counted wrongly")
    found["explain"] = explained
    tenth = max(1, shape.points // 10)
    kept, chosen = everything.copy(), np.zeros_like(everything)
    chosen[:, :tenth] = True
    kept[:, :tenth] = False
    found["forget_s"] = _forget(path, made, chosen)
    found["gc"] = {**_child("collect", path), **verify(path, made, everything, kept)}
    if not new_bytes:
        return found
    image = os.path.join(folder, "new.raw")

    def backup(name: str) -> float:
        _new_image(image, new_bytes)
        return run([program, "backup", "-r", path, image, "--vm", name, "--json"]).wall_s

    backup("warm-up")
    found["backup_alone_s"] = min(backup("alone"), backup("alone"))
    for name, nice in (("beside", 0), ("beside_nice", 10)):
        before = kept.copy()
        chosen = np.zeros_like(everything)
        first = int(np.flatnonzero(kept[0])[0])
        chosen[:, first : first + tenth] = True
        kept = before & ~chosen
        _forget(path, made, chosen)
        _new_image(image, new_bytes)
        gc = subprocess.Popen(_command("collect", path, nice), cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        time.sleep(1.0)  # so that it has come to its work
        usage = run([program, "backup", "-r", path, image, "--vm", name, "--json"])
        over = gc.poll() is not None
        output, _ = gc.communicate()
        if gc.returncode:
            raise CommandFailed("the collection beside the backup has failed")
        said = json.loads(output.splitlines()[-1])
        found[name] = {
            "backup_s": usage.wall_s,
            "collect_s": said["collect_s"],
            "gc_ended_first": over,
            **verify(path, made, before, kept),
        }
    os.unlink(image)
    return found


def follow_change(folder: str, shape: Shape) -> dict[str, Any]:
    """One of the points of a disk is forgotten and collected; nothing of the repository is cached."""
    path = os.path.join(folder, "one")
    with Repository.init(path, InitOptions()) as repository:
        own = repository.config.id
    made = make(path, own, shape)
    everything = np.ones((1, shape.points), bool)
    chosen = np.zeros_like(everything)
    chosen[0, shape.points // 2] = True
    forget_s = _forget(path, made, chosen)
    for place, folders, files in os.walk(path):
        if files and not folders:
            _drop_cache(place)
    found = _child("collect", path)
    return {
        "shape": asdict(shape),
        "chunks": shape.chunks,
        "nodes_bytes": made.node_bytes,
        "changed_bytes": shape.changed * shape.chunks_per_leaf * STORED_BYTES,
        "changed_plain_bytes": shape.changed << 24,
        "forget_s": forget_s,
        **found,
        **verify(path, made, everything, everything & ~chosen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--millions", type=float, default=10.0)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--gib", type=int, default=100, help="of the disk with points that differ by 1 %%")
    parser.add_argument("--quiet", action="store_true", help="no backups beside the collection")
    parser.add_argument("--new-mib", type=int, default=1024, help="size of the backups beside a collection")
    parser.add_argument("--folder", help="where to put the repositories (default: a temporary folder)")
    parser.add_argument("--holdfast", default=os.path.join(os.path.dirname(sys.executable), "holdfast"))
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        do, path = arguments.child
        print(json.dumps(_CHILDREN[do](path)))
        return
    found: dict[str, Any] = {
        "machine": describe(arguments.folder or tempfile.gettempdir()),
        "new_bytes": arguments.new_mib << 20,
    }
    for name in ("one", "large"):
        with tempfile.TemporaryDirectory(prefix="holdfast-collection-", dir=arguments.folder) as work:
            if name == "one":
                found[name] = follow_change(work, one_percent(arguments.gib))
            else:
                shape = shape_of(arguments.millions, arguments.points)
                found[name] = large(
                    work, shape, 0 if arguments.quiet else arguments.new_mib << 20, arguments.holdfast
                )
        print(json.dumps({name: found[name]}), flush=True)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
