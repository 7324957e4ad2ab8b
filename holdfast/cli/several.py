"""`holdfast backup --parallel`: what is said while several backups run, and the summary of all."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from holdfast.cli.failures import print_failure
from holdfast.cli.fleet import run_fleet, same_options, together
from holdfast.cli.linked import is_esxi, open_session, parse_esxi
from holdfast.cli.output import notice, print_json, say, warn
from holdfast.cli.passwords import current_password, password_is_given
from holdfast.cli.progress import progress
from holdfast.errors import LinkError, SourceError
from holdfast.units import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click

    from holdfast.cli.fleet import Ended
    from holdfast.cli.invocation import Invocation
    from holdfast.cli.progress_file import ProgressFile

__all__ = ["back_up_several"]

_OURS: Final = ("all_vms", "exclude", "parallel", "progress_file")


def back_up_several(
    invocation: Invocation,
    context: click.Context,
    sources: Sequence[str],
    parallel: int,
    states: ProgressFile,
) -> None:
    """Backs the sources up, so many at a time, and says how each one ended. The exit code is the first failure's."""
    password = None
    with invocation.open_repository("later") as repository:
        if repository.config.encryption is not None and not password_is_given(invocation):
            typed = current_password(invocation)
            password = typed() if typed is not None else None
    global_words = ["--json", "-r", invocation.repository_path()]
    for option, value in (
        ("--password-file", invocation.password_file),
        ("--password-command", invocation.password_command),
    ):
        if value:
            global_words += [option, value]
    options = same_options(context, _OURS)
    _warn_of_limits(invocation, sources, parallel)

    def hear(source: str, value: dict[str, Any]) -> None:
        if value.get("type") == "progress":
            states.note_progress(source, value)
            return
        _hear(invocation, source, value)
        if value.get("type") in ("summary", "error"):
            states.note(source, value)

    invocation.if_interrupted = (
        "what was not finished made no restore point; the VMs were put back as they were"
    )
    with progress(invocation, f"backing up {len(sources)} sources") as shown:
        ended = run_fleet(
            sources,
            lambda source: [*global_words, "backup", *options, "--", source],
            parallel,
            shown,
            hear,
            password,
        )
    invocation.if_interrupted = ""
    invocation.exit_code = together(ended)
    if not invocation.json:
        _tell(ended)


def _warn_of_limits(invocation: Invocation, sources: Sequence[str], parallel: int) -> None:
    """Says so if a host may turn some of the connections away that begin at the same time. What it does not tell is left to the backups."""
    counts = Counter(parse_esxi(source).host for source in sources if is_esxi(source))
    for host, count in counts.items():
        at_once = min(count, parallel)
        if at_once < 2:
            continue
        with contextlib.suppress(SourceError, LinkError), open_session(host) as session:
            if session.record.restrict:  # such a key can not ask
                continue
            limit = session.view.sshd_limits().max_startups
            if at_once > limit:
                warn(
                    invocation,
                    f"{host} may turn connections away when more than {limit} log in at the same time (MaxStartups of its sshd), and "
                    f"up to {at_once} backups begin at once; use --parallel {limit}",
                )


def _hear(invocation: Invocation, source: str, value: dict[str, Any]) -> None:
    message = f"{source}: {value.get('message', '')}"
    match value.get("type"):
        case "summary":
            if invocation.json:
                print_json(value)
        case "warning":
            warn(invocation, message)
        case "error":
            print_failure(
                message,
                int(value.get("code", 1)),
                str(value.get("hint", "")),
                json=invocation.json,
                log=str(value.get("log", "")),
            )
        case _:
            notice(invocation, message)


def _tell(ended: Sequence[Ended]) -> None:
    for one in ended:
        if one.summary is None:
            say(f"{one.source}: failed, exit code {one.code}")
            continue
        point = one.summary.get("point")
        say(
            f"{one.source}: {f'restore point {point[:12]}' if point else 'dry run'}, size "
            f"{format_size(one.summary['size_bytes'])}, new {format_size(one.summary['bytes_new'])}, "
            f"{format_duration(one.summary['duration_s'])}"
        )
    done = sum(one.summary is not None for one in ended)
    say(f"{done} of {len(ended)} backed up")
