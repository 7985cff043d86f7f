"""Models behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted APIs).

Requests run side by side up to a limit, with a time limit each; 429, 5xx, cut connections and answers that are not JSON
are tried again with exponential back-off and full jitter, until the call's deadline: then the server counts as away
(ModelUnreachable), the stage pauses and nothing is lost. A request that the server calls wrong is the record's fault
(PermanentRecordError).

Options are read from the first token's `top_logprobs`. A server shows only the most likely tokens: an option outside
them is given the smallest probability shown, which bounds it from above, and adds nothing to the mass. A server that
gives no log-probabilities cannot judge: that is an error, never a guessed label. The key comes from an environment
variable and stands in no message.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from engine.errors import ModelUnreachable, PermanentRecordError, UsageError
from engine.models.port import Ask, Capabilities, Generation, OptionScores
from schemas.ids import fingerprint

TOP_LOGPROBS = 20
DEADLINE_S = 600.0
BACKOFF_S = (0.5, 30.0)
PLAIN = Capabilities(token_ids=False, exact_logprobs=False)
REQUEST_FAULTS = (400, 413, 422)
SETTING_FAULTS = (401, 403, 404)


class Away(Exception):
    """One request failed in a way that may pass."""


def open_endpoint(
    spec: str, *, api_key_env: str = "OPENAI_API_KEY", timeout_s: float = 120.0, concurrency: int = 16
) -> Endpoint:
    """The model that `http://HOST:PORT/v1#MODEL` names."""
    url, _, model = spec.partition("#")
    if not model:
        raise UsageError(f"{spec} names no model", "a server may serve several", f"write it as {url}#MODEL")
    return Endpoint(url.rstrip("/"), model, os.environ.get(api_key_env, ""), timeout_s=timeout_s, concurrency=concurrency)


@dataclass
class Endpoint:
    """One model of one server. `deadline_s` bounds all tries of one request."""

    url: str
    id: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    concurrency: int = 16
    deadline_s: float = DEADLINE_S
    backoff_s: tuple[float, float] = BACKOFF_S
    capabilities: Capabilities = PLAIN

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx.Client(headers=headers, timeout=self.timeout_s)
        self.pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        # A server's weights have no name of their own: the address and the model's name stand for them.
        self.revision = fingerprint(url=self.url, model=self.id)[:16]

    # The port

    def generate(
        self,
        batch: Sequence[Ask],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        # Requests of one text each: not every server takes n > 1, and each gets a seed of its own.
        bodies = [body(self.id, ask) | sampling | {"seed": (ask.seed + n) % 2**31} for ask in batch for n in range(samples)]
        answers = list(self.pool.map(lambda request: self.ask(request, generation), bodies))
        return [answers[i : i + samples] for i in range(0, len(answers), samples)]

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        wanted = {"temperature": 1.0, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        bodies = [body(self.id, ask) | wanted for ask in batch]
        return list(self.pool.map(lambda request: self.ask(request, lambda answer: scores(answer, options)), bodies))

    # Requests

    def ask(self, request: dict[str, Any], read: Callable[[dict[str, Any]], Any]) -> Any:
        """Send a request until it is answered well, up to the deadline."""
        deadline, tries = time.monotonic() + self.deadline_s, 0
        while True:
            try:
                return read(self.post(request))
            except Away as error:
                wait = random.uniform(0, min(self.backoff_s[1], self.backoff_s[0] * 2**tries))
                tries += 1
                if time.monotonic() + wait >= deadline:
                    raise ModelUnreachable(
                        f"the model server {self.url} does not answer",
                        f"{error}, after {tries} tries",
                        "look at the server and at models.*; the stage goes on when it is back",
                    ) from error
                time.sleep(wait)

    def post(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self.client.post(f"{self.url}/chat/completions", json=request)
        except httpx.HTTPError as error:
            raise Away(type(error).__name__) from error
        if response.status_code in REQUEST_FAULTS:
            raise PermanentRecordError(f"{self.url} refuses the request", self.said(response), "")
        if response.status_code in SETTING_FAULTS:
            raise ModelUnreachable(
                f"{self.url} does not serve {self.id} to us ({response.status_code})",
                self.said(response),
                "check models.* and the variable that models.api_key_env names",
            )
        if response.status_code != 200:
            raise Away(f"status {response.status_code}")
        try:
            answer = response.json()
            answer["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Away("an answer that is no chat completion") from error
        return dict(answer)

    def said(self, response: httpx.Response) -> str:
        """The server's words, short, and without the key should it repeat it."""
        text = response.text[:300]
        return text.replace(self.key, "***") if self.key else text


def body(model: str, ask: Ask) -> dict[str, Any]:
    """A chat request; a prefill is an assistant turn that the server is asked to go on with."""
    messages = [{"role": turn.role, "content": turn.content} for turn in ask.turns]
    if not ask.prefill:
        return {"model": model, "messages": messages}
    begun = {"role": "assistant", "content": ask.prefill}
    return {
        "model": model,
        "messages": [*messages, begun],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def generation(answer: dict[str, Any]) -> Generation:
    choice = answer["choices"][0]
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    # No token ids: such an answer trains SFT and the reward model, never PPO.
    return Generation(text=choice["message"]["content"] or "", finish_reason=finish)


def scores(answer: dict[str, Any], options: Sequence[str]) -> OptionScores:
    """Sum each option over the shown tokens that mean it: `A`, ` A`, `(A`, `A)`."""
    listed = ((answer["choices"][0].get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    if not listed:
        raise UsageError(
            "the model server gives no log-probabilities",
            "critique verdicts and judgements are read from them, and a label is never guessed",
            "serve critic and judge with log-probabilities on (vLLM does), or set models.critic and models.judge",
        )
    shown = [(str(entry["token"]).strip().strip("()"), float(entry["logprob"])) for entry in listed]
    floor = min(logprob for _, logprob in shown)
    sums = [[math.exp(logprob) for token, logprob in shown if token == option] for option in options]
    return OptionScores(
        logprobs=tuple(math.log(sum(found)) if found and sum(found) > 0 else floor for found in sums),
        mass=sum(sum(found) for found in sums),
    )
