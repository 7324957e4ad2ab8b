"""Single bytes, and more, of every file of a repository are altered at random.

Whatever is altered, the outcome is either exact bytes or an error of a known kind: never other bytes, never a
shorter list of points, never another exception, never a hang. A crash in LMDB's C code counts as noticed (the
command line runs the engine in a child and turns that into exit code 21), but how often it happens is counted
and shown.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb
import pytest
from rig.disks import content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, restored
from rig.zygote import Verdict, Zygote, digests_of

from holdfast.repo import keys

PASSWORD = "correct horse"
CRASHES = {4, 6, 7, 8, 11}  # SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV
ALLOWED = {13, *range(20, 30)}
FACTOR = 10 if os.environ.get("HOLDFAST_SOAK") else 1
"""Multiplies the number of flips."""


@dataclass
class Target:
    """A repository, and the means to spoil its files and to bring them back."""

    path: Path
    digests: dict[str, dict[str, str]]
    password: str | None
    intact: dict[str, bytes]

    def files(self, *folders: str) -> list[str]:
        return sorted(name for name in self.intact if name.startswith(folders))

    def write(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)

    def reset(self) -> None:
        """All files as they were; a judge writes to the index."""
        for folder in ("index", "packs"):
            for found in [p for p in (self.path / folder).rglob("*") if p.is_file()]:
                if str(found.relative_to(self.path)) not in self.intact:
                    found.unlink()
        for name, data in self.intact.items():
            path = self.path / name
            if not path.exists() or path.stat().st_size != len(data) or path.read_bytes() != data:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)


def make(path: Path, password: str | None) -> Target:
    options = SMALL if password is None else replace(SMALL, cipher="aes256-gcm")
    world = FolderWorld(path, options, password)
    digests = {}
    with world.open(password=password) as repository:
        for name, units in [
            ("web1", [*range(1, 18), 0, 0, 4, 5]),
            ("web1", [*range(1, 15), 100, 0, 17, 18, 4]),
            ("db1", [*range(50, 58), 1, 2, 3]),
        ]:
            repository.backup(
                machine_of([content(units)], name=name, files={"a.vmx": b"x" * 3000}), ONE_WORKER
            )
        for point in repository.points():
            digests[point.id.hex()] = digests_of(restored(repository, point))
    assert len(digests) == 3
    intact = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return Target(path, digests, password, intact)


@pytest.fixture(scope="module")
def plain(memory_folder: Path) -> Target:
    return make(Path(tempfile.mkdtemp(dir=memory_folder)) / "repo", None)


@pytest.fixture(scope="module")
def compact(memory_folder: Path) -> Target:
    """With an index that has no page but those in use."""
    made = Path(tempfile.mkdtemp(dir=memory_folder))
    target = make(made / "repo", None)
    with lmdb.open(str(target.path / "index"), readonly=True, lock=False, max_dbs=16) as env:
        env.copy(str(made), compact=True)
    target.intact["index/data.mdb"] = (made / "data.mdb").read_bytes()
    del target.intact["index/head"]  # it counts transactions, and copying begins anew
    target.reset()
    return target


@pytest.fixture(scope="module")
def encrypted(memory_folder: Path) -> Iterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SCRYPT_N", 16)
        yield make(Path(tempfile.mkdtemp(dir=memory_folder)) / "repo", PASSWORD)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


def flipped(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One byte changed; half of the time one that is not zero, since much of an index is unused."""
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        used = [i for i in range(len(data)) if data[i]] if len(data) < 4096 else []
        for _ in range(200):
            if data[at]:
                break
            at = rng.choice(used) if used else rng.randrange(len(data))
    value = (
        data[at] ^ (1 << rng.randrange(8)) if rng.random() < 0.7 else (data[at] + rng.randrange(1, 256)) % 256
    )
    return data[:at] + bytes([value]) + data[at + 1 :], f"byte {at}: {data[at]:#04x} -> {value:#04x}"


def acceptable(verdict: Verdict, target: Target) -> str:
    """Empty, or what is not acceptable about an outcome."""
    if verdict.signal:
        return (
            ""
            if verdict.signal in CRASHES
            else f"the child was ended by signal {verdict.signal} (14 is a hang)"
        )
    if verdict.wrong:
        return "; ".join(verdict.wrong)
    if not set(verdict.codes) <= ALLOWED:
        return f"exit codes {verdict.codes}: {verdict.messages}"
    if verdict.exact < len(target.digests) and not verdict.codes:
        return "a point did not come back, and nothing was reported"
    return ""


