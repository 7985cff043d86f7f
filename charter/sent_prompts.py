"""Rebuild the prompts that a model was sent for a record, and verify them.

A record stores the hash of its prompt template and its inputs, not the prompts. To rebuild the prompts, the stage of the record runs
again, with the settings and the constitution of the run manifest, on the parent of the record. A model that only records its
requests returns the stored replies. The prompts are verified if the stage makes the same record again: the record id is a hash of the
parent, the model, the template, the constitution and the settings of the stage. If a manifest, a parent or a template is missing, or
if the stage makes another record, the result has the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from pydantic import ValidationError

from charter.constitution_texts import load_constitutions
from charter.manifests import parse_manifest_settings
from charter.models import RoleModels, is_endpoint
from charter.pipeline import make_critique_stage, make_judge_stage, make_respond_stage, make_revise_stage
from charter.stages import STAGE_ROLES
from constitutions.loader import Constitution
from engine.budget import Price, parse_prices
from engine.errors import CharterError
from engine.models.control_tokens import break_up_markers
from engine.models.interface import (
    LOCAL_CAPABILITIES,
    NUM_VOTES,
    Generation,
    GenerationRequest,
    ModelCapabilities,
    OptionScores,
)
from engine.notices import NOTICES
from engine.settings import Settings
from engine.store import QueryFunction
from schemas import ids
from schemas.records import (
    ChatMessage,
    Critique,
    Outcome,
    Preference,
    PrincipleVote,
    Record,
    Response,
    Revision,
    Verdict,
)

ORDERS = ("forward", "backward")
# What a record does not store about its model: a local model has all capabilities, and servers have these combinations.
_CAPABILITIES = [
    replace(
        LOCAL_CAPABILITIES,
        prefill=prefill,
        logprobs=logprobs,
        num_votes=0 if logprobs else NUM_VOTES,
        any_temperature=any_temperature,
    )
    for any_temperature, logprobs, prefill in product((True, False), repeat=3)
]
# If one of these fields of the rebuilt record differs, the prompts are not those of the stored record.
_VERIFIED_FIELDS = (
    "record_id", "template_hash", "constitution", "messages", "seed", "initial_response", "previous_response", "response", "critique",
    "response_a", "response_b",
)  # fmt: skip
_MANIFESTS_SQL = """SELECT run_id, settings, constitution.hash AS constitution_hash FROM raw.runs
    WHERE run_id IN (SELECT unnest($runs::VARCHAR[])) AND NOT is_duplicate ORDER BY commit_seq DESC"""


@dataclass(frozen=True)
class SentPrompt:
    """One prompt. `prefill` is the beginning of the assistant message that the model continued.

    `is_option_question` is true if the model was not asked to write, and the probabilities of option letters were read instead.
    """

    messages: tuple[ChatMessage, ...]
    prefill: str
    is_option_question: bool
    title: str = ""


@dataclass(frozen=True)
class SentPrompts:
    """The prompts of one record. `problem` is the reason why they cannot be rebuilt or are not verified, or "" if they are verified.

    `option_source` is the origin of the option probabilities, or is "" if no options were scored. `cost` is the cost of the
    record in the currency of budget.prices, or None without a price.
    """

    prompts: tuple[SentPrompt, ...] = ()
    problem: str = ""
    option_source: str = ""
    cost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the prompts as plain values."""
        prompts = [
            {"title": p.title, "messages": [m.model_dump() for m in p.messages], "prefill": p.prefill} for p in self.prompts
        ]
        return {"prompts": prompts, "problem": self.problem, "option_source": self.option_source, "cost": self.cost}


@dataclass(frozen=True)
class StageInputs:
    """What a rebuild needs: the records of a prompt by id, and the manifests of their runs, newest first.

    `prices` is used for a model without a price in the run manifest.
    """

    records: Mapping[str, Record]
    manifests: Sequence[dict[str, Any]]
    constitutions: Mapping[str, Constitution]
    prices: Mapping[str, Price]

    @cached_property
    def sent_prompts(self) -> dict[str, SentPrompts]:
        """The prompts of each record that a stage made."""
        return {id_: rebuild_prompts(record, self) for id_, record in self.records.items() if record.stage in STAGE_ROLES}


class _UnexpectedRequest(CharterError):
    """The stage sends a request for which the record has no reply."""


