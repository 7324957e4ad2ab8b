"""Messages: what both sides say to each other, as values and as bytes (PROTOCOL.md, "Messages").

Each message is a frozen value with the fields that its class annotates, and a row of the table `_LAYOUTS`: its number, and how
each of its fields lies in the body, in the order of the fields. There is nothing else in a body. Requests name the class of
their answer.

The classes are not dataclasses, although they are used, typed and printed like some: `@dataclass` compiles source for each
class, and for so many that takes longer than a login. Here all share the methods of one.

Pure: bytes in, values out. What the values mean, and whether they may be said now, is for `near` and `far` to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, NoReturn, TypeVar, cast, dataclass_transform

from holdfast.errors import ProtocolError
from holdfast.ids import ID_BYTES, PACK_ID_BYTES, SESSION_ID_BYTES
from holdfast.repo.challenge import NONCE_BYTES
from holdfast.repo.wire.fields import (
    BLOB,
    BULK,
    FLAG,
    I64,
    TEXT,
    U8,
    U16,
    U32,
    U64,
    Bulk,
    Cursor,
    Field,
    Pieces,
    fixed,
    many,
    optional,
    pairs,
    records,
)

__all__ = ["SECRET_BYTES", "VERSION", "Message", "Request", "decode_message", "encode_message", "layouts"]

VERSION: Final = 1
SECRET_BYTES: Final = 32


class _Fields(type):
    """Makes what a class annotates its slots, but for what belongs to the class itself."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _Fields:
        annotated: Mapping[str, str] = namespace.get("__annotations__", {})
        fields = tuple(field for field, kind in annotated.items() if not kind.startswith("ClassVar"))
        return super().__new__(mcs, name, bases, namespace | {"__slots__": fields})


@dataclass_transform(frozen_default=True)
class _Value(metaclass=_Fields):
    """A frozen value. Equal are those of the same class whose fields are equal."""

    __slots__: ClassVar[tuple[str, ...]]

    def __init__(self, *values: object, **named: object) -> None:
        names = self.__slots__
        if named:
            values += tuple(named.pop(name) for name in names[len(values) :] if name in named)
        if named or len(values) != len(names):
            raise TypeError(f"{type(self).__name__} takes the fields {', '.join(names) or '(none)'}")
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._values() == self._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in zip(self.__slots__, self._values(), strict=True))
        return f"{type(self).__name__}({', '.join(shown)})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: '{name}' can not be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: '{name}' can not be deleted")


class Message(_Value):
    """Anything that is said."""


M = TypeVar("M", bound=Message)


class Request(Message, Generic[M]):
    """What the near side says; it is answered by one message of the class `answer`, or by a `Failure`."""

    answer: ClassVar[type[Message]]


# --- answers


class Failure(Message):
    """It could not be done. `code` names the class of the error (`wire.faults`)."""

    code: int
    message: str
    hint: str


class Done(Message):
    """It was done."""


class Truth(Message):
    """Yes or no."""

    value: bool


class Number(Message):
    """A number."""

    value: int


class MaybeNumber(Message):
    """A number, or that there is none."""

    value: int | None


class Bytes(Message):
    """Some bytes."""

    data: bytes | Pieces


class MaybeBytes(Message):
    """Some bytes, or that there are none."""

    data: bytes | None


class Ids(Message):
    """Ids of records, nodes or points; `more`: there are others."""

    ids: tuple[bytes, ...]
    more: bool


class Welcome(Message):
    """The far side agrees to `version`."""

    version: int
    software: str
    append_only: bool
    read_only: bool


class Opened(Message):
    """The repository is open. `outside`: its index lies outside of it, and may not know what other machines did."""

    config: bytes
    warning: str
    copies_agree: bool
    writable: bool
    outside: bool


class PackIds(Message):
    """Ids of packs."""

    ids: tuple[bytes, ...]


