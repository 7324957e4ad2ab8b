# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""What a key that is limited to the agent has in place of a shell: commands of the host, small files, folders.

Everything passes the gate first. A command runs as a list of words, without a shell, with nothing to read and a PATH of
its own; its output is sent as it comes, and a sign of life if none does. When the agent ends, so does what it has started.

Each command has a thread of its own, since some wait for hours (a consolidation) or for another one (a question).
"""

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from typing import Any, Callable, Dict, List, Set, Tuple

from holdfast.esxi.agent import frames
from holdfast.esxi.agent.allowed import Allowed
from holdfast.esxi.agent.files import as_bytes, write_all
from holdfast.esxi.agent.gate import MARKER, Gate

MAX_COMMANDS = 12
MAX_READ_BYTES = 128 << 20
_PATH = "/bin:/sbin:/usr/bin:/usr/sbin"
_STEP_BYTES = 64 << 10
_TAIL_BYTES = 4096
_LIFE_S = 20.0
_LOOK_S = 120.0
_LAST_WORDS_S = 2.0
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

Sending = Callable[[int, int, bytes], None]


def limited_to(level: str, send: Sending) -> "Tools":
    """The tools for a key of that level."""
    return Tools(Gate(level), send)


class Tools(object):
    """Does what the gate lets through.

    Args:
        send: puts an answer that is not the last one, given its kind, request and payload.
    """

    def __init__(self, gate: Gate, send: Sending) -> None:
        self.gate = gate
        self._send = send
        self._allowed = Allowed(gate, self._ask)
        self._children = set()  # type: Set[Any]
        self._lock = threading.Lock()
        # Or a folder could change between being looked at and being completed.
        self._writing = threading.Lock()
        self._ended = False

    def verbs(self) -> Dict[int, Callable[[bytes], Any]]:
        """Kind of request -> what does it."""
        return {frames.MAKE: self._make, frames.PUT: self._put, frames.COMPLETE: self._complete}

    def end(self) -> None:
        """Ends all commands that are running, and lets none start."""
        with self._lock:
            self._ended = True
            for child in self._children:
                _kill(child)

    def run(self, payload: bytes, request: int, buffer: bytearray) -> Any:
        """A command, to its end. Its output goes before the answer."""
        wanted = json.loads(payload.decode("utf-8"))
        words, together = wanted["words"], bool(wanted["together"])
        instead = self._allowed.instead(words)
        if instead is not None:
            self._send(frames.DATA, request, instead[1].encode("utf-8", "surrogateescape"))
            return buffer, frames.RESULT, _ended_with(instead[0], b"", False)
        try:
            child = self._start(words, together)
        except FileNotFoundError:
            return buffer, frames.RESULT, _ended_with(127, words[0].encode() + b": not found", False)
        try:
            until = time.monotonic() + float(wanted["timeout_s"])
            tail, expired = self._pass_on(child, request, until)
        finally:
            self._forget(child)
        return buffer, frames.RESULT, _ended_with(child.returncode, tail, expired)

    def read(self, payload: bytes, request: int, buffer: bytearray) -> Any:
        """A small file; its content goes before the answer."""
        wanted = json.loads(payload.decode("utf-8"))
        path, limit = self.gate.readable(wanted["path"]), min(int(wanted["limit"]), MAX_READ_BYTES)
        descriptor = os.open(as_bytes(path), os.O_RDONLY | os.O_NONBLOCK | _NO_LINK)
        with os.fdopen(descriptor, "rb", 0) as file:
            size = 0
            while size <= limit:
                data = file.read(min(_STEP_BYTES, limit + 1 - size))
                if not data:
                    break
                size += len(data)
                self._send(frames.DATA, request, data)
        return buffer, frames.RESULT, json.dumps({"size": size}).encode("ascii")

    # Commands

    def _start(self, words: List[str], together: bool) -> Any:
        with self._lock:
            if self._ended or len(self._children) >= MAX_COMMANDS:
                raise OSError(errno.EAGAIN, "too many commands run at once")
            child = subprocess.Popen(
                [as_bytes(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if together else subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
            self._children.add(child)
            return child

    def _forget(self, child: Any) -> None:
        with self._lock:
            self._children.discard(child)
            _kill(child)
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()

    def _pass_on(self, child: Any, request: int, until: float) -> Tuple[bytes, bool]:
        """Sends what a command prints until it ends; the end of its standard error, and whether its time was over."""
        streams = [stream for stream in (child.stdout, child.stderr) if stream is not None]
        tail, alive, gone = b"", time.monotonic(), 0.0
        while streams or child.poll() is None:
            now = time.monotonic()
            if now >= until:
                return tail, True
            if child.poll() is not None:  # what it has started may hold its output open
                gone = gone or now
                if now > gone + _LAST_WORDS_S:
                    break
            ready = select.select(streams, [], [], min(1.0 if streams else 0.02, until - now))[0]
            if not ready and now > alive + _LIFE_S:
                self._send(frames.DATA, request, b"")
                alive = now
            for stream in ready:
                data = os.read(stream.fileno(), _STEP_BYTES)
                if not data:
                    streams.remove(stream)
                elif stream is child.stderr:
                    tail = (tail + data)[-_TAIL_BYTES:]
                else:
                    self._send(frames.DATA, request, data)
                    alive = now
        return tail, False

    def _ask(self, words: List[str]) -> Tuple[int, str]:
        child = self._start(words, False)
        try:
            output = child.communicate(timeout=_LOOK_S)[0]
            return child.returncode, output.decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            raise OSError(errno.ETIMEDOUT, "the host does not answer") from None
        finally:
            self._forget(child)

    # Folders and files

    def _make(self, payload: bytes) -> Any:
        wanted = json.loads(payload.decode("utf-8"))
        marker = wanted["marker"].encode("utf-8")[:_TAIL_BYTES]
        with self._writing:
            folder = self.gate.new_folder(wanted["path"])
            os.mkdir(as_bytes(folder))
            try:
                _write(folder + "/" + MARKER, os.O_EXCL, 0, marker, self.gate.still)
            except OSError:  # the datastore is full; without its marker nobody could go on with the folder
                shutil.rmtree(as_bytes(folder), ignore_errors=True)
                raise
        return {}

    def _put(self, payload: bytes) -> Any:
        offset, length = frames.PUTS.unpack_from(payload)
        path, data = (
            payload[frames.PUTS.size :][:length].decode("utf-8"),
            payload[frames.PUTS.size + length :],
        )
        with self._writing:
            _write(self.gate.put(path, offset, data), 0, offset, data, self.gate.still)
        return {"written": len(data)}

    def _complete(self, payload: bytes) -> Any:
        with self._writing:
            folder = self.gate.complete(json.loads(payload.decode("utf-8"))["path"])
            if hasattr(os, "sync"):
                os.sync()
            os.unlink(as_bytes(folder + "/" + MARKER))
        return {}


def _write(path: str, how: int, offset: int, data: bytes, still: Callable[[str], None]) -> None:
    """The data is in the file, and on the disk; what is written at its beginning is all that is in it then.

    Args:
        still: told when the file is open and before anything is written; raises if it must not be.
    """
    descriptor = os.open(as_bytes(path), os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | _NO_LINK | how, 0o644)
    try:
        still(path)
        if offset == 0:
            os.ftruncate(descriptor, 0)
        write_all(descriptor, memoryview(data), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _environment() -> Dict[str, str]:
    """What commands get: what sshd gave us, but nothing that changes which program runs, or how."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LD_", "PYTHON")) and name not in ("SSH_ORIGINAL_COMMAND", "ENV", "BASH_ENV")
    }
    kept["PATH"] = _PATH
    return kept


def _kill(child: Any) -> None:
    """Ends a command that still runs, and whatever it has started, at once."""
    if child.poll() is not None:
        return
    with contextlib.suppress(OSError):  # it has just ended; or the host knows no groups of processes
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        child.kill()


def _ended_with(status: int, tail: bytes, expired: bool) -> bytes:
    said = {"status": status, "stderr": tail.decode("utf-8", "replace"), "expired": expired}
    return json.dumps(said).encode("ascii")
