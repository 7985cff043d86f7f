"""Read and publish run manifests. A run manifest is a record with the configuration of a run."""

from __future__ import annotations

import json
from typing import Any

import charter
from constitutions.loader import Constitution
from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.settings import Settings
from engine.worker import to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ConstitutionRef, RunManifest


def make_run_manifest(settings: Settings, constitution: Constitution, replay: dict[str, Any] | None = None) -> RunManifest:
    """Return the manifest of a run.

    `replay` describes the records that a replay reads. `replay` is stored with the settings.
    """
    values = settings.model_dump(mode="json", exclude={"data", "bus"}) | ({"replay": replay} if replay else {})
    settings_json = json.dumps(values, ensure_ascii=False)
    configuration = ids.compute_fingerprint(
        "run_configuration", settings=settings_json, constitution=constitution.hash, version=charter.__version__
    )
    fingerprint = ids.compute_fingerprint("run", run=settings.run.id, configuration=configuration)
    return RunManifest(
        record_id=ids.compute_record_id("run", [], fingerprint),
        run_id=settings.run.id,
        stage="run",
        constitution=ConstitutionRef(name=constitution.name, version=constitution.version, hash=constitution.hash),
        name=settings.run.id,
        settings=settings_json,
        constitution_text=constitution.text,
        charter_version=charter.__version__,
    )


def read_run_manifests(bus: Bus) -> list[RunManifest]:
    """Return the manifests of all runs, oldest first. A run has one manifest for each configuration that it used."""
    return [decode_record(value, RunManifest) for value in read_values(bus, RunManifest.topic)]


def publish_run_manifest(bus: Bus, manifest: RunManifest) -> None:
    """Publish a manifest if it is not on the log yet."""
    if manifest.record_id not in {published.record_id for published in read_run_manifests(bus)}:
        bus.publish([to_producer_record(manifest)])
