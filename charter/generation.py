"""Run the generator of `charter produce --generate`: open its model, its limits and its metrics, and show its yield."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from charter.budget import make_budget
from charter.connect import connect_bus, is_log_missing
from charter.console import print_progress
from charter.evaluation.suites import open_suite
from charter.installation import get_install_command
from charter.models import RoleModels
from charter.startup import exit_if_abandoned, start_when_ready
from charter.telemetry import start_metrics_server
from charter.text import to_one_line
from engine.bus.embedded import EmbeddedBus
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.host import Host
from engine.instances import ServiceLease
from engine.languages import require_language_detector
from engine.metrics import MetricSample, collect_notice_metrics, collect_server_metrics
from engine.models.interface import Model
from engine.pacing import PacedAdmission
from engine.server_waits import ServerWaitReporter
from engine.settings import Settings
from engine.stop_signals import stop_on_signals
from engine.text import format_count
from producers.generate import (
    GeneratorOptions,
    PromptGenerator,
    collect_generation_metrics,
    format_yield,
)
from producers.near_duplicates import join_messages, require_minhash
from producers.recipe import load_recipe
from schemas.records import Sampling
from schemas.topics import TOPICS
from trainer.methods import get_rl_fraction

ROLE = "generator"
_POLL_INTERVAL_S = 0.2
_REPORT_INTERVAL_POLLS = 25


def require_packages() -> None:
    """Raise UsageError if a package of the extra `generate` is missing."""
    command = f"type: {get_install_command('generate')}"
    require_minhash(command)
    require_language_detector(
        "produce --generate", "a prompt in another language than the recipe asks for is rejected", command
    )


def read_evaluation_texts(settings: Settings, specs: Sequence[str]) -> list[tuple[str, str]]:
    """Return (origin, text) for each prompt of evaluation suites that need not be on the log yet.

    A spec is that of `charter eval run --suite`: NAME, NAME=FILE or FILE.
    """
    try:
        suites = [open_suite(spec, settings.evaluation.suites_folder, settings.prompts.max_chars) for spec in specs]
    except UsageError as error:
        fix = error.fix.replace("charter eval run --suite", "--suite").replace("--suite", "--avoid-suite")
        raise UsageError(error.what.replace("--suite", "--avoid-suite"), error.why, fix) from error
    return [
        (f"{suite.name}:{prompt.place.item}", join_messages(prompt.messages)) for suite in suites for prompt in suite.prompts
    ]


def make_generator_options(settings: Settings, limit: int) -> GeneratorOptions:
    options = settings.generate
    return GeneratorOptions(
        seed=options.seed,
        batch_size=options.batch_size,
        sampling=Sampling(temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens),
        max_waiting=options.max_waiting,
        max_fruitless=options.max_fruitless,
        duplicate_threshold=settings.prompts.duplicate_threshold,
        max_chars=settings.prompts.max_chars,
        eval_fraction=settings.prompts.eval_fraction,
        rl_fraction=get_rl_fraction(settings),
        limit=limit,
    )


def generate_prompts(
    settings: Settings, limit: int, avoided_suites: Sequence[str], *, wait: bool, open_models: dict[str, Model] | None = None
) -> None:
    """Generate prompts until a signal arrives, or until the run has `limit` prompts of the recipe. 0 means no limit.

    `open_models` are models that are already open, by their setting. Raise TooFewPrompts if the model writes no new prompts any more.
    """
    require_packages()
    recipe, evaluation_texts = load_recipe(settings.generate.recipe), read_evaluation_texts(settings, avoided_suites)
    models = RoleModels(settings, {} if open_models is None else open_models)

    def start() -> tuple[Bus, PromptGenerator]:
        bus = connect_bus(settings)
        try:
            options, model = make_generator_options(settings, limit), models.get_model(ROLE)
            pacing = PacedAdmission(bus, settings.respond.num_completions)
            budget = make_budget(settings, models, bus, [ROLE], admits_prompts=True)
            generator = PromptGenerator(
                bus,
                recipe,
                model,
                settings.run.id,
                options,
                pacing=pacing,
                budget=budget,
                evaluation_texts=evaluation_texts,
            )
            return bus, generator
        except BaseException:
            bus.close()
            raise

    bus, generator = start_when_ready(start, wait=wait)
    with ExitStack() as resources:
        resources.callback(bus.close)
        for opened in (generator.pacing, generator.budget):
            if opened:
                resources.callback(opened.close)
        lease = ServiceLease(settings.folder, "generator")
        resources.callback(lease.close)
        for close in reversed(start_metrics_server(settings, _make_collector(generator, models))):
            resources.callback(close)
        waits = ServerWaitReporter(settings.folder, lambda: [server.health for server in models.list_servers()])
        host = Host(
            [],
            {"generator": generator.run, "server waits": waits.run},
            [resources.pop_all().close],
            watched_calls=[generator.call_tracker],
            shutdown_timeout_s=settings.worker.shutdown_timeout_s,
            call_timeout_s=settings.worker.call_timeout_s,
        )
    end = f"until the run has {format_count(limit, 'prompts')} of it" if limit else "stop with Ctrl-C"
    print_progress(
        f"generating prompts for run {settings.run.id} from recipe {recipe.name} {recipe.version} with {generator.model.id}; {end}"
    )
    _run_until_stopped(host, generator, stop_on_signals())
    click.echo(format_yield(generator.num_published, generator.rejected))
    exit_if_abandoned(host, 0)
    host.raise_if_failed()


def _make_collector(generator: PromptGenerator, models: RoleModels) -> Callable[[Bus], Iterator[MetricSample]]:
    def read(bus: Bus) -> Iterator[MetricSample]:
        yield from collect_notice_metrics()
        yield from collect_generation_metrics(generator)
        yield from collect_server_metrics(models.list_servers())

    return read


def _run_until_stopped(host: Host, generator: PromptGenerator, stop: threading.Event) -> None:
    """Run the host until the generator ends or a signal arrives. Print the yield when it changes."""
    last_line = format_yield(0, Counter())
    with host:
        for poll in count(1):
            if stop.wait(_POLL_INTERVAL_S) or host.failure_event.is_set() or generator.is_done.is_set():
                return
            line = format_yield(generator.num_published, generator.rejected)
            if poll % _REPORT_INTERVAL_POLLS == 0 and line != last_line:
                print_progress(line)
                last_line = line


def show_sample(settings: Settings, avoided_suites: Sequence[str]) -> None:
    """Sample the next index and print its prompts and its rejected texts. Publish nothing."""
    require_packages()
    recipe, evaluation_texts = load_recipe(settings.generate.recipe), read_evaluation_texts(settings, avoided_suites)
    with ExitStack() as resources:
        bus = open_log_or_empty(settings, resources)
        model = RoleModels(settings).get_model(ROLE)
        generator = PromptGenerator(
            bus, recipe, model, settings.run.id, make_generator_options(settings, 0), evaluation_texts=evaluation_texts
        )
        generator.read_log()
        sampled = generator.sample(generator.position.next_line)
    for prompt in sampled.prompts:
        kind = prompt.recipe_item.kind if prompt.recipe_item else ""
        click.echo(to_one_line(f"would be published, {prompt.source}, {kind}: {prompt.messages[-1].content}"))
    for item in sampled.rejected:
        detail = f" ({item.detail})" if item.detail else ""
        click.echo(to_one_line(f"rejected, {item.reason.value}{detail}: {item.text}"))
    click.echo(f"dry run of index {sampled.index}: {format_yield(len(sampled.prompts), sampled.count_rejected(), 'accepted')}")


def open_log_or_empty(settings: Settings, resources: ExitStack) -> Bus:
    """Return the log. If the log does not exist yet, return an empty one in a temporary folder, so that nothing is created."""
    if is_log_missing(settings):
        folder = resources.enter_context(TemporaryDirectory())
        bus: Bus = EmbeddedBus(Path(folder))
        bus.create_topics(list(TOPICS.values()))
    else:
        bus = connect_bus(settings)
    resources.callback(bus.close)
    return bus
