"""What is sent to a host: the command that starts its Python, and the program that this Python then reads.

The command is a bootstrap of some hundred bytes, as command lines are limited and quoting is fragile. It says that it is ready
(so that what a host prints at login is told from the agent), reads the program by its stated length, verifies it and runs it.
Nothing is written to the host, compiled files neither (`-B`).
"""

from __future__ import annotations

import functools
import importlib.resources
import shlex
import zlib
from typing import Final

from holdfast.esxi.agent.frames import READY

__all__ = ["bootstrap_command", "program"]

_MODULES: Final = (
    ("holdfast.chunker", "aligned_plain"),
    ("holdfast.esxi.agent", "frames"),
    ("holdfast.esxi.agent", "cuts"),
    ("holdfast.esxi.agent", "files"),
    ("holdfast.esxi.agent", "deflating"),
    ("holdfast.esxi.agent", "serve"),
)

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


def bootstrap_command(python: str = "python3") -> str:
    """The shell command that starts the agent on a host.

    Args:
        python: the host's interpreter.
    """
    return f"exec {shlex.quote(python)} -B -s -E -c {shlex.quote(_BOOTSTRAP)}"


@functools.cache
def program() -> bytes:
    """What the bootstrap reads: a line with length and checksum, and the program, deflated."""
    source = [_LOADER]
    for package, name in _MODULES:
        text = importlib.resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")
        source.append(f"{name} = load({package!r}, {name!r}, {text!r})\n")
    source.append("serve.main(aligned_plain)\n")
    packed = zlib.compress("".join(source).encode(), 9)
    return b"%d %d\n" % (len(packed), zlib.crc32(packed)) + packed