class Tally:
    """What came of many flips; printed, so that a run with -s or a failure shows it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def add(self, verdict: Verdict, target: Target, what: str) -> None:
        problem = acceptable(verdict, target)
        if problem:
            self.failures.append(f"{what}: {problem}")
        if verdict.signal:
            self.outcomes[f"crash (signal {verdict.signal})"] += 1
        elif verdict.harmless:
            self.outcomes["harmless"] += 1
        elif verdict.exact == len(target.digests):
            self.outcomes[f"all points exact, reported with {sorted(set(verdict.codes))}"] += 1
        else:
            self.outcomes[f"refused with {sorted(set(verdict.codes))}"] += 1

    def finish(self, *, noticed_at_least: int) -> None:
        print(f"{self.what}: {dict(self.outcomes)}")
        assert not self.failures, f"{len(self.failures)} of {self.outcomes.total()}: " + "\n".join(
            self.failures[:10]
        )
        noticed = self.outcomes.total() - self.outcomes["harmless"]
        assert noticed >= noticed_at_least, "hardly anything was noticed: is anything damaged at all?"


def flip_files(target: Target, zygote: Zygote, names: list[str], count: int, rng: random.Random) -> Tally:
    tally = Tally(" ".join(names)[:60])
    weights = [len(target.intact[name]) for name in names]
    for _ in range(count):
        name = rng.choices(names, weights)[0]
        data, what = flipped(target.intact[name], rng)
        target.write(name, data)
        tally.add(
            zygote.judge(target.path, target.digests, password=target.password), target, f"{name}, {what}"
        )
        target.reset()
    return tally


def test_nothing_is_amiss_before(plain: Target, encrypted: Target, zygote: Zygote) -> None:
    for target in (plain, encrypted):
        verdict = zygote.judge(target.path, target.digests, password=target.password)
        assert verdict.harmless, verdict
        assert verdict.exact == 3
        assert zygote.judge(target.path, target.digests, password=target.password, rebuild=True).harmless
        target.reset()


@pytest.mark.parametrize("part", range(2))
def test_flips_in_the_index(plain: Target, zygote: Zygote, rng: random.Random, part: int) -> None:
    flip_files(plain, zygote, ["index/data.mdb"], 100 * FACTOR, rng).finish(noticed_at_least=4)


@pytest.mark.parametrize("part", range(2))
def test_flips_in_an_index_without_old_pages(
    compact: Target, zygote: Zygote, rng: random.Random, part: int
) -> None:
    flip_files(compact, zygote, ["index/data.mdb"], 100 * FACTOR, rng).finish(noticed_at_least=30)


def test_flips_in_small_files_of_the_index(plain: Target, zygote: Zygote, rng: random.Random) -> None:
    names = [name for name in plain.files("index/") if not name.endswith("data.mdb")]
    assert {"index/lock.mdb", "index/head"} <= set(names)
    for name in names:
        flip_files(plain, zygote, [name], 25 * FACTOR, rng).finish(noticed_at_least=0)


def test_flips_in_packs(plain: Target, zygote: Zygote, rng: random.Random) -> None:
    count = 120 * FACTOR
    tally = flip_files(plain, zygote, plain.files("packs/"), count, rng)
    tally.finish(noticed_at_least=count)


def test_flips_in_packs_of_an_encrypted_repository(
    encrypted: Target, zygote: Zygote, rng: random.Random
) -> None:
    count = 60 * FACTOR
    flip_files(encrypted, zygote, encrypted.files("packs/"), count, rng).finish(noticed_at_least=count)


@pytest.mark.parametrize("name", ["config.json", "config.json.copy"])
def test_flips_in_the_configuration(
    plain: Target, encrypted: Target, zygote: Zygote, rng: random.Random, name: str
) -> None:
    """The other copy is used, and `check` tells."""
    for target in (plain, encrypted):
        tally = flip_files(target, zygote, [name], 25 * FACTOR, rng)
        tally.finish(noticed_at_least=20)
        assert not any("refused" in outcome for outcome in tally.outcomes)


def test_flips_in_both_copies_of_the_configuration(
    plain: Target, encrypted: Target, zygote: Zygote, rng: random.Random
) -> None:
    for target in (plain, encrypted):
        tally = Tally("both copies")
        for _ in range(20 * FACTOR):
            for name in ("config.json", "config.json.copy"):
                target.write(name, flipped(target.intact[name], rng)[0])
            tally.add(zygote.judge(target.path, target.digests, password=target.password), target, "config")
            target.reset()
        tally.finish(noticed_at_least=15)


def test_a_rebuild_undoes_any_flip_in_the_index(plain: Target, zygote: Zygote, rng: random.Random) -> None:
    for _ in range(25 * FACTOR):
        name = rng.choices(["index/data.mdb", "index/lock.mdb", "index/head"], [8, 1, 1])[0]
        data, what = flipped(plain.intact[name], rng)
        plain.write(name, data)
        verdict = zygote.judge(plain.path, plain.digests, rebuild=True)
        assert verdict.harmless, f"{name}, {what}: {verdict}"
        assert verdict.exact == 3
        plain.reset()


def test_a_backup_into_a_damaged_index_harms_no_point(
    compact: Target, zygote: Zygote, rng: random.Random
) -> None:
    """It may fail, or end in C; but no point suffers, and one that it reports is complete."""
    units = [*range(3, 12), 900, 901, 0, *range(50, 54)]
    contents = digests_of({"disk0.raw": content(units)})
    outcomes: Counter[str] = Counter()
    for number in range(40 * FACTOR):
        data, what = flipped(compact.intact["index/data.mdb"], rng)
        compact.write("index/data.mdb", data)
        verdict = zygote.back_up(compact.path, units, f"new {number}")
        assert not verdict.wrong, f"{what}: {verdict}"
        assert set(verdict.codes) <= ALLOWED, f"{what}: {verdict}"
        assert verdict.signal in {0, *CRASHES}, f"{what}: {verdict}"
        outcomes[f"signal {verdict.signal}" if verdict.signal else str(list(verdict.codes))] += 1
        expected = compact.digests | ({verdict.made: contents} if verdict.made else {})
        after = zygote.judge(compact.path, expected, rebuild=True, unreported=contents)
        assert after.harmless, f"{what}: {verdict}, {after}"
        assert after.exact >= len(expected)
        compact.reset()
    print(dict(outcomes))
    assert outcomes["[]"]
    assert outcomes["[21]"]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(0, len(data), 4096)
    return data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :]


def shuffled(data: bytes, rng: random.Random) -> bytes:
    """Two pages in each other's place."""
    pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    one, other = rng.sample(range(len(pages)), 2)
    pages[one], pages[other] = pages[other], pages[one]
    return b"".join(pages)


