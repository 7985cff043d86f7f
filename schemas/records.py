"""The records of Charter. Each record class has one topic and one table.

A record is event-carried state: it contains everything that the next stage needs, so no stage has to join. Every record also
contains its lineage: the stage and model that produced it, its parents, the constitution and the policy version.

`schemas.avro` derives the Avro schema of each class. A test checks that the committed `.avsc` files match the classes. The
order of fields in a schema is: `Record`, then the groups of shared fields, then the fields of the class.

Every enum has the default UNKNOWN, so that an old reader can read a new symbol. UNKNOWN is never used for training.

An unknown number is null, never NaN: aggregates over NaN are NaN.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def utc_now() -> datetime:
    """Return the current time in UTC, with microseconds, as Avro stores it."""
    return datetime.now(UTC)


class Float32:
    """Marks a float field that Avro and DuckDB store in 32 bits (token log-probabilities)."""


class Identifier:
    """Marks an id of `schemas.ids`: a UUID of 16 bytes in DuckDB, its text form elsewhere."""


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
    """An Avro enum. A reader that lacks a symbol reads it as UNKNOWN."""


class Split(AvroEnum):
    UNKNOWN = "UNKNOWN"
    TRAIN = "TRAIN"
    EVAL = "EVAL"


class FinishReason(AvroEnum):
    """Why generation ended. REFUSED: a filter of the server withheld the completion or its end; never used for SFT."""

    UNKNOWN = "UNKNOWN"
    STOP = "STOP"
    LENGTH = "LENGTH"
    REFUSED = "REFUSED"


class Verdict(AvroEnum):
    """The critic's verdict on a response under one principle, from next-token probabilities. LOW_MASS: no clear verdict."""

    UNKNOWN = "UNKNOWN"
    CLEAN = "CLEAN"
    FLAWED = "FLAWED"
    LOW_MASS = "LOW_MASS"
    NOT_ASKED = "NOT_ASKED"


class EndReason(AvroEnum):
    """Why a critique-revision chain ended.

    NONE: it has not ended. SATISFIED: the verdict is clean. UNUSABLE: a revision is unusable. SKIPPED: its source is not
    revised. LOST: the last revision lost against its predecessor, which is the final response.
    """

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    SATISFIED = "SATISFIED"
    LAST_ROUND = "LAST_ROUND"
    UNUSABLE = "UNUSABLE"
    SKIPPED = "SKIPPED"
    LOST = "LOST"


class RejectionReason(AvroEnum):
    """Why a revision is unusable for training. REFUSED: a filter of the server withheld it or its end."""

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    EMPTY = "EMPTY"
    COPY = "COPY"
    ECHO = "ECHO"
    REFUSED = "REFUSED"


class Outcome(AvroEnum):
    """The outcome of a judgment. Only OK is used for training."""

    UNKNOWN = "UNKNOWN"
    OK = "OK"
    REFUSED = "REFUSED"
    UNPARSEABLE = "UNPARSEABLE"
    LOW_MASS = "LOW_MASS"
    POSITION_FLIP = "POSITION_FLIP"
    TIMEOUT = "TIMEOUT"


class LabelSource(AvroEnum):
    """Who gave a label or wrote a response: a model or a person."""

    UNKNOWN = "UNKNOWN"
    AI = "AI"
    HUMAN = "HUMAN"


class PolicyKind(AvroEnum):
    """What an update contains: a policy or a reward model."""

    UNKNOWN = "UNKNOWN"
    POLICY = "POLICY"
    REWARD = "REWARD"


class DeadLetterKind(AvroEnum):
    """Why a record could not be processed. CRASH: it crashed several processes. EXHAUSTED: all its attempts failed."""

    UNKNOWN = "UNKNOWN"
    DECODE = "DECODE"
    PERMANENT = "PERMANENT"
    EXHAUSTED = "EXHAUSTED"
    TOO_LARGE = "TOO_LARGE"
    CRASH = "CRASH"


