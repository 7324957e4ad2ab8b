"""One process of the OpenSSH client: started so that it can not outlive us, watched until it ends.

A thread per process reads the client's log and its standard error, whatever anybody else does, and notices the end.
So nothing blocks because somebody forgot to read, and at the end everything about it is known.

**Nobody outlives us.** The client leads a process group of its own: Ctrl-C on the terminal reaches only us, so the
connection is still there to tidy up over it, and `kill` takes helpers (a jump host's client) along. If we are killed,
the kernel ends the client: that is asked for with PR_SET_PDEATHSIG, through setpriv(1), since code between fork and exec is
unsafe in a process with threads. The kernel means by "parent" the *thread* that started the process, so one thread that never
ends starts them all.

**The log's way.** The client closes all inherited descriptors before it opens its log, so the pipe for it is named through /proc.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final

from holdfast.errors import LinkError
from holdfast.ssh.descriptors import widen_pipe
from holdfast.ssh.link import STDERR_TAIL_BYTES
from holdfast.ssh.verdict import Progress

__all__ = ["ClientProcess"]

_READ_BYTES: Final = 1 << 16
_LINE_BYTES: Final = 2048
_PIPE_BYTES: Final = 1 << 20


class _Starter:
    """Starts processes from one thread, which lives as long as this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = 0
        self._requests: queue.SimpleQueue[tuple[list[str], Future[subprocess.Popen[bytes]]]]

    def start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """A process with pipes; it ends when this process does."""
        with self._lock:
            if self._process != os.getpid():  # a fork has no threads but one
                self._process = os.getpid()
                self._requests = queue.SimpleQueue()
                threading.Thread(
                    target=self._work, args=(self._requests,), name="ssh-starter", daemon=True
                ).start()
        setpriv = shutil.which("setpriv")
        bound = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
        started: Future[subprocess.Popen[bytes]] = Future()
        self._requests.put(([*bound, *argv], started))
        return started.result()

    @staticmethod
    def _work(
        requests: queue.SimpleQueue[tuple[list[str], Future[subprocess.Popen[bytes]]]],
    ) -> None:
        while True:
            argv, started = requests.get()
            try:
                started.set_result(
                    subprocess.Popen(
                        argv,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        bufsize=0,
                        start_new_session=True,
                    )
                )
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the process
                started.set_exception(error)
            del argv, started


_STARTER: Final = _Starter()


class ClientProcess:
    """A running client.

    Args:
        program: the client.
        arguments: without the log's place, which is added.

    Attributes:
        moved: set when the command runs, or the process has ended.
        ended: set when it has ended and all that it said has been taken in.
    """

    def __init__(self, program: str, arguments: Sequence[str]) -> None:
        self.progress: Final = Progress()
        self.moved: Final = threading.Event()
        self.ended: Final = threading.Event()
        self._lock = threading.Lock()
        self._reaped = False
        self._stderr = bytearray()
        self._log = b""
        missing = "install OpenSSH's client (on Debian and Ubuntu: openssh-client)"
        if shutil.which(program) is None:
            raise LinkError(f"there is no SSH client '{program}' on this machine", hint=missing)
        log, log_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            popen = _STARTER.start([program, "-E", f"/proc/{os.getpid()}/fd/{log_end}", *arguments])
        except OSError as error:
            os.close(log)
            os.close(log_end)
            raise LinkError(
                f"the SSH client {program} can not be started ({error.strerror or error})",
                hint=missing,
            ) from None
        assert popen.stdin is not None
        assert popen.stdout is not None
        assert popen.stderr is not None
        self._popen = popen
        self.pid: Final = popen.pid
        self.stdin: Final = popen.stdin.fileno()
        self.stdout: Final = popen.stdout.fileno()
        for descriptor in (self.stdin, self.stdout):
            widen_pipe(descriptor, _PIPE_BYTES)
        os.set_blocking(popen.stderr.fileno(), False)
        threading.Thread(
            target=self._watch, args=(log, log_end), name=f"ssh-{popen.pid}", daemon=True
        ).start()

    def close_stdin(self) -> None:
        """Ends the client's input. Nobody must be writing."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def close_stdout(self) -> None:
        """Lets go of the client's output. Nobody must be reading."""
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def kill(self) -> None:
        """Ends the client and its helpers at once, if they still run."""
        with self._lock:
            if not self._reaped:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)

    def stderr_tail(self) -> bytes:
        """The end of what came on standard error."""
        with self._lock:
            return bytes(self._stderr)

    def _watch(self, log: int, log_end: int) -> None:
        assert self._popen.stderr is not None
        stderr = self._popen.stderr.fileno()
        end = os.pidfd_open(self.pid)
        try:
            waiting = select.poll()
            for descriptor in (log, stderr, end):
                waiting.register(descriptor, select.POLLIN)
            running = listening = True
            while running:
                ready = [descriptor for descriptor, _ in waiting.poll()]
                running = end not in ready
                # At the end, what is still in the pipes; a helper that holds them open is not waited for.
                if listening and (stderr in ready or not running) and self._take_stderr(stderr):
                    waiting.unregister(stderr)
                    listening = False
                if log in ready or not running:
                    self._take_log(log)
        finally:
            with self._lock:
                self._popen.wait()
                self._reaped = True
            for descriptor in (end, log, log_end):
                os.close(descriptor)
            self._popen.stderr.close()
            self.ended.set()
            self.moved.set()

    def _take_stderr(self, descriptor: int) -> bool:
        """Takes in what is there; whether that was the end of it."""
        while True:
            try:
                piece = os.read(descriptor, _READ_BYTES)
            except BlockingIOError:
                return False
            if not piece:
                return True
            with self._lock:
                self._stderr += piece
                del self._stderr[:-STDERR_TAIL_BYTES]

    def _take_log(self, descriptor: int) -> None:
        while True:
            try:
                piece = os.read(descriptor, _READ_BYTES)
            except BlockingIOError:
                break
            *lines, self._log = (self._log + piece).split(b"\n")
            for line in lines:
                self.progress.note(line[:_LINE_BYTES].decode("utf-8", "replace").rstrip("\r"))
            self._log = self._log[:_LINE_BYTES]
        if self.progress.started:
            self.moved.set()
