"""File systems of guests: which there are on the disks of a restore point, and what is in them.

    disks -> volumes.find_volumes -> Volume.open() -> Node (the root) -> children(), pieces()

`port` has the words that all share, `volumes` finds what there is, and `ext`, `xfs`, `ntfs` and `fat` each join one
file system to the library that knows it (dissect, an optional extra; docs/FILES.md says why that one). Nothing
outside of this package imports the library, and none of its exceptions leaves it.

Everything read here was written by a guest, which may be hostile: see `port.contained`.
"""
