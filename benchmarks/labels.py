"""Compare two rates of labels and verdicts: Charter reads them from log-probabilities, and the peer writes them as text.

python -m benchmarks.labels [--pairs 16] [--peer 4] [--chains 8]

All rates are measured with the same model in the same run, on shipped prompts and on completions that the model samples. The
goal is a factor of 20 on a CPU.

label     Charter uses the default preset (lee2023): one principle, the mean of both orders, and shared prefixes. The peer is
          the course's judge. It asks one question with both responses and all principles, in one order, and writes up to 256
          tokens. The peer is first measured one pair at a time with `generate` of transformers, and then in batches with
          Charter's generation. The ratio in brackets assumes that the peer also asks in both orders, which takes two questions.
verdict   Charter asks whether the response violates the principle, with the options in both orders. The peer writes the
          course's critique of up to 256 tokens. This peer is also measured one by one and in batches.
chain     The number of tokens that all steps of a prompt compute (responses, verdicts, critiques, revisions and label) is
          compared with the number of tokens of the same questions without shared prefixes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.generation import make_requests
from constitutions.loader import load_constitution
from consumers import templates
from consumers.judge import JudgeStage
from engine.models import open_model
from engine.models.chat_template import format_prompt
from engine.models.interface import GenerationRequest, require_results
from engine.models.local import LocalModel
from schemas.records import ChatMessage, Preference, Record, Response

if TYPE_CHECKING:
    from charter.api import Charter, RevisionChain

_MIN_RATIO = {"cpu": 20.0, "cuda": 50.0}
_MAX_RESPONSE_TOKENS = 128
_MAX_WRITTEN_TOKENS = 256
_Messages = tuple[ChatMessage, ...]


def measure_per_second(model: LocalModel, work: Callable[[], Any], count: int) -> float:
    """Return the rate of `work` per second of CPU time on a CPU, or per second of wall time on a GPU.

    CPU time does not depend on other load on the machine.
    """
    clock = time.process_time if model.device == "cpu" else time.monotonic
    started = clock()
    work()
    return count / (clock() - started)


def generate_one_by_one(model: LocalModel, questions: Sequence[_Messages], max_tokens: int = _MAX_WRITTEN_TOKENS) -> list[int]:
    """Write a reply to each question with transformers' `generate` and greedy decoding. Return the lengths in tokens."""
    lengths = []
    for messages in questions:
        encoded = model.tokenizer(format_prompt(model.tokenizer, messages), return_tensors="pt", add_special_tokens=False)
        encoded = encoded.to(model.device)
        with torch.inference_mode():
            output = model.model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False)
        lengths.append(output.shape[1] - encoded["input_ids"].shape[1])
    return lengths


def generate_in_batches(model: LocalModel, questions: Sequence[_Messages], max_tokens: int = _MAX_WRITTEN_TOKENS) -> None:
    """Write a reply to each question with Charter's generation and greedy decoding."""
    requests = [GenerationRequest(messages) for messages in questions]
    require_results(model.generate(requests, temperature=0.0, max_tokens=max_tokens))


def make_judge_questions(judge: JudgeStage, responses: Sequence[Response]) -> list[_Messages]:
    """Return the course's question about the first two completions of each response, in one order."""
    judge_prompt = judge.constitution.combined_judge_prompt
    return [
        templates.make_comparison_messages(
            r.messages, r.completions[0].text, r.completions[1].text, judge_prompt, templates.LETTER_TEMPLATE
        )
        for r in responses
    ]


def _compare_with_peers(
    name: str, model: LocalModel, charter_rate: float, questions: Sequence[_Messages], num_sequential: int, num_orders: int = 1
) -> float:
    """Print the rates of Charter and of the two peers. Return Charter's rate divided by the rate of the sequential peer.

    Charter asks in `num_orders` orders. The peers ask in only one order.
    """
    lengths: list[int] = []

    def generate_sequentially() -> None:
        lengths.extend(generate_one_by_one(model, questions[:num_sequential]))

    sequential = measure_per_second(model, generate_sequentially, num_sequential)
    batched = measure_per_second(model, lambda: generate_in_batches(model, questions), len(questions))
    print(f"{name}: {charter_rate:.2f}/s by log-probabilities, both orders")
    mean_length = statistics.mean(lengths)
    for method, peer_rate, digits in (
        (f"one by one (transformers, {mean_length:.0f} tokens)", sequential, 4),
        (f"in batches of {len(questions)} (Charter)", batched, 3),
    ):
        both_orders = f" ({num_orders * charter_rate / peer_rate:.1f})" if num_orders > 1 else ""
        print(f"  written, {method}: {peer_rate:.{digits}f}/s, ratio {charter_rate / peer_rate:.1f}{both_orders}")
    return charter_rate / sequential


