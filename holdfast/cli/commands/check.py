"""`holdfast check`: proves that everything that is listed can be restored, and heals what is damaged."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation, checked_address
from holdfast.cli.options import repository_options, workers_option
from holdfast.cli.output import Json, notice, print_json, say
from holdfast.cli.passwords import current_password
from holdfast.cli.progress import progress
from holdfast.errors import UsageError
from holdfast.units import format_size, format_time, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from holdfast.repo.check import CheckReport, DamagedRange
    from holdfast.repo.ledger import Budget
    from holdfast.repo.place import Place
    from holdfast.repo.recover import Rebuilt
    from holdfast.repo.repair import RepairReport
    from holdfast.repo.repository import Repository

__all__ = ["command", "open_other"]


@click.command("check")
@click.argument("points", metavar="[POINT]...", nargs=-1)
@click.option("--read-data", is_flag=True, help="Read and verify every stored byte, not only the structure.")
@click.option(
    "--max-time", metavar="DURATION", help="Begin to read no more packs after this time (90s, 10m, 2h)."
)
@click.option("--max-bytes", metavar="SIZE", help="Read no more than this (500GiB), but always one pack.")
@click.option(
    "--older-than", metavar="DURATION", help="Read only packs that were last verified longer ago (30d)."
)
@click.option("--repair", is_flag=True, help="Read all data, and heal what is damaged.")
@click.option("--from", "other", metavar="ADDRESS", help="With --repair: another repository to heal from.")
@click.option(
    "--from-password-file",
    metavar="FILE",
    help="The other repository's password. [default: that of this one]",
)
@click.option("--rebuild-index", is_flag=True, help="First make the index anew from the packs.")
@workers_option
@repository_options
@click.pass_obj
def command(
    invocation: Invocation,
    points: tuple[str, ...],
    read_data: bool,
    max_time: str | None,
    max_bytes: str | None,
    older_than: str | None,
    repair: bool,
    other: str | None,
    from_password_file: str | None,
    rebuild_index: bool,
    workers: int | None,
) -> None:
    """Prove that everything that is listed can be restored.

    Without POINTs all packs and all restore points are checked, with them only what these need. Backups and
    restores may go on meanwhile. Rebuilding the index needs the repository for itself, and changes no pack.

    The repository remembers when each pack was verified last. --read-data begins with those that never were, then
    takes the oldest; with --max-time or --max-bytes the next check goes on where this one ends.

    --repair looks for what is damaged in other packs and in the repository --from, and stores it anew. What is
    nowhere is stored anew by a later backup that meets the same content. No pack is changed or removed.

    Without the password of an encrypted repository, the stored bytes are verified, but restore points are not.
    """
    _require_sense(points, read_data or repair, repair, other, (max_time, max_bytes, older_than))
    if from_password_file and not other:
        raise UsageError("--from-password-file needs --from")
    rebuilt: Rebuilt | None = None
    repaired: RepairReport | None = None
    budget = _budget(max_time, max_bytes, older_than)
    with contextlib.ExitStack() as stack:
        repository = stack.enter_context(invocation.open_repository("now" if repair else "if possible"))
        donor = open_other(invocation, stack, other, from_password_file) if other else None
        if rebuild_index:
            with progress(invocation, "rebuilding the index", unit="packs") as shown:
                rebuilt = repository.rebuild_index(shown.update)
            if not invocation.json:
                say(
                    f"rebuilt the index: {_count(rebuilt.packs, 'pack')}, {_count(rebuilt.records, 'record')}, "
                    f"{_count(rebuilt.points, 'restore point')}"
                )
        chosen = [repository.resolve(point) for point in points] or None
        invocation.if_interrupted = (
            "what was verified until then is remembered" if read_data or repair else ""
        )
        with progress(invocation, "repairing" if repair else "checking") as shown:
            if repair:
                report, repaired = repository.repair(
                    donor, budget=budget, workers=workers, on_progress=shown.update
                )
            else:
                report = repository.check(
                    chosen,
                    read_data=read_data,
                    budget=budget,
                    workers=workers,
                    on_progress=lambda done, total: shown.update(done, total if read_data else 0),
                )
        locked = repository.config.encryption is not None and current_password(invocation) is None
    if invocation.json:
        print_json(_as_json(report, rebuilt, repaired))
    else:
        _print(report, repaired)
        if repaired is not None:
            _print_repaired(repaired)
        elif report.clean:
            said = _reservation(report, read_data=read_data, locked=locked)
            say(f"no damage found{said}")
    error = report.error() if repaired is None else repaired.error()
    if error is not None:
        raise error


def _require_sense(
    points: Sequence[str], reads: bool, repair: bool, other: str | None, limits: tuple[str | None, ...]
) -> None:
    """Raises UsageError if options do not go together."""
    if repair and points:
        raise UsageError("--repair heals the whole repository: it takes no restore points")
    if other and not repair:
        raise UsageError("--from needs --repair")
    if any(limits) and not reads:
        raise UsageError(
            "--max-time, --max-bytes and --older-than limit what --read-data reads", hint="add --read-data"
        )
    if any(limits) and points:
        raise UsageError(
            "--max-time, --max-bytes and --older-than are for a check of all packs: name no points"
        )


def _budget(max_time: str | None, max_bytes: str | None, older_than: str | None) -> Budget:
    from holdfast.repo.ledger import Budget

    return Budget(
        None if max_time is None else parse_duration(max_time),
        None if max_bytes is None else parse_size(max_bytes),
        None if older_than is None else parse_duration(older_than),
    )


def open_other(
    invocation: Invocation,
    stack: contextlib.ExitStack,
    path: str,
    password_file: str | None,
    place: Callable[[], Place] | None = None,
) -> Repository:
    """Another repository than that of `-r`, open.

    Args:
        place: where that is being reached already.
    """
    from holdfast.cli.passwords import password_from_file
    from holdfast.repo.repository import Repository

    password = (lambda: password_from_file(password_file)) if password_file else current_password(invocation)
    return stack.enter_context(
        Repository.open(
            checked_address(path),
            password=password,
            notify=lambda message: notice(invocation, f"{path}: {message}"),
            place=place,
        )
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _as_json(report: CheckReport, rebuilt: Rebuilt | None, repaired: RepairReport | None) -> dict[str, Json]:
    reading = report.reading
    return {
        "type": "summary",
        "ok": report.clean if repaired is None else repaired.complete,
        "packs": report.packs,
        "records": report.records,
        "points": report.points,
        "bytes_verified": report.bytes_verified,
        "reading": None
        if reading is None
        else {
            "packs": reading.packs,
            "left_packs": reading.left_packs,
            "left_bytes": reading.left_bytes,
            "ended_by": reading.ended_by or None,
            "verified_bytes": reading.verified_bytes,
            "total_bytes": reading.total_bytes,
            "oldest_verification": format_time(reading.oldest) if reading.oldest else None,
        },
        "findings": [{"kind": finding.kind, "message": finding.message} for finding in report.findings],
        "damaged": [_range_as_json(part) for part in report.damaged],
        "notes": list(report.notes),
        "rebuilt": None
        if rebuilt is None
        else {
            "packs": rebuilt.packs,
            "records": rebuilt.records,
            "points": rebuilt.points,
            "problems": list(rebuilt.problems),
        },
        "repaired": None
        if repaired is None
        else {
            "damaged_records": repaired.damaged,
            "healed_records": repaired.healed_total,
            "healed_from": [{"source": name, "records": n} for name, n in repaired.healed.items()],
            "moved_records": repaired.moved,
            "dropped_records": repaired.dropped,
            "unreadable_records": repaired.unreadable,
        },
    }


def _range_as_json(part: DamagedRange) -> dict[str, Json]:
    return {
        "point": part.point,
        "vm": part.vm,
        "disk": part.content,
        "offset": part.offset,
        "length": part.length,
        "reason": part.reason,
    }


def _print(report: CheckReport, repaired: RepairReport | None) -> None:
    for note in report.notes:
        say(f"note: {note}")
    for finding in report.findings:
        say(f"{finding.kind}: {finding.message}")
    for part in report.damaged:
        say(
            f"{'damaged' if repaired is None else 'still damaged'}: restore point {part.point[:12]} of {part.vm}, "
            f"{part.content}, bytes {part.offset} to {part.offset + part.length} ({format_size(part.length)}): "
            f"{part.reason}"
        )
    read = f", {format_size(report.bytes_verified)} read and verified" if report.bytes_verified else ""
    say(
        f"checked {_count(report.packs, 'pack')}, {_count(report.records, 'record')}, "
        f"{_count(report.points, 'restore point')}{read}"
    )
    for line in _reading_lines(report):
        say(line)


def _reading_lines(report: CheckReport) -> Iterator[str]:
    """How far the reading of packs is, if there is more to read."""
    reading = report.reading
    if reading is None or not (reading.ended_by or reading.packs < report.packs):
        return
    yield (
        f"{format_size(reading.verified_bytes)} of {format_size(reading.total_bytes)} have been verified"
        + (f", all of it since {format_time(reading.oldest)}" if reading.oldest else "")
    )
    if reading.ended_by:
        what = "time is over" if reading.ended_by == "time" else "number of bytes is used up"
        yield (
            f"the {what}: {format_size(reading.left_bytes)} in {_count(reading.left_packs, 'pack')} are left for the "
            "next check"
        )


def _print_repaired(repaired: RepairReport) -> None:
    if repaired.moved:
        say(f"{_count(repaired.moved, 'intact record')} of damaged packs were written anew")
    for name, number in repaired.healed.items():
        say(f"healed {_count(number, 'record')} from {name}")
    if repaired.dropped:
        needed = "a backup that meets the same content stores them anew"
        say(
            f"{_count(repaired.dropped, 'damaged record')} "
            f"{'was' if repaired.dropped == 1 else 'were'} taken out of the index: {needed}"
        )
    if repaired.complete:
        if repaired.damaged == repaired.healed_total:
            count = _count(repaired.damaged, "damaged record")
            say(
                f"all is healed: {count}"
                if repaired.damaged or repaired.moved
                else "nothing had to be repaired"
            )
        else:
            say("all is healed: no restore point needs what is left damaged")


def _reservation(report: CheckReport, *, read_data: bool, locked: bool) -> str:
    """What a clean report does not say."""
    if locked:
        return " in the packs; whether all restore points are complete needs the password"
    if report.reading is not None and report.reading.ended_by:
        return " so far"
    return "" if read_data else " in the structure; --read-data verifies every byte as well"
