"""Repositories on other hosts: bytes on the wire and rates, against `ssh HOST 'cat > file'` in the same run.

    python -m benchmarks.remote [--mib 512] [--runs 3] [--points 1000] [--clients 8] [--folder FOLDER] [--output FILE]

The other host is a real sshd on loopback, with one cipher for all; both sides share the cores of this machine. The command line is
measured as users run it, so that starting Python twice and the login are in every time. Data is noise: nothing of it is shared or
becomes smaller, so that every byte has to pass.

- copy: the source's packs through `ssh HOST 'cat > file'`, and the other way through `ssh HOST cat`: what the connection takes;
- push, pull: `holdfast replicate` of one restore point into an empty repository there, and from there into an empty one here;
- backup: `holdfast backup` of the same image into an empty repository there;
- slow links: the same through a proxy that delays each direction by half of the round trip and passes no more than the link's rate;
- bytes: what the proxy has passed in both directions with a push, beyond the records themselves; SSH's own part is in them;
- unchanged: a push between two repositories that hold the same restore points already;
- clients: backups of several clients at once into one repository there, against one client that has as much to store.

After each push, pull and backup the repository that was written is read completely (`check --read-data`), and the disk restored
from it is compared with the image; after each copy the files are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.measure import CommandFailed, compare_files, run, warm
from benchmarks.standalone import add_places, run_alone
from benchmarks.synthetic import Shape, make
from holdfast.cli.entry import run as run_here
from holdfast.repo.repository import Repository
from tests.repo.rig.slow_link import OneWay, Wire
from tests.ssh.sshd import Sshd, public_part

__all__ = ["Bench", "Clients", "Moved", "Unchanged", "main", "measure", "section"]

MIB = 1 << 20
CIPHER = "aes128-gcm@openssh.com"
ROUND_TRIP_S = 0.05
RATES = (0, 20_000_000, 100_000_000)
"""Of links, in bytes per second; 0 is loopback as it is."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What moving the same data in one way came to: medians.

    Args:
        what: copy-there, copy-here, push, pull or backup.
        link_bytes_per_s: rate of the link; 0 for loopback as it is.
        data_bytes: what had to pass: of the packs, or of the records that were missing.
        wire_bytes: what passed a proxy both ways; 0 where there was none.
    """

    what: str
    link_bytes_per_s: int
    data_bytes: int
    wall_s: float
    wire_bytes: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.data_bytes / self.wall_s


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A push that has nothing to do; `starts_s` is what starting the program twice and a login take without any repository."""

    points: int
    wire_bytes: int
    wall_s: float
    starts_s: float


@dataclass(frozen=True, slots=True)
class Clients:
    """Backups at once, and one of all that data; each client has `data_bytes` of its own."""

    count: int
    data_bytes: int
    together_s: float
    alone_s: float


