"""`holdfast vms`: the VMs of a linked host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.linked import open_session
from holdfast.cli.options import json_option
from holdfast.cli.output import Column, Json, notice, print_json, print_table
from holdfast.units import format_size

if TYPE_CHECKING:
    from holdfast.esxi.inventory import VmLook

__all__ = ["command"]


@click.command("vms")
@click.argument("host")
@json_option
@click.pass_obj
def command(invocation: Invocation, host: str) -> None:
    """List the VMs of a linked host, and what of them can be backed up."""
    with open_session(host) as session:
        looks = [session.view.look(vm) for vm in session.view.vms(lambda text: notice(invocation, text))]
    if invocation.json:
        print_json({"host": host, "vms": [_as_json(look) for look in looks]})
        return
    print_table(
        [Column("ID", right=True), Column("NAME", wide=True), Column("POWER"), Column("DATASTORE"), Column("DISKS"),
         Column("SIZE", right=True), Column("SNAPSHOTS", right=True), Column("BACKUP", wide=True)],
        [_row(look) for look in looks],
    )  # fmt: skip


def _row(look: VmLook) -> tuple[str, ...]:
    size = sum(disk.size_bytes or 0 for disk in look.disks)
    reasons = [f"not {disk.label or disk.title}: {disk.obstacle}" for disk in look.disks if disk.obstacle]
    return (
        str(look.vm.id), look.vm.name, look.vm.power, look.vm.file.datastore, str(len(look.disks)), format_size(size),
        str(sum(1 for _ in look.all_snapshots())), look.trouble or "; ".join(reasons) or "yes",
    )  # fmt: skip


def _as_json(look: VmLook) -> dict[str, Json]:
    vm = look.vm
    return {
        "id": vm.id,
        "name": vm.name,
        "uuid": vm.uuid,
        "instance_uuid": vm.instance_uuid,
        "power": vm.power,
        "vmx": str(vm.file),
        "datastore": vm.file.datastore,
        "guest": vm.guest,
        "disks": [
            {
                "label": disk.label,
                "title": disk.title,
                "file": str(disk.file),
                "size_bytes": disk.size_bytes,
                "thin": disk.thin,
                "mode": disk.mode,
                "uuid": disk.uuid,
                "obstacle": disk.obstacle,
            }
            for disk in look.disks
        ],
        "snapshots": [
            {"id": one.id, "name": one.name, "created": one.created} for one in look.all_snapshots()
        ],
        "obstacle": look.obstacle,
    }
