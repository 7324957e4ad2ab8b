"""Packs that somebody has made up or broken: whatever is in them, recovery ends, soon, and with a known error.

Two kinds of hostility: bytes altered blindly, and records, tables and footers that lie with every checksum in
order (the seed of the checksums is in the pack's own header, so whoever can write there can make them).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from rig.disks import KIB, MIB, content, machine_of
from rig.engine import ONE_WORKER, SMALL, MemoryWorld, restored
from rig.model_index import ModelIndex
from rig.stores import MemoryPackStore

from holdfast.errors import HoldfastError
from holdfast.ids import PackId, RecordId
from holdfast.repo import recover
from holdfast.repo.codec import strong_hash
from holdfast.repo.format.record import (
    FOOTER_BYTES,
    MAX_PACK_BYTES,
    MAX_STORED_BYTES,
    Codec,
    Kind,
    PackFooter,
    PackHeader,
    RecordHeader,
    TableEntry,
    encode_pack_footer,
    encode_pack_header,
    encode_record_header,
    encode_table,
)
from holdfast.repo.packs import LocalPackStore
from holdfast.repo.recover import adopt_pack, adopt_strays, rebuild_index
from holdfast.repo.repository import Repository

UNITS = [*range(1, 40), 0, 3, 4]
TIME_S = 10.0
FACTOR = 25 if os.environ.get("HOLDFAST_SOAK") else 1
U32 = st.integers(0, 2**32 - 1)
SOON = st.sampled_from(
    [0, 1, 63, 64, 72, 100, 4096, 65536, MAX_STORED_BYTES, 2**31, 2**32 - 1]
) | st.integers(0, 1 << 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> MemoryWorld:
    """One point, in sealed packs and an open one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.repo.session._BATCH_BYTES", 300_000)
        made = MemoryWorld(
            tmp_path_factory.mktemp("hostile") / "repo", replace(SMALL, chunk_size_bytes=64 * KIB)
        )
        with made.open() as repository:
            repository.backup(machine_of([content(UNITS)], files={"a.vmx": b"a" * 99}), ONE_WORKER)
    assert len(list(made.store.ids())) >= 3
    return made


def image(store: MemoryPackStore, pack_id: PackId) -> bytes:
    return store.read(pack_id, 0, store.length(pack_id) or 0)


def replaced(world: MemoryWorld, pack_id: PackId, data: bytes) -> MemoryWorld:
    other = world.copy()
    other.store.delete(pack_id)
    writer = other.store.create(pack_id)
    writer.append([data])
    writer.sync()
    writer.close()
    return other


def known_errors_only(what: str, act: Callable[[], object]) -> object:
    began = time.monotonic()
    found: object = None
    code = 20
    try:
        found = act()
    except HoldfastError as error:
        code = error.exit_code
    assert code in {13, *range(20, 30)}, f"{what}: exit code {code}"
    assert time.monotonic() - began < TIME_S, f"{what} took too long"
    return found


def examine(world: MemoryWorld) -> None:
    """Everything that reads packs without trusting them."""
    with world.open() as repository:
        home = repository._home()
        index = ModelIndex()
        known_errors_only("rebuild", lambda: rebuild_index(world.store, index, home, 1))
        known_errors_only(
            "strays", lambda: adopt_strays(world.store.copy(), ModelIndex(), home, 1, grown=True)
        )
        for pack_id in world.store.ids():
            known_errors_only(
                "adopt", lambda p=pack_id: adopt_pack(world.store.copy(), world.index.copy(), p, home, 1)
            )
        known_errors_only("check", lambda: repository.check(read_data=True))
    rebuilt = world.copy()
    rebuilt.index = index
    for state in (world, rebuilt):
        with state.open() as repository:
            points = known_errors_only("points", repository.points)
            for point in points or ():
                found = known_errors_only("restore", lambda p=point: restored(repository, p))
                assert found is None or found == {"disk0.raw": content(UNITS), "a.vmx": b"a" * 99}
            known_errors_only("check", lambda: repository.check(read_data=True))


