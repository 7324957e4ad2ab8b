"""Backing up one VM of a linked host: the host is tidied, the VM held still, and the engine reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.interrupts import on_interrupt
from holdfast.cli.linked import Via, host_files, open_session, parse_esxi
from holdfast.cli.output import notice, warn
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.cli.invocation import Invocation
    from holdfast.cli.progress import Progress
    from holdfast.esxi.machine import Request
    from holdfast.repo.backup import BackupOptions, BackupSummary
    from holdfast.repo.repository import Repository

__all__ = ["HostBackup", "back_up_from_host"]

_SKEW_S = 120


@dataclass(frozen=True, slots=True)
class HostBackup:
    """How VMs of hosts are backed up."""

    request: Request
    via: Via | None

    def shown(self) -> str:
        """In words, for a log."""
        request = self.request
        via = f"--via {self.via}" if self.via else "by the host's own Python if it has one"
        words = [request.how, via]
        words += [name for name in ("quiesce", "memory", "force_off") if getattr(request, name)]
        words += [f"only the disk {disk}" for disk in request.disks]
        return ", ".join(words)


def back_up_from_host(
    invocation: Invocation,
    repository: Repository,
    source: str,
    vm_name: str | None,
    how: HostBackup,
    options: BackupOptions,
    show: contextlib.AbstractContextManager[Progress],
    note: Callable[[str], None],
) -> tuple[BackupSummary, tuple[str, ...]]:
    """What the backup did, and what could not be put right afterwards; of the latter the user was told.

    Args:
        note: told step by step what is done, for a log.

    Raises:
        SourceError, LinkError: the VM can not be backed up.
    """
    from holdfast.esxi.machine import held_machine
    from holdfast.esxi.settling import settle_abandoned

    place = parse_esxi(source)
    if not place.rest:
        raise UsageError(f"'{source}' names no VM", hint="write esxi://HOST/VM, or --all for all of them")
    troubles: list[str] = []

    def trouble(text: str) -> None:
        troubles.append(text)
        warn(invocation, text)

    with contextlib.ExitStack() as stack:
        session = stack.enter_context(open_session(place.host, note))
        for text in settle_abandoned(session, lambda text: notice(invocation, text)):
            trouble(text)
        skew_s = round(session.view.clock_s() - time.time())
        if abs(skew_s) > _SKEW_S:
            notice(
                invocation,
                f"the clock of {place.host} is off by {skew_s:+d} s; the restore point carries this machine's time",
            )
        session.note_host()
        vm = session.view.find(place.rest)
        files = host_files(session, how.via, lambda text: notice(invocation, text))
        stack.callback(files.close)
        stack.enter_context(on_interrupt(files.interrupt))
        with held_machine(session, vm, how.request, files, trouble) as held:
            machine = held.machine
            if vm_name is not None:
                machine = dataclasses.replace(machine, name=vm_name)
            if options.time is None:
                options = dataclasses.replace(options, time=held.time)
            with contextlib.closing(machine), show as shown:
                summary = repository.backup(
                    machine,
                    dataclasses.replace(
                        options,
                        on_progress=lambda counters: shown.update(
                            counters.bytes_done,
                            counters.bytes_total,
                            bytes_read=counters.bytes_read,
                            bytes_new=counters.bytes_new,
                        ),
                    ),
                )
    return summary, tuple(troubles)
