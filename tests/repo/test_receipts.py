"""Times of receipt: noted by the side where the index lies, kept when the index is lost, and not a client's to choose."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, quiet
from rig.faults import Crash, CrashAt, Faults, When
from rig.remote import all_gone, remote_repository

from holdfast.errors import StorageError
from holdfast.ids import PointId, RecordId, RepositoryId
from holdfast.repo.backup import BackupOptions, run_backup
from holdfast.repo.folder import RepositoryFolder
from holdfast.repo.format import rows
from holdfast.repo.format.receipt import BEGINNING, RECEIPT_BYTES, decode_receipts
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.place import LocalPlace
from holdfast.repo.receipts import ReceiptFile
from holdfast.repo.repository import Repository
from holdfast.repo.wire.rights import Rights

REPOSITORY = RepositoryId(b"r" * 16)
T0 = 1_700_000_000
DAY = 86_400


def local(path: Path | str, now: float) -> Repository:
    """A repository whose place has another clock than the rest of the process."""
    place = LocalPlace(RepositoryFolder(str(path)), lambda: now)
    return Repository(place, place.read_config().config, None, quiet)


def back_up(repository: Repository, number: int, **more: object) -> PointId:
    made = repository.backup(machine_of([content([number, number + 1])]), replace(ONE_WORKER, **more))
    assert made.point is not None
    return made.point


def receipts(repository: Repository) -> dict[PointId, int]:
    """Of each point when it was received; 0 if that was not noted."""
    return {row.id: row.received_ms for row in repository._index().points()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    Repository.init(str(folder), SMALL, notify=quiet).close()
    return folder


def file_of(path: Path) -> Path:
    return path / "packs" / "receipts"


def noted(path: Path) -> dict[PointId, int]:
    """What the file says."""
    with Repository.open(str(path), notify=quiet) as repository:
        return decode_receipts(repository.config.id, file_of(path).read_bytes()).received_ms


def forget_receipts(path: Path) -> None:
    """Makes the repository one that was written before there were receipts."""
    file_of(path).unlink(missing_ok=True)
    with Repository.open(str(path), notify=quiet) as repository:
        index = repository._index()
        assert isinstance(index, LmdbIndex)
        found = index.points()
        with index._env.begin(write=True) as txn:
            for row in found:
                txn.put(row.id, rows.encode_point_row(replace(row, received_ms=0)), db=index._points)
            txn.put(b"version", rows.encode_counter(b"version", 1), db=index._meta)


# --- repositories


def test_the_side_of_the_index_tells_the_time_and_a_rebuild_knows_it(path: Path) -> None:
    with local(path, T0) as repository:
        one = back_up(repository, 1)
    with local(path, T0 + DAY) as repository:
        two = back_up(repository, 5)
        assert [p.received_ms for p in repository.points()] == [T0 * 1000, (T0 + DAY) * 1000]
    expected = {one: T0 * 1000, two: (T0 + DAY) * 1000}
    with local(path, T0 + 9 * DAY) as repository:
        repository.rebuild_index()
        assert receipts(repository) == expected
    shutil.rmtree(path / "index")
    with local(path, T0 + 9 * DAY) as repository:
        assert receipts(repository) == expected
        repository.forget(repository.points()[:1])
        repository.recall(repository.hidden_points())
        assert receipts(repository) == expected
    assert noted(path) == {BEGINNING: T0 * 1000, **expected}


def test_of_points_from_before_the_claim_counts(path: Path) -> None:
    with local(path, T0) as repository:
        old = back_up(repository, 1)
    forget_receipts(path)
    with local(path, T0 + DAY) as repository:
        (point,) = repository.points()
        assert (point.noted_ms, point.received_ms) == (0, point.manifest.received_ms)
        repository.rebuild_index()  # there is still nothing that could be noted
        assert receipts(repository) == {old: 0}
    assert not file_of(path).exists()
    with local(path, T0 + DAY) as repository:
        new = back_up(repository, 5)
    expected = {old: 0, new: (T0 + DAY) * 1000}
    with local(path, T0 + 2 * DAY) as repository:
        assert receipts(repository) == expected
        repository.rebuild_index()
        assert receipts(repository) == expected


def _unlisted(path: Path) -> None:
    """Has a backup die before its last transaction: its manifest is in a pack, and no index lists it."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    world = object.__new__(FolderWorld)
    world.path, faults = str(copy), Faults(counted=frozenset({"commit"}))
    with world.open(faults) as repository:
        back_up(repository, 20)
    world.path, last = str(path), len(faults.log)
    dying = Faults(lambda number, _: CrashAt(When.BEFORE) if number == last else None, frozenset({"commit"}))
    repository = world.open(dying)
    with pytest.raises(Crash):
        back_up(repository, 20)
    world.kill(repository, dying)


