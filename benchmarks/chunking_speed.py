"""How fast each chunker cuts data that is in memory, on one core, side by side in one run.

    [LAB=FOLDER_OF_IMAGES] python benchmarks/chunking_speed.py

Data: 1 GiB from the middle of `vm1-d0.raw` where LAB has it, 256 MiB of random bytes, 256 MiB of zeros in
pages of their own. Segments of 16 MiB. Reported is the best of three passes in CPU time of the thread, so that
other work on the machine counts little; peers run over the same buffers with their fastest interface.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable

import numpy as np

from holdfast.chunker import PUBLISHED_SEED, ChunkerParams, make_chunker
from holdfast.chunker.aligned_plain import PlainAlignedChunker

SEGMENT_BYTES = 16 << 20
AVERAGE_BYTES = 64 << 10


def data_sets() -> dict[str, memoryview]:
    sets = {}
    path = os.path.join(os.environ.get("LAB", ""), "vm1-d0.raw")
    if os.path.exists(path):
        with open(path, "rb") as file:
            file.seek(1 << 30)
            sets["image"] = memoryview(file.read(1 << 30))
    rng = np.random.default_rng(1)
    sets["random"] = memoryview(rng.bytes(256 << 20))
    zeros = np.empty(256 << 20, np.uint8)
    zeros.fill(0)
    sets["zeros"] = memoryview(zeros)
    return sets


def chunkers() -> dict[str, Callable[[memoryview], object]]:
    found: dict[str, Callable[[memoryview], object]] = {
        "aligned (numpy)": make_chunker(ChunkerParams("aligned", AVERAGE_BYTES)).cut,
        "aligned (plain Python)": PlainAlignedChunker(AVERAGE_BYTES, PUBLISHED_SEED).cut,
        "fixed": make_chunker(ChunkerParams("fixed", AVERAGE_BYTES)).cut,
    }
    limits = {"min_size": AVERAGE_BYTES // 4, "avg_size": AVERAGE_BYTES, "max_size": AVERAGE_BYTES * 4}
    try:
        from pyfastcdc import FastCDC

        for normalization in (1, 2):
            library = FastCDC(**limits, normalized_chunking=normalization)
            found[f"pyfastcdc, normalization {normalization}"] = lambda view, library=library: [
                chunk.length for chunk in library.cut_buf(view)
            ]
    except ImportError:
        print("pyfastcdc is not installed", file=sys.stderr)
    try:
        import fastcdc

        found["fastcdc"] = lambda view: [chunk.length for chunk in fastcdc.fastcdc(view, **limits)]
    except ImportError:
        print("fastcdc is not installed", file=sys.stderr)
    return found


def rate(cut: Callable[[memoryview], object], data: memoryview) -> float:
    """Bytes per second of CPU time."""
    segments = [data[at : at + SEGMENT_BYTES] for at in range(0, len(data), SEGMENT_BYTES)]
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        for segment in segments:
            cut(segment)
        best = min(best, time.thread_time() - began)
    return len(data) / best


def main() -> None:
    sets = data_sets()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}")
    print(f"| GB/s on one core | {' | '.join(sets)} |\n|---|{'---|' * len(sets)}")
    for name, cut in chunkers().items():
        rates = [f"{rate(cut, data) / 1e9:.2f}" for data in sets.values()]
        print(f"| {name} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
