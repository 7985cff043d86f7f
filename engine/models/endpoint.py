"""Models behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted APIs).

A server is asked once, at its first use, what it can do (`engine.models.probe`); what it cannot do is never papered over:
`capabilities` says it, and the stages ask in other words, under another template hash.

Requests run side by side up to a limit, with a time limit each; 429, 5xx, cut connections and answers that are not JSON are
tried again with exponential back-off and full jitter, and never before a `Retry-After` is over, until the call's deadline: then
the server counts as away (ModelUnreachable), the stage pauses and nothing is lost. A request that the server calls wrong is the
record's fault (PermanentRecordError).

Options are read from the first token's `top_logprobs`, or counted in sampled replies where a server gives none (`scores`,
`votes`). Tokens are counted as the server bills them: what a failed try used is added to the next answer that arrives. The key
comes from an environment variable, which may be one server's own, and stands in no message.
"""

from __future__ import annotations

import copy
import email.utils
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from engine.errors import CharterError, DependencyUnreachable, ModelUnreachable, PermanentRecordError, UsageError
from engine.models.port import NOTHING, Ask, Capabilities, Generation, OptionScores, Usage
from schemas.ids import fingerprint

log = logging.getLogger("charter.endpoint")

DEADLINE_S = 600.0
BACKOFF_S = (0.5, 30.0)
MAX_ANSWER_BYTES = 16 * 1024 * 1024
CHARS_PER_TOKEN = 4  # where a server does not count
REQUEST_FAULTS = (400, 413, 422)
SETTING_FAULTS = (401, 402, 403, 404)
VOTES = 8
VOTE_TOKENS = 8
# What surrounds a letter in a token: spaces (also as two families of tokenizers write them) and parentheses.
AROUND = " \n\tĠ▁()"
VOTE = re.compile(r"[\s(\[*\"']*(?:answer\s*:?\s*)?[\s(\[*\"']*(\w+)\s*(?:[)\]*\"'.:,]|\n|$)", re.IGNORECASE)
THOUGHT = re.compile(r"\s*<think>(?:.*?</think>\s*|.*\Z)", re.DOTALL)

FINISH = {"stop": "stop", "length": "length", "timeout": "timeout", "content_filter": "refused"}

T = TypeVar("T")
Body = dict[str, Any]


class Away(Exception):
    """One request failed in a way that may pass. `status` is the server's, 0 for none; `used` what it billed all the same."""

    def __init__(self, why: str, status: int = 0, used: Usage = NOTHING) -> None:
        super().__init__(why)
        self.status, self.used = status, used


class Slow(Away):
    """A request was taken and not answered in time."""


class Refused(Exception):
    """The server calls a request wrong; its words, without the key."""


@dataclass(frozen=True)
class Request:
    """What is sent, and the seconds in which the answer may be written; None: the endpoint's own limit, and tried again."""

    body: Body
    writing_s: float | None = None


@dataclass(frozen=True)
class Dialect:
    """How one server is talked to: fields that its requests need, None where it cannot do it.

    always: in every request (thinking off, no truncation hidden in the server's defaults).
    begun: with a prefilled assistant message. token_ids: to get exact token ids. shown: how many top log-probabilities, 0: none.
    processed: whether they are those of the sampling temperature. unmodified: sampling is what the request says and no more.
    seeds, counts: whether it takes seeds, and says how many tokens it used.
    """

    limit: str = "max_tokens"
    always: Body = field(default_factory=dict)
    begun: Body | None = None
    shown: int = 0
    processed: bool = False
    token_ids: Body | None = None
    unmodified: bool = False
    seeds: bool = True
    counts: bool = True

    def capabilities(self, votes: int) -> Capabilities:
        return Capabilities(
            prefill=self.begun is not None,
            logprobs=self.shown > 0,
            token_ids=self.token_ids is not None,
            exact_logprobs=self.token_ids is not None and self.shown > 0 and self.unmodified,
            votes=0 if self.shown else votes,
        )


def served_revision(url: str, model: str) -> str:
    """What stands for the weights of a server's model in records."""
    return fingerprint(url=url, model=model)[:16]


