"""`charter doctor`: looks at everything that a run here depends on, and says what to do about what is wrong.

Each check looks, and changes nothing: it creates no folder, log or topic, loads no weights and takes no lock for long.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from charter.options import common, json_option, print_rows

if TYPE_CHECKING:
    from engine.bus.port import Bus
    from engine.models.endpoint import Dialect
    from engine.settings import Settings

ROOM_BYTES = 5 * 1024**3  # a run's database, log and a few checkpoints of a small model
SMALLEST_BYTES = 500 * 1024**2
ASK_S = 5.0
LOCAL_ROLES = ("policy", "critic", "judge")
MARKS = {"ok": "ok", "warn": "look", "fail": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """What one check found: `state` is ok, warn or fail; `fix` says what to type."""

    check: str
    state: str
    found: str
    fix: str = ""


@click.command()
@json_option
@common
def doctor(settings: Settings, as_json: bool) -> None:
    """Look for what is missing, and say what to fix.

    Python and packages, disk, database, log, models and constitution. Exit code 1 if one fails.

    \b
    Examples:
      charter doctor
      charter doctor --bus kafka://localhost:9092 --json
    """
    findings = list(examine(settings))
    if as_json:
        print_rows(
            ["check", "state", "found", "fix"],
            [(finding.check, finding.state, finding.found, finding.fix) for finding in findings],
            True,
        )
    else:
        tell(findings)
    sys.exit(any(finding.state == "fail" for finding in findings))


def tell(findings: list[Finding]) -> None:
    from charter.text import inert

    longest = max(len(finding.check) for finding in findings)
    for finding in findings:
        click.echo(f"{MARKS[finding.state]:<5} {finding.check:<{longest}}  {inert(finding.found)}")
        if finding.fix:
            click.echo(f"{'':<5} {'':<{longest}}  -> {inert(finding.fix)}")


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding, in the order in which things depend on each other."""
    checks: list[tuple[str, Callable[[Settings], Iterator[Finding]]]] = [
        ("python", python),
        ("packages", packages),
        ("folder", folder),
        ("database", database),
        ("log", log_of),
        ("models", models),
        ("constitution", constitution),
    ]
    for name, check in checks:
        yield from guarded(name, check, settings)


def guarded(name: str, check: Callable[[Settings], Iterator[Finding]], settings: Settings) -> Iterator[Finding]:
    """The check's findings; an error of ours is a finding too."""
    from constitutions.loader import ConstitutionError
    from engine.errors import CharterError

    try:
        yield from check(settings)
    except (CharterError, ConstitutionError) as error:
        yield Finding(name, "fail", "; ".join(part for part in (error.what, error.why) if part), error.fix)


def python(settings: Settings) -> Iterator[Finding]:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "fail", found, "" if good else "use Python 3.11 or newer")


def packages(settings: Settings) -> Iterator[Finding]:
    """Each requirement of the installed Charter against what is installed; extras only warn."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wrong: list[str] = []
    extras: list[str] = []
    count = 0
    for text in metadata.requires("charter") or []:
        requirement = Requirement(text)
        extra = next((name for name in ("train", "dev") if requirement.marker and name in str(requirement.marker)), "")
        if extra == "dev" or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            (extras if extra else wrong).append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    if wrong:
        yield Finding("packages", "fail", ", ".join(wrong), "type: pip install -e '.[train]'")
    elif extras:
        fix = "for local models and training type: pip install -e '.[train]'"
        yield Finding("packages", "warn", f"no local models, no training: {', '.join(extras)}", fix)
    else:
        yield Finding("packages", "ok", f"{count} packages in their ranges{processor()}")


def processor() -> str:
    """What torch computes on, where it is installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return ""
    import torch

    on = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} processor cores, no GPU"
    return f"; torch {torch.__version__} on {on}"


def folder(settings: Settings) -> Iterator[Finding]:
    """Whether the data folder can be written, and has room."""
    path = settings.folder.resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = f"{there} cannot be written" if there.is_dir() else f"{there} is no folder"
        yield Finding("data folder", "fail", found, "give another: --data FOLDER, or mend its permissions")
        return
    free = shutil.disk_usage(there).free
    state = "ok" if free > ROOM_BYTES else "warn" if free > SMALLEST_BYTES else "fail"
    fix = "" if state == "ok" else "make room, or use a larger disk: --data FOLDER"
    yield Finding(
        "data folder", state, f"{path}, {free / 1024**3:.1f} GB free" + ("" if there == path else " (not there yet)"), fix
    )


def database(settings: Settings) -> Iterator[Finding]:
    from charter.pipeline import store_of
    from engine.tables import VERSION

    store = store_of(settings)
    if not store.path.exists():
        yield Finding("database", "ok", f"{store.path} is not there yet; the sink makes it")
        return
    rows = store.query("SELECT coalesce(sum(records), 0) FROM pipeline_status", wait_s=ASK_S).rows
    size = store.path.stat().st_size / 1024**2
    yield Finding("database", "ok", f"{store.path}, format {VERSION}, {rows[0][0]:,} records, {size:,.0f} MB")
    open_letters = "SELECT count(*) FROM dead_letters WHERE record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"
    ((count,),) = store.query(open_letters, wait_s=ASK_S).rows
    yield Finding(
        "dead letters", "warn" if count else "ok", f"{count}" if count else "none", "type: charter dlq" if count else ""
    )


