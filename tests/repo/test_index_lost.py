"""The index is lost, elsewhere, behind, or can not be written: nothing is ever only in it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from rig.child import Child
from rig.disks import MIB, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, Truth, assert_clean, quiet, restored
from rig.files import write_noise

from holdfast.errors import (
    DamagedIndex,
    HoldfastError,
    RepositoryBusy,
    StorageDenied,
    UsageError,
    WrongPassword,
)
from holdfast.ids import RecordId
from holdfast.repo import folder, keys
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.recover import adopt_strays
from holdfast.repo.repository import Repository

HERE = Path(__file__).parent


@pytest.fixture
def world(tmp_path: Path) -> FolderWorld:
    return FolderWorld(tmp_path / "repo")


@pytest.fixture
def truth(world: FolderWorld) -> Truth:
    """Two VMs with three points."""
    made = Truth()
    with world.open() as repository:
        made.backup(repository, [content([*range(1, 40), 0, 0, 1, 2]), b"small"], name="web1")
        made.backup(repository, [content([*range(1, 30), 50, 51, 0, 0, 0, 1, 2]), b""], name="web1")
        made.backup(repository, [content([*range(60, 80), *range(5, 20)])], name="db1")
    return made


class TestLost:
    def test_the_next_use_makes_a_new_one(self, world: FolderWorld, truth: Truth) -> None:
        world.drop_index()
        said: list[str] = []
        with Repository.open(world.path, notify=said.append) as repository:
            truth.verify(repository)
        assert len(said) == 1
        assert "rebuilt" in said[0]

    @pytest.mark.parametrize(
        "use",
        [
            lambda r: r.points(),
            lambda r: r.check(),
            lambda r: r.statistics(),
            lambda r: r.resolve("web1@latest"),
            lambda r: r.backup(machine_of([content([1, 2, 3])]), ONE_WORKER),
        ],
    )
    def test_whatever_the_next_use_is(self, world: FolderWorld, truth: Truth, use) -> None:
        world.drop_index()
        with world.open() as repository:
            use(repository)
        with world.open() as repository:
            assert {p.id.hex() for p in repository.points()} >= truth.points.keys()
            assert_clean(repository.check(read_data=True))

    def test_the_new_one_knows_what_the_old_one_knew(self, world: FolderWorld, truth: Truth) -> None:
        def all_of_it(repository: Repository):
            index = repository._index()
            rows = {row.number: row.id for row in index.packs()}
            places = {
                i: (rows[p.pack], p.offset, p.stored_bytes, p.plain_bytes, p.kind)
                for i, p in index.scan(None, 10**6)
            }
            packs = {
                row.id: (row.state, row.committed_bytes, row.records, row.live_bytes, row.created)
                for row in index.packs()
            }
            return places, packs, index.points()

        with world.open() as repository:
            before = all_of_it(repository)
            summary = repository.rebuild_index()
            assert all_of_it(repository) == before
        assert summary.points == 3
        assert summary.records == len(before[0])
        assert not summary.problems
        assert truth.points

    def test_while_others_use_it(
        self, world: FolderWorld, truth: Truth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(folder, "_LOCK_WAIT_S", 0.1)
        user = Child(do="hold", path=world.path)
        user.ready()
        with world.open() as repository:
            with pytest.raises(RepositoryBusy) as caught:
                repository.rebuild_index()
            assert caught.value.exit_code == 11
            truth.verify(repository)
        user.go()
        assert len(user.result()["points"]) == 3
        with world.open() as repository:
            repository.rebuild_index()
            truth.verify(repository)

    def test_deleted_under_a_user(
        self, world: FolderWorld, truth: Truth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever has it open goes on reading; whoever writes is stopped; whoever comes next has to wait."""
        monkeypatch.setattr(folder, "_LOCK_WAIT_S", 0.1)
        with world.open() as repository:
            repository.points()
            world.drop_index()
            truth.verify(repository)
            with pytest.raises(DamagedIndex):
                repository.backup(machine_of([content([1, 2, 900])]), ONE_WORKER)
            with world.open() as other, pytest.raises(RepositoryBusy):
                other.points()
        with world.open() as repository:
            truth.verify(repository)

    def test_missed_by_many_at_once(self, world: FolderWorld, truth: Truth) -> None:
        world.drop_index()
        children = [Child(do="list", path=world.path, open=False) for _ in range(4)]
        for child in children:
            child.ready()
        for child in children:
            child.go()
        results = [child.result() for child in children]
        assert all(set(result.get("points", ())) == truth.points.keys() for result in results), results

    def test_parts_of_it_are_lost(self, world: FolderWorld, truth: Truth) -> None:
        for name in ("lock.mdb", "head", "data.mdb"):
            os.unlink(Path(world.path) / "index" / name)
            with world.open() as repository:
                truth.verify(repository)

    def test_nonsense_in_its_place(self, world: FolderWorld, truth: Truth) -> None:
        shutil.rmtree(Path(world.path) / "index")
        (Path(world.path) / "index").write_bytes(b"not a folder")
        try:
            with world.open() as repository:
                truth.verify(repository)
        except HoldfastError:
            with world.open() as repository:
                repository.rebuild_index()
                truth.verify(repository)


