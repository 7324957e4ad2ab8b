"""Every call by which a process changes files, numbered, so that it can be made to die or to fail at any of them.

`Tripwire` takes the place of the functions of `os` that change a folder, of `open` for writing, of the hole
punching and of LMDB's write transactions. It is meant for a process that was forked for the purpose: nothing is put
back, and `KILL` is a real SIGKILL.

For a power cut it keeps, beside the folder, what is certain to be on the platter: a file's content as of its last
sync, a folder's entries as of that folder's last sync (a file's sync does not vouch for its name). What a machine
may show after the cut is written to another folder: of what was not synced nothing, or any part: entries one by one
(a rename is whole or not at all), contents torn and with blocks of zeros. LMDB's own promise is taken for granted: its
data file holds what was committed. That its name is durable is not.
"""

from __future__ import annotations

import builtins
import errno
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any, NoReturn, Self

import lmdb

from rig.stores import after_power_loss


class Fault(Enum):
    """What goes wrong at a step."""

    KILL_BEFORE = "killed before"
    KILL_AMID = "killed amid"
    KILL_AFTER = "killed after"
    FULL = "full disk"
    ERROR = "I/O error"
    POWER_NOTHING = "power cut, nothing survives that was not synced"
    POWER_ANYTHING = "power cut, any part survives of what was not synced"


_POWER = (Fault.POWER_NOTHING, Fault.POWER_ANYTHING)

_THINGS = (
    (r"\.\.", "the folder above"),
    (r"\.", "the repository's folder"),
    (r"packs", "packs/"),
    (r"packs/receipts", "the receipts"),
    (r"packs/..", "a folder of packs"),
    (r"packs/../.*\.pack", "a pack"),
    (r"index", "index/"),
    (r"index\.new-\d+", "the new index/"),
    (r"index\.old-\d+", "the old index/"),
    (r"index/head(\.\d+)*", "the index's head"),
    (r"index\.new-\d+/head(\.\d+)*", "the new index's head"),
    (r"index\.old-\d+/head(\.\d+)*", "the old index's head"),
    (r"index/(data|lock)\.mdb", r"the index's \1.mdb"),
    (r"index\.(new|old)-\d+/(data|lock)\.mdb", r"the \1 index's \2.mdb"),
    (r"\.config\.json\.\d+", "a new config.json"),
    (r"\.config\.json\.copy\.\d+", "a new config.json.copy"),
    (r"([^/]+)", r"\1"),
)

_TRANSACTIONS = {
    "_prepare": "make its tables",
    "_open_tables": "make its tables",
    "commit": "commit",
    "begin_session": "begin a session",
    "end_session": "end a session",
    "begin_collection": "begin a collection",
    "sweep": "sweep",
    "drop": "drop damaged records",
    "update_pack": "change a pack's row",
    "remove_pack": "forget a pack",
    "heartbeat": "sign of life",
}


@dataclass(eq=False)
class _File:
    """What is on the platter of a file: content as of its last sync."""

    durable: bytes | None = None
    commits: bool = False  # LMDB's: what is in it is durable
    unlinked: bytes | None = None


@dataclass(eq=False)
class _Folder:
    """Entries now, as of the last sync, and the changes in between, each of which is whole or not at all."""

    now: dict[str, _File | _Folder] = field(default_factory=dict)
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    changes: list[list[tuple[str, _File | _Folder | None]]] = field(default_factory=list)

    def change(self, *entries: tuple[str, _File | _Folder | None]) -> None:
        self.changes.append(list(entries))
        _apply(self.now, self.changes[-1])

    def sync(self) -> None:
        self.durable, self.changes = dict(self.now), []


def _apply(entries: dict[str, _File | _Folder], change: list[tuple[str, _File | _Folder | None]]) -> None:
    for name, token in change:
        if token is None:
            entries.pop(name, None)
        else:
            entries[name] = token


