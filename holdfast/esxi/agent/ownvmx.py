# The Python of a hypervisor host may be as old as 3.5: no f-strings, no annotated variables, no list[int].
"""What the .vmx of a VM may say that a limited key has the host register: nothing but files of the VM's own.

The host reads that file as root, and opens what it names. So each line has to be clear, or another reader could
understand it otherwise; a disk lies in the VM's own folder, where the host's tool has made it; and devices and services of
the host stay out.
"""

import re
from typing import Callable, Dict

from holdfast.esxi.agent.naming import Refused, is_descriptor, is_name, shown

MAX_VMX_BYTES = 1 << 20
_VMX_LINE = re.compile(r'[ \t]*([A-Za-z0-9_.:\-]+)[ \t]*=[ \t]*"([^"]*)"[ \t]*')
_VMX_ESCAPE = re.compile(r"\|([0-9A-Fa-f]{2})")
_DEVICE_FILE = re.compile(r"([a-z]+\d+:\d+)\.(?:filename|redo)")
_CD_IMAGE = "cdrom-image"
_CD_DRIVES = ("cdrom-raw", "atapi-cdrom")
_FREE_TEXT = re.compile(r"annotation|displayname|guestinfo\..*|guestos\..*|guest\..*|tools\..*")
# Would give the VM devices or services of the host, or start it from a state that was made up.
_NOT_REGISTERED = re.compile(
    r"pcipassthru\d.*|checkpoint\.vmstate.*|usb.*\.autoconnect\..*|vmci\d*\.(?:unrestricted|filter.*)"
)
# In these, what is a slash, a dot or a quote to us is one to the host.
_ENCODING = re.compile(
    r"utf-8|us-ascii|windows-\d{3,4}|iso-8859-\d{1,2}|gbk|gb2312|gb18030|big5|shift_jis|euc-(?:jp|kr|cn|tw)"
)


def require_own_files(vmx: bytes, path: str, is_image: Callable[[str], bool]) -> None:
    """Returns if a .vmx names no file outside of its folder, but images of CDs, and no device of the host.

    Args:
        is_image: whether a path is that of an image of a CD.

    Raises:
        Refused: it does, or is not clear.
    """
    pairs = _pairs_in(vmx, path)
    for key, value in sorted(pairs.items()):
        device = _DEVICE_FILE.fullmatch(key)
        if device is not None:
            kind = pairs.get(device.group(1) + ".devicetype", "").lower()
            is_own = _may_hold(kind, value, is_image) or (key.endswith(".redo") and not value)
        elif _NOT_REGISTERED.fullmatch(key) is not None:
            is_own = value.lower() in ("", "false")
        elif key == ".encoding":
            is_own = _ENCODING.fullmatch(value.lower()) is not None
        else:
            is_own = _FREE_TEXT.fullmatch(key) is not None or not _is_elsewhere(value)
        if not is_own:
            raise Refused('its .vmx names what is not its own: %s = "%s"' % (key, shown(value)), path)


def _pairs_in(vmx: bytes, path: str) -> Dict[str, str]:
    """What a .vmx says, by keys in small letters. Raises Refused where another reader could understand it otherwise."""
    if len(vmx) > MAX_VMX_BYTES:
        raise Refused("the .vmx is too long", path)
    pairs = {}  # type: Dict[str, str]
    for line in re.split(r"\r\n|\r|\n", vmx.decode("latin-1")):
        if not line.strip(" \t") or line.startswith("#"):
            continue
        match = _VMX_LINE.fullmatch(line)
        if match is None or match.group(1).lower() in pairs:
            raise Refused("the .vmx has a line that is not clear: %s" % shown(line), path)
        value = _VMX_ESCAPE.sub(lambda escape: chr(int(escape.group(1), 16)), match.group(2))
        pairs[match.group(1).lower()] = value
    return pairs


def _may_hold(kind: str, value: str, is_image: Callable[[str], bool]) -> bool:
    """Whether a drive of that kind may hold that file: a disk of the VM's own, for all but CD drives."""
    if kind == _CD_IMAGE:
        return is_image(value) or (is_name(value) and value.lower().endswith(".iso"))
    if kind in _CD_DRIVES:
        return not _is_elsewhere(value) or (
            value.startswith("/vmfs/devices/cdrom/") and ".." not in value.split("/")
        )
    return is_name(value) and is_descriptor(value)


def _is_elsewhere(value: str) -> bool:
    return value.startswith(("/", "[")) or ".." in value.split("/")
