"""Compare local generation in batches with one prompt at a time, with the same model. The goal is a speedup of 10.

python -m benchmarks.generation
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from engine.models import open_model
from engine.models.interface import GenerationRequest, Model
from producers.files import SHIPPED_PROMPTS_PATH
from producers.parse import parse_prompt
from producers.rows import read_rows

_MIN_SPEEDUP = 10.0
_MAX_TOKENS = 96


def make_requests(count: int) -> list[GenerationRequest]:
    """Return requests for the first `count` shipped prompts."""
    rows = read_rows(str(SHIPPED_PROMPTS_PATH), 1, count)
    return [GenerationRequest(parse_prompt(row, source="", max_chars=10**6).messages, seed=number) for number, row in rows]


def _measure_tokens_per_second(model: Model, batches: Sequence[Sequence[GenerationRequest]]) -> float:
    started, tokens = time.monotonic(), 0
    for batch in batches:
        tokens += sum(len(generation.token_ids) for (generation,) in model.generate(batch, max_tokens=_MAX_TOKENS))
    return tokens / (time.monotonic() - started)


def main() -> int:
    model = open_model("smollm2", max_batch_size=64)
    model.generate(make_requests(2), max_tokens=4)  # warm up
    sequential = _measure_tokens_per_second(model, [[request] for request in make_requests(6)])
    for count in (32, 64):
        batched = _measure_tokens_per_second(model, [make_requests(count)])
        print(f"{count:3} rows: {batched:6.0f} tokens/s, one at a time {sequential:5.1f}, ratio {batched / sequential:4.1f}")
    return 0 if batched / sequential >= _MIN_SPEEDUP else 1


if __name__ == "__main__":
    sys.exit(main())
