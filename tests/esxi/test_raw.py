from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.errors import (
    DestinationExists,
    DiskFull,
    SourceChanged,
    SourceNotFound,
    SourceUnreadable,
    SourceUnsupported,
    StorageDenied,
    StorageError,
)
from holdfast.esxi.raw import FileSink, RawSource

MIB = 1 << 20


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_reads_a_file_of_odd_size(tmp_path: Path, content, scatter) -> None:
    path = tmp_path / "disk.raw"
    scatter(path, 5 * MIB + 77)
    source = RawSource(str(path))
    content.check(source, path.read_bytes())
    source.close()
    source.close()


def test_holes_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(10 * MIB)
        file.write(b"x" * 4096)
    source = RawSource(str(path))
    ranges = list(source.data_extents(0, 64 * MIB))
    assert sum(length for _, length in ranges) <= MIB
    assert list(source.data_extents(20 * MIB, 30 * MIB)) == []
    assert list(source.data_extents(10 * MIB + 1, 10 * MIB + 2)) == [(10 * MIB + 1, 1)]
    source.close()


def test_an_empty_file_has_no_extents(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    source = RawSource(str(tmp_path / "empty"))
    assert source.size_bytes == 0
    assert list(source.data_extents(0, 0)) == []
    source.read_into(0, memoryview(bytearray()))
    source.close()


def test_a_file_system_without_holes_gives_one_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x" * 10)
    source = RawSource(str(tmp_path / "x"))

    def refuse(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert list(source.data_extents(2, 9)) == [(2, 7)]
    source.close()


def test_a_file_that_shrinks_is_noticed_by_reading_and_by_asking_for_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * MIB)
    source = RawSource(str(path))
    os.truncate(path, 1000)
    with pytest.raises(SourceChanged, match=r"disk\.raw"):
        source.read_into(0, memoryview(bytearray(2000)))
    with pytest.raises(SourceChanged, match=r"disk\.raw"):
        list(source.data_extents(0, MIB))
    source.close()


def test_a_read_error_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x" * 10)
    source = RawSource(str(tmp_path / "x"))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SourceUnreadable, match="x can not be read"):
        source.read_into(0, memoryview(bytearray(5)))
    source.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)))
    source = RawSource(str(tmp_path / "x"))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    buffer = bytearray(200)
    source.read_into(3, memoryview(buffer))
    assert buffer == bytes(range(3, 203))
    source.close()


@contextlib.contextmanager
def oddity(kind: str, folder: Path) -> Iterator[str]:
    path = str(folder / "odd.raw")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            yield path
        return
    yield path


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_what_is_no_disk_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    with oddity(kind, tmp_path) as path, pytest.raises(SourceUnsupported, match=r"odd|zero"):
        RawSource(path)


def test_absent_unreadable_and_impossible_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceNotFound, match="nothing-here"):
        RawSource(str(tmp_path / "nothing-here"))
    with pytest.raises(SourceNotFound):
        RawSource("a\0b")
    with pytest.raises(SourceNotFound):
        RawSource(str(tmp_path / ("x" * 300)))
    (tmp_path / "x").touch()
    os.symlink(tmp_path / "x", tmp_path / "link")
    with pytest.raises(SourceUnsupported, match="symbolic link"):
        RawSource(str(tmp_path / "link"), follow=False)

    def refuse(*_: object) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SourceUnreadable, match="Permission denied") as caught:
        RawSource(str(tmp_path / "x"))
    assert caught.value.hint


def test_file_info(tmp_path: Path) -> None:
    path = tmp_path / "x.nvram"
    path.write_bytes(b"abc")
    path.chmod(0o640)
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    source = RawSource(str(path))
    info = source.file_info("d/x.nvram")
    assert (info.name, info.size_bytes, info.mode) == ("d/x.nvram", 3, 0o640)
    assert info.mtime_ns == 1_700_000_000_123_456_789
    source.close()


# FileSink


def sink(path: Path, size: int, *, overwrite: bool = False, **more: int) -> FileSink:
    return FileSink(str(path), size, overwrite=overwrite, mode=more.pop("mode", 0o644), **more)


