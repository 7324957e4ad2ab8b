"""The notation in which `vim-cmd` prints objects, parsed.

    Listsummary:

    (vim.vm.Summary) {
       vm = 'vim.VirtualMachine:496',
       config = (vim.vm.Summary.ConfigSummary) {
          name = "web1",
          annotation = "two
    lines, and a " in them",
       },
       guest = (vim.vm.Summary.GuestSummary) null,
       tags = (string) [ "a", "b" ],
       bootTime = <unset>
    }

Releases differ in what stands at the ends of lines (`,` or `, `). Strings are not escaped: a quote ends one only where
something follows that can follow a value. So the text of an annotation could pretend to be fields; a field that
occurs twice is therefore refused.

Bounds: length (`answer.py`), nesting. Whatever the text, the outcome is a value or `SourceFormat`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from holdfast.errors import SourceFormat
from holdfast.esxi.names import printable

__all__ = ["Items", "Null", "Obj", "Reference", "Unset", "Value", "parse_all", "parse_object"]

_DEEPEST: Final = 40


@dataclass(frozen=True, slots=True)
class Unset:
    """A field that has no value: `<unset>`, or nothing at all."""


@dataclass(frozen=True, slots=True)
class Null:
    """No object: `(type) null`."""

    type: str


@dataclass(frozen=True, slots=True)
class Reference:
    """A managed object: `'vim.VirtualMachine:496'`."""

    type: str
    id: str


@dataclass(frozen=True, slots=True)
class Items:
    """A list: `(type) [ ... ]`."""

    type: str
    items: tuple[Value, ...]

    def objects(self) -> tuple[Obj, ...]:
        """Those of the items that are objects."""
        return tuple(item for item in self.items if isinstance(item, Obj))


@dataclass(frozen=True, slots=True)
class Obj:
    """An object: `(type) { name = value, ... }`.

    Args:
        type: such as `vim.vm.device.VirtualDisk`.
    """

    type: str
    fields: tuple[tuple[str, Value], ...]

    def get(self, name: str) -> Value:
        """The field's value; `Unset` if there is none."""
        return next((value for field, value in self.fields if field == name), _UNSET)

    def text(self, name: str) -> str:
        """The field's value if it is a string or a bare word, else an empty string."""
        value = self.get(name)
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> int | None:
        """The field's value if it is a whole number."""
        value = self.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def flag(self, name: str) -> bool | None:
        """The field's value if it is true or false."""
        value = self.get(name)
        return value if isinstance(value, bool) else None

    def child(self, name: str) -> Obj | None:
        """The field's value if it is an object."""
        value = self.get(name)
        return value if isinstance(value, Obj) else None

    def children(self, name: str) -> tuple[Obj, ...]:
        """The objects of the list that the field holds."""
        value = self.get(name)
        return value.objects() if isinstance(value, Items) else ()


Value: TypeAlias = str | int | bool | Unset | Null | Reference | Items | Obj

_UNSET: Final = Unset()
_BLANK: Final = re.compile(r"\s*")
_TYPE: Final = re.compile(r"\(([\w.:]+)\)[ \t]*")
_FIELD: Final = re.compile(r"([A-Za-z_]\w*)[ \t]*=[ \t]*")
_BARE: Final = re.compile(r"[^\s,{}\[\]\"'()]+")
_NUMBER: Final = re.compile(r"-?[0-9]{1,19}\Z")
# What may follow a string: the end of its line; a next field or the end of the object on the same line.
_STRING_END: Final = re.compile(r'"(?=[ \t]*(?:,?[ \t]*(?:\n|\Z|[}\]])|,[ \t]*(?:[A-Za-z_]\w* = |["\'(])))')
_REFERENCE: Final = re.compile(r"'([^'\n:]*):?([^'\n]*)'")
_HEAD: Final = re.compile(r"^[ \t]*(?=\([\w.:]+\)[ \t]*[{\[])", re.MULTILINE)


def parse_object(text: str, what: str) -> Obj:
    """The first object in what a command printed.

    Args:
        what: the command, for messages.

    Raises:
        SourceFormat: there is none, or it can not be understood.
    """
    for value in parse_all(text, what):
        if isinstance(value, Obj):
            return value
    raise SourceFormat(f"{what} printed no object, but: {printable(text.strip()[:200])}")


def parse_all(text: str, what: str) -> tuple[Value, ...]:
    """All objects and lists in what a command printed; headlines between them are skipped.

    Raises:
        SourceFormat: one of them can not be understood.
    """
    parser = _Parser(text, what)
    found: list[Value] = []
    while (match := _HEAD.search(text, parser.at)) is not None:
        parser.at = match.end()
        found.append(parser.value(0))
    return tuple(found)


class _Parser:
    def __init__(self, text: str, what: str) -> None:
        self._text = text
        self._what = what
        self.at = 0

    def value(self, depth: int) -> Value:
        if depth > _DEEPEST:
            raise self._nonsense("it is nested too deeply")
        text = self._text
        if self._next("<unset>"):
            return _UNSET
        match = _TYPE.match(text, self.at)
        if match is not None:
            self.at = match.end()
            if self._next("{"):
                return self._fields(match[1], depth)
            if self._next("["):
                return self._items(match[1], depth)
            if self._next("null"):
                return Null(match[1])
            if self._next("<unset>"):
                return _UNSET
        if self._next('"'):
            return self._string()
        match = _REFERENCE.match(text, self.at)
        if match is not None:
            self.at = match.end()
            return Reference(match[1], match[2])
        match = _BARE.match(text, self.at)
        if match is None:
            return _UNSET  # `committed = ,`
        self.at = match.end()
        word = match[0]
        if word in ("true", "false"):
            return word == "true"
        return int(word) if _NUMBER.match(word) else word

    def _fields(self, type_name: str, depth: int) -> Obj:
        fields: dict[str, Value] = {}
        while not self._after_blanks("}"):
            match = _FIELD.match(self._text, self.at)
            if match is None:
                raise self._nonsense("a field is missing")
            self.at = match.end()
            value = self.value(depth + 1)
            if fields.setdefault(match[1], value) is not value:
                raise self._nonsense(f"the field {match[1]} occurs twice")
            self._comma()
        return Obj(type_name, tuple(fields.items()))

    def _items(self, type_name: str, depth: int) -> Items:
        items: list[Value] = []
        while not self._after_blanks("]"):
            before = self.at
            items.append(self.value(depth + 1))
            self._comma()
            if self.at == before:
                raise self._nonsense("an item is missing")
        return Items(type_name, tuple(items))

    def _string(self) -> str:
        match = _STRING_END.search(self._text, self.at)
        if match is None:
            raise self._nonsense("a string does not end")
        found = self._text[self.at : match.start()]
        self.at = match.end()
        return found

    def _comma(self) -> None:
        self._after_blanks(",")

    def _after_blanks(self, word: str) -> bool:
        match = _BLANK.match(self._text, self.at)
        assert match is not None, "it matches nothing, too"
        self.at = match.end()
        if self.at >= len(self._text) and word in "}]":
            raise self._nonsense("it ends too early")
        return self._next(word)

    def _next(self, word: str) -> bool:
        if not self._text.startswith(word, self.at):
            return False
        self.at += len(word)
        return True

    def _nonsense(self, why: str) -> SourceFormat:
        line = self._text.count("\n", 0, self.at) + 1
        near = printable(self._text[self.at : self.at + 60].strip())
        return SourceFormat(
            f"what {self._what} printed can not be understood: {why} in line {line}, before '{near}'",
            hint="the host may run a release that is not known yet: please report the command's output",
        )
