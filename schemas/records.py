"""The records of Charter. Each record class has one topic and one table.

A record contains everything that the next stage needs, so that a stage never has to join records. Every record also contains
its lineage: the stage and the model that produced it, its parents, the constitution and the policy version.

`schemas.avro` derives the Avro schema of each class. A test checks that the committed `.avsc` files match the classes. The
order of fields in a schema is: `Record`, then the groups of shared fields, then the fields of the class.

Every enum has the default UNKNOWN. A reader with an older schema reads a new symbol as UNKNOWN. UNKNOWN is never used for
training.

An unknown number is null, never NaN, because the sum and the mean of a column that contains NaN are NaN.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def utc_now() -> datetime:
    """Return the current time in UTC with a precision of microseconds, which is the precision in Avro."""
    return datetime.now(UTC)


class Float32:
    """A marker for a float field that Avro and DuckDB store in 32 bits, such as token log-probabilities."""


class Identifier:
    """A marker for an id field (see `schemas.ids`). DuckDB stores the id as a UUID of 16 bytes; everywhere else it is text."""


def _non_finite_to_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_non_finite(metrics: object) -> object:
    if not isinstance(metrics, dict):
        return metrics
    return {name: value for name, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)}


OptionalFloat = Annotated[float | None, BeforeValidator(_non_finite_to_none)]  # NaN and infinity become null
Metrics = Annotated[dict[str, float], BeforeValidator(_drop_non_finite)]  # metrics without a finite value are omitted
Id = Annotated[str, Identifier(), Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]


class AvroEnum(StrEnum):
    """An Avro enum. If a reader's schema does not have a symbol, the reader reads the symbol as UNKNOWN."""


class Split(AvroEnum):
    """The use of a prompt. EVAL is held out from training. SUITE is a prompt of an evaluation suite (`charter eval run`).

    Prompts with the split SUITE have separate ids: they are never trained, and they hold no other prompt out.
    """

    UNKNOWN = "UNKNOWN"
    TRAIN = "TRAIN"
    EVAL = "EVAL"
    SUITE = "SUITE"


class Purpose(AvroEnum):
    """The training phase that a prompt is for. A hash of its dialogue decides (`prompts.rl_fraction`).

    REWARD means that its labels train the reward model. RL means that its completions train the policy, so that the judge does not
    have to label them. ANY means both. A prompt that trained the reward model cannot train the policy afterwards.
    """

    UNKNOWN = "UNKNOWN"
    ANY = "ANY"
    REWARD = "REWARD"
    RL = "RL"


class FinishReason(AvroEnum):
    """The reason why generation ended.

    REFUSED means that a filter of the server withheld the completion or its end. Such a completion is never used for SFT.
    """

    UNKNOWN = "UNKNOWN"
    STOP = "STOP"
    LENGTH = "LENGTH"
    REFUSED = "REFUSED"


class Verdict(AvroEnum):
    """The critic's verdict on a response under one principle, from next-token probabilities.

    LOW_MASS means that the probabilities give no clear verdict. NOT_ASKED means that the critic was not asked.
    """

    UNKNOWN = "UNKNOWN"
    CLEAN = "CLEAN"
    FLAWED = "FLAWED"
    LOW_MASS = "LOW_MASS"
    NOT_ASKED = "NOT_ASKED"


class EndReason(AvroEnum):
    """The reason why a critique-revision chain ended.

    NONE means that the chain has not ended. SATISFIED means that the critic finds no problem. LAST_ROUND means that no rounds
    remain. UNUSABLE means that a response is unusable. SKIPPED means that responses to prompts of this source are not revised.
    LOST means that the last revision is worse than the previous response, so the previous response is the final response.
    NO_CRITIQUE means that the critic wrote no usable critique, so the response could not be revised. It is not trained.
    """

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    SATISFIED = "SATISFIED"
    LAST_ROUND = "LAST_ROUND"
    UNUSABLE = "UNUSABLE"
    SKIPPED = "SKIPPED"
    LOST = "LOST"
    NO_CRITIQUE = "NO_CRITIQUE"


