"""A VM of the host: what its files say, its power, its snapshots, and the changes that go through them.

The .vmx file is the truth about disks: it is read when a VM is registered or powered on, and rewritten when a snapshot
changes what the VM runs on. Every change happens under the VM's lock, which a writing guest takes for each write, so a
snapshot is a moment between two writes.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import threading
from dataclasses import dataclass, field
from datetime import datetime

from tests.esxi_host.chain import Chain, descriptors
from tests.esxi_host.datastores import Datastores
from tests.esxi_host.redo import Cowd, SeSparse
from tests.esxi_host.tasks import TaskError
from tests.esxi_host.vmfiles import Descriptor, Pairs

NODE = re.compile(r"^(scsi|ide|sata|nvme)(\d+):(\d+)\.fileName$", re.IGNORECASE)
SESPARSE_FROM_BYTES = 2 << 40
"""On VMFS 5, disks of that size and more have SESparse redo logs as well."""


@dataclass(slots=True)
class Snapshot:
    """One snapshot of a VM's tree."""

    number: int
    name: str
    description: str
    created: datetime
    state: str
    """The VM's power at that moment."""
    disks: dict[str, str]
    """Node -> descriptor (machine's path) that holds the disk as it was."""
    parent: int | None
    memory: bool = False


@dataclass(slots=True)
class Vm:
    """One registered VM."""

    vmid: int
    vmx: str
    """The machine's path of its configuration."""
    stores: Datastores
    rng: random.Random
    power: str = "Powered off"
    told_power: tuple[str, float] | None = None
    """What `power.getstate` still says, and until when."""
    snapshots: list[Snapshot] = field(default_factory=list)
    next_snapshot: int = 1
    chains: dict[str, Chain] = field(default_factory=dict)
    """The disks of a running VM."""
    question: int | None = None
    world: int = 0
    started: datetime | None = None
    layout_sizes: dict[str, int] = field(default_factory=dict)
    """What `get.filelayoutex` believes: sizes as they were at the last change of the VM."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    pairs: Pairs = field(default_factory=Pairs)
    consolidating: bool = False

    # --- what the files say

    def load(self) -> None:
        self.pairs = Pairs.read(self.vmx)
        self.note_sizes()

    @property
    def folder(self) -> str:
        return os.path.dirname(self.vmx)

    @property
    def name(self) -> str:
        return self.pairs.get("displayName") or os.path.splitext(os.path.basename(self.vmx))[0]

    @property
    def guest(self) -> str:
        text = self.pairs.get("guestOS", "other")
        known = {"other": "otherGuest"}
        return known.get(text, text.replace("-", "_") + "Guest")

    @property
    def hardware(self) -> str:
        return f"vmx-{int(self.pairs.get('virtualHW.version', '13')):02d}"

    @property
    def running(self) -> bool:
        return self.power == "Powered on"

    def disk_path(self, value: str) -> str:
        """The machine's path of a `fileName` in the configuration."""
        if value.startswith("/"):
            return self.stores.real(value)
        return os.path.normpath(os.path.join(self.folder, value))

    def disks(self) -> dict[str, str]:
        """Node (`scsi0:0`) -> descriptor (machine's path) of what the VM runs on, in the configuration's order."""
        found = {}
        for name, value in self.pairs.values.items():
            if match := NODE.match(name):
                node = f"{match[1].lower()}{match[2]}:{match[3]}"
                if self.pairs.true(f"{node}.present") and value.lower().endswith(".vmdk"):
                    found[node] = self.disk_path(value)
        return found

    def mode(self, node: str) -> str:
        return self.pairs.get(f"{node}.mode") or "persistent"

    def snapshot_disks(self) -> dict[str, str]:
        """The disks that snapshots cover: not the independent ones, and no raw devices with a physical mapping."""
        covered = {}
        for node, path in self.disks().items():
            if self.mode(node).startswith("independent"):
                continue
            if Descriptor.read(path).extent_type not in ("VMFS", "VMFSSPARSE", "SESPARSE"):
                continue
            covered[node] = path
        return covered

    # --- power

    def open_disks(self) -> None:
        for node, path in self.disks().items():
            try:
                self.chains[node] = Chain.open(path)
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError) and "can not write" in str(error):
                    continue  # a raw device: the stand-in has none behind it
                self.close_disks()
                raise TaskError(
                    f"Cannot open the disk '{self.stores.host_path(path)}' or one of the snapshot disks it depends on. "
                ) from error

    def close_disks(self) -> None:
        for chain in self.chains.values():
            chain.close()
        self.chains.clear()

    def reopen_disks(self) -> None:
        if self.running:
            self.close_disks()
            self.open_disks()

    def side_files(self, *, running: bool) -> None:
        """Swap and lock files are there while the VM runs."""
        swap = f"{os.path.splitext(self.vmx)[0]}-{hashlib.sha256(self.vmx.encode()).hexdigest()[:8]}.vswp"
        for path in (swap, self.vmx + ".lck"):
            if running:
                with open(path, "wb") as file:
                    file.truncate(1 << 20 if path == swap else 0)
            elif os.path.exists(path):
                os.unlink(path)

    # --- locks

    def held_files(self) -> tuple[list[str], list[str]]:
        """(exclusive, read-only) files of a running VM, machine's paths."""
        if not self.running:
            return [], []
        exclusive = [self.vmx + ".lck"]
        exclusive += [path for path in _listed(self.folder) if path.endswith(".vswp")]
        read_only: list[str] = []
        for chain in self.chains.values():
            exclusive.append(chain.links[0].extent_path)
            below = [link.extent_path for link in chain.links[1:]]
            (exclusive if self.consolidating else read_only).extend(below)
        return exclusive, read_only

    # --- snapshots

    def snapshot(self, name: str, description: str, now: datetime, *, memory: bool = False) -> Snapshot:
        """The VM goes on on new redo logs. On error nothing is changed."""
        number = self.next_snapshot
        covered = self.snapshot_disks()
        made: list[str] = []
        try:
            fresh = {node: self._new_redo(path, made) for node, path in covered.items()}
        except BaseException:
            for path in made:
                if os.path.exists(path):
                    os.unlink(path)
            raise
        for node, path in fresh.items():
            self._set_disk(node, path)
        self.next_snapshot += 1
        made_one = Snapshot(
            number, name, description, now, self.power.lower(), covered, self.current, memory and self.running
        )
        stem = os.path.splitext(self.vmx)[0]
        with open(f"{stem}-Snapshot{number}.vmsn", "wb") as file:
            file.write(b"\xd2\xbe\xd2\xbe".ljust(28000, b"\0"))
        if made_one.memory:
            with open(f"{stem}-Snapshot{number}.vmem", "wb") as file:
                file.truncate(int(self.pairs.get("memSize", "1")) << 20)
        self.snapshots.append(made_one)
        self.write_files()
        self.reopen_disks()
        return made_one

    @property
    def current(self) -> int | None:
        """The snapshot that the VM's present state descends from. The tree is a line."""
        return self.snapshots[-1].number if self.snapshots else None

    def _new_redo(self, parent_path: str, made: list[str]) -> str:
        parent = Descriptor.read(parent_path)
        base = re.sub(r"-\d{6}$", "", os.path.splitext(os.path.basename(parent_path))[0])
        folder = os.path.dirname(parent_path)
        number = next(
            n for n in range(1, 1000) if not os.path.exists(os.path.join(folder, f"{base}-{n:06d}.vmdk"))
        )
        stem = f"{base}-{number:06d}"
        redo_type = self.stores.of(parent_path).redo_type
        if redo_type == "VMFSSPARSE" and self.stores.of(parent_path).kind != "NFS":
            redo_type = "SESPARSE" if parent.size_bytes >= SESPARSE_FROM_BYTES else redo_type
        if parent.extent_type != "VMFS":
            redo_type = parent.extent_type  # two formats never mix in a chain
        if redo_type == "SESPARSE":
            extent, create_type = f"{stem}-sesparse.vmdk", "seSparse"
        else:
            extent, create_type = f"{stem}-delta.vmdk", "vmfsSparse"
        path, extent_path = os.path.join(folder, f"{stem}.vmdk"), os.path.join(folder, extent)
        made += [path, extent_path]
        kind = SeSparse if redo_type == "SESPARSE" else Cowd
        kind.create(extent_path, parent.size_bytes, os.path.basename(parent_path))
        Descriptor(
            create_type,
            redo_type,
            extent,
            parent.sectors,
            f"{self.rng.getrandbits(32):08x}",
            parent.cid,
            os.path.basename(parent_path),
            (("ddb.longContentID", f"{self.rng.getrandbits(128):032x}"),),
        ).write(path)
        return path

    def _set_disk(self, node: str, path: str) -> None:
        old = self.pairs.get(f"{node}.fileName")
        name = os.path.basename(path)
        self.pairs.set(f"{node}.fileName", os.path.join(os.path.dirname(old), name) if "/" in old else name)

    def drop_from_tree(self, snapshot: Snapshot) -> None:
        """The tree no longer has it; the disks are as before."""
        for other in self.snapshots:
            if other.parent == snapshot.number:
                other.parent = snapshot.parent
        self.snapshots.remove(snapshot)
        stem = os.path.splitext(self.vmx)[0]
        for suffix in ("vmsn", "vmem"):
            path = f"{stem}-Snapshot{snapshot.number}.{suffix}"
            if os.path.exists(path):
                os.unlink(path)
        self.write_files()

    def merge_children(self, disks: dict[str, str]) -> None:
        """Redo logs that stand directly over these disks are merged into them and removed."""
        for node, disk in disks.items():
            current = self.disks().get(node)
            if current is None:
                continue
            line = [path for path, _ in descriptors(current)]
            if disk not in line or line.index(disk) == 0:
                continue
            above = line[line.index(disk) - 1]
            self._merge(node, above, disk, line[: line.index(above)])
        self.write_files()

    def _merge(self, node: str, above: str, disk: str, higher: list[str]) -> None:
        """`above` goes into `disk`; whatever named `above` names `disk` from now on."""
        self.close_disks()
        chain = Chain.open(above)
        try:
            chain.merge_top()
        finally:
            chain.close()
        gone = Descriptor.read(above)
        kept = Descriptor.read(disk)
        if higher:
            child = Descriptor.read(higher[-1])
            _replace(child, higher[-1], parent=os.path.basename(disk), parent_cid=kept.cid)
        else:
            self._set_disk(node, disk)
        for snapshot in self.snapshots:
            if snapshot.disks.get(node) == above:
                snapshot.disks[node] = disk
        self.pairs.write(self.vmx)
        os.unlink(above)
        os.unlink(os.path.join(os.path.dirname(above), gone.extent))
        self.reopen_disks()

    def consolidate_all(self) -> None:
        """Every redo log that no snapshot needs is merged downwards."""
        needed = {path for snapshot in self.snapshots for path in snapshot.disks.values()}
        for node, current in list(self.disks().items()):
            if Descriptor.read(current).extent_type not in ("VMFS", "VMFSSPARSE", "SESPARSE"):
                continue
            while True:
                line = [path for path, _ in descriptors(self.disks()[node])]
                loose = [n for n in range(1, len(line)) if line[n] not in needed]
                if not loose:
                    break
                # an intermediate disk that nobody needs takes what stands over it
                position = loose[0]
                self._merge(node, line[position - 1], line[position], line[: position - 1])
        self.write_files()

    def write_files(self) -> None:
        """The .vmx and the .vmsd say what is now."""
        self.pairs.write(self.vmx)
        stem = os.path.splitext(self.vmx)[0]
        lines = Pairs({".encoding": "UTF-8", "snapshot.lastUID": str(self.next_snapshot - 1)})
        if self.snapshots:
            lines.set("snapshot.current", str(self.current))
        for position, snapshot in enumerate(self.snapshots):
            own = f"snapshot{position}"
            lines.set(f"{own}.uid", str(snapshot.number))
            lines.set(f"{own}.filename", f"{os.path.basename(stem)}-Snapshot{snapshot.number}.vmsn")
            if snapshot.parent is not None:
                lines.set(f"{own}.parent", str(snapshot.parent))
            lines.set(f"{own}.displayName", snapshot.name)
            lines.set(f"{own}.description", snapshot.description)
            microseconds = int(snapshot.created.timestamp() * 1_000_000)
            lines.set(f"{own}.createTimeHigh", str(microseconds >> 32))
            lines.set(f"{own}.createTimeLow", str(microseconds & 0xFFFFFFFF))
            lines.set(f"{own}.numDisks", str(len(snapshot.disks)))
            for number, (node, path) in enumerate(snapshot.disks.items()):
                same = os.path.dirname(path) == self.folder
                lines.set(
                    f"{own}.disk{number}.fileName",
                    os.path.basename(path) if same else self.stores.host_path(path),
                )
                lines.set(f"{own}.disk{number}.node", node)
        lines.set("snapshot.numSnapshots", str(len(self.snapshots)))
        lines.write(f"{stem}.vmsd")
        self.note_sizes()

    def note_sizes(self) -> None:
        self.layout_sizes = {path: os.path.getsize(path) for path in self.files()}

    def files(self) -> list[str]:
        """The files of the VM: its folder's, and those of its disks elsewhere."""
        found = _listed(self.folder)
        for disk in self.disks().values():
            try:
                for path, descriptor in descriptors(disk):
                    found += [path, os.path.join(os.path.dirname(path), descriptor.extent)]
            except (OSError, ValueError):
                continue
        return [path for path in dict.fromkeys(found) if os.path.isfile(path)]


def _listed(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []  # an entry of the inventory whose files are gone
    return sorted(entry.path for entry in os.scandir(folder) if entry.is_file())


def _replace(descriptor: Descriptor, path: str, *, parent: str, parent_cid: str) -> None:
    Descriptor(
        descriptor.create_type,
        descriptor.extent_type,
        descriptor.extent,
        descriptor.sectors,
        descriptor.cid,
        parent_cid,
        parent,
        descriptor.extras,
    ).write(path)