def test_a_sink_writes_a_sparse_file_and_names_it_last(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    out = sink(path, 64 * MIB + 3, mode=0o600, mtime_ns=1_600_000_000_000_000_001)
    out.write(MIB + 1, memoryview(b"abc"))
    out.write(64 * MIB, memoryview(b"end"))
    assert not path.exists()
    assert len(names(tmp_path)) == 1
    out.finish()
    assert names(tmp_path) == ["disk.raw"]
    status = path.stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (64 * MIB + 3, 0o600)
    assert status.st_mtime_ns == 1_600_000_000_000_000_001
    assert status.st_blocks * 512 < MIB
    data = path.read_bytes()
    assert data[MIB + 1 : MIB + 4] == b"abc"
    assert data[-3:] == b"end"
    assert len(data.replace(b"\0", b"")) == 6


def test_abort_leaves_nothing(tmp_path: Path) -> None:
    out = sink(tmp_path / "disk.raw", 100)
    out.write(0, memoryview(b"abc"))
    out.abort()
    out.abort()
    assert names(tmp_path) == []


def test_what_exists_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"precious")
    with pytest.raises(DestinationExists, match=r"disk\.raw") as caught:
        sink(path, 100)
    assert caught.value.hint
    assert names(tmp_path) == ["disk.raw"]
    out = sink(path, 3, overwrite=True)
    out.write(0, memoryview(b"new"))
    assert path.read_bytes() == b"precious"
    out.finish()
    assert path.read_bytes() == b"new"


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    out = sink(path, 3)
    path.write_bytes(b"precious")
    with pytest.raises(DestinationExists, match=r"disk\.raw"):
        out.finish()
    out.abort()
    assert path.read_bytes() == b"precious"
    assert names(tmp_path) == ["disk.raw"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_system_without_hard_links(
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "disk.raw"
    out = sink(path, 3)
    out.write(0, memoryview(b"new"))
    if taken:
        path.write_bytes(b"precious")
        with pytest.raises(DestinationExists):
            out.finish()
        out.abort()
    else:
        out.finish()
    assert path.read_bytes() == (b"precious" if taken else b"new")
    assert names(tmp_path) == ["disk.raw"]


def test_a_link_is_replaced_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    os.symlink(tmp_path / "victim", tmp_path / "disk.raw")
    with pytest.raises(DestinationExists):
        sink(tmp_path / "disk.raw", 3)
    out = sink(tmp_path / "disk.raw", 3, overwrite=True)
    out.finish()
    assert not (tmp_path / "disk.raw").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_no_folder_pipe_or_device_is_ever_replaced(kind: str, tmp_path: Path) -> None:
    with oddity(kind, tmp_path) as path, pytest.raises(DestinationExists, match="no regular file"):
        sink(Path(path), 3, overwrite=True)


def test_set_id_bits_out_of_a_backup_are_dropped(tmp_path: Path) -> None:
    out = sink(tmp_path / "x", 0, mode=0o6755)
    out.finish()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o755


def test_names_as_long_as_a_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127 + "x")
    out = sink(path, 1)
    out.finish()
    assert path.exists()


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, DiskFull), (errno.EROFS, StorageDenied), (errno.EIO, StorageError)],
)
def test_write_errors_are_translated(
    number: int, expected: type[StorageError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    out = sink(tmp_path / "disk.raw", 10)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        with pytest.raises(expected, match=r"disk\.raw"):
            out.write(0, memoryview(b"abc"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(expected, match=r"disk\.raw"):
            out.finish()
    out.abort()
    assert names(tmp_path) == []
    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", fail)
        with pytest.raises(expected, match=r"disk\.raw"):
            sink(tmp_path / "disk.raw", 10)
    assert names(tmp_path) == []


def test_a_missing_folder_and_impossible_values(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        sink(tmp_path / "absent" / "x", 1)
    with pytest.raises(StorageError):
        sink(tmp_path / "x", 1 << 70)
    with pytest.raises(StorageError):
        FileSink("a\0b", 1, overwrite=False, mode=0o644)
    out = sink(tmp_path / "x", 1, mtime_ns=1 << 100)
    with pytest.raises(StorageError, match="time"):
        out.finish()
    out.abort()


def test_threads_write_at_once(tmp_path: Path) -> None:
    rng = random.Random(5)
    data = rng.randbytes(3 * MIB + 5)
    out = sink(tmp_path / "x", len(data))
    pieces = [(at, memoryview(data)[at : at + 10_007]) for at in range(0, len(data), 10_007)]
    rng.shuffle(pieces)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda piece: out.write(*piece), pieces))
    out.finish()
    assert (tmp_path / "x").read_bytes() == data


def test_two_restores_to_one_name_do_not_meet(tmp_path: Path) -> None:
    """Each has a temporary file of its own; the second to finish is refused."""
    outs = [sink(tmp_path / "x", 1) for _ in range(2)]
    barrier = threading.Barrier(2)
    results: list[str] = []

    def finish(out: FileSink, letter: bytes) -> None:
        out.write(0, memoryview(letter))
        barrier.wait()
        try:
            out.finish()
            results.append("done")
        except DestinationExists:
            out.abort()
            results.append("refused")

    threads = [threading.Thread(target=finish, args=pair) for pair in zip(outs, (b"a", b"b"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["done", "refused"]
    assert names(tmp_path) == ["x"]