class RejectionReason(AvroEnum):
    """The reason why a response or a critique is unusable.

    REFUSED means that a filter of the server withheld the response or its end. REASONING means that the response contains what
    looks like the reasoning of a model. COPY means that a revision repeats the response that it should improve, and ECHO that it
    repeats a few-shot example. LEAK means that it repeats another part of its prompt: the instruction, the critique or a heading.
    """

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    EMPTY = "EMPTY"
    COPY = "COPY"
    ECHO = "ECHO"
    REFUSED = "REFUSED"
    REASONING = "REASONING"
    LEAK = "LEAK"


class Outcome(AvroEnum):
    """The outcome of a judgment. Only OK is used for training.

    EMPTY, WITHHELD, REASONING and IDENTICAL mean that the pair cannot be compared, so the judge was not asked (see
    engine/eligibility.py). EMPTY means that a response has no visible text. WITHHELD means that a filter of the server withheld a
    response. REASONING means that a response contains what looks like reasoning. TRUNCATED means that the judge reached its token
    limit while it was thinking. NOT_APPLICABLE means that a person decided that the pair must not have a label. NOT_NEEDED means that
    the judge was not asked, because the prompt has the purpose RL.
    """

    UNKNOWN = "UNKNOWN"
    OK = "OK"
    REFUSED = "REFUSED"
    UNPARSEABLE = "UNPARSEABLE"
    LOW_MASS = "LOW_MASS"
    POSITION_FLIP = "POSITION_FLIP"
    TIMEOUT = "TIMEOUT"
    EMPTY = "EMPTY"
    WITHHELD = "WITHHELD"
    IDENTICAL = "IDENTICAL"
    NOT_APPLICABLE = "NOT_APPLICABLE"
    REASONING = "REASONING"
    TRUNCATED = "TRUNCATED"
    NOT_NEEDED = "NOT_NEEDED"


class LabelSource(AvroEnum):
    """The source of a label or a response: a model (AI), a person (HUMAN), or the prompts of both responses (CONTRAST).

    CONTRAST means that response A was sampled with the constitution in its prompt and response B without it, so A is chosen.
    """

    UNKNOWN = "UNKNOWN"
    AI = "AI"
    HUMAN = "HUMAN"
    CONTRAST = "CONTRAST"


class PolicyKind(AvroEnum):
    """The model that an update contains: a policy or a reward model."""

    UNKNOWN = "UNKNOWN"
    POLICY = "POLICY"
    REWARD = "REWARD"


class DeadLetterKind(AvroEnum):
    """The reason why a record could not be processed.

    CRASH means that the record crashed several processes. EXHAUSTED means that all attempts to process the record failed.
    """

    UNKNOWN = "UNKNOWN"
    DECODE = "DECODE"
    PERMANENT = "PERMANENT"
    EXHAUSTED = "EXHAUSTED"
    TOO_LARGE = "TOO_LARGE"
    CRASH = "CRASH"


class AvroModel(BaseModel):
    """The base class of records and their parts. Instances are immutable and reject unknown fields, NaN and infinity."""

    model_config = ConfigDict(ser_json_bytes="base64", frozen=True, extra="forbid", allow_inf_nan=False)


class ChatMessage(AvroModel):
    """One message of a dialogue."""

    role: str
    content: str


class ConstitutionRef(AvroModel):
    """The constitution under which a record was produced."""

    name: str
    version: str
    hash: str


class ModelRef(AvroModel):
    """The id and the revision of a model.

    The revision is the content hash of the model's weights. For a served model, it is a hash of the address and the name.
    """

    id: str
    revision: str


class Sampling(AvroModel):
    """The sampling parameters of a completion.

    `max_tokens` limits the response, and `max_thinking_tokens` limits the reasoning before it. 0 means that thinking is off.
    """

    temperature: float
    top_p: float
    max_tokens: int
    max_thinking_tokens: int = 0

    def to_fingerprint(self) -> dict[str, float]:
        """Return the parameters for a fingerprint. A parameter that is off is left out, so that ids do not change."""
        return self.model_dump(exclude_defaults=True)


