"""What reading through a mount costs, against `holdfast restore` and, with --borg, `borg mount` of the same data.

    python -m benchmarks.mount --image DISK.raw [--borg PATH] [--runs 3] [--folder FOLDER] [--output FILE]

The same image is backed up by each tool, in the same run and on the same disk. Then, for each run anew:

- restore: `holdfast restore` into a file, without waiting for the disk; the rate is the image's length by that time;
- sequential: one reader, 1 MiB at a time, through a fresh mount; then the kernel's copy of what was read is compared
  with the image byte by byte;
- data: the same through another fresh mount by a reader that leaves holes out, as `cp --sparse=always` and
  `qemu-img convert` do (Borg does not say where holes are, so that there is nothing to leave out);
- page cache: an empty file of the image's length, all one hole, read in the same way without any mount. A restore does not
  pay for that, since it writes past the page cache; every reader of files pays it;
- random: 4 KiB at random places that hold data, through a fresh mount, one reader and four at once, without the
  kernel's read-ahead; each block is compared with the image;
- memory: the peak of the mount's own memory (anonymous pages) over all that.

Besides, in a repository of its own with 1000 restore points: the time from starting `holdfast mount` until it has
returned, the first listing of the folder with the points, and `ls -l` of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.measure import CommandFailed, compare_files, data_extents, run, warm

__all__ = ["Reading", "main", "many_points", "measure_tool", "page_cache_s", "section"]

_STEP_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_WAIT_S = 60


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading through one mount came to.

    Args:
        sequential_s: for the whole image; `data_s` leaving out the holes that the mount tells of.
        random_per_s: blocks of 4 KiB by one reader; `random4_per_s` by four.
        memory_bytes: peak of the mount's anonymous memory.
    """

    mount_s: float
    sequential_s: float
    data_s: float
    random_per_s: float
    random4_per_s: float
    memory_bytes: int


class HoldfastMount:
    """Holdfast by its command line."""

    name = "holdfast"

    def __init__(self, program: str, work: str) -> None:
        self._program = program
        self.repository = os.path.join(work, "holdfast")

    def store(self, image: str) -> None:
        """Backs the image up."""
        run([self._program, "init", "-r", self.repository])
        run([self._program, "-r", self.repository, "backup", image, "--vm", "bench"])

    def restore(self, folder: str) -> float:
        """Seconds that a restore takes; not waiting for the disk."""
        return run(
            [self._program, "-r", self.repository, "restore", "bench@latest", folder + "/"], sync=False
        ).wall_s

    @contextmanager
    def mounted(self, place: str, image: str) -> Iterator[tuple[str, float, int]]:
        """The mounted image, the seconds that it took to mount, and the process that serves it."""
        began = time.perf_counter()
        run([self._program, "-r", self.repository, "mount", place], sync=False)
        took_s = time.perf_counter() - began
        try:
            path = os.path.join(place, "by-vm/bench/latest", os.path.basename(image))
            yield path, took_s, int(os.getxattr(place, "user.holdfast.pid"))
        finally:
            run([self._program, "umount", place], sync=False)


