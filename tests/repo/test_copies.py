"""What a replication notes of copies, on which side, and when a far side is told again."""

from __future__ import annotations

import pytest
from rig.faults import Faults, FaultyIndex, disk_full
from rig.model_index import ModelIndex

from holdfast.ids import PackId, PointId, RecordId, RepositoryId
from holdfast.repo.copies import SeenCopies, Side, note_copies
from holdfast.repo.format.rows import PointRow
from holdfast.repo.index import Batch, Index

HERE, THERE = RepositoryId(b"h" * 16), RepositoryId(b"t" * 16)
DAY_S = 86_400
NOW = 1_700_000_000


def point(number: int) -> PointId:
    return PointId(RecordId(bytes([number]) * 32))


def index(*numbers: int) -> ModelIndex:
    made = ModelIndex()
    for number in numbers:
        made.commit(Batch(None, NOW, point=PointRow(point(number), False, False, PackId(b"p" * 16), b"r")))
    return made


def here(of: Index, *, noted: bool = True) -> Side:
    return Side(of, HERE, "/srv/here", is_far=False, noted=noted)


def far(of: Index, *, noted: bool = True) -> Side:
    return Side(of, THERE, "ssh://nas/there", is_far=True, noted=noted)


def times(of: Index) -> dict[bytes, tuple[int, int, int]]:
    return {row.point[:1]: (row.compared, row.sampled, row.read) for row in of.copies()}


SEEN = SeenCopies([(point(1), point(11)), (point(2), point(12))])


def test_each_side_is_told_its_own_ids_and_only_the_source_of_proofs() -> None:
    one, other = index(1, 2), index(11, 12)
    seen = SeenCopies(SEEN.pairs, proven={point(12)}, whole=True)
    note_copies(here(one), far(other), seen, NOW)
    assert times(one) == {b"\x01": (NOW, 0, 0), b"\x02": (NOW, 0, NOW)}
    assert times(other) == {b"\x0b": (NOW, 0, 0), b"\x0c": (NOW, 0, 0)}
    assert {row.address for row in one.copies()} == {"ssh://nas/there"}
    assert {row.address.partition(":")[2] for row in other.copies()} == {"/srv/here"}
    note_copies(here(one), far(other), SeenCopies(SEEN.pairs, proven={point(11)}), NOW + 5)
    assert times(one) == {b"\x01": (NOW + 5, NOW + 5, 0), b"\x02": (NOW + 5, 0, NOW)}


def test_a_far_side_is_told_again_by_the_first_run_of_a_day() -> None:
    one, other = index(1, 2), index(11, 12)
    midnight = NOW // DAY_S * DAY_S + DAY_S
    for when, told in ((-7200, -7200), (-3600, -7200), (-1, -7200), (0, 0), (3600, 0), (DAY_S, DAY_S)):
        note_copies(here(one), far(other), SEEN, midnight + when)
        assert times(one)[b"\x01"][0] == midnight + when
        assert times(other)[b"\x0b"][0] == midnight + told


def test_what_is_new_is_told_at_once() -> None:
    one, other = index(1, 2), index(11, 12)
    note_copies(here(one), far(other), SeenCopies(SEEN.pairs[:1]), NOW)
    note_copies(here(one), far(other), SEEN, NOW + 1)
    assert times(other) == {b"\x0b": (NOW + 1, 0, 0), b"\x0c": (NOW + 1, 0, 0)}


def test_what_is_not_there_any_more_is_no_copy() -> None:
    one, other = index(1, 2), index(11, 12)
    for source, target, when in ((here(one), far(other), NOW), (far(other), here(one), NOW + DAY_S)):
        note_copies(here(one), far(other), SEEN, when - 1)
        absent = source.index.copies()[1].point
        left = SeenCopies([(source.index.copies()[0].point, target.index.copies()[0].point)], absent=[absent])
        note_copies(source, target, left, when + 2 * DAY_S)
        assert [row.point for row in source.index.copies()] == [left.pairs[0][0]]


@pytest.mark.parametrize("limited", ["here", "there"])
def test_a_side_that_may_not_be_changed_is_not_noted(limited: str) -> None:
    one, other = index(1, 2), index(11, 12)
    note_copies(here(one, noted=limited != "here"), far(other, noted=limited != "there"), SEEN, NOW)
    assert (times(one) == {}) == (limited == "here")
    assert (times(other) == {}) == (limited == "there")


def test_a_full_disk_on_one_side_is_no_fault() -> None:
    one, other = index(1, 2), index(11, 12)
    faults = Faults(lambda _number, _name: disk_full(), frozenset({"note_copies"}))
    full = FaultyIndex(one, faults)
    note_copies(here(full), far(other), SEEN, NOW)
    assert faults.fired == 1
    assert times(one) == {}
    assert len(times(other)) == 2
