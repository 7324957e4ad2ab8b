"""`rescue.py` gets everything out that is there, says what is not, and needs nothing of Holdfast.

It runs as people run it, in a process of its own, in which Holdfast and what only Holdfast needs can not be imported.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import blake3
import pytest
import xxhash

ROOT = Path(__file__).parent.parent.parent
RESCUE = ROOT / "rescue.py"
GOLDEN = ROOT / "tests" / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
NAMES = sorted(EXPECTED)
CLEAR, ENCRYPTED = "v1-clear-aligned", "v1-aes256-gcm"

# Runs a script with these modules out of reach; argv: names, script, its arguments.
WITHOUT = """
import runpy, sys
blocked = set(sys.argv[1].split())
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocker())
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FOREIGN = "holdfast lmdb numpy xxhash click rich"

Run = Callable[..., subprocess.CompletedProcess[str]]


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rescue", RESCUE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def rescue(
    *args: str | Path, password: str | None = None, without: str = FOREIGN, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST")}
    environment |= {"HOLDFAST_PASSWORD": password} if password else {}
    return subprocess.run(
        [sys.executable, "-I", "-X", "utf8", "-c", WITHOUT, without, str(RESCUE), *map(str, args)],
        cwd="/",
        env=environment | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All golden repositories. Not to be written to."""
    folder = tmp_path_factory.mktemp("golden")
    for name in NAMES:
        with tarfile.open(GOLDEN / f"{name}.tar.xz") as tar:
            tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the repository that is not encrypted."""
    return Path(shutil.copytree(pristine / CLEAR, tmp_path / "repository"))


def password_of(name: str) -> str | None:
    return EXPECTED[name]["passwords"][0] if EXPECTED[name]["passwords"] else None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_as(dest: Path, wanted: dict[str, Any]) -> None:
    """All of the point, and nothing else, is in the folder."""
    names = set()
    for disk in wanted["disks"]:
        flat = disk["name"].replace(".vmdk", "-flat.vmdk")
        names |= {disk["name"], flat}
        assert sha256(dest / disk["name"]) == disk["descriptor_sha256"]
        # a flat file has whole sectors; so have the golden disks
        assert (dest / flat).stat().st_size == disk["size_bytes"]
        assert sha256(dest / flat) == disk["sha256"]
    for entry in wanted["files"]:
        names.add(entry["name"])
        status = (dest / entry["name"]).stat()
        assert sha256(dest / entry["name"]) == entry["sha256"]
        assert (status.st_mode & 0o777, status.st_mtime_ns) == (entry["mode"] & 0o777, entry["mtime_ns"])
    assert {str(path.relative_to(dest)) for path in dest.rglob("*") if path.is_file()} == names
    assert all((dest / folder).is_dir() for folder in wanted["folders"])


# --- a parser of packs for the tests' own use


@dataclass(frozen=True)
class Found:
    path: Path
    offset: int
    kind: int
    stored: int
    id: bytes

    @property
    def payload_at(self) -> int:
        return self.offset + 72


def packs(place: Path) -> list[Path]:
    return sorted(place.glob("packs/*/*.pack"))


def seed_of(path: Path) -> int:
    return int.from_bytes(bytes.fromhex(path.stem)[:8], "little")


def is_sealed(path: Path) -> bool:
    return path.read_bytes()[-32:-24] == b"HOLDSEAL"


def records(path: Path) -> Iterator[Found]:
    data, at = path.read_bytes(), 64
    while data[at : at + 4] == b"\xf7HFr":
        stored = int.from_bytes(data[at + 8 : at + 12], "little")
        yield Found(path, at, data[at + 4], stored, data[at + 16 : at + 48])
        at += 72 + stored


def sealed_and_open(place: Path) -> tuple[Path, Path]:
    sealed = [path for path in packs(place) if is_sealed(path)]
    (other,) = [path for path in packs(place) if not is_sealed(path)]
    return sealed[0], other


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def record(path: Path, kind: int, plaintext: bytes, record_id: bytes | None = None) -> bytes:
    """A raw record, for the pack of this path."""
    contexts = {2: "clear node id", 3: "clear manifest id", 4: "clear mark id"}
    if record_id is None and kind == 1:
        record_id = blake3.blake3(plaintext).digest()
    elif record_id is None:
        context = "holdfast 2026-11-22 v1 " + contexts[kind]
        record_id = blake3.blake3(plaintext, derive_key_context=context).digest()
    head = struct.pack("<4sBBHII32s", b"\xf7HFr", kind, 0, 0, len(plaintext), len(plaintext), record_id)
    head += blake3.blake3(plaintext).digest()[:16]
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head, seed_of(path))) + plaintext


