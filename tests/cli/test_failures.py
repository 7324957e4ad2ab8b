"""What bad input gets: a clear sentence, the right exit code, a hint, and no harm. See also `test_restore`."""

from __future__ import annotations

import json
import os
import random
import string
from pathlib import Path

import pytest

from holdfast import errors
from holdfast.cli import failures
from holdfast.cli.invocation import Invocation, checked_address
from holdfast.repo.format import config as config_format


def test_a_path_that_is_no_repository(holdfast, tmp_path, vm) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for words in (["list"], ["backup", vm], ["restore", "a@latest", tmp_path / "x"], ["check"], ["stats"]):
        for place in ("none", "file", "folder"):
            outcome = holdfast("-r", tmp_path / place, *words)
            assert outcome.code == 10
            assert "hint: " in outcome.err
            assert outcome.out == ""
    assert os.listdir(tmp_path / "folder") == []


def test_no_repository_named(holdfast) -> None:
    outcome = holdfast("list")
    assert outcome.code == 2
    assert "HOLDFAST_REPOSITORY" in outcome.err


@pytest.mark.parametrize(
    "address", ["user@host:/srv/repo", "s3://bucket/x", "name:with:colons", "ssh://host"]
)
def test_addresses_that_could_mean_two_things_are_refused(holdfast, address: str) -> None:
    outcome = holdfast("list", "-r", address)
    assert outcome.code == 2
    assert address in outcome.err


def test_paths_with_colons_are_paths() -> None:
    for path in ("./host:22:/srv", "/a:b/c", "a/b:/c"):
        assert checked_address(path) == path


def with_checksum(value: dict[str, object]) -> bytes:
    value["checksum"] = config_format._checksum(value)  # type: ignore[arg-type]
    return json.dumps(value).encode()


def change_config(repo: Path, change) -> None:
    for name in ("config.json", "config.json.copy"):
        value = json.loads((repo / name).read_bytes())
        change(value)
        (repo / name).write_bytes(with_checksum(value))


def test_a_repository_of_a_newer_format(holdfast, repo, vm) -> None:
    def newer(value) -> None:
        value["version"]["read"] = 2

    change_config(repo, newer)
    for words in (["list"], ["backup", vm], ["check"]):
        outcome = holdfast("-r", repo, *words)
        assert outcome.code == 13
        assert "format version 2" in outcome.err
        assert "use a newer Holdfast" in outcome.err


def test_a_repository_with_an_unknown_feature(holdfast, repo) -> None:
    change_config(repo, lambda value: value["features"]["required"].append("time-travel"))
    outcome = holdfast("-r", repo, "list")
    assert outcome.code == 13
    assert "time-travel" in outcome.err


def test_a_damaged_configuration(holdfast, done, repo) -> None:
    (repo / "config.json").write_bytes(b"{}")
    outcome = holdfast("-r", repo, "list")
    assert outcome.code == 0
    assert "its copy was used" in outcome.err
    (repo / "config.json.copy").write_bytes(b"\xff\xfe")
    outcome = holdfast("-r", repo, "list")
    assert outcome.code == 22
    assert "hint" in outcome.err


def test_init_where_something_is(holdfast, repo, tmp_path) -> None:
    assert holdfast("init", "-r", repo).code == 15
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    assert holdfast("init", "-r", tmp_path / "used").code == 15
    assert holdfast("init", "-r", tmp_path / "used" / "file").code == 15
    assert os.listdir(tmp_path / "used") == ["file"]


@pytest.mark.parametrize(
    "options",
    [
        ("--chunk-size", "3"), ("--chunk-size", "huge"), ("--chunk-size", "1TiB"), ("--compression", "lz4"),
        ("--compression", "zstd:99"), ("--chunker", "magic"), ("--encryption", "rot13"),
    ],
)  # fmt: skip
def test_init_with_impossible_options(holdfast, tmp_path, options) -> None:
    outcome = holdfast("init", "-r", tmp_path / "r", *options)
    assert outcome.code == 2
    assert "hint: " in outcome.err
    assert not (tmp_path / "r").exists()


def test_sources_that_are_not_there_or_empty(holdfast, done, empty_repo, tmp_path) -> None:
    (tmp_path / "empty.raw").touch()
    (tmp_path / "empty-folder").mkdir()
    for source, code in (("none", 41), ("empty.raw", 46), ("empty-folder", 46), ("none/below", 41)):
        outcome = holdfast("backup", "-r", empty_repo, tmp_path / source)
        assert outcome.code == code, outcome.err
    assert holdfast("backup", "-r", empty_repo, "/dev/null").code == 45
    assert holdfast("backup", "-r", empty_repo, "a\0b").code == 41
    assert holdfast("backup", "-r", empty_repo, "").code == 41
    assert done("list", "-r", empty_repo).out == "no restore points yet\n"


