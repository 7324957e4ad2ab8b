#!/usr/bin/env python3
r"""Gets restore points out of a Holdfast repository without Holdfast, from its packs alone.

    python rescue.py PACKS_DIR --list [--all]
    python rescue.py PACKS_DIR --restore POINT DEST [--all] [--force]

PACKS_DIR is the repository's folder, its packs/ folder, or any folder with packs below it. POINT is the beginning of
an id that --list shows, VM@latest, VM@latest~N, or the name of a VM (its newest point). An encrypted repository needs
its config.json (or config.json.copy; --config FILE if it is elsewhere) and a password, which is taken from
HOLDFAST_PASSWORD, from the first line of the file HOLDFAST_PASSWORD_FILE, or asked for; or --key FILE, the master key
as `holdfast key export` writes it.

It was written from docs/FORMAT.md, whose section names stand in the comments, and needs Python 3.8 or later and
`pip install blake3 zstandard` (and `cryptography` if the repository is encrypted). It writes below DEST only.

No byte is written to DEST that was not verified by its id, and damage ends nothing: each copy of a record is tried, what
can not be read is left as a hole, and stderr says where.
Memory: 18 bytes per record, and 30 MB: 200 MB for 0.6 TB that differ in chunks of 64 KiB, 2.8 GB for 10 TB.
Exit codes: 0 all is well, 1 failed, 2 wrong usage, 100 something could not be read (stderr says what).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import getpass
import hashlib
import json
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

try:
    import blake3 as blake3_package
    import zstandard
except ImportError as missing:
    sys.exit(f"rescue: {missing}: pip install blake3 zstandard")

CHUNK, NODE, MANIFEST, MARK, TABLE = 1, 2, 3, 4, 127
NAMES = {CHUNK: "chunk", NODE: "node", MANIFEST: "manifest", MARK: "mark"}
RAW, ZSTD = 0, 1
ENCRYPTED = 1
MAGIC = b"\xf7HFr"
HOLE = bytes(32)
CONTEXT = "holdfast 2026-11-22 v1 "
PACK_HEADER = struct.Struct("<8sHHI16s16sQQ")
RECORD_HEADER = struct.Struct("<4sBBHII32s16sQ")
TABLE_ENTRY = struct.Struct("<32sIIIBBH")
FOOTER = struct.Struct("<8sQIIQ")
PLACE = struct.Struct("<6sII")
# Limits
MOST_PLAIN_BYTES, MOST_STORED_BYTES, MOST_LEVEL, FANOUT = 32 << 20, (32 << 20) + 4096, 5, 256
MOST_PACK_BYTES = (1 << 32) - 1
BLOCK_BYTES, PAGE_BYTES = 1 << 20, 4096
# What Python says of JSON that is not what it should be
NONSENSE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
SECTOR_BYTES = 512


class Failure(Exception):
    """Nothing more can be done; the text says why."""


class Damage(Exception):
    """One piece can not be had; the text says why."""


def printable(text: object) -> str:
    """The text without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: str) -> None:
    """Tells people something that is not the result."""
    print(f"rescue: {text}", file=sys.stderr, flush=True)


def size_text(size_bytes: int) -> str:
    """The size as people read it."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 1 << power:
            return f"{size_bytes / (1 << power):.1f} {unit}"
    return f"{size_bytes} B"


# --- hashes


def blake3(data: bytes, *, key: bytes | None = None, context: str | None = None) -> bytes:
    """BLAKE3, plain, keyed, or as key derivation."""
    if context is not None:
        return bytes(blake3_package.blake3(data, derive_key_context=CONTEXT + context).digest())
    return bytes((blake3_package.blake3(data, key=key) if key else blake3_package.blake3(data)).digest())


XXH3_SECRET = struct.unpack(
    "<8Q",
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    ),
)
MASK = (1 << 64) - 1


def xxh3(data: bytes, seed: int) -> int:
    """XXH3-64 of 17 to 64 bytes: the lengths of the format's checks. (The whole algorithm also takes others.)"""

    def mix(at: int, secret: int) -> int:
        low, high = struct.unpack_from("<QQ", data, at)
        product = (low ^ (XXH3_SECRET[secret] + seed & MASK)) * (
            high ^ (XXH3_SECRET[secret + 1] - seed & MASK)
        )
        return int(product & MASK ^ product >> 64)

    length = len(data)
    total = length * 0x9E3779B185EBCA87 + mix(0, 0) + mix(length - 16, 2)
    if length > 32:
        total += mix(16, 4) + mix(length - 32, 6)
    total &= MASK
    total = (total ^ total >> 37) * 0x165667919E3779F9 & MASK
    return total ^ total >> 32


# --- configuration and keys


