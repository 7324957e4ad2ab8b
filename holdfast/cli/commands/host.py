"""`holdfast host`: the ESXi hosts that are linked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.linked import host_book, open_session
from holdfast.cli.options import json_option
from holdfast.cli.output import Column, Json, notice, print_facts, print_json, print_table, say, warn
from holdfast.errors import EXIT_WARNINGS, HoldfastError
from holdfast.esxi.agent.gate import LEVELS
from holdfast.units import format_size

if TYPE_CHECKING:
    from holdfast.cli.hostcheck import HostReport
    from holdfast.esxi.agent.bundle import Level

__all__ = ["command"]


@click.group("host")
@json_option
def command() -> None:
    """Link ESXi hosts, look at them, and clean up after interrupted runs.

    A host is linked once, with its password; from then on Holdfast uses a key of its own. SSH has to be enabled on the host.
    """


@command.command("add")
@click.argument("name")
@click.argument("address", metavar="USER@HOST[:PORT]")
@click.option(
    "--key", metavar="FILE", default="", help="Use this private key (RSA or ECDSA), or make one there."
)
@click.option(
    "--restrict",
    type=click.Choice(LEVELS),
    is_flag=False,
    flag_value="backup",
    metavar="[LEVEL]",
    help="Have the host let the key run nothing but this version's agent, for: 'backup' (the default), 'restore' (new VMs as "
    "well), 'in-place' (and existing disks). To be linked anew after an upgrade that changes the agent.",
)
@click.option(
    "--fingerprint", metavar="SHA256:...", default="", help="The host's key, instead of being asked about it."
)
@json_option
@click.pass_obj
def add(
    invocation: Invocation, name: str, address: str, key: str, restrict: Level | None, fingerprint: str
) -> None:
    """Link a host: confirm its key, give its password once, exchange keys.

    Done again, it changes what the key may do over there.

    [env: HOLDFAST_HOST_PASSWORD, where nobody is there to type it]
    """
    from holdfast.cli.linking import link_host

    record = link_host(invocation, name, address, key=key, restrict=restrict, fingerprint=fingerprint)
    version = ""
    try:
        with open_session(name) as session:
            version = str(session.view.version())
    except HoldfastError as error:
        warn(invocation, f"{name} is linked, but does not answer like an ESXi host: {error.message}")
        invocation.exit_code = EXIT_WARNINGS
    if invocation.json:
        print_json(
            {
                "name": name,
                "address": str(record.address),
                "key": record.key,
                "version": version,
                "restrict": record.restrict,
            }
        )
        return
    say(f"linked {name} ({record.address})" + (f": ESXi {version}" if version else ""))
    if record.restrict:
        say(f"its key runs this version's agent there on level '{record.restrict}', and nothing else")


@command.command("list")
@json_option
@click.pass_obj
def list_hosts(invocation: Invocation) -> None:
    """List the linked hosts, and what our key may do there."""
    hosts = host_book().all()
    if invocation.json:
        print_json(
            {
                "hosts": [
                    {
                        "name": h.name,
                        "address": str(h.address),
                        "key": h.key,
                        "restrict": h.restrict,
                        "agent_present": h.agent_present,
                    }
                    for h in hosts
                ]
            }
        )
        return
    print_table(
        [Column("NAME"), Column("ADDRESS"), Column("RESTRICTED"), Column("KEY", wide=True)],
        [(h.name, str(h.address), _restriction(h.restrict, present=h.agent_present), h.key) for h in hosts],
    )
    for host in hosts:
        if not host.agent_present:
            notice(
                invocation,
                f"{host.name} runs the agent of another version of Holdfast only: link it again, "
                f"holdfast host add {host.name} {host.address} --restrict {host.restrict}",
            )


def _restriction(level: str, *, present: bool) -> str:
    return (level if present else f"{level}, another agent") if level else "no"


@command.command("check")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--clean", is_flag=True, help="Remove what interrupted runs of this installation have left behind."
)
@json_option
@click.pass_obj
def check(invocation: Invocation, names: tuple[str, ...], clean: bool) -> None:
    """Look at hosts: version, datastores, Python, clock, licence, limits of SSH, and what interrupted runs have left.

    Without NAME, all linked hosts are looked at.
    """
    from holdfast.cli.hostcheck import check_host

    reports = []
    for name in names or [host.name for host in host_book().all()]:
        with open_session(name) as session:
            reports.append(check_host(session, clean=clean, tell=lambda text: notice(invocation, text)))
    if any(report.warnings for report in reports):
        invocation.exit_code = EXIT_WARNINGS
    if invocation.json:
        print_json({"hosts": [report.as_json() for report in reports]})
        return
    for report in reports:
        _show(report)
        for warning in report.warnings:
            warn(invocation, warning)


def _show(report: HostReport) -> None:
    facts = [
        ("host", f"{report.name} ({report.address})"),
        ("key", f"runs the agent only, on level '{report.restrict}'" if report.restrict else "has a shell"),
    ]
    if report.version:
        facts += [
            ("version", report.version),
            ("python", report.python or "none: only --via stream is possible"),
            ("clock", f"{report.clock_skew_s:+d} s against this machine"),
            *(("datastore", f"{v.name or v.uuid} ({v.kind}), {format_size(v.free_bytes)} of {format_size(v.size_bytes)} free") for v in report.volumes),
            ("VMs", str(report.vms)),
        ]  # fmt: skip
    allows = report.allows
    if allows is not None:
        facts += [("licence", f"{one.name} ({one.edition})") for one in allows.licenses]
        if allows.sshd is not None:
            facts.append(
                ("sshd", f"{allows.sshd.max_startups} logins at the same time, {allows.sshd.max_sessions} commands over one connection")
            )  # fmt: skip
        facts += [("hint", hint) for hint in allows.hints()]
    print_facts(facts)


@command.command("remove")
@click.argument("name")
@json_option
@click.pass_obj
def remove(invocation: Invocation, name: str) -> None:
    """Unlink a host, and take our key off it.

    A key that is limited by --restrict can not do that; the host's password is asked for. [env: HOLDFAST_HOST_PASSWORD]
    """
    from holdfast.cli.linking import unlink_host

    unlink_host(invocation, name)
    values: dict[str, Json] = {"name": name}
    if invocation.json:
        print_json(values)
        return
    say(f"unlinked {name}")


@command.command("capture")
@click.argument("name")
@click.argument("out", metavar="OUT.tar")
@json_option
@click.pass_obj
def capture(invocation: Invocation, name: str, out: str) -> None:
    """Collect what a host prints, for a report to the developers; changes nothing.

    Names, addresses and UUIDs are replaced, the same one by the same word everywhere. Look through the file before you pass it on.
    """
    from holdfast.cli.hostcapture import capture_host

    with open_session(name) as session:
        count = capture_host(session, out)
    if invocation.json:
        print_json({"name": name, "out": out, "commands": count})
        return
    say(f"wrote what {count} commands printed to {out}; look through it before you pass it on")
