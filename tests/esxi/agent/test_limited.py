"""A key that is bound to the agent: the one program that it runs, and what that does in place of a shell."""

from __future__ import annotations

import errno
import json
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.errors import KeyLimited, LinkError, LinkTimeout, SourceError
from holdfast.esxi.agent import frames
from holdfast.esxi.agent.bundle import Level, pin_in, pinned_command, program, program_hash
from holdfast.esxi.agent.gate import MARKER, Gate
from holdfast.esxi.agent.naming import Refused
from holdfast.esxi.agent.tools import Tools
from holdfast.esxi.agent_console import AgentConsole
from holdfast.esxi.agent_link import AgentLink
from holdfast.ssh.keys import PublicKey

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def limited(pipes) -> Iterator[Callable[..., AgentConsole]]:
    """Consoles over an agent that is bound as a host's authorized_keys bind it."""
    made: list[AgentConsole] = []

    def make(level: Level = "backup", python: str = sys.executable) -> AgentConsole:
        made.append(
            AgentConsole(lambda: AgentLink.start(pipes(pinned_command(level, python))), pause=lambda _: None)
        )
        return made[-1]

    yield make
    for console in made:
        console.close()


def said(pipes: object, *sent: bytes, command: str = "") -> tuple[int, bytes]:
    """How the bound bootstrap ended, and what it said behind its first words."""
    far = pipes(command or pinned_command("backup", sys.executable))  # type: ignore[operator]
    for data in sent:
        far.write(data)
    far.end_input()
    out = b""
    while data := far.read(65536):
        out += data
    return far.process.wait(20), out.partition(frames.READY)[2].partition(b"\n")[2]


# What it runs


def test_the_line_fits_into_authorized_keys() -> None:
    command = pinned_command("in-place")
    line = PublicKey("ssh-rsa", "A" * 540, "holdfast esx1").line(command=command, restrict=True)
    assert len(line) < 2 * KIB
    assert "\n" not in line
    inside = re.fullmatch(r'restrict,command="((?:[^"\\]|\\.)*)" ssh-rsa A+ holdfast esx1', line)
    assert inside is not None
    assert inside[1].replace('\\"', '"') == command, "as sshd reads it"
    assert shlex.split(command)[:5] == ["exec", "python3", "-B", "-I", "-c"]


def test_it_says_on_which_level_it_runs_what(limited) -> None:
    link = limited("restore").link
    assert link.pin is not None
    assert (link.pin.level, link.pin.hash, link.pin.is_present) == ("restore", program_hash(), True)
    assert link.hello.level == "restore"


def test_every_python_here_runs_it(limited, each_python) -> None:
    assert limited("backup", each_python).act(("date", "-u", "+%s"), "asking").text.strip().isdecimal()


def packed(data: bytes) -> bytes:
    small = zlib.compress(data)
    return b"%d %d\n" % (len(small), zlib.crc32(small)) + small


def test_another_program_is_not_run(pipes) -> None:
    for other in (
        packed(b"print('run')"), program(), program(limited=True)[:-1] + b"!", packed(b""), b"", b"\n", b"-1 0\n",
        b"9" * 200 + b"\n", b"import os; os.system('echo run')\n", packed(b"#" * (4 * MIB)), packed(b"\0" * 64 + b"print('run')"),
    ):  # fmt: skip
        status, answer = said(pipes, other)
        assert status != 0
        assert answer == b"", other[:60]


def test_what_is_asked_for_in_place_of_the_command_does_not_matter(pipes) -> None:
    """sshd tells it in a variable, and the command does not look at it."""
    for asked in ("sh", "scp -t /", "$(touch /tmp/x); `id`", "internal-sftp"):
        command = f"SSH_ORIGINAL_COMMAND={shlex.quote(asked)}; export SSH_ORIGINAL_COMMAND; "
        status, answer = said(pipes, command=command + pinned_command("backup", sys.executable))
        assert (status, answer) == (1, b"")


def test_the_near_side_knows_that_the_host_runs_another_version(pipes) -> None:
    older = pinned_command("backup", sys.executable).replace(program_hash(), "0" * 64)
    with pytest.raises(KeyLimited, match="another version") as caught:
        AgentLink.start(pipes(older))
    assert "link the host again" in caught.value.hint
    pin = pin_in(f"3.8 backup {'0' * 64}")
    assert pin is not None
    assert not pin.is_present
    assert pin_in("3.8") is None


def test_a_key_with_a_shell_has_none_of_it(start) -> None:
    link, _ = start()
    assert (link.pin, link.hello.level) == (None, "")
    with pytest.raises(LinkError):
        list(link.ask(frames.COMMAND, b'{"words": ["df"], "timeout_s": 9, "together": false}'))


# What it does


def test_commands_run_and_are_refused(limited) -> None:
    console = limited()
    assert re.search("Linux", console.act(("uname", "-a"), "asking").text)
    with pytest.raises(KeyLimited, match="not among those") as caught:
        console.act(("sh", "-c", "id"), "asking")
    assert (caught.value.exit_code, "--restrict" in caught.value.hint) == (59, True)
    with pytest.raises(KeyLimited):
        console.read("/etc/passwd", 100)
    with pytest.raises(KeyLimited):
        console.listing("/etc")
    with pytest.raises(KeyLimited):
        console.exists("/etc/passwd")
    for write in (
        lambda: console.put("/tmp/x", b"x"),
        lambda: console.make_folder("/tmp/x", b""),
        lambda: console.complete("/tmp"),
    ):
        with pytest.raises(KeyLimited):
            write()
    for writable in (False, True):
        with pytest.raises(KeyLimited):
            console.link.open("/etc/passwd", writable=writable)
    assert console.act(("vmware", "-vl"), "asking").status == 127, "this is no host"
    with pytest.raises(LinkTimeout):
        console.act(("uname", "-a"), "asking", timeout_s=0.0)


