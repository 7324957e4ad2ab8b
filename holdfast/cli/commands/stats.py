"""`holdfast stats`: how much is stored, and how well it is deduplicated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_facts, print_json
from holdfast.units import format_age, format_duration, format_size, format_time

if TYPE_CHECKING:
    from holdfast.repo.format.rows import CopyRow
    from holdfast.repo.repository import RepositoryStatistics

__all__ = ["command"]


@click.command("stats")
@click.option("--vm", metavar="NAME", help="Count the restore points of this VM only, by name or UUID.")
@repository_options
@click.pass_obj
def command(invocation: Invocation, vm: str | None) -> None:
    """Show how much is stored, and how well it is deduplicated.

    The ratio is that of the size of all restore points, holes included, to what their data takes in the packs:
    what holes, deduplication and compression save together.
    """
    with invocation.open_repository() as repository:
        points = repository.points(vm)
        figures = repository.statistics(vm)
        copies = repository.copies()
    known = [copies.get(point.id, []) for point in points]
    stored = sum(point.manifest.statistics.bytes_stored for point in points)
    taken = stored if vm is not None else figures.live_bytes
    ratio = figures.size_bytes / taken if taken else None
    if invocation.json:
        verified = figures.oldest_verification
        print_json(
            {
                "vms": figures.vms,
                "points": figures.points,
                "size_bytes": figures.size_bytes,
                "stored_bytes_added": stored,
                "ratio": None if ratio is None else round(ratio, 3),
                "packs": figures.packs,
                "packs_bytes": figures.packs_bytes,
                "live_bytes": figures.live_bytes,
                "dead_bytes": figures.dead_bytes,
                "index_records": figures.index.records,
                "index_bytes": figures.index.used_bytes,
                "sessions": figures.index.sessions,
                "oldest_verification": format_time(verified) if verified else None,
                "verified_bytes": figures.verified_bytes,
                "oldest_unverified_age_s": _age_s(figures),
                "points_without_copy": sum(not rows for rows in known),
                "copies": [
                    {
                        "repository": one.repository.hex(),
                        "address": one.address,
                        "points": count,
                        "oldest_proof": format_time(one.proven),
                    }
                    for one, count in _elsewhere(known)
                ],
            }
        )
        return
    whose = " (of this VM)" if vm is not None else ""
    print_facts(
        [
            ("VMs", str(figures.vms)),
            (f"restore points{whose}", str(figures.points)),
            (f"their size{whose}", format_size(figures.size_bytes)),
            (f"stored for them{whose}", format_size(stored)),
            (f"ratio{whose}", "-" if ratio is None else f"{ratio:.1f} to 1"),
            ("packs", f"{figures.packs}, {format_size(figures.packs_bytes)}"),
            ("  in use", format_size(figures.live_bytes)),
            ("  no longer in use", format_size(figures.dead_bytes)),
            ("index", f"{figures.index.records} records, {format_size(figures.index.used_bytes)}"),
            ("sessions", str(figures.index.sessions)),
            ("verified", _verified(figures)),
            *_copies(known),
        ]
    )


def _age_s(figures: RepositoryStatistics) -> int | None:
    since = figures.oldest_unverified
    return None if since is None else max(0, int(time.time()) - since)


def _verified(figures: RepositoryStatistics) -> str:
    age_s = _age_s(figures)
    if age_s is None:
        return "nothing is stored yet"
    age = "less than a minute" if age_s < 60 else format_duration(age_s)
    if figures.oldest_verification:
        return f"all, the oldest byte {age} ago ({format_time(figures.oldest_verification)})"
    return (
        f"{format_size(figures.verified_bytes)}; the oldest unverified byte is {age} old "
        "(holdfast check --read-data)"
    )


def _elsewhere(known: Sequence[Sequence[CopyRow]]) -> list[tuple[CopyRow, int]]:
    """For each other repository the copy that was proven longest ago, and how many there are."""
    by_place: dict[bytes, list[CopyRow]] = {}
    for copies in known:
        for copy in copies:
            by_place.setdefault(copy.repository, []).append(copy)
    return [(min(copies, key=lambda copy: copy.proven), len(copies)) for copies in by_place.values()]


def _copies(known: Sequence[Sequence[CopyRow]]) -> list[tuple[str, str]]:
    """One line for each other repository."""
    now = time.time()
    said = [
        f"{count} of {len(known)} in {one.address}, the oldest proof {format_age(max(0.0, now - one.proven))} ago"
        for one, count in _elsewhere(known)
    ]
    return [("copies" if not number else "", line) for number, line in enumerate(said or ["none known"])]