class Places(Message):
    """For each id the row of `chunks`: pack (0: not there), offset, stored and plain bytes, epoch, kind."""

    places: tuple[tuple[int, int, int, int, int, int], ...]


class CommitOutcome(Message):
    """See `index.Committed`."""

    gone: tuple[bytes, ...]
    duplicates: int
    duplicate_bytes: int


class Rows(Message):
    """Rows of a table: keys and values."""

    rows: tuple[tuple[bytes, bytes], ...]


class ChunkRows(Message):
    """Keys and values of `chunks`, each joined."""

    keys: bytes
    values: bytes


class PointStates(Message):
    """All points: id, bits (1 hidden, 2 pinned)."""

    points: tuple[tuple[bytes, int], ...]


class Removed(Message):
    """See `index.Swept`."""

    records: int
    bytes: int


class CollectionBegun(Message):
    """See `index.Collection`."""

    epoch: int
    removed: tuple[bytes, ...]


class Figures(Message):
    """See `index.IndexFigures`."""

    records: int
    packs: int
    points: int
    sessions: int
    used_bytes: int


class MaybeIds(Message):
    """Ids, some of which are not known."""

    ids: tuple[bytes | None, ...]


class Answers(Message):
    """For each id, from the front: state (0 not there, 1 whole, 2 damaged), strong hash, proof; see "Challenges"."""

    answers: tuple[tuple[int, bytes, bytes], ...]


class Scanned(Message):
    """Records that are intact, ranges (offset, length) that are damaged, and up to where the scan has come."""

    records: tuple[tuple[bytes, int, int, int, int, int, int], ...]
    damaged: tuple[tuple[int, int], ...]
    end: int


# --- requests: the connection and the place


class Hello(Request[Welcome]):
    """The first message: the versions that the near side speaks."""

    answer: ClassVar = Welcome
    least: int
    most: int
    software: str


class Ping(Request[Done]):
    """Are you there?"""

    answer: ClassVar = Done


class Open(Request[Opened]):
    """Use the repository at this path from now on."""

    answer: ClassVar = Opened
    path: str


class Create(Request[Opened]):
    """Make a repository at this path and use it."""

    answer: ClassVar = Opened
    path: str
    config: bytes


class ReadConfig(Request[Opened]):
    """How things stand now."""

    answer: ClassVar = Opened


class WriteConfig(Request[Done]):
    """Replace the configuration; under the lock for that."""

    answer: ClassVar = Done
    config: bytes


class Lock(Request[Done]):
    """Take a lock: 1 the configuration's, 2 that of collections."""

    answer: ClassVar = Done
    which: int


class Unlock(Request[Done]):
    """Let go of it."""

    answer: ClassVar = Done
    which: int


class UseIndex(Request[Done]):
    """Take part in the use of the index."""

    answer: ClassVar = Done


class OwnIndex(Request[Truth]):
    """Exclude every other use of the index; `unless_there`: only while there is none."""

    answer: ClassVar = Truth
    unless_there: bool


class IndexExists(Request[Truth]):
    """Whether there is an index."""

    answer: ClassVar = Truth


class OpenIndex(Request[Truth]):
    """Take part in its use, and open it, if there is one; what follows on records, points and sessions is about it."""

    answer: ClassVar = Truth


class BeginRebuild(Request[Done]):
    """Make a fresh index; what follows is about it, until `EndRebuild`."""

    answer: ClassVar = Done


class EndRebuild(Request[Done]):
    """Put the fresh index into the old one's place, or throw it away."""

    answer: ClassVar = Done
    keep: bool


class Invitation(Message):
    """Where a further stream finds this connection, and what it has to know."""

    door: str
    secret: bytes


class Invite(Request[Invitation]):
    """Let further streams join this connection (see "Several streams")."""

    answer: ClassVar = Invitation


class Join(Request[Done]):
    """Be a further stream of the connection that has given this invitation; the first request behind `Hello`."""

    answer: ClassVar = Done
    door: str
    secret: bytes


