"""The generator: what it publishes in one transaction, and what happens when it is killed, fenced, held, or has no model."""

import threading
import uuid
from collections import Counter
from contextlib import closing

import pytest

from engine import pacing as pacing_module
from engine.budget import Budget
from engine.bus import open_bus
from engine.bus.read import read_values
from engine.errors import CommitUncertain, ModelUnreachable, PermanentRecordError, TooFewPrompts, TopicChanged, WriterFenced
from engine.models.interface import Generation, ModelCapabilities
from engine.models.scripted import POISON_TEXT
from engine.notices import NOTICES
from engine.pacing import PacedAdmission, TrainingLoopLease, is_training_loop_running
from engine.run_starts import ensure_run_start
from engine.worker import to_producer_record
from producers import generate
from producers.files import FileProducer
from producers.gates import Rejection
from producers.generate import (
    GeneratorOptions,
    PromptGenerator,
    collect_generation_metrics,
    format_yield,
    read_texts,
    render_request,
)
from producers.recipe import load_recipe, plan_request
from schemas import ids
from schemas.codec import decode_record
from schemas.records import Allowance, Erasure, ProducerOffset, Prompt, Purpose, Response, Split
from schemas.topics import make_topic_table
from tests.support.list_model import ListModel, write_request
from tests.support.respond_worker import make_prompt
from tests.support.waiting import wait_until

RECIPE = load_recipe("default")


def make_generator(bus, model=None, **options):
    pacing = options.pop("pacing", None)
    texts, budget = options.pop("evaluation_texts", ()), options.pop("budget", None)
    values = {"batch_size": 2, "max_waiting": 0, "eval_fraction": 0.0} | options
    model = ListModel() if model is None else model
    return PromptGenerator(
        bus, RECIPE, model, "r", GeneratorOptions(**values), pacing=pacing, budget=budget, evaluation_texts=texts
    )


def run(generator, num_prompts=None):
    """Run the generator until it ends or, if `num_prompts` is given, until it has published this number of prompts."""
    stop = threading.Event()
    if num_prompts is None:
        generator.run(stop)
        return
    thread = threading.Thread(target=generator.run, args=(stop,))
    thread.start()
    wait_until(lambda: generator.num_published >= num_prompts or not thread.is_alive())
    stop.set()
    thread.join()


def read_prompts(bus):
    return [decode_record(value, Prompt) for value in read_values(bus, "prompts")]


def read_contents(bus):
    return [prompt.messages[-1].content for prompt in read_prompts(bus)]


def read_position(bus):
    positions = [decode_record(value, ProducerOffset) for value in read_values(bus, "producer-offsets")]
    return max((p for p in positions if p.stage == "generate"), key=lambda position: position.next_line)


@pytest.fixture(autouse=True)
def clear_notices():
    NOTICES.clear()


def test_prompts_have_their_lineage_and_the_position_counts_them(bus):
    with closing(make_generator(bus, seed=3)) as generator:
        generator.step()
        generator.step()
    prompts, position = read_prompts(bus), read_position(bus)
    assert (position.next_line, position.published, len(prompts)) == (2, 8, 8)
    assert (position.prompt_tokens, position.completion_tokens) == (4 * 3, 4 * 2)
    assert position.content_hash == RECIPE.hash and position.model.id == "lists" and position.rejected == {}
    assert {(p.recipe_item.index, p.recipe_item.request) for p in prompts} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for prompt in prompts:
        item, kinds = prompt.recipe_item, {kind.id: kind for kind in RECIPE.kinds}
        plan = plan_request(RECIPE, prompt.seed)
        assert (item.recipe, item.version, item.hash) == (RECIPE.name, RECIPE.version, RECIPE.hash)
        assert (item.kind, item.topic, item.language) == (plan.kind.id, plan.topic, "en")
        assert prompt.source == kinds[item.kind].source and prompt.origin == f"default:{item.index}"
        assert prompt.model.id == "lists" and prompt.sampling.temperature == 1.0 and prompt.template_hash
        assert prompt.prompt_id == ids.compute_prompt_id(prompt.messages) and prompt.split is Split.TRAIN
    assert {prompt.purpose for prompt in prompts} == {Purpose.ANY}


def test_another_seed_recipe_or_run_asks_for_other_prompts(bus):
    seeds = []
    for options in ({}, {"seed": 1}):
        with closing(make_generator(bus, ListModel(num_written=20 * len(seeds)), **options)) as generator:
            generator.step()
        seeds.append({prompt.seed for prompt in read_prompts(bus)})
    assert len(seeds[1] - seeds[0]) == 2 and read_position(bus).next_line == 1


