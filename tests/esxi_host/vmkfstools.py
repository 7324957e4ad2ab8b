"""`vmkfstools`: makes, copies, grows, checks, renames and removes disks, with the texts of a real host.

It works beside the view of the datastores, as the real one works below the shell's files, so it asks itself what is locked.
Copies are made by `chain.py`, so copying a snapshotted disk gives the disk as the chain says.
"""

from __future__ import annotations

import itertools
import os
import re

from tests.esxi_host.chain import Chain, descriptors
from tests.esxi_host.inventory import Inventory
from tests.esxi_host.requests import grow
from tests.esxi_host.session import Session
from tests.esxi_host.vmfiles import Descriptor, base_extras

FORMATS = {
    "thin": "VMFS thin-provisioned",
    "zeroedthick": "VMFS zeroedthick",
    "eagerzeroedthick": "VMFS eagerzeroedthick",
}
UNITS = {"": 1, "s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
NOT_A_DISK = "The file specified is not a virtual disk (15)"
LOCKED = "Failed to lock the file (16392)"
NO_SPACE = "No space left on device (1835017)"
WITH_VALUE = set("iIcXdaxEWv")


class Failure(Exception):
    """What the command says before it ends with code 255."""


def run(inventory: Inventory, session: Session) -> int:
    """The exit code of `vmkfstools`."""
    options, operands = _options(session.arguments)
    try:
        return _run(inventory, session, options, operands)
    except Failure as failure:
        session.complain(str(failure))
        return 255
    except IndexError:
        session.complain("vmkfstools: missing argument; see vmkfstools -h")
        return 1


LONG = {
    "--createvirtualdisk": "c",
    "--clonevirtualdisk": "i",
    "--diskformat": "d",
    "--adaptertype": "a",
    "--extendvirtualdisk": "X",
    "--deletevirtualdisk": "U",
    "--renamevirtualdisk": "E",
    "--chainConsistent": "e",
    "--fix": "x",
    "--queryrdm": "q",
    "--dump": "D",
    "--verbose": "v",
    "--blockmap": "t",
    "--help": "h",
}


def _options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options with their values, and what is left over."""
    found: dict[str, str] = {}
    operands: list[str] = []
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if word.startswith("--"):
            name, _, value = word.partition("=")
            letter = LONG.get(name, name)
            found[letter] = value or (pending.pop(0) if letter in WITH_VALUE and pending else "")
        elif word.startswith("-") and len(word) > 1:
            letter, value = word[1], word[2:]
            if letter in WITH_VALUE and not value and pending:
                value = pending.pop(0)
            found[letter] = value
        else:
            operands.append(word)
    return found, operands


def _run(inventory: Inventory, session: Session, options: dict[str, str], operands: list[str]) -> int:
    if "h" in options:
        session.print("OPTIONS FOR VIRTUAL DISKS:\n\nvmkfstools -c --createvirtualdisk #[bBsSkKmMgGtT]")
        return 0
    if "i" in options:
        return _clone(inventory, session, options, operands)
    target = _place(inventory, session, options["E"] if "E" in options else operands[0])
    if "E" in options:
        return _rename(inventory, target, _place(inventory, session, operands[0]))
    if "c" in options:
        return _create(inventory, session, options, target, operands[0])
    if not os.path.exists(target):
        raise Failure(f"Failed to open '{operands[0]}': The system cannot find the file specified (25)")
    if "X" in options:
        return _grow(inventory, session, options, target, operands[0])
    if "U" in options:
        return _delete(inventory, target)
    if "e" in options:
        return _chain(session, target)
    if "x" in options:
        return _check(inventory, session, options["x"], target, operands[0])
    if "q" in options:
        return _query(session, options, target, operands[0])
    if "D" in options:
        return _lock_state(inventory, session, target)
    if "t" in options:
        return _block_map(inventory, session, target)
    raise Failure("vmkfstools: no operation given; see vmkfstools -h")


def _place(inventory: Inventory, session: Session, path: str) -> str:
    try:
        return inventory.stores.real(session.absolute(path))
    except FileNotFoundError:
        raise Failure(f"Failed to open '{path}': The system cannot find the file specified (25)") from None


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([bskmgt]?)", text.lower())
    if not found:
        raise Failure(f"Invalid size '{text}'")
    return int(found[1]) * UNITS[found[2].replace("b", "")]


def _create(inventory: Inventory, session: Session, options: dict[str, str], target: str, given: str) -> int:
    kind = options.get("d", "zeroedthick")
    if os.path.exists(target):
        raise Failure("Failed to create virtual disk: The file already exists (39)")
    size_bytes = -(-_size(options["c"]) // 512) * 512
    if not os.path.isdir(os.path.dirname(target)):
        raise Failure("Failed to create virtual disk: The destination path is not valid (19)")
    if kind == "eagerzeroedthick":
        session.print(f"Creating disk '{given}' and zeroing it out...")
    new_disk(inventory, target, size_bytes, kind)
    session.print("Create: 100% done.")
    return 0


def new_disk(inventory: Inventory, target: str, size_bytes: int, kind: str, cid: str | None = None) -> None:
    """An empty base disk. Raises Failure where there is no room for one."""
    free = inventory.free_bytes(inventory.stores.of(target).uuid)
    if free < (1 << 20) or (kind != "thin" and size_bytes > free):
        raise Failure(f"Failed to create virtual disk: {NO_SPACE}.")
    flat = re.sub(r"\.vmdk$", "", target) + "-flat.vmdk"
    with open(flat, "xb") as file:
        file.truncate(size_bytes)
    Descriptor(
        "vmfs",
        "VMFS",
        os.path.basename(flat),
        size_bytes // 512,
        cid or f"{inventory.rng.getrandbits(32):08x}",
        extras=base_extras(size_bytes, inventory.rng, thin=kind == "thin", hardware="14"),
    ).write(target)


def _clone(inventory: Inventory, session: Session, options: dict[str, str], operands: list[str]) -> int:
    given = [options["i"], *operands]
    source, target = _place(inventory, session, given[0]), _place(inventory, session, given[1])
    kind = options.get("d", "zeroedthick")
    try:
        chain_files = descriptors(source)
    except (OSError, ValueError):
        raise Failure(f"DiskLib_Check() failed for source disk {NOT_A_DISK}.") from None
    for path, descriptor in chain_files:
        extent = os.path.join(os.path.dirname(path), descriptor.extent)
        if not os.path.exists(extent):
            raise Failure(f"DiskLib_Check() failed for source disk {NOT_A_DISK}.")
        if inventory.locked(extent):
            raise Failure(f"Failed to open '{given[0]}': {LOCKED}.")
    session.print(f"Destination disk format: {FORMATS.get(kind, FORMATS['zeroedthick'])}")
    session.print(f"Cloning disk '{given[0]}'...")
    if os.path.exists(target):
        raise Failure("Failed to clone disk: The file already exists (39).")
    size_bytes = chain_files[0][1].size_bytes
    used = sum(os.stat(os.path.join(os.path.dirname(p), d.extent)).st_blocks * 512 for p, d in chain_files)
    if inventory.free_bytes(inventory.stores.of(target).uuid) < used:
        raise Failure(f"Failed to clone disk : {NO_SPACE}.")
    new_disk(inventory, target, size_bytes, kind, cid=chain_files[-1][1].cid)
    chain = Chain.open(source)
    try:
        for percent in (10, 55):
            session.print(f"Clone: {percent}% done.", end="\r")
        chain.copy_to(re.sub(r"\.vmdk$", "", target) + "-flat.vmdk")
    finally:
        chain.close()
    session.print("Clone: 100% done.")
    return 0


def _grow(inventory: Inventory, session: Session, options: dict[str, str], target: str, given: str) -> int:
    flat = os.path.join(os.path.dirname(target), Descriptor.read(target).extent)
    if inventory.locked(flat, writing=True):
        raise Failure(f"Failed to extend the disk '{given}': {LOCKED}.")
    try:
        grow(target, _size(options["X"]))
    except ValueError as error:
        raise Failure(
            f"Failed to extend the disk : One of the parameters supplied is invalid (1): {error}"
        ) from None
    session.print("Grow: 100% done.")
    return 0


def _delete(inventory: Inventory, target: str) -> int:
    extent = os.path.join(os.path.dirname(target), Descriptor.read(target).extent)
    if inventory.locked(extent, writing=True):
        raise Failure(f"Failed to delete virtual disk: {LOCKED}.")
    os.unlink(extent)
    os.unlink(target)
    return 0


def _rename(inventory: Inventory, old: str, new: str) -> int:
    descriptor = Descriptor.read(old)
    extent = os.path.join(os.path.dirname(old), descriptor.extent)
    if inventory.locked(extent, writing=True):
        raise Failure(f"Failed to rename disk: {LOCKED}.")
    suffix = descriptor.extent.rpartition("-")[2]
    moved = re.sub(r"\.vmdk$", "", new) + f"-{suffix}"
    os.rename(extent, moved)
    os.unlink(old)
    Descriptor(
        descriptor.create_type,
        descriptor.extent_type,
        os.path.basename(moved),
        descriptor.sectors,
        descriptor.cid,
        descriptor.parent_cid,
        descriptor.parent,
        descriptor.extras,
    ).write(new)
    return 0


def _chain(session: Session, target: str) -> int:
    try:
        line = descriptors(target)
    except (OSError, ValueError):
        raise Failure(f"Failed to open virtual disk '{target}': {NOT_A_DISK}.") from None
    for (_, child), (_, parent) in itertools.pairwise(line):
        if child.parent_cid != parent.cid:
            raise Failure("Disk chain is not consistent : The parent virtual disk has been modified (18).")
    session.print("Disk chain is consistent.")
    return 0


def _check(inventory: Inventory, session: Session, what: str, target: str, given: str) -> int:
    try:
        descriptor = Descriptor.read(target)
    except ValueError:
        raise Failure(f"Failed to check disk '{given}': {NOT_A_DISK}.") from None
    extent = os.path.join(os.path.dirname(target), descriptor.extent)
    if not os.path.exists(extent):
        raise Failure(f"Failed to check disk '{given}': The system cannot find the file specified (25).")
    if inventory.locked(extent):
        raise Failure(f"Failed to check disk '{given}': {LOCKED}.")
    if descriptor.extent_type == "VMFS" and os.path.getsize(extent) != descriptor.size_bytes:
        raise Failure(f"Failed to check disk '{given}': The size of the extent does not match (3).")
    session.print("Disk is error free" if what == "check" else "Disk had no errors")
    return 0


def _query(session: Session, options: dict[str, str], target: str, given: str) -> int:
    descriptor = Descriptor.read(target)
    if "v" in options:
        for path, one in descriptors(target):
            session.print(f"DISKLIB-VMFS  : '{path}' : open successful (23) size = {one.size_bytes}, hd = 0.")
    if descriptor.extent_type == "VMFSRDM":
        physical = descriptor.create_type == "vmfsPassthroughRawDeviceMap"
        session.print(
            f"Disk {given} is a {'Passthrough' if physical else 'Non-passthrough'} Raw Device Mapping"
        )
        session.print("Maps to: vml.02000000006000c298")
    else:
        session.print(f"{given} is not an rdm")
    return 0


def _lock_state(inventory: Inventory, session: Session, target: str) -> int:
    mode = 0
    if inventory.locked(target):
        mode = 1
    elif inventory.locked(target, writing=True):
        mode = 2
    found = os.stat(target)
    owner = "00000000-00000000-0000-000000000000" if mode != 1 else "5e0026d9-a647150e-d8a8-4cedfb76e9d5"
    session.print(
        f"Lock [type 10c00001 offset 189792256 v 121, hb offset 3964928\ngen 43, mode {mode}, owner {owner} mtime "
        f"{int(found.st_mtime)}\nnum 0 gblnum 0 gblgen 0 gblbrk 0]"
    )
    if mode == 2:
        session.print("RO Owner[0] HB Offset 3964928 5e0026d9-a647150e-d8a8-4cedfb76e9d5")
    session.print(
        f"Addr <4, 309, {found.st_ino % 4096}>, gen 13, links 1, type reg, flags 0, uid 0, gid 0, mode 600"
    )
    session.print(
        f"len {found.st_size}, nb {found.st_blocks // 2048} tbz 0, cow 0, newSinceEpoch 0, zla 3, bs 1048576"
    )
    return 0


def _block_map(inventory: Inventory, session: Session, target: str) -> int:
    """Where the disk's blocks of a megabyte are. No full sample of a real host is known: the shape is a guess."""
    descriptor = Descriptor.read(target)
    flat = os.path.join(os.path.dirname(target), descriptor.extent)
    if inventory.locked(flat):
        raise Failure(f"Failed to open '{os.path.basename(target)}': {LOCKED}.")
    block = 1 << 20
    session.print(
        f"Mapping for file {inventory.stores.host_path(target)} ({descriptor.size_bytes} bytes in size):"
    )
    with open(flat, "rb") as file:
        offset = 0
        while offset < descriptor.size_bytes:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA) // block * block
                stop = -(-os.lseek(file.fileno(), max(start, offset), os.SEEK_HOLE) // block) * block
            except OSError:
                start = stop = descriptor.size_bytes
            stop = min(stop, descriptor.size_bytes)
            if start > offset:
                session.print(
                    f"[{offset:12}:{start - offset:12}] --> [NOMP --          :             -->           ]"
                )
            if stop > start:
                place = 0x10000000 + start
                session.print(
                    f"[{start:12}:{stop - start:12}] --> [VMFS -- LVID:5e0026d9-a647150e-d8a8-4cedfb76e9d5/"
                    f"1:( {place:12} --> {place + stop - start:12})]"
                )
            offset = max(stop, offset + 1)
    return 0
