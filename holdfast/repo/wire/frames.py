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
from collections.abc import Iterator, Sequence
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
_APART_BYTES: Final = 16 << 10
"""Smaller pieces cost less together than each for itself."""
_FRONT_BYTES: Final = 64
"""Of a long message, in one piece: more than lies before data in bulk."""
_SHOWN_BYTES: Final = 400
_HEAD: Final = struct.Struct("<4sBBHII")
_CHECK: Final = struct.Struct("<Q")


class Packet(NamedTuple):
    """A whole message, still encoded.

    Args:
        request: number of the request that it is, or answers.
        more: what follows `body`, if a long one came in several pieces.
    """

    request: int
    kind: int
    body: bytes
    more: Sequence[memoryview] = ()

    @property
    def length(self) -> int:
        """Of the whole body."""
        return len(self.body) + sum(map(len, self.more))


def encode_frames(
    request: int, kind: int, body: Sequence[bytes | bytearray | memoryview]
) -> list[bytes | bytearray | memoryview]:
    """What makes up one message on the wire, in order.

    Large pieces of `body` are not copied.
    """
    rest = [memoryview(piece) for piece in body]
    left = sum(map(len, rest))
    assert left <= MAX_MESSAGE_BYTES
    out: list[bytes | bytearray | memoryview] = []
    while True:
        size = min(left, MAX_BODY_BYTES)
        left -= size
        head = _HEAD.pack(MAGIC, kind, _MORE if left else 0, 0, request, size)
        digest = xxhash.xxh3_64(head)
        parts = _front(rest, size)
        for part in parts:
            digest.update(part)
        small = bytearray(head + _CHECK.pack(digest.intdigest()))
        for part in parts:
            if len(part) < _APART_BYTES:
                small += part
                continue
            out += [small, part]
            small = bytearray()
        if small:
            out.append(small)
        if not left:
            return out


def _front(rest: list[memoryview], size: int) -> list[memoryview]:
    """Takes the first `size` bytes off some pieces."""
    taken: list[memoryview] = []
    while size:
        part = rest[0][:size]
        taken.append(part)
        size -= len(part)
        rest[0] = rest[0][len(part) :]
        if not rest[0]:
            del rest[0]
    return taken


class Decoder:
    """Takes bytes in as they come and gives messages back.

    Memory: one message, and less than a frame besides.
    """

    def __init__(self) -> None:
        self._head = bytearray()  # of the frame that is coming in
        self._body: list[bytearray | memoryview] = []
        self._missing = 0
        self._parts: list[bytearray | memoryview] = []
        self._parts_bytes = 0
        self._open: tuple[int, int] | None = None
        self.frames = 0

    def feed(self, data: bytes) -> Iterator[Packet]:
        """The messages that are complete with `data`; all of them must be taken before the next call.

        Raises:
            ProtocolError: what came is no frame, or not one that may come now.
        """
        left = memoryview(data)
        while left:
            if len(self._head) < HEADER_BYTES:
                count = HEADER_BYTES - len(self._head)
                self._head += left[:count]
                left = left[count:]
                if len(self._head) < HEADER_BYTES:
                    return
                try:
                    self._missing = self._checked_length()
                except ProtocolError:
                    self._head += left[:_SHOWN_BYTES]
                    raise
            count = min(self._missing, len(left))
            self._keep(left[:count])
            left = left[count:]
            self._missing -= count
            if not self._missing:
                packet = self._take()
                if packet is not None:
                    yield packet

    def end(self) -> None:
        """Raises `ProtocolError` if the stream ended within a message."""
        if self._head or self._open is not None:
            raise ProtocolError("the other side stopped in the middle of a message")

    @property
    def rest(self) -> bytes:
        """What has come and was not understood, to show to the user."""
        return bytes(self._head[:_SHOWN_BYTES])

    def _keep(self, data: memoryview) -> None:
        """Small pieces are put together, lest each takes many times its length."""
        if len(data) >= _APART_BYTES:
            self._body.append(data)
        elif self._body and isinstance(self._body[-1], bytearray):
            self._body[-1] += data
        else:
            self._body.append(bytearray(data))

    def _checked_length(self) -> int:
        magic, _, flags, reserved, _, length = _HEAD.unpack_from(self._head)
        if magic != MAGIC:
            raise ProtocolError(
                "the other side does not speak Holdfast's protocol, or not this version of it"
            )
        if flags & ~_MORE or reserved:
            raise ProtocolError(f"a frame has flags that are not known ({flags:#x}, {reserved:#x})")
        if length > MAX_BODY_BYTES:
            raise ProtocolError(f"a frame claims {length} bytes, beyond the limit of {MAX_BODY_BYTES}")
        return int(length)

    def _take(self) -> Packet | None:
        """The message that the frame completes, if it does."""
        _, kind, flags, _, request, length = _HEAD.unpack_from(self._head)
        (check,) = _CHECK.unpack_from(self._head, _HEAD.size)
        digest = xxhash.xxh3_64(bytes(self._head[: _HEAD.size]))
        for piece in self._body:
            digest.update(piece)
        if digest.intdigest() != check:
            raise ProtocolError("a frame fails its checksum: bytes were altered on the way")
        if self._open is not None and self._open != (request, kind):
            raise ProtocolError("frames of two messages are mixed")
        self.frames += 1
        self._head.clear()
        self._parts += self._body
        self._parts_bytes += length
        self._body = []
        if self._parts_bytes > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message is longer than the limit of {MAX_MESSAGE_BYTES} bytes")
        if flags and length < MAX_BODY_BYTES:
            raise ProtocolError("a frame that says that more follows is not full")
        if flags:
            self._open = (request, kind)
            return None
        parts, size, self._parts, self._parts_bytes, self._open = self._parts, self._parts_bytes, [], 0, None
        if size < _APART_BYTES:
            return Packet(request, kind, b"".join(parts))
        views = [memoryview(part) for part in parts]
        front = b"".join(_front(views, _FRONT_BYTES))
        return Packet(request, kind, front, views)
