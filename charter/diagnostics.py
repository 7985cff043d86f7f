"""Run the checks of `charter doctor`: Python, packages, data folder, database, log, models, constitution."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec

import httpx
from packaging.requirements import Requirement

from charter.connect import is_log_missing, open_bus_from_settings, open_store
from charter.installation import get_install_command, is_installed
from charter.topic_check import find_topic_problems
from constitutions.loader import ConstitutionError, load_constitution
from engine.bus import KAFKA_SCHEME
from engine.bus.port import Bus
from engine.bus.security import sends_secret_unencrypted
from engine.bus.token_statistics import TOKEN_STATISTICS
from engine.errors import CharterError
from engine.models import SCRIPTED_SPEC, resolve_model_folder, smollm2
from engine.models.chat_api import ServerCapabilities
from engine.models.endpoint import get_api_key_variable, open_endpoint
from engine.settings import ModelsSettings, Settings
from engine.store import FORMAT_VERSION
from engine.text import format_count
from schemas.topics import TOPICS

_RECOMMENDED_FREE_BYTES = 5 * 1024**3  # enough for the database, the log and a few checkpoints of a small model
_REQUIRED_FREE_BYTES = 500 * 1024**2
_REQUEST_TIMEOUT_S = 5.0
_PROBE_TIMEOUT_S = 60.0
_NO_LIST_STATUSES = (404, 405, 501)  # the server has no list of models
_MODEL_ROLES = ("policy", "critic", "judge", "generator")


@dataclass(frozen=True)
class CheckResult:
    """Holds the result of one check. `state` is ok, warn or fail. `fix` is the action that the user should take."""

    check: str
    state: str
    detail: str
    fix: str = ""


def run_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of all checks. Each check runs after the checks that it depends on."""
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
    """Yield the results of one check. If the check raises a CharterError, yield a failed result."""
    try:
        yield from check(settings)
    except (CharterError, ConstitutionError) as error:
        yield CheckResult(name, "fail", "; ".join(part for part in (error.what, error.why) if part), error.fix)


def _check_python(settings: Settings) -> Iterator[CheckResult]:
    is_supported = sys.version_info >= (3, 11)
    fix = "" if is_supported else "use Python 3.11 or newer"
    yield CheckResult("python", "ok" if is_supported else "fail", f"{sys.version.split()[0]} at {sys.executable}", fix)


def _check_packages(settings: Settings) -> Iterator[CheckResult]:
    """Compare the requirements of Charter with the installed packages. A missing optional package is only a warning."""
    if not is_installed():
        detail = "Charter is not installed, so its requirements are unknown"
        yield CheckResult("packages", "warn", detail, f"type: {get_install_command('train')}")
        return
    problems: list[str] = []
    missing_extras: list[str] = []
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
            (missing_extras if extra else problems).append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} does not match {requirement.specifier}")
    if problems:
        yield CheckResult("packages", "fail", ", ".join(problems), f"type: {get_install_command('train')}")
    elif missing_extras:
        fix = f"for local models and training, type: {get_install_command('train')}"
        yield CheckResult("packages", "warn", f"no local models and no training: {', '.join(missing_extras)}", fix)
    else:
        yield CheckResult("packages", "ok", f"{count} packages with supported versions{_describe_device()}")


def _describe_device() -> str:
    """Return the device that torch uses. Return an empty string if torch is not installed."""
    if find_spec("torch") is None:
        return ""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"
    return f"; torch {torch.__version__} on {device}"


def _check_data_folder(settings: Settings) -> Iterator[CheckResult]:
    """Check that the data folder is writable and its disk has enough free space."""
    path = settings.folder.resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        detail = f"{existing} is not writable" if existing.is_dir() else f"{existing} is not a folder"
        yield CheckResult("data folder", "fail", detail, "use another folder: --data FOLDER, or change its permissions")
        return
    free = shutil.disk_usage(existing).free
    state = "ok" if free > _RECOMMENDED_FREE_BYTES else "warn" if free > _REQUIRED_FREE_BYTES else "fail"
    fix = "" if state == "ok" else "free some space, or use a larger disk: --data FOLDER"
    suffix = "" if existing == path else " (does not exist yet)"
    yield CheckResult("data folder", state, f"{path}, {free / 1024**3:.1f} GB free{suffix}", fix)


