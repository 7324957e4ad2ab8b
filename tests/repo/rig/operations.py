"""What the failure matrix puts to the test: operations on real folders, and what is to be found afterwards.

Everything here runs in a process that was forked for it (see `rig.matrix`). Repositories are small, but have all that
an operation can meet: packs that are dead as a whole and in part, open and sealed ones, hidden and pinned points.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC
from pathlib import Path

from holdfast.errors import HoldfastError, IntegrityError, NoRepository
from holdfast.repo import gc, keys, session
from holdfast.repo.gc import CollectOptions
from holdfast.repo.points import Point
from holdfast.repo.repository import InitOptions, Repository
from holdfast.repo.retention import Candidate, Policy, plan_retention
from rig.disks import KIB, MIB, machine_of
from rig.engine import ONE_WORKER, quiet, restored
from rig.usage import live_bytes, reachable_bytes

OPTIONS = InitOptions(
    chunker="fixed", chunk_size_bytes=64 * KIB, segment_bytes=MIB, pack_bytes=MIB, compression_level=1
)

PASSWORDS = ("one", "two", "three", "four")
"""That any repository of the matrix was ever given."""

NOTES = "notes.json"
"""Beside a template's repository: what its points are called and what they must give back."""


def set_up() -> None:
    """Makes little data enough: small batches, small holes, passwords that are tried at once."""
    session._BATCH_BYTES = 400_000  # type: ignore[misc]
    session._BATCH_AGE_S = 1e9  # type: ignore[misc]
    gc._LEAST_DEAD_BYTES = 64 * KIB  # type: ignore[misc]
    keys.SCRYPT_N = 16  # type: ignore[misc]


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass
class Notes:
    """Of each known point its name in the matrix, and the digests of its contents."""

    names: dict[str, str]
    digests: dict[str, dict[str, str]]

    def write(self, folder: Path) -> None:
        (folder / NOTES).write_text(json.dumps([self.names, self.digests]))

    @staticmethod
    def read(folder: Path) -> Notes:
        return Notes(*json.loads((folder / NOTES).read_text()))


