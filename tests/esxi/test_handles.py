from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import SourceChanged
from holdfast.esxi.handles import FilePool, SharedFile


def open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def make(folder: Path, count: int) -> list[str]:
    paths = [str(folder / f"file{number}") for number in range(count)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(b"%d" % number)
    return paths


def read(file: SharedFile) -> bytes:
    with file.descriptor() as descriptor:
        return os.pread(descriptor, 100, 0)


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    pool = FilePool(4)
    before = open_count()
    files = [SharedFile(path, pool=pool) for path in make(tmp_path, 50)]
    assert open_count() <= before + 5
    for _ in range(2):
        assert [read(file) for file in files] == [b"%d" % number for number in range(50)]
        assert open_count() <= before + 5
    for file in files:
        file.close()
        file.close()
    assert open_count() == before


def test_a_file_in_use_stays_open(tmp_path: Path) -> None:
    pool = FilePool(2)
    files = [SharedFile(path, pool=pool) for path in make(tmp_path, 10)]
    with files[0].descriptor() as descriptor:
        for file in files[1:]:
            read(file)
        assert os.pread(descriptor, 10, 0) == b"0"
        files[0].close()
        assert os.pread(descriptor, 10, 0) == b"0"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pread(descriptor, 10, 0)
    for file in files:
        file.close()


def test_a_file_that_was_replaced_is_not_read_on(tmp_path: Path) -> None:
    pool = FilePool(1)
    first, second, third = make(tmp_path, 3)
    files = [SharedFile(first, pool=pool), SharedFile(second, pool=pool), SharedFile(third, pool=pool)]
    os.replace(third, first)
    with pytest.raises(SourceChanged, match="file0 was replaced"):
        read(files[0])
    os.unlink(second)
    read(files[2]) if os.path.exists(third) else None
    with pytest.raises(SourceChanged, match="file1 was removed"):
        read(files[1])
    for file in files:
        file.close()


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = open_count() + 12
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_room_is_made_when_the_process_runs_out(tmp_path: Path, few_descriptors: int) -> None:
    pool = FilePool(1000)
    files = [SharedFile(path, pool=pool) for path in make(tmp_path, few_descriptors + 20)]
    assert [read(file) for file in files] == [b"%d" % number for number in range(len(files))]
    for file in files:
        file.close()


def test_many_threads_share_a_small_pool(tmp_path: Path) -> None:
    pool = FilePool(3)
    files = [SharedFile(path, pool=pool) for path in make(tmp_path, 20)]
    wrong: list[object] = []

    def work(offset: int) -> None:
        try:
            for step in range(200):
                number = (step * 7 + offset) % 20
                if read(files[number]) != b"%d" % number:
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for file in files:
        file.close()
