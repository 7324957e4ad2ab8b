"""`python -m tests.esxi_host`: a stand-in ESXi host by hand. `start` runs one; the rest talks to one that runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile

from tests.esxi_host.faults import TABLE
from tests.esxi_host.options import RELEASES
from tests.esxi_host.standin import Control, StandIn, StandInError

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.esxi_host", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="run a stand-in until it is interrupted")
    start.add_argument("--folder", help="everything is below it (a temporary one if not given)")
    start.add_argument("--release", choices=RELEASES, default="8.0")
    start.add_argument("--port", type=int, default=0, help="0: any that is free")
    start.add_argument("--name", default="esx1")
    start.add_argument("--password", default="Stand-in.7")
    start.add_argument("--datastore-kind", choices=["VMFS-5", "VMFS-6", "NFS"], default="VMFS-6")
    start.add_argument(
        "--vm",
        action="append",
        default=[],
        metavar="NAME[:MIB[,MIB...]|:IMAGE][:off]",
        help="a VM with disks of those sizes, or with one disk from a raw image; running, unless `off` is said",
    )
    start.add_argument(
        "--writing", type=float, default=0, metavar="MIB_PER_S", help="the guests write at that rate"
    )
    start.add_argument("--no-locks", action="store_true", help="no file system view that locks files")
    fault = commands.add_parser(
        "fault", help="set a fault switch of a stand-in that runs; see docs/STANDIN.md"
    )
    fault.add_argument("folder")
    fault.add_argument("name", choices=[*TABLE, "none"], metavar="NAME", help="`none` clears all")
    fault.add_argument("value", nargs="?", default="true", help="`off` clears it")
    fault.add_argument("--times", type=int)
    state = commands.add_parser("state", help="print what a stand-in that runs has, as JSON")
    state.add_argument("folder")
    arguments = parser.parse_args()
    try:
        if arguments.command == "start":
            return _start(arguments)
        return _ask(arguments)
    except (StandInError, RuntimeError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _start(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="standin-") as temporary:
        host = StandIn(
            arguments.folder or temporary,
            release=arguments.release,
            port=arguments.port,
            name=arguments.name,
            password=arguments.password,
            locks=not arguments.no_locks,
        )
        with host:
            host.add_datastore("datastore1", kind=arguments.datastore_kind)
            for text in arguments.vm or ["web1:64"]:
                _add(host, text, arguments.writing)
            print(f"stand-in for ESXi {host.release}, {arguments.name}, below {host.folder}")
            print(f"  {' '.join(host.ssh_command())}")
            print(f"  password (keyboard-interactive): {host.password}")
            print(f"  faults: python -m tests.esxi_host fault {host.folder} NAME [VALUE]")
            print("Ctrl-C ends it.", flush=True)
            try:
                return host.wait()
            except KeyboardInterrupt:
                return 0


def _add(host: StandIn, text: str, writing_mib: float) -> None:
    from tests.esxi_host.standin import Disk

    name, *rest = text.split(":")
    running = "off" not in rest
    rest = [part for part in rest if part != "off"]
    if rest and os.path.exists(rest[0]):
        disks = [Disk(raw=os.path.abspath(rest[0]))]
    else:
        sizes = rest[0].split(",") if rest else ["64"]
        disks = [Disk(int(size) * MIB, seed=number) for number, size in enumerate(sizes, 1)]
    vm = host.add_vm(name, disks=disks, running=running)
    if writing_mib and running:
        host.start_guest(vm, rate_bytes=writing_mib * MIB, log=True)


def _ask(arguments: argparse.Namespace) -> int:
    connection = socket.socket(socket.AF_UNIX)
    folder = os.open(arguments.folder, os.O_RDONLY | os.O_DIRECTORY)
    connection.connect(f"/proc/self/fd/{folder}/control.sock")
    control = Control(connection)
    if arguments.command == "state":
        message = {"op": "state", "args": {}}
    elif arguments.name == "none":
        message = {"op": "clear_faults", "args": {"names": []}}
    elif arguments.value == "off":
        message = {"op": "clear_faults", "args": {"names": [arguments.name]}}
    else:
        value = _value(arguments.value)
        message = {
            "op": "set_fault",
            "args": {"name": arguments.name, "value": value, "times": arguments.times},
        }
    answer = control.ask(message)
    control.close()
    if "error" in answer:
        raise StandInError(answer["error"])
    if answer["ok"] is not None:
        print(json.dumps(answer["ok"], indent=2))
    return 0


def _value(text: str) -> str | int | float | bool:
    if text == "true":
        return True
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    sys.exit(main())