class AvroModel(BaseModel):
    """The base class of records and their parts: immutable, without unknown fields, and without NaN or infinity."""

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
    """A model: its id, and as revision the content hash of its weights (for a served model, a hash of address and name)."""

    id: str
    revision: str


class Sampling(AvroModel):
    """The sampling parameters of a completion."""

    temperature: float
    top_p: float
    max_tokens: int


class Completion(AvroModel):
    """One sampled completion.

    `logprobs` are the log-probabilities of `token_ids` at the sampling temperature, from the weights that sampled them.
    """

    index: int
    text: str
    token_ids: list[int] = Field(default_factory=list)
    logprobs: list[Annotated[float, Float32()]] = Field(default_factory=list)
    finish_reason: FinishReason = FinishReason.UNKNOWN
    policy_version: int | None = None
    seed: int = 0


class Round(AvroModel):
    """One finished round of critique and revision, as the records of later rounds contain it."""

    round: int
    principle_id: str
    critique: str
    revision: str


class PrincipleVerdict(AvroModel):
    """The critic's verdict on a response under one principle.

    `p_flawed` is the probability of the option FLAWED among the two options, `option_mass` their total probability.
    """

    principle_id: str
    verdict: Verdict = Verdict.UNKNOWN
    p_flawed: OptionalFloat = None
    option_mass: OptionalFloat = None


class PrincipleVote(AvroModel):
    """The vote of one principle on a pair, in both orders: A shown first (forward) and B shown first (backward).

    `p_forward` and `p_backward` are the probability that A is better; null if the judge's answer is unreadable. The option mass
    is then 0, or null if the model's numbers are invalid. The explanations are the text that the judge wrote. Only votes with
    `outcome` OK count, weighted by `weight`.
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


class Record(AvroModel):
    """The fields of every record: its id and its lineage.

    `record_id` is deterministic (see `schemas.ids`): repeated work has the same id. `model` produced this record.
    `policy_version` is the version of the policy that sampled the response in it.
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
        """The key in the log: the prompt id, so that the records of a prompt stay in order."""
        return (self.prompt_id or self.record_id).encode()


# Groups of fields that several records share. A record class lists a group before `Record`.


class PromptFields(AvroModel):
    """The prompt: its dialogue, and what sampling and the split into training and evaluation need."""

    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0


class ResponseIdField(AvroModel):
    """The `record_id` of the Response that a record is about."""

    response_id: Id


class OptionalResponseIdField(AvroModel):
    """The `record_id` of the Response that a record is about; null for data from a file."""

    response_id: Id | None = None


class PhaseField(AvroModel):
    """A training phase: sft, reward, ppo or dpo."""

    phase: str


class BatchFields(PhaseField):
    """A batch of a training phase."""

    batch_number: int


class Prompt(PromptFields, Record):
    """A prompt that enters the pipeline. `origin` is the file and row that it comes from."""

    topic: ClassVar[str] = "prompts"

    origin: str = ""


class Response(PromptFields, Record):
    """All completions of one prompt."""

    topic: ClassVar[str] = "responses"

    prompt_token_ids: list[int] = Field(default_factory=list)
    completions: list[Completion]


