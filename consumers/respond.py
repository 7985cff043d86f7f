"""The respond stage: prompts -> responses. The policy samples `num_completions` completions for each prompt.

A Response contains all completions of a prompt. Each completion has its token ids, their log-probabilities at the sampling
temperature, and the version of the policy that sampled it. PPO trains on exactly these tokens and does not sample again. A
completion with reasoning has no tokens, so PPO does not use it: the reward model scores the response alone, and reasoning is
never trained.

If `contrast` is set (`judge.pairing = "contrast"`), each training prompt gets one more completion: the contrast completion, which
is sampled with principles of the constitution in its prompt. It is a separate field of the Response, so that it is never taken
for a completion of the prompt alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from constitutions.loader import Constitution, CritiquePrinciple
from consumers.chain import read_finish_reason
from consumers.judge import make_constitution_ref
from consumers.templates import CHAT_TEMPLATE_HASH
from engine.constitution_prompts import (
    HEADERS_HASH,
    ConstitutionRole,
    add_principles,
    render_principles,
    select_principles,
)
from engine.errors import CharterError, PermanentRecordError, UsageError
from engine.models.interface import Generation, GenerationRequest, Model, Result, sum_usage
from engine.notices import NOTICES
from schemas import ids
from schemas.records import (
    Completion,
    ContrastCompletion,
    ModelRef,
    Prompt,
    Response,
    Sampling,
    Split,
)


@dataclass(frozen=True)
class ContrastPrompts:
    """Makes the prompts of contrast completions. `num_principles` principles are drawn for a prompt; 0 means all."""

    constitution: Constitution
    role: ConstitutionRole = "user"
    num_principles: int = 0

    def select_principles(self, prompt: Prompt) -> Sequence[CritiquePrinciple]:
        return select_principles(self.constitution, prompt.prompt_id or "", self.num_principles, prompt.tags)

    def make_request(self, model: Model, prompt: Prompt, record_id: str) -> GenerationRequest:
        """Return the request with the principles in its prompt. Raise UsageError if no principle applies, or if the prompt has no place."""
        if not (principles := self.select_principles(prompt)):
            raise UsageError(
                f"no principle of {self.constitution.name} applies to the tags {', '.join(prompt.tags) or '(none)'}",
                "each principle names the tags that it applies to",
                "add a principle without tags, or tag the prompt",
            )
        text = render_principles(self.constitution, principles)
        tokenizer = getattr(model, "tokenizer", None)  # a model on a server has none
        messages = add_principles(tokenizer, prompt.messages, text, self.role, "contrast.constitution_role")
        return GenerationRequest(messages, seed=ids.compute_seed(record_id, 1), group=f"respond {record_id}")

    def compute_fingerprint(self, respond: str) -> str:
        """Return the fingerprint of responses with a contrast completion. `respond` is the fingerprint of those without one."""
        return ids.compute_fingerprint(
            "contrast_prompt",
            respond=respond,
            constitution=self.constitution.hash,
            role=self.role,
            principles=self.num_principles,
            header=HEADERS_HASH,
        )

    def make_completion(self, generation: Generation, prompt: Prompt, record_id: str) -> ContrastCompletion:
        return ContrastCompletion(
            text=generation.text,
            finish_reason=read_finish_reason(generation),
            seed=ids.compute_seed(record_id, 1),
            reasoning=generation.reasoning,
            principle_ids=[principle.id for principle in self.select_principles(prompt)],
            role=self.role,
        )


@dataclass(frozen=True)
class RespondStage:
    """The respond stage. `get_policy` returns the current policy and its version.

    `suite_max_tokens` replaces the maximum length of a response for the prompts of these evaluation suites. With `contrast`, each
    training prompt also gets a contrast completion.
    """

    get_policy: Callable[[], tuple[Model, int]]
    num_completions: int
    sampling: Sampling
    suite_max_tokens: Mapping[str, int] = field(default_factory=dict)
    contrast: ContrastPrompts | None = None

    def __call__(self, prompts: Sequence[Prompt]) -> list[Result[list[Response]]]:
        limits = [self.get_max_tokens(prompt) for prompt in prompts]
        results: dict[int, Result[list[Response]]] = {}
        for limit in dict.fromkeys(limits):
            positions = [position for position, other in enumerate(limits) if other == limit]
            stage = replace(self, sampling=self.sampling.model_copy(update={"max_tokens": limit}))
            results |= zip(positions, stage.respond([prompts[position] for position in positions]), strict=True)
        return [results[position] for position in range(len(prompts))]

    def get_max_tokens(self, prompt: Prompt) -> int:
        suite = prompt.suite_item.suite if prompt.suite_item else ""
        return self.suite_max_tokens.get(suite, self.sampling.max_tokens)

    def respond(self, prompts: Sequence[Prompt]) -> list[Result[list[Response]]]:
        """Return the responses to prompts that all have the same sampling parameters."""
        model, version = self.get_policy()
        record_ids = [
            ids.compute_record_id("respond", [prompt.record_id], self.compute_fingerprint(model, version, prompt))
            for prompt in prompts
        ]
        requests = [
            GenerationRequest(tuple(prompt.messages), seed=ids.compute_seed(record_id), group=f"respond {record_id}")
            for prompt, record_id in zip(prompts, record_ids, strict=True)
        ]
        started = time.monotonic()
        results = self.generate(model, requests, self.num_completions)
        answered = [n for n, result in enumerate(results) if not isinstance(result, CharterError)]
        contrasts = self.sample_contrasts(model, {record_ids[n]: prompts[n] for n in answered})
        latency_ms = 1000 * (time.monotonic() - started) / len(prompts)
        lineage = {
            "model": ModelRef(id=model.id, revision=model.revision),
            "policy_version": version,
            "latency_ms": latency_ms,
        }
        responses: list[Result[list[Response]]] = []
        for prompt, record_id, result in zip(prompts, record_ids, results, strict=True):
            contrast = contrasts.get(record_id)
            if isinstance(result, CharterError):
                responses.append(result)
            elif isinstance(contrast, CharterError):
                responses.append(contrast)
            else:
                response = self.make_response(prompt, record_id, result, lineage)
                responses.append([self.add_contrast(response, contrast, prompt)])
        return responses

    def generate(self, model: Model, requests: Sequence[GenerationRequest], count: int) -> Sequence[Result[list[Generation]]]:
        return model.generate(
            requests,
            num_completions=count,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            max_thinking_tokens=self.sampling.max_thinking_tokens,
        )

    def has_contrast(self, prompt: Prompt) -> bool:
        """Return whether a prompt gets a contrast completion. Only training prompts do."""
        return self.contrast is not None and prompt.split is Split.TRAIN

    def sample_contrasts(self, model: Model, prompts: Mapping[str, Prompt]) -> dict[str, Result[Generation]]:
        """Sample the contrast completions of prompts. The keys are the ids of the responses.

        A prompt that can have none is reported and left out. The value is an error if the response has to be tried again.
        """
        requests: dict[str, GenerationRequest] = {}
        for record_id, prompt in prompts.items():
            if self.contrast and self.has_contrast(prompt):
                try:
                    requests[record_id] = self.contrast.make_request(model, prompt, record_id)
                except UsageError as error:
                    _report_no_contrast(error)
        results = self.generate(model, list(requests.values()), 1) if requests else []
        contrasts: dict[str, Result[Generation]] = {}
        for record_id, result in zip(requests, results, strict=True):
            if isinstance(result, PermanentRecordError):  # e.g. the longer prompt exceeds the context of the model
                _report_no_contrast(result)
            else:
                contrasts[record_id] = result if isinstance(result, CharterError) else result[0]
        return contrasts

    def add_contrast(self, response: Response, generation: Generation | None, prompt: Prompt) -> Response:
        """Return the response with its contrast completion. `generation` is None if the prompt can have none."""
        if self.contrast is None or not self.has_contrast(prompt):
            return response
        # The constitution is part of the record id, also if the prompt can have no contrast completion.
        response = response.model_copy(update={"constitution": make_constitution_ref(self.contrast.constitution)})
        if generation is None:
            return response
        usage = sum_usage([generation])
        return response.model_copy(
            update={
                "contrast_completion": self.contrast.make_completion(generation, prompt, response.record_id),
                "prompt_tokens": response.prompt_tokens + usage.prompt_tokens,
                "completion_tokens": response.completion_tokens + usage.completion_tokens,
            }
        )

    def compute_fingerprint(self, model: Model, version: int, prompt: Prompt) -> str:
        fingerprint = ids.compute_fingerprint(
            "respond",
            model=[model.id, model.revision],
            policy_version=version,
            template=CHAT_TEMPLATE_HASH,
            sampling=self.sampling.to_fingerprint(),
            num_completions=self.num_completions,
        )
        return self.contrast.compute_fingerprint(fingerprint) if self.contrast and self.has_contrast(prompt) else fingerprint

    def make_response(
        self, prompt: Prompt, record_id: str, generations: Sequence[Generation], lineage: dict[str, object]
    ) -> Response:
        seed, usage = ids.compute_seed(record_id), sum_usage(generations)
        version = lineage["policy_version"]
        completions = [
            Completion(
                index=index,
                text=generation.text,
                token_ids=[] if generation.reasoning else list(generation.token_ids),
                logprobs=[] if generation.reasoning else list(generation.logprobs),
                finish_reason=read_finish_reason(generation),
                policy_version=version,
                seed=seed,
                reasoning=generation.reasoning,
            )
            for index, generation in enumerate(generations)
        ]
        return Response(
            record_id=record_id,
            parent_ids=[prompt.record_id],
            prompt_id=prompt.prompt_id,
            run_id=prompt.run_id,
            stage="respond",
            template_hash=CHAT_TEMPLATE_HASH,
            sampling=self.sampling,
            seed=seed,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            messages=prompt.messages,
            source=prompt.source,
            tags=prompt.tags,
            split=prompt.split,
            epoch=prompt.epoch,
            purpose=prompt.purpose,
            suite_item=prompt.suite_item,
            prompt_token_ids=list(generations[0].prompt_token_ids),
            completions=completions,
            **lineage,
        )


def _report_no_contrast(error: CharterError) -> None:
    NOTICES.report(
        "contrast",
        error.what,
        f"a response gets no contrast completion, so there is no contrast pair: {error.what}: {error.why}",
    )
