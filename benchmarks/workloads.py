"""The named workloads: which images, and what is done with them in which order.

A workload is data. A new kind of work is a new entry here, with whatever its steps need as further fields;
what a tool can not do is left out by its `Tool.steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.guests import DAY_0, DAY_1, OTHER

__all__ = ["WORKLOADS", "Step", "Workload"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that every tool does in turn.

    Args:
        image: file name of the disk that is backed up or restored.
        vm: whose disk it is.
        sized: the space that the repository takes is measured after the step.
    """

    name: str
    title: str
    action: Literal["backup", "restore", "check"]
    image: str = ""
    vm: str = ""
    sized: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """A sequence of steps on one repository for each tool.

    Args:
        tools: that it is meant for; see `benchmarks.tools.TOOLS`.
    """

    name: str
    title: str
    images: tuple[str, ...]
    steps: tuple[Step, ...]
    tools: tuple[str, ...]


_SEQUENCE = (
    Step("first", "first backup (vm1, day 0)", "backup", DAY_0, "vm1", sized=True),
    Step("changed", "backup of the changed image (vm1, day 1)", "backup", DAY_1, "vm1", sized=True),
    Step("other", "backup of another machine (vm2)", "backup", OTHER, "vm2", sized=True),
    Step("unchanged", "backup of the unchanged image, everything read", "backup", DAY_1, "vm1"),
    Step("restore", "restore of vm1, day 1", "restore", DAY_1, "vm1"),
    Step("check", "check with every stored byte read", "check"),
)
_OWN = ("holdfast", "holdfast aes256-gcm", "holdfast chacha20-poly1305", "holdfast 1 core")
_PEERS = ("borg fixed 1 MiB", "borg fixed 64 KiB", "borg default", "restic", "casync", "zstd", "cp")
_IMAGES = (DAY_0, DAY_1, OTHER)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "holdfast",
            "Holdfast alone: against its ceilings, encrypted, on one core",
            _IMAGES,
            _SEQUENCE,
            _OWN,
        ),
        Workload("peers", "side by side with other tools", _IMAGES, _SEQUENCE, (*_OWN, *_PEERS)),
        Workload(
            "duel",
            "side by side with Borg as the targets name it",
            _IMAGES,
            _SEQUENCE,
            ("holdfast", "borg fixed 1 MiB", "holdfast aes256-gcm", "holdfast 1 core"),
        ),
    )
}