def garbage(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    size = min(rng.choice([8, 64, 4096]), len(data) - at)
    return data[:at] + rng.randbytes(size) + data[at + size :]


@pytest.mark.parametrize("how", [truncated, zeroed, shuffled, garbage])
def test_much_damage_to_the_index(plain: Target, zygote: Zygote, rng: random.Random, how) -> None:
    tally = Tally(how.__name__)
    for _ in range(30 * FACTOR):
        plain.write("index/data.mdb", how(plain.intact["index/data.mdb"], rng))
        tally.add(zygote.judge(plain.path, plain.digests), plain, how.__name__)
        plain.reset()
    tally.finish(noticed_at_least=2)


def test_an_index_of_another_repository(plain: Target, zygote: Zygote, tmp_path: Path) -> None:
    other = make(tmp_path / "other", None)
    plain.write("index/data.mdb", other.intact["index/data.mdb"])
    verdict = zygote.judge(plain.path, plain.digests)
    assert not acceptable(verdict, plain)
    assert set(verdict.codes) == {21}
    plain.reset()


def test_an_older_state_of_the_index(tmp_path: Path, zygote: Zygote) -> None:
    """Brought back from a copy, without its `head`: points are missing in it, but nothing is damaged by it."""
    target = make(tmp_path / "repo", None)
    with _at(target.path).open() as repository:
        summary = repository.backup(machine_of([content([1, 2, 800])], name="late"), ONE_WORKER)
        assert summary.point is not None
        point = next(p for p in repository.points() if p.id == summary.point)
        target.digests[summary.point.hex()] = digests_of(restored(repository, point))
    target.write("index/data.mdb", target.intact["index/data.mdb"])
    verdict = zygote.judge(target.path, target.digests)
    assert set(verdict.codes) == {21}, "the file 'head' tells that the index has fallen back"
    assert zygote.judge(target.path, target.digests, rebuild=True).harmless


def _at(path: Path) -> FolderWorld:
    world = FolderWorld.__new__(FolderWorld)
    world.path = str(path)
    return world


def test_an_empty_index_file(plain: Target, zygote: Zygote) -> None:
    plain.write("index/data.mdb", b"")
    verdict = zygote.judge(plain.path, plain.digests)
    assert set(verdict.codes) == {21}, verdict
    plain.reset()
    shutil.rmtree(plain.path / "index")
    assert zygote.judge(plain.path, plain.digests).harmless
    plain.reset()
