# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""Names of the files that a limited key may have made on the host, and the refusal of all that it may not do."""

import errno
import re
from typing import Any

from holdfast.esxi.agent.files import as_bytes

_MAX_NAME = 200
CONTROL = re.compile("[\x00-\x1f\x7f]")
# What would lead the host elsewhere, or is the host's own business. Disks are made by vmkfstools.
NOT_PUT = (
    ".vmsd", ".vmsn", ".vmss", ".vmem", ".vmtx", ".vswp", ".lck", ".log", "-flat.vmdk", "-delta.vmdk", "-sesparse.vmdk",
)  # fmt: skip


class Refused(OSError):
    """The key may not do that."""

    is_refusal = True

    def __init__(self, message: str, path: str = "") -> None:
        OSError.__init__(self, errno.EPERM, message, path)


def is_name(name: str) -> bool:
    """Whether a new file or folder may be called so."""
    plain = 0 < len(as_bytes(name)) <= _MAX_NAME and "/" not in name and not CONTROL.search(name)
    return plain and name[0] not in ".-[ "


def is_descriptor(name: str) -> bool:
    """Whether a file of that name is the descriptor of a disk that stands alone."""
    return name.lower().endswith(".vmdk") and not name.lower().endswith(NOT_PUT)


def shown(value: Any) -> str:
    """What was asked for, as it is told to the one who asked; short."""
    return value[:200] if isinstance(value, str) else repr(value)[:200]
