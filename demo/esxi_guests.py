"""The guests of the ESXi tour: two VMs cloned from one system disk, each with a database that is written to all the time.

The disks are real ext4 file systems, made by `mkfs.ext4 -d` and changed by debugfs. The guests write as a database does: whole
blocks, in place, within one file whose blocks were looked up before. So the file system stays clean at every moment, and the
content of the disk differs at every moment.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from tests.esxi_host import StandIn, VmState

MIB = 1 << 20
DISK_BYTES = 256 * MIB
SYSTEM_BYTES = 32 * MIB
DATABASE_BYTES = 8 * MIB
DATABASE = "/var/lib/shop/orders.db"
_BLOCK_BYTES = 4096
_PACE_S = 0.005


def make_system_disk(folder: Path) -> Path:
    """A disk with files of this machine and a database: what both VMs are cloned from."""
    tree = folder / "system"
    left = SYSTEM_BYTES
    for directory, names, files in os.walk("/usr/lib"):
        names.sort()
        for name in sorted(files):
            source = os.path.join(directory, name)
            if left <= 0:
                break
            if os.path.islink(source) or not os.path.isfile(source) or os.path.getsize(source) > left:
                continue
            target = tree / source.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            left -= os.path.getsize(source)
    database = tree / DATABASE.lstrip("/")
    database.parent.mkdir(parents=True)
    database.write_bytes(random.Random(1).randbytes(DATABASE_BYTES))
    disk = folder / "system.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    _quietly("mkfs.ext4", "-q", "-b", str(_BLOCK_BYTES), "-L", "system", "-d", str(tree), str(disk))
    shutil.rmtree(tree)
    return disk


def clone_disk(system: Path, name: str) -> Path:
    """A copy of the system disk that has a host name and a database of its own."""
    disk = system.with_name(f"{name}.raw")
    _quietly("cp", "--sparse=always", str(system), str(disk))
    own = system.with_name(f"{name}.own")
    own.write_bytes(random.Random(name).randbytes(DATABASE_BYTES))
    host_name = system.with_name(f"{name}.name")
    host_name.write_text(f"{name}\n", encoding="utf-8")
    changes = system.with_name(f"{name}.debugfs")
    changes.write_text(
        f"rm {DATABASE}\nwrite {own} {DATABASE}\nmkdir /etc\nwrite {host_name} /etc/hostname\n",
        encoding="utf-8",
    )
    _quietly("debugfs", "-w", "-f", str(changes), str(disk))
    for path in (own, host_name, changes):
        path.unlink()
    return disk


def database_blocks(disk: Path) -> list[int]:
    """The numbers of the blocks that the database lies in."""
    shown = _quietly("debugfs", "-R", f"blocks {DATABASE}", str(disk))
    blocks = [int(number) for number in re.findall(r"\d+", shown)]
    assert len(blocks) * _BLOCK_BYTES == DATABASE_BYTES, f"{DATABASE} has {len(blocks)} blocks"
    return blocks


class BusyGuest:
    """A guest that writes into its database as long as the `with` lasts.

    Args:
        blocks: of the database; the guest keeps to the first quarter of it, as databases have hot tables.
    """

    def __init__(self, host: StandIn, vm: VmState, blocks: list[int]) -> None:
        self._host = host
        self._vm = vm
        self._blocks = blocks[: len(blocks) // 4]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"guest-{vm.name}", daemon=True)
        self.writes = 0
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        rng = random.Random(self._vm.vmid)
        try:
            while not self._stopping.wait(_PACE_S):
                offset = rng.choice(self._blocks) * _BLOCK_BYTES
                self._host.write(self._vm, "scsi0:0", offset, rng.randbytes(_BLOCK_BYTES))
                self.writes += 1
        except Exception as error:  # noqa: BLE001 - told by whoever asks for the number of writes
            self.error = error


def _quietly(*command: str) -> str:
    """What the command printed.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
