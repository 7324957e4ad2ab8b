"""What the wire runs over: two streams of bytes, to and from a far process, however it was started.

`SshStream` is a command on another host; `PipeStream` a process here, for programs that bring their own way to the
other host, and for tests. Both say in words why the far side ended when it did.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Final, Protocol

from holdfast.errors import FarCommandMissing, FarSideEnded, LinkError, LinkLost, LinkTimeout
from holdfast.ssh.descriptors import writing_parts
from holdfast.ssh.link import STDERR_TAIL_BYTES, Channel, Link, far_failure, printable

__all__ = ["PipeStream", "SshStream", "Stream"]

_LAST_WORDS_S: Final = 10.0
_FAREWELL_S: Final = 5.0
_NOT_FOUND: Final = 127  # of a shell


class Stream(Protocol):
    """A far process that listens and answers. One thread may read while another one writes."""

    def read(self, limit_bytes: int) -> bytes:
        """The next bytes, at most so many; empty at the end. Raises `LinkError`."""
        ...

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Sends all of some pieces, one behind the other; waits while the far side is slow. Raises `LinkError`."""
        ...

    def close_write(self) -> None:
        """Tells the far side that nothing more will come. May be called twice."""
        ...

    def ended(self) -> LinkError:
        """Why the far side has ended although it was still needed; called after `read` has returned nothing."""
        ...

    def close(self) -> None:
        """Lets go of it; what still runs is ended. May be called twice."""
        ...


class SshStream:
    """A command on another host.

    Args:
        link: closed with the stream.
    """

    def __init__(self, link: Link, channel: Channel) -> None:
        self._link = link
        self._channel = channel

    def read(self, limit_bytes: int) -> bytes:
        """See `Stream.read`."""
        return self._channel.read(limit_bytes)

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """See `Stream.write`."""
        self._channel.write_parts(parts)

    def close_write(self) -> None:
        """See `Stream.close_write`."""
        self._channel.close_write()

    def ended(self) -> LinkError:
        """See `Stream.ended`."""
        try:
            status = self._channel.wait(_LAST_WORDS_S)
        except LinkTimeout:
            return LinkLost(f"{self._link.address} has stopped answering")
        return far_failure(
            self._link.address, "the repository was in use", status, self._channel.stderr_tail()
        )

    def close(self) -> None:
        """See `Stream.close`."""
        self._channel.close()
        self._link.close()


class PipeStream:
    """A process of this machine.

    Args:
        argv: program and arguments.
        name: what the user knows it as.
    """

    def __init__(self, argv: Sequence[str], name: str) -> None:
        self._name = name
        self._stderr = bytearray()
        try:
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise FarCommandMissing(
                f"{argv[0]} can not be started ({error.strerror})",
                hint="HOLDFAST_RSH names the program that is run instead of ssh",
            ) from error
        self._listener = threading.Thread(target=self._listen, name="holdfast-far-words", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stderr is not None
        while piece := self._process.stderr.read(4096):
            self._stderr += piece
            del self._stderr[:-STDERR_TAIL_BYTES]

    def read(self, limit_bytes: int) -> bytes:
        """See `Stream.read`."""
        assert self._process.stdout is not None
        return os.read(self._process.stdout.fileno(), limit_bytes)

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """See `Stream.write`."""
        assert self._process.stdin is not None
        try:
            for _ in writing_parts(self._process.stdin.fileno(), parts):
                pass
        except (OSError, ValueError):
            raise FarSideEnded(f"{self._name} takes no more data") from None

    def close_write(self) -> None:
        """See `Stream.close_write`."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def ended(self) -> LinkError:
        """See `Stream.ended`."""
        try:
            status = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return LinkLost(f"{self._name} has stopped answering")
        self._listener.join(_LAST_WORDS_S)
        said = printable(bytes(self._stderr))
        if status == _NOT_FOUND:
            return FarCommandMissing(
                f"{self._name} does not know the command that is needed" + (f": {said}" if said else ""),
                hint="install Holdfast over there, or name its place with HOLDFAST_REMOTE_COMMAND",
            )
        return FarSideEnded(f"{self._name} ended with status {status}" + (f": {said}" if said else ""))

    def close(self) -> None:
        """See `Stream.close`."""
        self.close_write()
        try:
            self._process.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(_LAST_WORDS_S)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()
