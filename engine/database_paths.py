"""Check and write the path of a DuckDB file. DuckDB does not take every path as the name of a file."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import UsageError

# DuckDB reads the part after "?" as options of a URL, and "\" as a separator of folders.
_UNSUPPORTED_CHARS = "?\\"


def find_unsupported_char(path: Path) -> str:
    """Return a character of the absolute path that DuckDB does not support. Otherwise return ""."""
    return next((char for char in str(path.absolute()) if char in _UNSUPPORTED_CHARS), "")


def require_supported_path(path: Path) -> None:
    """Raise UsageError if DuckDB does not support the path."""
    if char := find_unsupported_char(path):
        raise UsageError(
            f"the database cannot be at {path.absolute()}",
            f"DuckDB does not support the character {char} in the path of a file",
            "use another folder or file name, without this character",
        )


def to_database_path(path: Path) -> str:
    """Return the path as DuckDB must get it. Without the leading "./", it reads `md:x` and `:memory:` as names of databases."""
    return str(path) if path.is_absolute() else os.path.join(".", path)  # noqa: PTH118
