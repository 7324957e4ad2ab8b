"""Which keys a host accepts: ours is added to its authorized_keys file, or taken out again; all others stay.

One shell script does it over there, in one go, with nothing but what ESXi's busybox and every Unix have. It writes the new
content beside the file, checks that exactly our line is the difference, and renames; where renaming is not possible it
writes into the file. The file keeps its owner and permissions; a link is followed. Whatever fails before the rename, the old file is still there.

A key is recognised by its own bytes, not by its comment, so adding it again replaces its options and removing it works
whatever the line looks like. Done twice, nothing changes.
"""

from __future__ import annotations

import re
import shlex
from typing import Final

from holdfast.errors import LinkError
from holdfast.ssh.keys import PublicKey
from holdfast.ssh.link import Link, printable

__all__ = ["USUAL_PLACE", "admit", "knows_restrict", "withdraw"]

USUAL_PLACE: Final = "~/.ssh/authorized_keys"

_SCRIPT: Final = r"""set -eu
umask 077
f=@PLACE@
key=@KEY@
line=@LINE@
case $f in "~/"*) f=$HOME/${f#??} ;; esac
if [ -L "$f" ]; then f=$(readlink -f "$f"); fi
if [ -e "$f" ] && [ ! -f "$f" ]; then echo "$f is not a file" >&2; exit 1; fi
lines() { awk -v key="$key" 'index($0, key) == 0' "$1"; }
count() { echo $(($(lines "$1" | wc -l))); }  # no tr on ESXi
had=0
if [ -f "$f" ]; then had=$(grep -c -F -e "$key" "$f" || true); fi
if [ -z "$line" ] && [ "$had" = 0 ]; then echo holdfast-absent; exit 0; fi
if [ -n "$line" ] && [ "$had" = 1 ] && grep -q -x -F -e "$line" "$f"; then echo holdfast-present; exit 0; fi
d=${f%/*}
if [ ! -d "$d" ]; then mkdir -p "$d"; fi
t=$f.holdfast.$$
trap 'rm -f "$t"' EXIT
trap 'exit 1' HUP INT TERM
others=0
if [ -f "$f" ]; then
    others=$(count "$f")
    cp -p "$f" "$t"
    lines "$f" >"$t"
else
    : >"$t"
fi
if [ -n "$line" ]; then printf '%s\n' "$line" >>"$t"; fi
now=$(grep -c -F -e "$key" "$t" || true)
if [ -n "$line" ]; then want=1; else want=0; fi
if [ "$(count "$t")" != "$others" ] || [ "$now" != "$want" ]; then
    echo "the new file could not be written completely beside $f; is the disk full?" >&2
    exit 1
fi
mv -f "$t" "$f" 2>/dev/null || cat "$t" >"$f"
sync
echo holdfast-changed
"""


def admit(
    link: Link,
    key: PublicKey,
    place: str = USUAL_PLACE,
    *,
    command: str = "",
    restrict: bool = False,
    spelled_out: bool = False,
) -> bool:
    """Makes the host accept `key`; whether anything had to be changed for that.

    Args:
        place: the authorized_keys file over there; `~/` is the home folder.
        command, restrict, spelled_out: as for `PublicKey.line`.

    Raises:
        LinkError: it could not be done, and nothing was changed.
    """
    line = key.line(command=command, restrict=restrict, spelled_out=spelled_out)
    return _changed(link, key, place, line)


def knows_restrict(server: str) -> bool:
    """Whether a server knows the option `restrict`, by what it calls itself. OpenSSH does since 7.2.

    One that does not refuses the whole line.
    """
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", server)
    return version is None or (int(version[1]), int(version[2])) >= (7, 2)


def withdraw(link: Link, key: PublicKey, place: str = USUAL_PLACE) -> bool:
    """Makes the host no longer accept `key`; whether it did before.

    Raises:
        LinkError: it could not be done, and nothing was changed.
    """
    return _changed(link, key, place, "")


def _changed(link: Link, key: PublicKey, place: str, line: str) -> bool:
    script = (
        _SCRIPT.replace("@PLACE@", shlex.quote(place))
        .replace("@KEY@", shlex.quote(key.encoded))
        .replace("@LINE@", shlex.quote(line))
    )
    result = link.run("sh -s", script.encode()).checked(f"changing {place}")
    said = result.stdout.split()[-1:]
    if said not in ([b"holdfast-changed"], [b"holdfast-present"], [b"holdfast-absent"]):
        raise LinkError(
            f"{link.address} did not run our script but said: {printable(result.stdout) or 'nothing'}",
            hint="its login shell, or a forced command for this key, keeps commands from running",
        )
    return said == [b"holdfast-changed"]
