"""`import holdfast`: small, typed, quick; and the other ways to start the command."""

from __future__ import annotations

import subprocess
import sys

import pytest

import holdfast
from holdfast.errors import PointNotFound


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=60)


def test_everything_that_is_promised_is_there() -> None:
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None
        assert name in dir(holdfast)
    assert set(holdfast._PLACES) == set(holdfast.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="nonsense"):
        holdfast.nonsense  # noqa: B018


def test_importing_it_loads_nothing_else() -> None:
    outcome = python(
        "-c", "import holdfast, sys; print([m for m in sys.modules if m.startswith('holdfast.')])"
    )
    assert outcome.stdout == "[]\n"


def test_the_example_of_the_package(tmp_path, vm) -> None:
    repo = str(tmp_path / "repo")
    holdfast.Repository.init(repo).close()
    with holdfast.Repository.open(repo) as repository:
        machine = holdfast.open_machine(str(vm))
        summary = repository.backup(machine, holdfast.BackupOptions(labels={"reason": "nightly"}))
        machine.close()
        assert summary.bytes_new > 0
        with repository.open_disk("web1@latest", "web1.vmdk") as disk:
            assert disk.read(512) == (vm / "web1-flat.vmdk").read_bytes()[:512]
        (point,) = repository.points()
        assert dict(point.manifest.labels) == {"reason": "nightly"}
        with pytest.raises(PointNotFound):
            repository.resolve("nope@latest")


def test_without_assertions(execute, repo, vm, tmp_path, same) -> None:
    """`python -O` removes assertions; nothing may depend on them."""
    optimised = ("-O",)
    assert execute("backup", "-r", repo, vm, options=optimised).code == 0
    assert execute("restore", "-r", repo, "web1@latest", tmp_path / "back", options=optimised).code == 0
    assert same(vm, tmp_path / "back")
    assert execute("check", "-r", repo, "--read-data", options=optimised).code == 0


def test_as_a_module_it_is_the_command(execute) -> None:
    outcome = execute("version")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"holdfast {holdfast.__version__} ")
    assert execute("--help").out.startswith("Usage: holdfast ")


def test_version_loads_none_of_the_engine() -> None:
    code = (
        "import sys; from holdfast.cli.entry import run; run(['version']); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'numpy', 'lmdb', 'rich', 'zstandard', 'blake3', 'cryptography', 'xxhash', 'subprocess', 'tomllib'}))"
    )
    assert python("-c", code).stdout.splitlines()[1] == "[]"
