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

from charter.pipeline import Models, make_critique, make_judge, make_respond, make_revise
from constitutions.loader import Constitution
from constitutions.loader import load as load_constitution
from consumers.critique import Criticise
from consumers.judge import Judge
from consumers.respond import Respond
from consumers.revise import Revise
from engine.errors import UsageError
from engine.models import open_model
from engine.models.port import Model
from engine.settings import Settings, load
from producers.files import DEFAULT_SOURCE, about_row, prompt_record
from producers.parse import BadRow, parse_prompt
from schemas.records import ChatMessage, Critique, EndReason, Outcome, Preference, Prompt, Record, Response, Revision

__all__ = ["Asking", "Charter", "Constitution", "Critiqued", "Judged", "load_constitution", "open_model"]

Asking = str | Sequence[ChatMessage | Mapping[str, str]] | Prompt | Response


@dataclass(frozen=True)
class Critiqued:
    """One chain of critique and revision: the first answers, and every critique and revision in order."""

    response: Response
    links: tuple[Critique | Revision, ...]

    @property
    def end(self) -> Critique | Revision:
        """The record that ends the chain."""
        return self.links[-1]

    @property
    def end_reason(self) -> EndReason:
        return self.end.end_reason

    @property
    def initial_response(self) -> str:
        return self.end.initial_response

    @property
    def final_response(self) -> str | None:
        """The text to learn from; None where the chain has none (`end_reason` is UNUSABLE)."""
        return None if self.end_reason is EndReason.UNUSABLE else self.end.final_response

    @property
    def critiques(self) -> list[Critique]:
        return [link for link in self.links if isinstance(link, Critique)]

    @property
    def revisions(self) -> list[Revision]:
        return [link for link in self.links if isinstance(link, Revision)]

    @property
    def records(self) -> list[Record]:
        return [self.response, *self.links]


@dataclass(frozen=True)
class Judged:
    """A prompt's answers and what the judge says of them: one preference for each neighbouring two of them, or with
    judge.pairing "revision" one of the final text and the first answer, or none where there is nothing to compare."""

    response: Response
    preferences: tuple[Preference, ...]
    chain: Critiqued | None = None

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
        return self.side(1)

    @property
    def rejected(self) -> str | None:
        return self.side(-1)

    def side(self, wins: int) -> str | None:
        if self.preference is None or self.p_a is None or self.p_a == 0.5:
            return None
        return self.preference.response_a if (self.p_a - 0.5) * wins > 0 else self.preference.response_b

    @property
    def records(self) -> list[Record]:
        return [*(self.chain.records if self.chain else [self.response]), *self.preferences]