class Chain(PromptFields, ResponseIdField, Record):
    """The state of a critique-revision chain, which critiques and revisions share. It starts with completion 0 of a response.

    `response` is the response that was critiqued, or the revision; `finish_reason` is why its generation ended. If `end_reason`
    is not NONE, the chain has ended and `final_response` is its result.
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
    """A verdict on `response` and, unless the chain ends, the written critique.

    `verdicts` has one verdict for each principle that was checked. `p_flawed` is the maximum of their probabilities and
    `option_mass` the minimum of their option masses. `p_better` is the probability that a revision is better than its
    predecessor, averaged over both orders; null for an initial response.
    """

    topic: ClassVar[str] = "critiques"

    critique: str = ""
    verdict: Verdict = Verdict.UNKNOWN
    p_flawed: OptionalFloat = None
    option_mass: OptionalFloat = None
    p_better: OptionalFloat = None
    similarity: OptionalFloat = None
    verdicts: list[PrincipleVerdict] = Field(default_factory=list)


class Revision(Chain):
    """The response, rewritten according to a critique. `similarity` to the previous response is between 0 and 1."""

    topic: ClassVar[str] = "revisions"

    critique: str
    similarity: float = 0.0
    rejection_reason: RejectionReason = RejectionReason.NONE


class Preference(PromptFields, OptionalResponseIdField, Record):
    """A preference pair with its judgment. The soft label `p_a` is the probability that A is better.

    `p_a` is null unless `outcome` is OK or POSITION_FLIP. `label_order` is "both" (the average of both orders), "forward" (A
    shown first) or "backward". `cached_tokens` is the number of `prompt_tokens` that were not computed again, because they are
    shared with another judge prompt.

    A person's override of a label is a separate record with `label_source` HUMAN; its `parent_ids` contain the overridden
    label. A person's comparison from a file has no parents; `origin` is the file and row that it comes from.
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
    label_source: LabelSource = LabelSource.AI
    preset: str = ""
    label_order: str = ""
    cached_tokens: int = 0
    origin: str = ""


class Demonstration(PromptFields, Record):
    """A response that a person wrote or selected, for supervised fine-tuning. `origin` is the file and row it comes from."""

    topic: ClassVar[str] = "demonstrations"

    completion: str
    finish_reason: FinishReason = FinishReason.STOP
    label_source: LabelSource = LabelSource.HUMAN
    origin: str = ""


class BatchManifest(BatchFields, Record):
    """The exact rows of one training batch. It is written before training starts.

    `record_ids` are in the order of training. `sl_record_ids` are the finished chains for the supervised part of a combined
    objective. `replayed_record_ids` are the `record_ids` that an earlier batch of this phase has trained on. `mixture` is the
    number of rows of each source, `target_mixture` the configured shares. `cursors` is, for each source, the commit up to which
    this phase has used its rows; empty: `commit_seq_to` for all sources.
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


class PolicyUpdate(Record):
    """A new version of the policy (kind POLICY) or of the reward model (kind REWARD), which every worker can load.

    With `restored_version` it is a new version with the weights of an earlier one. `batch_id` is then the batch that produced
    those weights; the nil UUID for the base model. If two updates have the same version, the first one in the log counts.
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
        # The record id, so that compaction keeps two updates with the same version: the first one counts.
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
    """An event that stopped or paused training. `voided_batch_id` is a voided batch: later batches may use its rows."""

    topic: ClassVar[str] = "incidents"

    title: str
    detail: str
    metrics: Metrics = Field(default_factory=dict)
    voided_batch_id: Id | None = None


class Pause(PhaseField, Record):
    """A training phase is paused or resumed. The newest record of a phase counts."""

    topic: ClassVar[str] = "pauses"

    paused: bool
    reason: str = ""

    @property
    def key(self) -> bytes:
        return self.record_id.encode()


class DroppedRollout(Record):
    """A rollout that was excluded from training, and the reason."""

    topic: ClassVar[str] = "dropped-rollouts"

    dropped_id: Id
    reason: str


class ProducerOffset(Record):
    """The position of a producer in one input file: the next line to read."""

    topic: ClassVar[str] = "producer-offsets"

    name: str
    content_hash: str
    next_line: int
    published: int

    @property
    def key(self) -> bytes:
        return self.record_id.encode()


class DeadLetterRetry(Record):
    """A dead letter was published again, for the stage that failed to process it. `parent_ids` contain the dead letter."""

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
    """A record that could not be processed: its bytes and headers unchanged, its coordinates, and the error."""

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
    Demonstration,
    BatchManifest,
    PolicyUpdate,
    RunManifest,
    Score,
    Metric,
    Incident,
    Pause,
    DroppedRollout,
    ProducerOffset,
    DeadLetterRetry,
    Erasure,
    DeadLetter,
)
