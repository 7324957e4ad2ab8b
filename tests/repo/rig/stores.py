"""Pack stores for tests: one in memory that loses what was not synced, and the faults around any store.

`MemoryPackStore` models a file system below a power switch. It keeps two images of each pack: what a
reader sees now, and what is certain to be on the platter (content as of its last sync, existence as of the
first one). `lose_power` replaces the former by something that a real machine could show after a crash:
unsynced packs may be gone, unsynced tails may be cut anywhere, and blocks of them may be zeros, since the
kernel writes pages in any order.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from holdfast.errors import DamagedData, InternalError, StorageError
from holdfast.ids import PackId
from holdfast.repo.packs import PackWriter

_BLOCK = 512


@dataclass(slots=True)
class _File:
    now: bytearray = field(default_factory=bytearray)
    durable: bytes | None = None
    holder: object | None = None


class _MemoryPackWriter:
    def __init__(self, pack_id: PackId, file: _File, lock: threading.RLock) -> None:
        self._id = pack_id
        self._file = file
        self._lock = lock
        file.holder = self

    @property
    def id(self) -> PackId:
        return self._id

    @property
    def length(self) -> int:
        return len(self._file.now)

    def _held(self) -> _File:
        if self._file.holder is not self:
            raise InternalError("a pack was written to without being held")
        return self._file

    def append(self, parts: Sequence[bytes]) -> int:
        with self._lock:
            file = self._held()
            start = len(file.now)
            for part in parts:
                file.now += part
            return start

    def cut(self, length: int) -> None:
        with self._lock:
            file = self._held()
            assert length <= len(file.now)
            del file.now[length:]

    def sync(self) -> None:
        with self._lock:
            file = self._held()
            file.durable = bytes(file.now)

    def close(self) -> None:
        with self._lock:
            if self._file.holder is self:
                self._file.holder = None


class MemoryPackStore:
    """See the module."""

    def __init__(self) -> None:
        self._files: dict[PackId, _File] = {}
        self._lock = threading.RLock()

    def create(self, pack_id: PackId) -> PackWriter:
        with self._lock:
            assert pack_id not in self._files
            file = self._files[pack_id] = _File()
            return _MemoryPackWriter(pack_id, file, self._lock)

    def adopt(self, pack_id: PackId) -> PackWriter | None:
        with self._lock:
            file = self._files.get(pack_id)
            if file is None or file.holder is not None:
                return None
            return _MemoryPackWriter(pack_id, file, self._lock)

    def read(self, pack_id: PackId, offset: int, length: int) -> bytes:
        with self._lock:
            file = self._files.get(pack_id)
            if file is None:
                raise DamagedData(f"pack {pack_id.hex()} is missing")
            data = bytes(file.now[offset : offset + length])
        if len(data) < length:
            raise DamagedData(f"pack {pack_id.hex()} ends at byte {offset + len(data)}, more was expected")
        return data

    def length(self, pack_id: PackId) -> int | None:
        with self._lock:
            file = self._files.get(pack_id)
            return None if file is None else len(file.now)

    def sync(self, pack_id: PackId) -> None:
        with self._lock:
            file = self._files.get(pack_id)
            if file is None:
                raise StorageError("there is no such pack")
            file.durable = bytes(file.now)

    def ids(self) -> Iterator[PackId]:
        with self._lock:
            return iter(sorted(self._files))

    def delete(self, pack_id: PackId) -> None:
        with self._lock:
            self._files.pop(pack_id, None)

    def free_bytes(self) -> int:
        return 1 << 40

    def allocated_bytes(self, pack_id: PackId) -> int:
        with self._lock:
            file = self._files.get(pack_id)
            data = bytes(file.now) if file is not None else b""
        return sum(_BLOCK for at in range(0, len(data), _BLOCK) if any(data[at : at + _BLOCK]))

    def can_punch(self) -> bool:
        return True

    def punch(self, pack_id: PackId, ranges: Sequence[tuple[int, int]]) -> None:
        with self._lock:
            file = self._files[pack_id]
            for start, end in ranges:
                file.now[start:end] = bytes(end - start)
            file.durable = bytes(file.now)

    def close(self) -> None:
        pass

    # --- what only tests do

    def copy(self) -> MemoryPackStore:
        """The same packs once more, held by nobody."""
        other = MemoryPackStore()
        with self._lock:
            for pack_id, file in self._files.items():
                other._files[pack_id] = _File(bytearray(file.now), file.durable)
        return other

    def kill(self) -> None:
        """All processes are gone: nothing is held any more, everything written stays."""
        with self._lock:
            for file in self._files.values():
                file.holder = None

    def lose_power(self, rng: random.Random) -> None:
        """The machine is gone: of what was not synced, anything may be left."""
        self.kill()
        with self._lock:
            for pack_id, file in list(self._files.items()):
                if file.durable is None and rng.random() < 0.5:
                    del self._files[pack_id]
                    continue
                file.now = bytearray(after_power_loss(file.durable or b"", bytes(file.now), rng))
                file.durable = bytes(file.now)

    def overwrite(self, pack_id: PackId, offset: int, data: bytes) -> None:
        """Damages a pack."""
        with self._lock:
            file = self._files[pack_id]
            file.now[offset : offset + len(data)] = data
            file.durable = bytes(file.now)

    def total_bytes(self) -> int:
        """Length of all packs together."""
        with self._lock:
            return sum(len(file.now) for file in self._files.values())


def _common_prefix(a: bytes, b: bytes) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    low, high = 0, shorter
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def after_power_loss(durable: bytes, now: bytes, rng: random.Random) -> bytes:
    """One of the images that a crash may leave between a synced one and the newest one."""
    manner = rng.randrange(4)
    if manner == 0:
        return durable
    if manner == 1:
        return now
    length = rng.randint(min(len(durable), len(now)), max(len(durable), len(now)))
    image = bytearray(now[:length].ljust(length, b"\0"))
    first = _common_prefix(durable, now)
    for start in range(first // _BLOCK * _BLOCK, length, _BLOCK):
        if rng.random() < 0.3:
            old = durable[start : start + _BLOCK].ljust(_BLOCK, b"\0")
            at = max(start, first)
            stop = min(start + _BLOCK, length)
            image[at:stop] = old[at - start : stop - start]
    return bytes(image)