def test_a_source_that_can_not_be_read(holdfast, execute, empty_repo, tmp_path, monkeypatch) -> None:
    (tmp_path / "secret.raw").write_bytes(b"x" * 10000)
    (tmp_path / "secret.raw").chmod(0)
    if os.access(tmp_path / "secret.raw", os.R_OK):
        pytest.skip("root may read everything")
    assert holdfast("backup", "-r", empty_repo, tmp_path / "secret.raw").code == 43


def test_a_descriptor_that_lies(holdfast, empty_repo, vm) -> None:
    (vm / "web1-flat.vmdk").unlink()
    outcome = holdfast("backup", "-r", empty_repo, vm)
    assert outcome.code == 44
    assert "web1-flat.vmdk" in outcome.err


def test_a_repository_is_not_backed_up_into_itself(holdfast, repo, tmp_path) -> None:
    for source in (repo, repo / "config.json", repo.parent):
        outcome = holdfast("backup", "-r", repo, source)
        assert outcome.code == 2
        assert "overlap" in outcome.err


@pytest.mark.parametrize(
    ("point", "code", "said"),
    [
        ("web1", 14, "web1@latest"),
        ("web2@latest", 14, "'web1'"),
        ("web1@latest~9", 14, "has 2 restore points"),
        ("web1@2020-01-01T00:00:00Z", 14, "the nearest one is of 2026-11-21T02:00:00Z"),
        ("web1@yesterday", 2, "web1@yesterday"),
        ("web1@2026-99-99", 2, "is not a time"),
        ("@latest", 2, "names no VM"),
        ("ffffffff", 14, "begins with"),
        ("", 14, "is no restore point"),
        ("../../etc/passwd", 14, "is no restore point"),
        ("\x1b[31mred", 14, "\\x1b[31mred"),
    ],
)
def test_points_that_are_absent(holdfast, repo, tmp_path, point: str, code: int, said: str) -> None:
    for words in (
        ["show", point],
        ["restore", point, tmp_path / "x"],
        ["diff", "web1@latest", point],
        ["check", point],
    ):
        outcome = holdfast("-r", repo, *words)
        assert outcome.code == code, outcome.err
        assert said.replace("web1@yesterday", "yesterday") in outcome.err
        assert outcome.out == ""
    assert not (tmp_path / "x").exists()


def test_a_point_that_is_ambiguous(holdfast, empty_repo, tmp_path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    same_time = ("--time", "2026-01-01T00:00:00Z")
    for _ in range(2):
        assert holdfast("backup", "-r", empty_repo, disk, *same_time).code == 0
    outcome = holdfast("show", "-r", empty_repo, "d@2026-01-01T00:00:00Z")
    assert outcome.code == 14
    assert "several restore points of that time" in outcome.err
    other = tmp_path / "e.raw"
    other.write_bytes(b"y" * 5000)
    assert holdfast("backup", "-r", empty_repo, disk, "--vm", "other").code == 0
    with_uuid = tmp_path / "vm"
    with_uuid.mkdir()
    (with_uuid / "a.vmx").write_text(
        'displayName = "d"\nuuid.bios = "56 4d 8e 21 7a 90 4c 33-b2 15 f6 0d 48 ce 71 9a"\n'
    )
    assert holdfast("backup", "-r", empty_repo, with_uuid).code == 0
    outcome = holdfast("show", "-r", empty_repo, "d@latest")
    assert outcome.code == 14
    assert "several VMs are named 'd'" in outcome.err
    assert "564d8e217a904c33b215f60d48ce719a" in outcome.err


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/cron.d/x", "/absolute", "..", ".", "a\nb", "tab\there", "\x1b[2J", "größe", "虚拟机", "🦊" * 20,
        "x" * 300, " ", "a@b", "a@latest", "-r", "'; rm -rf /", "e\u0301", "\u202eevil", "latest~1", "%s{}[bold]",
    ],
)  # fmt: skip
def test_odd_names_of_vms(holdfast, done, empty_repo, tmp_path, name: str) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    done("backup", "-r", empty_repo, disk, f"--vm={name}")
    listed = done("list", "-r", empty_repo)
    assert len(listed.out.splitlines()) == 2
    assert all(c.isprintable() for c in listed.out.replace("\n", ""))
    assert done("list", "-r", empty_repo, "--json").document["points"][0]["vm"] == name
    assert done("list", "-r", empty_repo, f"--vm={name}", "--json").document["points"]
    for words in (["show", f"{name}@latest"], ["diff", f"{name}@latest", f"{name}@latest"]):
        shown = (
            done("-r", empty_repo, *(["--"] if name.startswith("-") else []), *words)
            if not name.startswith("-")
            else done(words[0], "-r", empty_repo, "--", *words[1:])
        )
        assert all(c.isprintable() for c in shown.out.replace("\n", ""))
    place = tmp_path / "back"
    done("restore", "-r", empty_repo, "--", f"{name}@latest", place)
    assert place.read_bytes() == disk.read_bytes()


