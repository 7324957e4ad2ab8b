"""A process of its own that works on a repository: `python -m rig.child '{"do": "backup", ...}'`.

It says `ready` when everything is imported and opened, waits for a line on its standard input (so that
several can be started at the same moment), does the work, and ends with one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent.parent


class Child:
    """The other end: starts a process and hears what it says."""

    def __init__(self, **job: object) -> None:
        paths = [str(_HERE), *(p for p in sys.path if p)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rig.child", json.dumps(job, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def ready(self) -> None:
        """Waits until it is about to begin."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", f"the child said {line!r}"

    def go(self) -> None:
        """Lets it begin."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill_after(self, seconds: float) -> bool:
        """Kills it; returns whether it was still at work."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        self.process.kill()
        self.process.communicate()
        return self.process.returncode == -9

    def result(self) -> dict[str, Any]:
        """What it has to say at its end."""
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, f"the child ended with {self.process.returncode}"
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def run(self) -> dict[str, Any]:
        """All of it."""
        self.ready()
        self.go()
        return self.result()


def _backup(repository, job: dict) -> dict:
    from holdfast.repo.backup import BackupOptions
    from rig.disks import machine_of
    from rig.files import FileSource

    machine = machine_of([FileSource(job["disk"])], name=job["name"])
    summary = repository.backup(machine, BackupOptions(workers=job.get("workers", 2)))
    return {
        "point": summary.point.hex(),
        "chunks_new": summary.chunks_new,
        "chunks_reused": summary.chunks_reused,
        "bytes_stored": summary.bytes_stored,
        "bytes_new": summary.bytes_new,
        "bytes_read": summary.bytes_read,
        "duration_s": summary.duration_s,
    }


def _restore(repository, job: dict) -> dict:
    from rig.files import FileSink

    point = repository.resolve(job["point"])
    tree = point.manifest.disks[0].tree
    sink = FileSink(job["to"], tree.size_bytes)
    repository.restore(point, [(tree, sink)], workers=2)
    sink.finish()
    return {}


def _check(repository, job: dict) -> dict:
    report = repository.check(read_data=job.get("read_data", True), workers=2)
    return {
        "clean": report.clean,
        "findings": [f.message for f in report.findings] + [str(d) for d in report.damaged],
        "points": report.points,
        "bytes_verified": report.bytes_verified,
    }


def _repair(repository, job: dict) -> dict:
    from holdfast.repo.repository import Repository
    from rig.engine import quiet

    with Repository.open(job["other"], notify=quiet) as other:
        _, repaired = repository.repair(other, workers=2)
    return {
        "complete": repaired.complete,
        "damaged": repaired.damaged,
        "healed": repaired.healed_total,
        "message": str(repaired.error() or ""),
    }


def _hold(repository, _job: dict) -> dict:
    """Uses the repository until its standard input is closed."""
    found = {"points": [p.id.hex() for p in repository.points()]}
    sys.stdin.read()
    return found


def _list(repository, _job: dict) -> dict:
    return {"points": [p.id.hex() for p in repository.points()]}


def main() -> None:
    from holdfast.errors import HoldfastError
    from holdfast.repo import session
    from holdfast.repo.repository import Repository
    from rig.engine import quiet

    job = json.loads(sys.argv[1])
    if "batch_bytes" in job:
        session._BATCH_BYTES = job["batch_bytes"]  # type: ignore[misc]
    work = {
        "backup": _backup,
        "restore": _restore,
        "check": _check,
        "repair": _repair,
        "hold": _hold,
        "list": _list,
    }[job["do"]]
    from holdfast.repo import backup, check, repair, restore  # noqa: F401 - before the clock runs

    said: dict[str, Any] = {}
    try:
        with Repository.open(job["path"], password=job.get("password"), notify=quiet) as repository:
            if job.get("open", True):
                repository.points()
            print("ready", flush=True)
            sys.stdin.readline()
            began = time.monotonic()
            said = work(repository, job)
            said["seconds"] = time.monotonic() - began
    except HoldfastError as error:
        said = {"code": error.exit_code, "message": error.message}
    # Not ru_maxrss: that remembers the process which this one was forked from.
    with open("/proc/self/status", encoding="ascii") as status:
        said["rss_kib"] = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