def digests_of(contents: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


# --- repositories to begin with


NEW = {"disk0.raw": noise(1, 700 * KIB) + noise(90, 900 * KIB), "web1.vmx": b"displayName = 'web1'\n" * 40}
"""What the backup under test backs up."""


def _add(repository: Repository, notes: Notes, name: str, vm: str, disk: bytes) -> Point:
    summary = repository.backup(machine_of([disk], name=vm), ONE_WORKER)
    assert summary.point is not None
    point = repository.resolve(summary.point.hex())
    notes.names[point.id.hex()] = name
    notes.digests[point.id.hex()] = digests_of({"disk0.raw": disk})
    return point


def _lived_in(folder: Path, *, forgotten: bool = True) -> None:
    notes = Notes({}, {})
    with Repository.init(str(folder / "repo"), OPTIONS, notify=quiet) as repository:
        doomed = [_add(repository, notes, "first", "web1", noise(1, 700 * KIB) + noise(2, 600 * KIB))]
        _add(repository, notes, "second", "web1", noise(1, 700 * KIB) + noise(3, 200 * KIB))
        mixed = noise(4, 1600 * KIB)
        doomed.append(_add(repository, notes, "third", "db1", mixed))
        parts = [mixed[n * 64 * KIB : (n + 1) * 64 * KIB] for n in range(25) if n % 4 == 0]
        _add(repository, notes, "fourth", "db1", b"".join(parts))
        pinned = _add(repository, notes, "fifth", "web1", noise(1, 700 * KIB))
        repository.pin([pinned])
        if forgotten:
            repository.forget(doomed)
    notes.write(folder)


def _nothing(folder: Path) -> None:
    Notes({}, {}).write(folder)


def _encrypted(folder: Path) -> None:
    notes = Notes({}, {})
    options = replace(OPTIONS, cipher="aes256-gcm")
    with Repository.init(str(folder / "repo"), options, password="one", notify=quiet) as repository:
        _add(repository, notes, "first", "web1", noise(1, 300 * KIB))
        repository.add_key("two", "second")
    notes.write(folder)


def _damaged(folder: Path) -> None:
    """Chunks, a node, a table and a whole pack are damaged; beside it a repository that is whole."""
    _lived_in(folder)
    shutil.copytree(folder / "repo", folder / "other")
    own = random.Random(11)
    packs = sorted((folder / "repo" / "packs").glob("??/*.pack"))
    for number, path in enumerate(packs):
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for _ in range(2):
                file.seek(own.randrange(64, size - 200))
                file.write(b"damage" * 4)
            if number == 1:
                file.seek(size - 40)
                file.write(bytes(40))


TEMPLATES: dict[str, Callable[[Path], None]] = {
    "nothing": _nothing,
    "lived in": _lived_in,
    "unforgotten": lambda folder: _lived_in(folder, forgotten=False),
    "encrypted": _encrypted,
    "damaged": _damaged,
}


# --- operations


@dataclass(frozen=True)
class Operation:
    """One command.

    Args:
        command: as the user gives it.
        template: the state of the repository before.
        run: does it, on the folder that the repository is in.
        already: exit codes that say, when it is run again, that it had been done.
        adds: the contents of the point that it makes.
        collects: it leaves nothing that nobody needs.
        heals: the repository is damaged before.
        password: of the repository.
    """

    name: str
    command: str
    template: str
    run: Callable[[Path], None]
    already: tuple[int, ...] = ()
    adds: dict[str, bytes] | None = None
    collects: bool = False
    heals: bool = False
    password: str | None = None


def opened(folder: Path, password: str | None = None) -> Repository:
    return Repository.open(str(folder / "repo"), password=password, notify=quiet)


def _named(repository: Repository, folder: Path, *names: str) -> list[Point]:
    notes = Notes.read(folder)
    ids = {name: point for point, name in notes.names.items()}
    return [repository.resolve(ids[name]) for name in names]


def _init(folder: Path) -> None:
    Repository.init(str(folder / "repo"), OPTIONS, notify=quiet).close()


def _backup(folder: Path) -> None:
    with opened(folder) as repository:
        repository.backup(machine_of([NEW["disk0.raw"]], files={"web1.vmx": NEW["web1.vmx"]}), ONE_WORKER)


def _forget(folder: Path) -> None:
    with opened(folder) as repository:
        repository.forget(_named(repository, folder, "second", "fourth"))


def _recall(folder: Path) -> None:
    with opened(folder) as repository:
        hidden = repository.hidden_points()
        if hidden:
            repository.recall(hidden)


def _pin(folder: Path) -> None:
    with opened(folder) as repository:
        repository.pin(_named(repository, folder, "second"))


def _prune(folder: Path) -> None:
    with opened(folder) as repository:
        points = repository.points()
        pinned = repository.pinned()
        candidates = [
            Candidate(p.id, p.manifest.time, p.received_ms // 1000, p.manifest.vm_uuid, p.id in pinned)
            for p in points
        ]
        verdicts = plan_retention(candidates, Policy(last=1), now=2**40, zone=UTC)
        going = [point for point, verdict in zip(points, verdicts, strict=True) if not verdict.kept]
        if going:
            repository.forget(going)


def _collect(below: float) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        with opened(folder) as repository:
            repository.collect(CollectOptions(compact_below=below))

    return run


def _rebuild(folder: Path) -> None:
    with opened(folder) as repository:
        repository.rebuild_index()


def _repair(folder: Path) -> None:
    with opened(folder) as repository, Repository.open(str(folder / "other"), notify=quiet) as other:
        _, report = repository.repair(donor=other)
        error = report.error()
    if error is not None:
        raise error


def _key_add(folder: Path) -> None:
    with opened(folder, "one") as repository:
        repository.add_key("three", "third")


def _key_remove(folder: Path) -> None:
    with opened(folder, "one") as repository:
        ids = [slot.id for slot in repository.key_slots() if slot.label == "second"]
        repository.remove_key(ids[0] if ids else "gone")


def _key_change(folder: Path) -> None:
    with opened(folder, "one") as repository:
        repository.change_password("four")


OPERATIONS = [
    Operation("init", "holdfast init", "nothing", _init, already=(15,)),
    Operation("backup", "holdfast backup", "lived in", _backup, adds=NEW),
    Operation("forget", "holdfast forget", "lived in", _forget, already=(14,)),
    Operation("recall", "holdfast forget --undo", "lived in", _recall),
    Operation("pin", "holdfast pin", "lived in", _pin),
    Operation("prune", "holdfast prune --keep-last 1", "unforgotten", _prune),
    Operation("gc", "holdfast gc", "lived in", _collect(0.5), collects=True),
    Operation("compact", "holdfast gc --compact-below 1.0", "lived in", _collect(1.0), collects=True),
    Operation("holes", "holdfast gc --compact-below 0.0", "lived in", _collect(0.0), collects=True),
    Operation("rebuild-index", "holdfast check --rebuild-index", "lived in", _rebuild),
    Operation("repair", "holdfast check --repair --from OTHER", "damaged", _repair, heals=True),
    Operation("key add", "holdfast key add", "encrypted", _key_add, password="one"),
    Operation("key remove", "holdfast key remove", "encrypted", _key_remove, already=(2,), password="one"),
    Operation(
        "key change", "holdfast key change-password", "encrypted", _key_change, already=(12,), password="one"
    ),
]


# --- what is there


def state_of(folder: Path, operation: Operation) -> list[str]:
    """What the user sees: the points with their marks, the passwords that open, or that there is no repository.

    Raises:
        AssertionError: a point comes back with other bytes, or one is listed that nobody finished.
    """
    notes = Notes.read(folder)
    found: list[str] = []
    try:
        repository = opened(folder, _password(folder, operation))
    except NoRepository:
        return ["no repository"]
    added = digests_of(operation.adds) if operation.adds else None
    with repository:
        pinned = repository.pinned()
        listed = repository.points()
        for point in [*listed, *repository.hidden_points()]:
            point_id = point.id.hex()
            name, expected = notes.names.get(point_id, "new"), notes.digests.get(point_id, added)
            assert expected is not None, "a point is listed that was never finished"
            marks = ["pinned"] if point.id in pinned else []
            if point not in listed:
                marks.append("hidden")
            else:
                try:
                    assert digests_of(restored(repository, point)) == expected, f"{name} came back otherwise"
                except IntegrityError:
                    assert operation.heals, f"{name} is damaged"
                    marks.append("damaged")
            found.append(" ".join([name, *marks]))
    if operation.password is not None:
        found += [f"opens with {password}" for password in PASSWORDS if _opens(folder, password)]
    return sorted(found)


def _opens(folder: Path, password: str) -> bool:
    with opened(folder, password) as repository:
        try:
            repository.unlock()
        except HoldfastError:
            return False
        return True


def _password(folder: Path, operation: Operation) -> str | None:
    """One that opens it."""
    if operation.password is None:
        return None
    found = [password for password in PASSWORDS if _opens(folder, password)]
    assert found, "no password opens the repository any more"
    return found[0]


def findings_of(folder: Path, operation: Operation) -> str:
    """What `check --read-data` has to say; damage is not among what it may."""
    with opened(folder, _password(folder, operation)) as repository:
        report = repository.check(read_data=True, workers=1)
    if operation.heals and not report.clean:
        return "the damage that was there"
    assert not report.damaged, f"check: {report.damaged}"
    return "; ".join(sorted({finding.message for finding in report.findings})) or "clean"


def run_again(folder: Path, operation: Operation) -> str:
    """What becomes of the same command, given once more."""
    try:
        operation.run(folder)
        return "done"
    except HoldfastError as error:
        if error.exit_code in operation.already:
            return f"already {error.exit_code}"
        return f"fails {error.exit_code}: {error.message}"


def back_up(folder: Path, operation: Operation) -> None:
    """The next night's backup, which must work whatever came before."""
    disk = noise(1, 700 * KIB) + noise(7, 300 * KIB)
    with opened(folder, _password(folder, operation)) as repository:
        summary = repository.backup(machine_of([disk], name="next"), ONE_WORKER)
        assert summary.point is not None
        point = repository.resolve(summary.point.hex())
        assert restored(repository, point) == {"disk0.raw": disk}
        notes = Notes.read(folder)
        notes.names[point.id.hex()] = "next"
        notes.digests[point.id.hex()] = digests_of({"disk0.raw": disk})
        notes.write(folder)


def judge(folder: Path, operation: Operation) -> dict[str, object]:
    """What a fault has left; then a backup, which must get through."""
    state = state_of(folder, operation)
    if state == ["no repository"]:
        return {"state": state, "check": "", "then": state}
    check = findings_of(folder, operation)
    back_up(folder, operation)
    return {"state": state, "check": check, "then": state_of(folder, operation)}


def judge_again(folder: Path, operation: Operation) -> dict[str, object]:
    """What becomes of the same command, given once more as the first thing; then a backup."""
    again = run_again(folder, operation)
    if again.startswith("fails"):
        return {"again": again}
    if operation.collects:
        with opened(folder) as repository:
            assert live_bytes(repository) == reachable_bytes(repository), "garbage stays for good"
    back_up(folder, operation)
    return {
        "again": again,
        "state": state_of(folder, operation),
        "check": findings_of(folder, operation),
        "left over": left_over(folder),
    }


def left_over(folder: Path) -> list[str]:
    """Files that no command removes."""
    repository = folder / "repo"
    return sorted(
        {
            name.split(".new-")[0].split(".old-")[0]
            for name in os.listdir(repository)
            if name.startswith(("index.", ".config"))
        }
    )
