"""Keys: what a password opens, what it does not, and that nobody changes the configuration behind its back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedConfig, UsageError, WrongPassword
from holdfast.ids import RepositoryId
from holdfast.repo import keys as k
from holdfast.repo.format import canonical
from holdfast.repo.format.config import (
    MAX_SLOTS,
    Cipher,
    Compression,
    Config,
    ScryptParameters,
    decode_config,
    encode_config,
)
from holdfast.repo.format.record import Kind

CLEAR = Config(
    RepositoryId(bytes(range(16))), 1_700_000_000, "aligned", 65536, 16 << 20, 256 << 20, Compression(1), None
)
MASTER = bytes(range(32))
CIPHERS: tuple[Cipher, ...] = ("aes256-gcm", "chacha20-poly1305")
NOW = 1_700_000_000


@pytest.fixture(autouse=True)
def _quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a guess is not what is tested here."""
    monkeypatch.setattr(k, "SCRYPT_N", 16)


def encrypted(cipher: Cipher = "aes256-gcm", password: str = "secret") -> Config:
    return k.with_encryption(CLEAR, cipher, MASTER, password, NOW)


def stored(config: Config) -> Config:
    """The configuration as it comes back from the disk."""
    return decode_config(encode_config(config))


def tampered(config: Config, **members: Any) -> Config:
    """The configuration with other members and a right checksum: what storage can do without the key.

    Args:
        members: path with `__` for `.` -> value, or a function of the old value.
    """
    value = json.loads(encode_config(config))
    for path, new in members.items():
        at: Any = value
        *parents, last = path.split("__")
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else at[name]
        at[last] = new(at[last]) if callable(new) else new
    del value["checksum"]
    value["checksum"] = blake3.blake3(canonical.encode(value)).hexdigest()
    return decode_config(json.dumps(value).encode())


# --- passwords


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("password", ["secret", "p", "päss wörd 🔑", "x" * 5000, "tab\tnewline\n", "\udcff"])
def test_the_password_opens_the_master_key(cipher: Cipher, password: str) -> None:
    config = stored(encrypted(cipher, password))
    assert config.encryption is not None
    master, slot = k.unlock(config, [password])
    assert master == MASTER
    assert slot == config.encryption.slots[0]


@pytest.mark.parametrize("password", ["", "Secret", "secret ", " secret", "secre", "sec\0ret", "secret\n"])
def test_another_password_opens_nothing(password: str) -> None:
    with pytest.raises(WrongPassword):
        k.unlock(stored(encrypted()), [password])


def test_normal_forms_are_different_passwords() -> None:
    config = encrypted(password="caf\u00e9")
    with pytest.raises(WrongPassword):
        k.unlock(config, ["cafe\u0301"])


def test_the_first_password_that_fits_is_taken() -> None:
    assert k.unlock(encrypted(), ["wrong", "secret", "other"])[0] == MASTER
    with pytest.raises(WrongPassword):
        k.unlock(encrypted(), [])


def test_an_empty_password_is_refused() -> None:
    with pytest.raises(UsageError):
        encrypted(password="")
    with pytest.raises(UsageError):
        k.add_slot(encrypted(), MASTER, "", "empty", NOW)


def test_a_clear_repository_has_no_keys() -> None:
    for attempt in (
        lambda: k.unlock(CLEAR, ["secret"]),
        lambda: k.master_fits(CLEAR, MASTER),
        lambda: k.add_slot(CLEAR, MASTER, "x", "x", NOW),
        lambda: k.remove_slot(CLEAR, MASTER, "x"),
    ):
        with pytest.raises(UsageError, match="not encrypted"):
            attempt()


def test_the_default_cost_is_what_the_document_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k, "SCRYPT_N", 1 << 16)
    config = stored(encrypted())
    assert config.encryption is not None
    kdf = config.encryption.slots[0].kdf
    assert (kdf.n, kdf.r, kdf.p, len(kdf.salt)) == (65536, 8, 2, 32)
    assert k.unlock(config, ["secret"])[0] == MASTER


# --- several passwords


def test_slots_come_and_go() -> None:
    config, second = k.add_slot(encrypted(), MASTER, "two", "night shift", NOW)
    config, third = k.add_slot(config, MASTER, "three", "", NOW)
    config = stored(config)
    assert [k.unlock(config, [p])[0] for p in ("secret", "two", "three")] == [MASTER] * 3
    assert k.unlock(config, ["two"])[1] == second
    assert second.label == "night shift"
    config = stored(k.remove_slot(config, MASTER, second.id))
    with pytest.raises(WrongPassword):
        k.unlock(config, ["two"])
    assert k.unlock(config, ["three"])[1] == third
    config, changed = k.replace_slot(config, MASTER, third.id, "new", NOW + 1)
    config = stored(config)
    assert k.unlock(config, ["new"])[1] == changed
    assert changed.label == third.label
    assert changed.id != third.id
    with pytest.raises(WrongPassword):
        k.unlock(config, ["three"])