class Tripwire:
    """See the module. `install` once, in a process of its own.

    Args:
        root: the repository's folder; changes elsewhere pass unseen.
        at: number of the step at which the fault strikes, from 1 on; 0 for none.
        after_cut: the folder to write what a power cut leaves of the folder above `root` to.
    """

    def __init__(
        self, root: str, at: int = 0, fault: Fault | None = None, after_cut: str = "", seed: int = 0
    ):
        self.root = os.path.realpath(root)
        self.log: list[tuple[str, bool]] = []
        """Of each step its name, and whether it can be done in part."""
        self.fired = False
        self.missed: list[str] = []
        self._above = os.path.dirname(self.root)
        self._at = at
        self._fault = fault
        self._after_cut = after_cut
        self._rng = random.Random(seed)
        self._full = False
        self._inside = 0
        self._lock = threading.RLock()
        self._fds: dict[int, str] = {}
        self._tree = self._read_tree(self._above) if fault in _POWER else None

    # --- names

    def _is_ours(self, path: object) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False
        full = os.path.abspath(path)
        return full in (self._above, self.root) or full.startswith(self.root + "/")

    def thing(self, path: str) -> str:
        """What a path is in a repository, in words."""
        relative = os.path.relpath(path, self.root)
        for pattern, words in _THINGS:
            found = re.fullmatch(pattern, relative)
            if found:
                return found.expand(words)
        return relative

    # --- the one place where faults strike

    def _step(
        self,
        name: str,
        act: Callable[[], Any],
        *,
        amid: Callable[[], Any] | None = None,
        note: Callable[[], None] = lambda: None,
        grows: bool = False,
        fail: Callable[[int], BaseException] = lambda code: OSError(code, os.strerror(code)),
    ) -> Any:
        """Args: `amid` does a part; `note` records what the step has changed; `grows`: it needs room."""
        with self._lock:
            self._inside += 1
            try:
                self.log.append((name, amid is not None))
                if len(self.log) != self._at:
                    if self._full and grows:
                        raise fail(errno.ENOSPC)
                    return self._done(act, note)
                self.fired = True
                match self._fault:
                    case Fault.KILL_BEFORE:
                        self._die()
                    case Fault.KILL_AMID:
                        if amid is not None:
                            amid()
                        self._die()
                    case Fault.KILL_AFTER:
                        act()
                        self._die()
                    case Fault.FULL:
                        self._full = True
                        if amid is not None:
                            return self._done(amid, note)  # a short write; the next one fails
                        raise fail(errno.ENOSPC)
                    case Fault.ERROR:
                        if amid is not None:
                            self._done(amid, note)
                        raise fail(errno.EIO)
                    case Fault.POWER_NOTHING | Fault.POWER_ANYTHING:
                        self._done(act, note)
                        self._cut_power()
                        self._die()
                return self._done(act, note)
            finally:
                self._inside -= 1

    def _done(self, act: Callable[[], Any], note: Callable[[], None]) -> Any:
        result = act()
        if self._tree is not None:
            note()
        return result

    def _die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    # --- the calls

    def install(self) -> None:
        """Takes the calls' places, in this process, for good."""
        real = {name: getattr(os, name) for name in (
            "open", "close", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "posix_fallocate",
            "mkdir", "rmdir", "unlink", "rename", "replace",
        )}  # fmt: skip
        real_open = builtins.open

        def open_(path, flags, mode=0o777, *, dir_fd=None):
            if not self._is_ours(path):
                return real["open"](path, flags, mode, dir_fd=dir_fd)
            full = os.path.abspath(path)

            def act():
                fd = real["open"](full, flags, mode)
                self._fds[fd] = full
                return fd

            if flags & os.O_CREAT and not os.path.lexists(full):
                return self._step(
                    f"create {self.thing(full)}", act, note=lambda: self._link(full, _File()), grows=True
                )
            with self._lock:
                return self._unseen(act)

        def close(fd):
            with self._lock:
                self._fds.pop(fd, None)
                real["close"](fd)

        def writing(call):
            def write(fd, data, *offset):
                path = self._fds.get(fd)
                if path is None:
                    return real[call](fd, data, *offset)
                part = len(data) * 2 // 3
                if part > 8192:
                    part -= part % 4096

                def amid():
                    return real[call](fd, memoryview(data)[:part], *offset)

                return self._step(
                    f"write {self.thing(path)}",
                    lambda: real[call](fd, data, *offset),
                    amid=amid if part else None,
                    grows=True,
                )

            return write

        def on_descriptor(call, verb, *, syncs=False, grows=False):
            def act_on(fd, *more):
                path = self._fds.get(fd)
                if path is None:
                    return real[call](fd, *more)
                return self._step(
                    f"{verb} {self.thing(path)}",
                    lambda: real[call](fd, *more),
                    note=(lambda: self._sync(path)) if syncs else lambda: None,
                    grows=grows,
                )

            return act_on

        def mkdir(path, mode=0o777, *, dir_fd=None):
            if not self._is_ours(path) or os.path.lexists(path):
                return self._unseen(lambda: real["mkdir"](path, mode, dir_fd=dir_fd))
            full = os.path.abspath(path)
            return self._step(
                f"mkdir {self.thing(full)}",
                lambda: real["mkdir"](full, mode),
                note=lambda: self._link(full, _Folder()),
                grows=True,
            )

        def removing(call):
            def remove(path, *, dir_fd=None):
                if not self._is_ours(path) or not os.path.lexists(path):
                    return self._unseen(lambda: real[call](path, dir_fd=dir_fd))
                full = os.path.abspath(path)

                def act():
                    self._keep_content(full)
                    real[call](full)

                return self._step(f"{call} {self.thing(full)}", act, note=lambda: self._link(full, None))

            return remove

        def renaming(call):
            def rename(source, target, **more):
                if not self._is_ours(source):
                    return real[call](source, target, **more)
                a, b = os.path.abspath(source), os.path.abspath(target)
                assert os.path.dirname(a) == os.path.dirname(b), "a rename from folder to folder"

                def act():
                    if os.path.isfile(b):
                        self._keep_content(b)
                    real[call](a, b)

                words = self.thing(b)
                if words.startswith(("the old", "index/")):
                    words = f"{self.thing(a)} to {words}"
                return self._step(f"rename {words}", act, note=lambda: self._move(a, b), grows=False)

            return rename

        def open_file(path, mode="r", *args, encoding=None, **more):
            if "w" not in mode or not self._is_ours(path):
                return real_open(path, mode, *args, encoding=encoding, **more)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            return _Written(fd, encoding or "utf-8")

        os.open, os.close = open_, close
        os.write, os.pwrite = writing("write"), writing("pwrite")
        os.ftruncate = on_descriptor("ftruncate", "cut")
        os.fsync = on_descriptor("fsync", "sync", syncs=True)
        os.fdatasync = on_descriptor("fdatasync", "sync", syncs=True)
        os.posix_fallocate = on_descriptor("posix_fallocate", "allocate", grows=True)
        os.mkdir = mkdir
        os.unlink = os.remove = removing("unlink")
        os.rmdir = removing("rmdir")
        os.rename, os.replace = renaming("rename"), renaming("replace")
        builtins.open = open_file
        self._install_punch()
        self._install_lmdb()
        sys.addaudithook(self._audit)

    def _unseen(self, act: Callable[[], Any]) -> Any:
        self._inside += 1
        try:
            return act()
        finally:
            self._inside -= 1

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Remembers changes of files that no step knows of: the matrix would pass over them."""
        if self._inside or event not in (
            "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink",
        ):  # fmt: skip
            return
        path = args[1] if event in ("os.link", "os.symlink") else args[0]
        if event == "open" and not args[2] & (os.O_CREAT | os.O_TRUNC):
            return
        if self._is_ours(path) and (event != "open" or not os.path.exists(path)):
            self.missed.append(f"{event} {self.thing(path)}")

    def _install_punch(self) -> None:
        from holdfast.repo import packs

        real = packs._fallocate()
        if real is None:
            return
        import ctypes

        def punch(fd: int, mode: int, start: int, length: int) -> int:
            path = self._fds.get(fd, "")
            half = length // 2 // 4096 * 4096
            try:
                result: int = self._step(
                    f"punch {self.thing(path)}",
                    lambda: real(fd, mode, start, length),
                    amid=(lambda: real(fd, mode, start, half) and 0) if half and self._killing() else None,
                )
            except OSError as error:
                ctypes.set_errno(error.errno or errno.EIO)
                return -1
            return result

        packs._fallocate = lambda: punch  # type: ignore[assignment]

    def _killing(self) -> bool:
        return self._fault is Fault.KILL_AMID

    def _install_lmdb(self) -> None:
        real = lmdb.open

        def open_(folder: str, **options: Any) -> Any:
            data, lock = os.path.join(folder, "data.mdb"), os.path.join(folder, "lock.mdb")
            if not self._is_ours(folder):
                return real(folder, **options)
            if os.path.exists(data):
                return _Environment(real(folder, **options), self, folder)

            def note() -> None:
                self._link(data, _File(commits=True))
                if self._token(lock) is None:
                    self._link(lock, _File(commits=True))

            env = self._step(
                f"create {self.thing(data)}",
                lambda: real(folder, **options),
                note=note,
                grows=True,
                fail=_lmdb_error,
            )
            return _Environment(env, self, folder)

        lmdb.open = open_  # type: ignore[assignment]

    def transaction(self, folder: str, act: Callable[[], Any]) -> Any:
        """A write transaction's end."""
        words = "transaction"
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith("lmdb_index.py") and frame.f_code.co_name in _TRANSACTIONS:
                words = _TRANSACTIONS[frame.f_code.co_name]
                if frame.f_code.co_name != "_take_out":
                    break
            frame = frame.f_back  # type: ignore[assignment]
        where = "" if os.path.basename(folder) == "index" else " in the new index"
        return self._step(f"transaction: {words}{where}", act, grows=True, fail=_lmdb_error)

    # --- what is on the platter

    def _read_tree(self, path: str) -> _Folder:
        folder = _Folder()
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                folder.now[entry.name] = self._read_tree(entry.path)
            else:
                with open(entry.path, "rb") as file:
                    folder.now[entry.name] = _File(file.read(), entry.name in ("data.mdb", "lock.mdb"))
        folder.durable = dict(folder.now)
        return folder

    def _token(self, path: str) -> _File | _Folder | None:
        token: _File | _Folder | None = self._tree
        if path != self._above:
            for name in os.path.relpath(path, self._above).split("/"):
                token = token.now.get(name) if isinstance(token, _Folder) else None
        return token

    def _folder_of(self, path: str) -> _Folder:
        folder = self._token(os.path.dirname(path))
        assert isinstance(folder, _Folder), path
        return folder

    def _link(self, path: str, token: _File | _Folder | None) -> None:
        self._folder_of(path).change((os.path.basename(path), token))

    def _move(self, source: str, target: str) -> None:
        token = self._token(source)
        assert token is not None
        self._folder_of(source).change((os.path.basename(source), None), (os.path.basename(target), token))

    def _keep_content(self, path: str) -> None:
        token = self._token(path) if self._tree is not None else None
        if isinstance(token, _File):
            token.unlinked = self._content(path)

    @staticmethod
    def _content(path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def _sync(self, path: str) -> None:
        token = self._token(path)
        if isinstance(token, _Folder):
            token.sync()
        elif isinstance(token, _File):
            token.durable = self._content(path)

    def _cut_power(self) -> None:
        """Writes what the next start of the machine will find."""
        assert self._tree is not None
        here = {id(token): path for path, token in self._paths(self._tree, self._above)}
        self._write_tree(self._tree, self._after_cut, here)

    def _paths(self, folder: _Folder, path: str) -> list[tuple[str, _File | _Folder]]:
        found = []
        for name, token in folder.now.items():
            below = os.path.join(path, name)
            found.append((below, token))
            if isinstance(token, _Folder):
                found += self._paths(token, below)
        return found

    def _write_tree(self, folder: _Folder, to: str, here: dict[int, str]) -> None:
        entries = dict(folder.durable)
        if self._fault is Fault.POWER_ANYTHING:
            for change in folder.changes:
                if self._rng.random() < 0.5:
                    _apply(entries, change)
        os.makedirs(to, exist_ok=True)
        for name, token in entries.items():
            if isinstance(token, _Folder):
                self._write_tree(token, os.path.join(to, name), here)
            else:
                with open(os.path.join(to, name), "wb") as file:
                    file.write(self._survivor(token, here.get(id(token))))

    def _survivor(self, token: _File, path: str | None) -> bytes:
        now = self._content(path) if path is not None else token.unlinked or b""
        if token.commits:
            return now
        durable = token.durable or b""
        return after_power_loss(durable, now, self._rng) if self._fault is Fault.POWER_ANYTHING else durable


def _lmdb_error(code: int) -> BaseException:
    error = lmdb.Error(os.strerror(code))
    error.code = code  # type: ignore[attr-defined]
    return error


class _Environment:
    """LMDB's, with a step at the end of each write transaction."""

    def __init__(self, env: Any, wire: Tripwire, folder: str) -> None:
        self._env = env
        self._wire = wire
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self, *, write: bool = False, **more: Any) -> Any:
        txn = self._env.begin(write=write, **more)
        return _Transaction(txn, self._wire, self._folder) if write else txn

    def open_db(self, key: bytes, txn: Any = None, create: bool = True, **more: Any) -> Any:
        def act() -> Any:
            return self._env.open_db(key, txn=txn, create=create, **more)

        if txn is not None or not create:
            return act()
        return self._wire.transaction(self._folder, act)


class _Transaction:
    """The end of a `with` block commits, and that is a step."""

    def __init__(self, txn: Any, wire: Tripwire, folder: str) -> None:
        self._txn = txn
        self._wire = wire
        self._folder = folder

    def __enter__(self) -> Any:
        return self._txn.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        if kind is not None:
            return self._txn.__exit__(kind, error, trace)
        try:
            return self._wire.transaction(self._folder, lambda: self._txn.__exit__(None, None, None))
        except lmdb.Error:
            self._txn.abort()
            raise


class _Written:
    """A file that `open` made for writing, as far as Holdfast uses one."""

    def __init__(self, fd: int, encoding: str) -> None:
        self._fd = fd
        self._encoding = encoding

    def write(self, data: bytes | str) -> int:
        rest = memoryview(data.encode(self._encoding) if isinstance(data, str) else data)
        total = len(rest)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        return total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._fd)