class Completion(AvroModel):
    """One sampled completion.

    `logprobs` are the log-probabilities of `token_ids` at the sampling temperature, from the weights that sampled them.
    `reasoning` is what the model wrote before its response `text`. A completion with reasoning has no tokens, because RL trains on
    all tokens of a completion, and reasoning is never trained.
    """

    index: int
    text: str
    token_ids: list[int] = Field(default_factory=list)
    logprobs: list[Annotated[float, Float32()]] = Field(default_factory=list)
    finish_reason: FinishReason = FinishReason.UNKNOWN
    policy_version: int | None = None
    seed: int = 0
    reasoning: str = ""


class ContrastCompletion(AvroModel):
    """One completion that the policy sampled with principles of the constitution in its prompt (`judge.pairing = "contrast"`).

    It is no rollout, because it belongs to another prompt than the other completions. So it has no tokens. `principle_ids` are the
    principles in its prompt, and `role` is the message that contains them: user or system.
    """

    text: str
    finish_reason: FinishReason = FinishReason.UNKNOWN
    seed: int = 0
    reasoning: str = ""
    principle_ids: list[str] = Field(default_factory=list)
    role: str = ""


class Round(AvroModel):
    """One finished round of critique and revision. The records of later rounds contain it."""

    round: int
    principle_id: str
    critique: str
    revision: str


class PrincipleVerdict(AvroModel):
    """The critic's verdict on a response under one principle.

    The question is asked in two orders. Forward means that option A is FLAWED, backward that option A is CLEAN. In each order,
    the option mass is the total probability of the two options, and `p_flawed` is the probability of FLAWED divided by this
    total. `p_flawed` is the mean of both orders, and `option_mass` is the smaller one.
    """

    principle_id: str
    verdict: Verdict = Verdict.UNKNOWN
    p_flawed: OptionalFloat = None
    option_mass: OptionalFloat = None
    p_flawed_forward: OptionalFloat = None
    p_flawed_backward: OptionalFloat = None
    option_mass_forward: OptionalFloat = None
    option_mass_backward: OptionalFloat = None


class PrincipleVote(AvroModel):
    """The vote of one principle on a pair. Forward means that A is shown first, backward that B is shown first.

    `p_forward` and `p_backward` are the probability that A is better, or null if the judge's reply cannot be read. In this case
    the option mass is 0, or null if the model returned invalid numbers. `explanation` and `explanation_backward` are what the
    judge wrote in the two orders, and `reasoning` and `reasoning_backward` are what it thought before that. Only votes with the
    outcome OK count, and `weight` is the weight of the vote.
    """

    principle_id: str
    p_forward: OptionalFloat
    p_backward: OptionalFloat
    option_mass_forward: OptionalFloat
    option_mass_backward: OptionalFloat
    weight: float = 1.0
    outcome: Outcome = Outcome.UNKNOWN
    explanation: str = ""
    explanation_backward: str = ""
    reasoning: str = ""
    reasoning_backward: str = ""


class Record(AvroModel):
    """The fields of every record: its id and its lineage.

    `record_id` is deterministic, so repeated work has the same id (see `schemas.ids`). `model` is the model that produced the
    record. `policy_version` is the version of the policy that sampled the record's response.
    """

    topic: ClassVar[str]

    record_id: Id
    parent_ids: list[Id] = Field(default_factory=list)
    prompt_id: Id | None = None
    run_id: str
    stage: str
    constitution: ConstitutionRef | None = None
    principle_id: str | None = None
    model: ModelRef | None = None
    policy_version: int | None = None
    template_hash: str | None = None
    sampling: Sampling | None = None
    seed: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_ms: float = 0.0
    created_at: datetime = Field(default_factory=utc_now)

    @property
    def key(self) -> bytes:
        """The key of the record in the log. The key is the prompt id, so that the log keeps the order of a prompt's records."""
        return (self.prompt_id or self.record_id).encode()


