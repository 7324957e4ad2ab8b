"""What benchmarks with a form of their own have in common when they run as a command: a clean environment, a folder, the table, the figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import CommandFailed

__all__ = ["add_places", "run_alone"]


def add_places(parser: argparse.ArgumentParser) -> None:
    """The options that `run_alone` looks at."""
    parser.add_argument("--folder", help="where it works (a temporary folder in it)")
    parser.add_argument("--output", help="write the figures there, as JSON")


def run_alone(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[Path], dict[str, Any]],
    section: Callable[[Sequence[dict[str, Any]]], Iterator[str]],
) -> int:
    """Measures in a folder that is removed afterwards, and prints the table; 1 if anything failed or differed.

    Args:
        section: what the report says of results, line by line.
    """
    for variable in [variable for variable in os.environ if variable.startswith("HOLDFAST_")]:
        del os.environ[variable]
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=options.folder) as folder:
        try:
            result = measure(Path(folder))
        except (CommandFailed, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    print(*section([result]), sep="\n", end="")
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
