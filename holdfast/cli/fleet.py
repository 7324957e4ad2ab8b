"""Several VMs at once: one process for each backup, at most so many at a time, and one summary.

Each process is the same command for one source, with `--json`; what it prints is shown here, with the name of its source.
So a backup that crashes takes no other with it, an index is opened once per process, and all cores are used.

An interruption is passed on to all, and waited for: each one puts its VM back as it was.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from holdfast.cli.linked import SCHEME, is_esxi, open_session, parse_esxi
from holdfast.errors import EXIT_WARNINGS, EmptySource, UsageError

if TYPE_CHECKING:
    from holdfast.cli.progress import Progress

__all__ = ["Ended", "expand_all", "run_fleet", "same_options", "together"]

_DONE: Final = (0, EXIT_WARNINGS)


@dataclass(frozen=True, slots=True)
class Ended:
    """How the backup of a source ended. `summary` is the JSON that it printed last, if it did."""

    source: str
    code: int
    summary: dict[str, Any] | None


def expand_all(
    sources: Sequence[str], excluded: Sequence[str], tell: Callable[[str], None]
) -> tuple[str, ...]:
    """The sources, with `esxi://HOST` replaced by all VMs of that host whose names match none of `excluded`.

    Raises:
        UsageError: a source is no host.
        EmptySource: nothing is left.
    """
    found: list[str] = []
    for source in sources:
        if not is_esxi(source) or parse_esxi(source).rest:
            raise UsageError(f"--all is for hosts, and '{source}' is none", hint="write esxi://HOST")
        host = parse_esxi(source).host
        with open_session(host) as session:
            vms = session.view.vms(tell)
        names = [vm.name for vm in vms]
        for vm in vms:
            if not any(fnmatch.fnmatchcase(vm.name, pattern) for pattern in excluded):
                unique = names.count(vm.name) == 1 and "/" not in vm.name
                found.append(f"{SCHEME}{host}/{vm.name if unique else vm.id}")
    if not found:
        raise EmptySource(
            "no VM is left to be backed up", hint="'holdfast vms HOST' lists them; see --exclude"
        )
    return tuple(found)


def run_fleet(
    sources: Sequence[str],
    arguments: Callable[[str], list[str]],
    parallel: int,
    progress: Progress,
    hear: Callable[[str, dict[str, Any]], None],
    password: str | None,
) -> tuple[Ended, ...]:
    """How the backups of all sources ended, in their order.

    Args:
        arguments: of the command for one source.
        hear: told each line (JSON) of each source.
        password: of the repository, if it was typed; passed on by a pipe.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(sources)):
        waiting.put(number)
    ended: dict[int, Ended] = {}
    running: dict[int, subprocess.Popen[str]] = {}
    state: dict[int, tuple[int, int]] = {}
    lock = threading.Lock()
    stopping = threading.Event()

    def listen(number: int, stream: Iterator[str], last: list[dict[str, Any]]) -> None:
        for line in stream:
            try:
                value = json.loads(line)
            except ValueError:
                value = {"type": "notice", "message": line.rstrip()}
            with lock:
                if value.get("type") == "progress":
                    state[number] = (int(value.get("bytes_done", 0)), int(value.get("bytes_total", 0)))
                    progress.update(
                        sum(one[0] for one in state.values()), sum(one[1] for one in state.values())
                    )
                elif value.get("type") == "summary":
                    last[:] = [value]
                hear(sources[number], value)

    def work() -> None:
        while not stopping.is_set():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            last: list[dict[str, Any]] = []
            with _started(arguments(sources[number]), password) as process:
                with lock:
                    running[number] = process
                if stopping.is_set():
                    process.send_signal(signal.SIGINT)
                assert process.stdout is not None
                assert process.stderr is not None
                errors = threading.Thread(target=listen, args=(number, process.stderr, []), daemon=True)
                errors.start()
                listen(number, process.stdout, last)
                errors.join()
                code = process.wait()
            with lock:
                del running[number]
                ended[number] = Ended(sources[number], code, last[0] if last else None)

    threads = [threading.Thread(target=work, name=f"fleet-{n}") for n in range(min(parallel, len(sources)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stopping.set()
        with lock:
            for process in running.values():
                with contextlib.suppress(OSError):
                    process.send_signal(signal.SIGINT)
        for thread in threads:
            thread.join()
        raise
    return tuple(ended[number] for number in sorted(ended))


def same_options(context: click.Context, left_out: Collection[str]) -> list[str]:
    """The options that a command was given, as words of a command line.

    Args:
        left_out: names of parameters.
    """
    words: list[str] = []
    for parameter in context.command.params:
        if (
            not isinstance(parameter, click.Option)
            or parameter.name in left_out
            or not parameter.expose_value
        ):
            continue
        value = context.params.get(parameter.name or "")
        if value == parameter.default or value in (None, False, ()):
            continue
        option = parameter.opts[-1]
        if parameter.is_flag:
            words.append(option)
        else:
            for one in value if parameter.multiple else [value]:
                words += [option, str(one)]
    return words


def together(ended: Sequence[Ended]) -> int:
    """The exit code of all together: of the first failure, else of warnings."""
    codes = [one.code for one in ended]
    return next((code for code in codes if code not in _DONE), EXIT_WARNINGS if EXIT_WARNINGS in codes else 0)


@contextlib.contextmanager
def _started(arguments: list[str], password: str | None) -> Iterator[subprocess.Popen[str]]:
    environment = dict(os.environ)
    pipe: tuple[int, ...] = ()
    if password is not None:
        reading, writing = os.pipe()
        os.write(writing, f"{password}\n".encode())
        os.close(writing)
        pipe = (reading,)
        environment["HOLDFAST_PASSWORD_FILE"] = f"/dev/fd/{reading}"
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "holdfast", *arguments],
            env=environment,
            pass_fds=pipe,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    finally:
        for descriptor in pipe:
            os.close(descriptor)
    with process:
        yield process