# The next classes are groups of fields that several records share. In the bases of a record class, they come before `Record`.


class PromptFields(AvroModel):
    """The fields of a prompt: its dialogue, source, tags, split (training or evaluation), epoch and purpose."""

    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0
    purpose: Purpose = Purpose.ANY


class SuiteItem(AvroModel):
    """The place of a prompt in an evaluation suite.

    `item` is the key of the row in the file of the suite. `subset` is a part of the suite whose rate is reported apart.
    `transform` is the name of the jailbreak transformation of the prompt, or empty. `instructions` is a JSON list of verifiable
    instructions, each {"id": ..., "kwargs": {...}}, or empty (see consumers/graders/instructions.py).
    """

    suite: str
    item: str
    subset: str = ""
    transform: str = ""
    instructions: str = ""


class RecipeItem(AvroModel):
    """The place of a generated prompt in a recipe (producers/generate.py).

    `recipe`, `version` and `hash` identify the recipe. `index` is the number of the batch that the generator published in one
    transaction, and `request` is the request of the batch. `kind`, `topic` and `language` are what the request asked for.
    """

    recipe: str
    version: str
    hash: str
    index: int
    request: int
    kind: str
    topic: str
    language: str


class SuiteItemField(AvroModel):
    """The place of a prompt in an evaluation suite; null for all other prompts."""

    suite_item: SuiteItem | None = None


class ConfigurationField(AvroModel):
    """The number of the run's configuration under which a stage made the record (see `charter.configurations`)."""

    configuration: int | None = None


class ResponseIdField(AvroModel):
    """The `record_id` of the Response that a record is about."""

    response_id: Id


class OptionalResponseIdField(AvroModel):
    """The `record_id` of the Response that a record is about; null for data from a file."""

    response_id: Id | None = None


class PhaseField(AvroModel):
    """The name of a training phase: sft, reward, ppo, dpo, grpo, rloo or distill."""

    phase: str


class BatchFields(PhaseField):
    """The phase and the number of a training batch."""

    batch_number: int


class Prompt(PromptFields, SuiteItemField, Record):
    """A prompt that enters the pipeline.

    `origin` is the file and the row of the prompt, or the recipe and the index. `recipe_item` is the place of a generated prompt in
    its recipe; null for all other prompts. The model, the seed and the sampling of a generated prompt are those of its request.
    """

    topic: ClassVar[str] = "prompts"

    origin: str = ""
    recipe_item: RecipeItem | None = None


class Response(PromptFields, SuiteItemField, ConfigurationField, Record):
    """All completions of one prompt.

    `contrast_completion` is one more completion, which was sampled with principles of `constitution` in its prompt. Only the judge
    stage and the stage grade use it.
    """

    topic: ClassVar[str] = "responses"

    prompt_token_ids: list[int] = Field(default_factory=list)
    completions: list[Completion]
    contrast_completion: ContrastCompletion | None = None


class Chain(PromptFields, ResponseIdField, ConfigurationField, Record):
    """The state of a critique-revision chain. A chain starts with completion 0 of a response.

    Critique and Revision have these fields. `response` is the newest response of the chain, and `finish_reason` is the reason
    why its generation ended. If `end_reason` is not NONE, the chain has ended, and `final_response` is its result.
    """

    initial_response: str
    initial_finish_reason: FinishReason
    response_model: ModelRef | None = None
    rounds: list[Round] = Field(default_factory=list)
    round: int
    response: str
    finish_reason: FinishReason
    previous_response: str | None = None
    previous_finish_reason: FinishReason = FinishReason.UNKNOWN
    final: bool = False
    end_reason: EndReason = EndReason.NONE
    final_response: str | None = None
    final_finish_reason: FinishReason = FinishReason.UNKNOWN
    preset: str = ""
    cached_tokens: int = 0


