"""The near side of the agent: starts it over a channel, asks it, and believes nothing that it says.

The channel is whatever reads, writes and closes: a process's pipes or an SSH channel. One thread receives; callers wait
for their own answers, and any number of them may ask at once. What is asked for is bounded in number and in bytes, so
that the agent's memory and ours are: a request waits until there is room.

Invariants: every answer is checked against its request (labels, lengths, counts, decompressed sizes) before it is
given on; hashes that the agent states are claims, only what was fetched and hashed here is known. When the channel breaks or the
agent breaks the protocol, all that wait get the same error, and so does whoever asks later.
"""

from __future__ import annotations

import contextlib
import json
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from holdfast.errors import HoldfastError, KeyLimited, LinkError, LinkLost, LinkTimeout, SourceError
from holdfast.esxi.agent import frames
from holdfast.esxi.agent.bundle import Pin, pin_in, program
from holdfast.esxi.agent.frames import Piece
from holdfast.esxi.agent_answers import (
    AgentHello,
    FarEntry,
    Found,
    broken,
    entry_of,
    failure_in,
    found_in,
    grouped,
    list_in,
    number_in,
    object_in,
    records_in,
    slices,
)
from holdfast.esxi.names import printable
from holdfast.units import KIB, MIB

__all__ = ["AgentLink", "FarFile", "Transport"]

_BANNER_BYTES: Final = 256 * KIB
_REQUESTS: Final = 32
_REQUEST_BYTES: Final = 8 * MIB
_SCAN_PIECES: Final = 8
_LONG_BYTES: Final = 16 * KIB
_FETCH_BYTES: Final = MIB
_FETCHES: Final = 6
_ENTRIES: Final = 20000
_END_S: Final = 10.0
_LAST_WORDS_S: Final = 2.0


class Transport(Protocol):
    """A running command's standard streams; `holdfast.ssh.link.Channel` is one."""

    def read(self, limit_bytes: int, /) -> bytes:
        """The next bytes of its output, empty at its end."""
        ...

    def readinto(self, buffer: memoryview, /) -> int:
        """How many bytes of its output were put into `buffer`; 0 at its end."""
        ...

    def write(self, data: bytes, /) -> None:
        """Sends all of `data` to its input."""
        ...

    def close(self) -> None:
        """Ends it; a `read` that waits returns."""
        ...


@dataclass(slots=True)
class _Pending:
    """A request that waits for its answers. `held`: what it takes of the room for outstanding bytes."""

    held: int
    answers: deque[tuple[int, bytes | memoryview]] = field(default_factory=deque)
    done: bool = False