def log_of(settings: Settings) -> Iterator[Finding]:
    """Whether the log answers, and has every topic as the settings want it."""
    from engine.bus import KAFKA

    if not settings.bus_address.startswith(KAFKA) and not (Path(settings.bus_address) / "log.sqlite").exists():
        yield Finding("log", "ok", f"the embedded log in {settings.bus_address} is not there yet")
        return
    from charter.pipeline import open_settings

    bus = open_settings(settings)
    try:
        yield from topics(bus, settings)
    finally:
        bus.close()


def topics(bus: Bus, settings: Settings) -> Iterator[Finding]:
    from schemas.topics import TOPICS

    there = bus.topic_ids(list(TOPICS))
    missing = [name for name in TOPICS if name not in there]
    where = f"{settings.bus_address} answers, cluster {bus.cluster_id}"
    if missing:
        yield Finding(
            "log", "warn", f"{where}; {len(missing)} topics are missing: {', '.join(missing)}", "type: charter topics create"
        )
        return
    yield Finding("log", "ok", f"{where}, {len(there)} topics")
    behind = [d.name for d in bus.describe(list(TOPICS)) if d.in_sync < d.replicas]
    if behind:
        yield Finding("replicas", "warn", f"not in step: {', '.join(behind)}", "look at the brokers: a lost one, or a slow one")


def models(settings: Settings) -> Iterator[Finding]:
    """Each role's model: a folder with weights, a model in the cache, or a server that answers."""
    seen: set[str] = set()
    for role in LOCAL_ROLES:
        spec = getattr(settings.models, role) or settings.models.policy
        if spec not in seen:
            seen.add(spec)
            yield from guarded(f"model {role}", lambda _, spec=spec, role=role: model(spec, role, settings), settings)  # type: ignore[misc]


def model(spec: str, role: str, settings: Settings) -> Iterator[Finding]:
    from engine.models import SCRIPTED, model_folder

    name = f"model {role}"
    if spec.startswith(("http://", "https://")):
        yield server(name, spec, settings.models.api_key_env)
        return
    if spec == SCRIPTED:
        yield Finding(name, "warn", "the scripted model is a fake for tests", "set models.policy to a real model")
        return
    if spec == "smollm2":
        from engine.models import smollm2

        ready = (smollm2.cache() / "models" / smollm2.NAME.lower() / "config.json").exists()
        found = "smollm2, ready in the cache" if ready else f"smollm2, to be converted once from {smollm2.gguf().name}"
        yield Finding(name, "ok", found)
        return
    place = model_folder(spec)
    weights = sorted(place.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights) / 1024**2
    fix = "" if weights else "save the model as safetensors; pickled weights are never loaded"
    yield Finding(name, "ok" if weights else "fail", f"{place}, {len(weights)} safetensors files, {size:,.0f} MB", fix)


def server(name: str, spec: str, api_key_env: str) -> Finding:
    """Whether an OpenAI-compatible server answers and serves the model, and what it can do; the key is never shown."""
    import httpx

    from engine.models.endpoint import key_variable, open_endpoint

    asked = open_endpoint(spec, api_key_env=api_key_env)
    url, wanted = asked.url, asked.id
    try:
        answer = asked.client.get(f"{url}/models", timeout=ASK_S)
        answer.raise_for_status()
        served = [str(entry["id"]) for entry in answer.json()["data"]]
    except httpx.HTTPStatusError as error:
        refused = error.response.status_code in (401, 403)
        variable = key_variable(url, api_key_env) or "that models.api_key_env names"
        fix = f"put the key into the variable {variable}" if refused else "look at the server's log"
        return Finding(name, "fail", f"{url} answers with status {error.response.status_code}", fix)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Finding(
            name,
            "fail",
            f"{url} does not answer as a model server: {type(error).__name__}",
            "start the server, or mend models.*",
        )
    if wanted not in served:
        return Finding(
            name,
            "fail",
            f"{url} serves {', '.join(served) or 'nothing'}, not {wanted}",
            f"write models.{name.split()[-1]} as {url}#NAME",
        )
    asked.deadline_s = ASK_S
    return Finding(name, "ok", f"{url} serves {wanted}: {able(asked.dialect)}")


def able(dialect: Dialect) -> str:
    """What a server was found to do, in the words of docs/models.md."""
    return ", ".join([
        "prefills" if dialect.begun is not None else "no prefills",
        f"{dialect.shown} top log-probabilities" if dialect.shown else "options by votes",
        "token ids" if dialect.token_ids is not None else "no token ids",
    ])  # fmt: skip


def constitution(settings: Settings) -> Iterator[Finding]:
    from constitutions.loader import load

    found = load(settings.run.constitution)
    counts = f"{len(found.critique)} principles for critique, {len(found.judging)} for judging"
    yield Finding("constitution", "ok", f"{found.name} {found.version}, {counts}")


VERBS = (doctor,)
