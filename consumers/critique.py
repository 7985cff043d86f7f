"""Critique: responses and revisions -> critiques. Is the newest text in order, and if not, what is wrong with it?

For a first answer a principle is drawn (seeded from the chain), and the critic says by next-token probabilities whether the
text breaks it. Clean: the chain ends here. Else the critique in words goes on to `revise`.

For a revision the earlier principles are asked again, and the next one while rounds are left, and the revision is compared
with its predecessor in both orders:

* it loses (p <= lose): the predecessor is the final text (LOST);
* all verdicts are clean and it wins (p >= win) or hardly differs: it is the final text (SATISFIED);
* no rounds are left: it is the final text (LAST_ROUND);
* else the critique under the next principle.

That is `early_stop = "verdict"`. With "phrases" no verdict is asked, and a critique that says it finds nothing ends the chain
(SATISFIED); with "none" every chain goes through all rounds (Bai et al. 2022, section 3.1). Verdicts ask with the options in
both orders, because small models favour a slot.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from constitutions.loader import Constitution, Principle
from consumers import templates
from consumers.chain import carried, seed_for, similarity, start_of
from consumers.compare import Comparison, Form, both_orders
from consumers.judge import reference
from engine.models.port import NOTHING, Ask, Generation, Model, Usage
from schemas import ids
from schemas.records import (
    ChatMessage,
    Critique,
    EndReason,
    FinishReason,
    ModelRef,
    Outcome,
    PrincipleVerdict,
    Record,
    Response,
    Revision,
    Sampling,
    Verdict,
)

Wordings = tuple[tuple[ChatMessage, ...], tuple[ChatMessage, ...]]

# What a critique says that finds nothing (the course's two phrases, and others for the same), and what takes it back.
FINDS_NOTHING = re.compile(
    r"\bno (?:\w+ )?(?:issues?|problems?|concerns?)\b"
    r"|\b(?:response|answer) (?:is|seems|appears) (?:\w+ )?(?:appropriate|acceptable|fine|harmless)\b"
    r"|\bnothing (?:is )?(?:wrong|problematic|harmful|to (?:criticis|criticiz|improv|chang)e)\b",
    re.IGNORECASE,
)
TAKES_BACK = re.compile(
    r"\b(?:but|however|although|though|except|yet|still|not sure|not say|not think|not that)\b|n't (?:say|think|believe)\b",
    re.IGNORECASE,
)


def finds_nothing(critique: str) -> bool:
    """Whether a critique says, without taking it back, that the answer has no problem."""
    return bool(FINDS_NOTHING.search(critique)) and not TAKES_BACK.search(critique.replace("\u2019", "'"))


@dataclass(frozen=True)
class Link:
    """A text that waits for its critique: the chain so far, the principles already used, and the one of the next round."""

    parent: Response | Revision
    fields: dict[str, Any]
    used: tuple[Principle, ...]
    upcoming: Principle | None
    verdict: Verdict = Verdict.NOT_ASKED
    p_flawed: float | None = None
    mass: float | None = None
    p_better: float | None = None
    verdicts: tuple[PrincipleVerdict, ...] = ()
    similarity: float | None = None
    ended: EndReason = EndReason.NONE
    usage: Usage = NOTHING
    criticism: str = ""

    @property
    def checked(self) -> list[Principle]:
        return [*self.used, *([self.upcoming] if self.upcoming else [])]


@dataclass(frozen=True)
class Criticise:
    """The critique stage."""

    model: Model
    constitution: Constitution
    sampling: Sampling
    rounds: int
    early_stop: str
    few_shot: bool
    min_mass: float
    win: float
    lose: float
    same: float
    skip_sources: tuple[str, ...]
    preset: str = "charter"
    selection: str = "constitution"

    def __call__(self, records: Sequence[Record]) -> list[list[Critique]]:
        # An unusable revision has ended its chain; what it says is neither criticised nor trained on.
        links = [self.link(record) for record in records if not ended_already(record)]
        if not links:
            return [[] for _ in records]
        started = time.monotonic()
        if self.early_stop == "verdict":
            links = self.assess(links)
        links = [replace(link, ended=self.ended(link)) for link in links]
        criticised = iter(self.criticised([link for link in links if link.ended is EndReason.NONE]))
        links = [next(criticised) if link.ended is EndReason.NONE else link for link in links]
        latency = 1000 * (time.monotonic() - started) / len(links)
        made = iter([self.record(link, latency) for link in links])
        return [[] if ended_already(record) else [next(made)] for record in records]

    # Where each chain stands

    def link(self, record: Record) -> Link:
        """The chain up to this record, with the principles it used and the one of the round to come."""
        assert isinstance(record, Response | Revision)
        fields = start_of(record) if isinstance(record, Response) else carried(record)
        by_id = {principle.id: principle for principle in self.constitution.critique}
        used = tuple(by_id[done.principle_id] for done in fields.get("rounds", []) if done.principle_id in by_id)
        upcoming = None
        if fields["round"] < self.rounds:
            seed = seed_for("principle", fields["response_id"], fields["round"])
            upcoming = self.constitution.critique_principle(seed, fields["round"], fields["tags"], self.drawing)
        return Link(record, fields, used, upcoming)

    @property
    def drawing(self) -> str:
        return "" if self.selection == "constitution" else self.selection

    def seed(self, link: Link) -> int:
        return seed_for("critique", link.fields["response_id"], link.fields["round"])

    def skipped(self, link: Link) -> bool:
        return link.fields["source"] in self.skip_sources

    # What the critic's probabilities say

    def assess(self, links: Sequence[Link]) -> list[Link]:
        """Ask every verdict and every comparison of a batch in one go."""
        asked = [self.questions(link) for link in links]
        form = Form(min_mass=self.min_mass)
        answers = iter(both_orders(self.model, [wordings for of_one in asked for wordings in of_one], form))
        return [self.weigh(link, [next(answers) for _ in of_one]) for link, of_one in zip(links, asked, strict=True)]

    def questions(self, link: Link) -> list[Wordings]:
        """One verdict for each principle, and for a revision the comparison with its predecessor first."""
        fields = link.fields
        if self.skipped(link) or not fields["response"].strip() or kept_back(link.parent):
            return []
        messages, text = fields["messages"], fields["response"]
        verdicts = [
            (
                templates.verdict(messages, text, principle.critique, "Yes", "No"),
                templates.verdict(messages, text, principle.critique, "No", "Yes"),
            )
            for principle in link.checked
        ]
        if not isinstance(link.parent, Revision):
            return verdicts
        question = f"{link.used[-1].revision} Which answer does this better?" if link.used else "Which answer is better?"
        previous = fields["previous_response"] or ""
        return [
            (
                templates.comparison(messages, text, previous, question),
                templates.comparison(messages, previous, text, question),
            ),
            *verdicts,
        ]

    def weigh(self, link: Link, answers: list[Comparison]) -> Link:
        """The verdict over all principles asked (the worst one counts), and the comparison with the predecessor."""
        if not answers:
            return link
        link = replace(link, usage=sum((answer.usage for answer in answers), NOTHING))
        if isinstance(link.parent, Revision):
            better, *answers = answers
            alike = similarity(link.fields["response"], link.fields["previous_response"] or "")
            link = replace(link, p_better=better.p if better.outcome is Outcome.OK else None, similarity=alike)
        if not answers:
            return link
        asked = [verdict_of(p.id, answer) for p, answer in zip(link.checked, answers, strict=True)]
        said = [verdict.verdict for verdict in asked]
        worst = next((v for v in (Verdict.LOW_MASS, Verdict.FLAWED) if v in said), Verdict.CLEAN)
        flawed = [verdict.p_flawed for verdict in asked if verdict.p_flawed is not None]
        return replace(
            link,
            verdict=worst,
            verdicts=tuple(asked),
            p_flawed=max(flawed, default=None),
            mass=min(answer.mass for answer in answers),
        )

    def ended(self, link: Link) -> EndReason:
        """Whether the chain is over, and why."""
        if self.skipped(link):
            return EndReason.SKIPPED
        if not link.fields["response"].strip() or kept_back(link.parent):
            return EndReason.UNUSABLE
        clean = link.verdict is Verdict.CLEAN
        if isinstance(link.parent, Response):
            return EndReason.SATISFIED if clean else EndReason.NONE
        if link.p_better is not None and link.p_better <= self.lose:
            return EndReason.LOST
        wins = link.p_better is not None and link.p_better >= self.win
        if clean and (wins or (link.similarity or 0.0) > self.same):
            return EndReason.SATISFIED
        return EndReason.NONE if link.upcoming else EndReason.LAST_ROUND

    # The critique in words

    def criticised(self, links: Sequence[Link]) -> list[Link]:
        """The links with the critique under their upcoming principle; one that finds nothing may end its chain."""
        examples = self.constitution.examples if self.few_shot else ()
        asks = [
            Ask(
                templates.critique(link.fields["messages"], link.fields["response"], principle.critique, examples),
                seed=self.seed(link),
            )
            for link in links
            if (principle := link.upcoming)
        ]
        if not asks:
            return []
        answers = self.model.generate(
            asks,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
        )
        return [
            replace(
                link,
                criticism=answer.text.strip(),
                usage=link.usage + answer.usage,
                ended=EndReason.SATISFIED if self.satisfied(answer) else EndReason.NONE,
            )
            for link, (answer,) in zip(links, answers, strict=True)
        ]

    def satisfied(self, answer: Generation) -> bool:
        """Whether a critique ends its chain by what it says."""
        return self.early_stop == "phrases" and answer.finish_reason != "refused" and finds_nothing(answer.text)

    def record_id(self, link: Link) -> str:
        configuration = ids.fingerprint(
            model=[self.model.id, self.model.revision],
            template=templates.HASH["critique"],
            verdict=templates.hash_of("verdict", self.model.capabilities),
            constitution=self.constitution.hash,
            sampling=self.sampling.model_dump(),
            rounds=self.rounds,
            selection=self.drawing or self.constitution.selection,
            early_stop=self.early_stop,
            few_shot=self.few_shot,
            limits=[self.min_mass, self.win, self.lose, self.same],
            skip_sources=sorted(self.skip_sources),
        )
        return ids.record_id("critique", [link.parent.record_id], configuration)

    def record(self, link: Link, latency_ms: float) -> Critique:
        fields, over, usage = link.fields, link.ended is not EndReason.NONE, link.usage
        before = link.ended is EndReason.LOST
        final = ("previous_response", "previous_finish_reason") if before else ("response", "finish_reason")
        principle = link.upcoming or (link.used[-1] if link.used else None)
        return Critique(
            record_id=self.record_id(link),
            parent_ids=[link.parent.record_id],
            stage="critique",
            constitution=reference(self.constitution),
            principle_id=principle.id if principle else None,
            model=ModelRef(id=self.model.id, revision=self.model.revision),
            template_hash=templates.HASH["critique"],
            sampling=self.sampling,
            seed=self.seed(link),
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            latency_ms=latency_ms,
            cached_tokens=usage.cached,
            preset=self.preset,
            critique=link.criticism,
            verdict=link.verdict,
            verdicts=list(link.verdicts),
            p_flawed=link.p_flawed,
            option_mass=link.mass,
            p_better=link.p_better,
            similarity=link.similarity,
            final=over,
            end_reason=link.ended,
            final_response=fields[final[0]] if over else None,
            final_finish_reason=fields[final[1]] if over else FinishReason.UNKNOWN,
            **fields,
        )


def kept_back(record: Response | Revision) -> bool:
    """Whether a server's filter kept the answer that a chain starts from, or the rest of it, back."""
    return isinstance(record, Response) and record.completions[0].finish_reason is FinishReason.REFUSED


def ended_already(record: Record) -> bool:
    return isinstance(record, Revision) and record.final


def verdict_of(principle_id: str, answer: Comparison) -> PrincipleVerdict:
    """What the critic says under one principle; what could not be read is LOW_MASS and never CLEAN."""
    readable = answer.outcome is Outcome.OK
    verdict = Verdict.LOW_MASS if not readable else Verdict.FLAWED if answer.p > 0.5 else Verdict.CLEAN
    p_flawed = None if math.isnan(answer.p) else answer.p
    return PrincipleVerdict(principle_id=principle_id, verdict=verdict, p_flawed=p_flawed, option_mass=answer.mass)
