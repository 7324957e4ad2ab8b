"""docs/FORMAT.md against the code: what the document says is what is written."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import get_args

import blake3
import pytest
import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from holdfast.chunker import CHUNKER_NAMES
from holdfast.disk import DiskGeometry, DiskInfo, FileInfo
from holdfast.errors import DamagedConfig
from holdfast.ids import HOLE_ID, ChunkId, NodeId, PackId, PointId, RecordId, RepositoryId, SessionId
from holdfast.repo import keys as k
from holdfast.repo import lmdb_index
from holdfast.repo.backup import vm_identity
from holdfast.repo.codec import Sealer
from holdfast.repo.format import canonical, config, manifest, mark, node, receipt, record, rows
from holdfast.repo.format.canonical import Json
from holdfast.repo.format.record import Codec, Kind, RecordHeader

Rows = list[dict[str, str]]
Tables = dict[str, Rows]

PREFIX = "holdfast 2026-11-22 v1 "
PACK = PackId(bytes(range(100, 116)))
SEED = int.from_bytes(PACK[:8], "little")
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


def number(text: str, values: Mapping[str, int]) -> int:
    """An offset or a size of the document, which may be a formula such as `8 + 4 * n`."""
    assert re.fullmatch(r"[\w\s+*-]+", text), text
    return int(eval(text, {"__builtins__": {}}, dict(values)))


def read(table: Rows, data: bytes, **values: int) -> dict[str, int | bytes]:
    """The fields of a structure, by nothing but the document's table. It must cover the bytes without gaps."""
    fields: dict[str, int | bytes] = {}
    at = 0
    for row in table:
        offset, size = number(row["offset"], values), number(row["size"], values)
        assert offset == at, row
        at += size
        piece = data[offset:at]
        kind = row["type"]
        if kind == "bytes" or size != SIZES[kind]:
            fields[row["field"]] = piece
        else:
            fields[row["field"]] = int.from_bytes(piece, "little")
    assert at == len(data)
    return fields


# --- packs and records


def test_pack_header(tables: Tables) -> None:
    data = record.encode_pack_header(record.PackHeader(PACK, RepositoryId(b"R" * 16), 1_700_000_000_123))
    assert read(tables["pack-header"], data) == {
        "magic": b"HOLDPACK",
        "version": 1,
        "header_bytes": 64,
        "flags": 0,
        "pack_id": PACK,
        "repository_id": b"R" * 16,
        "created_ms": 1_700_000_000_123,
        "check": xxhash.xxh3_64_intdigest(data[:56]),
    }


def test_record_header(tables: Tables) -> None:
    header = RecordHeader(
        Kind.MANIFEST, Codec.ZSTD, record.ENCRYPTED, 12345, 54321, RecordId(b"i" * 32), b"s" * 16
    )
    data = record.encode_record_header(header, PACK)
    assert read(tables["record-header"], data) == {
        "magic": b"\xf7HFr",
        "kind": 3,
        "codec": 1,
        "flags": 1,
        "stored_bytes": 12345,
        "plain_bytes": 54321,
        "id": b"i" * 32,
        "strong_hash": b"s" * 16,
        "check": xxhash.xxh3_64_intdigest(data[:64], SEED),
    }
    assert header.associated_data() == data[:48]


def test_table_and_footer(tables: Tables) -> None:
    entry = record.TableEntry(RecordId(b"i" * 32), 64, 2, 3, Kind.NODE, Codec.ZSTD, 1)
    assert read(tables["table-entry"], record.encode_table([entry])) == {
        "id": b"i" * 32,
        "offset": 64,
        "stored_bytes": 2,
        "plain_bytes": 3,
        "kind": 2,
        "codec": 1,
        "flags": 1,
    }
    data = record.encode_pack_footer(record.PackFooter(1 << 20, 77), PACK)
    assert read(tables["pack-footer"], data) == {
        "magic": b"HOLDSEAL",
        "table_offset": 1 << 20,
        "entries": 77,
        "reserved": 0,
        "check": xxhash.xxh3_64_intdigest(data[:24], SEED),
    }


