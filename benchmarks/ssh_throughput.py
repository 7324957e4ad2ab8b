"""How much OpenSSH's client and paramiko move over loopback, per cipher and number of connections.

    python -m benchmarks.ssh_throughput [--mib 256] [--runs 3]

A real sshd on 127.0.0.1 offers one cipher at a time. Every byte is hashed on both ends with SHA-256, and a run whose hashes differ
ends the benchmark. Beside the links stands `ssh HOST cat`, the plain client with a pipe, as the ceiling of the same run.
Both ends share this machine's cores, so a real network with two machines does better.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holdfast.ssh.link import Link, Patience
from holdfast.ssh.openssh import OpenSshLink, client_options
from holdfast.ssh.paramiko_link import ParamikoLink
from tests.ssh.sshd import Sshd

MIB = 1 << 20
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "chacha20-poly1305@openssh.com")
HASH_THERE = f"""{sys.executable} -c '
import hashlib, sys
print(hashlib.file_digest(sys.stdin.buffer.raw, "sha256").hexdigest(), end="")'"""  # sha256sum itself would be the limit
OPENERS: dict[str, Callable[..., Link]] = {"OpenSSH client": OpenSshLink, "paramiko": ParamikoLink}


def receive(link: Link, path: Path, expected: str) -> None:
    """Reads the file at the far end, and compares its hash."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(MIB))
    with link.start(f"cat '{path}'") as channel:
        while count := channel.readinto(buffer):
            digest.update(buffer[:count])
        assert channel.wait() == 0
    assert digest.hexdigest() == expected, "what arrived is not what was sent"


def send(link: Link, path: Path, expected: str) -> None:
    """Writes the file into a command at the far end that hashes it."""
    with link.start(HASH_THERE) as channel, path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(MIB))
        while count := file.readinto(buffer):
            channel.write(buffer[:count])
        channel.close_write()
        assert channel.read(64).decode() == expected, "what arrived is not what was sent"


def plain_client(server: Sshd, path: Path) -> None:
    """`ssh HOST cat`, hashed by nobody."""
    options = client_options(server.access, Patience())
    command = ["ssh", *options, "-p", str(server.port), f"{server.address.user}@127.0.0.1", f"cat '{path}'"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        while os.read(process.stdout.fileno(), MIB):
            pass
    assert process.returncode == 0


def rate(total_bytes: int, runs: int, work: Callable[[], None]) -> float:
    """Median MB/s of `work`."""
    times_s = []
    for _ in range(runs):
        started_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - started_s)
    return total_bytes / statistics.median(times_s) / 1e6


def processor_s() -> tuple[float, float]:
    """Processor seconds of this process so far, and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def several(links: list[Link], work: Callable[[Link], None]) -> Callable[[], None]:
    """All links at once, each in a thread."""

    def body() -> None:
        with ThreadPoolExecutor(len(links)) as pool:
            list(pool.map(work, links))

    return body


def rekeying(folder: Path, mib: int) -> None:
    """Both directions at once while the server re-keys every 4 MiB; says what happened."""
    block = os.urandom(MIB)
    for name, opener in OPENERS.items():
        with Sshd(folder / f"rekey-{opener.__name__}", extra="RekeyLimit 4M\nLogLevel DEBUG1") as server:
            sent, received = hashlib.sha256(), hashlib.sha256()
            with opener(server.address, server.access) as link, link.start("cat") as channel:

                def sending(channel: object = channel, sent: object = sent) -> None:
                    for _ in range(mib):
                        channel.write(block)  # type: ignore[attr-defined]
                        sent.update(block)  # type: ignore[attr-defined]
                    channel.close_write()  # type: ignore[attr-defined]

                thread = threading.Thread(target=sending)
                thread.start()
                while piece := channel.read(MIB):
                    received.update(piece)
                thread.join()
                channel.wait()
            assert sent.digest() == received.digest()
            exchanges = server.log().count("SSH2_MSG_KEXINIT received")
            print(f"{name}: {mib} MiB each way with {exchanges} key exchanges, intact", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ciphers", nargs="+", default=CIPHERS)
    options = parser.parse_args()
    size = options.mib * MIB
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        data = os.urandom(size)
        (folder / "data").write_bytes(data)
        expected = hashlib.sha256(data).hexdigest()
        del data
        print(
            "| cipher | link | connections | receive MB/s | send MB/s | own s/GB | client's s/GB |\n"
            "|---|---|--:|--:|--:|--:|--:|"
        )
        for cipher in options.ciphers:
            with Sshd(folder / cipher, extra=f"Ciphers {cipher}") as server:
                alone = rate(size, options.runs, lambda: plain_client(server, folder / "data"))
                print(f"| {cipher} | `ssh HOST cat` | 1 | {alone:.0f} | | | |", flush=True)
                for kind, opener in OPENERS.items():
                    if kind == "paramiko" and cipher.startswith("chacha"):
                        continue  # paramiko has no chacha20
                    for count in (1, 2) if cipher == CIPHERS[0] else (1,):
                        links = [opener(server.address, server.access) for _ in range(count)]
                        before = processor_s()
                        figures = [
                            rate(
                                size * count,
                                options.runs,
                                several(links, lambda link, work=work: work(link, folder / "data", expected)),
                            )
                            for work in (receive, send)
                        ]
                        moved_gb = size * count * 2 * options.runs / 1e9
                        own, client = ((b - a) / moved_gb for a, b in zip(before, processor_s(), strict=True))
                        print(
                            f"| {cipher} | {kind} | {count} | {figures[0]:.0f} | {figures[1]:.0f} "
                            f"| {own:.1f} | {client:.1f} |",
                            flush=True,
                        )
                        for link in links:
                            link.close()
        print()
        rekeying(folder, options.mib)


if __name__ == "__main__":
    main()
