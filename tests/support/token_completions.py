"""The part of vLLM's `/inference/v1/generate` that tests need, with the schema of vLLM 0.32.0."""

import json
import random

from tests.support.chat_server import EVENT_STREAM, make_chat_completion

DISABLED = (
    403,
    {
        "error": {
            "message": "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.",
            "type": "PermissionDeniedError",
            "param": None,
            "code": 403,
        }
    },
)
_FIELDS = {"model", "token_ids", "sampling_params", "return_token_ids", "stream", "stream_options", "output_mode"}
_SAMPLING_FIELDS = {"temperature", "top_p", "max_tokens", "logprobs", "seed", "stop_token_ids", "detokenize"}
_ABSENT_CHOICE_FIELDS = {"stop_reason": None, "routed_experts": None, "sampling_mask": None, "weight_versions": None}


def find_problem(request):
    """Return why a strict server rejects a request, or an empty string."""
    sampling = request["sampling_params"]
    if unknown := (request.keys() - _FIELDS) | (sampling.keys() - _SAMPLING_FIELDS):
        return f"unknown fields {sorted(unknown)}"
    ids = request["token_ids"]
    if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
        return "token_ids must be a list of at least one id"
    return ""


def make_token_completion(request, token_ids, logprobs, finish_reason):
    """Return the body of an unstreamed response."""
    has_logprobs = request["sampling_params"].get("logprobs") is not None
    entries = [
        {"token_id": token, "logprob": value, "rank": 1, "top_logprobs": [{"token_id": token, "logprob": value, "rank": 1}]}
        for token, value in zip(token_ids, logprobs, strict=True)
    ]
    choice = {"index": 0, "logprobs": {"content": entries} if has_logprobs else None, "finish_reason": finish_reason}
    counts = {"prompt_tokens": len(request["token_ids"]), "completion_tokens": len(token_ids)}
    return {
        "request_id": "generate-tokens-1",
        "model": request["model"],
        "created": 1,
        "usage": counts | {"total_tokens": sum(counts.values())},
        "prompt_logprobs": None,
        "prompt_token_ids": request["token_ids"] if request.get("return_token_ids") else None,
        "output_mode": "tokens",
        "choices": [choice | {"token_ids": list(token_ids)} | _ABSENT_CHOICE_FIELDS],
    }


def make_token_events(completion, *, done=True):
    """Return the server-sent events of a completion: one for each token, then one with the usage, and the end mark."""
    shared = {"request_id": completion["request_id"], "output_mode": "tokens"}
    choice, chunks = completion["choices"][0], []
    tokens, entries = choice["token_ids"], (choice["logprobs"] or {}).get("content", [])
    for n in range(max(1, len(tokens))):
        piece = choice | {
            "token_ids": tokens[n : n + 1],
            "finish_reason": None if n < len(tokens) - 1 else choice["finish_reason"],
        }
        piece["logprobs"] = {"content": entries[n : n + 1]} if entries else None
        first = {"prompt_token_ids": completion["prompt_token_ids"]} if n == 0 else {}
        chunks.append(shared | {"choices": [piece], "usage": None} | first)
    chunks.append(shared | {"choices": [], "usage": completion["usage"]})
    return [b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks] + [b"data: [DONE]\n\n"] * done


def answer_token_request(request, completion, **options):
    """Return the result of a script: the completion, as a stream if the request asks for one."""
    if request.get("stream"):
        return 200, iter(make_token_events(completion, **options)), EVENT_STREAM
    return 200, completion


def sample_tokens(request, num_tokens=27):
    """Return letters that depend on the prompt and the seed, an end token, and their log-probabilities, up to the limit of tokens."""
    sampling = request["sampling_params"]
    rng = random.Random(f"{request['token_ids']} {sampling.get('seed')}")
    tokens = [*(rng.randrange(3, num_tokens) for _ in range(6)), 2]
    limit = sampling["max_tokens"]
    return tokens[:limit], [-0.25 * (n + 1) for n in range(len(tokens))][:limit], "stop" if limit >= len(tokens) else "length"


class TokenScript:
    """The script of a server of random completions. `results` are results of the next token requests, before the others.

    `change` gets each completion before it is sent. The chat API answers greetings.
    """

    def __init__(self):
        self.results, self.change = [], lambda completion: completion

    def __call__(self, number, request):
        if "token_ids" not in request:
            return 200, make_chat_completion("fine")
        if self.results:
            return self.results.pop(0)
        if problem := find_problem(request):
            return 400, {"error": {"message": problem}}
        return answer_token_request(request, self.change(make_token_completion(request, *sample_tokens(request))))
