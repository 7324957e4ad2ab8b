"""The disk is full in the middle of a backup: a clear error, earlier points stay restorable, and it goes on later.

With root on real, small file systems (tmpfs); without root by a limit on the size of files, which the kernel
enforces in the middle of a write just as a full disk does.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from rig.disks import MIB, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, Truth, chunk_copies, quiet, restored

from holdfast.errors import DiskFull, StorageError
from holdfast.repo.repository import InitOptions, Repository

HERE = Path(__file__).parent


class SmallDisk:
    """A tmpfs that can be made larger."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        self._mount(f"size={size}")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], check=True)

    def resize(self, size: int) -> None:
        self._mount(f"remount,size={size}")

    def fill(self, leave: int) -> Path:
        """Takes up all room but `leave` bytes."""
        status = os.statvfs(self.path)
        size = status.f_bavail * status.f_frsize - leave
        filler = self.path / "filler"
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        return filler

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("needs root: a tmpfs has to be mounted")
    if shutil.which("mount") is None:
        pytest.skip("needs the command mount")
    disk = SmallDisk(tmp_path / "small", 24 * MIB)
    yield disk
    disk.unmount()


def compacted(index: Path) -> None:
    """Leaves an index no free page: whatever is written to it now needs room."""
    fresh = index.with_name("compacted")
    fresh.mkdir()
    with lmdb.open(str(index), readonly=True, lock=False, max_dbs=16) as env:
        env.copy(str(fresh), compact=True)
    (fresh / "data.mdb").replace(index / "data.mdb")
    (index / "head").unlink()  # it counts transactions, and copying begins anew