def canonical(value: object) -> bytes:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_config(paths: list[str]) -> dict[str, Any] | None:
    """The first intact configuration; else the first that can be understood at all; None if there is none.

    A damaged one will do: whatever a password or its slots open is verified, and nothing else of it is relied on.
    """
    doubtful = None
    for path in paths:
        try:
            with open(path, "rb") as file:
                config = json.loads(file.read(1 << 20))
            checksum = config.pop("checksum", None)
            if config["type"] != "holdfast-repository":
                continue
            if config["version"]["read"] > 1 or config["features"]["required"]:
                raise Failure(f"{path} is of a later version of the format than this program knows")
            if checksum == blake3(canonical(config)).hex():
                return dict(config)
            say(f"{path} is damaged: its checksum is wrong")
            doubtful = doubtful or config
        except FileNotFoundError:
            continue
        except OSError as error:
            say(f"{path} can not be read: {error.strerror}")
        except (KeyError, TypeError, ValueError, AttributeError):
            say(f"{path} is damaged: it can not be understood")
    return doubtful


def password_bytes() -> bytes:
    """The password, from the environment or whoever sits at the terminal."""
    text, path = os.environ.get("HOLDFAST_PASSWORD"), os.environ.get("HOLDFAST_PASSWORD_FILE")
    if text:
        return text.encode("utf-8", "surrogateescape")
    if path:
        try:
            with open(path, "rb") as file:
                return file.readline().rstrip(b"\n").rstrip(b"\r")
        except OSError as error:
            raise Failure(f"{path} can not be read: {error.strerror}") from None
    if not sys.stdin or not sys.stdin.isatty():
        raise Failure("the repository is encrypted: set HOLDFAST_PASSWORD_FILE or HOLDFAST_PASSWORD")
    return getpass.getpass("Password of the repository: ").encode("utf-8", "surrogateescape")


class Keys:
    """What turns payloads into plaintexts, and says which id a plaintext has."""

    def __init__(self, config: dict[str, Any] | None, key_file: str | None) -> None:
        encryption = (config or {}).get("encryption")
        self.encrypted = bool(encryption)
        if not encryption or not config:
            return
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers import aead
        except ImportError as missing:
            raise Failure(f"the repository is encrypted, and {missing}: pip install cryptography") from None
        self._invalid_tag = InvalidTag
        try:
            ciphers: dict[str, Any] = {"aes256-gcm": aead.AESGCM, "chacha20-poly1305": aead.ChaCha20Poly1305}
            self._aead = ciphers[encryption["cipher"]]
            master = self._key_from(key_file) if key_file else self._unlock(config, password_bytes())
            signed = {**config, "encryption": {k: v for k, v in encryption.items() if k != "mac"}}
            if (
                encryption["mac"]
                != blake3(canonical(signed), key=blake3(master, context="configuration")).hex()
            ):
                say("the configuration was altered, or the key is not of this repository: its MAC is wrong")
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"the configuration or the key can not be understood: {error!r}") from None
        self._data_key = blake3(master, context="record encryption")
        self._id_keys = {kind: blake3(master, context=f"key of {NAMES[kind]} ids") for kind in NAMES}

    @staticmethod
    def _key_from(path: str) -> bytes:
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        except OSError as error:
            raise Failure(f"{path} can not be read: {error.strerror}") from None
        if len(lines) != 1 or not re.fullmatch("[0-9a-fA-F]{64}", lines[0]):
            raise Failure(f"{path} is no exported master key: 64 hexadecimal digits in one line")
        return bytes.fromhex(lines[0])

    def _unlock(self, config: dict[str, Any], password: bytes) -> bytes:
        """Keys, Slots: the master key, from the first slot that the password opens."""
        encryption = config["encryption"]
        for slot in encryption["slots"]:
            kdf = slot["kdf"]
            n, r, p = (int(kdf[name]) for name in "nrp")
            if n > 1 << 20 or r > 32 or p > 16 or 128 * n * r > 1 << 28 or n * r * p > 1 << 23:
                continue
            salt = bytes.fromhex(kdf["salt"])
            key = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=32, maxmem=1 << 29)
            associated = {
                "chunk_size_bytes": config["chunker"]["chunk_size_bytes"],
                "chunker": config["chunker"]["name"],
                "cipher": encryption["cipher"],
                "id": slot["id"],
                "kdf": {name: kdf[name] for name in ("n", "p", "r", "salt")},
                "repository": config["id"],
                "segment_bytes": config["segment_bytes"],
            }
            nonce, wrapped = bytes.fromhex(slot["nonce"]), bytes.fromhex(slot["wrapped"])
            with contextlib.suppress(self._invalid_tag):
                return bytes(self._aead(key).decrypt(nonce, wrapped, canonical(associated)))
        raise Failure("the password opens nothing here: it is wrong, or config.json is damaged")

    def record_id(self, kind: int, plaintext: bytes) -> bytes:
        """Identity."""
        if self.encrypted:
            return blake3(plaintext, key=self._id_keys[kind])
        return blake3(plaintext) if kind == CHUNK else blake3(plaintext, context=f"clear {NAMES[kind]} id")

    def open(self, record: Record, payload: bytes) -> bytes:
        """Records, Encryption: the verified plaintext.

        Raises:
            Damage: the payload is not that of this record.
        """
        if record.codec not in (RAW, ZSTD) or record.flags != (ENCRYPTED if self.encrypted else 0):
            raise Damage("of an unknown form")
        if len(payload) != record.stored_bytes or record.plain_bytes > MOST_PLAIN_BYTES:
            raise Damage("cut off")
        if self.encrypted:
            associated = MAGIC + struct.pack("<BBHII32s", *record)
            key = blake3(payload[:16] + associated, key=self._data_key)
            try:
                payload = self._aead(key).decrypt(bytes(4) + payload[16:24], payload[24:], associated)
            except (self._invalid_tag, ValueError):
                raise Damage("damaged") from None
        if record.codec == ZSTD:
            try:
                decompressor = zstandard.ZstdDecompressor(max_window_size=128 << 20)
                with decompressor.stream_reader(payload) as reader:
                    payload = reader.read(record.plain_bytes + 1)
            except zstandard.ZstdError:
                raise Damage("damaged") from None
        if len(payload) != record.plain_bytes or self.record_id(record.kind, payload) != record.id:
            raise Damage("damaged")
        return payload


