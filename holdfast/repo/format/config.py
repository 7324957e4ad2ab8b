"""The repository's configuration file (FORMAT.md, "config.json").

It says how to read everything else: format version, features, chunker, compression, encryption and the
wrapped keys. It is kept twice (`config.json` and `config.json.copy`), carries a checksum over its
canonical form, and is laid out for people to read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

import blake3

from holdfast.errors import DamagedConfig, DamagedData, UnsupportedFormat
from holdfast.ids import RepositoryId
from holdfast.repo.format import canonical
from holdfast.repo.format.canonical import Fields, Json
from holdfast.repo.format.node import MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES

__all__ = [
    "FORMAT_VERSION",
    "MAC_BYTES",
    "MAX_CONFIG_BYTES",
    "MAX_SLOTS",
    "Cipher",
    "Compression",
    "Config",
    "Encryption",
    "KeySlot",
    "ScryptParameters",
    "config_body",
    "decode_config",
    "encode_config",
]

FORMAT_VERSION: Final = 1
MAX_CONFIG_BYTES: Final = 1 << 20
MAC_BYTES: Final = 32
MAX_SLOTS: Final = 64
MAX_SCRYPT_BYTES: Final = 256 << 20
MAX_SCRYPT_WORK: Final = 1 << 23
"""Bounds of n * r * p: a hostile configuration can neither take much memory nor much time."""
_KNOWN_FEATURES: Final[frozenset[str]] = frozenset()

Cipher = Literal["aes256-gcm", "chacha20-poly1305"]
_CIPHERS: Final = ("aes256-gcm", "chacha20-poly1305")


@dataclass(frozen=True, slots=True)
class Compression:
    """How payloads are compressed by default.

    It concerns writers only; each record says for itself how it is compressed.

    Args:
        level: of zstd; 0 stands for no compression.
        auto: a writer may raise the level while its source is the slow part.
    """

    level: int
    auto: bool = False

    @property
    def name(self) -> str:
        """`zstd`, `auto` or `none`."""
        return "none" if not self.level else "auto" if self.auto else "zstd"

    def __str__(self) -> str:
        return f"zstd:{self.level}" if self.name == "zstd" else self.name


@dataclass(frozen=True, slots=True)
class ScryptParameters:
    """Cost of the password hash (RFC 7914). Memory is 128 * n * r bytes."""

    n: int
    r: int
    p: int
    salt: bytes


@dataclass(frozen=True, slots=True)
class KeySlot:
    """The master key, wrapped under one password.

    Args:
        id: 16 hexadecimal digits, for people to name it by.
        label: what its owner calls it.
        nonce: 12 bytes of the wrapping AEAD.
        wrapped: ciphertext and tag of the 32 bytes of the master key.
    """

    id: str
    label: str
    created: int
    kdf: ScryptParameters
    nonce: bytes
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class Encryption:
    """The cipher of all payloads, and the passwords that open it.

    Args:
        mac: keyed BLAKE3 of the rest of the configuration, under a key derived from the master key: storage
            can not alter a setting unnoticed, and a wrong master key is told from the right one.
    """

    cipher: Cipher
    mac: bytes
    slots: tuple[KeySlot, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What `init` decided.

    Args:
        segment_bytes: what disks are cut into before they are chunked.
        pack_bytes: a pack that has reached this size is sealed.
        encryption: None if payloads are stored in the clear.
        write_blocker: what this Holdfast lacks to write to the repository; reading is possible.
        signed_body: what the MAC of a configuration that was read is over, members unknown to this version
            included; empty for one that is being made.
    """

    id: RepositoryId
    created: int
    chunker: str
    chunk_size_bytes: int
    segment_bytes: int
    pack_bytes: int
    compression: Compression
    encryption: Encryption | None
    write_blocker: str = ""
    signed_body: bytes = b""


def _slot_json(slot: KeySlot) -> Json:
    return {
        "created": slot.created,
        "id": slot.id,
        "kdf": {
            "n": slot.kdf.n,
            "name": "scrypt",
            "p": slot.kdf.p,
            "r": slot.kdf.r,
            "salt": slot.kdf.salt.hex(),
        },
        "label": slot.label,
        "nonce": slot.nonce.hex(),
        "wrapped": slot.wrapped.hex(),
    }


def _to_json(config: Config) -> dict[str, Json]:
    encryption = config.encryption
    return {
        "chunker": {"chunk_size_bytes": config.chunk_size_bytes, "name": config.chunker},
        "compression": {"level": config.compression.level, "name": config.compression.name},
        "created": config.created,
        "encryption": None
        if encryption is None
        else {
            "cipher": encryption.cipher,
            "mac": encryption.mac.hex(),
            "slots": [_slot_json(slot) for slot in encryption.slots],
        },
        "features": {"optional": [], "required": []},
        "id": config.id.hex(),
        "pack_bytes": config.pack_bytes,
        "segment_bytes": config.segment_bytes,
        "type": "holdfast-repository",
        "version": {"read": FORMAT_VERSION, "write": FORMAT_VERSION},
    }


def config_body(config: Config) -> bytes:
    """What the MAC is over: the canonical form without checksum and MAC."""
    return config.signed_body or _body(_to_json(config))


