"""`link`: a key for repositories, given once and limited, against a real SSH server that takes passwords."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.ssh.password_server import PASSWORD, PasswordServer
from tests.ssh.sshd import Sshd


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PasswordServer]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOLDFAST_HOST_PASSWORD", PASSWORD)
    monkeypatch.delenv("HOLDFAST_RSH", raising=False)
    with PasswordServer(tmp_path / "far") as one:
        yield one


def fingerprint(server: PasswordServer) -> str:
    return f"SHA256:{server.host_key.fingerprint.removeprefix('SHA256:')}"


def test_a_linked_key_reaches_one_folder_and_nothing_else(
    server: PasswordServer,
    tmp_path: Path,
    done: Callable[..., Any],
    holdfast: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, outside = tmp_path / "in side", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    program = f"{sys.executable} -m holdfast"
    link = ("link", server.address, "--restrict", inside, "--program", program)
    done(*link, "--fingerprint", fingerprint(server))
    (line,) = server.authorized_keys.read_text().splitlines()
    assert line.startswith('restrict,command="')
    assert server.passwords == [PASSWORD]
    # what it has made, with an sshd that can do more than take passwords
    known_hosts = tmp_path / "config" / "holdfast" / "known_hosts"
    (key,) = (path for path in (known_hosts.parent / "repository-keys").iterdir() if path.suffix != ".pub")
    monkeypatch.setenv("HOLDFAST_SSH_KEY", str(key))
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"content" * 1000)
    known = known_hosts.read_text()
    with Sshd(tmp_path / "sshd") as sshd:
        far = f"ssh://{sshd.address}"
        sshd.know(known_hosts)
        sshd.authorized_keys.write_text(f"{line}\n")
        done("init", "-r", f"{far}{inside}/repo")
        assert holdfast("init", "-r", f"{far}{outside}/repo").code == 32
        # linked again, it may do less
        known_hosts.write_text(known)
        done(*link, "--append-only")
        (line,) = server.authorized_keys.read_text().splitlines()
        sshd.know(known_hosts)
        sshd.authorized_keys.write_text(f"{line}\n")
        done("backup", "-r", f"{far}{inside}/repo", disk)
        assert holdfast("forget", "-r", f"{far}{inside}/repo", "disk@latest").code == 32
    known_hosts.write_text(known)
    # and removed, it is gone on both sides
    assert Path(done("link", server.address, "--remove", "--json").document["key"]) == key
    assert server.authorized_keys.read_text() == ""
    assert not list(key.parent.iterdir())
    assert holdfast("link", server.address, "--remove").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("nas.example", "--restrict", "/srv"),
        ("me@nas.example",),
        ("me@nas.example", "--restrict", "srv"),
        ("me@nas.example", "--restrict", "/srv", "--append-only", "--read-only"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], holdfast: Callable[..., Any]) -> None:
    assert holdfast("link", *words).code == 2


def test_a_host_that_is_not_confirmed_gets_nothing(
    server: PasswordServer, tmp_path: Path, holdfast: Callable[..., Any]
) -> None:
    assert holdfast("link", server.address, "--restrict", tmp_path).code == 52
    wrong = holdfast("link", server.address, "--restrict", tmp_path, "--fingerprint", "SHA256:other")
    assert (wrong.code, server.users, server.passwords) == (52, [], [])
