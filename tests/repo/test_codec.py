"""From plaintext to stored bytes and back: nothing that was altered comes out as a plaintext."""

from __future__ import annotations

import os
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import blake3
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedData, InternalError
from holdfast.ids import PackId, RecordId
from holdfast.repo.codec import NONCE_BYTES, TAG_BYTES, Opener, Sealed, Sealer, strong_hash
from holdfast.repo.format.record import (
    ENCRYPTED,
    MAX_PLAIN_BYTES,
    MAX_STORED_BYTES,
    RECORD_HEADER_BYTES,
    Codec,
    Kind,
    RecordHeader,
    decode_record_header,
)
from holdfast.repo.keys import Keys, clear_keys, secret_keys

MASTER = bytes(range(32))
CLEAR = clear_keys()
GCM = secret_keys("aes256-gcm", MASTER)
CHACHA = secret_keys("chacha20-poly1305", MASTER)
TEXT = b"some text that repeats, " * 200
NOISE = blake3.blake3(b"noise").digest(length=5000)
PACK = PackId(bytes(range(16)))
KINDS = (Kind.CHUNK, Kind.NODE, Kind.MANIFEST, Kind.MARK)

every_key = pytest.mark.parametrize(
    "keys", [CLEAR, GCM, CHACHA], ids=["clear", "aes256-gcm", "chacha20-poly1305"]
)
secret_key = pytest.mark.parametrize("keys", [GCM, CHACHA], ids=["aes256-gcm", "chacha20-poly1305"])


def seal(keys: Keys, plaintext: bytes, level: int = 1, kind: Kind = Kind.CHUNK) -> Sealed:
    return Sealer(keys, level).seal(kind, keys.record_id(kind, plaintext), plaintext)


def altered(header: RecordHeader, **fields: Any) -> RecordHeader:
    return header._replace(**fields)


def rehashed(sealed: Sealed, payload: bytes, **fields: Any) -> Sealed:
    """A record with another payload whose lengths and strong hash are right, as a hostile hand would make it."""
    header = altered(sealed.header, stored_bytes=len(payload), strong_hash=strong_hash(payload), **fields)
    return Sealed(header, payload)


def refused(keys: Keys, sealed: Sealed) -> str:
    with pytest.raises(DamagedData) as caught:
        Opener(keys).open(sealed.header, sealed.payload)
    return caught.value.message


# --- round trips


@given(
    st.sampled_from([CLEAR, GCM, CHACHA]),
    st.sampled_from(KINDS),
    st.integers(0, 6),
    st.binary(max_size=300) | st.binary(min_size=1, max_size=20).map(lambda text: text * 200),
)
def test_round_trip(keys: Keys, kind: Kind, level: int, plaintext: bytes) -> None:
    sealed = seal(keys, plaintext, level, kind)
    header = sealed.header
    assert Opener(keys).open(header, sealed.payload) == plaintext
    assert Opener(keys).open(header, memoryview(sealed.payload)) == plaintext
    assert header.stored_bytes == len(sealed.payload)
    assert header.plain_bytes == len(plaintext)
    assert header.strong_hash == blake3.blake3(sealed.payload).digest()[:16]
    assert bool(header.flags & ENCRYPTED) == (keys is not CLEAR)
    stored = sealed.to_bytes(PACK)
    assert decode_record_header(stored, PACK) == header
    assert stored[RECORD_HEADER_BYTES:] == sealed.payload


@every_key
def test_largest_record(keys: Keys) -> None:
    plaintext = os.urandom(MAX_PLAIN_BYTES)
    sealed = seal(keys, plaintext)
    assert sealed.header.codec is Codec.RAW
    assert sealed.header.stored_bytes <= MAX_STORED_BYTES
    assert decode_record_header(sealed.to_bytes(PACK), PACK) == sealed.header
    assert Opener(keys).open(sealed.header, sealed.payload) == plaintext


def test_compression_is_kept_only_if_it_saves() -> None:
    assert seal(CLEAR, TEXT).header.codec is Codec.ZSTD
    assert seal(CLEAR, NOISE).header.codec is Codec.RAW
    assert seal(CLEAR, TEXT, level=0).header.codec is Codec.RAW
    assert seal(CLEAR, b"").header.codec is Codec.RAW