class AgentLink:
    """A running agent. Use `start`; close it when done.

    Args:
        transport: owned, and closed by `close`.
        silence_s: how long the agent may say nothing while it is asked something.
    """

    def __init__(self, transport: Transport, *, silence_s: float = 300.0) -> None:
        self._transport = transport
        self._silence_s = silence_s
        self._buffer = bytearray()
        self._at_end = False
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._held = 0
        self._number = 0
        self._failure: HoldfastError | None = None
        self._receiver = threading.Thread(target=self._receive, name="agent-link", daemon=True)
        self._heard_s = time.monotonic()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.hello = AgentHello(0, "", (), knows_holes=False)
        self.pin: Pin | None = None
        """What the host says that our key is limited to."""

    @classmethod
    def start(cls, transport: Transport, *, silence_s: float = 300.0) -> AgentLink:
        """The agent, running, over a transport on which `bundle.bootstrap_command` was started.

        Raises:
            LinkError: the host has no Python that can run it, or something else answers.
            KeyLimited: the host runs the agent of another version of Holdfast only.
            LinkLost: the connection broke.
        """
        link = cls(transport, silence_s=silence_s)
        try:
            link.pin = link._await_ready()
            if link.pin is not None and not link.pin.is_present:
                raise KeyLimited(
                    "the host runs the agent of another version of Holdfast for this key, and no other program",
                    hint="link the host again, with the same --restrict; its password is needed once more",
                )
            link._write(program(limited=link.pin is not None))
            link._receiver.start()
            said = link._ask_json(frames.HELLO, {"version": frames.VERSION})
            link.hello = AgentHello(
                version=number_in(said, "version"),
                python=str(said.get("python", ""))[:40],
                chunkers=tuple(str(name) for name in list_in(said, "chunkers")),
                knows_holes=said.get("holes") is True,
                level=str(said.get("level", ""))[:20],
            )
            if link.hello.version != frames.VERSION:
                raise LinkError(
                    f"the agent speaks version {link.hello.version} of the protocol, not {frames.VERSION}"
                )
        except BaseException:
            link.close()
            raise
        return link

    def close(self) -> None:
        """Ends the agent. May be called twice."""
        self._fail(LinkLost("the agent's channel was closed"))
        self._transport.close()
        # Whoever closes descriptors after this must not have them read by a thread that is still on its way.
        if self._receiver.is_alive() and self._receiver is not threading.current_thread():
            self._receiver.join(_END_S)

    @property
    def is_alive(self) -> bool:
        """Whether it can still be asked something, as far as is known."""
        return self._failure is None

    def ask(self, kind: int, payload: bytes) -> Iterator[bytes]:
        """Yields the payloads of the answers to a request of any kind, as they come.

        Raises:
            SourceError: the agent could not do what was asked.
            KeyLimited: our key may not do that.
            LinkError: the connection or the protocol broke.
        """
        return map(bytes, self._answers(self._ask(kind, payload)))

    # Files

    def stat(self, path: str) -> FarEntry:
        """What is at that path.

        Raises:
            SourceNotFound, SourceUnreadable: the host says so.
        """
        return entry_of(self._ask_json(frames.STAT, {"path": path}))

    def list_folder(self, path: str) -> tuple[FarEntry, ...]:
        """What is in that folder, by name.

        Raises:
            SourceNotFound, SourceUnreadable: the host says so.
        """
        entries = list_in(self._ask_json(frames.LIST, {"path": path}), "entries")
        if len(entries) >= _ENTRIES:
            raise SourceError(f"{printable(path)} has more than {_ENTRIES} entries")
        return tuple(entry_of(entry) for entry in entries if isinstance(entry, dict))

    def open(self, path: str, *, writable: bool = False) -> FarFile:
        """A file on the host. It must exist.

        Raises:
            SourceNotFound, SourceUnreadable: the host says so.
        """
        said = self._ask_json(frames.OPEN, {"path": path, "writable": writable})
        return FarFile(self, path, number_in(said, "handle"), number_in(said, "size"))

    def set_pace(self, bytes_per_s: int) -> None:
        """Has the agent read and write no faster than that; 0: as fast as it can."""
        self._ask_json(frames.PACE, {"bytes_per_s": bytes_per_s})

    # Disks

    def cutter(self, name: str, chunk_size_bytes: int, seed: bytes) -> int:
        """The number of a chunker, for `scan`.

        Raises:
            SourceError: the agent does not know it.
        """
        wanted = {"name": name, "chunk_size": chunk_size_bytes, "seed": seed.hex()}
        return number_in(self._ask_json(frames.CUTTER, wanted), "cutter")

    def scan(self, cutter: int, pieces: Iterable[Piece]) -> Iterator[Found]:
        """Yields what is in each of the ranges, in their order; labels must differ.

        Pieces are taken from the iterable as the agent gets to them.

        Raises:
            SourceError: a range can not be read.
            LinkError: the agent broke the protocol.
        """
        prefix = struct.pack("<I", cutter)
        batches = grouped(pieces, _SCAN_PIECES, None)
        for batch, answers in self._windowed(frames.SCAN, batches, prefix, 4):
            found: dict[int, Found] = {}
            wanted = {piece.label: piece for piece in batch}
            for payload in answers:
                one = found_in(payload, wanted)
                found[one.label] = one
            if len(found) != len(batch):
                raise broken(f"it answered for {len(found)} of {len(batch)} ranges")
            for piece in batch:
                yield found[piece.label]

    def fetch(self, pieces: Iterable[Piece], *, codec: int = frames.AUTO) -> Iterator[bytes | memoryview]:
        """Yields the bytes of the ranges, in their order. Labels do not matter.

        Args:
            codec: how they travel; see `Deflator`.

        Raises: as `scan`.
        """
        prefix = bytes([codec])
        ends: deque[bool] = deque()

        def split() -> Iterator[Piece]:
            number = 0
            for piece in pieces:
                parts = list(slices(piece.runs, _FETCH_BYTES))
                for place, runs in enumerate(parts):
                    ends.append(place == len(parts) - 1)
                    yield Piece(number & 0xFFFFFFFF, runs)
                    number += 1

        whole: list[bytes | memoryview] = []
        for batch, answers in self._windowed(
            frames.FETCH, grouped(split(), 256, _FETCH_BYTES), prefix, _FETCHES
        ):
            data = records_in(batch, answers)
            for piece in batch:
                whole.append(data[piece.label])
                if ends.popleft():
                    yield whole[0] if len(whole) == 1 else b"".join(whole)
                    whole.clear()

    def hashes(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        """Yields the SHA-256 of each range as the host reads it back, in their order. Labels must differ.

        A range is at most 2 MiB long. Raises: as `scan`.
        """
        for batch, answers in self._windowed(frames.HASH, grouped(pieces, 256, 16 * MIB), b"\0", _FETCHES):
            data = b"".join(answers)
            if len(data) % frames.HASHED.size:
                raise broken("its hashes are cut off")
            found = dict(frames.HASHED.iter_unpack(data))
            if set(found) != {piece.label for piece in batch}:
                raise broken("it hashed other ranges than it was asked to")
            for piece in batch:
                yield found[piece.label]

    def _end(self, handle: int, kind: int) -> None:
        object_in(list(self._answers(self._ask(kind, struct.pack("<H", handle)))))

    def _windowed(
        self, kind: int, batches: Iterator[list[Piece]], prefix: bytes, window: int
    ) -> Iterator[tuple[list[Piece], Iterator[bytes | memoryview]]]:
        """Asks for batches ahead of their answers, and yields each batch with its answers, in order."""
        waiting: deque[tuple[list[Piece], int]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, self._ask(kind, prefix + frames.pack_pieces(batch))))
                if len(waiting) >= window:
                    first, request = waiting.popleft()
                    yield first, self._answers(request)
            while waiting:
                first, request = waiting.popleft()
                yield first, self._answers(request)
        finally:
            for _, request in waiting:
                with contextlib.suppress(HoldfastError):
                    deque(self._answers(request), maxlen=0)

    # Requests and answers

    def _ask_json(self, kind: int, wanted: dict[str, object]) -> dict[str, object]:
        answers = list(self._answers(self._ask(kind, json.dumps(wanted).encode())))
        return object_in(answers)

    def _ask(self, kind: int, payload: bytes) -> int:
        """Sends a request as soon as there is room for it, and returns its number."""
        held = len(payload)
        packed, flags = frames.deflated(payload)
        if len(packed) > frames.MAX_PAYLOAD_BYTES or held > frames.MAX_INFLATED_BYTES:
            raise LinkError(f"a request of {held} bytes is too long for the agent")
        with self._changed:
            self._wait(
                lambda: (
                    len(self._pending) < _REQUESTS
                    and (self._held == 0 or self._held + held <= _REQUEST_BYTES)
                )
            )
            self._number = self._number % 0xFFFFFFFF + 1
            request = self._number
            if not self._pending:
                self._heard_s = time.monotonic()
            self._pending[request] = _Pending(held)
            self._held += held
        self._write(frames.pack(kind, request, packed, flags) + packed)
        return request

    def _answers(self, request: int) -> Iterator[bytes | memoryview]:
        """Yields the payloads of a request's answers as they come.

        Raises:
            SourceError: the agent could not do what was asked.
            LinkError: the connection or the protocol broke.
        """
        failed: HoldfastError | None = None
        pending = self._pending[request]
        while True:
            with self._changed:
                self._wait(lambda: bool(pending.answers) or pending.done)
                if not pending.answers:
                    break
                kind, payload = pending.answers.popleft()
            if kind == frames.FAILED:
                failed = failed or failure_in(payload)
            elif failed is None:
                yield payload
        with self._changed:
            del self._pending[request]
            self._changed.notify_all()
        if failed is not None:
            raise failed

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Returns, with the condition held, when `ready`.

        Raises:
            LinkError: the connection broke, or the agent is silent for too long.
        """
        while not ready():
            if self._failure is not None:
                raise self._failure
            left = self._heard_s + self._silence_s - time.monotonic()
            if left <= 0:
                raise LinkTimeout(
                    f"the agent on the host has said nothing for {self._silence_s:.0f} s",
                    hint="the host may be overloaded, or its storage may hang",
                )
            self._changed.wait(min(left, 60.0))

    def _receive(self) -> None:
        try:
            while True:
                frame = frames.receive(self._read_exactly)
                if frame is None:
                    raise _ended()
                kind, flags, request, payload = frame
                with self._changed:
                    pending = self._pending.get(request)
                    if pending is None or pending.done:
                        raise broken(f"it answers request {request}, which nobody made")
                    self._heard_s = time.monotonic()
                    pending.answers.append((kind, payload))
                    if flags & frames.LAST:
                        pending.done = True
                        self._held -= pending.held
                    self._changed.notify_all()
        except frames.FrameError as error:
            self._fail(_ended() if self._at_end else broken(str(error)))  # killed in the middle of a frame
        except HoldfastError as error:
            self._fail(error)
        except (OSError, ValueError) as error:  # of a transport that is closed meanwhile
            self._fail(LinkLost(f"the agent's channel broke ({error})"))

    def _fail(self, error: HoldfastError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        with self._sending:
            if self._failure is not None:
                raise self._failure
            try:
                self._transport.write(data)
            except (OSError, ValueError) as error:
                raise self._reason(LinkLost(f"the agent's channel broke ({error})")) from None
            self.sent_bytes += len(data)

    def _reason(self, error: HoldfastError) -> HoldfastError:
        """Why nothing can be sent any more: whoever receives learns how the agent has ended, though maybe a moment later."""
        if self._receiver.is_alive():
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None, _LAST_WORDS_S)
        return self._failure or error

    def _read_exactly(self, count: int) -> bytes | memoryview:
        """So many bytes, fewer at the end. What is long is read into its place at once: copies are made under the interpreter's lock."""
        if count < _LONG_BYTES:
            while len(self._buffer) < count and (data := self._transport.read(_LONG_BYTES)):
                self.received_bytes += len(data)
                self._buffer += data
            taken = bytes(self._buffer[:count])
            del self._buffer[:count]
            self._at_end = len(taken) < count
            return taken
        whole = memoryview(bytearray(count))
        have = min(count, len(self._buffer))
        whole[:have] = self._buffer[:have]
        del self._buffer[:have]
        while have < count and (got := self._transport.readinto(whole[have:])):
            self.received_bytes += got
            have += got
        self._at_end = have < count
        return whole[:have]

    def _await_ready(self) -> Pin | None:
        """Reads past whatever the host prints at login, up to the line by which the bootstrap says that it runs, and returns
        what our key is limited to.
        """
        mark = b"\n" + frames.READY + b" "
        while True:
            at = self._buffer.find(mark)
            end = self._buffer.find(b"\n", at + len(mark)) if at >= 0 else -1
            if end >= 0:
                words = self._buffer[at + len(mark) : end].decode("utf-8", "replace")
                del self._buffer[: end + 1]
                return pin_in(words)
            if len(self._buffer) > _BANNER_BYTES:
                raise LinkError("the host prints something else than the agent's first words")
            before = len(self._buffer)
            try:
                data = self._transport.read(64 * KIB)
            except (OSError, ValueError) as error:
                raise LinkLost(f"the agent's channel broke ({error})") from None
            self._buffer += data
            if len(self._buffer) == before:
                words = printable(bytes(self._buffer[-300:]).decode("utf-8", "replace").strip())
                raise LinkError(
                    f"the agent did not start on the host: {words or 'nothing was said'}",
                    hint="ESXi 6.5 and later have a python3 of their own: is it in the PATH of this account, and has the host memory left?",
                )