def new_pack(like: Path, number: int, *contents: tuple[int, bytes]) -> Path:
    """One more pack of the same repository, with these records."""
    pack_id = bytes([number]) * 16
    path = like.parent.parent / pack_id.hex()[:2] / f"{pack_id.hex()}.pack"
    path.parent.mkdir(exist_ok=True)
    head = b"HOLDPACK" + struct.pack("<HHI", 1, 64, 0) + pack_id + like.read_bytes()[32:48] + bytes(8)
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    path.write_bytes(head + b"".join(record(path, kind, plaintext) for kind, plaintext in contents))
    return path


def chunk_of_disk(place: Path) -> Found:
    """A chunk of the sealed pack; the first point needs it."""
    sealed, _ = sealed_and_open(place)
    return next(found for found in records(sealed) if found.kind == 1)


def contents(place: Path, ids: list[bytes], kind: int) -> list[bytes]:
    """Plaintexts, as rescue.py reads them."""
    loaded = module()
    with contextlib.closing(loaded.Store(str(place / "packs"), loaded.Keys(None, None), None)) as store:
        return [store.load(record_id, kind) for record_id in ids]


def manifest_of(place: Path) -> dict[str, Any]:
    """Of some restore point."""
    some = next(found for path in packs(place) for found in records(path) if found.kind == 3)
    return json.loads(contents(place, [some.id], 3)[0])


# --- what is intact


@pytest.mark.parametrize("name", NAMES)
def test_restores_every_golden_point(name: str, pristine: Path, tmp_path: Path) -> None:
    for number, wanted in enumerate(EXPECTED[name]["points"]):
        dest = tmp_path / str(number)
        outcome = rescue(pristine / name, "--restore", wanted["id"][:12], dest, password=password_of(name))
        assert (outcome.returncode, outcome.stderr) == (0, "")
        assert "every byte verified" in outcome.stdout
        same_as(dest, wanted)
        (flat,) = dest.glob("gold_1-flat.vmdk")
        assert flat.stat().st_blocks * 512 < 1 << 20  # 257 MiB, nearly all of them holes


@pytest.mark.parametrize("name", NAMES)
def test_lists_points_as_marks_say(name: str, pristine: Path) -> None:
    outcome = rescue(pristine / name / "packs", "--list", password=password_of(name))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()[1:]
    assert [line[:12] for line in lines] == [point["id"][:12] for point in EXPECTED[name]["points"]]
    assert "pinned" in lines[0]
    assert "pinned" not in lines[1]
    assert "göld 1" in lines[0]
    assert "day=0 größe=klein" in lines[0]
    everything = rescue(pristine / name, "--list", "--all", password=password_of(name)).stdout.splitlines()
    assert [("collected" in line) for line in everything[1:]] == [False, False, True]


@pytest.mark.parametrize("password", EXPECTED[ENCRYPTED]["passwords"])
def test_every_password_opens_it(password: str, pristine: Path, tmp_path: Path) -> None:
    assert rescue(pristine / ENCRYPTED, "--list", password=password).returncode == 0
    file = tmp_path / "password"
    file.write_text(f"{password}\nsecond line\n", encoding="utf-8")
    outcome = rescue(pristine / ENCRYPTED, "--list", env={"HOLDFAST_PASSWORD_FILE": str(file)})
    assert outcome.returncode == 0