class BorgMount:
    """Borg by its command line, with its default chunker and zstd 1."""

    name = "borg"

    def __init__(self, program: str, work: str) -> None:
        self._program = program
        self._work = work
        self.repository = os.path.join(work, "borg")
        self._environment = {
            "BORG_BASE_DIR": os.path.join(work, "borg-home"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def store(self, image: str) -> None:
        """Backs the image up."""
        run([self._program, "init", "-e", "none", self.repository], environment=self._environment)
        run(
            [self._program, "create", "-C", "zstd,1", f"{self.repository}::bench", os.path.basename(image)],
            environment=self._environment, folder=os.path.dirname(image),
        )  # fmt: skip

    @contextmanager
    def mounted(self, place: str, image: str) -> Iterator[tuple[str, float, int]]:
        """As `HoldfastMount.mounted`."""
        path = os.path.join(place, os.path.basename(image))
        began = time.perf_counter()
        process = subprocess.Popen(
            [self._program, "mount", "--foreground", f"{self.repository}::bench", place],
            env={**os.environ, **self._environment}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not os.path.exists(path):
                if process.poll() is not None or time.perf_counter() - began > _WAIT_S:
                    raise CommandFailed("borg mount did not come up; does its Python have pyfuse3 or llfuse?")
                time.sleep(0.01)
            yield path, time.perf_counter() - began, process.pid
        finally:
            subprocess.run(
                [self._program, "umount", place], check=False, env={**os.environ, **self._environment}
            )
            process.wait(timeout=_WAIT_S)


def _peak_anonymous(pid: int, stop: threading.Event, found: list[int]) -> None:
    while not stop.wait(0.05):
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            found.append(
                next((int(line.split()[1]) for line in file if line.startswith("RssAnon")), 0) * 1024
            )


def _sequential(path: str) -> float:
    buffer = memoryview(bytearray(_STEP_BYTES))
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def _data(path: str) -> float:
    buffer = memoryview(bytearray(_STEP_BYTES))
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        for start, length in data_extents(path):
            file.seek(start)
            left = length
            while left > 0 and (count := file.readinto(buffer[: min(left, _STEP_BYTES)])):
                left -= count
    return time.perf_counter() - began


def page_cache_s(size_bytes: int, work: str) -> float:
    """Seconds for reading a file that is all one hole: what the kernel takes for the pages alone."""
    path = os.path.join(work, "hole")
    with open(path, "wb") as file:
        file.truncate(size_bytes)
    try:
        return _sequential(path)
    finally:
        os.unlink(path)


def _random(path: str, image: str, seconds: float, readers: int, seed: int) -> float:
    """Blocks per second; every one is compared with the image."""
    places = [
        at - at % _BLOCK_BYTES
        for start, length in data_extents(image)
        for at in range(start, start + length, _BLOCK_BYTES)
    ]
    counts: list[int] = []
    wrong: list[int] = []

    def read(number: int) -> None:
        made, count = random.Random(f"{seed} {number}"), 0
        with open(path, "rb", buffering=0) as mounted, open(image, "rb", buffering=0) as truth:
            os.posix_fadvise(mounted.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                at = made.choice(places)
                if os.pread(mounted.fileno(), _BLOCK_BYTES, at) != os.pread(truth.fileno(), _BLOCK_BYTES, at):
                    wrong.append(at)
                count += 1
        counts.append(count)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began
    if wrong:
        raise CommandFailed(f"{len(wrong)} blocks of {path} are wrong, the first at {wrong[0]}")
    return sum(counts) / took_s


def measure_tool(
    tool: HoldfastMount | BorgMount, image: str, work: str, seconds: float, seed: int
) -> Reading:
    """One run of a tool whose repository holds the image.

    Raises:
        CommandFailed: what was read is not the image.
    """
    place = os.path.join(work, f"mounted-{tool.name}")
    os.makedirs(place, exist_ok=True)
    memory: list[int] = [0]
    warm([tool.repository, image])

    def watched(pid: int, what: Any, *arguments: Any) -> float:
        stop = threading.Event()
        thread = threading.Thread(target=_peak_anonymous, args=(pid, stop, memory), daemon=True)
        thread.start()
        try:
            return float(what(*arguments))
        finally:
            stop.set()
            thread.join()

    with tool.mounted(place, image) as (path, mount_s, pid):
        sequential_s = watched(pid, _sequential, path)
        compare_files(path, image)
    with tool.mounted(place, image) as (path, _, pid):
        data_s = watched(pid, _data, path)
    with tool.mounted(place, image) as (path, _, pid):
        one = watched(pid, _random, path, image, seconds, 1, seed)
    with tool.mounted(place, image) as (path, _, pid):
        four = watched(pid, _random, path, image, seconds, 4, seed + 1)
    return Reading(mount_s, sequential_s, data_s, one, four, max(memory))


def many_points(program: str, work: str, points: int) -> dict[str, float]:
    """Times to mount a repository with many points of one VM, and to list them."""
    from benchmarks.synthetic import Shape, make
    from holdfast.repo.repository import Repository

    path, place = os.path.join(work, "many"), os.path.join(work, "mounted-many")
    os.makedirs(place, exist_ok=True)
    with Repository.init(path) as repository:
        repository_id = repository.config.id
    make(path, repository_id, Shape(1, points, 4, 1, 2, 2, chunks_per_leaf=8))
    run([program, "-r", path, "list"])  # rebuilds the index if need be
    began = time.perf_counter()
    run([program, "-r", path, "mount", place], sync=False)
    mount_s = time.perf_counter() - began
    try:
        began = time.perf_counter()
        folder = next((Path(place) / "by-vm").iterdir())
        found = len(os.listdir(folder))
        first_s = time.perf_counter() - began
        if found != points + 1:
            raise CommandFailed(f"{found - 1} restore points are listed, not {points}")
        ls_s = run(["ls", "-l", str(folder)], sync=False).wall_s
    finally:
        run([program, "umount", place], sync=False)
    return {"points": points, "mount_s": mount_s, "listing_s": first_s, "ls_l_s": ls_s}


def _median(readings: Sequence[Reading]) -> Reading:
    columns = zip(*(asdict(reading).values() for reading in readings), strict=True)
    return Reading(*(statistics.median(column) for column in columns))


def section(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What docs/BENCHMARKS.md says of some results, one for each image."""
    for one in found:
        yield (
            f"An image of {one['image_bytes'] / 1e9:.1f} GB with {one['data_bytes'] / 1e9:.1f} GB of data, medians of {one['runs']} runs "
            f"(`benchmarks/mount.py`; what is read is compared with the image): `holdfast restore` takes {one['restore_s']:.2f} s; an empty file "
            f"of that length, read through the page cache without a mount, {one['page_cache_s']:.2f} s."
        )
        yield ""
        yield "| mount | all bytes, s | of the rate of restore | without holes, s | 4 KiB at random, /s | by four readers | own memory, MB |"
        yield "|---|--:|--:|--:|--:|--:|--:|"
        for name in ("holdfast", "borg"):
            if name not in one:
                continue
            tool = one[name]
            yield (
                f"| {name} | {tool['sequential_s']:.2f} | {one['restore_s'] / tool['sequential_s']:.0%} | {tool['data_s']:.2f} "
                f"| {tool['random_per_s']:.0f} | {tool['random4_per_s']:.0f} | {tool['memory_bytes'] / 1e6:.0f} |"
            )
        yield ""
        if "borg" in one:
            ours, theirs = one["holdfast"], one["borg"]
            yield (
                f"Against Borg: {theirs['sequential_s'] / ours['sequential_s']:.2f} times the rate from front to back (target 2), "
                f"{ours['random_per_s'] / theirs['random_per_s']:.0f} times the random reads (target 3)."
            )
            yield ""
        if "many" in one:
            many = one["many"]
            yield (
                f"A repository with {many['points']} restore points: mounted in {many['mount_s']:.2f} s (target 0.5), their folder listed in "
                f"{many['listing_s']:.2f} s (target 0.5), with `ls -l` in {many['ls_l_s']:.2f} s."
            )
            yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", required=True, help="a raw disk image")
    parser.add_argument(
        "--borg", help="Borg 1.4 with pyfuse3 or llfuse, as benchmarks/install_peers makes it"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each random measurement")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--folder", help="where to put the repositories (default: a temporary folder)")
    parser.add_argument("--holdfast", default=os.path.join(os.path.dirname(sys.executable), "holdfast"))
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()
    image = os.path.abspath(arguments.image)
    size = os.path.getsize(image)
    found: dict[str, Any] = {
        "image_bytes": size,
        "data_bytes": sum(length for _, length in data_extents(image)),
        "runs": arguments.runs,
    }
    with tempfile.TemporaryDirectory(prefix="holdfast-mount-", dir=arguments.folder) as work:
        found["machine"] = describe(work)
        own = HoldfastMount(arguments.holdfast, work)
        tools: list[HoldfastMount | BorgMount] = [own]
        if arguments.borg:
            tools.append(BorgMount(os.path.abspath(arguments.borg), work))
        for tool in tools:
            tool.store(image)
        readings: dict[str, list[Reading]] = {tool.name: [] for tool in tools}
        restores: list[float] = []
        empty: list[float] = []
        for number in range(arguments.runs):
            with tempfile.TemporaryDirectory(dir=work) as target:
                warm([own.repository])
                restores.append(own.restore(target))
                compare_files(os.path.join(target, os.path.basename(image)), image)
            empty.append(page_cache_s(size, work))
            for tool in tools:
                readings[tool.name].append(measure_tool(tool, image, work, arguments.seconds, number))
        found["restore_s"] = statistics.median(restores)
        found["restore_bytes_per_s"] = size / found["restore_s"]
        found["page_cache_s"] = statistics.median(empty)
        for name, measured in readings.items():
            middle = _median(measured)
            found[name] = {
                **asdict(middle),
                "sequential_bytes_per_s": size / middle.sequential_s,
                "runs": [asdict(one) for one in measured],
            }
        if arguments.points:
            found["many"] = many_points(arguments.holdfast, work, arguments.points)
    print(json.dumps(found, indent=1))
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
