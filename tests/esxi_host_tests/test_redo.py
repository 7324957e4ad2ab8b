"""The redo logs that the stand-in writes, read back by qemu-img, which knows nothing of this code."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

MIB = 1 << 20


def qemu_img(*arguments: str | os.PathLike[str]) -> str:
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Model:
    """A disk as bytes beside the chain, changed by the same writes."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.data = bytearray(size)
        self.rng = rng

    def change(self, chain, times: int) -> None:
        sectors = len(self.data) // 512
        for _ in range(times):
            count = min(sectors, self.rng.choice([1, 1, 3, 8, 16, 64, 200]))
            start = self.rng.choice([0, sectors - count, self.rng.randrange(sectors - count + 1)])
            place = start * 512
            if self.rng.random() < 0.15:
                chain.discard(place, count * 512)
                self.data[place : place + count * 512] = bytes(count * 512)
            else:
                data = self.rng.randbytes(count * 512)
                chain.write(place, data)
                self.data[place : place + len(data)] = data


def make_vm(folder: Path, kind: str, size: int):
    from tests.esxi_host.datastores import Datastores
    from tests.esxi_host.vmfiles import Descriptor, Pairs, base_extras
    from tests.esxi_host.vms import Vm

    rng = random.Random(3)
    stores = Datastores(str(folder), rng)
    store = stores.add("ds", kind, 1 << 40)
    place = Path(store.real) / "vm"
    place.mkdir()
    with (place / "vm-flat.vmdk").open("wb") as file:
        file.truncate(size)
    extras = base_extras(size, rng, thin=True, hardware="14")
    Descriptor("vmfs", "VMFS", "vm-flat.vmdk", size // 512, "7475b330", extras=extras).write(
        str(place / "vm.vmdk")
    )
    Pairs({"displayName": "vm", "scsi0:0.fileName": "vm.vmdk", "scsi0:0.present": "TRUE"}).write(
        str(place / "vm.vmx")
    )
    vm = Vm(1, str(place / "vm.vmx"), stores, rng)
    vm.load()
    vm.power = "Powered on"
    vm.open_disks()
    return vm


# more than one table each: a table is for 2 MiB in COWD and for 16 MiB in SESparse
@pytest.mark.parametrize(
    ("kind", "size"),
    [("VMFS-5", 3 * MIB), ("NFS", 2 * MIB + 512 * 5), ("VMFS-6", 20 * MIB), ("VMFS-6", 17 * MIB + 512 * 5)],
)
def test_what_is_written_through_redo_logs_is_what_qemu_img_reads(
    tmp_path: Path, kind: str, size: int
) -> None:
    from tests.esxi_host.tasks import host_clock

    seed = int(os.environ.get("HOLDFAST_TEST_SEED", "0")) or random.randrange(1 << 30)
    print("seed", seed)
    model = Model(size, random.Random(seed))
    vm = make_vm(tmp_path, kind, size)
    node = "scsi0:0"
    truths = []
    for number in range(4):
        model.change(vm.chains[node], 60)
        truths.append(bytes(model.data))
        vm.snapshot(f"s{number}", "", host_clock(0))
    model.change(vm.chains[node], 60)

    def equal(descriptor: str, truth: bytes) -> None:
        (tmp_path / "truth.raw").write_bytes(truth)
        qemu_img("compare", "-f", "raw", "-F", "vmdk", tmp_path / "truth.raw", descriptor)

    for snapshot, truth in zip(vm.snapshots, truths, strict=True):
        equal(snapshot.disks[node], truth)
    equal(vm.disks()[node], bytes(model.data))

    for number in (1, 3, 0, 2):  # one from the middle, the newest, the oldest, the last that is left
        snapshot = next(one for one in vm.snapshots if one.name == f"s{number}")
        disks = dict(snapshot.disks)
        vm.drop_from_tree(snapshot)
        vm.merge_children(disks)
        model.change(vm.chains[node], 20)
        equal(vm.disks()[node], bytes(model.data))
        for left in vm.snapshots:
            equal(left.disks[node], truths[int(left.name[1:])])
    vm.close_disks()
    names = sorted(os.listdir(vm.folder))
    assert names == ["vm-flat.vmdk", "vm.vmdk", "vm.vmsd", "vm.vmx"]
    assert os.path.getsize(os.path.join(vm.folder, "vm-flat.vmdk")) == size


def test_redo_logs_outlive_being_opened_again(tmp_path: Path) -> None:
    from tests.esxi_host.tasks import host_clock

    for kind in ("VMFS-5", "VMFS-6"):
        (tmp_path / kind).mkdir()
        vm = make_vm(tmp_path / kind, kind, 20 * MIB)
        model = Model(20 * MIB, random.Random(5))
        vm.snapshot("s", "", host_clock(0))
        for _ in range(4):
            model.change(vm.chains["scsi0:0"], 30)
            vm.reopen_disks()
        assert vm.chains["scsi0:0"].read(0, 20 * MIB) == bytes(model.data)
        vm.close_disks()


def test_formats_follow_the_datastore_and_never_mix(tmp_path: Path) -> None:
    from tests.esxi_host.tasks import host_clock

    for kind, suffix in (("VMFS-5", "delta"), ("VMFS-6", "sesparse"), ("NFS", "delta")):
        (tmp_path / kind).mkdir()
        vm = make_vm(tmp_path / kind, kind, 4 * MIB)
        vm.snapshot("s", "", host_clock(0))
        assert os.path.exists(os.path.join(vm.folder, f"vm-000001-{suffix}.vmdk"))
        vm.close_disks()


def test_large_disks_on_vmfs5_have_sesparse_redo_logs(tmp_path: Path) -> None:
    from tests.esxi_host.tasks import host_clock

    vm = make_vm(tmp_path, "VMFS-5", 2 << 40)
    vm.snapshot("s", "", host_clock(0))
    assert os.path.exists(os.path.join(vm.folder, "vm-000001-sesparse.vmdk"))
    vm.close_disks()