class Proxy:
    """A port before that of the server: delays, limits and counts what passes. All connections share the rate, each way."""

    def __init__(self, port: int, round_trip_s: float, rate: int) -> None:
        self._ends: list[socket.socket] = []
        self._ways: list[OneWay] = []
        self._port, self._delay_s = port, round_trip_s / 2
        self._there, self._back = Wire(rate), Wire(rate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._ends += [client, server]
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink, wire in ((client, server, self._there), (server, client, self._back)):
                self._ways.append(OneWay(source.fileno(), os.dup(sink.fileno()), self._delay_s, wire))

    @property
    def passed_bytes(self) -> int:
        """In both directions, of all connections."""
        return sum(way.passed for way in self._ways)

    def close(self) -> None:
        """Ends all connections, and takes no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for end in self._ends:
            with contextlib.suppress(OSError):  # it has gone already
                end.shutdown(socket.SHUT_RDWR)
        for way in self._ways:
            for thread in way.threads:
                thread.join()
        for end in self._ends:
            end.close()


class Bench:
    """The other host, the image, and a repository here that holds it.

    Args:
        work: everything is put there.
        size_bytes: of the image.
    """

    def __init__(self, server: Sshd, work: Path, size_bytes: int) -> None:
        self._server, self._work = server, work
        self._number = 0
        self._config = work / "config" / "holdfast"
        self._config.mkdir(parents=True)
        self.know(server.port)
        self.image = make_image(work / "disk.raw", size_bytes, seed=1)
        self.source = str(work / "source")
        self.here("-r", self.source, "init")
        self.here("-r", self.source, "backup", str(self.image), "--vm", "bench")
        self._packs = work / "packs"
        with self._packs.open("wb") as file:
            for pack in sorted(Path(self.source, "packs").rglob("*")):
                if pack.is_file():
                    with pack.open("rb") as part:
                        shutil.copyfileobj(part, file)
        warm([self.source, str(self.image), str(self._packs)])

    @property
    def server_port(self) -> int:
        """Of the SSH server itself."""
        return self._server.port

    def know(self, port: int) -> None:
        """The server's keys are right for another port as well."""
        with (self._config / "known_hosts").open("a", encoding="ascii") as file:
            for key in self._server.host_keys.values():
                file.write(f"[127.0.0.1]:{port} {public_part(key)}\n")

    def holdfast(self, *arguments: str) -> str:
        """Runs the command line; what it said."""
        environment = {
            "XDG_CONFIG_HOME": str(self._work / "config"),
            "HOLDFAST_SSH_KEY": str(self._server.key),
            "HOLDFAST_REMOTE_COMMAND": f"{sys.executable} -m holdfast serve --stdio",
        }
        return run([sys.executable, "-m", "holdfast", *arguments], environment=environment, sync=False).output

    @staticmethod
    def here(*arguments: str) -> None:
        """The same in this process, for what is not measured and needs no other host."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run_here(arguments)
        if code:
            raise CommandFailed(f"exit code {code}: holdfast {' '.join(arguments)}\n{said.getvalue()}")

    def address(self, port: int, path: str) -> str:
        """Of a repository over there."""
        return f"ssh://{self._server.address.user}@127.0.0.1:{port}{path}"

    def _fresh(self, *, like: str = "") -> str:
        self._number += 1
        path = str(self._work / f"target{self._number}")
        self.here("-r", path, "init", *(["--like", like] if like else []))
        return path

    def _proven(self, repository: str) -> None:
        """Reads a repository, compares the disk that is restored from it, and removes it."""
        self.here("-r", repository, "check", "--read-data")
        restored = self._work / "restored.raw"
        self.here("-r", repository, "restore", "bench@latest", str(restored), "--as", "raw", "--overwrite")
        compare_files(str(restored), str(self.image))
        restored.unlink()
        shutil.rmtree(repository)

    def _all_proven(self, repository: str, images: Sequence[Path]) -> None:
        """Reads a repository, and compares each VM's disk."""
        self.here("-r", repository, "check", "--read-data")
        for image in images:
            restored = self._work / "restored.raw"
            self.here("-r", repository, "restore", f"{image.stem}@latest", str(restored), "--as", "raw")
            compare_files(str(restored), str(image))
            restored.unlink()

    def starts_s(self) -> float:
        """Seconds that starting the program here and there takes, with a login between."""
        began_s = time.perf_counter()
        self.holdfast("version")
        remote = f"{sys.executable} -m holdfast serve --stdio"
        subprocess.run([*self._ssh(self.server_port), remote], check=True, stdin=subprocess.DEVNULL)
        return time.perf_counter() - began_s

    def _ssh(self, port: int) -> list[str]:
        options = ["BatchMode=yes", f"UserKnownHostsFile={self._config / 'known_hosts'}"]
        words = [word for option in options for word in ("-o", option)]
        user = f"{self._server.address.user}@127.0.0.1"
        return ["ssh", "-F", "none", *words, "-i", str(self._server.key), "-p", str(port), user]

    def copy(self, port: int, *, there: bool) -> tuple[float, int]:
        """The packs through the plain client, into a file."""
        copy = self._work / "copied"
        command = f"cat > '{copy}'" if there else f"cat '{self._packs}'"
        with self._packs.open("rb") as source, copy.open("wb") as sink:
            began_s = time.perf_counter()
            subprocess.run(
                [*self._ssh(port), command],
                check=True,
                stdin=source if there else subprocess.DEVNULL,
                stdout=None if there else sink,
            )
            wall_s = time.perf_counter() - began_s
        compare_files(str(copy), str(self._packs))
        copy.unlink()
        return wall_s, self._packs.stat().st_size

    def replicate(self, port: int, *, push: bool) -> tuple[float, int]:
        """Into an empty repository, there or here."""
        target = self._fresh(like=self.source)
        words = (
            ("-r", self.source, "replicate", "--to", self.address(port, target))
            if push
            else ("-r", target, "replicate", "--from", self.address(port, self.source))
        )
        began_s = time.perf_counter()
        said = self.holdfast(*words, "--json")
        wall_s = time.perf_counter() - began_s
        self._proven(target)
        return wall_s, int(_summary(said)["stored_bytes"])

    def back_up(self, port: int) -> tuple[float, int]:
        """Into an empty repository there."""
        target = self._fresh()
        began_s = time.perf_counter()
        said = self.holdfast(
            "-r", self.address(port, target), "backup", str(self.image), "--vm", "bench", "--json"
        )
        wall_s = time.perf_counter() - began_s
        self._proven(target)
        return wall_s, int(_summary(said)["bytes_stored"])

    def unchanged(self, points: int, runs: int) -> Unchanged:
        """Two repositories with the same restore points."""
        source, target = self._work / "many", self._work / "many-there"
        for path in (source, target):
            with Repository.init(str(path)) as repository:
                repository_id = repository.config.id
            make(str(path), repository_id, Shape(1, points, 4, 1, 2, 2, chunks_per_leaf=8))
            self.here("-r", str(path), "list")  # makes the index if need be
        times_s, starts_s, passed = [], [], 0
        for number in range(runs + 1):
            with proxy(self, 0.0, 0) as link:  # the first one counts bytes
                port = link.port if number == 0 else self.server_port
                began_s = time.perf_counter()
                said = _summary(
                    self.holdfast(
                        *("-r", str(source), "replicate", "--to", self.address(port, str(target)), "--json")
                    )
                )
                if said["already"] != points or said["copied"]:
                    raise CommandFailed(f"of {points} points that are there, {said['already']} were found")
                if number:
                    times_s.append(time.perf_counter() - began_s)
                    starts_s.append(self.starts_s())
                else:
                    passed = link.passed_bytes
        return Unchanged(points, passed, statistics.median(times_s), statistics.median(starts_s))

    def clients(self, count: int, size_bytes: int) -> Clients:
        """Several at once, each with an image of its own, then one with an image as long as all of theirs."""
        images = [make_image(self._work / f"own{n}.raw", size_bytes, seed=n + 10) for n in range(count)]
        whole = make_image(self._work / "whole.raw", count * size_bytes, seed=9)
        warm([str(image) for image in [*images, whole]])

        def timed_s(some: Sequence[Path]) -> float:
            target = self._fresh()
            there = self.address(self.server_port, target)
            began_s = time.perf_counter()
            with ThreadPoolExecutor(len(some)) as pool:
                for _ in pool.map(
                    lambda image: self.holdfast("-r", there, "backup", str(image), "--vm", image.stem), some
                ):
                    pass
            wall_s = time.perf_counter() - began_s
            self._all_proven(target, some)
            return wall_s

        together_s, alone_s = timed_s(images), timed_s([whole])
        return Clients(count, size_bytes, together_s, alone_s)


@contextlib.contextmanager
def proxy(bench: Bench, round_trip_s: float, rate: int) -> Iterator[Proxy]:
    """A way to the server that is counted, and slow if need be."""
    link = Proxy(bench.server_port, round_trip_s, rate)
    bench.know(link.port)
    try:
        yield link
    finally:
        link.close()


def make_image(path: Path, size_bytes: int, seed: int) -> Path:
    """A raw disk of noise."""
    noise = random.Random(seed)
    with path.open("wb") as file:
        for at in range(0, size_bytes, MIB):
            file.write(noise.randbytes(min(MIB, size_bytes - at)))
    return path


def _summary(said: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def _works(bench: Bench) -> dict[str, Callable[[int], tuple[float, int]]]:
    return {
        "copy-there": lambda port: bench.copy(port, there=True),
        "copy-here": lambda port: bench.copy(port, there=False),
        "push": lambda port: bench.replicate(port, push=True),
        "pull": lambda port: bench.replicate(port, push=False),
        "backup": bench.back_up,
    }


def _moved(bench: Bench, runs: int, rate: int) -> Iterator[Moved]:
    """Every work over one link, one after the other in each round; medians of the rounds."""
    times_s: dict[str, list[float]] = {}
    data: dict[str, int] = {}
    wire: dict[str, int] = {}
    for _ in range(runs):
        for what, work in _works(bench).items():
            if rate == 0:
                wall_s, data[what] = work(bench.server_port)
            else:
                with proxy(bench, ROUND_TRIP_S, rate) as link:
                    wall_s, data[what] = work(link.port)
                    wire[what] = link.passed_bytes
            times_s.setdefault(what, []).append(wall_s)
    for what, walls_s in times_s.items():
        yield Moved(what, rate, data[what], statistics.median(walls_s), wire.get(what, 0))


def measure(
    work: Path, size_bytes: int, runs: int, points: int, clients: int, rates: Sequence[int] = RATES
) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    machine = describe(str(work))
    with Sshd(work / "sshd", extra=f"Ciphers {CIPHER}") as server:
        bench = Bench(server, work, size_bytes)
        moved = [each for rate in rates for each in _moved(bench, runs, rate)]
        unchanged = bench.unchanged(points, runs)
        at_once = bench.clients(clients, size_bytes // clients)
    return {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "cipher": CIPHER,
        "size_bytes": size_bytes,
        "runs": runs,
        "moved": [asdict(each) for each in moved],
        "unchanged": asdict(unchanged),
        "clients": asdict(at_once),
    }


def section(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What docs/BENCHMARKS.md says of some results: Markdown, line by line."""
    for one in found:
        moved = [Moved(**each) for each in one["moved"]]
        copies = {each.link_bytes_per_s: each for each in moved if each.what == "copy-there"}
        back = {each.link_bytes_per_s: each for each in moved if each.what == "copy-here"}
        yield (
            f"{one['size_bytes'] / MIB:.0f} MiB of noise, a real sshd on loopback, both sides on the same cores, cipher {one['cipher']}; medians of "
            f"{one['runs']} runs, starts of the programs and logins included (`benchmarks/remote.py`; what arrives is read and compared); load at "
            f"the end {one['machine']['load_after']:.1f}. Slow links have a round trip of {ROUND_TRIP_S * 1000:.0f} ms, by a proxy."
        )
        yield ""
        yield "| link | what | s | MB/s | of `ssh HOST cat` that way | of the link | on the wire beyond the data |"
        yield "|---|---|--:|--:|--:|--:|--:|"
        for each in moved:
            slow = each.link_bytes_per_s
            plain = (back if each.what in ("pull", "copy-here") else copies)[slow]
            yield (
                f"| {f'{slow / 1e6:.0f} MB/s' if slow else 'loopback'} | {each.what} | {each.wall_s:.2f} | {each.rate / 1e6:.0f} "
                f"| {each.rate / plain.rate:.0%} | {f'{each.rate / slow:.0%}' if slow else ''} "
                f"| {f'{each.wire_bytes / each.data_bytes - 1:.2%}' if slow else ''} |"
            )
        yield ""
        same, many = Unchanged(**one["unchanged"]), Clients(**one["clients"])
        yield (
            f"Nothing to do, {same.points} restore points on both sides: {same.wire_bytes / 1024:.0f} KiB on the wire (target 64), {same.wall_s:.2f} s "
            f"(target 1), of which starting the program here and there and the login alone take {same.starts_s:.2f} s."
        )
        total = many.count * many.data_bytes
        yield ""
        yield (
            f"{many.count} clients at once into one repository: {total / many.together_s / 1e6:.0f} MB/s together; one client with all of "
            f"their data: {total / many.alone_s / 1e6:.0f} MB/s (target: together no less than alone)."
        )
        yield ""
        yield (
            "Targets: push, pull and backup 70 % of the plain client over loopback, 60 % of the link's rate over slow links; 1 % on the wire beyond "
            "the records. One SSH connection has no more than 2 MiB under way, which bounds it by the round trip, whatever runs over it."
        )
        yield ""


def main() -> int:
    """Prints the table; 1 if anything failed or differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=512, help="length of the image")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    add_places(parser)
    options = parser.parse_args()
    return run_alone(
        "remote",
        options,
        lambda folder: measure(folder, options.mib * MIB, options.runs, options.points, options.clients),
        section,
    )


if __name__ == "__main__":
    sys.exit(main())
