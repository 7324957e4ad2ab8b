"""`holdfast replicate`: copies restore points into another repository."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from holdfast.cli.commands.check import open_other
from holdfast.cli.invocation import Invocation, checked_address
from holdfast.cli.meanwhile import imported_meanwhile, reached_meanwhile
from holdfast.cli.options import repository_options, workers_option
from holdfast.cli.output import Json, print_json, say, warn
from holdfast.cli.progress import progress
from holdfast.errors import EXIT_WARNINGS, UsageError
from holdfast.units import format_size, format_time, parse_rate, parse_share, parse_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from holdfast.cli.mirroring import MirrorPlan
    from holdfast.ids import PointId
    from holdfast.repo.points import Point
    from holdfast.repo.prove import Proven
    from holdfast.repo.replicate import Ack, ReplicateReport
    from holdfast.repo.repository import Repository

__all__ = ["command"]

_ENGINE: Final = ("holdfast.repo.replicate",)


@click.command("replicate")
@click.option("--to", metavar="ADDRESS", help="Copy from -r into this repository.")
@click.option("--from", "source", metavar="ADDRESS", help="Copy from this repository into -r.")
@click.option(
    "--other-password-file", metavar="FILE", help="The other repository's password. [default: that of -r]"
)
@click.option("--vm", multiple=True, metavar="NAME", help="Only points of this VM. Repeatable.")
@click.option(
    "--label",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only points with this label. Repeatable: with all of them.",
)
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the newest N points of each VM.")
@click.option("--since", metavar="TIME", help="Only points of this time or later.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be copied; change nothing.")
@click.option("--max-rate", metavar="RATE", help="Copy no faster than this (50MiB/s).")
@click.option(
    "--ack",
    type=click.Choice(["chunk", "batch", "point"]),
    default="batch",
    show_default=True,
    help="When what was copied is durable: piece by piece, every few seconds, or with its point.",
)
@click.option(
    "--verify", is_flag=True, help="Have all that the chosen points need read and hashed in the target."
)
@click.option("--challenge", metavar="SHARE", help="The same of a random share of it (1%).")
@click.option("--repair", is_flag=True, help="First heal what is damaged in the target from the source.")
@click.option(
    "--mirror-retention",
    is_flag=True,
    help="Forget points in the target that the source once had and has forgotten.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1),
    metavar="N",
    help="Copy over N connections (up to 16) to each other host at once. [default: one, and up to 4 if the way is long]",
)
@workers_option
@repository_options
@click.pass_obj
def command(
    invocation: Invocation,
    to: str | None,
    source: str | None,
    other_password_file: str | None,
    vm: tuple[str, ...],
    label: tuple[str, ...],
    last: int | None,
    since: str | None,
    dry_run: bool,
    max_rate: str | None,
    ack: Ack,
    verify: bool,
    challenge: str | None,
    repair: bool,
    mirror_retention: bool,
    parallel: int | None,
    workers: int | None,
) -> None:
    """Copy restore points into another repository, each one as a whole.

    Only what the other repository lacks is copied. A point appears there when all that it needs is on its disk; an
    interrupted copy goes on where it ended. What was forgotten there stays so. Nothing is ever removed there, but
    with --mirror-retention: then what the source has forgotten is forgotten there, too, when all else is done.

    Where both repositories have the same key (or none), records are copied as they are; otherwise contents are read
    and encrypted anew.
    """
    if (to is None) == (source is None):
        raise UsageError("name the other repository", hint="with --to ADDRESS, or with --from ADDRESS")
    if dry_run and (verify or challenge or repair):
        raise UsageError("--dry-run copies nothing, so there is nothing to verify or to repair")
    share = 1.0 if verify else parse_share(challenge) if challenge else 0.0
    rate = parse_rate(max_rate) if max_rate else None
    wanted = _Wanted(vm, _pairs(label), last, None if since is None else parse_time(since))
    there = to or source or ""
    with contextlib.ExitStack() as stack:
        with (
            reached_meanwhile(checked_address(there), index=True) as place,
            imported_meanwhile(_ENGINE, invocation.address, there),
        ):
            mine = stack.enter_context(invocation.open_repository(engine=_ENGINE))
            known = (
                mine.points() if to is not None and not mine.is_far else None
            )  # while `other` is waited for
            other = open_other(invocation, stack, there, other_password_file, place)
        one, two = (mine, other) if to is not None else (other, mine)
        if parallel is not None:
            one.use_streams(parallel)
            two.use_streams(parallel)
        if mirror_retention:
            two.require_removing()
        points = wanted.choose(one.points_beside(two) if known is None else known)
        healed = _repair(invocation, one, two, workers) if repair else None
        invocation.if_interrupted = "what was copied is found again by the next 'holdfast replicate'"
        report = _copy(invocation, one, two, points, dry_run, ack, rate, workers)
        verified = _verify(invocation, one, two, points, share, workers) if share else None
        if not dry_run:
            _note(one, two, points, report, verified, whole=share >= 1)
        mirror = _mirror(one, two, wanted, points, report, dry_run=dry_run) if mirror_retention else None
    if invocation.json:
        print_json(_as_json(report, verified, healed, mirror, dry_run=dry_run))
        return
    _print(report, verified, healed, dry_run=dry_run)
    if mirror is not None:
        from holdfast.cli.mirroring import announce_mirror

        announce_mirror(mirror, dry_run=dry_run)


class _Wanted:
    """Which points to copy."""

    def __init__(
        self, vms: Sequence[str], labels: Sequence[tuple[str, str]], last: int | None, since: int | None
    ) -> None:
        self._vms = vms
        self._labels = labels
        self._last = last
        self._since = since
        self._vm_uuids: frozenset[str] | None = None

    def choose(self, points: Sequence[Point]) -> list[Point]:
        """Those of some points that are meant, oldest first."""
        from holdfast.repo.points import points_of_vm

        found = [point for vm in self._vms for point in points_of_vm(points, vm)] if self._vms else points
        if self._vms:
            self._vm_uuids = frozenset(point.manifest.vm_uuid for point in found)
        found = [point for point in {point.id: point for point in found}.values() if self._fits(point)]
        if self._last is None:
            return found
        newest: dict[str, list[Point]] = {}
        for point in found:
            newest.setdefault(point.manifest.vm_uuid, []).append(point)
        return [point for points in newest.values() for point in points[-self._last :]]

    def _fits(self, point: Point) -> bool:
        return set(self._labels) <= set(point.manifest.labels) and (
            self._since is None or point.manifest.time >= self._since
        )

    def may_go(self, point: Point) -> bool:
        """Whether a point of the target is among those that are meant; how many are copied does not matter for it."""
        return self._fits(point) and (self._vm_uuids is None or point.manifest.vm_uuid in self._vm_uuids)


def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in labels:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"'{text}' is no label", hint="write KEY=VALUE")
        pairs.append((key, value))
    return pairs


def _copy(
    invocation: Invocation,
    source: Repository,
    target: Repository,
    points: Sequence[Point],
    dry_run: bool,
    ack: Ack,
    rate: int | None,
    workers: int | None,
) -> ReplicateReport:
    from holdfast.repo.replicate import ReplicateOptions
    from holdfast.ssh.throttle import Throttle

    pace: Callable[[int], None] = Throttle(rate).take if rate else lambda _bytes: None
    with progress(invocation, "copying") as bar:
        return source.replicate(
            target,
            points,
            ReplicateOptions(
                dry_run=dry_run,
                ack=ack,
                workers=workers,
                pace=pace,
                on_progress=lambda copied: bar.update(copied, 0),
            ),
        )


def _repair(invocation: Invocation, source: Repository, target: Repository, workers: int | None) -> int:
    """Heals the target from the source; returns how many records were healed."""
    with progress(invocation, "repairing") as bar:
        _, repaired = target.repair(source, workers=workers, on_progress=bar.update)
    error = repaired.error()
    if error is not None:
        raise error
    return repaired.healed_total


class _Verified(NamedTuple):
    """What was read back in the target.

    Args:
        ids: of the points, in the target.
        proven: what a target on another host has shown; None if the target is here.
    """

    ids: tuple[PointId, ...]
    proven: Proven | None

    @property
    def points(self) -> int:
        """How many."""
        return len(self.ids)


def _verify(
    invocation: Invocation,
    source: Repository,
    target: Repository,
    points: Sequence[Point],
    share: float,
    workers: int | None,
) -> _Verified:
    """Has points read back in the target, by the far side if that is on another host.

    Raises:
        IntegrityError: something is damaged there.
    """
    sessions = {point.manifest.session for point in points}
    there = [point for point in target.points_beside(source) if point.manifest.session in sessions]
    ids = tuple(point.id for point in there)
    with progress(invocation, "verifying") as bar:
        if target.is_far:
            proven = target.prove(source, there, share, workers, bar.update)
            if proven.not_here:
                warn(
                    invocation,
                    f"{proven.not_here} of the records that were compared could not be had from the source, which lacks them or has them damaged; "
                    "'holdfast check --repair --from' heals them",
                )
                invocation.exit_code = EXIT_WARNINGS
            return _Verified(ids, proven)
        if share < 1:
            target.sample(there, share, bar.update)
            return _Verified(ids, None)
        error = target.check(there, read_data=True, workers=workers, on_progress=bar.update).error()
    if error is not None:
        raise error
    return _Verified(ids, None)


def _note(
    source: Repository,
    target: Repository,
    points: Sequence[Point],
    report: ReplicateReport,
    verified: _Verified | None,
    *,
    whole: bool,
) -> None:
    """Notes on both sides what each now knows of the other one."""
    from holdfast.repo.copies import SeenCopies

    listed = {here for here, _ in report.pairs}
    absent = [point.id for point in points if point.id not in listed]
    proven = frozenset(verified.ids if verified is not None else ())
    source.note_copies(target, SeenCopies(report.pairs, absent, proven, whole))


def _mirror(
    source: Repository,
    target: Repository,
    wanted: _Wanted,
    points: Sequence[Point],
    report: ReplicateReport,
    *,
    dry_run: bool,
) -> MirrorPlan:
    """Forgets in the target what the source has forgotten, but in a dry run."""
    from holdfast.cli.mirroring import mirror_plan

    copied = {point.id for point in report.copied}
    coming = [point for point in points if point.id in copied] if dry_run else []
    plan = mirror_plan(source, target, wanted.may_go, coming)
    if plan.forgotten and not dry_run:
        target.forget(plan.forgotten)
    return plan


def _as_json(
    report: ReplicateReport,
    verified: _Verified | None,
    healed: int | None,
    mirror: MirrorPlan | None,
    *,
    dry_run: bool,
) -> dict[str, Json]:
    from holdfast.cli.mirroring import mirror_json

    proven = verified.proven if verified is not None else None
    return {
        "type": "summary",
        "dry_run": dry_run,
        "same_keys": report.same_keys,
        "copied": [
            {
                "id": point.id.hex(),
                "target_id": point.target_id.hex() if point.target_id else None,
                "vm": point.vm_name,
                "time": format_time(point.time),
                "records": point.records,
                "stored_bytes": point.stored_bytes,
                "proof": point.proof.hex() or None,
            }
            for point in report.copied
        ],
        "already": report.already,
        "forgotten": report.forgotten,
        "records": report.records,
        "stored_bytes": report.stored_bytes,
        "verified_points": verified.points if verified is not None else 0,
        "proven_records": proven.records if proven is not None else None,
        "fetched_records": proven.fetched if proven is not None else None,
        "healed_records": healed,
        "mirrored": mirror_json(mirror) if mirror is not None else None,
        "duration_s": round(report.duration_s, 3),
    }


def _print(report: ReplicateReport, verified: _Verified | None, healed: int | None, *, dry_run: bool) -> None:
    if healed is not None:
        say(f"healed {healed} damaged record{'' if healed == 1 else 's'} of the target")
    for point in report.copied:
        verb = "would copy" if dry_run else "copied"
        say(
            f"{verb} {point.id.hex()[:12]} {point.vm_name} {format_time(point.time)}: "
            f"{format_size(point.stored_bytes)}"
        )
    said = [f"{len(report.copied)} {'to copy' if dry_run else 'copied'}", f"{report.already} there already"]
    if report.forgotten:
        said.append(f"{report.forgotten} forgotten there, and left so")
    how = "" if report.same_keys else "; the keys differ, so contents were read and sealed anew"
    say(
        f"restore points: {', '.join(said)}; {format_size(report.stored_bytes)} in {report.duration_s:.1f} s{how}"
    )
    if verified is not None and verified.points:
        points = f"{verified.points} restore point{'' if verified.points == 1 else 's'}"
        say(f"verified in the target: {points}{_how(verified.proven)}")


def _how(proven: Proven | None) -> str:
    """In which way a target on another host has proven what it holds."""
    if proven is None:
        return ""
    records = f"{proven.records} record{'' if proven.records == 1 else 's'}"
    compared = f"{format_size(proven.stored_bytes)} read and hashed on both sides"
    if not proven.fetched:
        return f", {records}, {compared}"
    fetched = f"{proven.fetched} sent here and opened"
    return f", {records}, {f'{compared}, ' if proven.stored_bytes else ''}{fetched}"