@pytest.mark.parametrize("rebuild", [False, True], ids=["adopted", "found by a rebuild"])
def test_what_was_never_listed_is_received_when_it_is_found(path: Path, rebuild: bool) -> None:
    with local(path, T0) as repository:
        before = back_up(repository, 1)
    _unlisted(path)
    with local(path, T0 + DAY) as repository:
        assert receipts(repository).keys() == {before}
        if rebuild:
            repository.rebuild_index()
        else:
            repository.collect()
        found = receipts(repository)
        assert len(found) == 2
        assert sorted(found.values()) == [T0 * 1000, (T0 + DAY) * 1000]
        assert noted(path) == {BEGINNING: T0 * 1000, **found}


def test_a_crash_between_the_file_and_the_index_changes_no_receipt(path: Path) -> None:
    with local(path, T0) as repository:
        back_up(repository, 1)
    _unlisted(path)
    with Repository.open(str(path), notify=quiet) as repository:
        twin = path.with_name("twin")
        shutil.copytree(path, twin)
        with Repository.open(str(twin), notify=quiet) as other:
            other.collect()
            (unlisted,) = other._index().point_states().keys() - repository._index().point_states().keys()
        # The dead writer had come as far as noting its receipt.
        ReceiptFile(str(path / "packs"), repository.config.id, lambda: T0 + 5).receive(unlisted, list)
    with local(path, T0 + 3 * DAY) as repository:
        repository.collect()
        assert receipts(repository)[unlisted] == (T0 + 5) * 1000


def test_a_replica_notes_its_own(path: Path, tmp_path: Path) -> None:
    with local(path, T0) as source:
        point = back_up(source, 1)
        Repository.init(str(tmp_path / "replica"), SMALL, notify=quiet).close()
        with local(tmp_path / "replica", T0 + 40 * DAY) as target:
            source.replicate(target, source.points())
            assert receipts(target) == {point: (T0 + 40 * DAY) * 1000}


