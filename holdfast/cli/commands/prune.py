"""`holdfast prune`: forgets the restore points that no rule keeps (docs/RETENTION.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_json, say
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.repo.gc import CollectReport
    from holdfast.repo.periods import Duration
    from holdfast.repo.repository import Repository
    from holdfast.repo.retention import Dialect, Policy

__all__ = ["command"]

C = TypeVar("C", bound=Callable[..., object])

_COUNTS = {
    "last": "Keep the newest N restore points of each VM.",
    "hourly": "Keep the newest one of each of the last N hours that have one.",
    "daily": "Likewise for days.",
    "weekly": "Likewise for weeks, which begin on Mondays.",
    "monthly": "Likewise for months.",
    "yearly": "Likewise for years.",
}
_SPANS = {
    "within": "Keep all that are less than TIME (14d, 36h, 2w, 6m, 1y2m) older than the newest.",
    "within-hourly": "Keep the newest one of each hour of that time.",
    "within-daily": "Likewise for days.",
    "within-weekly": "Likewise for weeks.",
    "within-monthly": "Likewise for months.",
    "within-yearly": "Likewise for years.",
}


def _rule_options(function: C) -> C:
    """The options `--keep-last` to `--keep-within-yearly`."""
    rules = [(name, "N", text) for name, text in _COUNTS.items()]
    rules += [(name, "TIME", text) for name, text in _SPANS.items()]
    for name, metavar, text in reversed(rules):
        function = click.option(f"--keep-{name}", metavar=metavar, help=text)(function)
    return function


@click.command("prune")
@_rule_options
@click.option(
    "--keep-label", metavar="KEY=VALUE", multiple=True, help="Keep those with this label. Repeatable."
)
@click.option("--vm", metavar="NAME", help="Only the restore points of this VM, by name or UUID.")
@click.option(
    "--dialect",
    type=click.Choice(["holdfast", "restic", "borg", "pbs"]),
    default="holdfast",
    show_default=True,
    help="Count as this program does.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, and why; change nothing.")
@click.option(
    "--explain", is_flag=True, help="Say of each one why it stays, when it goes, and what that frees."
)
@click.option("--gc", "collect", is_flag=True, help="Collect garbage afterwards, which gives the space back.")
@click.option("--alone", is_flag=True, help="With --gc: no other machine uses the repository, as of 'gc'.")
@repository_options
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    keep_label: tuple[str, ...],
    vm: str | None,
    dialect: str,
    dry_run: bool,
    explain: bool,
    collect: bool,
    alone: bool,
    **keep: str | None,
) -> None:
    """Forget the restore points that no rule keeps.

    A restore point stays if any rule keeps it; VMs are judged one by one. N may be 'unlimited'. Hours to years begin
    by the clock of the local time zone.

    Pinned restore points, those whose time lies in the future, and the newest verified one of each VM always stay.
    What is forgotten is not listed any more; 'forget --undo' brings it back until 'gc' has run.
    """
    policy = _policy(keep, keep_label, dialect)

    from holdfast.cli.prune_plan import announce, make_plan, many, plan_json

    report: CollectReport | None = None
    with invocation.open_repository() as repository:
        plan = make_plan(invocation, repository, policy, vm, sizes=dry_run or explain, size_of_each=explain)
        forgotten = plan.forgotten
        if not invocation.json:
            announce(plan, explain=explain, dry_run=dry_run, collect=collect)
        if not dry_run:
            if forgotten:
                repository.forget(forgotten)
                if not invocation.json:
                    say(f"forgot {many(len(forgotten))}")
            if collect:
                report = _collect(invocation, repository, alone=alone)
    if invocation.json:
        from holdfast.cli.commands.gc import report_json

        print_json(
            {
                "type": "summary",
                "dry_run": dry_run,
                **plan_json(plan, policy),
                "gc": None if report is None else report_json(report, dry_run=False),
            }
        )
    elif report is not None:
        _say_collected(report)
    elif forgotten and not dry_run:
        say("'holdfast gc' gives their space back; until then 'holdfast forget --undo' brings them back")


def _policy(keep: Mapping[str, str | None], labels: tuple[str, ...], dialect: str) -> Policy:
    from holdfast.repo.periods import parse_calendar_duration
    from holdfast.repo.retention import Policy

    def count(name: str) -> int | None:
        text = keep[f"keep_{name}"]
        return None if text is None else _count(name, text)

    def span(name: str) -> Duration | None:
        text = keep[f"keep_{name}"]
        return None if text is None else parse_calendar_duration(text)

    return Policy(
        last=count("last"),
        hourly=count("hourly"),
        daily=count("daily"),
        weekly=count("weekly"),
        monthly=count("monthly"),
        yearly=count("yearly"),
        within=span("within"),
        within_hourly=span("within_hourly"),
        within_daily=span("within_daily"),
        within_weekly=span("within_weekly"),
        within_monthly=span("within_monthly"),
        within_yearly=span("within_yearly"),
        labels=tuple(_label(text) for text in labels),
        dialect=cast("Dialect", dialect),
    )


def _count(name: str, text: str) -> int:
    from holdfast.repo.retention import UNLIMITED

    if text in ("unlimited", str(UNLIMITED)):
        return UNLIMITED
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UsageError(
            f"--keep-{name}: '{text}' is no number of restore points",
            hint="write for example 7, or 'unlimited' for all",
        )
    return int(text)


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise UsageError(
            f"'{text}' is no label", hint="write KEY=VALUE, for example --keep-label reason=release"
        )
    return key, value


def _collect(invocation: Invocation, repository: Repository, *, alone: bool) -> CollectReport:
    from holdfast.cli.progress import progress
    from holdfast.repo.gc import CollectOptions

    invocation.if_interrupted = "the restore points are forgotten; the next 'holdfast gc' does the rest"
    with progress(invocation, "collecting", unit="records") as bar:
        report = repository.collect(
            CollectOptions(
                on_progress=lambda phase, done, total: bar.update(done, total) if phase == "sweep" else None
            ),
            alone=alone,
        )
    invocation.if_interrupted = ""
    return report


def _say_collected(report: CollectReport) -> None:
    from holdfast.units import format_size

    for note in report.notes:
        say(f"note: {note}")
    say(f"collected garbage: gave back {format_size(report.freed_bytes)}")
