"""The first process of a stand-in: makes its world, starts its two servants, and takes everything with it when it ends.

It runs as process 1 of namespaces of its own (processes, mounts, host name). So whatever a session starts ends when this
process ends, and all mounts go with it: the kernel sees to it, even after SIGKILL. It ends when hostd ends, and hostd ends
when the other side of its control socket does, which is held by the process that wanted the stand-in.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

from tests.esxi_host import rootfs
from tests.esxi_host.layout import Layout
from tests.esxi_host.locks import Board
from tests.esxi_host.options import Options


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    options = Options(**json.loads(sys.argv[2]))
    try:
        layout = Layout(options.folder)
        socket.sethostname(options.name)
        rootfs.mount(layout)
        _datastores(layout, options)
        hostd = os.fork()
        if hostd == 0:
            _run_hostd(control, options)
    except Exception:
        control.sendall(json.dumps({"error": traceback.format_exc()}).encode() + b"\n")
        return 1
    control.close()
    while True:
        pid, status = os.wait()  # sessions that lost their parent are ours to bury
        if pid == hostd:
            return os.waitstatus_to_exitcode(status)


def _run_hostd(control: socket.socket, options: Options) -> None:
    from tests.esxi_host.hostd import Hostd

    try:
        Hostd(options).run(control)
    except BaseException:
        traceback.print_exc()
        control.sendall(json.dumps({"error": traceback.format_exc()}).encode() + b"\n")
    finally:
        os._exit(0)


def _datastores(layout: Layout, options: Options) -> None:
    """The datastores are at /vmfs/volumes of the host."""
    place = os.path.join(layout.root, "vmfs/volumes")
    if not options.locks:
        rootfs.mount_call(layout.volumes, place, "", rootfs.BIND)
        return
    if not os.path.exists("/dev/fuse"):
        raise RuntimeError("there is no /dev/fuse: start without locks, or load the kernel's fuse module")
    board = Board(layout.locks)
    readable, writable = os.pipe()
    if os.fork() == 0:
        os.close(readable)
        try:
            from tests.esxi_host.lockfs import serve

            serve(layout.volumes, place, board, writable)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writable)
    if os.read(readable, 1) != b"1":
        raise RuntimeError("the view of the datastores could not be mounted; see log/init.log")
    os.close(readable)
    device = os.stat(place).st_dev
    try:  # the kernel asks the view for a megabyte at a time instead of 128 KiB
        with open(
            f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w", encoding="ascii"
        ) as file:
            file.write("1024")
    except OSError:
        pass  # a container without a writable /sys


if __name__ == "__main__":
    sys.exit(main())