class TestBlindly:
    @settings(max_examples=40 * FACTOR)
    @given(data=st.data())
    def test_bytes_altered_cut_moved_and_repeated(self, world: MemoryWorld, data: st.DataObject) -> None:
        pack_id = data.draw(st.sampled_from(list(world.store.ids())))
        made = bytearray(image(world.store, pack_id))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, max(len(made) - 1, 0)))
            size = data.draw(st.sampled_from([1, 4, 32, 72, 1000, 40_000]))
            manner = data.draw(st.sampled_from(["flip", "noise", "zero", "drop", "repeat", "cut", "insert"]))
            note(f"{manner} {size} at {at} of {len(made)}")
            if manner == "flip" and made:
                made[at] ^= 1 << data.draw(st.integers(0, 7))
            elif manner == "noise":
                made[at : at + size] = random.Random(at).randbytes(min(size, len(made) - at))
            elif manner == "zero":
                made[at : at + size] = bytes(min(size, len(made) - at))
            elif manner == "drop":
                del made[at : at + size]
            elif manner == "repeat":
                made[at:at] = made[at : at + size]
            elif manner == "cut":
                del made[at:]
            else:
                made[at:at] = random.Random(at).randbytes(size)
        examine(replaced(world, pack_id, bytes(made)))


def header(kind: Kind = Kind.CHUNK, **more) -> RecordHeader:
    base = RecordHeader(kind, Codec.RAW, 0, 0, 0, RecordId(b"i" * 32), strong_hash(b""))
    return base._replace(**more)


class TestWithEveryChecksumInOrder:
    @settings(max_examples=40 * FACTOR)
    @given(
        kind=st.sampled_from(list(Kind)),
        codec=st.sampled_from(list(Codec)),
        flags=st.sampled_from([0, 1, 2, 0x8000]),
        stored=SOON,
        plain=SOON,
        payload=st.binary(max_size=300),
        truthful=st.booleans(),
        end=st.booleans(),
    )
    def test_a_record_that_lies(
        self, world: MemoryWorld, kind, codec, flags, stored, plain, payload, truthful, end
    ) -> None:
        for pack_id in list(world.store.ids())[:2]:
            original = image(world.store, pack_id)
            lie = header(kind, codec=codec, flags=flags, plain_bytes=plain, strong_hash=strong_hash(payload))
            lie = lie._replace(stored_bytes=len(payload) if truthful else stored)
            data = encode_record_header(lie, pack_id) + payload
            made = original + data if end else original[:64] + data + original[64:]
            examine(replaced(world, pack_id, made))

    @settings(max_examples=40 * FACTOR)
    @given(
        entries=st.lists(
            st.tuples(SOON | U32, SOON | U32, SOON, st.sampled_from(list(Kind)), st.sampled_from([0, 1, 2])),
            max_size=8,
        ),
        count=st.none() | U32,
        offset=st.none() | st.integers(0, 2**64 - 1) | SOON,
        kind=st.sampled_from([Kind.TABLE, Kind.TABLE, Kind.CHUNK]),
        ordered=st.booleans(),
    )
    def test_a_table_that_lies(self, world: MemoryWorld, entries, count, offset, kind, ordered) -> None:
        pack_id = next(iter(world.store.ids()))
        body = image(world.store, pack_id)[:5000]
        if ordered:
            entries = sorted(entries)
        rows = [
            TableEntry(RecordId(bytes([n]) * 32), at, s, p, k, Codec.RAW, f)
            for n, (at, s, p, k, f) in enumerate(entries)
        ]
        table = encode_table(rows)
        head = header(kind, stored_bytes=len(table), plain_bytes=len(table), strong_hash=strong_hash(table))
        footer = PackFooter(len(body) if offset is None else offset, len(rows) if count is None else count)
        made = body + encode_record_header(head, pack_id) + table + encode_pack_footer(footer, pack_id)
        assert len(encode_pack_footer(footer, pack_id)) == FOOTER_BYTES
        examine(replaced(world, pack_id, made))

    @pytest.mark.parametrize("first", [bytes(16), b"\xff" * 16], ids=["met first", "met last"])
    def test_a_table_that_gives_one_chunk_the_place_of_another(
        self, world: MemoryWorld, first: bytes
    ) -> None:
        """A true id, with the place of another record: nothing wrong comes back."""
        index = world.index
        rows = [(i, p) for i, p in index.scan(None, 10**6) if p.kind == Kind.CHUNK]
        (one, _), (_, place) = rows[0], rows[1]
        pack_id = PackId(first)
        with world.open() as repository:
            repository_id = repository.config.id
        source = image(world.store, index.pack_id(place.pack))
        record = source[place.offset : place.offset + 72 + place.stored_bytes]
        lie = encode_record_header(
            header(
                id=one,
                stored_bytes=place.stored_bytes,
                plain_bytes=place.plain_bytes,
                codec=Codec.ZSTD,
                strong_hash=strong_hash(record[72:]),
            ),
            pack_id,
        )
        body = encode_pack_header(PackHeader(pack_id, repository_id, 1)) + lie + record[72:]
        table = encode_table(
            [TableEntry(one, 64, place.stored_bytes, place.plain_bytes, Kind.CHUNK, Codec.ZSTD, 0)]
        )
        head = header(
            Kind.TABLE, stored_bytes=len(table), plain_bytes=len(table), strong_hash=strong_hash(table)
        )
        data = (
            body
            + encode_record_header(head, pack_id)
            + table
            + encode_pack_footer(PackFooter(len(body), 1), pack_id)
        )
        spoilt = world.copy()
        writer = spoilt.store.create(pack_id)
        writer.append([data])
        writer.close()
        examine(spoilt)

    def test_a_pack_of_another_repository(self, world: MemoryWorld, tmp_path: Path) -> None:
        other = MemoryWorld(tmp_path / "other")
        with other.open() as repository:
            repository.backup(machine_of([content([77, 78])]), ONE_WORKER)
        spoilt = world.copy()
        for pack_id in other.store.ids():
            writer = spoilt.store.create(pack_id)
            writer.append([image(other.store, pack_id)])
            writer.close()
        examine(spoilt)
        with spoilt.open() as repository:
            rebuilt = rebuild_index(spoilt.store, ModelIndex(), repository._home(), 1)
        assert rebuilt.points == 1
        assert any("another repository" in problem for problem in rebuilt.problems)