def _check_database(settings: Settings) -> Iterator[CheckResult]:
    """Check that the database opens and has the current format. Count the dead letters that were not retried."""
    store = open_store(settings)
    if not store.path.exists():
        yield CheckResult("database", "ok", f"{store.path} does not exist yet; the sink creates it")
        return
    rows = store.query("SELECT coalesce(sum(records), 0) FROM pipeline_status", lock_timeout_s=_REQUEST_TIMEOUT_S).rows
    size = store.path.stat().st_size / 1024**2
    yield CheckResult(
        "database", "ok", f"{store.path}, format {FORMAT_VERSION}, {format_count(rows[0][0], 'records')}, {size:,.0f} MB"
    )
    pending = "SELECT count(*) FROM dead_letters WHERE record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"
    ((count,),) = store.query(pending, lock_timeout_s=_REQUEST_TIMEOUT_S).rows
    yield CheckResult(
        "dead letters", "warn" if count else "ok", f"{count}" if count else "none", "type: charter dlq list" if count else ""
    )


def _check_log(settings: Settings) -> Iterator[CheckResult]:
    """Check that the log is reachable, that all topics exist, and that all replicas are in sync."""
    if is_log_missing(settings):
        yield CheckResult("log", "ok", f"the embedded log in {settings.bus_address} does not exist yet")
        return
    bus = open_bus_from_settings(settings)
    try:
        yield from _describe_login(settings)
        yield from _check_topics(bus, settings)
    finally:
        bus.close()


def _describe_login(settings: Settings) -> Iterator[CheckResult]:
    """Report how the open log was logged in to. Report nothing for the embedded log, and for Kafka without TLS and SASL."""
    options = settings.bus
    if not settings.bus_address.startswith(KAFKA_SCHEME) or options.security_protocol == "PLAINTEXT":
        return
    detail = str(options.security_protocol)
    if detail.startswith("SASL"):
        detail += f" with {options.sasl_mechanism}"
    if options.ssl_certfile:
        detail += ", with a client certificate"
    if (remaining_s := TOKEN_STATISTICS.get_remaining_s()) is not None:
        detail += f"; the token is valid for {remaining_s:,.0f} s"
    if sends_secret_unencrypted(options):
        detail += "; the password or the token is sent without encryption"
        yield CheckResult("login", "warn", detail, "set bus.security_protocol to SASL_SSL")
    else:
        yield CheckResult("login", "ok", detail)


def _check_topics(bus: Bus, settings: Settings) -> Iterator[CheckResult]:
    topic_ids = bus.topic_ids(list(TOPICS))
    missing = [name for name in TOPICS if name not in topic_ids]
    log = f"{settings.bus_address} is reachable, cluster {bus.cluster_id}"
    if missing:
        yield CheckResult(
            "log",
            "warn",
            f"{log}; {format_count(len(missing), 'topics', 'are')} missing: {', '.join(missing)}",
            "type: charter topics create",
        )
        return
    yield CheckResult("log", "ok", f"{log}, {len(topic_ids)} topics")
    for problem in find_topic_problems(bus):
        yield CheckResult("topics", "fail" if problem.is_fatal else "warn", f"{problem.what}: {problem.why}", problem.fix)
    out_of_sync = [d.name for d in bus.describe_topics(list(TOPICS)) if d.in_sync_replicas < d.replicas]
    if out_of_sync:
        fix = "check the brokers: one may be down or slow"
        yield CheckResult("replicas", "warn", f"out of sync: {', '.join(out_of_sync)}", fix)


def _check_models(settings: Settings) -> Iterator[CheckResult]:
    """Check each model once. A model must be a folder with weights, a model in the cache, or a model on a reachable server."""
    checked: set[str] = set()
    for role in _MODEL_ROLES:
        spec = getattr(settings.models, role) or settings.models.policy
        if spec not in checked:
            checked.add(spec)
            yield from _run_check(f"model {role}", partial(_check_model, spec, role), settings)


