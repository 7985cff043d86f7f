"""The checks of `charter doctor`: installation, data folder, database, log, models, constitution."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import httpx
from packaging.requirements import Requirement

from charter.connect import open_bus_from_settings, open_store
from constitutions.loader import ConstitutionError, load_constitution
from engine.bus import KAFKA_SCHEME
from engine.bus.port import Bus
from engine.errors import CharterError
from engine.models import SCRIPTED_SPEC, resolve_model_folder
from engine.models.endpoint import ServerCapabilities, get_api_key_variable, open_endpoint
from engine.settings import Settings
from engine.tables import FORMAT_VERSION
from schemas.topics import TOPICS

_RECOMMENDED_FREE_BYTES = 5 * 1024**3  # a run's database, log and a few checkpoints of a small model
_REQUIRED_FREE_BYTES = 500 * 1024**2
_REQUEST_TIMEOUT_S = 5.0
_MODEL_ROLES = ("policy", "critic", "judge")


@dataclass(frozen=True)
class CheckResult:
    """What one check found: `state` is ok, warn or fail; `fix` says what to type."""

    check: str
    state: str
    detail: str
    fix: str = ""


def run_checks(settings: Settings) -> Iterator[CheckResult]:
    """Every finding, in the order in which things depend on each other."""
    checks: list[tuple[str, Callable[[Settings], Iterator[CheckResult]]]] = [
        ("python", _check_python),
        ("packages", _check_packages),
        ("folder", _check_data_folder),
        ("database", _check_database),
        ("log", _check_log),
        ("models", _check_models),
        ("constitution", _check_constitution),
    ]
    for name, check in checks:
        yield from _run_check(name, check, settings)


def _run_check(name: str, check: Callable[[Settings], Iterator[CheckResult]], settings: Settings) -> Iterator[CheckResult]:
    """The check's findings; an error of ours is a finding too."""

    try:
        yield from check(settings)
    except (CharterError, ConstitutionError) as error:
        yield CheckResult(name, "fail", "; ".join(part for part in (error.what, error.why) if part), error.fix)


def _check_python(settings: Settings) -> Iterator[CheckResult]:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    good = sys.version_info >= (3, 11)
    yield CheckResult("python", "ok" if good else "fail", found, "" if good else "use Python 3.11 or newer")


def _check_packages(settings: Settings) -> Iterator[CheckResult]:
    """Each requirement of the installed Charter against what is installed; extras only warn."""

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
        yield CheckResult("packages", "fail", ", ".join(wrong), "type: pip install -e '.[train]'")
    elif extras:
        fix = "for local models and training type: pip install -e '.[train]'"
        yield CheckResult("packages", "warn", f"no local models, no training: {', '.join(extras)}", fix)
    else:
        yield CheckResult("packages", "ok", f"{count} packages in their ranges{_describe_device()}")


def _describe_device() -> str:
    """What torch computes on, where it is installed."""

    if find_spec("torch") is None:
        return ""
    import torch

    on = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} processor cores, no GPU"
    return f"; torch {torch.__version__} on {on}"


def _check_data_folder(settings: Settings) -> Iterator[CheckResult]:
    """Whether the data folder can be written, and has room."""
    path = settings.folder.resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = f"{there} cannot be written" if there.is_dir() else f"{there} is no folder"
        yield CheckResult("data folder", "fail", found, "give another: --data FOLDER, or mend its permissions")
        return
    free = shutil.disk_usage(there).free
    state = "ok" if free > _RECOMMENDED_FREE_BYTES else "warn" if free > _REQUIRED_FREE_BYTES else "fail"
    fix = "" if state == "ok" else "make room, or use a larger disk: --data FOLDER"
    yield CheckResult(
        "data folder", state, f"{path}, {free / 1024**3:.1f} GB free" + ("" if there == path else " (not there yet)"), fix
    )


def _check_database(settings: Settings) -> Iterator[CheckResult]:

    store = open_store(settings)
    if not store.path.exists():
        yield CheckResult("database", "ok", f"{store.path} is not there yet; the sink makes it")
        return
    rows = store.query("SELECT coalesce(sum(records), 0) FROM pipeline_status", lock_timeout_s=_REQUEST_TIMEOUT_S).rows
    size = store.path.stat().st_size / 1024**2
    yield CheckResult("database", "ok", f"{store.path}, format {FORMAT_VERSION}, {rows[0][0]:,} records, {size:,.0f} MB")
    open_letters = "SELECT count(*) FROM dead_letters WHERE record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"
    ((count,),) = store.query(open_letters, lock_timeout_s=_REQUEST_TIMEOUT_S).rows
    yield CheckResult(
        "dead letters", "warn" if count else "ok", f"{count}" if count else "none", "type: charter dlq" if count else ""
    )


