"""A small VM, repositories, and two ways to run the command line: in this process, and as a real command."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.entry import run

sys.path.insert(0, str(Path(__file__).parents[1] / "repo"))  # `rig` makes disks

DISK_BYTES = 24 << 20
DAY_1, DAY_2 = "2026-11-21T02:00:00Z", "2026-11-22T02:00:00Z"

DESCRIPTOR = f"""# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=5a3c91e7
parentCID=ffffffff
createType="vmfs"

# Extent description
RW {DISK_BYTES // 512} VMFS "web1-flat.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "3"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.uuid = "60 00 C2 9b 41 d7 6e 05-8f 3a 12 c4 e0 77 a9 51"
ddb.virtualHWVersion = "19"
"""

VMX = """.encoding = "UTF-8"
displayName = "web1"
uuid.bios = "56 4d 8e 21 7a 90 4c 33-b2 15 f6 0d 48 ce 71 9a"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web1.vmdk"
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The JSON objects on stdout, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        """The last JSON object on stdout, which is a summary."""
        last = self.records[-1]
        assert last["type"] == "summary"
        return last

    @property
    def error(self) -> dict[str, Any]:
        """The JSON error on stderr."""
        last = json.loads(self.err.splitlines()[-1])
        assert last["type"] == "error"
        assert set(last) == {"type", "code", "message", "hint"}
        return last


Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's environment or configuration reaches a test."""
    for name in list(os.environ):
        if name.startswith("HOLDFAST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def holdfast(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def done(holdfast: Command) -> Command:
    """Runs a command in this process that must end well."""

    def call(*arguments: object) -> Outcome:
        outcome = holdfast(*arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        return outcome

    return call


@pytest.fixture
def program() -> Callable[..., list[str]]:
    """The command line of a real `holdfast` process."""

    def words(*arguments: object, options: Sequence[str] = ()) -> list[str]:
        return [sys.executable, *options, "-m", "holdfast", *(str(argument) for argument in arguments)]

    return words


@pytest.fixture
def execute(program: Callable[..., list[str]]) -> Command:
    """Runs a command as a process of its own, supervised as users have it."""

    def call(*arguments: object, options: Sequence[str] = (), **others: Any) -> Outcome:
        outcome = subprocess.run(
            program(*arguments, options=options),
            check=False,
            timeout=60,
            **({"capture_output": True, "text": True, "stdin": subprocess.DEVNULL} | others),
        )
        return Outcome(outcome.returncode, outcome.stdout or "", outcome.stderr or "")

    return call


def fill(path: Path, seed: int, size_bytes: int = DISK_BYTES) -> None:
    """A sparse file: some data at the beginning, in the middle, and nothing else."""
    data = random.Random(seed).randbytes(700_000)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        file.write(data[:400_000])
        file.seek(size_bytes // 2)
        file.write(data[400_000:])


@pytest.fixture(scope="session")
def vm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "web1"
    (folder / "logs").mkdir(parents=True)
    fill(folder / "web1-flat.vmdk", seed=1)
    (folder / "web1.vmdk").write_text(DESCRIPTOR)
    (folder / "web1.vmx").write_text(VMX)
    (folder / "web1.vmx").chmod(0o755)
    (folder / "web1.nvram").write_bytes(random.Random(2).randbytes(8684))
    (folder / "logs" / "vmware.log").write_text("2026-11-22 power on\n" * 50)
    os.utime(folder / "web1.nvram", ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    return folder


@pytest.fixture
def vm(vm_model: Path, tmp_path: Path) -> Path:
    """A VM's folder with one disk, to do with as one likes."""
    folder = tmp_path / "vms" / "web1"
    folder.parent.mkdir()
    subprocess.run(["cp", "--archive", "--sparse=always", vm_model, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def repository_model(vm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two restore points of the VM; its second day has one change in the disk and one in a file."""
    place = tmp_path_factory.mktemp("repository")
    second_day = place / "vm"
    subprocess.run(["cp", "--archive", "--sparse=always", vm_model, second_day], check=True)
    with (second_day / "web1-flat.vmdk").open("r+b") as file:
        file.seek(DISK_BYTES // 2)
        file.write(b"changed on the second day")
    (second_day / "web1.nvram").write_bytes(b"other settings")
    (second_day / "new.log").write_text("new\n")
    # as `no_settings` does, which is a fixture of each test
    settings = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    settings["XDG_CONFIG_HOME"] = str(place / "config")
    for words in (
        ["init"],
        ["backup", vm_model, "--time", DAY_1, "--label", "reason=nightly"],
        ["backup", second_day, "--time", DAY_2],
    ):
        subprocess.run(
            [sys.executable, "-m", "holdfast", "-r", place / "repo", *words],
            check=True,
            env=settings,
            stdout=subprocess.DEVNULL,
        )
    return place


@pytest.fixture
def repo(repository_model: Path, tmp_path: Path) -> Path:
    """A repository with two restore points, `web1@latest~1` and `web1@latest`, to do with as one likes."""
    shutil.copytree(repository_model / "repo", tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture
def empty_repo(tmp_path: Path, done: Command) -> Path:
    done("init", "-r", tmp_path / "empty")
    return tmp_path / "empty"


def same_bytes(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "--silent", a, b], check=False).returncode == 0


@pytest.fixture
def same() -> Callable[[Path, Path], bool]:
    """Whether two files, or two folders with all that is in them, are the same."""

    def compare(a: Path, b: Path) -> bool:
        if a.is_file():
            return same_bytes(a, b)
        return subprocess.run(["diff", "-r", a, b], check=False).returncode == 0

    return compare
