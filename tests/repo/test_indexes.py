"""The contract of `Index`, on LMDB and on the model; then both side by side on generated work."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from rig.engine import remove_rows
from rig.faults import Faults, FaultyIndex
from rig.model_index import ModelIndex
from rig.remote import hosted_connection
from rig.stores import MemoryPackStore

from holdfast.errors import DamagedIndex, PointNotFound, SessionGone
from holdfast.ids import NodeId, PackId, PointId, RecordId, RepositoryId, SessionId
from holdfast.repo.format.rows import CopyRow, PackState, Place, PointRow, SessionRow
from holdfast.repo.index import Batch, CopiesFound, Index, NewRecord, PackProgress, PointChange
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.wire.remote_index import RemoteIndex

REPOSITORY = RepositoryId(b"r" * 16)
NOW = 1_800_000_000


def rid(number: int) -> RecordId:
    """A record id; consecutive numbers are not consecutive ids."""
    return RecordId(random.Random(number).randbytes(32))


def pid(number: int) -> PackId:
    return PackId(random.Random(f"pack {number}").randbytes(16))


def sid(number: int) -> SessionId:
    return SessionId(random.Random(f"session {number}").randbytes(16))


def session(number: int, heartbeat: int = NOW, holds: tuple[PointId, ...] = ()) -> SessionRow:
    return SessionRow(sid(number), "backup", "host", 4711, heartbeat, heartbeat, holds)


def record(number: int, pack: int, offset: int, stored: int = 100) -> NewRecord:
    return NewRecord(rid(number), pid(pack), offset, stored, 2 * stored, 1)


def point(number: int, *, hidden: bool = False) -> PointRow:
    return PointRow(PointId(rid(number)), hidden, pinned=False, pack=pid(1), record=b"manifest %d" % number)


def progress(pack: int, committed: int, state: PackState = PackState.OPEN) -> PackProgress:
    return PackProgress(pid(pack), committed, state, NOW - pack)


@pytest.fixture(params=["lmdb", "model", "lmdb with faults", "lmdb over the wire"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    made: Index = (
        ModelIndex()
        if request.param == "model"
        else LmdbIndex(str(tmp_path / "index"), REPOSITORY, create=True)
    )
    if "wire" in request.param:
        connection = hosted_connection(MemoryPackStore(), made)
        yield RemoteIndex(connection)
        connection.close()
    else:
        yield FaultyIndex(made, Faults()) if "faults" in request.param else made
    made.close()


class TestContract:
    def test_a_new_index_is_empty(self, index: Index) -> None:
        assert index.lookup([rid(1), rid(2)]) == [None, None]
        assert index.lookup([]) == []
        assert index.scan(None, 10) == []
        assert (index.packs(), index.points(), index.sessions()) == ([], [], [])
        assert list(index.roots(sid(1))) == []
        figures = index.figures()
        assert (figures.records, figures.packs, figures.points, figures.sessions) == (0, 0, 0, 0)

    def test_a_batch_is_visible_when_it_is_committed(self, index: Index) -> None:
        batch = Batch(None, NOW, records=[record(1, 1, 64), record(2, 1, 300)], packs=[progress(1, 500)])
        committed = index.commit(batch)
        assert (committed.gone, committed.duplicates) == (frozenset(), 0)
        first, absent, second = index.lookup([rid(1), rid(9), rid(2)])
        assert first == Place(1, 64, 100, 200, 1, 1)
        assert absent is None
        assert second is not None
        assert second.offset == 300
        row = index.packs()[0]
        assert (row.number, row.id, row.state, row.committed_bytes) == (1, pid(1), PackState.OPEN, 500)
        assert (row.records, row.live_bytes, row.dead_bytes, row.created) == (2, 344, 0, NOW - 1)

    def test_the_same_id_asked_twice_is_answered_twice(self, index: Index) -> None:
        index.commit(Batch(None, NOW, records=[record(1, 1, 64)], packs=[progress(1, 500)]))
        one, two = index.lookup([rid(1), rid(1)])
        assert one == two
        assert one is not None

    def test_a_second_copy_is_counted_as_dead_and_the_first_one_stays(self, index: Index) -> None:
        index.commit(Batch(None, NOW, records=[record(1, 1, 64)], packs=[progress(1, 500)]))
        committed = index.commit(
            Batch(None, NOW, records=[record(1, 2, 64), record(2, 2, 300)], packs=[progress(2, 500)])
        )
        assert (committed.duplicates, committed.duplicate_bytes) == (1, 172)
        place = index.lookup([rid(1)])[0]
        assert place is not None
        assert place.pack == 1
        row = index.packs()[1]
        assert (row.records, row.dead_records, row.live_bytes, row.dead_bytes) == (1, 1, 172, 172)

    def test_a_record_committed_again_at_its_place_is_no_copy(self, index: Index) -> None:
        for _ in range(2):
            committed = index.commit(Batch(None, NOW, records=[record(1, 1, 64)], packs=[progress(1, 500)]))
            assert committed.duplicates == 0
        row = index.packs()[0]
        assert (row.records, row.dead_records, row.live_bytes, row.dead_bytes) == (1, 0, 172, 0)

    def test_a_pack_never_shrinks_in_the_index(self, index: Index) -> None:
        index.commit(Batch(None, NOW, packs=[progress(1, 500)]))
        index.commit(Batch(None, NOW, packs=[progress(1, 400)]))
        index.commit(Batch(None, NOW, packs=[progress(2, 10), progress(1, 700, PackState.SEALED)]))
        assert [(r.number, r.committed_bytes, r.state) for r in index.packs()] == [
            (1, 700, PackState.SEALED),
            (2, 10, PackState.OPEN),
        ]

    def test_a_pack_that_was_cut_off_does_not_grow_again(self, index: Index) -> None:
        """An adoption that began before a collection may end after it."""
        index.commit(Batch(None, NOW, packs=[progress(1, 700, PackState.SEALED)]))
        index.update_pack(1, lambda row: replace(row, state=PackState.HOLED, committed_bytes=600))
        index.commit(Batch(None, NOW, packs=[progress(1, 700, PackState.SEALED)]))
        assert [(r.committed_bytes, r.state) for r in index.packs()] == [(600, PackState.HOLED)]

    def test_nothing_is_committed_if_something_relied_on_is_gone(self, index: Index) -> None:
        index.begin_session(session(1), 0)
        index.commit(Batch(None, NOW, records=[record(1, 1, 64)], packs=[progress(1, 500)]))
        committed = index.commit(
            Batch(
                sid(1),
                NOW + 5,
                records=[record(2, 2, 64)],
                relied={rid(1), rid(7), rid(8)},
                roots=[NodeId(rid(2))],
                packs=[progress(2, 500)],
                point=point(50),
                ends_session=True,
            )
        )
        assert committed.gone == {rid(7), rid(8)}
        assert index.lookup([rid(2)]) == [None]
        assert len(index.packs()) == 1
        assert index.points() == []
        assert list(index.roots(sid(1))) == []
        assert [row.heartbeat for row in index.sessions()] == [NOW]

    def test_nothing_is_committed_for_a_session_that_is_gone(self, index: Index) -> None:
        for ended in (False, True):
            if ended:
                index.begin_session(session(1), 0)
                index.end_session(sid(1))
            with pytest.raises(SessionGone):
                index.commit(Batch(sid(1), NOW, records=[record(1, 1, 64)], packs=[progress(1, 500)]))
            with pytest.raises(SessionGone):
                index.heartbeat(sid(1), NOW)
            assert index.lookup([rid(1)]) == [None]
            assert index.packs() == []

    def test_a_session_lives_from_its_begin_to_its_end(self, index: Index) -> None:
        assert index.begin_session(session(1), 0) == 0
        assert index.begin_session(session(2), 0) == 1
        assert index.begin_session(replace(session(3), kind="restore"), 0) == 0
        index.end_session(sid(3))
        index.heartbeat(sid(1), NOW + 60)
        assert {row.id: row.heartbeat for row in index.sessions()} == {sid(1): NOW + 60, sid(2): NOW}
        leaves = [NodeId(rid(n)) for n in range(300)]
        index.commit(Batch(sid(1), NOW + 61, roots=leaves))
        index.commit(Batch(sid(2), NOW + 61, roots=leaves[:5]))
        index.commit(Batch(sid(1), NOW + 61, roots=leaves[:7]))
        assert list(index.roots(sid(1))) == sorted(leaves)
        assert list(index.roots(sid(2))) == sorted(leaves[:5])
        index.end_session(sid(1))
        index.end_session(sid(1))
        assert list(index.roots(sid(1))) == []
        assert list(index.roots(sid(2))) == sorted(leaves[:5])
        assert [row.id for row in index.sessions()] == [sid(2)]

    def test_a_point_ends_its_session_in_one_transaction(self, index: Index) -> None:
        index.begin_session(session(1), 0)
        index.commit(Batch(sid(1), NOW, point=point(50), ends_session=True))
        assert index.points() == [point(50)]
        assert index.sessions() == []

    def test_roots_of_a_session_that_died_after_its_point_do_not_stay_for_ever(self, index: Index) -> None:
        index.begin_session(session(1), 0)
        index.commit(Batch(sid(1), NOW, roots=[NodeId(rid(n)) for n in range(20)]))
        index.commit(Batch(sid(1), NOW, point=point(50), ends_session=True))
        # the process dies here, before it could take its roots away
        index.begin_session(session(2), 0)
        index.commit(Batch(sid(2), NOW, roots=[NodeId(rid(99))]))
        index.begin_session(session(3), 0)
        assert list(index.roots(sid(1))) == []
        assert list(index.roots(sid(2))) == [rid(99)]

    def test_whatever_is_committed_changes_its_number(self, index: Index) -> None:
        seen = [index.changes()]
        assert index.changes() == seen[0]
        for change in (
            lambda: index.begin_session(session(1), 0),
            lambda: index.heartbeat(sid(1), NOW + 1),
            lambda: index.commit(Batch(None, NOW, records=[record(1, 1, 64)], packs=[progress(1, 500)])),
            lambda: index.commit(Batch(None, NOW, point=point(7))),
            lambda: index.commit(Batch(None, NOW, changes=[PointChange(PointId(rid(7)), 1, hidden=True)])),
            index.begin_collection,
        ):
            change()
            assert index.changes() != seen[-1]
            seen.append(index.changes())
        index.lookup([rid(1)])
        assert index.changes() == seen[-1]

    def test_sessions_without_a_sign_of_life_are_dropped_with_their_roots(self, index: Index) -> None:
        index.begin_session(session(1, NOW - 1000), 0)
        index.begin_session(session(2, NOW - 10), 0)
        index.commit(Batch(sid(2), NOW - 10, roots=[NodeId(rid(1))]))
        with_roots = Batch(sid(1), NOW - 1000, roots=[NodeId(rid(1)), NodeId(rid(2))])
        index.commit(with_roots)
        assert index.begin_session(session(3), NOW - 100) == 1
        assert {row.id for row in index.sessions()} == {sid(2), sid(3)}
        assert list(index.roots(sid(1))) == []
        assert list(index.roots(sid(2))) == [rid(1)]

    def test_a_session_can_hold_only_points_that_are_there(self, index: Index) -> None:
        index.commit(Batch(None, NOW, point=point(50)))
        index.commit(Batch(None, NOW, point=point(51, hidden=True)))
        index.begin_session(session(1, holds=(point(50).id,)), 0)
        for missing in (point(51).id, point(52).id):
            with pytest.raises(PointNotFound):
                index.begin_session(session(2, holds=(point(50).id, missing)), 0)
        assert [row.id for row in index.sessions()] == [sid(1)]
        assert index.sessions()[0].holds == (point(50).id,)

    def test_what_was_collected_is_known(self, index: Index) -> None:
        index.commit(Batch(None, NOW, point=point(50)))
        index.commit(Batch(None, NOW, point=point(51, hidden=True)))
        every = [point(number).id for number in (50, 51, 52, 53)]
        assert index.collected(every) == frozenset()
        index.begin_collection()
        index.note_collected([point(53).id])
        assert index.collected(every) == {point(51).id, point(53).id}
        assert index.collected([]) == frozenset()

    def test_copies_are_noted_of_points_that_are_there(self, index: Index) -> None:
        here, there = RepositoryId(b"h" * 16), RepositoryId(b"t" * 16)
        one, two, three = (point(number).id for number in (50, 51, 52))
        index.commit(Batch(None, NOW, point=point(50)))
        index.commit(Batch(None, NOW, point=point(51, hidden=True)))
        index.note_copies(CopiesFound(there, "ssh://nas/there", 10, [one, two, three], read=[one]))
        index.note_copies(CopiesFound(here, "/here", 11, [one], sampled=[one]))
        index.note_copies(CopiesFound(there, "ssh://nas/moved", 12, [one], sampled=[one]))
        expected = [
            CopyRow(one, here, 11, 11, 0, "/here"),
            CopyRow(one, there, 12, 12, 10, "ssh://nas/moved"),
            CopyRow(two, there, 10, 0, 0, "ssh://nas/there"),
        ]
        assert sorted(index.copies(), key=lambda row: (row.point != one, row.repository)) == expected
        index.note_copies(CopiesFound(there, "ssh://nas/moved", 13, [], absent=[one, three]))
        assert {(row.point, row.repository) for row in index.copies()} == {(one, here), (two, there)}
        index.begin_collection()
        assert [row.point for row in index.copies()] == [one]

    def test_a_point_that_is_listed_stays_as_it_is(self, index: Index) -> None:
        """Whoever meets its manifest again knows less than the index does."""
        index.commit(Batch(None, NOW, point=point(50)))
        index.commit(Batch(None, NOW, point=point(51)))
        index.commit(Batch(None, NOW, changes=[PointChange(point(50).id, 1, hidden=True)]))
        index.commit(Batch(None, NOW, point=point(50)))
        assert index.points() == sorted([point(50, hidden=True), point(51)], key=lambda row: row.id)

    def test_a_scan_meets_every_record_once_and_in_order(self, index: Index) -> None:
        batch = Batch(None, NOW, [record(n, 1, 64 + 200 * n) for n in range(500)], packs=[progress(1, 10**6)])
        index.commit(batch)
        met: list[RecordId] = []
        after: RecordId | None = None
        while page := index.scan(after, 37):
            met += [record_id for record_id, _ in page]
            assert len(page) <= 37
            after = met[-1]
        assert met == sorted(rid(n) for n in range(500))
        assert index.scan(RecordId(b"\xff" * 32), 5) == []
        assert [r for r, _ in index.scan(RecordId(bytes(32)), 1)] == met[:1]

    def test_a_verification_is_noted(self, index: Index) -> None:
        index.commit(Batch(None, NOW, packs=[progress(1, 500), progress(2, 500)]))
        index.set_verified(2, NOW)
        index.set_verified(77, NOW)
        assert [row.verified for row in index.packs()] == [0, NOW]
        index.commit(Batch(None, NOW, packs=[progress(2, 500, PackState.SEALED)]))
        assert [row.verified for row in index.packs()] == [0, NOW]
        index.commit(Batch(None, NOW, packs=[progress(2, 600)]))
        assert [row.verified for row in index.packs()] == [0, 0], "nobody has looked at what was appended"

    def test_what_was_dropped_as_damaged_is_lost_until_it_is_stored_again(self, index: Index) -> None:
        index.commit(
            Batch(None, NOW, records=[record(1, 1, 64), record(2, 1, 300)], packs=[progress(1, 500)])
        )
        assert index.lost() == frozenset()
        assert index.drop({rid(1): (1, 65), rid(2): (2, 300), rid(3): (1, 64)}).records == 0, (
            "moved meanwhile"
        )
        dropped = index.drop({rid(1): (1, 64), rid(3): (1, 64)})
        assert (dropped.records, dropped.bytes) == (1, 172)
        assert index.lost() == {rid(1)}
        assert index.lookup([rid(1)]) == [None]
        assert (index.packs()[0].records, index.packs()[0].dead_bytes) == (1, 172)
        index.commit(Batch(None, NOW, records=[record(1, 2, 64)], packs=[progress(2, 300)]))
        assert index.lost() == frozenset()

    def test_many_threads_commit_side_by_side(self, index: Index) -> None:
        failures: list[BaseException] = []

        def work(pack: int) -> None:
            try:
                for round_ in range(20):
                    records = [
                        record(1000 * pack + 10 * round_ + n, pack, 64 + 1000 * round_ + 100 * n)
                        for n in range(8)
                    ]
                    index.commit(
                        Batch(
                            None,
                            NOW,
                            [*records, record(7, pack, 30)],
                            packs=[progress(pack, 1000 * (round_ + 1))],
                        )
                    )
                    assert None not in index.lookup([r.id for r in records])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(pack,)) for pack in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert index.figures().records == 4 * 20 * 8 + 1
        assert sum(row.records for row in index.packs()) == 4 * 20 * 8 + 1
        assert sorted(row.number for row in index.packs()) == [1, 2, 3, 4]


class Comparison(RuleBasedStateMachine):
    """Everything that can be done to an index is done to both, and both must answer the same."""

    records = st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(0, 20)),
        max_size=12,
        unique_by=lambda r: r[0],
    )

    @initialize()
    def make(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.lmdb = LmdbIndex(self.folder.name, REPOSITORY, create=True)
        self.model = ModelIndex()
        self.now = NOW

    def both(self, act: Callable[[Index], object]) -> object:
        outcomes: list[object] = []
        for index in (self.lmdb, self.model):
            try:
                outcomes.append(act(index))
            except (SessionGone, PointNotFound) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    @rule(
        records=records,
        relied=st.sets(st.integers(0, 40), max_size=4),
        roots=st.lists(st.integers(0, 40), max_size=4),
        owner=st.none() | st.integers(1, 3),
        new_point=st.none() | st.integers(50, 55),
        sealed=st.booleans(),
        ends=st.booleans(),
    )
    def commit(self, records, relied, roots, owner, new_point, sealed, ends) -> None:
        self.now += 1
        state = PackState.SEALED if sealed else PackState.OPEN
        packs = sorted({pack for _, pack, _ in records})
        batch = Batch(
            session=None if owner is None else sid(owner),
            now=self.now,
            records=[record(n, pack, 64 + 200 * at) for n, pack, at in records],
            relied={rid(n) for n in relied},
            roots=[] if owner is None else [NodeId(rid(n)) for n in roots],
            packs=[
                progress(pack, max(at for _, p, at in records if p == pack) * 200, state) for pack in packs
            ],
            point=None if new_point is None else point(new_point),
            ends_session=ends and owner is not None,
        )
        self.both(lambda index: index.commit(batch))

    @rule(
        owner=st.integers(1, 3),
        age=st.sampled_from([0, 50]),
        expire=st.booleans(),
        holds=st.none() | st.integers(50, 55),
    )
    def begin_session(self, owner, age, expire, holds) -> None:
        held = () if holds is None else (point(holds).id,)
        row = session(owner, self.now - age, held)
        self.both(lambda index: index.begin_session(row, self.now - 25 if expire else 0))

    @rule(owner=st.integers(1, 3))
    def heartbeat(self, owner) -> None:
        self.both(lambda index: index.heartbeat(sid(owner), self.now))

    @rule(owner=st.integers(1, 3))
    def end_session(self, owner) -> None:
        self.both(lambda index: index.end_session(sid(owner)))

    @rule(numbers=st.sets(st.integers(0, 40), max_size=3))
    def collect(self, numbers) -> None:
        ids = {rid(n) for n in numbers}
        remove_rows(self.lmdb, ids)
        self.model.remove_records(ids)

    @rule(number=st.integers(1, 5))
    def verify(self, number) -> None:
        self.both(lambda index: index.set_verified(number, self.now))

    @rule()
    def reopen(self) -> None:
        self.lmdb.close()
        self.lmdb = LmdbIndex(self.folder.name, REPOSITORY)

    @rule(limit=st.integers(1, 9), after=st.none() | st.integers(0, 40))
    def scan(self, limit, after) -> None:
        self.both(lambda index: index.scan(None if after is None else rid(after), limit))

    @invariant()
    def both_hold_the_same(self) -> None:
        if not hasattr(self, "lmdb"):
            return
        self.both(lambda index: index.lookup([rid(n) for n in range(41)]))
        self.both(lambda index: index.packs())
        self.both(lambda index: index.points())
        self.both(lambda index: index.sessions())
        self.both(lambda index: [list(index.roots(sid(n))) for n in range(1, 4)])
        self.both(lambda index: replace(index.figures(), used_bytes=0))

    def teardown(self) -> None:
        if hasattr(self, "lmdb"):
            self.lmdb.close()
            self.folder.cleanup()


TestComparison = Comparison.TestCase
TestComparison.settings = settings(max_examples=40, stateful_step_count=30)


class TestLmdb:
    def test_a_transaction_that_changed_nothing_makes_it_no_older(self, tmp_path: Path) -> None:
        """LMDB does not count it, so the file `head` must not either."""
        for _ in range(3):
            index = LmdbIndex(str(tmp_path), REPOSITORY, create=True)
            index.commit(Batch(None, NOW, point=point(50)))
            index.commit(Batch(None, NOW, point=point(50)))
            index.close()

    def test_what_was_committed_is_there_after_reopening(self, tmp_path: Path) -> None:
        index = LmdbIndex(str(tmp_path), REPOSITORY, create=True)
        index.commit(Batch(None, NOW, [record(1, 1, 64)], packs=[progress(1, 500)], point=point(50)))
        index.close()
        index.close()
        again = LmdbIndex(str(tmp_path), REPOSITORY)
        assert again.lookup([rid(1)]) != [None]
        assert again.points() == [point(50)]
        again.close()

    def test_it_is_shared_within_a_process(self, tmp_path: Path) -> None:
        one = LmdbIndex(str(tmp_path), REPOSITORY, create=True)
        other = LmdbIndex(str(tmp_path), REPOSITORY)
        one.commit(Batch(None, NOW, [record(1, 1, 64)], packs=[progress(1, 500)]))
        assert other.lookup([rid(1)]) != [None]
        one.close()
        assert other.lookup([rid(1)]) != [None]
        other.close()

    def test_a_child_can_not_open_what_its_parent_has_open(self, tmp_path: Path) -> None:
        """LMDB forbids an environment across a fork: the child is told, and the parent takes no harm."""
        script = f"""