def test_says_what_an_encrypted_repository_needs(pristine: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(pristine / ENCRYPTED, tmp_path / "repository"))
    wrong = rescue(place, "--list", password="wrong")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "the password opens nothing" in wrong.stderr
    none = rescue(place, "--list")
    assert none.returncode == 1
    assert "HOLDFAST_PASSWORD" in none.stderr
    without = rescue(place, "--list", password=password_of(ENCRYPTED), without=f"{FOREIGN} cryptography")
    assert without.returncode == 1
    assert "pip install cryptography" in without.stderr
    elsewhere = shutil.move(place / "config.json", tmp_path / "elsewhere")
    assert rescue(place, "--list", password=password_of(ENCRYPTED)).returncode == 0  # the copy
    (place / "config.json.copy").unlink()
    lost = rescue(place, "--list", password=password_of(ENCRYPTED))
    assert lost.returncode == 1
    assert "--config" in lost.stderr
    found = rescue(place / "packs", "--list", "--config", elsewhere, password=password_of(ENCRYPTED))
    assert found.returncode == 0


def test_takes_an_exported_master_key(pristine: Path, tmp_path: Path) -> None:
    from holdfast.repo.repository import Repository

    with Repository.open(str(pristine / ENCRYPTED), password=password_of(ENCRYPTED)) as repository:
        key = repository.export_key()
    file = tmp_path / "key"
    file.write_text(f"# a comment\n{key.hex()}\n", encoding="utf-8")
    outcome = rescue(pristine / ENCRYPTED, "--list", "--key", file)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_needs_no_configuration_if_nothing_is_encrypted(place: Path, tmp_path: Path) -> None:
    for name in ("config.json", "config.json.copy"):
        (place / name).unlink()
    outcome = rescue(place, "--restore", "göld 1@latest", tmp_path / "dest")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])


def test_packs_may_lie_in_any_folder(place: Path, tmp_path: Path) -> None:
    heap = tmp_path / "heap"
    heap.mkdir()
    for path in packs(place):
        shutil.move(path, heap)
    outcome = rescue(heap, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 0
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])


@pytest.mark.parametrize(
    ("text", "number"),
    [("göld 1", 1), ("göld 1@latest", 1), ("göld 1@latest~1", 0), ("göld 1@latest~2", None), ("other", None)],
)
def test_points_have_names(text: str, number: int | None, pristine: Path, tmp_path: Path) -> None:
    outcome = rescue(pristine / CLEAR, "--restore", text, tmp_path / "dest")
    assert outcome.returncode == (1 if number is None else 0)
    if number is None:
        assert not (tmp_path / "dest").exists()
    else:
        assert EXPECTED[CLEAR]["points"][number]["id"][:12] in outcome.stdout


def test_a_collected_point_is_restored_on_demand_only(pristine: Path, tmp_path: Path) -> None:
    listing = rescue(pristine / CLEAR, "--list", "--all").stdout
    (line,) = [line for line in listing.splitlines() if "collected" in line]
    assert rescue(pristine / CLEAR, "--restore", line[:12], tmp_path / "a").returncode == 1
    assert rescue(pristine / CLEAR, "--restore", line[:12], tmp_path / "b", "--all").returncode == 0


def test_a_forgotten_point_is_shown_as_such(place: Path) -> None:
    point = EXPECTED[CLEAR]["points"][1]["id"]
    mark = {
        "action": "forget",
        "point": point,
        "session": "00" * 16,
        "time_ns": 1_900_000_000_000_000_000,
        "type": "mark",
        "version": 1,
    }
    new_pack(packs(place)[0], 7, (4, json.dumps(mark, separators=(",", ":")).encode()))
    lines = rescue(place, "--list").stdout.splitlines()
    assert [("forgotten" in line) for line in lines] == [False, False, True]


def test_does_not_overwrite(pristine: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "gold.vmx").write_text("precious")
    outcome = rescue(pristine / CLEAR, "--restore", "göld 1", dest)
    assert outcome.returncode == 1
    assert "exists already" in outcome.stderr
    assert [path.name for path in dest.iterdir()] == ["gold.vmx"]
    assert (dest / "gold.vmx").read_text() == "precious"
    assert rescue(pristine / CLEAR, "--restore", "göld 1", dest, "--force").returncode == 0
    same_as(dest, EXPECTED[CLEAR]["points"][1])