def test_generator_killed_between_sampling_and_commit_repeats_the_index(bus):
    model = ListModel()  # it writes other texts at each call
    killed = make_generator(bus, model)
    killed.step()
    lost = killed.sample(1)
    with closing(make_generator(bus, model)) as successor:
        successor.step()
    texts = set(read_contents(bus))
    assert len(texts) == 8 and read_position(bus).next_line == 2
    assert not texts & {prompt.messages[-1].content for prompt in lost.prompts}
    assert {prompt.seed for prompt in lost.prompts} <= {prompt.seed for prompt in read_prompts(bus)}  # the same requests


class UncertainWriter:
    """A writer whose next commits have unknown outcomes. Each entry of `outcomes` says whether the records are written."""

    def __init__(self, writer, outcomes):
        self.writer, self.outcomes = writer, outcomes

    def commit(self, records):
        if not self.outcomes:
            return self.writer.commit(records)
        if self.outcomes.pop(0):
            self.writer.commit(records)
        raise CommitUncertain("the outcome is unknown", "the connection was lost")

    def close(self):
        self.writer.close()


def test_after_an_uncertain_commit_the_position_on_the_log_decides(bus, monkeypatch):
    outcomes, open_writer = [False, True, False], bus.open_writer
    monkeypatch.setattr(bus, "open_writer", lambda name, **options: UncertainWriter(open_writer(name, **options), outcomes))
    run(make_generator(bus, limit=12))
    prompts = read_prompts(bus)
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == 12
    assert Counter(prompt.recipe_item.index for prompt in prompts) == {0: 4, 1: 4, 2: 4} and not outcomes


def test_second_generator_of_a_run_fences_the_first(bus):
    first, second = make_generator(bus), make_generator(bus)
    first.step()
    with closing(second):
        second.step()
        with pytest.raises(WriterFenced, match="another generator of run r has started") as error:
            run(first)
    assert len(str(error.value).splitlines()) == 3 and first.is_done.is_set()
    assert [prompt.recipe_item.index for prompt in read_prompts(bus)].count(0) == 4 and read_position(bus).next_line == 2


def test_generator_ends_if_its_topic_was_created_again(bus, monkeypatch):
    generator, topic_ids = make_generator(bus), bus.topic_ids
    generator.step()
    monkeypatch.setattr(bus, "topic_ids", lambda topics: topic_ids(topics) | {"prompts": "another id"})
    with pytest.raises(TopicChanged, match="the topic prompts was deleted and created again"):
        run(generator)
    assert len(read_prompts(bus)) == 4


def test_unreachable_model_is_waited_for(bus, monkeypatch, caplog):
    monkeypatch.setattr(generate, "compute_backoff", lambda failures: 0.0)
    error = ModelUnreachable("http://localhost:1/v1 is unreachable", "connection refused")
    generator = make_generator(bus, ListModel(queued_errors=[error, error]), limit=4)
    run(generator)
    assert (generator.num_pauses, len(read_prompts(bus))) == (2, 4)
    messages = [record.message for record in caplog.records]
    assert messages[0] == "generate pauses 0.0 s: http://localhost:1/v1 is unreachable; connection refused"
    assert any("continues after a pause" in message for message in messages)


def test_failed_request_is_rejected_alone(bus):
    class Failing(ListModel):
        def generate(self, batch, **options):
            results = super().generate(batch, **options)
            return [PermanentRecordError(f"{POISON_TEXT}", "it is poisoned"), *results[1:]]

    with closing(make_generator(bus, Failing())) as generator:
        generator.step()
    assert len(read_prompts(bus)) == 2 and read_position(bus).rejected == {"failed_request": 1}


def test_one_unreachable_answer_repeats_the_whole_index(bus, monkeypatch):
    monkeypatch.setattr(generate, "compute_backoff", lambda failures: 0.0)
    model = ListModel()
    results = [ModelUnreachable("down", "for one request")]

    class Flaky(ListModel):
        def generate(self, batch, **options):
            answers = model.generate(batch, **options)
            return [*answers[:-1], results.pop()] if results else answers

    run(make_generator(bus, Flaky(), limit=4))
    assert len(read_prompts(bus)) == 4 and len(model.requests) == 4
    assert model.requests[:2] == model.requests[2:] and model.requests[0].group  # a server keeps the answers that it has billed


