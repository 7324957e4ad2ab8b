"""docs/BENCHMARKS.md out of the published summaries: tables, plots, verdicts, and why.

    python -m benchmarks.report [--publish NAME=RESULT.json...]

Figures come from `benchmarks/published/*.json`, sentences that explain them from `benchmarks/remarks.toml`.
Nothing in the report is written by hand.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import esxi_wire, mount, remote
from benchmarks.machine import PROJECT
from benchmarks.summary import PUBLISHED, Summary, load, publish
from benchmarks.targets import Verdict, verdicts

__all__ = ["plots", "render"]

_DOCS = PROJECT / "docs"
_REMARKS = PROJECT / "benchmarks" / "remarks.toml"
_VERDICTS = {True: "met", False: "**missed**", None: "not measured"}
_OWN = "holdfast"
# Results in the form of their own benchmark: the start of their file's name (and key of the remark), the heading, who writes of them.
_SECTIONS: tuple[tuple[str, str, Callable[[Sequence[dict[str, Any]]], Iterator[str]]], ...] = (
    ("mount", "Mounting", mount.section),
    ("esxi-wire", "Backups from a host", esxi_wire.section),
    ("remote", "Repositories on other hosts", remote.section),
)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _machine(summary: dict[str, Any]) -> str:
    about = summary["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    changed = " with uncommitted changes" if about["uncommitted"] else ""
    return (
        f"{about['date'][:10]}, commit {about['commit']}{changed}; {about['cpu']}, {about['cores']} cores, "
        f"{about['memory_bytes'] / 2**30:.0f} GiB memory, Linux {about['kernel']}, {about['file_system']}; "
        f"Python {about['python']}, {libraries}; load before the run {about['load_before']:.1f}"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _best_verdicts(runs: Sequence[Summary]) -> Iterator[tuple[Verdict, Summary]]:
    """Each target from the run with the most rounds that can tell."""
    ordered = sorted(runs, key=lambda run: -run.runs)
    for candidates in zip(*(verdicts(run) for run in ordered), strict=True):
        pairs = list(zip(candidates, ordered, strict=True))
        yield next((pair for pair in pairs if pair[0].met is not None), pairs[0])


def _targets(runs: Sequence[Summary], remarks: dict[str, str]) -> Iterator[str]:
    yield "## Targets"
    yield ""
    rows, reasons = [], []
    for verdict, run in _best_verdicts(runs):
        rows.append(
            [
                verdict.work,
                verdict.value,
                verdict.against,
                verdict.ratio,
                verdict.cpu,
                verdict.target,
                _VERDICTS[verdict.met],
                str(run.runs) if verdict.met is not None else "",
            ]
        )
        if verdict.key in remarks:
            reasons.append(
                f"- *{verdict.work}*, {_VERDICTS[verdict.met]} (target {verdict.target}): {' '.join(remarks[verdict.key].split())}"
            )
    yield from _table(
        ["work", "Holdfast", "against", "ratio", "CPU s of both", "target", "verdict", "runs"], rows
    )
    if reasons:
        yield "Where the distance comes from:"
        yield ""
        yield from reasons
        yield ""


def _side_by_side(run: Summary) -> Iterator[str]:
    steps = {
        step: title for step, title in run.raw["steps"].items() if any(run.figure(t, step) for t in run.tools)
    }
    data = {name: about["data_bytes"] / 1e6 for name, about in run.raw["images"].items()}
    yield f"Images: {', '.join(f'{name} ({size:.0f} MB of data)' for name, size in data.items())}; {run.raw['made']}."
    yield f"Medians of {run.runs} run{'s' if run.runs > 1 else ''}; {_machine(run.raw)}."
    yield ""
    yield "Wall seconds, sync included (CPU seconds in parentheses):"
    yield ""
    rows = []
    for tool in run.tools:
        cells = []
        for step in steps:
            wall, cpu = run.figure(tool, step), run.figure(tool, step, "cpu_s")
            cells.append("" if wall is None else f"{wall:.2f} ({_number(cpu, '.1f')})")
        rows.append([tool, *cells])
    yield from _table(["tool", *steps], rows)
    yield "; ".join(f"*{step}*: {title}" for step, title in steps.items()) + "."
    yield ""
    yield "Repository in MB after each image, apparent size (allocated on disk in parentheses), and peak resident memory in MB:"
    yield ""
    rows = []
    for tool in run.tools:
        cells = []
        for step in ("first", "changed", "other"):
            apparent = run.figure(tool, step, "apparent_bytes")
            allocated = run.figure(tool, step, "allocated_bytes")
            cells.append(
                ""
                if apparent is None or allocated is None
                else f"{apparent / 1e6:.0f} ({allocated / 1e6:.0f})"
            )
        for step in ("first", "restore"):
            peak = run.figure(tool, step, "rss_peak_bytes")
            cells.append("" if peak is None else f"{peak / 1e6:.0f}")
        rows.append([tool, *cells])
    yield from _table(["tool", "first", "changed", "other", "memory, first", "memory, restore"], rows)
    for tool in run.tools:
        about = run.raw["tools"][tool]
        yield f"- {tool}: {about['version']}; {about['remark']}."
    yield ""


def _losses(run: Summary) -> Iterator[str]:
    """Every figure in which a peer is better than Holdfast."""
    kinds = {
        "wall_s": ("s", 1.0, ".2f", "time"),
        "cpu_s": ("CPU s", 1.0, ".1f", "CPU seconds"),
        "rss_peak_bytes": ("MB", 1e6, ".0f", "memory"),
        "apparent_bytes": ("MB", 1e6, ".0f", "space"),
    }
    found = []
    for kind, (unit, scale, form, name) in kinds.items():
        for step in run.raw["steps"]:
            own = run.figure(_OWN, step, kind)
            if own is None:
                continue
            better = [
                f"{tool} {other / scale:{form}}"
                for tool in run.tools
                if not tool.startswith(_OWN)
                and (other := run.figure(tool, step, kind)) is not None
                and other < own
            ]
            if better:
                found.append(f"- {name}, *{step}*: Holdfast {own / scale:{form}} {unit}; {', '.join(better)}")
    yield "## Where a peer wins"
    yield ""
    yield from found or ["Nowhere in this run."]
    yield ""


def _ceilings(run: Summary) -> Iterator[str]:
    images = list(run.raw["images"])
    raw = run.raw["ceilings"]
    yield "## Ceilings"
    yield ""
    yield "What the unavoidable parts alone take on all cores, in the same runs (`benchmarks/ceilings.py` says how):"
    yield ""
    rows = [
        [
            image,
            f"{raw['data_bytes'][at] / 1e6:.0f}",
            f"{raw['new_bytes'][at] / 1e6:.0f}",
            f"{raw['compressed_bytes'][at] / 1e6:.0f}",
            f"{raw['chunks'][at] / 1e3:.1f} k",
            f"{raw['new_chunks'][at] / 1e3:.1f} k",
            f"{raw['hash_cpu_s'][at]:.2f}",
            f"{raw['zstd_cpu_s'][at]:.2f}",
            f"{raw['ideal_s'][at]:.2f}",
            f"{raw['read_hash_s'][at]:.2f}",
        ]
        for at, image in enumerate(images)
    ]
    yield from _table(
        [
            "image", "data, MB", "new, MB", "compressed, MB", "chunks", "new chunks",
            "BLAKE3, CPU s", "zstd 1, CPU s", "both on all cores, s", "read and BLAKE3, s",
        ],
        rows,
    )  # fmt: skip
    ways = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in raw["decompress_write_s"].items())
    yield f"zstd decompression and writing of the restored image: {ways}."
    yield ""


def _index(scale: dict[str, Any], remarks: dict[str, str]) -> Iterator[str]:
    yield "## Large repositories"
    yield ""
    yield (
        f"A synthetic index, loaded in key order by `benchmarks/index_scale.py`; rates measured on top of it as backups "
        f"work; the backup is of {scale['new_bytes'] / 2**30:g} GiB of new random data. {_machine(scale)}."
    )
    yield ""
    names = {
        "records": ("chunks", 1e6, ".1f", " M"),
        "bytes_per_record": ("bytes per chunk", 1, ".0f", ""),
        "used_bytes": ("index, MB", 1e6, ".0f", ""),
        "open_s": ("open and first lookup, ms", 1e-3, ".1f", ""),
        "lookup_hit_per_s": ("lookups of present ids, k/s", 1e3, ".0f", ""),
        "lookup_miss_cold_per_s": ("lookups of absent ids, nothing cached, k/s", 1e3, ".1f", ""),
        "lookup_miss_per_s": ("lookups of absent ids, k/s", 1e3, ".0f", ""),
        "scan_per_s": ("scan, k rows/s", 1e3, ".0f", ""),
        "insert_per_s": ("insertion, k/s", 1e3, ".1f", ""),
        "backup_s": ("backup of new data, s", 1, ".2f", ""),
        "backup_into_empty_s": ("the same into an empty repository, s", 1, ".2f", ""),
        "backup_anon_bytes": ("its anonymous memory, MB", 1e6, ".0f", ""),
        "backup_rss_bytes": ("its resident memory with the mapped index, MB", 1e6, ".0f", ""),
        "load_s": ("loading by the tool, s", 1, ".0f", ""),
    }
    sizes = scale["sizes"]
    rows = [
        [title, *(f"{size[key] / unit:{form}}{ending}" for size in sizes)]
        for key, (title, unit, form, ending) in names.items()
        if all(key in size for size in sizes)
    ]
    yield from _table(rows[0], rows[1:])
    if "index" in remarks:
        yield remarks["index"]
        yield ""


def _change_map(found: dict[str, Any]) -> Iterator[str]:
    yield "## Incremental with a change map"
    yield ""
    yield (
        "A sparse disk of 1 TiB with 100 GiB of data, 64 blocks of it changed (`benchmarks/change_map.py`; the disk "
        "is computed, not stored; what was backed up is compared at the changed and at other places):"
    )
    yield ""
    yield from _table(
        ["backup, s (target < 2)", "whole process, s", "read, bytes", "stored, bytes", "peak memory, MB"],
        [
            [
                f"{found['backup_s']:.2f}",
                f"{found['process_s']:.2f}",
                f"{found['bytes_read']}",
                f"{found['bytes_stored']}",
                f"{found['rss_peak_bytes'] / 1e6:.0f}",
            ]
        ],
    )


def _beside(found: dict[str, Any], large: dict[str, Any]) -> Iterator[str]:
    alone = large["backup_alone_s"]
    ways = [("beside", "beside a collection"), ("beside_nice", "beside one with nice 10")]
    yield f"A backup of {found['new_bytes'] / 2**30:g} GiB of new random data into it (target: slowed by less than a third):"
    yield ""
    yield from _table(
        ["backup", "s", "slower by", "the collection, s"],
        [["alone", f"{alone:.2f}", "", ""]]
        + [
            [
                title,
                f"{large[way]['backup_s']:.2f}",
                f"{large[way]['backup_s'] / alone - 1:.0%}",
                f"{large[way]['collect_s']:.1f}",
            ]
            for way, title in ways
        ],
    )


def _collection(found: dict[str, Any], remarks: dict[str, str]) -> Iterator[str]:
    large, one = found["large"], found["one"]
    shape = large["shape"]
    yield "## Keeping"
    yield ""
    yield (
        f"A synthetic repository of {large['chunks'] / 1e6:.1f} million chunks and {large['all_points']} restore points: "
        f"{shape['vms']} VMs, {shape['changed'] / shape['segments']:.1%} of the segments of each differ from point to point "
        "(`benchmarks/collection.py`: real packs, nodes, manifests and index, chunks without payloads; what is left after "
        f"each collection is compared with what must be). {_machine(found)}."
    )
    yield ""

    def mb(value: float) -> str:
        return f"{value / 1e6:.0f}"

    plan, gc, explain = large["plan"], large["gc"], large["explain"]
    yield from _table(
        ["work", "s", "CPU s", "anonymous memory, MB", "with the mapped index, MB", "target"],
        [
            [
                f"plan a prune of {plan['points']} points",
                f"{plan['plan_s']:.2f}",
                f"{plan['cpu_s']:.2f}",
                mb(plan["anon_bytes"]),
                mb(plan["rss_bytes"]),
                "< 2 s",
            ],
            [
                f"gc after forgetting {gc['points']} points",
                f"{gc['collect_s']:.1f}",
                f"{gc['cpu_s']:.1f}",
                mb(gc["anon_bytes"]),
                mb(gc["rss_bytes"]),
                "< 60 s, < 512 MB",
            ],
            [
                "bytes that each point alone needs (`--explain`)",
                f"{explain['explain_s']:.1f}",
                f"{explain['cpu_s']:.1f}",
                mb(explain["anon_bytes"]),
                mb(explain["rss_bytes"]),
                "",
            ],
        ],
    )
    if "beside" in large:
        yield from _beside(found, large)
    percent = one["changed_bytes"]
    yield (
        f"Removing one of {one['shape']['points']} points of a disk of {one['shape']['segments'] / 64:g} GiB that differ by 1 % "
        f"({mb(percent)} MB stored, {mb(one['changed_plain_bytes'])} MB of the disk), nothing cached: forget {one['forget_s']:.2f} s, "
        f"gc {one['collect_s']:.1f} s; {mb(one['io']['read_bytes'])} MB read from the disk and "
        f"{mb(one['io']['write_bytes'])} MB written, for {mb(one['dropped_bytes'])} MB that are given back."
    )
    yield ""
    if "collection" in remarks:
        yield " ".join(remarks["collection"].split())
        yield ""


def plots(run: Summary, scale: dict[str, Any] | None, folder: Path) -> Iterator[str]:
    """Draws what the tables say into a folder; yields the lines that show the pictures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "holdfast"
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, title: str) -> str:
        plt.tight_layout()
        plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()
        return f"![{title}](images/{name}.svg)"

    steps = ("first", "changed", "other", "unchanged", "restore")
    tools = [tool for tool in run.tools if run.figure(tool, "restore") is not None]
    plt.figure(figsize=(9, 4))
    width = 0.8 / len(tools)
    for number, tool in enumerate(tools):
        values = [run.figure(tool, step) or 0.0 for step in steps]
        plt.bar([at + number * width for at in range(len(steps))], values, width, label=tool)
    plt.xticks([at + 0.4 - width / 2 for at in range(len(steps))], steps)
    plt.ylabel("seconds, sync included")
    plt.legend(fontsize=7)
    plt.grid(axis="y", alpha=0.3)
    yield save("bench-times", "Times of each step by tool")
    sized = [tool for tool in tools if run.figure(tool, "other", "apparent_bytes") is not None]
    if sized:
        plt.figure(figsize=(9, 3))
        bottoms = [0.0] * len(sized)
        for step in ("first", "changed", "other"):
            values = [(run.figure(tool, step, "apparent_bytes") or 0.0) / 1e6 for tool in sized]
            plt.barh(sized, [v - b for v, b in zip(values, bottoms, strict=True)], left=bottoms, label=step)
            bottoms = values
        plt.gca().invert_yaxis()
        plt.xlabel("MB in the repository")
        plt.legend(fontsize=7)
        yield save("bench-space", "Space after each image by tool")
    if scale and len(scale["sizes"]) > 1:
        plt.figure(figsize=(9, 3.5))
        records = [size["records"] for size in scale["sizes"]]
        for key, title in (
            ("lookup_hit_per_s", "lookup, present"),
            ("lookup_miss_per_s", "lookup, absent"),
            ("scan_per_s", "scan"),
            ("insert_per_s", "insertion"),
        ):
            plt.loglog(records, [size[key] for size in scale["sizes"]], "o-", label=title)
        plt.xlabel("chunks in the index")
        plt.ylabel("per second")
        plt.legend(fontsize=7)
        plt.grid(which="both", alpha=0.3)
        yield save("bench-index", "Rates of the index by its size")


