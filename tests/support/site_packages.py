"""A folder of the installed packages without some of them, as on a machine that lacks these packages."""

import sysconfig
from pathlib import Path


def link_site_packages_without(missing, folder):
    """Fill the folder with links to all installed packages except `missing`. Return it.

    `python -S` with PYTHONPATH = this folder finds only these packages.
    """
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = entry.name.split("-")[0].split(".")[0].lower()
        if name not in missing and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder
