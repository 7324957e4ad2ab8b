"""Passwords and keys: where they come from, in which order, and what the key commands do."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.cli import passwords
from holdfast.cli.commands.key import parse_master_key
from holdfast.cli.invocation import Invocation
from holdfast.cli.settings import Settings
from holdfast.errors import UsageError, WrongPassword
from holdfast.repo import keys


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of a password is for attackers, not for these tests."""
    monkeypatch.setattr(keys, "SCRYPT_N", 1 << 4)


@pytest.fixture
def secret(tmp_path: Path, done, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("HOLDFAST_PASSWORD", "first")
    done("init", "-r", tmp_path / "secret", "--encryption", "aes256-gcm")
    monkeypatch.delenv("HOLDFAST_PASSWORD")
    return tmp_path / "secret"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("cipher", ["aes256-gcm", "chacha20-poly1305"])
def test_an_encrypted_repository_end_to_end(done, vm, tmp_path, same, monkeypatch, cipher: str) -> None:
    monkeypatch.setenv("HOLDFAST_REPOSITORY", str(tmp_path / "repo"))
    monkeypatch.setenv("HOLDFAST_PASSWORD", "päßword")
    out = done("init", "--encryption", cipher).out
    assert "holdfast key export" in out
    done("backup", vm)
    done("restore", "web1@latest", tmp_path / "back")
    assert same(vm, tmp_path / "back")
    done("check", "--read-data")
    data = b"".join(path.read_bytes() for path in (tmp_path / "repo").rglob("*") if path.is_file())
    assert b"web1" not in data
    assert b"power on" not in data


def test_without_the_right_password(holdfast, secret, vm, monkeypatch) -> None:
    for words in (
        ["list"],
        ["backup", vm],
        ["stats"],
        ["show", "x@latest"],
        ["key", "export"],
        ["key", "add"],
    ):
        outcome = holdfast("-r", secret, *words)
        assert outcome.code == 12
        assert "no password was given" in outcome.err
    monkeypatch.setenv("HOLDFAST_PASSWORD", "wrong")
    outcome = holdfast("-r", secret, "list", "--json")
    assert outcome.error["code"] == 12
    assert "hint" in outcome.error


def test_a_stranger_can_check_the_bytes(holdfast, done, secret, vm, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_PASSWORD", "first")
    done("backup", "-r", secret, vm)
    monkeypatch.delenv("HOLDFAST_PASSWORD")
    outcome = holdfast("-r", secret, "check", "--read-data")
    assert outcome.code == 0
    assert "note: no password was given" in outcome.out
    summary = holdfast("-r", secret, "check", "--read-data", "--json").summary
    assert summary["points"] == 0
    assert summary["bytes_verified"] > 0
    assert summary["notes"]


def test_sources_come_in_this_order(tmp_path, monkeypatch) -> None:
    file = written(tmp_path / "file", b"from the file\nsecond line\n")
    invocation = Invocation(settings=Settings(password_command="echo from the settings"))
    invocation.password_file = str(file)
    invocation.password_command = "echo from the command line"
    seen = []
    monkeypatch.setenv("HOLDFAST_PASSWORD", "from the environment")
    monkeypatch.setenv("HOLDFAST_PASSWORD_FILE", str(written(tmp_path / "other", b"from another file\r\n")))
    monkeypatch.setenv("HOLDFAST_PASSWORD_COMMAND", "printf 'from the other command'")
    for step in (
        "password_file",
        "password_command",
        "HOLDFAST_PASSWORD",
        "HOLDFAST_PASSWORD_FILE",
        "HOLDFAST_PASSWORD_COMMAND",
    ):
        source = passwords.current_password(invocation)
        assert source is not None
        seen.append(source())
        if step.islower():
            setattr(invocation, step, None)
        else:
            monkeypatch.delenv(step)
    source = passwords.current_password(invocation)
    assert source is not None
    assert [*seen, source()] == [
        "from the file", "from the command line", "from the environment", "from another file",
        "from the other command", "from the settings",
    ]  # fmt: skip
    assert passwords.current_password(Invocation()) is None


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HOLDFAST_PASSWORD_FILE", "/none", "No such file"),
        ("HOLDFAST_PASSWORD_FILE", "/", "Is a directory"),
        ("HOLDFAST_PASSWORD_FILE", "/dev/null", "empty first line"),
        ("HOLDFAST_PASSWORD_FILE", "/dev/zero", "longer than"),
        ("HOLDFAST_PASSWORD_COMMAND", "false", "exit code 1"),
        ("HOLDFAST_PASSWORD_COMMAND", "true", "empty first line"),
        ("HOLDFAST_PASSWORD_COMMAND", "/none/such", "No such file"),
        ("HOLDFAST_PASSWORD_COMMAND", "''", "can not be run"),
    ],
)
def test_sources_that_fail(holdfast, secret, monkeypatch, variable: str, value: str, said: str) -> None:
    monkeypatch.setenv(variable, value)
    outcome = holdfast("-r", secret, "list")
    assert outcome.code == 12
    assert said in outcome.err


