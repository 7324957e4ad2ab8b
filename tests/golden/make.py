"""Makes the golden repositories: `python tests/golden/make.py` writes *.tar.xz and expected.json beside this file.

They are kept for ever: a later version of Holdfast must read what this one has written. Run it only before a
version of the format is frozen, or to add repositories of a new one; never to make a failing test pass.

The source is a VM folder whose bytes depend on nothing but this file. Ids of packs and sessions, keys, salts and
passwords' salts are random, so two runs give different archives of the same restore points.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.esxi.folder import open_machine
from holdfast.ids import PackId, PointId, SessionId
from holdfast.repo import keys
from holdfast.repo.backup import BackupOptions
from holdfast.repo.codec import Sealed, Sealer, strong_hash
from holdfast.repo.format import record as r
from holdfast.repo.format.config import Cipher
from holdfast.repo.format.mark import Action, Mark, encode_mark
from holdfast.repo.keys import clear_keys
from holdfast.repo.packs import LocalPackStore
from holdfast.repo.records import PackScanner
from holdfast.repo.repository import InitOptions, Repository

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
PASSWORD = "golden password é"
SECOND_PASSWORD = "another one"
BLOCK = 4096
MIB = 1 << 20
TIMES = (1_700_000_000, 1_700_086_400, 1_700_172_800)


@dataclass(frozen=True)
class Golden:
    """One golden repository.

    Args:
        with_index: keep the index in the archive; otherwise it has to be rebuilt.
    """

    name: str
    chunker: str
    chunk_size_bytes: int
    cipher: Cipher | None = None
    level: int = 1
    with_index: bool = False


GOLDENS = (
    Golden("v1-clear-aligned", "aligned", 32 << 10),
    Golden("v1-clear-fixed", "fixed", 64 << 10, level=0, with_index=True),
    Golden("v1-aes256-gcm", "aligned", 32 << 10, "aes256-gcm"),
    Golden("v1-chacha20-poly1305", "aligned", 64 << 10, "chacha20-poly1305", level=3),
)


# --- the source


def noise(name: str, size: int) -> bytes:
    """Bytes that do not compress."""
    return hashlib.shake_128(name.encode()).digest(size)


def block(name: str) -> bytes:
    """A block that compresses well and is like no other."""
    line = f"{hashlib.sha256(name.encode()).hexdigest()} {name}\n".encode()
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def system_disk(day: int) -> bytes:
    """3 MiB and 3 sectors. Day by day some blocks change, and a part moves by three blocks."""
    size = 3 * MIB + 3 * 512
    blocks = [block(f"system {number // 2 if 200 < number < 260 else number}") for number in range(300)]
    blocks += [bytes(BLOCK)] * 200
    blocks += [block(f"moving {number}") for number in range(100)]
    if day:
        blocks[500:500] = [block(f"day {day}, inserted {number}") for number in range(3)]
    for number in range(4 * day):
        blocks[number * 17 % 300] = block(f"day {day}, changed {number}")
    data = b"".join(blocks) + noise("system", 5 * BLOCK + 700)
    return data.ljust(size, b"\0")[:size]


def sparse_pieces(day: int) -> Iterator[tuple[int, bytes]]:
    """Where the large disk has data: its first and last bytes, and a few places between them."""
    yield 0, block("first")
    yield 40 * MIB - BLOCK, block("across a border") + block("of two segments")
    yield 200 * MIB + 17 * BLOCK, b"".join(block(f"middle {number}") for number in range(20))
    yield 255 * MIB, block(f"last of the first inner node, day {day}")
    yield 257 * MIB, b"the last sector".ljust(512, b"!")


SPARSE_BYTES = 257 * MIB + 512
"""More than 256 segments of 1 MiB: the tree has two levels of inner nodes."""


def descriptor(flat: str, size: int, uuid: str) -> str:
    return f"""# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=fffffffe
parentCID=ffffffff
createType="vmfs"