import os
from holdfast.errors import InternalError
from holdfast.ids import RepositoryId
from holdfast.repo.lmdb_index import LmdbIndex
mine = LmdbIndex({str(tmp_path)!r}, RepositoryId({REPOSITORY!r}), create=True)
child = os.fork()
if not child:
    try:
        LmdbIndex({str(tmp_path)!r}, RepositoryId({REPOSITORY!r}))
    except InternalError:
        pass
    try:
        mine.points()
    except InternalError:
        mine.close()
        os._exit(7)
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert mine.points() == []
mine.close()
print(os.waitstatus_to_exitcode(status))
"""
        outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert outcome.stdout.strip() == "7"

    @pytest.mark.parametrize("damage", ["empty", "missing", "garbage", "another"])
    def test_an_index_that_is_none_is_refused(self, tmp_path: Path, damage: str) -> None:
        LmdbIndex(str(tmp_path), REPOSITORY, create=True).close()
        data = tmp_path / "data.mdb"
        if damage == "empty":
            data.write_bytes(b"")
        elif damage == "garbage":
            data.write_bytes(random.Random(1).randbytes(100_000))
        elif damage == "missing":
            data.unlink()
        repository = RepositoryId(b"o" * 16) if damage == "another" else REPOSITORY
        with pytest.raises(DamagedIndex):
            LmdbIndex(str(tmp_path), repository)

    def test_an_index_that_fell_back_behind_a_point_is_noticed(self, tmp_path: Path) -> None:
        folder = tmp_path / "index"
        index = LmdbIndex(str(folder), REPOSITORY, create=True)
        index.commit(Batch(None, NOW, point=point(50)))
        index.close()
        old = (folder / "data.mdb").read_bytes()
        index = LmdbIndex(str(folder), REPOSITORY)
        index.commit(Batch(None, NOW, point=point(51)))
        index.close()
        (folder / "data.mdb").write_bytes(old)
        with pytest.raises(DamagedIndex, match="older"):
            LmdbIndex(str(folder), REPOSITORY)

    def test_replacing_it_under_a_user_is_noticed_before_anything_is_written(self, tmp_path: Path) -> None:
        index = LmdbIndex(str(tmp_path / "index"), REPOSITORY, create=True)
        os.rename(tmp_path / "index", tmp_path / "old")
        LmdbIndex(str(tmp_path / "index"), REPOSITORY, create=True).close()
        with pytest.raises(DamagedIndex):
            index.commit(Batch(None, NOW, [record(1, 1, 64)], packs=[progress(1, 500)]))
        index.close()

    def test_memory_of_the_process_does_not_reach_the_disk(self, tmp_path: Path) -> None:
        """Pages are written whole: their unused parts must not be what happened to be in memory before."""
        script = f"""
