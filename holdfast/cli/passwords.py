"""Where passwords come from: a file, a command, the environment, or whoever sits at the terminal.

Of files and commands the first line is the password, without its line end. The first source that is set
wins, and is the only one that is asked: one that fails is an error, never a reason to try the next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from holdfast.errors import UsageError, WrongPassword

if TYPE_CHECKING:
    from holdfast.cli.invocation import Invocation
    from holdfast.repo.repository import Repository

__all__ = [
    "at_terminal",
    "current_password",
    "new_password",
    "password_for_init",
    "password_from_file",
    "password_is_given",
    "unlock_patiently",
]

MAX_PASSWORD_BYTES: Final = 4096
_ATTEMPTS: Final = 3

Source = Callable[[], str]


def at_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()


def current_password(invocation: Invocation) -> Source | None:
    """What asks for the repository's password; None if there is no way to get one."""
    source = _configured(invocation)
    if source is None and at_terminal():
        return lambda: _ask("Password of the repository: ")
    return source


def password_is_given(invocation: Invocation) -> bool:
    """Whether the user has said where a password is to be taken from."""
    return _configured(invocation) is not None


def unlock_patiently(invocation: Invocation, repository: Repository) -> None:
    """Unlocks a repository, or begins to; whoever types the password may err some times.

    Raises:
        WrongPassword: it opens nothing, or there is none. A password that is not typed may prove wrong later.
    """
    if _configured(invocation) is not None:
        repository.unlock_ahead()
        return
    for attempts_left in reversed(range(_ATTEMPTS if at_terminal() else 1)):
        try:
            repository.unlock()
            return
        except WrongPassword as error:
            if not attempts_left:
                raise
            print(f"holdfast: {error.message}", file=sys.stderr, flush=True)


def password_for_init(invocation: Invocation) -> str:
    """The password of a repository that is being made. Asked for twice at a terminal.

    Raises:
        UsageError: there is none, or the two differ.
    """
    source = _configured(invocation)
    if source is not None:
        return source()
    return _ask_twice(
        "Password of the new repository: ",
        "set HOLDFAST_PASSWORD_FILE, HOLDFAST_PASSWORD_COMMAND or HOLDFAST_PASSWORD",
    )


def new_password(file: str | None) -> str:
    """A password to be added to a repository. Asked for twice at a terminal.

    Args:
        file: of the command line; it comes before HOLDFAST_NEW_PASSWORD and _NEW_PASSWORD_FILE.

    Raises:
        UsageError: there is none, or the two differ.
    """
    if file:
        return _from_file(file)
    text = os.environ.get("HOLDFAST_NEW_PASSWORD")
    if text:
        return text
    file = os.environ.get("HOLDFAST_NEW_PASSWORD_FILE")
    if file:
        return _from_file(file)
    return _ask_twice("New password: ", "set HOLDFAST_NEW_PASSWORD_FILE or HOLDFAST_NEW_PASSWORD")


def _configured(invocation: Invocation) -> Source | None:
    environment, settings = os.environ, invocation.settings
    places = (
        ("", invocation.password_file, invocation.password_command),
        (
            environment.get("HOLDFAST_PASSWORD"),
            environment.get("HOLDFAST_PASSWORD_FILE"),
            environment.get("HOLDFAST_PASSWORD_COMMAND"),
        ),
        ("", settings.password_file, settings.password_command),
    )
    for text, file, command in places:
        if text:
            return partial(str, text)
        if file:
            return partial(_from_file, file)
        if command:
            return partial(_from_command, command)
    return None


def password_from_file(path: str) -> str:
    """The password that the first line of a file is.

    Raises:
        WrongPassword: the file can not be read, or has none.
    """
    return _from_file(path)


def _from_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return _first_line(file.readline(MAX_PASSWORD_BYTES + 2), f"the password file {path}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise WrongPassword(f"the password file {path} can not be read ({reason})") from None


def _from_command(command: str) -> str:
    import shlex
    import subprocess

    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"the password command can not be understood: {error}") from None
    try:
        outcome = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise WrongPassword(f"the password command can not be run ({reason}): {command}") from None
    if outcome.returncode:
        raise WrongPassword(f"the password command failed with exit code {outcome.returncode}: {command}")
    return _first_line(outcome.stdout, "what the password command printed")


def _first_line(data: bytes, what: str) -> str:
    line = data.partition(b"\n")[0].removesuffix(b"\r")
    if not line:
        raise WrongPassword(f"{what} has an empty first line")
    if len(line) > MAX_PASSWORD_BYTES:
        raise WrongPassword(f"the first line of {what} is longer than {MAX_PASSWORD_BYTES} bytes")
    return line.decode("utf-8", "surrogateescape")


def _ask(prompt: str) -> str:
    import getpass

    try:
        return getpass.getpass(prompt)
    except EOFError:
        raise WrongPassword("no password was given") from None


def _ask_twice(prompt: str, hint: str) -> str:
    if not at_terminal():
        raise UsageError("a password is needed, and there is no terminal to ask for it", hint=hint)
    first = _ask(prompt)
    if not first:
        raise UsageError("the password is empty")
    if _ask("The same once more: ") != first:
        raise UsageError("the two passwords differ")
    return first
