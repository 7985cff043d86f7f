"""`charter chat`: chat with a policy on the terminal, or send one prompt to a policy from a script."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import click

from charter.connect import connect_existing_bus
from charter.console import common_options
from charter.models import RoleModels
from charter.policies import get_verified_folder, parse_policy_version
from charter.text import escape_unprintable, format_json
from engine.models import open_model
from engine.models.interface import Generation, GenerationRequest, Model, require_results
from engine.policy import get_weights_version, read_policy_updates
from engine.settings import Settings
from schemas.records import ChatMessage

_NEW_DIALOGUE_COMMAND = "/new"


@click.command()
@click.argument("prompt", required=False)
@click.option("--policy", "version", default="latest", show_default=True, help="Policy version; 0 is the base model.")
@click.option("--temperature", type=click.FloatRange(0.0), help="Sampling temperature [default: respond.temperature].")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Maximum number of tokens in a response [default: respond.max_tokens]."
)
@click.option("--seed", type=int, help="Sampling seed [default: random].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per response.")
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

    With PROMPT (- reads it from standard input), print one response and exit. Without PROMPT, each line of input is a user
    message. Type /new to start a new dialogue, and Ctrl-D to end the chat. The command does not write to the log or the database.

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
        click.echo(
            f"policy {number} ({model.id}); {_NEW_DIALOGUE_COMMAND} starts a new dialogue, Ctrl-D ends the chat", err=True
        )
    for text in [sys.stdin.read() if prompt == "-" else prompt] if prompt is not None else _read_user_lines():
        if text.strip() == _NEW_DIALOGUE_COMMAND:
            messages = []
            continue
        messages = [*messages, _make_message("user", text.strip())]
        generation = _generate_response(model, messages, seeds.getrandbits(32), sampling)
        messages = [*messages, _make_message("assistant", generation.text)]
        _print_response(number, generation, as_json)


def _read_user_lines() -> Iterator[str]:
    """Yield the lines of standard input. Skip empty lines."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _make_message(role: str, content: str) -> ChatMessage:
    return ChatMessage(role=role, content=content)


def _generate_response(model: Model, messages: list[ChatMessage], seed: int, sampling: dict[str, Any]) -> Generation:
    ((generation,),) = require_results(model.generate([GenerationRequest(tuple(messages), seed=seed)], **sampling))
    return generation


def _print_response(version: int, generation: Generation, as_json: bool) -> None:
    if as_json:
        row = {"policy": version, "response": generation.text, "finish_reason": generation.finish_reason}
        click.echo(format_json(row, indent=None))
    else:
        click.echo(escape_unprintable(generation.text))


def _load_policy(settings: Settings, version: str) -> tuple[int, Model]:
    """Load a policy. Return its version number and its model."""
    bus = connect_existing_bus(settings)
    updates = read_policy_updates(bus)
    bus.close()
    number = parse_policy_version(version, updates)
    if get_weights_version(updates, number) == 0:
        return number, RoleModels(settings).get_model("policy")
    folder = get_verified_folder(settings, updates, number)
    return number, open_model(str(folder), threads=settings.models.threads, max_batch_size=1)


COMMAND = chat
