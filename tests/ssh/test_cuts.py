"""Replication over a real sshd, cut off at random bytes in every way: it always goes on, and little is sent twice.

What is cut: a connection is reset, or one of the processes is killed (SIGKILL): the near side, a far side, an ssh client; with one connection,
and with three of which one is hit. The copying is begun anew until it gets through. At the end of each such series both repositories are read completely, and the bytes
that have passed are compared with what there was to copy: a cut may cost the batch that was under way, and no more.

Some cuts with each run of the tests; a hundred with HOLDFAST_SOAK=1 (`make soak`). How many have met a replication at work is
counted.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.disks import machine_of

from holdfast.repo.backup import BackupOptions
from holdfast.repo.repository import InitOptions, Repository
from tests.ssh.sshd import Sshd, await_end, public_part

CUTS = 100 if os.environ.get("HOLDFAST_SOAK") else 8
DATA = 40 << 20
CHANGE = 16 << 20
SEGMENT = 1 << 20
BATCH = 16 * SEGMENT
"""What `--ack chunk` commits at once with one worker."""
OPENING = 128 << 10
"""At most, for each connection, of one that copies nothing: the login, the index's tables, the ids of points."""
OPTIONS = InitOptions(chunker="fixed", chunk_size_bytes=64 << 10, segment_bytes=SEGMENT, pack_bytes=8 << 20)


