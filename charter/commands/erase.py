"""`charter erase`: delete a prompt and all records made from it."""

from __future__ import annotations

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options
from charter.lookup import find_prompt_ids
from engine.errors import UsageError
from engine.settings import Settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.records import Erasure


@click.command()
@click.argument("identifiers", metavar="PROMPT_ID...", nargs=-1, required=True)
@click.option("--reason", default="", help="Reason to store in the erasure record.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@common_options
def erase(settings: Settings, identifiers: tuple[str, ...], reason: str, yes: bool) -> None:
    """Delete a prompt and all records made from it.

    The command publishes an erasure record. Each sink that reads this log deletes the prompt and the records made from it. The
    sink also drops such records if they arrive later. Later batches and replays skip these records.

    The log keeps its records until they expire (bus.retention_ms). Models that were trained on the records do not change.

    \b
    Examples:
      charter erase 3f2a1c04-... --reason "asked by its author"
    """
    prompt_ids = []
    for identifier in identifiers:
        matches = find_prompt_ids(open_store(settings), identifier)
        if len(matches) != 1:
            raise UsageError(
                f"{identifier!r} matches {len(matches) or 'no'} prompts",
                "an erasure cannot be undone, so each id must match exactly one prompt",
                "type: charter sql 'select prompt_id, prompt from traces'    and give a complete prompt_id",
            )
        prompt_ids += matches
    if not yes:
        question = f"permanently delete all records of {_format_prompt_count(len(prompt_ids))} from the databases?"
        click.confirm(question, abort=True)
    bus = connect_bus(settings)
    bus.publish(
        [
            to_producer_record(
                Erasure(
                    record_id=ids.compute_record_id("forget", [prompt_id], ""),
                    prompt_id=prompt_id,
                    run_id=settings.run.id,
                    stage="erase",
                    reason=reason,
                )
            )
            for prompt_id in prompt_ids
        ]
    )
    bus.close()
    click.echo(
        f"erasure of {_format_prompt_count(len(prompt_ids))} published; the sink deletes the records while charter run is active"
    )


def _format_prompt_count(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count} prompts"


COMMAND = erase
