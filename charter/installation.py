"""Return the command that installs the optional packages of Charter. It depends on how Charter itself is installed."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit


def get_install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, such as "train", and corrects the versions of all packages."""
    if not is_installed():
        return f"pip install -e '{Path(__file__).resolve().parent.parent}[{extra}]'"
    if checkout := _find_checkout():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'charter[{extra}]'"  # pip finds the installed Charter and adds only what is missing


def is_installed() -> bool:
    """Return whether Charter is an installed package. A checkout on PYTHONPATH is not one."""
    try:
        metadata.distribution("charter")
    except metadata.PackageNotFoundError:
        return False
    return True


def _find_checkout() -> str:
    """Return the folder of an editable installation. Return "" for any other installation, such as one from a wheel."""
    text = metadata.distribution("charter").read_text("direct_url.json")
    origin = json.loads(text) if text else {}
    return unquote(urlsplit(origin["url"]).path) if origin.get("dir_info", {}).get("editable") else ""