# Extent description
RW {size // 512} VMFS "{flat}"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "{max(1, size // 512 // 63 // 255)}"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.uuid = "{uuid}"
ddb.virtualHWVersion = "13"
"""


VMX = """.encoding = "UTF-8"
displayName = "göld 1"
uuid.bios = "56 4d 00 11 22 33 44 55-66 77 88 99 aa bb cc dd"
uuid.location = "56 4d 00 11 22 33 44 55-66 77 88 99 aa bb cc dd"
scsi0.present = "TRUE"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "gold.vmdk"
scsi0:1.present = "TRUE"
scsi0:1.fileName = "gold_1.vmdk"
nvram = "gold.nvram"
"""


def write_source(folder: Path, day: int) -> None:
    """The VM's folder as it was on that day."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notes").mkdir(parents=True)
    (folder / "empty").mkdir()
    system = system_disk(day)
    (folder / "gold-flat.vmdk").write_bytes(system)
    (folder / "gold.vmdk").write_text(
        descriptor("gold-flat.vmdk", len(system), "60 00 c2 9a 00 00 00 01-00 00 00 00 00 00 00 01"),
        encoding="utf-8",
    )
    with (folder / "gold_1-flat.vmdk").open("wb") as file:
        file.truncate(SPARSE_BYTES)
        for offset, data in sparse_pieces(day):
            file.seek(offset)
            file.write(data)
    (folder / "gold_1.vmdk").write_text(
        descriptor("gold_1-flat.vmdk", SPARSE_BYTES, "60 00 c2 9a 00 00 00 02-00 00 00 00 00 00 00 02"),
        encoding="utf-8",
    )
    (folder / "gold.vmx").write_text(VMX, encoding="utf-8")
    (folder / "gold.nvram").write_bytes(noise("nvram", 1000))
    (folder / "vmware.log").write_text("".join(f"day {day}: line {n}\n" for n in range(50)), encoding="utf-8")
    (folder / "notes" / "nothing.txt").write_bytes(b"")
    (folder / "notes" / "ümläut.txt").write_text("as it is\n", encoding="utf-8")
    if day == 1:
        (folder / "notes" / "only on day 1").write_bytes(b"1")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o640 if path.suffix != ".vmx" else 0o755)
            os.utime(path, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789 + day))


# --- what a backup alone does not write


def pack_paths(repository: Path) -> list[Path]:
    return sorted((repository / "packs").glob("*/*.pack"))


def pack_id_of(path: Path) -> PackId:
    return PackId(bytes.fromhex(path.stem))


def seal(repository: Path, path: Path) -> None:
    """Seals an open pack, as a writer does that has filled it."""
    pack_id = pack_id_of(path)
    store = LocalPackStore(str(repository / "packs"))
    scanner = PackScanner(store, pack_id, path.stat().st_size, payloads=True)
    entries = [
        r.TableEntry(
            found.header.id,
            found.offset,
            found.header.stored_bytes,
            found.header.plain_bytes,
            found.header.kind,
            found.header.codec,
            found.header.flags,
        )
        for found in scanner.records()
    ]
    store.close()
    assert not scanner.damaged
    plaintext = r.encode_table(entries)
    table_id = clear_keys().record_id(r.Kind.TABLE, plaintext)
    header = r.RecordHeader(
        r.Kind.TABLE, r.Codec.RAW, 0, len(plaintext), len(plaintext), table_id, strong_hash(plaintext)
    )
    footer = r.encode_pack_footer(r.PackFooter(path.stat().st_size, len(entries)), pack_id)
    with path.open("ab") as file:
        file.write(Sealed(header, plaintext).to_bytes(pack_id) + footer)


def write_marks(repository: Repository, path: Path, marks: list[tuple[Action, PointId]]) -> None:
    """Appends marks to the open pack, as later versions do."""
    secrets = repository.unlock()
    sealer = Sealer(secrets, 1)
    pack_id = pack_id_of(path)
    with path.open("ab") as file:
        for number, (action, point) in enumerate(marks):
            session = SessionId(hashlib.sha256(f"mark {number}".encode()).digest()[:16])
            text = encode_mark(Mark(action, point, session, TIMES[2] * 10**9 + number))
            sealed = sealer.seal(r.Kind.MARK, secrets.record_id(r.Kind.MARK, text), text)
            file.write(sealed.to_bytes(pack_id))


# --- making


def back_up(repository: Repository, source: Path, day: int) -> PointId:
    machine = replace(open_machine(str(source)), origin="gold")
    try:
        options = BackupOptions(labels={"day": str(day), "größe": "klein"}, time=TIMES[day], workers=1)
        point = repository.backup(machine, options).point
    finally:
        machine.close()
    assert point is not None
    return point


