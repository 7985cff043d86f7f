"""Make and read run manifests. A run manifest is a record with the configuration of a run.

`charter.configurations` decides when a manifest is published.
"""

from __future__ import annotations

import json
from typing import Any

import charter
from constitutions.loader import Constitution
from engine.bus.port import Bus
from engine.bus.read import read_values
from engine.settings import Settings
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ConstitutionRef, RunManifest

_ADDITIONAL_KEYS = ("replay", "evaluation_run", "configuration")  # stored with the settings of a run; they are no settings


def make_run_manifest(
    settings: Settings,
    constitution: Constitution,
    replay: dict[str, Any] | None = None,
    configuration: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> RunManifest:
    """Return the manifest of a run.

    `replay` describes the records that a replay reads, and `evaluation` has the name and the policy of an evaluation.
    `configuration` has the fields of a `charter.configurations.RunConfiguration`. All are stored with the settings.
    """
    values = settings.model_dump(mode="json", exclude={"data", "bus"})
    values |= {"replay": replay} if replay else {}
    values |= {"evaluation_run": evaluation} if evaluation else {}
    values |= {"configuration": configuration} if configuration else {}
    settings_json = json.dumps(values, ensure_ascii=False)
    settings_fingerprint = ids.compute_fingerprint(
        "run_configuration", settings=settings_json, constitution=constitution.hash, version=charter.__version__
    )
    fingerprint = ids.compute_fingerprint("run", run=settings.run.id, configuration=settings_fingerprint)
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


def parse_manifest_settings(text: str) -> dict[str, Any]:
    """Return {section: values} from the field `settings` of a manifest, without the keys that are no settings."""
    return {name: section for name, section in json.loads(text).items() if name not in _ADDITIONAL_KEYS}


def parse_evaluation(text: str) -> dict[str, Any] | None:
    """Return the name and the policy version of an evaluation from the field `settings` of its manifest. Return None for other runs."""
    fields: dict[str, Any] | None = json.loads(text).get("evaluation_run")
    return fields


def read_run_manifests(bus: Bus) -> list[RunManifest]:
    """Return the manifests of all runs, oldest first. A run has a manifest for each configuration."""
    return [decode_record(value, RunManifest) for value in read_values(bus, RunManifest.topic)]
