"""What a key that is limited to the agent may touch: paths, names, descriptors, and what a .vmx may speak of."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.esxi.agent.gate import LEVELS, MARKER, Gate
from holdfast.esxi.agent.naming import Refused
from holdfast.esxi.agent.ownvmx import require_own_files

DESCRIPTOR = b'# Disk DescriptorFile\nRW 2048 VMFS "vm-flat.vmdk"\nddb.adapterType = "lsilogic"\n'
UUID = b'ddb.uuid = "60 00 C2 94 7b 3f 53 be-cb 4b ee 5e 3d 92 72 2e"\n'
VMX = b'.encoding = "UTF-8"\nscsi0:0.fileName = "vm.vmdk"\nannotation = "see /etc/motd"\n'


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """A host's datastores: one with VMs, one of the host's own, and links that lead out."""
    root = tmp_path / "vmfs" / "volumes"
    web, boot = root / "5a" / "web1", root / "b0"
    for folder in (web, root / "5a" / "notes", root / "5a" / "new", boot / "x", tmp_path / "etc"):
        folder.mkdir(parents=True)
    (root / "datastore1").symlink_to("5a")
    (root / "BOOTBANK1").symlink_to("b0")
    for path in (web / "web1.vmx", web / "web1.nvram", web / "web1.vmdk", web / "web1-flat.vmdk", boot / "x/x.vmx",
                 boot / "state.tgz", root / "5a/notes/secret.txt", root / "5a/notes/lone.vmdk", tmp_path / "etc/shadow"):  # fmt: skip
        path.write_bytes(b"something")
    (web / "out.vmdk").symlink_to(tmp_path / "etc/shadow")
    (web / "own.vmdk").symlink_to(boot / "state.tgz")
    (root / "5a" / "away").symlink_to(tmp_path / "etc")
    (root / "5a" / "new" / MARKER).write_bytes(b"not complete")
    (root / "5a" / "new" / "vm.vmdk").write_bytes(DESCRIPTOR)
    (root / "5a" / "new" / "vm-flat.vmdk").write_bytes(bytes(512))
    (root / "5a" / "new" / "vm.vmx").write_bytes(VMX)
    return root


def gate(volumes: Path, level: str = "restore") -> Gate:
    return Gate(level, str(volumes))


# Reading


def test_files_of_vms_and_disks_are_readable(volumes: Path) -> None:
    for name in (
        "web1/web1.vmx",
        "web1/web1.nvram",
        "web1/web1-flat.vmdk",
        "notes/lone.vmdk",
        f"new/{MARKER}",
    ):
        for datastore in ("5a", "datastore1"):
            for level in LEVELS:
                assert (
                    gate(volumes, level).readable(f"{volumes}/{datastore}/{name}") == f"{volumes}/5a/{name}"
                )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow", "../../etc/shadow", "5a/../b0/state.tgz", "5a/web1/../../../../etc/shadow", "5a/web1/./web1.vmx",
        "5a//web1/web1.vmx", "5a/web1/web1.vmx/", "5a/web1/web1.vmx\0", "5a/web1/web1.vmx\n", "5a/web1/out.vmdk",
        "5a/web1/own.vmdk", "5a/away/shadow", "BOOTBANK1/state.tgz", "b0/state.tgz", "b0/x/x.vmx", "5a/notes/secret.txt",
        "", "5a", "datastore1", f"5a/{'x' * 4097}.vmdk",
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_else_is_readable(volumes: Path, level: str, path: str) -> None:
    whole = path if path.startswith("/") else f"{volumes}/{path}"
    with pytest.raises(Refused):
        gate(volumes, level).readable(whole)


PARTS = ("5a", "datastore1", "BOOTBANK1", "b0", "web1", "away", "notes", "new", "etc", "..", ".", "", "out.vmdk", "own.vmdk",
         "web1.vmx", "web1-flat.vmdk", "vm.vmx", "vm-flat.vmdk", "secret.txt", "shadow", "state.tgz", "x.vmx", MARKER)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=6), level=st.sampled_from(LEVELS))
def test_whatever_the_path_nothing_of_the_host_is_reached(
    volumes: Path, parts: list[str], level: str
) -> None:
    path = "/".join([str(volumes), *parts])
    ours = gate(volumes, level)
    with contextlib.suppress(OSError):
        real = Path(ours.readable(path))
        assert real == Path(os.path.realpath(path))
        assert real.parent in {volumes / "5a" / name for name in ("web1", "notes", "new")}
        assert real.name not in ("secret.txt", "shadow", "state.tgz")
    with contextlib.suppress(OSError):
        real = Path(ours.writable(path))
        assert level != "backup"
        assert real.parent == volumes / "5a/new" or level == "in-place"
        assert real.name.endswith("-flat.vmdk")
        assert real.is_relative_to(volumes)
        assert not real.is_relative_to(volumes / "b0")
    for change in (lambda: ours.put(path, 0, b"x"), lambda: ours.disk(path)):
        with contextlib.suppress(OSError):
            assert Path(change()).parent == volumes / "5a" / "new"
            assert level != "backup"


@pytest.mark.parametrize("path", [None, 7, ["/vmfs/volumes/5a/web1/web1.vmx"], b"/vmfs/volumes/x"])
def test_what_is_no_path_is_refused(volumes: Path, path: object) -> None:
    for ask in (gate(volumes).readable, gate(volumes).listable, gate(volumes).writable, gate(volumes).place):
        with pytest.raises(Refused):
            ask(path)


def test_what_is_not_there_is_not_refused_but_missing(volumes: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gate(volumes).readable(f"{volumes}/5a/gone/gone.vmx")
    with pytest.raises(FileNotFoundError):
        gate(volumes).listable(f"{volumes}/5a/gone")


def test_only_folders_of_vms_are_listed(volumes: Path) -> None:
    for name in ("web1", "notes", "new"):  # in `notes` there is a disk
        assert gate(volumes, "backup").listable(f"{volumes}/5a/{name}") == f"{volumes}/5a/{name}"
    for name in ("", "5a", "5a/away", "b0", "b0/x", "BOOTBANK1"):
        with pytest.raises(Refused):
            gate(volumes).listable(f"{volumes}/{name}")


# Writing


def test_a_key_for_backups_writes_nothing(volumes: Path) -> None:
    ours, new = gate(volumes, "backup"), f"{volumes}/5a/new"
    for ask in (
        lambda: ours.writable(f"{new}/vm-flat.vmdk"), lambda: ours.new_folder(f"{volumes}/5a/more"),
        lambda: ours.disk(f"{new}/vm.vmdk"), lambda: ours.put(f"{new}/vm.vmx", 0, VMX), lambda: ours.complete(new),
        lambda: ours.registrable(f"{new}/vm.vmx"), lambda: ours.still(f"{new}/vm.vmx"),
    ):  # fmt: skip
        with pytest.raises(Refused, match="level"):
            ask()


def test_flat_files_are_written_in_marked_folders_only_or_in_place(volumes: Path) -> None:
    new, old = f"{volumes}/datastore1/new/vm-flat.vmdk", f"{volumes}/datastore1/web1/web1-flat.vmdk"
    assert gate(volumes, "restore").writable(new) == f"{volumes}/5a/new/vm-flat.vmdk"
    assert gate(volumes, "in-place").writable(new) == f"{volumes}/5a/new/vm-flat.vmdk"
    assert gate(volumes, "in-place").writable(old) == f"{volumes}/5a/web1/web1-flat.vmdk"
    with pytest.raises(Refused, match=MARKER):
        gate(volumes, "restore").writable(old)


@pytest.mark.parametrize(
    "name",
    ["web1/web1.vmx", "web1/web1.vmdk", "web1/out.vmdk", "web1/own.vmdk", f"new/{MARKER}", "new/vm.vmdk"],
)
def test_in_place_is_about_flat_files_only(volumes: Path, name: str) -> None:
    with pytest.raises(Refused):
        gate(volumes, "in-place").writable(f"{volumes}/5a/{name}")


def test_folders_are_made_on_top_of_a_datastore(volumes: Path) -> None:
    assert gate(volumes).new_folder(f"{volumes}/datastore1/web1 (2)") == f"{volumes}/5a/web1 (2)"
    for name in (
        "more",
        "b0/more",
        "5a/web1/more",
        "5a/-more",
        "5a/.more",
        "5a/[x]",
        "5a/a\nb",
        "5a/" + "x" * 201,
    ):
        with pytest.raises(Refused):
            gate(volumes).new_folder(f"{volumes}/{name}")


@pytest.mark.parametrize(
    "name",
    [MARKER, "vm.vmsd", "vm.vmsn", "vm.vmss", "vm.vswp", "vm.VMSD", "vm-flat.vmdk", "vm-000001-delta.vmdk", "other.vmdk",
     "-x.vmx", ".vmx", "a\nb.vmx", "sub/vm.vmx", "x" * 201],
)  # fmt: skip
def test_these_names_are_never_written(volumes: Path, name: str) -> None:
    with pytest.raises(Refused):
        gate(volumes).put(f"{volumes}/5a/new/{name}", 0, b"anything")


def test_small_files_are_written_where_the_marker_is(volumes: Path) -> None:
    ours = gate(volumes)
    assert ours.put(f"{volumes}/5a/new/vm.nvram", 0, b"x") == f"{volumes}/5a/new/vm.nvram"
    for name, offset in (("web1/web1.vmx", 0), ("notes/a.txt", 0), ("new/vm.nvram", 128 << 20)):
        with pytest.raises(Refused):
            ours.put(f"{volumes}/5a/{name}", offset, b"x")
    os.symlink("/etc/passwd", volumes / "5a/new/link.txt")
    os.mkfifo(volumes / "5a/new/pipe.txt")
    for name in ("link.txt", "pipe.txt"):
        with pytest.raises(Refused):
            ours.put(f"{volumes}/5a/new/{name}", 0, b"x")


def test_of_a_descriptor_only_the_uuid_changes(volumes: Path) -> None:
    ours, path = gate(volumes), f"{volumes}/5a/new/vm.vmdk"
    for same in (DESCRIPTOR, DESCRIPTOR + UUID, UUID + DESCRIPTOR):
        ours.put(path, 0, same)
    elsewhere = b'RW 2048 VMFS "/vmfs/volumes/5a/web1/web1-flat.vmdk"\n'
    for other in (
        b"", DESCRIPTOR + elsewhere, DESCRIPTOR.replace(b"vm-flat", b"../web1/web1-flat"), DESCRIPTOR + UUID + UUID,
        DESCRIPTOR + b'ddb.uuid = "x"\n', DESCRIPTOR + b"ddb.uuid\r" + elsewhere, DESCRIPTOR + b"\n" * (1 << 17),
    ):  # fmt: skip
        with pytest.raises(Refused, match="UUID"):
            ours.put(path, 0, other)
    with pytest.raises(Refused):
        ours.put(path, 4, DESCRIPTOR[4:])


def test_disks_are_made_where_the_marker_is(volumes: Path) -> None:
    ours = gate(volumes)
    assert ours.disk(f"{volumes}/datastore1/new/more.vmdk") == f"{volumes}/5a/new/more.vmdk"
    for name in (
        "web1/web1.vmdk",
        "new/x.vmx",
        "new/-x.vmdk",
        "new/x-flat.vmdk",
        "new/../web1/web1.vmdk",
        "more.vmdk",
    ):
        with pytest.raises(Refused):
            ours.disk(f"{volumes}/5a/{name}")


def test_a_marker_is_a_file(volumes: Path) -> None:
    (volumes / "5a" / "web1" / MARKER).symlink_to(volumes / "5a" / "new" / MARKER)
    with pytest.raises(Refused, match=MARKER):
        gate(volumes).writable(f"{volumes}/5a/web1/web1-flat.vmdk")


# Registering


def completed(volumes: Path, ours: Gate) -> str:
    ours.complete(f"{volumes}/5a/new")
    (volumes / "5a" / "new" / MARKER).unlink()
    return f"{volumes}/5a/new/vm.vmx"


def test_what_was_restored_over_this_connection_is_registered(volumes: Path) -> None:
    ours = gate(volumes)
    with pytest.raises(Refused, match="restored over this connection"):
        ours.registrable(f"{volumes}/5a/web1/web1.vmx")
    with pytest.raises(Refused, match="restored over this connection"):
        ours.registrable(f"{volumes}/5a/new/vm.vmx")
    ours.registrable(completed(volumes, ours))
    with pytest.raises(Refused, match="restored over this connection"):
        gate(volumes).registrable(f"{volumes}/5a/new/vm.vmx")


def test_a_file_that_another_agent_has_open_is_not_what_is_registered(volumes: Path) -> None:
    ours, theirs = gate(volumes), gate(volumes)
    path = theirs.put(f"{volumes}/5a/new/vm.vmx", 0, b"evil")
    with open(path, "r+b") as opened:
        theirs.still(path)
        ours.registrable(completed(volumes, ours))
        opened.write(b'scsi0:0.fileName = "/vmfs/volumes/5a/web1/web1.vmdk"')
    assert Path(path).read_bytes() == VMX
    assert sorted(os.listdir(volumes / "5a" / "new")) == ["vm-flat.vmdk", "vm.vmdk", "vm.vmx"]
    with pytest.raises(Refused, match=MARKER):
        theirs.still(path)


def image(path: str) -> bool:
    return path == "/vmfs/volumes/5a/iso/debian.iso"


@pytest.mark.parametrize(
    "line",
    [
        'ide0:0.fileName = "/vmfs/volumes/5a/iso/debian.iso"\nide0:0.deviceType = "cdrom-image"',
        'sata0:0.fileName = "debian.iso"\nsata0:0.deviceType = "cdrom-image"',
        'ide1:0.fileName = "auto detect"\nide1:0.deviceType = "atapi-cdrom"',
        'ide1:0.fileName = "/vmfs/devices/cdrom/mpx.vmhba32:C0:T0:L0"\nide1:0.deviceType = "atapi-cdrom"',
        'displayName = "/vmfs/../x"', 'guestinfo.path = "/etc"', 'scsi0:0.redo = ""', 'pciPassthru0.present = "FALSE"',
        "# a remark", "", 'nvram = "vm.nvram"',
    ],
)  # fmt: skip
def test_a_vmx_of_the_vms_own_passes(line: str) -> None:
    require_own_files(VMX + line.encode(), "/x", image)


@pytest.mark.parametrize(
    "line",
    [
        'scsi0:1.fileName = "/vmfs/volumes/5a/web1/web1.vmdk"', 'scsi0:1.fileName = "../web1/web1.vmdk"',
        'scsi0:1.fileName = "[datastore1] web1/web1.vmdk"', 'scsi0:1.fileName = "disk.txt"',
        'scsi0:1.fileName = "|2Fvmfs|2Fvolumes|2Fx.vmdk"', 'SCSI0:1.FILENAME = "/vmfs/x.vmdk"',
        'scsi0:1.fileName = "vm-flat.vmdk"', 'nvdimm0:0.fileName = "made-up.txt"', 'scsi0:1.redo = "made-up.txt"',
        'ide0:0.fileName = "/vmfs/volumes/5a/web1/web1-flat.vmdk"\nide0:0.deviceType = "cdrom-image"',
        'ide0:0.fileName = "/etc/shadow"\nide0:0.deviceType = "cdrom-image"',
        'ide0:0.fileName = "/vmfs/devices/disks/naa.1"\nide0:0.deviceType = "cdrom-raw"',
        'ide0:0.fileName = "/vmfs/devices/cdrom/../disks/naa.1"\nide0:0.deviceType = "cdrom-raw"',
        'serial0.fileName = "/etc/ssh/keys-root/authorized_keys"', 'workingDir = "/vmfs/volumes/5a/web1"',
        'sched.swap.dir = "/tmp"', 'extendedConfigFile = "../web1/web1.vmx"', 'pciPassthru0.id = "00000:003:00.0"',
        'checkpoint.vmState = "made-up.txt"', 'usb.autoConnect.device0 = "vid:0781"', '.encoding = "UTF-7"', 'vmci0.unrestricted = "TRUE"',
        'nvram = "a"\nNVRAM = "b"', "no line of a vmx", 'nvram = "a" x', 'a b = "c"', 'nvram = "a"b"',
    ],
)  # fmt: skip
def test_a_vmx_that_speaks_of_what_is_not_the_vms_is_refused(line: str) -> None:
    start = VMX.replace(b'.encoding = "UTF-8"\n', b"") if line.startswith(".enc") else VMX
    with pytest.raises(Refused):
        require_own_files(start + line.encode(), "/x", image)


def test_only_images_are_put_into_cd_drives(volumes: Path) -> None:
    (volumes / "5a" / "iso").mkdir()
    (volumes / "5a" / "iso" / "a.iso").touch()
    (volumes / "5a" / "iso" / "b.iso").symlink_to(volumes.parent.parent / "etc" / "shadow")
    drive = 'ide0:0.deviceType = "cdrom-image"\nide0:0.fileName = "{}"\n'
    for name, accepted in (
        ("datastore1/iso/a.iso", True),
        ("5a/iso/b.iso", False),
        ("5a/web1/web1.vmx", False),
    ):
        ours, new = gate(volumes), volumes / "5a" / f"vm-{len(name)}"
        new.mkdir()
        (new / MARKER).touch()
        (new / "vm.vmx").write_text(drive.format(volumes / name))
        ours.complete(str(new))
        (new / MARKER).unlink()
        if accepted:
            ours.registrable(f"{new}/vm.vmx")
        else:
            with pytest.raises(Refused, match="not its own"):
                ours.registrable(f"{new}/vm.vmx")
