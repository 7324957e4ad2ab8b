"""The commands that a key which is limited to the agent may run, and those that only look like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.esxi.agent.allowed import Allowed, snapshots_in
from holdfast.esxi.agent.gate import MARKER, SNAPSHOT_NOTE, Gate
from holdfast.esxi.agent.naming import Refused

OURS = "holdfast-0123456789ab"
TREE = f"""\
Get Snapshot:
|-ROOT
--Snapshot Name        : before the update
--Snapshot Id        : 1
--Snapshot Desciption  : three lines
|-CHILD
--Snapshot Name        : {OURS}
--Snapshot Id        : 1
--Snapshot Created On  : 10/4/2026 19:0:52
--|-CHILD
----Snapshot Name        : {OURS}
----Snapshot Id        : 2
----Snapshot Desciption  : {SNAPSHOT_NOTE}
"""
QUESTION = """\
Virtual machine message 27:
msg.uuid.altered:This virtual machine might have been moved or copied.
   1. Cancel
   2. I Moved It
   3. I Copied It [default]
Select choice.  Press enter for default <3>.
"""


class Host:
    """A host that prints the same whenever it is asked."""

    def __init__(self, volumes: Path, text: str = "", status: int = 0, level: str = "restore") -> None:
        self.volumes = volumes
        self.asked: list[list[str]] = []
        self._answer = (status, text)
        self.allowed = Allowed(Gate(level, str(volumes)), self._ask)

    def _ask(self, words: list[str]) -> tuple[int, str]:
        self.asked.append(words)
        return self._answer

    def may(self, *words: object) -> bool:
        """Whether the command runs as it is."""
        try:
            return self.allowed.instead(list(words)) is None
        except Refused:
            return False


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    for name in ("new", "web1"):
        (tmp_path / "ds" / name).mkdir(parents=True)
    (tmp_path / "ds" / "new" / MARKER).touch()
    (tmp_path / "ds" / "web1" / "web1.vmx").touch()
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "vmware -vl", "uname -a", "date -u +%s", "df", "hostname", "esxcli vm process list", "vim-cmd vmsvc/getallvms",
        "esxcli --formatter=csv storage filesystem list", "vim-cmd vmsvc/get.config 12", "vim-cmd vmsvc/snapshot.get 12",
        "vim-cmd vmsvc/power.off 12", "vim-cmd vmsvc/message 12", "vim-cmd vimsvc/task_info haTask-12-vim.VirtualMachine.x-1",
        "vim-cmd vmsvc/snapshot.create", "vim-cmd solo/registervm",
    ],
)  # fmt: skip
def test_what_holdfast_runs_may_run(volumes: Path, line: str) -> None:
    host = Host(volumes, level="backup")
    assert host.may(*line.split())
    assert host.asked == []


@pytest.mark.parametrize(
    "words",
    [
        [], ["sh"], ["sh", "-c", "id"], ["/bin/sh"], ["df", "-h"], ["vmware"], ["date", "-s", "0"], ["date", "-u", "+%s; id"],
        ["vim-cmd"], ["vim-cmd", "vmsvc/destroy", "12"], ["vim-cmd", "vmsvc/unregister", "12"],
        ["vim-cmd", "vmsvc/power.reset", "12"], ["vim-cmd", "vmsvc/power.off"], ["vim-cmd", "vmsvc/power.off", "12", "13"],
        ["vim-cmd", "vmsvc/get.config", "-1"], ["vim-cmd", "vmsvc/get.config", "12\n13"], ["vim-cmd", "vmsvc/get.config", "12;id"],
        ["vim-cmd", "vmsvc/get.configx", "12"], ["vim-cmd", "vmsvc/get.config", "$(id)"], ["vim-cmd", "hostsvc/enable_ssh"],
        ["vim-cmd", "vmsvc/getallvms", "-H", "other"], ["vim-cmd", "-U", "root", "vmsvc/getallvms"], ["vim-cmd", "vmsvc/get.config", 12],
        ["vim-cmd", "vimsvc/task_info", "-x"], ["vim-cmd", "vimsvc/task_info", "x y"], ["vim-cmd", "vmsvc/get.config", "1" * 10],
        ["esxcli", "system", "shutdown", "reboot"], ["esxcli", "vm", "process", "kill"], ["ls", "-la", "/etc"], ["cat", "/etc/shadow"],
        ["ls", "-la", "/bin", "/etc"], ["vmware", "-vl\0"], ["uname", ""], ["df"] * 11, ["x" * 5000], "df", None, {"df": 1},
        ["vim-cmd", "solo/registervm", "-h"], ["python3", "-c", "1"], ["vim-cmd", "vmsvc/get.config", "\u0661\u0662"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", ["backup", "in-place"])
def test_nothing_else_may(volumes: Path, words: object, level: str) -> None:
    with pytest.raises(Refused):
        Host(volumes, level=level).allowed.instead(words)


# Snapshots


@pytest.mark.parametrize(
    ("name", "note", "made"),
    [
        (OURS, SNAPSHOT_NOTE, True), ("nightly", SNAPSHOT_NOTE, False), (f"{OURS}0", SNAPSHOT_NOTE, False),
        (f"-{OURS}", SNAPSHOT_NOTE, False), (OURS, "\n--Snapshot Id : 7", False), (OURS.upper(), SNAPSHOT_NOTE, False),
    ],
)  # fmt: skip
def test_snapshots_are_made_by_our_names_only(volumes: Path, name: str, note: str, made: bool) -> None:
    assert Host(volumes).may("vim-cmd", "vmsvc/snapshot.create", "12", name, note, "0", "1") is made


def test_a_snapshot_is_removed_if_the_host_says_that_it_is_ours(volumes: Path) -> None:
    host = Host(volumes, TREE, level="backup")
    assert host.may("vim-cmd", "vmsvc/snapshot.remove", "12", "2")
    assert host.asked == [["vim-cmd", "vmsvc/snapshot.get", "12"]]
    assert not host.may("vim-cmd", "vmsvc/snapshot.remove", "12", "1"), (
        "two have that id, and one is not ours"
    )
    assert not host.may("vim-cmd", "vmsvc/snapshot.remove", "12", "2", "1"), "with its children"
    gone = host.allowed.instead(["vim-cmd", "vmsvc/snapshot.remove", "12", "9"])
    assert gone is not None and gone[0] == 1 and "no snapshot with the id 9" in gone[1]  # noqa: PT018
    foreign = Host(volumes, TREE.replace(OURS, "manual"))
    with pytest.raises(Refused, match="'manual' is none of Holdfast's"):
        foreign.allowed.instead(["vim-cmd", "vmsvc/snapshot.remove", "12", "2"])


def test_a_host_that_does_not_answer_has_nothing_removed(volumes: Path) -> None:
    for verb in (("vmsvc/snapshot.remove", "12", "2"), ("vmsvc/snapshot.removeall", "12")):
        for status, text in ((0, ""), (1, "Failed to login: "), (0, "(vim.fault.NotFound) {\n}")):
            instead = Host(volumes, text, status).allowed.instead(["vim-cmd", *verb])
            assert instead == (1, text)


def test_a_note_does_not_make_a_snapshot_ours() -> None:
    """A description runs over several lines, and says what lines of other snapshots say."""
    text = f"""\