# --- requests: packs


class ListPacks(Request[PackIds]):
    """See `PackStore.ids`."""

    answer: ClassVar = PackIds


class PackLength(Request[MaybeNumber]):
    """See `PackStore.length`."""

    answer: ClassVar = MaybeNumber
    pack: bytes


class ReadPack(Request[Bytes]):
    """See `PackStore.read`."""

    answer: ClassVar = Bytes
    pack: bytes
    offset: int
    length: int


class SyncPack(Request[Done]):
    """See `PackStore.sync`."""

    answer: ClassVar = Done
    pack: bytes


class DeletePack(Request[Done]):
    """See `PackStore.delete`."""

    answer: ClassVar = Done
    pack: bytes


class FreeBytes(Request[Number]):
    """See `PackStore.free_bytes`."""

    answer: ClassVar = Number


class AllocatedBytes(Request[Number]):
    """See `PackStore.allocated_bytes`."""

    answer: ClassVar = Number
    pack: bytes


class CanPunch(Request[Truth]):
    """See `PackStore.can_punch`."""

    answer: ClassVar = Truth


class Punch(Request[Done]):
    """See `PackStore.punch`."""

    answer: ClassVar = Done
    pack: bytes
    ranges: tuple[tuple[int, int], ...]


class CreatePack(Request[Done]):
    """See `PackStore.create`; the writer gets the number `writer`."""

    answer: ClassVar = Done
    writer: int
    pack: bytes


class AdoptPack(Request[MaybeNumber]):
    """See `PackStore.adopt`; answered by the pack's length."""

    answer: ClassVar = MaybeNumber
    writer: int
    pack: bytes


class Append(Request[Done]):
    """See `PackWriter.append`; `offset` is where the bytes must come to lie."""

    answer: ClassVar = Done
    writer: int
    offset: int
    data: bytes | Pieces


class Cut(Request[Done]):
    """See `PackWriter.cut`."""

    answer: ClassVar = Done
    writer: int
    length: int


class SyncWriter(Request[Done]):
    """See `PackWriter.sync`."""

    answer: ClassVar = Done
    writer: int


class CloseWriter(Request[Done]):
    """See `PackWriter.close`."""

    answer: ClassVar = Done
    writer: int


class ListRecords(Request[Bytes]):
    """What a pack's table would say of its records up to `end`; encoded as a table (FORMAT.md, "Packs")."""

    answer: ClassVar = Bytes
    pack: bytes
    end: int


class ScanPack(Request[Scanned]):
    """Scan a pack from `start` to `end`, in one go some 64 MiB; with `payloads` each record is held against its strong hash."""

    answer: ClassVar = Scanned
    pack: bytes
    start: int
    end: int
    payloads: bool


class Challenge(Request[Answers]):
    """Read and hash at most 4096 records under `nonce`; as many as 64 MiB hold, from the front, and one at least."""

    answer: ClassVar = Answers
    nonce: bytes
    ids: tuple[bytes, ...]


# --- requests: the index


class Lookup(Request[Places]):
    """See `Index.lookup`."""

    answer: ClassVar = Places
    ids: tuple[bytes, ...]


class Commit(Request[CommitOutcome]):
    """See `index.Batch`. Records are (id, number of the pack in `packs`, offset, stored, plain, kind)."""

    answer: ClassVar = CommitOutcome
    session: bytes | None
    now: int
    packs: tuple[tuple[bytes, int, int, int], ...]
    records: tuple[tuple[bytes, int, int, int, int, int], ...]
    relied: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    point: tuple[bytes, bool, bool, bytes, bytes] | None
    changes: tuple[tuple[bytes, int, int | None, int | None], ...]
    replacing: tuple[tuple[bytes, int, int], ...]
    ends_session: bool
    aliases: Mapping[bytes, bytes]


