"""What `holdfast host check` finds out about a host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.errors import KeyLimited
from holdfast.esxi.settling import consolidate, leftovers, settle_abandoned

if TYPE_CHECKING:
    from holdfast.cli.output import Json
    from holdfast.esxi.host import HostSession
    from holdfast.esxi.says.storage import Volume

__all__ = ["HostReport", "check_host"]

_SKEW_S: Final = 120
_LOW: Final = 0.05


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host is like.

    Args:
        version: empty if it could not be looked at; `python`, `clock_skew_s`, `volumes` and `vms` say nothing then.
        clock_skew_s: what it is ahead.
        volumes: those that hold VMs.
        restrict: the level of the agent that our key is limited to; empty if it has a shell.
        agent_present: whether that is the agent of this version.
    """

    name: str
    address: str
    version: str = ""
    python: str = ""
    clock_skew_s: int = 0
    volumes: tuple[Volume, ...] = ()
    vms: int = 0
    restrict: str = ""
    agent_present: bool = True
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Json]:
        """For programs."""
        return {
            "name": self.name,
            "address": self.address,
            "version": self.version,
            "python": self.python,
            "clock_skew_s": self.clock_skew_s,
            "datastores": [
                {
                    "name": v.name,
                    "uuid": v.uuid,
                    "kind": v.kind,
                    "size_bytes": v.size_bytes,
                    "free_bytes": v.free_bytes,
                }
                for v in self.volumes
            ],
            "vms": self.vms,
            "restrict": self.restrict,
            "agent_present": self.agent_present,
            "warnings": list(self.warnings),
        }


def check_host(session: HostSession, *, clean: bool, tell: Callable[[str], None]) -> HostReport:
    """Looks at a host, and cleans up if asked to.

    Args:
        tell: told what was cleaned up.
    """
    view, warnings = session.view, []
    try:
        level = session.level()
    except KeyLimited as error:
        return HostReport(
            session.name,
            str(session.record.address),
            restrict=session.record.restrict,
            agent_present=False,
            warnings=(f"{error.message}: nothing of it could be looked at; {error.hint}",),
        )
    if level != session.record.restrict:
        warnings.append(
            f"{session.name} has our key on level '{level}', not '{session.record.restrict}' as was agreed on: "
            "link it again, as you want it"
        )
    version = view.version()
    if version.major < 6 or (version.major, version.minor) < (6, 5):
        warnings.append(f"{session.name} runs ESXi {version}; 6.5 is the oldest that is meant to work")
    python = view.python()
    skew_s = round(view.clock_s() - time.time())
    if abs(skew_s) > _SKEW_S:
        warnings.append(
            f"the clock of {session.name} is off by {skew_s:+d} s: restore points carry this machine's time; set up NTP on the host"
        )
    volumes = tuple(
        v
        for v in view.volumes()
        if v.mounted and v.kind.upper().startswith(("VMFS-", "NFS", "VSAN")) and v.kind != "VMFS-L"
    )
    warnings += [
        f"the datastore {v.name or v.uuid} is nearly full: a snapshot may fill it while a backup runs"
        for v in volumes
        if v.size_bytes and v.free_bytes < v.size_bytes * _LOW
    ]
    vms = view.vms(warnings.append)
    if clean:
        warnings += settle_abandoned(session, tell)
        for vm in vms:
            if consolidate(session, vm):
                tell(f"consolidated the disks of {vm.shown}")
    for leftover in leftovers(session, vms):
        cure = "; 'holdfast host check --clean' puts that right" if leftover.ours and not clean else ""
        warnings.append(f"{leftover.text}{cure}")
    return HostReport(
        session.name,
        str(session.record.address),
        str(version),
        python,
        skew_s,
        volumes,
        len(vms),
        level,
        warnings=tuple(warnings),
    )
