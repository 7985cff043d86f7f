"""Check that `import engine` and the like find Charter's packages, and not a folder or a file of the user.

Charter consists of several packages with ordinary names. Python searches the folder of a script or notebook first. A folder
`engine/` or a file `schemas.py` there would be imported instead, with confusing errors or none at all.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("schemas", "constitutions", "engine", "producers", "consumers", "trainer")


def require_own_packages() -> None:
    """Raise ImportError if one of the packages would be imported from outside of this installation."""
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = _find_location(name)
        if found is not None and found != root / name:
            loaded = " and is already imported" if name in sys.modules else ""
            raise ImportError(
                f"{found} hides the package `{name}` of Charter in {root}\n"
                f"Python finds it first{loaded}, because its folder is before Charter's in sys.path\n"
                f"rename {found}, or start Python in another folder",
                name=name,
                path=str(found),
            )


def _find_location(name: str) -> Path | None:
    """Return the folder of the package or the file of the module that `import name` gives, without importing it."""
    module = sys.modules.get(name)
    if module is not None:
        file, folders = getattr(module, "__file__", None), getattr(module, "__path__", ())
    else:
        spec = find_spec(name)
        if spec is None:
            return None
        file, folders = spec.origin if spec.has_location else None, spec.submodule_search_locations or ()
    if file is None:  # a folder without an __init__.py
        file = next((str(Path(folder) / "__init__.py") for folder in folders), None)
    if file is None:
        return None
    path = Path(file).resolve()
    return path.parent if path.stem == "__init__" else path
