"""Key pairs of the stand-in, made when it starts and kept in its folder. None is ever part of the project."""

from __future__ import annotations

import os
import subprocess

KINDS = {
    "rsa": ("rsa", "3072"),
    "host_rsa": ("rsa", "2048"),
    "ecdsa": ("ecdsa", "256"),
    "ed25519": ("ed25519", "256"),
}


_client: dict[str, bytes] = {}
"""The client's key pair of this process. Its stand-ins accept the same one; host keys are each one's own."""


def make_client_key(path: str) -> None:
    """A client's RSA key pair is at the path. Cost: that of `make_keys` the first time, then nothing."""
    names = ("", ".pub")
    if not os.path.exists(path) and _client:
        for name in names:
            with open(path + name, "xb", opener=lambda place, flags: os.open(place, flags, 0o600)) as file:
                file.write(_client[name])
    make_keys(("rsa", path))
    for name in names:
        with open(path + name, "rb") as file:
            _client[name] = file.read()


def make_keys(*wanted: tuple[str, str]) -> None:
    """The key pairs (kind, path) exist; they are made at the same time. Cost: 0.1 to 0.5 s for RSA."""
    running = []
    for kind, path in wanted:
        if os.path.exists(path):
            continue
        name, bits = KINDS[kind]
        command = ["ssh-keygen", "-q", "-t", name, "-b", bits, "-N", "", "-C", "standin", "-f", path]
        running.append((command, subprocess.Popen(command, stdin=subprocess.DEVNULL)))
    for command, process in running:
        if process.wait() != 0:
            raise RuntimeError(f"could not make a key pair: {' '.join(command)}")
