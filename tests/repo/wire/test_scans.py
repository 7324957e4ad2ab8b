"""Packs that a far side scans itself: what it reports is what reading them from here would show, and little travels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import SMALL, quiet, restored
from rig.remote import answering, hosted_connection, remote_repository, wire_of

from holdfast.errors import ProtocolError
from holdfast.ids import PackId
from holdfast.repo.backup import BackupOptions
from holdfast.repo.format.record import MAX_PACK_BYTES, PACK_HEADER_BYTES
from holdfast.repo.packs import LocalPackStore
from holdfast.repo.records import PackScanner, ReportedScan, ScannedRecord, scanner_of
from holdfast.repo.repository import InitOptions, Repository
from holdfast.repo.wire import far_packs
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.remote_store import RemotePackStore

PASSWORD = "correct horse"
UNITS = list(range(1, 161))


def make(path: Path, options: InitOptions = SMALL, password: str | None = None) -> str:
    with Repository.init(str(path), options, password=password, notify=quiet) as repository:
        repository.backup(machine_of([content(UNITS)]), BackupOptions(workers=1))
    return str(path)


def packs(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.pack"))


def spoil(pack: Path, *places: int) -> None:
    data = bytearray(pack.read_bytes())
    for at in places:
        data[at] ^= 1
    pack.write_bytes(bytes(data))


def described(record: ScannedRecord) -> tuple[object, ...]:
    return (record.offset, *record.header._replace(strong_hash=b""))


@pytest.mark.parametrize("payloads", [True, False])
def test_a_far_side_reports_what_a_scan_from_here_finds(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, payloads: bool
) -> None:
    folder = make(tmp_path / "repo")
    for pack in packs(folder):
        spoil(pack, *(rng.randrange(PACK_HEADER_BYTES, pack.stat().st_size) for _ in range(rng.randrange(4))))
    monkeypatch.setattr(far_packs, "_MOST_SCANNED", 5)
    monkeypatch.setattr(far_packs, "_MOST_SCANNED_BYTES", 200_000)
    own = LocalPackStore(str(tmp_path / "repo" / "packs"))
    connection = hosted_connection(own)
    far = RemotePackStore(connection)
    for pack in packs(folder):
        pack_id, end = PackId(bytes.fromhex(pack.stem)), pack.stat().st_size
        scanner = PackScanner(own, pack_id, end, payloads=payloads)
        expected = [described(record) for record in scanner.records()]
        reported = scanner_of(far, pack_id, end, payloads=payloads, reported=True)
        assert isinstance(reported, ReportedScan)
        before = connection.requests
        assert [described(record) for record in reported.records()] == expected
        assert reported.damaged == scanner.damaged
        assert connection.requests - before >= len(expected) // 5
    connection.close()


def test_a_far_repository_is_repaired_without_being_read_from_here(tmp_path: Path) -> None:
    folder = make(tmp_path / "repo")
    with Repository.init(str(tmp_path / "donor"), SMALL, notify=quiet) as donor:
        with Repository.open(folder, notify=quiet) as repository:
            repository.replicate(donor, repository.points())
        for pack in packs(folder)[:3]:
            spoil(pack, PACK_HEADER_BYTES + 500)
        with remote_repository(folder) as far:
            _, repaired = far.repair(donor)
            assert repaired.healed_total == 3
            assert wire_of(far).received_bytes < sum(pack.stat().st_size for pack in packs(folder)) // 20
    with Repository.open(folder, notify=quiet) as repository:
        assert repository.check(read_data=True).clean
        assert restored(repository, repository.points()[0])["disk0.raw"] == content(UNITS)


def test_without_a_key_stored_bytes_are_verified_over_there(tmp_path: Path) -> None:
    secret = InitOptions(cipher="aes256-gcm", chunker="fixed", segment_bytes=1 << 20, pack_bytes=1 << 20)
    folder = make(tmp_path / "repo", secret, PASSWORD)
    with remote_repository(folder) as far:
        report = far.check(read_data=True)
        assert report.clean
        assert report.bytes_verified > len(UNITS) * 50_000
        assert wire_of(far).received_bytes < report.bytes_verified // 20
    spoil(packs(folder)[0], PACK_HEADER_BYTES + 500)
    with remote_repository(folder) as far:
        assert not far.check(read_data=True).clean


def test_what_may_be_scanned_is_bounded(tmp_path: Path) -> None:
    folder = make(tmp_path / "repo")
    connection = hosted_connection(LocalPackStore(f"{folder}/packs"))
    pack = bytes.fromhex(packs(folder)[0].stem)
    for start, end in ((0, 1000), (1000, 999), (PACK_HEADER_BYTES, MAX_PACK_BYTES + 1)):
        with pytest.raises(ProtocolError, match="can not be scanned there"):
            connection.ask(m.ScanPack(pack, start, end, payloads=True))
    connection.close()


@pytest.mark.parametrize(
    "answer",
    [
        m.Scanned((), (), PACK_HEADER_BYTES),
        m.Scanned((), (), 1001),
        m.Scanned(((b"i" * 32, 64, 1, 1, 99, 0, 0),), (), 1000),
        m.Scanned(((b"i" * 32, 64, 1, 1, 1, 99, 0),), (), 1000),
    ],
    ids=["no step", "beyond the end", "an unknown kind", "an unknown codec"],
)
def test_reports_that_can_not_be_are_refused(answer: m.Scanned) -> None:
    with answering(answer) as connection, pytest.raises(ProtocolError):
        list(ReportedScan(RemotePackStore(connection), PackId(b"p" * 16), 1000, payloads=True).records())
