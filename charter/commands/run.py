"""`charter run`: run the stages and the sink."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count

import click

from charter import custom_stage
from charter.connect import connect_bus, open_store
from charter.console import accept_configuration_option, common_options, print_progress
from charter.label_quality import read_verdict
from charter.lag import CompletionCheck
from charter.pipeline import make_host
from charter.progress import show_progress
from charter.stages import MODEL_ROLES, STAGES
from charter.starting_policy import describe_starting_policy, get_pinned_version, keep_starting_policy, set_from_base
from charter.startup import exit_if_abandoned, start_when_ready, wait_option
from engine.bus.port import Bus
from engine.bus.read import read_topic
from engine.host import Host, reduce_garbage_collection
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from engine.store import Store
from engine.text import format_count
from schemas.records import Prompt
from trainer.methods import require_enough_completions

_ALL_STAGES = (*STAGES, "sink")
_POLL_INTERVAL_S = 0.2
_REPORT_INTERVAL_POLLS = 25
_DONE_CHECK_INTERVAL_POLLS = 5  # the check reads the log, so it does not run at every poll


class _StageParamType(click.Choice[str]):
    """Accepts the name of a built-in stage, or a Python file with a custom stage."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value.endswith(".py") else super().convert(value, param, ctx)


@click.command()
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=_StageParamType(_ALL_STAGES),
    help="Run only this stage. FILE.py runs a custom stage. May be repeated.",
)
@click.option("--instance", metavar="NAME", help="Fixed name of this worker instance, e.g. the ordinal of a pod.")
@click.option("--until-done", is_flag=True, help="Exit when the stages have processed all records on the log.")
@click.option(
    "--from-base",
    is_flag=True,
    help="In a new run, sample all responses from the base model and not from the newest policy.",
)
@accept_configuration_option
@wait_option
@common_options
def run(
    settings: Settings,
    origins: dict[str, str],
    stages: tuple[str, ...],
    instance: str | None,
    until_done: bool,
    from_base: bool,
    accept_configuration: bool,
    wait: bool,
) -> None:
    """Run the stages and the sink until stopped.

    One process runs all stages and the sink. With --stage, it runs only the given stages. FILE.py is a custom stage
    (docs/extending.md).

    A new run starts from the newest policy on the log, whichever run it was trained on. With --from-base, the run uses the base
    model (policy 0) for all its responses, also after a restart.

    A run keeps its configuration: settings, models, constitution and prompt templates that enter the ids of the records of a
    stage. If they have changed since the stage started in this run, the command exits with code 2 and prints the changes. With
    --accept-configuration, it adds them to the run as a further configuration (charter runs).

    If the log, the database or the disk is unavailable at the start, the exit code is 3. With --wait, the command waits.

    On Ctrl-C or SIGTERM, stop reading, finish the records in flight and exit. The exit code is 1 or 3 if a stage stops with an
    error.

    \b
    Examples:
      charter run
      charter run --until-done
      charter run --run library --from-base
      charter run --bus kafka://localhost:9092 --stage respond
      charter run --bus kafka://localhost:9092 --stage sink --wait
      charter run --set respond.temperature=0.7 --accept-configuration
    """
    selected = stages or _ALL_STAGES
    builtin = [name for name in selected if name in STAGES]
    custom = [custom_stage.load_custom_stage(name, MODEL_ROLES) for name in selected if name not in _ALL_STAGES]
    if "respond" in builtin:
        require_enough_completions(settings)
    if from_base:
        settings, origins = set_from_base(settings, origins)

    def start() -> tuple[Bus, Host, Settings]:
        bus = connect_bus(settings)
        try:
            reduce_garbage_collection()
            run_settings = keep_starting_policy(settings, origins, bus) if builtin or custom else settings
            host = make_host(
                run_settings,
                bus,
                builtin,
                sink="sink" in selected,
                custom_stages=custom,
                instance=instance,
                pinned_version=get_pinned_version(run_settings),
                accept_configuration=accept_configuration,
            )
            return bus, host, run_settings
        except BaseException:
            bus.close()
            raise

    bus, host, settings = start_when_ready(start, wait=wait)
    stop = stop_on_signals(host.note_stop)
    for line in _describe_start(settings, bus, host, selected, until_done):
        print_progress(line)
    store = open_store(settings) if "sink" in selected else None
    if until_done:
        _run_until_done(settings, bus, host, store, stop)
    else:
        _run_until_stopped(host, stop)
    exit_if_abandoned(host, 0)
    bus.close()
    host.raise_if_failed()


