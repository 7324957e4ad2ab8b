"""The contract of `PackStore` and `PackWriter`, for every implementation; then what each adds to it."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.faults import Crash, CrashAt, Faults, FaultyPackStore, When, disk_error, disk_full
from rig.remote import hosted_connection
from rig.stores import MemoryPackStore

from holdfast.errors import DamagedData, DiskFull, HoldfastError, StorageError
from holdfast.ids import PackId
from holdfast.repo import appender, packs
from holdfast.repo.packs import LocalPackStore, PackStore
from holdfast.repo.wire.near import Connection
from holdfast.repo.wire.remote_store import RemotePackStore

A, B = PackId(bytes.fromhex("aa" * 16)), PackId(bytes.fromhex("ab" * 16))
Make = Callable[[], PackStore]


class _NoDirectWriter:
    """A file system that knows no way past the page cache."""

    def __init__(self, path: str) -> None:
        del path

    def write(self, offset: int, data: memoryview) -> int:
        del offset, data
        return 0

    def close(self) -> None:
        pass


@pytest.fixture(params=["local", "memory", "local with faults", "memory with faults", "local over the wire"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Opens the same set of packs anew, as another process would."""
    memory = MemoryPackStore()
    connections: list[Connection] = []

    def opened() -> PackStore:
        store: PackStore = LocalPackStore(str(tmp_path)) if "local" in request.param else memory
        if "wire" in request.param:
            connections.append(hosted_connection(store))
            return RemotePackStore(connections[-1])
        return FaultyPackStore(store, Faults()) if "faults" in request.param else store

    yield opened
    for connection in connections:
        connection.close()


def filled(store: PackStore, pack_id: PackId, data: bytes) -> None:
    writer = store.create(pack_id)
    writer.append([data])
    writer.sync()
    writer.close()