class ScanChunks(Request[ChunkRows]):
    """See `Index.scan_rows`."""

    answer: ClassVar = ChunkRows
    after: bytes | None
    limit: int


class ListPackRows(Request[Rows]):
    """See `Index.packs`; keys and values of the table."""

    answer: ClassVar = Rows


class ListPoints(Request[PointStates]):
    """The ids of all points; `GetPoints` tells the rest."""

    answer: ClassVar = PointStates


class GetPoints(Request[Rows]):
    """The rows of some points; as many as fit into an answer, from the front."""

    answer: ClassVar = Rows
    ids: tuple[bytes, ...]


class BeginSession(Request[Number]):
    """See `Index.begin_session`; the row is a value of the table."""

    answer: ClassVar = Number
    session: bytes
    row: bytes
    expire_before: int


class Heartbeat(Request[Done]):
    """See `Index.heartbeat`."""

    answer: ClassVar = Done
    session: bytes
    now: int


class EndSession(Request[Done]):
    """See `Index.end_session`."""

    answer: ClassVar = Done
    session: bytes


class ListSessions(Request[Rows]):
    """See `Index.sessions`."""

    answer: ClassVar = Rows


class GetRoots(Request[Ids]):
    """The next page of `Index.roots`; page 0 begins anew."""

    answer: ClassVar = Ids
    session: bytes
    page: int


class GetFigures(Request[Figures]):
    """See `Index.figures`."""

    answer: ClassVar = Figures


class BeginCollection(Request[CollectionBegun]):
    """See `Index.begin_collection`."""

    answer: ClassVar = CollectionBegun


class NoteCollected(Request[Done]):
    """See `Index.note_collected`."""

    answer: ClassVar = Done
    points: tuple[bytes, ...]


class Sweep(Request[Removed]):
    """See `Index.sweep`."""

    answer: ClassVar = Removed
    ids: tuple[bytes, ...]
    before: int


class Drop(Request[Removed]):
    """See `Index.drop`: (id, number of the pack, offset)."""

    answer: ClassVar = Removed
    damaged: tuple[tuple[bytes, int, int], ...]


class ListLost(Request[Ids]):
    """See `Index.lost`."""

    answer: ClassVar = Ids


class GetAliases(Request[MaybeIds]):
    """See `Index.aliases`."""

    answer: ClassVar = MaybeIds
    names: tuple[bytes, ...]


class ScanAliases(Request[Rows]):
    """See `Index.scan_aliases`: names and records."""

    answer: ClassVar = Rows
    after: bytes
    limit: int


class DropAliases(Request[Done]):
    """See `Index.drop_aliases`."""

    answer: ClassVar = Done
    names: tuple[bytes, ...]


class GetPackRow(Request[MaybeBytes]):
    """The row of a pack."""

    answer: ClassVar = MaybeBytes
    number: int


class ReplacePackRow(Request[Truth]):
    """Put `new` into the place of a pack's row if it is still `old`; whether it was."""

    answer: ClassVar = Truth
    number: int
    old: bytes
    new: bytes


class RemovePack(Request[Truth]):
    """See `Index.remove_pack`."""

    answer: ClassVar = Truth
    number: int


class ListCopies(Request[Rows]):
    """All rows of `copies`; none for clients that may only add: where else points are is not for them."""

    answer: ClassVar = Rows


MOST_READ_BYTES: Final = 4 << 20
"""Of a pack, by one `ReadPack`."""

START_BYTES: Final = 8
"""Of an id, where it need not be beyond doubt."""


class NoteCopies(Request[Done]):
    """See `Index.note_copies`. Points are named by the first 8 bytes of their ids; what fits none or several is passed over.

    `address` has at most 1024 bytes.
    """

    answer: ClassVar = Done
    repository: bytes
    address: str
    when: int
    compared: tuple[bytes, ...]
    sampled: tuple[bytes, ...]
    read: tuple[bytes, ...]
    absent: tuple[bytes, ...]