@dataclass
class _RecordedModel:
    """A model that records its requests, and returns the stored replies. `scores` are (p of the first option, option mass)."""

    id: str
    revision: str
    capabilities: ModelCapabilities
    texts: Iterator[tuple[str, str]]
    scores: Iterator[tuple[float | None, float]]
    prompts: list[SentPrompt] = field(default_factory=list)

    def generate(self, batch: Sequence[GenerationRequest], *, num_completions: int = 1, **_: Any) -> list[list[Generation]]:
        generations = []
        for request in batch:
            self.prompts.append(SentPrompt(request.messages, request.prefill, False))
            generations.append([Generation(*_take_reply(self.texts)) for _ in range(num_completions)])
        return generations

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        scores = []
        for request in batch:
            self.prompts.append(SentPrompt(request.messages, request.prefill, True))
            p, mass = _take_reply(self.scores)
            p, mass = (0.0, 0.0) if p is None else (p, mass)
            scores.append(OptionScores((_compute_log(p * mass), _compute_log((1 - p) * mass)), mass))
        return scores


def _take_reply(replies: Iterator[Any]) -> Any:
    try:
        return next(replies)
    except StopIteration:
        raise _UnexpectedRequest("the stage sends more requests than the record has replies") from None


def _compute_log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def load_stage_inputs(query: QueryFunction, records: Sequence[Record], prices: Mapping[str, Price]) -> StageInputs:
    """Load the manifests and the constitutions of the runs of `records`, which are all records of a prompt."""
    manifests = query(_MANIFESTS_SQL, {"runs": sorted({record.run_id for record in records})}).to_dicts()
    hashes = [record.constitution.hash for record in records if record.constitution]
    by_id = {record.record_id: record for record in records}
    return StageInputs(by_id, manifests, load_constitutions(query, hashes), prices)


def rebuild_prompts(record: Record, inputs: StageInputs) -> SentPrompts:
    """Rebuild and verify the prompts of a record."""
    if record.model is None:
        return SentPrompts(problem="no model was asked")
    manifests = [manifest for manifest in inputs.manifests if manifest["run_id"] == record.run_id]
    parent = inputs.records.get(record.parent_ids[0]) if record.parent_ids else None
    result = SentPrompts(problem=_find_missing_input(record, parent, manifests, inputs))
    if parent is not None and not result.problem:
        with NOTICES.mute():  # the stage has reported its events when it made the record
            for manifest in manifests:
                result = _rebuild_with_manifest(record, parent, manifest, inputs)
                if not result.problem:
                    break
    price = _find_price(record, manifests, inputs.prices)
    return replace(result, cost=price.compute_cost(record.prompt_tokens, record.completion_tokens) if price else None)


def _find_missing_input(record: Record, parent: Record | None, manifests: Sequence[dict[str, Any]], inputs: StageInputs) -> str:
    if parent is None:
        return "the parent of the record is not in the database"
    if not manifests:
        return f"the manifest of run {record.run_id} is not in the database"
    if record.constitution and record.constitution.hash not in inputs.constitutions:
        return f"the constitution {record.constitution.hash[:12]} is not in the database, or this version of Charter cannot read it"
    return ""


def _parse_settings(text: str) -> Settings | str:
    """Return the settings of a run manifest, or the reason why this version of Charter cannot read them."""
    try:
        return Settings(**parse_manifest_settings(text))
    except ValidationError as error:
        names = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        return f"the settings of the run manifest are not valid in this version of Charter: {names}"


def _find_price(record: Record, manifests: Sequence[dict[str, Any]], prices: Mapping[str, Price]) -> Price | None:
    for manifest in manifests:
        texts = parse_manifest_settings(manifest["settings"]).get("budget", {}).get("prices", [])
        if record.model and (price := parse_prices(texts).get(record.model.id)):
            return price
    return prices.get(record.model.id) if record.model else None


def _rebuild_with_manifest(record: Record, parent: Record, manifest: dict[str, Any], inputs: StageInputs) -> SentPrompts:
    """Run the stage with the settings of one manifest, for each combination of capabilities until the record is the same."""
    settings = _parse_settings(manifest["settings"])
    if isinstance(settings, str):
        return SentPrompts(problem=settings)
    constitution = inputs.constitutions[record.constitution.hash] if record.constitution else None
    best = SentPrompts(problem="the stage makes no such record")
    for capabilities in _CAPABILITIES:
        assert record.model is not None
        texts, scores = _list_texts(record), _list_scores(record)
        model = _RecordedModel(record.model.id, record.model.revision, capabilities, iter(texts), iter(scores))
        try:
            rebuilt = _run_stage(record, parent, model, settings, constitution)
        except CharterError as error:
            best = best if best.prompts else SentPrompts(tuple(model.prompts), f"the prompts cannot be rebuilt: {error.what}")
            continue
        result = SentPrompts(
            tuple(_add_titles(record, _as_sent(record, model.prompts, settings))),
            _find_difference(record, rebuilt),
            _describe_options(record, model),
        )
        if not result.problem:
            return result
        best = best if best.prompts and len(best.prompts) >= len(result.prompts) else result
    return best


