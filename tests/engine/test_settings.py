"""Settings: precedence, origins, and errors that suggest the nearest name."""

from pathlib import Path

import pytest

from engine.errors import UsageError
from engine.settings import PRESETS, format_settings_file, iter_settings, load_settings


def test_defaults_have_the_expected_values():
    settings, origins = load_settings(environment={})
    assert (settings.ppo.clip, settings.ppo.beta, settings.critique.rounds, settings.respond.num_completions) == (
        0.2,
        0.02,
        4,
        2,
    )
    assert origins["ppo.clip"] == "default"


def test_precedence_is_flag_environment_file_preset(tmp_path):
    file = tmp_path / "charter.toml"
    file.write_text("[respond]\nnum_completions = 3\nmax_tokens = 33\ntop_p = 0.3\n")
    preset = {"respond": {"num_completions": 2, "max_tokens": 22, "top_p": 0.2, "temperature": 0.22}}
    environment = {"CHARTER_RESPOND__NUM_COMPLETIONS": "4", "CHARTER_RESPOND__MAX_TOKENS": "44"}
    settings, origins = load_settings({"respond.num_completions": "5"}, file, preset, environment)
    respond = settings.respond
    assert (respond.num_completions, respond.max_tokens, respond.top_p, respond.temperature) == (5, 44, 0.3, 0.22)
    names = [origins[f"respond.{key}"] for key in ("num_completions", "max_tokens", "top_p", "temperature")]
    assert names == ["flag", "CHARTER_RESPOND__MAX_TOKENS", str(file), "preset"]


def test_preset_sets_only_values_that_are_not_set_elsewhere(tmp_path):
    file = tmp_path / "charter.toml"
    file.write_text('[critique]\npreset = "bai2022"\nrounds = 2\n[judge]\npreset = "course"\n')
    preset = {"critique": {"rounds": 1, "temperature": 0.9, "max_tokens": 9}}
    environment = {"CHARTER_JUDGE__REJECT_POSITION_FLIPS": "false", "CHARTER_JUDGE__PRESET": "bai2022-cot"}
    settings, origins = load_settings({"critique.preset": "course"}, file, preset, environment)
    critique, judge = settings.critique, settings.judge
    assert (critique.preset, critique.selection, critique.early_stop, critique.few_shot) == (
        "course",
        "rotate",
        "phrases",
        False,
    )
    assert (critique.rounds, critique.temperature, critique.max_tokens) == (2, 0.9, 9)
    assert (judge.preset, judge.answer_mode, judge.clamp, judge.principles, judge.reject_position_flips) == (
        "bai2022-cot", "reasoning", 0.4, "sample", False
    )  # fmt: skip
    assert origins["critique.early_stop"] == "critique.preset=course" and origins["critique.preset"] == "flag"
    assert origins["judge.clamp"] == "judge.preset=bai2022-cot" and origins["judge.num_principles"] == "default"
    for section, layers in PRESETS.items():
        for name in layers:
            assert getattr(load_settings({f"{section}.preset": name}, environment={})[0], section).preset == name
    with pytest.raises(UsageError, match=r"judge\.preset cannot be \"best\""):
        load_settings({"judge.preset": "best"}, environment={})


@pytest.mark.parametrize(
    ("flags", "environment", "text", "nearest"),
    [
        ({"respond.num_completion": "1"}, {}, "", "respond.num_completions"),
        ({}, {"CHARTER_JUDGE__MIN_MAS": "1"}, "", "judge.min_option_mass"),
        ({}, {}, "[ppo]\ncliping = 1\n", "ppo.clip"),
        ({}, {}, "[critiques]\nrounds = 1\n", "critique.rounds"),
        ({}, {}, "num_completions = 1\n", "num_completions"),
    ],
)
def test_error_for_an_unknown_setting_suggests_the_nearest(tmp_path, flags, environment, text, nearest):
    file = tmp_path / "charter.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match="unknown setting") as caught:
        load_settings(flags, file, None, environment)
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("respond.num_completions", "0"), ("judge.pairing", "pairs"), ("ppo.clip", "-1"), ("critique.early_stop", "perhaps")],
)
def test_error_for_an_invalid_value_names_the_setting_and_the_value(name, value):
    with pytest.raises(UsageError) as caught:
        load_settings({name: value}, environment={})
    assert name in str(caught.value) and value.strip("-") in str(caught.value)


def test_error_for_an_invalid_file_names_the_line(tmp_path):
    file = tmp_path / "charter.toml"
    file.write_text("[respond]\nnum_completions = = 3\n")
    with pytest.raises(UsageError, match="line 2"):
        load_settings({}, file, environment={})


def test_lists_are_parsed_from_commas_or_json():
    for text in ("helpful,benign", '["helpful", "benign"]'):
        settings, _ = load_settings({"critique.skip_sources": text}, environment={})
        assert settings.critique.skip_sources == ["helpful", "benign"]
    settings, _ = load_settings({"models.follow": "critic", "sft.rounds": "[1, 2]"}, environment={})
    assert (settings.models.follow, settings.sft.rounds) == (["critic"], [1, 2])
    for value in ("[1", "0", "x"):
        with pytest.raises(UsageError, match=r"sft.rounds cannot be"):
            load_settings({"sft.rounds": value}, environment={})


def test_generated_settings_file_has_every_key_and_the_default_values(tmp_path):
    file = tmp_path / "charter.toml"
    file.write_text(format_settings_file())
    settings, origins = load_settings({}, file, environment={})
    assert settings == load_settings({}, environment={})[0] and set(origins.values()) == {"default"}
    lines = format_settings_file().splitlines()
    assert all(any(line.startswith(f"# {key} = ") for line in lines) for _, key, _ in iter_settings())


def test_committed_settings_file_is_up_to_date():
    assert Path("charter.toml").read_text(encoding="utf-8") == format_settings_file(), (
        "run: charter config --defaults > charter.toml"
    )


def test_weights_in_bf16_are_only_frozen_ones():
    with pytest.raises(UsageError, match=r"train\.base_dtype cannot be .bf16.(.|\n)*train\.lora_rank is 0"):
        load_settings({"train.base_dtype": "bf16"}, environment={})
    flags = {"train.base_dtype": "bf16", "train.lora_rank": "8"}
    assert load_settings(flags, environment={})[0].train.base_dtype == "bf16"
    with pytest.raises(UsageError, match=r"train\.precision is fp32"):
        load_settings(flags | {"train.precision": "fp32"}, environment={})


def test_thinking_budget_needs_a_judge_that_writes():
    with pytest.raises(UsageError, match=r"judge\.max_thinking_tokens cannot be .100.(.|\n)*reasoning or letter"):
        load_settings({"judge.max_thinking_tokens": "100"}, environment={})
    flags = {"judge.max_thinking_tokens": "100", "judge.preset": "bai2022-cot"}
    assert load_settings(flags, environment={})[0].judge.max_thinking_tokens == 100
