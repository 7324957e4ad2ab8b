"""The near side of a connection: asks, from any number of threads, without waiting for the answer to the last question.

One thread reads all answers and gives each to whoever asked; it never waits for anything else, so the far side can
always get rid of what it has to say. Requests are numbered in the order in which they are sent.

Invariants: an answer is used only if it is of the kind that was asked for; when the connection breaks, or the other
side breaks the rules, everything that waits gets the one error that says why, and so does everything later.

Does not reconnect: what a command has done, and what it may do again, only its session knows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar, cast

from holdfast.errors import FarSideEnded, HoldfastError, LinkError, LinkLost, ProtocolError
from holdfast.repo.wire.faults import raised_by
from holdfast.repo.wire.frames import Decoder, encode_frames
from holdfast.repo.wire.messages import (
    VERSION,
    Failure,
    Hello,
    Message,
    Ping,
    Request,
    decode_message,
    encode_message,
)
from holdfast.repo.wire.stream import Stream
from holdfast.ssh.link import printable
from holdfast.version import VERSION as SOFTWARE

__all__ = ["Connection"]

M = TypeVar("M", bound=Message)

_READ_BYTES: Final = 256 * 1024
_QUIET_S: Final = 30.0
_GOODBYE_S: Final = 15.0


class Connection:
    """See the module. Thread-safe.

    Args:
        name: of the other side, for messages.
        first: requests that are sent behind the greeting, without waiting for its answer.

    Attributes:
        opening: their answers.
    """

    def __init__(self, stream: Stream, name: str, first: Sequence[Request[Any]] = ()) -> None:
        self.name = name
        self.sent_bytes = 0
        self.received_bytes = 0
        self.requests = 0
        self._stream = stream
        self._lock = threading.Lock()  # guards what follows
        self._waiting: dict[int, tuple[type[Message], Future[Message]]] = {}
        self._failure: HoldfastError | None = None
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._spoke = threading.Event()
        self._reader = threading.Thread(target=self._read, name="holdfast-answers", daemon=True)
        self._reader.start()
        try:
            welcome = self.begin(Hello(VERSION, VERSION, f"Holdfast {SOFTWARE}"))
            self.opening: list[Future[Any]] = [self.begin(request) for request in first]
            self.welcome = welcome.result()
            if self.welcome.version != VERSION:
                raise ProtocolError(f"{name} wants to speak version {self.welcome.version} of the protocol")
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._keep_alive, name="holdfast-keep-alive", daemon=True).start()

    # --- asking

    def ask(self, request: Request[M]) -> M:
        """The answer to a request.

        Raises:
            HoldfastError: what the other side says has gone wrong.
            LinkError: the connection is gone.
        """
        return self.begin(request).result()

    def begin(self, request: Request[M], on_answer: Callable[[Future[M]], None] | None = None) -> Future[M]:
        """Sends a request and returns at once; the answer, or the error, comes later.

        Args:
            on_answer: called from the reading thread; it must not wait for anything.
        """
        kind, body = encode_message(request)
        future: Future[Message] = Future()
        if on_answer is not None:
            future.add_done_callback(cast("Callable[[Future[Message]], None]", on_answer))
        with self._writing:  # numbers go up in the order in which requests are sent
            with self._lock:
                if self._failure is not None:
                    raise self._failure
                self.requests += 1
                number = self.requests
                self._waiting[number] = request.answer, future
            try:
                for piece in encode_frames(number, kind, body):
                    self._write(piece)
            except LinkError as error:
                failed = error
            else:
                return cast("Future[M]", future)
        self._reader.join(_GOODBYE_S)  # it knows better why
        self._fail(failed)
        raise self._failure or failed

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._stream.write(data)
        self.sent_bytes += len(data)
        self._spoke.set()

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

    def _read(self) -> None:
        decoder = Decoder()
        try:
            while data := self._stream.read(_READ_BYTES):
                self.received_bytes += len(data)
                try:
                    for packet in decoder.feed(data):
                        self._answer(packet.request, decode_message(packet.kind, packet.body))
                except ProtocolError as error:
                    raise self._explained(error, decoder) from None
            if decoder.rest and not decoder.frames:
                raise self._explained(ProtocolError("it ended at once"), decoder)
            if not self._closed.is_set():
                raise self._stream.ended()
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
            wanted, future = self._waiting.pop(number, (Message, None))
        if future is None:
            raise ProtocolError("an answer came to a question that was not asked, or for the second time")
        if isinstance(message, Failure):
            future.set_exception(raised_by(message, self.name))
        elif isinstance(message, wanted):
            future.set_result(message)
        else:
            error = ProtocolError("an answer is not of the kind that was asked for")
            future.set_exception(error)
            raise error

    def _fail(self, error: HoldfastError) -> None:
        with self._lock:
            self._failure = self._failure or error
            error = self._failure
            waiting, self._waiting = self._waiting, {}
        for _, future in waiting.values():
            with contextlib.suppress(Exception):
                future.set_exception(error)

    # --- the end

    def close(self) -> None:
        """Ends the connection: the far side has let go of everything when this returns. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._writing, contextlib.suppress(LinkError, FarSideEnded):
            self._stream.close_write()
        self._reader.join(_GOODBYE_S)
        self._stream.close()
        self._reader.join(_GOODBYE_S)
        self._fail(LinkLost(f"the connection to {self.name} was closed from this side"))
