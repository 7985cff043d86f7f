"""Decide under which configuration of a run a process works.

The configuration of a stage consists of the values that enter the ids of its records: settings, model, constitution and prompt
templates. Addresses, ports, limits and batch sizes do not belong to it, and a policy version that a trainer publishes does not
either. Each run manifest stores the configurations of all stages in `settings`, under the key `configuration`.

`claim_configuration` compares the stages of this process with the newest manifest of the run:

1. If the run has no manifest yet, this process publishes configuration 1.
2. If the stages have the same configuration, nothing is published.
3. If a stage has another configuration but has not started in this run yet, the process publishes the current configuration
   again, with the values of this stage.
4. If a stage has started with another configuration, the process is refused. With --accept-configuration, the process publishes
   a further configuration.

Two processes can start at the same time. So the process that publishes a manifest first opens the run's writer and then reads
the manifests again. A second writer fences the first one, so only one of two concurrent processes can publish. The other process
then decides again, and finds the manifest of the first one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

from charter.manifests import read_run_manifests
from charter.models import RoleModels, is_endpoint
from charter.stages import STAGE_OUTPUTS, STAGES, get_stage_role
from constitutions.loader import Constitution
from consumers.templates import CHAT_TEMPLATE_HASH, TEMPLATE_HASHES
from engine.backoff import compute_backoff
from engine.bus.port import Bus
from engine.bus.read import read_topic
from engine.constitution_prompts import HEADERS_HASH
from engine.errors import CommitUncertain, UsageError, WriterFenced
from engine.pairing import CONTRAST_PAIRING, name_pairing
from engine.settings import JudgeSettings, Settings
from engine.worker import to_producer_record
from schemas.records import RunManifest
from schemas.topics import TOPICS

logger = logging.getLogger("charter.configurations")

_RETRY_RANGE_S = (0.1, 2.0)
_HASH_CHARS = 12
_MAX_QUIET_FAILURES = 3  # a few failures are normal if several processes start at the same time
_WEIGHTS_PREFIX = "weights of "
UNKNOWN = None  # the value of a model that the process has not opened

StageConfiguration = Mapping[str, Any]  # maps names of settings to values


@dataclass(frozen=True)
class RunConfiguration:
    """One configuration of a run. `number` counts from 1. `started` are the stages of the processes that published it."""

    number: int
    stages: Mapping[str, StageConfiguration]
    started: tuple[str, ...] = ()

    def to_manifest_fields(self) -> dict[str, Any]:
        return {"number": self.number, "started": list(self.started), "stages": self.stages}


def describe_stages(settings: Settings, constitution: Constitution, models: RoleModels) -> dict[str, StageConfiguration]:
    """Return the configuration of every stage. A local model that is not open has the value UNKNOWN.

    A change of one of these values changes the ids of the stage's records, except for the address of a model server. Values
    that the stage does not use are omitted.
    """
    respond, critique, judge = settings.respond, settings.critique, settings.judge
    examples = {"critique.few_shot": critique.few_shot}
    principles = {"run.constitution": f"{constitution.name} {constitution.version} ({constitution.hash[:_HASH_CHARS]})"}
    judge_principles = constitution.judge_with if judge.principles == "constitution" else judge.principles
    asks_all = judge_principles == "all"
    stages: dict[str, dict[str, Any]] = {
        "respond": {
            "respond.num_completions": respond.num_completions,
            "respond.temperature": respond.temperature,
            "respond.top_p": respond.top_p,
            "respond.max_tokens": respond.max_tokens,
            **_describe_thinking("respond", respond.max_thinking_tokens),
            "chat template": CHAT_TEMPLATE_HASH[:_HASH_CHARS],
            **({"run.from_base": True} if settings.run.from_base else {}),
            **(principles | _describe_contrast(settings) if judge.pairing == CONTRAST_PAIRING else {}),
        },
        "critique": principles
        | examples
        | {
            "critique.temperature": critique.temperature,
            "critique.max_tokens": critique.max_tokens,
            **_describe_thinking("critique", critique.max_thinking_tokens),
            "critique.rounds": critique.rounds,
            "critique.selection": constitution.selection if critique.selection == "constitution" else critique.selection,
            "critique.early_stop": critique.early_stop,
            "critique.min_option_mass": critique.min_option_mass,
            "critique.accept_threshold": critique.accept_threshold,
            "critique.reject_threshold": critique.reject_threshold,
            "critique.similarity_threshold": critique.similarity_threshold,
            "critique.skip_sources": sorted(critique.skip_sources),
            **_describe_templates("critique", "verdict"),
        },
        "revise": principles
        | examples
        | {
            "critique.temperature": critique.temperature,
            "revise.max_tokens": settings.revise.max_tokens,
            **_describe_thinking("revise", settings.revise.max_thinking_tokens),
            **_describe_templates("revision"),
        },
        "judge": {"judge.pairing": judge.pairing, "contrast.ask_judge": False}
        if judge.pairing == CONTRAST_PAIRING and not settings.contrast.ask_judge
        else principles
        | {
            "judge.pairing": name_pairing(judge.pairing),
            "judge.answer_mode": judge.answer_mode,
            "judge.principles": "all" if asks_all else "sample",
            **({} if asks_all else {"judge.num_principles": judge.num_principles}),
            "judge.label_order": judge.label_order,
            "judge.clamp": judge.clamp,
            "judge.min_option_mass": judge.min_option_mass,
            "judge.reject_position_flips": judge.reject_position_flips,
            **({} if judge.answer_mode == "logprobs" else _describe_judge_limits(judge)),
            **_describe_templates({"logprobs": "comparison"}.get(judge.answer_mode, judge.answer_mode)),
        },
    }
    # Grades with other graders are other records of the same run, so the stage grade has no configuration.
    return {"grade": {}} | {
        stage: values | (_describe_model(role, settings, models) if role else {})
        for stage, values in stages.items()
        for role in [get_stage_role(stage, settings)]
    }


def _describe_thinking(section: str, max_thinking_tokens: int) -> dict[str, int]:
    """Return the limit of thinking. Without thinking there is no entry, as in the configurations of earlier versions."""
    return {f"{section}.max_thinking_tokens": max_thinking_tokens} if max_thinking_tokens else {}


def _describe_contrast(settings: Settings) -> dict[str, Any]:
    """Return what decides the prompts of contrast completions."""
    contrast = settings.contrast
    return {
        "contrast.constitution_role": contrast.constitution_role,
        "contrast.num_principles": contrast.num_principles,
        "contrast template": HEADERS_HASH[:_HASH_CHARS],
    }


def _describe_judge_limits(judge: JudgeSettings) -> dict[str, int]:
    return {"judge.max_tokens": judge.max_tokens, **_describe_thinking("judge", judge.max_thinking_tokens)}


def _describe_templates(*names: str) -> dict[str, str]:
    return {f"{name} template": TEMPLATE_HASHES[name][:_HASH_CHARS] for name in names}


def _describe_model(role: str, settings: Settings, models: RoleModels) -> dict[str, str | None]:
    """Return the id and the weights of a role's model. The address of a server is omitted, because a server can move."""
    spec, setting, weights = models.get_spec(role), f"models.{role}", f"{_WEIGHTS_PREFIX}models.{role}"
    description: dict[str, str | None]
    if is_endpoint(spec):
        description = {setting: spec.partition("#")[2], weights: "on a server"}
    elif spec in models.open_models:
        model = models.open_models[spec]
        description = {setting: model.id, weights: model.revision}
    else:
        description = {setting: UNKNOWN, weights: UNKNOWN}
    return description | ({"models.follow": role} if role in settings.models.follow else {})


