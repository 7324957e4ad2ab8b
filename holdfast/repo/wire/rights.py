"""What a connection may do: all, only add, or only read.

Two tables decide, by the class of a request, before anything else looks at it; what stands in neither is for those
who may do everything. What depends on the content of a request
(a batch that hides a point, say) is decided where that is done, with `Rights.may_change`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from holdfast.errors import StorageDenied
from holdfast.repo.wire import messages as m

__all__ = ["Rights"]

_READING: Final = frozenset(
    {
        m.Hello, m.Ping, m.Open, m.ReadConfig, m.Unlock, m.UseIndex, m.IndexExists, m.OpenIndex,
        m.ListPacks, m.PackLength, m.ReadPack, m.ListRecords, m.ScanPack, m.Challenge, m.FreeBytes, m.AllocatedBytes, m.CanPunch,
        m.CloseWriter, m.Lookup, m.ScanChunks, m.ListPackRows, m.ListPoints, m.GetPoints, m.ListSessions,
        m.GetRoots, m.GetFigures, m.ListLost, m.GetAliases, m.ScanAliases, m.GetPackRow, m.GetChanges,
        m.WereCollected, m.ListCopies, m.Invite, m.Join,
    }
)  # fmt: skip
_ADDING: Final = frozenset(
    {
        m.CreatePack, m.AdoptPack, m.Append, m.Cut, m.SyncWriter, m.SyncPack, m.Commit, m.BeginSession,
        m.Heartbeat, m.EndSession,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rights:
    """See the module.

    Args:
        restrict: only repositories in this folder or below; empty: all that the account may reach.
    """

    append_only: bool = False
    read_only: bool = False
    restrict: str = ""

    def encode(self) -> bytes:
        """To be compared with those of another process."""
        return f"{self.append_only:d}{self.read_only:d}{self.restrict}".encode("utf-8", "surrogateescape")

    @property
    def may_change(self) -> bool:
        """Whether things that are there may be changed and removed."""
        return not self.append_only and not self.read_only

    def require(self, request: m.Message) -> None:
        """Raises `StorageDenied` if this kind of request is not for this connection."""
        if self.may_change or type(request) in _READING:
            return
        if self.read_only:
            raise StorageDenied(
                "this connection may only read the repository",
                hint="the far side was started with --read-only; another key or account may be allowed more",
            )
        if type(request) not in _ADDING:
            raise self.refusal()

    @staticmethod
    def refusal() -> StorageDenied:
        """What is said to a client that may only add."""
        return StorageDenied(
            "this connection may only add restore points and read, not change or remove anything",
            hint="the far side was started with --append-only; do this over there, or with another key",
        )

    def path(self, text: str) -> str:
        """The real path of a repository that a client names.

        Raises:
            StorageDenied: it is not for this connection.
        """
        if not os.path.isabs(text) or "\0" in text:
            raise StorageDenied("the repository's path is not absolute")
        if not self.restrict:
            return os.path.abspath(text)
        real, allowed = os.path.realpath(text), os.path.realpath(self.restrict)
        if real != allowed and not real.startswith(allowed.rstrip("/") + "/"):
            raise StorageDenied(
                "this connection may not use repositories outside of the folder that it is restricted to",
                hint="the far side was started with --restrict",
            )
        return real