def test_names_that_can_not_be(holdfast, empty_repo, tmp_path) -> None:
    disk = tmp_path / "d.raw"
    disk.write_bytes(b"x" * 5000)
    for name in ("", "x" * 1025, "\udcff"):
        outcome = holdfast("backup", "-r", empty_repo, disk, "--vm", name)
        assert outcome.code == 2, name
    assert holdfast("backup", "-r", empty_repo, disk, disk, "--vm", "x").code == 2


def test_labels_and_times_that_can_not_be(holdfast, empty_repo, vm) -> None:
    for options in (
        ["--label", "x"], ["--label", "=x"], ["--label", "a=1", "--label", "a=2"], ["--label", "a=" + "x" * 70000],
        ["--label", "a=\udcff"], ["--time", "yesterday"], ["--time", ""], ["--time", "1960-01-01T00:00:00Z"],
        ["--workers", "0"], ["--workers", "many"],
    ):  # fmt: skip
        outcome = holdfast("backup", "-r", empty_repo, vm, *options)
        assert outcome.code == 2, options
        assert (
            "hint: " in outcome.err
            or "bytes" in outcome.err
            or "twice" in outcome.err
            or "UTF-8" in outcome.err
        )


def test_typing_errors(holdfast, repo) -> None:
    outcome = holdfast("lst", "-r", repo)
    assert (outcome.code, outcome.out) == (2, "")
    assert "did you mean 'list'?" in outcome.err
    outcome = holdfast("list", "--vmm", "x")
    assert outcome.code == 2
    assert outcome.err.startswith("holdfast: no such option")
    assert holdfast("restore", "x").code == 2
    assert holdfast("list", "too", "many").code == 2
    assert holdfast("key", "frobnicate").code == 2
    assert holdfast("key").code == 2


def test_errors_as_json(holdfast, repo, tmp_path) -> None:
    for words, code in (
        (["list", "-r", tmp_path / "none"], 10),
        (["list", "--nope"], 2),
        (["frobnicate"], 2),
        (["show", "-r", repo, "nope@latest"], 14),
        (["backup", "-r", repo, tmp_path / "none"], 41),
        (["backup", "-r", repo], 2),
        ([], 2),
        (["key"], 2),
    ):
        outcome = holdfast(*words, "--json")
        assert outcome.code == code
        assert outcome.error["code"] == code
        assert outcome.error["message"]
        assert outcome.out == ""
        assert len(outcome.err.splitlines()) == 1


def told(error: BaseException, capsys, *, json: bool = False, if_interrupted: str = "") -> tuple[int, str]:
    code = failures.report(error, Invocation(json=json, if_interrupted=if_interrupted))
    return code, capsys.readouterr().err


def test_what_is_said_of_exceptions_that_should_not_be(capsys, monkeypatch) -> None:
    code, text = told(ZeroDivisionError("division by zero"), capsys)
    assert code == 1
    assert text.startswith("holdfast: internal error: ZeroDivisionError: division by zero\n  hint: ")
    assert "report" in text
    assert "Traceback" not in text
    monkeypatch.setenv("HOLDFAST_DEBUG", "1")
    assert (
        "Traceback" in told(ZeroDivisionError(), capsys)[1]
        or "ZeroDivisionError" in told(ZeroDivisionError(), capsys)[1]
    )


def test_what_is_said_of_system_errors(capsys) -> None:
    assert told(OSError(28, "No space left on device", "/x"), capsys) == (
        31,
        (
            "holdfast: no space left while using /x (No space left on device)\n"
            "  hint: free some space there and run the command again; nothing listed was harmed\n"
        ),
    )
    assert told(MemoryError(), capsys)[0] == 1
    assert told(BrokenPipeError(), capsys) == (141, "")
    assert told(KeyboardInterrupt(), capsys, if_interrupted="all is well") == (
        130,
        "holdfast: interrupted\n  hint: all is well\n",
    )


def test_every_error_can_be_told(capsys) -> None:
    pending = [errors.HoldfastError]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        error = cls("what\nhappened\x1b[31m")
        code, text = told(error, capsys)
        assert code == cls.exit_code
        assert "what\\nhappened\\x1b[31m" in text
        code, text = told(error, capsys, json=True)
        assert json.loads(text)["message"].endswith("what\nhappened\x1b[31m")


def test_random_command_lines_never_break_it(holdfast, repo, tmp_path, monkeypatch, request) -> None:
    seed = int(os.environ.get("HOLDFAST_TEST_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    words = [
        "list", "show", "diff", "restore", "check", "stats", "key", "export", "web1@latest", "web1@latest~1", "--json",
        "--vm", "--disk", "--as", "raw", "-r", str(repo), "--", "-", "--overwrite", "--ranges", "-n", "x", "", "@", "..",
        "--password-file", "/dev/null", "--workers", "2", "--help",
    ]  # fmt: skip
    for _ in range(150):
        line = [rng.choice(words) for _ in range(rng.randrange(1, 7))]
        if rng.random() < 0.3:
            line.append("".join(rng.choice(string.printable) for _ in range(6)))
        outcome = holdfast("-r", str(repo), *line)
        assert outcome.code in errors.EXIT_CODES, line
        assert "internal error" not in outcome.err, line