def test_the_level_may_change_on_the_way() -> None:
    sealer = Sealer(CLEAR, 1)
    sealer.level = 0
    assert sealer.seal(Kind.CHUNK, CLEAR.record_id(Kind.CHUNK, TEXT), TEXT).header.codec is Codec.RAW


# --- encryption


@secret_key
def test_the_same_plaintext_is_never_stored_as_the_same_bytes(keys: Keys) -> None:
    one = Sealer(keys, 1)
    record_id = keys.record_id(Kind.CHUNK, TEXT)
    records = [one.seal(Kind.CHUNK, record_id, TEXT) for _ in range(3)] + [seal(keys, TEXT)]
    assert len({bytes(sealed.payload) for sealed in records}) == 4
    assert len({bytes(sealed.payload)[NONCE_BYTES:] for sealed in records}) == 4
    assert len({bytes(sealed.payload)[:NONCE_BYTES] for sealed in records}) == 4
    assert len({bytes(sealed.payload)[:16] for sealed in records}) == 2, "one salt for each writer"
    assert len({sealed.header.id for sealed in records}) == 1, "or nothing would be found again"


@secret_key
def test_threads_share_a_sealer_without_sharing_numbers(keys: Keys) -> None:
    sealer = Sealer(keys, 0)
    record_id = keys.record_id(Kind.CHUNK, b"x")
    nonces: list[bytes] = []

    def work() -> None:
        nonces.extend(
            [bytes(sealer.seal(Kind.CHUNK, record_id, b"x").payload[:NONCE_BYTES]) for _ in range(500)]
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(nonces)) == 2000


@secret_key
def test_a_salt_and_a_number_that_repeat_make_no_two_texts_under_one_key(keys: Keys) -> None:
    """A machine that was set back to an earlier state goes on with the same salt and the same numbers."""
    streams = []
    for plaintext in (bytes(64), bytes(63) + b"\1"):
        sealer = Sealer(keys, 0)
        sealer._salt = b"salt" * 4
        sealed = sealer.seal(Kind.CHUNK, keys.record_id(Kind.CHUNK, plaintext), plaintext)
        assert sealed.payload[:NONCE_BYTES] == b"salt" * 4 + bytes(8)
        ciphertext = sealed.payload[NONCE_BYTES:-TAG_BYTES]
        streams.append(bytes(a ^ b for a, b in zip(ciphertext, plaintext, strict=True)))
    assert streams[0] != streams[1]
    assert sum(a == b for a, b in zip(*streams, strict=True)) < 10, "the key streams have nothing in common"


