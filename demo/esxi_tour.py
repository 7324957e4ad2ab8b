"""The demo's second half: running VMs of an ESXi host are backed up, and every claim on the way is checked.

There is no ESXi host in it, but a stand-in (docs/STANDIN.md): a real sshd, real files and redo logs, and ESXi's commands as far as
they are known. It needs root; where that or a package is missing, the tour says so and is left out, with exit code 0. Ends with
another one if anything differs. All that it writes is in one temporary folder (KEEP=1 keeps it; TMPDIR says where it is made).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from demo.esxi_guests import DISK_BYTES, MIB, BusyGuest, clone_disk, database_blocks, make_system_disk
from tests.esxi_host import Disk, StandIn, StandInError, VmState

if TYPE_CHECKING:
    from collections.abc import Iterator

VMS = ("web1", "web2")
NEEDED = {
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "busybox": "busybox",
    "unshare": "util-linux",
    "fusermount3": "fuse3",
    "/usr/bin/python3": "python3",
}


# --- telling -----------------------------------------------------------------------------------------


class Colours:
    """Those of `demo/run`: for terminals only."""

    on = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    bold, green, red, cyan, plain = (
        ("\x1b[1m", "\x1b[32m", "\x1b[31m", "\x1b[36m", "\x1b[0m") if on else ("",) * 5
    )


class Failed(Exception):
    """Something is not as the tour claims."""


def chapter(text: str) -> None:
    """Begins a part of the story."""
    print(f"\n{Colours.bold}{text}{Colours.plain}", flush=True)


def tell(text: str) -> None:
    """A sentence between commands."""
    print(text, flush=True)


def proven(text: str) -> None:
    """A claim that was just checked."""
    print(f"{Colours.green}  ok: {text}{Colours.plain}", flush=True)


def fail(text: str) -> NoReturn:
    """Ends the tour."""
    raise Failed(text)


def show(*command: str) -> None:
    """The command as one would type it."""
    print(f"{Colours.cyan}$ {shlex.join(command)}{Colours.plain}", flush=True)


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Shows the command and runs it; a failure is the tour's."""
    show(*command)
    if code := subprocess.run(command, check=False, env=env).returncode:
        fail(f"'{command[0]}' ended with {code}")


def in_mib(count: float) -> str:
    """Bytes for people."""
    return f"{count / MIB:.1f} MiB"


# --- the place ---------------------------------------------------------------------------------------


def what_is_missing() -> str | None:
    """Why the stand-in can not run here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "it needs root on Linux, since the stand-in host runs in namespaces of its own"
    packages = {package for program, package in NEEDED.items() if not shutil.which(program)}
    if packages:
        return f"packages of the system are missing: {' '.join(sorted(packages))}"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "it needs /dev/fuse, by which the stand-in host locks the disks of running VMs"
    trial = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"namespaces can not be made here ({done.stderr.strip()})"
    return None


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A folder that is removed at the end, unless KEEP says otherwise."""
    place = Path(tempfile.mkdtemp(prefix="holdfast-esxi-demo.", dir=os.environ.get("TMPDIR") or None))
    try:
        yield place
    finally:
        if os.environ.get("KEEP", "0") != "0":
            tell(f"\nEverything is kept in {place}")
        else:
            shutil.rmtree(place)


def own_environment(work: Path) -> None:
    """Holdfast's configuration (linked hosts, keys) and repository are those of the tour."""
    for name in [name for name in os.environ if name.startswith("HOLDFAST_")]:
        del os.environ[name]
    os.environ["XDG_CONFIG_HOME"] = str(work / "config")
    os.environ["XDG_STATE_HOME"] = str(work / "state")
    os.environ["HOLDFAST_REPOSITORY"] = "repo"
    os.environ["LC_ALL"] = "C.UTF-8"


# --- the proof ---------------------------------------------------------------------------------------


