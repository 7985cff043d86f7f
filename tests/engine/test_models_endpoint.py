"""Endpoints against a real HTTP server on loopback that behaves, and one that does not."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from engine.errors import ModelUnreachable, PermanentRecordError, UsageError
from engine.models import open_model
from engine.models.endpoint import Endpoint
from engine.models.port import Ask
from schemas.records import Turn

KEY = "sk-very-secret"


def ask(text="hi", prefill=""):
    return Ask((Turn(role="user", content=text),), prefill, 7)


@pytest.fixture
def server():
    """Answers what `script` says: a function from the request to (status, body), called for each request in turn."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, self.headers.get("Authorization"), request))
            with state.lock:
                state.busy += 1
                state.most = max(state.most, state.busy)
            try:
                result = state.script(len(state.requests), request)
            finally:
                with state.lock:
                    state.busy -= 1
            if result is None:
                self.close_connection = True
                self.connection.close()  # cut
                return
            status, body = result
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class State:
        requests, lock, busy, most = [], threading.Lock(), 0, 0
        script = staticmethod(lambda number, request: (200, chat("fine")))

    state = State()
    state.requests = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *_: None  # clients that hung up are what some tests are about
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def chat(text, finish="stop", top=None):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        choice["logprobs"] = {"content": [{"token": "x", "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]}
    return {"choices": [choice]}


def endpoint(server, **more):
    return Endpoint(server.url, "m", KEY, **{"backoff_s": (0.01, 0.02), "deadline_s": 5.0, "timeout_s": 2.0} | more)


def test_samples_sampling_and_the_key_are_sent(server):
    server.script = lambda n, request: (200, chat(request["messages"][0]["content"], "length"))
    answers = endpoint(server).generate([ask("a"), ask("b")], samples=2, temperature=0.5, top_p=0.9, max_tokens=11)
    assert [[g.text for g in a] for a in answers] == [["a", "a"], ["b", "b"]]
    assert answers[0][0].finish_reason == "length" and answers[0][0].token_ids == ()
    path, key, request = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (request["model"], request["temperature"], request["top_p"], request["max_tokens"]) == ("m", 0.5, 0.9, 11)
    assert len({r["seed"] for _, _, r in server.requests}) == 2


def test_a_prefill_asks_the_server_to_go_on(server):
    endpoint(server).generate([ask(prefill="Answer: (")])
    request = server.requests[0][2]
    assert (
        request["messages"][-1] == {"role": "assistant", "content": "Answer: ("} and request["continue_final_message"] is True
    )


def test_options_sum_variants_and_bound_what_is_not_shown(server):
    top = [("A", -1.0), (" A", -2.0), ("x", -3.0), ("y", -4.0)]
    server.script = lambda n, request: (200, chat("A", top=top))
    (scores,) = endpoint(server).option_logprobs([ask()], ("A", "B"))
    assert scores.logprobs == pytest.approx((math.log(math.exp(-1) + math.exp(-2)), -4.0))
    assert scores.mass == pytest.approx(math.exp(-1) + math.exp(-2))


def test_without_log_probabilities_there_is_no_label(server):
    with pytest.raises(UsageError, match="no log-probabilities"):
        endpoint(server).option_logprobs([ask()], ("A", "B"))


@pytest.mark.parametrize("trouble", [(429, {}), (500, {}), (503, b"busy"), (200, b"no json"), (200, {"choices": []}), None])
def test_trouble_that_passes_is_tried_again(server, trouble):
    server.script = lambda n, request: trouble if n <= 2 else (200, chat("at last"))
    assert endpoint(server).generate([ask()])[0][0].text == "at last"
    assert len(server.requests) == 3


def test_trouble_that_stays_is_the_servers_and_not_the_records(server):
    server.script = lambda n, request: (500, {})
    with pytest.raises(ModelUnreachable, match="does not answer"):
        endpoint(server, deadline_s=0.2).generate([ask()])


def test_a_server_that_is_away_or_slow_is_unreachable(server):
    with pytest.raises(ModelUnreachable):
        Endpoint("http://127.0.0.1:9/v1", "m", deadline_s=0.2, backoff_s=(0.01, 0.02)).generate([ask()])
    release = threading.Event()
    server.script = lambda n, request: release.wait(5) and (200, chat("late"))
    try:
        with pytest.raises(ModelUnreachable, match="Timeout"):
            endpoint(server, timeout_s=0.1, deadline_s=0.3).generate([ask()])
    finally:
        release.set()


def test_a_refused_request_is_the_records_fault_and_the_key_is_not_repeated(server):
    server.script = lambda n, request: (400, f"bad request with {KEY}".encode())
    with pytest.raises(PermanentRecordError) as caught:
        endpoint(server).generate([ask()])
    assert "bad request" in str(caught.value) and KEY not in str(caught.value)
    server.script = lambda n, request: (401, f"wrong key {KEY}".encode())
    with pytest.raises(ModelUnreachable, match="401") as caught:
        endpoint(server).generate([ask()])
    assert KEY not in str(caught.value) and KEY not in repr(endpoint(server))


def test_requests_run_side_by_side_up_to_the_limit(server):
    barrier = threading.Barrier(4)
    server.script = lambda n, request: (barrier.wait(5) >= 0) and (200, chat("x"))
    endpoint(server, concurrency=4, timeout_s=10).generate([ask(str(n)) for n in range(12)])
    assert server.most == 4


def test_an_address_must_name_a_model(monkeypatch):
    with pytest.raises(UsageError, match="#MODEL"):
        open_model("http://127.0.0.1:9/v1")
    monkeypatch.setenv("MY_KEY", KEY)
    opened = open_model("http://127.0.0.1:9/v1/#m", api_key_env="MY_KEY")
    assert (opened.url, opened.id, opened.key) == ("http://127.0.0.1:9/v1", "m", KEY)
