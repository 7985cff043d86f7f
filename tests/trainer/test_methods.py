"""The registry of RL methods is the only place that knows one method by its name."""

import re
from pathlib import Path

from engine.settings import TrainSettings
from trainer import methods
from trainer.phases import LEARNERS

ROOT = Path(__file__).parents[2]
# These files are about one method: the entries of the registry, the learners, their settings, and the demo, which runs PPO.
OF_ONE_METHOD = ("trainer/methods.py", "trainer/phases.py", "trainer/learners/grpo.py", "engine/settings.py", "charter/demo.py")


def test_each_method_has_a_learner_and_a_setting():
    assert set(LEARNERS) == set(methods.PHASES)
    names = TrainSettings.model_fields["rl_method"].annotation.__args__
    assert set(names) == set(methods.RL_METHODS)


def test_no_other_module_compares_a_phase_with_a_method():
    """Such a comparison would silently exclude a new method from staleness, drops, beta or the monitor."""
    names = "|".join(methods.RL_METHODS)  # in grpo.py, "grpo" is also the name of a loss
    comparison = re.compile(rf"""(?:==|!=|<>|\bin \(|phase\s*=)\s*['"](?:{names})['"]""")
    files = [file for folder in ("trainer", "charter", "engine") for file in (ROOT / folder).rglob("*.*")]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        if file.suffix in (".py", ".sql", ".html", ".toml") and str(file.relative_to(ROOT)) not in OF_ONE_METHOD
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if comparison.search(line)
    ]
    assert not found


def test_enabled_phases_follow_from_the_method():
    assert methods.list_enabled_phases(TrainSettings()) == ("sft", "reward", "ppo")
    assert methods.list_enabled_phases(TrainSettings(rl_method="dpo")) == ("sft", "dpo")
