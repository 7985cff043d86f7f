"""Create a folder for a run of the user: settings, a commented constitution and a few prompts."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import UsageError

_TEMPLATES = Path(__file__).parent / "project"
_PLACEHOLDER = "{name}"


def create_project_folder(folder: Path) -> list[Path]:
    """Write the files into a new or empty folder. Return their paths. Raise UsageError if the folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = f"{folder} is not empty" if folder.is_dir() else f"{folder} is not a folder"
        raise UsageError(what, "this command never overwrites files", "give the name of a new folder: charter init NAME")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for template in sorted(_TEMPLATES.iterdir()):
        path = folder / template.name
        path.write_text(
            template.read_text(encoding="utf-8").replace(_PLACEHOLDER, _make_constitution_name(folder)), encoding="utf-8"
        )
        written.append(path)
    return written


def _make_constitution_name(folder: Path) -> str:
    """Return the name of the folder in the form of a constitution's name: small letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "my-constitution"