def test_requests_that_make_no_sense_do_not_end_it(limited) -> None:
    link = limited("in-place").link
    for kind, payload in (
        (frames.COMMAND, b""), (frames.COMMAND, b"[]"), (frames.COMMAND, b'{"words": 1}'), (frames.READ, b"{}"),
        (frames.COMMAND, b'{"words": ["df"], "timeout_s": "x", "together": 0}'), (frames.MAKE, b'{"path": 1, "marker": 2}'),
        (frames.PUT, b""), (frames.PUT, b"\0" * 10), (frames.COMPLETE, b'{"path": null}'), (frames.READ, b"\xff"),
    ):  # fmt: skip
        with pytest.raises((SourceError, KeyLimited)):
            list(link.ask(kind, payload))
    assert list(link.ask(frames.HELLO, b"{}"))


def test_an_agent_that_is_gone_is_started_again(limited) -> None:
    console = limited()
    first = console.link
    first.close()
    assert console.act(("hostname",), "asking").text
    assert console.link is not first


def test_it_ends_when_its_input_does(pipes) -> None:
    far = pipes(pinned_command("backup", sys.executable))
    link = AgentLink.start(far)
    peak = Path(f"/proc/{far.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+)", peak)[1]) < 64 * KIB  # type: ignore[index]
    far.end_input()
    began = time.monotonic()
    assert far.process.wait(10) == 0
    assert time.monotonic() - began < 5
    link.close()


# Small files and folders, in this process


class Sent:
    """Answers that are not the last one."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, kind: int, request: int, payload: bytes) -> None:
        assert (kind, request) == (frames.DATA, 1)
        self.data += payload


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    (tmp_path / "ds" / "web1").mkdir(parents=True)
    (tmp_path / "ds" / "web1" / "web1.vmx").write_bytes(b"x" * 100_000)
    return tmp_path


def test_small_files_are_read_to_their_end_or_the_limit(volumes: Path) -> None:
    for limit, size in ((200_000, 100_000), (99_999, 100_000), (10, 11)):
        sent = Sent()
        tools = Tools(Gate("backup", str(volumes)), sent)
        wanted = json.dumps({"path": f"{volumes}/ds/web1/web1.vmx", "limit": limit}).encode()
        _, kind, last = tools.read(wanted, 1, bytearray())
        assert (kind, json.loads(last), len(sent.data)) == (frames.RESULT, {"size": size}, size)


def put(tools: Tools, path: str, data: bytes, offset: int = 0) -> None:
    name = path.encode()
    tools.verbs()[frames.PUT](frames.PUTS.pack(offset, len(name)) + name + data)


def test_a_folder_is_made_filled_and_completed(volumes: Path) -> None:
    tools = Tools(Gate("restore", str(volumes)), Sent())
    make, complete = tools.verbs()[frames.MAKE], tools.verbs()[frames.COMPLETE]
    new = volumes / "ds" / "new"
    asked = json.dumps({"path": str(new), "marker": "being restored"}).encode()
    make(asked)
    assert (new / MARKER).read_text() == "being restored"
    with pytest.raises(FileExistsError):
        make(asked)
    put(tools, f"{new}/vm.nvram", b"longer than the next one")
    put(tools, f"{new}/vm.nvram", b"abc")
    put(tools, f"{new}/vm.nvram", b"def", 3)
    assert (new / "vm.nvram").read_bytes() == b"abcdef"
    complete(json.dumps({"path": str(new)}).encode())
    assert [path.name for path in new.iterdir()] == ["vm.nvram"]
    with pytest.raises(Refused):
        put(tools, f"{new}/vm.nvram", b"more")
    with pytest.raises(Refused):
        complete(json.dumps({"path": str(new)}).encode())


def test_a_folder_that_can_not_be_marked_is_not_left(volumes: Path) -> None:
    class Full(Gate):
        def still(self, real: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", real)

    wanted = json.dumps({"path": f"{volumes}/ds/new", "marker": "x"}).encode()
    with pytest.raises(OSError, match="No space"):
        Tools(Full("restore", str(volumes)), Sent()).verbs()[frames.MAKE](wanted)
    assert not (volumes / "ds" / "new").exists()


def test_nothing_is_written_into_a_folder_that_was_completed_meanwhile(volumes: Path) -> None:
    """Another agent completes it between the question to the gate and the first byte."""
    new = volumes / "ds" / "new"

    class Late(Gate):
        def still(self, real: str) -> None:
            (new / MARKER).unlink()
            super().still(real)

    new.mkdir()
    (new / MARKER).touch()
    (new / "vm.vmx").write_bytes(b"good")
    with pytest.raises(Refused):
        put(Tools(Late("restore", str(volumes)), Sent()), f"{new}/vm.vmx", b"evil")
    assert (new / "vm.vmx").read_bytes() == b"good"
