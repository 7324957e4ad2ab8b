"""A set of record ids that grows by 16 bytes per id, not by a Python object.

Used where a command has to remember which of many records it has met. Ids are told apart by their first
16 bytes: with a thousand million ids, two of them share those with a probability of 10^-21.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from holdfast.ids import RecordId

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IdSet"]

_KEY: Final = 16
_RECENT: Final = 32_768


class IdSet:
    """Sorted arrays whose sizes grow geometrically, and a small recent set before them."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._arrays: list[np.ndarray[tuple[int], np.dtype[np.bytes_]]] = []

    def __len__(self) -> int:
        return len(self._recent) + sum(len(array) for array in self._arrays)

    def __contains__(self, record_id: RecordId) -> bool:
        return bool(self.known([record_id]))

    def known(self, ids: Iterable[RecordId]) -> set[RecordId]:
        """Those of the ids that are in the set."""
        asked = list(ids)
        found = {i for i in asked if i[:_KEY] in self._recent}
        if not self._arrays or not asked:
            return found
        import numpy as np  # only large sets need it, and it takes a tenth of a second to load

        keys = np.array([i[:_KEY] for i in asked], dtype=f"S{_KEY}")
        for array in self._arrays:
            at = np.minimum(np.searchsorted(array, keys), len(array) - 1)
            for position in np.flatnonzero(array[at] == keys).tolist():
                found.add(asked[position])
        return found

    def add(self, ids: Iterable[RecordId]) -> set[RecordId]:
        """Adds ids; returns those that were not in the set before."""
        asked = dict.fromkeys(ids)
        new = asked.keys() - self.known(asked)
        self._recent.update(i[:_KEY] for i in new)
        if len(self._recent) >= _RECENT:
            import numpy as np

            array = np.sort(np.array(list(self._recent), dtype=f"S{_KEY}"))
            self._recent.clear()
            while self._arrays and len(self._arrays[-1]) <= 2 * len(array):
                array = np.sort(np.concatenate([self._arrays.pop(), array]), kind="stable")
            self._arrays.append(array)
        return set(new)
