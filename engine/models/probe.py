"""Asking a server what it can do, once, with a handful of requests of a few tokens.

Names and versions of servers say little (a proxy answers for several), so each thing is tried and the answer looked at:

1. a plain request, which must work (`max_tokens`, or `max_completion_tokens` where that is the name; with a seed, or without);
2. thinking switched off (`chat_template_kwargs`), and the server's own hidden sampling defaults (`top_k` and such) neutralised;
3. a prefilled assistant message, cut in the middle of a word: only a server that goes on with it ends the word. First with vLLM's two
   fields, then without (llama.cpp and several hosted models go on with a last assistant message as it is);
4. log-probabilities: how many top tokens, and whether they change with the temperature (processed) or not (raw);
5. token ids of the sampled text: `return_token_ids`, else `return_tokens_as_token_ids`;
6. whether it samples at all: some servers answer greedily whatever temperature is asked for.

A request that is refused with 4xx, or answered three times with 500, means that the server cannot do it. Anything else that
goes wrong is the server being away, and nothing is concluded from it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from engine.errors import ModelUnreachable
from engine.models.endpoint import Away, Body, Dialect, Refused, counted, generation, top_of
from engine.models.port import NOTHING

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

log = logging.getLogger("charter.endpoint")

COUNT = {"role": "user", "content": "Write the numbers from one to twelve in words, in lower case, separated by commas."}
BEGUN = {"role": "assistant", "content": "one, two, three, four, five, six, seven, eight, nine, ten, elev"}
END = "en"
INVENT = {"role": "user", "content": "Invent a name for a new ship, and tell me where it sails to. Be as original as you can."}
INVENTED = 12  # tokens in which two samples are hardly ever the same
TOKENS = 4
TOPS = (20, 5)
LIMITS = ("max_tokens", "max_completion_tokens")
CLOSE = 1e-3  # log-probabilities that differ by less are the same
NO_THINKING: Body = {"chat_template_kwargs": {"enable_thinking": False}}
UNMODIFIED: Body = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
GO_ON: tuple[Body, ...] = ({"continue_final_message": True, "add_generation_prompt": False}, {})
TOKEN_IDS: tuple[Body, ...] = ({"return_token_ids": True}, {"return_tokens_as_token_ids": True})
FAILURES = 3


class Probe:
    """One server being asked. `base` is a request that works."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.limit, self.seeds, self.counts = "max_tokens", True, True
        self.base: Body = {"model": endpoint.id, "messages": [COUNT], "temperature": 0.0}
        self.plain()

    def plain(self) -> None:
        words = ""
        for seed in ({"seed": 1}, {}):
            for limit in LIMITS:
                request = self.base | seed | {limit: TOKENS}
                try:
                    answer = self.answer(request)
                except Refused as error:
                    words = words or str(error)
                    continue
                self.limit, self.seeds, self.counts, self.base = limit, bool(seed), counted(answer) is not None, request
                return
        raise ModelUnreachable(
            f"{self.endpoint.url} refuses a plain request for {self.endpoint.id}", words, "check models.* and the server"
        )

    def answer(self, request: Body) -> Body:
        answer, used = self.endpoint.answer(request, give_up=lambda error, tries: broken(error) and tries >= FAILURES)
        self.endpoint.owe(used)
        return answer

    def tried(self, more: Body) -> Body | None:
        """The answer to the plain request with `more` in it; None when it is refused."""
        try:
            return self.answer(self.base | more)
        except Refused:
            return None

    def taken(self, more: Body) -> bool:
        """Whether these fields are taken; if so every request has them from now on."""
        if self.tried(more) is None:
            return False
        self.base = self.base | more
        return True

    def thinks(self) -> bool:
        """Whether answers still begin with a thought."""
        message = (self.tried({}) or {"choices": [{"message": {"content": ""}}]})["choices"][0]["message"]
        thought = message.get("reasoning_content") or message.get("reasoning")
        return bool(thought) or message["content"].lstrip().startswith("<think>")

    def samples(self) -> bool:
        """Whether two seeds give two texts at temperature 1."""
        wanted = {"messages": [INVENT], "temperature": 1.0, self.limit: INVENTED}
        answers = [self.tried(wanted | ({"seed": seed} if self.seeds else {})) for seed in (1, 2)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers if answer]
        return len(set(texts)) == len(answers)

    def goes_on(self) -> Body | None:
        for fields in GO_ON:
            answer = self.tried(fields | {"messages": [COUNT, BEGUN]})
            if answer and answer["choices"][0]["message"]["content"].startswith(END):
                return fields
        return None

    def top(self, count: int, temperature: float = 1.0) -> dict[str, float]:
        wanted = {"temperature": temperature, self.limit: 1, "logprobs": True, "top_logprobs": count}
        answer = self.tried(wanted)
        return dict(top_of(answer)) if answer else {}

    def shown(self) -> int:
        for count in TOPS:
            if found := self.top(count):
                return min(count, len(found))
        return 0

    def processed(self, shown: int) -> bool:
        """Whether halving the temperature changes the log-probabilities."""
        warm, cool = self.top(shown), self.top(shown, temperature=0.5)
        both = warm.keys() & cool.keys()
        return bool(both) and max(abs(warm[token] - cool[token]) for token in both) > CLOSE

    def token_ids(self, shown: int) -> Body | None:
        for fields in TOKEN_IDS:
            more: dict[str, Any] = {"logprobs": True, "top_logprobs": 0} if shown else {}
            answer = self.tried(fields | more)
            if answer and generation(answer, NOTHING).token_ids:
                return fields
        return None


def broken(error: Away) -> bool:
    """A server that answers 500 to one kind of request cannot do it; other trouble passes."""
    return error.status == 500


def probe(endpoint: Endpoint) -> Dialect:
    """What a server can do. Raises ModelUnreachable while it is away."""
    asked = Probe(endpoint)
    thinking_off = asked.taken(NO_THINKING)
    unmodified = asked.taken(UNMODIFIED)
    shown = asked.shown()
    dialect = Dialect(
        limit=asked.limit,
        always=(NO_THINKING if thinking_off else {}) | (UNMODIFIED if unmodified else {}),
        begun=asked.goes_on(),
        shown=shown,
        processed=shown > 0 and asked.processed(shown),
        token_ids=asked.token_ids(shown),
        unmodified=unmodified,
        seeds=asked.seeds,
        counts=asked.counts,
    )
    tell(endpoint, dialect)
    if not asked.samples():
        log.warning(
            "%s answers alike whatever the seed: it does not sample, so completions and votes are all the same", endpoint.url
        )
    if asked.thinks():
        log.warning("%s goes on thinking: what it thinks is cut off its answers, and its options catch little", endpoint.url)
    return dialect


def tell(endpoint: Endpoint, dialect: Dialect) -> None:
    """Say once what this server cannot do and what is done instead."""
    if dialect.begun is None:
        log.warning("%s does not go on with a prefilled assistant message: options are asked for in words", endpoint.url)
    if not dialect.shown:
        log.warning("%s gives no log-probabilities: options are scored by votes, which cost more", endpoint.url)
    if not dialect.counts:
        log.warning("%s does not count tokens: four characters are taken for one", endpoint.url)
