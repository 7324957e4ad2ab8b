"""Runs a workload with every tool in turn, checks what they did, and writes the figures down.

    python -m benchmarks.compare [WORKLOAD] [--images FOLDER | --size small|full] [--runs 3] [--work FOLDER]

Rules: all tools work on the same files; each step's input is read into the page cache before its clock
starts; each time includes a `sync`; the tools take turns step by step (A B C, A B C, ...), and so do the
ceilings, so that a noisy machine is noisy for all; restored disks are compared byte for byte with the
originals, repositories are checked by their own tools, and Holdfast's counts must add up to those that the
ceilings found on their own. Any wrong outcome ends the run without a result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.guests import SIZES, make_guests
from benchmarks.machine import PROJECT, describe
from benchmarks.measure import CommandFailed, Usage, compare_files, data_extents, tree_size, warm
from benchmarks.tools import Backup, Holdfast, Tool, make_tools
from benchmarks.workloads import WORKLOADS, Step, Workload

__all__ = ["RESULTS", "run_workload"]

RESULTS = PROJECT / "benchmarks" / "results"


def _figures(usage: Usage) -> dict[str, object]:
    return {name: value for name, value in asdict(usage).items() if name != "output"}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class _Round:
    """One pass through the workload: every step by every tool."""

    def __init__(self, workload: Workload, tools: Sequence[Tool], images: str, work: str) -> None:
        self._workload = workload
        self._tools = tools
        self._images = images
        self._work = work
        self.ceilings: dict[str, list[int]] = {}
        self.results: dict[str, dict[str, dict[str, object]]] = {tool.name: {} for tool in tools}

    def _image(self, name: str) -> str:
        return os.path.join(self._images, name)

    def run(self, skip: frozenset[str]) -> None:
        """Does it all, and removes the repositories at the end."""
        names = [self._image(name) for name in self._workload.images]
        restored = next(
            (s.image for s in self._workload.steps if s.action == "restore"), self._workload.images[0]
        )
        _say("ceilings")
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.ceilings", self._work, self._image(restored), *names],
            cwd=PROJECT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        self.ceilings = json.loads(output)
        try:
            for tool in self._tools:
                tool.init()
            for step in self._workload.steps:
                for tool in self._tools:
                    if step.name in tool.steps and step.name not in skip:
                        self._step(step, tool)
        finally:
            for tool in self._tools:
                shutil.rmtree(tool.repository, ignore_errors=True)

    def _step(self, step: Step, tool: Tool) -> None:
        if step.action == "backup":
            warm([self._image(step.image)])
            backup = tool.backup(self._image(step.image), step.vm)
            self._verify(step, tool, backup)
            found = {**_figures(backup.usage), "figures": backup.figures}
        elif step.action == "restore":
            found = self._restore(step, tool)
        else:
            warm([tool.repository])
            checked = tool.check()
            found = _figures(checked) if checked is not None else {}
        if step.sized:
            found["apparent_bytes"], found["allocated_bytes"] = tree_size(tool.repository)
        self.results[tool.name][step.name] = found
        _say(
            f"{tool.name}: {step.name} {found.get('wall_s', 0):.2f} s, {found.get('cpu_s', 0):.2f} CPU s, "
            f"{int(str(found.get('rss_peak_bytes', 0))) / 1e6:.0f} MB"
        )

    def _restore(self, step: Step, tool: Tool) -> dict[str, object]:
        image = step.image
        if "changed" not in tool.steps:  # then it only has the first image
            image = self._workload.images[0]
        with tempfile.TemporaryDirectory(dir=self._work, prefix="restored-") as folder:
            warm([tool.repository])
            usage, place = tool.restore(step.vm, self._image(image), folder)
            compare_files(self._image(image), place)
            allocated = os.stat(place).st_blocks * 512
        os.sync()  # what the removal leaves to be written is not the next tool's
        return {**_figures(usage), "allocated_bytes": allocated}

    def _verify(self, step: Step, tool: Tool, backup: Backup) -> None:
        """Holdfast's own counts against those of the ceilings, which were made in another way."""
        said = backup.figures
        if said is None:
            return
        number = self._workload.images.index(step.image)
        data = sum(length for _, length in data_extents(self._image(step.image)))
        wrong = []
        if said["bytes_read"] != data:
            wrong.append(f"{said['bytes_read']} bytes were read of {data}")
        if isinstance(tool, Holdfast) and not tool.encrypted:  # a secret seed makes other cuts
            if said["chunks_new"] + said["chunks_reused"] != self.ceilings["chunks"][number]:
                wrong.append(f"{said} do not add up to {self.ceilings['chunks'][number]} chunks")
            if step.name == "first" and said["bytes_new"] != self.ceilings["new_bytes"][number]:
                wrong.append(f"{said['bytes_new']} bytes were new, not {self.ceilings['new_bytes'][number]}")
        if step.name == "unchanged" and (said["bytes_new"] or said["chunks_new"]):
            wrong.append(f"an unchanged image had {said['bytes_new']} new bytes")
        if wrong:
            raise CommandFailed(f"{tool.name}, {step.name}: " + "; ".join(wrong))