import gc, random
from holdfast.ids import RepositoryId
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.format.rows import PackState
from holdfast.repo.index import Batch, NewRecord, PackProgress
secret = [b"TOP SECRET PLAINTEXT " * (size // 21) for size in [4096, 4050, 8192, 12000, 2048] * 400]
index = LmdbIndex({str(tmp_path)!r}, RepositoryId({REPOSITORY!r}), create=True)
rng = random.Random(1)
pack = bytes(16)
for round in range(10):
    copies = [bytes(bytearray(s)) for s in secret]
    del copies
    gc.collect()
    index.commit(Batch(None, 1, [NewRecord(rng.randbytes(32), pack, 64, 1, 1, 1) for _ in range(500)],
        packs=[PackProgress(pack, 100, PackState.OPEN, 1)]))
index.close()
"""
        subprocess.run([sys.executable, "-c", script], check=True)
        assert b"TOP SECRET" not in (tmp_path / "data.mdb").read_bytes()

    def test_two_processes_commit_side_by_side(self, tmp_path: Path) -> None:
        LmdbIndex(str(tmp_path), REPOSITORY, create=True).close()
        script = f"""
import json, sys
from holdfast.ids import RepositoryId
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.format.rows import PackState
from holdfast.repo.index import Batch, NewRecord, PackProgress
me = int(sys.argv[1])
index = LmdbIndex({str(tmp_path)!r}, RepositoryId({REPOSITORY!r}))
print("ready", flush=True)
sys.stdin.readline()
duplicates = 0
for n in range(50):
    own = NewRecord(bytes([me, n]) * 16, bytes([me]) * 16, 64 + n, 10, 10, 1)
    shared = NewRecord(bytes([99, n]) * 16, bytes([me]) * 16, 1000 + n, 10, 10, 1)
    duplicates += index.commit(Batch(None, 1, [own, shared],
        packs=[PackProgress(bytes([me]) * 16, n, PackState.OPEN, 1)])).duplicates
print(json.dumps(duplicates))
index.close()
"""
        children = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(n)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for n in (1, 2)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        outputs = [json.loads(child.communicate()[0]) for child in children]
        assert sum(outputs) == 50
        index = LmdbIndex(str(tmp_path), REPOSITORY)
        assert index.figures().records == 150
        assert sum(row.records for row in index.packs()) == 150
        index.close()