def _run_stage(
    record: Record, parent: Record, model: _RecordedModel, settings: Settings, constitution: Constitution | None
) -> Record | None:
    """Return the record that the stage makes of the parent."""
    models = RoleModels(settings)
    models.open_models[models.get_spec(STAGE_ROLES[record.stage])] = model
    stage: Any
    if isinstance(record, Response):
        # A suite has its own maximum length, which is not in the settings of the run.
        limits = {record.suite_item.suite: record.sampling.max_tokens} if record.suite_item and record.sampling else {}
        # The text of the constitution is not needed for a response without a contrast completion.
        stage = make_respond_stage(settings, lambda: (model, record.policy_version or 0), constitution, limits)
    elif constitution is None:
        return None
    elif isinstance(record, Critique):
        stage = make_critique_stage(settings, models, constitution)
    elif isinstance(record, Revision):
        stage = make_revise_stage(settings, models, constitution)
    else:
        assert isinstance(record, Preference)
        stage = make_judge_stage(settings, models, constitution)
        if isinstance(parent, Response):  # the other pairs of the response have other records
            indices = (record.completion_index_a, record.completion_index_b)
            parent = parent.model_copy(update={"completions": [c for c in parent.completions if c.index in indices]})
    (outputs,) = stage([parent])
    if isinstance(outputs, CharterError):
        raise outputs
    return outputs[0] if outputs else None


def _list_texts(record: Record) -> list[tuple[str, str]]:
    """Return the texts that the model wrote for a record, with their finish reasons, in the order of the requests."""
    if isinstance(record, Response):
        texts = [(completion.text, completion.finish_reason.lower()) for completion in record.completions]
        contrast = record.contrast_completion
        return [*texts, *([(contrast.text, contrast.finish_reason.lower())] if contrast else [])]
    if isinstance(record, Critique):
        return [(record.critique, "stop")]
    if isinstance(record, Revision):
        return [(record.response, record.finish_reason.lower())]
    votes = record.votes if isinstance(record, Preference) else []
    return [_get_reply(vote, order) for vote in votes for order in ORDERS]


def _get_reply(vote: PrincipleVote, order: str) -> tuple[str, str]:
    """Return what the judge wrote in one order, and the finish reason."""
    text, p = (vote.explanation, vote.p_forward) if order == "forward" else (vote.explanation_backward, vote.p_backward)
    reasons = {Outcome.TIMEOUT: "timeout", Outcome.REFUSED: "refused"}
    return text, reasons.get(vote.outcome, "stop") if p is None else "stop"


def _list_scores(record: Record) -> list[tuple[float | None, float]]:
    """Return (p of the first option, option mass) for each question with options, in the order of the questions."""
    if isinstance(record, Preference):
        return [score for vote in record.votes for score in _list_vote_scores(vote)]
    if not isinstance(record, Critique):
        return []
    scores: list[tuple[float | None, float]] = []
    if record.round > 0:  # the comparison with the previous response; only its mean is stored
        p = record.p_better
        scores += [(p, 1.0), (None if p is None else 1 - p, 1.0)]
    for verdict in record.verdicts:
        scores += [(o["p"], o["mass"] or 0.0) for o in list_verdict_options(verdict.model_dump())]
    return scores


def _list_vote_scores(vote: PrincipleVote) -> list[tuple[float | None, float]]:
    """Return the scores of the orders in which options were scored. A judge that wrote nothing usable was not asked to choose."""
    scores = []
    writes = bool(vote.explanation or vote.explanation_backward)
    for order, options in zip(ORDERS, list_vote_options(vote.model_dump()), strict=True):
        text, finish_reason = _get_reply(vote, order)
        if not writes or (text and finish_reason == "stop"):
            scores.append((options["p"], options["mass"] or 0.0))
    return scores