# --- packs and records


class Record(NamedTuple):
    """A record's header without its checksums, in the order of its bytes."""

    kind: int
    codec: int
    flags: int
    stored_bytes: int
    plain_bytes: int
    id: bytes


class Pack(NamedTuple):
    """A file of records."""

    path: str
    id: bytes
    size_bytes: int

    @property
    def seed(self) -> int:
        """Of all checksums in it."""
        return int.from_bytes(self.id[:8], "little")


def record_of(head: bytes, seed: int) -> Record | None:
    """The record whose header this is; None if it is none, or damaged."""
    if len(head) != RECORD_HEADER.size or head[:4] != MAGIC:
        return None
    _, kind, codec, flags, stored, plain, record_id, _, check = RECORD_HEADER.unpack(head)
    return Record(kind, codec, flags, stored, plain, record_id) if check == xxh3(head[:64], seed) else None


class Index:
    """Id -> places, in 14 bytes a record.

    The first two bytes of an id choose a bucket, the next six stand in it before the place. Ids that agree in all
    eight are told apart by whoever reads the record.
    """

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(1 << 16)]

    def add(self, record_id: bytes, pack: int, offset: int) -> None:
        """Remembers one more place of a record."""
        self._buckets[record_id[0] << 8 | record_id[1]] += PLACE.pack(record_id[2:8], pack, offset)

    def places(self, record_id: bytes) -> Iterator[tuple[int, int]]:
        """Number of the pack and offset of each place where the record was seen."""
        bucket, wanted = self._buckets[record_id[0] << 8 | record_id[1]], record_id[2:8]
        at = bucket.find(wanted)
        while at >= 0:
            if at % PLACE.size == 0:
                _, pack, offset = PLACE.unpack_from(bucket, at)
                yield pack, offset
            at = bucket.find(wanted, at + 1)