@pytest.mark.parametrize(
    "args", [[], ["--list"], ["x"], ["x", "--restore", "y"], ["x", "--list", "--nonsense"]]
)
def test_wrong_usage(args: list[str]) -> None:
    assert rescue(*args).returncode == 2


def test_a_folder_without_packs(tmp_path: Path) -> None:
    assert rescue(tmp_path, "--list").returncode == 1
    assert rescue(tmp_path / "absent", "--list").returncode == 1


# --- what is damaged


def test_a_torn_tail_costs_nothing(place: Path, tmp_path: Path) -> None:
    _, unsealed = sealed_and_open(place)
    whole = record(unsealed, 1, os.urandom(5000))
    with unsealed.open("ab") as file:
        file.write(whole[:3000])
    outcome = rescue(place, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 0
    assert "no whole record" in outcome.stderr
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])
    assert rescue(place, "--list").returncode == 0


@pytest.mark.parametrize("bytes_lost", [1, 32, 33, 500])
def test_a_lost_footer_or_table_costs_nothing(bytes_lost: int, place: Path, tmp_path: Path) -> None:
    for path in packs(place):
        if is_sealed(path):
            os.truncate(path, path.stat().st_size - bytes_lost)
    outcome = rescue(place, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 0
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])


def test_a_damaged_table_costs_nothing(place: Path, tmp_path: Path) -> None:
    for path in packs(place):
        if is_sealed(path):
            table = list(records(path))[-1]
            overwrite(path, table.payload_at + 40, b"damaged")
    outcome = rescue(place, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 0
    assert "the table is damaged" in outcome.stderr
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])


def test_damaged_record_headers_cost_nothing_where_the_table_is_intact(place: Path, tmp_path: Path) -> None:
    sealed, _ = sealed_and_open(place)
    for found in list(records(sealed))[:-1]:
        overwrite(sealed, found.offset, bytes(72))
    outcome = rescue(place, "--restore", EXPECTED[CLEAR]["points"][0]["id"], tmp_path / "dest")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][0])


def test_a_damaged_pack_header_costs_nothing(place: Path, tmp_path: Path) -> None:
    for path in packs(place):
        overwrite(path, 0, bytes(64))
    outcome = rescue(place, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 0
    assert "its name has to do" in outcome.stderr
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])


def test_behind_damage_records_are_found_again(place: Path, tmp_path: Path) -> None:
    """Without a table, a header that is gone costs its own record and no other."""
    sealed, _ = sealed_and_open(place)
    os.truncate(sealed, sealed.stat().st_size - 40)
    lost = [found for found in records(sealed) if found.kind == 1][3]
    overwrite(sealed, lost.offset + 20, b"damaged")
    listing = rescue(place, "--list")
    assert listing.returncode == 100
    assert f"no whole record in bytes {lost.offset} to {lost.payload_at + lost.stored}" in listing.stderr
    assert len(listing.stdout.splitlines()) == 3
    outcome = rescue(place, "--restore", EXPECTED[CLEAR]["points"][0]["id"], tmp_path / "dest")
    assert outcome.returncode == 100
    assert outcome.stderr.count("damaged:") == 1
    assert f"chunk {lost.id.hex()[:12]} is in no pack" in outcome.stderr


def damaged_ranges(stderr: str) -> list[tuple[str, int, int]]:
    lines = re.findall(r"^rescue: damaged: (.*), bytes (\d+) to (\d+) \(", stderr, re.MULTILINE)
    return [(Path(name).name, int(start), int(end)) for name, start, end in lines]


