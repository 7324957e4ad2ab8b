"""A connection by paramiko: the host verified, then us, with key or password.

The order is what matters: the host's key is judged before anything about us is sent, the user's name and the password above all.
Exceptions of paramiko end here; what leaves this module is an error of ours.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import paramiko

from holdfast.errors import HostUnreachable, LinkError, LoginRefused, UsageError
from holdfast.ssh.address import DEFAULT_PORT, Address
from holdfast.ssh.known_hosts import HostKey, KnownHosts
from holdfast.ssh.link import Patience, printable
from holdfast.ssh.verdict import Progress, verdict

__all__ = ["Answer", "connect", "host_key", "log_in"]

Answer = Callable[[str, bool], str]
"""Answers a question of the host (most often "Password: "); the flag says whether what is typed may be shown."""

_LOG: Final = "holdfast.ssh.paramiko"
_CIPHERS: Final = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
# Paramiko must never be the one to ask for new keys. Until the host has agreed, its messages still arrive, and paramiko's
# only thread then waits for the new keys in order to answer one (the end of a channel), while nobody else could bring
# them: the connection stands still for 30 s and mostly breaks. When the host asks, as ESXi does each GiB, all is well.
# One key is good for 64 GiB with AES (RFC 4344, section 3.2), and this is half of it.
_REKEY_BYTES: Final = 1 << 35
_REKEY_PACKETS: Final = 1 << 30
_SIGNATURES: Final = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}

logging.getLogger(_LOG).addHandler(logging.NullHandler())


def connect(address: Address, patience: Patience, kinds: Sequence[str] = ()) -> paramiko.Transport:
    """An encrypted connection to somebody whose key is not judged yet.

    Args:
        kinds: kinds of host keys that are recorded for this host; it is asked for one of these first.

    Raises:
        HostUnreachable, LinkError: there is none.
    """
    port = address.port or DEFAULT_PORT
    try:
        stream = socket.create_connection((address.host, port), timeout=patience.connect_s)
    except OSError as error:
        reason = "could not resolve" if isinstance(error, socket.gaierror) else str(error)
        raise _failed(address, reason) from None
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that no longer acknowledges anything; one that acknowledges but does not answer is `paramiko_link`'s business.
    silence_ms = round(1000 * patience.keep_alive_s * (patience.keep_alive_count + 1))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
    transport: paramiko.Transport | None = None
    with _translated(address):
        try:
            transport = paramiko.Transport(stream)
            transport.daemon = True
            transport.set_log_channel(_LOG)
            transport.banner_timeout = transport.handshake_timeout = patience.connect_s
            transport.auth_timeout = patience.connect_s
            transport.packetizer.REKEY_BYTES = _REKEY_BYTES
            transport.packetizer.REKEY_PACKETS = _REKEY_PACKETS
            options = transport.get_security_options()
            options.ciphers = _CIPHERS
            wanted = [name for kind in kinds for name in _SIGNATURES.get(kind, (kind,))]
            offered = list(options.key_types)
            options.key_types = [name for name in wanted if name in offered] + [
                name for name in offered if name not in wanted
            ]
            transport.start_client(timeout=patience.connect_s)
            if not transport.initial_kex_done:
                raise _failed(address, "timed out")
        except BaseException:
            if transport is not None:
                transport.close()
            stream.close()
            raise
    return transport


def host_key(transport: paramiko.Transport) -> HostKey:
    """The key that the host has shown, and proved to have."""
    key = transport.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def log_in(
    transport: paramiko.Transport, address: Address, known_hosts: KnownHosts, key: str, answer: Answer | None
) -> None:
    """Returns when the host is known to be the right one, and has let us in.

    Args:
        key: file of a private key; empty for none.
        answer: for questions of the host; None: it must not ask any.

    Raises:
        HostKeyUnknown, HostKeyChanged: nothing was sent to it.
        LoginRefused: it takes neither key nor password.
    """
    known_hosts.judge(address, host_key(transport))
    if not address.user:
        raise UsageError(f"no user is named for {address}", hint=f"write for example root@{address}")
    with _translated(address):
        methods = _methods(transport, address.user)
        if key and not transport.is_authenticated():
            methods = _with_key(transport, address, key) or methods
        if answer and not transport.is_authenticated():
            _with_answers(transport, address.user, answer, methods)
    if not transport.is_authenticated():
        raise LoginRefused(
            f"{address} does not accept our {'password' if answer else 'key'}; it would take: {', '.join(methods)}",
            hint="check user and password"
            if answer
            else "link the host again, or check its authorized_keys and the key that is used here",
        )


def _methods(transport: paramiko.Transport, user: str) -> list[str]:
    """What the host offers for logging in."""
    try:
        transport.auth_none(user)
    except paramiko.BadAuthenticationType as refusal:
        return [str(method) for method in refusal.allowed_types]
    return []


def _with_key(transport: paramiko.Transport, address: Address, path: str) -> list[str]:
    """What the host wants besides the key, or instead of it."""
    try:
        private = paramiko.PKey.from_path(path)
    except FileNotFoundError:
        raise LoginRefused(f"the key {path} does not exist", hint="link the host again") from None
    except paramiko.PasswordRequiredException:
        raise LoginRefused(
            f"the key {path} is protected by a password",
            hint="use a key of its own for Holdfast, or an agent",
        ) from None
    except Exception as error:  # noqa: BLE001 - the library raises whatever a malformed file leads it to
        raise LoginRefused(f"the key {path} can not be used ({printable(str(error))})") from None
    try:
        return [str(method) for method in transport.auth_publickey(address.user, private)]
    except paramiko.BadAuthenticationType as refusal:
        return [str(method) for method in refusal.allowed_types]
    except paramiko.AuthenticationException:
        return []


def _with_answers(transport: paramiko.Transport, user: str, answer: Answer, methods: Sequence[str]) -> None:
    def asked(_title: str, _instructions: str, questions: list[tuple[str, bool]]) -> list[str]:
        return [answer(printable(question), shown) for question, shown in questions]

    # ESXi and other hosts with PAM know passwords only as a dialogue.
    if "keyboard-interactive" in methods:
        with contextlib.suppress(paramiko.AuthenticationException):
            transport.auth_interactive(user, asked)
    elif "password" in methods:
        with contextlib.suppress(paramiko.AuthenticationException):
            transport.auth_password(user, answer("Password:", False), fallback=False)


@contextlib.contextmanager
def _translated(address: Address) -> Iterator[None]:
    try:
        yield
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise LinkError(
            f"{address} and we have no method in common: {printable(str(error))}",
            hint="update the SSH server over there",
        ) from None
    except EOFError:
        raise _failed(address, "connection closed by the host") from None
    except (paramiko.SSHException, OSError) as error:
        if "banner" in str(error).lower():
            raise HostUnreachable(
                f"{address} does not answer as an SSH server does ({printable(str(error))})",
                hint="is the port right, and is the host not overloaded?",
            ) from None
        raise _failed(address, str(error) or type(error).__name__) from None


def _failed(address: Address, reason: str) -> LinkError:
    progress = Progress()
    progress.lines.append(reason)
    return verdict(address, progress, b"")
