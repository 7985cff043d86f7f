"""Local generation in batches against one prompt at a time, same model, same machine, same run: at least 10 times as fast.

python -m benchmarks.generation
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from engine.models import open_model
from engine.models.port import Ask, Model
from producers.files import SHIPPED
from producers.parse import parse_prompt
from producers.rows import rows

LEAST_RATIO = 10.0
TOKENS = 96


def asks(count: int) -> list[Ask]:
    lines = rows(str(SHIPPED), 1, count)
    return [Ask(parse_prompt(line, source="", max_chars=10**6).messages, seed=number) for number, line in lines]


def tokens_per_second(model: Model, batches: Sequence[Sequence[Ask]]) -> float:
    started, tokens = time.monotonic(), 0
    for batch in batches:
        tokens += sum(len(g.token_ids) for of_one in model.generate(batch, max_tokens=TOKENS) for g in of_one)
    return tokens / (time.monotonic() - started)


def main() -> int:
    model = open_model("smollm2", max_batch=64)
    model.generate(asks(2), max_tokens=4)  # warm
    alone = tokens_per_second(model, [[ask] for ask in asks(6)])
    for count in (32, 64):
        batched = tokens_per_second(model, [asks(count)])
        print(f"{count:3} rows: {batched:6.0f} tokens/s, one at a time {alone:5.1f}, ratio {batched / alone:4.1f}")
    return 0 if batched / alone >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
