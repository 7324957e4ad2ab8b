"""Rows of the index: round trips, frozen bytes, and that a row which was altered or moved is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedIndex, HoldfastError
from holdfast.ids import PackId, PointId, RecordId, RepositoryId, SessionId
from holdfast.repo.format import rows
from holdfast.repo.format.rows import CopyRow, PackRow, PackState, Place, PointRow, PointsDigest, SessionRow

Survives = Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ids = st.binary(min_size=32, max_size=32).map(RecordId)
points = ids.map(PointId)
half_ids = st.binary(min_size=16, max_size=16)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
seconds = st.integers(0, 2**62)

places = st.builds(Place, u32, u32, u32, u32, u32, st.integers(0, 255))
pack_rows = st.builds(
    PackRow, u32, half_ids.map(PackId), st.sampled_from(list(PackState)), u64, u32, u32, u64, u64, u64, u64
)
point_rows = st.builds(
    PointRow, points, st.booleans(), st.booleans(), half_ids.map(PackId), st.binary(max_size=100), u64
)
session_rows = st.builds(
    SessionRow,
    half_ids.map(SessionId),
    texts,
    texts,
    seconds,
    seconds,
    seconds,
    st.lists(points, max_size=3).map(tuple),
)

KEY = RecordId(bytes(range(32)))
PLACE = Place(1, 2, 3, 4, 5, 1)
PACK = PackRow(7, PackId(b"p" * 16), PackState.OPEN, 1, 2, 3, 4, 5, 6, 7)
POINT = PointRow(PointId(KEY), hidden=True, pinned=False, pack=PackId(b"p" * 16), record=b"record")
RECEIVED = PointRow(PointId(KEY), True, False, PackId(b"p" * 16), b"record", received_ms=1_700_000_000_123)
SESSION = SessionRow(SessionId(b"s" * 16), "backup", "høst", 1, 2, 3, (PointId(KEY),))


@given(ids, places)
def test_places(key: RecordId, place: Place) -> None:
    assert rows.decode_place(key, rows.encode_place(key, place)) == place


@given(pack_rows)
def test_packs(row: PackRow) -> None:
    assert rows.decode_pack_row(rows.pack_key(row.number), rows.encode_pack_row(row)) == row


@given(point_rows)
def test_points(row: PointRow) -> None:
    assert rows.decode_point_row(row.id, rows.encode_point_row(row)) == row


@given(session_rows)
def test_sessions(row: SessionRow) -> None:
    assert rows.decode_session_row(row.id, rows.encode_session_row(row)) == row
    assert rows.decode_session_row(row.id, rows.encode_session_row(row.alive_at(9))).heartbeat == 9


@given(st.binary(max_size=20), u64)
def test_counters(key: bytes, number: int) -> None:
    assert rows.decode_counter(key, rows.encode_counter(key, number)) == number


@given(st.binary(min_size=48, max_size=48))
def test_roots(key: bytes) -> None:
    rows.check_root(key, rows.encode_root(key))


@given(st.lists(points, unique=True), st.randoms())
def test_digest_of_points(ids: list[PointId], random: object) -> None:
    import random as r

    digest = PointsDigest(0, bytes(32))
    for point in ids:
        digest = digest.toggled(point, 1)
    assert rows.decode_points_digest(b"points", rows.encode_points_digest(b"points", digest)) == digest
    shuffled = list(ids)
    assert isinstance(random, r.Random)
    random.shuffle(shuffled)
    for point in shuffled:
        digest = digest.toggled(point, -1)
    assert digest == PointsDigest(0, bytes(32))


@given(st.lists(u32, min_size=2))
def test_keys_of_packs_are_in_the_order_of_their_numbers(numbers: list[int]) -> None:
    assert [rows.pack_key(n) for n in sorted(numbers)] == sorted(rows.pack_key(n) for n in numbers)


def test_a_copy_is_read_as_it_was_written() -> None:
    assert rows.decode_copy_row(COPY_KEY, rows.encode_copy_row(COPY)) == COPY
    assert COPY.proven == 3


def test_frozen_rows() -> None:
    assert rows.encode_place(KEY, PLACE).hex() == "0100000002000000030000000400000005000000010016ed1b65"
    assert (
        rows.encode_pack_row(PACK).hex()
        == "7070707070707070707070707070707001000000020000000300000001000000000000000400000000000000050000000000000006000000000000000700000000000000bd538f81"
    )
    assert rows.encode_point_row(POINT).hex() == "01707070707070707070707070707070707265636f7264a9768f46"
    assert (
        rows.encode_point_row(RECEIVED).hex()
        == "05707070707070707070707070707070707b68e5cf8b0100007265636f726483dcf41b"
    )
    assert (
        rows.encode_session_row(SESSION).hex()
        == "7b22686561727462656174223a332c22686f6c6473223a5b2230303031303230333034303530363037303830393061306230633064306530663130313131323133313431353136313731383139316131623163316431653166225d2c22686f7374223a2268c3b87374222c226b696e64223a226261636b7570222c22706964223a312c2273746172746564223a327dab77b450"
    )
    assert rows.encode_counter(b"epoch", 5).hex() == "05000000000000006e5e456e"
    assert (
        rows.encode_points_digest(b"points", PointsDigest(1, KEY)).hex()
        == "0100000000000000000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1ff6cc7925"
    )
    assert rows.encode_root(b"s" * 16 + KEY).hex() == "6d4f6360"


Decode = Callable[[bytes, bytes], object]

COPY = CopyRow(PointId(KEY), RepositoryId(b"R" * 16), 1, 2, 3, "ssh://nas/høst")
COPY_KEY = rows.copy_key(COPY.point, COPY.repository)

EVERY: list[tuple[bytes, bytes, Decode]] = [
    (COPY_KEY, rows.encode_copy_row(COPY), rows.decode_copy_row),
    (KEY, rows.encode_place(KEY, PLACE), rows.decode_place),
    (rows.pack_key(7), rows.encode_pack_row(PACK), rows.decode_pack_row),
    (KEY, rows.encode_point_row(POINT), rows.decode_point_row),
    (KEY, rows.encode_point_row(RECEIVED), rows.decode_point_row),
    (SESSION.id, rows.encode_session_row(SESSION), rows.decode_session_row),
    (b"epoch", rows.encode_counter(b"epoch", 5), rows.decode_counter),
    (b"points", rows.encode_points_digest(b"points", PointsDigest(1, KEY)), rows.decode_points_digest),
    (b"s" * 16 + KEY, rows.encode_root(b"s" * 16 + KEY), rows.check_root),
]
every_row = pytest.mark.parametrize(
    ("key", "value", "decode"),
    EVERY,
    ids=["copy", "place", "pack", "point", "received point", "session", "counter", "digest", "root"],
)


@every_row
def test_every_flipped_bit_is_noticed(key: bytes, value: bytes, decode: Decode) -> None:
    decode(key, value)
    for bit in range(8 * len(value)):
        changed = bytearray(value)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedIndex):
            decode(key, bytes(changed))
    for bit in range(8 * len(key)):
        other = bytearray(key)
        other[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedIndex):
            decode(bytes(other), value)


@every_row
def test_cut_off_and_longer_rows_are_noticed(key: bytes, value: bytes, decode: Decode) -> None:
    for length in range(len(value)):
        with pytest.raises(DamagedIndex):
            decode(key, value[:length])
    with pytest.raises(DamagedIndex):
        decode(key, value + b"\0")


@pytest.mark.parametrize(
    ("key", "value", "decode"),
    [
        row
        for row in EVERY
        if row[2] not in (rows.decode_point_row, rows.decode_session_row, rows.decode_copy_row)
    ],  # of any length
)
def test_rows_of_a_wrong_length_with_a_right_checksum_are_noticed(
    key: bytes, value: bytes, decode: Decode
) -> None:
    for body in {b"", value[:-5], value[:-4] + b"\0"} - {value[:-4]}:
        with pytest.raises(DamagedIndex):
            decode(key, rows._sealed(key, body))


def test_a_point_needs_a_whole_id_as_its_key_and_a_pack() -> None:
    for key, body in ((KEY, bytes(16)), (KEY[:31], bytes(40)), (KEY + b"k", bytes(40))):
        with pytest.raises(DamagedIndex):
            rows.decode_point_row(key, rows._sealed(key, body))


def test_an_unknown_state_of_a_pack_is_noticed() -> None:
    body = bytearray(rows.encode_pack_row(PACK)[:-4])
    body[16] = 9
    with pytest.raises(DamagedIndex, match="unknown state 9"):
        rows.decode_pack_row(rows.pack_key(7), rows._sealed(rows.pack_key(7), bytes(body)))


@given(st.sampled_from(EVERY), st.binary(max_size=120))
def test_fuzz(survives: Survives, row: tuple[bytes, bytes, Decode], body: bytes) -> None:
    key, _, decode = row
    survives(lambda: decode(key, body), (DamagedIndex,))
    survives(lambda: decode(key, rows._sealed(key, body)), (DamagedIndex,))


@given(st.binary(max_size=40), st.text(max_size=20).map(lambda t: t.encode("utf-8", "replace")))
def test_fuzz_sessions(survives: Survives, key: bytes, text: bytes) -> None:
    for body in (
        text,
        b'{"holds":["zz"]}',
        b'{"heartbeat":1,"holds":["00"],"host":"h","kind":"k","pid":1,"started":1}',
        b'{"heartbeat":-1,"holds":[],"host":"h","kind":"k","pid":1,"started":1}',
    ):
        survives(lambda body=body: rows.decode_session_row(key, rows._sealed(key, body)), (DamagedIndex,))  # type: ignore[misc]
