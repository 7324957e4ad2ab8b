"""A reader of repositories that was written from docs/FORMAT.md alone: it shares no code with Holdfast.

It proves that the document is complete, and is slow, trusting and short: what it reads are the golden repositories.
Section names in the comments are those of the document.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3
import xxhash
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

CONTEXT = "holdfast 2026-11-22 v1 "
HOLE = bytes(32)
CHUNK, NODE, MANIFEST, MARK, TABLE = 1, 2, 3, 4, 127
NAMES = {CHUNK: "chunk", NODE: "node", MANIFEST: "manifest", MARK: "mark"}


def derive(context: str, data: bytes) -> bytes:
    return blake3.blake3(data, derive_key_context=CONTEXT + context).digest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Reader:
    """All restore points of a repository, from config.json and the packs."""

    def __init__(self, folder: Path, password: str | None) -> None:
        # config.json
        self.config = json.loads((folder / "config.json").read_bytes())
        checksum = self.config.pop("checksum")
        assert checksum == blake3.blake3(canonical(self.config)).hexdigest()
        assert self.config["type"] == "holdfast-repository"
        assert self.config["version"]["read"] == 1
        assert self.config["features"]["required"] == []
        self.master = None if self.config["encryption"] is None else self.unlock(password or "")
        # Packs
        self.records: dict[bytes, tuple[int, int, int, int, bytes, bytes]] = {}
        self.sealed = self.open = 0
        for path in sorted(folder.glob("packs/??/*.pack")):
            self.scan(path)
        self.points = self.listed()

    def unlock(self, password: str) -> bytes:
        """Keys: a slot that the password opens, and the configuration's MAC."""
        encryption = self.config["encryption"]
        self.aead = {"aes256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}[encryption["cipher"]]
        for slot in encryption["slots"]:
            kdf = slot["kdf"]
            key = hashlib.scrypt(
                password.encode(), salt=bytes.fromhex(kdf["salt"]), n=kdf["n"], r=kdf["r"], p=kdf["p"], dklen=32, maxmem=2**28
            )  # fmt: skip
            associated = canonical(
                {
                    "chunk_size_bytes": self.config["chunker"]["chunk_size_bytes"],
                    "chunker": self.config["chunker"]["name"],
                    "cipher": encryption["cipher"],
                    "id": slot["id"],
                    "kdf": {name: kdf[name] for name in ("n", "p", "r", "salt")},
                    "repository": self.config["id"],
                    "segment_bytes": self.config["segment_bytes"],
                }
            )
            wrapped = bytes.fromhex(slot["wrapped"])
            try:
                master = self.aead(key).decrypt(bytes.fromhex(slot["nonce"]), wrapped, associated)
            except InvalidTag:
                continue
            signed = {**self.config, "encryption": {k: v for k, v in encryption.items() if k != "mac"}}
            mac = blake3.blake3(canonical(signed), key=derive("configuration", master)).hexdigest()
            assert mac == encryption["mac"]
            return master
        raise ValueError("the password opens no slot")

    def scan(self, path: Path) -> None:
        data = path.read_bytes()
        assert data[:16] == b"HOLDPACK" + struct.pack("<HHI", 1, 64, 0)
        assert data[16:32].hex() == path.stem
        assert data[32:48].hex() == self.config["id"]
        assert int.from_bytes(data[56:64], "little") == xxhash.xxh3_64_intdigest(data[:56])
        seed = int.from_bytes(data[16:24], "little")
        end = len(data)
        if data[-32:-24] == b"HOLDSEAL":
            table_offset, entries, reserved, check = struct.unpack("<QIIQ", data[-24:])
            assert check == xxhash.xxh3_64_intdigest(data[-32:-8], seed)
            assert reserved == 0
            end -= 32
        offset = 64
        found = []
        while offset < end:
            # Records
            head = data[offset : offset + 72]
            magic, kind, codec, flags, stored, plain, record_id, strong, check = struct.unpack(
                "<4sBBHII32s16sQ", head
            )
            assert magic == b"\xf7HFr"
            assert check == xxhash.xxh3_64_intdigest(head[:64], seed)
            payload = data[offset + 72 : offset + 72 + stored]
            assert strong == blake3.blake3(payload).digest()[:16]
            if kind == TABLE:
                assert record_id == blake3.blake3(payload).digest()
                assert (offset, entries) == (table_offset, len(found))
                assert payload == b"".join(found)
            else:
                found.append(struct.pack("<32sIIIBBH", record_id, offset, stored, plain, kind, codec, flags))
                self.records.setdefault(record_id, (kind, codec, flags, plain, head[:48], payload))
            offset += 72 + stored
        assert offset == end
        self.sealed += end < len(data)
        self.open += end == len(data)

    def load(self, record_id: bytes, wanted: int) -> bytes:
        """Records, Encryption, Identity."""
        kind, codec, flags, plain, associated, payload = self.records[record_id]
        assert kind == wanted
        assert flags == (self.master is not None)
        if self.master is not None:
            salt, number = payload[:16], payload[16:24]
            key = blake3.blake3(salt + associated, key=derive("record encryption", self.master)).digest()
            payload = self.aead(key).decrypt(bytes(4) + number, payload[24:], associated)
        if codec == 1:
            payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=plain)
        assert len(payload) == plain
        if self.master is not None:
            expected = blake3.blake3(payload, key=derive(f"key of {NAMES[kind]} ids", self.master)).digest()
        elif kind == CHUNK:
            expected = blake3.blake3(payload).digest()
        else:
            expected = derive(f"clear {NAMES[kind]} id", payload)
        assert record_id == expected
        return payload

    def listed(self) -> dict[str, dict[str, Any]]:
        """Manifests and Marks: the points by id, with their flags."""
        of_kind = {k: [i for i, record in self.records.items() if record[0] == k] for k in (MANIFEST, MARK)}
        points = {
            i.hex(): {**self.parsed(i, MANIFEST), "pinned": False, "hidden": False} for i in of_kind[MANIFEST]
        }
        marks = sorted((self.parsed(i, MARK)["time_ns"], i) for i in of_kind[MARK])
        collected = set()
        for _, record_id in marks:
            mark = self.parsed(record_id, MARK)
            point = points.get(mark["point"], {})
            if mark["action"] == "collect":
                collected.add(mark["point"])
            elif mark["action"] in ("forget", "recall"):
                point["hidden"] = mark["action"] == "forget"
            else:
                point["pinned"] = mark["action"] == "pin"
        return {i: point for i, point in points.items() if i not in collected}

    def parsed(self, record_id: bytes, kind: int) -> dict[str, Any]:
        text = self.load(record_id, kind)
        value = json.loads(text)
        assert canonical(value) == text
        assert isinstance(value, dict)
        return value

    def content(self, point: dict[str, Any], content: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Segments and Disk trees: (offset, bytes) of what is no hole."""
        segment_bytes, size = point["segment_bytes"], content["size_bytes"]
        total = -(-size // segment_bytes)
        level, nodes = 0, total
        while nodes > 1:
            level, nodes = level + 1, -(-nodes // 256)
        if total:
            yield from self.descend(bytes.fromhex(content["root"]), level, 0, total, segment_bytes, size)

    def descend(
        self, node: bytes, level: int, first: int, total: int, segment_bytes: int, size: int
    ) -> Iterator[tuple[int, bytes]]:
        if node == HOLE:
            return
        data = self.load(node, NODE)
        kind, node_level, reserved, count = struct.unpack("<BBHI", data[:8])
        assert (kind, node_level, reserved) == (2 if level else 1, level, 0)
        if level:
            span = 256 ** (level - 1)
            assert count == -(-min(total - first, 256 * span) // span)
            assert len(data) == 8 + 32 * count
            for number in range(count):
                child = data[8 + 32 * number : 40 + 32 * number]
                yield from self.descend(child, level - 1, first + number * span, total, segment_bytes, size)
            return
        offset = first * segment_bytes
        ids_at = 8 + 4 * count
        for part in struct.unpack_from(f"<{count}I", data, 8):
            length = part & 0x7FFFFFFF
            if not part >> 31:
                chunk = self.load(data[ids_at : ids_at + 32], CHUNK)
                assert len(chunk) == length
                yield offset, chunk
                ids_at += 32
            offset += length
        assert ids_at == len(data)
        assert offset == min((first + 1) * segment_bytes, size)
