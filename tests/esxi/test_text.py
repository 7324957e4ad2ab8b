from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.esxi.text import decode, encode


@pytest.mark.parametrize(
    ("declared", "codec"),
    [
        ("UTF-8", "utf-8"),
        ("windows-1252", "cp1252"),
        ("GBK", "gbk"),
        ("Shift_JIS", "shift_jis"),
        ("utf-7", "utf-8"),
    ],
)
def test_the_declared_encoding_is_used_both_ways(declared: str, codec: str) -> None:
    name = {"gbk": "虚拟机", "shift_jis": "サーバ"}.get(codec, "Bücher")
    data = f'# x\r\nencoding="{declared}"\r\nname="{name}"\r\n'.encode(codec)
    assert name in decode(data)
    assert encode(decode(data)) == data


def test_no_codec_that_does_more_than_map_characters_is_looked_up() -> None:
    data = b'.encoding = "unicode_escape"\nx = "\\u0041"\n'
    assert "\\u0041" in decode(data)


def test_bytes_that_are_not_in_the_declared_encoding_are_still_read() -> None:
    assert decode(b'encoding="UTF-8"\nx="\xff\xfe"') == 'encoding="UTF-8"\nx="ÿþ"'


@given(st.text())
def test_utf8_text_comes_back(text: str) -> None:
    assert encode(decode(text.encode())) == text.encode() or "encoding" in text.lower()


@given(st.binary())
def test_decode_never_fails(data: bytes) -> None:
    decode(b'encoding="gbk"\n' + data)
