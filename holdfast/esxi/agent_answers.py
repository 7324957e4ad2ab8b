"""What the agent answers, held against what it was asked, and what it is asked in pieces that fit.

Everything here is pure. An answer that contradicts its request is a `LinkError`: then either the connection is damaged or
the host is not to be trusted, and nothing that follows can be relied upon.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.disk import BlockSource, parts_digest
from holdfast.errors import HoldfastError, KeyLimited, LinkError, SourceError
from holdfast.esxi.agent import frames
from holdfast.esxi.agent.frames import Piece
from holdfast.esxi.handles import source_error
from holdfast.esxi.names import printable
from holdfast.esxi.vmdk.joined import Placement

__all__ = [
    "AgentHello",
    "FarEntry",
    "Found",
    "Run",
    "broken",
    "entry_of",
    "failure_in",
    "found_in",
    "grouped",
    "list_in",
    "number_in",
    "object_in",
    "plain_of",
    "records_in",
    "runs_of",
    "slices",
]

_MAP_RUNS: Final = 100_000

Run = tuple[int, int, int]
"""(length, handle, offset): so many bytes of a disk are there in the file with that handle, or `frames.ZEROS`."""


@dataclass(frozen=True, slots=True)
class AgentHello:
    """What the agent says of itself. `level`: what the key is limited to; empty if it is not."""

    version: int
    python: str
    chunkers: tuple[str, ...]
    knows_holes: bool
    level: str = ""


@dataclass(frozen=True, slots=True)
class FarEntry:
    """A file or folder on the host. `mode` as in `os.stat`."""

    name: str
    size_bytes: int
    mode: int
    mtime_s: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a scan found in a range of a disk.

    Args:
        label: of the piece.
        digest: what to expect of this range the next time, if nothing changes: `parts_digest`.
        chunks: how many parts are no holes.
        data_bytes: what they come to.
        same: its parts are those that were expected; nothing more is said of them.
        parts: lengths, those of holes negative.
        hashes: SHA-256 of each part that is no hole.
    """

    label: int
    digest: bytes
    chunks: int
    data_bytes: int
    same: bool = False
    parts: tuple[int, ...] = ()
    hashes: tuple[bytes, ...] = ()


def runs_of(placements: Iterable[Placement], handle_of: Callable[[BlockSource], int]) -> list[Run]:
    """The map of a range of a disk, as it is sent along with what is to be done with the range.

    Args:
        placements: as `ChainSource.placements` yields them.
        handle_of: the handle of the file that a placement is in.
    """
    runs: list[Run] = []
    for start, end, source, offset in placements:
        length = end - start
        handle, place = (frames.ZEROS, 0) if source is None else (handle_of(source), offset)
        if runs:
            before, last_handle, last_place = runs[-1]
            if last_handle == handle and (handle == frames.ZEROS or last_place + before == place):
                runs[-1] = (before + length, handle, last_place)
                continue
        runs.append((length, handle, place))
    return runs


def records_in(
    batch: Sequence[Piece], answers: Iterable[bytes | memoryview]
) -> dict[int, bytes | memoryview]:
    """The bytes of each of the ranges, by label.

    Raises:
        LinkError: they are not those that were asked for.
    """
    lengths = {piece.label: piece.length for piece in batch}
    found: dict[int, bytes | memoryview] = {}
    for answer in answers:
        payload, place = memoryview(answer), 0
        while place < len(payload):
            if place + frames.RECORD.size > len(payload):
                raise broken("a record is cut off")
            label, codec, plain_length, stored_length = frames.RECORD.unpack_from(payload, place)
            place += frames.RECORD.size
            stored = payload[place : place + stored_length]
            place += stored_length
            if lengths.get(label) != plain_length or len(stored) != stored_length or label in found:
                raise broken("it sent a record that was not asked for")
            found[label] = plain_of(codec, stored, plain_length)
    if len(found) != len(batch):
        raise broken(f"it sent {len(found)} of {len(batch)} ranges")
    return found


def grouped(pieces: Iterable[Piece], most: int, most_bytes: int | None) -> Iterator[list[Piece]]:
    """Yields the pieces in groups of at most so many, and so many bytes, and with maps that fit into a request."""
    group: list[Piece] = []
    length = runs = 0
    for piece in pieces:
        too_long = most_bytes is not None and length + piece.length > most_bytes
        if group and (len(group) >= most or too_long or runs + len(piece.runs) > _MAP_RUNS):
            yield group
            group, length, runs = [], 0, 0
        group.append(piece)
        length += piece.length
        runs += len(piece.runs)
    if group:
        yield group