@pytest.mark.parametrize("limit", [64 * MIB, pytest.param(MAX_PACK_BYTES, marks=pytest.mark.soak)])
def test_a_pack_beyond_the_limit(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets have 32 bits: what lies beyond is reported, and does not break the index. The file is sparse."""
    monkeypatch.setattr(recover, "MAX_PACK_BYTES", limit)
    path = tmp_path / "repo"
    with Repository.init(str(path), SMALL, notify=lambda _m: None) as repository:
        repository.backup(machine_of([content([1, 2, 3])]), ONE_WORKER)
        store = LocalPackStore(str(path / "packs"))
        pack_id = PackId(b"huge" * 4)
        writer = store.create(pack_id)
        writer.append([encode_pack_header(PackHeader(pack_id, repository.config.id, 1))])
        writer.close()
        payload = b"far away"
        beyond = encode_record_header(
            header(stored_bytes=len(payload), plain_bytes=len(payload), strong_hash=strong_hash(payload)),
            pack_id,
        )
        with open(store.path(pack_id), "r+b") as file:
            file.seek(limit + 5000)
            file.write(beyond + payload)
        rebuilt = repository.rebuild_index()
        assert any("longer" in problem for problem in rebuilt.problems)
        assert rebuilt.points == 1
        assert repository.check(read_data=True).points == 1
        repository.backup(machine_of([content([1, 2, 9])], name="more"), ONE_WORKER)


def test_a_million_headers_that_lead_nowhere(world: MemoryWorld) -> None:
    """Magic numbers in plenty: a search for the next record must not become quadratic."""
    pack_id = next(iter(world.store.ids()))
    noise = b"\xf7HFr" * (1 << 20)
    began = time.monotonic()
    examine(replaced(world, pack_id, image(world.store, pack_id)[:3000] + noise))
    assert time.monotonic() - began < 120
