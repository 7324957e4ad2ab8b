"""A session with a linked host: its connections, what can be seen and done there, and what is owed to it.

Control goes over one connection with many channels, bulk over connections of its own (docs/SSH.md).
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from holdfast.esxi.console import Console
from holdfast.esxi.hosts import HostBook, HostRecord
from holdfast.esxi.inventory import HostView
from holdfast.esxi.journal import Journal
from holdfast.esxi.snapshots import Patience, SnapshotKeeper
from holdfast.ssh.openssh import OpenSshLink
from holdfast.ssh.paramiko_link import ParamikoLink

__all__ = ["HostSession"]


class HostSession:
    """A host that is spoken to. Nothing is sent before the first command."""

    def __init__(self, book: HostBook, record: HostRecord, patience: Patience | None = None) -> None:
        access = book.access(record)
        self.record: Final = record
        self.control: Final = ParamikoLink(record.address, access)
        self.bulk: Final = OpenSshLink(record.address, access)
        self.console: Final = Console(self.control)
        self.view: Final = HostView(self.console)
        self.keeper: Final = SnapshotKeeper(self.view, patience)
        self.journal: Final = Journal(book.runs_folder)
        self.patience: Final = patience or Patience()

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.record.name

    def close(self) -> None:
        """Ends the connections. May be called twice."""
        self.bulk.close()
        self.control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
