# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""The gate: what a key that is limited to the agent may ask for. Held against every request, on the host.

The level stands in the host's own authorized_keys, in the command that the key is bound to, beside the hash of
this program; nothing that the near side sends can change either.

    backup     look at VMs, read their files, make and remove snapshots with our names, switch VMs off and on
    restore    and make new VMs: write into folders that hold our marker, register what was made in this session
    in-place   and write into the flat files of disks of VMs that are there

Invariants. A path counts as what it is after links were followed, and has to lie on a datastore, never on one
of the host's own volumes (its boot banks hold the hashes of its passwords). A file is read only if it is a
disk or lies in a folder with a VM. A folder is written to only as long as it holds the marker, and only the agent
sets markers, in folders that it makes; so nothing that existed before is written to, but for disks at level `in-place`.
No descriptor of a disk is ever taken from outside: the host's own tool makes them, so none leads out of its folder.
"""

import os
import re
import stat
from typing import Any, List, Optional, Set

from holdfast.esxi.agent.files import as_bytes, as_text
from holdfast.esxi.agent.naming import CONTROL, NOT_PUT, Refused, is_descriptor, is_name, shown
from holdfast.esxi.agent.ownvmx import MAX_VMX_BYTES, require_own_files

LEVELS = ("backup", "restore", "in-place")
MARKER = "HOLDFAST-INCOMPLETE.txt"
SNAPSHOT_NAME = r"holdfast-[0-9a-f]{12}"
SNAPSHOT_NOTE = "Holdfast is backing this VM up"

_OWN_LABELS = ("BOOTBANK", "OSDATA-", "LOCKER-")
_OWN_LINKS = ("/bootbank", "/altbootbank", "/scratch", "/locker", "/store")
_MAX_PATH = 4096
_MAX_DESCRIPTOR_BYTES = 64 << 10
_MAX_PUT_BYTES = 128 << 20
_CD_IMAGES_OF_HOST = ("/usr/lib/vmware/isoimages/", "/vmimages/tools-isoimages/")
_UUID_LINE = re.compile(rb'ddb\.uuid = "[0-9a-fA-F]{2}(?:[ -][0-9a-fA-F]{2}){15}"')


class Gate(object):
    """What a key of one level may touch. Methods return the real path, or raise Refused.

    Args:
        root: where the datastores are.
    """

    def __init__(self, level: str, root: str = "/vmfs/volumes") -> None:
        if level not in LEVELS:
            raise ValueError("no level is called %r" % (level,))
        self.level = level
        self._prefix = root + "/"
        self._root = _real(root) + "/"
        self._own = None  # type: Optional[Set[str]]
        self._completed = set()  # type: Set[str]

    def require(self, level: str, what: str) -> None:
        """Raises Refused if the key's level is lower than that."""
        if LEVELS.index(self.level) < LEVELS.index(level):
            raise Refused(
                "%s needs a key of the level '%s', and this one has '%s'" % (what, level, self.level)
            )

    def place(self, path: Any) -> str:
        """The real path of something on a datastore, which need not exist. Its metadata may be looked at."""
        parts = path[len(self._prefix) :].split("/") if isinstance(path, str) else []
        if (
            not isinstance(path, str)
            or not path.startswith(self._prefix)
            or len(path) > _MAX_PATH
            or any(part in ("", ".", "..") or CONTROL.search(part) for part in parts)
        ):
            raise Refused("only plain paths below %s are open to it" % self._prefix, shown(path))
        real = _real(path)
        if not real.startswith(self._root):
            raise Refused("it leads out of the datastores", path)
        if real[len(self._root) :].split("/")[0] in self._own_volumes():
            raise Refused("that is a volume of the host's own", path)
        return real

    def readable(self, path: Any) -> str:
        """A file that belongs to a VM."""
        real = self.place(path)
        os.lstat(as_bytes(real))  # that there is nothing is no refusal
        names = _names(os.path.dirname(real))
        if not real.lower().endswith(".vmdk") and MARKER not in names and not _has(names, ".vmx"):
            raise Refused("only disks, and files beside a .vmx, are open to it", path)
        return self._deep(real, path)

    def listable(self, path: Any) -> str:
        """A folder that belongs to a VM."""
        real = self.place(path)
        os.lstat(as_bytes(real))
        names = _names(real)
        if MARKER not in names and not _has(names, ".vmx") and not _has(names, ".vmdk"):
            raise Refused("only folders with a VM or a disk in them are open to it", path)
        return real

    def writable(self, path: Any) -> str:
        """A flat file that may be written to."""
        real = self._deep(self.place(path), path)
        if not real.endswith("-flat.vmdk"):
            raise Refused("only flat files of disks can be written to", path)
        if self.level != "in-place" or self._is_marked(os.path.dirname(real)):
            self.marked(os.path.dirname(real), path)
        return real

    def marked(self, folder: str, path: Any) -> None:
        """Returns if a folder (a real path) may be written to: it holds our marker."""
        self.require("restore", "writing")
        if not self._is_marked(folder):
            raise Refused("only folders that hold %s can be written to" % MARKER, shown(path))

    def new_folder(self, path: Any) -> str:
        """A folder that is to be made, on top of a datastore."""
        self.require("restore", "making a folder")
        real = self.place(path)
        if "/" in real[len(self._root) :].partition("/")[2] or not is_name(os.path.basename(real)):
            raise Refused("folders are only made on top of a datastore, with plain names", path)
        return self._deep(real, path)

    def disk(self, path: Any) -> str:
        """The descriptor, which need not exist, of a disk that the host's tool may make, check or remove."""
        real = self._deep(self.place(path), path)
        self.marked(os.path.dirname(real), path)
        name = os.path.basename(real)
        if not is_name(name) or not is_descriptor(name):
            raise Refused("that is no name for a disk", path)
        return real

    def put(self, path: Any, offset: int, data: bytes) -> str:
        """A small file that may be written; of a descriptor only the line with its UUID may change.

        To be held against `still` again when it is open.
        """
        real = self._deep(self.place(path), path)
        self.marked(os.path.dirname(real), path)
        name = os.path.basename(real)
        if not is_name(name) or name == MARKER or name.lower().endswith(NOT_PUT):
            raise Refused("a file of that name is not written", path)
        if not _may_become_file(real) or offset + len(data) > _MAX_PUT_BYTES:
            raise Refused("that is no small file", path)
        if name.lower().endswith(".vmdk") and (offset or not _same_but_for_uuid(real, data)):
            raise Refused("of the descriptor of a disk only the line with its UUID can change", path)
        return real

    def still(self, real: str) -> None:
        """Returns if the folder of a file, which is open for writing by now, can be written to still.

        Another agent may have completed it meanwhile. `registrable` puts a new file in place of the .vmx after the marker is
        gone: so what was opened before that is not what counts, and what is opened after it does not get past here.
        """
        self.marked(os.path.dirname(real), real)

    def complete(self, path: Any) -> str:
        """A folder that is to lose its marker; from then on it can not be written to, but registered."""
        real = self._deep(self.place(path), path)
        self.marked(real, path)
        self._completed.add(real)
        return real

    def registrable(self, path: Any) -> None:
        """Returns if a VM may be registered: made in this session, and all its files are in its folder.

        Its .vmx is a new file then, which nobody has open.
        """
        self.require("restore", "registering a VM")
        real = self._deep(self.place(path), path)
        folder, name = os.path.split(real)
        if folder not in self._completed or self._is_marked(folder) or not name.endswith(".vmx"):
            raise Refused("only VMs that were restored over this connection are registered", path)
        with open(as_bytes(real), "rb") as file:
            vmx = file.read(MAX_VMX_BYTES + 1)
        require_own_files(vmx, path, self._is_image)
        _replace(real, vmx)

    def _is_image(self, path: str) -> bool:
        """Whether a VM may have this file in its CD drive: an image on a datastore, or one of the host's own for that."""
        try:
            real = self.place(path)
        except Refused:
            real = _real(path)
            if not real.startswith(tuple(_real(folder) + "/" for folder in _CD_IMAGES_OF_HOST)):
                return False
        return real.lower().endswith(".iso")

    def _deep(self, real: str, path: str) -> str:
        if "/" not in real[len(self._root) :]:
            raise Refused("that is a datastore as a whole", path)
        return real

    def _is_marked(self, folder: str) -> bool:
        try:
            return stat.S_ISREG(os.lstat(as_bytes(folder + "/" + MARKER)).st_mode)
        except OSError:
            return False

    def _own_volumes(self) -> Set[str]:
        """Names of the volumes that are the host's own."""
        if self._own is None:
            paths = [self._root + name for name in _names(self._root) if name.startswith(_OWN_LABELS)]
            reals = [_real(path) for path in paths + list(_OWN_LINKS)]
            # /scratch may be a folder on a datastore: that does not make the datastore the host's own.
            self._own = {
                real[len(self._root) :]
                for real in reals
                if real.startswith(self._root) and "/" not in real[len(self._root) :]
            }
        return self._own