def test_model_that_repeats_itself_stops_the_generator(bus, caplog):
    generator = make_generator(bus, ListModel(texts=[write_request(1)]), max_fruitless=3)
    with pytest.raises(TooFewPrompts) as error:
        run(generator)
    assert str(error.value).splitlines()[:2] == [
        "the last 3 indexes before index 4 gave no new prompt (generate.max_fruitless)",
        "all their texts were rejected; this process has rejected: duplicate 15",
    ]
    position = read_position(bus)
    assert (position.next_line, position.published, position.rejected) == (4, 1, {"duplicate": 15})
    samples = {(s.name, *(v for _, v in s.labels[2:])): s.value for s in collect_generation_metrics(generator)}
    assert samples["charter_rejected_texts_total", "duplicate"] == 15 and samples["charter_generated_prompts_total",] == 1
    assert samples["charter_fruitless_indexes",] == 3 and samples["charter_generated_indexes_total",] == 4
    assert NOTICES.get_counts() == {("rejected_text", "duplicate"): 15}
    assert sum("reason duplicate (it is near default:0)" in record.message for record in caplog.records) == 1
    with pytest.raises(TooFewPrompts):
        run(make_generator(bus, ListModel(texts=[write_request(1)]), max_fruitless=1))  # the next process continues
    assert read_position(bus).rejected == {"duplicate": 19}


def test_limit_counts_the_prompts_of_earlier_processes(bus):
    generator = make_generator(bus, limit=5)
    run(generator)
    assert (len(read_prompts(bus)), generator.rejected) == (5, {"over_limit": 3})
    run(make_generator(bus, limit=5))
    assert len(read_prompts(bus)) == 5
    run(make_generator(bus, ListModel(num_written=50), limit=7))
    assert len(read_prompts(bus)) == 7


def test_prompts_of_other_producers_are_seen_while_the_generator_runs(bus, tmp_path):
    generator = make_generator(bus, batch_size=1)
    with closing(generator):
        generator.step()
        (tmp_path / "other.jsonl").write_text(f'"{write_request(3)}"\n')
        FileProducer(bus, "r", eval_fraction=0.0).publish(str(tmp_path / "other.jsonl"))
        generator.step()
    assert len(read_prompts(bus)) == 4 and read_position(bus).rejected == {"duplicate": 1}


def test_evaluation_prompts_and_erased_prompts_are_not_published(bus):
    bus.publish([to_producer_record(make_prompt(write_request(1), "other").model_copy(update={"split": Split.EVAL}))])
    erased = make_prompt(write_request(3))
    bus.publish(
        [to_producer_record(Erasure(record_id=ids.compute_id("e"), prompt_id=erased.prompt_id, run_id="r", stage="erase"))]
    )
    with closing(make_generator(bus, evaluation_texts=[("suite:7", write_request(2))])) as generator:
        generator.step()
    assert set(read_contents(bus)) == {write_request(1), write_request(4)}
    assert read_position(bus).rejected == {"contamination": 2, "erased": 1}


# Waiting


def test_generator_waits_for_the_responders(bus, caplog):
    generator = make_generator(bus, max_waiting=3)
    with closing(generator):
        generator.step()
        bus.publish([to_producer_record(make_prompt("Of another run?", "other"))])
        assert [generator.step() for _ in range(3)] == [False] * 3
        assert len(read_prompts(bus)) == 5 and generator.num_waits == 1
        assert generator.wait_reason.startswith("enough prompts of run r wait for the stage respond")
        bus.set_committed("r.respond", bus.end_offsets(["prompts"]))
        generator.step()
    assert len(read_prompts(bus)) == 9 and generator.get_waited_s() > 0
    assert [r.message.split(":")[0] for r in caplog.records if "generate" in r.message] == [
        "generate waits", "generate continues after 0 s",
    ]  # fmt: skip


def test_generator_waits_while_a_training_loop_wants_no_completions(bus, monkeypatch):
    monkeypatch.setattr(generate, "_WAIT_INTERVAL_S", 0.01)
    monkeypatch.setattr(pacing_module, "_POLL_INTERVAL_S", 0.01)
    lease = TrainingLoopLease(bus, "trainer")
    wait_until(lambda: is_training_loop_running(bus))
    ends = [offset for _, offset in sorted(bus.end_offsets([Response.topic]).items())]
    allowance = Allowance(
        record_id=ids.compute_id("a"), run_id="r", stage="train", phase="ppo", num_completions=0, offsets=ends, reason="enough"
    )
    bus.publish([to_producer_record(allowance)])
    with closing(PacedAdmission(bus, 1)) as pacing:
        generator, stop = make_generator(bus, pacing=pacing, limit=4), threading.Event()
        thread = threading.Thread(target=generator.run, args=(stop,))
        thread.start()
        wait_until(lambda: generator.wait_reason == "the training loop wants no further completions: enough")
        assert read_prompts(bus) == []
        more = allowance.model_copy(update={"record_id": ids.compute_id("b"), "num_completions": 8})
        bus.publish([to_producer_record(more)])
        thread.join()
    lease.close()
    assert len(read_prompts(bus)) == 4


