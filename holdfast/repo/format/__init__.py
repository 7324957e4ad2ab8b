"""The bytes of format v1, as in FORMAT.md. Pure: bytes in, frozen values out."""
