"""Keys: from a password to the master key, and from the master key to all others (FORMAT.md, "Keys").

The master key is 32 random bytes drawn by `init`. Each key slot of the configuration holds it wrapped
under one password (scrypt, then the repository's AEAD). Everything else is derived from the master key by
BLAKE3's key derivation, one context string per purpose, so that no key serves two purposes.

A repository without encryption has no secret: ids are plain BLAKE3 and the chunker's seed is published.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Protocol

import blake3

from holdfast.errors import DamagedConfig, UsageError, WrongPassword
from holdfast.ids import NodeId, RecordId
from holdfast.repo.format import canonical
from holdfast.repo.format.config import (
    MAC_BYTES,
    MAX_SLOTS,
    Cipher,
    Config,
    Encryption,
    KeySlot,
    ScryptParameters,
    config_body,
)
from holdfast.repo.format.record import Kind

__all__ = [
    "MASTER_KEY_BYTES",
    "Aead",
    "Keys",
    "add_slot",
    "aead",
    "clear_keys",
    "master_fits",
    "new_master_key",
    "remove_slot",
    "replace_slot",
    "secret_keys",
    "unlock",
    "with_encryption",
]

MASTER_KEY_BYTES: Final = 32
ALIAS_BYTES: Final = 16

SCRYPT_N: Final = 1 << 16
SCRYPT_R: Final = 8
SCRYPT_P: Final = 2
"""64 MiB and about a third of a second for one guess: one of the settings that OWASP's password storage
cheat sheet counts as equivalent to 128 MiB with p = 1, and it fits the memory bound of every command."""

_CONTEXT: Final = "holdfast 2026-11-22 v1 "
RECORD_CONTEXT: Final = _CONTEXT + "record encryption"
CHUNKER_CONTEXT: Final = _CONTEXT + "chunker seed"
CONFIG_CONTEXT: Final = _CONTEXT + "configuration"
ALIAS_CONTEXT: Final = _CONTEXT + "key of aliases"
CLEAR_ALIAS_CONTEXT: Final = _CONTEXT + "clear alias"
SECRET_ID_CONTEXTS: Final = {
    Kind.CHUNK: _CONTEXT + "key of chunk ids",
    Kind.NODE: _CONTEXT + "key of node ids",
    Kind.MANIFEST: _CONTEXT + "key of manifest ids",
    Kind.MARK: _CONTEXT + "key of mark ids",
}
CLEAR_ID_CONTEXTS: Final = {
    Kind.NODE: _CONTEXT + "clear node id",
    Kind.MANIFEST: _CONTEXT + "clear manifest id",
    Kind.MARK: _CONTEXT + "clear mark id",
}
"""Context strings of BLAKE3's key derivation mode: one for each use, frozen with the format."""


class Aead(Protocol):
    """Authenticated encryption with associated data, RFC 5116 style."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        """Ciphertext and 16 bytes of tag."""
        ...

    def encrypt_into(
        self,
        nonce: bytes,
        data: bytes | memoryview,
        associated_data: bytes | None,
        buf: bytearray | memoryview,
    ) -> int:
        """`encrypt` into a buffer of just the right length."""
        ...

    def decrypt(self, nonce: bytes, data: bytes | memoryview, associated_data: bytes | None) -> bytes:
        """The plaintext; raises `cryptography.exceptions.InvalidTag`."""
        ...


@cache
def aead_maker(cipher: Cipher) -> Callable[[bytes], Aead]:
    """What makes the AEAD of that name from a key of 32 bytes."""
    # Imported here: a repository that is not encrypted starts faster without.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    return AESGCM if cipher == "aes256-gcm" else ChaCha20Poly1305


def aead(cipher: Cipher, key: bytes) -> Aead:
    """The AEAD of that name with that key of 32 bytes."""
    return aead_maker(cipher)(key)


def derive(secret: bytes, context: str) -> bytes:
    """32 bytes for one purpose, by BLAKE3's key derivation mode."""
    return blake3.blake3(secret, derive_key_context=context).digest()