class Critique(Chain):
    """The verdict on `response`. If the chain continues, the record also contains the written critique.

    `verdicts` has one verdict for each checked principle. `p_flawed` is the maximum of the verdicts' `p_flawed`, and
    `option_mass` is the minimum of their `option_mass`. `p_better` is the probability that a revision is better than the
    previous response, averaged over both orders. For an initial response, `p_better` is null.

    `principle_id` is the principle of the written critique. If the chain ends without a written critique, it is the principle
    under which `response` was checked (an initial response) or revised (a revision). If `end_reason` is UNUSABLE,
    `rejection_reason` is the reason why `response` is unusable. If `end_reason` is NO_CRITIQUE, it is the reason why `critique` is
    unusable.

    `reasoning` is what the critic thought before it wrote the critique. `leaks` names the parts of the prompt that the critic
    repeated (consumers/leaks.py); marks such as `> ` are removed from the critique.
    """

    topic: ClassVar[str] = "critiques"

    critique: str = ""
    verdict: Verdict = Verdict.UNKNOWN
    p_flawed: OptionalFloat = None
    option_mass: OptionalFloat = None
    p_better: OptionalFloat = None
    similarity: OptionalFloat = None
    verdicts: list[PrincipleVerdict] = Field(default_factory=list)
    rejection_reason: RejectionReason = RejectionReason.NONE
    reasoning: str = ""
    leaks: list[str] = Field(default_factory=list)


class Revision(Chain):
    """A response that was rewritten according to a critique.

    `similarity` is the similarity to the previous response, from 0 to 1. `reasoning` is what the model thought before it wrote the
    revision. `leaks` names the parts of the prompt that the model repeated (consumers/leaks.py); marks such as `> ` are removed.
    """

    topic: ClassVar[str] = "revisions"

    critique: str
    similarity: float = 0.0
    rejection_reason: RejectionReason = RejectionReason.NONE
    reasoning: str = ""
    leaks: list[str] = Field(default_factory=list)


class Preference(PromptFields, OptionalResponseIdField, ConfigurationField, Record):
    """A preference pair with its judgment. The soft label `p_a` is the probability that A is better.

    If `outcome` is neither OK nor POSITION_FLIP, `p_a` is null. `label_order` is "both" (the mean of both orders), "forward" (A
    is shown first) or "backward" (B is shown first). `cached_tokens` is the number of `prompt_tokens` that were not computed
    again, because another judge prompt has the same prefix. If the pair cannot be compared, `outcome_reason` has the reason.

    If `label_source` is CONTRAST, `p_a` is 1: response A was sampled with the constitution in its prompt. If the judge was asked about
    this pair, `votes`, `p_forward` and `p_backward` have its answers, which do not change the label.

    When a person overrides a label, the new label is a separate record with `label_source` HUMAN. Its `parent_ids` contain the
    id of the overridden record, and `labeler` is the name of the person. A human comparison from a file has no parents, and
    `origin` is its file and row.
    """

    topic: ClassVar[str] = "preferences"

    pairing: str
    response_a: str
    response_b: str
    completion_index_a: int | None = None
    completion_index_b: int | None = None
    finish_reason_a: FinishReason = FinishReason.UNKNOWN
    finish_reason_b: FinishReason = FinishReason.UNKNOWN
    p_a: OptionalFloat = None
    p_forward: OptionalFloat = None
    p_backward: OptionalFloat = None
    position_gap: OptionalFloat = None
    option_mass: OptionalFloat = None
    position_flip: bool = False
    votes: list[PrincipleVote] = Field(default_factory=list)
    explanation: str = ""
    outcome: Outcome = Outcome.UNKNOWN
    outcome_reason: str = ""
    label_source: LabelSource = LabelSource.AI
    preset: str = ""
    label_order: str = ""
    cached_tokens: int = 0
    origin: str = ""
    labeler: str = ""


