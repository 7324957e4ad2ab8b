"""One segment on its way into the repository: how often it is asked for what it does not have."""

from __future__ import annotations

import random
from collections.abc import Sequence

from holdfast.ids import ChunkId, NodeId, RecordId
from holdfast.repo.codec import Sealer
from holdfast.repo.format.record import Kind
from holdfast.repo.keys import clear_keys
from holdfast.repo.session import Segment
from holdfast.repo.storing import Storing

KEYS = clear_keys()


class Commits:
    """Takes records in as a session does, with commits of others in between: after these appends, by number."""

    def __init__(self, after: set[int]) -> None:
        self._after = after
        self._generation = 0
        self._appends = 0
        self.stored: list[RecordId] = []
        self.asked: list[int] = []

    def generation(self) -> int:
        return self._generation

    def unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        self.asked.append(len(ids))
        return set(ids) - set(self.stored)

    def append(self, segment: Segment, generation: int) -> int:
        records = [sealed.header.id for sealed in segment.records]
        if generation != self._generation and records:
            records = [one for one in records if one in self.unknown(records)]
        self.stored += records
        self._appends += 1
        self._generation += self._appends in self._after
        return 0

    def flush(self) -> None:
        raise AssertionError("nobody asked for it")


def stored(commits: Commits) -> list[RecordId]:
    """Has a segment of 4 MiB of noise stored, of which a part comes twice; returns what it should have come to."""
    noise = random.Random(3).randbytes(4 << 20)
    pieces = [memoryview(noise)[at : at + 65536] for at in range(0, len(noise), 65536)]
    ids = [ChunkId(KEYS.record_id(Kind.CHUNK, piece)) for piece in pieces]
    leaf = NodeId(KEYS.record_id(Kind.NODE, b"leaf"))
    storing = Storing(commits, Sealer(KEYS, 0), None, lambda: None)
    storing.add_whole([*ids, *ids[:5]], [*pieces, *pieces[:5]], leaf, b"leaf")
    return [*ids, leaf]


def test_a_whole_segment_asks_once() -> None:
    commits = Commits(set())
    expected = stored(commits)
    assert commits.stored == expected
    assert commits.asked == [len(expected)]


def test_after_a_commit_it_asks_once_more_for_what_is_left() -> None:
    commits = Commits({2})
    expected = stored(commits)
    assert commits.stored == expected
    assert commits.asked == [len(expected), len(expected) - 16]


def test_what_somebody_else_has_committed_meanwhile_is_not_stored_again() -> None:
    expected = stored(Commits(set()))
    commits = Commits({2})
    ask = commits.unknown

    def unknown(ids: Sequence[RecordId]) -> set[RecordId]:
        return ask(ids) - ({expected[20]} if commits.generation() else set())

    commits.unknown = unknown  # type: ignore[method-assign]
    stored(commits)
    assert commits.stored == [one for one in expected if one != expected[20]]
