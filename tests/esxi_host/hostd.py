"""The host's daemon: serves commands from sessions and requests from tests, and joins the parts of the stand-in.

Two sockets: `/var/run/hostd.sock` in the host, where `vim-cmd` and its like send their arguments and get bytes and an exit
code; and the control socket to the process that started the stand-in (a second one, FOLDER/control.sock, for commands
by hand). When the former closes, the daemon ends, and the stand-in with it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback

from tests.esxi_host import esxcli, vimcmd, vmkfstools
from tests.esxi_host.faults import Faults
from tests.esxi_host.inetd import Inetd
from tests.esxi_host.inventory import Inventory
from tests.esxi_host.layout import Layout
from tests.esxi_host.mischief import Mischief
from tests.esxi_host.options import Options
from tests.esxi_host.requests import Requests
from tests.esxi_host.session import Session

PROGRAMS = {
    "vim-cmd": vimcmd.run,
    "vmkfstools": vmkfstools.run,
    "esxcli": esxcli.run,
    "localcli": esxcli.run,
    "vmware": esxcli.run_vmware,
    "vsish": esxcli.run_vsish,
    "vdf": esxcli.run_vdf,
}


class Hostd:
    """The daemon of one stand-in."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.layout = Layout(options.folder)
        self.faults = Faults()
        self.inventory = Inventory(self.layout, options, self.faults)
        self.inetd = Inetd(self.layout, self.faults, options.port)
        self.mischief = Mischief(self.layout, self.faults, self.inventory)
        self._requests = Requests(self.inventory, self.inetd, self.faults)

    def run(self, control: socket.socket) -> None:
        """Serves until the control socket is closed by its other end."""
        commands = _listen(self.layout.command_socket)
        by_hand = _listen(self.layout.control)
        for listener, serve in ((commands, self._serve_command), (by_hand, self._serve_control)):
            threading.Thread(target=_accept, args=(listener, serve), daemon=True).start()
        self.mischief.start()
        self.inetd.start()
        control.sendall(json.dumps({"port": self.inetd.port}).encode() + b"\n")
        self._serve_control(control)
        self.inventory.stop()

    def _serve_control(self, connection: socket.socket) -> None:
        for line in connection.makefile("rb"):
            message = json.loads(line)
            try:
                answer = {"ok": self._requests.answer(message["op"], message["args"])}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            try:
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:
                return

    def _serve_command(self, connection: socket.socket) -> None:
        with connection:
            session = Session.receive(connection, self.options.release)
            if session is None:
                return
            delay_s = self.faults.number("slow_commands_s")
            if delay_s:
                time.sleep(delay_s)
            try:
                code = PROGRAMS[session.program](self.inventory, session)
            except BrokenPipeError:
                return  # the session is gone; what the command did stays done
            except Exception:
                traceback.print_exc()
                session.print("A general system error occurred: the stand-in has an error; see log/init.log")
                code = 1
            session.finish(code)


def _listen(path: str) -> socket.socket:
    """A listening socket at a path of any length: the kernel's limit is met by the folder's descriptor."""
    listener = socket.socket(socket.AF_UNIX)
    if os.path.lexists(path):
        os.unlink(path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
    listener.listen(64)
    return listener


def _accept(listener: socket.socket, serve: object) -> None:
    assert callable(serve)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()
