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
from engine.store import Ask

if TYPE_CHECKING:
    from engine.settings import Settings

LOGIN = re.compile(r"(?<=//)[^/@\s]*@")  # of a URL: never shown
PACKAGES = ("duckdb", "fastavro", "kafka-python", "pydantic", "torch", "transformers", "trl")


def listed(ask: Ask) -> list[dict[str, Any]]:
    """Every run, newest first, with what it is made of and how many records it has."""
    from charter.replay import RUNS

    return list(reversed(ask(RUNS, (), 500).records()))


def names(ask: Ask) -> dict[str, Any]:
    """The runs' ids, newest first."""
    sql = "SELECT run_id FROM raw.runs GROUP BY 1 ORDER BY max(commit_seq) DESC"
    return {"runs": [run for (run,) in ask(sql, (), 200).rows]}


def card(ask: Ask, run: str, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Everything about one run; `manifest` is None when there is no such run (any more)."""
    sql = "SELECT * FROM raw.runs WHERE run_id = ? AND NOT is_duplicate ORDER BY commit_seq DESC"
    manifests = ask(sql, [run], 20).records()
    if not manifests:
        return {"run": run, "manifest": None, "runs": names(ask)["runs"]}
    manifest = manifests[0]
    settings = flat_settings(manifest["settings"])
    other = wanted.get("with", "")
    return {
        "run": run,
        "manifest": {name: manifest[name] for name in ("record_id", "created_at", "constitution", "charter_version")},
        "constitution_text": manifest["constitution_text"],
        "settings": settings,
        "changes": changes(manifests),
        "models": models(ask, run),
        "runs": names(ask)["runs"],
        "with": other,
        "differences": compared(ask, run, other) if other else None,
    }


def flat_settings(text: str) -> dict[str, Any]:
    """The settings of a manifest as dotted names, without the logins of URLs."""
    from charter.replay import flat

    return {name: without_login(value) for name, value in flat(json.loads(text)).items()}


def without_login(value: Any) -> Any:
    return LOGIN.sub("", value) if isinstance(value, str) else value


def changes(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What changed each time that the run was started with another configuration, newest first."""
    found = []
    for newer, older in pairwise(manifests):
        after, before = flat_settings(newer["settings"]), flat_settings(older["settings"])
        after["constitution"], before["constitution"] = newer["constitution"], older["constitution"]
        after["charter"], before["charter"] = newer["charter_version"], older["charter_version"]
        found.append({"at": newer["created_at"], "settings": difference(before, after)})
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"setting": name, "before": before.get(name), "after": after.get(name)}
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def compared(ask: Ask, run: str, other: str) -> dict[str, Any]:
    """What two runs differ in: configuration, records, labels. `found` is False when the other run is not there."""
    from charter.replay import LABELS, SHARED

    rows = ask("SELECT * FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC", [other], 1).records()
    if not rows:
        return {"found": False}
    mine = ask("SELECT * FROM raw.runs WHERE run_id = ? ORDER BY commit_seq DESC", [run], 1).records()[0]
    sides = []
    for manifest in (mine, rows[0]):
        settings = {
            k: v for k, v in flat_settings(manifest["settings"]).items() if k != "run.id" and not k.startswith("replay.")
        }
        constitution = manifest["constitution"] or {}
        settings["constitution"] = f"{constitution.get('name')} {constitution.get('version')}"
        settings["constitution hash"] = constitution.get("hash")
        sides.append(settings | {"charter": manifest["charter_version"]})
    return {
        "found": True,
        "settings": difference(sides[0], sides[1]),
        "shared": ask(SHARED, [run, other]).records(),
        "labels": ask(LABELS, [run, other]).records(),
    }


def models(ask: Ask, run: str) -> list[dict[str, Any]]:
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
    return ask(f"{' UNION ALL '.join(parts)} ORDER BY stage, policy_version", {"run": run}, 200).records()


def here(settings: Settings) -> dict[str, dict[str, str]]:
    """Where everything lies on this machine, and the versions of what it runs on."""
    folder = settings.folder.resolve()
    versions = {"charter": charter.__version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "paths": {
            "database": str(folder / "charter.duckdb"),
            "log": without_login(settings.bus_address),
            "checkpoints": str(folder / "checkpoints"),
        },
        "versions": versions,
    }
