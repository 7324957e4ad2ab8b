"""`holdfast mount`: restore points as plain files in a folder."""

from __future__ import annotations

from collections.abc import Callable

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_json, say
from holdfast.errors import UsageError
from holdfast.units import MIB, parse_size

__all__ = ["command"]

_LEAST_CACHE_BYTES = 16 * MIB


@click.command("mount")
@click.argument("folder", metavar="DIR")
@click.option("--vm", metavar="NAME", help="Only this VM, by name or UUID.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground, and log to stderr.")
@click.option("--allow-other", is_flag=True, help="Let other users of this machine read it.")
@click.option(
    "--cache-size", default="256MiB", show_default=True, metavar="SIZE", help="Memory for decoded data."
)
@repository_options
@click.pass_obj
def command(
    invocation: Invocation, folder: str, vm: str | None, foreground: bool, allow_other: bool, cache_size: str
) -> None:
    """Show all restore points as files in the empty folder DIR, read-only, until 'holdfast umount DIR'.

    Each restore point is a folder with descriptors and flat .vmdk files that VMware, QEMU and others can open. Only
    what is asked for is read. New restore points appear by themselves, forgotten ones vanish.
    """
    from holdfast.cli.mounting import MountPlan, log_to_stderr, log_to_system, serve_mount
    from holdfast.fuse.binding import require_libfuse
    from holdfast.fuse.daemon import run_in_background
    from holdfast.fuse.mountpoint import require_mountable

    cache_bytes = parse_size(cache_size)
    if cache_bytes < _LEAST_CACHE_BYTES:
        raise UsageError("the cache is too small", hint="give it 16MiB or more")
    place = require_mountable(folder, invocation.repository_path())
    with invocation.open_repository() as repository:
        plan = MountPlan(place, vm, allow_other, cache_bytes)
        if foreground:
            serve_mount(repository, plan, log_to_stderr, lambda: _tell(invocation, place, repository.path))
            return
        repository.unlock()
        require_libfuse()
        repository.detach()

        def work(ready: Callable[[], None]) -> None:
            repository.attach()
            serve_mount(repository, plan, log_to_system, ready)

        run_in_background(work)
        _tell(invocation, place, repository.path)


def _tell(invocation: Invocation, place: str, repository: str) -> None:
    if invocation.json:
        print_json({"type": "summary", "mount_point": place, "repository": repository})
    else:
        say(f"mounted on {place}; 'holdfast umount {place}' ends it")
