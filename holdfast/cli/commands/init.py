"""`holdfast init`: a new repository."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final, cast

import click
from click.core import ParameterSource

from holdfast.chunker import CHUNKER_NAMES, DEFAULT_CHUNKER_PARAMS
from holdfast.cli.commands.check import open_other
from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import print_facts, print_json, say
from holdfast.cli.passwords import password_for_init
from holdfast.errors import UsageError
from holdfast.units import format_size, parse_size

if TYPE_CHECKING:
    from holdfast.repo.format.config import Cipher

__all__ = ["command", "compression_level"]

_ZSTD: Final = re.compile(r"zstd(?::(\d{1,2}))?\Z")


def compression_level(text: str) -> int:
    """The level that `zstd:N`, `zstd`, `auto` or `none` stands for; 0 is none.

    Raises:
        UsageError: it is nothing of these.
    """
    if text in ("none", "auto"):
        return 0 if text == "none" else 1
    match = _ZSTD.match(text)
    level = int(match[1] or 1) if match else 0
    if not 1 <= level <= 19:
        raise UsageError(f"'{text}' is no compression", hint="write none, auto, or zstd:1 to zstd:19")
    return level


@click.command("init")
@click.option(
    "--encryption",
    type=click.Choice(["none", "aes256-gcm", "chacha20-poly1305"]),
    default="none",
    show_default=True,
    help="How all content is encrypted. Can not be changed later.",
)
@click.option(
    "--chunker",
    type=click.Choice(CHUNKER_NAMES),
    default=DEFAULT_CHUNKER_PARAMS.name,
    show_default=True,
    help="How disks are cut into chunks. Can not be changed later.",
)
@click.option(
    "--chunk-size",
    metavar="SIZE",
    default="64KiB",
    show_default=True,
    help="The size of chunks that is aimed at. Can not be changed later.",
)
@click.option(
    "--compression",
    metavar="zstd:N|auto|none",
    default="zstd:1",
    show_default=True,
    help="How chunks are compressed; N is 1 (fast) to 19 (small); auto raises it while the source is slow.",
)
@click.option(
    "--like",
    metavar="ADDRESS",
    help="Take encryption, key and chunking from this repository, so that replication copies records as they are.",
)
@click.option(
    "--like-password-file", metavar="FILE", help="That repository's password. [default: the new one's]"
)
@repository_options
@click.pass_context
def command(
    context: click.Context,
    encryption: str,
    chunker: str,
    chunk_size: str,
    compression: str,
    like: str | None,
    like_password_file: str | None,
) -> None:
    """Make a new repository.

    The folder must not exist, or be empty. With encryption, a password is asked for, or taken from
    HOLDFAST_PASSWORD_FILE, HOLDFAST_PASSWORD_COMMAND or HOLDFAST_PASSWORD.
    """
    from holdfast.repo.repository import InitOptions, Repository

    invocation = context.find_object(Invocation)
    assert invocation is not None
    path = invocation.repository_path()
    if like_password_file and not like:
        raise UsageError("--like-password-file needs --like")
    if like:
        for name in ("encryption", "chunker", "chunk_size"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(f"--{name.replace('_', '-')} is taken from the repository of --like")
    options = InitOptions(
        cipher=None if encryption == "none" else cast("Cipher", encryption),
        chunker=chunker,
        chunk_size_bytes=parse_size(chunk_size),
        compression_level=compression_level(compression),
        compression_auto=compression == "auto",
    )
    with contextlib.ExitStack() as stack:
        other = open_other(invocation, stack, like, like_password_file) if like else None
        encrypted = options.cipher if other is None else other.config.encryption
        password = password_for_init(invocation) if encrypted else None
        repository = stack.enter_context(Repository.init(path, options, password=password, like=other))
        config = repository.config
        path = repository.path
    encryption = config.encryption.cipher if config.encryption else "none"
    if invocation.json:
        print_json(
            {
                "id": config.id.hex(),
                "path": path,
                "encryption": encryption,
                "chunker": config.chunker,
                "chunk_size_bytes": config.chunk_size_bytes,
                "compression": str(config.compression),
                "segment_bytes": config.segment_bytes,
                "pack_bytes": config.pack_bytes,
            }
        )
        return
    print_facts(
        [
            ("repository", path),
            ("id", config.id.hex()),
            ("encryption", encryption),
            ("chunker", f"{config.chunker}, {format_size(config.chunk_size_bytes)}"),
            ("compression", str(config.compression)),
        ]
    )
    if config.encryption:
        say("")
        say("Without the password nothing can be restored. Keep a copy of the key in a safe place as well,")
        say("apart from the repository:  holdfast key export --output FILE")
