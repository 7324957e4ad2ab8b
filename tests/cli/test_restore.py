"""Restoring: every form a disk can be written in, and everything that can stand in the way."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from holdfast.cli import restore_plan, restoring
from holdfast.errors import DestinationExists, StorageError
from holdfast.repo.repository import Repository

DISK_BYTES = 24 << 20
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="needs qemu-img (package qemu-utils)"
)


def identical(a: Path, b: Path, a_format: str = "raw", b_format: str = "raw") -> bool:
    """Whether qemu, which knows nothing of us, sees the same disk in both."""
    outcome = subprocess.run(
        ["qemu-img", "compare", "-f", a_format, "-F", b_format, a, b],
        capture_output=True,
        text=True,
        check=False,
    )
    return outcome.stdout == "Images are identical.\n"


@pytest.fixture
def flat(vm: Path) -> Path:
    return vm / "web1-flat.vmdk"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


VM_FILES = ["logs/vmware.log", "web1-flat.vmdk", "web1.nvram", "web1.vmdk", "web1.vmx"]


def test_a_vm_comes_back_with_modes_times_and_holes(done, repo, vm, tmp_path, same) -> None:
    back = tmp_path / "deep" / "er" / "back"
    outcome = done("restore", "-r", repo, "web1@latest~1", back)
    assert same(vm, back)
    assert names(back) == VM_FILES
    assert stat.S_IMODE((back / "web1.vmx").stat().st_mode) == 0o755
    assert stat.S_IMODE((back / "web1-flat.vmdk").stat().st_mode) == 0o600
    assert (back / "web1.nvram").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (back / "web1-flat.vmdk").stat().st_blocks * 512 < 2_000_000
    assert outcome.out.startswith("restored web1 (restore point ")


def test_restore_as_json(done, repo, tmp_path) -> None:
    back = tmp_path / "back"
    outcome = done("restore", "-r", repo, "web1@latest~1", back, "--json")
    summary = outcome.summary
    assert summary["dest"] == str(back)
    assert summary["vm"] == "web1"
    assert sorted(file["path"] for file in summary["files"]) == sorted(str(back / name) for name in VM_FILES)
    assert 700_000 <= summary["bytes_written"] < 1_200_000
    assert summary["size_bytes"] > DISK_BYTES
    assert summary["dry_run"] is False
    assert {record["type"] for record in outcome.records[:-1]} <= {"progress"}


def test_a_dry_run_writes_nothing(done, repo, tmp_path) -> None:
    back = tmp_path / "back"
    out = done("restore", "-r", repo, "web1@latest~1", back, "--dry-run").out
    assert all(str(back / name) in out for name in VM_FILES)
    assert done("restore", "-r", repo, "web1@latest", back, "-n", "--json").summary["dry_run"] is True
    assert not back.exists()


@needs_qemu
def test_disks_as_raw(done, repo, flat, tmp_path) -> None:
    back = tmp_path / "back"
    done("restore", "-r", repo, "web1@latest~1", back, "--as", "raw")
    assert names(back) == ["logs/vmware.log", "web1.nvram", "web1.raw", "web1.vmx"]
    assert identical(flat, back / "web1.raw")


@needs_qemu
def test_one_disk_to_a_file_or_into_a_folder(done, repo, flat, tmp_path) -> None:
    words = ("restore", "-r", repo, "web1@latest~1")
    done(*words, tmp_path / "one.vmdk", "--disk", "web1.vmdk")
    assert identical(flat, tmp_path / "one.vmdk", b_format="vmdk")
    assert identical(flat, tmp_path / "one-flat.vmdk")
    done(*words, tmp_path / "one.img", "--disk", "scsi0:0", "--as", "raw")
    assert identical(flat, tmp_path / "one.img")
    (tmp_path / "folder").mkdir()
    done(*words, tmp_path / "folder", "--disk", "web1.vmdk")
    assert names(tmp_path / "folder") == ["web1-flat.vmdk", "web1.vmdk"]
    assert identical(flat, tmp_path / "folder" / "web1.vmdk", b_format="vmdk")
    done(*words, f"{tmp_path}/fresh/", "--disk", "web1.vmdk", "--as", "raw")
    assert names(tmp_path / "fresh") == ["web1.raw"]


@needs_qemu
def test_a_raw_image_comes_back_as_it_was_or_as_vmdk(done, empty_repo, tmp_path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(300_000) + b"odd")
    with image.open("r+b") as file:
        file.truncate(5_000_001)
    done("backup", "-r", empty_repo, image)
    words = ("restore", "-r", empty_repo, "disk@latest")
    done(*words, tmp_path / "back.img")
    assert (tmp_path / "back.img").read_bytes() == image.read_bytes()
    (tmp_path / "folder").mkdir()
    done(*words, tmp_path / "folder")
    assert (tmp_path / "folder" / "disk.raw").read_bytes() == image.read_bytes()
    done(*words, tmp_path / "v.vmdk", "--as", "vmdk")
    assert names(tmp_path).count("v-flat.vmdk") == 1
    assert identical(image, tmp_path / "v.vmdk", b_format="vmdk")


@needs_qemu
def test_every_kind_of_vmdk_alone(done, empty_repo, flat, tmp_path) -> None:
    for kind in ("monolithicSparse", "twoGbMaxExtentSparse", "streamOptimized", "monolithicFlat"):
        folder = tmp_path / kind
        folder.mkdir()
        source = folder / f"{kind}.vmdk"
        subprocess.run(
            ["qemu-img", "convert", "-O", "vmdk", "-o", f"subformat={kind}", flat, source],
            check=True,
            capture_output=True,
        )
        done("backup", "-r", empty_repo, source)
        done("restore", "-r", empty_repo, f"{kind}@latest", folder / "back.raw", "--as", "raw")
        assert identical(flat, folder / "back.raw")
        done("restore", "-r", empty_repo, f"{kind}@latest", folder / "back.vmdk")
        assert identical(flat, folder / "back.vmdk", b_format="vmdk")


def test_what_exists_is_only_replaced_when_told(holdfast, done, repo, tmp_path, same, vm) -> None:
    back = tmp_path / "back"
    back.mkdir()
    (back / "web1.vmx").write_text("precious")
    (back / "other").write_text("precious too")
    words = ("restore", "-r", repo, "web1@latest~1", back)
    for outcome in (holdfast(*words), holdfast(*words, "--dry-run")):
        assert outcome.code == 33
        assert "web1.vmx exists already" in outcome.err
        assert "--overwrite" in outcome.err
    assert names(back) == ["other", "web1.vmx"]
    assert (back / "web1.vmx").read_text() == "precious"
    done(*words, "--overwrite")
    assert (back / "other").read_text() == "precious too"
    (back / "other").unlink()
    assert same(vm, back)


def test_a_folder_is_never_replaced_by_a_file(holdfast, repo, tmp_path) -> None:
    (tmp_path / "back" / "web1.vmx").mkdir(parents=True)
    outcome = holdfast("restore", "-r", repo, "web1@latest", tmp_path / "back", "--overwrite")
    assert outcome.code == 33
    assert "no regular file" in outcome.err
    (tmp_path / "file").write_text("x")
    assert holdfast("restore", "-r", repo, "web1@latest", tmp_path / "file", "--overwrite").code == 33
    assert holdfast("restore", "-r", repo, "web1@latest", tmp_path / "file" / "below").code == 33
    assert (tmp_path / "file").read_text() == "x"


def test_a_link_below_the_destination_is_not_followed(holdfast, repo, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "logs").symlink_to(tmp_path / "elsewhere")
    outcome = holdfast("restore", "-r", repo, "web1@latest", tmp_path / "back", "--overwrite")
    assert outcome.code == 33
    assert names(tmp_path / "elsewhere") == []


def test_never_into_the_repository(holdfast, repo, tmp_path) -> None:
    (tmp_path / "link").symlink_to(repo)
    for place in (repo, repo / "x", repo / "packs", tmp_path / "link" / "x", repo / ".." / "repo" / "x"):
        outcome = holdfast("restore", "-r", repo, "web1@latest", place, "--overwrite")
        assert outcome.code == 2
        assert "inside of the repository" in outcome.err
    assert sorted(os.listdir(repo)) == ["README.txt", "config.json", "config.json.copy", "index", "packs"]


def test_a_destination_that_is_no_path(holdfast, repo, tmp_path) -> None:
    assert holdfast("restore", "-r", repo, "web1@latest", "").code == 2
    assert holdfast("restore", "-r", repo, "web1@latest", "a\0b").code == 2
    outcome = holdfast("restore", "-r", repo, "web1@latest", tmp_path / ("x" * 300))
    assert outcome.code in (2, 30)
    assert "name too long" in outcome.err.lower()


def test_a_place_where_nothing_can_be_written(holdfast, repo) -> None:
    outcome = holdfast("restore", "-r", repo, "web1@latest", "/proc/holdfast-test")
    assert 30 <= outcome.code < 40
    assert "/proc/holdfast-test" in outcome.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
@pytest.mark.parametrize(("options", "code"), [("size=300k", 31), ("size=8m,ro", 32)])
def test_a_full_or_read_only_file_system(holdfast, repo, tmp_path, options: str, code: int) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        outcome = holdfast("restore", "-r", repo, "web1@latest", small / "back")
        assert outcome.code == code
        assert "hint:" in outcome.err
        assert os.listdir(small) == []  # whatever was begun is gone
    finally:
        subprocess.run(["umount", small], check=True)


def test_point_and_disk_must_exist(holdfast, repo, tmp_path) -> None:
    outcome = holdfast("restore", "-r", repo, "web1@latest", tmp_path / "x", "--disk", "nope.vmdk")
    assert outcome.code == 14
    assert "its disks: web1.vmdk" in outcome.err
    assert holdfast("restore", "-r", repo, "web1@latest~2", tmp_path / "x").code == 14
    assert not (tmp_path / "x").exists()


def test_a_folder_without_disks(done, holdfast, empty_repo, tmp_path, same) -> None:
    folder = tmp_path / "files"
    (folder / "empty").mkdir(parents=True)
    (folder / "nothing").write_bytes(b"")
    (folder / "notes.txt").write_text("notes")
    done("backup", "-r", empty_repo, folder)
    done("restore", "-r", empty_repo, "files@latest", tmp_path / "back")
    assert same(folder, tmp_path / "back")
    assert (tmp_path / "back" / "empty").is_dir()


def test_more_files_than_may_be_open(execute, done, empty_repo, tmp_path, same) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(120):
        (folder / f"file-{number}").write_text(str(number))
    done("backup", "-r", empty_repo, folder)
    import resource

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))

    outcome = execute("-r", empty_repo, "restore", "many@latest", tmp_path / "back", preexec_fn=few_files)
    assert outcome.code == 0, outcome.err
    assert same(folder, tmp_path / "back")


class Meddler:
    """Is told of progress, and does something else instead."""

    def __init__(self, action) -> None:
        self.action = action

    def update(self, done: int, total: int, **details: int) -> None:
        self.action()


def restore_with(repo: Path, dest: Path, action) -> None:
    with Repository.open(str(repo)) as repository:
        point = repository.resolve("web1@latest")
        plan = restore_plan.plan_restore(
            repository.path, point, str(dest), disk=None, as_="original", overwrite=False
        )
        restoring.carry_out(repository, point, plan, Meddler(action), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError("no more"), MemoryError])
def test_a_restore_that_stops_leaves_nothing_behind(repo, tmp_path, error) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        restore_with(repo, tmp_path / "a" / "b", stop)
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        restore_with(repo, tmp_path / "kept", stop)
    assert os.listdir(tmp_path / "kept") == []


def test_a_file_that_appears_meanwhile_is_not_replaced(repo, tmp_path) -> None:
    back = tmp_path / "back"
    with pytest.raises(DestinationExists):
        restore_with(repo, back, lambda: (back / "web1.vmx").write_text("somebody else's"))
    assert names(back) == ["web1.vmx"]
    assert (back / "web1.vmx").read_text() == "somebody else's"


def test_files_with_odd_names(done, empty_repo, vm, tmp_path, same) -> None:
    for name in ("a\nb.log", "größe.log", "\x1b[2J", " ", "-rf", "x" * 255, "quote'\"", "a\\b"):
        (vm / name).write_text(name)
    done("backup", "-r", empty_repo, vm)
    assert all(c.isprintable() for c in done("show", "-r", empty_repo, "web1@latest").out.replace("\n", ""))
    done("restore", "-r", empty_repo, "web1@latest", tmp_path / "back")
    assert same(vm, tmp_path / "back")


@pytest.fixture
def device(tmp_path: Path):
    """A block device of 32 MiB, full of other data."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a loop device")
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xaa" * (32 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip("needs loop devices")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@needs_qemu
def test_a_block_device_is_read_and_written(holdfast, done, repo, device, flat, tmp_path) -> None:
    words = ("restore", "-r", repo, "web1@latest~1", device, "--disk", "web1.vmdk")
    assert holdfast(*words, "--overwrite").code == 2  # a .vmdk can not be a device
    outcome = holdfast(*words, "--as", "raw")
    assert outcome.code == 33
    assert "--overwrite" in outcome.err
    done(*words, "--as", "raw", "--overwrite")
    with device.open("rb") as file:
        assert file.read(DISK_BYTES) == flat.read_bytes()  # what were holes is zeros now
        assert set(file.read()) == {0xAA}  # what lies behind is left alone
    done("backup", "-r", repo, device, "--vm", "device")
    done("restore", "-r", repo, "device@latest", tmp_path / "device.raw")
    assert identical(device, tmp_path / "device.raw")


def test_a_block_device_that_is_too_small(holdfast, done, empty_repo, device, tmp_path) -> None:
    big = tmp_path / "big.raw"
    with big.open("wb") as file:
        file.truncate(40 << 20)
        file.write(b"x")
    done("backup", "-r", empty_repo, big)
    outcome = holdfast("restore", "-r", empty_repo, "big@latest", device, "--overwrite")
    assert outcome.code == 30
    assert "at least as large" in outcome.err
