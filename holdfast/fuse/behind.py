"""What readers from front to back have left behind is taken out of the page cache again.

Whoever reads a disk of a terabyte once should not have all of the machine's memory filled with it; and on a virtual machine whose
free memory goes back to its host, fresh pages cost more than what is read into them.

The process that serves a mount must never wait for that mount itself, neither by opening a file of it nor by having the kernel
invalidate pages (libfuse can ask for that, and it waits for pages that are being read): killed in such a moment, it could not
end, and with it nobody who reads. So a small process does it, a user of the mount like any other, which advises the kernel that
some pages are not needed; pages that somebody uses are passed over. It ends with the mount's process, by the end of its input.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from typing import Final

__all__ = ["LeftBehind"]

_END_WAIT_S: Final = 5
_PROGRAM: Final = """
import os, sys
place = os.fsencode(sys.argv[1])
for line in iter(sys.stdin.buffer.readline, b""):
    start, end, path = line[:-1].split(b" ", 2)
    try:
        file = os.open(place + path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        continue
    os.posix_fadvise(file, int(start), int(end) - int(start), os.POSIX_FADV_DONTNEED)
    os.close(file)
"""


class LeftBehind:
    """See the module. The process is started when it is first needed. Thread-safe.

    Args:
        place: where it is mounted.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def add(self, path: str, start: int, end: int) -> None:
        """A reader of that file, a path within the mount, has left that range behind. Never waits for anybody."""
        if "\n" in path:
            return
        # What can not be told stays in the page cache, and that is all.
        with self._lock, contextlib.suppress(OSError):
            if self._process is None and not self._closed:
                self._process = self._started()
            if self._process is not None and self._process.stdin is not None:
                os.write(self._process.stdin.fileno(), b"%d %d %s\n" % (start, end, os.fsencode(path)))

    def close(self) -> None:
        """Ends the process. May be called twice."""
        with self._lock:
            process, self._process, self._closed = self._process, None, True
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            process.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, self._place],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process
