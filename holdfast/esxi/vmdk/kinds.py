"""What a `.vmdk` file is, by its first bytes.

A flat extent's content is the guest's, who could write the beginning of a descriptor or of a sparse
header there. So a text that is longer than a descriptor is data, and whoever asks leaves out the
files that a descriptor names as its extents.
"""

from __future__ import annotations

from typing import Literal

from holdfast.disk import SECTOR_BYTES, BlockSource
from holdfast.esxi.vmdk.cowd import COWD_MAGIC
from holdfast.esxi.vmdk.descriptor import MAX_DESCRIPTOR_BYTES, looks_like_descriptor
from holdfast.esxi.vmdk.sesparse import SESPARSE_MAGIC
from holdfast.esxi.vmdk.sparse import SPARSE_MAGIC

__all__ = ["VmdkKind", "kind_of"]

VmdkKind = Literal["descriptor", "sparse", "sparse extent", "redo log", "data"]
"""`sparse` holds a descriptor, `sparse extent` does not; `data` may be a flat extent or anything else."""


def kind_of(file: BlockSource) -> VmdkKind:
    """What the file is by its content.

    A flat extent's content is the guest's, who could write the beginning of a descriptor there: a
    text of more than a descriptor's size is data.

    Raises:
        SourceError: it can not be read.
    """
    head = bytearray(min(file.size_bytes, SECTOR_BYTES))
    file.read_into(0, memoryview(head))
    if head.startswith(SPARSE_MAGIC):
        return "sparse" if _has_descriptor(file, bytes(head)) else "sparse extent"
    if head.startswith((COWD_MAGIC, SESPARSE_MAGIC)):
        return "redo log"
    if looks_like_descriptor(bytes(head)) and file.size_bytes <= MAX_DESCRIPTOR_BYTES:
        return "descriptor"
    return "data"


def _has_descriptor(file: BlockSource, head: bytes) -> bool:
    """Whether a sparse extent has a descriptor inside. The parts of a split disk have none, or an empty one.

    A header that makes no sense counts as that of a whole disk, so that opening it says what is wrong.
    """
    if len(head) < SECTOR_BYTES:
        return True
    offset = int.from_bytes(head[28:36], "little") * SECTOR_BYTES
    if not 0 < offset < file.size_bytes:
        return offset > 0
    text = bytearray(min(SECTOR_BYTES, file.size_bytes - offset))
    file.read_into(offset, memoryview(text))
    return any(text)