@secret_key
def test_a_sealer_does_not_cross_a_fork(keys: Keys) -> None:
    sealer = Sealer(keys, 0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            sealer.seal(Kind.CHUNK, RecordId(bytes(32)), b"x")
        except InternalError:
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"refused"
    os.close(reader)


HEADER_CHANGES: dict[str, Callable[[RecordHeader], RecordHeader]] = {
    "kind": lambda h: altered(h, kind=Kind.NODE),
    "codec": lambda h: altered(h, codec=Codec.RAW if h.codec is Codec.ZSTD else Codec.ZSTD),
    "plain_bytes": lambda h: altered(h, plain_bytes=h.plain_bytes + 1),
    "id": lambda h: altered(h, id=RecordId(bytes(32))),
    "flags": lambda h: altered(h, flags=0),
    "stored_bytes": lambda h: altered(h, stored_bytes=h.stored_bytes - 1),
}


@every_key
@pytest.mark.parametrize("field", HEADER_CHANGES)
@pytest.mark.parametrize("text", [TEXT, NOISE], ids=["zstd", "raw"])
def test_every_field_of_the_header_is_vouched_for(keys: Keys, text: bytes, field: str) -> None:
    """Changed in the header alone, with the header's checksum made anew: the record does not open."""
    sealed = seal(keys, text)
    header = HEADER_CHANGES[field](sealed.header)
    if field == "flags" and keys is CLEAR:
        header = altered(sealed.header, flags=ENCRYPTED)
    refused(keys, Sealed(header, sealed.payload))


@secret_key
def test_stored_length_and_payload_cut_together_are_refused(keys: Keys) -> None:
    sealed = seal(keys, NOISE)
    for length in (
        0,
        NONCE_BYTES,
        NONCE_BYTES + TAG_BYTES - 1,
        NONCE_BYTES + TAG_BYTES,
        len(sealed.payload) - 1,
    ):
        refused(keys, rehashed(sealed, sealed.payload[:length]))


@every_key
def test_every_flipped_bit_of_a_payload_is_noticed(keys: Keys) -> None:
    sealed = seal(keys, b"twenty-two bytes long.")
    for bit in range(8 * len(sealed.payload)):
        changed = bytearray(sealed.payload)
        changed[bit // 8] ^= 1 << bit % 8
        assert "damaged in its pack" in refused(keys, Sealed(sealed.header, bytes(changed)))
        assert "wrong key, or forged" in refused(keys, rehashed(sealed, bytes(changed)))


@secret_key
def test_payloads_can_not_be_exchanged(keys: Keys) -> None:
    one, two = seal(keys, b"A" * 100, 0), seal(keys, b"B" * 100, 0)
    refused(keys, rehashed(one, two.payload))
    spliced = one.payload[:NONCE_BYTES] + two.payload[NONCE_BYTES:]
    refused(keys, rehashed(two, spliced))


def test_another_key_opens_nothing() -> None:
    sealed = seal(GCM, TEXT)
    for keys in (secret_keys("aes256-gcm", bytes(32)), CHACHA):
        assert "wrong key" in refused(keys, sealed)


def test_clear_and_encrypted_records_do_not_pass_for_each_other() -> None:
    assert "is encrypted in a repository that is not" in refused(CLEAR, seal(GCM, TEXT))
    for keys in (GCM, CHACHA):
        clear = seal(CLEAR, TEXT)
        assert "is not encrypted in an encrypted repository" in refused(keys, clear)
        forged = Sealed(altered(clear.header, id=keys.record_id(Kind.CHUNK, TEXT)), clear.payload)
        assert "is not encrypted" in refused(keys, forged)
    assert Opener(GCM).can_open(seal(GCM, TEXT).header)
    assert not Opener(GCM).can_open(seal(CLEAR, TEXT).header)
    assert not Opener(CLEAR).can_open(seal(GCM, TEXT).header)


def test_a_genuine_record_under_another_id_is_refused() -> None:
    sealed = seal(CLEAR, TEXT)
    header = altered(sealed.header, id=CLEAR.record_id(Kind.CHUNK, b"what was asked for"))
    assert "not what its id says" in refused(CLEAR, Sealed(header, sealed.payload))


def test_a_chunk_never_passes_for_a_node_or_a_manifest() -> None:
    """A guest chooses its chunks; their ids are in another domain."""
    sealed = seal(CLEAR, TEXT)
    for kind in KINDS[1:]:
        refused(CLEAR, Sealed(altered(sealed.header, kind=kind), sealed.payload))


# --- hostile frames


def framed(frame: bytes, plain_bytes: int, plaintext: bytes) -> Sealed:
    header = RecordHeader(
        Kind.CHUNK,
        Codec.ZSTD,
        0,
        len(frame),
        plain_bytes,
        CLEAR.record_id(Kind.CHUNK, plaintext),
        strong_hash(frame),
    )
    return Sealed(header, frame)


def test_frames_with_and_without_their_content_size_are_read() -> None:
    for stated in (True, False):
        frame = zstandard.ZstdCompressor(write_content_size=stated).compress(TEXT)
        sealed = framed(frame, len(TEXT), TEXT)
        assert Opener(CLEAR).open(sealed.header, sealed.payload) == TEXT


def test_frames_that_lie_about_their_size_are_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=True).compress(TEXT)
    for plain_bytes in (0, 1, len(TEXT) - 1, len(TEXT) + 1, MAX_PLAIN_BYTES):
        refused(CLEAR, framed(frame, plain_bytes, TEXT))
    bare = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    for plain_bytes in (0, 1, len(TEXT) - 1, len(TEXT) + 1, MAX_PLAIN_BYTES):
        refused(CLEAR, framed(bare, plain_bytes, TEXT))


def test_what_is_not_exactly_one_frame_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(TEXT)
    empty = zstandard.ZstdCompressor().compress(b"")
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    for payload in (
        frame + b"\0",
        frame + frame,
        frame + empty,
        frame + skippable,
        frame[:-1],
        frame[1:],
        b"",
        b"\0" * 20,
    ):
        refused(CLEAR, framed(payload, len(TEXT), TEXT))
    refused(CLEAR, framed(frame[: len(frame) // 2] + empty, len(TEXT), TEXT))


def test_frames_with_a_dictionary_are_refused() -> None:
    dictionary = zstandard.ZstdCompressionDict(TEXT, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(NOISE + TEXT)
    refused(CLEAR, framed(frame, len(NOISE + TEXT), NOISE + TEXT))


@pytest.mark.parametrize("stated", [True, False])
def test_a_bomb_takes_no_more_memory_than_was_declared(stated: bool) -> None:
    bomb = zstandard.ZstdCompressor(level=3, write_content_size=stated).compress(bytes(256 << 20))
    assert len(bomb) < 64 << 10
    tracemalloc.start()
    try:
        refused(CLEAR, framed(bomb, 65536, b""))
        refused(CLEAR, framed(bomb, 0, b""))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("log", [10, 20, 27, 28, 31])
def test_windows_up_to_128_mib_are_read_and_no_larger_ones(log: int) -> None:
    """A frame by hand: magic, no options, the window, one last raw block of 10 bytes."""
    frame = (
        b"\x28\xb5\x2f\xfd\0" + bytes([log - 10 << 3]) + (10 << 3 | 1).to_bytes(3, "little") + b"0123456789"
    )
    sealed = framed(frame, 10, b"0123456789")
    if log <= 27:
        assert Opener(CLEAR).open(sealed.header, sealed.payload) == b"0123456789"
    else:
        refused(CLEAR, sealed)


def test_a_header_beyond_the_limit_is_refused_by_the_opener_too() -> None:
    sealed = seal(CLEAR, TEXT)
    refused(CLEAR, Sealed(altered(sealed.header, plain_bytes=MAX_PLAIN_BYTES + 1), sealed.payload))


@given(
    st.sampled_from([CLEAR, GCM, CHACHA]),
    st.sampled_from(list(Codec)),
    st.integers(0, 300),
    st.binary(max_size=300),
)
def test_fuzz(keys: Keys, codec: Codec, plain_bytes: int, payload: bytes) -> None:
    flags = ENCRYPTED if keys.cipher else 0
    for prefix in (b"", b"\x28\xb5\x2f\xfd"):
        stored = prefix + payload
        header = RecordHeader(
            Kind.CHUNK, codec, flags, len(stored), plain_bytes, RecordId(b"i" * 32), strong_hash(stored)
        )
        refused(keys, Sealed(header, stored))


# --- frozen bytes


FROZEN = {
    "clear": "f7484672010100001700000018010000f81ccbbe6d13b631b6bb8aabd78be0cc008736530bf30ec5639eda6b84a6635dd33dfb64b00e8a9aa8df2a0327ce380feef6077125c1da7e28b52ffd00007500003866726f7a656e2001000e528b11",
    "aes256-gcm": "f7484672010101003f00000018010000fe77353ad491076f8f462affccd6ee6bce653132eb3faf99e598e8d7f6f68e986d6ea3fc44ba04c20508eeb6600141660451094150518eac5353535353535353535353535353535300000000000000000aa84a9219448eb0a0adf4f65e8dc27a65edcb1538f6778936d00b1e1ab9dfa312a2d66829b482",
    "chacha20-poly1305": "f7484672010101003f00000018010000fe77353ad491076f8f462affccd6ee6bce653132eb3faf99e598e8d7f6f68e981cc20865857300245ee786bd86b1c2c035d86a419711d7ef5353535353535353535353535353535300000000000000006e02c08ee967e594248011f5863fb70f0f0b97111d0a751346e49e54ec066077e1e924451e6cba",
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_records_open(name: str) -> None:
    """Records as they were written when the format was frozen, header and payload."""
    keys = CLEAR if name == "clear" else secret_keys(name, MASTER)  # type: ignore[arg-type]
    data = bytes.fromhex(FROZEN[name])
    header = decode_record_header(data, PACK)
    assert header.codec is Codec.ZSTD
    assert Opener(keys).open(header, data[RECORD_HEADER_BYTES:]) == b"frozen " * 40
