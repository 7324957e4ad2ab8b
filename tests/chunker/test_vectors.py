"""Cut points are part of the repository format: these never change.

A failure here means that backups would no longer find their own chunks. The remedy is never to write the
file anew: it is to undo the change, or to give the changed chunker a new name.
(`python tests/chunker/test_vectors.py` prints what the current code makes of the test data, for a new name.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest

from holdfast.chunker import PUBLISHED_SEED, ChunkerParams, make_chunker
from holdfast.chunker.aligned_plain import PlainAlignedChunker, multipliers

FILE = Path(__file__).with_name("vectors.json")
SEEDS = {"published": PUBLISHED_SEED, "secret": hashlib.sha256(b"a secret").digest()}
SIZES = {
    "aligned": [16, 32, 64, 128, 1024, 4096],
    "fixed": [4, 64, 1024, 16384],
    "fastcdc": [16, 64, 1024],
}
WRITTEN_OUT = 120
"""So many cuts of each list are in the file; all are in its hash."""


def data(disk: Any) -> bytes:
    return disk("vectors", (6 << 20) + 1234)  # type: ignore[no-any-return]


def digest(parts: list[int]) -> str:
    return blake3.blake3(",".join(map(str, parts)).encode()).hexdigest()


def vectors(disk: Any) -> Iterator[dict[str, Any]]:
    view = memoryview(data(disk))
    for name, sizes in SIZES.items():
        for kib in sizes:
            for seed_name, seed in SEEDS.items():
                parts = make_chunker(ChunkerParams(name, kib << 10), seed).cut(view)
                yield {
                    "chunker": name,
                    "chunk_size_bytes": kib << 10,
                    "seed": seed_name,
                    "count": len(parts),
                    "blake3": digest(parts),
                    "parts": parts[:WRITTEN_OUT],
                }


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


def test_the_data_is_the_same(disk: Any) -> None:
    assert blake3.blake3(data(disk)).hexdigest() == stored()["data_blake3"]


def test_seeds_and_multipliers() -> None:
    assert {name: seed.hex() for name, seed in SEEDS.items()} == stored()["seeds"]
    for name, seed in SEEDS.items():
        assert [f"{weight:016x}" for weight in multipliers(seed)] == stored()["multipliers"][name]


@pytest.mark.parametrize(
    "vector", stored()["vectors"], ids=lambda v: f"{v['chunker']}-{v['chunk_size_bytes']}-{v['seed']}"
)
def test_cuts(vector: dict[str, Any], disk: Any) -> None:
    if vector["chunker"] == "fastcdc":
        pytest.importorskip("pyfastcdc", reason="needs pyfastcdc (holdfast[fastcdc])")
    view = memoryview(data(disk))
    size, seed = vector["chunk_size_bytes"], SEEDS[vector["seed"]]
    chunkers = [make_chunker(ChunkerParams(vector["chunker"], size), seed).cut]
    if vector["chunker"] == "aligned":
        chunkers.append(PlainAlignedChunker(size, seed).cut)
    for cut in chunkers:
        parts = cut(view)
        assert parts[:WRITTEN_OUT] == vector["parts"]
        assert len(parts) == vector["count"]
        assert digest(parts) == vector["blake3"]


def test_every_chunker_and_seed_has_a_vector() -> None:
    assert {(v["chunker"], v["chunk_size_bytes"] >> 10, v["seed"]) for v in stored()["vectors"]} == {
        (name, kib, seed) for name, sizes in SIZES.items() for kib in sizes for seed in SEEDS
    }


def main() -> None:
    spec = importlib.util.spec_from_file_location("chunker_conftest", FILE.with_name("conftest.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = {
        "what": "frozen cut points; see test_vectors.py",
        "data_blake3": blake3.blake3(data(module.disk_bytes)).hexdigest(),
        "seeds": {name: seed.hex() for name, seed in SEEDS.items()},
        "multipliers": {name: [f"{w:016x}" for w in multipliers(seed)] for name, seed in SEEDS.items()},
        "vectors": list(vectors(module.disk_bytes)),
    }
    lines = json.dumps(document, indent=1)
    # One line for each list: a change shows as one.
    compact = []
    for line in lines.split("\n"):
        if compact and compact[-1].endswith(("[", ",")) and line.strip().rstrip(",").lstrip("-").isdigit():
            compact[-1] += line.strip()
        else:
            compact.append(line)
    sys.stdout.write("\n".join(compact) + "\n")


if __name__ == "__main__":
    main()