def _body(value: dict[str, Json]) -> bytes:
    body = {key: member for key, member in value.items() if key != "checksum"}
    encryption = body.get("encryption")
    if isinstance(encryption, dict):
        body["encryption"] = {key: member for key, member in encryption.items() if key != "mac"}
    return canonical.encode(body)


def encode_config(config: Config) -> bytes:
    """The text of the configuration file."""
    value = _to_json(config)
    value["checksum"] = _checksum(value)
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _checksum(value: dict[str, Json]) -> str:
    return blake3.blake3(canonical.encode({k: v for k, v in value.items() if k != "checksum"})).hexdigest()


def _slot(value: Json) -> KeySlot:
    fields = Fields(value, "a key slot")
    kdf = fields.object("kdf")
    if kdf.text("name") != "scrypt":
        raise UnsupportedFormat(f"a key slot uses '{kdf.text('name')}'", hint="use a newer Holdfast")
    parameters = ScryptParameters(
        n=kdf.integer("n", least=2, most=2**20),
        r=kdf.integer("r", least=1, most=32),
        p=kdf.integer("p", least=1, most=16),
        salt=kdf.hexadecimal("salt"),
    )
    work = parameters.n * parameters.r * parameters.p
    if (
        parameters.n & (parameters.n - 1)
        or 128 * parameters.n * parameters.r > MAX_SCRYPT_BYTES
        or work > MAX_SCRYPT_WORK
        or not 16 <= len(parameters.salt) <= 64
    ):
        raise DamagedData("the cost of a key slot's password hash is out of bounds")
    return KeySlot(
        id=fields.raw("id", 8).hex(),
        label=fields.text("label"),
        created=fields.integer("created"),
        kdf=parameters,
        nonce=fields.raw("nonce", 12),
        wrapped=fields.raw("wrapped", 48),
    )


def decode_config(data: bytes) -> Config:
    """The configuration that `data` encodes.

    Raises:
        DamagedConfig: it is none, or fails its checksum.
        UnsupportedFormat: it is intact, and of a version or with features that this Holdfast lacks.
    """
    try:
        value = json.loads(data.decode())
        if not isinstance(value, dict) or value.get("checksum") != _checksum(value):
            raise DamagedConfig("the repository's configuration fails its checksum")
    except (ValueError, RecursionError, TypeError):
        raise DamagedConfig("the repository's configuration is no JSON text") from None
    try:
        return replace(_decode(Fields(value, "the configuration")), signed_body=_body(value))
    except DamagedData as error:
        raise DamagedConfig(error.message) from None


def _decode(fields: Fields) -> Config:
    if fields.text("type") != "holdfast-repository":
        raise DamagedData("the configuration is not that of a repository")
    needed = fields.object("version").integer("read")
    unknown = sorted(set(fields.object("features").texts("required")) - _KNOWN_FEATURES)
    if needed > FORMAT_VERSION or unknown:
        what = f"the features {', '.join(unknown)}" if unknown else f"format version {needed}"
        raise UnsupportedFormat(
            f"the repository needs {what}; this Holdfast reads format version {FORMAT_VERSION}",
            hint="use a newer Holdfast",
        )
    newer = fields.object("version").integer("write") > FORMAT_VERSION
    optional = sorted(set(fields.object("features").texts("optional")) - _KNOWN_FEATURES)
    blocker = "a newer format version" if newer else f"the features {', '.join(optional)}" if optional else ""
    compression, chunker = fields.object("compression"), fields.object("chunker")
    encryption = fields.optional_object("encryption")
    cipher = encryption.text("cipher") if encryption else ""
    if encryption and cipher not in _CIPHERS:
        raise UnsupportedFormat(f"the repository is encrypted with '{cipher}'", hint="use a newer Holdfast")
    if compression.text("name") not in ("zstd", "auto", "none"):
        raise UnsupportedFormat(
            f"the compression '{compression.text('name')}' is unknown", hint="use a newer Holdfast"
        )
    level = compression.integer("level", most=22)
    if bool(level) == (compression.text("name") == "none"):
        raise DamagedData("name and level of the compression contradict each other")
    if encryption and not 1 <= len(encryption.items("slots")) <= MAX_SLOTS:
        raise DamagedData(f"the configuration has no key slot, or more than {MAX_SLOTS}")
    segment = fields.integer("segment_bytes", least=MIN_SEGMENT_BYTES, most=MAX_SEGMENT_BYTES)
    if segment & (segment - 1):
        raise DamagedData("the segment size is no power of two")
    return Config(
        id=RepositoryId(fields.raw("id", 16)),
        created=fields.integer("created"),
        chunker=chunker.text("name"),
        chunk_size_bytes=chunker.integer("chunk_size_bytes", least=512, most=16 << 20),
        segment_bytes=segment,
        pack_bytes=fields.integer("pack_bytes", least=1 << 20, most=2 << 30),
        compression=Compression(level, compression.text("name") == "auto"),
        encryption=None
        if encryption is None
        else Encryption(
            cast("Cipher", cipher),
            encryption.raw("mac", MAC_BYTES),
            tuple(_slot(value) for value in encryption.items("slots")),
        ),
        write_blocker=blocker,
    )