def test_a_damaged_chunk_is_left_as_a_hole(place: Path, pristine: Path, tmp_path: Path) -> None:
    point = EXPECTED[CLEAR]["points"][0]
    assert rescue(pristine / CLEAR, "--restore", point["id"], tmp_path / "whole").returncode == 0
    lost = chunk_of_disk(place)
    overwrite(lost.path, lost.payload_at + lost.stored // 2, b"damaged")
    outcome = rescue(place, "--restore", point["id"], tmp_path / "dest")
    assert outcome.returncode == 100
    ranges = damaged_ranges(outcome.stderr)
    assert ranges
    assert f"damaged at byte {lost.offset} of pack {lost.path.stem}" in outcome.stderr
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            wanted = bytearray(path.read_bytes())
            for _, start, end in [r for r in ranges if r[0] == path.name]:
                assert any(wanted[start:end])
                wanted[start:end] = bytes(end - start)
            assert (tmp_path / "dest" / path.relative_to(tmp_path / "whole")).read_bytes() == wanted


def test_a_second_copy_is_used(place: Path, tmp_path: Path) -> None:
    """Whichever of the two is damaged, and whatever a table says of it."""
    lost = chunk_of_disk(place)
    (content,) = contents(place, [lost.id], 1)
    overwrite(lost.path, lost.payload_at + lost.stored // 2, b"damaged")
    for number in (0x00, 0xFF):  # found before and after the damaged one
        extra = new_pack(lost.path, number, (1, content))
        dest = tmp_path / str(number)
        outcome = rescue(place, "--restore", EXPECTED[CLEAR]["points"][0]["id"], dest)
        assert (outcome.returncode, outcome.stderr) == (0, "")
        same_as(dest, EXPECTED[CLEAR]["points"][0])
        extra.unlink()


def test_space_that_was_given_back_is_no_damage(place: Path, tmp_path: Path) -> None:
    """Its table still names the records; they are elsewhere now."""
    sealed, _ = sealed_and_open(place)
    gone = [found for found in records(sealed) if found.kind in (1, 2)][2:30]
    assert gone[-1].offset - gone[0].offset > 8192
    plain = [(found.kind, contents(place, [found.id], found.kind)[0]) for found in gone]
    new_pack(sealed, 0xFF, *plain)
    overwrite(sealed, gone[0].offset, bytes(gone[-1].payload_at + gone[-1].stored - gone[0].offset))
    for number, cut_bytes in enumerate((0, 40)):  # by the table, then record by record
        os.truncate(sealed, sealed.stat().st_size - cut_bytes)
        dest = tmp_path / str(number)
        outcome = rescue(place, "--restore", EXPECTED[CLEAR]["points"][0]["id"], dest)
        assert outcome.returncode == 0
        assert outcome.stderr.count("no whole record") == (number and 1)  # what is left of the table
        same_as(dest, EXPECTED[CLEAR]["points"][0])
    assert rescue(place, "--list").returncode == 0


def test_holed_packs_are_no_damage(place: Path, tmp_path: Path) -> None:
    """As a collection leaves them: no table, and of runs of dead records the block-aligned insides gone."""
    sealed, _ = sealed_and_open(place)
    table = list(records(sealed))[-1]
    os.truncate(sealed, table.offset)
    for run in range(40):  # what is dead begins and ends anywhere in its blocks
        with sealed.open("ab") as file:
            for number in range(3):
                file.write(
                    record(sealed, 1, hashlib.shake_128(bytes([run, number])).digest(3000 + 137 * run))
                )
            file.write(record(sealed, 1, b"alive" * run))
    dead = [found for found in records(sealed) if found.offset >= table.offset]
    for first, last in zip(dead[0::4], dead[2::4], strict=True):
        start = -(-first.offset // 4096) * 4096
        end = (last.payload_at + last.stored) // 4096 * 4096
        overwrite(sealed, start, bytes(end - start))
    listing = rescue(place, "--list")
    assert (listing.returncode, listing.stderr) == (0, "")
    outcome = rescue(place, "--restore", EXPECTED[CLEAR]["points"][0]["id"], tmp_path / "dest")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][0])


@pytest.mark.parametrize("sealed", [True, False])
def test_a_bad_sector_costs_what_is_in_it(
    sealed: bool,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, _ = sealed_and_open(place)
    if not sealed:
        os.truncate(bad, bad.stat().st_size - 32)
    (lost,) = [
        found for found in records(bad) if found.offset <= 5 * 4096 + 100 < found.payload_at + found.stored
    ]
    assert lost.kind == 1

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            if str(self.name) == str(bad) and self.tell() < 6 * 4096 and self.tell() + size > 5 * 4096:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    loaded = module()
    monkeypatch.setattr(loaded, "open", lambda path, *_, buffering: Failing(path), raising=False)
    with contextlib.closing(loaded.Store(str(place / "packs"), loaded.Keys(None, None), None)) as store:
        with pytest.raises(loaded.Damage, match=r"damaged at byte|in no pack"):
            store.load(lost.id, 1)
        assert store.incomplete
        for found in records(bad):
            end = found.payload_at + found.stored
            if found.kind in (1, 2) and (end <= 5 * 4096 or found.offset >= 6 * 4096):
                assert store.load(found.id, found.kind)
    assert capsys.readouterr().err.count("bytes 20480 to 24576 can not be read") == 1


def test_a_lost_pack_ends_nothing(place: Path, tmp_path: Path) -> None:
    sealed, _ = sealed_and_open(place)
    sealed.unlink()
    outcome = rescue(place, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 100
    assert damaged_ranges(outcome.stderr)
    assert (tmp_path / "dest" / "gold_1-flat.vmdk").stat().st_size == EXPECTED[CLEAR]["points"][1]["disks"][
        1
    ]["size_bytes"]


def test_a_damaged_manifest_is_reported(place: Path) -> None:
    (lost, *_) = [found for path in packs(place) for found in records(path) if found.kind == 3]
    overwrite(lost.path, lost.payload_at + 5, b"damaged")
    outcome = rescue(place, "--list", "--all")
    assert outcome.returncode == 100
    assert f"restore point {lost.id.hex()[:12]} can not be read" in outcome.stderr
    assert len(outcome.stdout.splitlines()) == 3


def test_foreign_files_are_passed_over(place: Path, pristine: Path, tmp_path: Path) -> None:
    folder = packs(place)[0].parent
    (folder / "notes.txt").write_text("not a pack")
    (folder / ("ab" * 16 + ".pack.tmp")).write_bytes(bytes(1000))
    (folder / ("cd" * 16 + ".pack")).write_bytes(b"HOLDPACK")  # shorter than its header
    other = next((pristine / "v1-clear-fixed" / "packs").glob("*/*.pack"))
    shutil.copy(other, folder)
    renamed = folder / ("ef" * 16 + ".pack")
    shutil.copy(packs(place)[0], renamed)
    outcome = rescue(place, "--restore", "göld 1", tmp_path / "dest")
    assert outcome.returncode == 0
    assert f"{other.name} is passed over: it belongs to repository" in outcome.stderr
    assert f"{renamed.name} is passed over" in outcome.stderr
    same_as(tmp_path / "dest", EXPECTED[CLEAR]["points"][1])


def test_what_a_guest_stores_is_no_record(place: Path) -> None:
    """A chunk that holds a whole pack, manifests included, and whose own header is lost."""
    _, unsealed = sealed_and_open(place)
    inside = record(unsealed.with_name("ab" * 16 + ".pack"), 3, b'{"version":1}')
    host = record(unsealed, 1, b"\xf7HFr" * 1000 + inside)
    with unsealed.open("ab") as file:
        file.write(b"damaged!" + host[8:] + record(unsealed, 1, b"the next one"))
    outcome = rescue(place, "--list")
    assert outcome.returncode == 100
    assert len(outcome.stdout.splitlines()) == 3
    assert "can not be read" not in outcome.stderr


# --- what is hostile

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "nul\0byte",
    "..",
    ".",
    "",
    "a//b",
    "x" * 300,
    "folder/../../../up",
    "\ud800",
    17,
    None,
    "gold.vmx",  # taken by an honest one
    "gold.vmx/below",  # which is a file
    "renamed-1",
]


def test_hostile_names_stay_inside(place: Path, tmp_path: Path) -> None:
    manifest = manifest_of(place)
    honest = next(file for file in manifest["files"] if file["name"] == "gold.vmx")
    manifest["files"] = [honest, *({**honest, "name": name} for name in HOSTILE)]
    manifest["disks"] = [{**disk, "name": "../d.vmdk", "flat_name": "/tmp/d"} for disk in manifest["disks"]]
    manifest["folders"] = ["../outside", "gold.vmx", "/outside", "inside"]
    manifest["vm"]["name"] = "evil\x1b[2J"
    plaintext = json.dumps(manifest).encode()
    new_pack(packs(place)[0], 7, (3, plaintext))
    context = "holdfast 2026-11-22 v1 clear manifest id"
    point = blake3.blake3(plaintext, derive_key_context=context).hexdigest()
    dest = tmp_path / "deep" / "er" / "dest"
    before = {path for path in tmp_path.rglob("*") if dest not in path.parents}
    outcome = rescue(place, "--restore", point, dest)
    assert outcome.returncode == 100, outcome.stderr
    assert "\x1b" not in outcome.stdout + outcome.stderr
    after = {path for path in tmp_path.rglob("*") if dest not in path.parents}
    assert after - before == {dest, *list(dest.parents)[:2]}
    assert not Path("/tmp/d").exists()
    honest_bytes = (dest / "gold.vmx").read_bytes()
    copies = [path for path in dest.iterdir() if path.is_file() and path.read_bytes() == honest_bytes]
    assert len(copies) == 1 + len(HOSTILE)
    assert (dest / "inside").is_dir()


def test_a_link_does_not_lead_outside(pristine: Path, tmp_path: Path) -> None:
    dest, outside = tmp_path / "dest", tmp_path / "outside"
    dest.mkdir()
    outside.mkdir()
    (outside / "nothing.txt").write_text("precious")
    (dest / "notes").symlink_to(outside)
    outcome = rescue(pristine / CLEAR, "--restore", "göld 1", dest, "--force")
    assert outcome.returncode == 1
    assert "leads out of" in outcome.stderr
    assert [path.name for path in outside.iterdir()] == ["nothing.txt"]
    assert (outside / "nothing.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        {"disks": 1},
        {"disks": [{"size_bytes": -1, "format": "raw", "name": "d", "root": "00" * 32}]},
        {"disks": [{"size_bytes": 1 << 62, "format": "raw", "name": "d", "root": "01" * 32}]},
        {"segment_bytes": 0},
        {"time": 1 << 70},
        {"version": 2},
        {"vm": "x"},
        {"files": [[[]]]},
    ],
)
def test_nonsense_ends_in_a_sentence(change: dict[str, Any], place: Path, tmp_path: Path) -> None:
    manifest = manifest_of(place) | change
    plaintext = json.dumps(manifest).encode()
    new_pack(packs(place)[0], 7, (3, plaintext))
    context = "holdfast 2026-11-22 v1 clear manifest id"
    point = blake3.blake3(plaintext, derive_key_context=context).hexdigest()
    outcome = rescue(place, "--restore", point, tmp_path / "dest")
    assert outcome.returncode in (1, 100)
    assert "Traceback" not in outcome.stderr
    assert rescue(place, "--restore", "göld 1@latest", tmp_path / "other").returncode in (0, 1, 100)


def test_deep_json_ends_in_a_sentence(place: Path) -> None:
    new_pack(packs(place)[0], 7, (3, b"[" * 100_000))
    outcome = rescue(place, "--list")
    assert outcome.returncode == 100
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stdout.splitlines()) == 3