def find_differences(before: StageConfiguration, after: StageConfiguration) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of each setting that differs. An UNKNOWN value does not differ from any other value.

    The weights of a model are omitted if the model itself differs.
    """
    unused = "not used"
    pairs = {name: (before.get(name, unused), after.get(name, unused)) for name in sorted({*before, *after})}
    differences = {name: (a, b) for name, (a, b) in pairs.items() if a != b and UNKNOWN not in (a, b)}
    implied = {f"{_WEIGHTS_PREFIX}{name}" for name in differences}
    return {name: pair for name, pair in differences.items() if name not in implied}


def parse_configuration(settings: str) -> RunConfiguration | None:
    """Return the configuration in the settings of a manifest. Return None for a manifest of an older version of Charter."""
    fields = json.loads(settings).get("configuration")
    return RunConfiguration(fields["number"], fields["stages"], tuple(fields["started"])) if fields else None


def claim_configuration(
    bus: Bus,
    run_id: str,
    own_stages: Mapping[str, StageConfiguration],
    all_stages: Mapping[str, StageConfiguration],
    make_manifest: Callable[[RunConfiguration], RunManifest],
    *,
    accept: bool = False,
    name_option: str = "--run NAME",
    may_accept: bool = True,
) -> RunConfiguration:
    """Return the configuration of the run under which this process works. Publish a manifest if the log has none for it.

    `own_stages` are the configurations of the stages that this process runs. `all_stages` are those of all stages; they become
    configuration 1 if the run is new. `name_option` is the option that names another run. `may_accept` is false for a run that keeps
    one configuration, such as an evaluation.

    Raises UsageError if a stage has started with another configuration and `accept` is false.
    """
    fix = f"restore the settings, or start another run: {name_option}"
    if may_accept:
        fix = f"restore the settings, start another run: {name_option}, or add a configuration to this run: --accept-configuration"
    for failures in count():
        current, target = _decide(bus, run_id, own_stages, all_stages, accept, fix)
        if target == current:
            if accept:
                text = "--accept-configuration has no effect: the stages have configuration %d of run %s"
                logger.warning(text, target.number, run_id)
            return target
        try:
            with closing(bus.open_writer(f"manifest/{run_id}")) as writer:
                # Another process may have published a manifest before the writer was opened.
                current, target = _decide(bus, run_id, own_stages, all_stages, accept, fix)
                if target != current:
                    writer.commit([to_producer_record(make_manifest(target))])
                    if current and (changes := describe_changes(current, target)):
                        logger.warning("configuration %d of run %s: %s", target.number, run_id, changes)
            return target
        except (WriterFenced, CommitUncertain) as error:
            level = logging.INFO if failures < _MAX_QUIET_FAILURES else logging.WARNING
            logger.log(level, "the manifest of run %s is not published yet, trying again: %s", run_id, error.what)
            time.sleep(compute_backoff(failures, _RETRY_RANGE_S))
    raise AssertionError("count() does not end")


def _decide(
    bus: Bus,
    run_id: str,
    own_stages: Mapping[str, StageConfiguration],
    all_stages: Mapping[str, StageConfiguration],
    accept: bool,
    fix: str,
) -> tuple[RunConfiguration | None, RunConfiguration]:
    """Return the current configuration of the run, and the configuration under which this process works.

    Raise UsageError with the remedy `fix` if a stage has started with another configuration and `accept` is false.
    """
    manifests = [manifest for manifest in read_run_manifests(bus) if manifest.run_id == run_id]
    configurations = [configuration for manifest in manifests if (configuration := parse_configuration(manifest.settings))]
    if not configurations:
        return None, RunConfiguration(1, all_stages, tuple(own_stages))
    current = configurations[-1]
    started = {stage for configuration in configurations for stage in configuration.started}
    changes = {
        stage: differences
        for stage, values in own_stages.items()
        if (differences := find_differences(current.stages.get(stage, {}), values))
    }
    refused = [stage for stage in changes if stage in started or has_started(bus, run_id, stage)]
    if refused and not accept:
        raise _make_refusal(run_id, current.number, {stage: changes[stage] for stage in refused}, fix)
    completed = {
        stage: values if stage in changes or UNKNOWN in current.stages[stage].values() else current.stages[stage]
        for stage, values in own_stages.items()
    }
    stages = {**current.stages, **completed}
    if stages == current.stages:
        return current, current
    published = tuple(stage for stage in STAGES if stage in (*current.started, *own_stages))
    return current, RunConfiguration(current.number + (1 if refused else 0), stages, published)


def has_started(bus: Bus, run_id: str, stage: str) -> bool:
    """Return whether a stage has worked in a run: its group has committed offsets, or the log has outputs of it.

    The outputs are checked too, because Kafka deletes the offsets of a group that is empty for a long time.
    """
    run_header = ("run", run_id.encode())
    return bool(bus.committed(f"{run_id}.{stage}", list(TOPICS))) or any(
        run_header in record.headers for record in read_topic(bus, STAGE_OUTPUTS[stage])
    )


def _make_refusal(run_id: str, number: int, changes: Mapping[str, Mapping[str, tuple[Any, Any]]], fix: str) -> UsageError:
    differences = {name: pair for stage in changes.values() for name, pair in stage.items()}
    listed = ", ".join(
        f"{name} was {_format(before)} and is now {_format(after)}" for name, (before, after) in differences.items()
    )
    stages = f"the stage {next(iter(changes))}" if len(changes) == 1 else f"the stages {', '.join(changes)}"
    return UsageError(
        f"configuration {number} of run {run_id} differs from the settings of this process: {listed}",
        f"these values are part of the record ids of {stages}, so the run would mix records of two configurations",
        fix,
    )


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe_changes(before: RunConfiguration, after: RunConfiguration) -> str:
    """Return the settings that differ between two configurations of a run, as one line."""
    differences: dict[str, tuple[Any, Any]] = {}
    for stage, values in after.stages.items():
        differences |= find_differences(before.stages.get(stage, {}), values)
    return "; ".join(f"{name}: {_format(a)} -> {_format(b)}" for name, (a, b) in differences.items())
