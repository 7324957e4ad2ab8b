"""Host keys, and our own file of them, in the format that OpenSSH reads as well.

Only a person adds a host (through `exchange`); nothing is ever learned by connecting. Hosts are written as they are
called, not hashed: the file lies beside the configuration, which names them anyway. Lines of others are kept, whatever they hold.

Durability: `record` and `forget` replace the file in one step and return when it is on the disk.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from holdfast.errors import storage_error
from holdfast.ssh.address import Address
from holdfast.ssh.verdict import key_changed, key_unknown

__all__ = ["HostKey", "KnownHosts", "replace_file"]

_MARKERS: Final = (b"@revoked", b"@cert-authority")


@dataclass(frozen=True, slots=True)
class HostKey:
    """A public key by which a host proves who it is.

    Args:
        kind: `ssh-ed25519`, `ecdsa-sha2-nistp256`, `ssh-rsa`, ...
        blob: the key in SSH's wire format.
    """

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """`SHA256:...`, as OpenSSH shows it."""
        digest = hashlib.sha256(self.blob).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind} {self.fingerprint}"


class KnownHosts:
    """The file of known hosts at `path`; it need not exist yet."""

    def __init__(self, path: str) -> None:
        self.path: Final = path

    def keys(self, name: str) -> list[HostKey]:
        """What is recorded for a host's name (`Address.known_as`)."""
        found = []
        for line in self._lines():
            words = line.split()
            if len(words) >= 3 and words[0] not in _MARKERS and _names(words[0], name):
                with contextlib.suppress(binascii.Error, UnicodeDecodeError):
                    found.append(HostKey(words[1].decode(), base64.b64decode(words[2], validate=True)))
        return found

    def revoked(self, name: str, key: HostKey) -> bool:
        """Whether somebody has marked this key as one not to trust."""
        encoded = base64.b64encode(key.blob)
        lines = (line.split() for line in self._lines() if line.startswith(b"@revoked"))
        return any(len(words) >= 4 and _names(words[1], name) and words[3] == encoded for words in lines)

    def judge(self, address: Address, shown: HostKey) -> None:
        """Returns if the host is the one that we know.

        As with OpenSSH, a key that is recorded for a host on port 22 is good for its other ports, too.

        Raises:
            HostKeyUnknown: nothing is recorded for it.
            HostKeyChanged: something else is recorded, or the key is revoked.
        """
        if self.revoked(address.known_as, shown):
            raise key_changed(address, str(shown))
        recorded = self.keys(address.known_as)
        if shown in recorded or (not recorded and shown in self.keys(address.host.lower())):
            return
        raise key_changed(address, str(shown)) if recorded else key_unknown(address, str(shown))

    def record(self, address: Address, key: HostKey) -> None:
        """Makes `key` a known key of the host; others that are recorded stay.

        Raises:
            StorageError: the file can not be written.
        """
        line = f"{address.known_as} {key.kind} {base64.b64encode(key.blob).decode()}\n".encode()
        with self._changing():
            if key not in self.keys(address.known_as):
                replace_file(self.path, b"".join([*self._lines(), line]))

    def forget(self, address: Address) -> int:
        """Removes what is recorded for the host; how many keys that were.

        Raises:
            StorageError: the file can not be written.
        """
        with self._changing():
            lines = self._lines()
            kept = [line for line in lines if not _names(line.split(maxsplit=1)[:1], address.known_as)]
            if len(kept) < len(lines):
                replace_file(self.path, b"".join(kept))
        return len(lines) - len(kept)

    def _lines(self) -> list[bytes]:
        try:
            with open(self.path, "rb") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, f"reading {self.path}") from None
        return [line + b"\n" for line in lines]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Keeps other processes of ours from changing the file at the same time."""
        folder = os.path.dirname(os.path.abspath(self.path))
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(error, f"writing {self.path}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def replace_file(path: str, data: bytes) -> None:
    """A file with `data`, readable by its owner only, in place of what was there; on the disk on return.

    Raises:
        StorageError: it can not be written; what was there is still there.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".holdfast-", dir=folder)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise storage_error(error, f"writing {path}") from None


def _names(field: bytes | list[bytes], name: str) -> bool:
    """Whether the first field of a line names the host, in the clear or hashed."""
    if isinstance(field, list):
        field = field[0] if field else b""
    wanted = name.encode()
    for one in field.split(b","):
        if one.lower() == wanted:
            return True
        if one.startswith(b"|1|") and one.count(b"|") == 3:
            _, _, salt, digest = one.split(b"|")
            with contextlib.suppress(binascii.Error):
                computed = hmac.digest(base64.b64decode(salt), wanted, "sha1")
                if hmac.compare_digest(computed, base64.b64decode(digest)):
                    return True
    return False