class Store:
    """The records of all packs below a folder."""

    def __init__(self, folder: str, keys: Keys, repository_id: bytes | None) -> None:
        self.keys = keys
        self.incomplete = False  # something is lost that might have been a restore point
        self.ids: dict[int, set[bytes]] = {MANIFEST: set(), MARK: set()}
        self._files: collections.OrderedDict[str, BinaryIO] = collections.OrderedDict()
        self._unreadable: set[tuple[str, int]] = set()
        self._index = Index()
        self._table: tuple[Pack | None, dict[int, Record]] = (None, {})
        self._packs = self._find(folder, repository_id)
        forms = set()
        for number, pack in enumerate(self._packs):
            if sys.stderr.isatty():
                print(
                    f"\r\x1b[Kpack {number + 1} of {len(self._packs)}\r", end="", file=sys.stderr, flush=True
                )
            found = self._table_of(pack)
            if found is None and self._read(pack, pack.size_bytes - FOOTER.size, 8) == b"HOLDSEAL":
                say(f"{pack.path}: the table is damaged; reading record by record")
            for offset, record in self._walk(pack) if found is None else found:
                if record.kind in NAMES:
                    forms.add(record.flags)
                    self._index.add(record.id, number, offset)
                if record.kind in self.ids:
                    self.ids[record.kind].add(record.id)
        if sys.stderr.isatty():
            print("\x1b[K", end="", file=sys.stderr, flush=True)
        if forms == {ENCRYPTED} and not keys.encrypted:
            raise Failure("the packs are encrypted: name the repository's config.json by --config")

    def _find(self, folder: str, repository_id: bytes | None) -> list[Pack]:
        """The packs of the repository; without a configuration, of the one that most of them belong to."""

        def unreadable(error: OSError) -> None:
            say(f"{error.filename} can not be read: {error.strerror}")
            self.incomplete = True

        packs: list[tuple[Pack, bytes | None]] = []
        for parent, folders, names in os.walk(folder, onerror=unreadable):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(parent, name)
                if not re.fullmatch(r"[0-9a-f]{32}\.pack", name):
                    continue  # Files: other names are no packs
                try:
                    pack = Pack(path, bytes.fromhex(name[:32]), min(os.path.getsize(path), MOST_PACK_BYTES))
                    head = self._read(pack, 0, PACK_HEADER.size)
                except OSError as error:
                    unreadable(error)
                    continue
                if len(head) < PACK_HEADER.size:
                    continue  # its writer died before the first record
                magic, version, length, _, pack_id, repository, _, check = PACK_HEADER.unpack(head)
                if magic != b"HOLDPACK" or check != xxh3(head[:56], 0):
                    say(f"{path}: the header is damaged; its name has to do")
                    packs.append((pack, None))
                elif (version, length) != (1, PACK_HEADER.size) or pack_id != pack.id:
                    say(f"{path} is passed over: its header has another version, or names another pack")
                    self.incomplete = True
                else:
                    packs.append((pack, repository))
        owners = collections.Counter(owner for _, owner in packs if owner)
        owner = repository_id or (owners.most_common(1)[0][0] if owners else None)
        for pack, other in packs:
            if other not in (owner, None):
                say(f"{pack.path} is passed over: it belongs to repository {(other or b'').hex()}")
        if not packs:
            raise Failure(f"there are no packs below {folder}")
        return [pack for pack, other in packs if other in (owner, None)]

    def _read(self, pack: Pack, offset: int, length: int) -> bytes:
        """Bytes of a pack, fewer at its end; zeros where the disk can not read them."""
        file = self._files.pop(pack.path, None)
        if file is None:
            if len(self._files) >= 100:
                self._files.popitem(last=False)[1].close()
            file = open(pack.path, "rb", buffering=0)  # noqa: SIM115  # closed when others push it out
        self._files[pack.path] = file
        try:
            file.seek(offset)
            data = file.read(length)
            while len(data) < length and (more := file.read(length - len(data))):
                data += more
            return data
        except OSError:
            within = PAGE_BYTES - offset % PAGE_BYTES  # the rest of the page that the offset is in
            if length > within:
                pages = (offset, *range(offset + within, offset + length, PAGE_BYTES))
                ends = (*pages[1:], offset + length)
                return b"".join(self._read(pack, at, end - at) for at, end in zip(pages, ends))
            page = pack.path, offset // PAGE_BYTES * PAGE_BYTES
            if page not in self._unreadable:
                say(f"{page[0]}: bytes {page[1]} to {page[1] + PAGE_BYTES} can not be read")
                self._unreadable.add(page)
                self.incomplete = True
            return bytes(max(0, min(length, pack.size_bytes - offset)))

    def _table_of(self, pack: Pack) -> list[tuple[int, Record]] | None:
        """Packs: offsets and records as the table of a sealed pack has them; None if there is none, or not intact."""
        foot = self._read(pack, max(0, pack.size_bytes - FOOTER.size), FOOTER.size)
        if len(foot) != FOOTER.size or foot[:8] != b"HOLDSEAL":
            return None
        _, offset, entries, _, check = FOOTER.unpack(foot)
        length = entries * TABLE_ENTRY.size
        if check != xxh3(foot[:24], pack.seed) or length > MOST_STORED_BYTES:
            return None
        if offset + RECORD_HEADER.size + length + FOOTER.size != pack.size_bytes:
            return None
        record = record_of(self._read(pack, offset, RECORD_HEADER.size), pack.seed)
        payload = self._read(pack, offset + RECORD_HEADER.size, length)
        if record is None or record.kind != TABLE or len(payload) != length or blake3(payload) != record.id:
            return None
        return [
            (at, Record(kind, codec, flags, stored, plain, record_id))
            for record_id, at, stored, plain, kind, codec, flags in TABLE_ENTRY.iter_unpack(payload)
        ]

    def _walk(self, pack: Pack) -> Iterator[tuple[int, Record]]:
        """Offsets and records of a pack, header by header; behind damage from the next intact header on."""
        at = PACK_HEADER.size
        while at + RECORD_HEADER.size <= pack.size_bytes:
            record = record_of(self._read(pack, at, RECORD_HEADER.size), pack.seed)
            if record is not None and at + RECORD_HEADER.size + record.stored_bytes <= pack.size_bytes:
                yield at, record
                at += RECORD_HEADER.size + record.stored_bytes
                continue
            lost, at = at, self._next_header(pack, at + 1)
            if self._is_holed(pack, lost, at):
                continue
            say(
                f"{pack.path}: no whole record in bytes {lost} to {at}{', its end' if at == pack.size_bytes else ''}"
            )
            self.incomplete |= at < pack.size_bytes  # a torn end is what an interrupted backup leaves

    def _next_header(self, pack: Pack, at: int) -> int:
        """Where the next intact header begins; the pack's size if there is none."""
        while at + RECORD_HEADER.size <= pack.size_bytes:
            block = self._read(pack, at, BLOCK_BYTES)
            found = block.find(MAGIC)
            while found >= 0:
                if record_of(block[found : found + RECORD_HEADER.size], pack.seed):
                    return at + found
                found = block.find(MAGIC, found + 1)
            at += max(1, len(block) - RECORD_HEADER.size + 1)
        return pack.size_bytes

    def _is_holed(self, pack: Pack, start: int, end: int) -> bool:
        """Collection: whether a page here is all zeros, since the space of dead records was given back."""
        pages = range(start - start % PAGE_BYTES, end - PAGE_BYTES + 1, PAGE_BYTES)
        return any(not self._read(pack, page, PAGE_BYTES).strip(b"\0") for page in pages)

    def load(self, record_id: bytes, kind: int) -> bytes:
        """The verified plaintext of a record, from whichever of its places is intact.

        Raises:
            Damage: none is.
        """
        faults = []
        for number, offset in self._index.places(record_id):
            pack = self._packs[number]
            try:
                record = record_of(self._read(pack, offset, RECORD_HEADER.size), pack.seed)
                record = record or self._as_table_says(pack, offset)
                if record is None or (record.id, record.kind) != (record_id, kind):
                    raise Damage("not there any more")
                if record.stored_bytes > MOST_STORED_BYTES:
                    raise Damage("longer than any record")
                payload = self._read(pack, offset + RECORD_HEADER.size, record.stored_bytes)
                return self.keys.open(record, payload)
            except Damage as damage:
                faults.append(f"{damage} at byte {offset} of pack {pack.id.hex()}")
            except OSError as error:
                faults.append(f"in pack {pack.id.hex()}, which can not be read ({error.strerror})")
        raise Damage(f"{NAMES[kind]} {record_id.hex()[:12]} is {', '.join(faults) or 'in no pack'}")

    def _as_table_says(self, pack: Pack, offset: int) -> Record | None:
        """What a damaged header has said. The payload behind it may be intact, and its id will tell."""
        if self._table[0] != pack:
            self._table = (pack, dict(self._table_of(pack) or ()))
        return self._table[1].get(offset)

    def close(self) -> None:
        """Closes the packs."""
        while self._files:
            self._files.popitem()[1].close()

    # --- disk trees

    def pieces(self, root: bytes, size: int, segment: int) -> Iterator[tuple[int, int, bytes | None, str]]:
        """Disk trees: (offset, length, bytes, "") of all that is no hole, or (offset, length, None, why it is lost)."""
        segments = -(-size // segment)
        level = 0
        while FANOUT**level < segments:
            level += 1
        if level > MOST_LEVEL:
            yield 0, size, None, "the size is impossible"
        elif segments:
            yield from self._descend(root, level, 0, size, segment)

    def _descend(
        self, node_id: bytes, level: int, first: int, size: int, segment: int
    ) -> Iterator[tuple[int, int, bytes | None, str]]:
        """Segments from number `first` on, below a node of this level."""
        if node_id == HOLE:
            return
        start = first * segment
        length = min(FANOUT**level * segment, size - start)
        try:
            node = self.load(node_id, NODE)
            children = inner(node, level, -(-length // (FANOUT ** (level - 1) * segment))) if level else []
            parts = [] if level else leaf(node, length)
        except Damage as damage:
            yield start, length, None, str(damage)
            return
        for number, child in enumerate(children):
            yield from self._descend(child, level - 1, first + number * FANOUT ** (level - 1), size, segment)
        for part_bytes, chunk_id in parts:
            if chunk_id is not None:
                try:
                    chunk = self.load(chunk_id, CHUNK)
                    if len(chunk) != part_bytes:
                        raise Damage("the leaf is wrong about a chunk's length")
                    yield start, part_bytes, chunk, ""
                except Damage as damage:
                    yield start, part_bytes, None, str(damage)
            start += part_bytes


def inner(node: bytes, level: int, count: int) -> list[bytes]:
    """The ids of an inner node's children."""
    if node[:8] != struct.pack("<BBHI", 2, level, 0, count) or len(node) != 8 + 32 * count:
        raise Damage("an inner node has another shape than the size demands")
    return [node[at : at + 32] for at in range(8, len(node), 32)]


def leaf(node: bytes, length: int) -> list[tuple[int, bytes | None]]:
    """Length and id (None: a hole) of each part of a segment."""
    count = int.from_bytes(node[4:8], "little")
    if node[:4] != b"\1\0\0\0" or len(node) < 8 + 4 * count:
        raise Damage("a leaf has another shape than the size demands")
    parts: list[tuple[int, bytes | None]] = []
    at = 8 + 4 * count
    for part in struct.unpack_from(f"<{count}I", node, 8):
        hole = part >> 31
        parts.append((part & 0x7FFFFFFF, None if hole else node[at : at + 32]))
        at += 0 if hole else 32
    if at != len(node) or sum(part_bytes for part_bytes, _ in parts) != length:
        raise Damage("a leaf has another shape than the size demands")
    return parts


# --- restore points


class Point(NamedTuple):
    """What a listing needs of a restore point."""

    id: str
    vm: str
    uuid: str
    age: tuple[int, int, str]
    time: str
    size_bytes: int
    labels: str
    states: list[str]


def parsed(store: Store, record_id: bytes, kind: int) -> dict[str, Any]:
    """The JSON object of a manifest or mark."""
    value = json.loads(store.load(record_id, kind))
    if not isinstance(value, dict) or value["version"] != 1:
        raise Damage("of an unknown version")
    return value


def list_points(store: Store, *, everything: bool) -> list[Point]:
    """Manifests and Marks: the restore points, oldest first."""
    points = {}
    for record_id in sorted(store.ids[MANIFEST]):
        try:
            manifest = parsed(store, record_id, MANIFEST)
            contents = manifest["disks"] + manifest["files"]
            points[record_id.hex()] = Point(
                id=record_id.hex(),
                vm=str(manifest["vm"]["name"]),
                uuid=str(manifest["vm"]["uuid"]),
                age=(int(manifest["time"]), int(manifest["received_ms"]), record_id.hex()),
                time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(manifest["time"]))),
                size_bytes=sum(int(content["size_bytes"]) for content in contents),
                labels=" ".join(f"{name}={text}" for name, text in sorted(manifest["labels"].items())),
                states=["partial"] if manifest["partial"] else [],
            )
        except (Damage, *NONSENSE) as error:
            say(f"restore point {record_id.hex()[:12]} can not be read: {printable(error)}")
            store.incomplete = True
    marks = []
    for record_id in sorted(store.ids[MARK]):
        try:
            mark = parsed(store, record_id, MARK)
            marks.append((int(mark["time_ns"]), record_id, str(mark["action"]), str(mark["point"])))
        except (Damage, *NONSENSE) as error:
            say(f"a mark can not be read: {printable(error)}")
            store.incomplete = True
    state = {
        "forget": "forgotten",
        "recall": "forgotten",
        "pin": "pinned",
        "unpin": "pinned",
        "collect": "collected",
    }
    for _, _, action, point_id in sorted(marks):
        if point_id in points and action in state:
            states = points[point_id].states
            if action in ("recall", "unpin"):
                states[:] = [name for name in states if name != state[action]]
            elif state[action] not in states:
                states.append(state[action])
    listed = sorted(points.values(), key=lambda point: point.age)
    return [point for point in listed if everything or "collected" not in point.states]


def print_points(points: list[Point]) -> None:
    """A table for people."""
    rows = [("ID", "VM", "TIME", "SIZE", "STATE", "LABELS")]
    rows += [
        (
            p.id[:12],
            printable(p.vm),
            p.time,
            size_text(p.size_bytes),
            ",".join(p.states) or "-",
            printable(p.labels),
        )
        for p in points
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]).rstrip())


