# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""The agent's engine: requests come in on standard input, answers go out on standard output.

One thread receives, one sends, a few work: while one of them cuts, another one hashes and a third one's read is under
way (reading, hashing and deflating release the interpreter's lock). Each worker has one buffer of the size of a piece.

Memory is bounded: the near side may have 32 requests and 8 MiB of them outstanding, and whoever exceeds
that is cut off; answers wait in a queue of 4 MiB, and workers wait for room in it.

The agent ends at once when standard input ends, whatever it is doing: a connection that breaks leaves nothing behind.
"""

import hashlib
import json
import os
import struct
import sys
import threading
import time
from collections import deque
from typing import Any, Callable, List, Optional

from holdfast.esxi.agent import frames
from holdfast.esxi.agent.cuts import AlignedCutter, FixedCutter
from holdfast.esxi.agent.deflating import Deflator, Rate
from holdfast.esxi.agent.files import Files, as_bytes, as_text, write_all

MAX_REQUESTS = 40
MAX_REQUESTS_BYTES = 16 << 20
MAX_ANSWERS_BYTES = 4 << 20
MAX_ENTRIES = 20000
_BATCH_BYTES = 1 << 20
_SEND_BYTES = 256 << 10
_WORKERS = 2


class Sender(object):
    """The queue of answers. Workers wait while it is full."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._frames = deque()  # type: Any
        self._bytes = 0
        self._changed = threading.Condition()
        self.rate = Rate()

    def put(self, kind: int, request: int, payload: bytes, flags: int = 0) -> None:
        """Queues a frame; waits while the queue is full."""
        head = frames.pack(kind, request, payload, flags)
        with self._changed:
            while self._bytes > MAX_ANSWERS_BYTES:
                self._changed.wait()
            self._frames.append(head)
            self._frames.append(payload)
            self._bytes += len(payload) + len(head)
            self._changed.notify_all()

    def run(self) -> None:
        """Sends what is queued, for ever."""
        while True:
            with self._changed:
                while not self._frames:
                    self._changed.wait()
                taken = [self._frames.popleft()]
                size = len(taken[0])
                while self._frames and size + len(self._frames[0]) <= _SEND_BYTES:
                    taken.append(self._frames.popleft())
                    size += len(taken[-1])
            view = memoryview(b"".join(taken) if len(taken) > 1 else taken[0])
            del taken
            began = time.monotonic()
            while view:
                view = view[os.write(self._descriptor, view[:_SEND_BYTES]) :]
            self.rate.note(size, time.monotonic() - began)
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()


class Agent(object):
    """Does what requests ask for. One for the life of the program.

    Args:
        tools: what a limited key has in place of a shell (`tools.Tools`), with the gate that it has to pass; None if the
            key has a shell anyway.
    """

    def __init__(self, plain: Any, sender: Sender, tools: Any = None) -> None:
        self._plain = plain
        self._sender = sender
        self._tools = tools
        self._gate = tools.gate if tools is not None else None
        self._files = Files()
        self._deflator = Deflator(sender.rate, _WORKERS)
        self._cutters = {}  # type: Any
        self._jobs = deque()  # type: Any
        self._changed = threading.Condition()
        self._finishing = threading.Lock()
        self._requests = 0
        self._requests_bytes = 0
        self._open = {}  # type: Any
        self._pace = 0  # bytes per second; 0: as fast as it goes
        self._paced_until = 0.0
        self._verbs = {
            frames.HELLO: self._hello, frames.STAT: self._stat, frames.LIST: self._list, frames.OPEN: self._open_file,
            frames.CLOSE: self._close, frames.CUTTER: self._cutter, frames.WRITE: self._write, frames.SYNC: self._sync,
            frames.PACE: self._set_pace,
        }  # fmt: skip
        if self._tools is not None:
            self._verbs.update(self._tools.verbs())

    def accept(self, kind: int, request: int, payload: bytes) -> None:
        """Queues the work that a request asks for. Raises FrameError if it keeps to no rule."""
        with self._changed:
            if request in self._open or request == 0:
                raise frames.FrameError("request %d is not new" % request)
            if self._requests >= MAX_REQUESTS or self._requests_bytes + len(payload) > MAX_REQUESTS_BYTES:
                raise frames.FrameError("too much is asked for at once")
        jobs = []  # type: List[Callable[[bytearray], None]]
        if kind == frames.SCAN:
            cutter, pieces = self._scan_request(payload)
            jobs = [self._job(request, self._scan, piece, cutter) for piece in pieces]
        elif kind in (frames.FETCH, frames.HASH):
            if len(payload) < 1:
                raise frames.FrameError("a request is cut off")
            codec, pieces = payload[0], frames.unpack_pieces(payload[1:])
            act = self._fetch if kind == frames.FETCH else self._hash
            jobs = [self._job(request, act, batch, codec) for batch in _batches(pieces)]
        elif self._tools is not None and kind in (frames.COMMAND, frames.READ):
            act = self._tools.run if kind == frames.COMMAND else self._tools.read
            jobs = [self._job(request, act, payload, request)]
        elif kind in self._verbs:
            jobs = [self._job(request, self._simple, self._verbs[kind], payload)]
        else:
            raise frames.FrameError("there is no request of kind %d" % kind)
        with self._changed:
            self._requests += 1
            self._requests_bytes += len(payload)
            self._open[request] = [len(jobs), len(payload)]
            if kind != frames.COMMAND:
                self._jobs.extend(jobs)
            self._changed.notify_all()
        if kind == frames.COMMAND:  # it may take hours, and others may have to be answered for it to end
            thread = threading.Thread(target=self._alone, args=(jobs[0],))
            thread.daemon = True
            thread.start()

    def _alone(self, job: Callable[[bytearray], Any]) -> None:
        """Does a job in a thread of its own. A defect ends the agent, or the near side would wait for an answer."""
        done = False
        try:
            job(bytearray())
            done = True
        finally:
            if not done:
                self.end()
                os._exit(4)

    def end(self) -> None:
        """Ends what was started on the host. The agent itself is to end next."""
        if self._tools is not None:
            self._tools.end()

    def work(self) -> None:
        """Does jobs, for ever."""
        buffer = bytearray()
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
                job = self._jobs.popleft()
            buffer = job(buffer)

    def _job(self, request: int, act: Callable[..., Any], what: Any, how: Any) -> Callable[[bytearray], Any]:
        def job(buffer: bytearray) -> bytearray:
            try:
                buffer, kind, payload = act(what, how, buffer)
            except OSError as error:
                refused = getattr(error, "is_refusal", False)
                words = error.strerror or str(error)
                kind, payload = frames.FAILED, _failure(error.errno or 0, words, error.filename, refused)
            except MemoryError:
                buffer = bytearray()
                kind, payload = frames.FAILED, _failure(12, "the host gives the agent no more memory", None)
            except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
                kind, payload = frames.FAILED, _failure(0, "the request makes no sense: %r" % (error,), None)
            flags = 0
            if kind != frames.DATA:
                payload, flags = frames.deflated(payload)
            with self._finishing:  # or another worker's last answer would overtake this one
                if self._is_last(request):
                    flags |= frames.LAST
                self._sender.put(kind, request, payload, flags)
            return buffer

        return job

    def _is_last(self, request: int) -> bool:
        with self._changed:
            state = self._open[request]
            state[0] -= 1
            if state[0]:
                return False
            del self._open[request]
            self._requests -= 1
            self._requests_bytes -= state[1]
            return True

    # Disks

    def _scan_request(self, payload: bytes) -> Any:
        if len(payload) < 4:
            raise frames.FrameError("a request is cut off")
        return struct.unpack_from("<I", payload)[0], frames.unpack_pieces(payload[4:])

    def _scan(self, piece: frames.Piece, cutter: int, buffer: bytearray) -> Any:
        buffer = _at_least(buffer, piece.length)
        with memoryview(buffer) as whole, whole[: piece.length] as view:
            chunker = self._cutters[cutter]
            reading = chunker.begin(view)
            has_data = self._files.read(piece.runs, view, frames.ZEROS, reading.upto)
            if not has_data and piece.length >= chunker.shortest_hole_bytes:
                parts = [-piece.length]
            else:
                if not has_data:  # too short for a hole: zeros like any other data
                    view[:] = bytes(piece.length)
                parts = reading.finish()
            hashes = []  # type: List[bytes]
            place = 0
            for part in parts:
                if part > 0:
                    hashes.append(hashlib.sha256(view[place : place + part]).digest())
                place += abs(part)
        self._keep_pace(piece.length)
        listing = struct.pack("<%di" % len(parts), *parts) + b"".join(hashes)
        if piece.expected == hashlib.sha256(listing).digest():
            same = frames.SUMMARY.pack(piece.label, frames.SAME, len(hashes))
            return buffer, frames.SEGMENT, same + frames.DATA_BYTES.pack(sum(p for p in parts if p > 0))
        if not hashes:
            return buffer, frames.SEGMENT, frames.SUMMARY.pack(piece.label, frames.HOLE, 0)
        return buffer, frames.SEGMENT, frames.SUMMARY.pack(piece.label, frames.PARTS, len(parts)) + listing

    def _fetch(self, pieces: List[frames.Piece], wanted: int, buffer: bytearray) -> Any:
        out = []  # type: List[bytes]
        for piece in pieces:
            buffer = _at_least(buffer, piece.length)
            with memoryview(buffer) as whole, whole[: piece.length] as view:
                if not self._files.read(piece.runs, view, frames.ZEROS):
                    view[:] = bytes(piece.length)
                codec, stored = self._deflator.stored(view, wanted)
            out.append(frames.RECORD.pack(piece.label, codec, piece.length, len(stored)))
            out.append(stored)
            self._keep_pace(piece.length)
        return buffer, frames.DATA, b"".join(out)

    def _hash(self, pieces: List[frames.Piece], _: int, buffer: bytearray) -> Any:
        out = []  # type: List[bytes]
        for piece in pieces:
            buffer = _at_least(buffer, piece.length)
            with memoryview(buffer) as whole, whole[: piece.length] as view:
                if not self._files.read(piece.runs, view, frames.ZEROS):
                    view[:] = bytes(piece.length)
                out.append(frames.HASHED.pack(piece.label, hashlib.sha256(view).digest()))
            self._keep_pace(piece.length)
        return buffer, frames.RESULT, b"".join(out)

    # Everything else

    def _simple(self, verb: Callable[[bytes], Any], payload: bytes, buffer: bytearray) -> Any:
        return buffer, frames.RESULT, json.dumps(verb(payload)).encode("ascii")

    def _hello(self, _: bytes) -> Any:
        return {
            "version": frames.VERSION, "python": "%d.%d.%d" % sys.version_info[:3], "pid": os.getpid(),
            "chunkers": ["aligned", "fixed"], "hashes": ["sha256"], "codecs": ["zlib"],
            "holes": hasattr(os, "SEEK_DATA"), "platform": sys.platform, "level": self._gate.level if self._gate else "",
        }  # fmt: skip

    def _stat(self, payload: bytes) -> Any:
        path = json.loads(payload.decode("utf-8"))["path"]
        real = self._gate.place(path) if self._gate is not None else path
        return _entry(os.path.basename(path), os.stat(as_bytes(real)))

    def _list(self, payload: bytes) -> Any:
        path = json.loads(payload.decode("utf-8"))["path"]
        folder = as_bytes(self._gate.listable(path) if self._gate is not None else path)
        entries = []  # type: List[Any]
        for name in sorted(os.listdir(folder))[:MAX_ENTRIES]:
            try:
                entries.append(_entry(as_text(name), os.lstat(os.path.join(folder, name))))
            except OSError:
                continue  # removed meanwhile
        return {"entries": entries}

    def _open_file(self, payload: bytes) -> Any:
        wanted = json.loads(payload.decode("utf-8"))
        path, writable = wanted["path"], bool(wanted.get("writable"))
        if self._gate is not None:
            path = self._gate.writable(path) if writable else self._gate.readable(path)
        handle, file = self._files.open(path, writable, follow=self._gate is None)
        return {"handle": handle, "size": file.size}

    def _close(self, payload: bytes) -> Any:
        self._files.close(struct.unpack("<H", payload)[0])
        return {}

    def _cutter(self, payload: bytes) -> Any:
        wanted = json.loads(payload.decode("utf-8"))
        if wanted["name"] == "aligned":
            cutter = AlignedCutter(self._plain, wanted["chunk_size"], bytes.fromhex(wanted["seed"]))  # type: Any
        elif wanted["name"] == "fixed":
            cutter = FixedCutter(wanted["chunk_size"])
        else:
            raise ValueError("no chunker %r" % (wanted["name"],))
        if len(self._cutters) >= 16:
            raise ValueError("too many chunkers")
        self._cutters[len(self._cutters)] = cutter
        return {"cutter": len(self._cutters) - 1}

    def _write(self, payload: bytes) -> Any:
        handle, offset = frames.PLACE.unpack_from(payload)
        descriptor = self._files.get(handle).descriptor
        view = memoryview(payload)[frames.PLACE.size :]
        write_all(descriptor, view, offset)
        self._keep_pace(len(view))
        return {"written": len(view)}

    def _sync(self, payload: bytes) -> Any:
        os.fsync(self._files.get(struct.unpack("<H", payload)[0]).descriptor)
        return {}

    def _set_pace(self, payload: bytes) -> Any:
        self._pace = int(json.loads(payload.decode("utf-8"))["bytes_per_s"])
        return {}

    def _keep_pace(self, length: int) -> None:
        """Waits as long as reading or writing so much has to take."""
        pace = self._pace
        if pace <= 0:
            return
        with self._changed:
            now = time.time()
            self._paced_until = max(self._paced_until, now) + float(length) / pace
            wait = self._paced_until - now
        if wait > 0.01:
            time.sleep(min(wait, 60.0))


def _at_least(buffer: bytearray, length: int) -> bytearray:
    return buffer if len(buffer) >= length else bytearray(length)


def _batches(pieces: List[frames.Piece]) -> List[List[frames.Piece]]:
    """Pieces that are answered in one frame. Raises FrameError if one does not fit into a frame."""
    batches = [[]]  # type: List[List[frames.Piece]]
    size = 0
    for piece in pieces:
        if piece.length > frames.MAX_PAYLOAD_BYTES // 2:
            raise frames.FrameError("a piece of %d bytes does not fit into a frame" % piece.length)
        if batches[-1] and size + piece.length > _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(piece)
        size += piece.length
    return batches


def _entry(name: str, status: os.stat_result) -> Any:
    return {"name": name, "size": status.st_size, "mode": status.st_mode, "mtime": int(status.st_mtime)}


def _failure(number: int, message: str, path: Optional[Any], refused: bool = False) -> bytes:
    shown = as_text(path) if isinstance(path, bytes) else path if isinstance(path, str) else ""
    said = {"errno": number, "message": message[:500], "path": shown[:1000], "refused": refused}
    return json.dumps(said).encode("ascii")


def main(plain: Any, tools: Any = None, level: str = "") -> None:
    """Serves until standard input ends.

    Args:
        tools: the module of that name, where the key is limited to the agent.
        level: on which level, from the command that the key is bound to.
    """
    sys.setswitchinterval(
        0.0005
    )  # a hash is back for the lock after each chunk; 5 ms would make it wait for a whole cut
    source, sink = sys.stdin.buffer, sys.stdout.fileno()
    sender = Sender(sink)
    agent = Agent(plain, sender, tools.limited_to(level, sender.put) if tools is not None else None)

    def guarded(run: Callable[[], None]) -> Callable[[], None]:
        def target() -> None:
            try:
                run()
            finally:
                agent.end()
                os._exit(4)  # standard output is gone, or a defect: nothing sensible can follow

        return target

    threading.stack_size(256 << 10)
    for run in (sender.run,) + (agent.work,) * _WORKERS:
        thread = threading.Thread(target=guarded(run))
        thread.daemon = True
        thread.start()
    try:
        while True:
            frame = frames.receive(source.read)
            if frame is None:
                agent.end()
                os._exit(0)
            agent.accept(frame[0], frame[2], frame[3])
    except frames.FrameError as error:
        sys.stderr.write("holdfast agent: %s\n" % error)
        sys.stderr.flush()
        agent.end()
        os._exit(3)
