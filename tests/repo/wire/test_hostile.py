"""Sides that do not keep to the protocol: fuzzed frames both ways, and a client that tries what it may not do."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import blake3
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, quiet
from rig.remote import SocketStream, served

from holdfast.errors import (
    HoldfastError,
    IntegrityError,
    LinkError,
    ProtocolError,
    SessionGone,
    StorageDenied,
)
from holdfast.ids import PackId, RecordId, RepositoryId, SessionId
from holdfast.repo.codec import strong_hash
from holdfast.repo.format import rows
from holdfast.repo.format.record import (
    PACK_HEADER_BYTES,
    Codec,
    Kind,
    PackHeader,
    RecordHeader,
    encode_pack_header,
    encode_record_header,
)
from holdfast.repo.lease import new_session_row
from holdfast.repo.repository import Repository
from holdfast.repo.wire import messages as m
from holdfast.repo.wire.far import FarSide
from holdfast.repo.wire.faults import failure_of, raised_by
from holdfast.repo.wire.fields import Pieces
from holdfast.repo.wire.frames import HEADER_BYTES, MAX_BODY_BYTES, MAX_MESSAGE_BYTES, Decoder, encode_frames
from holdfast.repo.wire.near import Connection
from holdfast.repo.wire.rights import Rights

NOW = 1_800_000_000


def frame(request: int, kind: int, body: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    """A frame with a right checksum, whatever it says."""
    head = struct.pack(
        "<4sBBHII", b"\xf7HFw", kind, flags, 0, request, len(body) if length is None else length
    )
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head + body)) + body


def said(message: m.Message, request: int) -> bytes:
    kind, body = m.encode_message(message)
    return b"".join(encode_frames(request, kind, body))


HELLO = said(m.Hello(1, 1, "test"), 1)


def answers(*pieces: bytes) -> list[tuple[int, m.Message]]:
    """What a far side answers to these bytes until it ends; it must end."""
    pending = list(pieces)
    out: list[bytes] = []
    FarSide(lambda _limit: pending.pop(0) if pending else b"", out.extend, Rights(restrict="/nowhere")).run()
    decoder = Decoder()
    packets = list(decoder.feed(b"".join(out)))
    decoder.end()
    return [(packet.request, m.decode_message(*packet[1:])) for packet in packets]


# --- frames


@given(st.binary(max_size=3_000_000), st.integers(1, 5_000_000), st.integers(0, 3_000_000))
@settings(max_examples=15)
@example(bytes(MAX_BODY_BYTES), 1000, 16)
@example(bytes(MAX_BODY_BYTES + 1), 1 << 20, MAX_BODY_BYTES - 20_000)
def test_messages_survive_any_fragmentation(body: bytes, step: int, cut: int) -> None:
    stream = b"".join(encode_frames(7, 107, [body[:cut], body[cut:]])) + frame(8, 2, b"")
    decoder = Decoder()
    packets = [
        packet for at in range(0, len(stream), step) for packet in decoder.feed(stream[at : at + step])
    ]
    decoder.end()
    assert [(p.request, p.kind, b"".join([p.body, *p.more])) for p in packets] == [
        (7, 107, body),
        (8, 2, b""),
    ]


@pytest.mark.parametrize("front", [0, 3, 15, 16, 40, 70_000])
def test_data_in_bulk_is_the_same_however_it_came(front: int) -> None:
    data = bytes(range(256)) * 400
    kind, body = m.encode_message(m.Append(3, 5, Pieces([data[:100], b"", data[100:]])))
    whole = b"".join(body)
    found = m.decode_message(
        kind, whole[:front], [memoryview(whole[front : front + 9]), memoryview(whole[front + 9 :])]
    )
    assert found == m.Append(3, 5, data)
    assert found == m.decode_message(kind, whole)
    for wrong in (whole[:-1], whole + b"x"):
        with pytest.raises(ProtocolError):
            m.decode_message(kind, wrong[:front], [memoryview(wrong[front:])])


def test_other_long_messages_may_come_in_pieces_too() -> None:
    message = m.Lookup(tuple(bytes([n]) * 32 for n in range(200)))
    kind, body = m.encode_message(message)
    whole = b"".join(body)
    assert (
        m.decode_message(kind, whole[:64], [memoryview(whole[64:5000]), memoryview(whole[5000:])]) == message
    )
    with pytest.raises(ProtocolError):
        m.decode_message(kind, whole[:64], [memoryview(whole[64:-1])])


@given(st.data())
@settings(max_examples=150)
def test_one_flipped_bit_is_always_noticed(data: st.DataObject) -> None:
    stream = bytearray(said(m.Lookup((b"a" * 32, b"b" * 32)), 5))
    bit = data.draw(st.integers(0, len(stream) * 8 - 1))
    stream[bit // 8] ^= 1 << bit % 8
    decoder = Decoder()
    with contextlib.suppress(ProtocolError):
        assert not list(decoder.feed(bytes(stream)))
        decoder.end()
        pytest.fail("it was taken for whole")


@pytest.mark.parametrize(
    "stream",
    [
        b"SSH-2.0-OpenSSH_9.2 and so on, as if it were",
        frame(1, 64, b"", length=MAX_BODY_BYTES + 1),
        frame(1, 64, b"", length=2**32 - 1),
        frame(1, 64, b"x", flags=2),
        frame(1, 64, b"short", flags=1),
        frame(1, 64, bytes(MAX_BODY_BYTES), flags=1) + frame(2, 64, b"of another"),
    ],
)
def test_frames_that_break_the_rules_are_refused(stream: bytes) -> None:
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        list(decoder.feed(stream))


def test_a_message_without_an_end_is_cut_short() -> None:
    decoder = Decoder()
    part = frame(1, 107, bytes(MAX_BODY_BYTES), flags=1)
    with pytest.raises(ProtocolError, match="longer than the limit"):
        for _ in range(MAX_MESSAGE_BYTES // MAX_BODY_BYTES + 1):
            assert not list(decoder.feed(part))


def test_a_frame_that_trickles_in_takes_no_more_memory_than_its_length() -> None:
    stream = frame(1, 107, bytes(MAX_BODY_BYTES))
    decoder = Decoder()
    tracemalloc.start()
    try:
        count = sum(1 for at in range(0, len(stream), 64) for _ in decoder.feed(stream[at : at + 64]))
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BODY_BYTES
    finally:
        tracemalloc.stop()
    assert count == 1


# --- messages


@given(st.sampled_from(sorted(number for number, _ in m.layouts().values())), st.binary(max_size=300))
@settings(max_examples=400)
def test_any_body_is_a_message_or_refused(kind: int, body: bytes) -> None:
    try:
        message = m.decode_message(kind, body)
    except ProtocolError:
        return
    with contextlib.suppress(UnicodeEncodeError):
        assert m.decode_message(*_as_bytes(message)) == message


def _as_bytes(message: m.Message) -> tuple[int, bytes]:
    kind, body = m.encode_message(message)
    return kind, b"".join(body)


def test_counts_are_compared_with_what_is_there_before_they_are_believed() -> None:
    for kind in (128, 129, 131, 141, 145):
        with pytest.raises(ProtocolError):
            m.decode_message(kind, b"\xff" * 4)


# --- the far side


@given(st.binary(max_size=2000))
@settings(max_examples=100)
def test_noise_gets_one_refusal(noise: bytes) -> None:
    found = answers(noise)
    assert not noise or isinstance(found[-1][1], m.Failure)
    assert all(request == 0 and isinstance(answer, m.Failure) for request, answer in found)


@given(st.data())
@settings(max_examples=150)
def test_requests_with_any_content_are_answered(data: st.DataObject) -> None:
    """Well-formed frames with bodies that are anything: an answer each, or one refusal and the end."""
    kinds = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))
    stream = HELLO
    for number, kind in enumerate(kinds):
        stream += frame(number + 2, kind, data.draw(st.binary(max_size=120)))
    found = answers(stream)
    assert isinstance(found[0][1], m.Welcome)
    assert all(isinstance(answer, m.Failure | m.Done) for _, answer in found[1:])
    assert len(found) == len(kinds) + 1 or any(request == 0 for request, _ in found)
    for _, answer in found[1:]:
        if isinstance(answer, m.Failure):
            assert answer.code != 1, answer  # a defect of ours


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (said(m.Ping(), 1), "greeting"),
        (said(m.Hello(2, 9, "later"), 1), "versions 2 to 9"),
        (HELLO + said(m.Ping(), 3), "lost, or sent twice"),
        (HELLO + said(m.Ping(), 2) + said(m.Ping(), 2), "lost, or sent twice"),
        (HELLO + said(m.Done(), 2), "not a request"),
        (HELLO + frame(2, 63, b""), "no message number 63"),
        (HELLO + frame(2, 65, b"more"), "longer than it should be"),
        (HELLO + frame(2, 65, b"")[:10], "in the middle"),
    ],
)
def test_what_is_out_of_order_ends_the_connection_with_a_reason(stream: bytes, words: str) -> None:
    last = answers(stream)[-1][1]
    assert isinstance(last, m.Failure)
    assert words in last.message


# --- the near side


class Scripted:
    """A far side that says what it was told to say, whatever it is asked."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self._asked = threading.Event()

    def read(self, limit_bytes: int) -> bytes:
        self._asked.wait(10)
        return self._pieces.pop(0) if self._pieces else b""

    def write(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        self._asked.set()

    def close_write(self) -> None:
        self._asked.set()

    def ended(self) -> LinkError:
        return LinkError("it ended")

    def close(self) -> None:
        pass


@given(st.binary(min_size=1, max_size=500), st.booleans())
@settings(max_examples=100)
def test_a_near_side_survives_any_answer(noise: bytes, framed: bool) -> None:
    with pytest.raises(HoldfastError):
        Connection(Scripted(frame(1, 9, noise) if framed else noise), "far")


@pytest.mark.parametrize(
    "second",
    [said(m.Done(), 9), said(m.Done(), 1), said(m.Bytes(b"x"), 2), said(m.Failure(58, "no", ""), 0)],
    ids=["of the future", "of the past", "of another kind", "a refusal of everything"],
)
def test_answers_that_nobody_asked_for_end_the_connection(second: bytes) -> None:
    near, far = socket.socketpair()

    def script() -> None:
        for answer in (said(m.Welcome(1, "x", append_only=False, read_only=False), 1), second):
            far.recv(1000)
            far.sendall(answer)

    thread = threading.Thread(target=script)
    thread.start()
    connection = Connection(SocketStream(near), "far")
    with pytest.raises(LinkError):
        connection.ask(m.Ping())
    with pytest.raises(LinkError):
        connection.ask(m.Ping())
    thread.join()
    far.close()
    connection.close()


def test_words_of_the_other_side_do_not_reach_the_terminal_as_they_are() -> None:
    error = raised_by(m.Failure(30, "red \x1b[31m\nand \x07more", "do\x00it"), "far")
    assert all(character.isprintable() for character in error.message + error.hint)
    assert type(raised_by(m.Failure(999, "new", ""), "far")).__name__ == "RepositoryError"
    assert failure_of(KeyError("secret")).message == "KeyError on the far side"


# --- clients that may only add


@pytest.fixture
def path(tmp_path: Path) -> str:
    folder = str(tmp_path / "repo")
    with Repository.init(folder, SMALL, notify=quiet) as repository:
        repository.backup(machine_of([content(range(30))]), ONE_WORKER)
        repository.backup(machine_of([content(range(10, 40))]), ONE_WORKER)
    return folder


@pytest.fixture
def client(path: str) -> Iterator[Connection]:
    """An append-only client that has everything open."""
    near, thread = served(Rights(append_only=True))
    connection = Connection(SocketStream(near), "far")
    connection.ask(m.Open(path))
    connection.ask(m.OpenIndex())
    yield connection
    connection.close()
    thread.join(30)


def examples(path: str) -> list[m.Request[m.Message]]:
    with Repository.open(path, notify=quiet) as repository:
        index = repository._index()
        pack = index.packs()[0]
        record = index.scan(None, 1)[0]
        point = index.points()[0]
        config = (Path(path) / "config.json").read_bytes()
    row = rows.encode_pack_row(pack)
    return [
        m.Create(path + "2", config), m.WriteConfig(config), m.Lock(1), m.Lock(2), m.OwnIndex(unless_there=False),
        m.BeginRebuild(), m.EndRebuild(keep=True), m.DeletePack(pack.id), m.Punch(pack.id, ((64, 4096),)),
        m.BeginCollection(), m.NoteCollected((point.id,)), m.Sweep((record[0],), 2**31),
        m.Drop(((record[0], record[1].pack, record[1].offset),)), m.DropAliases((b"x" * 32,)),
        m.ReplacePackRow(pack.number, row, row), m.RemovePack(pack.number),
        m.NoteCopies(bytes(16), "ssh://nas/there", 1, (point.id[:8],), (), (point.id[:8],), ()),
    ]  # fmt: skip


def state(path: str) -> tuple[object, ...]:
    with Repository.open(path, notify=quiet) as repository:
        index = repository._index()
        files = sorted((str(p), p.read_bytes()) for p in (Path(path) / "packs").rglob("*.pack"))
        return (
            index.points(),
            index.scan(None, 10_000),
            index.packs(),
            files,
            (Path(path) / "config.json").read_bytes(),
        )


def test_every_request_that_changes_something_is_refused(client: Connection, path: str) -> None:
    before = state(path)
    tried = examples(path)
    for request in tried:
        with pytest.raises(StorageDenied, match="only add"):
            client.ask(request)
    assert state(path) == before
    requests = {cls for cls in m.layouts() if issubclass(cls, m.Request)}
    from holdfast.repo.wire import rights

    assert requests == {type(one) for one in tried} | rights._READING | rights._ADDING


def test_a_reader_may_not_even_add(path: str) -> None:
    from holdfast.repo.wire import rights

    for cls in rights._ADDING:
        request = cls(*(None for _ in cls.__slots__))
        with pytest.raises(StorageDenied, match="only read"):
            Rights(read_only=True).require(request)


def empty_commit(**changed: object) -> m.Commit:
    values: dict[str, object] = {
        "session": None, "now": NOW, "packs": (), "records": (), "relied": (), "roots": (), "point": None,
        "changes": (), "replacing": (), "ends_session": False, "aliases": {},
    }  # fmt: skip
    return m.Commit(**{**values, **changed})  # type: ignore[arg-type]


def repository_id(path: str) -> RepositoryId:
    with Repository.open(path, notify=quiet) as repository:
        return repository.config.id


def record_of(
    pack: PackId, kind: Kind, payload: bytes, named: bytes | None = None
) -> tuple[RecordHeader, bytes]:
    record_id = RecordId(blake3.blake3(payload).digest() if named is None else named)
    header = RecordHeader(kind, Codec.RAW, 0, len(payload), len(payload), record_id, strong_hash(payload))
    return header, encode_record_header(header, pack) + payload


def test_points_can_not_be_hidden_in_a_batch(client: Connection, path: str) -> None:
    before = state(path)
    with Repository.open(path, notify=quiet) as repository:
        index = repository._index()
        point, (record, place) = index.points()[0], index.scan(None, 1)[0]
        other = new_session_row("backup", NOW)
        index.begin_session(other, 0)
    tries: Sequence[m.Request[m.Message]] = [
        empty_commit(changes=((point.id, NOW * 10**9, 1, None),)),
        empty_commit(changes=((point.id, NOW * 10**9, None, 1),)),
        empty_commit(replacing=((record, place.pack, place.offset),)),
        empty_commit(point=(b"p" * 32, False, True, point.pack, point.record)),
        empty_commit(point=(b"p" * 32, True, False, point.pack, point.record)),
        empty_commit(session=other.id, ends_session=True),
        m.EndSession(other.id),
        m.Heartbeat(other.id, 0),
        m.BeginSession(other.id, rows.encode_session_row(other), 2**40),
    ]
    for request in tries:
        with pytest.raises(StorageDenied):
            client.ask(request)
    with pytest.raises(LinkError, match="manifest"):
        client.ask(empty_commit(point=(b"p" * 32, False, False, point.pack, point.record)))
    assert state(path) == before
    with Repository.open(path, notify=quiet) as repository:
        assert other.id in {row.id for row in repository._index().sessions()}


def test_its_clock_does_not_count(client: Connection, path: str) -> None:
    row = new_session_row("backup", 2**40)
    client.ask(m.BeginSession(row.id, rows.encode_session_row(row), 2**40))
    with Repository.open(path, notify=quiet) as repository:
        (found,) = [one for one in repository._index().sessions() if one.id == row.id]
    assert found.heartbeat < 2**33


Spoil = Callable[[PackId, RepositoryId], bytes]
OTHER = RepositoryId(b"o" * 16)
SPOILED: dict[str, Spoil] = {
    "noise": lambda _pack, _repository: os.urandom(500),
    "a pack header of another repository": lambda pack, _repository: encode_pack_header(
        PackHeader(pack, OTHER, 1)
    ),
    "a mark": lambda pack, repository: (
        encode_pack_header(PackHeader(pack, repository, 1)) + record_of(pack, Kind.MARK, b"forget it")[1]
    ),
    "another content than its id": lambda pack, repository: (
        encode_pack_header(PackHeader(pack, repository, 1))
        + record_of(pack, Kind.CHUNK, b"wrong", b"i" * 32)[1]
    ),
    "a payload that was altered": lambda pack, repository: (
        encode_pack_header(PackHeader(pack, repository, 1))
        + record_of(pack, Kind.CHUNK, b"right")[1][:-1]
        + b"!"
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_nothing_but_sound_records_is_appended(client: Connection, path: str, what: str) -> None:
    pack = PackId(os.urandom(16))
    data = SPOILED[what](pack, repository_id(path))
    client.ask(m.CreatePack(1, pack))
    with pytest.raises((IntegrityError, StorageDenied)):
        for at in range(0, len(data), 50):
            client.ask(m.Append(1, at, data[at : at + 50]))


def test_a_commit_names_only_what_is_there(client: Connection, path: str) -> None:
    pack = PackId(os.urandom(16))
    header, data = record_of(pack, Kind.CHUNK, b"a chunk")
    client.ask(m.CreatePack(1, pack))
    client.ask(m.Append(1, 0, encode_pack_header(PackHeader(pack, repository_id(path), 1)) + data))
    with pytest.raises(ProtocolError, match="out of order"):
        client.ask(m.Append(1, 5, b"again"))
    client.ask(m.SyncWriter(1))
    end = PACK_HEADER_BYTES + len(data)
    good = (header.id, 0, PACK_HEADER_BYTES, 7, 7, 1)
    packs = ((pack, end, 1, 1),)
    for bad in [
        (b"x" * 32, 0, PACK_HEADER_BYTES, 7, 7, 1), (header.id, 0, PACK_HEADER_BYTES + 1, 7, 7, 1),
        (header.id, 0, PACK_HEADER_BYTES, 7, 8, 1), (header.id, 0, end, 7, 7, 1), (header.id, 1, 64, 7, 7, 1),
        (header.id, 0, PACK_HEADER_BYTES, 7, 7, 2), (header.id, 0, PACK_HEADER_BYTES, 7, 7, 127),
    ]:  # fmt: skip
        with pytest.raises((ProtocolError, IntegrityError)):
            client.ask(empty_commit(packs=packs, records=(bad,)))
    with pytest.raises(ProtocolError):
        client.ask(empty_commit(packs=((pack, end, 77, 1),), records=(good,)))
    with pytest.raises(SessionGone):
        own = new_session_row("backup", NOW)
        client.ask(m.BeginSession(own.id, rows.encode_session_row(own), 0))
        client.ask(m.EndSession(own.id))
        client.ask(empty_commit(session=SessionId(own.id)))
    assert client.ask(empty_commit(packs=packs, records=(good,), aliases={b"a" * 32: header.id})).gone == ()
    assert client.ask(m.GetAliases((b"a" * 32,))).ids == (None,)


def test_nothing_committed_is_cut_off(client: Connection, path: str) -> None:
    with Repository.open(path, notify=quiet) as repository:
        (row,) = [row for row in repository._index().packs() if row.state is rows.PackState.OPEN]
    assert client.ask(m.AdoptPack(1, row.id)).value == row.committed_bytes
    with pytest.raises(StorageDenied):
        client.ask(m.Cut(1, row.committed_bytes - 1))
    client.ask(m.CloseWriter(1))
    (file,) = Path(path).rglob(row.id.hex() + ".pack")
    with file.open("ab") as stream:
        stream.write(random.Random(1).randbytes(100))
    assert client.ask(m.AdoptPack(2, row.id)).value is None


def test_header_is_as_long_as_documented() -> None:
    assert len(frame(1, 2, b"")) == HEADER_BYTES
