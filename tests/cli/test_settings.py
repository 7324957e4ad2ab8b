"""The configuration file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path, monkeypatch):
    def file(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        monkeypatch.setenv("HOLDFAST_CONFIG", str(path))
        return path

    return file


def test_where_it_is(done, repo) -> None:
    place = Path(os.environ["XDG_CONFIG_HOME"]) / "holdfast"
    place.mkdir()
    (place / "config.toml").write_text(f'repository = "{repo}"\n')
    assert len(done("list").out.splitlines()) == 3


def test_everything_else_comes_before_it(done, write, repo, monkeypatch) -> None:
    write('repository = "/nowhere"')
    monkeypatch.setenv("HOLDFAST_REPOSITORY", str(repo))
    done("list")
    monkeypatch.setenv("HOLDFAST_REPOSITORY", "/nowhere/else")
    done("list", "-r", repo)


def test_paths_are_relative_to_the_file(done, write, repo, monkeypatch) -> None:
    write('repository = "repo"\npassword-file = "none"\n')
    monkeypatch.chdir("/")
    done("list")
    monkeypatch.setenv("HOME", str(repo.parent))
    write('repository = "~/repo"')
    done("list")


def test_options_of_commands(done, write, empty_repo, tmp_path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    write(f'repository = "{empty_repo}"\n[backup]\nlabel = ["site=berlin", "reason=nightly"]\nworkers = 1\n')
    done("backup", disk)
    assert done("list", "--json").document["points"][0]["labels"] == {"site": "berlin", "reason": "nightly"}
    done("backup", disk, "--label", "reason=now", "--time", "2090-01-01T00:00:00Z")
    assert done("list", "--json").document["points"][1]["labels"] == {"reason": "now"}
    write(f'repository = "{empty_repo}"\n[backup]\nlabel = "one=1"\ndry-run = true\n')
    assert "nothing was stored" in done("backup", disk).out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("repo = '/x'", "unknown key 'repo'"),
        ("[backups]\nlabel = 'a=b'", "unknown table 'backups'"),
        ("[backup]\nlabels = 'a=b'", "unknown key 'labels'"),
        ("[backup]\nrepository = '/x'", "unknown key 'repository'"),
        ("[version]\nx = 1", "unknown table 'version'"),
        ("password = 'secret'", "must not hold a secret"),
        ("repository = 5", "is no text"),
        ("repository = ", "can not be understood"),
        ("\x00", "can not be understood"),
        ("[backup]\nworkers = 'many'", "--workers"),
        ("[backup]\nworkers = [1]", "wrong type"),
        ("[backup]\nworkers = 2026-01-01", "wrong type"),
        ("[backup]\nlabel = [['a=b']]", "wrong type"),
        ("[backup]\nlabel = 5", "label"),
    ],
)
def test_what_is_wrong_with_it_is_said(holdfast, write, empty_repo, tmp_path, text: str, said: str) -> None:
    write(text)
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    outcome = holdfast("-r", empty_repo, "backup", disk)
    assert outcome.code == 2
    assert said in outcome.err
    assert "secret" not in outcome.err.replace("must not hold a secret", "")


def test_a_secret_is_not_repeated(holdfast, write) -> None:
    write("password = 'hunter2'")
    outcome = holdfast("list")
    assert "hunter2" not in outcome.err
    assert "password_file" in outcome.err


def test_a_file_that_is_named_must_be_there(holdfast, done, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG", "/none")
    assert holdfast("list").code == 2
    done("version")
    monkeypatch.setenv("HOLDFAST_CONFIG", str(tmp_path))
    assert holdfast("list").code == 2


def test_a_repository_of_another_host_is_gone_to(holdfast, write, monkeypatch) -> None:
    monkeypatch.setenv("HOLDFAST_RSH", "false")  # which connects nobody
    for address in ("ssh://host/srv", "host:22:/srv"):
        write(f'repository = "{address}"')
        assert 50 <= holdfast("list").code <= 59