def console_fingerprint(host: StandIn) -> str:
    """What the host's own console shows of its key."""
    key = host.path("/etc/ssh/ssh_host_ecdsa_key.pub")
    shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True)
    return shown.stdout.split()[1]


def back_up_both(host: StandIn, guests: list[BusyGuest], label: str) -> int:
    """Both VMs at once, each by a process of its own; bytes over the wire. What they print is shown one after the other."""
    before = host.traffic()
    writes = [guest.writes for guest in guests]
    with contextlib.ExitStack() as stack:
        processes = []
        for name in VMS:
            command = ["holdfast", "backup", f"esxi://esx1/{name}", "--label", label]
            print(f"{Colours.cyan}$ {shlex.join(command)} &{Colours.plain}", flush=True)
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
            stack.callback(process.terminate)  # where the tour is ended meanwhile
            processes.append(process)
        for name, process in zip(VMS, processes, strict=True):
            said = process.communicate()[0]
            print(said, end="", flush=True)
            if process.returncode:
                fail(f"the backup of {name} ended with {process.returncode}")
    for guest, earlier in zip(guests, writes, strict=True):
        if guest.error is not None or guest.writes == earlier:
            fail(f"a guest did not write during the backup ({guest.error})")
    counts = " and ".join(str(guest.writes - earlier) for guest, earlier in zip(guests, writes, strict=True))
    proven(f"the guests wrote {counts} times to their disks meanwhile")
    after = host.traffic()
    return after.sent_bytes + after.received_bytes - before.sent_bytes - before.received_bytes


def same_as_before(host: StandIn, vms: list[VmState]) -> None:
    """The VMs run, on the same disks, without snapshots."""
    for vm in vms:
        now = host.vm(vm.name)
        if (now.power, now.disks, now.snapshots) != (vm.power, vm.disks, vm.snapshots):
            fail(f"{vm.name} is not as it was: {now}")
    proven("both VMs run as before, and no snapshot is left")


def same_as_at_the_snapshot(disk: Path, kept: str) -> None:
    """A disk out of the mount against what the stand-in kept at the moment of the snapshot."""
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", str(disk), kept)


def restore_to_host(host: StandIn, vm: VmState) -> None:
    """The VM's first restore point, as a VM that runs: its disk is compared with the one at the moment of the snapshot."""
    point = f"{vm.name}@latest~1"
    new_name = f"{vm.name}-back"
    run("holdfast", "restore", point, f"esxi://esx1/datastore1/{new_name}", "--register", "--power-on")
    run("holdfast", "vms", "esx1")
    new = host.vm(new_name)
    if new.power != vm.power or new.uuid == vm.uuid or new.question is not None:
        fail(f"the new VM is not as it should be: {new}")
    proven("the new VM is registered and runs, and the UUID is still the old one's alone")
    host.copy_disk(new, "scsi0:0", "back.raw")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", "back.raw", host.reference(vm, 1))
    proven("its disk is the one at the moment of the first snapshot")


@contextlib.contextmanager
def mounted(folder: str) -> Iterator[None]:
    """The repository as files, until the end of the `with`."""
    os.mkdir(folder)
    run("holdfast", "mount", folder)
    try:
        yield
    finally:
        run("holdfast", "umount", folder)


# --- the tour ----------------------------------------------------------------------------------------