class TestEncrypted:
    @pytest.fixture(autouse=True)
    def cheap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "SCRYPT_N", 16)

    @pytest.fixture
    def world(self, tmp_path: Path) -> FolderWorld:
        return FolderWorld(tmp_path / "repo", replace(SMALL, cipher="chacha20-poly1305"), "secret")

    def test_a_rebuild_needs_no_password(self, world: FolderWorld) -> None:
        truth = Truth()
        with world.open(password="secret") as repository:
            truth.backup(repository, [content(range(1, 40))])
        world.drop_index()
        with world.open() as repository:
            assert repository.rebuild_index().points == 1
            assert_clean(repository.check(read_data=True))
            with pytest.raises(WrongPassword):
                repository.points()
        with world.open(password="wrong") as repository, pytest.raises(WrongPassword):
            repository.points()
        with world.open(password="secret") as repository:
            truth.verify(repository)

    def test_an_index_elsewhere_catches_up_without_a_password(
        self, world: FolderWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What has to be opened for it waits until somebody comes with the key."""
        truth = Truth()
        monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(tmp_path / "elsewhere"))
        with world.open(password="secret") as repository:
            assert repository.points() == []
        monkeypatch.delenv("HOLDFAST_INDEX_DIR")
        for number in range(3):
            with world.open(password="secret") as repository:
                truth.backup(repository, [content(range(40 * number, 40 * number + 30))])
        monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(tmp_path / "elsewhere"))
        for _ in range(2):
            with world.open() as repository:
                assert_clean(repository.check(read_data=True))
        with world.open(password="secret") as repository:
            truth.verify(repository)


class TestElsewhere:
    @pytest.fixture
    def at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Chooses the machine on which the next command runs: each has an index of its own."""

        def choose(name: str) -> None:
            if name:
                monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(tmp_path / "machines" / name))
            else:
                monkeypatch.delenv("HOLDFAST_INDEX_DIR", raising=False)

        return choose

    def test_it_lies_there_and_nowhere_else(
        self, world: FolderWorld, truth: Truth, at, tmp_path: Path
    ) -> None:
        shutil.rmtree(Path(world.path) / "index")
        at("a")
        with world.open() as repository:
            truth.verify(repository)
        assert not (Path(world.path) / "index").exists()
        assert list((tmp_path / "machines" / "a").rglob("data.mdb"))

    def test_a_path_that_is_not_absolute_is_refused(
        self, world: FolderWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOLDFAST_INDEX_DIR", "here")
        with world.open() as repository, pytest.raises(UsageError):
            repository.points()

    def test_two_machines_take_turns(self, world: FolderWorld, at, rng: random.Random) -> None:
        truth = Truth()
        for round_ in range(12):
            at(rng.choice(["a", "b", "c"]))
            with world.open() as repository:
                truth.backup(
                    repository, [content([rng.randrange(60) for _ in range(20)])], name=f"vm{round_ % 3}"
                )
                truth.verify(repository)
        for name in ("a", "b", "c"):
            at(name)
            with world.open() as repository:
                truth.verify(repository)

    def test_points_whose_packs_come_later_are_found(self, world: FolderWorld, at) -> None:
        """One backup fills many packs; its manifest is in one of them, and packs are met in no special order."""
        at("b")
        with world.open() as repository:
            assert repository.points() == []
        truth = Truth()
        at("a")
        with world.open() as repository:
            for number in range(3):
                truth.backup(
                    repository, [content(range(100 * number, 100 * number + 90))], name=f"vm{number}"
                )
        at("b")
        with world.open() as repository:
            truth.verify(repository)

    def test_catching_up_can_be_interrupted_anywhere(
        self, world: FolderWorld, at, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from rig.faults import Crash, CrashAt, Faults, FaultyIndex, FaultyPackStore, When

        truth = Truth()
        at("a")
        with world.open() as repository:
            for number in range(2):
                truth.backup(repository, [content(range(50 * number, 50 * number + 45))], name=f"vm{number}")
        at("")
        crashes = 0
        for step in range(1, 60):
            at(f"b{step}")
            with world.open() as repository:
                index = repository._index()  # rebuilt, and then made to forget
                with index._env.begin(write=True) as txn:
                    for table in (index._chunks, index._packs, index._points):
                        txn.drop(table, delete=False)
                    from holdfast.repo.format import rows

                    empty = rows.PointsDigest(0, bytes(32))
                    txn.put(b"points", rows.encode_points_digest(b"points", empty), db=index._meta)
                faults = Faults(
                    lambda number, _name, step=step: CrashAt(When.BEFORE) if number == step else None
                )
                try:
                    adopt_strays(
                        FaultyPackStore(repository._store, faults),
                        FaultyIndex(index, faults),
                        repository._home(),
                        1,
                        grown=True,
                    )
                except Crash:
                    crashes += 1
                faults.die()
                faults.close_descriptors()
            with world.open() as repository:
                truth.verify(repository)
            if not faults.fired:
                break
        assert crashes >= 4
        assert not faults.fired, "there are more operations than were tried"

    def test_damage_met_while_catching_up_destroys_nothing(self, world: FolderWorld, at) -> None:
        """The other machine's index knows what is behind the damage; this one's must not cut it off."""
        at("b")
        with world.open() as repository:
            repository.points()
        at("a")
        truth = Truth()
        with world.open() as repository:
            truth.backup(repository, [content(range(1, 10))])
        pack = next(iter(world.store.ids()))
        path = Path(world.store.path(pack))
        data = bytearray(path.read_bytes())
        data[64 + 72 + 1000] ^= 1
        path.write_bytes(data)
        at("b")
        with world.open() as repository:
            repository.points()
            repository.backup(machine_of([content([70, 71])], name="other"), ONE_WORKER)
        assert path.read_bytes()[: len(data)] == data
        data[64 + 72 + 1000] ^= 1
        path.write_bytes(data + path.read_bytes()[len(data) :])
        at("a")
        with world.open() as repository:
            point = next(p for p in repository.points() if p.id.hex() in truth.points)
            assert restored(repository, point) == truth.points[point.id.hex()]

    def test_a_pack_that_was_removed_is_noticed(self, world: FolderWorld, at) -> None:
        truth = Truth()
        at("a")
        with world.open() as repository:
            truth.backup(repository, [content(range(1, 60))], name="one")
        known = set(world.store.ids())
        with world.open() as repository:
            truth.backup(repository, [content(range(100, 160))], name="two")
        gone = next(p for p in world.store.ids() if p not in known)
        os.unlink(world.store.path(gone))
        said: list[str] = []
        with Repository.open(world.path, notify=said.append) as repository:
            listed = repository.points()
            assert any("removed" in message for message in said)
            report = repository.check(read_data=True)
            assert {d.point for d in report.damaged} <= {p.id.hex() for p in listed}
            one = next(p for p in listed if p.manifest.vm_name == "one")
            assert restored(repository, one) == truth.points[one.id.hex()]

    def test_a_running_backup_of_another_machine_is_left_alone(self, world: FolderWorld, at) -> None:
        from rig.stepped import SteppedBackup

        at("b")
        with world.open() as repository:
            assert repository.points() == []
        at("a")
        backup = SteppedBackup(world, "one", content(range(1, 60)))
        backup.step(2)
        at("b")
        with world.open() as repository:
            assert repository.points() == []
            repository.backup(machine_of([content([200, 201])], name="two"), ONE_WORKER)
        at("a")
        truth = Truth()
        truth.points[backup.finish()] = {"disk0.raw": content(range(1, 60))}
        at("b")
        with world.open() as repository:
            two = next(p for p in repository.points() if p.manifest.vm_name == "two")
            truth.points[two.id.hex()] = {"disk0.raw": content([200, 201])}
            truth.verify(repository)


class TestReadOnly:
    @pytest.fixture
    def read_only(self, world: FolderWorld, truth: Truth, tmp_path: Path) -> Iterator[str]:
        """A read-only mount of the repository."""
        if os.geteuid() != 0:
            pytest.skip("needs root: a read-only bind mount has to be made")
        place = tmp_path / "read-only"
        place.mkdir()
        subprocess.run(["mount", "--bind", world.path, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        yield str(place)
        subprocess.run(["umount", "--lazy", place], check=True)

    @pytest.mark.root
    def test_everything_that_reads_works(self, read_only: str, truth: Truth) -> None:
        with Repository.open(read_only, notify=quiet) as repository:
            truth.verify(repository)
            assert repository.statistics().points == 3
            with repository.open_disk("web1@latest", "disk0.raw") as disk:
                assert disk.read(1 << 16) == content([1])

    @pytest.mark.root
    def test_everything_that_writes_is_refused_clearly(self, read_only: str, truth: Truth) -> None:
        for work in (
            lambda r: r.backup(machine_of([content([1, 900])]), ONE_WORKER),
            lambda r: r.rebuild_index(),
        ):
            with Repository.open(read_only, notify=quiet) as repository:
                with pytest.raises(StorageDenied) as caught:
                    work(repository)
                assert caught.value.exit_code == 32
        with Repository.open(read_only, notify=quiet) as repository:
            truth.verify(repository)

    @pytest.mark.root
    def test_without_an_index_one_is_made_elsewhere(
        self,
        read_only: str,
        world: FolderWorld,
        truth: Truth,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        world.drop_index()
        with Repository.open(read_only, notify=quiet) as repository, pytest.raises(StorageDenied) as caught:
            repository.points()
        assert "HOLDFAST_INDEX_DIR" in caught.value.hint
        for place in (tmp_path / "indexes", Path(read_only + "-indexes")):
            monkeypatch.setenv("HOLDFAST_INDEX_DIR", str(place))
            with Repository.open(read_only, notify=quiet) as repository:
                truth.verify(repository)

    @pytest.mark.root
    def test_beside_a_writer_on_another_mount(self, read_only: str, world: FolderWorld, truth: Truth) -> None:
        """A reader without locks and a writer: what is listed at any moment restores."""
        stop = threading.Event()
        failures: list[BaseException] = []
        script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from rig.engine import quiet, restored
from holdfast.repo.repository import Repository
for _ in range(6):
    with Repository.open({read_only!r}, notify=quiet) as repository:
        for point in repository.points():
            restored(repository, point)
"""
        reader = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    with world.open() as repository:
                        repository.backup(
                            machine_of([content([number, 1000 + number])], name="busy"), ONE_WORKER
                        )
                except BaseException as error:
                    failures.append(error)
                    return

        writer = threading.Thread(target=write)
        writer.start()
        _, said = reader.communicate(timeout=120)
        stop.set()
        writer.join()
        assert reader.returncode == 0, said
        assert not failures
        assert truth.points

    @pytest.mark.root
    def test_a_reader_that_writers_overtake_looks_again(
        self, read_only: str, world: FolderWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two commits beside a look-up may have reused the pages that it has read."""
        script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from rig.engine import quiet, ONE_WORKER
from rig.disks import content, machine_of
from holdfast.repo.repository import Repository
with Repository.open({world.path!r}, notify=quiet) as repository:
    repository.backup(machine_of([content([int(sys.argv[1]), 2000])], name="busy"), ONE_WORKER)
"""
        judged: list[bool] = []
        is_overtaken = LmdbIndex._is_overtaken

        def beside_writers(index: LmdbIndex, txn: lmdb.Transaction[bytes]) -> bool:
            if not index._read_only:
                return is_overtaken(index, txn)
            if len(judged) < 3:
                subprocess.run([sys.executable, "-c", script, str(len(judged))], check=True)
            judged.append(is_overtaken(index, txn))
            return judged[-1]

        with Repository.open(read_only, notify=quiet) as repository:
            monkeypatch.setattr(LmdbIndex, "_is_overtaken", beside_writers)
            assert repository._index().lookup([RecordId(bytes(32))]) == [None]
        assert judged == [True, True, True, False]

    def test_without_permission_to_write(self, world: FolderWorld, truth: Truth, tmp_path: Path) -> None:
        """As an ordinary user: the folder belongs to somebody else."""
        if os.geteuid() == 0 and shutil.which("setpriv") is None:
            pytest.skip("needs the command setpriv to become an ordinary user")
        for root, folders, files in os.walk(world.path):
            for name in [*folders, "."]:
                os.chmod(os.path.join(root, name), 0o555)
            for name in files:
                os.chmod(os.path.join(root, name), 0o444)
        script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from rig.engine import quiet, restored, ONE_WORKER
from rig.disks import content, machine_of
from holdfast.errors import StorageDenied
from holdfast.repo.repository import Repository
with Repository.open({world.path!r}, notify=quiet) as repository:
    points = repository.points()
    for point in points:
        restored(repository, point)
    assert repository.check(read_data=True).clean
    try:
        repository.backup(machine_of([content([1, 900])]), ONE_WORKER)
    except StorageDenied:
        print(len(points))
"""
        reach = tmp_path
        while os.geteuid() == 0 and reach != reach.parent:
            if not reach.stat().st_mode & 0o001:
                os.chmod(reach, reach.stat().st_mode | 0o011)
            reach = reach.parent
        become = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        outcome = subprocess.run(
            [*become, sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/"
        )
        for root, folders, _files in os.walk(world.path):
            for name in [*folders, "."]:
                os.chmod(os.path.join(root, name), 0o755)
        assert outcome.stdout.strip() == "3", outcome.stderr


def test_a_large_index_is_rebuilt_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.repo.recover._BATCH_RECORDS", 10)
    world = FolderWorld(tmp_path / "repo", replace(SMALL, chunk_size_bytes=4096))
    truth = Truth()
    disk = tmp_path / "disk.raw"
    write_noise(disk, 5, 3 * MIB)
    with world.open() as repository:
        truth.backup(repository, [disk.read_bytes()])
    world.drop_index()
    with world.open() as repository:
        truth.verify(repository)
