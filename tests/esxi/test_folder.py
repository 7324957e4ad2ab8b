from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.disk import Machine
from holdfast.errors import EmptySource, SourceFormat, SourceNotFound, SourceUnreadable, SourceUnsupported
from holdfast.esxi.folder import open_machine

SECTOR = 512


@pytest.fixture
def opened():
    """Opens machines and closes them after the test."""
    machines: list[Machine] = []

    def run(source: Path | str, **more: str) -> Machine:
        machines.append(open_machine(str(source), **more))
        return machines[-1]

    yield run
    for machine in machines:
        machine.close()
        machine.close()


def file_names(machine: Machine) -> list[str]:
    return [file.info.name for file in machine.files]


def disk_names(machine: Machine) -> list[str]:
    return [disk.info.name for disk in machine.disks]


def add_disk(folder: Path, name: str, text: Callable[..., str], sectors: int = 8) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text(f"{path.stem}-flat.vmdk", sectors))
    (path.parent / f"{path.stem}-flat.vmdk").write_bytes(b"d" * (sectors * SECTOR))


def attach(folder: Path, label: str, file_name: str) -> None:
    with (folder / "web1.vmx").open("a") as file:
        file.write(f'{label}.present = "TRUE"\n{label}.fileName = "{file_name}"\n')


@pytest.mark.parametrize("source", ["", "web1.vmx"])
def test_a_vm(source: str, flat_vm: Path, opened, content) -> None:
    machine = opened(flat_vm / source)
    assert (machine.kind, machine.name, machine.uuid) == ("vm", "Web One", "564d890e6865d486227880af6016e0e0")
    assert machine.warnings == ()
    assert file_names(machine) == ["vmware.log", "web1.nvram", "web1.vmx"]
    (disk,) = machine.disks
    info = disk.info
    assert (info.name, info.flat_name, info.label) == ("web1.vmdk", "web1-flat.vmdk", "scsi0:0")
    assert (info.format, info.create_type, info.size_bytes) == ("vmdk", "vmfs", 128 * SECTOR)
    assert content.of(disk.source) == (flat_vm / "web1-flat.vmdk").read_bytes()
    for file in machine.files:
        assert content.of(file.source) == (flat_vm / file.info.name).read_bytes()
        assert file.info.size_bytes == file.source.size_bytes


def test_names_can_be_given_and_have_defaults(flat_vm: Path, opened) -> None:
    assert opened(flat_vm, name="other").name == "other"
    (flat_vm / "web1.vmx").write_text('config.version = "8"\n')
    assert opened(flat_vm).name == "web1"
    (flat_vm / "web1.vmx").unlink()
    machine = opened(flat_vm)
    assert (machine.name, machine.uuid, machine.kind) == (flat_vm.name, "", "vm")
    assert disk_names(machine) == ["web1.vmdk"]


def test_several_disks_and_nested_folders(flat_vm: Path, opened, vmfs_text) -> None:
    add_disk(flat_vm, "web1_1.vmdk", vmfs_text)
    add_disk(flat_vm, "data/more.vmdk", vmfs_text)
    attach(flat_vm, "nvme0:3", "./data/more.vmdk")
    for path in ("empty/inner", "logs/old", "locked.lck"):
        (flat_vm / path).mkdir(parents=True)
    (flat_vm / "logs/old/a.log").write_text("a")
    (flat_vm / "locked.lck/M1.lck").write_text("x")
    machine = opened(flat_vm)
    assert [(disk.info.name, disk.info.label, disk.info.flat_name) for disk in machine.disks] == [
        ("data/more.vmdk", "nvme0:3", "data/more-flat.vmdk"),
        ("web1.vmdk", "scsi0:0", "web1-flat.vmdk"),
        ("web1_1.vmdk", "", "web1_1-flat.vmdk"),
    ]
    assert file_names(machine) == ["logs/old/a.log", "vmware.log", "web1.nvram", "web1.vmx"]
    assert machine.folders == ("empty", "empty/inner")
    assert machine.warnings == ()