class Charter:
    """A constitution and the models that work by it.

    `constitution` is a shipped one's name, a path, or a Constitution; `model` answers, and criticises and judges too unless
    `critic` or `judge` do: a Model (anything with the methods of engine.models.port.Model), or what a setting names: smollm2, a
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
        flags = {f"models.{role}": named(chosen, given) for role, chosen in roles.items() if chosen is not None}
        self.settings: Settings = load({**(settings or {}), **flags}, config)[0]
        self.models = Models(self.settings, opened=given)
        if not isinstance(constitution, Constitution):
            constitution = load_constitution(constitution or self.settings.run.constitution)
        self.constitution = constitution

    # The stages, on one prompt or on many

    def respond(self, prompt: Asking) -> Response:
        """The policy's answers to a prompt (`respond.samples` of them)."""
        (response,) = self.responses([prompt])
        return response

    def self_critique_loop(self, prompt: Asking) -> Critiqued:
        """Answer a prompt, and criticise and revise the first answer until its chain ends (Bai et al. 2022, section 3.1)."""
        (chain,) = self.self_critique_loops([prompt])
        return chain

    def generate_preference_pair(self, prompt: Asking) -> Judged:
        """Answer a prompt and judge its answers under the constitution (Bai et al. 2022, section 4.1)."""
        (judged,) = self.generate_preference_pairs([prompt])
        return judged

    def self_critique_loops(self, prompts: Iterable[Asking]) -> list[Critiqued]:
        """The same for many prompts at once, which models answer faster than one by one."""
        responses = self.responses(prompts)
        links: dict[int, list[Critique | Revision]] = {i: [] for i in range(len(responses))}
        waiting: dict[int, Response | Revision] = dict(enumerate(responses))
        while waiting:
            critiques = dict(zip(waiting, self.criticise(list(waiting.values())), strict=True))
            revisions = dict(zip(critiques, self.revise([one for (one,) in critiques.values()]), strict=True))
            for i, made in critiques.items():
                links[i] += [*made, *revisions[i]]
            waiting = {i: one for i, made in revisions.items() for one in made if not one.final}
        return [Critiqued(response, tuple(links[i])) for i, response in enumerate(responses)]

    def generate_preference_pairs(self, prompts: Iterable[Asking]) -> list[Judged]:
        if self.settings.judge.pairing == "revision":
            chains = self.self_critique_loops(prompts)
            labels = self.judge([chain.end for chain in chains])
            return [Judged(chain.response, tuple(made), chain) for chain, made in zip(chains, labels, strict=True)]
        responses = self.responses(prompts)
        for response in responses:
            if len(response.completions) < 2:
                fix = "set respond.samples to 2, or judge.pairing to revision, which compares with the revised text"
                raise UsageError("one answer is no pair", f"the response has {len(response.completions)} completions", fix)
        return [Judged(r, tuple(made)) for r, made in zip(responses, self.judge(responses), strict=True)]

    def responses(self, prompts: Iterable[Asking]) -> list[Response]:
        """A response to each; one that is a response already stays as it is."""
        asked = [one if isinstance(one, Response) else self.prompt(one) for one in prompts]
        prompted = [one for one in asked if isinstance(one, Prompt)]
        answered = iter(self.answer(prompted) if prompted else [])
        return [one if isinstance(one, Response) else next(answered)[0] for one in asked]

    def prompt(self, asked: str | Sequence[ChatMessage | Mapping[str, str]] | Prompt) -> Prompt:
        """A prompt's record; read as `charter produce` reads a row, a text or a list of messages {role, content}."""
        if isinstance(asked, Prompt):
            return asked
        limits = self.settings.prompts
        # What is neither a text nor a list of messages stays as it is: the parser says what is wrong with it.
        listed = isinstance(asked, Sequence) and not isinstance(asked, str)
        row = {"prompt": [plain(message) for message in asked] if listed else asked}
        try:
            parsed = parse_prompt(row, source=DEFAULT_SOURCE["prompts"], max_chars=limits.max_chars)
        except BadRow as error:
            fix = 'give a text, or messages such as [{"role": "user", "content": "..."}] that end with the user'
            raise UsageError("this is no prompt", str(error), fix) from error
        return prompt_record(about_row(parsed, self.settings.run.id, eval_share=limits.eval_share))

    @cached_property
    def answer(self) -> Respond:
        policy = self.models.role("policy")
        return make_respond(self.settings, lambda: (policy, 0))

    @cached_property
    def criticise(self) -> Criticise:
        return make_critique(self.settings, self.models, self.constitution)

    @cached_property
    def revise(self) -> Revise:
        return make_revise(self.settings, self.models, self.constitution)

    @cached_property
    def judge(self) -> Judge:
        return make_judge(self.settings, self.models, self.constitution)


def plain(message: object) -> object:
    """A message as a dictionary; what is no message stays as it is."""
    if isinstance(message, ChatMessage):
        return message.model_dump()
    return dict(message) if isinstance(message, Mapping) else message


def named(chosen: str | Model, given: dict[str, Model]) -> str:
    """What the settings call a model; one that is there already is put under that name into `given`."""
    if isinstance(chosen, str):
        return chosen
    name = f"{chosen.id} {chosen.revision}"
    given[name] = chosen
    return name
