"""What a stand-in is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

RELEASES = ("7.0", "8.0")


@dataclass(frozen=True, slots=True)
class Options:
    """Passed from the process that wants a stand-in to the stand-in's first process."""

    folder: str
    release: str = "8.0"
    port: int = 0
    name: str = "esx1"
    locks: bool = True
    """Whether locked files refuse to open; without, the datastores are reached without a view in between."""
    seed: int = 1