class Grade(ResponseIdField, Record):
    """One grade of one response by one grader.

    `subject` is "completion" (the completion with `completion_index` of the response), "final_response" (the result of a
    critique-revision chain) or "contrast_completion" (the completion with the constitution in its prompt). For the last two,
    `completion_index` is null. A grade of a contrast completion has no `policy_version`, because it is no response of the policy to
    the prompt alone. The grader documents the meaning of `label` and `score`. If
    `outcome` is not OK, the response could not be graded: `score` is null and `outcome_reason` has the reason. `details` are
    the numbers behind the score.
    """

    topic: ClassVar[str] = "grades"

    source: str
    split: Split = Split.TRAIN
    epoch: int = 0
    subject: str
    completion_index: int | None
    grader: str
    grader_version: str
    label: str
    score: OptionalFloat = None
    outcome: Outcome
    outcome_reason: str = ""
    details: Metrics = Field(default_factory=dict)


class Demonstration(PromptFields, Record):
    """A response that a person wrote or selected, for supervised fine-tuning. `origin` is its file and row."""

    topic: ClassVar[str] = "demonstrations"

    completion: str
    finish_reason: FinishReason = FinishReason.STOP
    label_source: LabelSource = LabelSource.HUMAN
    origin: str = ""


class BatchManifest(BatchFields, Record):
    """The exact rows of one training batch. The manifest is written before the training on the batch starts.

    `record_ids` are in the order of training. `sl_record_ids` are the finished chains for the supervised part of a combined
    objective. `replayed_record_ids` are the records that an earlier batch of this phase already used. `mixture` is the number
    of rows of each source, and `target_mixture` is the configured share of each source. `cursors` is the last commit sequence
    number of each source that this phase has used. If `cursors` is empty, this number is `commit_seq_to` for all sources.
    `sink_session` is the session of the sink in which these numbers were read. They are valid only in a database that has this
    session. In another database, the rows are found by their ids. `reward_record_ids` are the grades and labels that the rewards
    of groups are computed from.
    """

    topic: ClassVar[str] = "batches"

    record_ids: list[Id]
    sl_record_ids: list[Id] = Field(default_factory=list)
    content_hash: str
    commit_seq_from: int
    commit_seq_to: int
    base_policy_version: int
    base_reward_version: int | None = None
    reference_policy_version: int | None = None
    mixture: dict[str, int] = Field(default_factory=dict)
    settings: str = "{}"
    target_mixture: dict[str, float] = Field(default_factory=dict)
    cursors: dict[str, int] = Field(default_factory=dict)
    replayed_record_ids: list[Id] = Field(default_factory=list)
    sink_session: str | None = None
    reward_record_ids: list[Id] = Field(default_factory=list)


class PolicyUpdate(Record):
    """A new version of the policy (kind POLICY) or of the reward model (kind REWARD). Every worker can load it.

    If `restored_version` is set, the new version has the weights of that earlier version. `batch_id` is then the batch that
    produced these weights, or the nil UUID for the weights of the base model. If two updates have the same version, the first
    update in the log counts.
    """

    topic: ClassVar[str] = "policies"

    kind: PolicyKind
    version: int
    phase: str
    uri: str
    content_hash: str
    base_version: int
    batch_id: Id
    metrics: Metrics = Field(default_factory=dict)
    restored_version: int | None = None

    @property
    def key(self) -> bytes:
        # The key is the record id, so that compaction keeps both of two updates with the same version. The first one counts.
        return self.record_id.encode()


class RunManifest(Record):
    """The settings of a run and the full text of its constitution."""

    topic: ClassVar[str] = "runs"

    name: str
    settings: str
    constitution_text: str
    charter_version: str

    @property
    def key(self) -> bytes:
        return self.run_id.encode()


class TopicStart(BaseModel):
    """The state of a topic when a run begins: its id, and one offset for each partition."""

    name: str
    topic_id: str
    offsets: list[int]


class RunStart(Record):
    """The state of the topics when a run begins. No record of the run is at a lower offset. The first record of a run counts.

    The number of offsets is also the number of partitions that the keys of the run are distributed over.
    """

    topic: ClassVar[str] = "run-starts"

    topics: list[TopicStart]

    @property
    def key(self) -> bytes:
        return self.run_id.encode()


