"""`tools/setup`: quick when there is nothing to do, and plain about what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# what the script itself needs of a system, without Python and without the tools of the tests
BASE_TOOLS = ["sh", "dirname", "cat", "sed", "grep", "sha256sum", "rm"]


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> Path:
    """A project without .venv, in a system that has only `BASE_TOOLS` and a user other than root."""
    project = tmp_path / "project"
    (project / "tools").mkdir(parents=True)
    text = (root / "tools" / "setup").read_text(encoding="utf-8")
    assert "PATH=$PATH:/usr/sbin:/sbin\n" in text
    (project / "tools" / "setup").write_text(
        text.replace("PATH=$PATH:/usr/sbin:/sbin\n", ""), encoding="utf-8"
    )
    (project / "tools" / "setup").chmod(0o755)
    shutil.copy(root / "pyproject.toml", project)
    (tmp_path / "bin").mkdir()
    for name in BASE_TOOLS:
        found = shutil.which(name)
        assert found, name
        (tmp_path / "bin" / name).symlink_to(found)
    command(tmp_path, "id", "echo 1000")
    command(tmp_path, "apt-get", "echo 'apt-get must not run' >&2; exit 9")
    return tmp_path


def command(place: Path, name: str, body: str) -> None:
    path = place / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def tools(place: Path) -> set[str]:
    """The programs that the script looks for."""
    text = (place / "project" / "tools" / "setup").read_text(encoding="utf-8")
    body = text.partition("look_for_missing() {")[2].partition("\n}\n")[0]
    found = set(re.findall(r"\bhave ([\w.-]+)", body))
    assert {"mkfs.ext4", "qemu-img", "sshd"} <= found
    return found


def run_setup(place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [place / "project" / "tools" / "setup"],
        env={"PATH": str(place / "bin")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_takes_no_time_when_all_is_there(root: Path) -> None:
    if not (root / ".venv" / "setup.stamp").exists():
        pytest.skip("needs .venv as tools/setup makes it; this run uses another environment")
    spent_s = []
    for _ in range(3):
        before = os.times()
        outcome = subprocess.run([root / "tools" / "setup"], capture_output=True, text=True, check=True)
        after = os.times()  # of processors: how long it takes depends on what else the machine does
        spent_s.append(sum(after[2:4]) - sum(before[2:4]))
        assert outcome.stdout == ""
    assert min(spent_s) < 0.2


def test_names_what_is_missing_and_the_command_that_brings_it(bare: Path) -> None:
    outcome = run_setup(bare)
    assert outcome.returncode == 1
    assert "apt-get must not run" not in outcome.stderr
    install = next(line for line in outcome.stderr.splitlines() if "apt-get install" in line)
    for package in ("python3", "python3-venv", "e2fsprogs", "qemu-utils", "openssh-client", "openssh-server"):
        assert package in install.split()
    assert not (bare / "project" / ".venv").exists()


def test_names_only_what_is_missing(bare: Path) -> None:
    for name in tools(bare) - {"qemu-img"}:
        command(bare, name, "exit 0")
    command(bare, "python3", "exit 0")  # of the right age, and able to make virtual environments
    outcome = run_setup(bare)
    assert outcome.returncode == 1
    install = next(line for line in outcome.stderr.splitlines() if "apt-get install" in line)
    assert install.split()[-2:] == ["--no-install-recommends", "qemu-utils"]


def test_an_old_python_is_not_taken(bare: Path) -> None:
    for name in tools(bare):
        command(bare, name, "exit 0")
    command(bare, "python3", '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0; exit 1')
    command(bare, "apt-cache", '[ "$3" = python3 ] && echo "Version: 3.9.2-3"; exit 0')
    outcome = run_setup(bare)
    assert outcome.returncode == 1
    assert "This machine has Python 3.9.2" in outcome.stderr
    assert "python3.11-venv" in outcome.stderr


def test_says_which_packages_without_apt(bare: Path) -> None:
    os.unlink(bare / "bin" / "apt-get")
    outcome = run_setup(bare)
    assert outcome.returncode == 1
    assert "e2fsprogs" in outcome.stderr
    assert "apt-get update" not in outcome.stderr
