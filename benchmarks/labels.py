"""Labels and verdicts read from next-token probabilities against written ones: at least 20 times as many on a processor.

python -m benchmarks.labels [--pairs 16] [--peer 4] [--chains 8]

The same model, machine and run, on shipped prompts and answers that the model samples to them (their lengths are printed).

label     ours: the default recipe (lee2023), one principle, both orders averaged, prefixes shared.
          peer: the course's judge, one question with both answers and all principles, in one order, up to 256 tokens written
          by transformers' own `generate`, one pair at a time; and the same in batches by Charter's generation. The ratio in
          brackets is that of the same thing: both orders on either side, which are two questions to the peer.
verdict   ours: does the answer break the principle, both orders of the options. peer: the course's critique of up to 256
          tokens, the same two ways.
chain     the tokens that a prompt's whole chain computes (answers, verdicts, critiques, revisions, label), against the tokens
          of the same questions asked one by one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.generation import asks
from charter.api import Charter, Critiqued, load_constitution
from consumers import templates
from consumers.judge import Judge
from engine.models import open_model
from engine.models.chat import prompt_text
from engine.models.local import LocalModel
from engine.models.port import Ask
from schemas.records import ChatMessage, Preference, Record, Response

GOAL = {"cpu": 20.0, "cuda": 50.0}
ANSWER_TOKENS = 128
WRITTEN_TOKENS = 256
Turns = tuple[ChatMessage, ...]


def per_second(model: LocalModel, work: Callable[[], Any], count: int) -> float:
    """How many a second: of a core on a processor, whatever else runs there, of the clock on a GPU."""
    clock = time.process_time if model.device == "cpu" else time.monotonic
    started = clock()
    work()
    return count / (clock() - started)


def written_one_by_one(model: LocalModel, questions: Sequence[Turns]) -> list[str]:
    """What transformers' `generate` writes to each question, greedily."""
    texts = []
    for messages in questions:
        encoded = model.tokenizer(prompt_text(model.tokenizer, messages), return_tensors="pt", add_special_tokens=False)
        encoded = encoded.to(model.device)
        with torch.inference_mode():
            out = model.model.generate(**encoded, max_new_tokens=WRITTEN_TOKENS, do_sample=False)
        texts.append(model.tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def written_in_batches(model: LocalModel, questions: Sequence[Turns]) -> list[str]:
    made = model.generate([Ask(messages) for messages in questions], temperature=0.0, max_tokens=WRITTEN_TOKENS)
    return [generation.text for (generation,) in made]


def compare(name: str, model: LocalModel, ours: float, questions: Sequence[Turns], peers: int, orders: int = 1) -> float:
    """Print ours against both peers, which are asked one of so many orders; the ratio to the one that asks one by one."""
    lengths: list[int] = []

    def alone() -> None:
        texts = written_one_by_one(model, questions[:peers])
        lengths.extend(len(model.tokenizer(text)["input_ids"]) for text in texts)

    single = per_second(model, alone, peers)
    batched = per_second(model, lambda: written_in_batches(model, questions), len(questions))
    print(f"{name}: {ours:.2f}/s by probabilities, both orders")
    length = statistics.mean(lengths)
    for how, peer, digits in (
        (f"one by one (transformers, {length:.0f} tokens)", single, 4),
        (f"in batches of {len(questions)} (Charter)", batched, 3),
    ):
        same = f" ({orders * ours / peer:.1f})" if orders > 1 else ""
        print(f"  written, {how}: {peer:.{digits}f}/s, ratio {ours / peer:.1f}{same}")
    return ours / single


def labels(model: LocalModel, judge: Judge, responses: Sequence[Response], peers: int) -> float:
    judge(responses[:2])  # warm
    whole = judge.constitution.whole_question
    questions = [
        templates.comparison(r.messages, r.completions[0].text, r.completions[1].text, whole, templates.LETTER)
        for r in responses
    ]
    return compare("labels", model, per_second(model, lambda: judge(responses), len(responses)), questions, peers, 2)


def verdicts(model: LocalModel, charter: Charter, responses: Sequence[Response], peers: int) -> float:
    critic = charter.criticise
    links = [critic.link(response) for response in responses]
    critic.assess(links[:2])  # warm
    ours = per_second(model, lambda: critic.assess(links), len(links))
    questions = [
        templates.critique(link.fields["messages"], link.fields["text"], link.upcoming.critique, ())
        for link in links
        if link.upcoming
    ]
    return compare("verdicts", model, ours, questions, peers)


def chain_tokens(chains: Sequence[Critiqued], labelled: Sequence[Preference], samples: int) -> None:
    """Print by stage what was computed and what the same questions cost without sharing."""
    records: list[Record] = [record for chain in chains for record in chain.records]
    print(f"tokens of {len(chains)} chains: computed, without sharing, saved")
    total = [0, 0]
    for stage in ("respond", "critique", "revise", "judge"):
        of_stage = [record for record in [*records, *labelled] if record.stage == stage]
        read, written = sum(r.prompt_tokens for r in of_stage), sum(r.completion_tokens for r in of_stage)
        naive = read * (samples if stage == "respond" else 1) + written
        computed = read + written - sum(getattr(r, "cached_tokens", 0) for r in of_stage)
        total = [total[0] + computed, total[1] + naive]
        print(f"  {stage:8} {computed:8} {naive:8} {1 - computed / naive:6.1%}   ({len(of_stage)} records)")
    print(f"  {'all':8} {total[0]:8} {total[1]:8} {1 - total[0] / total[1]:6.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=16, help="pairs that our side and the batched peer judge")
    parser.add_argument("--peer", type=int, default=4, help="pairs that the peer judges one by one")
    parser.add_argument("--chains", type=int, default=8, help="prompts whose whole chain is counted")
    chosen = parser.parse_args()
    model = open_model(chosen.model, max_batch=64)
    assert isinstance(model, LocalModel)
    charter = Charter(load_constitution("default"), model, settings={"respond.max_tokens": ANSWER_TOKENS})
    prompts = [ask.messages for ask in asks(chosen.pairs)]
    responses = charter.responses(prompts)
    answers = statistics.mean(len(c.token_ids) for r in responses for c in r.completions)
    asked = statistics.mean(len(r.prompt_token_ids) for r in responses)
    print(f"{model.id} on {model.device}: prompts of {asked:.0f} tokens, answers of {answers:.0f}")
    ratios = [
        labels(model, charter.judge, responses, chosen.peer),
        verdicts(model, charter, responses, chosen.peer),
    ]
    chains = charter.self_critique_loops(responses[: chosen.chains])
    labelled = [label for (label,) in charter.judge(responses[: chosen.chains])]
    chain_tokens(chains, labelled, charter.settings.respond.samples)
    return 0 if min(ratios) >= GOAL[model.device] else 1


if __name__ == "__main__":
    sys.exit(main())
