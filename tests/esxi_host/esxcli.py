"""`esxcli`, `vmware`, `vsish` and `vdf`: what the host says about itself, its storage and its processes."""

from __future__ import annotations

import csv
import io
import json

from tests.esxi_host.inventory import Inventory
from tests.esxi_host.session import Session

VERSIONS = {
    "7.0": ("7.0.3", "21686933", "3", "VMware ESXi 7.0 Update 3"),
    "8.0": ("8.0.2", "22380479", "2", "VMware ESXi 8.0 Update 2"),
}
Row = dict[str, str | int | bool]


def run(inventory: Inventory, session: Session) -> int:
    """The exit code of `esxcli`."""
    formatter = ""
    words = list(session.arguments)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word.startswith("--formatter"):
            formatter = word.partition("=")[2] or (words.pop(0) if words else "")
    command = " ".join(words)
    if command == "system version get":
        _record(session, formatter, "VersionGet", version(session.release))
    elif command == "storage filesystem list":
        _table(session, formatter, "VmfsFileSystemList", filesystems(inventory), right={"Size", "Free"})
    elif command == "vm process list":
        _processes(inventory, session, formatter)
    elif command == "system hostname get":
        name = inventory.options.name
        row: Row = {"Domain Name": "", "Fully Qualified Domain Name": name, "Host Name": name}
        _record(session, formatter, "HostNameGet", row)
    elif command == "system uuid get":
        session.print("5e0026d9-a647-150e-d8a8-4cedfb76e9d5")
    elif command == "system time get":
        session.print(f"{inventory.now():%Y-%m-%dT%H:%M:%SZ}")
    elif command == "hardware memory get":
        session.print(
            "   Physical Memory: 17179398144 Bytes\n   Reliable Memory: 0 Bytes\n   NUMA Node Count: 1"
        )
    elif command.startswith("system settings advanced list -o /UserVars/ESXiShell"):
        session.print(_setting(words[-1], int(inventory.faults.get("shell_timeout_s") or 0)))
    elif command.startswith("system settings advanced list"):
        session.print(
            "   Path: /User/execInstalledOnly\n   Type: integer\n   Int Value: 1\n   Default Int Value: 1"
        )
    else:
        session.print(f"Error: Unknown command or namespace {command}\n")
        return 1
    return 0


def _setting(path: str, value: int) -> str:
    value = 0 if path.endswith("InteractiveTimeOut") else value
    return f"   Path: {path}\n   Type: integer\n   Int Value: {value}\n   Default Int Value: 0\n   Min Value: 0\n   Max Value: 86400"


def version(release: str) -> Row:
    number, build, update, _ = VERSIONS[release]
    return {
        "Product": "VMware ESXi",
        "Version": number,
        "Build": f"Releasebuild-{build}",
        "Update": int(update),
        "Patch": 0 if release == "8.0" else 75,
    }


def filesystems(inventory: Inventory) -> list[Row]:
    rows: list[Row] = [
        {
            "Mount Point": store.path,
            "Volume Name": store.name,
            "UUID": store.uuid,
            "Mounted": True,
            "Type": store.kind,
            "Size": store.capacity_bytes,
            "Free": inventory.free_bytes(store.uuid),
        }
        for store in inventory.stores.all
    ]
    osdata = "VFFS" if inventory.release == "7.0" else "VMFSOS"
    for name, kind, size in ((f"OSDATA-{'6' * 8}", osdata, 128580583424), ("BOOTBANK1", "vfat", 4293591040)):
        uuid = f"{sum(name.encode()):08x}-915fbb51-f64b-d8d385d87c24"
        rows.append(
            {
                "Mount Point": f"/vmfs/volumes/{uuid}",
                "Volume Name": name,
                "UUID": uuid,
                "Mounted": True,
                "Type": kind,
                "Size": size,
                "Free": size // 2,
            }
        )
    return rows


def _processes(inventory: Inventory, session: Session, formatter: str) -> None:
    running = [vm for vm in inventory.vms.values() if vm.running]
    rows: list[Row] = [
        {
            "World ID": vm.world + 1,
            "Process ID": 0,
            "VMX Cartel ID": vm.world,
            "UUID": vm.pairs.get("uuid.bios"),
            "Display Name": vm.name,
            "Config File": inventory.stores.host_path(vm.vmx),
        }
        for vm in running
    ]
    if formatter:
        _table(session, formatter, "VirtualMachine", rows, right=set())
        return
    blocks = [f"{row['Display Name']}\n" + _lines(row) for row in rows]
    if blocks:
        session.print("\n\n".join(blocks))


def _lines(row: Row) -> str:
    return "\n".join(f"   {name}: {_cell(value)}" for name, value in row.items())


def _cell(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _record(session: Session, formatter: str, kind: str, row: Row) -> None:
    if formatter == "keyvalue":
        for name, value in row.items():
            word = "boolean" if isinstance(value, bool) else "integer" if isinstance(value, int) else "string"
            session.print(f"{kind}.{name.replace(' ', '')}.{word}={_cell(value)}")
    elif formatter:
        _table(session, formatter, kind, [row], right=set())
    else:
        session.print(_lines(row))


def _table(session: Session, formatter: str, kind: str, rows: list[Row], *, right: set[str]) -> None:
    names = list(rows[0]) if rows else []
    if formatter == "csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        ordered = sorted(names, key=lambda name: name.replace(" ", ""))
        if rows:
            writer.writerow([name.replace(" ", "") for name in ordered] + [""])
        for row in rows:
            writer.writerow([_cell(row[name]) for name in ordered] + [""])
        session.print(buffer.getvalue(), end="")
    elif formatter == "json":
        session.print(
            json.dumps(
                [{name.replace(" ", ""): value for name, value in row.items()} for row in rows], indent=2
            )
        )
    elif formatter == "keyvalue":
        for row in rows:
            _record(session, formatter, kind, row)
    else:
        cells = [[_cell(row[name]) for name in names] for row in rows]
        widths = [max(len(name), *(len(row[column]) for row in cells)) for column, name in enumerate(names)]
        for line in (names, ["-" * width for width in widths], *cells):
            parts = [
                cell.rjust(width) if name in right else cell.ljust(width)
                for name, cell, width in zip(names, line, widths, strict=True)
            ]
            session.print("  ".join(parts).rstrip())


def run_vmware(_inventory: Inventory, session: Session) -> int:
    number, build, _, words = VERSIONS[session.release]
    flags = "".join(session.arguments)
    if "v" in flags:
        session.print(f"VMware ESXi {number} build-{build}")
    if "l" in flags:
        session.print(words)
    return 0


def run_vsish(_inventory: Inventory, session: Session) -> int:
    session.print(f"VSISHCmdGetInt(): Get failed: {' '.join(session.arguments)}: not found")
    return 1


def run_vdf(_inventory: Inventory, session: Session) -> int:
    session.print("Ramdisk                   Size      Used Available Use% Mounted on")
    session.print("tmp                      16384       176     16208   1% --")
    return 0