Get Snapshot:
|-ROOT
--Snapshot Name        : monthly
--Snapshot Id        : 7
--Snapshot Desciption  : first
--Snapshot Name        : {OURS}
--Snapshot Id        : 7
----Snapshot Name        : {OURS}
----Snapshot Id        : 8
"""
    assert snapshots_in(text) == [("7", "monthly")]
    imitated = f"{text}--|-CHILD\n----Snapshot Name : {OURS}\n----Snapshot Id : 7\n"
    assert [name for number, name in snapshots_in(imitated) if number == "7"] == ["monthly", OURS]


def test_everything_is_removed_only_where_there_is_nothing(volumes: Path) -> None:
    words = ("vim-cmd", "vmsvc/snapshot.removeall", "12")
    assert Host(volumes, "Get Snapshot:\n").may(*words)
    assert not Host(volumes, TREE).may(*words)
    assert not Host(volumes, "Get Snapshot:\n|-ROOT\n").may(*words)


# The host's question


def test_only_the_question_about_moving_is_answered(volumes: Path) -> None:
    host = Host(volumes, QUESTION)
    answer = ("vim-cmd", "vmsvc/message", "12", "27")
    assert host.may(*answer, "2")
    assert host.may(*answer, "3")
    for words in (
        (*answer, "1"),
        (*answer, "4"),
        ("vim-cmd", "vmsvc/message", "12", "28", "2"),
        (*answer, "-2"),
    ):
        assert not host.may(*words), words
    other = Host(volumes, QUESTION.replace("uuid.altered", "disk.full"))
    assert not other.may(*answer, "2")
    assert not Host(volumes, "No message.\n").may(*answer, "2")


# Disks and folders


def test_disks_are_made_checked_and_removed_in_marked_folders(volumes: Path) -> None:
    host, new, old = Host(volumes), f"{volumes}/ds/new/vm.vmdk", f"{volumes}/ds/web1/web1.vmdk"
    forms = (
        ("-c", "1048576", "-d", "thin", "-a", "lsilogic"), ("-U",), ("-e",), ("-x", "check"),
    )  # fmt: skip
    for form in forms:
        assert host.may("vmkfstools", *form, new), form
        assert not host.may("vmkfstools", *form, old), form
        assert not host.may("vmkfstools", *form, f"{volumes}/ds/new/../web1/web1.vmdk"), form
        assert not host.may("vmkfstools", *form, "-U"), form
        assert not Host(volumes, level="backup").may("vmkfstools", *form, new), form


@pytest.mark.parametrize(
    "form",
    [
        "-i {old} {new}", "-E {new} {old}", "-x repair {new}", "-c 1g -d thin -a lsilogic {new}", "-c -1 -d thin -a lsilogic {new}",
        "-c 1048576 -d rdm:/vmfs/devices/disks/x -a lsilogic {new}", "-r /vmfs/devices/disks/x {new}", "-D {new}", "-q {new}",
        "-c 1048576 -d thin -a x {new}", "-c 1048576 {new}", "-K {new}", "-U {new} {new}", "-C vmfs6 {new}",
    ],
)  # fmt: skip
def test_the_tool_for_disks_does_nothing_else(volumes: Path, form: str) -> None:
    words = form.format(new=f"{volumes}/ds/new/vm.vmdk", old=f"{volumes}/ds/web1/web1.vmdk").split()
    assert not Host(volumes, level="in-place").may("vmkfstools", *words)


def test_only_what_the_gate_lets_through_is_registered_or_listed(volumes: Path) -> None:
    host = Host(volumes)
    for words in (
        (f"{volumes}/ds/web1/web1.vmx",),
        (f"{volumes}/ds/web1/web1.vmx", "name"),
        ("/etc/passwd", "-x"),
    ):
        assert not host.may("vim-cmd", "solo/registervm", *words)
    assert host.may("ls", "-la", f"{volumes}/ds/web1")
    assert not host.may("ls", "-la", f"{volumes}/ds")
