"""Canonical JSON: one value, one sequence of bytes, and nothing else is accepted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DamagedData, HoldfastError
from holdfast.repo.format import canonical
from holdfast.repo.format.canonical import Fields, Json

Survives = Callable[[Callable[[], object], tuple[type[HoldfastError], ...]], bool]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=20,
)


@given(values)
def test_round_trip(value: Json) -> None:
    data = canonical.encode(value)
    assert canonical.decode(data) == value
    assert canonical.encode(canonical.decode(data)) == data
    assert json.loads(data) == value


@given(st.dictionaries(texts, st.integers(0, 9), min_size=2))
def test_members_are_sorted_like_their_bytes(value: dict[str, Json]) -> None:
    ordered = list(json.loads(canonical.encode(value)))
    assert ordered == sorted(value) == sorted(value, key=str.encode)


def test_frozen_bytes() -> None:
    value: Json = {
        "b": [1, -1, 0, 2**63 - 1, -(2**63)],
        "a": None,
        "Z": True,
        "é": "grün 🐘 \u2028 \x7f",
        "\ue000": {},
        "𐀀": [],
        'quote " back \\ slash /': "\b\f\n\r\t\x00\x1f",
    }
    assert (
        canonical.encode(value)
        == (
            '{"Z":true,"a":null,"b":[1,-1,0,9223372036854775807,-9223372036854775808],'
            '"quote \\" back \\\\ slash /":"\\b\\f\\n\\r\\t\\u0000\\u001f","é":"grün 🐘 \u2028 \x7f","\ue000":{},"𐀀":[]}'
        ).encode()
    )


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{", "nul", '{"a":1,}', "[1,]", "'a'", "{a:1}", "\ufeff{}",
        '{"a": 1}', ' {"a":1}', '{"a":1}\n', '{"a":1}\0', "[1, 2]",  # white space
        '{"b":1,"a":2}', '{"a":1,"a":1}', '{"a":1,"a":2}',  # order, twice
        "1.0", "1e3", "-0", "01", "+1", "1.", "NaN", "Infinity", "-Infinity", "0x1",
        "9223372036854775808", "-9223372036854775809", "1" * 5000,
        '"\\u0041"', '"\\/"', '"\\u00e9"', '"\\u001F"', '"\\u000a"', '"\\ud83d\\ude00"', '"\\x41"', '"\t"', '"\x00"',
        '"\\ud800"', '"\\udc00"',
        "[" * 100_000, "[" * 900 + "]" * 899, '{"a":' * 50_000,
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(DamagedData):
        canonical.decode(text.encode())


@pytest.mark.parametrize(
    "data", [b"\xff", b'"\xc3"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b'{"a":1}'.decode().encode("utf-16")]
)
def test_what_is_not_utf8_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedData):
        canonical.decode(data)


@given(st.binary(max_size=60) | texts.map(str.encode))
def test_fuzz(survives: Survives, data: bytes) -> None:
    if survives(lambda: canonical.decode(data), (DamagedData,)):
        assert canonical.encode(canonical.decode(data)) == data


@given(values, st.data())
def test_fuzz_of_valid_texts(survives: Survives, value: Json, data: st.DataObject) -> None:
    text = bytearray(canonical.encode(value))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.integers(0, 255))
    changed = bytes(text)
    if survives(lambda: canonical.decode(changed), (DamagedData,)):
        assert canonical.encode(canonical.decode(changed)) == changed


def test_a_long_hostile_text_takes_little_time() -> None:
    began = time.process_time()
    for text in (
        b"[" + b"[]," * 500_000 + b"[]]",
        b"[" * 1_000_000,
        b'"' + b"\\u0041" * 200_000 + b'"',
        b"1" * 1_000_000,
    ):
        try:
            canonical.decode(text)
        except DamagedData:
            continue
    assert time.process_time() - began < 5


# --- Fields

VALUE: Json = {
    "text": "t", "integer": 5, "flag": True, "hex": "00ff", "list": ["a", "b"], "mixed": ["a", 1],
    "object": {"x": 1}, "map": {"k": "v"}, "none": None, "upper": "00FF", "spaced": "00 ff", "odd": "abc",
}  # fmt: skip


def test_fields_reads_what_is_there() -> None:
    fields = Fields(VALUE, "it")
    assert fields.text("text") == "t"
    assert fields.integer("integer") == 5
    assert fields.flag("flag") is True
    assert fields.raw("hex", 2) == fields.hexadecimal("hex") == b"\x00\xff"
    assert fields.texts("list") == ("a", "b")
    assert fields.items("mixed") == ["a", 1]
    assert fields.object("object").integer("x") == 1
    assert fields.optional_object("none") is None
    inner = fields.optional_object("object")
    assert inner is not None
    assert inner.integer("x") == 1
    assert fields.text_map("map") == {"k": "v"}


@pytest.mark.parametrize(
    "read",
    [
        lambda f: f.text("absent"), lambda f: f.text("integer"), lambda f: f.text("none"),
        lambda f: f.integer("flag"), lambda f: f.integer("text"), lambda f: f.integer("integer", least=6),
        lambda f: f.integer("integer", most=4), lambda f: f.flag("integer"), lambda f: f.flag("none"),
        lambda f: f.raw("hex", 3), lambda f: f.raw("upper", 2), lambda f: f.raw("spaced", 2), lambda f: f.raw("text", 1),
        lambda f: f.hexadecimal("odd"), lambda f: f.hexadecimal("upper"), lambda f: f.hexadecimal("spaced"),
        lambda f: f.items("text"), lambda f: f.texts("mixed"), lambda f: f.texts("map"), lambda f: f.object("list"),
        lambda f: f.object("none"), lambda f: f.optional_object("text"), lambda f: f.text_map("object"),
        lambda f: f.text_map("list"), lambda f: f.object("object").text("x"),
    ],
)  # fmt: skip
def test_fields_names_what_is_wrong(read: Callable[[Fields], object]) -> None:
    with pytest.raises(DamagedData, match="it"):
        read(Fields(VALUE, "it"))


@pytest.mark.parametrize("value", [None, 1, "a", [], True])
def test_fields_needs_an_object(value: Json) -> None:
    with pytest.raises(DamagedData, match="is not an object"):
        Fields(value, "it")
