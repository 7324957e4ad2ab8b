"""Guest disks that are like real ones, made without root and without a network, from a seed.

    python -m benchmarks.guests FOLDER [--size small|full] [--seed N]

Three raw images with ext4 file systems: `vm1-d0.raw`; `vm1-d1.raw`, the same machine a day later; and
`vm2-d0.raw`, another machine with much of the same software. Software is real: files of this machine below
`ROOTS`, chosen folder by folder by the seed (so the same seed gives the same choice on the same machine).
Databases and logs are generated.

Day 1 keeps the layout of the disk, as a running guest does: 8 KiB pages of the databases are overwritten at
the places where the file system has put them (`debugfs` tells the blocks), the log is rotated (old blocks
stay, new ones come), packages are removed and added. Everything that is made is proven with `e2fsck -fn`.

Images of systems that `debootstrap` installs, for those who have root, are made by `debootstrap_images.sh`;
`python -m benchmarks.compare --images FOLDER` takes either kind.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DAY_0", "DAY_1", "OTHER", "SIZES", "GuestSize", "make_guests"]

DAY_0, DAY_1, OTHER = "vm1-d0.raw", "vm1-d1.raw", "vm2-d0.raw"
ROOTS = ("/usr/lib", "/usr/share", "/usr/include", "/usr/bin", "/usr/sbin", "/usr/local")
BLOCK_BYTES = 4096
PAGE_BYTES = 8192
_MIB = 1 << 20
_PLAIN_NAME = re.compile(r"/[A-Za-z0-9._+/@=-]+")
_LARGEST_FILE = 192 * _MIB
_DATABASE_PATHS = ("/var/lib/db/random.dat", "/var/lib/db/rows.dat")
_LOG = "/var/log/app.log"


@dataclass(frozen=True, slots=True)
class GuestSize:
    """How much of what a guest holds. All in bytes, but for the pages.

    Args:
        shared: software that both machines have.
        own: software that each machine has for itself.
        added: software that comes on day 1; a quarter of it is removed.
        database: of each of two files, one of random bytes, one of rows of text.
        pages: overwritten in each database file on day 1.
        log: lines written each day.
        disk: the size of the disk.
    """

    shared: int
    own: int
    added: int
    database: int
    pages: int
    log: int
    disk: int


SIZES = {
    "tiny": GuestSize(8 * _MIB, 4 * _MIB, 4 * _MIB, 2 * _MIB, 20, _MIB, 64 * _MIB),
    "small": GuestSize(170 * _MIB, 60 * _MIB, 40 * _MIB, 24 * _MIB, 200, 8 * _MIB, 640 * _MIB),
    "full": GuestSize(2800 * _MIB, 1500 * _MIB, 400 * _MIB, 400 * _MIB, 2000, 48 * _MIB, 8192 * _MIB),
}


@dataclass(frozen=True, slots=True)
class _Package:
    """The plain files of one folder."""

    files: tuple[tuple[str, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.files)


def _packages() -> list[_Package]:
    """One for each folder below the roots that has readable plain files, in a fixed order."""
    found = []
    for root in ROOTS:
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            files = []
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not _PLAIN_NAME.fullmatch(path) or os.path.islink(path) or not os.path.isfile(path):
                    continue
                size = os.path.getsize(path)
                if size and size <= _LARGEST_FILE and os.access(path, os.R_OK):
                    files.append((path, size))
            if files:
                found.append(_Package(tuple(files)))
    return found


class _Shelf:
    """Packages in an order that the seed gives; each is taken once."""

    def __init__(self, seed: int) -> None:
        self._packages = _packages()
        random.Random(seed).shuffle(self._packages)

    def take(self, size: int) -> list[str]:
        """Files of about `size` bytes together; fewer if the machine has no more."""
        taken, total = [], 0
        for package in list(self._packages):
            if total >= size:
                break
            if total + package.size_bytes <= size * 1.1 + BLOCK_BYTES:
                taken += [path for path, _ in package.files]
                total += package.size_bytes
                self._packages.remove(package)
        return taken


def _install(files: Sequence[str], tree: Path, prefix: str = "") -> None:
    """Copies files of this machine into a tree, below the same paths; modes and times are fixed."""
    for path in files:
        target = tree / (prefix + path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (1_700_000_000, 1_700_000_000))


def _rows(rng: random.Random, size: int) -> Iterator[bytes]:
    words = (b"alpha", b"beta", b"gamma", b"delta")
    while size > 0:
        block = b"".join(
            b"%012d|%s|%s\n" % (rng.getrandbits(36), rng.choice(words) * 4, rng.randbytes(24).hex().encode())
            for _ in range(4096)
        )[:size]
        size -= len(block)
        yield block


def _log_lines(rng: random.Random, day: int, size: int) -> Iterator[bytes]:
    second = 0
    while size > 0:
        lines = []
        for _ in range(4096):
            second += rng.random() < 0.2
            lines.append(
                b"2026-11-%02dT%02d:%02d:%02d host app[%d]: request %d served in %d ms\n"
                % (
                    day,
                    second // 3600 % 24,
                    second // 60 % 60,
                    second % 60,
                    rng.randrange(9999),
                    rng.getrandbits(40),
                    rng.randrange(900),
                )
            )
        block = b"".join(lines)[:size]
        size -= len(block)
        yield block


def _write(path: Path, blocks: Iterator[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)


def _tool(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed (package e2fsprogs)")
    return found


def _make_file_system(image: str, tree: Path, size: int, seed: int) -> None:
    uuid = f"00000000-0000-4000-8000-{seed:012x}"
    with open(image, "wb") as file:
        file.truncate(size)
    subprocess.run(
        [
            _tool("mkfs.ext4"), "-q", "-F", "-b", str(BLOCK_BYTES), "-U", uuid,
            "-E", f"hash_seed={uuid},root_owner=0:0", "-d", str(tree), image,
        ],
        check=True,
        env={**os.environ, "E2FSPROGS_FAKE_TIME": "1700000000"},
    )  # fmt: skip
    _prove(image)


def _prove(image: str) -> None:
    done = subprocess.run([_tool("e2fsck"), "-f", "-n", image], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{image} is not a clean file system:\n{done.stdout}{done.stderr}")


def _debugfs(image: str, commands: Sequence[str], *, write: bool) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as script:
        script.write("\n".join(commands) + "\n")
        script.flush()
        done = subprocess.run(
            [_tool("debugfs"), *(["-w"] if write else []), "-f", script.name, image],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "E2FSPROGS_FAKE_TIME": "1700086400"},
        )
    complaints = [line for line in done.stderr.splitlines() if line and not line.startswith("debugfs 1.")]
    if complaints:
        raise RuntimeError(f"debugfs: {complaints[:5]}")
    return done.stdout


def _overwrite_pages(image: str, path: str, pages: int, rng: random.Random) -> None:
    """Writes random pages of a file in place, as a database does."""
    listing = _debugfs(image, [f"blocks {path}"], write=False)
    blocks = [
        int(word) for line in listing.splitlines() if not line.startswith("debugfs:") for word in line.split()
    ]
    per_page = PAGE_BYTES // BLOCK_BYTES
    with open(image, "r+b") as file:
        for page in rng.sample(range(len(blocks) // per_page), pages):
            for part in range(per_page):
                block = blocks[page * per_page + part]
                file.seek(block * BLOCK_BYTES)
                file.write(rng.randbytes(BLOCK_BYTES))


def _folders(paths: Sequence[str]) -> list[str]:
    """All folders above the paths, parents first."""
    found = {str(parent) for path in paths for parent in Path(path).parents if str(parent) != "/"}
    return sorted(found)


def _change(
    day0: str, day1: str, added: Sequence[str], removed: Sequence[str], size: GuestSize, seed: int
) -> None:
    """Makes day 1 of day 0."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", day0, day1], check=True)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(day1)) as scratch:
        log = Path(scratch) / "app.log"
        _write(log, _log_lines(rng, 22, size.log))
        commands = [f"rm {path}" for path in removed]
        commands += [f"mkdir {folder}" for folder in _folders(["/opt/day1" + path for path in added])]
        commands += [f"write {path} /opt/day1{path}" for path in added]
        commands += [f"ln {_LOG} {_LOG}.1", f"unlink {_LOG}", f"write {log} {_LOG}"]
        # "/opt" is there already: its mkdir is the only one that may fail, so it is left out
        _debugfs(day1, [command for command in commands if command != "mkdir /opt"], write=True)
    for path in _DATABASE_PATHS:
        _overwrite_pages(day1, path, size.pages, rng)
    _prove(day1)