def test_no_two_slots_share_salt_nonce_or_id() -> None:
    config = encrypted()
    for number in range(8):
        config, _ = k.add_slot(config, MASTER, "secret", str(number), NOW)
    assert config.encryption is not None
    slots = config.encryption.slots
    for values in (
        [s.kdf.salt for s in slots],
        [s.nonce for s in slots],
        [s.wrapped for s in slots],
        [s.id for s in slots],
    ):
        assert len(set(values)) == len(slots)


def test_the_last_slot_stays_and_unknown_ones_are_named() -> None:
    config = encrypted()
    assert config.encryption is not None
    with pytest.raises(UsageError, match="last key"):
        k.remove_slot(config, MASTER, config.encryption.slots[0].id)
    with pytest.raises(UsageError, match="no key 'ffff'"):
        k.remove_slot(config, MASTER, "ffff")


def test_the_number_of_slots_is_bounded_but_a_password_can_still_be_changed() -> None:
    config = encrypted()
    for number in range(MAX_SLOTS - 1):
        config, _ = k.add_slot(config, MASTER, f"p{number}", "", NOW)
    with pytest.raises(UsageError, match=f"{MAX_SLOTS} keys"):
        k.add_slot(config, MASTER, "one more", "", NOW)
    assert config.encryption is not None
    config, _ = k.replace_slot(config, MASTER, config.encryption.slots[0].id, "changed", NOW)
    assert k.unlock(stored(config), ["changed"])[0] == MASTER


# --- what the storage's owner may try


SETTINGS: dict[str, Any] = {
    "chunker__name": "fixed",
    "chunker__chunk_size_bytes": 131072,
    "segment_bytes": 32 << 20,
    "id": "ff" * 16,
    "encryption__cipher": "chacha20-poly1305",
    "encryption__slots__0__id": "00" * 8,
    "encryption__slots__0__kdf__n": 8,
    "encryption__slots__0__kdf__r": 4,
    "encryption__slots__0__kdf__p": 1,
    "encryption__slots__0__kdf__salt": "00" * 32,
    "encryption__slots__0__nonce": "00" * 12,
    "encryption__slots__0__wrapped": "00" * 48,
}


@pytest.mark.parametrize("member", SETTINGS)
def test_a_password_opens_nothing_under_altered_settings(member: str) -> None:
    """The slot's associated data: the wrapping does not come off."""
    with pytest.raises(WrongPassword):
        k.unlock(tampered(encrypted(), **{member: SETTINGS[member]}), ["secret"])


OTHERS: dict[str, Any] = {
    "pack_bytes": 1 << 30,
    "compression__level": 19,
    "compression": {"level": 0, "name": "none"},
    "created": 1,
    "encryption__slots__0__label": "mine",
    "encryption__slots__0__created": 1,
    "encryption__slots": lambda slots: slots * 2,
    "encryption__mac": "00" * 32,
    "features__optional": ["harmless"],
    "version__write": 2,
    "later": 1,
    "encryption__later": 1,
}


@pytest.mark.parametrize("member", OTHERS)
def test_the_mac_covers_every_other_member(member: str) -> None:
    config = tampered(encrypted(), **{member: OTHERS[member]})
    with pytest.raises(DamagedConfig, match="not the one that was written with its key"):
        k.unlock(config, ["secret"])
    assert not k.master_fits(config, MASTER)


def test_what_is_not_altered_fits() -> None:
    config = tampered(encrypted(), created=CLEAR.created)
    assert k.unlock(config, ["secret"])[0] == MASTER
    assert k.master_fits(config, MASTER)
    assert not k.master_fits(config, bytes(32))


def test_a_configuration_of_a_later_version_fits_with_all_its_members() -> None:
    """A later version signs members that this one does not know; reading must go on."""
    value = json.loads(encode_config(encrypted()))
    value["later"], value["features"]["optional"] = {"x": [1]}, ["later"]
    del value["checksum"], value["encryption"]["mac"]
    key = blake3.blake3(MASTER, derive_key_context=k.CONFIG_CONTEXT).digest()
    value["encryption"]["mac"] = blake3.blake3(canonical.encode(value), key=key).hexdigest()
    value["checksum"] = blake3.blake3(canonical.encode(value)).hexdigest()
    config = decode_config(json.dumps(value).encode())
    assert k.unlock(config, ["secret"])[0] == MASTER
    assert config.write_blocker


def test_a_slot_can_not_be_carried_to_another_repository() -> None:
    ours = encrypted()
    theirs = k.with_encryption(
        replace(CLEAR, id=RepositoryId(b"other repository")), "aes256-gcm", bytes(32), "theirs", NOW
    )
    assert ours.encryption is not None
    assert theirs.encryption is not None
    mixed = replace(ours, encryption=replace(ours.encryption, slots=theirs.encryption.slots))
    with pytest.raises(WrongPassword):
        k.unlock(stored(mixed), ["theirs"])