class Score(ResponseIdField, Record):
    """The score of one completion by a reward model. `normalized_score` is (score - mean) / standard deviation."""

    topic: ClassVar[str] = "scores"

    completion_index: int
    reward_version: int
    score: float
    normalized_score: float


class Metric(BatchFields, Record):
    """The metrics of one training step."""

    topic: ClassVar[str] = "metrics"

    step: int
    metrics: Metrics


class Incident(PhaseField, Record):
    """An event that stopped or paused training. Later batches may use the rows of the voided batch `voided_batch_id`."""

    topic: ClassVar[str] = "incidents"

    title: str
    detail: str
    metrics: Metrics = Field(default_factory=dict)
    voided_batch_id: Id | None = None


class Pause(PhaseField, Record):
    """The pause or the resumption of a training phase. The newest record of a phase counts."""

    topic: ClassVar[str] = "pauses"

    paused: bool
    reason: str = ""

    @property
    def key(self) -> bytes:
        return self.record_id.encode()


class Allowance(PhaseField, Record):
    """The number of completions that a training loop wants now. It limits the responders (engine/pacing.py).

    The newest record counts, while the loop that wrote it runs. `num_completions` is the number of completions that may follow the
    position `offsets`, which has one offset for each partition of the topic `responses`. If it is null, there is no limit.
    Completions of a policy before `min_policy_version` are not counted. `phase` is the RL method, and `reason` is the reason for
    this limit.
    """

    topic: ClassVar[str] = "allowances"

    num_completions: int | None = None
    offsets: list[int] = Field(default_factory=list)
    min_policy_version: int = 0
    reason: str = ""


class DroppedRollout(Record):
    """A rollout or a DPO pair that was excluded from training, and the reason. `dropped_id` is the response or the preference."""

    topic: ClassVar[str] = "dropped-rollouts"

    dropped_id: Id
    reason: str


class ProducerOffset(Record):
    """The position of a producer in one input: the next line of a file to read, or the next index of a recipe to generate.

    For a recipe, `content_hash` and `recipe_hash` are its hash, `published` counts its prompts in the run, and `rejected` counts the texts of the model
    that were not published, by reason. `prompt_tokens` and `completion_tokens` are the sums over all its indexes.
    """

    topic: ClassVar[str] = "producer-offsets"

    name: str
    content_hash: str
    next_line: int
    published: int
    rejected: dict[str, int] = Field(default_factory=dict)
    recipe_hash: str = ""

    @property
    def key(self) -> bytes:
        return self.record_id.encode()


class DeadLetterRetry(Record):
    """A dead letter that was published again, for the stage that failed to process it. `parent_ids` contains its id."""

    topic: ClassVar[str] = "dead-letter-retries"

    dead_letter_id: Id
    source_topic: str


class Erasure(Record):
    """A request to delete all rows of the prompt `prompt_id` from every database, and never to insert them again."""

    topic: ClassVar[str] = "erasures"

    reason: str = ""


class Header(AvroModel):
    """A header of a record in the log."""

    key: str
    value: bytes


class DeadLetter(Record):
    """A record that could not be processed: its unchanged bytes and headers, its topic, partition and offset, and the error."""

    topic: ClassVar[str] = "dead-letters"

    kind: DeadLetterKind
    source_topic: str
    source_partition: int
    source_offset: int
    source_key: bytes | None = None
    value: bytes | None
    headers: list[Header] = Field(default_factory=list)
    error_class: str
    error_message: str
    attempts: int = 1


RECORDS: tuple[type[Record], ...] = (
    Prompt,
    Response,
    Critique,
    Revision,
    Preference,
    Grade,
    Demonstration,
    BatchManifest,
    PolicyUpdate,
    RunManifest,
    RunStart,
    Score,
    Metric,
    Incident,
    Pause,
    Allowance,
    DroppedRollout,
    ProducerOffset,
    DeadLetterRetry,
    Erasure,
    DeadLetter,
)
