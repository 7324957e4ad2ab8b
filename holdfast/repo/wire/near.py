"""The near side of a connection: asks, from any number of threads, without waiting for the answer to the last question.

A thread reads all answers and gives each to whoever asked; it never waits for anything else, so the far side can
always get rid of what it has to say. Requests are numbered in the order in which they are sent.

Where the other side is far away, one stream is slower than the link: SSH has two MiB under way at a time. So when there is much to move, further
streams are opened beside the work, as many as are wanted, and what is large goes over the one that has the least to do. Each has a thread that reads it.

Invariants: an answer is used only if it is of the kind that was asked for; when the connection breaks, or the other
side breaks the rules, everything that waits gets the one error that says why, and so does everything later.

Does not reconnect: what a command has done, and what it may do again, only its session knows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeVar, cast

from holdfast.errors import FarSideEnded, HoldfastError, LinkError, LinkLost, ProtocolError
from holdfast.repo.wire.faults import raised_by
from holdfast.repo.wire.frames import Decoder, encode_frames
from holdfast.repo.wire.messages import (
    VERSION,
    Failure,
    Hello,
    Invitation,
    Invite,
    Join,
    Message,
    Ping,
    Request,
    decode_message,
    encode_message,
)
from holdfast.repo.wire.stream import Stream
from holdfast.ssh.link import printable
from holdfast.version import VERSION as SOFTWARE

__all__ = ["Connection", "Further"]

M = TypeVar("M", bound=Message)

_READ_BYTES: Final = 256 * 1024
_QUIET_S: Final = 30.0
_GOODBYE_S: Final = 15.0
_FAR_S: Final = 0.008
"""A round trip from which on one stream is slower than a fast link."""
_WIDEN_AFTER_BYTES: Final = 4 << 20
"""Less is moved before another stream is open."""
_LOGINS_AT_ONCE: Final = 4
"""An SSH server turns some away where ten are under way (MaxStartups)."""


@dataclass(frozen=True, slots=True)
class Further:
    """How a connection gets more streams than its first.

    Args:
        open: another stream to the same far side.
        most: streams, with the first.
        eager: open them as soon as anything large is moved, however near the other side is.
    """

    open: Callable[[], Stream]
    most: int
    eager: bool


class _Lane:
    """A stream of the connection, and what is known of it."""

    def __init__(self, stream: Stream, decoder: Decoder) -> None:
        self.stream = stream
        self.decoder = decoder
        self.writing = threading.Lock()
        self.under_way = 0
        self.reader: threading.Thread | None = None


class _Waiting(NamedTuple):
    answer: type[Message]
    future: Future[Message]
    lane: _Lane
    weight: int
    since_s: float


class Connection:
    """See the module. Thread-safe.

    Args:
        name: of the other side, for messages.
        first: requests that are sent behind the greeting, without waiting for its answer.
        further: None for one stream only.

    Attributes:
        opening: the answers to `first`.
    """

    def __init__(
        self,
        stream: Stream,
        name: str,
        first: Sequence[Request[Any]] = (),
        *,
        further: Further | None = None,
    ) -> None:
        self.name = name
        self.sent_bytes = 0
        self.received_bytes = 0
        self.requests = 0
        self._further = further
        self._lock = threading.Lock()  # guards what follows
        self._lanes = [_Lane(stream, Decoder())]
        self._moved_bytes = 0
        self._round_trip_s = float("inf")
        self._waiting: dict[int, _Waiting] = {}
        self._failure: HoldfastError | None = None
        self._closed = threading.Event()
        self._spoke = threading.Event()
        self._widening: threading.Thread | None = None
        self._listen(self._lanes[0])
        try:
            welcome = self.begin(Hello(VERSION, VERSION, f"Holdfast {SOFTWARE}"))
            self.opening: list[Future[Any]] = [self.begin(request) for request in first]
            self.welcome = welcome.result()
            if self.welcome.version != VERSION:
                raise ProtocolError(f"{name} wants to speak version {self.welcome.version} of the protocol")
        except BaseException:
            self.close()
            raise
        self._round_trip_s = float("inf")  # the first answer had the other side's start in it
        threading.Thread(target=self._keep_alive, name="holdfast-keep-alive", daemon=True).start()

    @property
    def streams(self) -> int:
        """How many there are."""
        return len(self._lanes)

    def use_streams(self, count: int) -> None:
        """Sets how many there may be, for what is moved from now on, however near the other side is."""
        with self._lock:
            if self._further is not None:
                self._further = replace(self._further, most=count, eager=True)

    # --- asking

    def ask(self, request: Request[M]) -> M:
        """The answer to a request.

        Raises:
            HoldfastError: what the other side says has gone wrong.
            LinkError: the connection is gone.
        """
        return self.begin(request).result()

    def begin(
        self,
        request: Request[M],
        on_answer: Callable[[Future[M]], None] | None = None,
        *,
        weight: int = 0,
    ) -> Future[M]:
        """Sends a request and returns at once; the answer, or the error, comes later.

        Args:
            on_answer: called from a reading thread; it must not wait for anything.
            weight: bytes of data that go with it, or with its answer.
        """
        kind, body = encode_message(request)
        future: Future[Message] = Future()
        if on_answer is not None:
            future.add_done_callback(cast("Callable[[Future[Message]], None]", on_answer))
        lane = self._lane(weight)
        with lane.writing:  # on each stream numbers go up
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                self.requests += 1
                number = self.requests
                self._waiting[number] = _Waiting(request.answer, future, lane, weight, time.monotonic())
            try:
                self._write(lane, encode_frames(number, kind, body))
            except LinkError as error:
                failed = error
            else:
                return cast("Future[M]", future)
        if lane.reader is not None:
            lane.reader.join(_GOODBYE_S)  # it knows better why
        self._fail(failed)
        raise self._failure or failed

    def _lane(self, weight: int) -> _Lane:
        """The stream for a request."""
        if not weight:
            return self._lanes[0]
        with self._lock:
            self._moved_bytes += weight
            lane = min(self._lanes, key=lambda one: one.under_way)
            lane.under_way += weight
            if self._widening is None and self._is_slow():
                self._widening = threading.Thread(target=self._widen, name="holdfast-widen", daemon=True)
                self._widening.start()
        return lane

    def _write(self, lane: _Lane, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        lane.stream.write(parts)
        self.sent_bytes += sum(map(len, parts))
        if lane is self._lanes[0]:
            self._spoke.set()

    # --- further streams

    def _is_slow(self) -> bool:
        """Whether more streams would do it good. Called with the lock held."""
        further = self._further
        if further is None or further.most < 2:
            return False
        return further.eager or (self._round_trip_s >= _FAR_S and self._moved_bytes >= _WIDEN_AFTER_BYTES)

    def _widen(self) -> None:
        """Opens more streams, some at a time. What goes wrong with one is no matter: the others go on."""
        assert self._further is not None
        further = self._further
        with contextlib.suppress(HoldfastError):
            invitation = self.ask(Invite())
            wanted = iter(range(further.most - len(self._lanes)))
            logins = [
                threading.Thread(target=self._log_in, args=(further, invitation, wanted), daemon=True)
                for _ in range(min(_LOGINS_AT_ONCE, further.most - 1))
            ]
            for login in logins:
                login.start()
            for login in logins:
                login.join()

    def _log_in(self, further: Further, invitation: Invitation, wanted: Iterator[int]) -> None:
        """Opens streams until no more are wanted."""
        with contextlib.suppress(HoldfastError, OSError, ValueError):
            for _ in wanted:
                if not self._add(further.open(), invitation):
                    return

    def _add(self, stream: Stream, invitation: Invitation) -> bool:
        """Takes a stream into use; False if none is needed any more."""
        try:
            lane = _Lane(stream, _joined(stream, invitation))
            with self._lock:
                if not self._closed.is_set() and self._failure is None:
                    self._lanes = [*self._lanes, lane]
                    self._listen(lane)
                    return True
        except BaseException:
            stream.close()
            raise
        stream.close()
        return False

    def _keep_alive(self) -> None:
        """Says something now and then, so that the far side can tell a quiet client from a lost one."""
        while not self._closed.wait(_QUIET_S):
            if self._spoke.is_set():
                self._spoke.clear()
                continue
            try:
                self.begin(Ping())
            except HoldfastError:
                return

    # --- answers

    def _listen(self, lane: _Lane) -> None:
        lane.reader = threading.Thread(target=self._read, args=(lane,), name="holdfast-answers", daemon=True)
        lane.reader.start()

    def _read(self, lane: _Lane) -> None:
        decoder = lane.decoder
        try:
            while data := lane.stream.read(_READ_BYTES):
                self.received_bytes += len(data)
                try:
                    for packet in decoder.feed(data):
                        self._answer(packet.request, decode_message(packet.kind, packet.body, packet.more))
                except ProtocolError as error:
                    raise self._explained(error, decoder) from None
            if decoder.rest and not decoder.frames:
                raise self._explained(ProtocolError("it ended at once"), decoder)
            if not self._closed.is_set():
                raise lane.stream.ended()
            self._fail(LinkLost(f"the connection to {self.name} was closed from this side"))
        except HoldfastError as error:
            self._fail(error)
        except (OSError, ValueError) as error:
            self._fail(LinkLost(f"the connection to {self.name} broke off ({error})"))

    def _explained(self, error: ProtocolError, decoder: Decoder) -> ProtocolError:
        if decoder.frames or self.received_bytes > len(decoder.rest):
            return ProtocolError(f"{self.name}: {error.message}")
        return ProtocolError(
            f"{self.name} did not answer as Holdfast does, but said: {printable(decoder.rest)}",
            hint="see to it that logins without a terminal print nothing over there (.bashrc, banners)",
        )

    def _answer(self, number: int, message: Message) -> None:
        if number == 0 and isinstance(message, Failure):  # it could not even tell what we had asked
            raise raised_by(message, self.name)
        with self._lock:
            waiting = self._waiting.pop(number, None)
            if waiting is None:
                raise ProtocolError("an answer came to a question that was not asked, or for the second time")
            waiting.lane.under_way -= waiting.weight
            if not waiting.weight:
                self._round_trip_s = min(self._round_trip_s, time.monotonic() - waiting.since_s)
        if isinstance(message, Failure):
            waiting.future.set_exception(raised_by(message, self.name))
        elif isinstance(message, waiting.answer):
            waiting.future.set_result(message)
        else:
            error = ProtocolError("an answer is not of the kind that was asked for")
            waiting.future.set_exception(error)
            raise error

    def _fail(self, error: HoldfastError) -> None:
        with self._lock:
            self._failure = self._failure or error
            error = self._failure
            waiting, self._waiting = self._waiting, {}
        for one in waiting.values():
            with contextlib.suppress(Exception):
                one.future.set_exception(error)

    # --- the end

    def close(self) -> None:
        """Ends the connection: the far side has let go of everything when this returns. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            lanes = self._lanes
        # The end of the first is the connection's: the far side has let go of everything when its answers end.
        for lane in lanes:
            with lane.writing, contextlib.suppress(LinkError, FarSideEnded):
                lane.stream.close_write()
            if lane.reader is not None:
                lane.reader.join(_GOODBYE_S)
            lane.stream.close()
            if lane.reader is not None:
                lane.reader.join(_GOODBYE_S)
        self._fail(LinkLost(f"the connection to {self.name} was closed from this side"))


def _joined(stream: Stream, invitation: Invitation) -> Decoder:
    """Makes a stream one of the connection that has given an invitation.

    Returns:
        What decodes its answers from now on.

    Raises:
        ProtocolError, LinkError: it can not be.
    """
    decoder = Decoder()
    requests: list[Request[Any]] = [
        Hello(VERSION, VERSION, f"Holdfast {SOFTWARE}"),
        Join(invitation.door, invitation.secret),
    ]
    for number, request in enumerate(requests, 1):
        stream.write(encode_frames(number, *encode_message(request)))
        answers: list[Message] = []
        while not answers:
            data = stream.read(_READ_BYTES)
            if not data:
                raise stream.ended()
            answers += [
                decode_message(packet.kind, packet.body, packet.more) for packet in decoder.feed(data)
            ]
        if len(answers) != 1 or not isinstance(answers[0], request.answer):
            raise ProtocolError("a further stream was not taken")
    return decoder
