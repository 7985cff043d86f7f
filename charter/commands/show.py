"""`charter show`: show the trace of one prompt."""

from __future__ import annotations

import click

from charter.connect import open_store
from charter.console import common_options, output_options, print_records
from charter.lookup import describe_matches, find_erased_prompt_ids, find_prompt_ids, find_prompt_titles
from charter.text import format_trace
from engine.errors import UsageError
from engine.settings import Settings


@click.command()
@click.argument("identifier", metavar="ID")
@output_options
@common_options
def show(settings: Settings, identifier: str, output: str) -> None:
    """Show the trace of one prompt.

    The trace has the responses, critiques, revisions and labels of the prompt. ID is the id of the prompt or of one of these
    records. A unique prefix of the id is sufficient.

    \b
    Examples:
      charter show 3f2a
      charter show 3f2a --json
    """
    store = open_store(settings)
    prompt_ids = find_prompt_ids(store, identifier)
    if not prompt_ids and (erased := find_erased_prompt_ids(store, identifier)):
        raise UsageError(
            f"prompt {erased[0]} was erased",
            "charter erase deleted the prompt and all records made from it",
            f"for the time and the reason, type: charter sql \"from erasures where prompt_id = '{erased[0]}'\"",
        )
    if len(prompt_ids) > 1:
        titles = find_prompt_titles(store, prompt_ids)
        raise UsageError(
            f"{identifier!r} matches {len(prompt_ids)} prompts",
            f"an id prefix must match exactly one prompt; {describe_matches(len(prompt_ids), titles)}",
            f"give more characters of one of these ids, e.g. charter show {titles[0][0]}",
        )
    if not prompt_ids:
        raise UsageError(
            f"{identifier!r} matches no prompts",
            f"no record in {store.path} has an id that starts with it",
            "type: charter sql 'select prompt_id, prompt from traces limit 10'",
        )
    rows = store.query_dicts("SELECT * FROM traces WHERE prompt_id = ?", prompt_ids)
    if output:
        print_records(rows, output)
    else:
        click.echo(format_trace(rows[0]))


COMMAND = show
