"""A process that judges damaged repositories, each in a child of its own.

LMDB is C code: a damaged index may end the process that reads it, and a test run must survive that. The
zygote is started once, imports everything, has one thread, and forks a child for each job; jobs and verdicts
are lines of JSON. A child that does not come to an end is killed by its alarm, so a hang is seen as one.

Run as a program; `Zygote` is the other end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from rig.served import Served

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Verdict:
    """What came of one job.

    Args:
        signal: that ended the child; 0 if it ended by itself.
        codes: exit codes of all reported errors.
        wrong: sentences on whatever must never happen.
        exact: points that came back bit for bit.
        clean: the check found nothing.
        made: id of the point that a backup has made.
    """

    signal: int = 0
    codes: tuple[int, ...] = ()
    wrong: tuple[str, ...] = ()
    exact: int = 0
    clean: bool = False
    messages: tuple[str, ...] = ()
    made: str = ""

    @property
    def harmless(self) -> bool:
        """Nothing was noticed, and nothing had to be."""
        return self.clean and not self.codes and not self.signal


class Zygote(Served):
    """Starts the process and talks to it."""

    def __init__(self) -> None:
        super().__init__("rig.zygote")

    def judge(
        self,
        path: Path,
        digests: dict[str, dict[str, str]],
        *,
        password: str | None = None,
        rebuild: bool = False,
        unreported: dict[str, str] | None = None,
    ) -> Verdict:
        """Opens, lists, restores everything, checks everything; `digests` is what must come back.

        Args:
            rebuild: make a new index first; then nothing may be amiss.
            unreported: a further point may be listed if it has these contents.
        """
        return self._do(
            path=str(path), digests=digests, password=password, rebuild=rebuild, unreported=unreported
        )

    def back_up(self, path: Path, units: list[int], name: str) -> Verdict:
        """Makes one more backup, of a machine with one generated disk."""
        return self._do(path=str(path), units=units, name=name)

    def _do(self, **job: object) -> Verdict:
        answer = self.ask(job)
        return Verdict(**{k: tuple(v) if isinstance(v, list) else v for k, v in answer.items()})


def digests_of(contents: dict[str, bytes]) -> dict[str, str]:
    """Name -> SHA-256."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def _judge(job: dict) -> dict:
    from holdfast.errors import HoldfastError
    from holdfast.repo.repository import Repository
    from rig.engine import quiet, restored

    codes: list[int] = []
    messages: list[str] = []
    wrong: list[str] = []
    exact = 0
    clean = False
    digests: dict[str, dict[str, str]] = job["digests"]

    def attempt(what: str, act) -> object:
        try:
            return act()
        except HoldfastError as error:
            codes.append(error.exit_code)
            messages.append(f"{what}: {error.message}")
        except BaseException as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        return None

    def all_of_it() -> None:
        nonlocal exact, clean
        with Repository.open(job["path"], password=job["password"], notify=quiet) as repository:
            if job["rebuild"]:
                repository.rebuild_index()
            points = attempt("listing", repository.points)
            if points is not None:
                listed = {point.id.hex(): point for point in points}
                for extra in listed.keys() - digests.keys() if job["unreported"] else ():
                    digests[extra] = job["unreported"]
                if listed.keys() != digests.keys():
                    wrong.append(f"listed are {sorted(listed)}, not {sorted(digests)}")
                for point_id in listed.keys() & digests.keys():
                    found = attempt("restoring", lambda p=listed[point_id]: restored(repository, p))
                    if found is not None:
                        if digests_of(found) == digests[point_id]:
                            exact += 1
                        else:
                            wrong.append(f"point {point_id[:12]} came back with other bytes")
            report = attempt("checking", lambda: repository.check(read_data=True))
            if report is not None:
                error = report.error()
                clean = error is None
                if error is not None:
                    codes.append(error.exit_code)
                    messages.append(f"check: {error.message}")

    attempt("opening", all_of_it)
    return {
        "codes": codes,
        "messages": messages,
        "wrong": wrong,
        "exact": exact,
        "clean": clean,
    }


def _back_up(job: dict) -> dict:
    from holdfast.errors import HoldfastError
    from holdfast.repo.repository import Repository
    from rig.disks import content, machine_of
    from rig.engine import ONE_WORKER, quiet

    try:
        with Repository.open(job["path"], notify=quiet) as repository:
            machine = machine_of([content(job["units"])], name=job["name"])
            point = repository.backup(machine, ONE_WORKER).point
            assert point is not None
            return {"made": point.hex()}
    except HoldfastError as error:
        return {"codes": [error.exit_code], "messages": [error.message]}
    except BaseException as error:
        return {"wrong": [f"backup: {type(error).__name__}: {error}"]}


def _serve() -> None:
    import rig.engine  # noqa: F401 - imported once, before all forks

    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            signal.alarm(_TIMEOUT_S)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            with os.fdopen(writer, "w") as out:
                job = json.loads(line)
                json.dump(_back_up(job) if "units" in job else _judge(job), out)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answers:
            text = answers.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = text if status == 0 else json.dumps({"signal": -status})
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
