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

from benchmarks.generation import make_requests
from charter.api import Charter, RevisionChain, load_constitution
from consumers import templates
from consumers.judge import JudgeStage
from engine.models import open_model
from engine.models.chat_template import format_prompt
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage, Preference, Record, Response

_MIN_RATIO = {"cpu": 20.0, "cuda": 50.0}
_MAX_RESPONSE_TOKENS = 128
_MAX_WRITTEN_TOKENS = 256
_Messages = tuple[ChatMessage, ...]


def _measure_per_second(model: LocalModel, work: Callable[[], Any], count: int) -> float:
    """How many a second: of a core on a processor, whatever else runs there, of the clock on a GPU."""
    clock = time.process_time if model.device == "cpu" else time.monotonic
    started = clock()
    work()
    return count / (clock() - started)


def _generate_one_by_one(model: LocalModel, questions: Sequence[_Messages]) -> list[str]:
    """What transformers' `generate` writes to each question, greedily."""
    texts = []
    for messages in questions:
        encoded = model.tokenizer(format_prompt(model.tokenizer, messages), return_tensors="pt", add_special_tokens=False)
        encoded = encoded.to(model.device)
        with torch.inference_mode():
            out = model.model.generate(**encoded, max_new_tokens=_MAX_WRITTEN_TOKENS, do_sample=False)
        texts.append(model.tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def _generate_in_batches(model: LocalModel, questions: Sequence[_Messages]) -> list[str]:
    made = model.generate(
        [GenerationRequest(messages) for messages in questions], temperature=0.0, max_tokens=_MAX_WRITTEN_TOKENS
    )
    return [generation.text for (generation,) in made]


def _compare_with_peers(
    name: str, model: LocalModel, ours: float, questions: Sequence[_Messages], num_sequential: int, num_orders: int = 1
) -> float:
    """Print ours against both peers, which are asked one of so many orders; the ratio to the one that asks one by one."""
    lengths: list[int] = []

    def alone() -> None:
        texts = _generate_one_by_one(model, questions[:num_sequential])
        lengths.extend(len(model.tokenizer(text)["input_ids"]) for text in texts)

    single = _measure_per_second(model, alone, num_sequential)
    batched = _measure_per_second(model, lambda: _generate_in_batches(model, questions), len(questions))
    print(f"{name}: {ours:.2f}/s by probabilities, both orders")
    length = statistics.mean(lengths)
    for how, peer, digits in (
        (f"one by one (transformers, {length:.0f} tokens)", single, 4),
        (f"in batches of {len(questions)} (Charter)", batched, 3),
    ):
        same = f" ({num_orders * ours / peer:.1f})" if num_orders > 1 else ""
        print(f"  written, {how}: {peer:.{digits}f}/s, ratio {ours / peer:.1f}{same}")
    return ours / single


def _compare_labels(model: LocalModel, judge: JudgeStage, responses: Sequence[Response], num_sequential: int) -> float:
    judge(responses[:2])  # warm
    whole = judge.constitution.combined_judge_prompt
    questions = [
        templates.make_comparison_messages(
            r.messages, r.completions[0].text, r.completions[1].text, whole, templates.LETTER_TEMPLATE
        )
        for r in responses
    ]
    return _compare_with_peers(
        "labels", model, _measure_per_second(model, lambda: judge(responses), len(responses)), questions, num_sequential, 2
    )


def _compare_verdicts(model: LocalModel, charter: Charter, responses: Sequence[Response], num_sequential: int) -> float:
    critic = charter.critique_stage
    links = [critic.make_state(response) for response in responses]
    critic.assess_states(links[:2])  # warm
    ours = _measure_per_second(model, lambda: critic.assess_states(links), len(links))
    questions = [
        templates.make_critique_messages(link.fields["messages"], link.fields["text"], link.next_principle.critique_prompt, ())
        for link in links
        if link.next_principle
    ]
    return _compare_with_peers("verdicts", model, ours, questions, num_sequential)


def _print_chain_tokens(chains: Sequence[RevisionChain], preferences: Sequence[Preference], num_completions: int) -> None:
    """Print by stage what was computed and what the same questions cost without sharing."""
    records: list[Record] = [record for chain in chains for record in chain.records]
    print(f"tokens of {len(chains)} chains: computed, without sharing, saved")
    total = [0, 0]
    for stage in ("respond", "critique", "revise", "judge"):
        of_stage = [record for record in [*records, *preferences] if record.stage == stage]
        read, written = sum(r.prompt_tokens for r in of_stage), sum(r.completion_tokens for r in of_stage)
        naive = read * (num_completions if stage == "respond" else 1) + written
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
    model = open_model(chosen.model, max_batch_size=64)
    assert isinstance(model, LocalModel)
    charter = Charter(load_constitution("default"), model, settings={"respond.max_tokens": _MAX_RESPONSE_TOKENS})
    prompts = [ask.messages for ask in make_requests(chosen.pairs)]
    responses = charter.generate_responses(prompts)
    answers = statistics.mean(len(c.token_ids) for r in responses for c in r.completions)
    asked = statistics.mean(len(r.prompt_token_ids) for r in responses)
    print(f"{model.id} on {model.device}: prompts of {asked:.0f} tokens, answers of {answers:.0f}")
    ratios = [
        _compare_labels(model, charter.judge_stage, responses, chosen.peer),
        _compare_verdicts(model, charter, responses, chosen.peer),
    ]
    chains = charter.self_critique_loops(responses[: chosen.chains])
    labelled = [label for (label,) in charter.judge_stage(responses[: chosen.chains])]
    _print_chain_tokens(chains, labelled, charter.settings.respond.num_completions)
    return 0 if min(ratios) >= _MIN_RATIO[model.device] else 1


if __name__ == "__main__":
    sys.exit(main())
