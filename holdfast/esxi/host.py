"""A session with a linked host: its connections, what can be seen and done there, and what is owed to it.

Control goes over one connection with many channels, bulk over connections of its own (docs/SSH.md). Where our key is limited to
the agent, control is an agent, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from holdfast.errors import KeyLimited, SourceError
from holdfast.esxi.agent.bundle import bootstrap_command
from holdfast.esxi.agent_console import AgentConsole
from holdfast.esxi.agent_link import AgentLink
from holdfast.esxi.console import Console
from holdfast.esxi.hosts import HostBook, HostRecord
from holdfast.esxi.inventory import HostView
from holdfast.esxi.journal import Journal
from holdfast.esxi.shell_console import ShellConsole
from holdfast.esxi.snapshots import Patience, SnapshotKeeper
from holdfast.ssh.openssh import OpenSshLink
from holdfast.ssh.paramiko_link import ParamikoLink

__all__ = ["HostSession"]


class HostSession:
    """A host that is spoken to. Nothing is sent before the first command.

    Args:
        note: told step by step what is done there, for a log.
    """

    def __init__(
        self,
        book: HostBook,
        record: HostRecord,
        patience: Patience | None = None,
        *,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        access = book.access(record)
        self.record: Final = record
        self.note: Final = note
        self.control: Final = ParamikoLink(record.address, access)
        self.bulk: Final = OpenSshLink(record.address, access)
        self.console: Final[Console] = (
            AgentConsole(self._limited_agent) if record.restrict else ShellConsole(self.control)
        )
        self.view: Final = HostView(self.console)
        self.keeper: Final = SnapshotKeeper(self.view, patience)
        self.journal: Final = Journal(book.runs_folder)
        self.patience: Final = patience or Patience()

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.record.name

    def note_host(self) -> None:
        """Has it noted what host it is. What the host does not tell is no failure here."""
        with contextlib.suppress(SourceError):
            self.note(
                f"{self.name} is {self.record.address}, ESXi {self.view.version()}, Python {self.view.python() or 'none'}"
                + (f"; our key is limited to '{self.record.restrict}'" if self.record.restrict else "")
            )

    def level(self) -> str:
        """What the host says that our key is limited to; empty if it has a shell.

        Raises:
            KeyLimited: it is limited to another program than ours.
        """
        return self.console.link.hello.level if isinstance(self.console, AgentConsole) else ""

    def close(self) -> None:
        """Ends the connections. May be called twice."""
        self.console.close()
        self.bulk.close()
        self.control.close()

    def _limited_agent(self) -> AgentLink:
        """An agent for control, of a key that can do nothing else.

        Raises:
            KeyLimited: the host runs another one, or has let go of the limit.
            LinkError: it can not be started.
        """
        record = self.record
        again = f"holdfast host add {record.name} {record.address} --restrict {record.restrict}"
        try:
            link = AgentLink.start(self.control.start(bootstrap_command()))
        except KeyLimited:
            raise KeyLimited(
                f"{self.name} runs the agent of another version of Holdfast for our key, and no other program",
                hint=f"link it again; its password is needed once more: {again}",
            ) from None
        if link.pin is None:
            link.close()
            raise KeyLimited(
                f"{self.name} was linked with --restrict {record.restrict}, but lets our key run anything",
                hint=f"somebody has changed authorized_keys or sshd_config there; look at that, then link it again: {again}",
            )
        return link

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
