"""Names are safe, different for what differs, and lead back to what they were made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.fuse.names import distinct, original_name, safe_name, time_name

UUID_A, UUID_B = "564d8e21aaaa4c33b215f60d48ce719a", "564d8e21bbbb4c33b215f60d48ce719a"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("web1", "web1"),
        ("Web Server (2) - Köln", "Web Server (2) - Köln"),
        ("a/b", "a%2Fb"),
        ("100%", "100%25"),
        ("..", "%2E."),
        (".", "%2E"),
        (".hidden", "%2Ehidden"),
        ("-rf", "%2Drf"),
        ("bell\x07\n", "bell%07%0A"),
        ("end ", "end%20"),
        ("", "%"),
        ("web1~564d8e21", "web1%7E564d8e21"),
        ("web1~2", "web1~2"),
        ("\u202egnp.exe", "%E2%80%AEgnp.exe"),
    ],
)
def test_names_are_as_documented(text: str, name: str) -> None:
    assert safe_name(text) == name
    assert original_name(name) == text


@given(st.text(max_size=300))
def test_every_text_has_a_name_that_a_file_can_have(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name.encode()) <= 180
    assert "/" not in name
    assert name not in (".", "..", "latest~")
    assert name.isprintable()
    assert original_name(name) in (text, None)


@given(st.text(max_size=60), st.text(max_size=60))
def test_different_texts_have_different_names(a: str, b: str) -> None:
    assert (safe_name(a) == safe_name(b)) == (a == b)


def test_a_long_name_is_cut_within_a_character_s_borders_and_stays_its_own() -> None:
    first, second = "ü" * 400, "ü" * 401
    assert safe_name(first) != safe_name(second)
    assert safe_name(first).startswith("üü")
    assert len(safe_name(first).encode()) <= 180
    assert original_name(safe_name(first)) is None


def test_equal_names_get_as_much_of_their_key_as_they_need() -> None:
    assert distinct({UUID_A: "web", UUID_B: "db"}) == {UUID_A: "web", UUID_B: "db"}
    found = distinct({UUID_A: "web", UUID_B: "web"})
    assert found == {UUID_A: "web~564d8e21aaaa", UUID_B: "web~564d8e21bbbb"}


def test_a_time_is_a_name_without_colons() -> None:
    assert time_name(1_795_312_800) == "2026-11-22T02-00-00Z"