def test_what_is_left_out_on_purpose(flat_vm: Path, opened) -> None:
    for name in ("web1-1234.vswp", "web1.vmx.lck", ".lck-0a0b", "web1-ctk.vmdk", "web1-CTK.VMDK", "x.scoreboard",
                 ".web1.nvram.holdfast-partial-00ff"):  # fmt: skip
        (flat_vm / name).write_bytes(b"x" * 600)
    machine = opened(flat_vm)
    assert file_names(machine) == ["vmware.log", "web1.nvram", "web1.vmx"]
    assert machine.warnings == ()


def test_oddities_are_left_out_with_a_warning(flat_vm: Path, opened) -> None:
    (flat_vm / "link.log").symlink_to("/etc/passwd")
    (flat_vm / "away").symlink_to("/")
    os.mkfifo(flat_vm / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(flat_vm / "socket"))
        machine = opened(flat_vm)
    with open(os.fsencode(flat_vm) + b"/na\xffme.log", "wb"):
        pass
    assert file_names(machine) == ["vmware.log", "web1.nvram", "web1.vmx"]
    assert [warning.split(" was left out")[0] for warning in machine.warnings] == [
        "away",
        "link.log",
        "pipe",
        "socket",
    ]
    machine = opened(flat_vm)
    assert len(machine.warnings) == 5
    assert "not valid Unicode" in "".join(machine.warnings)
    for warning in machine.warnings:
        warning.encode()


def test_a_disk_whose_name_is_not_utf8_is_refused(flat_vm: Path) -> None:
    os.rename(flat_vm / "web1.vmdk", os.fsencode(flat_vm) + b"/web\xff.vmdk")
    with pytest.raises(SourceUnsupported, match=r"web\\udcff\.vmdk.*Unicode"):
        open_machine(str(flat_vm))


def test_names_with_quotes_newlines_and_unicode(tmp_path: Path, opened, vmfs_text) -> None:
    folder = tmp_path / "böse\nVM"
    folder.mkdir()
    (folder / "a\nb.log").write_text("x")
    add_disk(folder, "größe.vmdk", vmfs_text)
    machine = opened(folder)
    assert file_names(machine) == ["a\nb.log"]
    assert machine.disks[0].info.flat_name == "größe-flat.vmdk"
    assert "\n" not in machine.origin


@pytest.mark.parametrize(
    ("file_name", "words"),
    [
        ("absent.vmdk", "'absent.vmdk', attached as scsi0:1, is missing"),
        ("/vmfs/volumes/ds2/web1/web1_1.vmdk", "attached as scsi0:1, lies outside"),
        ("../other/other.vmdk", "lies outside"),
        ("web1.nvram", "is no VMDK"),
        ("web1-flat.vmdk", "is no VMDK"),
        ("web1-ctk.vmdk", "is missing"),
    ],
)
def test_an_attached_disk_that_is_not_there_fails_the_backup(
    file_name: str, words: str, flat_vm: Path
) -> None:
    attach(flat_vm, "scsi0:1", file_name)
    with pytest.raises(SourceFormat, match=words) as caught:
        open_machine(str(flat_vm))
    assert file_name in str(caught.value)


def test_absolute_names_that_lead_into_the_folder_are_understood(flat_vm: Path, opened) -> None:
    text = (flat_vm / "web1.vmx").read_text()
    (flat_vm / "web1.vmx").write_text(text.replace('"web1.vmdk"', f'"{flat_vm}/web1.vmdk"'))
    assert opened(flat_vm).disks[0].info.label == "scsi0:0"


def test_an_attached_delta_disk_that_can_not_be_read_fails_the_backup(flat_vm: Path, vmfs_text) -> None:
    delta = vmfs_text("web1-000001-delta.vmdk", 128, parentFileNameHint="web1.vmdk")
    delta = delta.replace("parentCID=ffffffff", "parentCID=7475b330").replace(" VMFS ", " VMFSSPARSE ")
    (flat_vm / "web1-000001.vmdk").write_text(delta)
    (flat_vm / "web1-000001-delta.vmdk").write_bytes(b"COWD" + bytes(4000))
    vmx = (flat_vm / "web1.vmx").read_text()
    (flat_vm / "web1.vmx").write_text(vmx.replace("web1.vmdk", "web1-000001.vmdk"))
    with pytest.raises(SourceUnsupported, match=r"web1-000001-delta\.vmdk.*version 0"):
        open_machine(str(flat_vm))


