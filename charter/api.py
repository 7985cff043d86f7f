"""Run the stages of the pipeline directly from Python, without a bus.

    from charter.api import Charter

    charter = Charter("default", model="smollm2")
    charter.self_critique_loop("How do magnets work?").final_response
    charter.generate_preference_pair("How do magnets work?").chosen

The methods return the same records with the same ids as the pipeline, because both run the same code and a sampling seed depends
only on the record. The methods do not store records; `docs/api.md` shows how to store them. Models are loaded on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from charter.models import RoleModels
from charter.pipeline import make_critique_stage, make_judge_stage, make_respond_stage, make_revise_stage
from constitutions.loader import Constitution
from constitutions.loader import load_constitution as load_constitution
from consumers.contrast import ContrastStage
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from consumers.revise import ReviseStage
from engine.errors import UsageError
from engine.models import open_model
from engine.models.interface import Model, require_results
from engine.pairing import CONTRAST_PAIRING, REVISION_PAIRING
from engine.settings import Settings, load_settings
from producers.files import DEFAULT_SOURCES, make_prompt_record, make_row_metadata
from producers.parse import RowError, parse_prompt
from schemas.records import ChatMessage, Critique, EndReason, Outcome, Preference, Prompt, Record, Response, Revision

__all__ = ["Charter", "Constitution", "JudgedResponse", "PromptLike", "RevisionChain", "load_constitution", "open_model"]

PromptLike = str | Sequence[ChatMessage | Mapping[str, str]] | Prompt | Response


@dataclass(frozen=True)
class RevisionChain:
    """Holds the response at the start of a revision chain, and the critiques and revisions of the chain in order."""

    response: Response
    steps: tuple[Critique | Revision, ...]

    @property
    def last_step(self) -> Critique | Revision:
        """Return the record that ends the chain."""
        return self.steps[-1]

    @property
    def end_reason(self) -> EndReason:
        return self.last_step.end_reason

    @property
    def initial_response(self) -> str:
        return self.last_step.initial_response

    @property
    def final_response(self) -> str | None:
        """Return the response to train on. Return None if there is none (`end_reason` is UNUSABLE or NO_CRITIQUE)."""
        is_unusable = self.end_reason in (EndReason.UNUSABLE, EndReason.NO_CRITIQUE)
        return None if is_unusable else self.last_step.final_response

    @property
    def critiques(self) -> list[Critique]:
        return [step for step in self.steps if isinstance(step, Critique)]

    @property
    def revisions(self) -> list[Revision]:
        return [step for step in self.steps if isinstance(step, Revision)]

    @property
    def records(self) -> list[Record]:
        return [self.response, *self.steps]


@dataclass(frozen=True)
class JudgedResponse:
    """Holds a response and the judge's preferences over its completions.

    Each pair of completions has one preference. By default, the pairs are consecutive completions. With judge.pairing
    "revision", one preference compares the final response of the chain with its initial response. `preferences` is empty if the chain has no usable revision.
    With "contrast", one preference compares the completion with the constitution in its prompt with completion 0.
    """

    response: Response
    preferences: tuple[Preference, ...]
    chain: RevisionChain | None = None

    @property
    def preference(self) -> Preference | None:
        return self.preferences[0] if self.preferences else None

    @property
    def p_a(self) -> float | None:
        """Return the soft label, which is the probability that response A is better. Return None if there is no usable
        label."""
        first = self.preference
        return first.p_a if first and first.outcome is Outcome.OK else None

    @property
    def chosen(self) -> str | None:
        """Return the preferred response. Return None for a tie or if there is no label."""
        return self._get_response(preferred=True)

    @property
    def rejected(self) -> str | None:
        """Return the other response of the pair. Return None for a tie or if there is no label."""
        return self._get_response(preferred=False)

    def _get_response(self, *, preferred: bool) -> str | None:
        if self.preference is None or self.p_a is None or self.p_a == 0.5:
            return None
        a_is_preferred = self.p_a > 0.5
        return self.preference.response_a if a_is_preferred == preferred else self.preference.response_b

    @property
    def records(self) -> list[Record]:
        return [*(self.chain.records if self.chain else [self.response]), *self.preferences]


class Charter:
    """Responds to prompts, and criticizes, revises and judges the responses under a constitution.

    `constitution` is the name of a shipped constitution, a path, or a Constitution. `model` is the policy. The critic and the
    judge use the same model if `critic` and `judge` are not given. A model is a Model (any object with the methods of
    engine.models.interface.Model), or a model setting: smollm2, a folder, a hub id, or http://HOST:PORT/v1#NAME. `settings`
    maps dotted names to values. All other settings come from the environment, ./charter.toml (or `config`) and the defaults, as
    for the command line.

    Raises UsageError for an invalid setting or prompt, and ConstitutionError for an invalid constitution. Raises ModelUnreachable
    on first use of a model that cannot be loaded or reached.
    """

    def __init__(
        self,
        constitution: str | Path | Constitution | None = None,
        model: str | Model | None = None,
        *,
        critic: str | Model | None = None,
        judge: str | Model | None = None,
        settings: Mapping[str, Any] | None = None,
        config: Path | None = None,
    ) -> None:
        open_models: dict[str, Model] = {}
        roles = {"policy": model, "critic": critic, "judge": judge}
        specs = {f"models.{role}": _register_model(value, open_models) for role, value in roles.items() if value is not None}
        self.settings: Settings = load_settings({**(settings or {}), **specs}, config)[0]
        self.models = RoleModels(self.settings, open_models=open_models)
        if not isinstance(constitution, Constitution):
            constitution = load_constitution(constitution or self.settings.run.constitution)
        self.constitution = constitution

    def respond(self, prompt: PromptLike) -> Response:
        """Sample the policy's response to a prompt. The record has `respond.num_completions` completions."""
        (response,) = self.generate_responses([prompt])
        return response

    def self_critique_loop(self, prompt: PromptLike) -> RevisionChain:
        """Respond to a prompt, then critique and revise until the chain ends (Bai et al. 2022, section 3.1)."""
        (chain,) = self.self_critique_loops([prompt])
        return chain

    def generate_preference_pair(self, prompt: PromptLike) -> JudgedResponse:
        """Respond to a prompt and judge the completions under the constitution (Bai et al. 2022, section 4.1)."""
        (judged,) = self.generate_preference_pairs([prompt])
        return judged

    def self_critique_loops(self, prompts: Iterable[PromptLike]) -> list[RevisionChain]:
        """Run `self_critique_loop` for many prompts. The prompts run in batches, which is faster than one prompt at a time."""
        responses = self.generate_responses(prompts)
        steps: dict[int, list[Critique | Revision]] = {i: [] for i in range(len(responses))}
        unfinished: dict[int, Response | Revision] = dict(enumerate(responses))
        while unfinished:
            critiques = dict(zip(unfinished, require_results(self.critique_stage(list(unfinished.values()))), strict=True))
            new_critiques = [critique for (critique,) in critiques.values()]
            revisions = dict(zip(critiques, require_results(self.revise_stage(new_critiques)), strict=True))
            for i in critiques:
                steps[i] += [*critiques[i], *revisions[i]]
            unfinished = {i: revision for i, outputs in revisions.items() for revision in outputs if not revision.final}
        return [RevisionChain(response, tuple(steps[i])) for i, response in enumerate(responses)]

    def generate_preference_pairs(self, prompts: Iterable[PromptLike]) -> list[JudgedResponse]:
        """Run `generate_preference_pair` for many prompts in batches.

        Raises UsageError for a response with one completion if judge.pairing is neither "revision" nor "contrast".
        """
        if self.settings.judge.pairing == REVISION_PAIRING:
            chains = self.self_critique_loops(prompts)
            preferences = require_results(self.judge_stage([chain.last_step for chain in chains]))
            return [JudgedResponse(c.response, tuple(labels), c) for c, labels in zip(chains, preferences, strict=True)]
        responses = self.generate_responses(prompts)
        for response in responses:
            if len(response.completions) < 2 and self.settings.judge.pairing != CONTRAST_PAIRING:
                raise UsageError(
                    f"a response with {len(response.completions)} completions cannot be judged",
                    "a preference compares two completions",
                    "set respond.num_completions to 2 or more, or judge.pairing to revision or contrast",
                )
        preferences = require_results(self.judge_stage(responses))
        return [JudgedResponse(r, tuple(labels)) for r, labels in zip(responses, preferences, strict=True)]

    def generate_responses(self, prompts: Iterable[PromptLike]) -> list[Response]:
        """Return a response for each item, in order. An item that is already a Response record is returned unchanged."""
        items = [item if isinstance(item, Response) else self.to_prompt(item) for item in prompts]
        new_prompts = [item for item in items if isinstance(item, Prompt)]
        outputs = iter(require_results(self.respond_stage(new_prompts)) if new_prompts else [])
        return [item if isinstance(item, Response) else next(outputs)[0] for item in items]

    def to_prompt(self, value: str | Sequence[ChatMessage | Mapping[str, str]] | Prompt) -> Prompt:
        """Convert a string or a list of messages to a Prompt record, with the same rules as `charter produce`.

        Raises UsageError for an invalid prompt.
        """
        if isinstance(value, Prompt):
            return value
        limits = self.settings.prompts
        # Pass any other type to the parser. The error of the parser describes the invalid value.
        is_messages = isinstance(value, Sequence) and not isinstance(value, str)
        row = {"prompt": [_message_to_dict(message) for message in value] if is_messages else value}
        try:
            parsed = parse_prompt(row, source=DEFAULT_SOURCES["prompts"], max_chars=limits.max_chars)
        except RowError as error:
            fix = 'pass a string, or messages such as [{"role": "user", "content": "..."}] whose last message is from the user'
            raise UsageError("the prompt is invalid", str(error), fix) from error
        return make_prompt_record(make_row_metadata(parsed, self.settings.run.id, eval_fraction=limits.eval_fraction))

    @cached_property
    def respond_stage(self) -> RespondStage:
        policy = self.models.get_model("policy")
        return make_respond_stage(self.settings, lambda: (policy, 0), self.constitution)

    @cached_property
    def critique_stage(self) -> CritiqueStage:
        return make_critique_stage(self.settings, self.models, self.constitution)

    @cached_property
    def revise_stage(self) -> ReviseStage:
        return make_revise_stage(self.settings, self.models, self.constitution)

    @cached_property
    def judge_stage(self) -> JudgeStage | ContrastStage:
        return make_judge_stage(self.settings, self.models, self.constitution)


def _message_to_dict(message: object) -> object:
    """Convert a message to a dictionary. Return any other value unchanged, because the parser reports the error."""
    if isinstance(message, ChatMessage):
        return message.model_dump()
    return dict(message) if isinstance(message, Mapping) else message


def _register_model(model: str | Model, opened_models: dict[str, Model]) -> str:
    """Return the model setting. For a Model object, add the object to `opened_models` and return its name there.

    The name consists of the id and the revision of the model.
    """
    if isinstance(model, str):
        return model
    name = f"{model.id} {model.revision}"
    opened_models[name] = model
    return name
