"""What hostd tells the view of the datastores: which files are locked, and which faults are on.

hostd writes the rules as a file and then counts up a generation in memory that both have mapped; the view compares
that number with each call, so a lock is in force when the command that made it has returned, at the cost of reading
eight bytes. The view counts the bytes that it has handed out in the same memory.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass, field

_WORD = struct.Struct("=Q")
_SIZE = 4096


@dataclass(slots=True)
class Rules:
    """The state of locks and faults. Paths are relative to the folder of volumes."""

    exclusive: list[str] = field(default_factory=list)
    """Nobody else opens these: extents that a running VM writes, its swap and its lock files."""
    read_only: list[str] = field(default_factory=list)
    """These are open for reading: bases and redo logs below the top of a running VM."""
    busy_reads: bool = False
    busy_at_bytes: int | None = None
    read_error: str = ""
    read_delay_s: float = 0.0
    full: list[str] = field(default_factory=list)
    """Volumes without room."""
    capacities: dict[str, int] = field(default_factory=dict)


class Board:
    """One side's hold on the rules."""

    def __init__(self, path: str) -> None:
        self._path = path
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(bytes(_SIZE))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self._seen = -1
        self._rules = Rules()

    def publish(self, rules: Rules) -> None:
        """On return the view acts by these rules. Only hostd calls this."""
        with open(self._path + ".new", "w", encoding="utf-8") as file:
            json.dump(asdict(rules), file)
        os.rename(self._path + ".new", self._path + ".json")
        _WORD.pack_into(self._memory, 0, _WORD.unpack_from(self._memory, 0)[0] + 1)

    def rules(self) -> Rules:
        """The rules of the moment. Only the view calls this."""
        generation = _WORD.unpack_from(self._memory, 0)[0]
        if generation != self._seen:
            if generation:
                with open(self._path + ".json", encoding="utf-8") as file:
                    self._rules = Rules(**json.load(file))
            self._seen = generation
        return self._rules

    @property
    def read_bytes(self) -> int:
        """Bytes that the view has handed out."""
        return int(_WORD.unpack_from(self._memory, 8)[0])

    def count(self, length: int) -> None:
        _WORD.pack_into(self._memory, 8, _WORD.unpack_from(self._memory, 8)[0] + length)