def test_a_command_that_can_not_be_understood(holdfast, secret, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_PASSWORD_COMMAND", "echo 'unfinished")
    assert holdfast("-r", secret, "list").code == 2


def test_init_needs_a_password(holdfast, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(passwords, "at_terminal", lambda: False)
    outcome = holdfast("init", "-r", tmp_path / "r", "--encryption", "aes256-gcm")
    assert outcome.code == 2
    assert "HOLDFAST_PASSWORD_FILE" in outcome.err
    assert not (tmp_path / "r").exists()


class Typist:
    """Sits at the terminal."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def __call__(self, prompt: str) -> str:
        assert prompt.endswith(": ")
        return self.answers.pop(0)


@pytest.fixture
def typing(monkeypatch):
    def sit_down(*answers: str) -> Typist:
        typist = Typist(*answers)
        monkeypatch.setattr(passwords, "at_terminal", lambda: True)
        monkeypatch.setattr("getpass.getpass", typist)
        return typist

    return sit_down


def test_passwords_are_asked_for_at_a_terminal(holdfast, done, tmp_path, typing) -> None:
    repo = tmp_path / "r"
    typing("one", "other")
    assert "differ" in holdfast("init", "-r", repo, "--encryption", "aes256-gcm").err
    typing("")
    assert "empty" in holdfast("init", "-r", repo, "--encryption", "aes256-gcm").err
    assert not repo.exists()
    typist = typing("good", "good")
    done("init", "-r", repo, "--encryption", "aes256-gcm")
    assert typist.answers == []
    typing("good")
    done("list", "-r", repo)
    typing("bad", "good")
    outcome = holdfast("list", "-r", repo)
    assert outcome.code == 0
    assert "opens none" in outcome.err
    typist = typing("bad", "worse", "worst", "good")
    assert holdfast("list", "-r", repo).code == 12
    assert typist.answers == ["good"]
    typing("good", "new", "new")
    done("key", "add", "-r", repo)
    typing("new")
    done("list", "-r", repo)


def test_keys_are_added_changed_and_removed(holdfast, done, secret, tmp_path, monkeypatch) -> None:
    new = written(tmp_path / "new", b"second\n")
    monkeypatch.setenv("HOLDFAST_REPOSITORY", str(secret))
    monkeypatch.setenv("HOLDFAST_PASSWORD", "first")
    (first,) = done("key", "list", "--json").document["keys"]
    added = done("key", "add", "--new-password-file", new, "--label", "for ops", "--json").document["key"]
    assert added["label"] == "for ops"
    assert re.fullmatch("[0-9a-f]{16}", added["id"])
    listing = done("key", "list").out
    assert added["id"] in listing
    assert "for ops" in listing
    monkeypatch.setenv("HOLDFAST_PASSWORD", "second")
    done("list")
    monkeypatch.setenv("HOLDFAST_NEW_PASSWORD", "third")
    changed = done("key", "change-password", "--json").document["key"]
    assert changed["id"] != added["id"]
    assert holdfast("list").code == 12
    monkeypatch.setenv("HOLDFAST_PASSWORD", "third")
    done("list")
    assert done("key", "remove", first["id"][:6]).out == f"removed key {first['id']}\n"
    monkeypatch.setenv("HOLDFAST_PASSWORD", "first")
    assert holdfast("list").code == 12
    monkeypatch.setenv("HOLDFAST_PASSWORD", "third")
    outcome = holdfast("key", "remove", changed["id"])
    assert outcome.code == 2
    assert "the last key" in outcome.err
    assert holdfast("key", "remove", "ffff").code == 2
    assert holdfast("key", "remove", "").code == 2


def test_the_key_goes_out_and_comes_back(holdfast, done, secret, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_REPOSITORY", str(secret))
    monkeypatch.setenv("HOLDFAST_PASSWORD", "first")
    comment, key = done("key", "export").out.splitlines()
    assert comment.startswith("# Master key of the Holdfast repository ")
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert done("key", "export", "--json").document["master_key"] == key
    file = tmp_path / "key"
    done("key", "export", "--output", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == f"{comment}\n{key}\n"
    assert holdfast("key", "export", "--output", file).code == 33
    assert holdfast("key", "export", "--output", tmp_path / "none" / "key").code == 30
    # every password is lost
    monkeypatch.delenv("HOLDFAST_PASSWORD")
    monkeypatch.setenv("HOLDFAST_NEW_PASSWORD_FILE", str(written(tmp_path / "new", b"found again")))
    done("key", "import", file, "--label", "rescue")
    monkeypatch.setenv("HOLDFAST_PASSWORD", "found again")
    done("list")
    written(file, b"# another one\n" + b"00" * 32)
    outcome = holdfast("key", "import", file)
    assert outcome.code == 12
    assert "not that of this repository" in outcome.err
    for nonsense in (
        b"",
        b"# nothing\n",
        b"abc\n",
        b"00" * 33,
        b"00" * 32 + b"\n" + b"00" * 32,
        os.urandom(200),
    ):
        assert holdfast("key", "import", written(file, nonsense)).code == 2
    assert holdfast("key", "import", tmp_path / "none").code == 2


def test_an_exported_key_is_read_leniently() -> None:
    key = "ab" * 32
    assert parse_master_key(f"# comment\r\n\r\n  {key.upper()}  \r\n", "x") == bytes.fromhex(key)
    with pytest.raises(UsageError):
        parse_master_key(key[:-1], "x")


def test_keys_of_a_repository_without_encryption(holdfast, empty_repo, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_NEW_PASSWORD", "x")
    for words in (["list"], ["add"], ["remove", "x"], ["change-password"], ["export"]):
        outcome = holdfast("-r", empty_repo, "key", *words)
        assert outcome.code == 2
        assert "not encrypted" in outcome.err


def test_a_first_line_of_bytes_that_are_no_text(tmp_path) -> None:
    source = passwords.current_password(
        Invocation(password_file=str(written(tmp_path / "f", b"\xff\xfe\nx")))
    )
    assert source is not None
    assert source() == "\udcff\udcfe"
    with pytest.raises(WrongPassword):
        passwords.new_password(str(written(tmp_path / "g", b"\nx")))