@dataclass(frozen=True, slots=True)
class Keys:
    """All that is needed to name, read and write records.

    Args:
        cipher: None if payloads are stored in the clear; then the other secrets are empty.
        data_key: records are encrypted under keys derived from it.
        id_keys: kind -> key of the keyed BLAKE3 that makes ids; empty without encryption.
        chunker_seed: None stands for the published seed.
        alias_key: key of the names of aliases; empty without encryption.
    """

    cipher: Cipher | None
    data_key: bytes
    id_keys: tuple[tuple[Kind, bytes], ...]
    chunker_seed: bytes | None
    alias_key: bytes = b""

    def record_id(self, kind: Kind, plaintext: bytes | memoryview) -> RecordId:
        """The id of a record: BLAKE3-256 of its plaintext, separated by kind, keyed when encrypted.

        Without encryption the id of a chunk is the plain BLAKE3 of its bytes. Nodes and manifests
        have a domain of their own, so that no guest can store a chunk that passes for one.
        """
        if self.id_keys:
            for known, key in self.id_keys:
                if known is kind:
                    return RecordId(blake3.blake3(plaintext, key=key).digest())
        context = CLEAR_ID_CONTEXTS.get(kind)
        if context is None:
            return RecordId(blake3.blake3(plaintext).digest())
        return RecordId(blake3.blake3(plaintext, derive_key_context=context).digest())

    def alias(self, kind: Kind, digest: bytes) -> bytes:
        """The name in the index of a hash that somebody else has made of a chunk, or of a leaf's parts: 16 bytes.

        Keyed when encrypted, so that the index tells nobody what plain hashes there are.
        """
        named = bytes([kind]) + digest
        if self.alias_key:
            return blake3.blake3(named, key=self.alias_key).digest(length=ALIAS_BYTES)
        return blake3.blake3(named, derive_key_context=CLEAR_ALIAS_CONTEXT).digest(length=ALIAS_BYTES)

    def hidden_digest(self, leaf: NodeId, digest: bytes) -> bytes:
        """The digest of a leaf's parts as the index keeps it under the leaf's id; the same function gives it back.

        When encrypted it is covered by a pad that the key and the id make. An id stands for one content and so for one
        digest: no pad is used for two.
        """
        if not self.alias_key:
            return digest
        pad = blake3.blake3(leaf, key=self.alias_key).digest()
        return bytes(one ^ other for one, other in zip(digest, pad, strict=True))

    def mark_id(self, plaintext: bytes) -> RecordId:
        """`record_id` of a mark."""
        return self.record_id(Kind.MARK, plaintext)

    def namer(self, kind: Kind) -> Callable[[bytes | memoryview], RecordId]:
        """`record_id` of one kind as a function of the plaintext alone, for loops."""
        if kind is Kind.CHUNK and not self.id_keys:
            return lambda plaintext: RecordId(blake3.blake3(plaintext).digest())
        for known, key in self.id_keys:
            if known is kind:
                return lambda plaintext: RecordId(blake3.blake3(plaintext, key=key).digest())
        return lambda plaintext: self.record_id(kind, plaintext)


def clear_keys() -> Keys:
    """The keys of a repository that is not encrypted."""
    return Keys(None, b"", (), None)


def secret_keys(cipher: Cipher, master: bytes) -> Keys:
    """The keys that follow from a master key."""
    return Keys(
        cipher,
        derive(master, RECORD_CONTEXT),
        tuple((kind, derive(master, context)) for kind, context in SECRET_ID_CONTEXTS.items()),
        derive(master, CHUNKER_CONTEXT),
        derive(master, ALIAS_CONTEXT),
    )


def new_master_key() -> bytes:
    """32 bytes from the operating system's generator."""
    return os.urandom(MASTER_KEY_BYTES)


def _associated(config: Config, cipher: Cipher, slot: KeySlot) -> bytes:
    """What a slot's tag also vouches for: storage can not swap the settings below under a password."""
    return canonical.encode(
        {
            "chunk_size_bytes": config.chunk_size_bytes,
            "chunker": config.chunker,
            "cipher": cipher,
            "id": slot.id,
            "kdf": {"n": slot.kdf.n, "p": slot.kdf.p, "r": slot.kdf.r, "salt": slot.kdf.salt.hex()},
            "repository": config.id.hex(),
            "segment_bytes": config.segment_bytes,
        }
    )


def _password_key(password: str, kdf: ScryptParameters) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=kdf.salt, length=32, n=kdf.n, r=kdf.r, p=kdf.p).derive(
        password.encode("utf-8", "surrogateescape")
    )


def _new_slot(config: Config, cipher: Cipher, master: bytes, password: str, label: str, now: int) -> KeySlot:
    if not password:
        raise UsageError(
            "the password is empty", hint="set HOLDFAST_PASSWORD, _PASSWORD_FILE or _PASSWORD_COMMAND"
        )
    kdf = ScryptParameters(SCRYPT_N, SCRYPT_R, SCRYPT_P, os.urandom(32))
    slot = KeySlot(os.urandom(8).hex(), label, now, kdf, os.urandom(12), bytes(48))
    wrapped = aead(cipher, _password_key(password, kdf)).encrypt(
        slot.nonce, master, _associated(config, cipher, slot)
    )
    return replace(slot, wrapped=wrapped)


