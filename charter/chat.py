"""`charter chat`: talk to a policy, or ask it one thing from a script."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from charter.options import common

if TYPE_CHECKING:
    from engine.models.port import Generation, Model
    from engine.settings import Settings
    from schemas.records import ChatMessage

NEW = "/new"


@click.command()
@click.argument("prompt", required=False)
@click.option("--policy", "version", default="latest", show_default=True, help="Which version answers; 0 is the first model.")
@click.option("--temperature", type=click.FloatRange(0.0), help="Sampling temperature; as respond.temperature.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer in tokens; as respond.max_tokens.")
@click.option("--seed", type=int, help="The same seed gives the same answer; else it is drawn.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each answer.")
@common
def chat(
    settings: Settings,
    prompt: str | None,
    version: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Talk to a policy.

    With PROMPT (- for standard input) it is asked once. Nothing of it is recorded. /new begins a new dialogue, Ctrl-D ends it.

    \b
    Examples:
      charter chat
      charter chat --policy 3 "Why is the sky blue?"
      echo "Say it in one word: why?" | charter chat --policy 0 --json -
    """
    number, model = policy_model(settings, version)
    sampling = {
        "temperature": settings.respond.temperature if temperature is None else temperature,
        "top_p": settings.respond.top_p,
        "max_tokens": max_tokens or settings.respond.max_tokens,
    }
    seeds = random.Random(seed)
    messages: list[ChatMessage] = []
    if prompt is None and not as_json:
        click.echo(f"policy {number} ({model.id}); {NEW} begins a new dialogue, Ctrl-D ends", err=True)
    for text in [sys.stdin.read() if prompt == "-" else prompt] if prompt is not None else typed():
        if text.strip() == NEW:
            messages = []
            continue
        messages = [*messages, message("user", text.strip())]
        answer = ask(model, messages, seeds.getrandbits(32), sampling)
        messages = [*messages, message("assistant", answer.text)]
        show(number, answer, as_json)


def typed() -> Iterator[str]:
    """What is typed, line by line; empty lines are passed over."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def message(role: str, content: str) -> ChatMessage:
    from schemas.records import ChatMessage

    return ChatMessage(role=role, content=content)


def ask(model: Model, messages: list[ChatMessage], seed: int, sampling: dict[str, float]) -> Generation:
    from engine.models.port import Ask

    ((answer,),) = model.generate([Ask(tuple(messages), seed=seed)], **sampling)  # type: ignore[arg-type]
    return answer


def show(number: int, answer: Generation, as_json: bool) -> None:
    from charter.text import inert, json_text

    if as_json:
        about = {"policy": number, "answer": answer.text, "finish_reason": answer.finish_reason}
        click.echo(json_text(about, indent=None))
    else:
        click.echo(inert(answer.text))


def policy_model(settings: Settings, version: str) -> tuple[int, Model]:
    """A policy's number and its weights."""
    from charter.pipeline import Models, connect
    from charter.policies import checked_folder, numbered
    from engine.models import open_model
    from engine.policy import updates, weights_of

    bus = connect(settings)
    known = updates(bus)
    bus.close()
    number = numbered(version, known)
    if weights_of(known, number) == 0:
        return number, Models(settings).role("policy")
    folder = checked_folder(settings, known, number)
    return number, open_model(str(folder), threads=settings.models.threads, max_batch=1)


VERBS = (chat,)
