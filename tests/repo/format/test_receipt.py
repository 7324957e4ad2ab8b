"""Entries of the file of receipts: round trips, frozen bytes, and that damage costs no more than what is damaged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.ids import PointId, RecordId, RepositoryId
from holdfast.repo.format.receipt import RECEIPT_BYTES, decode_receipts, encode_receipt

REPOSITORY, OTHER = RepositoryId(b"r" * 16), RepositoryId(b"o" * 16)

points = st.binary(min_size=32, max_size=32).map(lambda data: PointId(RecordId(data)))
entries = st.lists(st.tuples(points, st.integers(0, 2**64 - 1)), max_size=8, unique_by=lambda entry: entry[0])


def written(some: list[tuple[PointId, int]]) -> bytes:
    return b"".join(encode_receipt(REPOSITORY, *entry) for entry in some)


@given(entries)
def test_what_was_written_is_read(some: list[tuple[PointId, int]]) -> None:
    read = decode_receipts(REPOSITORY, written(some))
    assert (read.received_ms, read.damaged) == (dict(some), 0)
    assert read.sound_bytes == RECEIPT_BYTES * len(some)


@given(entries.filter(bool), st.data())
def test_a_flipped_bit_costs_one_entry(some: list[tuple[PointId, int]], data: st.DataObject) -> None:
    spoilt = bytearray(written(some))
    bit = data.draw(st.integers(0, 8 * len(spoilt) - 1))
    spoilt[bit // 8] ^= 1 << bit % 8
    lost = bit // 8 // RECEIPT_BYTES
    read = decode_receipts(REPOSITORY, bytes(spoilt))
    assert (read.received_ms, read.damaged) == (dict(some[:lost] + some[lost + 1 :]), 1)


@given(entries.filter(bool), st.data())
def test_a_torn_one_is_none(some: list[tuple[PointId, int]], data: st.DataObject) -> None:
    length = data.draw(st.integers(0, RECEIPT_BYTES * len(some)))
    read = decode_receipts(REPOSITORY, written(some)[:length])
    assert read.received_ms == dict(some[: length // RECEIPT_BYTES])
    assert (read.damaged, read.sound_bytes) == (
        int(bool(length % RECEIPT_BYTES)),
        length - length % RECEIPT_BYTES,
    )


def test_what_zeros_and_other_repositories_say_does_not_count() -> None:
    point = PointId(RecordId(b"p" * 32))
    read = decode_receipts(REPOSITORY, bytes(RECEIPT_BYTES) + encode_receipt(OTHER, point, 5))
    assert (read.received_ms, read.damaged, read.sound_bytes) == ({}, 2, 0)


def test_the_first_of_several_counts() -> None:
    point = PointId(RecordId(b"p" * 32))
    assert decode_receipts(REPOSITORY, written([(point, 7), (point, 5)])).received_ms == {point: 7}


def test_frozen_entry() -> None:
    point = PointId(RecordId(bytes(range(32))))
    assert encode_receipt(REPOSITORY, point, 1_700_000_000_123).hex() == (
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f7b68e5cf8b010000a44a1a90"
    )