def test_an_index_elsewhere_takes_what_another_one_has_noted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines, each with an index of its own, share the folder of packs."""
    for number, machine in enumerate(("one", "two", "one")):
        monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(tmp_path / machine))
        with local(path, T0 + number * DAY) as repository:
            back_up(repository, 10 * number + 1)
    for machine in ("one", "two"):
        monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(tmp_path / machine))
        with local(path, T0 + 9 * DAY) as repository:
            assert sorted(receipts(repository).values()) == [(T0 + n * DAY) * 1000 for n in range(3)]


@pytest.mark.parametrize("rights", [Rights(), Rights(append_only=True)], ids=["all rights", "append-only"])
def test_a_client_can_not_choose_it(path: Path, rights: Rights) -> None:
    lie = T0 - 300 * DAY
    with remote_repository(str(path), rights, clock=lambda: T0) as client:
        engine = replace(client._engine(), clock=lambda: lie)
        made = run_backup(engine, machine_of([content([1, 2])]), BackupOptions(workers=1, time=lie), [])
        (seen,) = client.points()
        assert (seen.manifest.received_ms, seen.received_ms) == (lie * 1000, T0 * 1000)
    all_gone()
    with Repository.open(str(path), notify=quiet) as repository:
        assert receipts(repository) == {made.point: T0 * 1000}


# --- the file


def point(number: int) -> PointId:
    return PointId(RecordId(random.Random(number).randbytes(32)))


def receive(
    folder: Path, number: int, now: float, listed: Callable[[], list[tuple[PointId, int]]] = list
) -> int:
    return ReceiptFile(str(folder), REPOSITORY, lambda: now).receive(point(number), listed)


def said(folder: Path) -> dict[PointId, int]:
    return decode_receipts(REPOSITORY, (folder / "receipts").read_bytes()).received_ms


def test_an_interrupted_beginning_is_begun_again(tmp_path: Path) -> None:
    """Wherever the first writer died: nothing of what was listed before is taken for new."""
    listed = [(point(n), 0) for n in range(3)]
    receive(tmp_path, 9, 5, lambda: listed)
    whole = (tmp_path / "receipts").read_bytes()
    for length in range(len(whole) - RECEIPT_BYTES):
        (tmp_path / "receipts").write_bytes(whole[:length])
        rebuilding = ReceiptFile(str(tmp_path), REPOSITORY, lambda: 8, rebuilding=True)
        if length < len(whole) - 2 * RECEIPT_BYTES:
            assert rebuilding.receive(point(0), list) == rebuilding.receive(point(77), list) == 0
        assert receive(tmp_path, 9, 7, lambda: listed) == 7000
        assert said(tmp_path) == {**dict(listed), BEGINNING: said(tmp_path)[BEGINNING], point(9): 7000}


def test_what_a_dead_writer_left_is_cut_off(tmp_path: Path) -> None:
    receive(tmp_path, 1, 5)
    whole = (tmp_path / "receipts").read_bytes()
    for rest in (b"x", b"x" * (RECEIPT_BYTES - 1), bytes(RECEIPT_BYTES), bytes(3 * RECEIPT_BYTES + 2)):
        (tmp_path / "receipts").write_bytes(whole + rest)
        receive(tmp_path, 2, 6)
        assert len((tmp_path / "receipts").read_bytes()) == len(whole) + RECEIPT_BYTES
        assert said(tmp_path) == {BEGINNING: 5000, point(1): 5000, point(2): 6000}


def test_a_damaged_entry_is_written_again_from_the_index(tmp_path: Path) -> None:
    for number in range(3):
        receive(tmp_path, number, 5 + number)
    data = bytearray((tmp_path / "receipts").read_bytes())
    data[RECEIPT_BYTES + 3] ^= 1  # that of the first point; the beginning is before it
    (tmp_path / "receipts").write_bytes(bytes(data))
    rebuilding = ReceiptFile(str(tmp_path), REPOSITORY, lambda: 50, rebuilding=True)
    assert (
        rebuilding.receive(point(0), list) == 0
    )  # its manifest's claim counts, rather than the rebuild's time
    assert rebuilding.receive(point(1), list) == 6000
    receive(tmp_path, 7, 9, lambda: [(point(0), 5000), (point(1), 6000), (point(2), 7000)])
    assert said(tmp_path) == {
        BEGINNING: 5000, point(1): 6000, point(2): 7000, point(0): 5000, point(7): 9000,
    }  # fmt: skip


def test_nothing_is_noted_where_nothing_can_be_written(tmp_path: Path) -> None:
    reading = ReceiptFile(str(tmp_path), REPOSITORY, lambda: 5, writable=False, rebuilding=True)
    assert reading.receive(point(1), list) == 0
    assert not (tmp_path / "receipts").exists()
    receive(tmp_path, 1, 3)
    before = (tmp_path / "receipts").read_bytes()
    assert (reading.receive(point(1), list), reading.receive(point(2), list)) == (3000, 5000)
    assert (tmp_path / "receipts").read_bytes() == before


@pytest.mark.parametrize("written", [0, 7, RECEIPT_BYTES])
def test_a_full_disk_lists_the_point_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    receive(tmp_path, 1, 3)
    write, room = os.write, [written]

    def full(fd: int, data: bytes) -> int:
        some = memoryview(data)[: room[0]]
        if not some:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] = 0
        return write(fd, some)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        assert receive(tmp_path, 2, 4) == 4000
    assert receive(tmp_path, 3, 5) == 5000
    assert {point(1): 3000, point(3): 5000}.items() <= said(tmp_path).items()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(errno.EIO, "it failed")))
        with pytest.raises(StorageError):
            receive(tmp_path, 4, 6)


def test_many_at_once_lose_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    work = [[chance.randrange(40) for _ in range(30)] for _ in range(4)]
    found: list[dict[int, set[int]]] = [{} for _ in work]

    def run(numbers: list[int], mine: dict[int, set[int]], clock: int) -> None:
        file = ReceiptFile(str(tmp_path), REPOSITORY, lambda: clock)
        for number in numbers:
            mine.setdefault(number, set()).add(file.receive(point(number), list))

    threads = [
        threading.Thread(target=run, args=(numbers, mine, clock))
        for clock, (numbers, mine) in enumerate(zip(work, found, strict=True), 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = said(tmp_path)
    for mine in found:
        for number, answers in mine.items():
            assert answers == {told[point(number)]}
    assert len((tmp_path / "receipts").read_bytes()) == RECEIPT_BYTES * len(told)