class WereCollected(Request[Ids]):
    """Which of some points were collected; see `Index.collected`."""

    answer: ClassVar = Ids
    ids: tuple[bytes, ...]


class GetChanges(Request[Number]):
    """See `Index.changes`."""

    answer: ClassVar = Number


_RECORD: Final = fixed(ID_BYTES)
_START: Final = fixed(START_BYTES)
_PACK: Final = fixed(PACK_ID_BYTES)
_SESSION: Final = fixed(SESSION_ID_BYTES)
_REPOSITORY: Final = fixed(16)

_LAYOUTS: Final[Mapping[type[Message], tuple[int, tuple[Field, ...]]]] = {
    Failure: (1, (U16, TEXT, TEXT)),
    Done: (2, ()),
    Truth: (3, (FLAG,)),
    Number: (4, (U64,)),
    MaybeNumber: (5, (optional(U64),)),
    Bytes: (6, (BULK,)),
    MaybeBytes: (7, (optional(BLOB),)),
    Ids: (8, (many(_RECORD), FLAG)),
    Welcome: (9, (U16, TEXT, FLAG, FLAG)),
    Opened: (10, (BLOB, TEXT, FLAG, FLAG, FLAG)),
    PackIds: (11, (many(_PACK),)),
    Places: (12, (records("IIIIIB", "u32 pack, u32 offset, u32 stored, u32 plain, u32 epoch, u8 kind"),)),
    CommitOutcome: (13, (many(_RECORD), U64, U64)),
    Rows: (14, (many(BLOB, BLOB),)),
    ChunkRows: (15, (BLOB, BLOB)),
    PointStates: (16, (many(_RECORD, U8),)),
    Removed: (17, (U64, U64)),
    CollectionBegun: (18, (U32, many(_RECORD))),
    Figures: (19, (U64, U64, U64, U64, U64)),
    MaybeIds: (20, (many(optional(_RECORD)),)),
    Answers: (21, (records("B16s32s", "u8 state, 16 bytes strong hash, 32 bytes proof"),)),
    Scanned: (
        22,
        (
            records(
                "32sIIIBBH", "32 bytes id, u32 offset, u32 stored, u32 plain, u8 kind, u8 codec, u16 flags"
            ),
            many(U64, U64),
            U64,
        ),
    ),
    Invitation: (23, (TEXT, fixed(SECRET_BYTES))),
    Hello: (64, (U16, U16, TEXT)),
    Ping: (65, ()),
    Open: (66, (TEXT,)),
    Create: (67, (TEXT, BLOB)),
    ReadConfig: (68, ()),
    WriteConfig: (69, (BLOB,)),
    Lock: (70, (U8,)),
    Unlock: (71, (U8,)),
    UseIndex: (72, ()),
    OwnIndex: (73, (FLAG,)),
    IndexExists: (74, ()),
    OpenIndex: (75, ()),
    BeginRebuild: (77, ()),
    EndRebuild: (78, (FLAG,)),
    Invite: (79, ()),
    Join: (80, (TEXT, fixed(SECRET_BYTES))),
    ListPacks: (96, ()),
    PackLength: (97, (_PACK,)),
    ReadPack: (98, (_PACK, U64, U32)),
    SyncPack: (99, (_PACK,)),
    DeletePack: (100, (_PACK,)),
    FreeBytes: (101, ()),
    AllocatedBytes: (102, (_PACK,)),
    CanPunch: (103, ()),
    Punch: (104, (_PACK, many(U64, U64))),
    CreatePack: (105, (U32, _PACK)),
    AdoptPack: (106, (U32, _PACK)),
    Append: (107, (U32, U64, BULK)),
    Cut: (108, (U32, U64)),
    SyncWriter: (109, (U32,)),
    CloseWriter: (110, (U32,)),
    ListRecords: (111, (_PACK, U64)),
    ScanPack: (112, (_PACK, U64, U64, FLAG)),
    Challenge: (113, (fixed(NONCE_BYTES), many(_RECORD))),
    Lookup: (128, (many(_RECORD),)),
    Commit: (
        129,
        (
            optional(_SESSION),
            I64,
            many(_PACK, U64, U8, I64),
            records("32sIIIIB", "32 bytes id, u32 pack, u32 offset, u32 stored, u32 plain, u8 kind"),
            many(_RECORD),
            many(_RECORD),
            optional(_RECORD, FLAG, FLAG, _PACK, BLOB),
            many(_RECORD, U64, optional(U8), optional(U8)),
            many(_RECORD, U32, U32),
            FLAG,
            pairs(BLOB, _RECORD),
        ),
    ),
    ScanChunks: (130, (optional(_RECORD), U32)),
    ListPackRows: (131, ()),
    ListPoints: (132, ()),
    GetPoints: (133, (many(_RECORD),)),
    BeginSession: (134, (_SESSION, BLOB, I64)),
    Heartbeat: (135, (_SESSION, I64)),
    EndSession: (136, (_SESSION,)),
    ListSessions: (137, ()),
    GetRoots: (138, (_SESSION, U32)),
    GetFigures: (139, ()),
    BeginCollection: (140, ()),
    NoteCollected: (141, (many(_RECORD),)),
    Sweep: (142, (many(_RECORD), U32)),
    Drop: (143, (many(_RECORD, U32, U32),)),
    ListLost: (144, ()),
    GetAliases: (145, (many(BLOB),)),
    ScanAliases: (146, (BLOB, U32)),
    DropAliases: (147, (many(BLOB),)),
    GetPackRow: (148, (U32,)),
    ReplacePackRow: (149, (U32, BLOB, BLOB)),
    RemovePack: (150, (U32,)),
    GetChanges: (151, ()),
    WereCollected: (152, (many(_RECORD),)),
    ListCopies: (153, ()),
    NoteCopies: (154, (_REPOSITORY, TEXT, U64, many(_START), many(_START), many(_START), many(_START))),
}
_MOST_BEFORE_BULK: Final = 16
"""Bytes of a message that lie before data in bulk."""
_BY_NUMBER: Final = {number: (cls, layout) for cls, (number, layout) in _LAYOUTS.items()}


