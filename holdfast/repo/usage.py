"""What removing restore points would free, computed from the trees (never guessed).

Points are put into groups; a record belongs to a group if only points of that group need it. Nodes are settled
by the inner nodes alone: what several groups share is never read. Of the leaves that one group has for itself,
the chunks are looked for in all other leaves, each of which is read once.

Memory: about 200 bytes per unique node, 12 bytes per chunk that a leaf of a single group names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.ids import HOLE_ID, ID_BYTES, NodeId, PointId, RecordId
from holdfast.repo.check import contents_of
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind
from holdfast.repo.format.rows import PLACE_BYTES
from holdfast.repo.index import Index
from holdfast.repo.points import Point
from holdfast.repo.records import RecordReader
from holdfast.repo.tree import TreeReader
from holdfast.repo.walk import read_node

__all__ = ["exclusive_bytes"]

_SHARED: Final = -1
_AT_ONCE: Final = 2048
_SCAN_ROWS: Final = 100_000

_Prefixes = npt.NDArray[np.uint64]
_Owners = npt.NDArray[np.int32]


def exclusive_bytes(
    records: RecordReader,
    trees: TreeReader,
    index: Index,
    points: Sequence[Point],
    groups: Mapping[PointId, int],
) -> dict[int, int]:
    """For each group the stored bytes, headers included, that nothing but its points needs.

    Args:
        points: all restore points that there are.
        groups: of each point, numbered from 0.

    Raises:
        DamagedData: a node can not be read.
    """
    owners = _NodeOwners(records)
    for point in points:
        for _, content in contents_of(point.manifest):
            owners.visit(content.root, trees.height(content), groups[point.id])
    total = dict.fromkeys(groups.values(), 0)
    own_leaves = [leaf for leaf, owner in owners.leaves.items() if owner != _SHARED]
    shared_leaves = [leaf for leaf, owner in owners.leaves.items() if owner == _SHARED]
    parts: list[_Prefixes] = []
    part_owners: list[_Owners] = []
    for leaf, ids in _chunks(records, own_leaves):
        prefixes = _prefixes(ids)
        parts.append(prefixes)
        part_owners.append(np.full(len(prefixes), owners.leaves[leaf], np.int32))
    prefix, owner = _settled(parts, part_owners)
    for _, ids in _chunks(records, shared_leaves):
        owner[_places(prefix, _prefixes(ids))] = _SHARED
    nodes = [(node, group) for node, group in (owners.leaves | owners.inner).items() if group != _SHARED]
    single = [(RecordId(node), group) for node, group in nodes]
    single += [(RecordId(point.id), groups[point.id]) for point in points]
    prefix = np.concatenate([prefix, _prefixes(b"".join(i for i, _ in single))])
    owner = np.concatenate([owner, np.array([group for _, group in single], np.int32)])
    order = np.argsort(prefix, kind="stable")
    for group, size in _sizes(index, prefix[order], owner[order]).items():
        total[group] += size
    return total


class _NodeOwners:
    """Which group each node belongs to."""

    def __init__(self, records: RecordReader) -> None:
        self._records = records
        self.inner: dict[NodeId, int] = {}
        self.leaves: dict[NodeId, int] = {}
        self._children: dict[NodeId, list[NodeId]] = {}

    def visit(self, root: NodeId, height: int, group: int) -> None:
        """Takes in the tree below a node for a group."""
        pending = [(root, height)] if root != HOLE_ID else []
        while pending:
            node, level = pending.pop()
            table = self.inner if level else self.leaves
            before = table.get(node)
            if before is None:
                table[node] = group
            elif before in (_SHARED, group):
                continue  # and so is all below it
            else:
                table[node] = _SHARED
                self._share(node, level)
                continue
            if level:
                pending += [(child, level - 1) for child in self._below(node)]

    def _share(self, root: NodeId, level: int) -> None:
        pending = [(child, level - 1) for child in self._below(root)] if level else []
        while pending:
            node, height = pending.pop()
            table = self.inner if height else self.leaves
            if table.get(node) == _SHARED:
                continue
            table[node] = _SHARED
            if height:
                pending += [(child, height - 1) for child in self._below(node)]

    def _below(self, node: NodeId) -> list[NodeId]:
        found = self._children.get(node)
        if found is None:
            found = read_node(node, self._records.load_one(node, Kind.NODE)).children()
            self._children[node] = found
        return found


def _chunks(records: RecordReader, leaves: Sequence[NodeId]) -> Iterable[tuple[NodeId, bytes]]:
    for first in range(0, len(leaves), _AT_ONCE):
        for leaf, data in records.each(leaves[first : first + _AT_ONCE], Kind.NODE):
            yield NodeId(leaf), read_node(NodeId(leaf), data).ids


def _prefixes(ids: bytes) -> _Prefixes:
    """The first 8 bytes of each id. Of a thousand million ids, two share them once in forty repositories."""
    return np.frombuffer(ids, "<u8").reshape(-1, ID_BYTES // 8)[:, 0].copy()


def _settled(parts: list[_Prefixes], owners: list[_Owners]) -> tuple[_Prefixes, _Owners]:
    """Each prefix once, ascending, with its owner, which is `_SHARED` if there are several."""
    if not parts:
        return np.empty(0, np.uint64), np.empty(0, np.int32)
    prefix, owner = np.concatenate(parts), np.concatenate(owners)
    order = np.lexsort((owner, prefix))
    prefix, owner = prefix[order], owner[order]
    starts = np.flatnonzero(np.concatenate([[True], prefix[1:] != prefix[:-1]]))
    ends = np.concatenate([starts[1:], [len(prefix)]]) - 1
    return prefix[starts], np.where(owner[starts] == owner[ends], owner[starts], _SHARED).astype(np.int32)


def _places(prefix: _Prefixes, asked: _Prefixes) -> npt.NDArray[np.intp]:
    """Where those of the asked ones that are there are."""
    if not len(prefix):
        return np.empty(0, np.intp)
    at = np.minimum(np.searchsorted(prefix, asked), len(prefix) - 1)
    return np.asarray(at[prefix[at] == asked])


def _sizes(index: Index, prefix: _Prefixes, owner: _Owners) -> dict[int, int]:
    """Stored bytes by owner, from one pass over the index."""
    total: dict[int, int] = {}
    after: RecordId | None = None
    while len(prefix):
        keys, values = index.scan_rows(after, _SCAN_ROWS)
        if not keys:
            break
        found = _prefixes(keys)
        stored = np.frombuffer(values, np.uint8).reshape(-1, PLACE_BYTES)[:, 8:12].copy().view("<u4").ravel()
        at = np.minimum(np.searchsorted(prefix, found), len(prefix) - 1)
        hit = prefix[at] == found
        groups, sizes = owner[at[hit]], stored[hit].astype(np.int64) + RECORD_HEADER_BYTES
        for group in np.unique(groups).tolist():
            if group != _SHARED:
                total[group] = total.get(group, 0) + int(sizes[groups == group].sum())
        after = RecordId(keys[-ID_BYTES:])
    return total
