"""What `holdfast host check` finds out about a host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from holdfast.errors import KeyLimited, SourceError
from holdfast.esxi.settling import consolidate, leftovers, settle_abandoned

if TYPE_CHECKING:
    from holdfast.cli.output import Json
    from holdfast.esxi.host import HostSession
    from holdfast.esxi.says.limits import License, SshdLimits
    from holdfast.esxi.says.storage import Volume

__all__ = ["HostReport", "check_host"]

_SKEW_S: Final = 120
_LOW: Final = 0.05


@dataclass(frozen=True, slots=True)
class HostAllows:
    """What a host lets us do, as far as it tells.

    Args:
        licenses: empty if it tells none.
        sshd: None if it does not tell.
        shell_open_s: SSH is switched off that long after it was switched on; 0 for never.
        shell_idle_s: a shell that somebody types at is ended after that; 0 for never.
    """

    licenses: tuple[License, ...] = ()
    sshd: SshdLimits | None = None
    shell_open_s: int | None = None
    shell_idle_s: int | None = None

    def as_json(self) -> dict[str, Json]:
        """For programs: null is what the host does not tell."""
        return {
            "licenses": [
                {"name": one.name, "edition": one.edition, "expires": one.expires, "free": one.is_free}
                for one in self.licenses
            ],
            "max_sessions": self.sshd.max_sessions if self.sshd else None,
            "max_startups": self.sshd.max_startups if self.sshd else None,
            "shell_timeout_s": self.shell_open_s,
            "shell_idle_timeout_s": self.shell_idle_s,
            "hints": list(self.hints()),
        }

    def hints(self) -> tuple[str, ...]:
        """What a user may want to know, and what is no fault."""
        found = [
            f"the licence '{one.name}' is the free one: backups and restores over SSH work with it, other tools that use the host's API may not"
            for one in self.licenses
            if one.is_free
        ]
        found += [
            f"the licence '{one.name}' ends at {one.expires}: from then on the host starts no VM"
            for one in self.licenses
            if one.expires
        ]
        if self.shell_open_s:
            found.append(
                f"the host switches SSH off {self.shell_open_s} s after it was switched on (UserVars.ESXiShellTimeOut): later "
                "backups, and those that have to connect again, do not get in; 0 leaves it on"
            )
        if self.shell_idle_s:
            found.append(
                f"the host ends shells that are idle for {self.shell_idle_s} s (UserVars.ESXiShellInteractiveTimeOut): that is meant "
                "for people, and should not concern backups; should they break off at that time, set it to 0"
            )
        return tuple(found)


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host is like.

    Args:
        version: empty if it could not be looked at; `python`, `clock_skew_s`, `volumes` and `vms` say nothing then.
        clock_skew_s: what it is ahead.
        volumes: those that hold VMs.
        restrict: the level of the agent that our key is limited to; empty if it has a shell.
        agent_present: whether that is the agent of this version.
        allows: None where the key is limited to the agent, and can not ask.
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
    allows: HostAllows | None = None
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
            **(self.allows or HostAllows()).as_json(),
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
        allows=None if level else _allowed(session),
        warnings=tuple(warnings),
    )


def _allowed(session: HostSession) -> HostAllows:
    view = session.view
    licenses: tuple[License, ...] = ()
    sshd: SshdLimits | None = None
    seconds: dict[str, int] = {}
    with contextlib.suppress(SourceError):
        licenses = view.licenses()
    with contextlib.suppress(SourceError):
        sshd = view.sshd_limits()
    for name in ("ESXiShellTimeOut", "ESXiShellInteractiveTimeOut"):
        with contextlib.suppress(SourceError):
            seconds[name] = view.shell_setting(name)
    return HostAllows(
        licenses, sshd, seconds.get("ESXiShellTimeOut"), seconds.get("ESXiShellInteractiveTimeOut")
    )
