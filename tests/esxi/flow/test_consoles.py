"""The contract of a host's console, over the shell and over the agent of a limited key: the same questions, the same answers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.errors import DiskFull, SourceFormat, SourceNotFound, StorageError
from holdfast.esxi.console import Console
from holdfast.esxi.host import HostSession
from holdfast.esxi.hosts import HostBook

if TYPE_CHECKING:
    from tests.esxi.flow.conftest import Desk
    from tests.esxi_host.standin import VmState

pytestmark = pytest.mark.root


def test_both_consoles_keep_to_the_contract(desk: Desk) -> None:
    vm = desk.host.add_vm("it's (2) $HOME ü", disks=[1 << 20], annotation="two\nlines")
    desk.link("esx2", "--restrict", "restore")
    book = HostBook(str(desk.config))
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(HostSession(book, book.get(name))) for name in ("esx1", "esx2")]
        assert [session.level() for session in sessions] == ["", "restore"]
        consoles = [session.console for session in sessions]
        for console in consoles:
            commands(console)
            looking(console, vm)
        shell, limited = (console.listing(vm.folder) for console in consoles)
        assert shell == limited
        for console, name in zip(consoles, ("by shell", "by agent"), strict=True):
            writing(console, desk, f"{vm.folder.rpartition('/')[0]}/{name}")


def commands(console: Console) -> None:
    assert console.python().startswith("3.")
    assert "two" in console.look(("vim-cmd", "vmsvc/getallvms"), "listing", str)
    missing = console.act(("vim-cmd", "vmsvc/get.config", "999"), "asking")
    assert missing.status != 0
    assert "vim.fault.NotFound" in missing.text
    both = console.act(("uname", "-a"), "asking", together=True)
    assert both.status == 0


def looking(console: Console, vm: VmState) -> None:
    data = console.read(vm.vmx, 1 << 20)
    assert b"displayName" in data
    assert console.read(vm.vmx, len(data)) == data
    with pytest.raises(SourceFormat, match="longer"):
        console.read(vm.vmx, len(data) - 1)
    for gone in (f"{vm.folder}/gone.vmx", f"{vm.folder}-gone/gone.vmx"):
        with pytest.raises(SourceNotFound):
            console.read(gone, 100)
        assert not console.exists(gone)
    assert console.exists(vm.vmx)
    assert console.exists(vm.folder)
    with pytest.raises(SourceNotFound):
        console.listing(f"{vm.folder}-gone")
    (flat,) = [file for file in console.listing(vm.folder) if file.name.endswith("-flat.vmdk")]
    assert (flat.size_bytes, flat.is_file, flat.is_folder) == (1 << 20, True, False)


def writing(console: Console, desk: Desk, folder: str) -> None:
    console.make_folder(folder, b"not complete")
    assert console.read(f"{folder}/HOLDFAST-INCOMPLETE.txt", 100) == b"not complete"
    with pytest.raises(StorageError, match="exists"):
        console.make_folder(folder, b"again")
    for data in (b"", b"first, and longer", b"second", bytes(range(256)) * 8192):
        console.put(f"{folder}/vm.nvram", data)
        assert console.read(f"{folder}/vm.nvram", max(len(data), 1)) == data
    desk.host.faults.set("datastore_full", "datastore1")
    with pytest.raises(DiskFull, match="full"):
        console.put(f"{folder}/more.nvram", b"x" * 5000)
    desk.host.faults.clear("datastore_full")
    console.complete(folder)
    assert not Path(desk.host.path(f"{folder}/HOLDFAST-INCOMPLETE.txt")).exists()
