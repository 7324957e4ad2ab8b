"""Our own key for a host: made once, kept readable by its owner only, and without a password of its own.

RSA, since ESXi in its FIPS mode takes neither ed25519 nor anything newer, and 3072 bits, which is what NIST asks for beyond
2030. A key for each host, so that one that is lost or withdrawn concerns one host. It has no password because backups run
when nobody is there to type one; who reads the file can log in, as who reads the repository's password can read backups.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import LoginRefused, UsageError, storage_error
from holdfast.ssh.known_hosts import replace_file

__all__ = ["DEFAULT_BITS", "PublicKey", "make_key", "public_key"]

DEFAULT_BITS: Final = 3072
_MAX_FILE_BYTES: Final = 1 << 16
_SPELLED_OUT: Final = (
    "no-agent-forwarding", "no-port-forwarding", "no-pty", "no-user-rc", "no-X11-forwarding",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The half of a key that hosts get to see.

    Args:
        kind: `ssh-rsa` and the like.
        encoded: the key in base64, as it stands in authorized_keys.
        comment: for people; without line ends.
    """

    kind: str
    encoded: str
    comment: str = ""

    def line(self, *, command: str = "", restrict: bool = False, spelled_out: bool = False) -> str:
        """The line that admits this key in an authorized_keys file.

        Args:
            command: what the host runs for this key, whatever is asked for.
            restrict: allow nothing but running a command (no terminal, no forwarding).
            spelled_out: say so by the options that servers knew before they knew `restrict`.

        Raises:
            UsageError: the command can not stand there.
        """
        if re.search(r"[\0\r\n]", command + self.comment):
            raise UsageError("a line of authorized_keys can not hold a line end")
        options = list(_SPELLED_OUT if spelled_out else ("restrict",)) if restrict else []
        if command:
            options.append('command="' + command.replace('"', '\\"') + '"')
        return " ".join(part for part in (",".join(options), self.kind, self.encoded, self.comment) if part)


def make_key(path: str, comment: str, *, bits: int = DEFAULT_BITS) -> PublicKey:
    """The public half of the key at `path`, which is made if it is not there yet.

    Durability: the key is on the disk on return.

    Raises:
        StorageError: it can not be written.
        LoginRefused: what is there is no key of ours, or others can read it.
    """
    if not os.path.lexists(path):
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        private = rsa.generate_private_key(public_exponent=65537, key_size=bits).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"writing {path}") from None
        replace_file(path, private)
        made = public_key(path, comment)
        replace_file(f"{path}.pub", f"{made.line()}\n".encode())
        return made
    return public_key(path, comment)


def public_key(path: str, comment: str = "") -> PublicKey:
    """The public half of the private key at `path`.

    Raises:
        LoginRefused: there is no usable key, or others than its owner can read it.
    """
    from cryptography.hazmat.primitives import serialization

    hint = "name another file, or remove this one so that a new key is made"
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise LoginRefused(f"the key {path} can not be read ({error.strerror or error})", hint=hint) from None
    if mode & 0o077:
        raise LoginRefused(f"the key {path} can be read by others", hint=f"run 'chmod 600 {path}'")
    try:
        private = serialization.load_ssh_private_key(data, password=None)
    except Exception:  # noqa: BLE001 - a malformed file leads the library to various exceptions
        with contextlib.suppress(Exception):
            pem = serialization.load_pem_private_key(data, password=None)
            return _public(pem.public_key(), comment)
        raise LoginRefused(f"{path} is no private key without a password", hint=hint) from None
    return _public(private.public_key(), comment)


def _public(key: object, comment: str) -> PublicKey:
    from cryptography.hazmat.primitives import serialization

    encoded: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    kind, _, rest = encoded.decode().partition(" ")
    assert base64.b64decode(rest, validate=True)
    return PublicKey(kind, rest, comment)
