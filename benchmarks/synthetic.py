"""Large repositories made quickly: the engine's own records, tables and rows, but chunks without payloads.

Packs are laid out as backups lay them out: the chunks of a segment, its leaf, and at the end of a point its inner
nodes and its manifest. Nodes and manifests are real records, written where they would lie; chunks are holes in the
pack's file, and rows of the table and the index. What reads no chunk (listing, planning, marking, sweeping, giving
back) does just what it would do in a real repository of that size.

The maker remembers which leaf each point has in each segment and which chunks each leaf names, so that what has to
be left after any points were forgotten can be computed without asking the engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import blake3
import lmdb
import numpy as np
import numpy.typing as npt

from holdfast.disk import DiskInfo
from holdfast.ids import (
    HOLE_ID,
    ID_BYTES,
    ChunkId,
    NodeId,
    PackId,
    PointId,
    RecordId,
    RepositoryId,
    SessionId,
)
from holdfast.repo.codec import Sealer, strong_hash
from holdfast.repo.format.manifest import (
    ContentTree,
    Manifest,
    PointDisk,
    PointStatistics,
    encode_manifest,
)
from holdfast.repo.format.node import Leaf, encode_leaf
from holdfast.repo.format.record import (
    PACK_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    TABLE_ENTRY_BYTES,
    Codec,
    Kind,
    PackFooter,
    PackHeader,
    RecordHeader,
    decode_table,
    encode_pack_footer,
    encode_pack_header,
    encode_record_header,
)
from holdfast.repo.format.rows import (
    PLACE_BYTES,
    PackRow,
    PackState,
    Place,
    PointRow,
    encode_counter,
    encode_pack_row,
    encode_place,
    pack_key,
)
from holdfast.repo.index import Batch
from holdfast.repo.keys import clear_keys
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.tree import LeafTable, build_tree

__all__ = ["PACK_BYTES", "SEGMENT_BYTES", "STORED_BYTES", "Made", "Shape", "make"]

SEGMENT_BYTES = 16 << 20
PACK_BYTES = 256 << 20
STORED_BYTES = 25_000
"""Of each chunk; with its header it takes 72 more."""
_RECORD = RECORD_HEADER_BYTES + STORED_BYTES
_BLOCK = 4096
_MAP_BYTES = 64 << 30
_START = 1_700_000_000
_ENTRY = np.dtype(
    [("id", "V32"), ("offset", "<u4"), ("stored", "<u4"), ("plain", "<u4"), ("kind", "u1"), ("codec", "u1"), ("flags", "<u2")]
)  # fmt: skip
assert _ENTRY.itemsize == TABLE_ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Shape:
    """What to make: VMs of one disk each, all with the same number of points, one a day.

    Args:
        segments: of each disk, 16 MiB each.
        changed: segments that differ from one point to the next.
        hot: where changes happen: among so many segments of the disk.
        fresh: of the chunks of a changed segment, so many are new.
    """

    vms: int
    points: int
    segments: int
    changed: int
    hot: int
    fresh: int
    chunks_per_leaf: int = 180

    @property
    def chunks(self) -> int:
        """How many different ones there are."""
        first = self.segments * self.chunks_per_leaf
        return self.vms * (first + (self.points - 1) * self.changed * self.fresh)


@dataclass
class Made:
    """A repository that was made.

    Args:
        chunk_ids: 32 bytes each, by number.
        leaf_chunks: by leaf, the numbers of its chunks.
        leaf_ids: by leaf.
        leaf_life: by leaf: its VM, the first point that has it, and the first that has it no more.
        inner: by VM and point the ids of all inner nodes.
        point_ids: by VM and point, oldest first.
        node_bytes: stored bytes of all nodes, with headers.
    """

    shape: Shape
    chunk_ids: npt.NDArray[np.void]
    leaf_chunks: npt.NDArray[np.int32]
    leaf_ids: list[bytes] = field(default_factory=list)
    leaf_life: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    inner: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)
    point_ids: dict[tuple[int, int], PointId] = field(default_factory=dict)
    node_bytes: int = 0

    def needed(self, kept: npt.NDArray[np.bool_]) -> tuple[set[bytes], npt.NDArray[np.bool_]]:
        """The ids of nodes and manifests that some points need, and for each chunk whether they need it.

        Args:
            kept: by VM and point.
        """
        before = np.concatenate([np.zeros((self.shape.vms, 1), np.int64), kept.cumsum(axis=1)], axis=1)
        vm, first, end = self.leaf_life.T
        leaves = before[vm, end] > before[vm, first]
        chunks = np.zeros(len(self.chunk_ids), bool)
        chunks[self.leaf_chunks[leaves].ravel()] = True
        ids = {self.leaf_ids[at] for at in np.flatnonzero(leaves).tolist()}
        for which, point_id in self.point_ids.items():
            if kept[which]:
                ids.add(bytes(point_id))
                ids.update(self.inner[which])
        return ids, chunks


class _Packs:
    """Writes packs; remembers rows."""

    def __init__(self, folder: str, repository: RepositoryId, sealer: Sealer) -> None:
        self._folder = folder
        self._repository = repository
        self._sealer = sealer
        self.rows: list[PackRow] = []
        self.nodes: list[tuple[bytes, Place]] = []
        self._begin()

    def _begin(self) -> None:
        self.id = PackId(os.urandom(16))
        name = self.id.hex()
        os.makedirs(os.path.join(self._folder, name[:2]), exist_ok=True)
        path = os.path.join(self._folder, name[:2], name + ".pack")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        os.write(self._fd, encode_pack_header(PackHeader(self.id, self._repository, _START * 1000)))
        self.length = PACK_HEADER_BYTES
        self._entries: list[npt.NDArray[np.void]] = []

    @property
    def number(self) -> int:
        """Of the pack that is being written."""
        return len(self.rows) + 1

    def chunks(self, ids: npt.NDArray[np.void], plain: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Leaves room for chunks; returns their offsets."""
        entries = np.zeros(len(ids), _ENTRY)
        entries["id"] = ids
        entries["offset"] = self.length + _RECORD * np.arange(len(ids))
        entries["stored"], entries["plain"] = STORED_BYTES, plain
        entries["kind"], entries["codec"] = Kind.CHUNK, Codec.ZSTD
        self._entries.append(entries)
        self.length += _RECORD * len(ids)
        return entries["offset"]

    def record(self, kind: Kind, record_id: bytes, plaintext: bytes) -> bytes:
        """Writes a real record; returns it."""
        sealed = self._sealer.seal(kind, RecordId(record_id), plaintext)
        header = sealed.header
        data = sealed.to_bytes(self.id)
        os.pwrite(self._fd, data, self.length)
        row = (record_id, self.length, header.stored_bytes, header.plain_bytes, kind, header.codec, 0)
        self._entries.append(np.array([row], _ENTRY))
        self.nodes.append(
            (
                record_id,
                Place(self.number, self.length, header.stored_bytes, header.plain_bytes, 1, int(kind)),
            )
        )
        self.length += len(data)
        return data

    def seal(self) -> None:
        """Ends the pack as a session does."""
        entries = np.concatenate(self._entries)
        plaintext = entries.tobytes()
        if not self.rows:
            assert len(decode_table(plaintext)) == len(entries), "the first table is no table"
        table_id = RecordId(blake3.blake3(plaintext).digest())
        size = len(plaintext)
        header = RecordHeader(Kind.TABLE, Codec.RAW, 0, size, size, table_id, strong_hash(plaintext))
        footer = encode_pack_footer(PackFooter(self.length, len(entries)), self.id)
        os.pwrite(self._fd, encode_record_header(header, self.id) + plaintext + footer, self.length)
        live = int(entries["stored"].sum(dtype=np.int64)) + RECORD_HEADER_BYTES * len(entries)
        assert live == self.length - PACK_HEADER_BYTES
        self.rows.append(
            PackRow(
                self.number, self.id, PackState.SEALED, os.fstat(self._fd).st_size, len(entries), 0, live, 0, _START, 0
            )
        )  # fmt: skip
        os.close(self._fd)

    def next_if_full(self) -> None:
        """Goes on with another pack if this one is full."""
        if self.length >= PACK_BYTES:
            self.seal()
            self._begin()


