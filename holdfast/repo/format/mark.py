"""Marks: what became of a restore point after it was made (FORMAT.md, "Marks").

A manifest never changes. That its point was forgotten, brought back, pinned, unpinned or collected is
written as a record of its own, so that an index made from the packs says the same as the one that was lost.
Marks are applied in the order of their time, and at the same time of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, cast

from holdfast.errors import DamagedData, UnsupportedFormat
from holdfast.ids import ID_BYTES, SESSION_ID_BYTES, PointId, RecordId, SessionId
from holdfast.repo.format import canonical
from holdfast.repo.format.canonical import Fields

__all__ = ["Action", "Mark", "decode_mark", "encode_mark"]

MARK_VERSION: Final = 1

Action = Literal["forget", "recall", "pin", "unpin", "collect"]
_ACTIONS: Final = ("forget", "recall", "pin", "unpin", "collect")


@dataclass(frozen=True, slots=True)
class Mark:
    """One change of a point's state.

    Args:
        action: `forget` hides the point, `recall` takes that back, `pin` protects it from policies, `unpin`
            takes that back, `collect` says that what it needed may be gone: it is never listed again.
        session: random; makes every mark a record of its own.
        time_ns: nanoseconds since 1970: two changes within one second keep their order.
    """

    action: Action
    point: PointId
    session: SessionId
    time_ns: int


def encode_mark(mark: Mark) -> bytes:
    """The canonical JSON of a mark."""
    return canonical.encode(
        {
            "action": mark.action,
            "point": mark.point.hex(),
            "session": mark.session.hex(),
            "time_ns": mark.time_ns,
            "type": "mark",
            "version": MARK_VERSION,
        }
    )


def decode_mark(data: bytes) -> Mark:
    """The mark that `data` encodes.

    Raises:
        DamagedData: it is none.
        UnsupportedFormat: it is one of a later version.
    """
    fields = Fields(canonical.decode(data), "a mark")
    if fields.text("type") != "mark":
        raise DamagedData("a mark is not that of a restore point")
    version, action = fields.integer("version"), fields.text("action")
    if version != MARK_VERSION or action not in _ACTIONS:
        raise UnsupportedFormat(
            f"a mark has version {version} and action '{action}'", hint="use a newer Holdfast"
        )
    return Mark(
        cast("Action", action),
        PointId(RecordId(fields.raw("point", ID_BYTES))),
        SessionId(fields.raw("session", SESSION_ID_BYTES)),
        fields.integer("time_ns"),
    )