def test_an_unreadable_disk_that_is_not_attached_is_kept_as_files(flat_vm: Path, opened, vmfs_text) -> None:
    add_disk(flat_vm, "old.vmdk", vmfs_text)
    os.truncate(flat_vm / "old-flat.vmdk", 100)
    (flat_vm / "lost-delta.vmdk").write_bytes(b"COWD" + bytes(4000))
    machine = opened(flat_vm)
    assert disk_names(machine) == ["web1.vmdk"]
    assert {"old.vmdk", "old-flat.vmdk", "lost-delta.vmdk"} < set(file_names(machine))
    assert len(machine.warnings) == 2
    assert "lost-delta.vmdk belongs to no disk" in machine.warnings[0]
    assert "'old-flat.vmdk' is too short" in machine.warnings[1]


@pytest.mark.parametrize("vmx", [None, 'displayName = "x"\n'])
def test_without_a_list_of_attached_disks_all_must_be_readable(vmx: str | None, flat_vm: Path) -> None:
    (flat_vm / "web1.vmx").unlink()
    if vmx:
        (flat_vm / "web1.vmx").write_text(vmx)
    os.truncate(flat_vm / "web1-flat.vmdk", 100)
    with pytest.raises(SourceFormat, match=r"'web1-flat\.vmdk' is too short"):
        open_machine(str(flat_vm))


def test_a_folder_of_files_alone(tmp_path: Path, opened) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "b").write_text("b")
    (folder / "a").write_text("a")
    machine = opened(folder)
    assert (machine.kind, machine.name, machine.disks) == ("vm", "f", ())
    assert file_names(machine) == ["a", "b"]


def test_several_vmx_files_need_a_choice(flat_vm: Path, opened) -> None:
    (flat_vm / "web2.vmx").write_text('displayName = "Two"\n')
    with pytest.raises(SourceFormat, match=r"2 VMs: web1\.vmx, web2\.vmx") as caught:
        open_machine(str(flat_vm))
    assert ".vmx" in caught.value.hint
    assert opened(flat_vm / "web2.vmx").name == "Two"
    with pytest.raises(SourceFormat, match=r"holds no \.vmx itself, but web1/web1\.vmx"):
        open_machine(str(flat_vm.parent))


def test_split_and_sparse_disks_in_a_folder(tmp_path: Path, opened, qemu_img, scatter, content) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    raw = tmp_path / "disk.raw"
    scatter(raw, 1 << 20)
    for name, subformat in (("mon", "monolithicSparse"), ("two", "twoGbMaxExtentSparse"),
                            ("fla", "twoGbMaxExtentFlat"), ("str", "streamOptimized")):  # fmt: skip
        qemu_img("convert", "-O", "vmdk", "-o", f"subformat={subformat}", raw, folder / f"{name}.vmdk")
    (folder / "mon-flat.vmdk").write_bytes(b"left over")
    machine = opened(folder)
    assert disk_names(machine) == ["fla.vmdk", "mon.vmdk", "str.vmdk", "two.vmdk"]
    assert [disk.info.flat_name for disk in machine.disks] == [
        "fla-flat.vmdk", "mon-flat-2.vmdk", "str-flat.vmdk", "two-flat.vmdk",
    ]  # fmt: skip
    assert "monolithicSparse" in machine.disks[1].info.descriptor
    for disk in machine.disks:
        assert content.of(disk.source) == raw.read_bytes()
    assert file_names(machine) == ["mon-flat.vmdk"]
    (folder / "two.vmdk").unlink()
    machine = opened(folder)
    assert file_names(machine) == ["mon-flat.vmdk", "two-s001.vmdk"]
    assert len(machine.warnings) == 2


def test_two_descriptors_of_one_flat_get_flats_of_their_own(flat_vm: Path, opened) -> None:
    (flat_vm / "copy.vmdk").write_text((flat_vm / "web1.vmdk").read_text())
    machine = opened(flat_vm)
    assert [(disk.info.name, disk.info.flat_name) for disk in machine.disks] == [
        ("copy.vmdk", "web1-flat.vmdk"),
        ("web1.vmdk", "web1-flat-2.vmdk"),
    ]


