"""The text form of the host's objects, as `vim-cmd` prints them: `(type) { name = value, ... }`.

ESXi 7.0 ends a line with a comma and a blank, 8.0 with the comma alone; the last line of an object has neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Ref(str):
    """A managed object's name, printed between apostrophes."""

    __slots__ = ()


class Bare(str):
    """Something that stands as it is: `<unset>`, `(type) null`, an enumeration's value."""

    __slots__ = ()


UNSET = Bare("<unset>")


def null(kind: str) -> Bare:
    """A missing object of a type."""
    return Bare(f"({kind}) null")


@dataclass(frozen=True, slots=True)
class Obj:
    """An object: its type and its members in order."""

    kind: str
    members: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Seq:
    """A list of objects or of values."""

    kind: str
    items: Sequence[Value]


Value = Obj | Seq | Ref | Bare | str | int | bool | float | None


def text(value: Value, release: str, indent: int = 0) -> str:
    """The printed form, without a line end."""
    comma = ", " if release == "7.0" else ","
    inner = " " * (indent + 3)
    match value:
        case Obj():
            lines = [
                f"{inner}{name} = {text(member, release, indent + 3)}"
                for name, member in value.members.items()
            ]
            return f"({value.kind}) {{\n" + (comma + "\n").join(lines) + f"\n{' ' * indent}}}"
        case Seq():
            if not value.items:
                return f"({value.kind}) []"
            lines = [inner + text(item, release, indent + 3) for item in value.items]
            return f"({value.kind}) [\n" + (comma + "\n").join(lines) + f"\n{' ' * indent}]"
        case Bare():
            return str(value)
        case Ref():
            return f"'{value}'"
        case bool():
            return "true" if value else "false"
        case None:
            return "<unset>"
        case int() | float():
            return str(value)
        case _:
            return f'"{value}"'


def fault(kind: str, message: str, release: str, **members: Value) -> str:
    """A fault as commands print it. `faultMessage` has no comma there: so do real hosts."""
    comma = ", " if release == "7.0" else ","
    lines = [
        f"   faultCause = (vmodl.MethodFault) null{comma}",
        "   faultMessage = <unset>" + (comma if members else ""),
    ]
    lines += [f"   {name} = {text(member, release, 3)}{comma}" for name, member in members.items()]
    lines.append(f'   msg = "{message}"')
    return f"({kind}) {{\n" + "\n".join(lines) + "\n}"