def _check_log(settings: Settings) -> Iterator[CheckResult]:
    """Whether the log answers, and has every topic as the settings want it."""

    if not settings.bus_address.startswith(KAFKA_SCHEME) and not (Path(settings.bus_address) / "log.sqlite").exists():
        yield CheckResult("log", "ok", f"the embedded log in {settings.bus_address} is not there yet")
        return

    bus = open_bus_from_settings(settings)
    try:
        yield from _check_topics(bus, settings)
    finally:
        bus.close()


def _check_topics(bus: Bus, settings: Settings) -> Iterator[CheckResult]:

    there = bus.topic_ids(list(TOPICS))
    missing = [name for name in TOPICS if name not in there]
    where = f"{settings.bus_address} answers, cluster {bus.cluster_id}"
    if missing:
        yield CheckResult(
            "log", "warn", f"{where}; {len(missing)} topics are missing: {', '.join(missing)}", "type: charter topics create"
        )
        return
    yield CheckResult("log", "ok", f"{where}, {len(there)} topics")
    behind = [d.name for d in bus.describe_topics(list(TOPICS)) if d.in_sync_replicas < d.replicas]
    if behind:
        yield CheckResult(
            "replicas", "warn", f"not in step: {', '.join(behind)}", "look at the brokers: a lost one, or a slow one"
        )


def _check_models(settings: Settings) -> Iterator[CheckResult]:
    """Each role's model: a folder with weights, a model in the cache, or a server that answers."""
    seen: set[str] = set()
    for role in _MODEL_ROLES:
        spec = getattr(settings.models, role) or settings.models.policy
        if spec not in seen:
            seen.add(spec)
            yield from _run_check(f"model {role}", lambda _, spec=spec, role=role: _check_model(spec, role, settings), settings)  # type: ignore[misc]


def _check_model(spec: str, role: str, settings: Settings) -> Iterator[CheckResult]:

    name = f"model {role}"
    if spec.startswith(("http://", "https://")):
        yield _check_model_server(name, spec, settings.models.api_key_env)
        return
    if spec == SCRIPTED_SPEC:
        yield CheckResult(name, "warn", "the scripted model is a fake for tests", "set models.policy to a real model")
        return
    if spec == "smollm2":
        from engine.models import smollm2

        ready = (smollm2.get_cache_folder() / "models" / smollm2.MODEL_NAME.lower() / "config.json").exists()
        found = (
            "smollm2, ready in the cache" if ready else f"smollm2, to be converted once from {smollm2.find_gguf_file().name}"
        )
        yield CheckResult(name, "ok", found)
        return
    place = resolve_model_folder(spec)
    weights = sorted(place.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights) / 1024**2
    fix = "" if weights else "save the model as safetensors; pickled weights are never loaded"
    yield CheckResult(name, "ok" if weights else "fail", f"{place}, {len(weights)} safetensors files, {size:,.0f} MB", fix)


def _check_model_server(name: str, spec: str, api_key_env: str) -> CheckResult:
    """Whether an OpenAI-compatible server answers and serves the model, and what it can do; the key is never shown."""

    asked = open_endpoint(spec, api_key_env=api_key_env)
    url, wanted = asked.url, asked.id
    try:
        answer = asked.client.get(f"{url}/models", timeout=_REQUEST_TIMEOUT_S)
        answer.raise_for_status()
        served = [str(entry["id"]) for entry in answer.json()["data"]]
    except httpx.HTTPStatusError as error:
        refused = error.response.status_code in (401, 403)
        variable = get_api_key_variable(url, api_key_env) or "that models.api_key_env names"
        fix = f"put the key into the variable {variable}" if refused else "look at the server's log"
        return CheckResult(name, "fail", f"{url} answers with status {error.response.status_code}", fix)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return CheckResult(
            name,
            "fail",
            f"{url} does not answer as a model server: {type(error).__name__}",
            "start the server, or mend models.*",
        )
    if wanted not in served:
        return CheckResult(
            name,
            "fail",
            f"{url} serves {', '.join(served) or 'nothing'}, not {wanted}",
            f"write models.{name.split()[-1]} as {url}#NAME",
        )
    asked.retry_timeout_s = _REQUEST_TIMEOUT_S
    return CheckResult(name, "ok", f"{url} serves {wanted}: {_format_capabilities(asked.server_capabilities)}")


def _format_capabilities(dialect: ServerCapabilities) -> str:
    """What a server was found to do, in the words of docs/models.md."""
    return ", ".join([
        "prefills" if dialect.prefill_body is not None else "no prefills",
        f"{dialect.max_top_logprobs} top log-probabilities" if dialect.max_top_logprobs else "options by votes",
        "token ids" if dialect.token_ids_body is not None else "no token ids",
    ])  # fmt: skip


def _check_constitution(settings: Settings) -> Iterator[CheckResult]:

    found = load_constitution(settings.run.constitution)
    counts = f"{len(found.critique)} principles for critique, {len(found.judge)} for judging"
    yield CheckResult("constitution", "ok", f"{found.name} {found.version}, {counts}")
