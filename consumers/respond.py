"""Respond: prompts -> responses. The policy answers each prompt k times.

One Response carries all completions with their token ids, their log-probabilities under the sampling temperature and the
version of the policy that sampled them: PPO trains on exactly these and never generates again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from consumers.chain import read_finish_reason
from consumers.templates import CHAT_HASH
from engine.models.port import Ask, Generation, Model, used
from schemas import ids
from schemas.records import Completion, ModelRef, Prompt, Response, Sampling


@dataclass(frozen=True)
class Respond:
    """The respond stage. `policy` gives the model that answers now and its version."""

    policy: Callable[[], tuple[Model, int]]
    samples: int
    sampling: Sampling

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[Response]]:
        model, version = self.policy()
        configuration = self.fingerprint(model, version)
        record_ids = [ids.record_id("respond", [prompt.record_id], configuration) for prompt in prompts]
        asks = [
            Ask(tuple(prompt.messages), seed=ids.seed(record_id)) for prompt, record_id in zip(prompts, record_ids, strict=True)
        ]
        started = time.monotonic()
        answers = model.generate(
            asks,
            samples=self.samples,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
        )
        latency = 1000 * (time.monotonic() - started) / len(prompts)
        lineage = {
            "model": ModelRef(id=model.id, revision=model.revision),
            "policy_version": version,
            "latency_ms": latency,
        }
        return [
            [self.response(prompt, record_id, generations, lineage)]
            for prompt, record_id, generations in zip(prompts, record_ids, answers, strict=True)
        ]

    def fingerprint(self, model: Model, version: int) -> str:
        return ids.fingerprint(
            model=[model.id, model.revision],
            policy_version=version,
            template=CHAT_HASH,
            sampling=self.sampling.model_dump(),
            samples=self.samples,
        )

    def response(
        self, prompt: Prompt, record_id: str, generations: Sequence[Generation], lineage: dict[str, object]
    ) -> Response:
        seed, usage = ids.seed(record_id), used(generations)
        version = lineage["policy_version"]
        completions = [
            Completion(
                index=index,
                text=generation.text,
                token_ids=list(generation.token_ids),
                logprobs=list(generation.logprobs),
                finish_reason=read_finish_reason(generation),
                policy_version=version,
                seed=seed,
            )
            for index, generation in enumerate(generations)
        ]
        return Response(
            record_id=record_id,
            parent_ids=[prompt.record_id],
            prompt_id=prompt.prompt_id,
            run_id=prompt.run_id,
            stage="respond",
            template_hash=CHAT_HASH,
            sampling=self.sampling,
            seed=seed,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            messages=prompt.messages,
            source=prompt.source,
            tags=prompt.tags,
            split=prompt.split,
            epoch=prompt.epoch,
            prompt_token_ids=list(generations[0].prompt_token_ids),
            completions=completions,
            **lineage,
        )
