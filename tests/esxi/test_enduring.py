"""Reading goes on when agents die: real agents in processes of their own, which are killed as they work."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.chunker import PUBLISHED_SEED, ChunkerParams, make_chunker
from holdfast.disk import Cutting, ScannedSegment
from holdfast.errors import HostUnreachable, LinkError, LinkLost, LoginRefused, SourceChanged, SourceNotFound
from holdfast.esxi.agented import AgentFiles, AgentScanner, AgentSource
from holdfast.esxi.enduring import Endurance, EnduringFiles
from holdfast.esxi.hostdisk import HostFiles, Link
from holdfast.esxi.vmdk.chain import ChainSource
from holdfast.esxi.vmdk.descriptor import parse_descriptor_text
from holdfast.esxi.vmdk.joined import JoinedSource

if TYPE_CHECKING:
    from tests.esxi.agent.conftest import Pipes

KIB = 1 << 10
MIB = 1 << 20
SEGMENT = MIB
QUICK = Endurance(pauses_s=(0.0, 0.0, 0.0))
CUTTING = Cutting("aligned", 64 * KIB, PUBLISHED_SEED)
DESCRIPTOR = """\
# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="vmfs"
RW {first} VMFS "one-flat.vmdk" 0
RW {second} VMFS "two-flat.vmdk" 0
ddb.adapterType = "lsilogic"
"""


class LocalFiles:
    """The agent's files, of a host whose datastores are below a folder of this machine."""

    def __init__(self, agent: AgentFiles, folder: Path) -> None:
        self._agent = agent
        self._folder = folder

    def open(self, path: str) -> AgentSource:
        return self._agent.open(f"{self._folder}{path}")

    def scanner(self, source: ChainSource | JoinedSource, where: str) -> AgentScanner:
        return self._agent.scanner(source, where)

    def close(self) -> None:
        self._agent.close()


