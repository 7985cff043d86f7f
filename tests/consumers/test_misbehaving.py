"""Stages on a faulty server: no label is invented, nothing is paid twice, and all tokens are counted."""

import math
import threading

from charter.models import RoleModels
from charter.pipeline import make_stage
from constitutions.loader import load_constitution as load_constitution
from engine.bus.read import read_values
from engine.errors import RequestFailed
from engine.host import Host
from engine.models.chat_api import ServerCapabilities
from engine.models.endpoint import Endpoint
from engine.models.probe import PREFILL_BODIES
from engine.settings import load_settings
from engine.worker import ModelExecutor, Worker, to_producer_record
from schemas.codec import decode_record
from schemas.records import Outcome, Preference
from tests.support.chat_server import CUT_CONNECTION, FakeChatServer, make_chat_completion
from tests.support.waiting import HANG_S, wait_until

PAIRS = 24
TOP = [("A", math.log(0.6)), ("B", math.log(0.3))]


class FaultyServerScript:
    """Fail every third request, and all of them for a while; sum the billed tokens. It prefers "the good one"."""

    def __init__(self):
        self.finished, self.lock, self.billed = threading.Event(), threading.Lock(), 0
        self.faults = [
            lambda: (429, b"slow down"), lambda: (500, b"oh"), lambda: CUT_CONNECTION, lambda: (200, b"{no json"),
            lambda: (200, make_chat_completion("?") | {"choices": []}), self.reply_late,
        ]  # fmt: skip
        self.late_replies_left = 1

    def reply_late(self):
        """Reply after the client's timeout, but only once: the timeout is long, so that a busy machine meets it nowhere else."""
        self.late_replies_left -= 1
        if self.late_replies_left < 0:
            return 500, b"oh"
        self.finished.wait(HANG_S)
        return 200, make_chat_completion("late", token_counts=None)

    def __call__(self, number, request):
        if 12 < number <= 30:
            return 503, b"restarting"
        text = " ".join(message["content"] for message in request["messages"])
        top = TOP if text.index("good one") < text.index("bad one") else [("B", TOP[0][1]), ("A", TOP[1][1])]
        reply = self.faults[number // 3 % len(self.faults)]() if number % 3 == 0 else None
        reply = reply or (200, make_chat_completion("A", top_logprobs=None if "silent" in text else top))
        if reply and reply[0] == 200 and isinstance(reply[1], dict):
            with self.lock:
                self.billed += reply[1].get("usage", {"prompt_tokens": 0})["prompt_tokens"]
        return reply


def test_judge_on_a_faulty_server_judges_each_pair_once_and_invents_no_label(bus, make_response, monkeypatch):
    monkeypatch.setattr("engine.backoff.BACKOFF_RANGE_S", (0.01, 0.05))
    server, script = FakeChatServer(), FaultyServerScript()
    server.script = script
    model = Endpoint(
        server.url, "m", timeout_s=1.0, concurrency=4, retry_timeout_s=0.3, backoff_range_s=(0.01, 0.02),
        cached_server_capabilities=ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20),
    )  # fmt: skip
    spec = f"{server.url}#m"
    settings, _ = load_settings(
        {"models.policy": "scripted", "models.judge": spec, "models.max_batch_size": "4"}, environment={}
    )
    judge = make_stage("judge", settings, RoleModels(settings, {spec: model}), load_constitution("default"), bus)
    bus.publish([
        to_producer_record(make_response(("the good one", "the bad one"), text=f"{'silent' if n % 4 == 0 else 'normal'} {n}"))
        for n in range(PAIRS)
    ])  # fmt: skip
    try:
        with Host([Worker(bus, judge, ModelExecutor("judge", downstream_wait_s=0.0), run_id="r", instance="0")]) as host:
            wait_until(lambda: sum(bus.committed("r.judge", ["responses"]).values()) == PAIRS, host)
    finally:
        script.finished.set()
        server.close()
    labels = [decode_record(value, Preference) for value in read_values(bus, "preferences")]
    assert len(labels) == len({label.record_id for label in labels}) == PAIRS
    assert list(read_values(bus, "dead-letters")) == []
    for label in labels:
        if "silent" in label.messages[-1].content:
            assert label.outcome in (Outcome.UNPARSEABLE, Outcome.LOW_MASS) and label.p_a is None
        else:
            assert label.outcome is Outcome.OK and math.isclose(label.p_a, 2 / 3) and not label.position_flip
    assert sum(label.prompt_tokens for label in labels) + model.unbilled_usage.prompt_tokens == script.billed > 0
    assert len(server.requests) > 2 * PAIRS  # requests were repeated


def make_endpoint(server):
    return Endpoint(
        server.url, "m", backoff_range_s=(0.01, 0.02),
        cached_server_capabilities=ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20),
    )  # fmt: skip


def test_second_attempt_of_a_record_asks_only_what_failed(make_response):
    """The critic answers the verdict questions but cannot write; the judge answers one of the orders."""
    server, is_broken = FakeChatServer(), threading.Event()

    def script(number, request):
        text = request["messages"][0]["content"]
        is_writing = not request.get("logprobs")
        if is_broken.is_set() and text != "Hello" and (is_writing or 0 < text.find("bad one") < text.find("good one")):
            return 500, b"out of memory"
        top = TOP if "(A) Yes" in text else [("B", TOP[0][1]), ("A", TOP[1][1])]  # every response is flawed
        return 200, make_chat_completion("It is rude.", top_logprobs=None if is_writing else top)

    server.script = script
    spec = f"{server.url}#m"
    settings, _ = load_settings({"models.policy": "scripted", "models.judge": spec, "models.critic": spec}, environment={})
    models, constitution = RoleModels(settings, {spec: make_endpoint(server)}), load_constitution("default")
    try:
        for name in ("critique", "judge"):
            stage = make_stage(name, settings, models, constitution, None, labels_all=True)
            records = [make_response(("the good one", "the bad one"), text=f"{name} {n}") for n in range(3)]
            is_broken.set()
            assert [type(result) for result in stage.process(records)] == [RequestFailed] * 3
            is_broken.clear()
            paid = len(server.requests)
            results = stage.process(records)
            assert all(isinstance(result, list) and result for result in results)
            assert len(server.requests) == paid + 3  # one request for each record: the critique, or the other order
            assert all(record.prompt_tokens >= 6 for (record,) in results)  # kept answers count, too
    finally:
        server.close()
