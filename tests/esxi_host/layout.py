"""Where things of one stand-in are: its folder outside, and the paths that its sessions see inside.

FOLDER/root/            the host's root folder; sshd and every session run in it
FOLDER/volumes/<uuid>/  the datastores as they are on disk, beside the view that locks files
FOLDER/references/      disks as they were at the moment of a snapshot
FOLDER/keys/            host keys, and a client's key that the host accepts
FOLDER/log/             what sshd, the host's daemon and the file system view had to say
"""

from __future__ import annotations

import os
from dataclasses import dataclass

PYTHON = "/usr/bin/python3"
"""The system's own Python: it is what the host's `python3` is."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of one stand-in, as the machine sees them."""

    folder: str

    def _in(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    @property
    def root(self) -> str:
        return self._in("root")

    @property
    def volumes(self) -> str:
        return self._in("volumes")

    @property
    def references(self) -> str:
        return self._in("references")

    @property
    def keys(self) -> str:
        return self._in("keys")

    @property
    def log(self) -> str:
        return self._in("log")

    @property
    def client_key(self) -> str:
        return self._in("keys", "client_rsa")

    @property
    def authorized_keys(self) -> str:
        return self._in("root", "etc", "ssh", "keys-root", "authorized_keys")

    @property
    def locks(self) -> str:
        """The memory that hostd and the view of the datastores share."""
        return self._in("locks")

    @property
    def control(self) -> str:
        """The socket for commands by hand from another terminal."""
        return self._in("control.sock")

    @property
    def command_socket(self) -> str:
        """The socket by which `vim-cmd` and its like reach hostd; in the host it is /var/run/hostd.sock."""
        return self._in("root", "var", "run", "hostd.sock")

    def make(self) -> None:
        for path in (self.root, self.volumes, self.references, self.keys, self.log):
            os.makedirs(path, exist_ok=True)
        os.chmod(self.keys, 0o700)
