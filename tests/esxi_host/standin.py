"""`StandIn`: starts a stand-in ESXi host, talks to it, and ends it. This is what tests use.

    with StandIn(tmp_path / "esx", release="8.0") as host:
        vm = host.add_vm("web1", disks=[64 << 20], running=True)
        ... ssh -i host.key_file -p host.port root@127.0.0.1 vim-cmd vmsvc/getallvms ...

Everything is below one folder. The stand-in ends with `stop`, at the end of the `with`, or with this process, however that
ends; no process and no mount is left. Several may run at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from tests.esxi_host import rootfs
from tests.esxi_host.faults import Value
from tests.esxi_host.keys import make_client_key, make_keys
from tests.esxi_host.layout import Layout
from tests.esxi_host.options import RELEASES, Options

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEFAULT_PASSWORD = "Stand-in.7"
START_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a new VM."""

    size_bytes: int = 0
    seed: int | None = None
    """Random data in about an eighth of it; None for an empty disk."""
    raw: str | None = None
    """An image whose content it gets."""
    name: str | None = None
    node: str | None = None
    datastore: str | None = None
    """Another datastore than the VM's: the .vmx has an absolute path then."""
    mode: str | None = None
    """Such as `independent_persistent`."""
    kind: str = "flat"
    """`flat`, `rdm` (virtual) or `rdmp` (physical)."""
    thin: bool = True


@dataclass(frozen=True, slots=True)
class VmState:
    """A VM as it was when it was asked for. Paths are the host's."""

    vmid: int
    name: str
    vmx: str
    power: str
    uuid: str
    question: int | None
    disks: dict[str, str]
    """Node -> descriptor that the VM runs on."""
    snapshots: list[dict[str, Any]]
    """id, name, parent, description; oldest first."""
    files: list[str]
    """Names in the VM's folder."""
    busy: bool
    """Whether a task of it is under way."""
    guest_writes: int
    guest_error: str | None

    @classmethod
    def of(cls, state: dict[str, Any]) -> VmState:
        return cls(**state)

    @property
    def folder(self) -> str:
        return self.vmx.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes over the wire. Payload of TCP, with SSH's own part."""

    connections: int
    sent_bytes: int
    """From the host."""
    received_bytes: int
    """By the host."""
    read_bytes: int
    """Bytes that sessions have read from datastores, through the view with the locks."""


class StandInError(Exception):
    """What the stand-in answered when it could not do what a test asked for."""


