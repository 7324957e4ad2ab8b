"""A stand-in host that is linked, a repository, and the `holdfast` command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.esxi_host import StandIn


@dataclass
class Desk:
    """Somebody at a terminal: a configuration folder, a repository, a linked host.

    Args:
        host: the stand-in.
    """

    host: StandIn
    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "repo"

    @property
    def config(self) -> Path:
        return self.folder / "config" / "holdfast"

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
        return (
            kept
            | {
                "XDG_CONFIG_HOME": str(self.folder / "config"),
                "XDG_STATE_HOME": str(self.folder / "state"),
                "HOLDFAST_REPOSITORY": str(self.repository),
            }
            | more
        )

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "holdfast", *arguments],
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *arguments: str, code: int | tuple[int, ...] = 0, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command that ended with that code, or one of these."""
        codes = code if isinstance(code, tuple) else (code,)
        with self.start(*arguments, **more) as process:
            out, err = process.communicate(timeout=240)
        assert process.returncode in codes, f"{arguments} ended with {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The last JSON line that the command printed."""
        return json.loads(self.run(*arguments, "--json", code=code).stdout.splitlines()[-1])

    def fingerprint(self) -> str:
        """What the host's key is like, as its console would say."""
        from holdfast.ssh.address import Address
        from holdfast.ssh.exchange import fetch_host_key
        from holdfast.ssh.known_hosts import KnownHosts

        address = Address("127.0.0.1", "root", self.host.port)
        return fetch_host_key(address, KnownHosts(str(self.folder / "none"))).fingerprint

    def link(self, name: str = "esx1", *options: str) -> None:
        address = f"root@127.0.0.1:{self.host.port}"
        self.run(
            "host",
            "add",
            name,
            address,
            "--fingerprint",
            self.fingerprint(),
            *options,
            HOLDFAST_HOST_PASSWORD=self.host.password,
        )

    def restored(self, point: str, disk: str, to: str = "raw") -> Path:
        """A disk of a restore point as a raw image."""
        target = self.folder / f"{to}.raw"
        self.run("restore", point, str(target), "--disk", disk, "--as", "raw", "--overwrite")
        return target

    def logs(self) -> list[Path]:
        """The logs of runs, oldest first."""
        return sorted((self.folder / "state" / "holdfast" / "logs").glob("*.log"))

    def owed(self) -> list[str]:
        """Files of the journal of runs."""
        runs = self.config / "runs"
        return sorted(os.listdir(runs)) if runs.exists() else []


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A linked stand-in without VMs, and an empty repository."""
    if os.geteuid() != 0:
        pytest.skip("the stand-in host needs root")
    from tests.esxi_host import StandIn

    with StandIn(tmp_path / "esx", release="8.0") as host:
        host.add_datastore("datastore1")
        at = Desk(host, tmp_path)
        at.run("init")
        at.link()
        yield at
