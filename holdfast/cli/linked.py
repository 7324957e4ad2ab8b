"""Linked ESXi hosts on the command line: `esxi://HOST/VM`, and sessions with the hosts that are meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from holdfast.cli.settings import config_folder
from holdfast.errors import KeyLimited, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.esxi.enduring import EnduringFiles
    from holdfast.esxi.host import HostSession
    from holdfast.esxi.hosts import HostBook

__all__ = ["SCHEME", "EsxiPlace", "Via", "host_book", "host_files", "is_esxi", "open_session", "parse_esxi"]

SCHEME: Final = "esxi://"
Via = Literal["agent", "stream"]


@dataclass(frozen=True, slots=True)
class EsxiPlace:
    """What `esxi://HOST/REST` names; `rest` is a VM, or a datastore and a folder, or empty."""

    host: str
    rest: str


def is_esxi(text: str) -> bool:
    """Whether a source or destination lies on a linked host."""
    return text.startswith(SCHEME)


def parse_esxi(text: str) -> EsxiPlace:
    """What the text names.

    Raises:
        UsageError: it names no host.
    """
    host, _, rest = text.removeprefix(SCHEME).partition("/")
    if not is_esxi(text) or not host:
        raise UsageError(
            f"'{text}' names no linked host",
            hint="write esxi://HOST/VM; 'holdfast host list' lists the hosts",
        )
    return EsxiPlace(host, rest)


def host_book() -> HostBook:
    """The linked hosts."""
    from holdfast.esxi.hosts import HostBook

    return HostBook(config_folder())


def open_session(name: str, note: Callable[[str], None] = lambda _text: None) -> HostSession:
    """A session with the linked host of that name; close it.

    Args:
        note: told step by step what is done there.

    Raises:
        SourceNotFound: none is called so.
    """
    from holdfast.esxi.host import HostSession

    book = host_book()
    return HostSession(book, book.get(name), note=note)


def host_files(session: HostSession, via: Via | None, tell: Callable[[str], None]) -> EnduringFiles:
    """What reads the host's files, and begins again when the connection breaks; close it.

    Args:
        via: None for the agent, or a stream if the host has no Python.
        tell: told if it is a stream although the agent would have been better, and when a connection breaks.

    Raises:
        LinkError: the agent was asked for, and does not start.
        KeyLimited: a stream was asked for, and the key is limited to the agent.
    """
    from holdfast.esxi.agented import AgentFiles
    from holdfast.esxi.enduring import EnduringFiles
    from holdfast.esxi.shell_console import ShellConsole
    from holdfast.esxi.streamed import StreamedFiles

    if via is None and not session.view.python():
        tell(f"{session.name} has no python3, so that all bytes have to travel (--via stream)")
        via = "stream"
    if via == "stream":
        console = session.console
        if not isinstance(console, ShellConsole):
            raise KeyLimited(
                f"{session.name} lets our key run the agent only, so that nothing can be read with --via stream",
                hint="leave --via out, or link the host again without --restrict",
            )
        return EnduringFiles(lambda: StreamedFiles(console, session.bulk), tell)
    return EnduringFiles(lambda: AgentFiles(session.bulk.start), tell)
