"""The worked example of docs/FORMAT.md: `python tests/repo/format/example.py --write` puts it into the document.

Everything in it is fixed, so that a reader written from the document can be tried on these bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import blake3

from holdfast.ids import ChunkId, PackId, RecordId, RepositoryId
from holdfast.repo.codec import Sealed, Sealer, strong_hash
from holdfast.repo.format import record as r
from holdfast.repo.format.node import Leaf, encode_leaf
from holdfast.repo.format.record import Codec, Kind, RecordHeader
from holdfast.repo.keys import Keys, clear_keys, secret_keys

DOCUMENT = Path(__file__).parents[3] / "docs" / "FORMAT.md"

PACK_ID = PackId(bytes(range(16)))
REPOSITORY_ID = RepositoryId(bytes(range(16, 32)))
CREATED_MS = 1_700_000_000_000
CHUNK = b"a chunk of bytes"
MASTER = bytes(range(32))
SALT = bytes(range(32, 48))
NUMBER = 5


@dataclass(frozen=True)
class Part:
    """Some bytes of the pack and what they are."""

    data: bytes
    meaning: str


def sealer_with_fixed_salt(keys: Keys) -> Sealer:
    """A sealer whose records are the same every time; only for examples."""
    sealer = Sealer(keys, 0)
    sealer._salt = SALT
    sealer._numbers = iter(range(NUMBER, NUMBER + 100))  # type: ignore[assignment]
    return sealer


def table_record(entries: list[r.TableEntry]) -> Sealed:
    plaintext = r.encode_table(entries)
    header = RecordHeader(
        Kind.TABLE,
        Codec.RAW,
        0,
        len(plaintext),
        len(plaintext),
        RecordId(blake3.blake3(plaintext).digest()),
        strong_hash(plaintext),
    )
    return Sealed(header, plaintext)


def sealed_pack(records: list[Sealed]) -> tuple[list[bytes], bytes]:
    """The pack's pieces in order, and the whole."""
    pieces = [r.encode_pack_header(r.PackHeader(PACK_ID, REPOSITORY_ID, CREATED_MS))]
    entries = []
    for sealed in records:
        header = sealed.header
        entries.append(
            r.TableEntry(
                header.id,
                len(b"".join(pieces)),
                header.stored_bytes,
                header.plain_bytes,
                header.kind,
                header.codec,
                header.flags,
            )
        )
        pieces += [r.encode_record_header(header, PACK_ID), sealed.payload]
    table = table_record(entries)
    table_offset = len(b"".join(pieces))
    pieces += [r.encode_record_header(table.header, PACK_ID), table.payload]
    pieces.append(r.encode_pack_footer(r.PackFooter(table_offset, len(entries)), PACK_ID))
    return pieces, b"".join(pieces)


def records() -> list[Sealed]:
    """The chunk, and the leaf that is the disk's root."""
    keys = clear_keys()
    sealer = Sealer(keys, 0)
    chunk = keys.record_id(Kind.CHUNK, CHUNK)
    leaf = encode_leaf(Leaf((len(CHUNK),), (ChunkId(chunk),)))
    return [
        sealer.seal(Kind.CHUNK, chunk, CHUNK),
        sealer.seal(Kind.NODE, keys.record_id(Kind.NODE, leaf), leaf),
    ]


def _cut(data: bytes, *parts: tuple[int, str]) -> Iterator[Part]:
    at = 0
    for size, meaning in parts:
        yield Part(data[at : at + size], meaning)
        at += size
    assert at == len(data)


def _record_header(data: bytes, kind: str) -> Iterator[Part]:
    return _cut(
        data,
        (4, "record header: magic"),
        (4, f"kind {kind}, codec RAW, no flags"),
        (8, "stored_bytes, plain_bytes"),
        (32, "id"),
        (16, "strong_hash"),
        (8, "check"),
    )


def parts() -> list[Part]:
    """The pack, annotated."""
    pieces, _ = sealed_pack(records())
    header, chunk_header, chunk, leaf_header, leaf, table_header, table, footer = pieces
    return [
        *_cut(
            header,
            (8, "pack header: magic"),
            (8, "version 1, 64 bytes, no flags"),
            (16, "pack_id"),
            (16, "repository_id"),
            (8, "created_ms"),
            (8, "check"),
        ),
        *_record_header(chunk_header, "CHUNK"),
        *_cut(chunk, (16, "payload: the chunk")),
        *_record_header(leaf_header, "NODE"),
        *_cut(leaf, (8, "payload: leaf, level 0, 1 part"), (4, "16 bytes, no hole"), (32, "id of the chunk")),
        *_record_header(table_header, "TABLE"),
        *(
            part
            for number in range(2)
            for part in _cut(
                table[48 * number : 48 * number + 48],
                (32, f"table, entry {number}: id"),
                (12, "offset, stored_bytes, plain_bytes"),
                (4, "kind, codec, flags"),
            )
        ),
        *_cut(footer, (8, "footer: magic"), (8, "table_offset"), (8, "entries, reserved"), (8, "check")),
    ]


def dump() -> str:
    """The annotated hexadecimal dump of the pack."""
    lines = []
    offset = 0
    for part in parts():
        for at in range(0, len(part.data), 16):
            row = part.data[at : at + 16]
            text = f"{offset + at:04x}  {row.hex(' '):<47}  {'' if at else part.meaning}"
            lines.append(text.rstrip())
        offset += len(part.data)
    return "\n".join(lines)


def key_rows() -> list[tuple[str, str]]:
    """What follows from the example's master key."""
    keys = secret_keys("aes256-gcm", MASTER)
    rows = [
        ("data key", keys.data_key),
        *((f"key of {kind.name.lower()} ids", key) for kind, key in keys.id_keys),
    ]
    assert keys.chunker_seed is not None
    rows += [("chunker seed", keys.chunker_seed)]
    chunk = keys.record_id(Kind.CHUNK, CHUNK)
    rows += [("id of the chunk", chunk)]
    for cipher in ("aes256-gcm", "chacha20-poly1305"):
        sealed = sealer_with_fixed_salt(secret_keys(cipher, MASTER)).seal(Kind.CHUNK, chunk, CHUNK)  # type: ignore[arg-type]
        if cipher == "aes256-gcm":
            rows += [("associated data", sealed.header.associated_data())]
        rows += [(f"payload with `{cipher}`", sealed.payload)]
        rows += [(f"its strong hash with `{cipher}`", sealed.header.strong_hash)]
    return [(what, data.hex()) for what, data in rows]


def key_table() -> str:
    return "\n".join(
        ["| what | bytes |", "|---|---|", *(f"| {what} | {data} |" for what, data in key_rows())]
    )


def _block(text: str, name: str, make: Callable[[], str], *, fenced: bool) -> str:
    """The document with one of its generated blocks made anew."""
    marker = f"<!-- held: {name} -->\n"
    head, _, rest = text.partition(marker)
    lines = rest.split("\n")
    end = lines.index("```", 1) + 1 if fenced else lines.index("") if "" in lines else len(lines)
    made = f"```\n{make()}\n```" if fenced else make()
    return head + marker + made + "\n" + "\n".join(lines[end:])


def updated(text: str) -> str:
    return _block(_block(text, "example", dump, fenced=True), "example-keys", key_table, fenced=False)


if __name__ == "__main__":
    current = DOCUMENT.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(updated(current), encoding="utf-8")
    else:
        sys.stdout.write(f"{dump()}\n\n{key_table()}\n")
