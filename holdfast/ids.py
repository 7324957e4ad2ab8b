"""The names of things: ids as types of their own, so that one is not passed for another.

All ids are raw `bytes` inside the program and lower-case hexadecimal outside of it.
"""

from __future__ import annotations

from typing import Final, NewType

__all__ = [
    "HOLE_ID",
    "ID_BYTES",
    "PACK_ID_BYTES",
    "SESSION_ID_BYTES",
    "ChunkId",
    "NodeId",
    "PackId",
    "PointId",
    "RecordId",
    "RepositoryId",
    "SessionId",
]

ID_BYTES: Final = 32
PACK_ID_BYTES: Final = 16
SESSION_ID_BYTES: Final = 16

RecordId = NewType("RecordId", bytes)
"""32 bytes: BLAKE3-256 of a record's plaintext (FORMAT.md, "Identity"). Any of the next three."""

ChunkId = NewType("ChunkId", RecordId)
NodeId = NewType("NodeId", RecordId)
PointId = NewType("PointId", RecordId)

PackId = NewType("PackId", bytes)
"""16 random bytes; the pack's file name is their hexadecimal form."""

SessionId = NewType("SessionId", bytes)
"""16 random bytes."""

RepositoryId = NewType("RepositoryId", bytes)
"""16 random bytes, drawn by `init`."""

HOLE_ID: Final = NodeId(RecordId(bytes(ID_BYTES)))
"""Stands for a subtree that holds nothing but zeros. Never the id of a record."""