class Cutter:
    """A TCP proxy in front of an sshd. It counts what passes each way, and does something when so much has passed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._counting = threading.Lock()
        self.passed = [0, 0]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._way = self._at = self._armed = 0
        self._action: Callable[[], bool] = lambda: False
        self.done = False
        self._start(self._accept)

    def arm(self, way: int, after_bytes: int, action: Callable[[], bool]) -> None:
        """The next connections: when so many bytes have passed to the server (way 0) or from it (1), `action` is done."""
        self._armed = len(self._pairs)
        self.passed = [0, 0]
        self._way, self._at, self._action, self.done = way, after_bytes, action, False

    def reset(self) -> bool:
        """Both ends of the newest connection get a reset."""
        for end in self._pairs[-1]:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads, which closes it
        return True

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append((client, server))
                left = [2]
                number = len(self._pairs) - 1
                self._start(self._pump, number, 0, client, server, left)
                self._start(self._pump, number, 1, server, client, left)

    def _pump(
        self, number: int, way: int, source: socket.socket, sink: socket.socket, left: list[int]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._counting:
                    rest = self._at - self.passed[way]
                    if way == self._way and not self.done and rest <= len(data) and number >= self._armed:
                        sink.sendall(data[:rest])
                        self.passed[way] += rest
                        self.done = self._action()
                        data = data[rest:]
                    self.passed[way] += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        left[0] -= 1
        if not left[0]:
            source.close()
            sink.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)


class Site:
    """Everything of one test: a source with two points, an sshd, the proxy, and the next target."""

    def __init__(self, folder: Path, sshd: Sshd, chance: random.Random) -> None:
        self.folder, self.sshd, self.chance = folder, sshd, chance
        self.cutter = Cutter(sshd.port)
        config = folder / "config" / "holdfast"
        config.mkdir(parents=True)
        (config / "known_hosts").write_text(
            "".join(f"[127.0.0.1]:{self.cutter.port} {public_part(key)}\n" for key in sshd.host_keys.values())
        )
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("HOLDFAST_")} | {
            "XDG_CONFIG_HOME": str(folder / "config"),
            "HOLDFAST_SSH_KEY": str(sshd.key),
            "HOLDFAST_REMOTE_COMMAND": f"{sys.executable} -m holdfast serve --stdio",
        }
        self.source = folder / "source"
        self._make_source()
        self.near: subprocess.Popen[bytes] | None = None

    def _make_source(self) -> None:
        data = bytearray(self.chance.randbytes(DATA))
        with Repository.init(str(self.source), OPTIONS) as repository:
            for day in range(2):
                machine = machine_of([bytes(data)])
                repository.backup(machine, BackupOptions(time=1_700_000_000 + day))
                data[:CHANGE] = self.chance.randbytes(CHANGE)
            self.points = [point.id for point in repository.points()]
            self.stored_bytes = sum(row.live_bytes for row in repository._index().packs())

    def new_target(self, number: int) -> Path:
        path = self.folder / f"target{number}"
        with Repository.open(str(self.source)) as source:
            Repository.init(str(path), OPTIONS, like=source).close()
        return path

    def begin(self, target: Path, *, push: bool, streams: int) -> subprocess.Popen[bytes]:
        far = f"ssh://{self.sshd.address.user}@127.0.0.1:{self.cutter.port}"
        ends = (self.source, "--to", f"{far}{target}") if push else (target, "--from", f"{far}{self.source}")
        self.near = subprocess.Popen(
            [sys.executable, "-m", "holdfast", "-r", ends[0], "replicate", *ends[1:], "--ack", "chunk", "--workers", "1",
             "--parallel", str(streams)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        return self.near

    # --- ways to cut

    def kill_near(self) -> bool:
        assert self.near is not None
        return _kill([self.near.pid])

    def kill_ssh(self) -> bool:
        assert self.near is not None
        return self._kill_one([pid for pid in _below(self.near.pid) if _command(pid)[:1] == ["ssh"]])

    def kill_far(self) -> bool:
        return self._kill_one(self.far_sides())

    def _kill_one(self, pids: list[int]) -> bool:
        return bool(pids) and _kill([self.chance.choice(pids)])

    def far_sides(self) -> list[int]:
        return [pid for pid in _below(self.sshd.pid) if "serve" in _command(pid)[1:]]

    def check(self, target: Path) -> None:
        for path in (self.source, target):
            with Repository.open(str(path)) as repository:
                assert [point.id for point in repository.points()] == self.points
                report = repository.check(read_data=True)
                assert report.clean, report.findings


def _below(pid: int) -> list[int]:
    """The processes that a process has begun, by whichever of its threads, and theirs."""
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(word) for word in (task / "children").read_text().split()]
    return children + [one for child in children for one in _below(child)]


def _command(pid: int) -> list[str]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [os.path.basename(words[0]), *words[1:]]


def _kill(pids: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


@pytest.fixture
def site(tmp_path: Path, own_sshd: Sshd) -> Iterator[Site]:
    seed = int(os.environ.get("HOLDFAST_SEED", "0")) or random.randrange(1, 1 << 32)
    print(f"seed {seed}: HOLDFAST_SEED={seed}")
    site = Site(tmp_path, own_sshd, random.Random(seed))
    yield site
    if site.near is not None and site.near.poll() is None:
        site.near.kill()
        site.near.wait()
    site.cutter.close()


@pytest.mark.slow
def test_it_goes_on_wherever_it_is_cut(site: Site) -> None:
    ways = {"reset": site.cutter.reset, "near": site.kill_near, "far": site.kill_far, "ssh": site.kill_ssh}
    landed: Counter[str] = Counter()
    worst = total = series = 0
    while sum(landed.values()) < CUTS:
        series += 1
        assert series <= 2 * CUTS, f"of all that was tried, only {dict(landed)} met a replication at work"
        push, streams = series % 2 == 1, 3 if series % 4 > 1 else 1
        target = site.new_target(series)
        cuts, passed = 0, 0
        finished = False
        while not finished:
            what = min(ways, key=lambda way: (landed[way], site.chance.random()))
            left = max(BATCH, site.stored_bytes - passed)
            enough = sum(landed.values()) >= CUTS
            at = 1 << 60 if enough else site.chance.randrange(2000, left + OPENING)
            site.cutter.arm(0 if push else 1, at, ways[what])
            near = site.begin(target, push=push, streams=streams)
            said = near.communicate(timeout=60)[1].decode()
            passed += site.cutter.passed[0 if push else 1]
            finished = near.returncode == 0
            if finished:
                break
            assert site.cutter.done, said
            expected = {-signal.SIGKILL} if what == "near" else set(range(50, 60))
            assert near.returncode in expected, f"{what}: {near.returncode} {said}"
            landed[what] += 1
            cuts += 1
            if (
                site.chance.random() < 0.5
            ):  # else the next one comes while the last far side settles what it was sent
                assert not await_end(site.far_sides(), 30)
        site.check(target)
        twice = passed - site.stored_bytes - OPENING * (cuts + 1) * streams
        print(
            f"series {series}: {'push' if push else 'pull'} by {streams}, {cuts} cuts, {max(0, twice)} bytes sent twice"
        )
        assert twice <= cuts * BATCH, f"series {series}: {cuts} cuts cost {twice} bytes"
        total += max(0, twice)
        if cuts:
            worst = max(worst, twice // cuts)
    print(
        f"{dict(landed)}; {total / sum(landed.values()):.0f} bytes sent twice per cut, at most {worst} in a series"
    )
    assert len(landed) == len(ways)