def open_endpoint(
    spec: str, *, api_key_env: str = "OPENAI_API_KEY", timeout_s: float = 120.0, concurrency: int = 16
) -> Endpoint:
    """The model that `http://HOST:PORT/v1#MODEL` names."""
    address, _, model = spec.partition("#")
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise UsageError("the model server has no proper address", str(error), "write http://HOST:PORT/v1#MODEL") from error
    variable = key_variable(url, api_key_env)
    if url.userinfo or url.query:
        raise UsageError(
            f"the address of the model server {url.host} holds more than an address",
            "a setting stands in the records of a run, and a key must not",
            f"put the key into the environment variable {variable} and write http://HOST:PORT/v1#MODEL",
        )
    if not model or not url.host:
        raise UsageError(f"{spec} names no model", "a server may serve several", f"write it as {address}#MODEL")
    key = os.environ.get(variable, "") if variable else ""
    return Endpoint(address.rstrip("/"), model, key, timeout_s=timeout_s, concurrency=concurrency)


def key_variable(address: httpx.URL | str, api_key_env: str) -> str:
    """The environment variable with a server's key: of `HOST=VARIABLE` its own (with a port or without), else the one alone.

    A server must not be sent another one's key: where the setting names hosts only, the others get none.
    """
    url, others = httpx.URL(address), ""
    for entry in api_key_env.split(","):
        host, separator, variable = (part.strip() for part in entry.partition("="))
        if separator and host in (url.host, url.netloc.decode()):
            return variable
        others = others if separator else host
    return others