def tour(work: Path) -> None:
    """The story.

    Raises:
        Failed: something is not as it is told.
    """
    began_s = time.monotonic()
    tell(
        "\nThe second half of the demo backs up VMs of an ESXi host while they run. The host is a stand-in: a real sshd, real\n"
        "files and redo logs, and ESXi's commands as far as they are known. No real host has been tried yet."
    )
    chapter("1. An ESXi host with two running VMs, cloned from one system disk")
    system = make_system_disk(work)
    clones = [clone_disk(system, name) for name in VMS]
    blocks = [database_blocks(disk) for disk in clones]
    system.unlink()
    with StandIn(work / "esx", release="8.0") as host, contextlib.ExitStack() as stack:
        host.add_datastore("datastore1")
        vms = [
            host.add_vm(name, disks=[Disk(raw=str(disk))], running=True)
            for name, disk in zip(VMS, clones, strict=True)
        ]
        used = sum(disk.stat().st_blocks * 512 for disk in clones)
        for disk in clones:
            disk.unlink()
        tell(f"Each has a disk of {in_mib(DISK_BYTES)}; together {in_mib(used)} of them hold data.")
        host.keep_references()

        chapter("2. The host is linked: its key is confirmed, the password is given once, a key is exchanged")
        tell(
            "The fingerprint is what the host's console shows. The password comes from HOLDFAST_HOST_PASSWORD."
        )
        run(
            *("holdfast", "host", "add", "esx1", f"root@127.0.0.1:{host.port}"),
            *("--fingerprint", console_fingerprint(host)),
            env={**os.environ, "HOLDFAST_HOST_PASSWORD": host.password},
        )
        run("holdfast", "vms", "esx1")

        chapter("3. Both are backed up at once, into one repository, while they write")
        run("holdfast", "init", "--encryption", "none")
        guests = [stack.enter_context(BusyGuest(host, vm, own)) for vm, own in zip(vms, blocks, strict=True)]
        first_wire = back_up_both(host, guests, "run=1")
        same_as_before(host, vms)

        chapter("4. The second backup: the host's own Python finds what is new, and only that travels")
        second_wire = back_up_both(host, guests, "run=2")
        same_as_before(host, vms)
        if second_wire * 4 > first_wire:
            fail(f"the second backup moved {in_mib(second_wire)}, the first one {in_mib(first_wire)}")
        run("holdfast", "list")

        chapter("5. Each restore point is the disk at the moment of its snapshot")
        tell(
            "The stand-in kept a copy of each disk when the snapshot was taken. qemu-img compares it with the mounted one:"
        )
        with mounted("mnt"):
            for number in (1, 2):
                for vm in vms:
                    folder = next(Path(f"mnt/by-label/run/{number}").glob(f"{vm.name}@*"))
                    same_as_at_the_snapshot(folder / f"{vm.name}.vmdk", host.reference(vm, number))
            proven("four restore points, four times identical to the last byte")
            run("e2fsck", "-fn", "mnt/by-vm/web1/latest/web1-flat.vmdk")
            proven("the guest's file system is clean")

        chapter("6. One of them comes back to the host, as a new VM beside the old one")
        restore_to_host(host, vms[0])

        chapter("7. The repository proves itself")
        run("holdfast", "check", "--read-data")
        summarize(used, first_wire, second_wire, time.monotonic() - began_s)


def summarize(used: int, first_wire: int, second_wire: int, took_s: float) -> None:
    """The figures, at the end."""
    chapter("Summary of the ESXi tour")
    stored = sum(path.stat().st_blocks * 512 for path in Path("repo").rglob("*") if path.is_file())
    for label, figure in (
        ("data on the disks of both VMs", in_mib(used)),
        ("over the wire for their first backup", in_mib(first_wire)),
        ("over the wire for the second", in_mib(second_wire)),
        ("repository with four restore points", in_mib(stored)),
        ("time taken by the tour", f"{took_s:.0f} s"),
    ):
        print(f"  {label:44} {figure:>12}")
    proven("VMs backed up while they ran, and as they were at one moment")


def main() -> int:
    """0 if all was as told, or the tour was left out."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if reason := what_is_missing():
        print(f"\nThe ESXi tour is left out: {reason}.")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    here = Path.cwd()
    try:
        with work_folder() as work, contextlib.chdir(work):
            own_environment(work)
            tour(work)
    except (Failed, StandInError, RuntimeError, OSError, subprocess.SubprocessError) as failure:
        print(f"{Colours.red}  FAILED: {failure}{Colours.plain}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        os.chdir(here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