def make_guests(folder: str, size: GuestSize, seed: int = 1) -> list[str]:
    """Makes the three images and returns their paths: vm1 day 0, vm1 day 1, vm2.

    Cost: the space of the images and of one file tree; for `full` some minutes.
    """
    os.makedirs(folder, exist_ok=True)
    shelf = _Shelf(seed)
    shared, own1, own2 = shelf.take(size.shared), shelf.take(size.own), shelf.take(size.own)
    added = shelf.take(size.added)
    removed = own1[: len(own1) // 10]
    paths = [os.path.join(folder, name) for name in (DAY_0, DAY_1, OTHER)]
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree = Path(scratch) / "vm1"
        _install([*shared, *own1], tree)
        (tree / "opt").mkdir()
        _write(
            tree / _DATABASE_PATHS[0].lstrip("/"), (rng.randbytes(_MIB) for _ in range(size.database // _MIB))
        )
        _write(tree / _DATABASE_PATHS[1].lstrip("/"), _rows(rng, size.database))
        _write(tree / _LOG.lstrip("/"), _log_lines(rng, 21, size.log))
        _make_file_system(paths[0], tree, size.disk, seed)
        shutil.rmtree(tree)
        _change(paths[0], paths[1], added, removed, size, seed + 1)
        tree = Path(scratch) / "vm2"
        _install([*own2, *shared], tree)
        _write(tree / "etc/hostname", iter([b"web2\n"]))
        _make_file_system(paths[2], tree, size.disk, seed + 2)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for path in make_guests(arguments.folder, SIZES[arguments.size], arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