def _replace(path: str, data: bytes) -> None:
    """Puts a new file with that content in place of another one."""
    new = path + "." + "".join("%02x" % byte for byte in os.urandom(8))
    descriptor = os.open(as_bytes(new), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(as_bytes(new), as_bytes(path))


def _same_but_for_uuid(path: str, data: bytes) -> bool:
    try:
        with open(as_bytes(path), "rb") as file:
            before = file.read(_MAX_DESCRIPTOR_BYTES + 1)
    except OSError:
        return False
    if max(len(before), len(data)) > _MAX_DESCRIPTOR_BYTES:
        return False
    old, new = ([line.rstrip() for line in text.splitlines()] for text in (before, data))
    added = [line for line in new if line.startswith(b"ddb.uuid")]
    return (
        len(added) <= 1
        and all(_UUID_LINE.fullmatch(line) for line in added)
        and [line for line in old if not line.startswith(b"ddb.uuid")]
        == [line for line in new if not line.startswith(b"ddb.uuid")]
    )


def _may_become_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(as_bytes(path)).st_mode)
    except OSError:
        return True  # there is nothing; what else is wrong will show when it is opened


def _real(path: str) -> str:
    return as_text(os.path.realpath(as_bytes(path)))


def _names(folder: str) -> List[str]:
    try:
        return [as_text(name) for name in os.listdir(as_bytes(folder))]
    except OSError:
        return []


def _has(names: List[str], ending: str) -> bool:
    return any(name.lower().endswith(ending) for name in names)
