"""Encrypted repositories: who can read what, what an onlooker sees, and what a forger can not do."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import blake3
import pytest
from rig.child import Child
from rig.disks import KIB, MIB, content, machine_of
from rig.engine import ONE_WORKER, SMALL, FolderWorld, Truth, assert_clean, quiet, restored
from rig.files import write_noise

from holdfast.errors import IntegrityError, UsageError, WrongPassword
from holdfast.repo import keys
from holdfast.repo.codec import NONCE_BYTES, strong_hash
from holdfast.repo.format.record import RECORD_HEADER_BYTES, Kind, RecordHeader, encode_record_header
from holdfast.repo.packs import LocalPackStore
from holdfast.repo.records import PackScanner
from holdfast.repo.repository import InitOptions, Repository

CIPHERS = ["aes256-gcm", "chacha20-poly1305"]
SECRET = b"Customer 4711 owes 12,345.67 EUR; "


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 16)


@pytest.fixture(params=CIPHERS)
def options(request: pytest.FixtureRequest) -> InitOptions:
    return replace(SMALL, cipher=request.param)


@pytest.fixture
def world(tmp_path: Path, options: InitOptions) -> FolderWorld:
    return FolderWorld(tmp_path / "repo", options, "first")


def opens(path: str, password: str) -> bool:
    with Repository.open(path, password=password, notify=quiet) as repository:
        try:
            repository.points()
        except WrongPassword:
            return False
        return True


class TestPasswords:
    def test_every_password_opens_everything(self, world: FolderWorld) -> None:
        truth = Truth()
        with world.open(password="first") as repository:
            truth.backup(repository, [content(range(1, 20))])
            repository.add_key("second", "office")
        with world.open(password="second") as repository:
            truth.verify(repository)
            truth.backup(repository, [content(range(5, 25))])
        with world.open(password="first") as repository:
            truth.verify(repository)
            assert [slot.label for slot in repository.key_slots()][1:] == ["office"]

    @pytest.mark.parametrize("wrong", ["", "First", "first ", "first\n", "second", "ﬁrst", "\udcff"])
    def test_any_other_is_refused(self, world: FolderWorld, wrong: str) -> None:
        with world.open(password=wrong) as repository:
            for use in (
                repository.points,
                repository.check,
                lambda: repository.backup(machine_of([b"x" * 5000])),
                lambda: repository.add_key("more", ""),
                repository.export_key,
            ):
                with pytest.raises(WrongPassword) as caught:
                    use()
                assert caught.value.exit_code == 12

    def test_a_removed_password_opens_nothing_any_more(self, world: FolderWorld) -> None:
        truth = Truth()
        with world.open(password="first") as repository:
            truth.backup(repository, [content(range(1, 20))])
            second = repository.add_key("second", "")
            first = repository.current_slot()
        with world.open(password="second") as repository:
            assert repository.current_slot().id == second.id
            repository.remove_key(first.id)
        assert not opens(world.path, "first")
        with world.open(password="second") as repository:
            truth.verify(repository)
            with pytest.raises(UsageError):
                repository.remove_key(second.id)
            with pytest.raises(UsageError):
                repository.remove_key("0123456789abcdef")
        assert opens(world.path, "second")

    def test_changing_a_password(self, world: FolderWorld) -> None:
        with world.open(password="first") as repository:
            repository.add_key("other", "")
            repository.change_password("new")
            repository.points()
            repository.change_password("newer")
        assert [opens(world.path, p) for p in ("first", "new", "newer", "other")] == [
            False,
            False,
            True,
            True,
        ]

    def test_the_exported_key_brings_back_who_has_lost_every_password(
        self, world: FolderWorld, tmp_path: Path
    ) -> None:
        truth = Truth()
        with world.open(password="first") as repository:
            truth.backup(repository, [content(range(1, 20))])
            exported = repository.export_key()
        with world.open() as repository:
            repository.import_key(exported, "after the fire", "emergency")
        with world.open(password="after the fire") as repository:
            truth.verify(repository)
        with world.open() as repository:
            for foreign in (os.urandom(32), exported[:-1] + bytes([exported[-1] ^ 1]), b"", exported * 2):
                with pytest.raises(WrongPassword):
                    repository.import_key(foreign, "x", "")
        assert not opens(world.path, "x")

    def test_an_empty_password_is_refused(
        self, world: FolderWorld, tmp_path: Path, options: InitOptions
    ) -> None:
        with pytest.raises(UsageError):
            Repository.init(str(tmp_path / "other"), options, password="", notify=quiet)
        with world.open(password="first") as repository:
            for use in (lambda: repository.add_key("", ""), lambda: repository.change_password("")):
                with pytest.raises(UsageError):
                    use()

    def test_two_at_once_lose_no_key(self, world: FolderWorld) -> None:
        one, other = world.open(password="first"), world.open(password="first")
        one.points()
        other.points()
        one.add_key("second", "")
        other.add_key("third", "")
        one.add_key("fourth", "")
        for repository in (one, other):
            repository.close()
        assert all(opens(world.path, p) for p in ("first", "second", "third", "fourth"))

    def test_a_repository_without_encryption_has_no_keys(self, tmp_path: Path) -> None:
        world = FolderWorld(tmp_path / "plain")
        with world.open(password="needless") as repository:
            for use in (repository.key_slots, repository.export_key, lambda: repository.add_key("x", "")):
                with pytest.raises(UsageError):
                    use()
            assert repository.points() == []


class TestOnlookers:
    def test_nothing_of_the_machines_is_seen(self, world: FolderWorld) -> None:
        """Not what is on their disks, not their names, not their labels: neither as it is, nor compressed."""
        rng = random.Random(3)
        disk = b"".join((SECRET * 2000)[: 64 * KIB] + rng.randbytes(64 * KIB) for _ in range(12))
        name, label, file = "finance-db-secret-name", "label-secret-value", "secret-name-of-a-file.vmx"
        with world.open(password="first") as repository:
            for _ in range(3):
                truth = Truth()
                machine = machine_of([disk], name=name, files={file: SECRET * 100})
                from holdfast.repo.backup import BackupOptions

                repository.backup(machine, BackupOptions(labels={"secret-key": label}, workers=2))
                disk = rng.randbytes(4096) + disk[4096:]
            assert_clean(repository.check(read_data=True))
            assert repository.points()[0].manifest.vm_name == name
            assert not truth.points
        noise = disk[64 * KIB : 64 * KIB + 32]
        uuid = blake3.blake3(name.encode()).digest()
        words = [
            SECRET[:16],
            name.encode(),
            label.encode(),
            b"secret-key",
            file.encode(),
            noise,
            uuid,
            b"disk0.raw",
        ]
        searched = 0
        for path in [p for p in Path(world.path).rglob("*") if p.is_file() and p.name != "README.txt"]:
            data = path.read_bytes()
            searched += len(data)
            for word in words:
                assert word not in data, f"{word!r} is in {path}"
        assert searched > MIB // 2

    def test_equal_content_looks_different_in_every_repository(
        self, tmp_path: Path, options: InitOptions
    ) -> None:
        disk = content(range(1, 30))
        seen: list[set[bytes]] = []
        lengths: list[list[int]] = []
        for number in range(2):
            world = FolderWorld(tmp_path / f"r{number}", options, "the same password")
            with world.open(password="the same password") as repository:
                repository.backup(machine_of([disk]), ONE_WORKER)
                seen.append({record_id for record_id, _ in repository._index().scan(None, 10**6)})
                lengths.append(
                    sorted(p.plain_bytes for _, p in repository._index().scan(None, 10**6) if p.kind == 1)
                )
        assert not seen[0] & seen[1]
        assert lengths[0] == lengths[1]
        plain = {blake3.blake3(disk[at : at + 64 * KIB]).digest() for at in range(0, len(disk), 64 * KIB)}
        assert not plain & (seen[0] | seen[1])

    def test_cuts_differ_between_repositories(self, tmp_path: Path) -> None:
        """The chunker's seed is a secret: chunk lengths do not tell which known file is stored."""
        options = replace(SMALL, cipher="aes256-gcm", chunker="aligned", chunk_size_bytes=16 * KIB)
        disk = random.Random(5).randbytes(4 * MIB)
        lengths = []
        for number in range(2):
            world = FolderWorld(tmp_path / f"r{number}", options, "p")
            with world.open(password="p") as repository:
                repository.backup(machine_of([disk]), ONE_WORKER)
                lengths.append(
                    sorted(p.plain_bytes for _, p in repository._index().scan(None, 10**6) if p.kind == 1)
                )
        assert lengths[0] != lengths[1]

    def test_whoever_has_no_key_can_verify_every_byte(self, world: FolderWorld, rng: random.Random) -> None:
        with world.open(password="first") as repository:
            repository.backup(machine_of([content(range(1, 30))]), ONE_WORKER)
        with world.open() as repository:
            report = repository.check(read_data=True)
            assert_clean(report)
            assert report.bytes_verified > MIB
            assert report.points == 0
            assert any("password" in note for note in report.notes)
        for _ in range(30):
            pack = rng.choice(list(world.store.ids()))
            path = Path(world.store.path(pack))
            intact = path.read_bytes()
            data = bytearray(intact)
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            with world.open() as repository:
                report = repository.check(read_data=True)
                assert not report.clean
                error = report.error()
                assert error is not None
                assert error.exit_code == 20
            path.write_bytes(intact)