def slices(runs: Iterable[Run], most_bytes: int) -> Iterator[list[Run]]:
    """Yields the runs, cut into ranges of at most so many bytes."""
    current: list[Run] = []
    room = most_bytes
    for length, handle, offset in runs:
        left, place = length, offset
        while left:
            count = min(left, room)
            current.append((count, handle, place))
            left -= count
            place += 0 if handle == frames.ZEROS else count
            room -= count
            if not room:
                yield current
                current, room = [], most_bytes
    if current:
        yield current


def found_in(answer: bytes | memoryview, wanted: dict[int, Piece]) -> Found:
    """What a scan says of one range, held against the range.

    Raises:
        LinkError: it makes no sense.
    """
    payload = bytes(answer)
    if len(payload) < frames.SUMMARY.size:
        raise broken("a summary is cut off")
    label, what, count = frames.SUMMARY.unpack_from(payload)
    piece = wanted.get(label)
    if piece is None:
        raise broken("it sent the summary of a range that was not asked for")
    listing = payload[frames.SUMMARY.size :]
    if what == frames.SAME and piece.expected is not None and len(listing) == frames.DATA_BYTES.size:
        (data_bytes,) = frames.DATA_BYTES.unpack(listing)
        if not count <= data_bytes <= piece.length:
            raise broken("a summary contradicts the range that it is of")
        return Found(label, piece.expected, count, data_bytes, same=True)
    if what == frames.HOLE:
        hole = (-piece.length,)
        return Found(label, parts_digest(hole, ()), 0, 0, parts=hole)
    if what != frames.PARTS or not 0 < count <= piece.length or len(listing) < 4 * count:
        raise broken("a summary makes no sense")
    parts: tuple[int, ...] = struct.unpack_from(f"<{count}i", listing)
    hashed = sum(part > 0 for part in parts)
    if 0 in parts or sum(map(abs, parts)) != piece.length or len(listing) != 4 * count + 32 * hashed:
        raise broken("a summary contradicts the range that it is of")
    hashes = tuple(listing[at : at + 32] for at in range(4 * count, len(listing), 32))
    data_bytes = sum(part for part in parts if part > 0)
    return Found(label, parts_digest(parts, hashes), hashed, data_bytes, parts=parts, hashes=hashes)


def plain_of(codec: int, stored: bytes | memoryview, length: int) -> bytes | memoryview:
    """Returns what a record holds. Raises LinkError if it is not so many bytes."""
    if codec == frames.RAW and len(stored) == length:
        return stored
    if codec != frames.ZLIB:
        raise broken("a record has a codec or a length that makes no sense")
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(stored, length + 1)
    except zlib.error as error:
        raise broken(f"a record can not be inflated ({error})") from None
    if len(data) != length or not inflater.eof:
        raise broken("a record does not inflate to its length")
    return data


def object_in(answers: Sequence[bytes | memoryview]) -> dict[str, object]:
    """Returns the JSON object in the only answer to a request. Raises LinkError if there is none."""
    try:
        said = json.loads(bytes(answers[0])) if len(answers) == 1 else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise broken("an answer makes no sense")
    return said


def number_in(said: dict[str, object], name: str) -> int:
    """Returns a field that is a whole number from 0 on. Raises LinkError if it is none."""
    value = said.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise broken(f"an answer lacks the number '{name}'")
    return value


def list_in(said: dict[str, object], name: str) -> list[object]:
    """Returns a field that is a list. Raises LinkError if it is none."""
    value = said.get(name)
    if not isinstance(value, list):
        raise broken(f"an answer lacks the list '{name}'")
    return value


def entry_of(said: dict[str, object]) -> FarEntry:
    """Returns a file or folder of an answer. Raises LinkError if it is none."""
    return FarEntry(
        str(said.get("name", "")), number_in(said, "size"), number_in(said, "mode"), number_in(said, "mtime")
    )


def failure_in(payload: bytes | memoryview) -> HoldfastError:
    """The error that says what the agent could not do."""
    said = object_in([payload])
    number, message, path = (
        said.get("errno"),
        printable(str(said.get("message", ""))),
        str(said.get("path", "")),
    )
    if said.get("refused") is True:
        where = f" ({printable(path)})" if path else ""
        return KeyLimited(
            f"the host does not let our key do that: {message}{where}",
            hint="if it is to be allowed, link the host again with a wider 'host add --restrict LEVEL', or without it",
        )
    if isinstance(number, int) and number > 0:
        return source_error(OSError(number, message), path or "a file on the host")
    return SourceError(f"the agent on the host failed: {message}")


def broken(why: str) -> LinkError:
    """The error that says in which way the agent has broken the protocol."""
    return LinkError(
        f"the agent on the host does not keep to the protocol: {why}",
        hint="something on the host prints into the connection, or the connection is damaged",
    )
