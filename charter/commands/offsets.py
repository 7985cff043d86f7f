"""`charter offsets`: accept, restore or set the committed offsets of a stage."""

from __future__ import annotations

import click

from charter.connect import open_bus_from_settings
from charter.console import common_options
from charter.stages import STAGE_OUTPUTS, STAGES, get_stage_inputs
from engine.bus.port import Bus, Offsets
from engine.errors import UsageError
from engine.positions import PositionFinder
from engine.run_starts import StartPositions, read_start_positions
from engine.settings import Settings

_stage_option = click.option("--stage", required=True, type=click.Choice(STAGES), help="The stage.")


@click.group()
def offsets() -> None:
    """Accept, restore or set the committed offsets of a stage.

    A stage refuses to start if another program has changed its offsets, or if its position is unknown. These commands
    decide where it continues. The processes of the stage must be stopped.

    \b
    Examples:
      charter offsets restore --stage judge --run live
      charter offsets accept --stage judge --run live
      charter offsets set --stage judge --run live --to latest
    """


@offsets.command()
@_stage_option
@common_options
def accept(settings: Settings, stage: str) -> None:
    """Continue at the offsets that another program has committed.

    Offsets below the last output of the stage repeat work. Offsets above it skip records. Offsets outside the log are refused.

    \b
    Examples:
      charter offsets accept --stage judge --run live
    """
    bus, topics = open_bus_from_settings(settings), get_stage_inputs(settings)[stage]
    group = f"{settings.run.id}.{stage}"
    foreign = {tp: entry.offset for tp, entry in bus.list_committed(group, topics).items() if not entry.topic_id}
    if not foreign:
        raise UsageError(
            f"{stage} of run {settings.run.id} has no offsets to accept",
            "no other program has changed its offsets",
            "type: charter topics lag",
        )
    beginnings, ends = bus.beginning_offsets(topics), bus.end_offsets(topics)
    for tp, offset in foreign.items():
        if not beginnings[tp] <= offset <= ends[tp]:
            raise UsageError(
                f"the offset {offset} of {tp.topic}[{tp.partition}] is not on the log",
                f"the log has the offsets {beginnings[tp]} to {ends[tp]}",
                f"type: charter offsets restore --run {settings.run.id} --stage {stage}",
            )
    bus.set_committed(group, foreign)
    _print_offsets(stage, foreign)
    bus.close()


@offsets.command()
@_stage_option
@common_options
def restore(settings: Settings, stage: str) -> None:
    """Continue after the last outputs of the stage.

    The position is rebuilt from the outputs and dead letters of the stage on the log. No work is repeated or skipped.

    \b
    Examples:
      charter offsets restore --stage judge --run live
    """
    bus, topics = open_bus_from_settings(settings), get_stage_inputs(settings)[stage]
    run_start = _require_run_start(bus, settings.run.id)
    finder = PositionFinder(bus, run_start, stage, bus.topic_ids(topics), (STAGE_OUTPUTS[stage],))
    positions = finder.recover(list(bus.end_offsets(topics)))
    bus.set_committed(f"{settings.run.id}.{stage}", positions)
    _print_offsets(stage, positions)
    bus.close()


@offsets.command("set")
@_stage_option
@click.option("--to", "bound", required=True, type=click.Choice(["earliest", "latest"]), help="The new position.")
@common_options
def set_offsets(settings: Settings, stage: str, bound: str) -> None:
    """Continue at the beginning or at the end of the log.

    With --to earliest, the stage processes all records on the log again that the run has. With --to latest, it skips all
    records on the log.

    \b
    Examples:
      charter offsets set --stage judge --run live --to latest
    """
    bus, topics = open_bus_from_settings(settings), get_stage_inputs(settings)[stage]
    run_start = _require_run_start(bus, settings.run.id)
    positions = run_start.get_offsets(bus, topics) if bound == "earliest" else bus.end_offsets(topics)
    bus.set_committed(f"{settings.run.id}.{stage}", positions)
    _print_offsets(stage, positions)
    bus.close()


def _require_run_start(bus: Bus, run_id: str) -> StartPositions:
    run_start = read_start_positions(bus, run_id)
    if run_start is None:
        raise UsageError(f"there is no run {run_id} on the log", "no process has started it", "type: charter runs")
    return run_start


def _print_offsets(stage: str, positions: Offsets) -> None:
    formatted = ", ".join(f"{tp.topic}[{tp.partition}]@{offset}" for tp, offset in sorted(positions.items()))
    click.echo(f"{stage} continues at {formatted}")


COMMAND = offsets