def _widest(runs: Sequence[Summary]) -> Summary:
    """The run with most tools."""
    return max(runs, key=lambda run: (len(run.tools), run.runs))


def render(
    runs: Sequence[Summary],
    scale: dict[str, Any] | None,
    remarks: dict[str, str],
    pictures: Sequence[str] = (),
    change_map: dict[str, Any] | None = None,
    collection: dict[str, Any] | None = None,
    sections: Mapping[str, Sequence[dict[str, Any]]] | None = None,
) -> str:
    """The whole document.

    Args:
        runs: the one with most tools is shown side by side; targets are taken from the one with most rounds.
        pictures: lines that `plots` has given.
        sections: results by their key in `_SECTIONS`.
    """
    widest = _widest(runs)
    lines = [
        "# Benchmarks",
        "",
        "<!-- made by `make bench-report` from benchmarks/published and benchmarks/remarks.toml -->",
        "",
        "Every figure stands with its ceiling, and losses stand beside wins. `make bench` measures Holdfast on this",
        "machine, `make bench-peers` the other tools beside it, `make bench-report` writes this file.",
        "",
        "Rules: the same files for all; each step's input read into the page cache before its clock starts; a `sync`",
        "inside of every time; tools take turns step by step; zstd level 1 and no encryption where there is the choice;",
        "sparse files where a tool can make them; no cache that spares reading. Restored disks are compared byte for",
        "byte, repositories checked by their own tools, Holdfast's counts of bytes and chunks held against counts",
        "made in another way; a wrong outcome ends a run without a result.",
        "",
        *([remarks["run"], ""] if "run" in remarks else []),
        *_targets(runs, remarks),
        "## Side by side",
        "",
        *[line for picture in pictures[:2] for line in (picture, "")],
        *_side_by_side(widest),
        *_losses(widest),
        *([remarks["losses"], ""] if "losses" in remarks else []),
    ]
    for run in runs:
        if run is not widest:
            lines += [f"## {_sentence(run.raw['title'])}", "", *_side_by_side(run)]
    lines += _ceilings(max(runs, key=lambda run: run.runs))
    if scale:
        lines += [*_index(scale, remarks), *[line for picture in pictures[2:] for line in (picture, "")]]
    if change_map:
        lines += _change_map(change_map)
    if collection:
        lines += _collection(collection, remarks)
    for key, heading, section in _SECTIONS:
        found = (sections or {}).get(key)
        if found:
            lines += [f"## {heading}", "", f"{_machine(found[0])}.", "", *section(found)]
            lines += [" ".join(remarks[key].split()), ""] if key in remarks else []
    if "not-measured" in remarks:
        lines += ["## Not measured yet", "", remarks["not-measured"], ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--publish", nargs="+", default=[], metavar="NAME=RESULT.json")
    arguments = parser.parse_args()
    PUBLISHED.mkdir(exist_ok=True)
    for item in arguments.publish:
        name, _, path = item.partition("=")
        print(publish(Path(path), name))
    others: dict[str, dict[str, Any] | None] = dict.fromkeys(("index", "change_map", "collection"))
    sections: dict[str, list[dict[str, Any]]] = {key: [] for key, _, _ in _SECTIONS}
    runs = []
    for path in sorted(PUBLISHED.glob("*.json")):
        if path.stem in others:
            others[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        elif key := next((key for key in sections if path.stem.startswith(key)), None):
            sections[key].append(json.loads(path.read_text(encoding="utf-8")))
        else:
            runs.append(load(path))
    scale = others["index"]
    remarks = tomllib.loads(_REMARKS.read_text(encoding="utf-8"))
    target = _DOCS / "BENCHMARKS.md"
    pictures = list(plots(_widest(runs), scale, _DOCS / "images"))
    text = render(runs, scale, remarks, pictures, others["change_map"], others["collection"], sections)
    target.write_text(text, encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
