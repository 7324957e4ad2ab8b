"""Names, parameters, and what a refused one says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from holdfast.chunker import (
    CHUNKER_NAMES,
    DEFAULT_CHUNKER_PARAMS,
    PUBLISHED_SEED,
    SEED_BYTES,
    ChunkerParams,
    make_chunker,
)
from holdfast.errors import UnsupportedFormat, UsageError

KIB = 1024


@pytest.mark.parametrize("name", CHUNKER_NAMES)
def test_each_name_makes_a_chunker_of_that_name(name: str) -> None:
    if name == "fastcdc":
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
    chunker = make_chunker(ChunkerParams(name, 64 * KIB))
    assert chunker.name == name
    assert chunker.lookahead_bytes > 0
    assert chunker.cut(memoryview(b"")) == []


def test_default() -> None:
    assert ChunkerParams("aligned", 64 * KIB) == DEFAULT_CHUNKER_PARAMS
    assert len(PUBLISHED_SEED) == SEED_BYTES


def test_unknown_name() -> None:
    with pytest.raises(UnsupportedFormat, match="'buzhash'"):
        make_chunker(ChunkerParams("buzhash", 64 * KIB))


@pytest.mark.parametrize(
    ("name", "smallest", "largest"),
    [
        ("aligned", 16 * KIB, 4096 * KIB),
        ("fixed", 4 * KIB, 16384 * KIB),
        ("fastcdc", 16 * KIB, 4096 * KIB),
    ],
)
def test_sizes(name: str, smallest: int, largest: int) -> None:
    for size in (0, -65536, 1, smallest - 1, smallest // 2, smallest + 1, 3 * smallest, largest * 2):
        with pytest.raises(UsageError, match=str(size)):
            make_chunker(ChunkerParams(name, size))
    if name == "fastcdc":
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
    for size in (smallest, largest):
        make_chunker(ChunkerParams(name, size))


def test_fastcdc_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyfastcdc", None)
    with pytest.raises(UnsupportedFormat, match="pyfastcdc"):
        make_chunker(ChunkerParams("fastcdc", 64 * KIB))


def test_import_brings_no_numpy() -> None:
    code = "import sys, holdfast.chunker, holdfast.chunker.splice, holdfast.chunker.fixed; print('numpy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_the_plain_chunker_runs_on_old_hosts() -> None:
    """Its text keeps to the grammar of Python 3.5 and to the standard library."""
    import ast
    from pathlib import Path

    import holdfast.chunker.aligned_plain as plain

    tree = ast.parse(Path(plain.__file__).read_text(encoding="utf-8"), feature_version=(3, 5))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported == {"bisect", "hashlib", "operator", "struct", "typing"}
    assert not any(isinstance(node, ast.JoinedStr | ast.AnnAssign) for node in ast.walk(tree))
