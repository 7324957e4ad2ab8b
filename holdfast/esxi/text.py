"""The bytes of VMware's text files (descriptors, VMX) as text, and back to the same bytes.

Both kinds name their encoding in a line of their own: `encoding="windows-1252"`, in a VMX
`.encoding = "UTF-8"`. A file that names none, or one that is unknown, is read as UTF-8.

Invariant: `encode(decode(data)) == data` wherever `data` is valid in the encoding that it names.
Where it is not, each byte is read as one character, so that reading never fails; file names with
such characters are then not found, and reported. Only encodings from the list below are looked up:
Python knows others that do more than mapping characters.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["decode", "encode"]

_DECLARED: Final = re.compile(
    r"^[ \t]*\.?encoding[ \t]*=[ \t]*\"?([A-Za-z0-9_.:-]{1,40})\"?[ \t]*\r?$",
    re.ASCII | re.IGNORECASE | re.MULTILINE,
)
_KNOWN: Final = frozenset(
    {
        "ascii", "us-ascii", "utf-8", "utf8",
        "big5", "gb2312", "gbk", "gb18030", "shift_jis", "windows-31j", "euc-jp", "euc-kr",
        *(f"windows-{page}" for page in range(1250, 1259)),
        *(f"iso-8859-{part}" for part in range(1, 17) if part != 12),
    }
)  # fmt: skip


def _codec(text: str) -> str:
    match = _DECLARED.search(text)
    name = match[1].lower() if match else "utf-8"
    return name if name in _KNOWN else "utf-8"


def decode(data: bytes) -> str:
    """The text of `data`, in the encoding that it names. A byte order mark stays in the text."""
    plain = data.decode("latin-1")
    try:
        return data.decode(_codec(plain))
    except UnicodeDecodeError:
        return plain


def encode(text: str) -> bytes:
    """The bytes of `text`, in the encoding that it names, or in UTF-8 if that can not express it.

    Raises:
        UnicodeEncodeError: the text has surrogates, which no encoding expresses.
    """
    try:
        return text.encode(_codec(text))
    except UnicodeEncodeError:
        return text.encode()
