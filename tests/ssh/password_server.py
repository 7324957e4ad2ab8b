"""A small SSH server that takes passwords, with paramiko's server side: what a real sshd only does with PAM.

It runs commands with the machine's own shell, in a home folder of its own, and accepts keys that stand in an authorized_keys
file there; forced commands are obeyed. Only for tests, on 127.0.0.1.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

import paramiko

from holdfast.ssh.address import Address

PASSWORD = "correct horse"


class PasswordServer:
    """Running from construction to `close`.

    Args:
        methods: what is offered besides keys: "password" or "keyboard-interactive".
        accepts_keys: False: as a host whose file is not where we put the key.
    """

    def __init__(
        self, home: Path, *, methods: str = "keyboard-interactive", accepts_keys: bool = True
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.methods = methods
        self.accepts_keys = accepts_keys
        self.authorized_keys = home / ".ssh" / "authorized_keys"
        self.passwords: list[str] = []
        self.users: list[str] = []
        self.host_key = paramiko.ECDSAKey.generate()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", "root", self._socket.getsockname()[1])
        self._transports: list[paramiko.Transport] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)
        for transport in self._transports:
            transport.close()
            transport.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.set_log_channel("holdfast.ssh.paramiko")
            transport.add_server_key(self.host_key)
            self._transports.append(transport)
            # not waited for: who only wants to see the host's key is gone again by then
            transport.start_server(event=threading.Event(), server=_Session(self))


class _Session(paramiko.ServerInterface):
    def __init__(self, server: PasswordServer) -> None:
        self._server = server
        self._forced = ""

    def get_allowed_auths(self, username: str) -> str:
        self._server.users.append(username)
        return f"publickey,{self._server.methods}"

    def check_auth_publickey(self, username: str, key: Any) -> int:
        if self._server.accepts_keys and self._server.authorized_keys.exists():
            for line in self._server.authorized_keys.read_text().splitlines():
                if key.get_base64() in line.split():
                    forced = re.search(r'command="((?:[^"\\]|\\")*)"', line)
                    self._forced = forced[1].replace('\\"', '"') if forced else ""
                    return paramiko.AUTH_SUCCESSFUL
        return paramiko.AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:
        self._server.passwords.append(password)
        right = self._server.methods == "password" and password == PASSWORD
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        return paramiko.InteractiveQuery("", "", ("(root@localhost) Password: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        self._server.passwords += responses
        return paramiko.AUTH_SUCCESSFUL if responses == [PASSWORD] else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(
            target=self._run, args=(channel, self._forced or command.decode()), daemon=True
        ).start()
        return True

    def _run(self, channel: paramiko.Channel, command: str) -> None:
        stdin = channel.makefile("rb").read()
        outcome = subprocess.run(
            ["sh", "-c", command], input=stdin, capture_output=True, check=False, cwd=self._server.home,
            env={"HOME": str(self._server.home), "PATH": os.environ["PATH"]},
        )  # fmt: skip
        channel.sendall(outcome.stdout)
        channel.sendall_stderr(outcome.stderr)
        channel.send_exit_status(outcome.returncode)
        channel.close()
