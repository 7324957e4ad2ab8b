"""`holdfast check`: proves that everything that is listed can be restored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options, workers_option
from holdfast.cli.output import Json, print_json, say
from holdfast.cli.passwords import current_password
from holdfast.cli.progress import progress
from holdfast.units import format_size

if TYPE_CHECKING:
    from holdfast.repo.check import CheckReport
    from holdfast.repo.recover import Rebuilt

__all__ = ["command"]


@click.command("check")
@click.argument("points", metavar="[POINT]...", nargs=-1)
@click.option("--read-data", is_flag=True, help="Read and verify every stored byte, not only the structure.")
@click.option("--rebuild-index", is_flag=True, help="First make the index anew from the packs.")
@workers_option
@repository_options
@click.pass_obj
def command(
    invocation: Invocation, points: tuple[str, ...], read_data: bool, rebuild_index: bool, workers: int | None
) -> None:
    """Prove that everything that is listed can be restored.

    Without POINTs all packs and all restore points are checked, with them only what these need. Backups and
    restores may go on meanwhile. Rebuilding the index needs the repository for itself, and changes no pack.

    Without the password of an encrypted repository, the stored bytes are verified, but restore points are not.
    """
    rebuilt: Rebuilt | None = None
    with invocation.open_repository("if possible") as repository:
        if rebuild_index:
            with progress(invocation, "rebuilding the index", unit="packs") as shown:
                rebuilt = repository.rebuild_index(shown.update)
            if not invocation.json:
                say(
                    f"rebuilt the index: {_count(rebuilt.packs, 'pack')}, {_count(rebuilt.records, 'record')}, "
                    f"{_count(rebuilt.points, 'restore point')}"
                )
        chosen = [repository.resolve(point) for point in points] or None
        with progress(invocation, "checking") as shown:
            report = repository.check(
                chosen,
                read_data=read_data,
                workers=workers,
                on_progress=lambda done, total: shown.update(done, total if read_data else 0),
            )
        locked = repository.config.encryption is not None and current_password(invocation) is None
    if invocation.json:
        print_json(_as_json(report, rebuilt))
    else:
        _print(report, read_data=read_data, locked=locked)
    error = report.error()
    if error is not None:
        raise error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _as_json(report: CheckReport, rebuilt: Rebuilt | None) -> dict[str, Json]:
    return {
        "type": "summary",
        "ok": report.clean,
        "packs": report.packs,
        "records": report.records,
        "points": report.points,
        "bytes_verified": report.bytes_verified,
        "findings": [{"kind": finding.kind, "message": finding.message} for finding in report.findings],
        "damaged": [
            {
                "point": part.point,
                "vm": part.vm,
                "disk": part.content,
                "offset": part.offset,
                "length": part.length,
                "reason": part.reason,
            }
            for part in report.damaged
        ],
        "notes": list(report.notes),
        "rebuilt": None
        if rebuilt is None
        else {
            "packs": rebuilt.packs,
            "records": rebuilt.records,
            "points": rebuilt.points,
            "problems": list(rebuilt.problems),
        },
    }


def _print(report: CheckReport, *, read_data: bool, locked: bool) -> None:
    for note in report.notes:
        say(f"note: {note}")
    for finding in report.findings:
        say(f"{finding.kind}: {finding.message}")
    for part in report.damaged:
        say(
            f"damaged: restore point {part.point[:12]} of {part.vm}, {part.content}, "
            f"bytes {part.offset} to {part.offset + part.length} ({format_size(part.length)}): {part.reason}"
        )
    read = f", {format_size(report.bytes_verified)} read and verified" if report.bytes_verified else ""
    say(
        f"checked {_count(report.packs, 'pack')}, {_count(report.records, 'record')}, "
        f"{_count(report.points, 'restore point')}{read}"
    )
    if report.clean:
        say(f"no damage found{_reservation(read_data=read_data, locked=locked)}")


def _reservation(*, read_data: bool, locked: bool) -> str:
    """What a clean report does not say."""
    if locked:
        return " in the packs; whether all restore points are complete needs the password"
    return "" if read_data else " in the structure; --read-data verifies every byte as well"
