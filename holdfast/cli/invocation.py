"""What one run of the command line was told, before any command of it looks at its own options.

Order of precedence everywhere: command line, then environment, then configuration file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from holdfast.cli.settings import Settings
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.cli.run_log import RunLog
    from holdfast.repo.repository import Repository

__all__ = ["Invocation", "Unlock", "checked_address"]

Unlock: TypeAlias = Literal["now", "if possible", "later"]


@dataclass(slots=True)
class Invocation:
    """One run. Filled while the command line is read, from left to right.

    Args:
        json: print JSON.
        repository: `-r`; None if it was not given.
        password_file, password_command: likewise.
        settings: what the configuration file says.
        exit_code: of a command that ends without an exception.
        if_interrupted: what the user should know when Ctrl-C ends the command now.
        run_log: of the run on a host that is under way, or that has just failed.
    """

    json: bool = False
    repository: str | None = None
    password_file: str | None = None
    password_command: str | None = None
    settings: Settings = field(default_factory=Settings)
    exit_code: int = 0
    if_interrupted: str = ""
    run_log: RunLog | None = None

    @property
    def log_path(self) -> str:
        """Where that log is; empty if there is none."""
        return self.run_log.path if self.run_log is not None else ""

    @property
    def address(self) -> str:
        """The repository that is meant, as it was named; empty if none was."""
        return self.repository or os.environ.get("HOLDFAST_REPOSITORY") or self.settings.repository

    def repository_path(self) -> str:
        """The path or address of the repository that is meant.

        Raises:
            UsageError: none was named, or it is neither.
        """
        address = self.address
        if not address:
            raise UsageError(
                "no repository was named", hint="name it with -r PATH, or set HOLDFAST_REPOSITORY"
            )
        return checked_address(address)

    def open_repository(self, unlock: Unlock = "now", engine: Sequence[str] = ()) -> Repository:
        """The repository that is meant, open.

        Args:
            unlock: get the password `now`, before a progress bar is in the way of its prompt; `if possible`:
                only if there is one; `later`: when the engine needs it, if it does.
            engine: modules that will be needed, and with them the index; they are loaded while another host is waited for.
        """
        from holdfast.cli.meanwhile import imported_meanwhile, reached_meanwhile
        from holdfast.cli.output import notice
        from holdfast.cli.passwords import current_password, unlock_patiently

        password = current_password(self)
        path = self.repository_path()
        with reached_meanwhile(path, index=bool(engine)) as place, imported_meanwhile(engine, path):
            from holdfast.repo.repository import Repository  # when the other host is being reached

            repository = Repository.open(
                path, password=password, notify=lambda message: notice(self, message), place=place
            )
        if unlock == "now" or (unlock == "if possible" and password is not None):
            try:
                unlock_patiently(self, repository)
            except BaseException:
                repository.close()
                raise
        return repository


def checked_address(address: str) -> str:
    """The address of a repository: a path here, `ssh://user@host[:port]/path` or `host:port:/path`.

    Raises:
        UsageError: it is neither.
    """
    from holdfast.ssh.address import parse_place

    if not address or "\0" in address:
        raise UsageError("the repository's address is no path")
    parse_place(address)
    return address
