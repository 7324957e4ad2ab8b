"""Canonical JSON: one value, one sequence of bytes (FORMAT.md, "Canonical JSON").

UTF-8, object keys sorted by code point, no white space, no floats, integers within 64 bits. `decode`
accepts nothing but what `encode` would have written, which leaves a damaged or hostile text no room.
`Fields` reads a decoded object with types and a sentence for each thing that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, TypeAlias

from holdfast.errors import DamagedData

__all__ = ["Fields", "Json", "decode", "encode"]

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"

_INT_LIMIT: Final = 2**63


def encode(value: Json) -> bytes:
    """The one encoding of `value`."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _refuse(text: str) -> Json:
    raise ValueError(f"number {text[:40]}")


def _integer(text: str) -> int:
    if len(text) > 20 or not -_INT_LIMIT <= (number := int(text)) < _INT_LIMIT:
        raise ValueError(f"number {text[:40]}")
    return number


def decode(data: bytes) -> Json:
    """The value that `data` canonically encodes.

    Raises:
        DamagedData: it is not the canonical encoding of any value.
    """
    try:
        value: Json = json.loads(
            data.decode(), parse_float=_refuse, parse_constant=_refuse, parse_int=_integer
        )
        canonical = encode(value)
    except (ValueError, RecursionError) as error:
        raise DamagedData(f"malformed JSON ({str(error)[:80]})") from None
    if canonical != data:
        raise DamagedData("JSON is not in canonical form")
    return value


class Fields:
    """Typed access to the members of a decoded object; every mismatch is `DamagedData`.

    Args:
        value: what should be an object.
        what: its name for messages, such as `manifest`.
    """

    def __init__(self, value: Json, what: str) -> None:
        if not isinstance(value, Mapping):
            raise DamagedData(f"{what} is not an object")
        self._members = value
        self._what = what

    def _get(self, key: str) -> Json:
        if key not in self._members:
            raise DamagedData(f"{self._what} lacks '{key}'")
        return self._members[key]

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key)
        if not isinstance(value, str):
            raise DamagedData(f"'{key}' of {self._what} is not a string")
        return value

    def integer(self, key: str, *, least: int = 0, most: int = 2**62) -> int:
        """An integer within bounds."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise DamagedData(f"'{key}' of {self._what} is not an integer from {least} to {most}")
        return value

    def flag(self, key: str) -> bool:
        """A boolean."""
        value = self._get(key)
        if not isinstance(value, bool):
            raise DamagedData(f"'{key}' of {self._what} is not true or false")
        return value

    def raw(self, key: str, length: int) -> bytes:
        """Bytes of a known length, from lower-case hexadecimal."""
        text = self.text(key)
        try:
            value = bytes.fromhex(text)
        except ValueError:
            value = b""
        if len(value) != length or value.hex() != text:
            raise DamagedData(f"'{key}' of {self._what} is not {length} bytes in hexadecimal")
        return value

    def hexadecimal(self, key: str) -> bytes:
        """Bytes of any length, from lower-case hexadecimal."""
        return self.raw(key, len(self.text(key)) // 2)

    def items(self, key: str) -> list[Json]:
        """A list."""
        value = self._get(key)
        if not isinstance(value, list):
            raise DamagedData(f"'{key}' of {self._what} is not a list")
        return value

    def object(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._get(key), f"'{key}' of {self._what}")

    def optional_object(self, key: str) -> Fields | None:
        """A nested object, or None for JSON's null."""
        value = self._get(key)
        return None if value is None else Fields(value, f"'{key}' of {self._what}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise DamagedData(f"'{key}' of {self._what} is not a list of strings")
        return tuple(str(value) for value in values)

    def text_map(self, key: str) -> dict[str, str]:
        """An object whose values are all strings."""
        value = self._get(key)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise DamagedData(f"'{key}' of {self._what} is not an object of strings")
        return {k: str(v) for k, v in value.items()}
