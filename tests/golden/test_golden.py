"""Repositories that earlier versions have written: everything in them is read, exactly, for ever.

A failure here means that people could not read their backups any more. The remedy is never to make the
repositories anew. (`make.py` says when it may be run.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from holdfast.errors import WrongPassword
from holdfast.esxi.folder import open_machine
from holdfast.ids import PointId, RecordId
from holdfast.repo.backup import BackupOptions
from holdfast.repo.format.rows import PackState
from holdfast.repo.index import Index
from holdfast.repo.points import Point
from holdfast.repo.repository import Repository

HERE = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
NAMES = sorted(EXPECTED)

Open = Callable[[Path], Repository]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def pristine(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it is in the archive. Not to be written to."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(HERE / f"{name}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder / name


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the repository that may be changed."""
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def passwords(name: str) -> list[str | None]:
    return EXPECTED[name]["passwords"] or [None]


def opened(place: Path, password: str | None = None) -> Repository:
    chosen = password or passwords(place.name)[0]
    return Repository.open(str(place), password=chosen, notify=lambda _text: None)


class Sink:
    """Takes a content in, sparsely, and gives its hash."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(self._fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)

    def finish(self) -> None:
        os.close(self._fd)

    def abort(self) -> None:
        raise AssertionError

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def pinned(repository: Repository, point: Point) -> bool:
    return next(row.pinned for row in repository._index().points() if row.id == point.id)


def test_opens_and_lists(place: Path, name: str) -> None:
    expected = EXPECTED[name]
    assert (place / "index").exists() == expected["with_index"]
    with opened(place) as repository:
        points = repository.points()
        assert [p.id.hex() for p in points] == [p["id"] for p in expected["points"]]
        for point, wanted in zip(points, expected["points"], strict=True):
            manifest = point.manifest
            assert (manifest.vm_name, manifest.vm_uuid, manifest.time) == (
                wanted["vm"],
                wanted["vm_uuid"],
                wanted["time"],
            )
            assert dict(manifest.labels) == wanted["labels"]
            assert list(manifest.folders) == wanted["folders"]
            assert pinned(repository, point) == wanted["pinned"]
            for disk, wanted_disk in zip(manifest.disks, wanted["disks"], strict=True):
                assert (disk.info.name, disk.info.label) == (wanted_disk["name"], wanted_disk["label"])
                assert disk.tree.root.hex() == wanted_disk["root"]
                descriptor = hashlib.sha256(disk.info.descriptor.encode()).hexdigest()
                assert descriptor == wanted_disk["descriptor_sha256"]
            for file, wanted_file in zip(manifest.files, wanted["files"], strict=True):
                assert (file.info.name, file.info.size_bytes) == (
                    wanted_file["name"],
                    wanted_file["size_bytes"],
                )
                assert (file.info.mode, file.info.mtime_ns) == (wanted_file["mode"], wanted_file["mtime_ns"])


def test_restores_exactly(place: Path, name: str, tmp_path: Path) -> None:
    with opened(place) as repository:
        for wanted in EXPECTED[name]["points"]:
            point = repository.resolve(wanted["id"])
            contents = [*point.manifest.disks, *point.manifest.files]
            assert len(contents) == len(wanted["disks"]) + len(wanted["files"])
            target = tmp_path / point.short_id
            target.mkdir()
            sinks = [Sink(target / str(number), c.tree.size_bytes) for number, c in enumerate(contents)]
            repository.restore(point, [(c.tree, sink) for c, sink in zip(contents, sinks, strict=True)])
            for content, sink, entry in zip(contents, sinks, wanted["disks"] + wanted["files"], strict=True):
                sink.finish()
                assert content.info.name == entry["name"]
                assert content.tree.size_bytes == entry["size_bytes"]
                assert sink.sha256() == entry["sha256"], entry["name"]


def test_checks_clean_with_all_data(place: Path) -> None:
    with opened(place) as repository:
        report = repository.check(read_data=True)
        assert report.clean, (report.findings, report.damaged)
        assert report.points == 2
        assert report.bytes_verified > 0


def test_every_password_opens_it_and_no_other(place: Path, name: str) -> None:
    known = passwords(name)
    for password in known:
        with opened(place, password) as repository:
            assert len(repository.points()) == 2
    if known == [None]:
        return
    with opened(place, "wrong") as repository, pytest.raises(WrongPassword):
        repository.points()
    with Repository.open(str(place), notify=lambda _text: None) as repository:
        with pytest.raises(WrongPassword):
            repository.points()


def tables(index: Index) -> tuple[object, ...]:
    """What an index says, without epochs and times of verification."""

    def chunks() -> Iterator[object]:
        after: RecordId | None = None
        while page := index.scan(after, 1000):
            yield from ((record_id, place._replace(epoch=0)) for record_id, place in page)
            after = page[-1][0]

    def packs() -> Iterator[object]:
        for row in index.packs():
            yield row.number, row.id, row.state, row.committed_bytes, row.records, row.live_bytes, row.created

    return list(chunks()), list(packs()), index.points()


def test_the_index_can_be_made_again(place: Path, name: str) -> None:
    with opened(place) as repository:
        repository.unlock()
        before = tables(repository._index())
        rebuilt = repository.rebuild_index()
        assert rebuilt.problems == ()
        assert rebuilt.points == 2
        assert tables(repository._index()) == before
        states = {row.state for row in repository._index().packs()}
        assert states == {PackState.OPEN, PackState.SEALED}
    shutil.rmtree(place / "index")
    with opened(place) as repository:
        assert tables(repository._index()) == before


def test_a_new_backup_of_the_same_machine_stores_nothing_anew(place: Path, name: str, tmp_path: Path) -> None:
    """Cuts, ids and the shape of trees are what they were."""
    make = load("make")
    for day, wanted in enumerate(EXPECTED[name]["points"]):
        make.write_source(tmp_path / "gold", day)
        machine = open_machine(str(tmp_path / "gold"))
        with opened(place) as repository:
            summary = repository.backup(machine, BackupOptions(time=1_800_000_000 + day))
            machine.close()
            assert (summary.chunks_new, summary.bytes_new) == (0, 0)
            assert summary.point is not None
            again = repository.resolve(summary.point.hex()).manifest
            before = repository.resolve(wanted["id"]).manifest
            assert [d.tree for d in again.disks] == [d.tree for d in before.disks]
            assert [f.tree for f in again.files] == [f.tree for f in before.files]
    with opened(place) as repository:
        assert repository.check(read_data=True).clean
        assert len(repository.points()) == 4


def test_a_collected_point_stays_away(place: Path, name: str) -> None:
    with opened(place) as repository:
        listed = {row.id for row in repository._index().points()}
        assert listed == {PointId(RecordId(bytes.fromhex(p["id"]))) for p in EXPECTED[name]["points"]}


def test_reads_by_the_document_alone(pristine: Path, name: str, tmp_path: Path) -> None:
    """No code of Holdfast: what docs/FORMAT.md says is enough."""
    expected = EXPECTED[name]
    reader = load("independent_reader").Reader(pristine, passwords(name)[-1])
    assert reader.sealed >= 1
    assert reader.open == 1
    assert reader.points.keys() == {p["id"] for p in expected["points"]}
    for wanted in expected["points"]:
        point = reader.points[wanted["id"]]
        assert (point["pinned"], point["hidden"]) == (wanted["pinned"], False)
        entries = {entry["name"]: entry for entry in wanted["disks"] + wanted["files"]}
        for number, content in enumerate(point["disks"] + point["files"]):
            sink = Sink(tmp_path / f"{wanted['id'][:8]}-{number}", content["size_bytes"])
            for offset, data in reader.content(point, content):
                sink.write(offset, memoryview(data))
            sink.finish()
            assert sink.sha256() == entries.pop(content["name"])["sha256"], content["name"]
        assert not entries


def test_archives_are_small() -> None:
    for name in NAMES:
        assert (HERE / f"{name}.tar.xz").stat().st_size < 200 << 10


def test_the_source_is_the_same(tmp_path: Path) -> None:
    """Otherwise a failure above would say nothing about the repositories."""
    make = load("make")
    for day in range(2):
        make.write_source(tmp_path, day)
        for name in NAMES:
            point = EXPECTED[name]["points"][day]
            for disk in point["disks"]:
                with (tmp_path / disk["name"].replace(".vmdk", "-flat.vmdk")).open("rb") as file:
                    assert hashlib.file_digest(file, "sha256").hexdigest() == disk["sha256"]
