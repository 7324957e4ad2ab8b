"""Repositories for tests: a real folder, or memory that can lose power, opened with or without faults.

A `World` is what outlives processes: packs and index. `open` starts a process on it, with the real
`Repository` on top; `Truth` remembers what each restore point must give back.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from holdfast.disk import Machine
from holdfast.ids import PackId, RecordId
from holdfast.repo.backup import BackupOptions, BackupSummary
from holdfast.repo.check import CheckReport, contents_of
from holdfast.repo.format import rows
from holdfast.repo.format.record import Kind
from holdfast.repo.index import Index
from holdfast.repo.lmdb_index import LmdbIndex
from holdfast.repo.packs import LocalPackStore, PackStore
from holdfast.repo.points import Point
from holdfast.repo.records import PackScanner
from holdfast.repo.recover import rebuild_index
from holdfast.repo.repository import InitOptions, Repository
from rig.disks import KIB, MIB, MemorySink, machine_of
from rig.faults import Faults, FaultyIndex, FaultyPackStore
from rig.model_index import ModelIndex, swept
from rig.stores import MemoryPackStore

SMALL = InitOptions(
    chunker="fixed", chunk_size_bytes=64 * KIB, segment_bytes=MIB, pack_bytes=MIB, compression_level=1
)
"""Many segments and packs out of little data."""

ONE_WORKER = BackupOptions(workers=1)


def quiet(_message: str) -> None:
    """A `notify` that says nothing."""


class World(Protocol):
    """What outlives a process."""

    path: str
    store: PackStore

    def open(self, faults: Faults | None = None, password: str | None = None) -> Repository: ...

    def kill(self, repository: Repository, faults: Faults) -> None:
        """The process of this repository is gone (kill -9)."""
        ...

    def lose_power(self, rng: random.Random) -> None:
        """All processes are gone, and what was not synced may be."""
        ...

    def drop_index(self) -> None:
        """The index is deleted; it is rebuilt by the next `open`, or by its first use."""
        ...

    def remove_records(self, repository: Repository, ids: set[RecordId]) -> None:
        """Takes rows out of the index, as garbage collection will."""
        ...


class MemoryWorld:
    """Packs and index in memory; only `config.json` is in the folder."""

    def __init__(self, path: Path, options: InitOptions = SMALL, password: str | None = None) -> None:
        self.path = str(path)
        Repository.init(self.path, options, password=password, notify=quiet).close()
        shutil.rmtree(os.path.join(self.path, "index"))
        self.store = MemoryPackStore()
        self.index = ModelIndex()

    def open(self, faults: Faults | None = None, password: str | None = None) -> Repository:
        repository = Repository.open(self.path, password=password, notify=quiet)
        store: PackStore = self.store
        index: Index = self.index
        if faults is not None:
            store, index = FaultyPackStore(store, faults), FaultyIndex(index, faults)
        repository._store = store  # type: ignore[assignment]
        repository._index_ = index
        return repository

    def copy(self) -> MemoryWorld:
        """The same state once more, to be spoilt in another way."""
        other = object.__new__(MemoryWorld)
        other.path, other.store, other.index = self.path, self.store.copy(), self.index.copy()
        return other

    def kill(self, repository: Repository, faults: Faults) -> None:
        faults.die()
        faults.close_descriptors()
        repository.close()

    def lose_power(self, rng: random.Random) -> None:
        self.store.lose_power(rng)

    def drop_index(self) -> None:
        self.index = ModelIndex()
        with self.open() as repository:
            rebuild_index(self.store, self.index, repository._home(), 1_700_000_000)

    def remove_records(self, repository: Repository, ids: set[RecordId]) -> None:
        self.index.remove_records(ids)


class FolderWorld:
    """A repository in a folder, with LMDB. A crash of the machine is a kill here: nothing is lost."""

    def __init__(self, path: Path, options: InitOptions = SMALL, password: str | None = None) -> None:
        self.path = str(path)
        Repository.init(self.path, options, password=password, notify=quiet).close()
        self.store = LocalPackStore(os.path.join(self.path, "packs"))

    def open(self, faults: Faults | None = None, password: str | None = None) -> Repository:
        repository = Repository.open(self.path, password=password, notify=quiet)
        if faults is not None:
            repository._store = FaultyPackStore(repository._store, faults)  # type: ignore[assignment]
            repository._index_ = FaultyIndex(repository._index(), faults)
        return repository

    def kill(self, repository: Repository, faults: Faults) -> None:
        faults.die()
        faults.close_descriptors()
        repository.close()

    def lose_power(self, rng: random.Random) -> None:
        pass

    def drop_index(self) -> None:
        shutil.rmtree(os.path.join(self.path, "index"))

    def remove_records(self, repository: Repository, ids: set[RecordId]) -> None:
        index = repository._index()
        while isinstance(index, FaultyIndex):
            index = index._index
        remove_rows(index, ids)


def remove_rows(index: Index, ids: set[RecordId]) -> None:
    """Takes rows out of a real index, behind everybody's back, as garbage collection will."""
    assert isinstance(index, LmdbIndex)
    with index._env.begin(write=True) as txn:
        for record_id in ids:
            value = txn.pop(record_id, db=index._chunks)
            if value is None:
                continue
            place = rows.decode_place(record_id, value)
            key = rows.pack_key(place.pack)
            row = rows.decode_pack_row(key, txn.get(key, b"", db=index._packs))
            txn.put(key, rows.encode_pack_row(swept(row, place)), db=index._packs)


