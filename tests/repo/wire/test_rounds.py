"""What commands ask when nothing is new, and how often they wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, quiet
from rig.remote import in_rounds

from holdfast.repo.copies import SeenCopies
from holdfast.repo.replicate import ReplicateReport
from holdfast.repo.repository import Repository

OPENING = ["Hello", "Open", "OpenIndex"]
DISK = content(range(4))


@pytest.fixture
def one(tmp_path: Path) -> str:
    """A repository with a point."""
    path = str(tmp_path / "one")
    with Repository.init(path, SMALL, notify=quiet) as repository:
        repository.backup(machine_of([DISK]), ONE_WORKER)
    return path


def replicated(source: Repository, target: Repository) -> ReplicateReport:
    """As the command does it."""
    report = source.replicate(target, source.points_beside(target))
    source.note_copies(target, SeenCopies(report.pairs))
    return report


def test_a_replication_without_anything_to_do(one: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    with (
        Repository.open(one, notify=quiet) as source,
        Repository.init(other, SMALL, notify=quiet) as target,
    ):
        assert len(replicated(source, target).copied) == 1
    rounds = [OPENING, ["ListPoints"]]
    with Repository.open(one, notify=quiet) as source, in_rounds(other, rounds) as target:
        assert replicated(source, target).already == 1
    with in_rounds(one, rounds) as source, Repository.open(other, notify=quiet) as target:
        assert replicated(source, target).already == 1


def test_a_backup_without_anything_new(one: str) -> None:
    rounds = [
        OPENING,
        *(
            [name]
            for name in (
                *("ListPoints", "GetPoints"),
                *("ListPackRows", "ListPacks", "PackLength"),  # what dead writers have left
                *("BeginSession", "ListLost"),
                *(
                    "ListPackRows",
                    "AdoptPack",
                    "ListPackRows",
                    "ReadPack",
                    "ListPackRows",
                ),  # a pack to go on with
            )
        ),
        ["Append", "SyncWriter"],
        *([name] for name in ("Commit", "EndSession", "CloseWriter")),
    ]
    with in_rounds(one, rounds) as repository:
        assert repository.backup(machine_of([DISK]), ONE_WORKER).bytes_new == 0


def test_an_index_that_can_not_be_opened_does_not_keep_its_repository_from_being(one: str) -> None:
    for file in Path(one, "index").iterdir():
        file.write_bytes(b"rubbish" * 1000)
    with in_rounds(one, [OPENING]) as repository:
        assert repository.config.chunker == SMALL.chunker