class TestContract:
    def test_there_is_nothing_in_a_new_store(self, make: Make) -> None:
        store = make()
        assert list(store.ids()) == []
        assert store.length(A) is None
        assert store.adopt(A) is None
        store.delete(A)
        with pytest.raises(DamagedData):
            store.read(A, 0, 1)
        with pytest.raises(DamagedData):
            store.read(A, 0, 0)
        store.close()

    def test_what_is_appended_is_read_from_its_offset(self, make: Make) -> None:
        store = make()
        writer = store.create(A)
        assert (writer.id, writer.length) == (A, 0)
        assert writer.append([b"one", b"", b"two"]) == 0
        assert writer.append([]) == 6
        assert writer.append([b"three"]) == 6
        assert writer.length == 11
        writer.sync()
        assert store.length(A) == 11
        assert store.read(A, 0, 11) == b"onetwothree"
        assert store.read(A, 3, 3) == b"two"
        assert store.read(A, 11, 0) == b""
        writer.close()
        writer.close()
        store.close()

    def test_many_parts_and_long_parts_keep_their_order(self, make: Make, rng: random.Random) -> None:
        store = make()
        parts = [rng.randbytes(rng.choice([0, 1, 72, 5000])) for _ in range(3000)] + [bytes(3 << 20)]
        writer = store.create(A)
        writer.append([b"before"])
        assert writer.append(parts) == 6
        writer.sync()
        assert store.read(A, 6, writer.length - 6) == b"".join(parts)
        writer.close()
        store.close()

    def test_reading_past_the_end_is_damage_not_an_input_output_error(self, make: Make) -> None:
        store = make()
        filled(store, A, b"0123456789")
        for offset, length in [(0, 11), (9, 2), (10, 1), (1 << 40, 1)]:
            with pytest.raises(DamagedData):
                store.read(A, offset, length)
        store.close()

    def test_a_pack_has_one_writer_at_a_time(self, make: Make) -> None:
        one, other = make(), make()
        writer = one.create(A)
        writer.append([b"mine"])
        assert one.adopt(A) is None
        assert other.adopt(A) is None
        writer.close()
        adopted = other.adopt(A)
        assert adopted is not None
        assert adopted.length == 4
        assert one.adopt(A) is None
        assert adopted.append([b", then yours"]) == 4
        adopted.sync()
        adopted.close()
        assert one.read(A, 0, 16) == b"mine, then yours"
        one.close()
        other.close()

    def test_cutting_drops_the_tail(self, make: Make) -> None:
        store = make()
        writer = store.create(A)
        writer.append([b"0123456789"])
        writer.sync()
        assert store.read(A, 0, 10)
        writer.append([b"not synced"])
        writer.cut(4)
        assert writer.length == 4
        assert store.length(A) == 4
        with pytest.raises(DamagedData):
            store.read(A, 0, 5)
        assert writer.append([b"abc"]) == 4
        writer.sync()
        assert store.read(A, 0, 7) == b"0123abc"
        writer.close()
        store.close()

    def test_all_packs_are_listed_until_they_are_deleted(self, make: Make) -> None:
        store = make()
        many = [PackId(bytes([n]) * 8 + bytes([n ^ 5]) * 8) for n in range(40)]
        for pack_id in many:
            filled(store, pack_id, pack_id)
        assert sorted(store.ids()) == sorted(many)
        assert all(store.read(pack_id, 0, 16) == pack_id for pack_id in many)
        store.delete(many[3])
        assert store.length(many[3]) is None
        with pytest.raises(DamagedData):
            store.read(many[3], 0, 1)
        assert sorted(make().ids()) == sorted(many[:3] + many[4:])
        store.close()

    def test_readers_on_many_threads_see_only_what_was_written(self, make: Make) -> None:
        """More packs than descriptors that are kept open, so that the cache turns over all the time."""
        store = make()
        many = [PackId(n.to_bytes(16, "big")) for n in range(1, 150)]
        for pack_id in many:
            filled(store, pack_id, pack_id * 64)
        wrong: list[object] = []

        def read(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(400):
                    pack_id = rng.choice(many)
                    offset = rng.randrange(0, 1024, 16)
                    if store.read(pack_id, offset, 16) != pack_id:
                        wrong.append(pack_id)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        store.close()


class TestLocal:
    def test_its_files_lie_where_the_format_says(self, tmp_path: Path) -> None:
        filled(LocalPackStore(str(tmp_path)), B, b"x")
        assert (tmp_path / "ab" / f"{'ab' * 16}.pack").read_bytes() == b"x"

    def test_other_files_are_passed_over(self, tmp_path: Path) -> None:
        store = LocalPackStore(str(tmp_path))
        filled(store, A, b"x")
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "zz").write_text("a file where a folder would be")
        (tmp_path / "ab").mkdir()
        (tmp_path / "ab" / "lost+found").mkdir()
        for name in [
            "",
            "x.pack",
            "ab" * 15 + ".pack",
            "ab" * 16 + ".tmp",
            "zz" * 16 + ".pack",
            "AB" * 16 + ".pack",
        ]:
            (tmp_path / "ab" / f"{name}.old").write_bytes(b"?")
            if name:
                (tmp_path / "ab" / name).write_bytes(b"?")
        (tmp_path / "ab" / ("ab " + "ab" * 14 + "a.pack")).write_bytes(b"?")
        assert list(store.ids()) == [A]

    def test_a_folder_in_the_place_of_a_pack_is_a_clear_error(self, tmp_path: Path) -> None:
        store = LocalPackStore(str(tmp_path))
        os.makedirs(store.path(A))
        for attempt in (lambda: store.adopt(A), lambda: store.read(A, 0, 1), lambda: store.create(A)):
            with pytest.raises(HoldfastError):
                attempt()

    def test_a_pack_in_the_making_can_not_be_taken_for_an_abandoned_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between making the file and locking it, another process finds it empty and removes it."""
        one, other = LocalPackStore(str(tmp_path)), LocalPackStore(str(tmp_path))
        flock, raced = packs.fcntl.flock, []

        def slow(fd: int, mode: int) -> None:
            if not raced:
                raced.append(fd)
                found = other.adopt(A)
                if found is not None:
                    assert found.length == 0
                    other.delete(A)
                    found.close()
            flock(fd, mode)

        monkeypatch.setattr(packs.fcntl, "flock", slow)
        writer = one.create(A)
        assert raced
        writer.append([b"precious"])
        writer.sync()
        assert other.adopt(A) is None
        writer.close()
        assert other.read(A, 0, 8) == b"precious"

    def test_a_pack_that_is_removed_while_it_is_adopted_is_not_written_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = LocalPackStore(str(tmp_path))
        filled(store, A, b"old")
        flock = packs.fcntl.flock

        def slow(fd: int, mode: int) -> None:
            store.delete(A)
            flock(fd, mode)

        monkeypatch.setattr(packs.fcntl, "flock", slow)
        assert store.adopt(A) is None

    def test_what_can_not_be_written_ends_the_writer_and_harms_nothing(self, tmp_path: Path) -> None:
        """Made to fail by a limit on the size of files: the kernel writes a part, then refuses."""
        script = f"""
