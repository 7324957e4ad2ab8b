"""Bytes over the wire and speed of backups from an ESXi host, against `ssh HOST cat` in the same run.

    python -m benchmarks.esxi_wire [--mib 256] [--runs 2] [--folder FOLDER] [--output FILE]

The host is the stand-in of the tests (docs/STANDIN.md), on loopback and on the cores of this machine; its datastores are reached
without the view that locks files. Needs root. Bytes are payload of TCP in both directions as the kernel counts them at the host's
sockets, so SSH's own part and the commands of the host are in them.

A running VM has one disk, three quarters of it filled with data that deflates to a good half, in pieces of 1 MiB. One after the other:

- first: an empty repository; unchanged: again, the median of some runs;
- 1 % changed: pieces of 16 KiB at random places were written by the guest;
- second VM: its disk is a copy of the first one's as it was, with a twentieth of the data replaced;
- all of that through the agent, then first and unchanged through a stream, into a repository of its own.

After each backup the disk is restored and compared with the copy that the stand-in kept at the moment of the snapshot. Rates are the
whole disk's length by the time that the engine worked (snapshots and logins are in the wall time alone). `ssh HOST cat` is the same
disk through the plain client into a pipe that is emptied. SHA-256 is this machine's, one thread, in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.measure import CommandFailed, compare_files, run, warm
from benchmarks.standalone import add_places, run_alone
from tests.esxi_host import Disk, StandIn, VmState

__all__ = ["Bench", "Moved", "main", "make_disk", "section"]

MIB = 1 << 20
_PIECE_BYTES = 16 << 10
_NODE = "scsi0:0"


@dataclass(frozen=True, slots=True)
class Moved:
    """What one backup came to.

    Args:
        wall_s: of the command; `engine_s` is the part in which disks were read and stored.
        new_bytes: plaintext that the repository did not have.
    """

    name: str
    via: str
    from_host_bytes: int
    to_host_bytes: int
    new_bytes: int
    wall_s: float
    engine_s: float

    @property
    def wire_bytes(self) -> int:
        """Both ways."""
        return self.from_host_bytes + self.to_host_bytes


def make_disk(path: Path, size_bytes: int, seed: int, like: Path | None = None) -> None:
    """A raw disk: new, or a copy of another one with a twentieth of its data replaced."""
    rng = random.Random(seed)
    pieces = range(0, size_bytes, MIB)
    written = rng.sample(pieces, len(pieces) * 3 // 4)
    if like is not None:
        run(["cp", "--sparse=always", str(like), str(path)])
        written = rng.sample(_filled(like), max(1, len(written) // 20))
    with path.open("r+b" if like else "wb") as file:
        file.truncate(size_bytes)
        for offset in written:
            file.seek(offset)
            file.write(rng.randbytes(MIB // 2).hex().encode())


def _filled(path: Path) -> list[int]:
    """Offsets of pieces that are not zeros."""
    zeros = bytes(MIB)
    with path.open("rb") as file:
        return [n * MIB for n, piece in enumerate(iter(lambda: file.read(MIB), b"")) if piece != zeros]


class Bench:
    """A linked stand-in, and backups from it that are counted and proven.

    Args:
        work: repositories, configuration and restored disks are put there.
    """

    def __init__(self, host: StandIn, work: Path) -> None:
        self._host = host
        self._work = work
        self._snapshots: dict[int, int] = {}
        os.environ["XDG_CONFIG_HOME"] = str(work / "config")
        os.environ["XDG_STATE_HOME"] = str(work / "state")
        key = host.path("/etc/ssh/ssh_host_ecdsa_key.pub")
        shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True)
        fingerprint = shown.stdout.split()[1]
        self._holdfast(
            *("host", "add", "esx1", f"root@127.0.0.1:{host.port}", "--fingerprint", fingerprint),
            environment={"HOLDFAST_HOST_PASSWORD": host.password},
        )

    def _holdfast(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        return run([sys.executable, "-m", "holdfast", *arguments], environment=environment, sync=False).output

    def repository(self, name: str) -> str:
        """A new, empty one."""
        path = str(self._work / name)
        self._holdfast("-r", path, "init")
        return path

    def back_up(self, name: str, vm: VmState, repository: str, via: str) -> Moved:
        """One backup.

        Raises:
            CommandFailed: it failed, or what is restored is not the disk at the moment of the snapshot.
        """
        before, began_s = self._host.traffic(), time.perf_counter()
        said = self._holdfast("-r", repository, "backup", f"esxi://esx1/{vm.name}", "--via", via, "--json")
        wall_s, after = time.perf_counter() - began_s, self._host.traffic()
        summary: dict[str, Any] = json.loads(said.splitlines()[-1])
        number = self._snapshots[vm.vmid] = self._snapshots.get(vm.vmid, 0) + 1
        restored, kept = str(self._work / "restored.raw"), self._host.reference(vm, number, _NODE)
        self._holdfast(
            *("-r", repository, "restore", summary["point"], restored),
            *("--disk", _NODE, "--as", "raw", "--overwrite"),
        )
        compare_files(restored, kept)
        os.unlink(restored)
        os.unlink(kept)
        return Moved(
            name,
            via,
            after.sent_bytes - before.sent_bytes,
            after.received_bytes - before.received_bytes,
            summary["bytes_new"],
            wall_s,
            summary["duration_s"],
        )

    def unchanged(self, vm: VmState, repository: str, via: str, runs: int) -> Moved:
        """The median one, by the engine's time."""
        done = [self.back_up("unchanged", vm, repository, via) for _ in range(runs)]
        return sorted(done, key=lambda moved: moved.engine_s)[len(done) // 2]

    def change(self, vm: VmState, size_bytes: int, share: float) -> None:
        """The guest writes into so much of its disk."""
        rng = random.Random(99)
        places = rng.sample(range(0, size_bytes, _PIECE_BYTES), round(size_bytes * share / _PIECE_BYTES))
        for offset in places:
            self._host.write(vm, _NODE, offset, rng.randbytes(_PIECE_BYTES))

    def plain_client_s(self, vm: VmState, runs: int) -> float:
        """Median seconds of `ssh HOST cat` of the VM's disk; once before that, its hash is compared."""
        flat = f"{vm.folder}/{vm.name}-flat.vmdk"
        with open(self._host.path(flat), "rb") as file:
            expected = hashlib.file_digest(file, "sha256").hexdigest()
        with subprocess.Popen(self._host.ssh_command(f"cat '{flat}'"), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if hashlib.file_digest(process.stdout, "sha256").hexdigest() != expected:  # type: ignore[arg-type]
                raise CommandFailed("what 'ssh HOST cat' brought is not the disk")
        times_s = []
        for _ in range(runs):
            began_s = time.perf_counter()
            with subprocess.Popen(
                self._host.ssh_command(f"cat '{flat}'"), stdout=subprocess.PIPE, bufsize=0
            ) as process:
                assert process.stdout is not None
                while os.read(process.stdout.fileno(), MIB):
                    pass
            times_s.append(time.perf_counter() - began_s)
        return statistics.median(times_s)


def sha256_rate() -> float:
    """Bytes per second of one thread; the best of three."""
    data = random.Random(1).randbytes(32 * MIB)
    times_s = []
    for _ in range(3):
        began_s = time.perf_counter()
        hashlib.sha256(data).digest()
        times_s.append(time.perf_counter() - began_s)
    return len(data) / min(times_s)


def measure(work: Path, size_bytes: int, runs: int) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    machine = describe(str(work))
    disks = [work / "one.raw", work / "two.raw"]
    make_disk(disks[0], size_bytes, seed=1)
    make_disk(disks[1], size_bytes, seed=2, like=disks[0])
    data_bytes = len(_filled(disks[0])) * MIB
    with StandIn(work / "esx", release="8.0", locks=False) as host:
        host.add_datastore("datastore1")
        one, two = (
            host.add_vm(name, disks=[Disk(raw=str(disk))], running=True)
            for name, disk in zip(("one", "two"), disks, strict=True)
        )
        for disk in disks:
            disk.unlink()
        host.keep_references()
        bench = Bench(host, work)
        warm([host.path(vm.folder) for vm in (one, two)])
        cat_s = bench.plain_client_s(one, runs)
        through_agent, streamed = bench.repository("agent"), bench.repository("stream")
        moved = [
            bench.back_up("first", one, through_agent, "agent"),
            bench.unchanged(one, through_agent, "agent", runs),
        ]
        bench.change(one, size_bytes, 0.01)
        moved += [
            bench.back_up("1 % changed", one, through_agent, "agent"),
            bench.back_up("second VM", two, through_agent, "agent"),
            bench.back_up("first", one, streamed, "stream"),
            bench.unchanged(one, streamed, "stream", runs),
        ]
        cat_s = min(cat_s, bench.plain_client_s(one, runs))  # before and after: the machine's load changes
    return {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "size_bytes": size_bytes,
        "data_bytes": data_bytes,
        "cat_s": cat_s,
        "sha256_bytes_per_s": sha256_rate(),
        "moved": [asdict(each) | {"wire_bytes": each.wire_bytes} for each in moved],
    }


def section(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What docs/BENCHMARKS.md says of some results: Markdown, line by line."""
    for one in found:
        size, cat, sha256 = one["size_bytes"], one["size_bytes"] / one["cat_s"], one["sha256_bytes_per_s"]
        yield (
            f"A disk of {size / MIB:.0f} MiB, {one['data_bytes'] / MIB:.0f} MiB of it data, on the stand-in host on loopback and on the same cores "
            f"(`benchmarks/esxi_wire.py`; each restored disk is compared with the one at the snapshot). `ssh HOST cat` of it: {cat / 1e6:.0f} MB/s; "
            f"SHA-256 of the host's Python on one core: {sha256 / 1e6:.0f} MB/s; load at the end {one['machine']['load_after']:.1f}."
        )
        yield ""
        yield "| backup | via | over the wire | of the disk | new | command s | engine s | MB/s | of `cat` | of SHA-256 |"
        yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        for moved in one["moved"]:
            rate, data_rate = size / moved["engine_s"], one["data_bytes"] / moved["engine_s"]
            yield (
                f"| {moved['name']} | {moved['via']} | {moved['wire_bytes'] / MIB:.2f} MiB "
                f"| {moved['wire_bytes'] / size:.3%} | {moved['new_bytes'] / MIB:.1f} MiB "
                f"| {moved['wall_s']:.1f} | {moved['engine_s']:.2f} | {rate / 1e6:.0f} | {rate / cat:.0%} "
                f"| {data_rate / sha256:.0%} |"
            )
        yield ""
        yield (
            "MB/s are the disk's length by the engine's time; the share of SHA-256 counts the data alone, since holes are not hashed. Targets: a stream "
            "80 % of `cat`, the agent 60 % of SHA-256, an unchanged disk 0.1 % of its length on the wire."
        )
        yield ""


def main() -> int:
    """Prints the table; 1 if anything failed or differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=256, help="length of the disk")
    parser.add_argument("--runs", type=int, default=2, help="of what is repeated")
    add_places(parser)
    options = parser.parse_args()
    return run_alone(
        "esxi_wire", options, lambda folder: measure(folder, options.mib * MIB, options.runs), section
    )


if __name__ == "__main__":
    sys.exit(main())
