from __future__ import annotations

import random
import struct
import time
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.errors import HoldfastError, SourceFormat, SourceUnsupported
from holdfast.esxi.vmdk.sparse import SparseExtent

RNG = random.Random(3)
GRAIN = 16 * 512
GRAINS = {
    number: RNG.randbytes(GRAIN - 100) if number % 2 else b"text" * 1000
    for number in (0, 1, 2, 7, 8, 30, 31, 62, 63)
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("footer", [False, True])
@pytest.mark.parametrize("capacity", [1024, 1023, 1009])
def test_reads_what_was_written(compressed, footer, capacity, sparse, memory, content) -> None:
    data = sparse.build(GRAINS, compressed=compressed, footer=footer, capacity=capacity)
    extent = SparseExtent(memory(data), "x.vmdk")
    content.check(extent, sparse.content(GRAINS, capacity=capacity))
    assert extent.descriptor_bytes() == sparse.descriptor(capacity).encode()


def test_extents_are_the_grains_with_neighbours_joined(sparse, memory) -> None:
    extent = SparseExtent(memory(sparse.build(GRAINS)), "x.vmdk")
    assert list(extent.data_extents(0, 1024 * 512)) == [
        (0, 3 * GRAIN), (7 * GRAIN, 2 * GRAIN), (30 * GRAIN, 2 * GRAIN), (62 * GRAIN, 2 * GRAIN),
    ]  # fmt: skip
    assert list(extent.data_extents(GRAIN + 1, 7 * GRAIN + 5)) == [(GRAIN + 1, 2 * GRAIN - 1), (7 * GRAIN, 5)]
    assert list(extent.data_extents(3 * GRAIN, 7 * GRAIN)) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_zero_grains_are_holes_if_the_header_says_so(compressed, sparse, memory, content) -> None:
    data = sparse.build(GRAINS, zeros=(3, 9, 40), compressed=compressed)
    extent = SparseExtent(memory(data), "x.vmdk")
    content.check(extent, sparse.content(GRAINS))
    assert (3 * GRAIN, GRAIN) not in list(extent.data_extents(0, 10 * GRAIN))


def test_entries_past_the_capacity_mean_nothing(sparse, memory, content) -> None:
    data = bytearray(sparse.build(GRAINS, capacity=1000))
    table = (
        data.index(struct.pack("<I", len(data) // 512 - 16)) - 6 * 4
    )  # the last table: grain 62 is its 7th entry
    struct.pack_into("<I", data, table + 7 * 4, 0xFFFFFFF0)
    extent = SparseExtent(memory(bytes(data)), "x.vmdk")
    wanted = {number: grain for number, grain in GRAINS.items() if number < 63}
    content.check(extent, sparse.content(wanted, capacity=1000))


def test_compressed_grains_without_markers(sparse, memory, content) -> None:
    body = bytearray(sparse.build({}, compressed=True))
    struct.pack_into("<I", body, 8, 0x10001)
    at = len(body)
    body += zlib.compress(b"abc" * 1000 + bytes(GRAIN - 3000))
    body += bytes(-len(body) % 512)
    tables = struct.unpack_from("<Q", body, 56)[0] * 512
    struct.pack_into("<I", body, tables, tables // 512 + 1)
    struct.pack_into("<I", body, tables + 512, at // 512)
    content.check(SparseExtent(memory(bytes(body)), "x"), sparse.content({0: b"abc" * 1000}))


BIG = 1 << 63


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("magic", b"XXXX", "no sparse header"),
        ("capacity", 0, "capacity"),
        ("capacity", BIG, "capacity"),
        ("capacity", (1 << 37), "grain directory|too many tables"),
        ("grain", 0, "grainSize"),
        ("grain", 3, "grainSize"),
        ("grain", BIG, "grainSize"),
        ("entries", 0, "numGTEsPerGT"),
        ("entries", 0xFFFFFFFF, "numGTEsPerGT"),
        ("directory_at", 0, "gdOffset"),
        ("directory_at", BIG, "grain directory.*past the end"),
        ("directory_at", 0xFFFFFFFFFFFFFFFF, "footer"),
        ("newlines", b"\n \n\n", "line ends were converted"),
        ("descriptor_length", BIG, "descriptorSize"),
    ],
)
def test_nonsense_in_the_header_is_refused(
    field: str, value: int | bytes, words: str, sparse, memory
) -> None:
    data = sparse.build(GRAINS, wrong={field: value})
    with pytest.raises(SourceFormat, match=words) as caught:
        SparseExtent(memory(data), "web1.vmdk")
    assert caught.value.message.startswith("web1.vmdk")


def test_nonsense_that_shows_later(sparse, memory) -> None:
    extent = SparseExtent(memory(sparse.build(GRAINS, wrong={"descriptor_at": BIG})), "web1.vmdk")
    with pytest.raises(SourceFormat, match="descriptor is said to lie"):
        extent.descriptor_bytes()
    with pytest.raises(SourceFormat, match="compressAlgorithm"):
        SparseExtent(memory(sparse.build(GRAINS, compressed=True, wrong={"algorithm": 7})), "x")
    with pytest.raises(SourceFormat, match=r"footer.*gdOffset"):
        data = bytearray(sparse.build(GRAINS, footer=True))
        struct.pack_into("<Q", data, len(data) - 1024 + 56, 0xFFFFFFFFFFFFFFFF)
        SparseExtent(memory(bytes(data)), "x")
    with pytest.raises(SourceFormat, match="contradict"):
        data = bytearray(sparse.build(GRAINS, footer=True))
        struct.pack_into("<Q", data, len(data) - 1024 + 12, 512)
        SparseExtent(memory(bytes(data)), "x")


def test_a_version_of_the_future_is_unsupported(sparse, memory) -> None:
    with pytest.raises(SourceUnsupported, match="version 4"):
        SparseExtent(memory(sparse.build(GRAINS, version=4)), "x")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("footer", [False, True])
def test_a_truncated_file_never_gives_wrong_bytes(compressed, footer, sparse, memory, content) -> None:
    data = sparse.build(GRAINS, compressed=compressed, footer=footer)
    expected = sparse.content(GRAINS)
    refused = []
    for length in [*range(0, 2000, 111), *range(2000, len(data), 3001), len(data) - 1, len(data) - 512]:
        try:
            assert content.of(SparseExtent(memory(data[:length]), "web1.vmdk")) == expected
        except SourceFormat as error:
            refused.append(error.message)
    assert len(refused) > 10
    assert all(message.startswith("web1.vmdk") for message in refused)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda marker, stream: struct.pack("<QI", 999, len(stream)) + stream, "belongs to sector 999"),
        (lambda marker, stream: struct.pack("<QI", 0, 0) + stream, "compressed size of 0"),
        (lambda marker, stream: struct.pack("<QI", 0, 0xFFFFFFFF) + stream, "compressed size of 4294967295"),
        (lambda marker, stream: marker + b"garbage" + stream[7:], "can not be inflated"),
        (lambda marker, stream: marker + stream[:-1] + bytes([stream[-1] ^ 1]), "can not be inflated"),
        (
            lambda marker, stream: struct.pack("<QI", 0, len(stream) // 2) + stream,
            "does not inflate to the size",
        ),
        (lambda marker, stream: pack(zlib.compress(bytes(100))), "does not inflate to the size"),
        (lambda marker, stream: pack(zlib.compress(bytes(GRAIN + 1))), "does not inflate to the size"),
        (lambda marker, stream: pack(zlib.compress(bytes(100 * GRAIN))), "does not inflate to the size"),
    ],
)
def test_a_damaged_compressed_grain_is_refused(change, words: str, sparse, memory, content) -> None:
    data = bytearray(sparse.build({0: RNG.randbytes(GRAIN)}, compressed=True))
    at = (
        struct.unpack_from(
            "<I", data, struct.unpack_from("<I", data, struct.unpack_from("<Q", data, 56)[0] * 512)[0] * 512
        )[0]
        * 512
    )
    length = struct.unpack_from("<QI", data, at)[1]
    marker, stream = bytes(data[at : at + 12]), bytes(data[at + 12 : at + 12 + length])
    changed = change(marker, stream)
    data[at : at + len(changed)] = changed
    with pytest.raises(SourceFormat, match=words):
        content.of(SparseExtent(memory(bytes(data)), "x"))


def pack(stream: bytes) -> bytes:
    return struct.pack("<QI", 0, len(stream)) + stream


def test_a_huge_sparse_disk_needs_little_memory_and_time(memory) -> None:
    """2 TiB, grains of 64 KiB: 65536 tables, of which a few are there."""
    import tracemalloc

    capacity, tables = 1 << 32, 1 << 16
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 1, 1, capacity, 128, 0, 0, 512, 0, 1, 0, 0, b"\n \r\n", 0
    )
    directory = [0] * tables
    body = bytearray(header.ljust(512, b"\0")) + bytes(4 * tables)
    wanted = []
    for number in (0, 1, 40_000, tables - 1):
        directory[number] = len(body) // 512
        grain_at = len(body) // 512 + 4
        body += struct.pack("<I", grain_at).ljust(2048, b"\0") + bytes([number % 251]) * 65536
        wanted.append((number * 512 * 65536, 65536))
    struct.pack_into(f"<{tables}I", body, 512, *directory)
    file = memory(bytes(body))
    tracemalloc.start()
    begin = time.monotonic()
    extent = SparseExtent(file, "x")
    assert list(extent.data_extents(0, capacity * 512)) == wanted
    buffer = bytearray(65536)
    for offset, _ in wanted:
        extent.read_into(offset, memoryview(buffer))
        assert len(set(buffer)) == 1
    assert time.monotonic() - begin < 5
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


PLAIN = {"compressed": False, "footer": False}
KINDS = [PLAIN, {"compressed": True, "footer": False}, {"compressed": True, "footer": True}]
INTERESTING = st.sampled_from([0, 1, 2, 127, 128, 255])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(
        st.tuples(st.integers(0, 4095), INTERESTING | st.integers(0, 255)), min_size=1, max_size=6
    ),
    at_end=st.booleans(),
)
def test_mutated_files_give_data_or_a_clear_error(kind, changes, at_end, sparse, memory) -> None:
    data = bytearray(sparse.build({0: b"a" * 100, 9: b"b" * GRAIN}, capacity=200, **kind))
    for place, value in changes:
        data[-1 - place % len(data) if at_end else place % len(data)] = value
    try:
        extent = SparseExtent(memory(bytes(data)), "x")
        extent.descriptor_bytes()
        size = extent.size_bytes
        for number, _ in enumerate(extent.data_extents(0, min(size, 1 << 30))):
            if number > 1000:
                break
        extent.read_into(0, memoryview(bytearray(min(size, 1 << 20))))
        extent.read_into(size - 1, memoryview(bytearray(1)))
    except HoldfastError as error:
        told = error.message
    else:
        told = "x"
    assert told.startswith("x")