# --- the parts


def test_xxh3_is_xxh3() -> None:
    loaded = module()
    for length in range(17, 65):
        data = hashlib.shake_128(bytes([length])).digest(length)
        for seed in (0, 1, 0x0123456789ABCDEF, (1 << 64) - 1):
            assert loaded.xxh3(data, seed) == xxhash.xxh3_64_intdigest(data, seed)


def test_the_index_finds_what_was_added() -> None:
    index = module().Index()
    ids = [hashlib.sha256(bytes([number % 251, number >> 8])).digest() for number in range(5000)]
    ids += [b"\1\1" + bytes(6) + bytes([number]) * 24 for number in range(50)]  # the same eight bytes
    ids += [
        b"\1\1" + bytes([0, 0, number, 0, 0, 0]) + bytes(24) for number in range(50)
    ]  # zeros at every offset
    for number, record_id in enumerate(ids):
        index.add(record_id, number, number * 7)
    for number, record_id in enumerate(ids):
        assert (number, number * 7) in list(index.places(record_id))
    assert not list(index.places(b"\2" * 32))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_descriptor_of_other_extents_becomes_flat(newline: str) -> None:
    flat_descriptor = module().flat_descriptor
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="windows-1252"',
        "CID=12345678",
        "parentCID=87654321",
        'parentFileNameHint="base.vmdk"',
        'createType="twoGbMaxExtentSparse"',
        'RW 4192256 SPARSE "a-s001.vmdk"',
        'RW 2048 SPARSE "a-s002.vmdk"',
        'changeTrackPath="a-ctk.vmdk"',
        'ddb.adapterType = "lsilogic"',
    ]
    text = flat_descriptor(newline.join(lines), 3 << 20, "a-flat.vmdk").decode()
    assert text.splitlines() == [
        "# Disk DescriptorFile",
        'encoding="UTF-8"',
        'createType="monolithicFlat"',
        "parentCID=ffffffff",
        'RW 6144 FLAT "a-flat.vmdk" 0',
        "version=1",
        "CID=12345678",
        'ddb.adapterType = "lsilogic"',
    ]
    assert flat_descriptor(text, 3 << 20, "a-flat.vmdk") == text.encode()
    assert b"monolithicFlat" in flat_descriptor("", 512, "b")