class StandIn:
    """One stand-in host.

    Args:
        folder: everything is below it; it is made, and it stays when the stand-in ends.
        release: `7.0` or `8.0`: whose texts the commands print.
        port: 0 for any that is free.
        locks: False to reach the datastores directly, for measurements of speed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        release: str = "8.0",
        port: int = 0,
        name: str = "esx1",
        password: str = DEFAULT_PASSWORD,
        locks: bool = True,
        seed: int = 1,
    ) -> None:
        if release not in RELEASES:
            raise ValueError(f"release {release!r}: there are {' and '.join(RELEASES)}")
        self._options = Options(os.path.abspath(folder), release, port, name, locks, seed)
        self._layout = Layout(self._options.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Control | None = None
        self.password = password
        self.user = "root"
        self.port = port
        self.faults = FaultSwitches(self)

    # --- life

    def start(self) -> Self:
        """The stand-in takes connections on return. Cost: about a second, most of it for keys."""
        rootfs.require_root()
        layout = self._layout
        layout.make()
        os.makedirs(os.path.join(layout.root, "etc/ssh"), exist_ok=True)
        make_client_key(layout.client_key)
        make_keys(
            ("host_rsa", os.path.join(layout.root, "etc/ssh/ssh_host_rsa_key")),
            ("ecdsa", os.path.join(layout.root, "etc/ssh/ssh_host_ecdsa_key")),
        )
        with open(layout.client_key + ".pub", encoding="utf-8") as file:
            public = file.read()
        rootfs.build(layout, password=self.password, authorized=public, host_name=self._options.name)
        ours, theirs = socket.socketpair()
        with theirs, open(os.path.join(layout.log, "init.log"), "ab") as log:
            command = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
            program = [
                sys.executable,
                "-m",
                "tests.esxi_host.init",
                str(theirs.fileno()),
                json.dumps(asdict(self._options)),
            ]
            self._process = subprocess.Popen(
                [*command, *program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, "PYTHONPATH": ROOT, "PYTHONWARNINGS": "default"},
            )
        self._control = Control(ours)
        try:
            ready = self._control.receive(START_TIMEOUT_S)
            if "error" in ready:
                raise StandInError(ready["error"])
        except BaseException:
            self.stop()
            raise
        self.port = int(ready["port"])
        return self

    def stop(self) -> None:
        """No process and no mount of the stand-in is left on return; its folder stays."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()  # the namespace dies with it
                self._process.wait()
            self._process = None

    def wait(self) -> int:
        """Returns when the stand-in has ended by itself."""
        assert self._process is not None
        return self._process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def call(self, operation: str, **arguments: Any) -> Any:
        """The answer of the stand-in's daemon. Raises StandInError with its reason."""
        if self._control is None:
            raise StandInError("the stand-in is not running")
        answer = self._control.ask({"op": operation, "args": arguments})
        if "error" in answer:
            raise StandInError(answer["error"])
        return answer["ok"]

    # --- how to get in

    @property
    def folder(self) -> str:
        return self._options.folder

    @property
    def release(self) -> str:
        return self._options.release

    @property
    def key_file(self) -> str:
        """An RSA key that the host accepts."""
        return self._layout.client_key

    @property
    def authorized_keys(self) -> str:
        """The host's file of accepted keys, as this machine sees it."""
        return self._layout.authorized_keys

    @property
    def known_hosts(self) -> str:
        """Lines for a known_hosts file: the host's keys under its address and port."""
        lines = []
        for kind in ("rsa", "ecdsa"):
            with open(
                os.path.join(self._layout.root, f"etc/ssh/ssh_host_{kind}_key.pub"), encoding="utf-8"
            ) as file:
                name, data = file.read().split()[:2]
            lines.append(f"[127.0.0.1]:{self.port} {name} {data}\n")
        return "".join(lines)

    def ssh_command(self, *command: str, options: Sequence[str] = ()) -> list[str]:
        """The command line of OpenSSH's client that runs a command on the host."""
        known = os.path.join(self._layout.keys, "known_hosts")
        with open(known, "w", encoding="utf-8") as file:
            file.write(self.known_hosts)
        settings = ["-F", "none", "-i", self.key_file, "-p", str(self.port)]
        for setting in (
            *(
                "IdentitiesOnly=yes",
                "BatchMode=yes",
                f"UserKnownHostsFile={known}",
                "GlobalKnownHostsFile=none",
            ),
            *("StrictHostKeyChecking=yes", "ConnectTimeout=20"),
        ):
            settings += ["-o", setting]
        return ["ssh", *settings, *options, "root@127.0.0.1", *command]

    def ssh(
        self, command: str, *, stdin: bytes = b"", timeout_s: float = 60, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        """A command line, run on the host by OpenSSH's client."""
        return subprocess.run(
            self.ssh_command(command, options=options),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def path(self, place: str) -> str:
        """Where a path of the host is on this machine; `/vmfs/volumes/...` leads beside the locks."""
        if place.startswith("/vmfs/volumes/"):
            return os.path.join(self._layout.volumes, place.removeprefix("/vmfs/volumes/"))
        return os.path.join(self._layout.root, place.lstrip("/"))

    # --- what the host has

    def add_datastore(self, name: str, *, kind: str = "VMFS-6", capacity_bytes: int = 100 << 30) -> str:
        """The id of a new datastore: `VMFS-6` (SESparse redo logs), `VMFS-5` or `NFS` (COWD)."""
        return str(self.call("add_datastore", name=name, kind=kind, capacity_bytes=capacity_bytes))

    def add_vm(
        self,
        name: str,
        *,
        disks: Sequence[int | Disk] = (64 << 20,),
        running: bool = False,
        datastore: str = "",
        folder: str | None = None,
        annotation: str = "",
        guest: str = "debian12-64",
        hardware: int = 19,
        memory_mib: int = 512,
        extra: dict[str, str] | None = None,
    ) -> VmState:
        """A registered VM with its files, as a host would have made them.

        Args:
            disks: sizes in bytes (with some random data), or `Disk` for more of a say.
            datastore: the first one if not named; one is made if there is none.
            extra: more lines for its .vmx.
        """
        parts = [
            disk if isinstance(disk, Disk) else Disk(disk, seed=number + 1)
            for number, disk in enumerate(disks)
        ]
        state = self.call(
            "add_vm",
            name=name,
            disks=[asdict(part) for part in parts],
            running=running,
            datastore=datastore,
            folder=folder,
            annotation=annotation,
            guest=guest,
            hardware=hardware,
            memory_mib=memory_mib,
            extra=extra or {},
        )
        return VmState.of(state)

    def vm(self, which: int | str) -> VmState:
        """A VM by its id, or the first one of that name."""
        for state in self.state()["vms"].values():
            if which in (state["vmid"], state["name"]):
                return VmState.of(state)
        raise StandInError(f"there is no VM {which!r}")

    def state(self) -> dict[str, Any]:
        """All that the host has, as JSON would show it."""
        return dict(self.call("state"))

    def remove_vm(self, vm: VmState) -> None:
        self.call("remove_vm", vmid=vm.vmid)

    def add_invalid_vm(self) -> int:
        """The id of an entry whose files are gone: `Skipping invalid VM`."""
        return int(self.call("add_invalid_vm"))

    # --- what others do

    def power(self, vm: VmState, to: str) -> None:
        """Somebody switches the VM `on`, `off` or `suspended`."""
        self.call("power", vmid=vm.vmid, to=to)

    def rename_vm(self, vm: VmState, name: str) -> None:
        self.call("rename_vm", vmid=vm.vmid, name=name)

    def snapshot(self, vm: VmState, name: str, description: str = "", *, memory: bool = False) -> int:
        """The id of a snapshot that somebody else has taken."""
        return int(self.call("snapshot", vmid=vm.vmid, name=name, description=description, memory=memory))

    def remove_snapshot(self, vm: VmState, snapshot: int | None = None) -> None:
        """Somebody removes that snapshot, or all of them with whatever is left over."""
        self.call("remove_snapshot", vmid=vm.vmid, snapshot=snapshot)

    def grow_disk(self, vm: VmState, node: str, size_bytes: int) -> None:
        self.call("grow_disk", vmid=vm.vmid, node=node, size_bytes=size_bytes)

    def write(self, vm: VmState, node: str, offset: int, data: bytes) -> None:
        """The guest writes whole sectors, through whatever the VM runs on."""
        self.call("write", vmid=vm.vmid, node=node, offset=offset, data=data.hex())

    def start_guest(
        self,
        vm: VmState,
        *,
        rate_bytes: float = 1 << 20,
        seed: int = 1,
        span_bytes: int = 0,
        log: bool = False,
    ) -> None:
        """The VM's guest writes at that rate (0: as fast as it goes) while it runs, until `stop_guest`."""
        self.call(
            "guest",
            vmid=vm.vmid,
            rate_bytes=rate_bytes,
            seed=seed,
            span_bytes=span_bytes,
            log=log,
            running=True,
        )

    def stop_guest(self, vm: VmState) -> None:
        self.call("guest", vmid=vm.vmid, rate_bytes=0, seed=0, span_bytes=0, log=False, running=False)

    # --- truth

    def keep_references(self, on: bool = True) -> None:
        """From now on each snapshot leaves raw copies of the disks as they were at that moment."""
        self.call("keep_references", on=on)

    def reference(self, vm: VmState, snapshot: int, node: str = "scsi0:0") -> str:
        """The raw copy of a disk at the moment of a snapshot."""
        return os.path.join(self._layout.references, f"{vm.vmid}-{snapshot}-{node.replace(':', '_')}.raw")

    def copy_disk(self, vm: VmState, node: str, target: str | os.PathLike[str]) -> None:
        """A raw copy of the disk as the guest sees it now."""
        self.call("copy_disk", vmid=vm.vmid, node=node, target=os.path.abspath(target))

    def traffic(self) -> Traffic:
        """Bytes over the wire since the start, as the kernel counts them at the sockets."""
        return Traffic(**self.call("traffic"))

    def drop_connections(self) -> int:
        """Resets all connections now and says how many there were."""
        return int(self.call("drop_connections"))


class FaultSwitches:
    """`host.faults`: see the table in docs/STANDIN.md."""

    def __init__(self, host: StandIn) -> None:
        self._host = host

    def set(self, name: str, value: Value = True, *, times: int | None = None) -> None:
        """The switch is on; with `times`, until it has struck that often."""
        self._host.call("set_fault", name=name, value=value, times=times)

    def clear(self, *names: str) -> None:
        """Those switches, or all of them, are off."""
        self._host.call("clear_faults", names=list(names))

    def struck(self) -> dict[str, int]:
        """How often each switch has struck."""
        return dict(self._host.call("struck"))


class Control:
    """One end of the control socket: JSON, a line for each message."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._pending = b""

    def ask(self, message: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            return self.receive(timeout_s)

    def receive(self, timeout_s: float | None) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._pending:
            data = self._socket.recv(1 << 16)
            if not data:
                raise StandInError("the stand-in has ended; its log folder may say why")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