def _check_model(spec: str, role: str, settings: Settings) -> Iterator[CheckResult]:
    name = f"model {role}"
    if spec.startswith(("http://", "https://")):
        yield _check_model_server(name, spec, settings.models)
        return
    if spec == SCRIPTED_SPEC:
        yield CheckResult(name, "warn", "the scripted model is a fake model for tests", "set models.policy to a real model")
        return
    if spec == "smollm2":
        is_cached = (smollm2.get_cache_folder() / "models" / smollm2.MODEL_NAME.lower() / "config.json").exists()
        source = "ready in the cache" if is_cached else f"converted on first use from {smollm2.find_gguf_file().name}"
        yield CheckResult(name, "ok", f"smollm2, {source}")
        return
    folder = resolve_model_folder(spec)
    weights = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights) / 1024**2
    fix = "" if weights else "save the model as safetensors; pickled weights are not loaded, because they can run code"
    yield CheckResult(
        name, "ok" if weights else "fail", f"{folder}, {format_count(len(weights), 'safetensors files')}, {size:,.0f} MB", fix
    )


def _check_model_server(name: str, spec: str, options: ModelsSettings) -> CheckResult:
    """Check that an OpenAI-compatible server is reachable and serves the model. Report the capabilities of the server.

    A server without a list of models is only asked for a completion. The API key is never printed.
    """
    endpoint = open_endpoint(
        spec,
        api_key_env=options.api_key_env,
        timeout_s=min(_PROBE_TIMEOUT_S, options.timeout_s),
        send_seed=options.send_seed,
        stream=options.stream,
    )
    url, model = endpoint.url, endpoint.id
    try:
        response = endpoint.client.get(f"{url}/models", timeout=_REQUEST_TIMEOUT_S)
        status = response.status_code
        if response.is_redirect:
            raise endpoint.make_redirect_error(status, response.headers.get("location", ""), "models")
        if status not in (200, *_NO_LIST_STATUSES):
            variable = get_api_key_variable(url, options.api_key_env) or "that models.api_key_env names"
            fix = (
                f"put the API key in the environment variable {variable}" if status in (401, 403) else "check the server's log"
            )
            detail = f"{url} returned status {status}: {endpoint.sanitize_error_text(response.content)}"
            return CheckResult(name, "fail", detail.rstrip(": "), fix)
        served = [model] if status in _NO_LIST_STATUSES else [str(entry["id"]) for entry in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        detail = f"{url} is not a reachable model server: {type(error).__name__}: {endpoint.sanitize_error_text(str(error))}"
        return CheckResult(name, "fail", detail.rstrip(": "), f"start the server, or correct models.{name.split()[-1]}")
    if model not in served:
        detail = f"{url} serves {', '.join(served) or 'nothing'}, not {model}"
        return CheckResult(name, "fail", detail, f"set models.{name.split()[-1]} to {url}#NAME with a name that it serves")
    endpoint.retry_timeout_s = _REQUEST_TIMEOUT_S
    return CheckResult(name, "ok", f"{url} serves {model}: {_format_capabilities(endpoint.server_capabilities)}")


def _format_capabilities(capabilities: ServerCapabilities) -> str:
    """Return the capabilities of a server, with the terms that docs/models.md defines."""
    return ", ".join([
        "prefills" if capabilities.prefill_body is not None else "no prefills",
        f"{capabilities.max_top_logprobs} top log-probabilities" if capabilities.max_top_logprobs else "options by votes",
        "token ids" if capabilities.token_ids_body is not None else "no token ids",
        "streams" if capabilities.stream_body is not None else "no streams",
        "accepts prompts as token ids" if capabilities.accepts_token_ids else "accepts prompts as messages",
        *(["ignores seeds"] if capabilities.ignores_seed else []),
    ])  # fmt: skip


def _check_constitution(settings: Settings) -> Iterator[CheckResult]:
    constitution = load_constitution(settings.run.constitution)
    counts = f"{format_count(len(constitution.critique), 'critique principles')}, {format_count(len(constitution.judge), 'judge principles')}"
    yield CheckResult("constitution", "ok", f"{constitution.name} {constitution.version}, {counts}")
