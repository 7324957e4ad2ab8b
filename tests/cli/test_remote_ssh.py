"""Repositories over a real OpenSSH server: as users have them."""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.ssh.sshd import Sshd, public_part  # noqa: E402

FAR = f"{sys.executable} -m holdfast serve --stdio"

pytestmark = pytest.mark.skipif(shutil.which("sshd", path="/usr/sbin:/usr/bin") is None, reason="needs sshd")


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    with Sshd(tmp_path / "sshd") as server:
        config = tmp_path / "config"
        (config / "holdfast").mkdir(parents=True)
        shutil.copy(server.access.known_hosts, config / "holdfast" / "known_hosts")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
        monkeypatch.setenv("HOLDFAST_SSH_KEY", str(server.key))
        monkeypatch.setenv("HOLDFAST_REMOTE_COMMAND", FAR)
        yield server


def test_from_init_to_restore(holdfast: Any, sshd: Sshd, tmp_path: Path) -> None:
    disk = tmp_path / "web1.raw"
    disk.write_bytes(random.Random(1).randbytes(5_000_000))
    there = f"ssh://{sshd.address}{tmp_path}/repo"
    for words in (
        ["init"],
        ["backup", disk],
        ["check", "--read-data"],
        ["restore", "web1@latest", tmp_path / "out"],
    ):
        outcome = holdfast("-r", there, *words)
        assert outcome.code == 0, outcome.err
    assert (tmp_path / "out").read_bytes() == disk.read_bytes()
    outcome = holdfast("-r", f"127.0.0.1:{sshd.address.port}:{tmp_path}/repo", "list", "--json")
    assert (outcome.code == 0) == (sshd.address.user in ("", os.environ.get("USER", "root"))), outcome.err


def test_a_forced_command_decides_what_a_key_may_do(holdfast: Any, sshd: Sshd, tmp_path: Path) -> None:
    disk = tmp_path / "web1.raw"
    disk.write_bytes(random.Random(1).randbytes(500_000))
    inside = tmp_path / "inside"
    inside.mkdir()
    there = f"ssh://{sshd.address}{inside}/repo"
    assert holdfast("-r", there, "init").code == 0
    allowed = f"{FAR} --append-only --restrict {inside}"
    (tmp_path / "sshd" / "authorized_keys").write_text(
        f'restrict,command="{allowed}" {public_part(sshd.key)}\n'
    )
    assert holdfast("-r", there, "backup", disk).code == 0
    refused = holdfast("-r", there, "forget", "web1@latest")
    assert refused.code == 32
    assert "may only add" in refused.err
    assert holdfast("-r", f"ssh://{sshd.address}{tmp_path}/elsewhere", "list").code == 32


def test_a_connection_that_drops_in_mid_backup_is_reported_and_resumed(
    holdfast: Any, sshd: Sshd, tmp_path: Path
) -> None:
    disk = tmp_path / "web1.raw"
    disk.write_bytes(random.Random(1).randbytes(120_000_000))
    there = f"ssh://{sshd.address}{tmp_path}/repo"
    assert holdfast("-r", there, "init").code == 0
    dropped = threading.Event()

    def drop_when_some_has_come() -> None:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and not dropped.is_set():
            used = sum(path.stat().st_size for path in (tmp_path / "repo" / "packs").rglob("*.pack"))
            if used > 10_000_000:
                sshd.drop()
                dropped.set()
            time.sleep(0.01)

    thread = threading.Thread(target=drop_when_some_has_come)
    thread.start()
    broken = holdfast("-r", there, "backup", disk)
    dropped.set()
    thread.join()
    assert broken.code in (54, 57), broken.err
    resumed = holdfast("-r", there, "backup", disk)
    assert resumed.code == 0, resumed.err
    assert holdfast("-r", there, "check", "--read-data").code == 0
