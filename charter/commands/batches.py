"""`charter batches`: list the training batches, show a batch, or rebuild a batch from its manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from charter.connect import connect_existing_bus, open_store
from charter.console import common_options, format_cell, output_options, print_records, print_rows
from engine.bus.read import read_values
from engine.errors import UsageError
from engine.settings import Settings
from engine.text import format_count
from schemas.codec import decode_record
from schemas.records import BatchManifest

if TYPE_CHECKING:
    from trainer.batches import Batch


_BATCHES_SQL = """
    SELECT b.batch_number, b.phase, len(b.record_ids) AS rows, b.mixture, b.base_policy_version AS policy,
           b.base_reward_version AS reward_model, b.created_at,
           CASE WHEN p.version IS NOT NULL THEN 'published ' || lower(p.kind) || ' ' || p.version
                WHEN i.voided_batch_id IS NOT NULL THEN 'voided: ' || i.title ELSE 'unfinished' END AS outcome
    FROM batches b
    LEFT JOIN policies p ON p.batch_id = b.record_id AND p.restored_version IS NULL
    LEFT JOIN (SELECT voided_batch_id, any_value(title) AS title FROM incidents GROUP BY 1) i ON i.voided_batch_id = b.record_id
    ORDER BY b.batch_number"""


@click.group(invoke_without_command=True)
@output_options
@common_options
def batches(settings: Settings, output: str) -> None:
    """List, show and rebuild training batches.

    Without a verb, print the list.

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
    """List all batches with their phase, size, models and outcome.

    \b
    Examples:
      charter batches list --json
    """
    _print_batches(settings, output)


def _print_batches(settings: Settings, output: str) -> None:
    result = open_store(settings).query(_BATCHES_SQL, limit_s=10.0)
    if output:
        print_rows(result.columns, result.rows, output)
    elif result.rows:
        i = result.columns.index("mixture")
        print_rows(result.columns, [(*row[:i], _format_mixture(row[i]), *row[i + 1 :]) for row in result.rows], "")
    else:
        click.echo("there are no batches yet")


def _format_mixture(mixture: dict[str, int]) -> str:
    return " ".join(f"{source}={count}" for source, count in sorted(mixture.items()))


@batches.command()
@click.argument("number", type=int)
@output_options
@common_options
def show(settings: Settings, number: int, output: str) -> None:
    """Show the manifest of one batch.

    The command reads the manifest from the log. The manifest has the rows, mixture, content hash, commit range and seed of the
    batch, and the models and settings of the training.

    \b
    Examples:
      charter batches show 3
    """
    summary = _summarize_manifest(_read_manifest(settings, number))
    if output:
        print_records(summary, output)
        return
    for name, value in summary.items():
        click.echo(f"{name}: {format_cell(value)}")


@batches.command()
@click.argument("number", type=int)
@output_options
@common_options
def rebuild(settings: Settings, number: int, output: str) -> None:
    """Rebuild a batch from the database, and verify its content hash.

    With --json, print the rows that training read, in the same order. If the batch cannot be rebuilt exactly, the command fails.

    \b
    Examples:
      charter batches rebuild 3
      charter batches rebuild 3 --json > batch-3.json
    """
    from trainer.batches import rebuild_batch

    batch = rebuild_batch(open_store(settings), _read_manifest(settings, number))
    if output:
        rows: dict[str, Any] = {"rows": batch.rows, "sl_rows": batch.sl_rows}
        print_records(_summarize_manifest(batch.manifest) | rows, output)
    else:
        click.echo(_format_rebuilt_batch(batch))


def _format_rebuilt_batch(batch: Batch) -> str:
    manifest = batch.manifest
    num_records = len(manifest.record_ids) + len(manifest.sl_record_ids)
    return (
        f"batch {manifest.batch_number} ({manifest.phase}) is rebuilt exactly: {format_count(num_records, 'records')},"
        f" content hash {manifest.content_hash}"
    )


def _read_manifest(settings: Settings, batch_number: int) -> BatchManifest:
    """Return the manifest of a batch from the log."""
    bus = connect_existing_bus(settings)
    manifests = [decode_record(value, BatchManifest) for value in read_values(bus, BatchManifest.topic)]
    bus.close()
    for manifest in manifests:
        if manifest.batch_number == batch_number:
            return manifest
    raise UsageError(
        f"there is no batch {batch_number}",
        f"the log has {format_count(len(manifests), 'batches')}",
        "type: charter batches    (lists the batch numbers)",
    )


def _summarize_manifest(manifest: BatchManifest) -> dict[str, Any]:
    """Return the fields of a manifest for printing, with the long lists of ids at the end."""
    fields = manifest.model_dump(mode="json")
    general = ("batch_number", "phase", "record_id", "created_at", "seed", "content_hash", "commit_seq_from", "commit_seq_to")
    models = ("base_policy_version", "base_reward_version", "reference_policy_version")
    summary = {name: fields[name] for name in (*general, *models, "mixture", "target_mixture", "cursors")}
    return (
        summary | {"settings": json.loads(manifest.settings)} | {name: fields[name] for name in ("record_ids", "sl_record_ids")}
    )


COMMAND = batches
