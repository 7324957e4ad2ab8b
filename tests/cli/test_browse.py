"""Files out of guests, by the commands: what paths mean, what is written where, and what a hostile guest can not do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.cli.extracting import extract
from holdfast.errors import GuestError
from holdfast.fuse.guest.port import Piece

pytest.importorskip("dissect.extfs", reason="the extra holdfast[files] is missing")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("sfdisk", "mkfs.vfat", "mcopy"))),
    reason="sfdisk, mkfs.vfat or mcopy (Debian packages fdisk, dosfstools, mtools) is missing",
)
MIB = 1 << 20
TIME_S = 1_700_000_000


@pytest.fixture(scope="session")
def guest_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("guest") / "tree"
    (tree / "etc" / "sub").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("web1\n")
    (tree / "etc" / "hostname").chmod(0o640)
    (tree / "etc" / "sub" / "set").write_bytes(b"x")
    (tree / "etc" / "sub" / "set").chmod(0o4755)
    (tree / "etc" / "new\nline").touch()
    (tree / "etc" / os.fsdecode(b"\xff")).write_bytes(b"bytes")
    (tree / "both").write_text("root\n")
    (tree / "alias").symlink_to("/etc")
    (tree / "etc" / "link").symlink_to("../alias/hostname")
    (tree / "outside").symlink_to("../../../../../../etc/hostname")
    (tree / "loop").symlink_to("loop")
    with (tree / "holes").open("wb") as file:
        file.write(b"a" * 5000)
        file.seek(9 * MIB)
        file.write(b"z")
    os.utime(tree / "etc" / "hostname", (TIME_S, TIME_S))
    return tree


@pytest.fixture(scope="session")
def guest_repo(guest_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VM with one disk (FAT, ext4, swap, and a damaged ext4), and one with two disks without partitions."""
    place = tmp_path_factory.mktemp("guests")
    ext = place / "ext"
    subprocess.run(["mkfs.ext4", "-q", "-d", guest_tree, ext, "16M"], check=True)
    fat = place / "fat"
    subprocess.run(["mkfs.vfat", "-C", fat, "8192"], check=True, capture_output=True)
    subprocess.run(["mcopy", "-i", fat, guest_tree / "both", "::both"], check=True)
    disk = place / "web.img"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    table = 'label: gpt\nsize=8M, type=U, name="EFI"\nsize=16M, type=L, name="root"\nsize=8M, type=S\nsize=16M, type=L\n'
    subprocess.run(["sfdisk", "-q", disk], input=table, text=True, check=True)
    whole = ext.read_bytes()
    damaged = bytearray(whole)
    damaged[2048:8192] = b"\xee" * 6144  # the groups
    with disk.open("r+b") as file:
        for start, content in ((1, fat.read_bytes()), (9, whole), (33, damaged)):
            file.seek(start * MIB)
            file.write(content)
    (place / "two").mkdir()
    (place / "two" / "a.img").write_bytes(whole)
    repo = place / "repo"
    base = [sys.executable, "-m", "holdfast", "-r", str(repo)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_")}
    for words in (["init"], ["backup", str(disk)], ["backup", str(place / "two" / "a.img"), "--vm", "plain"]):
        subprocess.run([*base, *words], check=True, capture_output=True, env=environment)
    return repo


def test_a_disk_with_partitions_is_listed(done, guest_repo: Path) -> None:
    lines = done("browse", "-r", guest_repo, "web@latest").out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["PATH", "KIND"], ["p1", "fat"], ["p2", "ext4"], ["p3", "swap"], ["p4", "ext4"],
    ]  # fmt: skip
    document = done("browse", "-r", guest_repo, "web@latest", "--json").document
    assert document["vm"] == "web"
    assert document["volumes"][1] == {
        "path": "p2", "disk": "web.img", "volume": "p2", "kind": "ext4", "size_bytes": 16 * MIB, "label": "root",
        "readable": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/etc", "p2/etc", "web.img/p2/etc", "etc/", "/alias", "/etc/sub/..", "p2/alias/../etc/."]
)
def test_a_folder_is_listed_by_any_of_its_names(done, guest_repo: Path, path: str) -> None:
    document = done("browse", "-r", guest_repo, "web@latest", path, "--json").document
    assert (document["volume"], document["path"]) == ("p2", "/etc")
    names = [entry["name"] for entry in document["entries"]]
    assert names == ["hostname", "link", "new\nline", "sub", "\udcff"]
    assert document["entries"][0] == {
        "name": "hostname", "type": "file", "size_bytes": 5, "mode": 0o640, "mtime_ns": TIME_S * 10**9, "target": None,
    }  # fmt: skip
    assert document["entries"][1]["target"] == "../alias/hostname"


def test_a_listing_for_people(done, guest_repo: Path) -> None:
    out = done("browse", "-r", guest_repo, "web@latest", "/etc").out
    assert "-rw-r-----   5 B  2023-11-14" in out
    assert "link -> ../alias/hostname" in out
    assert "new\\nline" in out
    assert "hostname" in done("browse", "-r", guest_repo, "web@latest", "/etc/hostname").out
    assert done("browse", "-r", guest_repo, "plain@latest").out.count("\n") > 3
    assert "is empty" not in done("browse", "-r", guest_repo, "plain@latest", "disk/etc").out


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["/nothing"], 61, "no file system", "looked at: p1, p2"),
        (["p2/nothing"], 61, "p2 has no '/nothing'", ""),
        (["/both"], 61, "ambiguous: 2 file systems", "p1/both, p2/both"),
        (["p2/etc/hostname/x"], 61, "is no folder", ""),
        (["p2/loop"], 61, "too many links", ""),
        (["p3"], 60, "no file system that can be read (swap)", ""),
        (["p4/etc"], 60, "can not be read", "restore the disk"),
        (["--partition", "9"], 61, "no partition '9'", "p1 of web.img"),
        (["--disk", "b.img"], 14, "no disk", "web.img"),
    ],
)
def test_what_is_not_found_is_explained(holdfast, guest_repo, words, code, message, hint) -> None:
    outcome = holdfast("browse", "-r", guest_repo, "web@latest", *words, "--json")
    assert outcome.code == code
    assert message in outcome.error["message"]
    assert hint in outcome.error["hint"]


