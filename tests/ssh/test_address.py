"""Addresses: what is another host, what is a path here, and what is refused because it could be either."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.ssh.address import Address, Place, parse_address, parse_place


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.5", Address("10.0.0.5")),
        ("root@10.0.0.5:22", Address("10.0.0.5", "root", 22)),
        ("nas", Address("nas")),
        ("nas:2222", Address("nas", "", 2222)),
        ("user@host", Address("host", "user")),
        ("user@corp.example@host", Address("host", "user@corp.example")),
        ("CORP\\user@host", Address("host", "CORP\\user")),
        ("[::1]:22", Address("::1", "", 22)),
        ("[::1]", Address("::1")),
        ("root@[fe80::1%eth0]:22", Address("fe80::1%eth0", "root", 22)),
        ("ssh://root@esx1.example:2222", Address("esx1.example", "root", 2222)),
        ("ssh://nas/", Address("nas")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "@", "@host", "root@", ":22", "host:", "host:0", "host:65536", "host:22x", "host:-1", "host:²",
        "::1", "fe80::1:22", "[::1", "[::1]22", "[host]:22", "[::1%e th]:22",
        "-oProxyCommand=x", "root@-oProxyCommand=x", "-l@host", "ho st", "host;id", "$(id)", "host\n", "us'er@host",
        "ssh://", "ssh://host/path", "http://host", "sftp://host", "host/path", "user\\@host",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://nas/backup/repo", Place(Address("nas"), "/backup/repo")),
        ("ssh://me@nas:2222/backup", Place(Address("nas", "me", 2222), "/backup")),
        ("ssh://[fd00::5]:22/b", Place(Address("fd00::5", "", 22), "/b")),
        ("ssh://nas/a:b/c d%20", Place(Address("nas"), "/a:b/c d%20")),
        ("nas:22:/backup", Place(Address("nas", "", 22), "/backup")),
        ("me@nas:22:/", Place(Address("nas", "me", 22), "/")),
        ("[::1]:22:/backup", Place(Address("::1", "", 22), "/backup")),
        ("me@[::1]:22:/backup", Place(Address("::1", "me", 22), "/backup")),
    ],
)
def test_places_on_other_hosts(text: str, expected: Place) -> None:
    assert parse_place(text) == expected
    if expected.path != "/":
        assert parse_place(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/backup",
        "backup",
        "./nas:22:/backup",
        "../x",
        "/nas:22:/backup",
        "~/x",
        "a/b:c",
        "",
        "user@host",
        ".",
        "a b",
    ],
)
def test_paths_here(text: str) -> None:
    assert parse_place(text) is None


@pytest.mark.parametrize(
    "text",
    ["nas:/backup", "nas:backup", "me@nas:/backup", "nas:22", "nas:22:backup", "nas:x:/b", "[::1]:/b", "::1:/b",
     "ssh://nas", "ssh://nas/", "ssh:///backup", "ssh://nas//", "s3://bucket/x", "file:///x", "-x:22:/b",
     "ssh://nas/a\nb", "nas:99999:/b", "nas::/b", ":22:/b"],
)  # fmt: skip
def test_what_could_be_meant_either_way_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_place(text)


def test_names_in_known_hosts() -> None:
    assert Address("NAS").known_as == "nas"
    assert Address("nas", "me", 22).known_as == "nas"
    assert Address("::1", "", 2222).known_as == "[::1]:2222"


@given(st.text(alphabet="ab@:/[]%.-~ 12s\\\n", max_size=24))
def test_nothing_passes_that_a_command_line_could_misread(text: str) -> None:
    try:
        place = parse_place(text)
    except UsageError:
        return
    if place is None:
        assert ":" not in text.partition("/")[0]
        return
    for word in (place.address.host, place.address.user):
        assert not word.startswith("-")
        assert not set(word) & set(" \n'\"$;&|<>`()/")
    assert place.path.startswith("/")
    assert 0 <= place.address.port < 65536