def _ended() -> LinkLost:
    return LinkLost(
        "the agent on the host has ended",
        hint="the host may be short of memory and have killed it: try again",
    )


class FarFile:
    """A file on the host; a `RangeReader` that can also be written to, if it was opened so."""

    def __init__(self, link: AgentLink, path: str, handle: int, size_bytes: int) -> None:
        self.path: Final = path
        self.handle: Final = handle
        self._link = link
        self._size_bytes = size_bytes
        self._writes: deque[int] = deque()
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Its length when it was opened."""
        return self._size_bytes

    def piece(self, label: int, offset: int, length: int, expected: bytes | None = None) -> Piece:
        """A range of this file alone, for `scan`, `fetch` and `hashes`."""
        return Piece(label, [(length, self.handle, offset)], expected)

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`; fewer where the file ends.

        Raises:
            SourceError: it can not be read.
        """
        length = min(length, self._size_bytes - offset)
        return b"".join(self._link.fetch([self.piece(0, offset, length)])) if length > 0 else b""

    def write(self, offset: int, data: bytes) -> None:
        """Sends bytes to be written, at most 2 MiB; `sync` tells whether they were.

        Raises:
            SourceError: an earlier write failed.
        """
        assert len(data) <= 2 * MIB, "more than fits into a request"
        while len(self._writes) >= _REQUESTS // 2:
            self._settle()
        request = self._link._ask(frames.WRITE, frames.PLACE.pack(self.handle, offset) + data)  # noqa: SLF001
        self._writes.append(request)

    def sync(self) -> None:
        """Returns when all that was written is on the host's disk.

        Raises:
            SourceError: a write failed.
        """
        while self._writes:
            self._settle()
        self._link._end(self.handle, frames.SYNC)  # noqa: SLF001

    def close(self) -> None:
        """Closes the file on the host. May be called twice."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(HoldfastError):
                while self._writes:
                    self._settle()
                self._link._end(self.handle, frames.CLOSE)  # noqa: SLF001

    def _settle(self) -> None:
        object_in(list(self._link._answers(self._writes.popleft())))  # noqa: SLF001