def find_point(points: list[Point], text: str) -> Point:
    """The point that an id's beginning, VM@latest, VM@latest~N or a VM's name names."""
    name, back = text, 0
    match = re.fullmatch(r"(.+)@latest(?:~(\d{1,9}))?", text, re.DOTALL)
    if match:
        name, back = match[1], int(match[2] or 0)
    by_id = [] if match or len(text) < 4 else [p for p in points if p.id.startswith(text.lower())]
    machines = {p.uuid for p in points if name in (p.vm, p.uuid)}
    history = [p for p in points if p.uuid in machines and not {"forgotten", "collected"} & set(p.states)]
    by_name = history[-1 - back : len(history) - back] if back < len(history) else []
    if len(machines) > 1 or len(by_id) > 1 or (by_id and by_name):
        found = ", ".join(p.id[:12] for p in (by_id + history)[:10])
        raise Failure(f"'{printable(text)}' names several restore points: {found}; name one by its id")
    if not by_id and not by_name:
        raise Failure(
            f"no restore point is named '{printable(text)}'; --list shows them, forgotten ones go by their id"
        )
    return (by_id or by_name)[0]


# --- writing


def is_safe(path: str) -> bool:
    """Manifests: whether a path stays below the folder that it is relative to."""
    try:
        parts = [os.fsencode(part) for part in path.split("/")]
    except UnicodeEncodeError:
        return False
    if any(not 0 < len(part) <= 255 or part in (b".", b"..") or b"\0" in part for part in parts):
        return False
    return len(os.fsencode(path)) <= 4095 and (os.name == "posix" or not re.search(r"[\\:]", path))


