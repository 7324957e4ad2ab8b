"""What the OpenSSH client's own log says about a connection: how far it came, and why it failed.

The client writes its log (at level DEBUG1) apart from the far command's standard error, so its words can be read
without mistaking the far side's for them. Its messages are not translated, and those that are looked for here have been stable since OpenSSH 7.

Pure: lines in, values and errors out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from holdfast.errors import (
    HostKeyChanged,
    HostKeyUnknown,
    HostUnreachable,
    LinkError,
    LinkLost,
    LoginRefused,
)
from holdfast.ssh.address import Address
from holdfast.ssh.link import KILLED, printable

__all__ = ["Progress", "key_changed", "key_unknown", "verdict"]

MAX_LINES: Final = 60

_HOST_KEY: Final = re.compile(r"debug1: Server host key: (\S+) (SHA256:\S+)")
_EXIT: Final = re.compile(r"debug1: Exit status (-?\d+)")
_EXIT_OF_MASTER: Final = re.compile(r"debug2: Received exit status from master (\d+)")
_CIPHER: Final = re.compile(r"debug1: kex: client->server cipher: (\S+)")
_TRANSFERRED: Final = re.compile(r"Transferred: sent (\d+), received (\d+) bytes")
_DENIED: Final = re.compile(r"Permission denied \(([^)]*)\)")
_NEGOTIATION: Final = re.compile(r"Unable to negotiate with .*?: (no matching .*)")

_UNREACHABLE: Final = (
    ("could not resolve", "its name is not known", "check the name for a typing error, or write the address"),
    ("connection refused", "nobody listens there", "is SSH switched on over there, and is the port right?"),
    ("no route to host", "there is no route to it", "check the network, and whether the host is on"),
    ("network is unreachable", "its network is not reachable", "check the network"),
    ("timed out", "it does not answer", "check the network, the address, and whether the host is on"),
    (
        "operation timed out",
        "it does not answer",
        "check the network, the address, and whether the host is on",
    ),
)
_DROPPED: Final = (
    "closed by", "reset by", "connection reset", "broken pipe", "not responding", "send disconnect",
    "received disconnect", "connection closed", "exceeded maxstartups", "message authentication code incorrect",
    "corrupted mac", "control master terminated", "control socket", "disconnected from", "write failed",
)  # fmt: skip


@dataclass(slots=True)
class Progress:
    """How far a connection has come, gathered line by line from the client's log.

    Args:
        host_key: type and fingerprint of the key that the host showed.
        started: the far command runs.
        status: how it ended; None as long as that is not known.
        wire_bytes: sent and received by the client, encryption and framing included; known at the end.
    """

    host_key: str = ""
    cipher: str = ""
    authenticated: bool = False
    started: bool = False
    status: int | None = None
    wire_bytes: tuple[int, int] | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    _told: int | None = None
    _quoting: bool = False  # the log quotes our command, which may have many lines

    def note(self, line: str) -> None:
        """Takes in the next line of the log."""
        if line.startswith("debug"):
            self._quoting = line.startswith("debug1: Sending command: ")
        if not line.startswith("debug"):
            if self._quoting:
                pass
            elif line.startswith("Authenticated to "):
                self.authenticated = True
            elif found := _TRANSFERRED.match(line):
                self.wire_bytes = int(found[1]), int(found[2])
            elif line.strip("@ ") and not line.startswith("Bytes per second"):
                self.lines.append(line)
        elif found := _HOST_KEY.match(line):
            self.host_key = self.host_key or f"{found[1]} {found[2]}"
        elif found := _CIPHER.match(line):
            self.cipher = found[1]
        elif line.startswith(
            ("debug1: Sending command: ", "debug1: mux_client_request_session: master session id")
        ):
            self.started = self.authenticated = True
        elif line.startswith("debug1: client_input_channel_req: channel 0 rtype exit-"):
            self._told = KILLED if "exit-signal" in line else 0
        elif (found := _EXIT.match(line)) and self._told is not None:
            self.status = KILLED if self._told == KILLED else int(found[1])
        elif found := _EXIT_OF_MASTER.match(line):
            self.status = int(found[1])


def verdict(address: Address, progress: Progress, stderr: bytes) -> LinkError:
    """The error that tells the user why a connection failed.

    Args:
        stderr: what else was said, before the command ran: by a jump host's client, or a proxy command.
    """
    if progress.started:
        reason = printable("\n".join(progress.lines)) or "without a word"
        return LinkLost(
            f"the connection to {address} broke off: {reason}",
            hint="check the network and the host's log; the command can be run again",
        )
    lines = [*stderr.decode("utf-8", "replace").splitlines(), *progress.lines]
    text = "\n".join(lines).lower()
    if (
        "host identification has changed" in text
        or "revoked host key" in text
        or "has changed and you" in text
    ):
        return key_changed(address, progress.host_key)
    if "host key is known for" in text or "host key verification failed" in text:
        return key_unknown(address, progress.host_key)
    if found := _DENIED.search("\n".join(lines)):
        return _refused(address, found[1], lines)
    if "too many authentication failures" in text:
        return LoginRefused(
            f"{address} refused the login: too many keys were offered",
            hint="name the key to use, or remove keys from the SSH agent",
        )
    for words, meaning, hint in _UNREACHABLE:
        if words in text:
            return HostUnreachable(f"{address} can not be reached: {meaning}", hint=hint)
    if found := _NEGOTIATION.search("\n".join(lines)):
        return LinkError(
            f"{address} and the SSH client here have no method in common: {printable(found[1])}",
            hint="update the SSH server over there",
        )
    reason = printable("\n".join(lines)) or "the SSH client did not say why"
    if any(words in text for words in _DROPPED):
        return HostUnreachable(
            f"{address} closed the connection before the login: {reason}",
            hint="is that an SSH server, and does it not refuse us for too many logins at a time?",
        )
    return LinkError(f"no connection to {address}: {reason}")


def key_unknown(address: Address, shown: str) -> HostKeyUnknown:
    """The refusal of a host that is not known. `shown` is the type and fingerprint of its key."""
    return HostKeyUnknown(
        f"{address} is not a known host; it shows the key {shown or '(none)'}",
        hint="compare this fingerprint with the host's own (on its console: ssh-keygen -lf FILE.pub), then link it",
    )


def key_changed(address: Address, shown: str) -> HostKeyChanged:
    """The refusal of a host whose key is not the recorded one. `shown` is as in `key_unknown`."""
    return HostKeyChanged(
        f"{address} shows another key than before: {shown or '(none)'}; somebody may pretend to be it",
        hint="only if the host was installed anew or got a new key: forget the old key, and link it again",
    )


def _refused(address: Address, methods: str, lines: Iterable[str]) -> LoginRefused:
    unusable = [line for line in lines if "load key" in line.lower() or "identity file" in line.lower()]
    told = f" ({printable(unusable[-1])})" if unusable else ""
    return LoginRefused(
        f"{address} does not accept our key{told}; it would take: {printable(methods)}",
        hint="link the host again, or check its authorized_keys and the key that is used here",
    )
