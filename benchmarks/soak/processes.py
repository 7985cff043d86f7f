"""The settings of the soak test, and the two processes whose models are programs: the stream and the generator of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.settings import Settings, load_settings
from engine.stop_signals import stop_on_signals

ROOT = Path(__file__).parents[2]
_CRITIC_ID, _JUDGE_ID, _GENERATOR_ID = "programmatic-critic", "programmatic-judge", "programmatic-questions"
_CHECK_INTERVAL_S = 0.5


def make_setting_flags(folder: Path) -> dict[str, str]:
    """Return the settings. Batches are small, so that there are many policies. The staleness limits are the defaults."""
    return {
        "data.folder": str(folder / "data"), "run.constitution": str(ROOT / "benchmarks/learning/constitution.toml"),
        "prompts.eval_fraction": "0", "models.policy": str(folder / "base"), "models.critic": _CRITIC_ID, "models.judge": _JUDGE_ID,
        "models.generator": _GENERATOR_ID, "generate.recipe": str(ROOT / "benchmarks/soak/recipe.toml"),
        "generate.batch_size": "8", "generate.max_waiting": "64",
        "models.max_batch_size": "64", "models.threads": "1", "respond.max_tokens": "48", "respond.num_completions": "2",
        "critique.rounds": "1", "critique.few_shot": "false", "bus.partitions": "4",
        "train.sft_rows": "512", "train.reward_rows": "128", "train.ppo_rows": "64", "train.max_rows": "512",
        "train.micro_batch_size": "32", "train.precision": "fp32", "train.sft_mixture": "[]", "train.reward_mixture": "[]",
        "sft.learning_rate": "1e-4", "sft.batch_size": "16", "reward.learning_rate": "3e-4", "reward.batch_size": "16",
        "reward.require_above_chance": "false",  # this test does not measure what the updates learn
        "ppo.learning_rate": "5e-5", "ppo.batch_size": "32", "ppo.epochs": "1",
        # The programmatic judge runs in the stream's process; the monitor's other metrics do not need a judge.
        "monitor.prompts": "0",
    }  # fmt: skip


def load_soak_settings(folder: Path, changes: Mapping[str, str]) -> Settings:
    return load_settings(make_setting_flags(folder) | dict(changes), environment={})[0]


def run_stream(folder: Path, changes: Mapping[str, str]) -> None:
    """Run every stage and the sink until SIGTERM, as `charter run` does."""
    from benchmarks.learning.programmatic import LANGUAGE_RULE, ProgrammaticCritic, make_judge
    from charter.connect import connect_bus
    from charter.pipeline import make_host
    from charter.stages import STAGES
    from charter.startup import exit_if_abandoned

    settings, stop = load_soak_settings(folder, changes), stop_on_signals()
    models = {_CRITIC_ID: ProgrammaticCritic(LANGUAGE_RULE), _JUDGE_ID: make_judge("judge", LANGUAGE_RULE, 0)}
    bus = connect_bus(settings)
    host = make_host(settings, bus, STAGES, sink=True, open_models=models)
    with host:
        while not stop.wait(_CHECK_INTERVAL_S) and not host.failure_event.is_set():
            pass
        host.note_stop()
    bus.close()
    exit_if_abandoned(host, 0)
    host.raise_if_failed()


def run_generator(folder: Path, changes: Mapping[str, str]) -> None:
    """Generate prompts until SIGTERM, as `charter produce --generate` does."""
    from benchmarks.soak.questions import QuestionModel
    from charter.generation import generate_prompts

    generate_prompts(load_soak_settings(folder, changes), 0, (), wait=False, open_models={_GENERATOR_ID: QuestionModel()})
