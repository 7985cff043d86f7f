"""A process that imports modules once and then forks. Each fork is a new process that runs a function without these imports.

`python -m tests.support.fork_server MODULE...` is the server. It reads requests, one JSON object a line, from its standard input,
and writes one answer a line.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.waiting import HANG_S

_ROOT = Path(__file__).parents[2]
_POLL_INTERVAL_S = 0.02
CHARTER_MODULES = (
    "charter.__main__", "charter.cli", "charter.commands.run", "charter.commands.produce", "charter.commands.replay",
    "charter.commands.sql", "engine.bus.kafka", "trainer.loop", "tests.chaos.fake_process",
)  # fmt: skip


@dataclass
class ForkedProcess:
    """A process with the methods of subprocess.Popen that the tests use."""

    server: ForkServer
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.request(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([f"process {self.pid}"], timeout or 0.0)
            time.sleep(_POLL_INTERVAL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # until `poll` has returned its exit code, its process id belongs to no other process
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server for some modules. It ends with this process."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", *modules],
            env=os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def request(self, **values: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server has ended with {self.process.wait()}")
        return json.loads(answer)

    def start(
        self,
        function: str,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
        stdin: Path | None = None,
    ) -> ForkedProcess:
        """Run `function` (MODULE:NAME), with `arguments` as the command line, in a new process.

        Its output is appended to the file `output`, and its error output to `errors` (default: `output`).
        """
        for path in (output, errors or output):
            path.touch()  # the caller may read the file before the process has opened it
        files = {"stdin": str(stdin or os.devnull), "output": str(output), "errors": str(errors or output)}
        request = {"function": function, "arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        return ForkedProcess(self, self.request(**request, **files))


@cache
def get_fork_server(*modules: str) -> ForkServer:
    """Return the server of this process for these modules."""
    return ForkServer(modules)


def run_charter(
    arguments: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    stdin: str = "",
    modules: Sequence[str] = CHARTER_MODULES,
) -> subprocess.CompletedProcess[str]:
    """Run `charter` in a fork of a process that has imported these modules."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: Path(temporary) / name for name in ("stdin", "output", "errors")}
        paths["stdin"].write_text(stdin, encoding="utf-8")
        server = get_fork_server(*modules)
        process = server.start(
            "charter.__main__:main", arguments, folder=folder or Path.cwd(), environment=environment, **paths
        )
        code = process.wait(HANG_S)
        output, errors = (paths[name].read_text(encoding="utf-8") for name in ("output", "errors"))
    return subprocess.CompletedProcess(["charter", *arguments], code, output, errors)


def _become_process(request: Mapping[str, Any]) -> None:
    """Replace the files, the folder, the environment and the arguments of this process, and run the function."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (name, mode) in enumerate((("stdin", os.O_RDONLY), ("output", append), ("errors", append))):
        descriptor = os.open(request[name], mode, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["charter", *request["arguments"]]
    module, name = request["function"].split(":")
    getattr(sys.modules[module], name)()


def _serve(modules: Sequence[str]) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what the modules print is no answer
    for module in modules:
        importlib.import_module(module)
    # Garbage collection in the forks skips the imported modules. It takes most of the time of a short process.
    gc.collect()
    gc.freeze()
    while line := _read_line():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            os.close(answers)
            _become_process(request)
            return
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _read_line() -> bytes:
    """Read one line from standard input, without a buffer that a fork would inherit."""
    line = b""
    while not line.endswith(b"\n") and (character := os.read(0, 1)):
        line += character
    return line


if __name__ == "__main__":
    _serve(sys.argv[1:])
