"""What a far side holds is proven by challenges: by little on the wire, and not by anybody who has not got the bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rig.disks import MIB, content, machine_of
from rig.engine import SMALL, quiet
from rig.remote import SocketStream, answering, remote_repository, served, wire_of

from holdfast.errors import DamagedPoint, ProtocolError
from holdfast.ids import PackId, RecordId
from holdfast.repo import challenge as challenge_module
from holdfast.repo.backup import BackupOptions, Engine
from holdfast.repo.challenge import MOST_IDS, Answer, OwnAnswers, State, proof_of
from holdfast.repo.codec import Sealed
from holdfast.repo.format.record import PACK_HEADER_BYTES, Codec, Kind
from holdfast.repo.packs import PackStore
from holdfast.repo.prove import Proven, prove
from holdfast.repo.repository import Repository
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.near import Connection
from holdfast.repo.wire.remote_store import RemotePackStore
from holdfast.repo.wire.rights import Rights

PASSWORD = "correct horse"
UNITS = list(range(1, 161))


def back_up(repository: Repository, units: Sequence[int], when: int = 1_700_000_000) -> None:
    machine = machine_of([content(units)], files={"a.vmx": b"a small file"})
    repository.backup(machine, BackupOptions(time=when, workers=1))


@pytest.fixture
def near(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(str(tmp_path / "near"), SMALL, notify=quiet) as repository:
        back_up(repository, UNITS)
        back_up(repository, [*UNITS[:-1], 999], 1_700_000_001)
        yield repository


@pytest.fixture
def folder(near: Repository, tmp_path: Path) -> str:
    """Of a replica."""
    path = str(tmp_path / "far")
    with Repository.init(path, SMALL, notify=quiet) as repository:
        near.replicate(repository, near.points())
    return path


@pytest.fixture
def far(folder: str) -> Iterator[Repository]:
    with remote_repository(folder, Rights(read_only=True)) as repository:
        yield repository


def packs(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.pack"))


def spoil(pack: Path, at: int) -> None:
    data = bytearray(pack.read_bytes())
    data[at] ^= 1
    pack.write_bytes(bytes(data))


def records_of(repository: Repository) -> int:
    return repository.statistics().index.records


# --- honest sides


def test_all_is_proven_and_only_hashes_travel(near: Repository, far: Repository) -> None:
    there = far.points()
    before = wire_of(far).received_bytes + wire_of(far).sent_bytes
    proven = far.prove(near, there, 1.0)
    travelled = wire_of(far).received_bytes + wire_of(far).sent_bytes - before
    assert proven.records == records_of(near) == records_of(far)
    assert (proven.fetched, proven.not_here) == (0, 0)
    assert proven.stored_bytes > len(UNITS) * 56 * 1024
    assert travelled < 4096 + 90 * proven.records < proven.stored_bytes // 200


def test_a_share_is_about_a_share(near: Repository, far: Repository) -> None:
    counts = [far.prove(near, far.points(), 0.25).records for _ in range(8)]
    expected = 8 * 0.25 * records_of(near)
    assert expected * 0.6 < sum(counts) < expected * 1.4
    assert len(set(counts)) > 1


@pytest.mark.parametrize("share", [1.0, 0.999_999])
def test_damage_is_found_wherever_it_is(
    near: Repository, folder: str, rng: random.Random, share: float
) -> None:
    pack = rng.choice(packs(folder))
    sound = pack.read_bytes()
    with Repository.open(folder, notify=quiet) as repository:
        row = next(row for row in repository._index().packs() if row.id.hex() == pack.stem)
        end = PACK_HEADER_BYTES + row.live_bytes
        for at in (PACK_HEADER_BYTES, rng.randrange(PACK_HEADER_BYTES, end), end - 1):
            spoil(pack, at)
            with (
                remote_repository(folder) as far,
                pytest.raises(DamagedPoint, match="1 record that restore points need is missing or damaged"),
            ):
                far.prove(near, far.points(), share)
            pack.write_bytes(sound)
    pack.unlink()
    with remote_repository(folder) as far, pytest.raises(DamagedPoint, match=r"\d\d+ records"):
        far.prove(near, far.points(), share)


def test_what_the_far_index_has_lost_is_missed(near: Repository, folder: str) -> None:
    with Repository.open(folder, notify=quiet) as repository:
        index = repository._index()
        (record, place), *_ = [row for row in index.scan(None, 100) if row[1].kind == Kind.CHUNK]
        index.drop({record: (place.pack, place.offset)})
    with remote_repository(folder) as far, pytest.raises(DamagedPoint, match=f"{record.hex()[:16]} is in no"):
        far.prove(near, far.points(), 1.0)


def test_damage_of_ours_is_not_blamed_on_the_far_side(near: Repository, far: Repository) -> None:
    for pack in packs(near.path):
        spoil(pack, PACK_HEADER_BYTES + 80)
    with Repository.open(near.path, notify=quiet) as near_again:
        proven = far.prove(near_again, far.points(), 1.0)
    assert proven.not_here == proven.fetched == len(packs(near.path))
    assert proven.records == records_of(far)


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(
        str(tmp_path / "secret"), replace(SMALL, cipher="aes256-gcm"), password=PASSWORD, notify=quiet
    ) as repository:
        back_up(repository, UNITS)
        yield repository


def test_another_form_of_the_same_content_is_fetched_and_opened(
    encrypted: Repository, tmp_path: Path
) -> None:
    """A far side that has half of it from a backup of its own: under the same keys, but sealed with another salt."""
    path = str(tmp_path / "other")
    with Repository.init(path, SMALL, password=PASSWORD, notify=quiet, like=encrypted) as repository:
        back_up(repository, UNITS[:80])
        encrypted.replicate(repository, encrypted.points())
        own = len(UNITS[:80])
    with remote_repository(path, password=PASSWORD) as far:
        there = [point for point in far.points() if point.id == encrypted.points()[0].id]
        proven = far.prove(encrypted, there, 1.0)
    assert own <= proven.fetched < own + 20
    assert proven.records > len(UNITS)
    assert proven.not_here == 0
    for pack in packs(path):
        spoil(pack, PACK_HEADER_BYTES + 100)
    with remote_repository(path, password=PASSWORD) as far, pytest.raises(DamagedPoint):
        far.prove(encrypted, there, 1.0)


def test_with_other_keys_everything_is_fetched(
    encrypted: Repository, near: Repository, tmp_path: Path
) -> None:
    path = str(tmp_path / "clear")
    with Repository.init(path, SMALL, notify=quiet) as repository:
        encrypted.replicate(repository, encrypted.points())
    with remote_repository(path) as far:
        proven = far.prove(encrypted, far.points(), 1.0)
        assert proven == Proven(records=records_of(far), fetched=records_of(far))
    spoil(packs(path)[0], PACK_HEADER_BYTES + 100)
    with remote_repository(path) as far, pytest.raises(DamagedPoint, match="1 record"):
        far.prove(encrypted, far.points(), 1.0)


def test_two_far_sides_are_compared_with_each_other(near: Repository, folder: str, far: Repository) -> None:
    with remote_repository(near.path) as source:
        before = wire_of(far).received_bytes
        proven = far.prove(source, far.points(), 1.0)
        assert (proven.records, proven.fetched) == (records_of(near), 0)
        assert wire_of(far).received_bytes - before < 90 * proven.records + 8192


# --- sides that lie


class Liar:
    """The near end of a far side that has kept hashes and thrown the bytes away, and says what `lie` makes of the truth."""

    def __init__(self, store: PackStore, lie: Callable[[bytes, Answer], Answer]) -> None:
        assert isinstance(store, RemotePackStore)
        self._store = store
        self._lie = lie

    def challenge(self, nonce: bytes, ids: Sequence[RecordId]) -> list[Answer]:
        return [self._lie(nonce, answer) for answer in self._store.challenge(nonce, ids)]

    def read(self, pack_id: PackId, offset: int, length: int) -> bytes:
        return os.urandom(length)


FIRST = bytes(32)
LIES: dict[str, Callable[[bytes, Answer], Answer]] = {
    "a guess": lambda _nonce, answer: answer._replace(proof=os.urandom(32)),
    "its hash as the proof": lambda _nonce, answer: answer._replace(proof=answer.strong_hash * 2),
    "another form": lambda _nonce, _answer: Answer(State.WHOLE, os.urandom(16), os.urandom(32)),
    "nothing there": lambda _nonce, _answer: Answer(State.ABSENT, bytes(16), bytes(32)),
    "damaged": lambda _nonce, _answer: Answer(State.DAMAGED, bytes(16), bytes(32)),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_has_not_got_the_bytes_proves_nothing(near: Repository, far: Repository, lie: str) -> None:
    engine = lying(far._engine(), LIES[lie])
    with pytest.raises(DamagedPoint) as raised:
        prove(near._engine(), engine, far.points(), 1.0)
    assert raised.value.message.startswith(f"{records_of(near)} records")


def lying(engine: Engine, lie: Callable[[bytes, Answer], Answer]) -> Engine:
    store = Liar(engine.store, lie)
    records = type(engine.records)(store, engine.index, engine.opener)  # type: ignore[arg-type]
    return replace(engine, store=store, records=records)  # type: ignore[arg-type]


def test_old_answers_are_of_no_use(near: Repository, far: Repository) -> None:
    """Whoever has answered for everything once, and kept that, can not answer the next challenge."""
    kept: dict[bytes, Answer] = {}

    def keep(_nonce: bytes, answer: Answer) -> Answer:
        return kept.setdefault(answer.strong_hash, answer)

    engine = lying(far._engine(), keep)
    assert prove(near._engine(), engine, far.points(), 1.0).records == records_of(near)
    with pytest.raises(DamagedPoint, match="proof for it is wrong"):
        prove(near._engine(), engine, far.points(), 1.0)


def test_a_proof_is_of_the_header_too_and_of_every_byte(near: Repository) -> None:
    engine = near._engine()
    record = next(key for key, place in engine.index.scan(None, 50) if place.kind == Kind.CHUNK)
    (sealed,) = engine.records.sealed([record], Kind.CHUNK)
    nonce = os.urandom(32)
    good = proof_of(nonce, sealed)
    header = sealed.header
    other = Codec.RAW if header.codec is Codec.ZSTD else Codec.ZSTD
    payload = bytearray(sealed.payload)
    payload[-1] ^= 1
    changed = [
        proof_of(os.urandom(32), sealed),
        proof_of(nonce, Sealed(header._replace(codec=other), sealed.payload)),
        proof_of(nonce, Sealed(header._replace(plain_bytes=header.plain_bytes + 1), sealed.payload)),
        proof_of(nonce, Sealed(header, payload)),
    ]
    assert good not in changed
    assert good == proof_of(nonce, sealed)


# --- limits


def open_client(folder: str) -> Connection:
    connection = Connection(SocketStream(served(Rights(read_only=True))[0]), "far")
    connection.ask(m.Open(folder))
    return connection


def test_what_is_asked_for_is_bounded(folder: str) -> None:
    client = open_client(folder)
    with pytest.raises(ProtocolError, match="no index"):
        client.ask(m.Challenge(FIRST, ()))
    client.ask(m.OpenIndex())
    assert client.ask(m.Challenge(FIRST, ())).answers == ()
    unknown = client.ask(m.Challenge(FIRST, (b"u" * 32,) * MOST_IDS)).answers
    assert set(unknown) == {(0, bytes(16), bytes(32))}
    with pytest.raises(ProtocolError, match="more records"):
        client.ask(m.Challenge(FIRST, (b"u" * 32,) * (MOST_IDS + 1)))
    client.close()


def test_work_is_bounded_too_and_the_rest_is_asked_for_again(
    near: Repository, far: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(challenge_module, "_MOST_BYTES", MIB // 2)
    engine = near._engine()
    ids = [key for key, _ in engine.index.scan(None, 1000)]
    own = OwnAnswers(engine.records, engine.index)
    assert 1 <= len(own.some(FIRST, ids)) < 20
    before = wire_of(far).requests
    assert far._engine().store.challenge(FIRST, ids) == own.challenge(FIRST, ids)  # type: ignore[attr-defined]
    assert wire_of(far).requests - before > 10


@pytest.mark.parametrize(
    "answer",
    [(), ((1, b"h" * 16, b"p" * 32),) * 3, ((9, b"h" * 16, b"p" * 32),)],
    ids=["nothing", "more than was asked", "an unknown state"],
)
def test_answers_that_can_not_be_are_refused(answer: tuple[tuple[int, bytes, bytes], ...]) -> None:
    with answering(m.Answers(answer)) as connection, pytest.raises(ProtocolError):
        RemotePackStore(connection).challenge(FIRST, [RecordId(b"a" * 32), RecordId(b"b" * 32)])
