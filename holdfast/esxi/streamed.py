"""Files of a host, read as streams: `dd` over there, its output here. For hosts whose Python can not be used.

A stream only goes forward, while disks are read in segments by several threads, roughly in order. So what lies between two
requests is kept in blocks, and only a request that is far ahead or behind starts another stream. Memory is bounded by `_KEPT_BLOCKS`.

Nothing is known of holes: zeros travel like data.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

from holdfast.errors import LinkLost, SourceChanged, SourceError
from holdfast.esxi.console import file_error
from holdfast.esxi.names import printable
from holdfast.esxi.shell_console import ShellConsole
from holdfast.ssh.link import KILLED, Channel, Link
from holdfast.units import MIB

__all__ = ["StreamSource", "StreamedFiles"]

_BLOCK_BYTES: Final = MIB
_KEPT_BLOCKS: Final = 64
_AHEAD_BLOCKS: Final = 48


class StreamedFiles:
    """Opens files of a host as streams. Implements `HostFiles`.

    Args:
        console: for small commands.
        bulk: makes the link for a stream's bytes.
    """

    def __init__(self, console: ShellConsole, bulk: Link) -> None:
        self._console = console
        self._bulk = bulk

    def open(self, path: str) -> StreamSource:
        """See `HostFiles.open`."""
        where = printable(path)
        answer = self._console.look_script(
            f"stat -L -c %s {shlex.quote(path)} && dd if={shlex.quote(path)} of=/dev/null bs=512 count=1 2>&1"
        )
        head, _, rest = answer.text.partition("\n")
        head = head.strip()
        if answer.status or not head.isdecimal():
            raise file_error(where, (rest if head.isdecimal() else answer.text).encode())
        return StreamSource(self._bulk.start, path, int(head))

    def scanner(self, source: object, where: str) -> None:
        """See `HostFiles.scanner`: a stream can only be read."""
        del source, where

    def close(self) -> None:
        """Nothing is held."""


class StreamSource:
    """A file of a host as a `BlockSource`.

    Args:
        start: starts a command on the host.
        size_bytes: of the file.
    """

    def __init__(self, start: Callable[[str], Channel], path: str, size_bytes: int) -> None:
        self._start = start
        self._path = path
        self._where = printable(path)
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._channel: Channel | None = None
        self._next = 0
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """The file's length when it was opened."""
        return self._size_bytes

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `BlockSource.data_extents`: one range."""
        if start < end:
            yield start, end - start

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `BlockSource.read_into`."""
        done = 0
        while done < buffer.nbytes:
            number, inside = divmod(offset + done, _BLOCK_BYTES)
            block = self._block(number)
            piece = block[inside : inside + buffer.nbytes - done]
            if not piece:
                raise SourceChanged(
                    f"{self._where} became shorter while it was read: it now ends at byte {offset + done}, "
                    f"not {self._size_bytes}"
                )
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """Ends the stream. May be called twice."""
        self._closed = True
        channel = self._channel
        if channel is not None:
            channel.kill()
        with self._lock:
            self._end_stream()
            self._kept.clear()

    def _block(self, number: int) -> bytes:
        with self._lock:
            block = self._kept.get(number)
            if block is not None:
                return block
            if self._closed:
                raise SourceError(f"{self._where} was closed while it was read")
            if self._channel is None or not self._next <= number <= self._next + _AHEAD_BLOCKS:
                self._end_stream()
                self._channel = self._start(
                    f"exec dd if={shlex.quote(self._path)} bs={_BLOCK_BYTES} skip={number}"
                )
                self._next = number
            while True:
                block = self._pull()
                self._kept[self._next] = block
                self._next += 1
                while len(self._kept) > _KEPT_BLOCKS:
                    self._kept.popitem(last=False)
                if self._next > number:
                    return block

    def _pull(self) -> bytes:
        assert self._channel is not None
        wanted = min(_BLOCK_BYTES, self._size_bytes - self._next * _BLOCK_BYTES)
        block = bytearray(wanted)
        view, done = memoryview(block), 0
        while done < wanted:
            count = self._channel.readinto(view[done:])
            if not count:
                self._explain(done)
            done += count
        return bytes(block)

    def _explain(self, done: int) -> None:
        """Raises what it means that the stream has ended early."""
        channel = self._channel
        assert channel is not None
        status = channel.wait(30.0)
        said = channel.stderr_tail()
        self._end_stream()
        if status == KILLED:
            raise LinkLost(
                f"the command that read {self._where} was killed on the host",
                hint="the host may be short of memory: try again",
            )
        if status:
            raise file_error(self._where, said)
        raise SourceChanged(
            f"{self._where} became shorter while it was read: it now ends at byte "
            f"{self._next * _BLOCK_BYTES + done}, not {self._size_bytes}"
        )

    def _end_stream(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(Exception):
                self._channel.close()
            self._channel = None
