"""Evaluate policies on suites: put the prompts of the suites through the stages respond and grade, one run per policy.

The run of a policy has the id `NAME-policy-VERSION`. Its policy does not change, and its prompts have the split SUITE: they are
graded, and neither trained nor judged. `run_evaluation` can be started again after a kill: prompts, responses and grades that are on
the log are not made again.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import Any

from charter.connect import open_store
from charter.console import print_progress
from charter.evaluation.suites import HARMFUL_SOURCES, Suite, SuitePrompt, open_suite
from charter.lag import CompletionCheck
from charter.manifests import parse_evaluation, read_run_manifests
from charter.models import is_endpoint
from charter.pipeline import Evaluation, make_host
from charter.policies import parse_policy_version
from charter.progress import show_progress
from charter.stages import get_stage_inputs, get_stage_role
from charter.startup import exit_if_abandoned, start_when_ready
from consumers.grade import COMPLETION
from engine.bus.port import Bus
from engine.bus.read import read_between
from engine.erasures import ErasedPrompts
from engine.errors import UsageError
from engine.host import Host
from engine.models.interface import Model
from engine.policy import get_weights_version, index_policies, read_policy_updates
from engine.remote_checkpoints import has_checkpoint, locate_checkpoint
from engine.run_starts import ensure_run_start
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from engine.store import Store
from engine.text import format_count
from producers.replay import decode_or_none, republish_records
from schemas import ids
from schemas.records import Prompt

_STAGES = ("respond", "grade")
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_POLL_INTERVAL_S = 0.2
_QUERY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of `charter eval run`, as the user typed them.

    `limit` is the number of prompts of each suite. If `max_tokens` is None, each suite has its own limit. `columns` maps columns of
    files, as in `charter produce`.
    """

    suites: tuple[str, ...]
    policies: tuple[str, ...]
    name: str = "eval"
    transforms: tuple[str, ...] = ()
    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationPlan:
    """The suites and prompts of an evaluation, its policy versions, and the settings of its runs."""

    request: EvaluationRequest
    suites: tuple[Suite, ...]
    prompts: tuple[SuitePrompt, ...]
    versions: tuple[int, ...]
    settings: Settings

    def get_run_id(self, version: int) -> str:
        return f"{self.request.name}-policy-{version}"

    def make_evaluation(self, version: int) -> Evaluation:
        limit = self.request.max_tokens
        limits = {suite.name: limit or suite.max_tokens for suite in self.suites}
        return Evaluation(self.request.name, version, limit, limits)


# The plan


def make_evaluation_plan(settings: Settings, bus: Bus, request: EvaluationRequest) -> EvaluationPlan:
    """Read the suites and find the policies. Raise UsageError if one of them is wrong, before anything is published."""
    if not _NAME_PATTERN.fullmatch(request.name):
        raise UsageError(
            f"--name {request.name} is not a name",
            "it is part of a run id: at most 80 letters, digits, dots, underscores and hyphens, and no dot at the start",
            "type: --name eval",
        )
    if request.samples > 1 and request.temperature == 0:
        raise UsageError(
            f"--samples is {request.samples} and --temperature is 0",
            "without sampling, all responses to a prompt are the same",
            "give a temperature: --temperature 1",
        )
    suites = tuple(
        open_suite(argument, settings.evaluation.suites_folder, settings.prompts.max_chars, request.columns)
        for argument in request.suites
    )
    return plan_evaluation(settings, bus, request, suites)


def plan_evaluation(settings: Settings, bus: Bus, request: EvaluationRequest, suites: tuple[Suite, ...]) -> EvaluationPlan:
    """Make the plan of an evaluation of suites that are open. `request.suites` has no effect."""
    names = [suite.name for suite in suites]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(
            f"the suite {twice} is given twice", "each suite is evaluated once", "give each suite another name: NAME=FILE"
        )
    for suite in suites:
        if suite.unread_columns:
            print_progress(f"{suite.path}: columns without effect: {', '.join(suite.unread_columns)}")
    prompts = tuple(prompt for suite in suites for prompt in _select_prompts(suite, request))
    versions = _resolve_versions(settings, bus, request.policies)
    plan = EvaluationPlan(request, suites, prompts, versions, _make_settings(settings, request, suites))
    for version in versions:
        _require_same_evaluation(bus, plan, version)
    return plan


def _select_prompts(suite: Suite, request: EvaluationRequest) -> Iterator[SuitePrompt]:
    """Yield the prompts of a suite, and each harmful prompt with each transformation."""
    plain = suite.sample(request.limit)
    yield from plain
    harmful = [prompt for prompt in plain if prompt.is_harmful]
    if request.transforms and not harmful:
        raise UsageError(
            f"--transform changes no prompt of the suite {suite.name}",
            f"it is put on harmful prompts: of the suites xstest (unsafe), harmbench and strongreject, and of a file with the source"
            f" {' or '.join(HARMFUL_SOURCES)}",
            "evaluate this suite in another command, without --transform",
        )
    for name in request.transforms:
        yield from (prompt.transform(name) for prompt in harmful)