def test_kinds_codecs_and_flags(tables: Tables) -> None:
    assert {row["name"]: int(row["kind"]) for row in tables["kinds"]} == {
        kind.name: int(kind) for kind in Kind
    }
    assert {row["name"]: int(row["codec"]) for row in tables["codecs"]} == {c.name: int(c) for c in Codec}
    assert {row["name"]: int(row["flag"], 16) for row in tables["flags"]} == {"ENCRYPTED": record.ENCRYPTED}
    assert sum(int(row["flag"], 16) for row in tables["flags"]) == record.KNOWN_FLAGS


@pytest.mark.parametrize("cipher", get_args(config.Cipher))
@pytest.mark.parametrize("plaintext", [b"short", b"long and dull " * 500])
def test_an_encrypted_record_opens_by_the_document_alone(
    tables: Tables, cipher: str, plaintext: bytes
) -> None:
    master = bytes(range(32))
    keys = k.secret_keys(cipher, master)  # type: ignore[arg-type]
    sealed = Sealer(keys, 3).seal(Kind.CHUNK, keys.record_id(Kind.CHUNK, plaintext), plaintext)
    header = sealed.header
    fields = read(tables["encrypted-payload"], bytes(sealed.payload), stored_bytes=header.stored_bytes)
    context = {row["context, after the common beginning"].strip("`"): row for row in tables["contexts"]}
    assert "record encryption" in context
    data_key = blake3.blake3(master, derive_key_context=PREFIX + "record encryption").digest()
    salt, count = fields["salt"], fields["number"]
    assert isinstance(salt, bytes)
    assert isinstance(count, int)
    associated = record.encode_record_header(header, PACK)[:48]
    record_key = blake3.blake3(salt + associated, key=data_key).digest()
    cipher_of = {"aes256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}[cipher]
    opened = cipher_of(record_key).decrypt(
        bytes(4) + struct.pack("<Q", count),
        fields["ciphertext"] + fields["tag"],  # type: ignore[operator]
        associated,
    )
    if header.codec is Codec.ZSTD:
        opened = zstandard.ZstdDecompressor().decompress(opened, max_output_size=header.plain_bytes)
    assert opened == plaintext
    assert header.strong_hash == blake3.blake3(sealed.payload).digest()[:16]
    id_key = blake3.blake3(master, derive_key_context=PREFIX + "key of chunk ids").digest()
    assert header.id == blake3.blake3(plaintext, key=id_key).digest()


# --- identity and keys


def test_every_context_is_the_one_that_is_used(tables: Tables, document: str) -> None:
    assert f"`{PREFIX}`" in document
    master, text = bytes(range(32)), b"some plaintext"
    keys, clear = k.secret_keys("aes256-gcm", master), k.clear_keys()
    id_keys = dict(keys.id_keys)
    assert id_keys.keys() == set(Kind) - {Kind.TABLE}
    made = {
        ("record encryption", "master key"): keys.data_key,
        ("chunker seed", "master key"): keys.chunker_seed,
        ("key of aliases", "master key"): keys.alias_key,
        ("clear node id", "plaintext of a node"): clear.record_id(Kind.NODE, text),
        ("clear manifest id", "plaintext of a manifest"): clear.record_id(Kind.MANIFEST, text),
        ("clear mark id", "plaintext of a mark"): clear.record_id(Kind.MARK, text),
    }
    digest = bytes(range(32))
    assert clear.alias(Kind.CHUNK, digest) == blake3.blake3(
        b"\1" + digest, derive_key_context=PREFIX + "clear alias"
    ).digest(length=16)
    assert keys.alias(Kind.NODE, digest) == blake3.blake3(b"\2" + digest, key=keys.alias_key).digest(
        length=16
    )
    made |= {(f"key of {kind.name.lower()} ids", "master key"): key for kind, key in id_keys.items()}
    listed = {
        (row["context, after the common beginning"].strip("`"), row["input"]) for row in tables["contexts"]
    }
    elsewhere = {
        ("configuration", "master key"),
        ("uuid of a name", "name of a VM, UTF-8"),
        ("clear alias", "kind of a record, and a hash of it"),
    }
    assert listed == made.keys() | elsewhere
    contexts = [context for context, _ in listed]
    assert len(contexts) == len(set(contexts)), "one context per purpose"
    for (context, source), value in made.items():
        input_bytes = master if source == "master key" else text
        assert blake3.blake3(input_bytes, derive_key_context=PREFIX + context).digest() == value, context


def test_identity_of_a_vm_without_uuid() -> None:
    from holdfast.disk import Machine

    derived = blake3.blake3("wéb".encode(), derive_key_context=PREFIX + "uuid of a name").digest()
    assert vm_identity(Machine("vm", "wéb", "", "", ())) == derived[:16].hex()


def test_ids(tables: Tables) -> None:
    clear, secret = k.clear_keys(), k.secret_keys("aes256-gcm", bytes(32))
    checked = set()
    for row in tables["ids"]:
        kind = Kind[row["kind"]]
        context = re.search(r"`([^`]+)`", row["id"])
        if context is None:
            expected = blake3.blake3(b"text").digest()
        elif row["repository"] == "clear":
            expected = blake3.blake3(b"text", derive_key_context=PREFIX + context[1]).digest()
        else:
            key = blake3.blake3(bytes(32), derive_key_context=PREFIX + context[1]).digest()
            expected = blake3.blake3(b"text", key=key).digest()
        for name, keys in (("clear", clear), ("encrypted", secret)):
            if row["repository"] in (name, "both"):
                checked.add((name, kind))
                assert keys.record_id(kind, b"text") == keys.namer(kind)(b"text") == expected
    assert checked == {(name, kind) for name in ("clear", "encrypted") for kind in Kind}
    assert bytes(32) == HOLE_ID


def test_scrypt_and_ciphers(tables: Tables) -> None:
    written = {row["parameter"]: int(row["value"]) for row in tables["scrypt"]}
    assert written == {"n": k.SCRYPT_N, "r": k.SCRYPT_R, "p": k.SCRYPT_P, "salt bytes": 32}
    assert [row["`cipher`"].strip("`") for row in tables["ciphers"]] == list(get_args(config.Cipher))


def test_chunkers(tables: Tables) -> None:
    assert {row["`chunker.name`"].strip("`") for row in tables["chunkers"]} == set(CHUNKER_NAMES)


# --- trees


def test_nodes(tables: Tables) -> None:
    lengths = (4096, -8192, 4096)
    leaf = node.encode_leaf(node.Leaf(lengths, (ChunkId(RecordId(b"a" * 32)), ChunkId(RecordId(b"b" * 32)))))
    head = read(tables["node-header"], leaf[:8])
    assert head == {"type": 1, "level": 0, "reserved": 0, "count": 3}
    fields = read(tables["leaf"], leaf, n=3, m=2)
    parts = struct.unpack("<3I", fields["parts"])  # type: ignore[arg-type]
    assert [-(part & 0x7FFFFFFF) if part >> 31 else part for part in parts] == list(lengths)
    assert fields["ids"] == b"a" * 32 + b"b" * 32
    inner = node.encode_inner(node.Inner(2, (NodeId(RecordId(b"c" * 32)), HOLE_ID)))
    assert read(tables["node-header"], inner[:8]) == {"type": 2, "level": 2, "reserved": 0, "count": 2}
    assert read(tables["inner"], inner, n=2)["children"] == b"c" * 32 + bytes(32)


# --- JSON


def paths(value: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Dotted member -> value; maps of free keys, lists and nulls are leaves."""
    assert isinstance(value, dict)
    for key, inner in value.items():
        if isinstance(inner, dict) and key not in ("labels", "geometry", "encryption"):
            yield from paths(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def has_type(value: Json, documented: str) -> bool:
    if documented.startswith("hex "):
        length = 2 * int(documented[4:])
        return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", value) is not None
    if documented.startswith("list of "):
        inner = documented[8:]
        return isinstance(value, list) and all(inner == "object" or has_type(item, inner) for item in value)
    if documented == "object or null":
        return value is None or isinstance(value, dict)
    if documented == "map of text":
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    if documented == "object":
        return isinstance(value, dict)
    kinds: dict[str, type] = {"text": str, "integer": int, "flag": bool}
    return type(value) is kinds[documented]


def holds(table: Rows, value: Json) -> None:
    """The object has exactly the members of the table, with their types."""
    documented = {row["member"].strip("`"): row["type"] for row in table}
    found = dict(paths(value))
    assert found.keys() == documented.keys()
    for member, documented_type in documented.items():
        assert has_type(found[member], documented_type), (member, found[member])


def sample_manifest() -> manifest.Manifest:
    tree = manifest.ContentTree(16 << 20, NodeId(RecordId(b"t" * 32)), 16 << 20)
    disk = DiskInfo(
        "web.vmdk", 16 << 20, "vmdk", "web-flat.vmdk", "# Disk", "vmfs", "scsi0:0", "6" * 32, "lsilogic",
        DiskGeometry(10, 255, 63),
    )  # fmt: skip
    return manifest.Manifest(
        session=SessionId(b"S" * 16),
        kind="vm",
        vm_uuid="ab" * 16,
        vm_name="web",
        host="backup1",
        origin="/vmfs/web",
        time=1_700_000_000,
        received_ms=1_700_000_001_000,
        segment_bytes=16 << 20,
        chunker="aligned",
        chunk_size_bytes=65536,
        disks=(manifest.PointDisk(disk, tree, "full", "52 de/4"),),
        files=(manifest.PointFile(FileInfo("web.vmx", 16 << 20, -5, 0o644), tree),),
        folders=("logs",),
        labels=(("site", "north"),),
        warnings=("something",),
        parent="cd" * 32,
        tool="holdfast 0.1.0",
        statistics=manifest.PointStatistics(1, 2, 3, 4, 5, 6),
        partial=False,
    )


def test_manifest(tables: Tables) -> None:
    value = canonical.decode(manifest.encode_manifest(sample_manifest()))
    holds(tables["manifest"], value)
    assert isinstance(value, dict)
    assert isinstance(value["disks"], list)
    assert isinstance(value["files"], list)
    holds(tables["manifest-disk"], value["disks"][0])
    holds(tables["manifest-file"], value["files"][0])
    assert (value["type"], value["version"]) == ("restore-point", 1)


def sample_config(*, encrypted: bool) -> config.Config:
    made = config.Config(
        RepositoryId(b"R" * 16),
        1_700_000_000,
        "aligned",
        65536,
        16 << 20,
        256 << 20,
        config.Compression(1),
        None,
    )
    if not encrypted:
        return made
    slot = config.KeySlot(
        "ab" * 8, "first", 1_700_000_000, config.ScryptParameters(2, 1, 1, b"s" * 32), b"n" * 12, b"w" * 48
    )
    return config.Config(
        made.id,
        made.created,
        made.chunker,
        made.chunk_size_bytes,
        made.segment_bytes,
        made.pack_bytes,
        made.compression,
        config.Encryption("aes256-gcm", b"k" * 32, (slot,)),
    )


def test_config(tables: Tables) -> None:
    import json

    value = json.loads(config.encode_config(sample_config(encrypted=True)))
    holds(tables["config"], value)
    holds(tables["config-encryption"], value["encryption"])
    holds(tables["config-slot"], value["encryption"]["slots"][0])
    checked = canonical.encode({key: inner for key, inner in value.items() if key != "checksum"})
    assert value["checksum"] == blake3.blake3(checked).hexdigest()
    holds(tables["config"], json.loads(config.encode_config(sample_config(encrypted=False))))


def test_mac_of_the_configuration() -> None:
    import json

    master = bytes(range(32))
    value = json.loads(config.encode_config(k.authenticated(sample_config(encrypted=True), master)))
    mac = value["encryption"].pop("mac")
    del value["checksum"]
    key = blake3.blake3(master, derive_key_context=PREFIX + "configuration").digest()
    assert mac == blake3.blake3(canonical.encode(value), key=key).hexdigest()


def test_mark(tables: Tables) -> None:
    made = mark.Mark("forget", PointId(RecordId(b"p" * 32)), SessionId(b"s" * 16), 1_700_000_000)
    value = canonical.decode(mark.encode_mark(made))
    holds(tables["mark"], value)
    assert isinstance(value, dict)
    assert (value["type"], value["version"]) == ("mark", 1)
    assert [row["action"].strip("`") for row in tables["actions"]] == list(get_args(mark.Action))


def test_receipt(tables: Tables) -> None:
    data = receipt.encode_receipt(RepositoryId(b"R" * 16), PointId(RecordId(b"p" * 32)), 1_700_000_000_123)
    assert read(tables["receipt"], data) == {
        "point": b"p" * 32,
        "received_ms": 1_700_000_000_123,
        "crc": zlib.crc32(b"R" * 16 + data[:40]),
    }
    assert receipt.BEGINNING == HOLE_ID


def test_associated_data_of_a_slot(tables: Tables) -> None:
    made = sample_config(encrypted=True)
    assert made.encryption is not None
    value = canonical.decode(k._associated(made, "aes256-gcm", made.encryption.slots[0]))
    holds(tables["slot-associated-data"], value)


# --- index


def test_rows(tables: Tables) -> None:
    key = RecordId(b"k" * 32)
    data = rows.encode_place(key, rows.Place(1, 2, 3, 4, 5, 1))
    assert read(tables["row-chunks"], data) == {
        "pack": 1, "offset": 2, "stored_bytes": 3, "plain_bytes": 4, "epoch": 5, "kind": 1, "reserved": 0,
        "crc": zlib.crc32(key + data[:-4]),
    }  # fmt: skip
    row = rows.PackRow(7, PACK, rows.PackState.SEALED, 11, 12, 17, 13, 14, 15, 16, rows.VerifiedBy.READING)
    data = rows.encode_pack_row(row)
    assert rows.pack_key(7) == struct.pack(">I", 7)
    assert read(tables["row-packs"], data) == {
        "id": PACK, "state": 2, "verified_by": 3, "reserved": bytes(2), "records": 12, "dead_records": 17, "committed_bytes": 11, "live_bytes": 13,
        "dead_bytes": 14, "created": 15, "verified": 16, "crc": zlib.crc32(rows.pack_key(7) + data[:-4]),
    }  # fmt: skip
    copy = rows.CopyRow(PointId(key), RepositoryId(b"R" * 16), 1, 2, 3, "ssh://nas/høst")
    copied = rows.copy_key(copy.point, copy.repository)
    data = rows.encode_copy_row(copy)
    assert copied == key + b"R" * 16
    assert read(tables["row-copies"], data, n=len(copy.address.encode())) == {
        "compared": 1,
        "sampled": 2,
        "read": 3,
        "address": copy.address.encode(),
        "crc": zlib.crc32(copied + data[:-4]),
    }
    for flags in range(8):
        received = 1_700_000_000_123 if flags & 4 else 0
        point = rows.PointRow(PointId(key), bool(flags & 1), bool(flags & 2), PACK, b"record", received)
        data = rows.encode_point_row(point)
        fields = read(tables["row-points"], data, n=6, r=flags >> 2)
        assert fields == {
            "flags": flags,
            "pack": PACK,
            "received_ms": received or b"",
            "record": b"record",
            "crc": zlib.crc32(key + data[:-4]),
        }
    session = rows.SessionRow(SessionId(b"s" * 16), "backup", "host", 1, 2, 3, (PointId(key),))
    data = rows.encode_session_row(session)
    holds(tables["session"], canonical.decode(data[:-4]))
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(b"s" * 16 + data[:-4])


def test_meta(tables: Tables) -> None:
    listed = {row["key"].strip("`") for row in tables["meta"]}
    written = {
        name.decode()
        for name in (
            lmdb_index._REPOSITORY,
            lmdb_index._VERSION,
            lmdb_index._NEXT_PACK,
            lmdb_index._EPOCH,
            lmdb_index._DIGEST,
        )
    }
    assert listed == written
    version = next(row for row in tables["meta"] if row["key"] == "`version`")
    assert version["value"].startswith(f"u64: {lmdb_index.INDEX_VERSION}; or 1,")
    assert set(lmdb_index._VERSIONS) == {1, lmdb_index.INDEX_VERSION}
    counter = rows.encode_counter(b"epoch", 9)
    assert counter == struct.pack("<Q", 9) + struct.pack("<I", zlib.crc32(b"epoch" + struct.pack("<Q", 9)))
    digest = rows.encode_points_digest(b"points", rows.PointsDigest(2, b"x" * 32))
    assert digest[:40] == struct.pack("<Q", 2) + b"x" * 32


def test_index_tables(tables: Tables) -> None:
    assert [row["table"].strip("`") for row in tables["index-tables"]] == list(lmdb_index._TABLES)


# --- limits, headings, example


def accepts_config(**members: int) -> bool:
    made = sample_config(encrypted=True)
    assert made.encryption is not None
    slot = made.encryption.slots[0]
    kdf = config.ScryptParameters(
        members.pop("n", 2), members.pop("r", 1), members.pop("p", 1), slot.kdf.salt
    )
    from dataclasses import replace

    encryption = replace(made.encryption, slots=(replace(slot, kdf=kdf),))
    try:
        config.decode_config(config.encode_config(replace(made, encryption=encryption, **members)))  # type: ignore[arg-type]
    except DamagedConfig:
        return False
    return True


def test_limits(tables: Tables) -> None:
    limits = {row["what"]: int(row["limit"]) for row in tables["limits"]}
    constants = {
        "plaintext of a record": record.MAX_PLAIN_BYTES,
        "payload of a record": record.MAX_STORED_BYTES,
        "length of a pack": record.MAX_PACK_BYTES,
        "records in a pack": record.MAX_TABLE_ENTRIES,
        "children of a node": node.FANOUT,
        "level of a root": node.MAX_LEVEL,
        "name of a VM": manifest.MAX_NAME_BYTES,
        "labels of a point": manifest.MAX_LABELS_BYTES,
        "configuration": config.MAX_CONFIG_BYTES,
        "manifest": manifest.MAX_MANIFEST_BYTES,
        "slots": config.MAX_SLOTS,
        "packs": 2**32,
        "index": lmdb_index._MAP_BYTES,
    }
    bounds = {
        "segment_bytes, least": ("segment_bytes", -1),
        "segment_bytes, most": ("segment_bytes", 1),
        "pack_bytes, least": ("pack_bytes", -1),
        "pack_bytes, most": ("pack_bytes", 1),
        "chunk_size_bytes, least": ("chunk_size_bytes", -1),
        "chunk_size_bytes, most": ("chunk_size_bytes", 1),
        "kdf.n, most": ("n", 1),
        "kdf.r, most": ("r", 1),
        "kdf.p, most": ("p", 1),
    }
    assert limits.keys() == constants.keys() | bounds.keys() | {"memory of scrypt", "work of scrypt"}
    assert {name: limits[name] for name in constants} == constants
    for name, (member, direction) in bounds.items():
        limit = limits[name]
        power = member in ("segment_bytes", "n")
        beyond = limit * 2 if power and direction > 0 else limit // 2 if power else limit + direction
        assert accepts_config(**{member: limit}), name
        assert not accepts_config(**{member: beyond}), name
    memory = limits["memory of scrypt"]
    assert accepts_config(n=memory // 128 // 16, r=16)
    assert not accepts_config(n=memory // 128 // 16, r=17)
    work = limits["work of scrypt"]
    assert accepts_config(n=work // 32, r=8, p=4)
    assert not accepts_config(n=work // 32, r=8, p=5)
    assert limits["records in a pack"] * record.TABLE_ENTRY_BYTES <= limits["plaintext of a record"]
    assert node.FANOUT ** limits["level of a root"] * limits["segment_bytes, least"] == 1 << 60
    worst_leaf = 8 + limits["segment_bytes, most"] // 4096 * 36
    assert worst_leaf <= limits["plaintext of a record"]
    worst_pack = (
        limits["pack_bytes, most"]
        + record.RECORD_HEADER_BYTES
        + limits["payload of a record"]
        + limits["records in a pack"] * record.TABLE_ENTRY_BYTES
        + record.RECORD_HEADER_BYTES
        + record.FOOTER_BYTES
    )
    assert worst_pack <= limits["length of a pack"]


def test_every_heading_that_the_code_refers_to_exists(document: str) -> None:
    headings = set(re.findall(r"^## (.+)$", document, re.MULTILINE))
    package = Path(record.__file__).parents[2]
    for path in package.rglob("*.py"):
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        for reference in re.findall(r'FORMAT\.md, ("[^)]*?")[).;:]', text):
            for heading in re.findall(r'"([^"]+)"', reference):
                assert heading in headings, f"{path.name} refers to {heading!r}"


def test_every_link_leads_to_a_heading(document: str) -> None:
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    anchors = {anchor(heading) for heading in re.findall(r"^##+ (.+)$", document, re.MULTILINE)}
    for link in re.findall(r"\]\(#([^)]+)\)", document):
        assert link in anchors


def test_example_is_what_the_code_writes(document: str, example: ModuleType) -> None:
    assert example.updated(document) == document, "run: python tests/repo/format/example.py --write"


def test_example_can_be_read_by_the_document_alone(document: str, tables: Tables) -> None:
    """From the hexadecimal dump in the document to the disk's bytes, with no code of Holdfast."""
    dump = document.split("<!-- held: example -->\n```\n")[1].split("```", maxsplit=1)[0]
    pack = b""
    for line in dump.splitlines():
        assert int(line[:4], 16) == len(pack)
        pack += bytes.fromhex(line[6:53])
    header = read(tables["pack-header"], pack[:64])
    pack_id = header["pack_id"]
    assert isinstance(pack_id, bytes)
    seed = int.from_bytes(pack_id[:8], "little")
    footer = read(tables["pack-footer"], pack[-32:])
    table_at = footer["table_offset"]
    assert isinstance(table_at, int)
    found = {}
    offset = 64
    while offset <= table_at:
        head = read(tables["record-header"], pack[offset : offset + 72])
        assert head["check"] == xxhash.xxh3_64_intdigest(pack[offset : offset + 64], seed)
        stored = head["stored_bytes"]
        assert isinstance(stored, int)
        payload = pack[offset + 72 : offset + 72 + stored]
        assert head["strong_hash"] == blake3.blake3(payload).digest()[:16]
        found[head["kind"]] = (head, payload)
        offset += 72 + stored
    assert offset == len(pack) - 32
    chunk, leaf, table = (found[kind] for kind in (1, 2, 127))
    assert footer["entries"] == len(table[1]) // 48 == 2
    assert chunk[0]["id"] == blake3.blake3(chunk[1]).digest()
    assert leaf[0]["id"] == blake3.blake3(leaf[1], derive_key_context=PREFIX + "clear node id").digest()
    fields = read(tables["leaf"], leaf[1], n=1, m=1)
    assert fields["ids"] == chunk[0]["id"]
    assert chunk[1] == b"a chunk of bytes"
