"""Whole commands over a connection: what is broken in the middle, how much passes, many at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, quiet, restored
from rig.remote import SocketStream, all_gone, remote_repository, wire_of

from holdfast.errors import FarSideEnded, HoldfastError, LinkError
from holdfast.repo.repository import Repository
from holdfast.repo.wire.rights import Rights


@pytest.fixture
def path(tmp_path: Path) -> str:
    folder = str(tmp_path / "repo")
    Repository.init(folder, SMALL, notify=quiet).close()
    return folder


class CutOff(SocketStream):
    """A connection that breaks when so many bytes have been sent."""

    def __init__(self, stream: SocketStream, after_bytes: int) -> None:
        super().__init__(stream._socket)
        self._left = after_bytes

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        data = b"".join(parts)
        if self._left < len(data):
            super().write([data[: max(0, self._left)]])
            self._left = 0
            self.close_write()
            raise FarSideEnded("the connection was cut")
        self._left -= len(data)
        super().write([data])


def test_an_unchanged_disk_sends_almost_nothing(path: str) -> None:
    disk = content(range(400))
    with remote_repository(path) as repository:
        first = repository.backup(machine_of([disk]), ONE_WORKER)
        assert first.point is not None
        assert wire_of(repository).sent_bytes > len(disk) // 4
    with remote_repository(path) as repository:
        before = wire_of(repository).requests
        second = repository.backup(machine_of([disk]), ONE_WORKER)
        wire = wire_of(repository)
        assert second.bytes_new == 0
        assert wire.sent_bytes + wire.received_bytes < 64 << 10
        assert wire.requests - before < 60
        assert restored(repository, repository.points()[-1]) == restored(repository, repository.points()[0])


def test_a_backup_that_breaks_anywhere_is_resumed(path: str) -> None:
    disk = content(range(100, 250))
    with remote_repository(path) as repository:
        repository.backup(machine_of([content([7])], name="other"), ONE_WORKER)
        sizes = wire_of(repository).sent_bytes
    broken = 0
    for after in range(sizes, sizes + 12_000_000, 1_500_001):
        try:
            with remote_repository(
                path, wrap=lambda stream, after=after: CutOff(stream, after)
            ) as repository:
                repository.backup(machine_of([disk]), ONE_WORKER)
        except LinkError:
            broken += 1
        all_gone()
    assert broken
    with remote_repository(path) as repository:
        assert repository.check(read_data=True).clean
        repository.backup(machine_of([disk]), ONE_WORKER)
        assert repository.check(read_data=True).clean
    with Repository.open(path, notify=quiet) as repository:
        assert restored(repository, repository.points()[-1])["disk0.raw"] == disk


def test_what_a_broken_backup_has_sent_is_not_sent_again(path: str) -> None:
    disk, half = content(range(1, 200)), 6_000_000
    with pytest.raises(LinkError), remote_repository(path, wrap=lambda s: CutOff(s, half)) as repository:
        repository.backup(machine_of([disk]), ONE_WORKER)
    all_gone()
    with Repository.open(path, notify=quiet) as repository:
        index, store = repository._index(), repository._store
        for row in index.packs():  # the far side has left nothing to be adopted
            assert store.length(row.id) == row.committed_bytes
        assert len(list(store.ids())) == len(index.packs())
        assert sum(row.live_bytes for row in index.packs()) > half * 0.9
    with remote_repository(path) as repository:
        repository.backup(machine_of([disk]), ONE_WORKER)
        assert wire_of(repository).sent_bytes < len(disk) - half * 0.8
        assert repository.check(read_data=True).clean


def test_eight_clients_at_once(path: str) -> None:
    failures: list[HoldfastError] = []

    def client(number: int) -> None:
        try:
            with remote_repository(path) as repository:
                for day in range(2):
                    units = [*range(40), *range(1000 * (number + 1) + day, 1000 * (number + 1) + day + 40)]
                    repository.backup(machine_of([content(units)], name=f"vm{number}"), ONE_WORKER)
        except HoldfastError as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    with Repository.open(path, notify=quiet) as repository:
        assert len(repository.points()) == 16
        assert repository.check(read_data=True).clean


def test_append_only_backups_go_on_in_the_same_pack(path: str) -> None:
    rights = Rights(append_only=True)
    for day in range(4):
        with remote_repository(path, rights) as repository:
            repository.backup(machine_of([content([*range(50), 5000 + day])]), ONE_WORKER)
    with (
        pytest.raises(LinkError),
        remote_repository(path, rights, wrap=lambda s: CutOff(s, 3_000_000)) as repository,
    ):
        repository.backup(machine_of([content(range(6000, 6100))]), ONE_WORKER)
    all_gone()
    with remote_repository(path, rights) as repository:
        repository.backup(machine_of([content(range(6000, 6100))]), ONE_WORKER)
    with Repository.open(path, notify=quiet) as repository:
        assert len(repository.points()) == 5
        assert repository.check(read_data=True).clean
        packs = repository._index().packs()
        assert len(packs) <= 2 + sum(row.committed_bytes for row in packs) // SMALL.pack_bytes