def test_needs_no_more_than_it_says() -> None:
    tree = ast.parse(RESCUE.read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"blake3", "zstandard", "cryptography"}
    for missing in ("blake3", "zstandard"):
        outcome = rescue("/", "--list", without=missing)
        assert outcome.returncode == 1
        assert "pip install blake3 zstandard" in outcome.stderr


@pytest.mark.parametrize("compact_below", [0.0, 1.0])
def test_reads_what_a_collection_leaves(
    compact_below: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, of Holdfast: packs are holed or written anew, and marks are written."""
    from holdfast.esxi.folder import open_machine
    from holdfast.repo.gc import CollectOptions
    from holdfast.repo.repository import InitOptions, Repository

    monkeypatch.setattr("holdfast.repo.gc._LEAST_DEAD_BYTES", 1 << 16)  # small packs for a quick test
    place, piece = tmp_path / "repository", 3 << 16
    first, other = (hashlib.shake_128(name).digest(24 * piece) for name in (b"first", b"other"))
    mixed = b"".join((first, other)[n % 2][n * piece : (n + 1) * piece] for n in range(24))
    points = []
    options = InitOptions(segment_bytes=1 << 20, pack_bytes=1 << 20)
    with Repository.init(str(place), options) as repository:
        for name, data in (("first", first), ("mixed", mixed)):
            (tmp_path / f"{name}.raw").write_bytes(data)
            with contextlib.closing(open_machine(str(tmp_path / f"{name}.raw"))) as machine:
                point = repository.backup(machine).point
            assert point is not None
            points.append(point.hex())
        repository.forget([repository.resolve(points[0])])
        assert "forgotten" in rescue(place, "--list").stdout
        report = repository.collect(CollectOptions(compact_below=compact_below))
        assert report.packs_compacted if compact_below else report.packs_holed
    outcome = rescue(place, "--list")
    assert (outcome.returncode, outcome.stderr) == (0, ""), report
    assert [line[:12] for line in outcome.stdout.splitlines()[1:]] == [points[1][:12]]
    outcome = rescue(place, "--restore", "mixed@latest", tmp_path / "dest")
    assert (outcome.returncode, outcome.stderr) == (0, ""), report
    assert (tmp_path / "dest" / "mixed.raw").read_bytes() == mixed
    collected = rescue(place, "--restore", points[0], tmp_path / "gone", "--all")
    # the manifest went with the records around it, or stays and says what is missing
    assert collected.returncode in (1, 100)
    assert bool(damaged_ranges(collected.stderr)) == (collected.returncode == 100)
