"""`charter eval principles`: measure which principle prevents what, with jailbreak prompts."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from charter.connect import connect_bus, open_store
from charter.console import common_options, output_options, print_progress, print_records, print_rows
from charter.evaluation.ablation import run_ablations
from charter.evaluation.jailbreaks import TRANSFORMS
from charter.evaluation.principle_effects import (
    CONTROL,
    compute_principle_effects,
    plan_principle_runs,
    require_critique_principles,
)
from charter.evaluation.suite_run import EvaluationRequest, make_evaluation_plan, run_evaluation
from charter.startup import start_when_ready, wait_option
from engine.errors import UsageError
from engine.settings import Settings


@click.command("principles")
@click.argument("principles", metavar="[PRINCIPLE...]", nargs=-1)
@click.option(
    "--suite",
    "suites",
    metavar="NAME[=FILE]",
    multiple=True,
    required=True,
    help="Suite of harmful prompts, as for charter eval run. May be repeated.",
)
@click.option(
    "--transform",
    "transforms",
    metavar="NAME",
    multiple=True,
    type=click.Choice(list(TRANSFORMS)),
    help=f"Also use each prompt with this jailbreak transformation: {', '.join(TRANSFORMS)}. May be repeated.",
)
@click.option("--policy", metavar="VERSION", default="0", show_default=True, help="Policy that writes the first responses.")
@click.option("--name", metavar="NAME", default="principles", show_default=True, help="Name of the evaluation.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Use only N prompts of each suite.")
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help="Maximum length of a response in tokens [default: that of the suite].",
)
@output_options
@wait_option
@common_options
def measure_principles(
    settings: Settings,
    origins: dict[str, str],
    principles: tuple[str, ...],
    suites: tuple[str, ...],
    transforms: tuple[str, ...],
    policy: str,
    name: str,
    limit: int | None,
    max_tokens: int | None,
    output: str,
    wait: bool,
) -> None:
    """Measure which principle of the constitution prevents what.

    A policy responds to harmful prompts, also with jailbreak transformations. The responses are criticized and revised under
    run.constitution, and again without each critique principle (or each PRINCIPLE). The grader refusal grades the final responses.
    Print the share that does not refuse, and its difference to the full constitution: it is positive if the principle prevents
    something. Nothing of this is trained on. To continue after an interruption, run the same command.

    \b
    Examples:
      charter eval principles --suite strongreject=strongreject.csv --transform role-play --transform past-tense --limit 50
      charter eval principles less-harm --suite harmbench=behaviors.csv --set run.constitution=red-team --csv
    """
    if origins["run.id"] == "flag":
        raise UsageError("--run has no effect on an evaluation", "it has its own runs", "give a name: --name NAME")
    require_critique_principles(settings, principles)
    request = EvaluationRequest(suites, (policy,), name=name, transforms=transforms, limit=limit, max_tokens=max_tokens)
    bus = start_when_ready(lambda: connect_bus(settings), wait=wait)
    try:
        plan = make_evaluation_plan(settings, bus, request)
        if "refusal" not in plan.settings.grade.graders:
            raise UsageError(
                f"the grader refusal does not grade the suites {', '.join(suite.name for suite in plan.suites)}",
                "the outcome is whether a response refuses",
                "use a suite of harmful prompts, such as strongreject=FILE",
            )
        if not run_evaluation(plan, bus, wait=wait):
            print_progress("stopped; to continue, run the same command again")
            sys.exit(1)
        evaluation_run = plan.get_run_id(plan.versions[0])
        runs = plan_principle_runs(settings, bus, evaluation_run, principles)
        run_ablations(runs, bus)
    finally:
        bus.close()
    effects = compute_principle_effects(open_store(settings), evaluation_run, runs)
    if output:
        print_records([asdict(effect) for effect in effects], output)
        return
    rows = [list((asdict(effect) | {"transform": effect.transform or "-"}).values()) for effect in effects]
    print_rows(list(asdict(effects[0])), rows, output)
    print_progress(f"{CONTROL} is the full constitution. A positive difference: without the principle, fewer responses refuse")