def test_a_slot_of_another_master_key_is_noticed() -> None:
    """Somebody who knows a password of his own wraps a master key of his own for this repository."""
    ours = encrypted()
    his = k.with_encryption(CLEAR, "aes256-gcm", bytes(32), "his", NOW)
    assert ours.encryption is not None
    assert his.encryption is not None
    mixed = replace(ours, encryption=replace(ours.encryption, slots=his.encryption.slots))
    with pytest.raises(DamagedConfig):
        k.unlock(stored(mixed), ["his"])


# --- what follows from a master key


def test_no_key_serves_two_purposes() -> None:
    keys = k.secret_keys("aes256-gcm", MASTER)
    every = [
        keys.data_key,
        keys.chunker_seed,
        *dict(keys.id_keys).values(),
        k.derive(MASTER, k.CONFIG_CONTEXT),
        MASTER,
    ]
    assert len(set(every)) == len(every)
    contexts = [
        k.RECORD_CONTEXT, k.CHUNKER_CONTEXT, k.CONFIG_CONTEXT, *k.SECRET_ID_CONTEXTS.values(), *k.CLEAR_ID_CONTEXTS.values(),
    ]  # fmt: skip
    assert len(set(contexts)) == len(contexts)


def test_frozen_keys() -> None:
    keys = k.secret_keys("aes256-gcm", MASTER)
    assert (
        blake3.blake3(keys.data_key + b"".join(key for _, key in keys.id_keys)).hexdigest()
        == "687048a746af7fb17d0ce870934aebd4210fe8f7e7c530e8a27d736a8a48bddb"
    )
    assert keys.chunker_seed is not None
    assert keys.chunker_seed.hex() == "b03e4c8ff9bab2960483d0d73ff0da56c3cc96eb34d82b6c909104561e24f3d0"


def test_frozen_slot() -> None:
    """A wrapping made once, with fixed salt and nonce, is opened for ever."""
    config = decode_config(b"""\
{
  "checksum": "4dc2ee7994adf18938e75d500f2e2283bb109287f9923015e5bce65f7dc54784",
  "chunker": {
    "chunk_size_bytes": 65536,
    "name": "aligned"
  },
  "compression": {
    "level": 1,
    "name": "zstd"
  },
  "created": 1700000000,
  "encryption": {
    "cipher": "aes256-gcm",
    "mac": "e7c5e316eed905776331e694a8bb7ce350f580df31ea593ac2b334787702b4ad",
    "slots": [
      {
        "created": 1700000000,
        "id": "0123456789abcdef",
        "kdf": {
          "n": 16,
          "name": "scrypt",
          "p": 2,
          "r": 8,
          "salt": "6465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f80818283"
        },
        "label": "first",
        "nonce": "32333435363738393a3b3c3d",
        "wrapped": "b9dfa3d7a71523ca81c97171ae0cd0980a069da3937d033a8e319d514da117aed77ba7cae266c54040c8314654cc1ef6"
      }
    ]
  },
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
""")
    assert k.unlock(config, ["correct horse"])[0] == MASTER


def test_new_master_keys_differ() -> None:
    assert len({k.new_master_key() for _ in range(10)}) == 10
    assert len(k.new_master_key()) == k.MASTER_KEY_BYTES


@given(st.binary(max_size=100), st.binary(min_size=32, max_size=32))
def test_ids_tell_kinds_and_repositories_apart(plaintext: bytes, master: bytes) -> None:
    kinds = (Kind.CHUNK, Kind.NODE, Kind.MANIFEST, Kind.MARK)
    families = [
        k.clear_keys(),
        k.secret_keys("aes256-gcm", master),
        k.secret_keys("aes256-gcm", master[::-1] + b"x"),
    ]
    ids = [keys.record_id(kind, plaintext) for keys in families for kind in kinds]
    assert len(set(ids)) == len(ids)
    for keys in families:
        for kind in Kind:
            assert keys.namer(kind)(memoryview(plaintext)) == keys.record_id(kind, plaintext)
    assert k.clear_keys().record_id(Kind.CHUNK, plaintext) == blake3.blake3(plaintext).digest()


@pytest.mark.parametrize("cipher", CIPHERS)
def test_the_cipher_is_the_one_that_was_asked_for(cipher: Cipher) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    library = {"aes256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}[cipher](MASTER)
    assert k.aead(cipher, MASTER).encrypt(bytes(12), b"text", b"data") == library.encrypt(
        bytes(12), b"text", b"data"
    )


def test_scrypt_is_scrypt() -> None:
    """RFC 7914, section 12, second vector (its first 32 bytes)."""
    parameters = ScryptParameters(1024, 8, 16, b"NaCl")
    assert k._password_key("password", parameters).hex() == (
        "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
    )