def _describe_start(settings: Settings, bus: Bus, host: Host, selected: Sequence[str], until_done: bool) -> Iterator[str]:
    """Yield lines about the policy that responds, the stages that run, and prompts that belong to other runs."""
    if "respond" in selected:
        yield describe_starting_policy(settings, bus)
    end = "exits when all work is done" if until_done else "stop with Ctrl-C"
    yield f"running {', '.join(selected)} for run {settings.run.id}; {end}"
    if "respond" in selected and (line := _describe_other_prompts(bus, host)):
        yield line


def _run_until_stopped(host: Host, stop: threading.Event) -> None:
    """Run the host until a signal or a failure. Print the number of finished records when it changes."""
    with host:
        for _ in _poll(host, stop):
            pass


def _run_until_done(settings: Settings, bus: Bus, host: Host, store: Store | None, stop: threading.Event) -> None:
    """Run the host until all records on the log are processed, or until a signal or a failure."""
    starts = {tp: offset for worker in host.workers for tp, offset in worker.run_start.offsets.items()}
    check = CompletionCheck(bus, {worker.group: worker.stage.inputs for worker in host.workers}, store, starts)
    with host, show_progress(f"run {settings.run.id}", "known records") as progress:
        for poll in _poll(host, stop):
            if poll % _REPORT_INTERVAL_POLLS == 0:
                check.update_progress(progress, sum(worker.num_committed for worker in host.workers))
            if poll % _DONE_CHECK_INTERVAL_POLLS == 0 and check.is_done():
                finished = _format_committed(host)
                print_progress("all work is done" + (f"; records finished by this process: {finished}" if finished else ""))
                if store:
                    print_progress(str(read_verdict(store, settings.label_quality)))
                return


def _poll(host: Host, stop: threading.Event) -> Iterator[int]:
    """Yield the number of each poll until a signal or a failure. Print the number of finished records when it changes."""
    last_line = ""
    for poll in count(1):
        if stop.wait(_POLL_INTERVAL_S) or host.failure_event.is_set():
            return
        if poll % _REPORT_INTERVAL_POLLS == 0 and (line := _format_committed(host)) != last_line:
            print_progress(line)
            last_line = line
        yield poll


def _describe_other_prompts(bus: Bus, host: Host) -> str:
    """If the run has no prompts, return a line with the runs of the prompts on the log. Otherwise return ""."""
    run_start, ends = host.workers[0].run_start, bus.end_offsets([Prompt.topic])
    if any(end > run_start.get_offset(tp) for tp, end in ends.items()):
        return ""
    counts = Counter(value.decode() for raw in read_topic(bus, Prompt.topic) for name, value in raw.headers if name == "run")
    others = ", ".join(
        f"{format_count(number, 'prompts', 'belong')} to run {run_id}" for run_id, number in sorted(counts.items())
    )
    return f"run {run_start.run_id} has no prompts yet{f'; {others}' if others else ''}"


def _format_committed(host: Host) -> str:
    """Return the number of records that each stage has processed since the start.

    Also return the number of records that the stages skipped because the records belong to other runs or to erased prompts.
    """
    counts = " ".join(
        f"{worker.stage.name}={worker.num_committed - worker.num_of_other_runs.total() - worker.num_erased}"
        + (f" ({format_count(worker.num_duplicates, 'duplicates')})" if worker.num_duplicates else "")
        for worker in host.workers
    )
    num_erased = sum(worker.num_erased for worker in host.workers)
    counts += f"; {format_count(num_erased, 'records')} of erased prompts skipped" if num_erased else ""
    others = Counter[str]()
    for worker in host.workers:
        # Several stages can skip the same records, so use the largest number and not the sum.
        others |= worker.num_of_other_runs
    return counts + "".join(
        f"; {format_count(number, 'records', 'belong')} to run {run_id}" for run_id, number in sorted(others.items())
    )


COMMAND = run
