"""A set of ids that may claim to hold a few more than were put in, but never denies one that was (a Bloom filter).

Garbage collection keeps what is in it: a false claim keeps a little garbage until the next collection, which
uses another salt. Two bytes for each expected id, at most 256 MiB; ids are hashes, so their own bytes serve.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import numpy.typing as npt

from holdfast.ids import ID_BYTES

__all__ = ["LiveSet"]

_HASHES: Final = 6
_BITS_PER_ID: Final = 16
_LEAST_BITS: Final = 1 << 20
_MOST_BITS: Final = 1 << 31


class LiveSet:
    """See the module.

    Args:
        expected: how many ids there may be, at most.
    """

    def __init__(self, expected: int) -> None:
        bits = _LEAST_BITS
        while bits < min(expected * _BITS_PER_ID, _MOST_BITS):
            bits *= 2
        self._mask = np.uint64(bits - 1)
        self._bytes = np.zeros(bits // 8, np.uint8)
        self._salts = np.frombuffer(os.urandom(16), np.uint64)

    def _positions(self, ids: bytes) -> npt.NDArray[np.uint64]:
        """The bits of each id, as rows of `_HASHES`."""
        words = np.frombuffer(ids, "<u8").reshape(-1, ID_BYTES // 8)
        first, step = words[:, 0] ^ self._salts[0], (words[:, 1] ^ self._salts[1]) | np.uint64(1)
        number = np.arange(_HASHES, dtype=np.uint64)
        return np.asarray((first[:, None] + step[:, None] * number) & self._mask)

    def add(self, ids: bytes) -> None:
        """Puts ids in, 32 bytes each, one behind the other."""
        if ids:
            bits = self._positions(ids).ravel()
            places, within = (bits >> np.uint64(3)).astype(np.intp), (bits & np.uint64(7)).astype(np.uint8)
            for bit in range(8):  # one at a time, so that it does no harm if a byte is named twice
                self._bytes[places[within == bit]] |= np.uint8(1 << bit)

    def lacks(self, ids: bytes) -> npt.NDArray[np.bool_]:
        """For each id whether it is certainly not in the set."""
        bits = self._positions(ids)
        found = self._bytes[(bits >> np.uint64(3)).astype(np.intp)] >> (bits & np.uint64(7)).astype(np.uint8)
        return np.asarray((found & 1).min(axis=1, initial=1) == 0)
