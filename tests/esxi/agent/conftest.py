"""Agents in processes of their own, started as a host's shell starts them, on every Python that is here."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.esxi.agent.bundle import bootstrap_command
from holdfast.esxi.agent_link import AgentLink


class Pipes:
    """A local process as the transport."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def read(self, limit_bytes: int) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.read(limit_bytes)

    def readinto(self, buffer: memoryview) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.readinto(buffer)

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[self.process.stdin.write(view) :]

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def close_streams(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def pythons() -> list[str]:
    """The oldest and newest of each minor version of Python 3 on this machine, this one first."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    roots = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    folders += [folder / "bin" for root in roots if root.is_dir() for folder in sorted(root.iterdir())]
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for folder in folders:
        for path in sorted(folder.glob("python3*")) if folder.is_dir() else ():
            if not re.fullmatch(r"python3(\.\d+)?", path.name) or ".pyenv/shims" in str(path):
                continue
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                say = "import sys; print('%d.%d' % sys.version_info[:2])"
                version = subprocess.run(
                    [path, "-c", say], capture_output=True, text=True, timeout=20, check=True
                ).stdout
                found.setdefault(version.strip(), str(path))
    return list(found.values())


PYTHONS = pythons()


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[AgentLink, Pipes]]]:
    """Starts an agent, and ends it after the test."""
    opened: list[Pipes] = []
    links: list[AgentLink] = []

    def run(python: str = sys.executable, before: str = "", **options: float) -> tuple[AgentLink, Pipes]:
        opened.append(Pipes(before + bootstrap_command(python)))
        links.append(AgentLink.start(opened[-1], **options))
        return links[-1], opened[-1]

    yield run
    for link in links:
        link.close()
    for pipes in opened:
        pipes.close()
        pipes.close_streams()


@pytest.fixture(params=PYTHONS, ids=lambda path: Path(path).parent.parent.name)
def each_python(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipes() -> Iterator[Callable[[str], Pipes]]:
    opened: list[Pipes] = []

    def run(command: str) -> Pipes:
        opened.append(Pipes(command))
        return opened[-1]

    yield run
    for one in opened:
        one.close()
        one.close_streams()
