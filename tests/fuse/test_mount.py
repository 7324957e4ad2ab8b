"""Real mounts by the real command: the right bytes, refusals, crashes, and beside everything else that goes on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuserig import (
    DAY,
    NOON,
    Holdfast,
    MountIt,
    back_up,
    needs_fuse,
    patterned,
    running,
    write_sparse,
)

pytestmark = needs_fuse


def init(holdfast: Holdfast, tmp_path: Path, *options: object) -> Path:
    repo = tmp_path / "repo"
    holdfast("init", "-r", repo, *options)
    return repo


@pytest.fixture
def repo(holdfast: Holdfast, tmp_path: Path, images: Path) -> Path:
    made = init(holdfast, tmp_path)
    back_up(holdfast, made, images / "day1.raw", "web1", NOON, "--label", "reason=nightly")
    back_up(holdfast, made, images / "day2.raw", "web1", NOON + DAY)
    return made


def same(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "--silent", a, b], check=False).returncode == 0


def compare(mounted: Path, original: Path) -> str:
    """What qemu-img says of two images."""
    outcome = subprocess.run(
        ["qemu-img", "compare", "-F", "raw", mounted, original], check=False, capture_output=True, text=True
    )
    return outcome.stdout.strip() + outcome.stderr.strip()


@pytest.mark.parametrize("chunker", ["aligned", "fixed", "fastcdc"])
def test_a_mounted_vmdk_is_the_disk(
    holdfast: Holdfast, tmp_path: Path, images: Path, mount: MountIt, chunker: str
) -> None:
    repo = init(holdfast, tmp_path, "--chunker", chunker)
    for number, name in enumerate(("day1", "day2", "odd")):
        back_up(holdfast, repo, images / f"{name}.raw", name, NOON + number)
    mounted = mount(repo)
    for name in ("day1", "day2", "odd"):
        assert (
            compare(mounted.point(name) / f"{name}.vmdk", images / f"{name}.raw") == "Images are identical."
        )
        assert same(mounted.point(name) / f"{name}.raw", images / f"{name}.raw")


@pytest.mark.parametrize("cipher", ["aes256-gcm", "chacha20-poly1305"])
def test_an_encrypted_repository_is_mounted_with_its_password(
    holdfast: Holdfast,
    tmp_path: Path,
    images: Path,
    mount: MountIt,
    monkeypatch: pytest.MonkeyPatch,
    cipher: str,
) -> None:
    monkeypatch.setenv("HOLDFAST_PASSWORD", "correct")
    repo = init(holdfast, tmp_path, "--encryption", cipher)
    back_up(holdfast, repo, images / "day1.raw", "web1", NOON)
    mounted = mount(repo)
    assert compare(mounted.point("web1") / "day1.vmdk", images / "day1.raw") == "Images are identical."
    mounted.end()
    monkeypatch.setenv("HOLDFAST_PASSWORD", "wrong")
    outcome = holdfast("-r", repo, "mount", mounted.place, check=False)
    assert outcome.returncode == 12
    assert list(mounted.place.iterdir()) == []


def test_holes_stay_holes(repo: Path, images: Path, mount: MountIt, tmp_path: Path) -> None:
    mounted = mount(repo)
    disk = mounted.point("web1") / "day2.raw"
    size, taken = disk.stat().st_size, disk.stat().st_blocks * 512
    assert size == (images / "day2.raw").stat().st_size
    assert 0 < taken < size
    blocks = int(
        subprocess.run(["du", "-k", disk], check=True, capture_output=True, text=True).stdout.split()[0]
    )
    assert blocks == -(-taken // 1024)
    for option in ("--sparse=always", "--sparse=auto"):
        copy = tmp_path / "copy"
        subprocess.run(["cp", option, disk, copy], check=True)
        assert same(copy, images / "day2.raw")
        assert copy.stat().st_blocks * 512 <= taken + (1 << 20)
        copy.unlink()
    with disk.open("rb") as file:
        data = (images / "day2.raw").read_bytes()
        at = 0
        while at < size:
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            if hole >= size:
                break
            try:
                at = os.lseek(file.fileno(), hole, os.SEEK_DATA)
            except OSError:
                at = size
            assert not any(data[hole:at])
        assert at > 0


def test_points_that_come_and_go_do_so_in_a_running_mount(
    repo: Path, images: Path, mount: MountIt, holdfast: Holdfast
) -> None:
    mounted = mount(repo)
    assert len(list((mounted.place / "by-id").iterdir())) == 2
    new = back_up(holdfast, repo, images / "odd.raw", "other", NOON)
    assert until(lambda: same(mounted.point("other") / "odd.raw", images / "odd.raw"))
    holdfast("-r", repo, "forget", new)
    assert until(lambda: not mounted.point("other").parent.exists())
    holdfast("-r", repo, "forget", "--undo", new)
    assert until(lambda: mounted.point("other").exists())


def until(condition) -> bool:
    """Whether it becomes true within the time that the document promises, and some more on a busy machine."""
    import time

    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
    return True


def test_an_open_file_can_be_read_after_forget_and_gc(
    repo: Path, images: Path, mount: MountIt, holdfast: Holdfast
) -> None:
    mounted = mount(repo)
    path = mounted.point("web1", "latest") / "day2.raw"
    data = (images / "day2.raw").read_bytes()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), 4096, 0) == data[:4096]
        holdfast("-r", repo, "forget", "web1@latest")
        holdfast("-r", repo, "gc")
        assert until(
            lambda: not path.exists() or path.resolve() != Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
        )
        for at in range(0, len(data), 1 << 20):
            assert os.pread(file.fileno(), 1 << 20, at) == data[at : at + (1 << 20)]
        assert os.fstat(file.fileno()).st_size == len(data)
    assert compare(mounted.point("web1") / "day1.vmdk", images / "day1.raw") == "Images are identical."


def test_damage_is_an_error_for_that_range_only(
    repo: Path, images: Path, mount: MountIt, holdfast: Holdfast
) -> None:
    pack = max((repo / "packs").rglob("*.pack"), key=lambda p: p.stat().st_size)
    with pack.open("r+b") as file:
        file.seek(pack.stat().st_size // 2)
        flipped = bytes(b ^ 0xFF for b in file.read(64))
        file.seek(-64, os.SEEK_CUR)
        file.write(flipped)
    report = json.loads(
        holdfast("-r", repo, "check", "--read-data", "--json", check=False).stdout.splitlines()[-1]
    )
    assert report
    place = mount(repo).point("web1", "2026-05-28T20-26-40Z")
    data = (images / "day1.raw").read_bytes()
    wrong = bad = 0
    with (place / "day1.raw").open("rb", buffering=0) as file:
        for at in range(0, len(data), 4096):
            try:
                wrong += os.pread(file.fileno(), 4096, at) != data[at : at + 4096]
            except OSError as error:
                wrong += error.errno != errno.EIO
                bad += 4096
    assert wrong == 0
    assert 0 < bad <= 1 << 20


def test_ten_readers_a_kill_and_a_new_mount(
    repo: Path, images: Path, mount: MountIt, holdfast: Holdfast
) -> None:
    mounted = mount(repo)
    disk = mounted.point("web1") / "day2.raw"
    readers = [
        subprocess.Popen(
            ["sh", "-c", 'while cat "$0" >/dev/null 2>&1; do :; done', str(disk)], stderr=subprocess.DEVNULL
        )
        for _ in range(10)
    ]
    assert os.path.getsize(disk) > 0
    mounted.kill()
    for reader in readers:
        assert reader.wait(timeout=60) is not None
    outcome = holdfast("-r", repo, "mount", mounted.place, check=False)
    assert outcome.returncode == 34
    assert "the process that served it is gone" in outcome.stderr
    assert f"holdfast umount {mounted.place}" in outcome.stderr
    holdfast("umount", mounted.place)
    mount(repo)
    assert same(disk, images / "day2.raw")


def test_where_nothing_can_be_mounted(repo: Path, tmp_path: Path, holdfast: Holdfast, mount: MountIt) -> None:
    def refused(place: Path) -> str:
        outcome = holdfast("-r", repo, "mount", place, check=False)
        assert outcome.returncode == 2, outcome.stderr
        assert "hint:" in outcome.stderr
        return outcome.stderr

    (tmp_path / "file").write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    inside = repo / "packs" / "here"
    inside.mkdir()
    link = tmp_path / "link"
    link.symlink_to(inside)
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "is no folder" in refused(tmp_path / "file")
    assert "is not empty" in refused(full)
    assert "lies in the repository" in refused(inside)
    assert "lies in the repository" in refused(link)
    mounted = mount(repo)
    assert "is mounted already" in refused(mounted.place)
    inside.rmdir()


def test_a_repository_that_is_none_is_told_at_the_terminal(tmp_path: Path, holdfast: Holdfast) -> None:
    (tmp_path / "m").mkdir()
    outcome = holdfast("-r", tmp_path / "none", "mount", tmp_path / "m", check=False)
    assert outcome.returncode == 10


def test_what_fails_in_the_background_is_told_at_the_terminal(
    repo: Path, tmp_path: Path, holdfast: Holdfast
) -> None:
    (tmp_path / "m").mkdir()
    outcome = holdfast("-r", repo, "mount", tmp_path / "m", "--vm", "nobody", check=False)
    assert outcome.returncode == 14
    assert "there is no VM 'nobody'" in outcome.stderr
    (repo / "index" / "data.mdb").write_bytes(b"\xff" * 65536)
    outcome = holdfast("-r", repo, "mount", tmp_path / "m", check=False)
    assert outcome.returncode == 21
    assert list((tmp_path / "m").iterdir()) == []


def test_without_libfuse_that_is_said(
    repo: Path, tmp_path: Path, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSE_LIBRARY_PATH", str(tmp_path / "no-such-library.so"))
    (tmp_path / "m").mkdir()
    outcome = holdfast("-r", repo, "mount", tmp_path / "m", check=False)
    assert outcome.returncode == 3
    assert "libfuse can not be loaded" in outcome.stderr


@pytest.mark.parametrize("number", [15, 2, 1])
def test_signals_unmount(repo: Path, mount: MountIt, number: int) -> None:
    mounted = mount(repo)
    pid = mounted.pid
    waiting = os.pidfd_open(pid)
    os.kill(pid, number)
    from fuserig import wait_for_end

    wait_for_end(waiting)
    os.close(waiting)
    assert list(mounted.place.iterdir()) == []


def test_nothing_can_be_written(repo: Path, mount: MountIt) -> None:
    folder = mount(repo).point("web1")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "new").write_text("x")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "day2.raw").open("r+b")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "day2.raw").unlink()


def test_umount_of_what_is_not_ours_is_refused(tmp_path: Path, holdfast: Holdfast) -> None:
    outcome = holdfast("umount", tmp_path, check=False)
    assert outcome.returncode == 2
    assert "nothing is mounted" in outcome.stderr
    outcome = holdfast("umount", "/proc", check=False)
    assert outcome.returncode == 2
    assert "no mount of Holdfast" in outcome.stderr


def test_umount_says_that_it_is_in_use(repo: Path, mount: MountIt, holdfast: Holdfast) -> None:
    mounted = mount(repo)
    with (mounted.point("web1") / "day2.raw").open("rb"):
        outcome = holdfast("umount", mounted.place, check=False)
        assert outcome.returncode == 34
        assert "is in use" in outcome.stderr
    mounted.end()
    assert list(mounted.place.iterdir()) == []


def namespace(*command: str) -> subprocess.Popen[str]:
    """A process in a mount namespace of its own, as containers have one: when this returns, it has begun."""
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", "; ".join((*command, "echo ready", "read end"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _, said = process.communicate()
        pytest.skip(f"needs a mount namespace, which unshare (util-linux) can not make here: {said}")
    return process


@pytest.mark.root
def test_umount_ends_a_mount_that_another_namespace_has_a_copy_of(
    repo: Path, mount: MountIt, holdfast: Holdfast
) -> None:
    if not Path("/sys/fs/fuse/connections").is_mount():
        pytest.skip("needs the file system fusectl")
    mounted = mount(repo)
    (mounted.point("web1") / "day2.raw").read_bytes()
    waiting = os.pidfd_open(mounted.pid)
    other = namespace()
    assert holdfast("umount", mounted.place).stderr == ""
    assert select.select([waiting], [], [], 0)[0], "its process goes on"
    os.close(waiting)
    assert other.poll() is None
    other.communicate("end\n")


@pytest.mark.root
def test_umount_leaves_what_another_namespace_uses(repo: Path, mount: MountIt, holdfast: Holdfast) -> None:
    mounted = mount(repo)
    file = mounted.point("web1") / "day2.raw"
    waiting = os.pidfd_open(mounted.pid)
    other = namespace(f"exec 3< '{file}'")
    outcome = holdfast("umount", mounted.place, check=False)
    assert outcome.returncode == 100
    assert "in another mount namespace (a container) have files of it open" in outcome.stderr
    assert list(mounted.place.iterdir()) == []
    other.communicate("end\n")
    from fuserig import wait_for_end

    wait_for_end(waiting)
    os.close(waiting)


@pytest.mark.root
def test_umount_says_where_else_it_is_mounted(
    repo: Path, mount: MountIt, holdfast: Holdfast, tmp_path: Path
) -> None:
    mounted = mount(repo)
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["mount", "--bind", mounted.place, copy], check=True)
    outcome = holdfast("umount", mounted.place, check=False)
    assert outcome.returncode == 100
    assert f"it is mounted on {copy} as well" in outcome.stderr
    assert any(copy.iterdir())
    assert holdfast("umount", copy).stderr == ""


# --- partitions


@pytest.fixture
def partitioned(tmp_path: Path) -> tuple[Path, Path]:
    """A disk with an ext4 file system in its second partition, and the folder that the file system holds."""
    if shutil.which("sfdisk") is None or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs sfdisk and mkfs.ext4")
    tree = tmp_path / "guest"
    (tree / "etc" / "deep" / "er").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("web1\n")
    (tree / "etc" / "deep" / "er" / "noise").write_bytes(patterned(3 << 20, 9))
    (tree / "link").symlink_to("etc/hostname")
    disk, system = tmp_path / "disk.raw", tmp_path / "ext4.raw"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, system, "20M"], check=True)
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    table = "label: gpt\nstart=2048, size=4096, type=uefi\nstart=8192, size=40960, type=linux\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=table, text=True, check=True)
    subprocess.run(
        ["dd", f"if={system}", f"of={disk}", "bs=512", "seek=8192", "conv=notrunc,sparse", "status=none"],
        check=True,
    )
    return disk, tree


def test_a_partition_is_a_sound_file_system(
    partitioned: tuple[Path, Path], holdfast: Holdfast, tmp_path: Path, mount: MountIt
) -> None:
    disk, _ = partitioned
    repo = init(holdfast, tmp_path)
    back_up(holdfast, repo, disk, "web1", NOON)
    folder = mount(repo).point("web1") / "disk.raw.partitions"
    assert sorted(os.listdir(folder)) == ["1-efi.img", "2-linux.img"]
    system = folder / "2-linux.img"
    assert system.stat().st_size == 20 << 20
    assert same(system, tmp_path / "ext4.raw")
    assert 0 < system.stat().st_blocks * 512 < 20 << 20
    outcome = subprocess.run(["e2fsck", "-fn", system], check=False, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.root
def test_a_partition_can_be_mounted(
    partitioned: tuple[Path, Path], holdfast: Holdfast, tmp_path: Path, mount: MountIt
) -> None:
    disk, tree = partitioned
    repo = init(holdfast, tmp_path)
    back_up(holdfast, repo, disk, "web1", NOON)
    system = mount(repo).point("web1") / "disk.raw.partitions" / "2-linux.img"
    place = tmp_path / "guest-mounted"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-o", "loop,ro,noload", system, place], check=False, capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"needs loop devices and root: {made.stderr.strip()}")
    try:
        outcome = subprocess.run(
            ["diff", "-r", "--no-dereference", tree, place], check=False, capture_output=True, text=True
        )
        assert outcome.stdout.splitlines() == [f"Only in {place}: lost+found"]
    finally:
        subprocess.run(["umount", place], check=True)


# --- load


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
@pytest.mark.parametrize("jobs", [1, 8])
def test_fio_verifies_what_it_reads_beside_a_backup_and_a_gc(
    holdfast: Holdfast, tmp_path: Path, images: Path, mount: MountIt, jobs: int
) -> None:
    """fio writes a file of blocks that carry their own checksums; that file is backed up, and fio verifies the copy."""
    size = 16 << 20
    job = [
        "fio",
        "--name=verified",
        f"--size={size}",
        "--bs=4k",
        "--verify=crc32c",
        "--ioengine=psync",
        "--thread",
    ]
    original = tmp_path / "fio" / "disk.raw"
    original.parent.mkdir()
    subprocess.run(
        [*job, f"--filename={original}", "--rw=write", "--do_verify=0"],
        check=True, stdout=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    repo = init(holdfast, tmp_path)
    back_up(holdfast, repo, original, "web1", NOON)
    lost = back_up(holdfast, repo, images / "odd.raw", "other", NOON)
    holdfast("-r", repo, "forget", lost)
    disk = mount(repo, "--cache-size", "16MiB").point("web1") / "disk.raw"
    others = [
        running(sys.executable, "-m", "holdfast", "-r", repo, "backup", images / "day1.raw", "--vm", "third"),
        running(sys.executable, "-m", "holdfast", "-r", repo, "gc"),
    ]
    with contextlib.ExitStack() as stack:
        beside = [stack.enter_context(one) for one in others]
        for order in ("read", "randread"):
            outcome = subprocess.run(
                [
                    *job, f"--filename={disk}", f"--rw={order}", f"--numjobs={jobs}", "--readonly", "--invalidate=1",
                    "--verify_fatal=1", "--output-format=json", "--group_reporting",
                ],
                check=False, capture_output=True, text=True, cwd=tmp_path,
            )  # fmt: skip
            assert outcome.returncode == 0, outcome.stdout + outcome.stderr
            report = json.loads(outcome.stdout[outcome.stdout.index("{") :])
            assert report["jobs"][0]["read"]["io_bytes"] >= jobs * size
            assert report["jobs"][0]["error"] == 0
        for process in beside:
            assert process.wait(timeout=120) == 0
    assert same(disk, original)


def test_memory_stays_within_the_cache_and_what_the_document_says(
    holdfast: Holdfast, tmp_path: Path, mount: MountIt
) -> None:
    image = tmp_path / "large.raw"
    write_sparse(image, patterned(160 << 20, 4))
    repo = init(holdfast, tmp_path)
    back_up(holdfast, repo, image, "web1", NOON)
    mounted = mount(repo, "--cache-size", "32MiB")
    disk = mounted.point("web1") / "large.raw"
    readers = [subprocess.Popen(["cmp", disk, image]) for _ in range(4)]
    assert [reader.wait(timeout=300) for reader in readers] == [0] * 4
    status = Path(f"/proc/{mounted.pid}/status").read_text()
    anonymous = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    assert anonymous < (32 + 150) << 20


def test_what_was_read_does_not_fill_the_memory(holdfast: Holdfast, tmp_path: Path, mount: MountIt) -> None:
    if shutil.which("fincore") is None:
        pytest.skip("needs fincore")
    image = tmp_path / "large.raw"
    with image.open("wb") as file:
        for at in range(0, 400, 8):
            file.seek(at << 20)
            file.write(patterned(1 << 20, at))
        file.truncate(400 << 20)
    repo = init(holdfast, tmp_path)
    back_up(holdfast, repo, image, "web1", NOON)
    disk = mount(repo).point("web1") / "large.raw"
    subprocess.run(["cmp", disk, image], check=True)
    cached = subprocess.run(["fincore", "-nb", "-o", "RES", disk], check=True, capture_output=True, text=True)
    assert 0 < int(cached.stdout) < 200 << 20
    subprocess.run(["cmp", disk, image], check=True)


def test_libfuse_2_will_do(repo: Path, images: Path, mount: MountIt, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        ctypes.CDLL("libfuse.so.2")
    except OSError:
        pytest.skip("needs libfuse 2")
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "libfuse.so.2")
    mounted = mount(repo)
    disk = mounted.point("web1") / "day2.raw"
    assert same(disk, images / "day2.raw")
    assert disk.stat().st_ino == os.stat(disk).st_ino > 1
    mounted.end()
