"""The project's own rules, as far as a machine can hold them. Quick: a part of `make check`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE_LIMIT_BYTES = 1 << 20
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def modules(root: Path) -> list[Path]:
    return sorted((root / "holdfast").rglob("*.py"))


def test_there_are_modules_to_look_at(root: Path) -> None:
    assert len(modules(root)) > 5


def test_every_module_opens_with_its_idea(root: Path) -> None:
    silent = []
    for path in modules(root):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring or len(docstring.split()) < 3:
            silent.append(path.relative_to(root))
    assert not silent, f"without a docstring that says something: {silent}"


def test_no_module_has_a_name_that_says_nothing(root: Path) -> None:
    folders = [path for path in (root / "holdfast").rglob("*") if path.is_dir()]
    vague = [path for path in [*modules(root), *folders] if path.stem.strip("_") in VAGUE_NAMES]
    assert not vague


def test_no_unfinished_business_in_the_package(root: Path) -> None:
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in modules(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if mark.search(line)
    ]
    assert not found


def test_packages_are_packages(root: Path) -> None:
    """A folder of modules without `__init__.py` would be left out of the wheel."""
    folders = {path.parent for path in modules(root)}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_no_test_module_is_hidden_from_pytest(root: Path) -> None:
    """A file of tests that pytest does not collect by its name is worse than none."""
    hidden = [
        path.relative_to(root)
        for path in (root / "tests").rglob("*.py")
        if not path.name.startswith("test_")
        and re.search(r"^(async )?def test_", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not hidden


def test_files_in_git_are_small(root: Path, tracked: list[Path]) -> None:
    large = [(path.relative_to(root), path.stat().st_size) for path in tracked]
    assert not [entry for entry in large if entry[1] >= FILE_LIMIT_BYTES]


def test_texts_in_git_are_clean(root: Path, tracked: list[Path]) -> None:
    """UTF-8, Unix line ends, no blanks at line ends, one line end at the end."""
    kinds = {".py", ".md", ".toml", ".sh", ".cfg", ".yml", ".yaml"}
    unclean = []
    for path in tracked:
        if path.suffix not in kinds and path.name not in {"Makefile", "run", "setup"}:
            continue
        text = path.read_bytes().decode("utf-8")
        if "\r" in text or re.search(r"[ \t]+$", text, re.MULTILINE) or (text and text[-1:] != "\n"):
            unclean.append(path.relative_to(root))
    assert not unclean


def test_scripts_can_be_run_and_parse(root: Path, tracked: list[Path]) -> None:
    scripts = [path for path in tracked if path.read_bytes()[:2] == b"#!"]
    assert {"tools/setup", "demo/run", ".ci/run"} <= {str(path.relative_to(root)) for path in scripts}
    for path in scripts:
        assert os.access(path, os.X_OK), f"{path} starts with #! but is not executable"
        shell = re.match(rb"#!.*\b(sh|bash)$", path.read_bytes().splitlines()[0])
        if shell:
            subprocess.run([shell[1].decode(), "-n", path], check=True)


def test_the_package_declares_itself_typed(root: Path) -> None:
    assert (root / "holdfast" / "py.typed").exists()


def test_links_between_documents_lead_somewhere(root: Path, tracked: list[Path]) -> None:
    broken = [
        (str(path.relative_to(root)), target)
        for path in tracked
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not broken


def test_exit_codes_are_documented_as_they_are(root: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "tools/exit_codes.py"], cwd=root, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


def test_messages_are_documented_as_they_are(root: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "tools/protocol.py"], cwd=root, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("group", "codes"),
    [
        ("UsageError", range(2, 3)),
        ("RepositoryError", range(10, 20)),
        ("IntegrityError", range(20, 30)),
        ("StorageError", range(30, 40)),
        ("SourceError", range(40, 50)),
        ("LinkError", range(50, 60)),
        ("GuestError", range(60, 70)),
    ],
)
def test_errors_keep_to_the_codes_of_their_group(group: str, codes: range) -> None:
    from holdfast import errors

    pending = [getattr(errors, group)]
    while pending:
        error = pending.pop()
        assert error.exit_code in codes, error
        assert error.exit_code in errors.EXIT_CODES
        pending.extend(error.__subclasses__())
