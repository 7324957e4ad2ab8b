"""Disks that the agent scans: what is expected and found costs nothing, and its parts can be had all the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.chunker import PUBLISHED_SEED
from holdfast.disk import Cutting
from holdfast.errors import SourceChanged
from holdfast.esxi.agented import AgentFiles, AgentScanner
from holdfast.esxi.vmdk.joined import JoinedSource, Piece

KIB = 1 << 10
MIB = 1 << 20
SEGMENT = MIB
SIZE = 9 * SEGMENT + 12 * KIB
CUTTING = Cutting("aligned", 16 * KIB, PUBLISHED_SEED)


def segments() -> Iterator[tuple[int, int]]:
    for at in range(0, SIZE, SEGMENT):
        yield at, min(SEGMENT, SIZE - at)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    rng = random.Random(5)
    path = tmp_path / "disk-flat.vmdk"
    with path.open("wb") as file:
        for at, length in segments():
            file.seek(at)
            file.write(rng.randbytes(length // 2))
        file.truncate(SIZE)
    return path


@pytest.fixture
def files(pipes) -> Iterator[AgentFiles]:
    opened = AgentFiles(pipes)
    yield opened
    opened.close()


def scanner_of(files: AgentFiles, disk: Path) -> AgentScanner:
    source = JoinedSource([Piece(SIZE, files.open(str(disk)), 0)])
    return files.scanner(source, "disk.vmdk")


def nothing(_offset: int, _length: int) -> None:
    return None


def test_parts_of_what_was_expected_can_be_had(files: AgentFiles, disk: Path) -> None:
    scanner = scanner_of(files, disk)
    first = {place: scanner.scan(*place, CUTTING, nothing) for place in segments()}
    digests = {place: one.digest for place, one in first.items()}
    before = files.link.received_bytes
    again = scanner_of(files, disk)
    found = {
        place: again.scan(*place, CUTTING, lambda at, length: digests[at, length]) for place in segments()
    }
    assert files.link.received_bytes - before < 60 * len(found)
    for place, one in found.items():
        assert one.digest == digests[place]
        assert (one.chunks, one.data_bytes) == (first[place].chunks, first[place].data_bytes)
        assert one.parts() == first[place].parts()
        assert b"".join(one.fetch(range(one.chunks))) == b"".join(first[place].fetch(range(one.chunks)))


def test_what_differs_from_what_was_expected_says_its_parts(files: AgentFiles, disk: Path) -> None:
    place = (0, SEGMENT)
    found = scanner_of(files, disk).scan(*place, CUTTING, lambda _at, _length: b"x" * 32)
    assert found.digest == scanner_of(files, disk).scan(*place, CUTTING, nothing).digest
    assert sum(map(abs, found.parts()[0])) == SEGMENT


def test_a_disk_that_changes_between_two_scans_is_noticed(files: AgentFiles, disk: Path) -> None:
    place = (0, SEGMENT)
    digest = scanner_of(files, disk).scan(*place, CUTTING, nothing).digest
    found = scanner_of(files, disk).scan(*place, CUTTING, lambda _at, _length: digest)
    with disk.open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(SourceChanged, match="has changed"):
        found.parts()
