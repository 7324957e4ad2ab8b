"""The way to the far side of a repository on another host: an SSH client, or another program, that starts `holdfast serve` there.

A login and the start of a program over there take a good part of a second. `Reaching` has that done beside other work; this module
loads what it takes, and nothing else, so that the wait begins at once.
"""

from __future__ import annotations

import os
import shlex
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from holdfast.errors import InternalError
from holdfast.repo.wire.stream import PipeStream, SshStream, Stream
from holdfast.ssh.address import Address
from holdfast.ssh.address import Place as FarAddress
from holdfast.ssh.link import Access
from holdfast.ssh.openssh import OpenSshLink

if TYPE_CHECKING:
    from holdfast.repo.wire.remote_place import RemotePlace

__all__ = ["Reaching", "linked_access", "reach"]

_FAR_COMMAND: Final = "holdfast serve --stdio"


def reach(far: FarAddress) -> Stream:
    """A far side that has been started.

    `HOLDFAST_REMOTE_COMMAND` is the command over there; `HOLDFAST_RSH` a program that is run instead of the SSH client, with the
    host and that command as its last two arguments; `HOLDFAST_SSH_KEY` the file of the private key; else it is that of `holdfast link`, or what SSH's configuration says.

    Raises:
        LinkError: the host can not be reached, or does not let us in.
    """
    command = os.environ.get("HOLDFAST_REMOTE_COMMAND") or _FAR_COMMAND
    program = os.environ.get("HOLDFAST_RSH", "")
    if program:
        return PipeStream([*shlex.split(program), str(far.address), command], str(far.address))
    linked = linked_access(far.address)
    key = os.environ.get("HOLDFAST_SSH_KEY") or (linked.key if os.path.exists(linked.key) else "")
    link = OpenSshLink(far.address, replace(linked, key=key, user_config=True))
    try:
        return SshStream(link, link.start(command))
    except BaseException:
        link.close()
        raise


def linked_access(address: Address) -> Access:
    """Our own known hosts, and where `holdfast link` puts the key for this user, host and port."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    folder = os.path.join(config, "holdfast")
    name = f"{address.user}@{address.known_as.replace('/', '_')}"
    return Access(os.path.join(folder, "known_hosts"), os.path.join(folder, "repository-keys", name))


class Reaching:
    """A place on another host that is being reached, and opened, in a thread. Close it.

    Args:
        index: have its index opened, too.
    """

    def __init__(self, far: FarAddress, *, index: bool) -> None:
        self._far = far
        self._index = index
        self._place: RemotePlace | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="holdfast-reach", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            stream = reach(self._far)
            try:
                # All that this needs is loaded while the far side starts.
                from holdfast.repo.wire.remote_place import RemotePlace

                place = RemotePlace.opened(stream, self._far, index=self._index)
            except BaseException:
                stream.close()
                raise
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever wants the place
            self._error = error
            return
        with self._lock:
            unwanted = self._closed
            self._place = None if unwanted else place
        if unwanted:
            place.release()

    def place(self) -> RemotePlace:
        """The place, which is the caller's from now on.

        Raises:
            LinkError: the other host can not be reached, or has no Holdfast.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        place, self._place = self._place, None
        if place is None:
            raise InternalError("a place was asked for twice")
        return place

    def close(self) -> None:
        """Lets go of the place, if nobody has taken it; one that is not reached yet is let go of then. Does not wait for that."""
        with self._lock:
            self._closed = True
            place, self._place = self._place, None
        if place is not None:
            place.release()
