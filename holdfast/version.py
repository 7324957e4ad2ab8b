"""The version of this program. The version of the repository format is in `repo.format.config`."""

from typing import Final

__all__ = ["VERSION"]

VERSION: Final = "0.1.0"
