"""The respond stage: prompts -> responses. The policy samples `num_completions` completions for each prompt.

A Response contains all completions of a prompt. Each completion has its token ids, their log-probabilities at the sampling
temperature, and the version of the policy that sampled it. PPO trains on exactly these tokens and does not sample again. A
completion with reasoning has no tokens, so PPO does not use it: the reward model scores the response alone, and reasoning is
never trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from consumers.chain import read_finish_reason
from consumers.templates import CHAT_TEMPLATE_HASH
from engine.errors import CharterError
from engine.models.interface import Generation, GenerationRequest, Model, Result, sum_usage
from schemas import ids
from schemas.records import Completion, ModelRef, Prompt, Response, Sampling


@dataclass(frozen=True)
class RespondStage:
    """The respond stage. `get_policy` returns the current policy and its version.

    `suite_max_tokens` replaces the maximum length of a response for the prompts of these evaluation suites.
    """

    get_policy: Callable[[], tuple[Model, int]]
    num_completions: int
    sampling: Sampling
    suite_max_tokens: Mapping[str, int] = field(default_factory=dict)

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
        configuration = self.compute_fingerprint(model, version)
        record_ids = [ids.compute_record_id("respond", [prompt.record_id], configuration) for prompt in prompts]
        requests = [
            GenerationRequest(tuple(prompt.messages), seed=ids.compute_seed(record_id), group=f"respond {record_id}")
            for prompt, record_id in zip(prompts, record_ids, strict=True)
        ]
        started = time.monotonic()
        results = model.generate(
            requests,
            num_completions=self.num_completions,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            max_thinking_tokens=self.sampling.max_thinking_tokens,
        )
        latency_ms = 1000 * (time.monotonic() - started) / len(prompts)
        lineage = {
            "model": ModelRef(id=model.id, revision=model.revision),
            "policy_version": version,
            "latency_ms": latency_ms,
        }
        return [
            result if isinstance(result, CharterError) else [self.make_response(prompt, record_id, result, lineage)]
            for prompt, record_id, result in zip(prompts, record_ids, results, strict=True)
        ]

    def compute_fingerprint(self, model: Model, version: int) -> str:
        return ids.compute_fingerprint(
            "respond",
            model=[model.id, model.revision],
            policy_version=version,
            template=CHAT_TEMPLATE_HASH,
            sampling=self.sampling.to_fingerprint(),
            num_completions=self.num_completions,
        )

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