def layouts() -> Mapping[type[Message], tuple[int, tuple[Field, ...]]]:
    """All messages: number, and the types of their fields in order."""
    return _LAYOUTS


def encode_message(message: Message) -> tuple[int, list[bytearray | bytes | memoryview]]:
    """A message's number, and the pieces of its body; data in bulk is where it was."""
    number, layout = _LAYOUTS[type(message)]
    out = bytearray()
    pieces: list[bytearray | bytes | memoryview] = [out]
    for name, item in zip(message.__slots__, layout, strict=True):
        value = getattr(message, name)
        item.put(out, value)
        if isinstance(item, Bulk):
            assert item is layout[-1]
            pieces += value.parts if isinstance(value, Pieces) else [value]
    return number, pieces


def decode_message(number: int, body: bytes, more: Sequence[bytes | bytearray | memoryview] = ()) -> Message:
    """The message of that number with that body.

    Args:
        more: the rest of the body, if it lies in several places.

    Raises:
        ProtocolError: there is no such message, or the body is not one of it.
    """
    known = _BY_NUMBER.get(number)
    if known is None:
        raise ProtocolError(f"there is no message number {number}")
    cls, layout = known
    if more and not (layout and isinstance(layout[-1], Bulk) and len(body) >= _MOST_BEFORE_BULK):
        body, more = b"".join([body, *more]), ()
    cursor = Cursor(body, more)
    values = [item.take(cursor) for item in layout]
    if cursor.left:
        raise ProtocolError(f"a message ({cls.__name__}) is longer than it should be")
    return cast("Callable[..., Message]", cls)(*values)