def test_generator_waits_at_the_limit_of_the_budget(bus):
    with closing(Budget(bus, "r", max_tokens=10)) as budget, closing(make_generator(bus, budget=budget)) as generator:
        generator.step()  # two requests with five tokens each
        budget.next_poll_at = 0.0
        generator.step()
        assert generator.wait_reason == "run r has reached budget.max_tokens or budget.max_cost"
    assert len(read_prompts(bus)) == 4


def test_stop_ends_a_waiting_generator(bus):
    generator, stop = make_generator(bus, max_waiting=1), threading.Event()
    thread = threading.Thread(target=generator.run, args=(stop,))
    thread.start()
    wait_until(lambda: generator.wait_reason)
    stop.set()
    thread.join()
    assert generator.is_done.is_set() and read_position(bus).next_line == 1


# Requests and responses


def test_model_without_prefill_gets_the_examples_in_the_message():
    plan = plan_request(RECIPE, 1)
    continued, asked = (render_request(RECIPE, plan, has_prefill=has_prefill) for has_prefill in (True, False))
    assert continued.prefill.endswith(f"4. {plan.examples[3]}\n5.") and plan.examples[0] not in continued.messages[0].content
    assert not asked.prefill and f"For example:\n1. {plan.examples[0]}\n" in asked.messages[0].content
    assert plan.topic in asked.messages[0].content and "English" in asked.messages[0].content and asked.seed == plan.seed


def test_generator_with_a_model_without_prefill(bus):
    model = ListModel(capabilities=ModelCapabilities(prefill=False))
    with closing(make_generator(bus, model)) as generator:
        generator.step()
    # The first line of each response has no number, so it is a remark about the list.
    assert read_position(bus).rejected == {"outside_list": 2} and not model.requests[0].prefill


@pytest.mark.parametrize(
    ("text", "finish_reason", "has_prefill", "texts", "reasons"),
    [
        (" A?\n6. B?\n7) C?", "stop", True, ["A?", "B?", "C?"], []),
        (" A?\n6. B?\nThese are questions.", "stop", True, ["A?", "B?"], [Rejection.OUTSIDE_LIST]),
        ("Here are two:\n- A?\n* B?", "stop", False, ["A?", "B?"], [Rejection.OUTSIDE_LIST]),
        ('1. "A?"\n2. **B?**\n3. „C?“', "stop", False, ["A?", "B?", "C?"], []),
        ("A?\nB?", "stop", False, ["A?", "B?"], []),
        (" A?\n6. B", "length", True, ["A?"], [Rejection.UNFINISHED]),
        (" A?\n6. B?\n", "length", True, ["A?", "B?"], []),
        (" A", "length", True, [], [Rejection.UNFINISHED]),
        ("  \n", "stop", True, [], [Rejection.EMPTY]),
        ("1. ", "stop", False, [], [Rejection.OUTSIDE_LIST]),
        ("", "refused", True, [], [Rejection.WITHHELD]),
        ("3.5 percent of what?", "stop", False, ["3.5 percent of what?"], []),
    ],
)
def test_items_of_a_list_are_texts_and_other_lines_are_counted(text, finish_reason, has_prefill, texts, reasons):
    found, rejected = read_texts(Generation(text, finish_reason), has_prefill=has_prefill)
    assert (found, [item.reason for item in rejected]) == (texts, reasons)


def test_yield_does_not_count_texts_over_the_limit():
    assert format_yield(0, Counter()) == "0 prompts published"
    line = format_yield(3, Counter({"duplicate": 2, "over_limit": 7}))
    assert line == "3 prompts published, yield 60% of 5 texts; rejected: over_limit 7, duplicate 2"


# Kafka


@pytest.mark.kafka
def test_generator_resumes_on_kafka_and_counts_waiting_prompts_without_transaction_markers(kafka_address):
    with closing(open_bus(kafka_address, prefix=f"g{uuid.uuid4().hex[:8]}.")) as bus:
        bus.create_topics(list(make_topic_table(num_partitions=3).values()))
        ensure_run_start(bus, "r")
        first, model = make_generator(bus), ListModel()
        first.model = model
        first.step()
        first.sample(1)  # then this process is killed
        with closing(make_generator(bus, model)) as second:
            second.step()
            second.history.refresh()
            assert second.history.count_waiting({}) == 8
            with pytest.raises(WriterFenced):
                run(first)
        prompts = read_prompts(bus)
        assert Counter(prompt.recipe_item.index for prompt in prompts) == {0: 4, 1: 4} and read_position(bus).next_line == 2
