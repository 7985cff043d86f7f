"""Sample new prompts from a model and publish them, as a producer that never ends.

The unit of work is an index. For index n, `batch_size` requests are drawn from the recipe (producers/recipe.py) with seeds that
depend only on the run, the recipe, the seed of the generator and n. Each line of a response is a text, and the texts that pass the
gates (producers/gates.py) are prompts:

1. Wait while the run has enough prompts, or while a training loop wants no further completions (engine/pacing.py).
2. Sample the responses of index n from the model. If the model is unreachable, wait and sample again.
3. Read the prompts that others have published since, check the texts, and count the rejected texts by reason.
4. Publish the prompts and the position n + 1, with the counts so far, in one transaction.

If the process is killed before step 4 ends, the next process samples index n again. The model may then write other texts, but only
one version of an index is ever published. If the outcome of step 4 is unknown, the position on the log decides.

One generator of a run works at a time: a second one fences the first one. Otherwise two generators could publish near-duplicates
of each other. Each prompt has the model, the seed and the sampling of its request, and its place in the recipe (`recipe_item`).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.backoff import compute_backoff
from engine.budget import Budget
from engine.bus.port import Bus, ProducerRecord, Writer
from engine.bus.read import read_values
from engine.erasures import ErasedPrompts
from engine.errors import CharterError, CommitUncertain, DependencyUnreachable, TooFewPrompts, WriterFenced
from engine.metrics import MetricSample
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Model, Result, Usage, require_results, sum_usage
from engine.notices import NOTICES
from engine.pacing import PacedAdmission
from engine.progress import track_work
from engine.run_starts import StartPositions, ensure_run_start
from engine.text import format_count
from engine.topic_guard import TopicGuard
from engine.watchdog import CallTracker
from engine.worker import PauseReport, to_producer_record
from producers.files import assign_split, make_prompt_record, make_row_metadata
from producers.gates import PromptGates, Rejected, Rejection
from producers.near_duplicates import KnownPrompt, NearDuplicateIndex, PromptHistory
from producers.recipe import LANGUAGE_NAMES, Recipe, RequestPlan, plan_request
from schemas import ids
from schemas.codec import decode_record
from schemas.records import ChatMessage, ModelRef, ProducerOffset, Prompt, RecipeItem, Sampling, Split

logger = logging.getLogger("charter.generate")

_WAIT_INTERVAL_S = 1.0
_TEMPLATE = (
    "{instruction} They are about: {topic}.\nWrite a numbered list of {count} of them, as different as possible. Each one is a"
    " single line in {language}, as a person would type it to an assistant."
)
_EXAMPLES_TEMPLATE = "\n\nFor example:\n{examples}"
_LIST_MARK = re.compile(r"\s*(?:(?:\(?\d{1,3}\s?[.):]|[-*•–])(?:\s+|$)|\d{1,3}[.)](?=[^\W\d]|[\"“„«']))")
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "'": "'"}


@dataclass(frozen=True)
class GeneratorOptions:
    """The options of a generator. A limit of 0 means no limit.

    `limit` is the number of prompts that the run gets from this recipe and seed, including those of earlier processes.
    """

    seed: int = 0
    batch_size: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, top_p=0.95, max_tokens=128))
    max_waiting: int = 256
    max_fruitless: int = 20
    duplicate_threshold: float = 0.6
    max_chars: int = 32_000
    eval_fraction: float = 0.05
    rl_fraction: float = 0.0
    limit: int = 0


@dataclass(frozen=True)
class SampledIndex:
    """The checked texts of one index. `usage` is what all its requests cost."""

    index: int
    prompts: tuple[Prompt, ...]
    rejected: tuple[Rejected, ...]
    usage: Usage

    def count_rejected(self) -> Counter[str]:
        return Counter(item.reason.value for item in self.rejected)


# Requests and responses


def render_instruction(recipe: Recipe, plan: RequestPlan) -> str:
    return _TEMPLATE.format(
        instruction=plan.kind.instruction,
        topic=plan.topic,
        count=len(plan.examples) + recipe.prompts_per_request,
        language=LANGUAGE_NAMES[plan.language],
    )


def render_request(recipe: Recipe, plan: RequestPlan, *, has_prefill: bool, group: str = "") -> GenerationRequest:
    """Return the request for a plan. A model with prefill continues the list of examples; otherwise the user shows the examples."""
    instruction, numbered = render_instruction(recipe, plan), "\n".join(f"{n}. {e}" for n, e in enumerate(plan.examples, 1))
    if has_prefill:
        message = ChatMessage(role="user", content=instruction)
        return GenerationRequest((message,), prefill=f"{numbered}\n{len(plan.examples) + 1}.", seed=plan.seed, group=group)
    content = instruction + _EXAMPLES_TEMPLATE.format(examples=numbered)
    return GenerationRequest((ChatMessage(role="user", content=content),), seed=plan.seed, group=group)


def compute_template_hash(*, has_prefill: bool) -> str:
    return ids.compute_fingerprint("template", template=_TEMPLATE + _EXAMPLES_TEMPLATE, prefill=has_prefill)


def read_texts(generation: Generation, *, has_prefill: bool) -> tuple[list[str], list[Rejected]]:
    """Return the items of the list in a response, and the lines that are no items.

    If any line has a number or a bullet, lines without one are remarks about the list. With a prefill, the number of the first line
    is in the prefill. The last line is unfinished if the response was cut.
    """
    if generation.finish_reason == "refused":
        return [], [Rejected(generation.text, Rejection.WITHHELD)]
    lines = [line for line in generation.text.splitlines() if line.strip()]
    if not lines:
        return [], [Rejected("", Rejection.EMPTY)]
    rejected: list[Rejected] = []
    if generation.finish_reason not in ("stop", "unknown") and not generation.text.endswith("\n"):
        rejected.append(Rejected(_strip_marks(lines.pop()), Rejection.UNFINISHED))
    has_marks = any(_LIST_MARK.match(line) for line in lines)
    texts: list[str] = []
    for number, line in enumerate(lines):
        is_item = not has_marks or _LIST_MARK.match(line) or (has_prefill and number == 0)
        text = _strip_marks(line)
        if not is_item or not text:
            rejected.append(Rejected(text, Rejection.OUTSIDE_LIST))
        else:
            texts.append(text)
    return texts, rejected


def _strip_marks(line: str) -> str:
    """Return a line without its number or bullet, emphasis, and quotation marks around the whole line."""
    line = _LIST_MARK.sub("", line.strip(), count=1).strip().strip("*").strip()
    if len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and line[0] not in line[1:-1]:
        line = line[1:-1].strip()
    return line


# The generator


class PromptGenerator:
    """Generates prompts for one run until `stop`, or until the run has `options.limit` of them.

    `pacing` holds the generator while a training loop wants no completions, and `budget` holds it at a limit of the run.
    `evaluation_texts` are prompts for evaluation that may not be on the log, each with its origin. Only the thread of `run` uses
    the log; other threads may read the counts.
    """

    def __init__(
        self,
        bus: Bus,
        recipe: Recipe,
        model: Model,
        run_id: str,
        options: GeneratorOptions,
        *,
        pacing: PacedAdmission | None = None,
        budget: Budget | None = None,
        evaluation_texts: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.bus, self.recipe, self.model, self.run_id, self.options = bus, recipe, model, run_id, options
        self.pacing, self.budget, self.evaluation_texts = pacing, budget, evaluation_texts
        self.writer: Writer | None = None
        self.examples = NearDuplicateIndex(options.duplicate_threshold)
        for text in recipe.list_examples():
            self.examples.add(text, KnownPrompt("", recipe.name, Split.TRAIN, is_of_run=False))
        # The counts of this process.
        self.num_published = self.num_indexes = self.num_fruitless = self.num_pauses = self.num_waits = 0
        self.rejected: Counter[str] = Counter()
        self.wait_reason, self.waiting_since, self.total_waited_s = "", 0.0, 0.0
        self.is_done = threading.Event()
        self.pause_report, self.call_tracker = PauseReport("generate"), CallTracker("generate")

    def run(self, stop: threading.Event) -> None:
        """Generate until `stop` is set or the limit is reached. Raise TooFewPrompts if the model writes nothing new any more."""
        num_failures = 0
        try:
            while not stop.is_set():
                try:
                    if self.step():
                        break
                    num_failures = 0
                    self.pause_report.end()
                    if self.wait_reason:
                        stop.wait(_WAIT_INTERVAL_S)
                except CommitUncertain as error:
                    logger.warning("generate opens a new transaction, and its position on the log decides: %s", error.what)
                    self.close()
                except DependencyUnreachable as error:
                    pause_s = compute_backoff(num_failures)
                    num_failures += 1
                    self.num_pauses += 1
                    self.pause_report.add("; ".join(str(error).splitlines()), pause_s)
                    stop.wait(pause_s)
                except WriterFenced as error:
                    raise WriterFenced(
                        f"another generator of run {self.run_id} has started",
                        "a run has one generator at a time; everything that this one has published is kept",
                        "let the other one continue, or use another run: --run NAME",
                    ) from error
        finally:
            self.end_wait()
            self.is_done.set()
            self.close()

    def step(self) -> bool:
        """Generate one index, or find out why to wait. Return whether the limit is reached."""
        if self.writer is None:
            self.open()
        assert self.writer is not None
        self.topic_guard.verify_at_interval()
        if self.options.limit and self.position.published >= self.options.limit:
            return True
        if reason := self.find_wait_reason():
            self.begin_wait(reason)
            return False
        self.end_wait()
        sampled = self.sample(self.position.next_line)
        self.topic_guard.verify()  # the history and the position do not belong to a topic that was created again
        self.commit(self.writer, sampled)
        return False

    def open(self) -> None:
        """Open the writer, which fences an earlier generator. Then read the position and all prompts on the log."""
        self.run_start: StartPositions = ensure_run_start(self.bus, self.run_id)
        with self.call_tracker.track("opening the writer"):
            writer = self.bus.open_writer(f"generate.{self.run_id}", topics=[Prompt.topic, ProducerOffset.topic])
        try:
            self.read_log()
        except BaseException:
            writer.close()
            raise
        self.writer = writer

    def read_log(self) -> None:
        """Read the position and all prompts on the log. This publishes nothing, and `sample` can then be called."""
        self.topic_guard = TopicGuard(self.bus, self.bus.topic_ids([Prompt.topic, ProducerOffset.topic]))
        self.position = self.load_position()
        self.erased = ErasedPrompts(self.bus)
        self.history = PromptHistory(self.bus, self.run_id, self.options.duplicate_threshold)
        with track_work("read the prompts on the log", "prompts") as progress:
            self.history.refresh(progress)
        for origin, text in self.evaluation_texts:
            self.history.add_evaluation_text(text, origin)
        self.gates = PromptGates(self.history, self.examples, min(self.recipe.max_chars, self.options.max_chars))

    def load_position(self) -> ProducerOffset:
        """Return the newest position of this recipe and seed in the run, or its first one."""
        configuration = ids.compute_fingerprint("generation", recipe=self.recipe.hash, run=self.run_id, seed=self.options.seed)
        first = ProducerOffset(
            record_id=ids.compute_record_id("generate", [], configuration),
            run_id=self.run_id,
            stage="generate",
            name=self.recipe.name,
            content_hash=self.recipe.hash,
            recipe_hash=self.recipe.hash,
            next_line=0,
            published=0,
        )
        positions = [decode_record(value, ProducerOffset) for value in read_values(self.bus, ProducerOffset.topic)]
        positions = [position for position in positions if position.record_id == first.record_id]
        return max([first, *positions], key=lambda position: position.next_line)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
            self.writer = None

    # Waiting

    def find_wait_reason(self) -> str:
        """Return why no prompt may be generated now, or an empty string."""
        if self.options.max_waiting:
            self.history.refresh()
            num_waiting = self.history.count_waiting(self.bus.committed(f"{self.run_id}.respond", [Prompt.topic]))
            if num_waiting >= self.options.max_waiting:
                return f"enough prompts of run {self.run_id} wait for the stage respond (generate.max_waiting = {self.options.max_waiting})"
        if self.budget and not self.budget.can_admit("generate"):
            return f"run {self.run_id} has reached budget.max_tokens or budget.max_cost"
        if self.pacing and (reason := self.pacing.find_hold()):
            return f"the training loop wants no further completions: {reason}"
        return ""

    def begin_wait(self, reason: str) -> None:
        if not self.waiting_since:
            self.waiting_since = time.monotonic()
            self.num_waits += 1
        if reason != self.wait_reason:
            # A busy stream has one wait for each batch of responses, so only the first one is always shown.
            logger.log(logging.WARNING if self.num_waits == 1 else logging.INFO, "generate waits: %s", reason)
        self.wait_reason = reason

    def end_wait(self) -> None:
        if self.waiting_since:
            waited_s = time.monotonic() - self.waiting_since
            self.total_waited_s += waited_s
            logger.log(logging.WARNING if self.num_waits == 1 else logging.INFO, "generate continues after %.0f s", waited_s)
        self.wait_reason, self.waiting_since = "", 0.0

    def get_waited_s(self) -> float:
        """Return the total time in seconds in which the generator waited for responders or for the training loop."""
        return self.total_waited_s + (time.monotonic() - self.waiting_since if self.waiting_since else 0.0)

    # One index

    def plan(self, index: int) -> list[RequestPlan]:
        """Return the requests of an index. A further process plans the same ones."""
        seed_id = f"{self.position.record_id}/{index}"
        return [plan_request(self.recipe, ids.compute_seed(seed_id, n)) for n in range(self.options.batch_size)]

    def sample(self, index: int) -> SampledIndex:
        """Sample the responses of an index and check their texts. Raise DependencyUnreachable if the model is unreachable."""
        plans, has_prefill = self.plan(index), self.model.capabilities.prefill
        sampling, group = self.options.sampling, f"{self.position.record_id}/{index}"
        results = self.model.generate(
            [render_request(self.recipe, plan, has_prefill=has_prefill, group=group) for plan in plans],
            num_completions=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            max_thinking_tokens=sampling.max_thinking_tokens,
        )
        _raise_if_unreachable(results)
        self.history.refresh()
        self.erased.refresh()
        prompts: list[Prompt] = []
        rejected: list[Rejected] = []
        usage = NO_USAGE
        for number, (plan, result) in enumerate(zip(plans, results, strict=True)):
            if isinstance(result, CharterError):
                rejected.append(Rejected("", Rejection.FAILED_REQUEST, result.what))
                continue
            usage += sum_usage(result)
            texts, unread = read_texts(result[0], has_prefill=has_prefill)
            rejected += unread
            for text in texts:
                checked = self.check(text, plan, index, number, len(prompts))
                if isinstance(checked, Rejected):
                    rejected.append(checked)
                    continue
                prompts.append(checked)
        return SampledIndex(index, tuple(prompts), tuple(rejected), usage)

    def check(self, text: str, plan: RequestPlan, index: int, request: int, num_accepted: int) -> Prompt | Rejected:
        """Return the prompt of a text and add it to the index of near-duplicates, or return why the text is rejected."""
        options = self.options
        if options.limit and self.position.published + num_accepted >= options.limit:
            return Rejected(text, Rejection.OVER_LIMIT)
        parsed = self.gates.check(text, plan, render_instruction(self.recipe, plan), self.erased.prompt_ids)
        if isinstance(parsed, Rejected):
            return parsed
        if conflict := self.gates.check_conflict(text, parsed, assign_split(parsed.messages, options.eval_fraction)):
            return conflict
        metadata = make_row_metadata(
            parsed,
            self.run_id,
            eval_fraction=options.eval_fraction,
            rl_fraction=options.rl_fraction,
            origin=f"{self.recipe.name}:{index}",
        )
        item = RecipeItem(
            recipe=self.recipe.name,
            version=self.recipe.version,
            hash=self.recipe.hash,
            index=index,
            request=request,
            kind=plan.kind.id,
            topic=plan.topic,
            language=plan.language,
        )
        prompt = make_prompt_record(metadata).model_copy(
            update={
                "recipe_item": item,
                "model": ModelRef(id=self.model.id, revision=self.model.revision),
                "sampling": options.sampling,
                "seed": plan.seed,
                "template_hash": compute_template_hash(has_prefill=self.model.capabilities.prefill),
            }
        )
        self.history.add_prompt(prompt)
        return prompt

    def commit(self, writer: Writer, sampled: SampledIndex) -> None:
        """Publish the prompts of an index and the next position in one transaction. Then count them.

        Raise TooFewPrompts after `max_fruitless` consecutive indexes without a prompt. Their positions are published.
        """
        position = self.position.model_copy(
            update={
                "next_line": sampled.index + 1,
                "published": self.position.published + len(sampled.prompts),
                "rejected": dict(Counter(self.position.rejected) + sampled.count_rejected()),
                "model": ModelRef(id=self.model.id, revision=self.model.revision),
                "seed": self.options.seed,
                "prompt_tokens": self.position.prompt_tokens + sampled.usage.prompt_tokens,
                "completion_tokens": self.position.completion_tokens + sampled.usage.completion_tokens,
            }
        )
        records: list[ProducerRecord] = [
            self.run_start.assign_partition(to_producer_record(record)) for record in (*sampled.prompts, position)
        ]
        try:
            with self.call_tracker.track("commit"):
                writer.commit(records)
        except BaseException:
            self.close()  # the index of near-duplicates has prompts that may not be on the log
            raise
        self.position = position
        self.num_indexes += 1
        self.num_published += len(sampled.prompts)
        self.rejected += sampled.count_rejected()
        for item in sampled.rejected:
            if item.reason is not Rejection.OVER_LIMIT:
                _report_rejected(item)
        self.num_fruitless = 0 if sampled.prompts else self.num_fruitless + 1
        if self.num_fruitless >= self.options.max_fruitless:
            raise _make_fruitless_error(self.num_fruitless, self.rejected, self.position.next_line)


def _raise_if_unreachable(results: Sequence[Result[list[Generation]]]) -> None:
    """Raise the first error that says that the model is unreachable. Errors of single requests only reject these requests."""
    require_results([result for result in results if isinstance(result, DependencyUnreachable)])


def _report_rejected(item: Rejected) -> None:
    detail = f" ({item.detail})" if item.detail else ""
    shown = f": {item.text[:100]!r}" if item.text else ""
    NOTICES.report(
        "rejected_text", item.reason.value, f"a sampled text is not published, reason {item.reason.value}{detail}{shown}"
    )


def _make_fruitless_error(num_fruitless: int, rejected: Counter[str], next_index: int) -> TooFewPrompts:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common())
    return TooFewPrompts(
        f"the last {format_count(num_fruitless, 'indexes')} before index {next_index} gave no new prompt (generate.max_fruitless)",
        f"all their texts were rejected; this process has rejected: {reasons}",
        "use a recipe with more topics and examples, another models.generator, or a higher generate.temperature, then type the same"
        " command to continue",
    )


# Reports


def compute_yield(num_published: int, rejected: Counter[str]) -> float | None:
    """Return the share of sampled texts that were published, or None if there are no texts. Texts over the limit do not count."""
    num_texts = num_published + rejected.total() - rejected[Rejection.OVER_LIMIT.value]
    return num_published / num_texts if num_texts else None


def format_yield(num_published: int, rejected: Counter[str], verb: str = "published") -> str:
    """Return a line such as "12 prompts published, yield 24 % of 50 texts; rejected: duplicate 30, not_a_request 8"."""
    share = compute_yield(num_published, rejected)
    if share is None:
        return f"{format_count(num_published, 'prompts')} {verb}"
    num_texts = num_published + rejected.total() - rejected[Rejection.OVER_LIMIT.value]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.most_common())
    line = f"{format_count(num_published, 'prompts')} {verb}, yield {share:.0%} of {format_count(num_texts, 'texts')}"
    return line + (f"; rejected: {reasons}" if reasons else "")


def collect_generation_metrics(generator: PromptGenerator) -> Iterator[MetricSample]:
    """Yield the metrics of a generator in this process."""
    labels = (("run", generator.run_id), ("recipe", generator.recipe.name))
    yield MetricSample(
        "charter_generated_prompts_total", "Generated prompts that were published.", generator.num_published, labels
    )
    for reason in Rejection:
        yield MetricSample(
            "charter_rejected_texts_total",
            "Texts of the generator that were not published, by reason.",
            generator.rejected[reason.value],
            (*labels, ("reason", reason.value)),
        )
    yield MetricSample("charter_generated_indexes_total", "Indexes that were committed.", generator.num_indexes, labels)
    yield MetricSample(
        "charter_fruitless_indexes", "Consecutive indexes without an accepted prompt.", generator.num_fruitless, labels
    )
    yield MetricSample(
        "charter_generator_pauses_total", "Pauses because the model or the log was unavailable.", generator.num_pauses, labels
    )
    yield MetricSample(
        "charter_generator_waits_total", "Waits for the responders or a training loop.", generator.num_waits, labels
    )
    yield MetricSample(
        "charter_generator_waited_seconds_total",
        "Seconds in which the generator waited for the responders or a training loop.",
        generator.get_waited_s(),
        labels,
    )