def run_workload(
    workload: Workload,
    tools: Sequence[Tool],
    images: str,
    work: str,
    runs: int,
    skip: frozenset[str] = frozenset(),
    on_round: Callable[[dict[str, object]], None] = lambda _result: None,
) -> dict[str, object]:
    """The result of all rounds, as it is written to JSON.

    Args:
        skip: names of steps to leave out.
        on_round: receives the result so far after each round.

    Raises:
        CommandFailed: a tool failed, or gave a wrong result.
    """
    machine = describe(work)
    rounds: list[dict[str, object]] = []
    result: dict[str, object] = {
        "workload": workload.name,
        "title": workload.title,
        "machine": machine,
        "steps": {step.name: step.title for step in workload.steps if step.name not in skip},
        "images": {
            name: {
                "size_bytes": os.path.getsize(os.path.join(images, name)),
                "data_bytes": sum(length for _, length in data_extents(os.path.join(images, name))),
            }
            for name in workload.images
        },
        "tools": {tool.name: {"version": tool.version(), "remark": tool.remark} for tool in tools},
        "rounds": rounds,
    }
    for number in range(runs):
        one = _Round(workload, tools, images, work)
        _say(f"round {number + 1} of {runs}")
        one.run(skip)
        rounds.append({"ceilings": one.ceilings, "tools": one.results, "load_after": os.getloadavg()[0]})
        on_round(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workload", nargs="?", choices=WORKLOADS, default="holdfast")
    parser.add_argument("--images", help="folder with the images, instead of making them")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--work", help="where repositories and restored disks are put (default: a temporary folder)"
    )
    parser.add_argument("--tools", nargs="+", help="only these")
    parser.add_argument("--skip", nargs="+", default=[], help="steps to leave out")
    parser.add_argument("--holdfast", help="the program to measure (default: the one beside this Python)")
    parser.add_argument("--borg", default="borg", help="the program of Borg 1.4")
    parser.add_argument("--output", help="the JSON file (default: a new one in benchmarks/results)")
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    output = Path(arguments.output or RESULTS / f"{workload.name}-{stamp}.json")
    output.parent.mkdir(parents=True, exist_ok=True)

    def save(result: dict[str, object]) -> None:
        result["made"] = "given images" if arguments.images else f"{arguments.size}, seed {arguments.seed}"
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=arguments.work) as work:
        images = arguments.images
        if images is None:
            images = os.path.join(work, "images")
            make_guests(images, SIZES[arguments.size], arguments.seed)
        tools = make_tools(
            arguments.tools or workload.tools, work, holdfast=arguments.holdfast, borg=arguments.borg
        )
        run_workload(
            workload, tools, os.path.abspath(images), work, arguments.runs, frozenset(arguments.skip), save
        )
    print(output)


if __name__ == "__main__":
    main()
