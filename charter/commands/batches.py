"""`charter batches`: what each training phase trained on, shown and rebuilt from its manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options, format_cell, output_options, print_records, print_rows
from engine.bus.read import read_values
from engine.errors import UsageError
from engine.settings import Settings
from schemas.codec import decode_record
from schemas.records import BatchManifest

if TYPE_CHECKING:
    from trainer.batches import Batch


_BATCHES_SQL = """
    SELECT b.batch_number, b.phase, len(b.record_ids) AS rows, b.mixture, b.base_policy_version AS policy,
           b.base_reward_version AS reward_model, b.created_at,
           CASE WHEN p.version IS NOT NULL THEN 'made ' || lower(p.kind) || ' ' || p.version
                WHEN i.voided_batch_id IS NOT NULL THEN 'given up: ' || i.title ELSE 'unfinished' END AS outcome
    FROM batches b
    LEFT JOIN policies p ON p.batch_id = b.record_id AND p.restored_version IS NULL
    LEFT JOIN (SELECT voided_batch_id, any_value(title) AS title FROM incidents GROUP BY 1) i ON i.voided_batch_id = b.record_id
    ORDER BY b.batch_number"""


@click.group(invoke_without_command=True)
@output_options
@common_options
def batches(settings: Settings, output: str) -> None:
    """List, show and rebuild training batches.

    Without a verb: the list.

    \b
    Examples:
      charter batches
      charter batches show 3
      charter batches rebuild 3 --json
    """
    if click.get_current_context().invoked_subcommand is None:
        _print_batches(settings, output)


@batches.command("list")
@output_options
@common_options
def list_batches(settings: Settings, output: str) -> None:
    """Every batch, and what became of it.

    \b
    Examples:
      charter batches list --json
    """
    _print_batches(settings, output)


def _print_batches(settings: Settings, output: str) -> None:

    found = open_store(settings).query(_BATCHES_SQL, limit_s=10.0)
    if output:
        print_rows(found.columns, found.rows, output)
    elif found.rows:
        place = found.columns.index("mixture")
        print_rows(found.columns, [(*row[:place], _format_mixture(row[place]), *row[place + 1 :]) for row in found.rows], "")
    else:
        click.echo("no batch has been drawn yet")


def _format_mixture(mixture: dict[str, int]) -> str:
    return " ".join(f"{source}={count}" for source, count in sorted(mixture.items()))


@batches.command()
@click.argument("number", type=int)
@output_options
@common_options
def show(settings: Settings, number: int, output: str) -> None:
    """One batch's manifest.

    Its rows, mix, hash, range of commits, seed, and the models and settings it trained with.

    \b
    Examples:
      charter batches show 3
    """

    about = _summarize_manifest(_read_manifest(settings, number))
    if output:
        print_records(about, output)
        return
    for name, value in about.items():
        click.echo(f"{name}: {format_cell(value)}")


@batches.command()
@click.argument("number", type=int)
@output_options
@common_options
def rebuild(settings: Settings, number: int, output: str) -> None:
    """Draw a past batch again, exactly.

    From the database, every row in the order of training, checked against its hash.

    With --json the rows themselves, as training saw them. What cannot be rebuilt exactly is an error.

    \b
    Examples:
      charter batches rebuild 3
      charter batches rebuild 3 --json > batch-3.json
    """
    from trainer.batches import rebuild_batch as rebuilt

    batch = rebuilt(open_store(settings), _read_manifest(settings, number))
    if output:
        rows: dict[str, Any] = {"rows": batch.rows, "sl_rows": batch.sl_rows}
        print_records(_summarize_manifest(batch.manifest) | rows, output)
    else:
        click.echo(_format_rebuilt_batch(batch))


def _format_rebuilt_batch(batch: Batch) -> str:
    manifest = batch.manifest
    named = len(manifest.record_ids) + len(manifest.sl_record_ids)
    return (
        f"batch {manifest.batch_number} ({manifest.phase}) is rebuilt exactly: all {named} records it names,"
        f" content hash {manifest.content_hash}"
    )


def _read_manifest(settings: Settings, batch_number: int) -> BatchManifest:
    """The manifest of a batch, from the log."""

    bus = connect_bus(settings)
    found = [decode_record(value, BatchManifest) for value in read_values(bus, BatchManifest.topic)]
    bus.close()
    for manifest in found:
        if manifest.batch_number == batch_number:
            return manifest
    raise UsageError(
        f"there is no batch {batch_number}",
        f"{len(found)} batches have been drawn so far",
        "type: charter batches    (their numbers)",
    )


def _summarize_manifest(manifest: BatchManifest) -> dict[str, Any]:
    about = manifest.model_dump(mode="json")
    wanted = ("batch_number", "phase", "record_id", "created_at", "seed", "content_hash", "commit_seq_from", "commit_seq_to")
    models = ("base_policy_version", "base_reward_version", "reference_policy_version")
    told = {name: about[name] for name in (*wanted, *models, "mixture", "target_mixture", "cursors")}
    return told | {"settings": json.loads(manifest.settings)} | {n: about[n] for n in ("record_ids", "sl_record_ids")}


COMMAND = batches
