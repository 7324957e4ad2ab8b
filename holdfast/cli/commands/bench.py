"""`holdfast bench`: which settings suit a user's own data and disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import click

from holdfast.cli.invocation import Invocation
from holdfast.cli.options import repository_options
from holdfast.cli.output import Column, print_facts, print_json, print_table, say
from holdfast.cli.progress import progress
from holdfast.errors import EmptySource, UsageError, storage_error
from holdfast.units import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.disk import BlockSource
    from holdfast.repo.measure import Measurement
    from holdfast.repo.repository import InitOptions

__all__ = ["command"]


@click.command("bench")
@click.argument("source", metavar="[SOURCE]", required=False)
@click.option(
    "--sample", metavar="SIZE", default="1GiB", show_default=True, help="About how much data to look at."
)
@click.option(
    "--folder",
    metavar="DIR",
    help="Where to put the temporary repository. [default: beside the repository, else the system's]",
)
@repository_options
@click.pass_obj
def command(invocation: Invocation, source: str | None, sample: str, folder: str | None) -> None:
    """Measure what settings give on your own data and disk, and recommend some.

    SOURCE is what 'backup' takes; of a VM its largest disk is used. Without SOURCE, the largest disk of the newest
    restore point of the repository is. Nothing is changed: a temporary folder is used, and removed at the end.
    """
    sample_bytes = parse_size(sample)
    if not sample_bytes:
        raise UsageError("--sample is 0", hint="write for example 1GiB")
    from holdfast.repo.measure import measure, recommend

    with _disk(invocation, source) as (name, disk), _temporary(invocation, folder) as place:
        with progress(invocation, "measuring", unit="steps") as shown:
            measured = measure(
                disk,
                place,
                sample_bytes=sample_bytes,
                on_step=lambda _what, share: shown.update(int(share * 100), 100),
            )
        options, reason = recommend(measured)
        if invocation.json:
            _print_json(name, measured, options, reason)
        else:
            _print(name, place, measured, options, reason)


@contextlib.contextmanager
def _disk(invocation: Invocation, source: str | None) -> Iterator[tuple[str, BlockSource]]:
    """The disk to measure on, and what to call it."""
    if source is not None:
        from holdfast.esxi.folder import open_machine

        with contextlib.closing(open_machine(source)) as machine:
            if not machine.disks:
                raise EmptySource(f"{source} has no disk")
            largest = max(machine.disks, key=lambda disk: disk.source.size_bytes)
            yield largest.info.name, largest.source
        return
    if not invocation.address:
        raise UsageError(
            "bench needs a SOURCE, or a repository that holds one", hint="holdfast bench web1.vmdk"
        )
    with invocation.open_repository() as repository:
        points = repository.points()
        disks = [disk for disk in points[-1].manifest.disks if disk.tree.size_bytes] if points else []
        if not disks:
            raise EmptySource("the repository holds no disk to measure on", hint="name a SOURCE")
        chosen = max(disks, key=lambda disk: disk.tree.size_bytes)
        yield chosen.info.name, repository.open_content(chosen.tree)


@contextlib.contextmanager
def _temporary(invocation: Invocation, folder: str | None) -> Iterator[str]:
    """A folder of our own on the disk that the repository is, or would be, on."""
    if folder is None and invocation.address:
        folder = os.path.dirname(os.path.abspath(invocation.repository_path()))
    try:
        place = tempfile.mkdtemp(prefix=".holdfast-bench-", dir=folder)
    except OSError as error:
        raise storage_error(
            error, f"making a temporary folder in {folder or tempfile.gettempdir()}"
        ) from None
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.0f}"


def _print(name: str, place: str, measured: Measurement, options: InitOptions, reason: str) -> None:
    print_facts(
        [
            ("disk", f"{name}, {format_size(measured.data_bytes)} of data"),
            ("sample", format_size(measured.sample_bytes)),
            ("cores", str(measured.cores)),
            ("reading the source", f"{_rate(measured.read_rate)} MB/s"),
            ("writing", f"{_rate(measured.write_rate)} MB/s to {os.path.dirname(place)}"),
            ("projected restore", f"{_rate(measured.projected_restore_rate)} MB/s"),
        ]
    )
    say("")
    print_table(
        [
            Column("CHUNKER"),
            Column("SIZE", right=True),
            Column("CHUNKS", right=True),
            Column("NEW DATA", right=True),
            Column("STORED", right=True),
            Column("WITH METADATA", right=True),
            Column("1 + 30 BACKUPS", right=True),
            Column("INDEX OF ALL", right=True),
            Column("CUT MB/S", right=True),
            Column("HASH MB/S", right=True),
        ],
        [
            [
                r.chunker.name,
                format_size(r.chunker.chunk_size_bytes),
                str(r.unique_chunks),
                format_size(r.unique_bytes),
                format_size(r.stored_bytes),
                format_size(r.stored_bytes + r.metadata_bytes),
                format_size(measured.month_bytes(r)),
                format_size(measured.projected_index_bytes(r)),
                _rate(r.cut_rate),
                _rate(r.hash_rate),
            ]
            for r in measured.chunkings
        ],
    )
    say("")
    print_table(
        [
            Column("COMPRESSION"),
            Column("RATIO", right=True),
            Column("COMPRESS MB/S", right=True),
            Column("DECOMPRESS MB/S", right=True),
        ],
        [
            [f"zstd:{r.level}", f"{r.ratio:.2f}", _rate(r.compress_rate), _rate(r.decompress_rate)]
            for r in measured.levels
        ],
    )
    say("")
    print_table(
        [
            Column("THREADS", right=True),
            Column("FIRST BACKUP MB/S", right=True),
            Column("UNCHANGED MB/S", right=True),
            Column("READ BACK MB/S", right=True),
        ],
        [
            [str(r.threads), _rate(r.backup_rate), _rate(r.unchanged_rate), _rate(r.restore_rate)]
            for r in measured.threads
        ],
    )
    say("")
    say(f"Recommended: holdfast init {' '.join(_flags(options))}")
    say(f"Since {reason}")


def _flags(options: InitOptions) -> list[str]:
    compression = f"zstd:{options.compression_level}" if options.compression_level else "none"
    size = f"{options.chunk_size_bytes >> 10}KiB"
    return ["--chunker", options.chunker, "--chunk-size", size, "--compression", compression]


def _print_json(name: str, measured: Measurement, options: InitOptions, reason: str) -> None:
    print_json(
        {
            "type": "summary",
            "disk": name,
            "data_bytes": measured.data_bytes,
            "sample_bytes": measured.sample_bytes,
            "cores": measured.cores,
            "read_bytes_per_s": round(measured.read_rate),
            "write_bytes_per_s": round(measured.write_rate),
            "projected_restore_bytes_per_s": round(measured.projected_restore_rate),
            "chunkers": [
                {
                    "chunker": r.chunker.name,
                    "chunk_size_bytes": r.chunker.chunk_size_bytes,
                    "chunks": r.chunks,
                    "unique_chunks": r.unique_chunks,
                    "unique_bytes": r.unique_bytes,
                    "stored_bytes": r.stored_bytes,
                    "metadata_bytes": r.metadata_bytes,
                    "month_bytes": measured.month_bytes(r),
                    "projected_index_bytes": measured.projected_index_bytes(r),
                    "cut_bytes_per_s": round(r.cut_rate),
                    "hash_bytes_per_s": round(r.hash_rate),
                }
                for r in measured.chunkings
            ],
            "compression": [
                {
                    "level": r.level,
                    "ratio": round(r.ratio, 3),
                    "compress_bytes_per_s": round(r.compress_rate),
                    "decompress_bytes_per_s": round(r.decompress_rate),
                }
                for r in measured.levels
            ],
            "threads": [
                {
                    "threads": r.threads,
                    "backup_bytes_per_s": round(r.backup_rate),
                    "unchanged_bytes_per_s": round(r.unchanged_rate),
                    "restore_bytes_per_s": round(r.restore_rate),
                }
                for r in measured.threads
            ],
            "recommended": {
                "chunker": options.chunker,
                "chunk_size_bytes": options.chunk_size_bytes,
                "compression_level": options.compression_level,
                "flags": _flags(options),
                "reason": reason,
            },
        }
    )
