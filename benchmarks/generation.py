"""Local generation in batches against one prompt at a time, same model, same machine, same run: at least 10 times as fast.

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
    lines = read_rows(str(SHIPPED_PROMPTS_PATH), 1, count)
    return [GenerationRequest(parse_prompt(line, source="", max_chars=10**6).messages, seed=number) for number, line in lines]


def _measure_tokens_per_second(model: Model, batches: Sequence[Sequence[GenerationRequest]]) -> float:
    started, tokens = time.monotonic(), 0
    for batch in batches:
        tokens += sum(len(g.token_ids) for of_one in model.generate(batch, max_tokens=_MAX_TOKENS) for g in of_one)
    return tokens / (time.monotonic() - started)


def main() -> int:
    model = open_model("smollm2", max_batch_size=64)
    model.generate(make_requests(2), max_tokens=4)  # warm
    alone = _measure_tokens_per_second(model, [[ask] for ask in make_requests(6)])
    for count in (32, 64):
        batched = _measure_tokens_per_second(model, [make_requests(count)])
        print(f"{count:3} rows: {batched:6.0f} tokens/s, one at a time {alone:5.1f}, ratio {batched / alone:4.1f}")
    return 0 if batched / alone >= _MIN_SPEEDUP else 1


if __name__ == "__main__":
    sys.exit(main())
