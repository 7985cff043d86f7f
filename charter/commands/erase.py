"""`charter erase`: delete a prompt and all records made from it."""

from __future__ import annotations

import sys

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options
from charter.erasure import erase_from_lakes, list_remaining_copies, make_erasure_plan, publish_erasures, wait_until_erased
from engine.bus import KAFKA_SCHEME
from engine.settings import Settings
from engine.text import format_count


@click.command()
@click.argument("identifiers", metavar="PROMPT_ID...", nargs=-1, required=True)
@click.option("--reason", default="", help="Reason to store in the erasure record. Do not repeat the text here.")
@click.option("--yes", is_flag=True, help="Do not show the text, and do not ask for confirmation.")
@common_options
def erase(settings: Settings, identifiers: tuple[str, ...], reason: str, yes: bool) -> None:
    """Delete a prompt and all records made from it.

    The command shows the prompt and asks for confirmation. Then it publishes an erasure record. Each sink that reads this log
    deletes the prompt, its other epochs and the records made from them: from its database, from the embedded log, and from the
    files of both. If no sink runs on this data folder, the command does this itself. It also rewrites the lakes of this data
    folder (charter export lake). It returns when this is finished.

    Later batches, replays and productions skip the prompt. Kafka cannot delete single records: the command prints until when each
    topic keeps the text. It also lists the models that were trained on the records, and other copies that it cannot delete.

    \b
    Examples:
      charter erase 3f2a1c04-... --reason "asked by its author"
    """
    store = open_store(settings)
    plan = make_erasure_plan(store, identifiers)
    if not yes:
        for line in plan.describe():
            click.echo(line)
        if not click.confirm("permanently delete all of this?"):
            click.echo("nothing was deleted")
            sys.exit(1)
    bus = connect_bus(settings)
    remaining = list_remaining_copies(settings, store, bus, plan)  # reads rows that the erasure deletes
    publish_erasures(bus, plan.prompt_ids, settings.run.id, reason)
    try:
        wait_until_erased(settings, bus, plan.prompt_ids)
    except BaseException:
        click.echo(
            "the erasure is published but not finished; to finish it, repeat this command, or type: charter run", err=True
        )
        raise
    log = "" if settings.bus_address.startswith(KAFKA_SCHEME) else " and from the embedded log"
    count = len(plan.prompts) or len(identifiers)
    click.echo(f"erased {format_count(count, 'prompts')} from {store.path}{log}; {plan.format_counts()}")
    bus.close()
    click.echo("not erased:")
    for line in remaining:
        click.echo(f"  {line}")
    erase_from_lakes(settings, plan.prompt_ids)


COMMAND = erase
