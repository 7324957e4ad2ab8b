"""One segment on its way into the repository: what is unknown is sealed and appended, the rest is relied on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple, Protocol

from holdfast.ids import ChunkId, NodeId, RecordId
from holdfast.repo.codec import Sealed, Sealer
from holdfast.repo.format.node import Leaf
from holdfast.repo.format.record import Kind
from holdfast.repo.session import Segment

__all__ = ["ParentLeaf", "RecordAcceptor", "Storing"]

_STAGE_BYTES: Final = 512 * 1024


class RecordAcceptor(Protocol):
    """Where records go: a `Session`, or a dry run that only counts."""

    def generation(self) -> int:
        """See `Session.generation`."""
        ...

    def unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        """See `Session.unknown`."""
        ...

    def append(self, segment: Segment, generation: int) -> int:
        """See `Session.append`."""
        ...

    def flush(self) -> None:
        """See `Session.flush`."""
        ...


class ParentLeaf(NamedTuple):
    """The parent's leaf of one segment, with its id."""

    id: NodeId
    leaf: Leaf


class Storing:
    """One segment on its way into the repository.

    Args:
        parent: what the parent has in its place. The session holds it, so nobody asks the index for its chunks.
        redo: does the segment again; see `Segment`.

    `aliases` are names of records that were added, or that the segment relies on.
    """

    def __init__(
        self,
        acceptor: RecordAcceptor,
        sealer: Sealer,
        parent: ParentLeaf | None,
        redo: Callable[[], None],
    ) -> None:
        self._acceptor = acceptor
        self._sealer = sealer
        self._held: AbstractSet[RecordId] = frozenset(parent.leaf.ids) if parent is not None else frozenset()
        self._redo = redo
        self._relied: set[RecordId] = set()
        self._sealed: set[RecordId] = set()
        self._staged: list[Sealed] = []
        self._staged_bytes = 0
        self._generation = 0
        self.aliases: dict[bytes, RecordId] = {}
        self.new_bytes = 0
        self.new_chunks = 0

    def unknown(self, ids: Sequence[RecordId]) -> set[RecordId]:
        """Those that the repository does not have; the segment relies on all others from now on."""
        if not self._staged:
            self._generation = self._acceptor.generation()
        found = self._acceptor.unknown(ids)
        self._relied.update(ids)
        self._relied -= found
        return found

    def absent(self, ids: Sequence[ChunkId]) -> set[RecordId]:
        """Those that have to be added; the segment relies on all others from now on, or its parent holds them."""
        rest = [chunk for chunk in ids if chunk not in self._held and chunk not in self._sealed]
        return self.unknown(rest) if rest else set()

    @property
    def needs_close(self) -> bool:
        """Whether `close` has something to do, if `finish` is not called."""
        return bool(self._relied or self._staged or self.aliases)

    def add(self, ids: Sequence[ChunkId], pieces: Sequence[memoryview | None]) -> None:
        """Stores those chunks that the repository does not have.

        Args:
            pieces: None for what was taken over from the parent unread.
        """
        held = self._held
        fresh = {
            chunk: piece
            for chunk, piece in zip(ids, pieces, strict=True)
            if piece is not None and chunk not in held and chunk not in self._sealed
        }
        if not fresh:
            return
        unknown = self.unknown(list(fresh))
        for chunk, piece in fresh.items():
            if chunk not in unknown or piece is None:
                continue
            self._stage(chunk, piece)

    def _stage(self, chunk: ChunkId, piece: memoryview) -> None:
        sealed = self._sealer.seal(Kind.CHUNK, chunk, piece)
        self.new_chunks += 1
        self._sealed.add(chunk)
        self._relied.add(chunk)
        self._staged.append(sealed)
        self._staged_bytes += len(sealed.payload)
        if self._staged_bytes >= _STAGE_BYTES:
            # While it is in the processor's cache. Should a commit come before the leaf, the leaf relies
            # on these chunks like on any others.
            self._append(frozenset(), ())

    def add_whole(
        self,
        ids: Sequence[ChunkId],
        pieces: Sequence[memoryview | None],
        leaf: NodeId,
        plaintext: bytes,
    ) -> None:
        """Stores what the repository does not have of a whole segment, its leaf too.

        It is asked once, for all; when there has been a commit, once more, for all that is left.
        """
        unique = dict(zip(ids, pieces, strict=True))
        unknown = self.unknown([*unique, leaf])
        for number, (chunk, piece) in enumerate(unique.items()):
            if not self._staged and self._generation != self._acceptor.generation():
                unknown = self.unknown([*list(unique)[number:], leaf])
            if chunk in unknown and piece is not None:
                self._stage(chunk, piece)
        if leaf in unknown:
            self._staged.append(self._sealer.seal(Kind.NODE, leaf, plaintext))
        self.close((leaf,))

    def finish(self, leaf: NodeId, plaintext: bytes) -> None:
        """Stores the leaf, and what has not been stored yet."""
        if leaf in self.unknown([leaf]):
            self._staged.append(self._sealer.seal(Kind.NODE, leaf, plaintext))
        self.close((leaf,))

    def close(self, roots: tuple[NodeId, ...] = ()) -> None:
        """Stores what has not been stored yet; what the segment relies on holds only then."""
        self._append(frozenset(self._relied) - {sealed.header.id for sealed in self._staged}, roots)

    def _append(self, relied: frozenset[RecordId], roots: tuple[NodeId, ...]) -> None:
        aliases, self.aliases = self.aliases, {}
        segment = Segment(self._staged, relied, roots, self._redo, aliases)
        self._staged, self._staged_bytes = [], 0
        self.new_bytes += self._acceptor.append(segment, self._generation)
