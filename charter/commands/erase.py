"""`charter erase`: delete everything that was made from a prompt."""

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
@click.option("--reason", default="", help="Why; it is kept.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common_options
def erase(settings: Settings, identifiers: tuple[str, ...], reason: str, yes: bool) -> None:
    """Delete everything that was made from a prompt.

    From every database that is fed from this log.

    The deletion is a record on the log: each sink carries it out, future batches and replays respect it, and what still comes
    of the prompt is not written. The log itself keeps its messages for as long as the topics are kept (bus.retention_ms), and
    models that were trained on them stay as they are.

    \b
    Examples:
      charter erase 3f2a1c04-... --reason "asked by its author"
    """

    prompts = []
    for identifier in identifiers:
        found = find_prompt_ids(open_store(settings), identifier)
        if len(found) != 1:
            raise UsageError(
                f"{identifier!r} is the beginning of {len(found) or 'no'} prompts",
                "it must name one prompt, for what is forgotten is gone",
                "type: charter sql 'select prompt_id, prompt from traces'    and give a whole prompt_id",
            )
        prompts += found
    if not yes:
        click.confirm(f"delete everything of {_format_prompt_count(len(prompts))} from the databases, for good?", abort=True)
    bus = connect_bus(settings)
    bus.publish(
        [
            to_producer_record(
                Erasure(
                    record_id=ids.compute_record_id("forget", [prompt], ""),
                    prompt_id=prompt,
                    run_id=settings.run.id,
                    stage="erase",
                    reason=reason,
                )
            )
            for prompt in prompts
        ]
    )
    bus.close()
    click.echo(f"to be forgotten as soon as the sink reads it (charter run): {_format_prompt_count(len(prompts))}")


def _format_prompt_count(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


COMMAND = erase
