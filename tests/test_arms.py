"""The comparison of arms: its statistics, its graders, the settings of each arm, and a run that is killed and continued."""

import json
import random
from dataclasses import replace
from itertools import product
from statistics import fmean

import pytest

from benchmarks.arms import __main__ as command
from benchmarks.arms.graders import one_sentence
from benchmarks.arms.graders.decline_harm import grade as grade_decline
from benchmarks.arms.graders.shuffle import shuffle_grades, write_shuffled_grader
from benchmarks.arms.plan import ARMS, SEEDS, Act, Arm, make_settings
from benchmarks.arms.prompts import list_training_prompts, read_held_out_prompts, sample_training_prompts
from benchmarks.arms.report import ArmReport, format_report, list_rows
from benchmarks.arms.run import ArmRun, Budget, BudgetUsed, RunOptions, RunResult, run_or_load
from benchmarks.arms.statistics import compute_seed_difference
from benchmarks.arms.worlds import DECLINE_HARM, ONE_SENTENCE, SMALL
from charter.connect import connect_bus
from charter.pipeline import BUILTIN_GRADERS
from consumers.graders.custom import load_grader
from consumers.graders.interface import GradedText
from engine.bus.read import read_values
from engine.errors import UsageError
from engine.statistics import compute_quantile
from schemas.codec import decode_record
from schemas.records import BatchManifest, ChatMessage, FinishReason

# Statistics


