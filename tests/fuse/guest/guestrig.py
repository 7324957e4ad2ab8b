"""File systems with something in them, made by the tools that make real ones, without root and without mounting."""

from __future__ import annotations

import mmap
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.fuse.guest.port import Node

MIB = 1 << 20
TIME_S = 1_700_000_000


class MemoryDisk:
    """Bytes as what is read of a stored disk."""

    def __init__(self, data: bytes | bytearray | mmap.mmap) -> None:
        self.data = data if isinstance(data, mmap.mmap) else bytearray(data)
        self.size_bytes = len(data)
        self._at = 0

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._at = offset
        return offset

    def read(self, length: int = -1) -> bytes:
        data = self.pread(self._at, length)
        self._at += len(data)
        return data


class FileDisk(MemoryDisk):
    """An image the same way; what is changed in `data` does not reach the file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            super().__init__(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


@dataclass(frozen=True)
class Seen:
    """What matters of a file."""

    kind: str
    size_bytes: int = 0
    content: bytes | str = b""
    mode: int | None = None


def content(node: Node, limit: int = 1 << 31) -> bytes:
    whole = bytearray()
    for piece in node.pieces():
        whole += bytes(piece) if isinstance(piece, int) else piece
        assert len(whole) <= limit
    return bytes(whole)


def seen(root: Node) -> dict[str, Seen]:
    """All that is in a guest's folder."""
    found: dict[str, Seen] = {}

    def walk(node: Node, above: str) -> None:
        for child in node.children():
            path = above + child.name
            if child.kind == "folder":
                found[path] = Seen("folder", mode=child.mode)
                walk(child, path + "/")
            elif child.kind == "link":
                found[path] = Seen("link", content=child.target)
            elif child.kind == "file":
                data = content(child)
                found[path] = Seen("file", child.size_bytes, data, child.mode)
            else:
                found[path] = Seen(child.kind)

    walk(root, "")
    return found


def of_tree(folder: Path) -> dict[str, Seen]:
    """The same of a folder of this machine."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        mode = stat.S_IMODE(info.st_mode)
        if stat.S_ISDIR(info.st_mode):
            what = Seen("folder", mode=mode)
        elif stat.S_ISLNK(info.st_mode):
            what = Seen("link", content=os.readlink(path))
        elif stat.S_ISREG(info.st_mode):
            what = Seen("file", info.st_size, path.read_bytes(), mode)
        else:
            what = Seen("fifo")
        found[str(path.relative_to(folder))] = what
    return found


def make_tree(folder: Path) -> Path:
    """Files of all kinds and sizes."""
    rng = random.Random(5)
    (folder / "etc").mkdir(parents=True)
    (folder / "etc" / "hostname").write_text("web1\n")
    (folder / "etc" / "localtime").symlink_to("../usr/zone")
    (folder / "etc" / "absolute").symlink_to("/etc/hostname")
    (folder / "long-link").symlink_to("x" * 200)
    (folder / "usr" / "deep" / "er").mkdir(parents=True)
    (folder / "usr" / "deep" / "er" / "empty").touch()
    for size in (1, 59, 60, 61, 100, 160, 4095, 4096, 4097, 300_000):
        (folder / "usr" / f"size-{size}").write_bytes(rng.randbytes(size))
    (folder / "usr" / "size-300000").chmod(0o640)
    (folder / "usr" / "zone").write_bytes(b"zone")
    (folder / "usr" / "zone").chmod(0o4755)
    (folder / "many").mkdir()
    for number in range(500):
        (folder / "many" / f"{'n' * (number % 40)}{number}").write_bytes(b"%d" % number)
    os.mkfifo(folder / "pipe")
    return folder


def call(*command: object, text: str | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], input=text, check=True, capture_output=True, text=True
    )
    return done.stdout


def protofile(folder: Path) -> Iterator[str]:
    """What mkfs.xfs takes for a tree."""
    for path in sorted(folder.iterdir()):
        info = path.lstat()
        mode = stat.S_IMODE(info.st_mode)
        permissions = f"{'u' if mode & 0o4000 else '-'}-{mode & 0o777:03o}"
        if stat.S_ISDIR(info.st_mode):
            yield f"{path.name} d{permissions} 0 0"
            yield from protofile(path)
            yield "$"
        elif stat.S_ISLNK(info.st_mode):
            yield f"{path.name} l{permissions} 0 0 {os.readlink(path)}"
        elif stat.S_ISFIFO(info.st_mode):
            yield f"{path.name} p{permissions} 0 0"
        else:
            yield f"{path.name} -{permissions} 0 0 {path}"


def make_xfs(path: Path, tree: Path, *options: str) -> Path:
    lines = ["/", "0 0", "d--755 0 0", *protofile(tree), "$"]
    proto = path.with_suffix(".proto")
    proto.write_text("\n".join(lines) + "\n")
    with path.open("wb") as file:
        file.truncate(304 * MIB)
    call("mkfs.xfs", "-q", *options, "-p", proto, path)
    return path


def make_ext(path: Path, tree: Path, *options: str, size: str = "24M") -> Path:
    call("mkfs.ext4", "-q", *options, "-d", tree, path, size)
    return path