def _resolve_versions(settings: Settings, bus: Bus, policies: Sequence[str]) -> tuple[int, ...]:
    """Return the policy versions in the given order, each once. Raise UsageError if one does not exist or has no weights."""
    updates = read_policy_updates(bus)
    versions = tuple(dict.fromkeys(parse_policy_version(policy, updates) for policy in policies))
    known = index_policies(updates)
    for version in versions:
        if version and version not in known:
            listed = ", ".join(map(str, (0, *known)))
            raise UsageError(
                f"there is no policy {version} on the log", f"it has the policies {listed}", "type: charter policy list"
            )
        weights = get_weights_version(updates, version)
        if weights and is_endpoint(settings.models.policy) and not settings.models.weight_sync:
            raise UsageError(
                f"policy {version} cannot be evaluated",
                f"the server {settings.models.policy} gets no trained policies (models.weight_sync is not set)",
                "set models.weight_sync, or type: --policy 0",
            )
        checkpoints = settings.folder / "checkpoints"
        if weights and not has_checkpoint(known[weights].uri, checkpoints):
            raise UsageError(
                f"the weights of policy {version} are missing",
                f"{locate_checkpoint(known[weights].uri, checkpoints)} does not exist; train.save_total_limit limits the number of stored checkpoints",
                "type: charter policy list    (it lists the weights that exist)",
            )
    return versions


def _make_settings(settings: Settings, request: EvaluationRequest, suites: Sequence[Suite]) -> Settings:
    """Return the settings of the runs, except for the run id."""
    respond: dict[str, Any] = {"num_completions": request.samples, "temperature": request.temperature}
    graders = dict.fromkeys([*settings.grade.graders, *(grader for suite in suites for grader in suite.graders)])
    return settings.model_copy(
        update={
            "respond": settings.respond.model_copy(update=respond),
            "grade": settings.grade.model_copy(update={"graders": list(graders), "subjects": [COMPLETION]}),
            "run": settings.run.model_copy(update={"from_base": False}),
        }
    )


def _require_same_evaluation(bus: Bus, plan: EvaluationPlan, version: int) -> None:
    """Raise UsageError if the run exists and is no evaluation, or if it has another text for a prompt of a suite."""
    run_id, name = plan.get_run_id(version), plan.request.name
    fix = "choose another name: --name NAME"
    manifest = next((manifest for manifest in read_run_manifests(bus) if manifest.run_id == run_id), None)
    if manifest is None:
        return
    if not parse_evaluation(manifest.settings):
        raise UsageError(f"run {run_id} already exists", "it is not an evaluation, so it cannot be continued", fix)
    published = {
        (place.suite, place.item, place.transform): prompt.prompt_id
        for prompt in _read_prompts(bus, run_id)
        if (place := prompt.suite_item)
    }
    for prompt in plan.prompts:
        place = prompt.place
        if published.get((place.suite, place.item, place.transform), prompt.prompt_id) != prompt.prompt_id:
            raise UsageError(
                f"the prompt {place.item} of the suite {place.suite} has changed since the evaluation {name} began",
                f"{prompt.origin} has another text than the prompt of run {run_id}, so the results would be of two suites",
                fix,
            )


def _read_prompts(bus: Bus, run_id: str) -> Iterator[Prompt]:
    run_header, topics = ("run", run_id.encode()), [Prompt.topic]
    starts = ensure_run_start(bus, run_id).get_offsets(bus, topics)
    for raw in read_between(bus, starts, bus.end_offsets(topics), skip_deleted=True):
        if run_header in raw.headers and isinstance(record := decode_or_none(raw), Prompt):
            yield record


# The run


def run_evaluation(plan: EvaluationPlan, bus: Bus, *, wait: bool = False) -> bool:
    """Evaluate all policies, one after the other. Return False if a signal stopped the evaluation."""
    hosts: list[Host] = []

    def note_stop() -> None:
        for host in hosts:
            host.note_stop()

    stop = stop_on_signals(note_stop)
    open_models: dict[str, Model] = {}
    for version in plan.versions:
        if not _evaluate_policy(plan, bus, version, hosts, stop, open_models, wait=wait):
            return False
        if not is_endpoint(plan.settings.models.policy) and get_stage_role("grade", plan.settings) is None:
            open_models.clear()  # no grader needs this model, so the weights of the next policy get its memory
    return True


