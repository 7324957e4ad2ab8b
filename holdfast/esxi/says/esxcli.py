"""`esxcli` in its formats: csv, json, keyvalue and the indented text; and `vmware -vl`.

The machine-readable formats spell `Mount Point` as `MountPoint`; a row of csv ends in a comma.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable

__all__ = [
    "HostVersion",
    "RunningVm",
    "parse_csv",
    "parse_json",
    "parse_keyvalue",
    "parse_processes",
    "parse_properties",
    "parse_version",
]

_PRODUCT: Final = re.compile(r"^VMware ESXi? (\d+)\.(\d+)(?:\.(\d+))? build-(\d+)", re.MULTILINE)
_PROPERTY: Final = re.compile(r"^\s+([A-Za-z][\w /()-]*?):(?:\s(.*))?$")
_KEYVALUE: Final = re.compile(r"^([\w.]+(?:\[\d+\][\w.]*)?)=(.*)$")
_MAX_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True, order=True)
class HostVersion:
    """The version of a host: 8.0.1 build 21495797."""

    major: int
    minor: int
    patch: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch} build {self.build}"


@dataclass(frozen=True, slots=True)
class RunningVm:
    """A VM that runs, as the kernel knows it: `esxcli vm process list`."""

    name: str
    world: int
    config_file: str


def parse_version(text: str) -> HostVersion:
    """The version that `vmware -vl` printed.

    Raises:
        SourceFormat: it printed none.
    """
    match = _PRODUCT.search(text)
    if match is None or any(part is not None and len(part) > 12 for part in match.groups()):
        raise SourceFormat(
            f"'vmware -vl' printed no version of ESXi, but: {printable(text.strip()[:200])}",
            hint="is it an ESXi host?",
        )
    return HostVersion(int(match[1]), int(match[2]), int(match[3] or 0), int(match[4]))


def parse_csv(text: str, columns: Sequence[str]) -> tuple[Mapping[str, str], ...]:
    """The rows of `esxcli --formatter=csv`, each with (at least) the given columns.

    Raises:
        SourceFormat: a column is missing, or a row is shorter than the header.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except csv.Error as error:
        raise SourceFormat(f"esxcli printed csv that can not be read ({error})") from None
    header = rows[0] if rows else []
    missing = [column for column in columns if column not in header]
    if missing:
        raise SourceFormat(
            f"esxcli printed no column {', '.join(missing)}, but: {printable(text.strip()[:200])}",
            hint="the host may run a release that is not known yet: please report the command's output",
        )
    found = []
    for row in rows[1 : _MAX_ROWS + 1]:
        if len(row) < max(header.index(column) for column in columns) + 1:
            raise SourceFormat(f"esxcli printed a row that is too short: {printable(','.join(row))}")
        found.append({name: value for name, value in zip(header, row, strict=False) if name})
    return tuple(found)


def parse_json(text: str) -> tuple[Mapping[str, str], ...]:
    """The rows of `esxcli --formatter=json`; a single object is one row. Values that are no text become JSON.

    Raises:
        SourceFormat: it is no JSON of that form.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise SourceFormat(f"esxcli printed no JSON, but: {printable(text.strip()[:200])}") from None
    rows = document if isinstance(document, list) else [document]
    if not all(isinstance(row, dict) for row in rows):
        raise SourceFormat("esxcli printed JSON that is no list of objects")
    return tuple(
        {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        for row in rows
    )


def parse_keyvalue(text: str) -> Mapping[str, str]:
    """`VersionGet.Version.string=8.0.2` and the like, as `esxcli --formatter=keyvalue` prints them, by the key as printed.

    Raises:
        SourceFormat: a line has another form.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        match = _KEYVALUE.match(line)
        if match is None:
            raise SourceFormat(f"esxcli printed '{printable(line)}' where key=value belongs")
        found.setdefault(match[1], match[2])
    if not found:
        raise SourceFormat("esxcli printed nothing where key=value belongs")
    return found


def parse_properties(text: str) -> Mapping[str, str]:
    """The indented `Name: value` lines of one object in esxcli's text for people.

    Raises:
        SourceFormat: there are none.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = _PROPERTY.match(line)
        if match is not None:
            found.setdefault(match[1], (match[2] or "").strip())
    if not found:
        raise SourceFormat(f"esxcli printed no properties, but: {printable(text.strip()[:200])}")
    return found


def parse_processes(text: str) -> tuple[RunningVm, ...]:
    """The VMs that `esxcli vm process list` lists; none if it prints nothing.

    Raises:
        SourceFormat: an entry lacks its world or its configuration file.
    """
    found = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if not block.strip():
            continue
        properties = parse_properties(block)
        world, config = properties.get("World ID", ""), properties.get("Config File", "")
        if not re.fullmatch("[0-9]{1,12}", world) or not config:
            raise SourceFormat(f"esxcli vm process list: '{printable(block[:100])}' can not be understood")
        found.append(RunningVm(properties.get("Display Name", ""), int(world), config))
    return tuple(found)