@dataclass
class Endpoint:
    """One model of one server. `deadline_s` bounds all tries of one request; `votes` is how many replies score an option."""

    url: str
    id: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    concurrency: int = 16
    deadline_s: float = DEADLINE_S
    backoff_s: tuple[float, float] = BACKOFF_S
    votes: int = VOTES
    known: Dialect | None = None

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self.client = httpx.Client(headers=headers, timeout=self.timeout_s, limits=limits)
        self.pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        # A server's weights have no name of their own: the address and the model's name stand for them.
        self.revision = served_revision(self.url, self.id)
        self.lock = threading.Lock()
        self.probing = threading.Lock()
        self.owed = NOTHING  # billed, but of no answer that arrived
        self.not_before = 0.0  # on the monotonic clock: the server asked for quiet until then

    # The port

    @property
    def dialect(self) -> Dialect:
        """How this server is talked to; asked once."""
        with self.probing:
            if self.known is None:
                from engine.models.probe import probe

                self.known = probe(self)
                log.info("%s#%s: %s", self.url, self.id, self.known)
            return self.known

    @property
    def capabilities(self) -> Capabilities:
        return self.dialect.capabilities(self.votes)

    def generate(
        self,
        batch: Sequence[Ask],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        dialect = self.dialect
        sampling = {"temperature": temperature, "top_p": top_p, dialect.limit: max_tokens}
        exact = top_p == 1 and temperature > 0 and (temperature == 1 or dialect.processed)
        if dialect.token_ids is not None:
            sampling |= dialect.token_ids
            sampling |= {"logprobs": True, "top_logprobs": 0} if exact and self.capabilities.exact_logprobs else {}
        # Requests of one text each: not every server takes n > 1, and each gets a seed of its own.
        requests = [
            Request(self.body(ask) | sampling | self.seed(ask.seed + n), ask.deadline_s)
            for ask in batch
            for n in range(samples)
        ]
        answers = self.ask_all(requests, generation)
        return [answers[i : i + samples] for i in range(0, len(answers), samples)]

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        dialect = self.dialect
        if not dialect.shown:
            return self.option_votes(batch, options)
        wanted = {"temperature": 1.0, "top_p": 1.0, dialect.limit: 1, "logprobs": True, "top_logprobs": dialect.shown}
        return self.ask_all([Request(self.body(ask) | wanted) for ask in batch], partial(scores, options=options))

    def option_votes(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        """The options' shares among `votes` replies sampled at temperature 1."""
        replies = self.generate(batch, samples=self.votes, max_tokens=VOTE_TOKENS)
        return [votes(of_one, options) for of_one in replies]

    def seed(self, seed: int) -> Body:
        return {"seed": seed % 2**31} if self.dialect.seeds else {}

    def body(self, ask: Ask) -> Body:
        """A chat request; a prefill is an assistant message that the server is asked to go on with."""
        dialect = self.dialect
        messages = [{"role": message.role, "content": message.content} for message in ask.messages]
        request = {"model": self.id, "messages": messages} | dialect.always
        if not ask.prefill:
            return request
        if dialect.begun is None:
            raise UsageError(
                f"{self.url} cannot go on with a prefilled assistant message",
                "it was asked to, and began a new one",
                "ask for what the message should begin with in words (capabilities.prefill says so)",
            )
        return request | {"messages": [*messages, {"role": "assistant", "content": ask.prefill}]} | dialect.begun

    # Requests

    def ask_all(self, requests: Sequence[Request], read: Callable[[Body, Usage], T]) -> list[T]:
        """Every request's answer. When one fails all are waited for, and what the others used is kept in mind."""
        futures = [self.pool.submit(self.ask, request, read) for request in requests]
        wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        if not errors:
            return [future.result()[0] for future in futures]
        for future in futures:
            if not future.exception():
                self.owe(future.result()[1])
        raise next((error for error in errors if isinstance(error, DependencyUnreachable)), errors[0])

    def ask(self, request: Request, read: Callable[[Body, Usage], T]) -> tuple[T, Usage]:
        """Send a request until it is answered well, up to the deadline: what `read` makes of it, and the tokens used."""
        try:
            answer, used = self.answer(request.body, writing_s=request.writing_s)
        except Refused as error:
            raise PermanentRecordError(f"{self.url} refuses the request", str(error), "") from error
        used += self.settle()
        return read(answer, used), used

    def answer(
        self,
        request: Body,
        *,
        writing_s: float | None = None,
        give_up: Callable[[Away, int], bool] = lambda error, tries: False,
    ) -> tuple[Body, Usage]:
        """The answer to one request, and what it used; `give_up` may end the tries early, as Refused.

        An answer that takes longer than `writing_s` ends with "timeout" if the server answers another request; else it is away.
        """
        deadline, tries = time.monotonic() + self.deadline_s, 0
        while True:
            self.keep_quiet(deadline)
            try:
                return self.post(request, writing_s or self.timeout_s)
            except Away as error:
                if isinstance(error, Slow) and writing_s and self.alive():
                    late = {"choices": [{"message": {"content": ""}, "finish_reason": "timeout"}]}
                    return late, estimated(request, late)
                self.owe(error.used)
                pause = random.uniform(0, min(self.backoff_s[1], self.backoff_s[0] * 2**tries))
                tries += 1
                if give_up(error, tries):
                    raise Refused(str(error)) from error
                if time.monotonic() + pause >= deadline:
                    raise self.away(f"{error}, after {tries} tries") from error
                time.sleep(pause)

    def away(self, why: str) -> CharterError:
        return ModelUnreachable(
            f"the model server {self.url} does not answer",
            why,
            "look at the server and at models.*; the stage goes on when it is back",
        )

    def alive(self) -> bool:
        """Whether the server answers the smallest of requests now."""
        greeting = {"model": self.id, "messages": [{"role": "user", "content": "Hello"}], self.dialect.limit: 1}
        try:
            self.owe(self.post(greeting | self.dialect.always, self.timeout_s)[1])
        except Away:
            return False
        except Refused:
            pass  # an answer all the same
        return True

    def post(self, request: Body, limit_s: float) -> tuple[Body, Usage]:
        """One try. Raises Away, Refused or ModelUnreachable."""
        try:
            status, headers, text = self.exchange(request, limit_s)
        except httpx.ReadTimeout as error:
            raise Slow(f"ReadTimeout after {limit_s:g} s") from error
        except httpx.HTTPError as error:
            raise Away(type(error).__name__) from error
        if status in REQUEST_FAULTS:
            raise Refused(self.said(text))
        if status in SETTING_FAULTS:
            raise ModelUnreachable(
                f"{self.url} does not serve {self.id} to us ({status})",
                self.said(text),
                "check models.* and the variable that models.api_key_env names",
            )
        if status != 200:
            self.quiet_for(headers.get("retry-after", ""))
            raise Away(f"status {status}", status)
        answer = chat_completion(text)
        return answer, counted(answer) or estimated(request, answer)

    # Other models of the same server

    def serving(self, model: str) -> Endpoint:
        """The same server under another of its model names, over the same connections."""
        dialect, other = self.dialect, copy.copy(self)
        other.known, other.id, other.revision = dialect, model, served_revision(self.url, model)
        return other

    def load_adapter(self, name: str, folder: Path) -> None:
        """Let vLLM load an adapter under a name. That it has one of this name already is for `require` to tell."""
        try:
            answer = self.client.post(f"{self.url}/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        except httpx.HTTPError as error:
            raise self.away(type(error).__name__) from error
        if answer.status_code != 200 and "already" not in answer.text:
            raise ModelUnreachable(
                f"{self.url} does not load {name} ({answer.status_code})",
                self.said(answer.content),
                "start vLLM with --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and a --max-lora-rank that is enough",
            )

    def require(self) -> None:
        """Raise ModelUnreachable unless the server gives a token under this name."""
        greeting = {"model": self.id, "messages": [{"role": "user", "content": "Hello"}], self.dialect.limit: 1}
        try:
            answer, used = self.post(greeting | self.dialect.always, self.timeout_s)
        except (Away, Refused) as error:
            raise self.away(str(error)) from error
        self.owe(used)
        if answer.get("model", self.id) != self.id:
            raise self.away(f"asked for {self.id}, it answers as {str(answer['model'])[:100]}")

    def exchange(self, request: Body, limit_s: float) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; an answer that is too long, or trickles in past the time limit, is cut off."""
        ends = time.monotonic() + limit_s
        parts, size, url = [], 0, f"{self.url}/chat/completions"
        with self.client.stream("POST", url, json=request, timeout=httpx.Timeout(self.timeout_s, read=limit_s)) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER_BYTES:
                    raise Away(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > ends:
                    raise Slow(f"an answer that is not complete after {limit_s:g} s")
            return response.status_code, response.headers, b"".join(parts)

    def quiet_for(self, retry_after: str) -> None:
        """Hold all requests back as long as a Retry-After header says."""
        with self.lock:
            self.not_before = max(self.not_before, time.monotonic() + seconds(retry_after))

    def keep_quiet(self, deadline: float) -> None:
        """Wait while the server wants quiet; if that is longer than the deadline it counts as away."""
        while (left := self.not_before - time.monotonic()) > 0:
            if self.not_before >= deadline:
                raise self.away(f"it asks to be left alone for another {left:.0f} s (Retry-After)")
            time.sleep(left)

    def owe(self, used: Usage) -> None:
        with self.lock:
            self.owed += used

    def settle(self) -> Usage:
        """What is owed, to be counted with an answer that arrived."""
        with self.lock:
            owed, self.owed = self.owed, NOTHING
            return owed

    def said(self, text: bytes) -> str:
        """The server's words, short, and without the key should it repeat it."""
        words = text[:100_000].decode("utf-8", "replace")
        return (words.replace(self.key, "***") if self.key else words)[:300]


def seconds(retry_after: str) -> float:
    """How long a Retry-After header asks for, in seconds or as a date; 0 for what is neither, or past."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# What answers say


def chat_completion(text: bytes) -> Body:
    """A chat completion; raises Away for anything else (with the usage, where that much can be read)."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Away("an answer that is not JSON") from error
    if not isinstance(answer, dict):
        raise Away("an answer that is no chat completion")
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise Away("an answer that is no chat completion", used=counted(answer) or NOTHING) from error
    if not isinstance(content, str | None):
        raise Away("an answer whose content is not a text", used=counted(answer) or NOTHING)
    message["content"] = readable(content or "")
    return answer


def readable(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def counted(answer: Body) -> Usage | None:
    """The server's own count."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    numbers = integers([usage.get("prompt_tokens"), usage.get("completion_tokens")])
    return Usage(*numbers) if numbers else None


def estimated(request: Body, answer: Body) -> Usage:
    """Four characters a token, for a server that does not count: a budget must not be blind."""
    read = sum(len(message["content"]) for message in request["messages"])
    return Usage(read // CHARS_PER_TOKEN, len(answer["choices"][0]["message"]["content"]) // CHARS_PER_TOKEN)


def generation(answer: Body, used: Usage) -> Generation:
    """The sampled text; its tokens too where the server gave them, exact and whole."""
    choice = answer["choices"][0]
    said = choice["message"]["content"]
    refusal = choice["message"].get("refusal")
    text = THOUGHT.sub("", said, count=1) if said.lstrip().startswith("<think>") else said
    finish = FINISH.get(str(choice.get("finish_reason")), "unknown")
    if isinstance(refusal, str) and refusal:
        text, finish = text or readable(refusal), "refused"
    token_ids, logprobs = sampled_tokens(choice)
    if text != said:
        token_ids, logprobs = (), ()  # they are of the thought too
    prompt = integers(answer.get("prompt_token_ids") or choice.get("prompt_token_ids"))
    return Generation(text, finish, token_ids, logprobs, prompt, used)


def sampled_tokens(choice: Body) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The sampled tokens' ids and, when there is one for each, their log-probabilities."""
    entries = [entry for entry in (choice.get("logprobs") or {}).get("content") or [] if isinstance(entry, dict)]
    named = [str(entry.get("token")) for entry in entries]
    token_ids = integers(choice.get("token_ids"))
    if not token_ids and named and all(re.fullmatch(r"token_id:\d+", name) for name in named):
        token_ids = tuple(int(name.removeprefix("token_id:")) for name in named)
    logprobs = tuple(value for entry in entries if (value := logprob_of(entry)) is not None)
    return token_ids, logprobs if len(logprobs) == len(token_ids) else ()


def integers(value: Any) -> tuple[int, ...]:
    good = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    return tuple(value) if good else ()


def logprob_of(entry: Any) -> float | None:
    """A finite log-probability; rounding above 0 is cut off."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return min(0.0, float(value))


def top_of(answer: Body) -> list[tuple[str, float]]:
    """The first token's shown tokens with their log-probabilities."""
    content = (answer["choices"][0].get("logprobs") or {}).get("content") or [{}]
    listed = content[0].get("top_logprobs") if isinstance(content[0], dict) else None
    pairs = [(entry.get("token"), logprob_of(entry)) for entry in listed or [] if isinstance(entry, dict)]
    return [(token, value) for token, value in pairs if isinstance(token, str) and value is not None]


def scores(answer: Body, used: Usage, *, options: Sequence[str]) -> OptionScores:
    """Sum each option over the shown tokens that mean it: `A`, ` A`, `(A`, `A)`.

    An option that is not shown has at most the smallest probability shown, and all of those together at most what the shown
    tokens leave over. It is given that bound, and beside a shown option the bound counts in the mass; where no option is shown
    nothing is known of any, and the mass is 0.
    """
    shown = [(token.strip(AROUND), value) for token, value in top_of(answer)]
    sums = [math.fsum(math.exp(value) for token, value in shown if token == option) for option in options]
    hidden = sum(found == 0 for found in sums)
    smallest = min((math.exp(value) for _, value in shown), default=0.0)
    left = max(0.0, 1.0 - math.fsum(math.exp(value) for _, value in shown))
    bound = min(smallest, left / hidden) if hidden else 0.0
    known = any(sums)
    held = [found or bound for found in sums]
    return OptionScores(
        logprobs=tuple(math.log(p) if p > 0 else -math.inf for p in held),
        mass=min(1.0, math.fsum(held)) if known else 0.0,
        usage=used,
    )


def votes(replies: Sequence[Generation], options: Sequence[str]) -> OptionScores:
    """Each option's share of the replies, and what they all share; a reply that is more than an option counts for none."""
    found = [vote(reply.text, options) for reply in replies]
    shares = [found.count(option) / len(replies) for option in options]
    return OptionScores(
        logprobs=tuple(math.log(share) if share else -math.inf for share in shares),
        mass=math.fsum(shares),
        usage=sum((reply.usage for reply in replies), NOTHING),
        replies=tuple(reply.text for reply, option in zip(replies, found, strict=True) if option is None),
    )


def vote(text: str, options: Sequence[str]) -> str | None:
    """The option that a reply begins with, alone: `A`, `(A)`, `Answer: A.`, `**A**`; not the `A` of `A better one`."""
    match = VOTE.match(text)
    return match[1] if match and match[1] in options else None