def make(golden: Golden, work: Path) -> Path:
    """The repository, below `work`."""
    place, source = work / golden.name, work / "gold"
    options = InitOptions(
        cipher=golden.cipher,
        chunker=golden.chunker,
        chunk_size_bytes=golden.chunk_size_bytes,
        compression_level=golden.level,
        segment_bytes=MIB,
        pack_bytes=MIB,
    )
    password = PASSWORD if golden.cipher else None

    def opened() -> Repository:
        return Repository.open(str(place), password=password, notify=lambda _text: None)

    write_source(source, 0)
    with Repository.init(str(place), options, password=password) as repository:
        if password:
            repository.add_key(SECOND_PASSWORD, "second")
        points = [back_up(repository, source, 0)]
    for path in pack_paths(place):
        if not is_sealed(path):
            seal(place, path)
    shutil.rmtree(place / "index")
    for day in (1, 2):
        write_source(source, day)
        with opened() as repository:
            points.append(back_up(repository, source, day))
    with opened() as repository:
        (path,) = [p for p in pack_paths(place) if not is_sealed(p)]
        first, second, third = points
        marks: list[tuple[Action, PointId]] = [("pin", first), ("forget", second), ("recall", second)]
        marks += [
            ("pin", second),
            ("unpin", second),
            ("forget", third),
            ("collect", third),
            ("recall", third),
        ]
        write_marks(repository, path, marks)
        repository.rebuild_index()
    return place


def is_sealed(path: Path) -> bool:
    return r.decode_pack_footer(path.read_bytes()[-r.FOOTER_BYTES :], pack_id_of(path)) is not None


def archive(golden: Golden, place: Path) -> bytes:
    """The repository as a compressed archive that says nothing of the machine."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if info.name.endswith("lock.mdb") or (not golden.with_index and "/index" in info.name):
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = TIMES[2]
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as tar:
        tar.add(place, arcname=golden.name, filter=plain)
    return buffer.getvalue()


def digest_of(read: Callable[[], Iterator[bytes]]) -> str:
    digest = hashlib.sha256()
    for piece in read():
        digest.update(piece)
    return digest.hexdigest()


def pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(MIB):
            yield data


def expected_point(
    repository: Repository, point_id: PointId, source: Path, *, pinned: bool
) -> dict[str, object]:
    """What must come out of a restore point: names, sizes and hashes, from the source and not from the repository."""
    point = repository.resolve(point_id.hex())
    manifest = point.manifest
    return {
        "id": point.id.hex(),
        "vm": manifest.vm_name,
        "vm_uuid": manifest.vm_uuid,
        "time": manifest.time,
        "labels": dict(manifest.labels),
        "folders": list(manifest.folders),
        "pinned": pinned,
        "disks": [
            {
                "name": disk.info.name,
                "label": disk.info.label,
                "size_bytes": (source / disk.info.flat_name).stat().st_size,
                "sha256": digest_of(lambda name=disk.info.flat_name: pieces(source / name)),  # type: ignore[misc]
                "root": disk.tree.root.hex(),
                "descriptor_sha256": hashlib.sha256((source / disk.info.name).read_bytes()).hexdigest(),
            }
            for disk in manifest.disks
        ],
        "files": [
            {
                "name": file.info.name,
                "size_bytes": (source / file.info.name).stat().st_size,
                "sha256": digest_of(lambda name=file.info.name: pieces(source / name)),  # type: ignore[misc]
                "mode": file.info.mode,
                "mtime_ns": file.info.mtime_ns,
            }
            for file in manifest.files
        ],
    }


def main() -> None:
    expected: dict[str, object] = {}
    keys.SCRYPT_N = 1 << 12  # type: ignore[misc]  # the tests open them often
    socket.gethostname = lambda: "golden"  # manifests name the machine that made them
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for golden in GOLDENS:
            place = make(golden, work)
            password = PASSWORD if golden.cipher else None
            with Repository.open(str(place), password=password) as repository:
                listed = repository.points()
                described = []
                for day, point in enumerate(listed):
                    write_source(work / "gold", day)
                    described.append(expected_point(repository, point.id, work / "gold", pinned=day == 0))
                assert [p["time"] for p in described] == list(TIMES[:2])
                report = repository.check(read_data=True)
                assert report.clean, report
            data = archive(golden, place)
            (HERE / f"{golden.name}.tar.xz").write_bytes(data)
            sys.stdout.write(f"{golden.name}: {len(data)} bytes\n")
            expected[golden.name] = {
                "format": 1,
                "chunker": golden.chunker,
                "chunk_size_bytes": golden.chunk_size_bytes,
                "passwords": [PASSWORD, SECOND_PASSWORD] if golden.cipher else [],
                "with_index": golden.with_index,
                "points": described,
            }
    EXPECTED.write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
