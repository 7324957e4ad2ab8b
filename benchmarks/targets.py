"""The targets that Holdfast has set itself, and how a run compares with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.guests import DAY_0, DAY_1
from benchmarks.summary import Summary

__all__ = ["Verdict", "verdicts"]

_HOLDFAST, _BORG, _BORG_64, _CASYNC = "holdfast", "borg fixed 1 MiB", "borg fixed 64 KiB", "casync"
_ENCRYPTED, _ONE_CORE = "holdfast aes256-gcm", "holdfast 1 core"
_MB = 1e6


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target against its figures.

    Args:
        key: for the remark that explains it.
        work: what was measured.
        value: Holdfast's figure, with its unit.
        against: the ceiling or the peer that it is held against, with its figure.
        ratio: of the two, as the target means it.
        target: the bound.
        met: None if the run lacks what it needs.
    """

    key: str
    work: str
    value: str
    against: str
    ratio: str
    target: str
    met: bool | None
    cpu: str = ""
    """CPU seconds of both, which a busy machine distorts less than times."""


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _at_most(
    key: str, work: str, value: float | None, against: str, other: float | None, bound: float
) -> Verdict:
    """A time that may be at most `bound` times another."""
    if value is None or other is None:
        return Verdict(key, work, "", against, "", f"≤ {bound:.2f}", None)
    ratio = value / other
    return Verdict(
        key,
        work,
        _seconds(value),
        f"{against}: {_seconds(other)}",
        f"{ratio:.2f}",
        f"≤ {bound:.2f}",
        ratio <= bound,
    )


def _share(
    key: str, work: str, value: float | None, against: str, ceiling: float | None, bound: float
) -> Verdict:
    """A time in which at least the share `bound` of the ceiling's speed must be reached."""
    if value is None or ceiling is None:
        return Verdict(key, work, "", against, "", f"≥ {bound:.0%}", None)
    share = ceiling / value
    return Verdict(
        key,
        work,
        _seconds(value),
        f"{against}: {_seconds(ceiling)}",
        f"{share:.0%}",
        f"≥ {bound:.0%}",
        share >= bound,
    )


def _cpu(run: Summary, verdict: Verdict, step: str, tool: str, other: float | None) -> Verdict:
    """The verdict with the CPU seconds of `tool`, and of what it is held against."""
    own = run.figure(tool, step, "cpu_s")
    if verdict.met is None or own is None or other is None:
        return verdict
    return replace(verdict, cpu=f"{own:.1f} / {other:.1f}")


def verdicts(run: Summary) -> Iterator[Verdict]:
    """All targets, in their order."""

    def time(step: str, tool: str = _HOLDFAST) -> float | None:
        return run.figure(tool, step)

    def against(tool: str, bound: float, key: str, step: str, work: str, own: str = _HOLDFAST) -> Verdict:
        title = "Borg" if tool == _BORG else "without"
        verdict = _at_most(key, work, time(step, own), title, time(step, tool), bound)
        return _cpu(run, verdict, step, own, run.figure(tool, step, "cpu_s"))

    yield against(_BORG, 0.60, "first-borg", "first", "first backup")
    computing = "zstd and BLAKE3 on all cores"
    ideal = run.ceiling("ideal_s", DAY_0)
    seconds = None if ideal is None else ideal * int(run.raw["machine"]["cores"])
    verdict = _at_most("first-ideal", "first backup", time("first"), computing, ideal, 1.20)
    yield _cpu(run, verdict, "first", _HOLDFAST, seconds)
    yield against(_BORG, 0.25, "changed-borg", "changed", "changed image, all read")
    yield _share(
        "unchanged",
        "unchanged image, all read",
        time("unchanged"),
        "reading and BLAKE3",
        run.ceiling("read_hash_s", DAY_1),
        0.70,
    )
    yield against(_BORG, 0.35, "restore-borg", "restore", "restore")
    yield _share(
        "restore", "restore", time("restore"), "zstd and writing", run.ceiling("decompress_write_s"), 0.70
    )
    for step in ("first", "changed", "unchanged", "restore"):
        work = f"{step}, encrypted (aes256-gcm)"
        yield against(_HOLDFAST, 1.15, f"encrypted-{step}", step, work, _ENCRYPTED)
    yield from _memory(run)
    yield from _space(run)


def _memory(run: Summary) -> Iterator[Verdict]:
    cores = int(run.raw["machine"]["cores"])
    steps = [step for step in run.raw["steps"] if run.figure(_HOLDFAST, step, "rss_peak_bytes")]
    peaks = {step: run.figure(_HOLDFAST, step, "rss_peak_bytes") or 0.0 for step in steps}
    work = f"resident memory on {cores} cores"
    if peaks:
        worst = max(peaks, key=lambda step: peaks[step])
        anonymous = run.figure(_HOLDFAST, worst, "anon_peak_bytes") or 0.0
        value = f"{peaks[worst] / _MB:.0f} MB ({worst}; {anonymous / _MB:.0f} MB of it anonymous)"
        # a bound for two cores: with more of them it grows as the next target allows
        bound = 300 + 64 * max(0, cores - 2)
        yield Verdict("memory", work, value, "", "", f"< {bound} MB", peaks[worst] < bound * _MB)
    all_cores = run.figure(_HOLDFAST, "first", "rss_peak_bytes")
    one_core = run.figure(_ONE_CORE, "first", "rss_peak_bytes")
    if all_cores is None or one_core is None or cores < 2:
        yield Verdict("memory-cores", "growth with each core", "", "", "", "≤ 64 MB", None)
        return
    growth = (all_cores - one_core) / (cores - 1)
    yield Verdict(
        "memory-cores",
        "growth with each core",
        f"{growth / _MB:.0f} MB",
        f"one core: {one_core / _MB:.0f} MB",
        "",
        "≤ 64 MB",
        growth <= 64 * _MB,
    )


def _space(run: Summary) -> Iterator[Verdict]:
    own = run.figure(_HOLDFAST, "other", "allocated_bytes")
    for key, name, tool, bound in (
        ("space-borg", "Borg, fixed 64 KiB", _BORG_64, 0.87),
        ("space-casync", "casync", _CASYNC, 1.0),
    ):
        other = run.figure(tool, "other", "allocated_bytes")
        if own is None or other is None:
            yield Verdict(key, "space after three images", "", name, "", f"≤ {bound:.2f}", None)
            continue
        ratio = own / other
        yield Verdict(
            key,
            "space after three images",
            f"{own / _MB:.0f} MB",
            f"{name}: {other / _MB:.0f} MB",
            f"{ratio:.3f}",
            f"≤ {bound:.2f}",
            ratio <= bound,
        )