def nonces(store: LocalPackStore) -> list[bytes]:
    """Of every record that any process has ever written, if its pack still holds it."""
    found = []
    for pack_id in store.ids():
        for record in PackScanner(store, pack_id, store.length(pack_id) or 0, payloads=True).records():
            if record.header.kind is not Kind.TABLE:
                assert record.payload is not None
                found.append(bytes(record.payload[:NONCE_BYTES]))
    return found


class TestNonces:
    def test_no_nonce_is_used_twice(self, world: FolderWorld, tmp_path: Path, rng: random.Random) -> None:
        """Across records, threads, sessions, processes at once, and processes that were killed."""
        disk = tmp_path / "disk.raw"
        landed = 0
        for round_ in range(4):
            write_noise(disk, rng.randrange(2**32), 12 * MIB)
            with world.open(password="first") as repository:
                repository.backup(machine_of([content([round_, 500 + round_])]), ONE_WORKER)
                repository.backup(machine_of([content([700 + round_])], name="same process"))
            victim = Child(
                do="backup", path=world.path, disk=disk, name="killed", password="first", workers=3
            )
            victim.ready()
            victim.go()
            landed += victim.kill_after(rng.uniform(0.02, 0.12))
            others = [
                Child(do="backup", path=world.path, disk=disk, name=f"vm{n}", password="first")
                for n in range(2)
            ]
            for child in others:
                child.ready()
            for child in others:
                child.go()
            for child in others:
                child.result()
        seen = Counter(nonces(world.store))
        assert landed
        assert len(seen) > 300
        assert seen.most_common(1)[0][1] == 1
        assert len({nonce[:16] for nonce in seen}) >= 4 * 3

    def test_a_sealer_does_not_cross_a_fork(self) -> None:
        script = """
import os
from holdfast.errors import InternalError
from holdfast.repo import keys
from holdfast.repo.codec import Sealer
from holdfast.repo.format.record import Kind
sealer = Sealer(keys.secret_keys("aes256-gcm", bytes(32)), 1)
sealer.seal(Kind.CHUNK, bytes(32), b"x")
if not os.fork():
    try:
        sealer.seal(Kind.CHUNK, bytes(32), b"x")
    except InternalError:
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
        outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert outcome.stdout.strip() == "7"


class TestForgers:
    """Who can write to the storage, has no key, and makes every checksum right that needs none."""

    @pytest.fixture
    def stored(self, world: FolderWorld) -> Truth:
        truth = Truth()
        with world.open(password="first") as repository:
            truth.backup(repository, [content([*range(1, 12), 3])])
        return truth

    def records(self, world: FolderWorld, kind: Kind):
        for pack_id in world.store.ids():
            length = world.store.length(pack_id) or 0
            for record in PackScanner(world.store, pack_id, length, payloads=True).records():
                if record.header.kind is kind:
                    yield pack_id, record.offset, record.header, bytes(record.payload or b"")

    def forge(self, world: FolderWorld, pack_id, offset: int, header: RecordHeader, payload: bytes) -> None:
        assert len(payload) == header.stored_bytes
        header = header._replace(strong_hash=strong_hash(payload))
        with open(world.store.path(pack_id), "r+b") as file:
            file.seek(offset)
            file.write(encode_record_header(header, pack_id) + payload)

    @pytest.mark.parametrize("kind", [Kind.CHUNK, Kind.NODE, Kind.MANIFEST])
    @pytest.mark.parametrize("part", ["nonce", "ciphertext", "tag"])
    def test_an_altered_payload(self, world: FolderWorld, stored: Truth, kind: Kind, part: str) -> None:
        pack_id, offset, header, payload = next(self.records(world, kind))
        at = {"nonce": 20, "ciphertext": NONCE_BYTES, "tag": len(payload) - 1}[part]
        self.forge(
            world, pack_id, offset, header, payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        )
        with world.open() as repository:
            assert_clean(repository.check(read_data=True))  # without a key it can not be told
        with world.open(password="first") as repository:
            assert not repository.check(read_data=True).clean
            point = repository.points()[0]
            if kind is not Kind.MANIFEST:
                with pytest.raises(IntegrityError):
                    restored(repository, point)

    def test_a_header_that_says_otherwise(self, world: FolderWorld, stored: Truth) -> None:
        """Another id, length or codec for an authentic payload: the header is authenticated with it."""
        found = list(self.records(world, Kind.CHUNK))
        (pack_id, offset, header, payload), (_, _, other, _) = found[0], found[1]
        for lie in (
            header._replace(id=other.id),
            header._replace(plain_bytes=header.plain_bytes + 1),
            header._replace(codec=type(header.codec)(1 - header.codec)),
            header._replace(flags=0),
            header._replace(kind=Kind.NODE),
        ):
            self.forge(world, pack_id, offset, lie, payload)
            with world.open(password="first") as repository:
                assert not repository.check(read_data=True).clean, lie
                with pytest.raises(IntegrityError):
                    restored(repository, repository.points()[0])
        self.forge(world, pack_id, offset, header, payload)
        with world.open(password="first") as repository:
            stored.verify(repository)

    def test_a_payload_in_the_place_of_another(self, world: FolderWorld, stored: Truth) -> None:
        """Authentic, of the same length, from the same repository, under the other one's header."""
        found = list(self.records(world, Kind.CHUNK))
        one = next(r for r in found if sum(r[2].stored_bytes == o[2].stored_bytes for o in found) > 1)
        other = next(r for r in found if r[2].stored_bytes == one[2].stored_bytes and r is not one)
        self.forge(world, one[0], one[1], one[2], other[3])
        with world.open(password="first") as repository:
            assert not repository.check(read_data=True).clean
            with pytest.raises(IntegrityError):
                restored(repository, repository.points()[0])

    def test_a_forged_manifest_does_not_hide_the_true_ones_after_a_rebuild(
        self, world: FolderWorld, stored: Truth
    ) -> None:
        pack_id, offset, header, payload = next(self.records(world, Kind.MANIFEST))
        with world.open(password="first") as repository:
            second = Truth()
            second.backup(repository, [content([7, 8, 9])], name="db1")
        self.forge(world, pack_id, offset, header, payload[:-1] + bytes([payload[-1] ^ 1]))
        world.drop_index()
        with world.open(password="first") as repository:
            listed = {p.id.hex(): p for p in repository.points()}
            assert second.points.keys() <= listed.keys()
            assert not stored.points.keys() & listed.keys()
            for point_id, found in second.points.items():
                assert restored(repository, listed[point_id]) == found

    def test_a_plain_record_in_an_encrypted_repository(self, world: FolderWorld, stored: Truth) -> None:
        """Nothing that is not encrypted is believed, whatever its id."""
        pack_id, offset, header, payload = next(self.records(world, Kind.CHUNK))
        plain = payload[: header.stored_bytes]
        lie = header._replace(flags=0, codec=type(header.codec)(0), plain_bytes=len(plain), id=header.id)
        self.forge(world, pack_id, offset, lie, plain)
        with world.open(password="first") as repository, pytest.raises(IntegrityError):
            restored(repository, repository.points()[0])

    def test_settings_swapped_under_a_password(self, world: FolderWorld, stored: Truth) -> None:
        """The configuration is vouched for by the master key: cheaper hashing or another chunker is noticed."""
        from holdfast.errors import HoldfastError

        path = Path(world.path) / "config.json"
        original = path.read_text()
        changed = re.sub(r'"chunk_size_bytes": \d+', '"chunk_size_bytes": 131072', original)
        assert changed != original
        from holdfast.repo.format.config import decode_config, encode_config

        config = decode_config(original.encode())
        forged = encode_config(replace(config, chunk_size_bytes=131072))
        for name in ("config.json", "config.json.copy"):
            (Path(world.path) / name).write_bytes(forged)
        with Repository.open(world.path, password="first", notify=quiet) as repository:
            with pytest.raises(HoldfastError):
                repository.points()
        for name in ("config.json", "config.json.copy"):
            (Path(world.path) / name).write_bytes(original.encode())
        with world.open(password="first") as repository:
            stored.verify(repository)

    def test_an_older_configuration_still_opens_only_with_its_own_passwords(self, world: FolderWorld) -> None:
        """Documented: who has kept a copy can go on using a removed password. It gives nothing more."""
        before = (Path(world.path) / "config.json").read_bytes()
        with world.open(password="first") as repository:
            repository.change_password("second")
        for name in ("config.json", "config.json.copy"):
            (Path(world.path) / name).write_bytes(before)
        assert opens(world.path, "first")
        assert not opens(world.path, "second")


def test_headers_are_as_long_as_the_tests_believe() -> None:
    assert RECORD_HEADER_BYTES == 72
