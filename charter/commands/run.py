"""`charter run`: run the stages and the sink."""

from __future__ import annotations

import os
import sys

import click

from charter import custom_stage
from charter.connect import connect_bus, open_store
from charter.console import common_options, print_progress
from charter.lag import is_all_work_done
from charter.pipeline import STAGE_ROLES, STAGES, make_host
from engine.host import Host
from engine.settings import Settings
from engine.stop_signals import stop_on_signals

_ALL_STAGES = (*STAGES, "sink")
_REPORT_INTERVAL_POLLS = 25  # looks of 0.2 s
_DONE_CHECK_INTERVAL_POLLS = 5


class _StageParamType(click.Choice[str]):
    """A stage of Charter's, or the file of one's own."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value.endswith(".py") else super().convert(value, param, ctx)


@click.command()
@click.option(
    "--stage", "stages", multiple=True, type=_StageParamType(_ALL_STAGES), help="Only this one, or a FILE.py; repeatable."
)
@click.option("--slot", metavar="NAME", help="This copy's fixed name, e.g. a pod's ordinal.")
@click.option("--until-done", is_flag=True, help="Stop when nothing on the log is left to do for them.")
@common_options
def run(settings: Settings, stages: tuple[str, ...], slot: str | None, until_done: bool) -> None:
    """Run the stages and the sink until stopped.

    All of them in one process, or those that --stage names: also one of your own in a Python file (docs/extending.md).

    \b
    Examples:
      charter run
      charter run --until-done
      charter run --bus kafka://localhost:9092 --stage respond
      charter run --bus kafka://localhost:9092 --stage sink
    """

    chosen = stages or _ALL_STAGES
    named = [name for name in chosen if name in _ALL_STAGES]
    own = [custom_stage.load_custom_stage(name, tuple(STAGE_ROLES.values())) for name in chosen if name not in _ALL_STAGES]
    bus, stop = connect_bus(settings), stop_on_signals()
    host = make_host(settings, bus, [n for n in named if n != "sink"], sink="sink" in named, custom_stages=own, instance=slot)
    end = "until nothing is left to do" if until_done else "stop with Ctrl-C"
    print_progress(f"running {', '.join(chosen)} for run {settings.run.id}; {end}")
    written = open_store(settings) if "sink" in named else None
    last, looks = "", 0
    with host:
        while not stop.wait(0.2) and not host.failure_event.is_set():
            looks += 1
            if looks % _REPORT_INTERVAL_POLLS == 0 and (line := _format_committed(host)) != last:
                print_progress(line)
                last = line
            if until_done and looks % _DONE_CHECK_INTERVAL_POLLS == 0 and is_all_work_done(bus, host.workers, written):
                print_progress(f"nothing is left to do; finished now: {_format_committed(host)}")
                break
    if host.abandoned_threads:
        print_progress(f"stopped without waiting longer for {', '.join(host.abandoned_threads)}; its work is done again")
        sys.stderr.flush()
        os._exit(0 if host.failure is None else getattr(host.failure, "exit_code", 1))  # a thread is still at work
    bus.close()
    host.raise_if_failed()


def _format_committed(host: Host) -> str:
    """How many records each stage has finished since the start."""
    return " ".join(f"{worker.stage.name}={worker.num_committed}" for worker in host.workers)


COMMAND = run