def test_the_guest_can_not_make_its_flat_look_like_a_disk(flat_vm: Path, opened, sparse) -> None:
    """What a guest writes to its first sectors must not make the backup read something else."""
    for beginning in (
        sparse.build({}),
        b'# Disk DescriptorFile\nversion=1\nRW 1 FLAT "web1.nvram"\n' + bytes(300_000),
    ):
        data = beginning.ljust(1000 * SECTOR, b"\0")
        (flat_vm / "web1-flat.vmdk").write_bytes(data)
        text = (flat_vm / "web1.vmdk").read_text()
        (flat_vm / "web1.vmdk").write_text(text.replace("RW 128", "RW 1000"))
        machine = opened(flat_vm)
        assert disk_names(machine) == ["web1.vmdk"]
        assert machine.disks[0].source.size_bytes == 1000 * SECTOR
        (flat_vm / "web1.vmdk").write_text(text)


# Single images


def test_a_vmdk_alone(flat_vm: Path, opened) -> None:
    machine = opened(flat_vm / "web1.vmdk")
    assert (machine.kind, machine.name, machine.uuid, machine.files) == ("disk", "web1", "", ())
    assert machine.disks[0].info.format == "vmdk"
    assert opened(flat_vm / "web1.vmdk", name="x").name == "x"


@pytest.mark.parametrize("size", [1, 512, 1_000_003])
@pytest.mark.parametrize("beginning", [b"x", b"KDMV", b"# Disk DescriptorFile\n"])
def test_a_raw_image_stays_raw_whatever_it_holds(
    size: int, beginning: bytes, tmp_path: Path, opened, content
) -> None:
    path = tmp_path / "web1.img"
    path.write_bytes(beginning[:size].ljust(size, b"\0"))
    machine = opened(path)
    assert (machine.kind, machine.name, machine.uuid) == ("disk", "web1", "")
    (disk,) = machine.disks
    assert (disk.info.name, disk.info.format, disk.info.flat_name) == ("web1.img", "raw", "")
    assert disk.info.size_bytes == size
    assert content.of(disk.source) == path.read_bytes()


# What bad input gets


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.raw").touch()
    (tmp_path / "empty.vmdk").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "x.vswp").write_text("swap")
    (tmp_path / "text.vmx").write_bytes(b"\0\1\2" * 50)
    os.mkfifo(tmp_path / "pipe.raw")
    (tmp_path / "circle.raw").symlink_to("circle.raw")
    for name, error in {
        "absent": SourceNotFound,
        "empty.raw/below": SourceNotFound,
        "a\0b": SourceNotFound,
        "x" * 300: SourceNotFound,
        "empty.raw": EmptySource,
        "empty.vmdk": EmptySource,
        "folder": EmptySource,
        "text.vmx": SourceFormat,
        "pipe.raw": SourceUnsupported,
        "circle.raw": SourceUnreadable,
    }.items():
        with pytest.raises(error) as caught:
            open_machine(str(tmp_path / name))
        assert name.replace("\0", r"\x00")[:50] in str(caught.value)
    with pytest.raises(SourceUnsupported, match="character device"):
        open_machine("/dev/zero")


@pytest.mark.parametrize("name", ["web1.nvram", "web1-flat.vmdk", "web1.vmx", "web1.vmdk"])
def test_a_file_that_may_not_be_read_fails_the_backup(
    name: str, flat_vm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: str, *more: int, **keys: int) -> int:
        if os.path.basename(path) == name:
            raise OSError(errno.EACCES, "Permission denied")
        return real_open(path, *more, **keys)

    monkeypatch.setattr(os, "open", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceUnreadable, match=f"{name} can not be read"):
        open_machine(str(flat_vm))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_may_not_be_listed(flat_vm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceUnreadable, match="web1"):
        open_machine(str(flat_vm))


def test_a_folder_with_more_files_than_may_be_open(tmp_path: Path, opened, content) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    for number in range(600):
        (folder / f"{number:04}.log").write_text(str(number))
    before = len(os.listdir("/proc/self/fd"))
    machine = opened(folder)
    assert len(os.listdir("/proc/self/fd")) < before + 300
    for number, file in enumerate(machine.files):
        assert content.of(file.source) == str(number).encode()
