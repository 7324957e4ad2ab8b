"""The building blocks of messages: how one value of each type lies in a message's body (PROTOCOL.md, "Fields").

Numbers are little-endian and of fixed size. What has a variable length has it in front, and it is compared with what is
left of the body before anything is made of it. Flags are 0 or 1, texts are UTF-8.

Pure: bytes in, values out. A body that is not exactly what its layout says raises `ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, cast

from holdfast.errors import ProtocolError

__all__ = [
    "BLOB",
    "BULK",
    "FLAG",
    "TEXT",
    "U8",
    "U16",
    "U32",
    "U64",
    "I64",
    "Bulk",
    "Cursor",
    "Field",
    "Pieces",
    "fixed",
    "many",
    "optional",
    "pairs",
    "records",
]


class Pieces:
    """Data that lies in several places, one behind the other. Equal are those with equal data, wherever it lies.

    Args:
        parts: nobody may change what is in them.
    """

    __slots__ = ("_size", "parts")

    def __init__(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        self.parts = tuple(parts)
        self._size = sum(map(len, self.parts))

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Pieces | bytes | bytearray | memoryview):
            return len(self) == len(other) and bytes(self) == bytes(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(bytes(self))


class Cursor:
    """Reads a body from front to back.

    Args:
        body: may be followed by more, which `rest` alone gives out.
    """

    def __init__(self, body: bytes, more: Sequence[bytes | bytearray | memoryview] = ()) -> None:
        self._body = body
        self._more = more
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return len(self._body) - self._at + sum(map(len, self._more))

    def take(self, length: int) -> bytes:
        """The next `length` bytes.

        Raises:
            ProtocolError: there are not so many.
        """
        start, end = self._at, self._at + length
        if end > len(self._body):
            raise ProtocolError("a message is shorter than it should be")
        self._at = end
        return self._body[start:end]

    def rest(self, length: int) -> Pieces:
        """The last bytes, which must be so many, where they lie."""
        if length != self.left:
            raise ProtocolError("a message is not as long as it should be")
        front = memoryview(self._body)[self._at :]
        more, self._more = self._more, ()
        self._at = len(self._body)
        return Pieces([front, *more] if front else more)


class Field(Protocol):
    """A type of value. `value` is what `take` returns; anything else is a defect of ours."""

    name: str
    least_bytes: int

    def put(self, out: bytearray, value: object) -> None:
        """Appends a value."""
        ...

    def take(self, cursor: Cursor) -> object:
        """Reads one. Raises `ProtocolError` if there is none."""
        ...


class _Number:
    def __init__(self, name: str, code: str) -> None:
        self.name = name
        self._struct = struct.Struct("<" + code)
        self.least_bytes = self._struct.size

    def put(self, out: bytearray, value: object) -> None:
        out += self._struct.pack(value)

    def take(self, cursor: Cursor) -> int:
        return int(self._struct.unpack(cursor.take(self._struct.size))[0])


class _Flag:
    name = "flag"
    least_bytes = 1

    def put(self, out: bytearray, value: object) -> None:
        out.append(1 if value else 0)

    def take(self, cursor: Cursor) -> bool:
        value = cursor.take(1)[0]
        if value > 1:
            raise ProtocolError("a flag is neither 0 nor 1")
        return bool(value)


class _Blob:
    name = "blob"
    least_bytes = 4

    def put(self, out: bytearray, value: object) -> None:
        data = cast("bytes", value)
        out += _LENGTH.pack(len(data))
        out += data

    def take(self, cursor: Cursor) -> bytes:
        return cursor.take(_take_length(cursor))


class Bulk:
    """A blob with a great deal of data, the last field of its message: it is not copied on its way (`encode_message`)."""

    name = "blob"
    least_bytes = 4

    def put(self, out: bytearray, value: object) -> None:
        """Appends the length alone: the data goes behind it."""
        out += _LENGTH.pack(len(cast("bytes | Pieces", value)))

    def take(self, cursor: Cursor) -> Pieces:
        """The data, where it lies."""
        return cursor.rest(_take_length(cursor))


class _Text:
    name = "text"
    least_bytes = 4

    def put(self, out: bytearray, value: object) -> None:
        BLOB.put(out, cast("str", value).encode("utf-8", "surrogateescape"))

    def take(self, cursor: Cursor) -> str:
        return cursor.take(_take_length(cursor)).decode("utf-8", "surrogateescape")


class _Fixed:
    def __init__(self, length: int) -> None:
        self.name = f"{length} bytes"
        self.least_bytes = length

    def put(self, out: bytearray, value: object) -> None:
        data = cast("bytes", value)
        assert len(data) == self.least_bytes
        out += data

    def take(self, cursor: Cursor) -> bytes:
        return cursor.take(self.least_bytes)


class _Many:
    """A count, then so many of a field; a tuple."""

    def __init__(self, item: Field) -> None:
        self.name = f"list of {item.name}"
        self.least_bytes = 4
        self._item = item

    def put(self, out: bytearray, value: object) -> None:
        items = cast("Sequence[object]", value)
        out += _LENGTH.pack(len(items))
        if isinstance(self._item, _Fixed):
            joined = b"".join(cast("Sequence[bytes]", items))
            assert len(joined) == len(items) * self._item.least_bytes
            out += joined
            return
        for item in items:
            self._item.put(out, item)

    def take(self, cursor: Cursor) -> tuple[object, ...]:
        count, size = _take_length(cursor), self._item.least_bytes
        if count * size > cursor.left:
            raise ProtocolError("a message claims more than it holds")
        if isinstance(self._item, _Fixed):
            joined = cursor.take(count * size)
            return tuple(joined[at : at + size] for at in range(0, len(joined), size))
        return tuple(self._item.take(cursor) for _ in range(count))


class _Row:
    """Some fields one behind the other; a tuple."""

    def __init__(self, items: Sequence[Field]) -> None:
        self.name = "(" + ", ".join(item.name for item in items) + ")"
        self.least_bytes = sum(item.least_bytes for item in items)
        self._items = items

    def put(self, out: bytearray, value: object) -> None:
        for item, part in zip(self._items, cast("Sequence[object]", value), strict=True):
            item.put(out, part)

    def take(self, cursor: Cursor) -> tuple[object, ...]:
        return tuple(item.take(cursor) for item in self._items)


class _Records:
    """A count, then so many rows of one fixed size, for what there is a great deal of; a tuple of tuples."""

    def __init__(self, code: str, name: str) -> None:
        self._struct = struct.Struct("<" + code)
        self.name = f"list of ({name})"
        self.least_bytes = 4

    def put(self, out: bytearray, value: object) -> None:
        rows = cast("Sequence[Sequence[object]]", value)
        out += _LENGTH.pack(len(rows))
        out += b"".join([self._struct.pack(*row) for row in rows])

    def take(self, cursor: Cursor) -> tuple[tuple[object, ...], ...]:
        count = _take_length(cursor)
        if count * self._struct.size > cursor.left:
            raise ProtocolError("a message claims more than it holds")
        return tuple(self._struct.iter_unpack(cursor.take(count * self._struct.size)))


class _Optional:
    """A flag, then the field if there is one."""

    def __init__(self, item: Field) -> None:
        self.name = f"{item.name} or nothing"
        self.least_bytes = 1
        self._item = item

    def put(self, out: bytearray, value: object) -> None:
        FLAG.put(out, value is not None)
        if value is not None:
            self._item.put(out, value)

    def take(self, cursor: Cursor) -> object:
        return self._item.take(cursor) if FLAG.take(cursor) else None


class _Pairs:
    """A list of pairs; a mapping. A key that comes twice is refused."""

    def __init__(self, key: Field, value: Field) -> None:
        self._rows = _Many(_Row((key, value)))
        self.name = f"map of {key.name} to {value.name}"
        self.least_bytes = 4

    def put(self, out: bytearray, value: object) -> None:
        self._rows.put(out, list(cast("Mapping[object, object]", value).items()))

    def take(self, cursor: Cursor) -> dict[object, object]:
        rows = cast("tuple[tuple[object, object], ...]", self._rows.take(cursor))
        found = dict(rows)
        if len(found) != len(rows):
            raise ProtocolError("a map holds a key twice")
        return found


_LENGTH: Final = struct.Struct("<I")


def _take_length(cursor: Cursor) -> int:
    return int(_LENGTH.unpack(cursor.take(4))[0])


U8: Final[Field] = _Number("u8", "B")
U16: Final[Field] = _Number("u16", "H")
U32: Final[Field] = _Number("u32", "I")
U64: Final[Field] = _Number("u64", "Q")
I64: Final[Field] = _Number("i64", "q")
FLAG: Final = _Flag()
BLOB: Final = _Blob()
BULK: Final = Bulk()
TEXT: Final = _Text()


def fixed(length: int) -> Field:
    """So many bytes."""
    return _Fixed(length)


def many(*items: Field) -> Field:
    """A tuple of any number of a field, or of rows of several."""
    return _Many(items[0] if len(items) == 1 else _Row(items))


def records(code: str, name: str) -> Field:
    """A tuple of rows of fixed size.

    Args:
        code: of `struct`.
        name: the row's fields, for the document.
    """
    return _Records(code, name)


def optional(*items: Field) -> Field:
    """A field, or a row of several, or None."""
    return _Optional(items[0] if len(items) == 1 else _Row(items))


def pairs(key: Field, value: Field) -> Field:
    """A mapping."""
    return _Pairs(key, value)
