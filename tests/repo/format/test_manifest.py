"""Manifests and marks: round trips, frozen bytes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.disk import DiskGeometry, DiskInfo, FileInfo
from holdfast.errors import DamagedData, HoldfastError, UnsupportedFormat
from holdfast.ids import HOLE_ID, NodeId, PointId, RecordId, SessionId
from holdfast.repo.format import canonical
from holdfast.repo.format import manifest as m
from holdfast.repo.format.canonical import Json
from holdfast.repo.format.manifest import ContentTree, Manifest, PointDisk, PointFile, PointStatistics
from holdfast.repo.format.mark import Mark, decode_mark, encode_mark

Survives = Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]

SEGMENT = 16 << 20
ROOT = NodeId(RecordId(bytes(range(32))))
DISK = DiskInfo(
    "web.vmdk", 40 << 30, "vmdk", "web-flat.vmdk", "# Disk DescriptorFile\n", "vmfs", "scsi0:0", "60" * 16, "lsilogic",
    DiskGeometry(5221, 255, 63),
)  # fmt: skip
MANIFEST = Manifest(
    session=SessionId(bytes(range(16))),
    kind="vm",
    vm_uuid="564d" * 8,
    vm_name='wéb "1"\n',
    host="backup1",
    origin="/vms/web",
    time=1_700_000_000,
    received_ms=1_700_000_060_000,
    segment_bytes=SEGMENT,
    chunker="aligned",
    chunk_size_bytes=65536,
    disks=(
        PointDisk(DISK, ContentTree(40 << 30, ROOT, SEGMENT), "audited", "52 9a/2"),
        PointDisk(DiskInfo("data.raw", 512, "raw"), ContentTree(512, HOLE_ID, SEGMENT)),
    ),
    files=(PointFile(FileInfo("logs/vmware.log", 7, -1, 0o4755), ContentTree(7, ROOT, SEGMENT)),),
    folders=("empty", "empty/too"),
    labels=(("a", ""), ("site", "Nürnberg")),
    warnings=("a symbolic link was left out",),
    parent="ab" * 32,
    tool="holdfast 0.1.0",
    statistics=PointStatistics(1, 2, 3, 4, 5, 6),
    partial=True,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
sizes = st.integers(0, 2**62)
digests = st.binary(min_size=32, max_size=32)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    segment = 1 << draw(st.integers(20, 30))

    def tree() -> ContentTree:
        return ContentTree(draw(sizes), NodeId(RecordId(draw(digests))), segment)

    def disk() -> PointDisk:
        content = tree()
        geometry = draw(st.none() | st.builds(DiskGeometry, sizes, sizes, sizes))
        info = DiskInfo(
            draw(texts),
            content.size_bytes,
            draw(st.sampled_from(["raw", "vmdk"])),
            *(draw(texts) for _ in range(6)),
            geometry,
        )
        return PointDisk(
            info, content, draw(st.sampled_from(["full", "hash", "cbt", "audited"])), draw(texts)
        )

    def file() -> PointFile:
        content = tree()
        mtime_ns = draw(st.integers(-(2**62), 2**62))
        return PointFile(
            FileInfo(draw(texts), content.size_bytes, mtime_ns, draw(st.integers(0, 0o7777))), content
        )

    return Manifest(
        session=SessionId(draw(st.binary(min_size=16, max_size=16))),
        kind=draw(st.sampled_from(["vm", "disk"])),
        vm_uuid=draw(st.binary(min_size=16, max_size=16)).hex(),
        vm_name=draw(texts),
        host=draw(texts),
        origin=draw(texts),
        time=draw(sizes),
        received_ms=draw(sizes),
        segment_bytes=segment,
        chunker=draw(texts),
        chunk_size_bytes=draw(st.integers(1, 2**62)),
        disks=tuple(disk() for _ in range(draw(st.integers(0, 2)))),
        files=tuple(file() for _ in range(draw(st.integers(0, 2)))),
        folders=tuple(draw(st.lists(texts, max_size=2))),
        labels=tuple(sorted(draw(st.dictionaries(texts, texts, max_size=2)).items())),
        warnings=tuple(draw(st.lists(texts, max_size=2))),
        parent=draw(texts),
        tool=draw(texts),
        statistics=PointStatistics(*(draw(sizes) for _ in range(6))),
        partial=draw(st.booleans()),
    )


@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    data = m.encode_manifest(manifest)
    assert m.decode_manifest(data) == manifest
    assert canonical.encode(canonical.decode(data)) == data


def test_frozen_manifest() -> None:
    data = m.encode_manifest(MANIFEST)
    assert m.decode_manifest(data) == MANIFEST
    assert (len(data), blake3.blake3(data).hexdigest()) == (
        1477,
        "fcce9a6c8c84ac9312c257d2650807a839862ec9b55a86b3e8514da3143532f0",
    )
    assert data.startswith(
        b'{"chunker":{"chunk_size_bytes":65536,"name":"aligned"},"disks":[{"adapter":"lsilogic",'
    )
    assert data.endswith(
        '"vm":{"name":"wéb \\"1\\"\\n","uuid":"564d564d564d564d564d564d564d564d"},"warnings":["a symbolic link was left out"]}'.encode()
    )


def members() -> dict[str, Json]:
    value = canonical.decode(m.encode_manifest(MANIFEST))
    assert isinstance(value, dict)
    return value


def changed(path: str, value: Json) -> bytes:
    """The sample with one member replaced; `path` such as `disks.0.root`."""
    top = members()
    *parents, last = path.split(".")
    inner: Json = top
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]  # type: ignore[index, call-overload]
    assert isinstance(inner, dict)
    inner[last] = value
    return canonical.encode(top)


def test_members_of_later_versions_are_ignored() -> None:
    top = members()
    top["later"] = {"a": [1]}
    assert m.decode_manifest(canonical.encode(top)) == MANIFEST
    assert m.decode_manifest(changed("disks.0.later", 1)) == MANIFEST


@pytest.mark.parametrize("name", sorted(members()))
def test_every_member_is_needed(name: str) -> None:
    top = members()
    del top[name]
    with pytest.raises(DamagedData, match="lacks"):
        m.decode_manifest(canonical.encode(top))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("type", "mark"), ("session", "00" * 15), ("session", "00" * 17), ("session", "AB" * 16), ("vm.uuid", "x"), ("vm", []),
        ("time", -1), ("time", "1"), ("received_ms", None), ("partial", 1), ("labels", {"a": 1}), ("labels", []),
        ("warnings", [1]), ("folders", "a"), ("disks", {}), ("disks", [1]), ("disks.0.root", "00" * 31),
        ("disks.0.size_bytes", -1), ("disks.0.size_bytes", 2**62 + 1), ("disks.0.geometry", 1), ("disks.0.geometry", {}),
        ("files.0.mode", 0o10000), ("files.0.mode", -1), ("files.0.mtime_ns", -(2**62) - 1), ("files.0.name", None),
        ("segment_bytes", 0), ("segment_bytes", (1 << 20) - 1), ("segment_bytes", 3 << 20), ("segment_bytes", 1 << 31),
        ("chunker", "aligned"), ("chunker.chunk_size_bytes", 0), ("statistics.bytes_new", -1), ("version", "1"),
    ],
)  # fmt: skip
def test_members_of_wrong_type_or_value_are_damaged(path: str, value: Json) -> None:
    with pytest.raises(DamagedData):
        m.decode_manifest(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", 2),
        ("version", 0),
        ("kind", "container"),
        ("disks.0.format", "qcow2"),
        ("disks.1.read", "guess"),
    ],
)
def test_what_only_a_later_version_knows_is_unsupported(path: str, value: Json) -> None:
    with pytest.raises(UnsupportedFormat):
        m.decode_manifest(changed(path, value))


def test_a_manifest_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(DamagedData, match="longer than any"):
        m.decode_manifest(b"[" * (m.MAX_MANIFEST_BYTES + 1))
    data = changed("host", "")
    padded = changed("host", "h" * (m.MAX_MANIFEST_BYTES - len(data)))
    assert len(padded) == m.MAX_MANIFEST_BYTES
    assert m.decode_manifest(padded).host.startswith("h")


def test_other_encodings_of_the_same_value_are_refused() -> None:
    data = m.encode_manifest(MANIFEST)
    for other in (
        data + b"\n",
        b" " + data,
        data.replace(b'":', b'": ', 1),
        data.replace("é".encode(), b"\\u00e9"),
    ):
        with pytest.raises(DamagedData):
            m.decode_manifest(other)


@given(st.data())
def test_fuzz(survives: Survives, data: st.DataObject) -> None:
    text = bytearray(m.encode_manifest(MANIFEST))
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    mutated = bytes(text[: data.draw(st.integers(len(text) - 200, len(text)))])
    for hostile in (bytes(text), mutated, data.draw(st.binary(max_size=50))):
        survives(lambda hostile=hostile: m.decode_manifest(hostile), (DamagedData, UnsupportedFormat))  # type: ignore[misc]


values: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts | st.just("00" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["disks", "files", "disks.0.root", "disks.0.geometry", *sorted(members())]), values)
def test_fuzz_of_members(survives: Survives, path: str, value: Json) -> None:
    survives(lambda: m.decode_manifest(changed(path, value)), (DamagedData, UnsupportedFormat))


# --- marks

MARK = Mark(
    "forget", PointId(RecordId(bytes(range(32)))), SessionId(bytes(range(16))), 1_700_000_000_123_456_789
)


@given(
    st.builds(
        Mark,
        st.sampled_from(["forget", "recall", "pin", "unpin", "collect"]),
        digests.map(RecordId).map(PointId),
        st.binary(min_size=16, max_size=16).map(SessionId),
        sizes,
    )
)
def test_mark_round_trip(mark: Mark) -> None:
    assert decode_mark(encode_mark(mark)) == mark


def test_frozen_mark() -> None:
    assert encode_mark(MARK).decode() == (
        '{"action":"forget","point":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",'
        '"session":"000102030405060708090a0b0c0d0e0f","time_ns":1700000000123456789,"type":"mark","version":1}'
    )


@pytest.mark.parametrize(
    ("member", "value", "error"),
    [
        ("type", "restore-point", DamagedData), ("version", 2, UnsupportedFormat), ("action", "bless", UnsupportedFormat),
        ("point", "00", DamagedData), ("session", 1, DamagedData), ("action", None, DamagedData),
    ],
)  # fmt: skip
def test_malformed_marks(member: str, value: Json, error: type[HoldfastError]) -> None:
    mark = canonical.decode(encode_mark(MARK))
    assert isinstance(mark, dict)
    with pytest.raises(error):
        decode_mark(canonical.encode({**mark, member: value}))
    assert decode_mark(canonical.encode({**mark, "later": 1})) == MARK
    del mark[member]
    with pytest.raises(DamagedData):
        decode_mark(canonical.encode(mark))


@given(st.binary(max_size=60), values)
def test_fuzz_mark(survives: Survives, data: bytes, value: Json) -> None:
    for hostile in (data, canonical.encode(value)):
        survives(lambda hostile=hostile: decode_mark(hostile), (DamagedData, UnsupportedFormat))  # type: ignore[misc]


def test_changing_one_thing_changes_the_bytes() -> None:
    assert m.encode_manifest(replace(MANIFEST, session=SessionId(bytes(16)))) != m.encode_manifest(MANIFEST)
