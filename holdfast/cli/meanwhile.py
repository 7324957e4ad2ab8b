"""What a command does while it waits for another host: it loads what it will need.

A login and the start of a program over there take half a second. So that is begun first, in a thread, and as soon as the address is
known; loading the engine takes a good part of that time. Modules are loaded once, whoever comes first, so it does not matter when
that ends, or whether it fails: the command imports what it needs itself, and fails there if it has to.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.repo.place import Place

__all__ = ["imported_meanwhile", "reached_meanwhile"]


@contextlib.contextmanager
def reached_meanwhile(address: str, *, index: bool) -> Iterator[Callable[[], Place] | None]:
    """What waits for the place at an address on another host, which is being reached and opened; None for one that is here.

    Args:
        index: its index is needed for certain, so it is opened, too.
    """
    from holdfast.ssh.address import parse_place

    far = parse_place(address)
    if far is None:
        yield None
        return
    from holdfast.repo.wire.reach import Reaching

    with contextlib.closing(Reaching(far, index=index)) as reaching:
        yield reaching.place


@contextlib.contextmanager
def imported_meanwhile(modules: Sequence[str], *addresses: str | None) -> Iterator[None]:
    """Loads modules, and all that they need, beside what is done within, if an address is on another host."""
    from holdfast.ssh.address import parse_place

    if not modules or not any(address and parse_place(address) for address in addresses):
        yield
        return
    loading = threading.Thread(target=_load, args=(modules,), name="holdfast-import", daemon=True)
    loading.start()
    try:
        yield
    finally:
        loading.join()


def _load(modules: Sequence[str]) -> None:
    for module in modules:
        with contextlib.suppress(Exception):  # whoever needs it imports it again, and is told
            importlib.import_module(module)