def _lengths(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    """The parts of a segment, in bytes."""
    blocks = SEGMENT_BYTES // _BLOCK
    cuts = np.sort(rng.choice(blocks - 1, count - 1, replace=False) + 1)
    return np.asarray(np.diff(np.concatenate([[0], cuts, [blocks]])) * _BLOCK)


def make(folder: str, repository: RepositoryId, shape: Shape, seed: int = 1) -> Made:
    """Fills a new, empty repository without encryption.

    The same shape and seed give the same restore points.

    Args:
        folder: of the repository.
    """
    rng = np.random.default_rng(seed)
    keys = clear_keys()
    total, per_leaf = shape.chunks, shape.chunks_per_leaf
    chunk_ids = np.frombuffer(rng.bytes(ID_BYTES * total), "V32")
    leaves = shape.vms * (shape.segments + (shape.points - 1) * shape.changed)
    made = Made(shape, chunk_ids, np.zeros((leaves, per_leaf), np.int32))
    made.leaf_life = np.zeros((leaves, 3), np.int32)
    chunk_pack, chunk_offset = np.zeros(total, np.uint32), np.zeros(total, np.uint32)
    chunk_plain = np.zeros(total, np.uint32)
    packs = _Packs(os.path.join(folder, "packs"), repository, Sealer(keys, 1))
    tables = [LeafTable(shape.segments) for _ in range(shape.vms)]
    current = np.full((shape.vms, shape.segments), -1, np.int64)
    parts = [_lengths(rng, per_leaf) for _ in range(64)]
    hot = [rng.choice(shape.segments, shape.hot, replace=False) for _ in range(shape.vms)]
    points: list[PointRow] = []
    used = 0

    def leaf(vm: int, segment: int, point: int) -> None:
        nonlocal used
        number, before = len(made.leaf_ids), int(current[vm, segment])
        lengths = parts[(vm + segment) % len(parts)]
        own = made.leaf_chunks[number]
        if before < 0:
            places = np.arange(per_leaf)
        else:
            made.leaf_life[before, 2] = point
            own[:] = made.leaf_chunks[before]
            places = np.sort(rng.choice(per_leaf, shape.fresh, replace=False))
        fresh = np.arange(used, used + len(places))
        used += len(places)
        own[places] = fresh
        chunk_plain[fresh] = lengths[places]
        chunk_pack[fresh] = packs.number
        chunk_offset[fresh] = packs.chunks(chunk_ids[fresh], chunk_plain[fresh])
        names = chunk_ids[own].tobytes()
        ids = tuple(ChunkId(RecordId(names[at : at + ID_BYTES])) for at in range(0, len(names), ID_BYTES))
        plaintext = encode_leaf(Leaf(tuple(lengths.tolist()), ids))
        node = keys.record_id(Kind.NODE, plaintext)
        made.node_bytes += len(packs.record(Kind.NODE, node, plaintext))
        made.leaf_ids.append(bytes(node))
        made.leaf_life[number] = vm, point, shape.points
        current[vm, segment] = number
        tables[vm][segment] = NodeId(node)
        packs.next_if_full()

    known: set[bytes] = set()
    for point in range(shape.points):
        for vm in range(shape.vms):
            changed: Sequence[int] = range(shape.segments)
            if point:
                changed = np.sort(rng.choice(hot[vm], shape.changed, replace=False)).tolist()
            for segment in changed:
                leaf(vm, segment, point)
            store: list[tuple[NodeId, bytes]] = []
            root = build_tree(tables[vm], keys, store)
            made.inner[vm, point] = [bytes(node) for node, _ in store]
            for node, plaintext in store:
                if node not in known:
                    known.add(bytes(node))
                    made.node_bytes += len(packs.record(Kind.NODE, node, plaintext))
            manifest = _manifest(shape, vm, point, root)
            point_id = PointId(keys.record_id(Kind.MANIFEST, manifest))
            record = packs.record(Kind.MANIFEST, point_id, manifest)
            points.append(PointRow(point_id, hidden=False, pinned=False, pack=packs.id, record=record))
            made.point_ids[vm, point] = point_id
            packs.next_if_full()
    packs.seal()
    assert (used, len(made.leaf_ids)) == (total, leaves)
    place = os.path.join(folder, "index")
    _load(place, made, (chunk_pack, chunk_offset, chunk_plain), packs)
    index = LmdbIndex(place, repository)
    for row in points:
        index.commit(Batch(None, _START, point=row))
    index.close()
    return made


def _manifest(shape: Shape, vm: int, point: int, root: NodeId) -> bytes:
    assert root != HOLE_ID
    when = _START + 86400 * point + 60 * vm
    return encode_manifest(
        Manifest(
            session=SessionId((vm << 32 | point + 1).to_bytes(16, "big")),
            kind="vm",
            vm_uuid=f"{vm + 1:032x}",
            vm_name=f"vm{vm}",
            host="synthetic",
            origin="made by benchmarks/synthetic.py",
            time=when,
            received_ms=when * 1000,
            segment_bytes=SEGMENT_BYTES,
            chunker="aligned",
            chunk_size_bytes=64 << 10,
            disks=(
                PointDisk(
                    DiskInfo("disk0.raw", shape.segments * SEGMENT_BYTES, "raw"),
                    ContentTree(shape.segments * SEGMENT_BYTES, root, SEGMENT_BYTES),
                ),
            ),
            files=(),
            folders=(),
            labels=(),
            warnings=(),
            parent="",
            tool="synthetic",
            statistics=PointStatistics(0, 0, 0, 0, 0, 0),
        )
    )


def _load(
    folder: str,
    made: Made,
    places: tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], npt.NDArray[np.uint32]],
    packs: _Packs,
) -> None:
    """Fills the tables of the index, every second key first, so that pages are as full as insertion leaves them."""
    pack, offset, plain = places
    total = len(made.chunk_ids)
    heads = np.frombuffer(made.chunk_ids.tobytes(), ">u8").reshape(total, 4)[:, 0]
    order = np.argsort(heads, kind="stable")
    step = 200_000
    env = lmdb.open(
        folder, map_size=_MAP_BYTES, max_dbs=8, create=False, sync=False, writemap=False, meminit=False
    )
    chunks, table, meta = (env.open_db(name, create=False) for name in (b"chunks", b"packs", b"meta"))
    for odd in (0, 1):
        for first in range(0, total, step):
            mine = order[first : first + step][odd::2]
            names = made.chunk_ids[mine].tobytes()
            columns = zip(pack[mine].tolist(), offset[mine].tolist(), plain[mine].tolist(), strict=True)
            rows = []
            for at, (number, start, length) in enumerate(columns):
                key = RecordId(names[ID_BYTES * at : ID_BYTES * at + ID_BYTES])
                rows.append(
                    (key, encode_place(key, Place(number, start, STORED_BYTES, length, 1, Kind.CHUNK)))
                )
            with env.begin(write=True, db=chunks) as txn:
                txn.cursor(chunks).putmulti(rows, append=not odd)
    with env.begin(write=True) as txn:
        for record_id, place in sorted(packs.nodes):
            value = encode_place(RecordId(record_id), place)
            assert len(value) == PLACE_BYTES
            txn.put(record_id, value, db=chunks)
        for row in packs.rows:
            txn.put(pack_key(row.number), encode_pack_row(row), db=table)
        txn.put(b"next_pack", encode_counter(b"next_pack", len(packs.rows) + 1), db=meta)
    env.sync(True)
    env.close()
