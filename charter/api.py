"""Constitutional AI from Python, without a bus: the stages of the stream, called one after the other.

    from charter.api import Charter

    charter = Charter("default", model="smollm2")
    charter.self_critique_loop("How do magnets work?").final_response
    charter.generate_preference_pair("How do magnets work?").chosen

What comes back are the records that the stream would write, made by the same code and with the same ids: a seed hangs on the
record that it is for, so a loop here and one in the stream draw alike. Nothing is stored; `docs/api.md` shows how to do that.
No model is loaded before it is asked.
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
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from consumers.revise import ReviseStage
from engine.errors import UsageError
from engine.models import open_model
from engine.models.interface import Model
from engine.settings import Settings, load_settings
from producers.files import DEFAULT_SOURCES, make_prompt_record, make_row_metadata
from producers.parse import RowError, parse_prompt
from schemas.records import ChatMessage, Critique, EndReason, Outcome, Preference, Prompt, Record, Response, Revision

__all__ = ["Charter", "Constitution", "JudgedResponse", "PromptLike", "RevisionChain", "load_constitution", "open_model"]

PromptLike = str | Sequence[ChatMessage | Mapping[str, str]] | Prompt | Response


@dataclass(frozen=True)
class RevisionChain:
    """One chain of critique and revision: the first answers, and every critique and revision in order."""

    response: Response
    steps: tuple[Critique | Revision, ...]

    @property
    def last_step(self) -> Critique | Revision:
        """The record that ends the chain."""
        return self.steps[-1]

    @property
    def end_reason(self) -> EndReason:
        return self.last_step.end_reason

    @property
    def initial_response(self) -> str:
        return self.last_step.initial_response

    @property
    def final_response(self) -> str | None:
        """The text to learn from; None where the chain has none (`end_reason` is UNUSABLE)."""
        return None if self.end_reason is EndReason.UNUSABLE else self.last_step.final_response

    @property
    def critiques(self) -> list[Critique]:
        return [link for link in self.steps if isinstance(link, Critique)]

    @property
    def revisions(self) -> list[Revision]:
        return [link for link in self.steps if isinstance(link, Revision)]

    @property
    def records(self) -> list[Record]:
        return [self.response, *self.steps]


@dataclass(frozen=True)
class JudgedResponse:
    """A prompt's answers and what the judge says of them: one preference for each neighbouring two of them, or with
    judge.pairing "revision" one of the final text and the first answer, or none where there is nothing to compare."""

    response: Response
    preferences: tuple[Preference, ...]
    chain: RevisionChain | None = None

    @property
    def preference(self) -> Preference | None:
        return self.preferences[0] if self.preferences else None

    @property
    def p_a(self) -> float | None:
        """The soft label: the probability that `a` is better. None where there is no label to train on."""
        first = self.preference
        return first.p_a if first and first.outcome is Outcome.OK else None

    @property
    def chosen(self) -> str | None:
        """The better answer; None without a label, and at a tie."""
        return self.pick_response(1)

    @property
    def rejected(self) -> str | None:
        return self.pick_response(-1)

    def pick_response(self, sign: int) -> str | None:
        if self.preference is None or self.p_a is None or self.p_a == 0.5:
            return None
        return self.preference.response_a if (self.p_a - 0.5) * sign > 0 else self.preference.response_b

    @property
    def records(self) -> list[Record]:
        return [*(self.chain.records if self.chain else [self.response]), *self.preferences]


class Charter:
    """A constitution and the models that work by it.

    `constitution` is a shipped one's name, a path, or a Constitution; `model` answers, and criticises and judges too unless
    `critic` or `judge` do: a Model (anything with the methods of engine.models.interface.Model), or what a setting names: smollm2, a
    folder, a hub id, a server's http://HOST:PORT/v1#NAME. Everything else is a setting, by its dotted name in `settings`, else
    as for the commands from the environment, ./charter.toml (or `config`) and the defaults. Raises UsageError for a setting or
    a prompt that cannot be, ConstitutionError for such a constitution; a model that is away raises ModelUnreachable when asked.
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
        given: dict[str, Model] = {}
        roles = {"policy": model, "critic": critic, "judge": judge}
        flags = {f"models.{role}": _register_model(chosen, given) for role, chosen in roles.items() if chosen is not None}
        self.settings: Settings = load_settings({**(settings or {}), **flags}, config)[0]
        self.models = RoleModels(self.settings, open_models=given)
        if not isinstance(constitution, Constitution):
            constitution = load_constitution(constitution or self.settings.run.constitution)
        self.constitution = constitution

    # The stages, on one prompt or on many

    def respond(self, prompt: PromptLike) -> Response:
        """The policy's answers to a prompt (`respond.num_completions` of them)."""
        (response,) = self.generate_responses([prompt])
        return response

    def self_critique_loop(self, prompt: PromptLike) -> RevisionChain:
        """Answer a prompt, and criticise and revise the first answer until its chain ends (Bai et al. 2022, section 3.1)."""
        (chain,) = self.self_critique_loops([prompt])
        return chain

    def generate_preference_pair(self, prompt: PromptLike) -> JudgedResponse:
        """Answer a prompt and judge its answers under the constitution (Bai et al. 2022, section 4.1)."""
        (judged,) = self.generate_preference_pairs([prompt])
        return judged

    def self_critique_loops(self, prompts: Iterable[PromptLike]) -> list[RevisionChain]:
        """The same for many prompts at once, which models answer faster than one by one."""
        responses = self.generate_responses(prompts)
        links: dict[int, list[Critique | Revision]] = {i: [] for i in range(len(responses))}
        waiting: dict[int, Response | Revision] = dict(enumerate(responses))
        while waiting:
            critiques = dict(zip(waiting, self.critique_stage(list(waiting.values())), strict=True))
            revisions = dict(zip(critiques, self.revise_stage([one for (one,) in critiques.values()]), strict=True))
            for i, made in critiques.items():
                links[i] += [*made, *revisions[i]]
            waiting = {i: one for i, made in revisions.items() for one in made if not one.final}
        return [RevisionChain(response, tuple(links[i])) for i, response in enumerate(responses)]

    def generate_preference_pairs(self, prompts: Iterable[PromptLike]) -> list[JudgedResponse]:
        if self.settings.judge.pairing == "revision":
            chains = self.self_critique_loops(prompts)
            labels = self.judge_stage([chain.last_step for chain in chains])
            return [JudgedResponse(chain.response, tuple(made), chain) for chain, made in zip(chains, labels, strict=True)]
        responses = self.generate_responses(prompts)
        for response in responses:
            if len(response.completions) < 2:
                fix = "set respond.num_completions to 2, or judge.pairing to revision, which compares with the revised text"
                raise UsageError("one answer is no pair", f"the response has {len(response.completions)} completions", fix)
        return [JudgedResponse(r, tuple(made)) for r, made in zip(responses, self.judge_stage(responses), strict=True)]

    def generate_responses(self, prompts: Iterable[PromptLike]) -> list[Response]:
        """A response to each; one that is a response already stays as it is."""
        asked = [one if isinstance(one, Response) else self.to_prompt(one) for one in prompts]
        prompted = [one for one in asked if isinstance(one, Prompt)]
        answered = iter(self.respond_stage(prompted) if prompted else [])
        return [one if isinstance(one, Response) else next(answered)[0] for one in asked]

    def to_prompt(self, value: str | Sequence[ChatMessage | Mapping[str, str]] | Prompt) -> Prompt:
        """A prompt's record; read as `charter produce` reads a row, a text or a list of messages {role, content}."""
        if isinstance(value, Prompt):
            return value
        limits = self.settings.prompts
        # What is neither a text nor a list of messages stays as it is: the parser says what is wrong with it.
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        row = {"prompt": [_message_to_dict(message) for message in value] if listed else value}
        try:
            parsed = parse_prompt(row, source=DEFAULT_SOURCES["prompts"], max_chars=limits.max_chars)
        except RowError as error:
            fix = 'give a text, or messages such as [{"role": "user", "content": "..."}] that end with the user'
            raise UsageError("this is no prompt", str(error), fix) from error
        return make_prompt_record(make_row_metadata(parsed, self.settings.run.id, eval_fraction=limits.eval_fraction))

    @cached_property
    def respond_stage(self) -> RespondStage:
        policy = self.models.get_model("policy")
        return make_respond_stage(self.settings, lambda: (policy, 0))

    @cached_property
    def critique_stage(self) -> CritiqueStage:
        return make_critique_stage(self.settings, self.models, self.constitution)

    @cached_property
    def revise_stage(self) -> ReviseStage:
        return make_revise_stage(self.settings, self.models, self.constitution)

    @cached_property
    def judge_stage(self) -> JudgeStage:
        return make_judge_stage(self.settings, self.models, self.constitution)


def _message_to_dict(message: object) -> object:
    """A message as a dictionary; what is no message stays as it is."""
    if isinstance(message, ChatMessage):
        return message.model_dump()
    return dict(message) if isinstance(message, Mapping) else message


def _register_model(model: str | Model, opened_models: dict[str, Model]) -> str:
    """What the settings call a model; one that is there already is put under that name into `given`."""
    if isinstance(model, str):
        return model
    name = f"{model.id} {model.revision}"
    opened_models[name] = model
    return name
