"""The contract of `Link` and `Channel`, held against a real server for every implementation."""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.errors import (
    FarCommandMissing,
    FarSideEnded,
    HostKeyChanged,
    HostKeyUnknown,
    HostUnreachable,
    LinkError,
    LinkLost,
    LinkTimeout,
    LoginRefused,
)
from holdfast.ssh.address import Address
from holdfast.ssh.link import KILLED, STDERR_TAIL_BYTES, Access, Channel, Link, Patience
from holdfast.ssh.openssh import OpenSshLink
from holdfast.ssh.paramiko_link import ParamikoLink
from holdfast.ssh.throttle import Throttle
from tests.ssh.sshd import Sshd, await_end, fingerprint, make_key, processes_with, public_part

MIB = 1 << 20
Opener = Callable[..., Link]
KINDS: dict[str, Opener] = {"openssh": OpenSshLink, "paramiko": ParamikoLink}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opener(kind: str) -> Opener:
    return KINDS[kind]


@pytest.fixture
def link(opener: Opener, sshd: Sshd) -> Iterator[Link]:
    with opener(sshd.address, sshd.access) as one:
        yield one


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def read_exactly(channel: Channel, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = channel.readinto(view)
        assert count > 0, "the stream ended early"
        view = view[count:]
    return bytes(data)


# --- running a command to its end -----------------------------------------------------------------


def test_output_and_status(link: Link) -> None:
    result = link.run("echo out; echo err >&2; exit 3")
    assert (result.status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


@pytest.mark.parametrize("status", [0, 1, 2, 126, 254, 255])
def test_every_status_is_the_commands_own(link: Link, status: int) -> None:
    assert link.run(f"exit {status}").status == status


@pytest.mark.parametrize("sentinel", [False, True])
def test_input_reaches_the_command(link: Link, sentinel: bool) -> None:
    data = noise(3 * MIB)
    result = link.run("cat; echo -n '|'; cat >&2", data, sentinel=sentinel)
    assert result.stdout == data + b"|"
    assert result.status == 0


def test_without_input_the_command_finds_its_end(link: Link) -> None:
    assert link.run("wc -c", timeout_s=20).stdout.strip() == b"0"


def test_a_command_need_not_read_its_input(link: Link) -> None:
    assert link.run("exec 0<&-; echo done", noise(8 * MIB), timeout_s=30).stdout == b"done\n"


def test_the_sentinel_tells_the_status(link: Link) -> None:
    for status in (0, 1, 3, 255):
        result = link.run(f"printf tail; exit {status}", sentinel=True)
        assert (result.status, result.stdout) == (status, b"tail")


def test_a_missing_sentinel_is_a_lost_answer(link: Link) -> None:
    with pytest.raises(LinkLost, match="not complete: oh"):
        link.run("echo partial; echo oh >&2; kill -9 $$", sentinel=True)


def test_the_sentinel_can_not_be_taken_from_the_output(link: Link) -> None:
    result = link.run("echo '@@0123456789abcdef rc=0'; exit 4", sentinel=True)
    assert result.status == 4
    assert result.stdout == b"@@0123456789abcdef rc=0\n"


def test_death_by_a_signal_is_neither_a_status_nor_a_lost_link(link: Link) -> None:
    assert link.run("echo before; kill -9 $$").status == KILLED


def test_what_runs_too_long_is_ended(link: Link) -> None:
    started_s = time.monotonic()
    with pytest.raises(LinkTimeout, match=r"did not end within 0\.5 s"):
        link.run("cat; sleep 60", timeout_s=0.5)
    assert time.monotonic() - started_s < 30
    assert link.run("echo next").stdout == b"next\n"


def test_too_long_an_answer_is_refused(link: Link) -> None:
    with pytest.raises(LinkError, match=r"more than 1\.00 MiB"):
        link.run("cat /dev/zero", limit_bytes=MIB, timeout_s=60)


def test_of_stderr_the_end_is_kept(link: Link) -> None:
    result = link.run("yes 0123456789 | head -c 300000 >&2; echo last >&2")
    assert len(result.stderr) == STDERR_TAIL_BYTES
    assert result.stderr.endswith(b"last\n")


def test_a_command_that_is_not_there(link: Link) -> None:
    result = link.run("holdfast-no-such-command --version")
    assert result.status == 127
    with pytest.raises(FarCommandMissing, match="while asking for the version"):
        result.checked("asking for the version")


def test_a_failed_command_says_what_it_said(link: Link) -> None:
    with pytest.raises(LinkError, match=r"ended with status 4 while trying: no \?\[31mway; out$") as caught:
        link.run("printf 'no \\033[31mway\\nout\\n' >&2; exit 4").checked("trying")
    assert type(caught.value) is LinkError
    assert link.run("true").checked("trying").status == 0


def test_words_of_a_command_arrive_as_they_are(link: Link) -> None:
    word = "a b'c\"d$HOME\\`id`\n%s *é"
    assert link.run(f"printf %s {shlex.quote(word)}").stdout.decode() == word


# --- talking to a command --------------------------------------------------------------------------


def test_sixty_four_mebibytes_each_way_at_once(link: Link) -> None:
    data = noise(MIB)
    sent, received = hashlib.sha256(), hashlib.sha256()
    with link.start("cat") as channel:

        def sending() -> None:
            for number in range(64):
                piece = number.to_bytes(8, "big") + data[8:]
                sent.update(piece)
                channel.write(piece)
            channel.close_write()

        thread = threading.Thread(target=sending)
        thread.start()
        buffer = memoryview(bytearray(200_000))
        while count := channel.readinto(buffer):
            received.update(buffer[:count])
        thread.join()
        assert channel.wait(20) == 0
        assert channel.sent_bytes == channel.received_bytes == 64 * MIB
    assert sent.digest() == received.digest()


def test_questions_and_answers(link: Link) -> None:
    with link.start('while read -r line; do echo "you said $line"; done; exit 9') as channel:
        for number in range(50):
            channel.write(b"%d\n" % number)
            assert read_exactly(channel, len(b"you said %d\n" % number)) == b"you said %d\n" % number
        channel.close_write()
        channel.close_write()
        assert channel.read(10) == b""
        assert channel.read(10) == b""
        assert channel.wait(20) == 9


def test_writing_to_a_command_that_has_ended(link: Link) -> None:
    with link.start("echo enough >&2; exit 5") as channel:
        with pytest.raises(FarSideEnded, match="status 5 while data was sent to it: enough"):
            for _ in range(64):
                channel.write(bytes(MIB))


def test_writing_behind_the_end(link: Link) -> None:
    with link.start("cat") as channel:
        channel.close_write()
        with pytest.raises(FarSideEnded):
            channel.write(b"x")


def test_waiting_has_a_limit(link: Link) -> None:
    with link.start("cat") as channel:
        with pytest.raises(LinkTimeout):
            channel.wait(0.05)


def test_killing_wakes_reader_and_writer(link: Link) -> None:
    with link.start("sleep 1000") as channel:
        errors: list[LinkError] = []

        def expect(work: Callable[[], object]) -> threading.Thread:
            def body() -> None:
                try:
                    work()
                except LinkError as error:
                    errors.append(error)

            thread = threading.Thread(target=body)
            thread.start()
            return thread

        threads = [expect(lambda: channel.read(10)), expect(lambda: channel.write(bytes(64 * MIB)))]
        channel.kill()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert [type(error) for error in errors] == [LinkLost, LinkLost]
        with pytest.raises(LinkLost):
            channel.wait(20)
        channel.kill()


def test_the_command_finds_its_input_at_the_end_when_the_channel_is_closed(
    link: Link, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    channel = link.start(f"echo up; cat; echo over > {fifo}")
    assert read_exactly(channel, 3) == b"up\n"
    channel.close()
    channel.close()
    assert fifo.read_bytes() == b"over\n"


def test_many_channels_at_once(link: Link) -> None:
    channels = [link.start(f"cat; exit {number}") for number in range(4)]
    for number, channel in enumerate(channels):
        channel.write(b"%d" % number)
        channel.close_write()
    for number, channel in enumerate(channels):
        assert channel.read(10) == b"%d" % number
        assert channel.wait(20) == number
        channel.close()


def test_closing_the_link_ends_its_channels(opener: Opener, sshd: Sshd) -> None:
    link = opener(sshd.address, sshd.access)
    channel = link.start("cat")
    link.close()
    link.close()
    with pytest.raises(LinkLost):
        channel.wait(20)


# --- what goes wrong -------------------------------------------------------------------------------


def test_a_drop_in_mid_stream_is_no_end(opener: Opener, own_sshd: Sshd) -> None:
    with opener(own_sshd.address, own_sshd.access) as link, link.start("cat /dev/zero") as channel:
        read_exactly(channel, 4 * MIB)
        assert own_sshd.drop() == 1
        with pytest.raises(LinkLost, match="broke off"):
            while channel.read(MIB):
                pass
        with pytest.raises(LinkLost):
            channel.wait(20)
        # a new try is a new connection
        with link.start("echo again") as second:
            assert second.read(100) == b"again\n"


def test_a_drop_while_writing(opener: Opener, own_sshd: Sshd) -> None:
    with opener(own_sshd.address, own_sshd.access) as link, link.start("cat > /dev/null") as channel:
        channel.write(bytes(MIB))
        own_sshd.drop()
        with pytest.raises(LinkLost):
            for _ in range(64):
                channel.write(bytes(MIB))


def test_a_drop_behind_the_last_byte_is_no_success(opener: Opener, own_sshd: Sshd) -> None:
    """All output is here, but the status is not: nobody may take it for done."""
    with (
        opener(own_sshd.address, own_sshd.access) as link,
        link.start("echo all; exec >&-; sleep 1000") as channel,
    ):
        assert read_exactly(channel, 4) == b"all\n"
        own_sshd.drop()
        with pytest.raises(LinkLost):
            channel.wait(20)


def test_a_host_that_falls_silent_is_given_up(opener: Opener, own_sshd: Sshd) -> None:
    patience = Patience(keep_alive_s=1, keep_alive_count=2)
    with opener(own_sshd.address, own_sshd.access, patience=patience) as link, link.start("cat") as channel:
        channel.write(b"hello")
        assert read_exactly(channel, 5) == b"hello"
        own_sshd.silence()
        started_s = time.monotonic()
        with pytest.raises(LinkLost):
            channel.read(10)
        assert time.monotonic() - started_s < 30


def test_an_unknown_host_is_refused_with_its_fingerprint(opener: Opener, sshd: Sshd, tmp_path: Path) -> None:
    for known in ("", f"[127.0.0.1]:{sshd.port + 1} {public_part(sshd.host_keys['rsa'])}\n"):
        (tmp_path / "known").write_text(known)
        with opener(sshd.address, Access(str(tmp_path / "known"), str(sshd.key))) as link:
            with pytest.raises(HostKeyUnknown) as caught:
                link.run("echo never")
        shown = {fingerprint(path) for path in sshd.host_keys.values()}
        assert any(one in caught.value.message for one in shown)
    assert (tmp_path / "known").read_text() == known  # nothing is learned by itself


def test_a_missing_file_of_known_hosts_knows_nobody(opener: Opener, sshd: Sshd, tmp_path: Path) -> None:
    with opener(sshd.address, Access(str(tmp_path / "none"), str(sshd.key))) as link:
        with pytest.raises(HostKeyUnknown):
            link.run("echo never")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("recorded", ["rsa", "ecdsa"])
def test_a_changed_host_key_is_refused(opener: Opener, sshd: Sshd, tmp_path: Path, recorded: str) -> None:
    """Of a kind that the host has, and of one that it has not."""
    other = make_key(tmp_path / "other", recorded)
    (tmp_path / "known").write_text(f"{sshd.address.known_as} {public_part(other)}\n")
    with opener(sshd.address, Access(str(tmp_path / "known"), str(sshd.key))) as link:
        with pytest.raises(HostKeyChanged) as caught:
            link.run("echo never")
    assert any(fingerprint(path) in caught.value.message for path in sshd.host_keys.values())


@pytest.mark.parametrize("recorded", ["ed25519", "rsa"])
def test_any_recorded_key_of_the_host_will_do(
    opener: Opener, sshd: Sshd, tmp_path: Path, recorded: str
) -> None:
    known = sshd.know(tmp_path / "known hosts 100%", recorded)
    with opener(sshd.address, Access(str(known), str(sshd.key))) as link:
        assert link.run("echo in").stdout == b"in\n"


def test_a_wrong_key_is_refused(opener: Opener, sshd: Sshd, tmp_path: Path) -> None:
    wrong = make_key(tmp_path / "wrong")
    with opener(sshd.address, Access(str(sshd.known_hosts), str(wrong))) as link:
        with pytest.raises(LoginRefused, match="publickey"):
            link.run("echo never")


def test_a_missing_key_is_refused(opener: Opener, sshd: Sshd, tmp_path: Path) -> None:
    with opener(sshd.address, Access(str(sshd.known_hosts), str(tmp_path / "none"))) as link:
        with pytest.raises(LoginRefused):
            link.run("echo never")


def test_nobody_listens(opener: Opener, own_sshd: Sshd) -> None:
    own_sshd.stop()
    with opener(own_sshd.address, own_sshd.access) as link:
        with pytest.raises(HostUnreachable, match="nobody listens"):
            link.run("echo never")


def test_an_unknown_name(opener: Opener, sshd: Sshd) -> None:
    with opener(Address("no-such-host.invalid", "root", 22), sshd.access) as link:
        with pytest.raises(HostUnreachable, match="name"):
            link.run("echo never")


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-1.5-old\r\n"])
def test_what_is_no_ssh_server(opener: Opener, sshd: Sshd, says: bytes) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answering() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(says)
                connection.recv(10_000)

        thread = threading.Thread(target=answering)
        thread.start()
        address = Address("127.0.0.1", "root", server.getsockname()[1])
        with opener(address, sshd.access, patience=Patience(connect_s=2)) as link:
            with pytest.raises(LinkError):
                link.run("echo never")
        thread.join(20)
        assert not thread.is_alive()


def test_a_host_that_never_greets(opener: Opener, sshd: Sshd) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", "root", server.getsockname()[1])
        with opener(address, sshd.access, patience=Patience(connect_s=1)) as link:
            started_s = time.monotonic()
            with pytest.raises(HostUnreachable):
                link.run("echo never")
            assert time.monotonic() - started_s < 15


# --- rates, re-keying, ESXi's methods, and the end of our process -----------------------------------


def test_the_rate_limit_is_kept(opener: Opener, sshd: Sshd) -> None:
    rate = 8 * MIB
    with opener(sshd.address, sshd.access, throttle=Throttle(rate)) as link:
        with link.start("cat > /dev/null; head -c 4194304 /dev/zero") as channel:
            started_s = time.monotonic()
            channel.write(bytes(4 * MIB))
            sent_s = time.monotonic() - started_s
            channel.close_write()
            started_s = time.monotonic()
            assert len(read_exactly(channel, 4 * MIB)) == 4 * MIB
            received_s = time.monotonic() - started_s
    assert 0.35 < sent_s < 1.5
    assert 0.35 < received_s < 1.5


@pytest.mark.slow
def test_rekeying_under_load(opener: Opener, tmp_path: Path) -> None:
    total = 256
    data = noise(MIB, seed=7)
    with (
        Sshd(tmp_path / "sshd", extra="RekeyLimit 16M") as server,
        opener(server.address, server.access) as link,
    ):
        with link.start("sha256sum") as channel:
            for _ in range(total):
                channel.write(data)
            channel.close_write()
            expected = hashlib.sha256()
            for _ in range(total):
                expected.update(data)
            assert channel.read(1000).split()[0].decode() == expected.hexdigest()
        with link.start(f"head -c {total * MIB} /dev/zero") as channel:
            received = hashlib.sha256()
            while piece := channel.read(MIB):
                received.update(piece)
            assert channel.received_bytes == total * MIB
            assert received.digest() == hashlib.sha256(bytes(total * MIB)).digest()


@pytest.mark.slow
def test_a_connection_outlives_much_traffic_and_many_ends(link: Link) -> None:
    """Paramiko by itself would ask for new keys after 512 MiB, and stall for 30 s if a command ends just then."""
    started_s = time.monotonic()
    for _ in range(10):
        with link.start("head -c 64M /dev/zero") as channel:
            while channel.read(MIB):
                pass
            assert channel.wait(20) == 0
            assert channel.received_bytes == 64 * MIB
    assert time.monotonic() - started_s < 29


def test_with_the_methods_of_esxi(opener: Opener, esxi_sshd: Sshd) -> None:
    rsa = esxi_sshd.folder / "id_rsa"
    if not rsa.exists():
        make_key(rsa, "rsa")
        with esxi_sshd.authorized_keys.open("a") as file:
            file.write(public_part(rsa) + "\n")
    data = noise(4 * MIB)
    with opener(esxi_sshd.address, Access(str(esxi_sshd.known_hosts), str(rsa))) as link:
        assert link.run("cat", data).stdout == data


CHILD = """
import sys, importlib
from holdfast.ssh.address import parse_address
from holdfast.ssh.link import Access
module, name, address, known_hosts, key, mark = sys.argv[1:]
opener = getattr(importlib.import_module(module), name)
channel = opener(parse_address(address), Access(known_hosts, key)).start("echo up; cat; : " + mark)
channel.read(3)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_nothing_of_ours_is_left_when_our_process_ends(
    opener: Opener, sshd: Sshd, tmp_path: Path, number: int | None
) -> None:
    mark = f"mark-{random.SystemRandom().getrandbits(64):x}"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, opener.__module__, opener.__qualname__, str(sshd.address),
         sshd.access.known_hosts, sshd.access.key, mark],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    pids = processes_with(mark)
    assert pids
    if number is None:
        child.stdin.close()  # a normal end, without closing the channel
    else:
        child.send_signal(number)
    child.wait(20)
    child.stdout.close()
    child.stdin.close()
    assert await_end(pids) == []


def test_a_server_that_allows_one_command_at_a_time(tmp_path: Path) -> None:
    with Sshd(tmp_path / "sshd", extra="MaxSessions 1") as server:
        with ParamikoLink(server.address, server.access) as link:
            for number in range(40):  # the server may not have noticed the end of the last one yet
                assert link.run(f"echo {number}").stdout == f"{number}\n".encode()
            with link.start("cat"):
                with pytest.raises(LinkError) as refused:
                    link.start("true")
                assert "MaxSessions" in (refused.value.hint or "")
            assert link.run("echo on").stdout == b"on\n"


def test_no_client_is_left_behind_by_these_tests(opener: Opener, own_sshd: Sshd) -> None:
    with opener(own_sshd.address, own_sshd.access) as link:
        for _ in range(3):
            link.run("true")
        channel = link.start("cat")
        connections = own_sshd.connections()
        assert connections
        channel.kill()
    assert await_end(connections) == []
    assert processes_with(f" -p {own_sshd.port} ") == []
