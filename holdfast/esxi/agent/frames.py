# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""Frames: how agent and near side talk. Both use this file; over there it runs on Python 3.5.

    offset  size  field
    0       2     "HF"
    2       1     kind
    3       1     flags: 1 the last frame that answers a request, 2 the payload is deflated
    4       4     request: chosen by the near side, repeated in the answers; 0 is about the connection
    8       4     length of the payload, at most MAX_PAYLOAD_BYTES
    12      4     CRC-32 of the 12 bytes before and of the payload
    16            payload

All numbers are little-endian. A frame that is not like that ends the connection: after it, nothing can be trusted
to begin where it seems to.
"""

import struct
import zlib
from typing import Any, Callable, List, Optional, Tuple

VERSION = 1
READY = b"HOLDFAST-AGENT-READY"

MAGIC = b"HF"
HEADER = struct.Struct("<2sBBIII")
LAST = 1
DEFLATED = 2
MAX_PAYLOAD_BYTES = 4 << 20
MAX_INFLATED_BYTES = 8 << 20

# Requests, from the near side.
HELLO, STAT, LIST, OPEN, CLOSE, CUTTER, SCAN, FETCH, WRITE, SYNC, HASH, PACE = range(1, 13)
# These only from keys that are limited to the agent; others have a shell.
COMMAND, READ, MAKE, PUT, COMPLETE = range(13, 18)
# Answers, from the agent.
RESULT, SEGMENT, DATA, FAILED = 129, 130, 131, 132

RUN = struct.Struct("<IHQ")  # length, handle, offset in its file: so many bytes of a disk are there
ZEROS = 0xFFFF  # as a handle: there is no file, the bytes are zeros
PIECE = struct.Struct("<IBI")  # label, flags, number of runs: a range of a disk, followed by its runs
EXPECTED = 1  # flag of a piece: 32 bytes of digest follow, before the runs
RECORD = struct.Struct("<IBII")  # label, codec, plain length, stored length; the stored bytes follow
SUMMARY = struct.Struct("<IBI")  # label, what was found, number of parts; lengths and hashes follow
DATA_BYTES = struct.Struct(
    "<I"
)  # follows the summary of what is as expected, with the number of chunks in it
PLACE = struct.Struct("<HQ")  # handle and offset of what is written; the data follows
PUTS = struct.Struct("<QH")  # offset and length of the path; the path and what is written there follow
HASHED = struct.Struct("<I32s")  # label and SHA-256 of a piece

SAME, HOLE, PARTS = range(3)
RAW, ZLIB, AUTO = range(3)  # AUTO is only asked for: it is answered by one of the others
MAX_PIECE_BYTES = 32 << 20


class FrameError(Exception):
    """The other side does not keep to the protocol."""


class Piece(object):
    """A range of a disk, and where its bytes are.

    Args:
        label: repeated in the answer.
        runs: (length, handle, offset), in the order of the range.
        expected: digest of the parts that were found there the last time, or None.
    """

    def __init__(
        self, label: int, runs: List[Tuple[int, int, int]], expected: Optional[bytes] = None
    ) -> None:
        self.label = label
        self.runs = runs
        self.expected = expected
        self.length = sum(run[0] for run in runs)


def pack(kind: int, request: int, payload: Any, flags: int = 0) -> bytes:
    """A frame's header; the payload follows it on the wire."""
    head = HEADER.pack(MAGIC, kind, flags, request, len(payload), 0)[:12]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head)) & 0xFFFFFFFF)


def deflated(payload: bytes, flags: int = 0) -> Tuple[bytes, int]:
    """The payload as it is sent, and the flags that say so: smaller where that is worth it."""
    if len(payload) > 400:
        small = zlib.compress(payload, 1)
        if len(small) < len(payload) * 9 // 10:
            return small, flags | DEFLATED
    return payload, flags


def receive(read: Callable[[int], Any]) -> Optional[Tuple[int, int, int, Any]]:
    """The next frame as (kind, flags, request, payload), inflated; None where the other side has ended.

    Args:
        read: returns exactly so many bytes, fewer only at the end; in the type in which the payload is wanted.

    Raises:
        FrameError: what comes is no frame.
    """
    head = read(HEADER.size)
    if not head:
        return None
    if len(head) < HEADER.size:
        raise FrameError("the stream ends within a header")
    magic, kind, flags, request, length, checksum = HEADER.unpack(head)
    if magic != MAGIC:
        raise FrameError("there is no frame where one belongs")
    if length > MAX_PAYLOAD_BYTES:
        raise FrameError("a frame of %d bytes is too long" % length)
    payload = read(length)
    if len(payload) < length:
        raise FrameError("the stream ends within a frame")
    if zlib.crc32(payload, zlib.crc32(head[:12])) & 0xFFFFFFFF != checksum:
        raise FrameError("a frame fails its checksum")
    if flags & DEFLATED:
        inflater = zlib.decompressobj()
        try:
            payload = inflater.decompress(payload, MAX_INFLATED_BYTES)
        except zlib.error as error:
            raise FrameError("a frame can not be inflated (%s)" % error) from None
        if not inflater.eof:
            raise FrameError("a frame inflates to too much, or not to its end")
    return kind, flags & ~DEFLATED, request, payload


def pack_pieces(pieces: List[Piece]) -> bytes:
    """Pieces as the payload of a request."""
    out = []  # type: List[bytes]
    for piece in pieces:
        out.append(PIECE.pack(piece.label, EXPECTED if piece.expected else 0, len(piece.runs)))
        if piece.expected:
            out.append(piece.expected)
        out.extend(RUN.pack(*run) for run in piece.runs)
    return b"".join(out)


def unpack_pieces(payload: bytes) -> List[Piece]:
    """The pieces in the payload of a request.

    Raises:
        FrameError: there are none, or they are not possible.
    """
    pieces = []  # type: List[Piece]
    place = 0
    try:
        while place < len(payload):
            label, flags, count = PIECE.unpack_from(payload, place)
            place += PIECE.size
            expected = None
            if flags & EXPECTED:
                expected = payload[place : place + 32]
                place += 32
            end = place + count * RUN.size
            if end > len(payload):
                raise FrameError("a piece is cut off")
            piece = Piece(label, list(RUN.iter_unpack(memoryview(payload)[place:end])), expected)
            place = end
            if not 0 < piece.length <= MAX_PIECE_BYTES or min(run[0] for run in piece.runs) == 0:
                raise FrameError("a piece of %d bytes is not possible" % piece.length)
            pieces.append(piece)
    except struct.error:
        raise FrameError("a piece is cut off") from None
    if not pieces:
        raise FrameError("a request names no piece")
    return pieces