def test_difference_is_the_mean_over_seeds_and_prompts():
    base = {"a": 0.5, "b": 0.0}
    result = compute_seed_difference(base, [{"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 1.0}])
    assert result.by_seed == (0.5, 0.5) and result.mean == 0.5
    # Resamples of one prompt and one seed have the means 0.5, 0.5, 0 and 1, so the interval reaches both ends.
    assert (result.low, result.high) == (0.0, 1.0) and not result.moves
    equal = compute_seed_difference(base, [{"a": 0.75, "b": 0.25}] * 3)
    assert (equal.low, equal.mean, equal.high) == (0.25, 0.25, 0.25) and equal.moves


def test_interval_agrees_with_all_possible_resamples():
    """Three seeds and three prompts have 27 * 27 equally likely resamples. A slow loop computes all of them."""
    rng = random.Random(1)
    base = {prompt: rng.random() for prompt in "abc"}
    seeds = [{prompt: rng.random() for prompt in "abc"} for _ in range(3)]
    means = sorted(
        fmean(values[prompt] - base[prompt] for values in drawn_seeds for prompt in drawn_prompts)
        for drawn_seeds in product(seeds, repeat=3)
        for drawn_prompts in product("abc", repeat=3)
    )
    result = compute_seed_difference(base, seeds, num_resamples=20_000)
    assert result.low == pytest.approx(compute_quantile(means, 0.025), abs=0.02)
    assert result.high == pytest.approx(compute_quantile(means, 0.975), abs=0.02)


def test_arm_moves_only_with_one_sign_in_every_seed():
    base = {str(n): 0.0 for n in range(40)}
    up, down = dict.fromkeys(base, 0.4), dict.fromkeys(base, -0.01)
    mixed = compute_seed_difference(base, [*[up] * 20, down])
    assert mixed.low > 0 and not mixed.moves
    assert compute_seed_difference(base, [up] * 3).moves and compute_seed_difference(base, [down]).moves
    noise = {key: (-1.0) ** n for n, key in enumerate(base)}
    assert not compute_seed_difference(base, [noise]).moves
    with pytest.raises(ValueError, match="same prompts"):
        compute_seed_difference(base, [{"0": 1.0}])


# Graders and prompts


def make_text(text, question="Why?", group="r", ended=True):
    reason = FinishReason.STOP if ended else FinishReason.LENGTH
    return GradedText((ChatMessage(role="user", content=question),), text, group, reason)


def test_one_sentence_grader_has_four_parts():
    (good, cut, listed, empty, long) = one_sentence.grade(
        [
            make_text("Cats purr because they are content."),
            make_text("Cats purr because they are content.", ended=False),
            make_text("Reasons:\n- food\n- sleep"),
            make_text(" "),
            make_text("word " * 30),
        ]
    )
    assert (good.label, good.score) == ("follows", 1.0) and (cut.label, cut.score) == ("fails", 0.75)
    assert (listed.details["paragraph"], listed.details["no_list"]) == (0.0, 0.0)
    assert empty.score == 0.0 and empty.label == "fails"
    assert long.label == "fails" and long.score == pytest.approx((3 + 0.5) / 4)


def test_decline_grader_depends_on_the_prompt():
    harmful = next(row["prompt"] for row in list_training_prompts(harmful=True))
    refusal, help_text = "I'm sorry, but I can't help with that.", "First, open the window. Then take a brush and clean it."
    texts = [(refusal, harmful), (help_text, harmful), (refusal, "Why do cats purr?"), (help_text, "Why do cats purr?")]
    grades = grade_decline([make_text(text, question) for text, question in texts])
    assert [grade.score for grade in grades] == [1.0, 0.0, 0.0, 1.0]


def test_shuffled_grades_stay_within_their_response_and_depend_on_the_seed(tmp_path):
    texts = [make_text("word " * n, group=f"g{n // 4}") for n in range(1, 41)]
    right = one_sentence.grade(texts)
    first, again, other = (shuffle_grades(one_sentence.grade, seed)(texts) for seed in (1, 1, 2))
    assert first == again != other and first != right
    for group in {text.group for text in texts}:
        places = [n for n, text in enumerate(texts) if text.group == group]
        assert sorted(first[n].details["words"] for n in places) == sorted(right[n].details["words"] for n in places)
    loaded = load_grader(str(write_shuffled_grader(tmp_path, "one_sentence", 1)), ())
    assert (loaded.name, loaded.version) == ("shuffled-arms-one-sentence", "1-seed-1")
    assert [grade for (grade,) in loaded.grade(texts)] == first


@pytest.mark.parametrize("world", {arm.world.name: arm.world for arm in ARMS}.values(), ids=lambda world: world.name)
def test_grader_of_each_world_has_no_name_of_another_grader(world):
    assert load_grader(str(world.grader_file), BUILTIN_GRADERS).name == world.grader_name


def test_no_measured_prompt_is_trained_on():
    trained = {row["prompt"] for harmful in (True, False) for row in list_training_prompts(harmful=harmful)}
    assert len(trained) == 440 and not trained & {row["prompt"] for row in read_held_out_prompts()}
    assert sample_training_prompts(600, with_harmful=False) != sample_training_prompts(601, with_harmful=False)
    held_out = {row["prompt"] for row in SMALL.read_held_out_rows(128)}
    assert not held_out & {row["prompt"] for row in SMALL.sample_rows(600, 400)}


def test_people_of_the_small_language_follow_its_rule_with_errors():
    rows = SMALL.sample_rows(600, 300)
    for kind, lowest, highest in (("demonstrations", 0.85, 0.99), ("judge_responses", 1.0, 1.0)):
        written = SMALL.write_people_rows(kind, rows, 600)
        share = fmean(SMALL.rule.score_response(row["prompt"], row["completion"]) == 1 for row in written)
        assert lowest <= share <= highest
    pairs = SMALL.write_people_rows("comparisons", rows, 600)
    scores = [[SMALL.rule.score_response(row["prompt"], row[name]) for name in ("chosen", "rejected")] for row in pairs]
    assert 0.8 < fmean(chosen > rejected for chosen, rejected in scores) < 0.97 and len(pairs) > 100


# Settings


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: f"{arm.world.model}-{arm.name}")
def test_every_phase_of_an_arm_has_the_stages_and_the_method_that_it_needs(arm, tmp_path):
    settings = make_settings(arm.world, tmp_path, tmp_path, arm=arm, seed=7, threads=1, overrides={"ppo.beta": "0.5"})
    assert settings.train.seed == 7 and settings.ppo.beta == 0.5
    needed = {"ppo": "respond", "distill": "respond", "grpo": "grade", "dpo": "judge"}
    acts = arm.plan(16, 2)
    for act in acts:
        assert act.phases and all(needed.get(phase, "") in ("", *act.stages) for phase in act.phases)
        methods = set(act.phases) - {"sft", "reward"}
        assert methods <= {settings.train.rl_method}
        assert act.stages or act.people
    prompts = sum(act.num_prompts for act in arm.plan(arm.world.num_prompts, arm.world.num_updates))
    assert len(arm.world.sample_rows(SEEDS[0], prompts)) == prompts
    if settings.train.rl_method == "grpo":
        (grader,) = settings.grade.graders
        assert settings.train.rewards == [f"{load_grader(grader, ()).name}=1"]
        assert load_grader(grader, ()).name.startswith("shuffled-") == arm.shuffles_grades
    if arm.world.model == "smollm2":
        num_completions = 1 if arm.name == "contrast" else 4
        assert (settings.respond.max_tokens, settings.respond.num_completions) == (64, num_completions)
        assert arm.world.num_prompts == 64
    names = {(other.world.model, other.name) for other in ARMS}
    assert len(names) == len(ARMS) and {DECLINE_HARM.model, ONE_SENTENCE.model} == {"smollm2"}


# Runs


class Killed(BaseException):
    """A kill at one place of a run."""


@pytest.fixture
def world(tiny):
    """Return the small world with a tiny model that nothing has trained."""
    settings = dict(SMALL.settings) | {"respond.max_tokens": "6", "respond.num_completions": "4", "sft.epochs": "1"}
    return replace(SMALL, settings=settings, num_prompts=6, get_base_folder=lambda folder: tiny)


PLAN = [Act(6, (), ("sft",), ("demonstrations",)), Act(4, ("respond", "grade"), ("grpo",))]
OPTIONS = RunOptions(held_out=4, samples=1, overrides={"grade.graders": '["length"]', "train.rewards": '["length=1"]'})


def run_once(world, folder, arm, options=OPTIONS, budget=None):
    lines = []
    result = run_or_load(world, arm, 1, folder, options, budget or Budget(float("inf")), lines.append)
    return result, lines


def test_run_that_is_killed_in_every_training_step_trains_each_row_once(world, tmp_path, monkeypatch):
    arm = Arm("mixed", "mixed", world, lambda *_: PLAN, {"train.rl_method": "grpo", "grpo.beta": "0.25"})
    train, kills = ArmRun.train, []

    def train_and_be_killed(run, phase):
        """Be killed twice in each training step: after the manifest is on the log, and after the policy is published."""
        kills.append((phase, "inside"))
        if kills.count(kills[-1]) == 1:
            monkeypatch.setattr(run.trainer.updater, "finish_or_void_batch", be_killed)
        train(run, phase)
        kills.append((phase, "after"))
        if kills.count(kills[-1]) == 1:
            raise Killed

    def be_killed(*_):
        raise Killed

    monkeypatch.setattr(ArmRun, "train", train_and_be_killed)
    for _ in range(4):
        with pytest.raises(Killed):
            run_once(world, tmp_path, arm)
    result, lines = run_once(world, tmp_path, arm)
    assert lines[0].startswith("small-mixed-1: act 2: grpo") and result.refused == []
    assert [(update["phase"], update["version"]) for update in result.updates] == [("sft", 1), ("grpo", 2)]
    assert (result.updates[0]["examples"], result.updates[1]["rollouts"]) == (6, 16)
    assert len(result.values["correct"]) == 4
    folder = tmp_path / "small-mixed-1"
    bus = connect_bus(make_settings(world, folder, folder, arm=arm, seed=1, threads=1, overrides=OPTIONS.overrides))
    manifests = [decode_record(value, BatchManifest) for value in read_values(bus, BatchManifest.topic)]
    bus.close()
    trained = {manifest.phase: json.loads(manifest.settings) for manifest in manifests}
    assert (trained["grpo"]["beta"], trained["grpo"]["rewards"]) == (0.25, ["length=1"])
    assert (trained["sft"]["learning_rate"], trained["sft"]["batch_size"]) == (3e-4, 16)
    again, lines = run_once(world, tmp_path, arm)
    assert again == result and lines == []
    with pytest.raises(UsageError, match="other options"):
        run_once(world, tmp_path, arm, replace(OPTIONS, samples=2))


def test_failed_training_is_reported_and_the_run_goes_on(world, tmp_path):
    """The tiny model writes only incorrect responses, so all rewards of a group are equal."""
    arm = Arm("grpo", "grpo", world, lambda *_: PLAN[1:], {"train.rl_method": "grpo"})
    result, lines = run_once(world, tmp_path, arm, RunOptions(held_out=2, samples=1))
    assert result.updates == [] and result.version == 0
    assert result.refused[0].startswith("grpo: ") and any("same reward" in line for line in lines)


def test_budget_stops_before_a_step_that_does_not_fit(world, tmp_path):
    arm = Arm("sft", "sft", world, lambda *_: PLAN[:1])
    budget = Budget(float("inf"), {"sft": 1.0})
    budget.require("sft")
    with pytest.raises(BudgetUsed):
        run_once(world, tmp_path, arm, budget=Budget(0.0))
    assert not (tmp_path / "small-sft-1.json").exists()


def test_ifeval_can_be_added_to_a_finished_run(world, tmp_path, monkeypatch):
    world = replace(world, model="smollm2")
    measured = []

    def measure(run):
        measured.append(run.options.ifeval_limit)
        run.progress.price["ifeval"] = 0.25

    monkeypatch.setattr(ArmRun, "measure_ifeval", measure)
    monkeypatch.setattr("benchmarks.arms.run.SEEDS", (1,))
    arm = Arm("sft", "sft", world, lambda *_: PLAN[:1])
    without, _ = run_once(world, tmp_path, arm)
    options = replace(OPTIONS, ifeval="ifeval.jsonl", ifeval_limit=3)
    result, lines = run_once(world, tmp_path, arm, options)
    assert measured == [3] and [line for line in lines if "CPU time" in line] == lines[-1:] and "IFEval" in lines[-1]
    assert result.price == without.price | {"ifeval": 0.25} and result.options["ifeval"] == "ifeval.jsonl"
    assert (result.values, result.updates) == (without.values, without.updates)
    assert run_once(world, tmp_path, arm, options) == (result, [])
    for other in (OPTIONS, replace(options, ifeval_limit=4), replace(options, samples=2)):
        with pytest.raises(UsageError, match="other options"):
            run_once(world, tmp_path, arm, other)


# Report


def make_result(arm, seed, values, **more):
    fields = {
        "options": {},
        "version": 1,
        "price": {"perplexity": 9.0},
        "seconds": {"sft": 1.0},
        "cpu_seconds": {"sft": 0.5},
        "refused": [],
        "updates": [],
    }
    return RunResult(arm, "small", seed, values={m.title: values for m in SMALL.metrics}, responses={}, **fields | more)


def test_report_shows_all_seeds_and_claims_nothing_for_an_unfinished_arm():
    keys = [str(n) for n in range(20)]
    base = make_result("base", 0, dict.fromkeys(keys, 0.0))
    up = dict.fromkeys(keys, 0.5)
    whole, part, missing = (replace(ARMS[0], title=title) for title in ("whole", "part", "missing"))
    reports = [
        ArmReport(whole, [make_result("a", seed, up, refused=["ppo: no"] if seed == 601 else []) for seed in SEEDS], {}),
        ArmReport(part, [make_result("b", 600, up)], {601: "3 of 7 steps", 602: "not started"}),
        ArmReport(missing, [], {600: "not started"}),
    ]
    text = format_report(SMALL, base, reports)
    assert "| whole | 3 | **+50 (+50 to +50)** |" in text and "| part (unfinished) | 1 of 3 | +50 (+50 to +50) |" in text
    assert "* part, seed 601: 3 of 7 steps" in text and "* whole, seed 601: ppo: no" in text
    assert all(f"| whole | {seed} | 1 | 50 % |" in text for seed in SEEDS)
    rows = list_rows(SMALL, base, reports)
    assert [row["moves"] for row in rows if row["metric"] == "correct"] == [True, None] and rows[-1]["metric"] is None
    assert rows[0]["by_seed"] == {"600": 0.5, "601": 0.5, "602": 0.5}
    assert "not measured yet" in format_report(SMALL, None, reports)


def test_command_shows_what_is_unfinished_without_running_anything(tmp_path, capsys):
    assert command.main(["--model", "smollm2", "--data", str(tmp_path), "--report", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert {row["arm"] for row in rows} == {arm.name for arm in ARMS if arm.world.model == "smollm2"}
    assert next(row for row in rows if row["arm"] == "distill")["unfinished"] == dict.fromkeys(map(str, SEEDS), "not started")
    assert command.main(["--model", "small", "--data", str(tmp_path), "--arm", "distill"]) == 2
    assert "its arms are demonstrations" in capsys.readouterr().err
