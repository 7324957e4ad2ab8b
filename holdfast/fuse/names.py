"""Names of files for what users have named: safe, and as far as a file name is long enough, reversible.

What no file name may hold, and what would disturb a terminal or a shell script, is written as `%` and two
hexadecimal digits for each byte, as in addresses of web pages; so is `%` itself. A name that is too long is cut and
ends in `%~` and a hash of the whole.

A `~` with hexadecimal digits at the end is what `distinct` adds to names that would be equal, so a name that has such
an end by itself gets it encoded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from holdfast.units import format_time

__all__ = ["distinct", "original_name", "safe_name", "time_name"]

_MOST_BYTES: Final = 180
"""Leaves room for what is put before and behind a name; the file system's limit is 255."""
_HASH_DIGITS: Final = 16
_EMPTY: Final = "%"
_MARKED: Final = re.compile(r"~([0-9a-f]{8,32})\Z")
_CUT: Final = re.compile(rf"%~[0-9a-f]{{{_HASH_DIGITS}}}\Z")
_ESCAPED: Final = re.compile(r"%([0-9A-F]{2})")


def safe_name(text: str) -> str:
    """The text as the name of a file or folder. Different texts have different names."""
    name = "".join(c if _is_plain(c) else _escaped(c) for c in text)
    if name.startswith((".", " ", "-")):
        name = _escaped(name[0]) + name[1:]
    if name.endswith(" "):
        name = name[:-1] + _escaped(" ")
    name = _MARKED.sub(r"%7E\1", name)
    encoded = name.encode()
    if len(encoded) > _MOST_BYTES:
        digest = hashlib.blake2b(text.encode(errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]
        name = encoded[: _MOST_BYTES - _HASH_DIGITS - 2].decode(errors="ignore") + "%~" + digest
    return name or _EMPTY


def original_name(name: str) -> str | None:
    """The text that `safe_name` made this name of; None if it had to cut it."""
    if _CUT.search(name):
        return None
    if name == _EMPTY:
        return ""
    data = _ESCAPED.sub(lambda m: chr(0xDC00 + int(m[1], 16)), name)
    return b"".join(
        bytes([ord(c) - 0xDC00]) if 0xDC00 <= ord(c) <= 0xDCFF else c.encode() for c in data
    ).decode(errors="surrogatepass")


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """Names that are no longer equal: those that are get `~` and the beginning of their key behind them.

    Args:
        names: key (hexadecimal digits) -> name. No two keys are equal.

    Returns:
        Key -> name. It depends on nothing but the arguments.
    """
    users: dict[str, list[str]] = {}
    for key, name in names.items():
        users.setdefault(name, []).append(key)
    found: dict[str, str] = {}
    for name, keys in users.items():
        digits = 8
        while len({key[:digits] for key in keys}) < len(keys):
            digits += 4
        for key in keys:
            found[key] = name if len(keys) == 1 else f"{name}~{key[:digits]}"
    return found


def time_name(unix_s: int) -> str:
    """A moment as the name of a folder: `2026-11-22T02-00-00Z`."""
    return format_time(unix_s).replace(":", "-")


def _is_plain(character: str) -> bool:
    return character.isprintable() and character not in "/%\\"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode(errors="surrogatepass"))
