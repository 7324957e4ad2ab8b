"""What a host lets people do: its licences, the limits of its sshd, and how long its shell stays open.

Lenient: what is not there has the value that OpenSSH or ESXi gives it. All of this makes hints, and no backup depends on it. Serial numbers
are not taken up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable
from holdfast.esxi.says.esxcli import parse_properties

__all__ = [
    "MAX_CONFIG_BYTES",
    "License",
    "SshdLimits",
    "parse_licenses",
    "parse_setting",
    "parse_sshd_config",
]

MAX_CONFIG_BYTES: Final = 1 << 18
_MOST_LICENSES: Final = 100
_MAX_NAME: Final = 200
_FREE_EDITIONS: Final = ("esxbasic", "esx.hypervisor.", "esxfree")
_LICENSE_LINE: Final = re.compile(r"\s+(serial|vmodl key|name|\[expirationDate\])\s*[:=]\s*(.*)\Z")
_WHOLE: Final = re.compile(r"\d{1,9}\Z")
_STARTUPS: Final = re.compile(r"(\d{1,9})(?::\d{1,9}:\d{1,9})?\Z")


@dataclass(frozen=True, slots=True)
class License:
    """An entry of `vim-cmd vimsvc/license --show`.

    Args:
        edition: such as `esx.hypervisor.cpuPackageCoreLimited`; empty if it is not told.
        expires: as the host writes it; empty if it does not expire.
    """

    name: str
    edition: str = ""
    expires: str = ""

    @property
    def is_free(self) -> bool:
        """Whether it looks like the free one, with which the host's API changes nothing; its shell can all the same."""
        return self.edition.lower().startswith(_FREE_EDITIONS)


@dataclass(frozen=True, slots=True)
class SshdLimits:
    """Limits of an sshd; the defaults are OpenSSH's.

    Args:
        max_sessions: commands at the same time over one connection.
        max_startups: connections that may be logging in at the same time; of more, some or all are turned away.
    """

    max_sessions: int = 10
    max_startups: int = 10


def parse_licenses(text: str) -> tuple[License, ...]:
    """The licences that `vim-cmd vimsvc/license --show` lists.

    Raises:
        SourceFormat: it lists none.
    """
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        match = _LICENSE_LINE.match(line)
        if match is None:
            continue
        if match[1] == "serial":
            found.append({})
        elif found:
            found[-1].setdefault(match[1], printable(match[2].strip()[:_MAX_NAME]))
    known = [
        License(one.get("name", ""), one.get("vmodl key", ""), one.get("[expirationDate]", ""))
        for one in found[:_MOST_LICENSES]
        if "name" in one or "vmodl key" in one
    ]
    if not known:
        raise SourceFormat("'vim-cmd vimsvc/license --show' listed no licence")
    return tuple(known)


def parse_sshd_config(text: str) -> SshdLimits:
    """The limits that an `sshd_config` sets for everybody; what it can not be understood about counts as not set."""
    set_to: dict[str, str] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].replace("=", " ", 1).split()
        if words and words[0].lower() == "match":
            break
        if len(words) >= 2:
            set_to.setdefault(words[0].lower(), words[1])  # sshd takes the first one, too
    sessions = set_to.get("maxsessions", "")
    startups = _STARTUPS.match(set_to.get("maxstartups", ""))
    default = SshdLimits()
    return SshdLimits(
        int(sessions) if _WHOLE.match(sessions) else default.max_sessions,
        int(startups[1]) if startups else default.max_startups,
    )


def parse_setting(text: str) -> int:
    """The number that `esxcli system settings advanced list -o` tells.

    Raises:
        SourceFormat: it tells none.
    """
    value = parse_properties(text).get("Int Value", "")
    if not _WHOLE.match(value):
        raise SourceFormat(f"esxcli printed no number for a setting, but: {printable(text.strip()[:200])}")
    return int(value)
