"""Packs and records: round trips, frozen bytes, and what damaged or hostile bytes lead to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedData, HoldfastError, UnsupportedFormat
from holdfast.ids import PackId, RecordId, RepositoryId
from holdfast.repo.format import record as r
from holdfast.repo.format.record import Codec, Kind, PackFooter, PackHeader, RecordHeader, TableEntry

Survives = Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]

PACK = PackId(bytes.fromhex("00112233445566778899aabbccddeeff"))
OTHER = PackId(bytes.fromhex("ff112233445566778899aabbccddeeff"))
HEADER = RecordHeader(
    Kind.CHUNK, Codec.ZSTD, r.ENCRYPTED, 4711, 65536, RecordId(bytes(range(32))), bytes(range(16))
)

u32 = st.integers(0, 2**32 - 1)
ids = st.binary(min_size=32, max_size=32).map(RecordId)
pack_ids = st.binary(min_size=16, max_size=16).map(PackId)
kinds = st.sampled_from(list(Kind))
codecs = st.sampled_from(list(Codec))
flags = st.sampled_from([0, r.ENCRYPTED])
stored = st.integers(0, r.MAX_STORED_BYTES)
plain = st.integers(0, r.MAX_PLAIN_BYTES)
headers = st.builds(
    RecordHeader, kinds, codecs, flags, stored, plain, ids, st.binary(min_size=16, max_size=16)
)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# --- round trips


@given(headers, pack_ids)
def test_record_header_round_trip(header: RecordHeader, pack_id: PackId) -> None:
    data = r.encode_record_header(header, pack_id)
    assert len(data) == r.RECORD_HEADER_BYTES
    assert r.decode_record_header(data, pack_id) == header
    assert r.decode_record_header(memoryview(data + b"payload"), pack_id) == header


@given(pack_ids, st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1))
def test_pack_header_round_trip(pack_id: PackId, repository: bytes, created_ms: int) -> None:
    header = PackHeader(pack_id, RepositoryId(repository), created_ms)
    assert r.decode_pack_header(r.encode_pack_header(header)) == header


@given(st.integers(0, 2**64 - 1), u32, pack_ids)
def test_footer_round_trip(offset: int, entries: int, pack_id: PackId) -> None:
    footer = PackFooter(offset, entries)
    assert r.decode_pack_footer(r.encode_pack_footer(footer, pack_id), pack_id) == footer


@given(
    st.lists(
        st.tuples(ids, st.integers(0, 100), st.integers(0, 5000), plain, kinds, codecs, flags), max_size=20
    )
)
def test_table_round_trip(parts: list[tuple[RecordId, int, int, int, Kind, Codec, int]]) -> None:
    entries = []
    offset = r.PACK_HEADER_BYTES
    for record_id, gap, size, plain_bytes, kind, codec, flag in parts:
        offset += gap
        entries.append(TableEntry(record_id, offset, size, plain_bytes, kind, codec, flag))
        offset += r.RECORD_HEADER_BYTES + size
    assert r.decode_table(r.encode_table(entries)) == entries


# --- frozen bytes


def test_frozen_record_header() -> None:
    assert r.encode_record_header(HEADER, PACK).hex() == (
        "f748467201010100"  # magic, kind, codec, flags
        "6712000000000100"  # lengths
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # id
        "000102030405060708090a0b0c0d0e0f"  # strong hash
        "3834f9e5d72dd400"  # check
    )


def test_frozen_pack_header() -> None:
    header = PackHeader(PACK, RepositoryId(bytes(range(16))), 1_700_000_000_000)
    assert (
        r.encode_pack_header(header).hex()
        == "484f4c445041434b010040000000000000112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f0068e5cf8b010000f677710d7f85746a"
    )


def test_frozen_footer() -> None:
    assert (
        r.encode_pack_footer(PackFooter(0x123456, 789), PACK).hex()
        == "484f4c445345414c56341200000000001503000000000000a55d4ebefc03991b"
    )


def test_frozen_table() -> None:
    entries = [
        TableEntry(RecordId(b"\1" * 32), 64, 100, 200, Kind.CHUNK, Codec.ZSTD, 1),
        TableEntry(RecordId(b"\2" * 32), 236, 300, 300, Kind.NODE, Codec.RAW, 0),
    ]
    assert r.encode_table(entries).hex() == (
        "01" * 32 + "4000000064000000c800000001010100" + "02" * 32 + "ec0000002c0100002c01000002000000"
    )


# --- damage


def test_every_flipped_bit_of_a_record_header_is_noticed() -> None:
    data = r.encode_record_header(HEADER, PACK)
    for bit in range(8 * len(data)):
        with pytest.raises(DamagedData):
            r.decode_record_header(flipped(data, bit), PACK)


def test_every_flipped_byte_of_a_record_header_is_noticed() -> None:
    data = r.encode_record_header(HEADER, PACK)
    for at in range(len(data)):
        for change in range(1, 256):
            with pytest.raises(DamagedData):
                r.decode_record_header(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :], PACK)


def test_every_flipped_bit_of_a_pack_header_is_noticed() -> None:
    data = r.encode_pack_header(PackHeader(PACK, RepositoryId(b"r" * 16), 5))
    for bit in range(8 * len(data)):
        with pytest.raises(DamagedData):
            r.decode_pack_header(flipped(data, bit))


def test_every_flipped_bit_of_a_footer_is_noticed() -> None:
    data = r.encode_pack_footer(PackFooter(1000, 3), PACK)
    for bit in range(8 * len(data)):
        assert r.decode_pack_footer(flipped(data, bit), PACK) is None


def test_what_belongs_to_another_pack_is_refused() -> None:
    with pytest.raises(DamagedData):
        r.decode_record_header(r.encode_record_header(HEADER, PACK), OTHER)
    assert r.decode_pack_footer(r.encode_pack_footer(PackFooter(1000, 3), PACK), OTHER) is None


def test_cut_off_headers_are_refused() -> None:
    header, pack = (
        r.encode_record_header(HEADER, PACK),
        r.encode_pack_header(PackHeader(PACK, RepositoryId(PACK), 1)),
    )
    for length in range(len(header)):
        with pytest.raises(DamagedData):
            r.decode_record_header(header[:length], PACK)
    for length in range(len(pack)):
        with pytest.raises(DamagedData):
            r.decode_pack_header(pack[:length])
    footer = r.encode_pack_footer(PackFooter(1, 1), PACK)
    assert r.decode_pack_footer(footer[:-1], PACK) is None
    assert r.decode_pack_footer(footer + b"\0", PACK) is None


def header_with(offset: int, value: bytes) -> bytes:
    """A header with other bytes and the right checksum, as a hostile hand would write it."""
    import xxhash

    data = bytearray(r.encode_record_header(HEADER, PACK))
    data[offset : offset + len(value)] = value
    check = xxhash.xxh3_64_intdigest(bytes(data[:64]), int.from_bytes(PACK[:8], "little"))
    return bytes(data[:64]) + check.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (4, b"\0"), (4, b"\5"), (4, b"\x7e"), (4, b"\x80"), (4, b"\xff"),  # kinds
        (5, b"\2"), (5, b"\xff"),  # codecs
        (6, b"\3\0"), (6, b"\0\1"), (6, b"\xff\xff"),  # flags
    ],
)  # fmt: skip
def test_unknown_kinds_codecs_and_flags_are_unsupported_not_damaged(offset: int, value: bytes) -> None:
    with pytest.raises(UnsupportedFormat):
        r.decode_record_header(header_with(offset, value), PACK)


@pytest.mark.parametrize(
    ("offset", "limit"), [(8, r.MAX_STORED_BYTES), (12, r.MAX_PLAIN_BYTES)], ids=["stored", "plain"]
)
def test_lengths_beyond_the_limit_are_refused(offset: int, limit: int) -> None:
    r.decode_record_header(header_with(offset, limit.to_bytes(4, "little")), PACK)
    for length in (limit + 1, 2**31, 2**32 - 1):
        with pytest.raises(DamagedData):
            r.decode_record_header(header_with(offset, length.to_bytes(4, "little")), PACK)


def test_pack_header_of_a_later_version_is_unsupported() -> None:
    import xxhash

    data = r.encode_pack_header(PackHeader(PACK, RepositoryId(PACK), 1))
    for at, value in ((8, b"\2\0"), (10, b"\x48\0"), (12, b"\1\0\0\0")):
        changed = data[:at] + value + data[at + len(value) : 56]
        with pytest.raises(UnsupportedFormat):
            r.decode_pack_header(changed + xxhash.xxh3_64_intdigest(changed).to_bytes(8, "little"))


ENTRY = TableEntry(RecordId(b"e" * 32), 64, 100, 200, Kind.CHUNK, Codec.ZSTD, 1)


@pytest.mark.parametrize(
    "entries",
    [
        [ENTRY._replace(offset=63)],  # inside of the pack's header
        [ENTRY, ENTRY._replace(offset=64 + 72 + 99)],  # inside of the one before
        [ENTRY._replace(offset=500), ENTRY],  # backwards
        [ENTRY, ENTRY],
        [ENTRY._replace(stored_bytes=r.MAX_STORED_BYTES + 1)],
        [ENTRY._replace(plain_bytes=r.MAX_PLAIN_BYTES + 1)],
        [ENTRY._replace(offset=2**32 - 100)],  # beyond the end of any pack
    ],
)
def test_impossible_tables_are_damaged(entries: list[TableEntry]) -> None:
    with pytest.raises(DamagedData):
        r.decode_table(r.encode_table(entries))


def test_tables_with_unknown_values_are_unsupported() -> None:
    data = r.encode_table([ENTRY])
    for at, value in ((44, 5), (45, 2), (46, 2), (47, 1)):
        with pytest.raises(UnsupportedFormat):
            r.decode_table(data[:at] + bytes([value]) + data[at + 1 :])


def test_a_table_of_the_most_entries_fits_a_record() -> None:
    size = 5 * r.TABLE_ENTRY_BYTES
    assert len(r.encode_table([ENTRY] * 5)) == size
    assert r.MAX_TABLE_ENTRIES * r.TABLE_ENTRY_BYTES <= r.MAX_PLAIN_BYTES


# --- fuzz: nothing but the documented errors


def mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    """Valid bytes with some bytes replaced, removed or repeated; and arbitrary bytes."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        data = bytearray(valid)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(0, len(data) - 1)))
            action = draw(st.integers(0, 3))
            if action == 0 and data:
                data[at] = draw(st.integers(0, 255))
            elif action == 1:
                del data[at : at + draw(st.integers(1, 8))]
            elif action == 2:
                data[at:at] = draw(st.binary(max_size=8))
            else:
                data = data[:at]
        return bytes(data)

    return build() | st.binary(max_size=200)


@given(mutated(r.encode_record_header(HEADER, PACK)))
def test_fuzz_record_header(survives: Survives, data: bytes) -> None:
    survives(lambda: r.decode_record_header(data, PACK), (DamagedData, UnsupportedFormat))


@given(mutated(r.encode_pack_header(PackHeader(PACK, RepositoryId(PACK), 1))))
def test_fuzz_pack_header(survives: Survives, data: bytes) -> None:
    survives(lambda: r.decode_pack_header(data), (DamagedData, UnsupportedFormat))


@given(mutated(r.encode_pack_footer(PackFooter(1, 1), PACK)))
def test_fuzz_footer(data: bytes) -> None:
    found = r.decode_pack_footer(data, PACK)
    assert found in (None, PackFooter(1, 1))


@given(mutated(r.encode_table([ENTRY, ENTRY._replace(offset=300)])))
def test_fuzz_table(survives: Survives, data: bytes) -> None:
    survives(lambda: r.decode_table(data), (DamagedData, UnsupportedFormat))
