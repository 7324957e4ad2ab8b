"""Changing a VMX: settings are set and dropped, every other line stays as it is.

Pure. A VMX that is stored with a restore point names disks that lie elsewhere by names within the folder; one that is
registered again must not speak of snapshots, change tracking or a suspended state that are not there any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from holdfast.esxi import text as texts

__all__ = ["VmxText"]

_LINE: Final = re.compile(r"[ \t\ufeff]*([^\s=#]+)[ \t]*=[ \t]*(?:\"([^\"]*)\"|(\S*))", re.ASCII)
_ESCAPE: Final = re.compile(r"\|([0-9A-Fa-f]{2})")


class VmxText:
    """The text of a VMX, to be changed. Keys are found in any case.

    Args:
        data: the file, in whatever encoding it names.
    """

    def __init__(self, data: bytes) -> None:
        self._lines = re.split(r"\r\n|\r|\n", texts.decode(data).rstrip("\r\n"))

    def get(self, key: str) -> str:
        """The value of a setting; empty if it is not there. The last one of several counts."""
        wanted, found = key.lower(), ""
        for line in self._lines:
            match = _LINE.match(line)
            if match is not None and match[1].lower() == wanted:
                value = match[2] if match[2] is not None else match[3]
                found = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), value)
        return found

    def keys(self) -> list[str]:
        """All keys as they are written."""
        return [match[1] for line in self._lines if (match := _LINE.match(line)) is not None]

    def set(self, key: str, value: str) -> None:
        """Gives a setting one value, where it stood or at the end."""
        line = f'{key} = "{_escaped(value)}"'
        places = [n for n, old in enumerate(self._lines) if self._key_of(old) == key.lower()]
        if not places:
            self._lines.append(line)
            return
        self._lines[places[0]] = line
        for number in reversed(places[1:]):
            del self._lines[number]

    def drop(self, unwanted: Callable[[str], bool]) -> None:
        """Removes the settings whose keys (in lower case) are unwanted."""
        self._lines = [line for line in self._lines if not ((key := self._key_of(line)) and unwanted(key))]

    def data(self) -> bytes:
        """The file."""
        return texts.encode("\n".join(self._lines) + "\n")

    @staticmethod
    def _key_of(line: str) -> str:
        match = _LINE.match(line)
        return match[1].lower() if match is not None else ""


def _escaped(value: str) -> str:
    return "".join(f"|{ord(c):02X}" if c in '"|' or ord(c) < 32 else c for c in value)