@pytest.mark.root
class TestOnASmallDisk:
    def test_full_in_the_middle_of_a_backup(
        self, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("holdfast.repo.session._BATCH_BYTES", 4 * MIB)
        world = FolderWorld(small_disk.path / "repo", SMALL)
        truth = Truth()
        large = content(range(1000, 1640))
        with world.open() as repository:
            truth.backup(repository, [content(range(1, 100))])
            for _ in range(2):  # the second attempt begins with a disk that is full already
                with pytest.raises(DiskFull) as caught:
                    repository.backup(machine_of([large], name="large"))
                assert caught.value.exit_code == 31
                assert caught.value.hint
                truth.verify(repository)
        with world.open() as repository:  # by a new process, still full
            truth.verify(repository)
            with pytest.raises(DiskFull):
                repository.backup(machine_of([large], name="large"))
        small_disk.resize(96 * MIB)
        before = chunk_copies(world.store)
        assert len(before) > 200
        with world.open() as repository:
            summary = truth.backup(repository, [large], name="large")
            truth.verify(repository)
        assert summary.chunks_reused > 100, "nothing of what had been stored was used again"
        again = {i for i, count in (chunk_copies(world.store) - before).items() if i in before}
        assert not again
        world.drop_index()
        with world.open() as repository:
            truth.verify(repository)

    def test_full_to_the_last_page(self, small_disk: SmallDisk) -> None:
        """Wherever the room ends - in a pack, in a commit, in the row of a session - it is the same error."""
        world = FolderWorld(small_disk.path / "repo", SMALL)
        truth = Truth()
        with world.open() as repository:
            truth.backup(repository, [content([1, 2, 3, 4])])
        failed = 0
        for number, leave in enumerate([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 600]):
            filler = small_disk.fill(leave * 4096)
            disk = content(range(100 + 20 * number, 112 + 20 * number))
            with world.open() as repository:
                try:
                    truth.backup(repository, [disk], name=f"vm{number}")
                except DiskFull:
                    failed += 1
                truth.verify(repository)
                assert repository.statistics().points == len(truth.points)
            filler.unlink()
            with world.open() as repository:
                truth.backup(repository, [disk], name=f"vm{number}")
                truth.verify(repository)
            if number % 6 == 5:
                truth.points.clear()
                shutil.rmtree(world.path)
                world = FolderWorld(small_disk.path / "repo", SMALL)
        assert failed > 12

    def test_a_full_disk_does_not_keep_anybody_from_restoring(self, small_disk: SmallDisk) -> None:
        """A restore holds its point in the index; without room for that it must go on all the same."""
        world = FolderWorld(small_disk.path / "repo", SMALL)
        disk = content(range(1, 60))
        with world.open() as repository:
            repository.backup(machine_of([disk]), ONE_WORKER)
        compacted(Path(world.path) / "index")
        small_disk.fill(0)
        for _ in range(3):
            with world.open() as repository:
                point = repository.resolve("web1@latest")
                assert restored(repository, point)["disk0.raw"] == disk
                assert repository.check(read_data=True).clean

    def test_an_index_that_finds_no_room(
        self, small_disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Packs have all the room in the world; LMDB has not."""
        monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(small_disk.path))
        small_disk.resize(600 << 10)
        options = InitOptions(chunker="fixed", chunk_size_bytes=4096, segment_bytes=MIB, pack_bytes=4 * MIB)
        world = FolderWorld(tmp_path / "repo", options)
        truth = Truth()
        with world.open() as repository:
            truth.backup(repository, [content(range(1, 10))])
            for _ in range(2):
                with pytest.raises(DiskFull):
                    repository.backup(machine_of([content(range(1000, 1640))], name="large"))
                truth.verify(repository)
        small_disk.resize(64 * MIB)
        with world.open() as repository:
            truth.backup(repository, [content(range(1000, 1640))], name="large")
            truth.verify(repository)

    def test_no_room_for_a_rebuilt_index(self, small_disk: SmallDisk) -> None:
        world = FolderWorld(small_disk.path / "repo", SMALL)
        truth = Truth()
        with world.open() as repository:
            truth.backup(repository, [content(range(1, 60))])
        world.drop_index()
        filler = small_disk.fill(4096)
        for _ in range(2):
            with world.open() as repository, pytest.raises(DiskFull):
                repository.points()
        filler.unlink()
        with world.open() as repository:
            truth.verify(repository)

    def test_no_room_for_a_new_repository(self, small_disk: SmallDisk) -> None:
        small_disk.fill(0)
        with pytest.raises(StorageError):
            Repository.init(str(small_disk.path / "repo"), notify=quiet)

    def test_no_room_for_another_key(self, small_disk: SmallDisk) -> None:
        """Both copies of the configuration hold the wrapped keys: neither may be lost to a full disk."""
        from dataclasses import replace

        from holdfast.repo import keys

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keys, "SCRYPT_N", 16)
            path = str(small_disk.path / "repo")
            with Repository.init(path, replace(SMALL, cipher="aes256-gcm"), password="one") as repository:
                small_disk.fill(0)
                for _ in range(3):
                    with pytest.raises(StorageError):
                        repository.add_key("two", "x" * 5000)
            with Repository.open(path, password="one", notify=quiet) as repository:
                assert repository.points() == []
                assert len(repository.key_slots()) == 1


def test_a_limit_on_the_size_of_files(tmp_path: Path, rng: random.Random) -> None:
    """Packs and index meet the limit in the middle of a write; the process lives, reports it, and goes on."""
    world = FolderWorld(
        tmp_path / "repo", InitOptions(chunker="fixed", chunk_size_bytes=4096, segment_bytes=MIB)
    )
    truth = Truth()
    with world.open() as repository:
        truth.backup(repository, [content(range(1, 20))])
    script = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
from rig.disks import content, machine_of
from rig.engine import quiet
from holdfast.errors import StorageError
from holdfast.repo.repository import Repository
codes = []
with Repository.open({world.path!r}, notify=quiet) as repository:
    for limit in [int(x) for x in sys.argv[1:]]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            repository.backup(machine_of([content(range(1000, 1160))], name="large"))
            codes.append(0)
        except StorageError as error:
            codes.append(error.exit_code)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert repository.check(read_data=True).clean
print(codes)
"""
    limits = [str(rng.randrange(100_000, 8 * MIB)) for _ in range(6)] + ["50000", "1"]
    outcome = subprocess.run(
        [sys.executable, "-c", script, *limits], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    codes = [int(code) for code in outcome.stdout.strip(" []\n").split(",")]
    assert set(codes) <= {0, 30, 31}
    assert sum(map(bool, codes)) >= 4, "the limit was hardly ever met"
    with world.open() as repository:
        listed = repository.points()
        for point in listed:
            if point.manifest.vm_name == "large":
                truth.points[point.id.hex()] = {"disk0.raw": content(range(1000, 1160))}
        truth.backup(repository, [content(range(1000, 1160))], name="large")
        truth.verify(repository)