def _compare_labels(model: LocalModel, judge: JudgeStage, responses: Sequence[Response], num_sequential: int) -> float:
    judge(responses[:2])  # warm up
    questions = make_judge_questions(judge, responses)
    charter_rate = measure_per_second(model, lambda: judge(responses), len(responses))
    return _compare_with_peers("labels", model, charter_rate, questions, num_sequential, num_orders=2)


def _compare_verdicts(model: LocalModel, charter: Charter, responses: Sequence[Response], num_sequential: int) -> float:
    critic = charter.critique_stage
    states = [critic.make_state(response) for response in responses]
    critic.assess_states(states[:2])  # warm up
    charter_rate = measure_per_second(model, lambda: critic.assess_states(states), len(states))
    questions = [
        templates.make_critique_messages(
            state.fields["messages"], state.fields["response"], state.next_principle.critique_prompt, ()
        )
        for state in states
        if state.next_principle
    ]
    return _compare_with_peers("verdicts", model, charter_rate, questions, num_sequential)


def _print_chain_tokens(chains: Sequence[RevisionChain], preferences: Sequence[Preference], num_completions: int) -> None:
    """Print the number of tokens that each stage computes, and the number that it would compute without shared prefixes."""
    records: list[Record] = [record for chain in chains for record in chain.records]
    print(f"tokens of {len(chains)} chains: computed, without sharing, saved")
    total = [0, 0]
    for stage in ("respond", "critique", "revise", "judge"):
        stage_records = [record for record in [*records, *preferences] if record.stage == stage]
        read, written = sum(r.prompt_tokens for r in stage_records), sum(r.completion_tokens for r in stage_records)
        unshared = read * (num_completions if stage == "respond" else 1) + written
        computed = read + written - sum(getattr(r, "cached_tokens", 0) for r in stage_records)
        total = [total[0] + computed, total[1] + unshared]
        print(f"  {stage:8} {computed:8} {unshared:8} {1 - computed / unshared:6.1%}   ({len(stage_records)} records)")
    print(f"  {'all':8} {total[0]:8} {total[1]:8} {1 - total[0] / total[1]:6.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=16, help="number of pairs for Charter and the batched peer")
    parser.add_argument("--peer", type=int, default=4, help="number of pairs for the sequential peer")
    parser.add_argument("--chains", type=int, default=8, help="number of prompts for the token count of chains")
    options = parser.parse_args()
    from charter.api import Charter

    model = open_model(options.model, max_batch_size=64)
    assert isinstance(model, LocalModel)
    charter = Charter(load_constitution("default"), model, settings={"respond.max_tokens": _MAX_RESPONSE_TOKENS})
    prompts = [request.messages for request in make_requests(options.pairs)]
    responses = charter.generate_responses(prompts)
    completion_tokens = statistics.mean(len(c.token_ids) for r in responses for c in r.completions)
    prompt_tokens = statistics.mean(len(r.prompt_token_ids) for r in responses)
    print(f"{model.id} on {model.device}: prompts of {prompt_tokens:.0f} tokens, completions of {completion_tokens:.0f}")
    ratios = [
        _compare_labels(model, charter.judge_stage, responses, options.peer),
        _compare_verdicts(model, charter, responses, options.peer),
    ]
    chains = charter.self_critique_loops(responses[: options.chains])
    preferences = [label for (label,) in charter.judge_stage(responses[: options.chains])]
    _print_chain_tokens(chains, preferences, charter.settings.respond.num_completions)
    return 0 if min(ratios) >= _MIN_RATIO[model.device] else 1


if __name__ == "__main__":
    sys.exit(main())
