"""What is sent to a host: the command that starts its Python, and the program that this Python then reads.

The command is a bootstrap of some hundred bytes, as command lines are limited and quoting is fragile. It says that it is ready
(so that what a host prints at login is told from the agent), reads the program by its stated length, verifies it and runs it.
Nothing is written to the host, compiled files neither (`-B`).

There are two of it. One goes over the channel before the program, for keys that have a shell. The other one stands in the
host's authorized_keys as all that a key can do (`pinned_command`): it says beforehand which program it takes and on what level, and
runs that one and no other. What is hashed is the program before it is deflated, since zlib's output is not the same everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import re
import shlex
import zlib
from dataclasses import dataclass
from typing import Final, Literal

from holdfast.esxi.agent.frames import READY
from holdfast.esxi.agent.gate import LEVELS

__all__ = [
    "REFUSAL",
    "Level",
    "Pin",
    "bootstrap_command",
    "pin_in",
    "pinned_command",
    "program",
    "program_hash",
]

Level = Literal["backup", "restore", "in-place"]

REFUSAL: Final = "this key runs one version of the agent of Holdfast, and nothing else"
"""What a host says to whoever asks for anything else."""

_MODULES: Final = (
    ("holdfast.chunker", "aligned_plain"),
    ("holdfast.esxi.agent", "frames"),
    ("holdfast.esxi.agent", "cuts"),
    ("holdfast.esxi.agent", "files"),
    ("holdfast.esxi.agent", "deflating"),
    ("holdfast.esxi.agent", "serve"),
)
_LIMITED_MODULES: Final = tuple(
    ("holdfast.esxi.agent", name) for name in ("naming", "ownvmx", "gate", "allowed", "tools")
)
_MAX_PROGRAM_BYTES: Final = 1 << 20

_BOOTSTRAP: Final = (
    "import sys,zlib\n"
    "i=sys.stdin.buffer\n"
    "o=sys.stdout.buffer\n"
    f'o.write(b"\\n{READY.decode()} "+("%d.%d"%sys.version_info[:2]).encode()+b"\\n")\n'
    "o.flush()\n"
    "n,c=map(int,i.readline(100).split())\n"
    "d=i.read(n)\n"
    "if len(d)!=n or zlib.crc32(d)&0xffffffff!=c:sys.exit(9)\n"
    'exec(compile(zlib.decompress(d),"holdfast-agent","exec"),{"__name__":"__main__"})\n'
)

# One line, as it stands in authorized_keys. Whoever has the key may send anything, so nothing here trusts a length.
_PINNED: Final = (
    "import sys,zlib,hashlib;i=sys.stdin.buffer;o=sys.stdout.buffer;"
    f'o.write(("\\n{READY.decode()} %d.%d @LEVEL @HASH\\n"%sys.version_info[:2]).encode());o.flush();'
    "h=i.readline(100).split();n=int(h[0])if h and h[0].isdigit()else 0;"
    f"d=i.read(min(n,{_MAX_PROGRAM_BYTES}));"
    f'd=zlib.decompressobj().decompress(d,{_MAX_PROGRAM_BYTES})if d else b"";'
    f'hashlib.sha256(d).hexdigest()=="@HASH"or sys.exit("{REFUSAL}");'
    'exec(compile(d,"holdfast-agent","exec"),{"__name__":"__main__","LEVEL":"@LEVEL"})'
)
_PIN: Final = re.compile(r"\d+\.\d+ ([a-z-]{1,20}) ([0-9a-f]{64})")

_LOADER: Final = """\
import sys, types
def load(package, name, text):
    parts = package.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if path not in sys.modules:
            sys.modules[path] = types.ModuleType(path)
            sys.modules[path].__path__ = []
    module = types.ModuleType(package + "." + name)
    sys.modules[module.__name__] = module
    setattr(sys.modules[package], name, module)
    exec(compile(text, name, "exec"), module.__dict__)
    return module
"""


@dataclass(frozen=True, slots=True)
class Pin:
    """What a key is limited to, as the host's own command says.

    Args:
        level: one of `gate.LEVELS`, or the word of a later version.
        hash: SHA-256 of the only program that it runs, in hexadecimal.
    """

    level: str
    hash: str

    @property
    def is_present(self) -> bool:
        """Whether that program is ours."""
        return self.hash == program_hash()


def bootstrap_command(python: str = "python3") -> str:
    """The shell command that starts the agent on a host.

    Args:
        python: the host's interpreter.
    """
    return f"exec {shlex.quote(python)} -B -s -E -c {shlex.quote(_BOOTSTRAP)}"


def pinned_command(level: Level, python: str = "python3") -> str:
    """The shell command that runs this version's agent on that level, and nothing else; without line ends."""
    assert level in LEVELS
    text = _PINNED.replace("@LEVEL", level).replace("@HASH", program_hash())
    return f"exec {shlex.quote(python)} -B -I -c {shlex.quote(text)}"


def pin_in(words: str) -> Pin | None:
    """What the bootstrap says of itself behind `frames.READY`; None if the key is not limited."""
    match = _PIN.fullmatch(words.strip())
    return Pin(match[1], match[2]) if match is not None else None


@functools.cache
def program_hash() -> str:
    """By what a host knows the program for limited keys: SHA-256 of it, in hexadecimal."""
    return hashlib.sha256(_source(limited=True)).hexdigest()


@functools.cache
def program(*, limited: bool = False) -> bytes:
    """What the bootstrap reads: a line with length and checksum, and the program, deflated.

    Args:
        limited: the one for keys that are limited to the agent, which has the gate in it.
    """
    packed = zlib.compress(_source(limited=limited), 9)
    return b"%d %d\n" % (len(packed), zlib.crc32(packed)) + packed


def _source(*, limited: bool) -> bytes:
    source = [_LOADER]
    for package, name in (*_MODULES, *(_LIMITED_MODULES if limited else ())):
        text = importlib.resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")
        source.append(f"{name} = load({package!r}, {name!r}, {text!r})\n")
    source.append(f"serve.main(aligned_plain{', tools, LEVEL' if limited else ''})\n")
    data = "".join(source)
    # Beyond ASCII, how a text is written as a literal depends on the version of Python, and so would the hash.
    assert data.isascii() and len(data) < _MAX_PROGRAM_BYTES  # noqa: PT018
    return data.encode()