def _evaluate_policy(
    plan: EvaluationPlan,
    bus: Bus,
    version: int,
    hosts: list[Host],
    stop: Event,
    open_models: dict[str, Model],
    *,
    wait: bool,
) -> bool:
    """Publish the prompts of a policy's run, and run the stages until all are responded to and graded. Return False after a signal."""
    run_id = plan.get_run_id(version)
    settings = plan.settings.model_copy(update={"run": plan.settings.run.model_copy(update={"id": run_id})})
    run_start = ensure_run_start(bus, run_id, may_have_records=False)
    start = partial(
        make_host,
        settings,
        bus,
        _STAGES,
        sink=True,
        pinned_version=version,
        evaluation=plan.make_evaluation(version),
        open_models=open_models,
    )
    host = start_when_ready(start, wait=wait)
    hosts[:] = [host]
    print_progress(f"run {run_id}: {_publish_prompts(plan, bus, run_id)}")
    inputs = {stage: topics for stage, topics in get_stage_inputs(settings).items() if stage in _STAGES}
    groups = {f"{run_id}.{stage}": topics for stage, topics in inputs.items()}
    check = CompletionCheck(bus, groups, open_store(settings), run_start.offsets)
    is_finished = False
    with host, show_progress(f"run {run_id}", "known records") as progress:
        while not host.failure_event.is_set() and not stop.wait(_POLL_INTERVAL_S):
            check.update_progress(progress, sum(worker.num_committed for worker in host.workers))
            if check.is_done():
                is_finished = True
                break
    hosts.clear()
    exit_if_abandoned(host, 1)
    host.raise_if_failed()
    return is_finished


def _publish_prompts(plan: EvaluationPlan, bus: Bus, run_id: str) -> str:
    """Publish the prompts that the run does not have yet. Return a line with the counts."""
    erased_ids = ErasedPrompts(bus).prompt_ids
    # An erasure of a text includes the id of the text outside suites.
    kept = [prompt for prompt in plan.prompts if ids.compute_prompt_id(prompt.messages) not in erased_ids]
    counts = republish_records(bus, [prompt.make_record(run_id) for prompt in kept], run_id)
    num_erased = len(plan.prompts) - len(kept) + len(counts.erased_ids)
    names = ", ".join(suite.name for suite in plan.suites)
    return (
        f"{format_count(counts.published, 'prompts')} of {names} published"
        + (f", {counts.from_earlier_start:,} published by an earlier start" if counts.from_earlier_start else "")
        + (f", {num_erased:,} skipped because they were erased" if num_erased else "")
    )


# The result

_RESPONSES_SQL = """
    SELECT policy_version AS policy, suite, subset, transform, count(DISTINCT prompt_id) AS prompts, count(*) AS completions,
           share(count(*) FILTER (finish_reason = 'LENGTH'), count(*)) AS truncated
    FROM suite_responses WHERE run_id IN (SELECT unnest($runs::VARCHAR[])) GROUP BY ALL ORDER BY ALL"""
_LABELS_SQL = """
    SELECT policy_version, suite, subset, transform, grader, CASE WHEN label = '' THEN outcome ELSE label END AS label, count(*) AS n
    FROM suite_grades WHERE run_id IN (SELECT unnest($runs::VARCHAR[])) GROUP BY ALL ORDER BY ALL"""
_DEAD_LETTERS_SQL = """
    SELECT count(*) FROM dead_letters
    WHERE run_id IN (SELECT unnest($runs::VARCHAR[])) AND record_id NOT IN (SELECT dead_letter_id FROM dead_letter_retries)"""
# Prompts of the suites that a policy may have been trained on, because they are also training prompts.
_TRAINED_SQL = """
    SELECT suite, count(DISTINCT item) FROM suite_responses
    WHERE run_id IN (SELECT unnest($runs::VARCHAR[])) AND messages IN (SELECT messages FROM raw.prompts WHERE split = 'TRAIN')
    GROUP BY 1 ORDER BY 1"""


@dataclass(frozen=True)
class EvaluationResult:
    """The counts of an evaluation. `rows` has one row for each policy, suite, subset and transformation, with the counts of labels.

    `num_trained` is the number of prompts of each suite that are also training prompts.
    """

    rows: list[dict[str, Any]]
    num_dead_letters: int
    num_trained: Mapping[str, int]


def read_result(plan: EvaluationPlan, store: Store) -> EvaluationResult:
    """Read the counts of the runs of the evaluation from the database."""
    parameters = {"runs": [plan.get_run_id(version) for version in plan.versions]}

    def query(sql: str) -> list[tuple[Any, ...]]:
        return store.query(sql, parameters, limit_s=_QUERY_TIMEOUT_S).rows

    labels: dict[tuple[Any, ...], dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for *place, grader, label, count in query(_LABELS_SQL):
        labels[tuple(place)][grader][label] = count
    names = ("policy", "suite", "subset", "transform", "prompts", "completions", "truncated")
    rows = [dict(zip(names, row, strict=True)) | {"labels": dict(labels[row[:4]])} for row in query(_RESPONSES_SQL)]
    ((num_dead_letters,),) = query(_DEAD_LETTERS_SQL)
    return EvaluationResult(rows, num_dead_letters, dict(query(_TRAINED_SQL)))
