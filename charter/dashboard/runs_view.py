"""Load the list of runs, the configuration and models of one run, and the differences between two runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from typing import Any

import charter
from charter.runs import SHARED_LABELS_SQL, SHARED_RECORDS_SQL, parse_settings
from charter.runs import load_runs as load_run_rows
from engine.settings import Settings
from engine.store import QueryFunction

_URL_CREDENTIALS_PATTERN = re.compile(r"(?<=//)[^/@\s]*@")  # matches user:password@ in a URL, which a page must not show
_PACKAGES = ("duckdb", "fastavro", "kafka-python", "pydantic", "torch", "transformers", "trl")


def load_runs(query: QueryFunction) -> list[dict[str, Any]]:
    """Return all configurations of all runs, newest first, with their record counts."""

    return list(reversed(load_run_rows(lambda sql: query(sql, (), 500).to_dicts())))


def load_run_ids(query: QueryFunction) -> dict[str, Any]:
    """Return the ids of the runs, newest first. Runs of evaluations come after all other runs."""
    sql = "SELECT run_id FROM raw.runs GROUP BY 1 ORDER BY bool_or(settings ->> '$.evaluation_run.name' IS NOT NULL), max(commit_seq) DESC"
    return {"run_ids": [run for (run,) in query(sql, (), 200).rows]}


def load_run(query: QueryFunction, run: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest, settings, models and changes of one run. `manifest` is None if the run is not in the database."""
    sql = "SELECT * FROM raw.runs WHERE run_id = ? AND NOT is_duplicate ORDER BY commit_seq DESC"
    manifests = query(sql, [run], 20).to_dicts()
    if not manifests:
        return {"run": run, "manifest": None, "run_ids": load_run_ids(query)["run_ids"]}
    manifest = manifests[0]
    settings = _flatten_settings(manifest["settings"])
    other = parameters.get("compare_with", "")
    return {
        "run": run,
        "manifest": {name: manifest[name] for name in ("record_id", "created_at", "constitution", "charter_version")},
        "constitution_text": manifest["constitution_text"],
        "settings": settings,
        "changes": _list_changes(manifests),
        "models": _load_models(query, run),
        "run_ids": load_run_ids(query)["run_ids"],
        "compare_with": other,
        "differences": _compare_runs(query, run, other) if other else None,
    }


def _flatten_settings(text: str) -> dict[str, Any]:
    """Return the settings of a manifest as {dotted name: value}, without the credentials in URLs."""

    return {name: _strip_credentials(value) for name, value in parse_settings(text).items()}


def _strip_credentials(value: Any) -> Any:
    return _URL_CREDENTIALS_PATTERN.sub("", value) if isinstance(value, str) else value


def _list_changes(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings that changed between consecutive manifests of a run, newest first."""
    changes = []
    for newer, older in pairwise(manifests):
        after, before = _flatten_settings(newer["settings"]), _flatten_settings(older["settings"])
        after["constitution"], before["constitution"] = newer["constitution"], older["constitution"]
        after["charter"], before["charter"] = newer["charter_version"], older["charter_version"]
        changes.append({"changed_at": newer["created_at"], "settings": _diff_settings(before, after)})
    return changes


def _diff_settings(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"setting": name, "before": before.get(name), "after": after.get(name)}
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _compare_runs(query: QueryFunction, run: str, other: str) -> dict[str, Any]:
    """Return the differences between two runs in settings, records and labels. `exists` is False if `other` does not exist."""

    rows = query("SELECT * FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC", [other], 1).to_dicts()
    if not rows:
        return {"exists": False}
    manifest = query("SELECT * FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC", [run], 1).to_dicts()[0]
    sides = []
    for row in (manifest, rows[0]):
        settings = {k: v for k, v in _flatten_settings(row["settings"]).items() if k != "run.id"}
        constitution = row["constitution"] or {}
        settings["constitution"] = f"{constitution.get('name')} {constitution.get('version')}"
        settings["constitution hash"] = constitution.get("hash")
        sides.append(settings | {"charter": row["charter_version"]})
    return {
        "exists": True,
        "settings": _diff_settings(sides[0], sides[1]),
        "record_counts": query(SHARED_RECORDS_SQL, [run, other]).to_dicts(),
        "labels": query(SHARED_LABELS_SQL, [run, other]).to_dicts(),
    }


def _load_models(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """Return the models, policy versions and prompt templates of the records of each stage. Human labels have no model."""
    parts = [
        f"""SELECT '{stage}' AS stage, model, policy_version, template_hash, count(*) AS records
            FROM raw.{table} WHERE run_id = $run AND model IS NOT NULL GROUP BY ALL"""
        for stage, table in (
            ("respond", "responses"),
            ("critique", "critiques"),
            ("revise", "revisions"),
            ("judge", "preferences"),
            ("grade", "grades"),
        )
    ]
    return query(f"{' UNION ALL '.join(parts)} ORDER BY stage, policy_version", {"run": run}, 200).to_dicts()


def describe_environment(settings: Settings) -> dict[str, dict[str, str]]:
    """Return the paths of the data on this machine and the versions of the installed packages."""
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
