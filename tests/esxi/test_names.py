from __future__ import annotations

import pytest

from holdfast.esxi.names import fault_of, free_name, parents_of, printable, stem_of


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/.",
        "a/",
        "a\0b",
        "x" * 256,
        "a/" * 2100 + "a",
        "\udc80",
    ],
)
def test_unsafe_paths_have_a_fault(path: str) -> None:
    assert fault_of(path)


@pytest.mark.parametrize("path", ["a", "a/b", "...", "..a", "ä/€", "x" * 255, "a b\nc", "a\\b"])
def test_safe_paths_have_none(path: str) -> None:
    assert fault_of(path) == ""


def test_printable_is_one_line_of_valid_unicode() -> None:
    shown = printable("a\nb\x1b[31m\udc80\u202eü")
    assert shown.isprintable()
    shown.encode()
    assert "ü" in shown
    assert len(printable("x" * 10_000)) <= 300


def test_parents_and_stems() -> None:
    assert parents_of("a/b/c") == ["a", "a/b"]
    assert parents_of("a") == []
    assert stem_of("d.x/web1.vmdk") == "d.x/web1"
    assert stem_of("sdb") == "sdb"


def test_free_names_are_numbered_short_and_can_be_quoted() -> None:
    assert free_name("d/web1", "-flat.vmdk", ()) == "d/web1-flat.vmdk"
    assert free_name("web1", "-flat.vmdk", {"web1-flat.vmdk", "web1-flat-2.vmdk"}) == "web1-flat-3.vmdk"
    assert free_name('we"b\n1', "-flat.vmdk", ()) == "we_b_1-flat.vmdk"
    long_name = free_name("ü" * 200, "-flat.vmdk", ())
    assert len(long_name.encode()) <= 255
    assert long_name.endswith("ü-flat.vmdk")