@pytest.mark.parametrize(
    "words", [["--partition", "1"], ["--partition", "p1"], ["--disk", "web.img", "--partition", "1"]]
)
def test_options_choose_too(done, guest_repo: Path, words: list[str]) -> None:
    document = done("browse", "-r", guest_repo, "web@latest", "/both", *words, "--json").document
    assert document["volume"] == "p1"
    assert document["entries"][0]["mode"] is None


def test_a_file_comes_out(done, holdfast, guest_repo: Path, guest_tree: Path, tmp_path: Path) -> None:
    done("extract", "-r", guest_repo, "web@latest", "/etc/hostname", tmp_path / "name")
    info = (tmp_path / "name").stat()
    assert (tmp_path / "name").read_text() == "web1\n"
    assert (stat.S_IMODE(info.st_mode), info.st_mtime) == (0o640, TIME_S)
    out = done("extract", "-r", guest_repo, "web@latest", "/etc/link", f"{tmp_path}/new/").out
    assert (tmp_path / "new" / "link").read_text() == "web1\n"
    assert out.startswith("extracted 1 file, 5 B in ")
    done("extract", "-r", guest_repo, "web@latest", "/holes", tmp_path)
    assert (tmp_path / "holes").read_bytes() == (guest_tree / "holes").read_bytes()
    assert (tmp_path / "holes").stat().st_blocks * 512 < 2 * MIB
    again = holdfast("extract", "-r", guest_repo, "web@latest", "/etc/hostname", tmp_path / "name")
    assert again.code == 33
    inside = holdfast("extract", "-r", guest_repo, "web@latest", "/etc/hostname", guest_repo / "packs")
    assert inside.code == 2


def test_a_link_out_of_the_guest_stays_in_it(done, guest_repo: Path, tmp_path: Path) -> None:
    done("extract", "-r", guest_repo, "web@latest", "p2/outside", tmp_path / "it")
    assert (tmp_path / "it").read_text() == "web1\n"


def test_a_folder_comes_out(done, guest_repo: Path, guest_tree: Path, tmp_path: Path) -> None:
    summary = done("extract", "-r", guest_repo, "web@latest", "p2", tmp_path / "all", "--json").summary
    assert summary["left_out"] == []
    assert summary["links"] == 4
    shutil.rmtree(tmp_path / "all" / "lost+found")
    subprocess.run(["diff", "-r", "--no-dereference", guest_tree, tmp_path / "all"], check=True)
    assert stat.S_IMODE((tmp_path / "all" / "etc" / "sub" / "set").stat().st_mode) == 0o755


def test_without_the_extra_the_command_says_what_to_install(
    execute, guest_repo: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['dissect.extfs'] = None\n")
    outcome = execute(
        "browse", "-r", guest_repo, "web@latest", env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    )
    assert outcome.code == 3, outcome.err
    assert "pip install 'holdfast[files]'" in outcome.err


class Made:
    """A node of a guest that no tool would make."""

    mode: int | None = 0o755
    mtime_ns: int | None = -(1 << 80)

    def __init__(self, name: str, kind: str, inside: list[Made] | bytes | str = b"") -> None:
        self.name, self.kind, self._inside = name, kind, inside
        self.size_bytes = len(inside)
        self.target = inside if isinstance(inside, str) else ""

    def children(self) -> list[Made]:
        assert isinstance(self._inside, list)
        return self._inside

    def pieces(self):
        if self._inside == b"broken":
            yield b"half"
            raise GuestError("it is broken")
        piece: Piece = self._inside  # type: ignore[assignment]
        yield piece


def test_a_hostile_folder_writes_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "dest").mkdir()
    root = Made("root", "folder", [
        Made("..", "file", b"up"), Made("", "file", b"none"), Made("/abs", "file", b"abs"), Made("a/../b", "file", b"x"),
        Made("nul\0", "file", b"x"), Made("\ud800", "file", b"x"), Made("x" * 300, "file", b"x"),
        Made("trap", "link", str(tmp_path / "victim")), Made("trap", "folder", [Made("in", "file", b"x")]),
        Made("trap2", "link", str(tmp_path / "victim" / "new")), Made("trap2", "file", b"x"),
        Made("null-link", "link", "a\0b"), Made("dev", "device"), Made("odd", "damaged"),
        Made("half", "file", b"broken"), Made("good", "file", b"good"),
    ])  # fmt: skip
    done = extract(root, "root", str(tmp_path / "dest"), lambda _length: None)
    assert list((tmp_path / "victim").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "dest" / "root").iterdir()) == ["good", "trap", "trap2"]
    assert (tmp_path / "dest" / "root" / "trap").is_symlink()
    assert len(done.left_out) == 13
    assert sorted(os.listdir(tmp_path)) == ["dest", "victim"]


def test_folders_without_end_are_cut_off(tmp_path: Path) -> None:
    inner = Made("d", "folder", [])
    inner._inside = [inner]
    done = extract(inner, "d", str(tmp_path), lambda _length: None)
    assert done.folders == 200
    assert [reason for _, reason in done.left_out] == ["folders are nested too deeply"]
