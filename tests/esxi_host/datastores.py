"""The datastores of a stand-in, and the three ways to write a path: the host's, the daemon's and the machine's.

/vmfs/volumes/<uuid or name>/dir/x.vmdk      in the host
[name] dir/x.vmdk                            in the daemon's texts
FOLDER/volumes/<uuid>/dir/x.vmdk             on this machine, beside the view with the locks
"""

from __future__ import annotations

import os
import posixpath
import random
import re
from dataclasses import dataclass

VOLUMES = "/vmfs/volumes"
KINDS = ("VMFS-5", "VMFS-6", "NFS")


@dataclass(frozen=True, slots=True)
class Datastore:
    """One datastore. `kind` decides about the format of redo logs."""

    name: str
    uuid: str
    kind: str
    capacity_bytes: int
    real: str
    """Its folder on this machine."""

    @property
    def path(self) -> str:
        """Its folder in the host."""
        return f"{VOLUMES}/{self.uuid}"

    @property
    def redo_type(self) -> str:
        return "SESPARSE" if self.kind == "VMFS-6" else "VMFSSPARSE"


class Datastores:
    """All of them, by id and by name."""

    def __init__(self, volumes: str, rng: random.Random) -> None:
        self._volumes = volumes
        self._rng = rng
        self.all: list[Datastore] = []

    def add(self, name: str, kind: str, capacity_bytes: int) -> Datastore:
        """A datastore; what its folder holds from an earlier run stays."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: there are {', '.join(KINDS)}")
        link = os.path.join(self._volumes, name)
        if os.path.islink(link):
            uuid = os.readlink(link)
        else:
            uuid = "-".join(f"{self._rng.getrandbits(bits):0{bits // 4}x}" for bits in (32, 32, 16, 48))
            os.symlink(uuid, link)
        real = os.path.join(self._volumes, uuid)
        os.makedirs(real, exist_ok=True)
        found = Datastore(name, uuid, kind, capacity_bytes, real)
        self.all.append(found)
        return found

    def named(self, name: str) -> Datastore:
        for store in self.all:
            if name in (store.name, store.uuid):
                return store
        raise FileNotFoundError(f"there is no datastore {name!r}")

    def real(self, place: str) -> str:
        """The machine's path of a host's path or of `[name] dir/file`. Raises FileNotFoundError."""
        if found := re.match(r"\[(.*?)\] ?(.*)$", place, re.DOTALL):
            return os.path.normpath(os.path.join(self.named(found[1]).real, found[2]))
        place = posixpath.normpath(place)
        if not place.startswith(VOLUMES + "/"):
            raise FileNotFoundError(f"{place} is on no datastore")
        name, _, rest = place.removeprefix(VOLUMES + "/").partition("/")
        return os.path.join(self.named(name).real, rest).rstrip("/")

    def of(self, real: str) -> Datastore:
        for store in self.all:
            if real == store.real or real.startswith(store.real + "/"):
                return store
        raise FileNotFoundError(f"{real} is on no datastore")

    def key(self, real: str) -> str:
        """The path below the folder of volumes, as the locks name it."""
        return os.path.relpath(real, self._volumes)

    def host_path(self, real: str) -> str:
        return posixpath.join(VOLUMES, self.key(real))

    def bracket(self, real: str) -> str:
        store = self.of(real)
        rest = os.path.relpath(real, store.real)
        return f"[{store.name}] {'' if rest == '.' else rest}"
