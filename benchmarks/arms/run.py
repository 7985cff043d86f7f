"""Run one arm with one seed through the real stages, sink and trainer. A run that was stopped or killed continues where it was.

A run is a list of steps. The file `progress.json` in its folder has the number of finished steps. The step that was interrupted
is started again: the log then shows which prompts are published and responded to, and which batches are trained or begun, so no
work is done twice. The result of a finished run is a file next to its folder, and the run is not started again.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arms.plan import CRITIC_ID, JUDGE_ID, SEEDS, Act, Arm, make_settings
from benchmarks.arms.worlds import Row, World
from benchmarks.learning.programmatic import ProgrammaticCritic, make_judge
from benchmarks.stream import run_stages
from charter.connect import connect_bus, open_store
from charter.evaluation.suite_run import EvaluationRequest, make_evaluation_plan, run_evaluation
from engine.bus.port import Bus
from engine.errors import TrainingFailed, UsageError
from engine.settings import Settings
from engine.store import Store
from producers.files import FileProducer, InputKind
from schemas.records import ChatMessage
from trainer.loop import Trainer
from trainer.monitor import compute_perplexity

BASE_SEED = 0  # the base model is measured once per world
_HELD_OUT = "held-out"
_KIND_OF_PEOPLE_ROWS: dict[str, InputKind] = {
    "demonstrations": "demonstrations",
    "judge_responses": "demonstrations",
    "comparisons": "preferences",
}


class BudgetUsed(Exception):
    """The next step would probably end after `--budget-minutes`."""


class Stopped(Exception):
    """A signal stopped a step."""


@dataclass
class Budget:
    """The end of the time budget (seconds of `time.monotonic`). `durations` has the longest step of each kind so far."""

    ends_at: float
    durations: dict[str, float] = field(default_factory=dict)

    def require(self, kind: str) -> None:
        """Raise BudgetUsed if a step of this kind would probably end too late."""
        if time.monotonic() + self.durations.get(kind, 0.0) > self.ends_at:
            raise BudgetUsed

    def note(self, kind: str, seconds: float) -> None:
        self.durations[kind] = max(self.durations.get(kind, 0.0), seconds)


@dataclass(frozen=True)
class RunOptions:
    """The options that change the result of a run. A result with other options is never mixed with these, but IFEval can be added.

    `limit` is the number of prompts of an update, or None for that of the world. `overrides` are changed settings.
    """

    limit: int | None = None
    updates: int | None = None
    held_out: int = 72
    samples: int = 2
    ifeval: str = ""
    ifeval_limit: int = 40
    human_text: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass
class RunProgress:
    """What is finished of a run. `seconds` and `cpu_seconds` have the time by kind of step.

    `skipped` has the training steps that had nothing to train, and `price` what is measured of it so far.
    """

    options: dict[str, Any]
    num_steps: int = 0
    num_done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    price: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """The result of one arm with one seed. `values` has, for each metric of the world, the mean of each held-out prompt.

    `price` has the perplexity of texts by people and, if IFEval was measured, its strict rate. `refused` lists the training steps
    that published nothing, with the reason. `updates` has the metrics of each published policy.
    """

    arm: str
    world: str
    seed: int
    options: dict[str, Any]
    version: int
    values: dict[str, dict[str, float]]
    price: dict[str, float]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    refused: list[str]
    updates: list[dict[str, Any]]
    responses: dict[str, str]


@dataclass(frozen=True)
class Step:
    """One step of a run: its kind (for times and budgets), what it does, and for training steps the phase."""

    kind: str
    title: str
    call: Callable[[], None]
    phase: str = ""


def get_run_name(world: World, arm: Arm | None, seed: int) -> str:
    return f"{world.name}-{arm.name}-{seed}" if arm else f"{world.name}-base"


def read_result(folder: Path, name: str) -> RunResult | None:
    """Return the result of a finished run, or None."""
    path = folder / f"{name}.json"
    return RunResult(**json.loads(path.read_text())) if path.exists() else None


def read_progress(folder: Path, name: str) -> RunProgress | None:
    """Return the progress of a run that has begun, or None."""
    path = folder / name / "progress.json"
    return RunProgress(**json.loads(path.read_text())) if path.exists() else None


def _write_atomically(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


def run_or_load(
    world: World,
    arm: Arm | None,
    seed: int,
    folder: Path,
    options: RunOptions,
    budget: Budget,
    report: Callable[[str], None],
    threads: int = 1,
) -> RunResult:
    """Return the result of a finished run, or begin or continue the run.

    Raises BudgetUsed or Stopped if the run is not finished, and UsageError if it was begun with other options.
    """
    if arm is None:
        options = replace(options, limit=None, updates=None)  # the base model is not trained
    name = get_run_name(world, arm, seed)
    saved, wanted = read_result(folder, name), asdict(options)
    for begun in (saved, read_progress(folder, name)):
        changed = {key for key, value in wanted.items() if begun.options.get(key) != value} if begun else set()
        if not begun or (not begun.options["ifeval"] and changed <= {"ifeval", "ifeval_limit"}):
            continue  # IFEval is the last step, so it can be added to a run that was finished without it
        if changed:
            raise UsageError(
                f"the run {name} in {folder} was begun with other options",
                ", ".join(f"{key} was {begun.options.get(key)!r} and is {wanted[key]!r}" for key in sorted(changed)),
                "give another folder: --data DIR",
            )
    if saved and saved.options == wanted:
        return saved
    (folder / name).mkdir(parents=True, exist_ok=True)
    base = world.get_base_folder(folder)
    settings = make_settings(world, folder / name, base, arm=arm, seed=seed, threads=threads, overrides=options.overrides)
    with ArmRun(world, arm, seed, settings, base, options, budget, report) as run:
        result = run.run()
    _write_atomically(folder / f"{name}.json", asdict(result))
    return result


class ArmRun:
    """One run in `settings.folder`. Bus, stages, sink and trainer run in this process."""

    def __init__(
        self,
        world: World,
        arm: Arm | None,
        seed: int,
        settings: Settings,
        base: Path,
        options: RunOptions,
        budget: Budget,
        report: Callable[[str], None],
    ) -> None:
        self.world, self.arm, self.seed, self.settings, self.base = world, arm, seed, settings, base
        self.options, self.budget, self.report = options, budget, report
        self.folder = settings.folder
        self.name = get_run_name(world, arm, seed)
        judge = arm.make_judge(seed) if arm else make_judge("judge", world.rule, seed)
        self.open_models: dict[str, Any] = {CRITIC_ID: ProgrammaticCritic(world.rule), JUDGE_ID: judge}
        self.bus: Bus = connect_bus(settings)
        self.store: Store = open_store(settings)
        self.trainer = Trainer(self.bus, self.store, settings, base, notify=report)
        self.acts = arm.plan(options.limit or world.num_prompts, options.updates or world.num_updates) if arm else []
        self.progress = read_progress(self.folder.parent, self.name) or RunProgress({})
        self.progress.options = asdict(options)
        self.rows = world.sample_rows(seed, sum(act.num_prompts for act in self.acts)) if self.acts else []
        self.steps = list(self.list_steps())
        self.progress.num_steps = len(self.steps)

    def __enter__(self) -> ArmRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.trainer.close()
        self.bus.close()

    # The steps

    def list_steps(self) -> Iterator[Step]:
        first = 0
        for number, act in enumerate(self.acts, start=1):
            rows = self.rows[first : first + act.num_prompts]
            first += act.num_prompts
            if len(rows) < act.num_prompts:
                raise UsageError(
                    f"{self.name} needs {first:,} prompts",
                    f"there are {len(self.rows):,} training prompts for each seed",
                    "use fewer prompts (--limit) or updates (--updates)",
                )
            yield Step("respond", f"act {number}: {len(rows)} prompts", partial(self.respond, number, act, rows))
            for phase in act.phases:
                yield Step(phase, f"act {number}: {phase}", partial(self.train, phase), phase)
        yield Step("held-out prompts", "held-out prompts", lambda: self.evaluate(_HELD_OUT, self.write_held_out_suite(), None))
        yield Step("perplexity", "perplexity of human text", self.measure_perplexity)
        # IFEval takes as long as the training, so it is measured for one seed of each arm.
        if self.options.ifeval and self.world.model != "small" and self.seed in (BASE_SEED, SEEDS[0]):
            yield Step("ifeval", "IFEval", self.measure_ifeval)

    def run(self) -> RunResult:
        """Run the steps that are not finished, and return the result."""
        for number, step in enumerate(self.steps):
            if number < self.progress.num_done:
                continue
            self.budget.require(step.kind)
            started, cpu_started = time.monotonic(), time.process_time()
            self.current = number
            step.call()
            seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
            self.budget.note(step.kind, seconds)
            for times, value in ((self.progress.seconds, seconds), (self.progress.cpu_seconds, cpu_seconds)):
                times[step.kind] = times.get(step.kind, 0.0) + value
            self.progress.num_done = number + 1
            _write_atomically(self.folder / "progress.json", asdict(self.progress))
            self.report(
                f"{self.name}: {step.title}, {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time ({number + 1} of {len(self.steps)})"
            )
        return self.make_result()

    def respond(self, number: int, act: Act, rows: Sequence[Row]) -> None:
        """Publish the prompts of an act and what people wrote for them. Run its stages until all records are in the database."""
        if act.stages:
            self.publish(f"prompts-{number}", rows, "prompts")
        for kind in act.people:
            assert self.world.write_people_rows is not None, f"the world {self.world.name} has no {kind}"
            written = self.world.write_people_rows(kind, list(rows), self.seed)
            self.publish(f"{kind}-{number}", written, _KIND_OF_PEOPLE_ROWS[kind])
        self.run_stages(act.stages)

    def publish(self, name: str, rows: Sequence[Row], kind: InputKind) -> None:
        """Publish rows. A producer that was killed continues after the last published row."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        FileProducer(self.bus, self.settings.run.id, eval_fraction=0.0, kind=kind, strict=True).publish(str(path))

    def run_stages(self, stages: Sequence[str]) -> None:
        """Run stages and the sink until they have processed every record."""
        run_stages(self.settings, self.bus, self.store, stages, self.open_models)

    def train(self, phase: str) -> None:
        """Make one update of a phase. Finish it first if an earlier start began it. Skip it if it is finished."""
        steps = self.steps[: self.current]
        num_before = sum(step.phase == phase for number, step in enumerate(steps) if str(number) not in self.progress.skipped)
        try:
            self.trainer.resume()
            if sum(manifest.phase == phase for manifest in self.trainer.read_state().manifests) <= num_before:
                self.trainer.update(phase)
        except TrainingFailed as error:  # the log has its batch, which is voided
            self.report(f"{self.name}: {phase} published nothing: {error.what}: {error.why}")
        except UsageError as error:  # there was nothing to train on, so the log has no batch
            self.progress.skipped[str(self.current)] = f"{phase}: {error.what}: {error.why}"
            self.report(f"{self.name}: skipped {phase}: {error.what}: {error.why}")

    # The measurements

    def write_held_out_suite(self) -> str:
        path = self.folder / "held-out.jsonl"
        rows = self.world.read_held_out_rows(self.options.held_out)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{_HELD_OUT}={path}"

    def evaluate(self, name: str, suite: str, limit: int | None) -> None:
        """Put a suite through the stages respond and grade with the last policy, as `charter eval run` does."""
        is_held_out = name == _HELD_OUT
        request = EvaluationRequest(
            (suite,),
            (str(self.trainer.read_state().policy_version),),
            name=name,
            limit=limit,
            samples=self.options.samples if is_held_out else 1,
            temperature=self.settings.respond.temperature if is_held_out else 0.0,
            max_tokens=self.settings.respond.max_tokens if is_held_out else None,
        )
        graders = {"graders": [str(self.world.grader_file)] if is_held_out else []}
        settings = self.settings.model_copy(update={"grade": self.settings.grade.model_copy(update=graders)})
        plan = make_evaluation_plan(settings, self.bus, request)
        with _kept_signal_handlers():
            is_finished = run_evaluation(plan, self.bus)
        if not is_finished:
            raise Stopped

    def get_evaluation_run(self, name: str) -> str:
        return f"{name}-policy-{self.trainer.read_state().policy_version}"

    def measure_perplexity(self) -> None:
        state = self.trainer.read_state()
        folder = self.trainer.updater.get_folders(state).get_policy_folder(state.policy_version)
        rows = _read_rows(self.options.human_text) if self.options.human_text else self.world.read_human_texts()
        texts = [
            ([ChatMessage(role="user", content=row["prompt"])] if "prompt" in row else [], row["completion"]) for row in rows
        ]
        perplexity = compute_perplexity(folder, texts)
        assert perplexity is not None, "the texts have no tokens to predict"
        self.progress.price["perplexity"] = perplexity

    def measure_ifeval(self) -> None:
        self.evaluate("ifeval", f"ifeval={self.options.ifeval}", self.options.ifeval_limit)
        sql = """SELECT avg(details['strict']), count(*) FROM suite_grades
                 WHERE run_id = ? AND grader = 'instructions' AND outcome = 'OK'"""
        ((rate, count),) = self.store.query(sql, [self.get_evaluation_run("ifeval")], limit_s=30.0).rows
        self.progress.price |= {"ifeval": rate, "ifeval_prompts": float(count)}

    def make_result(self) -> RunResult:
        state = self.trainer.read_state()
        rows = self.store.query_dicts(
            """SELECT item, subset, details FROM suite_grades WHERE run_id = ? AND grader = ? AND outcome = 'OK'
               ORDER BY item, completion_index""",
            [self.get_evaluation_run(_HELD_OUT), self.world.grader_name],
            limit_s=30.0,
        )
        responses = self.store.query(
            """SELECT messages[-1].content, response FROM suite_responses WHERE run_id = ? AND completion_index = 0
               ORDER BY item""",
            [self.get_evaluation_run(_HELD_OUT)],
            limit_s=30.0,
        ).rows
        voided = {incident.voided_batch_id: incident for incident in state.incidents if incident.voided_batch_id}
        refused = [
            f"{manifest.phase}: {voided[manifest.record_id].title}: {voided[manifest.record_id].detail}"
            for manifest in state.manifests
            if manifest.record_id in voided
        ]
        updates = [{"phase": update.phase, "version": update.version, **update.metrics} for update in state.updates]
        return RunResult(
            arm=self.arm.name if self.arm else "base",
            world=self.world.name,
            seed=self.seed,
            options=asdict(self.options),
            version=state.policy_version,
            values=_average_by_item(self.world, rows),
            price=self.progress.price,
            seconds=self.progress.seconds,
            cpu_seconds=self.progress.cpu_seconds,
            refused=[*refused, *self.progress.skipped.values()],
            updates=updates,
            responses=dict(responses),
        )


def _average_by_item(world: World, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean of each metric over the completions of each held-out prompt."""
    values: dict[str, dict[str, float]] = {}
    for metric in world.metrics:
        by_item: dict[str, list[float]] = {}
        for row in rows:
            if metric.subset in ("", row["subset"]):
                by_item.setdefault(row["item"], []).append(row["details"][metric.key])
        values[metric.title] = {item: sum(of_item) / len(of_item) for item, of_item in by_item.items()}
    return values


def _read_rows(path: str) -> list[Row]:
    """Return the rows of a JSON lines file with human texts."""
    try:
        rows: list[Row] = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read", str(error), "give a JSON lines file with the column completion") from error
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("completion"), str) for row in rows):
        raise UsageError(
            f"{path} has no texts",
            "each row needs a column completion, and may have a column prompt",
            "give a JSON lines file with the column completion",
        )
    return rows


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM at the end of the block. An evaluation replaces them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None is a handler that was not set from Python
                signal.signal(number, handler)
