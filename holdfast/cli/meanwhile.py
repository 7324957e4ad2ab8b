"""Imports what a command will need while it waits for another host.

A login and the start of a program over there take half a second, in which nothing is done here; loading the engine takes
a good part of that. Modules are loaded once, whoever comes first, so it does not matter when this ends, or whether it fails: the
command imports what it needs itself, and fails there if it has to.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator

__all__ = ["imported_meanwhile"]


@contextlib.contextmanager
def imported_meanwhile(module: str, *addresses: str | None) -> Iterator[None]:
    """Loads a module, and all that it needs, beside what is done within, if an address is on another host.

    Args:
        module: empty: none.
    """
    from holdfast.ssh.address import parse_place

    if not module or not any(address and parse_place(address) for address in addresses):
        yield
        return
    loading = threading.Thread(target=_load, args=(module,), name="holdfast-import", daemon=True)
    loading.start()
    try:
        yield
    finally:
        loading.join()


def _load(module: str) -> None:
    with contextlib.suppress(Exception):  # whoever needs it imports it again, and is told
        importlib.import_module(module)