class Destination:
    """A folder that restored files go to, and never beside it."""

    def __init__(self, folder: str, *, force: bool) -> None:
        self.folder = os.path.realpath(folder)
        self.renamed = 0
        self._force = force
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def place(self, name: object, *, is_folder: bool = False) -> str:
        """A path for a name out of a manifest, by another name if that one is unusable or taken."""
        path = name if isinstance(name, str) else ""
        parents = {path[: at.start()] for at in re.finditer("/", path)}
        free = (
            path not in self._files and (is_folder or path not in self._folders) and not parents & self._files
        )
        if not is_safe(path) or not free:
            self.renamed += 1
            while f"renamed-{self.renamed}" in self._files | self._folders:
                self.renamed += 1
            path, parents = f"renamed-{self.renamed}", set()
            say(f"'{printable(name)}' can not be used as a name here, and is restored as {path}")
        (self._folders if is_folder else self._files).add(path)
        self._folders |= parents
        full = os.path.join(self.folder, *path.split("/"))
        if os.path.lexists(full) and not is_folder and not self._force:
            raise Failure(f"{full} exists already: choose another destination, or use --force")
        return full

    def create(self, path: str) -> BinaryIO:
        """A new file; with --force in place of an older one."""
        self.make_folder(os.path.dirname(path))
        if self._force and os.path.lexists(path):
            os.unlink(path)
        return open(path, "xb")

    def make_folder(self, path: str) -> None:
        """The folder, if it is not there.

        Raises:
            Failure: a link leads out of the destination.
        """
        real = os.path.realpath(path)
        if os.path.commonpath([self.folder, real]) != self.folder:
            raise Failure(f"{path} is a link that leads out of {self.folder}")
        os.makedirs(real, exist_ok=True)


