"""Medians of a result, small enough to be committed: what the report is made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import PROJECT

__all__ = ["PUBLISHED", "Summary", "load", "publish", "summarize"]

PUBLISHED = PROJECT / "benchmarks" / "published"


def _median(values: list[Any]) -> Any:
    """Element by element for lists, key by key for objects; what is no number is taken from the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_median(list(column)) for column in zip(*values, strict=True)]
    if isinstance(first, int | float) and not isinstance(first, bool):
        return round(median(values), 4)
    return first


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its rounds replaced by their medians; the fastest and slowest times are kept."""
    rounds = result["rounds"]
    tools: dict[str, Any] = {}
    for name, about in result["tools"].items():
        steps = {}
        for step in rounds[0]["tools"][name]:
            every = [one["tools"][name][step] for one in rounds]
            times = sorted(one["wall_s"] for one in every if "wall_s" in one)
            steps[step] = {**_median(every), "wall_range_s": [round(t, 3) for t in times[:1] + times[-1:]]}
        tools[name] = {**about, "steps": steps}
    kept = {key: value for key, value in result.items() if key not in ("rounds", "tools")}
    return {
        **kept,
        "runs": len(rounds),
        "load_after": [round(one["load_after"], 2) for one in rounds],
        "ceilings": _median([one["ceilings"] for one in rounds]),
        "tools": tools,
    }


def publish(source: Path, name: str) -> Path:
    """Writes the summary of a result file (or a summary itself) to `published/<name>.json`."""
    found = json.loads(source.read_text(encoding="utf-8"))
    if "rounds" in found:
        found = summarize(found)
    target = PUBLISHED / f"{name}.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return target


@dataclass(frozen=True, slots=True)
class Summary:
    """A published summary of a workload."""

    raw: dict[str, Any]

    @property
    def runs(self) -> int:
        """Over how many the medians are."""
        return int(self.raw["runs"])

    @property
    def tools(self) -> list[str]:
        """Names, in the order of the run."""
        return list(self.raw["tools"])

    def figure(self, tool: str, step: str, name: str = "wall_s") -> float | None:
        """A median, or None if it was not measured."""
        found = self.raw["tools"].get(tool, {}).get("steps", {}).get(step, {}).get(name)
        return None if found is None else float(found)

    def ceiling(self, name: str, image: str | None = None) -> float | None:
        """A ceiling; of one image where there is one for each."""
        found = self.raw["ceilings"].get(name)
        if isinstance(found, dict):
            return float(min(found.values())) if found else None
        if isinstance(found, list) and image is not None:
            return float(found[list(self.raw["images"]).index(image)])
        return None


def load(path: Path) -> Summary:
    """A published summary; a result that was not published is summarized."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Summary(summarize(found) if "rounds" in found else found)
