"""The one-time key exchange: with passwords as hosts ask for them, and what it leaves where."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.errors import HostKeyChanged, HostKeyUnknown, LinkError, LoginRefused
from holdfast.ssh.authorized import admit, knows_restrict, withdraw
from holdfast.ssh.exchange import exchange_keys, fetch_host_key
from holdfast.ssh.keys import PublicKey, make_key, public_key
from holdfast.ssh.known_hosts import HostKey, KnownHosts
from holdfast.ssh.link import Access, Link
from holdfast.ssh.openssh import OpenSshLink
from holdfast.ssh.paramiko_link import ParamikoLink
from tests.ssh.password_server import PASSWORD, PasswordServer
from tests.ssh.sshd import Sshd, fingerprint, public_part
from tests.ssh.sshd import make_key as make_foreign_key


@pytest.fixture(params=["keyboard-interactive", "password"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PasswordServer]:
    with PasswordServer(tmp_path / "far home", methods=request.param) as one:
        yield one


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(str(tmp_path / "config" / "known_hosts"), str(tmp_path / "config" / "keys" / "nas"))


def yes(_key: HostKey) -> bool:
    return True


def never(*_: object) -> bool:
    raise AssertionError("nobody was to be asked")


def typed(*answers: str) -> Callable[[str, bool], str]:
    rest = list(answers)

    def answer(question: str, shown: bool) -> str:
        assert "assword" in question
        assert not shown
        return rest.pop(0)

    return answer


def test_afterwards_both_sides_know_each_other(server: PasswordServer, access: Access) -> None:
    shown: list[HostKey] = []

    def confirm(key: HostKey) -> bool:
        shown.append(key)
        assert server.users == []  # nothing was told to a host that is not confirmed
        return True

    done = exchange_keys(
        server.address, access, confirm=confirm, answer=typed(PASSWORD), comment="holdfast@here"
    )
    assert done.changed
    assert shown == [done.host]
    assert done.host.fingerprint == f"SHA256:{server.host_key.fingerprint.removeprefix('SHA256:')}"
    assert KnownHosts(access.known_hosts).keys(server.address.known_as) == [done.host]
    assert stat.S_IMODE(os.stat(access.key).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(access.key)).st_mode) == 0o700
    assert server.authorized_keys.read_text() == f"{done.ours.kind} {done.ours.encoded} holdfast@here\n"
    assert stat.S_IMODE(server.authorized_keys.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.authorized_keys.parent.stat().st_mode) == 0o700
    assert server.passwords == [PASSWORD]
    with ParamikoLink(server.address, access) as link:
        assert link.run("echo in").stdout == b"in\n"
    # a second time there is nothing to do, and nothing to ask
    again = exchange_keys(server.address, access, confirm=never, answer=never)
    assert not again.changed
    assert again.ours.encoded == done.ours.encoded


def test_a_host_that_is_not_confirmed_gets_nothing(server: PasswordServer, access: Access) -> None:
    with pytest.raises(HostKeyUnknown, match="SHA256:"):
        exchange_keys(server.address, access, confirm=lambda _: False, answer=never)
    assert server.users == []
    assert not os.path.exists(access.known_hosts)
    assert not os.path.exists(access.key)


def test_a_changed_host_is_not_even_offered_for_confirmation(
    server: PasswordServer, access: Access, tmp_path: Path
) -> None:
    other = make_foreign_key(tmp_path / "other")
    os.makedirs(os.path.dirname(access.known_hosts))
    Path(access.known_hosts).write_text(f"{server.address.known_as} {public_part(other)}\n")
    with pytest.raises(HostKeyChanged):
        exchange_keys(server.address, access, confirm=never, answer=never)
    assert server.users == []


def test_a_wrong_password_is_asked_for_again(server: PasswordServer, access: Access) -> None:
    done = exchange_keys(server.address, access, confirm=yes, answer=typed("wrong", "", PASSWORD))
    assert done.changed
    assert server.passwords == ["wrong", "", PASSWORD]


def test_three_wrong_passwords_are_enough(server: PasswordServer, access: Access) -> None:
    with pytest.raises(LoginRefused, match="password"):
        exchange_keys(server.address, access, confirm=yes, answer=typed("a", "b", "c", "d"))
    assert server.passwords == ["a", "b", "c"]
    assert not server.authorized_keys.exists()


def test_a_key_that_is_not_accepted_is_taken_out_again(tmp_path: Path, access: Access) -> None:
    with PasswordServer(tmp_path / "home", accepts_keys=False) as server:
        server.authorized_keys.parent.mkdir()
        server.authorized_keys.write_text("ssh-rsa AAAAB3 somebody\n")
        with pytest.raises(LoginRefused, match="taken out again"):
            exchange_keys(server.address, access, confirm=yes, answer=typed(PASSWORD))
        assert server.authorized_keys.read_text() == "ssh-rsa AAAAB3 somebody\n"


def test_a_restricted_key_runs_its_command_and_no_other(server: PasswordServer, access: Access) -> None:
    command = "echo \"served '$HOME'\""
    exchange_keys(server.address, access, confirm=yes, answer=typed(PASSWORD), restrict=True, command=command)
    assert server.authorized_keys.read_text().startswith('restrict,command="echo \\"served')
    with ParamikoLink(server.address, access) as link:
        assert link.run("echo mine").stdout == f"served '{server.home}'\n".encode()


def test_a_host_that_can_not_do_what_the_key_is_for_is_not_changed(
    server: PasswordServer, access: Access
) -> None:
    def prove(link: Link) -> None:
        assert link.run("echo by password").stdout == b"by password\n"
        raise LinkError("it can not")

    with pytest.raises(LinkError, match="it can not"):
        exchange_keys(server.address, access, confirm=yes, answer=typed(PASSWORD), restrict=True, prove=prove)
    assert not server.authorized_keys.exists()


def test_a_key_that_can_do_more_than_it_should_is_taken_out_again(
    server: PasswordServer, access: Access
) -> None:
    def attest() -> None:
        assert "restrict" in server.authorized_keys.read_text()
        raise LinkError("it can do more")

    with pytest.raises(LinkError, match="it can do more"):
        exchange_keys(
            server.address, access, confirm=yes, answer=typed(PASSWORD), restrict=True, attest=attest
        )
    assert server.authorized_keys.read_text() == ""


def test_what_a_key_may_do_is_changed_by_the_password(server: PasswordServer, access: Access) -> None:
    exchange_keys(
        server.address, access, confirm=yes, answer=typed(PASSWORD), restrict=True, command="echo old"
    )
    exchange_keys(server.address, access, confirm=never, answer=typed(PASSWORD), renew=True)
    with ParamikoLink(server.address, access) as link:
        assert link.run("echo mine").stdout == b"mine\n"
    assert len(server.authorized_keys.read_text().splitlines()) == 1


def test_servers_that_do_not_know_restrict_are_told_at_length() -> None:
    for server, known in (
        ("SSH-2.0-OpenSSH_9.2p1 Debian-2", True), ("SSH-2.0-OpenSSH_7.2", True), ("SSH-2.0-OpenSSH_10.0", True),
        ("SSH-2.0-OpenSSH_7.1p2", False), ("SSH-2.0-OpenSSH_5.6", False), ("SSH-2.0-other", True),
    ):  # fmt: skip
        assert knows_restrict(server) is known, server
    line = KEY.line(command="serve", restrict=True, spelled_out=True)
    assert line.startswith(
        "no-agent-forwarding,no-port-forwarding,no-pty,no-user-rc,no-X11-forwarding,command="
    )


# --- the file over there ---------------------------------------------------------------------------

KEY = PublicKey("ssh-rsa", "AAAAB3NzaC1yc2EAAAADAQABAAABgQ+/x=", "holdfast@here")
OTHERS = '# people\nssh-rsa AAAAB3other alice\n\nfrom="10.0.0.*",command="echo \\"hi\\"" ssh-ed25519 AAAAC3 b\'o`b$x\n'


@pytest.fixture
def link(sshd: Sshd) -> Iterator[OpenSshLink]:
    with OpenSshLink(sshd.address, sshd.access) as one:
        yield one


def test_other_lines_stay_as_they_are(link: OpenSshLink, tmp_path: Path) -> None:
    place = tmp_path / 'it\'s a "place"' / "authorized_keys"
    place.parent.mkdir()
    place.write_text(OTHERS)
    place.chmod(0o640)
    assert admit(link, KEY, str(place))
    assert place.read_text() == OTHERS + KEY.line() + "\n"
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    assert not admit(link, KEY, str(place))
    assert admit(link, KEY, str(place), command="serve", restrict=True)
    assert place.read_text() == OTHERS + KEY.line(command="serve", restrict=True) + "\n"
    assert withdraw(link, KEY, str(place))
    assert place.read_text() == OTHERS
    assert not withdraw(link, KEY, str(place))
    assert os.listdir(place.parent) == [place.name]


def test_a_last_line_without_an_end_is_not_glued_to_ours(link: OpenSshLink, tmp_path: Path) -> None:
    place = tmp_path / "keys"
    place.write_text("ssh-rsa AAAAB3other alice")
    admit(link, KEY, str(place))
    assert place.read_text().splitlines() == ["ssh-rsa AAAAB3other alice", KEY.line()]


def test_a_missing_folder_is_made_for_its_owner_only(link: OpenSshLink, tmp_path: Path) -> None:
    place = tmp_path / "new" / "deep" / "keys"
    assert not withdraw(link, KEY, str(place))
    assert not place.parent.exists()
    assert admit(link, KEY, str(place))
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_a_link_is_followed(link: OpenSshLink, tmp_path: Path) -> None:
    (tmp_path / "real").write_text(OTHERS)
    (tmp_path / "keys").symlink_to("real")
    admit(link, KEY, str(tmp_path / "keys"))
    assert (tmp_path / "keys").is_symlink()
    assert (tmp_path / "real").read_text() == OTHERS + KEY.line() + "\n"


def test_what_is_no_file_is_left_alone(link: OpenSshLink) -> None:
    for place in ("/dev/full", "/tmp"):
        with pytest.raises(LinkError, match="not a file"):
            admit(link, KEY, place)


@pytest.mark.root
def test_a_full_disk_leaves_the_old_file(link: OpenSshLink, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        place = tmp_path / "keys"
        place.write_text(OTHERS * 30)
        with (tmp_path / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(LinkError, match=r"disk full|No space"):
            admit(link, KEY, str(place))
        assert place.read_text() == OTHERS * 30
        assert sorted(os.listdir(tmp_path)) == ["filler", "keys"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_shell_that_does_not_run_our_script_is_noticed(own_sshd: Sshd) -> None:
    text = own_sshd.authorized_keys.read_text()
    own_sshd.authorized_keys.write_text('command="echo welcome" ' + text)
    with OpenSshLink(own_sshd.address, own_sshd.access) as link:
        with pytest.raises(LinkError, match="said: welcome"):
            admit(link, KEY, str(own_sshd.authorized_keys))


def test_line_ends_can_not_be_smuggled_in() -> None:
    from holdfast.errors import UsageError

    for command, comment in (("a\nssh-rsa AAAA evil", ""), ("", "x\nssh-rsa AAAA evil")):
        with pytest.raises(UsageError):
            PublicKey("ssh-rsa", "AAAA", comment).line(command=command)


def test_an_rsa_key_of_ours_opens_an_esxi_like_host(esxi_sshd: Sshd, tmp_path: Path) -> None:
    ours = make_key(str(tmp_path / "key"), "holdfast")
    assert fingerprint(tmp_path / "key") == HostKey(ours.kind, base64.b64decode(ours.encoded)).fingerprint
    access = Access(esxi_sshd.access.known_hosts, str(tmp_path / "key"))
    with OpenSshLink(esxi_sshd.address, esxi_sshd.access) as link:
        admit(link, ours, str(esxi_sshd.authorized_keys), restrict=True)
        for opener in (OpenSshLink, ParamikoLink):
            with opener(esxi_sshd.address, access) as mine:
                assert mine.run("echo in").stdout == b"in\n"
        assert withdraw(link, ours, str(esxi_sshd.authorized_keys))
    with OpenSshLink(esxi_sshd.address, access) as mine:
        with pytest.raises(LoginRefused):
            mine.run("echo in")


# --- keys and known hosts here ---------------------------------------------------------------------


def test_a_key_is_made_once(tmp_path: Path) -> None:
    first = make_key(str(tmp_path / "key"), "one")
    assert make_key(str(tmp_path / "key"), "two").encoded == first.encoded
    assert (tmp_path / "key.pub").read_text() == first.line() + "\n"


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    make_key(str(tmp_path / "key"), "")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(LoginRefused, match="read by others"):
        public_key(str(tmp_path / "key"))


@pytest.mark.parametrize(
    "content",
    [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"],
)
def test_what_is_no_key(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(LoginRefused):
        make_key(str(tmp_path / "key"), "")
    assert (tmp_path / "key").read_bytes() == content


def test_the_host_key_is_what_the_host_has(sshd: Sshd, tmp_path: Path) -> None:
    key = fetch_host_key(sshd.address, KnownHosts(str(tmp_path / "none")))
    assert key.fingerprint == fingerprint(sshd.host_keys["ed25519"])
    key = fetch_host_key(sshd.address, KnownHosts(str(sshd.know(tmp_path / "rsa", "rsa"))))
    assert key.fingerprint == fingerprint(sshd.host_keys["rsa"])


def test_known_hosts_keep_the_lines_of_others(sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    foreign = b"# mine\n\n@cert-authority *.example ssh-rsa AAAA\n*.example ssh-rsa AAAA x\n\xff\xfe odd\n"
    path.write_bytes(foreign)
    known = KnownHosts(str(path))
    key = fetch_host_key(sshd.address, known)
    known.record(sshd.address, key)
    known.record(sshd.address, key)
    assert path.read_bytes().startswith(foreign)
    assert known.keys(sshd.address.known_as) == [key]
    with OpenSshLink(sshd.address, Access(str(path), str(sshd.key))) as link:
        assert link.run("echo in").stdout == b"in\n"
    assert known.forget(sshd.address) == 1
    assert path.read_bytes() == foreign
    assert known.forget(sshd.address) == 0


def test_hashed_names_and_revoked_keys(sshd: Sshd, tmp_path: Path) -> None:
    path = sshd.know(tmp_path / "known_hosts")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", path], check=True, capture_output=True)
    assert b"127.0.0.1" not in path.read_bytes()
    known = KnownHosts(str(path))
    key = fetch_host_key(sshd.address, known)
    known.judge(sshd.address, key)
    with path.open("a") as file:
        for one in sshd.host_keys.values():
            file.write(f"@revoked {sshd.address.known_as} {public_part(one)}\n")
    with pytest.raises(HostKeyChanged):
        known.judge(sshd.address, HostKey(*_parts(sshd.host_keys["ed25519"])))
    with OpenSshLink(sshd.address, Access(str(path), str(sshd.key))) as link:
        with pytest.raises(HostKeyChanged):
            link.run("echo never")


def _parts(path: Path) -> tuple[str, bytes]:
    kind, encoded = public_part(path).split()
    return kind, base64.b64decode(encoded)
