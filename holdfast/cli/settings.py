"""The configuration file: TOML, every key one option of the command line.

    repository = "/backup/repo"
    password_file = "/etc/holdfast/password"

    [backup]
    label = ["site=berlin"]

Keys at the top are global options, those of a table are options of that command. A key that is no option
is an error, so that a typing error does not go unnoticed. Secrets are never in the file itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import UsageError

__all__ = ["Settings", "config_folder", "read_settings"]

_GLOBAL: Final = ("repository", "password_file", "password_command")
_SECRETS: Final = ("password", "passphrase", "new_password", "key", "master_key")
MAX_FILE_BYTES: Final = 1 << 20

Value = str | int | float | bool | list[str | int | float]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration file says.

    Args:
        commands: command -> option -> value.
    """

    path: str = ""
    repository: str = ""
    password_file: str = ""
    password_command: str = ""
    commands: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)


def _place() -> tuple[str, bool]:
    """Path of the file, and whether it must exist."""
    named = os.environ.get("HOLDFAST_CONFIG")
    if named:
        return named, True
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "holdfast", "config.toml"), False


def config_folder() -> str:
    """The folder of the configuration file, where linked hosts are kept, too. It need not exist."""
    return os.path.dirname(os.path.abspath(_place()[0]))


def read_settings() -> Settings:
    """What the configuration file says; nothing if there is none.

    Raises:
        UsageError: the file that HOLDFAST_CONFIG names is not there, it is no TOML, a key is unknown, or a
            value has the wrong type.
    """
    path, needed = _place()
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if needed:
            raise UsageError(
                f"the configuration file {path} does not exist", hint="see HOLDFAST_CONFIG"
            ) from None
        return Settings()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"the configuration file {path} can not be read ({reason})") from None
    return _parsed(path, data)


def _parsed(path: str, data: bytes) -> Settings:
    import tomllib

    try:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError("it is too long")
        content = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the configuration file {path} can not be understood: {error}") from None
    found: dict[str, str] = {}
    commands: dict[str, Mapping[str, Value]] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            commands[key] = {option.replace("-", "_"): entry for option, entry in value.items()}
        elif name in _SECRETS:
            raise UsageError(
                f"the configuration file {path} must not hold a secret ('{key}')",
                hint='write password_file = "PATH" or password_command = "COMMAND" instead',
            )
        elif name not in _GLOBAL:
            raise UsageError(
                f"unknown key '{key}' in the configuration file {path}",
                hint=f"known are {', '.join(_GLOBAL)}, and one table per command",
            )
        elif not isinstance(value, str):
            raise UsageError(f"'{key}' in the configuration file {path} is no text")
        else:
            found[name] = value
    folder = os.path.dirname(os.path.abspath(path))
    return Settings(
        path=path,
        repository=_resolved(found.get("repository", ""), folder),
        password_file=_resolved(found.get("password_file", ""), folder),
        password_command=found.get("password_command", ""),
        commands=commands,
    )


def _resolved(path: str, folder: str) -> str:
    """A path of the file: `~` is the home folder, and what is relative lies beside the file."""
    if not path or ":" in path.partition("/")[0]:  # an address of another machine
        return path
    return os.path.join(folder, os.path.expanduser(path))
