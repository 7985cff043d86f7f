"""`charter chat`: talk to a policy, or ask it one thing from a script."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import click

from charter.connect import connect_bus
from charter.console import common_options
from charter.models import RoleModels
from charter.policies import get_verified_folder, parse_policy_version
from charter.text import escape_unprintable, format_json
from engine.models import open_model
from engine.models.interface import Generation, GenerationRequest, Model
from engine.policy import get_weights_version, read_policy_updates
from engine.settings import Settings
from schemas.records import ChatMessage

_NEW_DIALOGUE_COMMAND = "/new"


@click.command()
@click.argument("prompt", required=False)
@click.option("--policy", "version", default="latest", show_default=True, help="Which version answers; 0 is the first model.")
@click.option("--temperature", type=click.FloatRange(0.0), help="Sampling temperature; as respond.temperature.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer in tokens; as respond.max_tokens.")
@click.option("--seed", type=int, help="The same seed gives the same answer; else it is drawn.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each answer.")
@common_options
def chat(
    settings: Settings,
    prompt: str | None,
    version: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Chat with a policy.

    With PROMPT (- for standard input) it is asked once. Nothing of it is recorded. /new begins a new dialogue, Ctrl-D ends it.

    \b
    Examples:
      charter chat
      charter chat --policy 3 "Why is the sky blue?"
      echo "Say it in one word: why?" | charter chat --policy 0 --json -
    """
    number, model = _load_policy(settings, version)
    sampling = {
        "temperature": settings.respond.temperature if temperature is None else temperature,
        "top_p": settings.respond.top_p,
        "max_tokens": max_tokens or settings.respond.max_tokens,
    }
    seeds = random.Random(seed)
    messages: list[ChatMessage] = []
    if prompt is None and not as_json:
        click.echo(f"policy {number} ({model.id}); {_NEW_DIALOGUE_COMMAND} begins a new dialogue, Ctrl-D ends", err=True)
    for text in [sys.stdin.read() if prompt == "-" else prompt] if prompt is not None else _read_user_lines():
        if text.strip() == _NEW_DIALOGUE_COMMAND:
            messages = []
            continue
        messages = [*messages, _make_message("user", text.strip())]
        answer = _generate_reply(model, messages, seeds.getrandbits(32), sampling)
        messages = [*messages, _make_message("assistant", answer.text)]
        _print_reply(number, answer, as_json)


def _read_user_lines() -> Iterator[str]:
    """What is typed, line by line; empty lines are passed over."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _make_message(role: str, content: str) -> ChatMessage:

    return ChatMessage(role=role, content=content)


def _generate_reply(model: Model, messages: list[ChatMessage], seed: int, sampling: dict[str, float]) -> Generation:

    ((answer,),) = model.generate([GenerationRequest(tuple(messages), seed=seed)], **sampling)  # type: ignore[arg-type]
    return answer


def _print_reply(version: int, reply: Generation, as_json: bool) -> None:

    if as_json:
        about = {"policy": version, "answer": reply.text, "finish_reason": reply.finish_reason}
        click.echo(format_json(about, indent=None))
    else:
        click.echo(escape_unprintable(reply.text))


def _load_policy(settings: Settings, version: str) -> tuple[int, Model]:
    """A policy's number and its weights."""

    bus = connect_bus(settings)
    known = read_policy_updates(bus)
    bus.close()
    number = parse_policy_version(version, known)
    if get_weights_version(known, number) == 0:
        return number, RoleModels(settings).get_model("policy")
    folder = get_verified_folder(settings, known, number)
    return number, open_model(str(folder), threads=settings.models.threads, max_batch_size=1)


COMMAND = chat
