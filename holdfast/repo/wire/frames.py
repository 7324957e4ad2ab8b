"""Frames: how messages lie in a stream of bytes (PROTOCOL.md, "Frames").

A frame is a header of 24 bytes and a body. The header names the version of the protocol, the message's kind, the
request that it belongs to, and the body's length; a checksum covers both. A message that is longer than a body may be
goes in several frames, one directly behind the other, all but the last of which say that more follows.

Invariants: nothing is allocated for what a header claims beyond the limits, and nothing of a message is used before
all of it has passed its checksums. A stream that has shown one broken frame is not read on: where the next one begins, nobody knows.

Pure: bytes in, values out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import xxhash

from holdfast.errors import ProtocolError

__all__ = ["HEADER_BYTES", "MAX_BODY_BYTES", "MAX_MESSAGE_BYTES", "Decoder", "Packet", "encode_frames"]

MAGIC: Final = b"\xf7HFw"
HEADER_BYTES: Final = 24
MAX_BODY_BYTES: Final = 1 << 20
MAX_MESSAGE_BYTES: Final = 64 << 20
"""All frames of one message together. The longest are commits: some million ids."""

_MORE: Final = 1
_HEAD: Final = struct.Struct("<4sBBHII")
_CHECK: Final = struct.Struct("<Q")


class Packet(NamedTuple):
    """A whole message, still encoded.

    Args:
        request: number of the request that it is, or answers.
    """

    request: int
    kind: int
    body: bytes


def encode_frames(request: int, kind: int, body: bytes | bytearray) -> list[bytes]:
    """The pieces that make up one message on the wire, in order."""
    assert len(body) <= MAX_MESSAGE_BYTES
    pieces: list[bytes] = []
    start = 0
    while True:
        part = bytes(body[start : start + MAX_BODY_BYTES]) if len(body) > MAX_BODY_BYTES else bytes(body)
        start += len(part)
        head = _HEAD.pack(MAGIC, kind, _MORE if start < len(body) else 0, 0, request, len(part))
        digest = xxhash.xxh3_64(head)
        digest.update(part)
        pieces += [head + _CHECK.pack(digest.intdigest()), part]
        if start >= len(body):
            return pieces


class Decoder:
    """Takes bytes in as they come and gives messages back.

    Memory: one message, and less than a frame besides.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._open: tuple[int, int] | None = None
        self.frames = 0

    def feed(self, data: bytes | memoryview) -> Iterator[Packet]:
        """The messages that are complete with `data`; all of them must be taken before the next call.

        Raises:
            ProtocolError: what came is no frame, or not one that may come now.
        """
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= HEADER_BYTES:
                length = self._checked_length(at)
                end = at + HEADER_BYTES + length
                if end > len(self._buffer):
                    break
                packet = self._take(at, end)
                at = end
                if packet is not None:
                    yield packet
        finally:
            del self._buffer[:at]

    def end(self) -> None:
        """Raises `ProtocolError` if the stream ended within a message."""
        if self._buffer or self._open is not None:
            raise ProtocolError("the other side stopped in the middle of a message")

    @property
    def rest(self) -> bytes:
        """What has come and was not understood, to show to the user."""
        return bytes(self._buffer[:400])

    def _checked_length(self, at: int) -> int:
        magic, _, flags, reserved, _, length = _HEAD.unpack_from(self._buffer, at)
        if magic != MAGIC:
            raise ProtocolError(
                "the other side does not speak Holdfast's protocol, or not this version of it"
            )
        if flags & ~_MORE or reserved:
            raise ProtocolError(f"a frame has flags that are not known ({flags:#x}, {reserved:#x})")
        if length > MAX_BODY_BYTES:
            raise ProtocolError(f"a frame claims {length} bytes, beyond the limit of {MAX_BODY_BYTES}")
        return int(length)

    def _take(self, at: int, end: int) -> Packet | None:
        _, kind, flags, _, request, _ = _HEAD.unpack_from(self._buffer, at)
        with memoryview(self._buffer) as view:
            head = bytes(view[at : at + 16])
            (check,) = _CHECK.unpack_from(view, at + 16)
            body = bytes(view[at + HEADER_BYTES : end])
        digest = xxhash.xxh3_64(head)
        digest.update(body)
        if digest.intdigest() != check:
            raise ProtocolError("a frame fails its checksum: bytes were altered on the way")
        if self._open is not None and self._open != (request, kind):
            raise ProtocolError("frames of two messages are mixed")
        self.frames += 1
        if not flags and self._open is None:
            return Packet(request, kind, body)
        self._parts.append(body)
        self._parts_bytes += len(body)
        if self._parts_bytes > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message is longer than the limit of {MAX_MESSAGE_BYTES} bytes")
        if flags and len(body) < MAX_BODY_BYTES:
            raise ProtocolError("a frame that says that more follows is not full")
        if flags:
            self._open = (request, kind)
            return None
        whole, self._parts, self._parts_bytes, self._open = b"".join(self._parts), [], 0, None
        return Packet(request, kind, whole)
