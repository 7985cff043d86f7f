"""A run whose only stage is respond: prompts, a worker that answers them without a model, and the answered prompts."""

from engine.bus.read import read_topic
from engine.host import Host
from engine.run_starts import ensure_run_start
from engine.worker import ModelExecutor, Stage, Worker, to_producer_record
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ChatMessage, Completion, Prompt, Response
from schemas.topics import make_topic_table
from tests.support.waiting import wait_until

SPECS = list(make_topic_table(num_partitions=3).values())


def make_prompt(text, run="r"):
    messages = [ChatMessage(role="user", content=text)]
    prompt_id = ids.compute_prompt_id(messages)
    return Prompt(record_id=prompt_id, prompt_id=prompt_id, run_id=run, stage="produce", messages=messages, source="test")


def make_response(prompt):
    if "fails" in prompt.messages[0].content:
        raise ValueError("raised by the test")
    return Response(
        record_id=ids.compute_record_id("respond", [prompt.record_id], "f"), prompt_id=prompt.prompt_id, run_id=prompt.run_id,
        stage="respond", messages=prompt.messages, source="test", completions=[Completion(index=0, text="a")],
        parent_ids=[prompt.record_id],
    )  # fmt: skip


def publish(bus, texts, run="r"):
    """Publish prompts as a producer does: the start of the run first."""
    ensure_run_start(bus, run)
    bus.publish([to_producer_record(make_prompt(text, run)) for text in texts])


def make_worker(bus, run="r", process=lambda records: [[make_response(record)] for record in records], first=False):
    stage = Stage("respond", ("prompts",), ("responses",), 0, 8, process, first_per_key=first)
    return Worker(bus, stage, ModelExecutor("test", downstream_wait_s=0.0), run_id=run, instance="0")


def run_until_done(bus, run="r", **options):
    """Run a worker until its committed offsets reach the ends of the topic. Return the worker."""
    worker = make_worker(bus, run, **options)
    with Host([worker]) as host:
        wait_until(lambda: bus.committed(f"{run}.respond", ["prompts"]) == bus.end_offsets(["prompts"]), host)
    host.raise_if_failed()
    return worker


def read_answered(bus, run="r"):
    """Return the prompt of each response of a run on the topic, sorted."""
    responses = [decode_record(raw.value, Response) for raw in read_topic(bus, "responses")]
    return sorted(response.messages[0].content for response in responses if response.run_id == run)


def name_prompts(first, end):
    return [f"p{n:02}" for n in range(first, end)]
