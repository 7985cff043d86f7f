"""The run card: what a run is made of, where everything lies, and what it differs in from another run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import charter
from engine.store import QueryFunction

if TYPE_CHECKING:
    from engine.settings import Settings

_URL_CREDENTIALS_PATTERN = re.compile(r"(?<=//)[^/@\s]*@")  # of a URL: never shown
_PACKAGES = ("duckdb", "fastavro", "kafka-python", "pydantic", "torch", "transformers", "trl")


def load_runs(query: QueryFunction) -> list[dict[str, Any]]:
    """Every run, newest first, with what it is made of and how many records it has."""
    from charter.runs import RUNS_SQL

    return list(reversed(query(RUNS_SQL, (), 500).to_dicts()))


def load_run_ids(query: QueryFunction) -> dict[str, Any]:
    """The runs' ids, newest first."""
    sql = "SELECT run_id FROM raw.runs GROUP BY 1 ORDER BY max(commit_seq) DESC"
    return {"runs": [run for (run,) in query(sql, (), 200).rows]}


def load_run(query: QueryFunction, run: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Everything about one run; `manifest` is None when there is no such run (any more)."""
    sql = "SELECT * FROM raw.runs WHERE run_id = ? AND NOT is_duplicate ORDER BY commit_seq DESC"
    manifests = query(sql, [run], 20).to_dicts()
    if not manifests:
        return {"run": run, "manifest": None, "runs": load_run_ids(query)["runs"]}
    manifest = manifests[0]
    settings = _flatten_settings(manifest["settings"])
    other = parameters.get("with", "")
    return {
        "run": run,
        "manifest": {name: manifest[name] for name in ("record_id", "created_at", "constitution", "charter_version")},
        "constitution_text": manifest["constitution_text"],
        "settings": settings,
        "changes": _list_changes(manifests),
        "models": _load_models(query, run),
        "runs": load_run_ids(query)["runs"],
        "with": other,
        "differences": _compare_runs(query, run, other) if other else None,
    }


def _flatten_settings(text: str) -> dict[str, Any]:
    """The settings of a manifest as dotted names, without the logins of URLs."""
    from charter.runs import flatten_settings

    return {name: _strip_credentials(value) for name, value in flatten_settings(json.loads(text)).items()}


def _strip_credentials(value: Any) -> Any:
    return _URL_CREDENTIALS_PATTERN.sub("", value) if isinstance(value, str) else value


def _list_changes(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What changed each time that the run was started with another configuration, newest first."""
    found = []
    for newer, older in pairwise(manifests):
        after, before = _flatten_settings(newer["settings"]), _flatten_settings(older["settings"])
        after["constitution"], before["constitution"] = newer["constitution"], older["constitution"]
        after["charter"], before["charter"] = newer["charter_version"], older["charter_version"]
        found.append({"at": newer["created_at"], "settings": _diff_settings(before, after)})
    return found


def _diff_settings(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"setting": name, "before": before.get(name), "after": after.get(name)}
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _compare_runs(query: QueryFunction, run: str, other: str) -> dict[str, Any]:
    """What two runs differ in: configuration, records, labels. `found` is False when the other run is not there."""
    from charter.runs import SHARED_LABELS_SQL, SHARED_RECORDS_SQL

    rows = query("SELECT * FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC", [other], 1).to_dicts()
    if not rows:
        return {"found": False}
    mine = query("SELECT * FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC", [run], 1).to_dicts()[0]
    sides = []
    for manifest in (mine, rows[0]):
        settings = {
            k: v for k, v in _flatten_settings(manifest["settings"]).items() if k != "run.id" and not k.startswith("replay.")
        }
        constitution = manifest["constitution"] or {}
        settings["constitution"] = f"{constitution.get('name')} {constitution.get('version')}"
        settings["constitution hash"] = constitution.get("hash")
        sides.append(settings | {"charter": manifest["charter_version"]})
    return {
        "found": True,
        "settings": _diff_settings(sides[0], sides[1]),
        "shared": query(SHARED_RECORDS_SQL, [run, other]).to_dicts(),
        "labels": query(SHARED_LABELS_SQL, [run, other]).to_dicts(),
    }


def _load_models(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """Which weights, prompt template and policy made the records of each stage."""
    parts = [
        f"""SELECT '{stage}' AS stage, model, policy_version, template_hash, count(*) AS records
            FROM raw.{table} WHERE run_id = $run GROUP BY ALL"""
        for stage, table in (
            ("respond", "responses"),
            ("critique", "critiques"),
            ("revise", "revisions"),
            ("judge", "preferences"),
        )
    ]
    return query(f"{' UNION ALL '.join(parts)} ORDER BY stage, policy_version", {"run": run}, 200).to_dicts()


def describe_environment(settings: Settings) -> dict[str, dict[str, str]]:
    """Where everything lies on this machine, and the versions of what it runs on."""
    folder = settings.folder.resolve()
    versions = {"charter": charter.__version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "paths": {
            "database": str(folder / "charter.duckdb"),
            "log": _strip_credentials(settings.bus_address),
            "checkpoints": str(folder / "checkpoints"),
        },
        "versions": versions,
    }
