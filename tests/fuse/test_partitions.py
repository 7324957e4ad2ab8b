"""Tables made by sfdisk are read as sfdisk reads them; made-up ones never raise, hang or leave the disk."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.fuse.partitions import Partition, find_partitions

MIB = 1 << 20
TABLE_DISK_BYTES = 4 * MIB
KINDS = {
    "83": "linux", "82": "swap", "8e": "lvm", "c": "fat32", "7": "ntfs", "ef": "efi", "fb": "vmfs", "f0": "type-f0",
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B": "efi", "0FC63DAF-8483-4772-8E79-3D69D8477DE4": "linux",
    "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F": "swap", "E6D6D379-F507-44C2-A23C-238F2A3DF928": "lvm",
    "AA31E02A-400F-11DB-9590-000C2911D1B8": "vmfs", "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": "data",
    "12345678-0000-0000-0000-000000000001": "type-12345678",
}  # fmt: skip

MBR = "label: dos\n, 8M, 83, *\n, 8M, 82\n, 8M, 8e\n, 8M, fb\n"
LOGICAL = "label: dos\n, 8M, 83\n, , E\n, 4M, 83\n, 4M, 82\n, 4M, c\n, 4M, 7\n, 4M, f0\n, , ef\n"
GPT = (
    "label: gpt\n"
    'size=4M, type=U, name="EFI System"\nsize=4M, type=L, name="wurzel \u00e4\u4e16\U0001f600"\nsize=4M, type=S\n'
    "start=20M, size=4M, type=E6D6D379-F507-44C2-A23C-238F2A3DF928\n"
    "size=4M, type=AA31E02A-400F-11DB-9590-000C2911D1B8\n"
    "size=4M, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\n"
    "size=4M, type=12345678-0000-0000-0000-000000000001\n"
)
UTF8 = {**os.environ, "LC_ALL": "C.UTF-8"}

needs_sfdisk = pytest.mark.skipif(
    shutil.which("sfdisk") is None, reason="sfdisk (Debian package fdisk) is missing"
)


def reader(image: bytes | bytearray) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 < length <= MIB
        return bytes(image[offset : offset + length])

    return read


def find(image: bytes | bytearray) -> tuple[Partition, ...]:
    return find_partitions(reader(image), len(image))


def run(*command: str | Path, answers: str = "") -> str:
    return subprocess.run(command, input=answers, env=UTF8, check=True, capture_output=True, text=True).stdout


def make(path: Path, script: str, size_bytes: int = 64 * MIB, sector_bytes: int = 512) -> bytearray:
    path.write_bytes(b"")
    os.truncate(path, size_bytes)
    if sector_bytes == 512:
        run("sfdisk", "--quiet", path, answers=script)
    else:  # sfdisk takes a file's sectors to be 512 bytes; its brother asks, and reads the same scripts
        path.with_suffix(".script").write_text(script, encoding="utf-8")
        run("fdisk", "-b", str(sector_bytes), path, answers=f"I\n{path.with_suffix('.script')}\nw\n")
    return bytearray(path.read_bytes())


def judge(path: Path, sector_bytes: int = 512) -> list[Partition]:
    """What util-linux reads from the disk, without extended partitions."""
    dump = path.with_suffix(".dump")
    if sector_bytes == 512:
        dump.write_text(run("sfdisk", "--dump", path), encoding="utf-8")
    else:
        run("fdisk", "-b", str(sector_bytes), path, answers=f"O\n{dump}\nq\n")
    row = re.compile(
        r"^.*-(\d+) : start= *(\d+), size= *(\d+), type=([^,\s]+)(?:.*name=\"(.*)\")?", re.MULTILINE
    )
    return [
        Partition(int(number), KINDS[kind], int(start) * sector_bytes, int(size) * sector_bytes, name)
        for number, start, size, kind, name in row.findall(dump.read_text(encoding="utf-8"))
        if kind not in ("5", "f")
    ]


@needs_sfdisk
@pytest.mark.parametrize(
    ("script", "sector_bytes", "count"),
    [(MBR, 512, 4), (LOGICAL, 512, 7), (GPT, 512, 7), (GPT, 4096, 7), ("label: gpt\n", 512, 0)],
)
def test_the_answer_is_that_of_sfdisk(tmp_path: Path, script: str, sector_bytes: int, count: int) -> None:
    image = make(tmp_path / "disk-", script, sector_bytes=sector_bytes)
    found = find(image)
    assert len(found) == count
    assert list(found) == judge(tmp_path / "disk-", sector_bytes)


@needs_sfdisk
def test_a_removed_partition_leaves_its_number_free(tmp_path: Path) -> None:
    path = tmp_path / "disk-"
    make(path, GPT)
    run("sfdisk", "--quiet", "--delete", path, "2", "5")
    found = find(path.read_bytes())
    assert [partition.number for partition in found] == [1, 3, 4, 6, 7]
    assert list(found) == judge(path)


@needs_sfdisk
@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("damage", ["header", "crc", "table", "place"])
def test_the_copy_at_the_end_stands_in(tmp_path: Path, sector_bytes: int, damage: str) -> None:
    image = make(tmp_path / "disk-", GPT, sector_bytes=sector_bytes)
    whole = find(image)
    at = sector_bytes + {"header": 0, "crc": 16, "table": sector_bytes + 40, "place": 24}[damage]
    image[at] ^= 0x40
    assert find(image) == whole
    image[-sector_bytes + 20] ^= 1  # reserved, but under the checksum
    assert find(image) == ()


@needs_sfdisk
def test_a_disk_that_grew_still_has_its_copy(tmp_path: Path) -> None:
    image = make(tmp_path / "disk-", GPT)
    whole = find(image)
    image.extend(bytes(MIB))
    assert find(image) == whole
    image[1024] ^= 1  # the first row: the header is right and says where the copy is
    assert find(image) == whole


@needs_sfdisk
def test_without_its_protective_entry_a_gpt_is_none(tmp_path: Path) -> None:
    image = make(tmp_path / "disk-", GPT)
    image[446 + 4] = 0
    assert find(image) == ()
    image[:512] = bytes(512)
    assert find(image) == ()


@needs_sfdisk
def test_what_does_not_fit_into_the_disk_is_left_out(tmp_path: Path) -> None:
    image = make(tmp_path / "disk-", MBR)
    assert [partition.number for partition in find(image[: 20 * MIB])] == [1, 2]
    logical = make(tmp_path / "disk-", LOGICAL)
    assert [partition.number for partition in find(logical[: 20 * MIB])] == [1, 5, 6]
    assert find(make(tmp_path / "disk-", GPT)[: 16 * MIB]) == find(make(tmp_path / "disk-", GPT))[:3]


@needs_sfdisk
@pytest.mark.parametrize(
    ("oem", "kind"), [(b"NTFS    ", "ntfs"), (b"EXFAT   ", "exfat"), (b"-FVE-FS-", "bitlocker")]
)
def test_what_windows_formatted_is_told_by_its_first_sector(tmp_path: Path, oem: bytes, kind: str) -> None:
    for script, number in ((LOGICAL, 8), (GPT, 6)):
        image = make(tmp_path / "disk-", script)
        at = next(partition.start_bytes for partition in find(image) if partition.number == number)
        image[at + 3 : at + 11] = oem
        assert {partition.number: partition.kind for partition in find(image)}[number] == kind


@pytest.mark.skipif(
    shutil.which("mkfs.vfat") is None, reason="mkfs.vfat (Debian package dosfstools) is missing"
)
def test_a_file_system_without_a_table_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "fat"
    subprocess.run(["mkfs.vfat", "-C", path, "16384"], check=True, capture_output=True)
    image = bytearray(path.read_bytes())
    assert image[510:512] == b"\x55\xaa"
    image[446:462] = struct.pack("<B3xB3xII", 0x80, 0x83, 1, 100)  # boot code that looks like an entry
    assert find(image) == ()


def entry(kind: int, start: int, sectors: int) -> bytes:
    return struct.pack("<B3xB3xII", 0, kind, start, sectors)


def sector(*entries: bytes) -> bytes:
    return bytes(446) + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


def test_a_chain_of_logical_partitions_that_bites_its_tail_ends() -> None:
    image = bytearray(MIB)
    image[:512] = sector(entry(0x0F, 8, 1000))
    image[8 * 512 : 9 * 512] = sector(entry(0x83, 1, 4), entry(0x05, 16, 100))
    image[24 * 512 : 25 * 512] = sector(entry(0x83, 1, 4), entry(0x05, 16, 100))
    assert [(p.number, p.start_bytes // 512) for p in find(image)] == [(5, 9), (6, 25)]


def test_an_endless_chain_of_logical_partitions_is_cut_off() -> None:
    reads = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        if not offset:
            return sector(entry(0x05, 1, 0xFFFFFFFF))
        return sector(entry(0x83, 1, 1), entry(0x05, offset // 512, 1))

    assert len(find_partitions(read, 1 << 62)) <= 256
    assert len(reads) <= 257


def header(**changes: int) -> bytes:
    fields = {
        "length": 92, "own": 1, "other": 100, "table": 2, "entries": 128, "entry_bytes": 128, "crc": 0, **changes
    }  # fmt: skip
    raw = bytearray(
        struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, fields["length"], 0, 0, fields["own"], fields["other"],
            34, 90, b"", fields["table"], fields["entries"], fields["entry_bytes"], fields["crc"],
        )
    )  # fmt: skip
    raw[16:20] = struct.pack("<I", zlib.crc32(raw[: fields["length"]].ljust(fields["length"], b"\0")))
    return bytes(raw).ljust(512, b"\0")


@pytest.mark.parametrize(
    "changes",
    [
        {"entries": 0xFFFFFFFF},
        {"entries": 0xFFFFFFFF, "entry_bytes": 0},
        {"entry_bytes": 0xFFFFFFFF},
        {"entry_bytes": 16},
        {"table": 2**64 - 1},
        {"table": 0},
        {"length": 0},
        {"other": 2**64 - 1},
        {"other": 0},
    ],
)
def test_headers_with_a_right_checksum_and_absurd_fields(changes: dict[str, int]) -> None:
    image = bytearray(200 * 512)
    image[:512] = sector(entry(0xEE, 1, 0xFFFFFFFF))
    image[512:1024] = header(**changes)
    assert find(image) == ()


def test_rows_with_absurd_places_are_left_out() -> None:
    table = bytearray(128 * 128)
    guid = bytes(range(1, 17))
    places = [
        (0, 50),
        (60, 50),
        (60, 59),
        (2**64 - 1, 2**64 - 1),
        (0, 2**64 - 1),
        (50, 199),
        (50, 200),
        (50, 50),
    ]
    for index, place in enumerate(places):
        table[index * 128 : index * 128 + 48] = guid + bytes(16) + struct.pack("<QQ", *place)
    table[7 * 128 + 56 : 7 * 128 + 62] = "a\nb".encode("utf-16-le")
    table[5 * 128 + 56 : 5 * 128 + 58] = b"\x00\xd8"  # half a surrogate pair
    image = bytearray(200 * 512)
    image[:512] = sector(entry(0xEE, 1, 0xFFFFFFFF))
    image[512:1024] = header(crc=zlib.crc32(table))
    image[1024 : 1024 + len(table)] = table
    assert [(p.number, p.size_bytes, p.name) for p in find(image)] == [
        (6, 150 * 512, "\ufffd"),
        (8, 512, "a\ufffdb"),
    ]


def test_disks_too_small_for_a_table() -> None:
    for size in (0, 1, 511, 512, 1023):
        assert find((sector(entry(0xEE, 1, 1), entry(0x83, 1, 1)) + bytes(600))[:size]) == ()


def test_an_unreadable_place_is_the_callers_business() -> None:
    def read(offset: int, length: int) -> bytes:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        find_partitions(read, MIB)


rows = st.builds(
    entry,
    st.sampled_from([0, 0x05, 0x0F, 0x07, 0x83, 0xEE]) | st.integers(0, 255),
    st.integers(0, 300) | st.integers(0, 2**32 - 1),
    st.integers(0, 300) | st.integers(0, 2**32 - 1),
)
sectors = (
    st.lists(rows, max_size=4).map(lambda some: sector(*some))
    | st.builds(
        header, own=st.sampled_from([0, 1, 255]), other=st.integers(0, 300), table=st.integers(0, 300),
        entries=st.integers(0, 200), entry_bytes=st.sampled_from([0, 1, 127, 128, 256]), length=st.integers(0, 600),
    )
    | st.binary(min_size=512, max_size=512)
    | st.just(bytes(512))
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(disk=st.dictionaries(st.integers(0, 255), sectors, max_size=12), first=sectors)
def test_garbage_never_raises_and_what_is_found_lies_inside(disk: dict[int, bytes], first: bytes) -> None:
    image = bytearray(256 * 512)
    for at, content in {**disk, 0: first}.items():
        image[at * 512 : at * 512 + 512] = content
    found = find(image)
    assert len(found) <= 520
    assert [p.number for p in found] == sorted({p.number for p in found})
    for partition in found:
        assert partition.start_bytes > 0
        assert partition.size_bytes > 0
        assert partition.start_bytes + partition.size_bytes <= len(image)
        assert partition.kind.replace("-", "").isalnum()
        assert partition.kind.isascii()
        assert partition.name.isprintable()


@needs_sfdisk
@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 64 * 512 - 1), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes_never_raise(tables: list[bytes], flips: list[tuple[int, int]]) -> None:
    for table in tables:
        first, last = bytearray(table[: 64 * 512]), bytearray(table[-64 * 512 :])
        for at, value in flips:
            first[at] ^= value
            last[-1 - at] ^= value

        def read(offset: int, length: int, first: bytes = first, last: bytes = last) -> bytes:
            tail = offset - TABLE_DISK_BYTES + len(last)
            return bytes(last[tail : tail + length] if tail >= 0 else first[offset : offset + length])

        for partition in find_partitions(read, TABLE_DISK_BYTES):
            end = partition.start_bytes + partition.size_bytes
            assert 0 < partition.start_bytes < end <= TABLE_DISK_BYTES


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("tables")
    small = {
        MBR: "label: dos\n, 1M, 83\n, 1M, 7\n",
        LOGICAL: "label: dos\n, , E\n, 64, 83\n, 64, 7\n, , 82\n",
    }
    small[GPT] = 'label: gpt\nsize=1M, type=L, name="x"\ntype=S\n'
    return [bytes(make(folder / "disk-", script, TABLE_DISK_BYTES)) for script in small.values()]