class Host:
    """A folder with a disk of two extents, and agents that read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: list[Pipes] = []
        self.lives = 0
        self.refusals: list[LinkError] = []
        self.told: list[str] = []
        store = folder / "vmfs/volumes/d/web1"
        store.mkdir(parents=True)
        rng = random.Random(7)
        data = b"".join(rng.randbytes(256 * KIB) + bytes(256 * KIB) for _ in range(24))
        self.data = data[: 12 * MIB - 4096]
        (store / "one-flat.vmdk").write_bytes(self.data[: 5 * MIB])
        (store / "two-flat.vmdk").write_bytes(self.data[5 * MIB :])
        (store / "other").write_bytes(rng.randbytes(6 * MIB))
        text = DESCRIPTOR.format(first=5 * MIB // 512, second=(len(self.data) - 5 * MIB) // 512)
        self.links = (Link("/vmfs/volumes/d/web1/web1.vmdk", parse_descriptor_text(text, "web1.vmdk")),)

    def begin(self) -> HostFiles:
        spec = importlib.util.spec_from_file_location(
            "agent_pipes", Path(__file__).parent / "agent" / "conftest.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
        if spec.name not in sys.modules:
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        self.lives += 1
        if self.lives > 1 and self.refusals:
            raise self.refusals.pop(0)

        def start(command: str) -> Pipes:
            self.agents.append(module.Pipes(command.replace("python3", sys.executable, 1)))
            return self.agents[-1]

        files = LocalFiles(AgentFiles(start), self.folder)  # type: ignore[arg-type]
        for _ in range(self.lives):  # so that a file has another handle in each life
            files.open("/vmfs/volumes/d/web1/other")
        return files

    def files(self, endurance: Endurance = QUICK) -> EnduringFiles:
        return EnduringFiles(self.begin, self.told.append, endurance)

    def kill(self) -> None:
        self.agents[-1].process.kill()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    for agent in made.agents:
        agent.close()
        agent.close_streams()


def nothing(_offset: int, _length: int) -> bytes | None:
    """Nothing is expected of any segment."""
    return None


def content_of(segment: ScannedSegment, data: bytes) -> None:
    """The segment is what cutting and hashing `data` here gives, and so are the bytes of its chunks."""
    lengths, hashes = segment.parts()
    assert list(lengths) == make_chunker(ChunkerParams("aligned", 64 * KIB)).cut(memoryview(data))
    wanted, at = [], 0
    for length in lengths:
        if length > 0:
            wanted.append(data[at : at + length])
        at += abs(length)
    assert list(hashes) == [hashlib.sha256(piece).digest() for piece in wanted]
    assert list(segment.fetch(range(len(wanted)))) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_agents_that_are_killed_at_any_moment_cost_no_byte(host: Host, seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    files = host.files()
    disk = files.disk(host.links)
    assert disk.scanner is not None
    assert disk.scanner.can_cut(CUTTING)
    scanner = disk.scanner
    places = [(at, min(SEGMENT, disk.size_bytes - at)) for at in range(0, disk.size_bytes, SEGMENT)]
    killing = {rng.randrange(len(places)): rng.choice(["before", "between"]) for _ in range(4)}

    def work(number: int) -> None:
        offset, length = places[number]
        if killing.get(number) == "before":
            host.kill()
        segment = scanner.scan(offset, length, CUTTING, nothing)
        if killing.get(number) == "between":
            host.kill()
        content_of(segment, host.data[offset : offset + length])

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(len(places))))
    assert files.interruptions >= 1
    assert files.interruptions == host.lives - 1
    assert len([text for text in host.told if "goes on" in text]) == files.interruptions
    buffer = bytearray(disk.size_bytes)
    host.kill()
    disk.read_into(0, memoryview(buffer))
    assert buffer == host.data
    files.close()


def test_an_agent_that_dies_in_the_middle_of_sending_is_followed_by_another(host: Host) -> None:
    files = host.files()
    disk = files.disk(host.links)
    assert disk.scanner is not None
    segment = disk.scanner.scan(4 * MIB, SEGMENT, CUTTING, nothing)  # across the border of the two extents
    _, hashes = segment.parts()
    got = []
    for number, data in enumerate(segment.fetch(range(len(hashes)))):
        if number == 0:
            host.kill()
        got.append(hashlib.sha256(data).digest())
    assert got == list(hashes)
    files.close()


def test_what_is_not_of_the_same_moment_any_more_is_not_read(host: Host) -> None:
    files = host.files()
    disk = files.disk(host.links)

    def gone() -> None:
        raise SourceChanged("somebody removed the snapshot")

    files.check = gone
    host.kill()
    for _ in range(2):
        with pytest.raises(SourceChanged, match="somebody removed"):
            disk.read_into(0, memoryview(bytearray(10)))
    assert host.lives == 1


def test_a_disk_that_has_changed_between_two_lives_is_refused(host: Host) -> None:
    files = host.files()
    disk = files.disk(host.links)
    assert disk.scanner is not None
    segment = disk.scanner.scan(0, SEGMENT, CUTTING, nothing)
    flat = host.folder / "vmfs/volumes/d/web1/one-flat.vmdk"
    flat.write_bytes(b"x" * 5 * MIB)
    host.kill()
    with pytest.raises(SourceChanged, match="other bytes than before"):
        list(segment.fetch([0, 1]))
    (host.folder / "vmfs/volumes/d/web1/two-flat.vmdk").unlink()
    host.kill()
    with pytest.raises(SourceNotFound):
        disk.read_into(0, memoryview(bytearray(10)))
    files.close()


def test_a_host_that_comes_back_late_is_waited_for_and_one_that_does_not_is_given_up(host: Host) -> None:
    files = host.files()
    disk = files.disk(host.links)
    host.refusals = [HostUnreachable("nobody listens there"), LinkError("the agent did not start")]
    host.kill()
    disk.read_into(0, memoryview(bytearray(10)))
    assert files.interruptions == 1
    assert [text.partition(";")[2] for text in host.told[:2]] == [" trying again in 0 s"] * 2
    host.refusals = [HostUnreachable("nobody listens there")] * 9
    host.kill()
    for _ in range(2):
        with pytest.raises(HostUnreachable, match="nobody listens"):
            disk.read_into(0, memoryview(bytearray(10)))
    assert len(host.refusals) == 9 - len(QUICK.pauses_s)


def test_a_host_that_does_not_let_us_in_any_more_is_given_up_at_once(host: Host) -> None:
    files = host.files()
    disk = files.disk(host.links)
    host.refusals = [LoginRefused("it does not accept our key")]
    host.kill()
    with pytest.raises(LoginRefused):
        disk.read_into(0, memoryview(bytearray(10)))
    assert host.lives == 2


def test_agents_that_bring_nothing_are_given_up(host: Host) -> None:
    """One that dies whenever it is asked for a certain range must not be started for ever."""
    files = host.files(Endurance(pauses_s=(0.0,), most_barren=2))
    disk = files.disk(host.links)

    def act(_opened: object) -> None:
        host.kill()
        raise LinkLost("the agent on the host has ended")

    with pytest.raises(LinkLost):
        disk.attempt(act)
    assert host.lives == 3


def test_an_interruption_ends_the_waiting(host: Host) -> None:
    pausing = threading.Event()
    files = EnduringFiles(
        host.begin, host.told.append, Endurance(pauses_s=(600.0,)), sleep=lambda _s: pausing.set()
    )
    disk = files.disk(host.links)
    host.kill()
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(disk.read_into, 0, memoryview(bytearray(10)))
        assert pausing.wait(30)
        files.interrupt()
        with pytest.raises(LinkLost):
            reading.result(30)
    files.close()
