"""The configuration: round trips, frozen text, tampering, versions and features."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedConfig, HoldfastError, UnsupportedFormat
from holdfast.ids import RepositoryId
from holdfast.repo.format import canonical, config
from holdfast.repo.format.config import (
    Compression,
    Config,
    Encryption,
    KeySlot,
    ScryptParameters,
    decode_config,
    encode_config,
)

Survives = Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]

SLOT = KeySlot(
    "0123456789abcdef",
    "first",
    1_700_000_000,
    ScryptParameters(1 << 16, 8, 2, bytes(range(32))),
    bytes(12),
    bytes(48),
)
CLEAR = Config(
    RepositoryId(bytes(range(16))), 1_700_000_000, "aligned", 65536, 16 << 20, 256 << 20, Compression(1), None
)
SECRET = replace(CLEAR, encryption=Encryption("aes256-gcm", bytes(range(32)), (SLOT,)))


def raw(made: Config) -> dict[str, Any]:
    value = json.loads(encode_config(made))
    assert isinstance(value, dict)
    return value


def text_of(value: dict[str, Any]) -> bytes:
    """The text of a configuration with a right checksum, as a hostile hand would make it."""
    value = {key: inner for key, inner in value.items() if key != "checksum"}
    value["checksum"] = blake3.blake3(canonical.encode(value)).hexdigest()
    return json.dumps(value).encode()


def put(value: dict[str, Any], path: str, inner: object) -> dict[str, Any]:
    at: Any = value
    *parents, last = path.split(".")
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = inner
    return value


def content(made: Config) -> Config:
    """A configuration without what only says where it came from."""
    return replace(made, signed_body=b"")


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
times = st.integers(0, 2**40)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    def slot() -> KeySlot:
        kdf = ScryptParameters(
            1 << draw(st.integers(1, 16)), draw(st.integers(1, 8)), draw(st.integers(1, 4)),
            draw(st.binary(min_size=16, max_size=64)),
        )  # fmt: skip
        return KeySlot(
            draw(st.binary(min_size=8, max_size=8)).hex(), draw(names), draw(times), kdf,
            draw(st.binary(min_size=12, max_size=12)), draw(st.binary(min_size=48, max_size=48)),
        )  # fmt: skip

    def encryption() -> Encryption:
        cipher = draw(st.sampled_from(["aes256-gcm", "chacha20-poly1305"]))
        slots = tuple(slot() for _ in range(draw(st.integers(1, 3))))
        return Encryption(cipher, draw(st.binary(min_size=32, max_size=32)), slots)

    level = draw(st.integers(0, 22))
    return Config(
        RepositoryId(draw(st.binary(min_size=16, max_size=16))),
        draw(times),
        draw(names),
        draw(st.integers(512, 16 << 20)),
        1 << draw(st.integers(20, 30)),
        draw(st.integers(1 << 20, 2 << 30)),
        Compression(level, auto=bool(level) and draw(st.booleans())),
        encryption() if draw(st.booleans()) else None,
    )


@given(configs())
def test_round_trip(made: Config) -> None:
    data = encode_config(made)
    assert content(decode_config(data)) == made
    assert encode_config(decode_config(data)) == data


def test_frozen_text() -> None:
    assert (
        encode_config(CLEAR).decode()
        == """\
{
  "checksum": "c88a459058e6a2e041fe0e4dee21d017e63d300b135904606f90810250dff42b",
  "chunker": {
    "chunk_size_bytes": 65536,
    "name": "aligned"
  },
  "compression": {
    "level": 1,
    "name": "zstd"
  },
  "created": 1700000000,
  "encryption": null,
  "features": {
    "optional": [],
    "required": []
  },
  "id": "000102030405060708090a0b0c0d0e0f",
  "pack_bytes": 268435456,
  "segment_bytes": 16777216,
  "type": "holdfast-repository",
  "version": {
    "read": 1,
    "write": 1
  }
}
"""
    )
    assert (
        blake3.blake3(encode_config(SECRET)).hexdigest()
        == "bb5d9c6cd1a28f2e7f162234c2b6b6f8552e1efc70cddcbbbe47679717f81055"
    )


def test_layout_and_order_of_the_text_mean_nothing() -> None:
    value = raw(SECRET)
    backwards = dict(reversed(value.items()))
    for text in (
        json.dumps(backwards),
        json.dumps(value, indent=8),
        json.dumps(value, ensure_ascii=True) + "\n\n",
    ):
        assert content(decode_config(text.encode())) == SECRET


@pytest.mark.parametrize("made", [CLEAR, SECRET], ids=["clear", "encrypted"])
def test_every_flipped_bit_is_noticed_or_harmless(made: Config) -> None:
    """White space outside of strings may change into other white space: that is all."""
    data = encode_config(made)
    harmless = 0
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert content(decode_config(bytes(changed))) == made
        except DamagedConfig:
            continue
        assert data[bit // 8 : bit // 8 + 1].isspace()
        harmless += 1
    assert harmless < len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"null", b"[]", b"1", b'"x"', b"\xff", b"{", b"[" * 200_000, b'{"checksum":1}', b'{"a":NaN}',
        b'{"checksum":"' + b"0" * 64 + b'"}', b'{"a":"\\ud800","checksum":""}', b'{"a":1.5}', b'{"n":' + b"9" * 5000 + b"}",
        b" " * (config.MAX_CONFIG_BYTES + 1), encode_config(CLEAR)[:-20], encode_config(CLEAR) + b"x",
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_what_is_no_configuration_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedConfig):
        decode_config(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("type", "other"), ("id", "00"), ("id", None), ("created", -1), ("created", 1.5), ("chunker", "aligned"),
        ("chunker.name", 1), ("chunker.chunk_size_bytes", 511), ("chunker.chunk_size_bytes", (16 << 20) + 1),
        ("segment_bytes", 3 << 20), ("segment_bytes", 1 << 19), ("segment_bytes", 1 << 31), ("pack_bytes", 0),
        ("pack_bytes", (2 << 30) + 1), ("compression.level", 23), ("compression.level", 0), ("compression.name", "none"),
        ("version", 1), ("version.read", "1"), ("features", []), ("features.required", "x"), ("features.optional", [1]),
        ("encryption", []), ("encryption.mac", "00" * 16), ("encryption.slots", []), ("encryption.slots", [1]),
        ("encryption.slots.0.id", "0123"), ("encryption.slots.0.nonce", "00" * 11), ("encryption.slots.0.wrapped", "00" * 47),
        ("encryption.slots.0.kdf.n", 3), ("encryption.slots.0.kdf.n", 1), ("encryption.slots.0.kdf.n", 1 << 21),
        ("encryption.slots.0.kdf.r", 0), ("encryption.slots.0.kdf.r", 33), ("encryption.slots.0.kdf.p", 17),
        ("encryption.slots.0.kdf.salt", "00" * 15), ("encryption.slots.0.kdf.salt", "00" * 65),
    ],
)  # fmt: skip
def test_members_of_wrong_type_or_value_are_damaged(path: str, value: object) -> None:
    with pytest.raises(DamagedConfig):
        decode_config(text_of(put(raw(SECRET), path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version.read", 2), ("features.required", ["new"]), ("encryption.cipher", "rot13"), ("compression.name", "lz9"),
        ("encryption.slots.0.kdf.name", "argon2id"),
    ],
)  # fmt: skip
def test_what_only_a_later_version_knows_is_unsupported(path: str, value: object) -> None:
    with pytest.raises(UnsupportedFormat):
        decode_config(text_of(put(raw(SECRET), path, value)))


def test_a_later_version_may_be_readable_but_not_writable() -> None:
    assert decode_config(encode_config(SECRET)).write_blocker == ""
    newer = decode_config(text_of(put(raw(SECRET), "version.write", 2)))
    assert "newer format version" in newer.write_blocker
    optional = decode_config(text_of(put(raw(SECRET), "features.optional", ["b", "a"])))
    assert "a, b" in optional.write_blocker
    assert content(replace(optional, write_blocker="")) == SECRET


def test_a_damaged_configuration_is_never_taken_for_one_of_a_later_version() -> None:
    data = encode_config(SECRET).replace(b'"read": 1', b'"read": 2')
    with pytest.raises(DamagedConfig):
        decode_config(data)


def test_more_slots_than_the_limit_are_refused() -> None:
    slots = raw(SECRET)["encryption"]["slots"]
    decode_config(text_of(put(raw(SECRET), "encryption.slots", slots * config.MAX_SLOTS)))
    with pytest.raises(DamagedConfig):
        decode_config(text_of(put(raw(SECRET), "encryption.slots", slots * (config.MAX_SLOTS + 1))))


def test_the_signed_body_holds_every_member_but_checksum_and_mac() -> None:
    value = put(put(raw(SECRET), "later", {"a": 1}), "encryption.later", [])
    signed = decode_config(text_of(value)).signed_body
    del value["checksum"], value["encryption"]["mac"]
    assert signed == canonical.encode(value)
    assert config.config_body(content(SECRET)) == decode_config(encode_config(SECRET)).signed_body


@given(st.data())
def test_fuzz(survives: Survives, data: st.DataObject) -> None:
    text = bytearray(encode_config(SECRET))
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    for hostile in (bytes(text), data.draw(st.binary(max_size=50))):
        survives(lambda hostile=hostile: decode_config(hostile), (DamagedConfig,))  # type: ignore[misc]


values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | names | st.just("00" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
member_paths = st.sampled_from(
    [
        *raw(SECRET),
        "encryption.cipher",
        "encryption.slots",
        "encryption.slots.0.kdf",
        "encryption.slots.0.kdf.n",
        "version.read",
    ]
)


@given(member_paths, values)
def test_fuzz_of_members(survives: Survives, path: str, value: object) -> None:
    hostile = text_of(put(raw(SECRET), path, value))
    survives(lambda: decode_config(hostile), (DamagedConfig, UnsupportedFormat))


@pytest.mark.parametrize(
    ("text", "compression"),
    [("none", Compression(0)), ("zstd:7", Compression(7)), ("auto", Compression(1, auto=True))],
)
def test_names_of_compressions(text: str, compression: Compression) -> None:
    assert str(compression) == text
