"""Servers and folders that all test processes of a session share. The first process that needs one makes it."""

import fcntl
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

_FOLDER_VARIABLE = "CHARTER_TEST_SHARED_FOLDER"  # the processes of pytest-xdist inherit it
_ADDRESS_FILE, _PROCESS_FILE = "address.txt", "process.txt"


def create_shared_folder():
    """Create the folder of this session. Only the first process of a session calls this."""
    os.environ[_FOLDER_VARIABLE] = tempfile.mkdtemp(prefix="charter-tests-")


def remove_shared_folder():
    """End the servers of this session, and remove its folder."""
    folder = Path(os.environ.pop(_FOLDER_VARIABLE))
    for path in folder.iterdir():
        _remove(path)
    shutil.rmtree(folder, ignore_errors=True)


def _remove(folder):
    """Kill the server in a folder, if there is one, and remove the folder."""
    if (process_file := folder / _PROCESS_FILE).exists():
        with suppress(ProcessLookupError):
            os.kill(int(process_file.read_text()), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)  # a killed server may still be writing


def make_once(name, make):
    """Return a folder that `make(folder)` has filled. Only the first call in a session fills it; the others wait for it."""
    folder = Path(os.environ[_FOLDER_VARIABLE]) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (marker := folder.with_suffix(".complete")).exists():
            _remove(folder)  # the attempt of a process that has failed
            folder.mkdir()
            make(folder)
            marker.touch()
    return folder


def start_once(name, launch):
    """Return the folder and the address of a server, which is started once in a session.

    `launch(folder)` returns the new process, its address, and a function that waits until the server answers.
    """

    def start(folder):
        process, address, wait_until_ready = launch(folder)
        (folder / _PROCESS_FILE).write_text(str(process.pid))
        wait_until_ready()
        (folder / _ADDRESS_FILE).write_text(address)

    folder = make_once(name, start)
    return folder, (folder / _ADDRESS_FILE).read_text()