def restored(repository: Repository, point: Point) -> dict[str, bytes]:
    """All contents of a point, through `Repository.restore`."""
    sinks = {name: MemorySink(tree.size_bytes) for name, tree in contents_of(point.manifest)}
    trees = dict(contents_of(point.manifest))
    repository.restore(point, [(trees[name], sink) for name, sink in sinks.items()], workers=2)
    for sink in sinks.values():
        sink.finish()
    return {name: bytes(sink.data) for name, sink in sinks.items()}


def contents(machine: Machine) -> dict[str, bytes]:
    """What a restore of this machine must give."""
    found = {}
    for name, source in [(d.info.name, d.source) for d in machine.disks] + [
        (f.info.name, f.source) for f in machine.files
    ]:
        data = bytearray(source.size_bytes)
        if data:
            source.read_into(0, memoryview(data))
        found[name] = bytes(data)
    return found


class Truth:
    """What each restore point must give back; the model beside the engine."""

    def __init__(self) -> None:
        self.points: dict[str, dict[str, bytes]] = {}

    def backup(
        self, repository: Repository, disks: list[bytes], name: str = "web1", **more: object
    ) -> BackupSummary:
        """Backs up and remembers."""
        machine = machine_of(disks, name=name)
        summary = repository.backup(machine, BackupOptions(workers=2, **more))  # type: ignore[arg-type]
        assert summary.point is not None
        self.points[summary.point.hex()] = contents(machine)
        return summary

    def verify(
        self,
        repository: Repository,
        *,
        unreported: Callable[[dict[str, bytes]], bool] = lambda _contents: False,
    ) -> None:
        """All points are listed and restore exactly; nothing else is listed; check is clean.

        Args:
            unreported: says of a listed point that no backup has reported whether its contents are right
                (a backup that died between its last commit and its report).
        """
        listed = {point.id.hex(): point for point in repository.points()}
        assert self.points.keys() <= listed.keys(), "a restore point is gone"
        for point_id, point in listed.items():
            found = restored(repository, point)
            if point_id in self.points:
                assert found == self.points[point_id], f"point {point_id[:12]} came back otherwise"
            else:
                assert unreported(found), f"point {point_id[:12]} is listed, but was never finished"
                self.points[point_id] = found
        assert_clean(repository.check(read_data=True))


def assert_clean(report: CheckReport) -> None:
    """Fails with what a check has found."""
    assert report.clean, "\n".join([*(f.message for f in report.findings), *map(str, report.damaged)])


def chunk_copies(store: PackStore) -> Counter[RecordId]:
    """Every chunk of which there is an intact record in any pack, and how many there are."""
    return Counter(record_id for _, record_id in _chunk_records(store))


def _chunk_records(store: PackStore) -> Iterator[tuple[PackId, RecordId]]:
    for pack_id in store.ids():
        length = store.length(pack_id) or 0
        if length < 64:
            continue
        with contextlib.suppress(Exception):
            for record in PackScanner(store, pack_id, length, payloads=True).records():
                if record.header.kind is Kind.CHUNK:
                    yield pack_id, record.header.id