def authenticated(config: Config, master: bytes) -> Config:
    """The configuration with a MAC over all of it, made with the master key."""
    encryption = _encryption(config)
    made = replace(config, signed_body=b"")
    return replace(made, encryption=replace(encryption, mac=_config_mac(made, master)))


def _config_mac(config: Config, master: bytes) -> bytes:
    return blake3.blake3(config_body(config), key=derive(master, CONFIG_CONTEXT)).digest(length=MAC_BYTES)


def master_fits(config: Config, master: bytes) -> bool:
    """Whether a master key is the repository's, and the configuration one that was made with it."""
    import hmac  # a far side, which has no keys, does without

    return hmac.compare_digest(_encryption(config).mac, _config_mac(config, master))


def with_encryption(config: Config, cipher: Cipher, master: bytes, password: str, now: int) -> Config:
    """The configuration of a new, encrypted repository with one key slot.

    Raises:
        UsageError: the password is empty.
    """
    slot = _new_slot(config, cipher, master, password, "first", now)
    return authenticated(replace(config, encryption=Encryption(cipher, bytes(MAC_BYTES), (slot,))), master)


def _encryption(config: Config) -> Encryption:
    if config.encryption is None:
        raise UsageError("the repository is not encrypted, so it has no keys")
    return config.encryption


def unlock(config: Config, passwords: Iterable[str]) -> tuple[bytes, KeySlot]:
    """The master key and the slot that one of the passwords opens.

    Cost: a third of a second and 64 MiB for each slot that is tried.

    Raises:
        WrongPassword: none of them opens any slot.
        DamagedConfig: one does, but the configuration was altered without the key.
    """
    from cryptography.exceptions import InvalidTag

    encryption = _encryption(config)
    for password in passwords:
        for slot in encryption.slots:
            try:
                master = aead(encryption.cipher, _password_key(password, slot.kdf)).decrypt(
                    slot.nonce, slot.wrapped, _associated(config, encryption.cipher, slot)
                )
            except InvalidTag:
                continue
            if not master_fits(config, master):
                raise DamagedConfig(
                    "the repository's configuration is not the one that was written with its key",
                    hint="somebody changed config.json; bring it back from a copy that you trust",
                )
            return master, slot
    raise WrongPassword(
        "the password opens none of the repository's keys",
        hint="set HOLDFAST_PASSWORD, HOLDFAST_PASSWORD_FILE or HOLDFAST_PASSWORD_COMMAND",
    )


def add_slot(config: Config, master: bytes, password: str, label: str, now: int) -> tuple[Config, KeySlot]:
    """The configuration with one more password."""
    encryption = _encryption(config)
    if len(encryption.slots) >= MAX_SLOTS:
        raise UsageError(f"the repository has {MAX_SLOTS} keys already, which is the limit")
    slot = _new_slot(config, encryption.cipher, master, password, label, now)
    added = replace(config, encryption=replace(encryption, slots=(*encryption.slots, slot)))
    return authenticated(added, master), slot


def remove_slot(config: Config, master: bytes, slot_id: str) -> Config:
    """The configuration without one password.

    Raises:
        UsageError: there is no such slot, or it is the last one.
    """
    encryption = _encryption(config)
    kept = tuple(slot for slot in encryption.slots if slot.id != slot_id)
    if len(kept) == len(encryption.slots):
        raise UsageError(f"there is no key '{slot_id}'", hint="'holdfast key list' shows the keys")
    if not kept:
        raise UsageError(
            "the last key can not be removed: nothing could be read any more", hint="add another key first"
        )
    return authenticated(replace(config, encryption=replace(encryption, slots=kept)), master)


def replace_slot(
    config: Config, master: bytes, slot_id: str, password: str, now: int
) -> tuple[Config, KeySlot]:
    """The configuration with another password in one slot's stead; the slot gets a new id."""
    encryption = _encryption(config)
    old = next((slot for slot in encryption.slots if slot.id == slot_id), None)
    slot = _new_slot(config, encryption.cipher, master, password, old.label if old else "", now)
    slots = (*(kept for kept in encryption.slots if kept.id != slot_id), slot)
    return authenticated(replace(config, encryption=replace(encryption, slots=slots)), master), slot