def flat_descriptor(text: str, size: int, flat_name: str) -> bytes:
    """Disk trees, of a `vmdk`: the descriptor for a disk that now lies in one flat file; as it was if it says so."""
    sectors = -(-size // SECTOR_BYTES)
    vmfs, flat = f'RW {sectors} VMFS "{flat_name}"', f'RW {sectors} FLAT "{flat_name}" 0'
    lines = text.replace("\r\n", "\n").split("\n")
    extent = re.compile(r"(?i)\s*(RW|RDONLY|NOACCESS)\s+\d")
    extents = [line.strip() for line in lines if extent.match(line)]
    if extents not in ([vmfs], [flat]) or not re.search(r"(?im)^[ \t]*parentCID[ \t]*=[ \t]*ffffffff", text):
        stale = re.compile(
            r"(?i)# Disk DescriptorFile|\s*(encoding|createType|parent\w+|changeTrackPath)\s*="
        )
        kept = [line for line in lines if line and not extent.match(line) and not stale.match(line)]
        head = [
            "# Disk DescriptorFile",
            'encoding="UTF-8"',
            'createType="monolithicFlat"',
            "parentCID=ffffffff",
        ]
        text = "\n".join([*head, flat, *(kept or ["version=1", "CID=fffffffe"]), ""])
    encoding = re.search(r'(?im)^[ \t]*encoding[ \t]*=[ \t]*"?([\w.-]+)', text)
    with contextlib.suppress(LookupError, UnicodeError):
        return text.encode(encoding[1] if encoding else "utf-8")
    return text.encode("utf-8", "replace")


def write_content(
    store: Store, destination: Destination, content: dict[str, Any], segment: int, path: str
) -> int:
    """Writes a disk or file, sparsely; says which ranges are lost, and returns how many bytes that are."""
    root, size = bytes.fromhex(content["root"]), int(content["size_bytes"])
    if not 0 <= size < 1 << 63:
        raise Damage(f"{printable(path)} has {size} bytes")
    whole = -(-size // SECTOR_BYTES) * SECTOR_BYTES if content.get("format") == "vmdk" else size
    lost: list[tuple[int, int, str]] = []
    with destination.create(path) as file:
        file.truncate(whole)
        for offset, length, data, why in store.pieces(root, size, segment):
            if data is not None:
                file.seek(offset)
                file.write(data)
            elif lost and lost[-1][1] == offset:
                lost[-1] = (lost[-1][0], offset + length, lost[-1][2])
            else:
                lost.append((offset, offset + length, why))
        file.flush()
        os.fsync(file.fileno())
    for start, end, why in lost:
        say(f"damaged: {printable(path)}, bytes {start} to {end} ({size_text(end - start)}): {why}")
    return sum(end - start for start, end, _ in lost)


def restore(store: Store, point: Point, destination: Destination) -> bool:
    """Writes all of a restore point that can be had; True if that is everything, under its own names."""
    manifest = parsed(store, bytes.fromhex(point.id), MANIFEST)
    segment = int(manifest["segment_bytes"])
    if segment < 1 << 20 or segment > 1 << 30:
        raise Damage(f"a segment has {segment} bytes")
    contents: list[tuple[dict[str, Any], str]] = []
    descriptors: list[tuple[str, bytes]] = []
    for disk in manifest["disks"]:
        if disk["format"] == "vmdk":
            flat = destination.place(
                re.sub(r'["\x00-\x1f]', "_", disk["flat_name"])
            )  # it stands in the descriptor
            path = destination.place(disk["name"])
            contents.append((disk, flat))
            name = os.path.relpath(flat, os.path.dirname(path)).replace(os.sep, "/")
            descriptors.append(
                (path, flat_descriptor(str(disk["descriptor"]), int(disk["size_bytes"]), name))
            )
        else:
            contents.append((disk, destination.place(disk["name"])))
    contents += [(file, destination.place(file["name"])) for file in manifest["files"]]
    for folder in [destination.folder, *(destination.place(f, is_folder=True) for f in manifest["folders"])]:
        destination.make_folder(folder)
    lost = 0
    for content, path in contents:
        lost += write_content(store, destination, content, segment, path)
        if "mode" in content:
            with contextlib.suppress(OSError, ValueError, TypeError, OverflowError):
                os.chmod(path, content["mode"] & 0o777)
                os.utime(path, ns=(content["mtime_ns"], content["mtime_ns"]))
    for path, text in descriptors:
        with destination.create(path) as file:
            file.write(text)
    result = f"{size_text(lost)} are damaged and left as holes" if lost else "every byte verified"
    print(
        f"restored {printable(point.vm)}, restore point {point.id[:12]} of {point.time}, to {destination.folder}"
    )
    counts = f"{len(manifest['disks'])} disks, {len(manifest['files'])} files"
    print(f"  {counts}, {size_text(point.size_bytes)}, {result}")
    return not lost and not destination.renamed


def arguments() -> argparse.Namespace:
    """The command line."""
    usage, _, notes = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="rescue.py",
        description=usage,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packs", metavar="PACKS_DIR", help="the repository's folder or its packs/ folder")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the restore points")
    action.add_argument("--restore", nargs=2, metavar=("POINT", "DEST"), help="restore one into a folder")
    parser.add_argument("--all", action="store_true", help="show points too whose space was given back")
    parser.add_argument("--force", action="store_true", help="replace files that exist in DEST")
    parser.add_argument("--config", metavar="FILE", help="config.json, if it is not beside the packs")
    parser.add_argument("--key", metavar="FILE", help="an exported master key, instead of a password")
    return parser.parse_args()


def run(chosen: argparse.Namespace) -> int:
    """Does what was asked for; the exit code."""
    if not os.path.isdir(chosen.packs):
        raise Failure(f"{chosen.packs} is no folder")
    beside = [chosen.packs, os.path.join(chosen.packs, os.pardir)]
    files = [os.path.join(folder, name) for folder in beside for name in ("config.json", "config.json.copy")]
    config = read_config([chosen.config] if chosen.config else files)
    if config is None and chosen.config:
        raise Failure(f"{chosen.config} is no configuration of a repository")
    repository_id = config.get("id") if config else None
    below = os.path.join(chosen.packs, "packs")
    packs = below if os.path.isdir(below) else chosen.packs
    keys = Keys(config, chosen.key)
    with contextlib.closing(
        Store(packs, keys, bytes.fromhex(repository_id) if repository_id else None)
    ) as store:
        points = list_points(store, everything=chosen.all)
        if chosen.list:
            print_points(points)
            return 100 if store.incomplete else 0
        point = find_point(points, chosen.restore[0])
        try:
            return 0 if restore(store, point, Destination(chosen.restore[1], force=chosen.force)) else 100
        except (Damage, *NONSENSE) as error:
            raise Failure(f"restore point {point.id[:12]} can not be restored: {printable(error)}") from None


def main() -> int:
    """Runs the command; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    os.umask(0o077)  # disks are nobody else's business
    try:
        return run(arguments())
    except Failure as failure:
        say(str(failure))
    except OSError as error:
        say(f"{error.filename or 'input/output'}: {error.strerror}")
    except KeyboardInterrupt:
        say("interrupted: the destination is not complete")
    return 1


if __name__ == "__main__":
    sys.exit(main())