def list_vote_options(vote: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the option scores of both orders of a vote: p of the option shown first, the mass, and the log-probabilities."""
    backward = None if vote["p_backward"] is None else 1 - vote["p_backward"]
    return [
        _make_option_row("forward", "A", "B", vote["p_forward"], vote["option_mass_forward"]),
        _make_option_row("backward", "B", "A", backward, vote["option_mass_backward"]),
    ]


def list_verdict_options(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the option scores of both orders of a verdict. Records of earlier versions have only the mean of both orders."""
    p_forward, p_backward = verdict.get("p_flawed_forward"), verdict.get("p_flawed_backward")
    masses = verdict.get("option_mass_forward"), verdict.get("option_mass_backward")
    if masses == (None, None):
        p_forward = p_backward = verdict["p_flawed"]
        masses = verdict["option_mass"], verdict["option_mass"]
    return [
        _make_option_row("forward", "flawed", "clean", p_forward, masses[0]),
        _make_option_row("backward", "clean", "flawed", None if p_backward is None else 1 - p_backward, masses[1]),
    ]


def _make_option_row(order: str, first: str, second: str, p: float | None, mass: float | None) -> dict[str, Any]:
    """Return the scores of two options. The log-probability of an option is ln(p · mass), or None if it is unknown or 0."""
    row: dict[str, Any] = {"order": order, "first": first, "second": second, "p": p, "mass": mass}
    for name, share in (("logprob_first", p), ("logprob_second", None if p is None else 1 - p)):
        row[name] = math.log(share * mass) if share and mass else None
    return row


def _as_sent(record: Record, prompts: Sequence[SentPrompt], settings: Settings) -> list[SentPrompt]:
    """Return the prompts as a server got them. A local model breaks up the control tokens of its tokenizer."""
    if not is_endpoint(RoleModels(settings).get_spec(STAGE_ROLES[record.stage])):
        return list(prompts)
    return [
        replace(p, messages=tuple(m.model_copy(update={"content": break_up_markers(m.content)}) for m in p.messages))
        for p in prompts
    ]


def _add_titles(record: Record, prompts: Sequence[SentPrompt]) -> list[SentPrompt]:
    """Name each prompt by its purpose and the order of its options."""
    subjects: list[str] = []
    if isinstance(record, Critique):
        subjects = ["comparison with the previous response"] if record.round > 0 and record.verdicts else []
        subjects += [f"verdict under {verdict.principle_id}" for verdict in record.verdicts]
    elif isinstance(record, Preference):
        subjects = [f"judgment under {vote.principle_id}" for vote in record.votes]
    written = {Critique: "critique", Revision: "revision", Response: "response"}.get(type(record))
    titles = []
    num_by_kind = {True: 0, False: 0}
    for prompt in prompts:
        number = num_by_kind[prompt.is_option_question]
        num_by_kind[prompt.is_option_question] += 1
        if written and not prompt.is_option_question:
            is_contrast = number > 0 and isinstance(record, Response)
            titles.append("response with the constitution" if is_contrast else written)
        else:
            subject = subjects[number // 2] if number // 2 < len(subjects) else "question"
            titles.append(
                f"{subject}, {('first', 'second')[number % 2]} order" + ("" if prompt.is_option_question else ", written reply")
            )
    return [replace(prompt, title=title) for prompt, title in zip(prompts, titles, strict=True)]


def _find_difference(record: Record, rebuilt: Record | None) -> str:
    """Return how the rebuilt record differs from the stored one, or "" if it is the same."""
    if rebuilt is None:
        return "the stage makes no record of the parent with these settings"
    if isinstance(record, Response) and ids.compute_prompt_id(record.messages, record.epoch) != record.prompt_id:
        return "the stored messages do not have the hash that is the id of the prompt"
    names = [name for name in _VERIFIED_FIELDS if getattr(rebuilt, name, None) != getattr(record, name, None)]
    if "template_hash" in names:
        return f"this version of Charter does not have the template {record.template_hash}"
    if names:
        return f"with the stored settings, the stage makes a record with another {' and '.join(names).replace('_', ' ')}"
    return ""


def _describe_options(record: Record, model: _RecordedModel) -> str:
    """Return where the option probabilities of a record come from."""
    is_verdict = isinstance(record, Critique) and record.verdict is not Verdict.NOT_ASKED
    if not (is_verdict or isinstance(record, Preference)):
        return ""
    if not any(prompt.is_option_question for prompt in model.prompts):
        return "written letters"
    return "next-token log-probabilities" if model.capabilities.logprobs else "shares of sampled replies"