import os, resource, signal, sys
from holdfast.errors import HoldfastError
from holdfast.ids import PackId
from holdfast.repo.packs import LocalPackStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = LocalPackStore({str(tmp_path)!r})
size = int(sys.argv[1])
writer = store.create(PackId(bytes(16)))
writer.append([b"a" * 1000])
writer.sync()
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
failed = []
for _ in range(40):
    try:
        writer.append([b"b" * 700_000, b"c"])
        writer.sync() if size < 10_000 else None
    except HoldfastError as error:
        failed.append(error.exit_code)
for act in (writer.sync, lambda: writer.append([b"d"]), lambda: writer.cut(5)):
    try:
        act()
    except HoldfastError as error:
        print(error.exit_code)
print(len(failed) > 0, set(failed))
writer.close()
"""
        for size in (5000, 9 << 20):
            outcome = subprocess.run(
                [sys.executable, "-c", script, str(size)], capture_output=True, text=True, check=True
            )
            assert outcome.stdout.split("\n")[:4] == ["30", "30", "30", "True {30}"]
            store = LocalPackStore(str(tmp_path))
            assert store.read(PackId(bytes(16)), 0, 1000) == b"a" * 1000
            again = store.adopt(PackId(bytes(16)))
            assert again is not None
            again.cut(1000)
            assert again.append([b"e" * 3000]) == 1000
            again.sync()
            assert store.read(PackId(bytes(16)), 0, 4000) == b"a" * 1000 + b"e" * 3000
            again.close()
            store.delete(PackId(bytes(16)))

    @pytest.mark.parametrize("direct", [True, False])
    def test_any_lengths_and_syncs_give_the_same_bytes(
        self, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, direct: bool
    ) -> None:
        """Pieces go past the page cache, tails through it, and blocks are written twice where they meet."""
        if not direct:
            monkeypatch.setattr(appender, "DirectWriter", _NoDirectWriter)
        block = rng.randbytes(9 << 20)
        store = LocalPackStore(str(tmp_path))
        writer = store.create(A)
        expected = bytearray()
        for _ in range(120):
            size = rng.choice([0, 1, 72, 4095, 4096, 4097, 65_536, 1 << 20, (4 << 20) - 1, 4 << 20, 9 << 20])
            size = min(size, rng.choice([100, 70_000, 9 << 20]))
            at = rng.randrange(len(block) - size + 1)
            assert writer.append([block[at : at + size // 3], block[at + size // 3 : at + size]]) == len(
                expected
            )
            expected += block[at : at + size]
            step = rng.randrange(10)
            if step < 3:
                writer.sync()
                assert store.length(A) == writer.length == len(expected)
                first = rng.randrange(len(expected) + 1)
                assert store.read(A, first, len(expected) - first) == expected[first:]
            elif step == 3:
                del expected[rng.randrange(len(expected) + 1) :]
                writer.cut(len(expected))
            elif step == 4:
                writer.sync()
                writer.close()
                adopted = store.adopt(A)
                assert adopted is not None
                writer = adopted
        writer.sync()
        assert store.read(A, 0, len(expected)) == expected
        writer.close()
        store.close()

    def test_syncing_beside_appending_loses_nothing(self, tmp_path: Path, rng: random.Random) -> None:
        store = LocalPackStore(str(tmp_path))
        writer = store.create(A)
        parts = [rng.randbytes(rng.choice([10, 5000, 300_000])) for _ in range(400)]
        stop, seen = threading.Event(), []

        def sync() -> None:
            while not stop.is_set():
                length = writer.length
                writer.sync()
                seen.append((length, store.length(A)))

        thread = threading.Thread(target=sync)
        thread.start()
        for part in parts:
            writer.append([part])
        stop.set()
        thread.join()
        writer.sync()
        assert store.read(A, 0, writer.length) == b"".join(parts)
        assert seen
        assert all(length is not None and length >= asked for asked, length in seen)
        writer.close()

    def test_after_a_failed_sync_nothing_more_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And whoever tries is told about the storage, not about a defect of Holdfast."""
        writer = LocalPackStore(str(tmp_path)).create(A)
        writer.append([b"x"])

        def fail(_fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(packs.os, "fdatasync", fail)
            with pytest.raises(DiskFull):
                writer.sync()
        with pytest.raises(DiskFull):
            writer.append([b"y"])
        with pytest.raises(DiskFull):
            writer.sync()
        writer.close()

    def test_a_short_write_is_finished(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = LocalPackStore(str(tmp_path))
        writer = store.create(A)
        pwrite = os.pwrite
        monkeypatch.setattr(packs.os, "pwrite", lambda fd, data, at: pwrite(fd, data[:2], at))
        assert writer.append([b"0123", b"4567", b"89"]) == 0
        writer.sync()
        assert store.read(A, 0, 10) == b"0123456789"
        writer.close()

    def test_descriptors_do_not_leak(self, tmp_path: Path) -> None:
        def count() -> int:
            return len(os.listdir("/proc/self/fd"))

        store = LocalPackStore(str(tmp_path))
        before = count()
        for n in range(200):
            pack_id = PackId(n.to_bytes(16, "big"))
            filled(store, pack_id, b"x")
            store.read(pack_id, 0, 1)
        assert count() - before <= 64
        store.close()
        assert count() == before

    def test_the_folders_of_a_new_pack_are_synced_with_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        fsync, fdatasync = os.fsync, os.fdatasync
        name = lambda fd: os.readlink(f"/proc/self/fd/{fd}")
        monkeypatch.setattr(packs.os, "fsync", lambda fd: (synced.append(name(fd)), fsync(fd))[1])
        monkeypatch.setattr(packs.os, "fdatasync", lambda fd: (synced.append(name(fd)), fdatasync(fd))[1])
        store = LocalPackStore(str(tmp_path))
        writer = store.create(A)
        writer.append([b"x"])
        writer.sync()
        assert synced == [store.path(A), str(tmp_path / "aa"), str(tmp_path)]
        writer.append([b"y"])
        writer.sync()
        assert synced[3:] == [store.path(A)]
        writer.close()


class TestMemory:
    """The rig's own store does what it promises, or the crash tests prove nothing."""

    def test_what_was_synced_survives_and_what_was_not_may_not(self) -> None:
        lost = kept = torn = 0
        for seed in range(300):
            store = MemoryPackStore()
            filled(store, A, b"synced" * 1000)
            writer = store.adopt(A)
            assert writer is not None
            writer.append([b"not synced" * 1000])
            unsynced = store.create(B)
            unsynced.append([b"new"])
            store.lose_power(random.Random(seed))
            length = store.length(A) or 0
            assert store.read(A, 0, 6000) == b"synced" * 1000
            tail = store.read(A, 6000, length - 6000)
            whole = (b"not synced" * 1000)[: len(tail)]
            lost += not tail
            kept += len(tail) == 10_000 and tail == whole
            torn += tail != whole
            assert store.length(B) in (None, 0, 1, 2, 3)
            again = store.adopt(A)
            assert again is not None
            with pytest.raises(HoldfastError):
                writer.append([b"from beyond the grave"])
        assert min(lost, kept, torn) > 20


class TestFaults:
    @pytest.mark.parametrize("when", list(When))
    def test_a_crash_ends_everything(self, when: When) -> None:
        below = MemoryPackStore()
        faults = Faults(lambda number, _name: CrashAt(when) if number == 3 else None)
        store = FaultyPackStore(below, faults)
        writer = store.create(A)
        writer.append([b"one"])
        with pytest.raises(Crash):
            writer.append([b"two"])
        assert below.length(A) == {When.BEFORE: 3, When.AFTER: 6, When.AMID: 5}[when]
        for attempt in (writer.sync, lambda: store.create(B), lambda: store.read(A, 0, 1)):
            with pytest.raises(Crash):
                attempt()
        assert faults.fired == 1
        faults.close_descriptors()
        assert below.adopt(A) is not None

    def test_an_error_is_raised_once_and_the_operation_not_done(self) -> None:
        faults = Faults(lambda number, name: disk_full() if (number, name) == (2, "append") else None)
        store = FaultyPackStore(MemoryPackStore(), faults)
        writer = store.create(A)
        with pytest.raises(DiskFull):
            writer.append([b"one"])
        assert writer.length == 0
        assert writer.append([b"two"]) == 0

    def test_a_read_can_fail(self) -> None:
        faults = Faults(lambda _number, _name: disk_error(), counted=frozenset({"read"}))
        store = FaultyPackStore(MemoryPackStore(), faults)
        filled(store, A, b"x")
        with pytest.raises(StorageError):
            store.read(A, 0, 1)
        assert faults.log == ["read"]


def test_the_limit_used_above_exists() -> None:
    """RLIMIT_FSIZE and its signal are what one test stands on."""
    assert resource.RLIMIT_FSIZE >= 0
    assert signal.SIGXFSZ
