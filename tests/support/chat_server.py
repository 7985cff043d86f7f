"""A loopback server with the part of the chat-completions API that tests need; a script decides each response."""

import json
import math
import threading
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT_CONNECTION = None  # a script returns this to close the connection without a response


class FakeChatServer:
    """Respond with the result of `script`: a function of (request number, request) that returns (status, body[, headers]) or

    CUT_CONNECTION. A body is bytes, an object for JSON, or an iterator of bytes that are sent one by one. `model_names` are
    the models that the server lists. `pages` are the results of GET requests for other paths, without their query.
    """

    def __init__(self, model_names=()):
        self.requests, self.authorizations, self.lock, self.num_active, self.max_active = [], [], threading.Lock(), 0, 0
        self.pages = {}
        self.model_list = {"data": [{"id": name} for name in model_names]}
        self.script = lambda number, request: (200, make_chat_completion("fine"))
        self.http_server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self.http_server.handle_error = lambda *_: None  # some tests close connections on purpose
        self.thread = threading.Thread(target=self.http_server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http_server.server_port}/v1"

    def close(self):
        self.http_server.shutdown()
        self.thread.join()
        self.http_server.server_close()

    @property
    def request_bodies(self):
        return [request for _, _, request in self.requests]


def _make_handler(fake_server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fake_server.authorizations.append(self.headers["Authorization"])
            pages = fake_server.pages | {"/v1/models": fake_server.model_list}
            page = pages.get(self.path.partition("?")[0])
            body = json.dumps(page or {"detail": "Not Found"}).encode()
            self.send_response(200 if page else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            with fake_server.lock:
                fake_server.requests.append((self.path, self.headers.get("Authorization"), request))
                number = len(fake_server.requests)
                fake_server.num_active += 1
                fake_server.max_active = max(fake_server.max_active, fake_server.num_active)
            try:
                result = fake_server.script(number, request)
            finally:
                with fake_server.lock:
                    fake_server.num_active -= 1
            if result is CUT_CONNECTION:
                self.close_connection = True
                self.connection.close()
                return
            status, body, *headers = result
            parts = body if isinstance(body, Iterator) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            if isinstance(body, Iterator):
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(parts[0])))
            self.end_headers()
            try:
                for part in parts:
                    self.wfile.write(part)
            finally:
                if isinstance(body, Generator):
                    body.close()  # the client may have closed the connection

        def log_message(self, *_):
            pass

    return Handler


def make_chat_completion(text, finish_reason="stop", top_logprobs=None, token_counts=(3, 2), **more):
    """Return the body of a chat completion; `top_logprobs` holds the first token's (token, log-probability) pairs."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    if top_logprobs is not None:
        choice["logprobs"] = {
            "content": [{"token": "x", "top_logprobs": [{"token": t, "logprob": p} for t, p in top_logprobs]}]
        }
    usage = {"usage": {"prompt_tokens": token_counts[0], "completion_tokens": token_counts[1]}} if token_counts else {}
    return {"choices": [choice]} | usage | more


EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


def make_events(completion, *, include_usage=True, done=True):
    """Return the server-sent events of a chat completion, as vLLM sends them: one for each entry of its log-probabilities.

    Without log-probabilities there is one event for each character. The text, the token ids and the log-probabilities are spread
    over the events; the last events have the finish reason, the usage and the end mark.
    """
    choice = completion["choices"][0]
    message, text = choice["message"], choice["message"].get("content") or ""
    entries = (choice.get("logprobs") or {}).get("content") or []
    token_ids = choice.get("token_ids") or []
    count = max(len(entries), len(token_ids)) or len(text)
    shared = {"id": "1", "object": "chat.completion.chunk", "model": completion.get("model")}
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    chunks = [shared | {"choices": [first], "prompt_token_ids": completion.get("prompt_token_ids")}]
    reasoning = {name: value for name, value in message.items() if name not in ("role", "content")}
    if reasoning:
        chunks.append(shared | {"choices": [{"index": 0, "delta": reasoning}]})
    for n in range(count):
        piece = text[n : n + 1] if n < count - 1 else text[n:]
        chunk = {"index": 0, "delta": {"content": piece}, "finish_reason": None, "logprobs": None}
        chunk |= {"logprobs": {"content": entries[n : n + 1]}} if entries else {}
        chunk |= {"token_ids": token_ids[n : n + 1]} if token_ids else {}
        chunks.append(shared | {"choices": [chunk]})
    chunks.append(shared | {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if include_usage and "usage" in completion:
        chunks.append(shared | {"choices": [], "usage": completion["usage"]})
    return [b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks] + [b"data: [DONE]\n\n"] * done


def stream_answer(completion, **options):
    """Return the result of a script that streams a chat completion."""
    return 200, iter(make_events(completion, **options)), EVENT_STREAM


STANDARD_FIELDS = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "logprobs", "top_logprobs"}
STREAM_FIELDS = {"stream", "stream_options"}
VLLM_FIELDS = STANDARD_FIELDS | {
    "continue_final_message", "add_generation_prompt", "chat_template_kwargs", "top_k", "min_p", "repetition_penalty",
    "return_token_ids",
}  # fmt: skip


def make_script(
    *,
    accepted_fields=STANDARD_FIELDS,
    max_top_logprobs=20,
    prefill_support="never",
    processed_logprobs=False,
    logprobs=True,
    returns_token_ids=False,
    streams=False,
):
    """Return the script of a server with the given capabilities. Like strict servers, it rejects unknown fields with status 400.

    `prefill_support` is "never", "requested" (only with vLLM's fields), "always" or "echoed" (as llama.cpp does without streaming).
    `max_top_logprobs` is the largest accepted
    value of top_logprobs. With `streams`, a request with `stream` is answered with a stream.
    """
    accepted_fields = accepted_fields | (STREAM_FIELDS if streams else set())

    def script(number, request):
        if unknown := set(request) - accepted_fields:
            return 400, {"error": {"message": f"Unrecognized request arguments: {sorted(unknown)}"}}
        if request.get("top_logprobs", 0) > max_top_logprobs:
            return 400, {"error": {"message": f"top_logprobs must be at most {max_top_logprobs}"}}
        has_prefill = request["messages"][-1]["role"] == "assistant"
        continue_requested = request.get("continue_final_message") and not request.get("add_generation_prompt", True)
        continues = prefill_support in ("always", "echoed") or (prefill_support == "requested" and continue_requested)
        text = "en, twelve" if has_prefill and continues else "one, two"
        if has_prefill and prefill_support == "echoed" and not request.get("stream"):
            text = request["messages"][-1]["content"] + text
        top = None
        if logprobs and request.get("logprobs"):
            temperature = (request["temperature"] or 1.0) if processed_logprobs else 1.0
            raw = [("A", math.log(0.6)), ("B", math.log(0.3)), ("The", math.log(0.1))]
            total = math.log(sum(math.exp(p / temperature) for _, p in raw))
            top = [(token, p / temperature - total) for token, p in raw][: request.get("top_logprobs", 0)]
        completion = make_chat_completion(text, top_logprobs=top)
        if returns_token_ids and request.get("return_token_ids"):
            completion["prompt_token_ids"], completion["choices"][0]["token_ids"] = [1, 2, 3], [7, 8, 2]
            if top is not None:
                completion["choices"][0]["logprobs"]["content"] = [{"token": t, "logprob": -0.5} for t in "abc"]
        return stream_answer(completion) if request.get("stream") else (200, completion)

    return script
