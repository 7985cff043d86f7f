"""The records that flow through Charter: one class, one topic and one table each.

A record is event-carried state: it holds what the next stage needs, so that no stage has to join. Every record carries its
lineage (who made it, from what, under which constitution and policy) in its own body. `schemas.avro` derives the Avro schema
of each class; the committed `.avsc` files are that derivation, and a test holds the two together.

Every enum has UNKNOWN as its default, so that an old reader survives a new symbol; UNKNOWN never trains.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field


def utc_now() -> datetime:
    """The current time in UTC, as Avro keeps it: to the microsecond."""
    return datetime.now(UTC)


class Float32:
    """Marks a float field that Avro and DuckDB keep in 32 bits (token log-probabilities)."""


class Identifier:
    """Marks an id of `schemas.ids`: 16 bytes in DuckDB, a UUID's text everywhere else."""


Id = Annotated[str, Identifier(), Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]


class AvroEnum(StrEnum):
    """An Avro enum: symbols are names, an unknown symbol reads as UNKNOWN."""


class Split(AvroEnum):
    UNKNOWN = "UNKNOWN"
    TRAIN = "TRAIN"
    EVAL = "EVAL"


class FinishReason(AvroEnum):
    """How a text ended. REFUSED: a server's filter kept it, or the rest of it, back; it never trains SFT."""

    UNKNOWN = "UNKNOWN"
    STOP = "STOP"
    LENGTH = "LENGTH"
    REFUSED = "REFUSED"


class Verdict(AvroEnum):
    """What the critic's next-token probabilities say of a text under one principle."""

    UNKNOWN = "UNKNOWN"
    CLEAN = "CLEAN"
    FLAWED = "FLAWED"
    LOW_MASS = "LOW_MASS"
    NOT_ASKED = "NOT_ASKED"


class EndReason(AvroEnum):
    """Why a critique-revision chain is over. NONE: it goes on. SKIPPED: its source is never revised.

    LOST: the newest revision lost against its predecessor, which is then the final text.
    """

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    SATISFIED = "SATISFIED"
    LAST_ROUND = "LAST_ROUND"
    UNUSABLE = "UNUSABLE"
    SKIPPED = "SKIPPED"
    LOST = "LOST"


class RejectionReason(AvroEnum):
    """Why a revision is not trained on. REFUSED: a server's filter kept it, or the rest of it, back."""

    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    EMPTY = "EMPTY"
    COPY = "COPY"
    ECHO = "ECHO"
    REFUSED = "REFUSED"


class Outcome(AvroEnum):
    """How a judgement ended. Only OK trains."""

    UNKNOWN = "UNKNOWN"
    OK = "OK"
    REFUSED = "REFUSED"
    UNPARSEABLE = "UNPARSEABLE"
    LOW_MASS = "LOW_MASS"
    POSITION_FLIP = "POSITION_FLIP"
    TIMEOUT = "TIMEOUT"


class LabelSource(AvroEnum):
    UNKNOWN = "UNKNOWN"
    AI = "AI"
    HUMAN = "HUMAN"


class PolicyKind(AvroEnum):
    UNKNOWN = "UNKNOWN"
    POLICY = "POLICY"
    REWARD = "REWARD"


class DeadLetterKind(AvroEnum):
    UNKNOWN = "UNKNOWN"
    DECODE = "DECODE"
    PERMANENT = "PERMANENT"
    EXHAUSTED = "EXHAUSTED"
    TOO_LARGE = "TOO_LARGE"
    CRASH = "CRASH"


class AvroModel(BaseModel):
    """The base of everything inside a record: immutable, and strict about its keys."""

    model_config = ConfigDict(ser_json_bytes="base64", frozen=True, extra="forbid")


class ChatMessage(AvroModel):
    """One message of a dialogue."""

    role: str
    content: str


class ConstitutionRef(AvroModel):
    name: str
    version: str
    hash: str


class ModelRef(AvroModel):
    """Which weights answered: the model's id and the content hash (or the server's word) for its revision."""

    id: str
    revision: str


class Sampling(AvroModel):
    temperature: float
    top_p: float
    max_tokens: int


class Completion(AvroModel):
    """One sampled answer. `logprobs` are of `token_ids`, under the sampling temperature, by the weights that sampled them."""

    index: int
    text: str
    token_ids: list[int] = Field(default_factory=list)
    logprobs: list[Annotated[float, Float32()]] = Field(default_factory=list)
    finish_reason: FinishReason = FinishReason.UNKNOWN
    policy_version: int | None = None
    seed: int = 0


class Round(AvroModel):
    """One finished round of critique and revision, as the later rounds of a chain carry it."""

    round: int
    principle_id: str
    critique: str
    revision: str


class PrincipleVerdict(AvroModel):
    """What the critic says of a text under one principle: p(flawed), and the mass that the two options caught."""

    principle_id: str
    verdict: Verdict = Verdict.UNKNOWN
    p_flawed: float | None = None
    option_mass: float | None = None


class PrincipleVote(AvroModel):
    """What one principle says of a pair: the probability that A is better, in both orders, and the mass the options caught.

    Only votes with `outcome` OK count, each by its `weight`. Where nothing could be read the probability is NaN and the mass
    0. The explanations are what the judge wrote with A shown first (forward) and with B shown first (backward).
    """

    principle_id: str
    p_forward: float
    p_backward: float
    option_mass_forward: float
    option_mass_backward: float
    weight: float = 1.0
    outcome: Outcome = Outcome.UNKNOWN
    explanation: str = ""
    explanation_backward: str = ""


class Record(AvroModel):
    """What every record carries: its id and its lineage.

    `record_id` is deterministic (see `schemas.ids`): work done twice has the same id. `model` is who made this record;
    `policy_version` is the version of the policy whose answer it is, or is about.
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
        """The message key: the prompt's id, so that one prompt's records stay in order."""
        return (self.prompt_id or self.record_id).encode()


class Prompt(Record):
    topic: ClassVar[str] = "prompts"

    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0
    origin: str = ""


class Response(Record):
    """All k completions of one prompt."""

    topic: ClassVar[str] = "responses"

    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0
    prompt_token_ids: list[int] = Field(default_factory=list)
    completions: list[Completion]


class Chain(Record):
    """What critique and revision share: the state of one chain, which starts from candidate 0 of a response.

    `response` is the text this record is about: the one criticised, or the revision. When `end_reason` is not NONE the chain is over
    and `final_response` is its result. `finish_reason` says how it ended.
    """

    response_id: Id
    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0
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
    """A verdict on `text` under a principle and, while the chain goes on, the critique in words.

    `verdicts` has every principle that was asked; `p_flawed` is the worst of them, the probability of the flawed option among
    the two, and `mass` the least that both caught. `p_better` compares a revision with its predecessor (both orders averaged),
    absent for a first answer.
    """

    topic: ClassVar[str] = "critiques"

    critique: str = ""
    verdict: Verdict = Verdict.UNKNOWN
    p_flawed: float | None = None
    option_mass: float | None = None
    p_better: float | None = None
    similarity: float | None = None
    verdicts: list[PrincipleVerdict] = Field(default_factory=list)


class Revision(Chain):
    """The text rewritten after a critique."""

    topic: ClassVar[str] = "revisions"

    critique: str
    similarity: float = 0.0
    rejection_reason: RejectionReason = RejectionReason.NONE


class Preference(Record):
    """A judgement of two answers: `p_a` is the soft label, the probability that A is better.

    `p_a` is null unless `outcome` is OK or POSITION_FLIP: no label is ever invented. `label_order` is "both" (averaged), or the one
    that the label was read from, "forward" (A shown first) or "backward". `cached_tokens` are those of `prompt_tokens` that
    were not computed again because another question began with them.
    A person's override of a label is a record of its own with `label_source` HUMAN, and `parent_ids` names the label that it
    stands for; a person's comparison that came from a file (`origin`) has no parents.
    """

    topic: ClassVar[str] = "preferences"

    response_id: Id | None = None
    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0
    pairing: str
    response_a: str
    response_b: str
    completion_index_a: int | None = None
    completion_index_b: int | None = None
    finish_reason_a: FinishReason = FinishReason.UNKNOWN
    finish_reason_b: FinishReason = FinishReason.UNKNOWN
    p_a: float | None = None
    p_forward: float | None = None
    p_backward: float | None = None
    position_gap: float | None = None
    option_mass: float | None = None
    position_flip: bool = False
    votes: list[PrincipleVote] = Field(default_factory=list)
    explanation: str = ""
    outcome: Outcome = Outcome.UNKNOWN
    label_source: LabelSource = LabelSource.AI
    preset: str = ""
    label_order: str = ""
    cached_tokens: int = 0
    origin: str = ""


class Demonstration(Record):
    """An answer that a person gave or chose: the part of the SFT mix that no model of ours made.

    `origin` is where it came from: a file's name and a row's number.
    """

    topic: ClassVar[str] = "demonstrations"

    messages: list[ChatMessage]
    source: str
    tags: list[str] = Field(default_factory=list)
    split: Split = Split.TRAIN
    epoch: int = 0
    completion: str
    finish_reason: FinishReason = FinishReason.STOP
    label_source: LabelSource = LabelSource.HUMAN
    origin: str = ""


class BatchManifest(Record):
    """Exactly what one training phase will train on, written before it steps.

    `record_ids` stand in the order of training. `sl_record_ids` are the finished chains of the supervised half of a combined
    objective. `replayed_record_ids` are those of `record_ids` that an earlier batch of this phase has trained on. `mixture` counts
    the rows of each source, `target_mixture` holds the shares that were asked for. `cursors` says for each source up to which commit
    this phase has drawn (none: `commit_seq_to`, for all of them).
    """

    topic: ClassVar[str] = "batches"

    phase: str
    batch_number: int
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
    """A new policy or reward model that every worker can load. Only kind POLICY raises the policy version.

    With `restored_version` it is a new version with the weights of an earlier one; `batch_id` is then the batch that made those weights
    (the nil UUID: the first model, which no batch made). Of two updates with one version the first on the log counts.
    """

    topic: ClassVar[str] = "policies"

    kind: PolicyKind
    version: int
    phase: str
    uri: str
    content_hash: str
    base_version: int
    batch_id: Id
    metrics: dict[str, float] = Field(default_factory=dict)
    restored_version: int | None = None

    @property
    def key(self) -> bytes:
        # Its own id, so that compaction keeps both of two updates with one version: the first one counts.
        return self.record_id.encode()


class RunManifest(Record):
    """What a run is made of: its settings and the full text of its constitution, which workers load by hash."""

    topic: ClassVar[str] = "runs"

    name: str
    settings: str
    constitution_text: str
    charter_version: str

    @property
    def key(self) -> bytes:
        return self.run_id.encode()


class Score(Record):
    """A reward model's score of one candidate."""

    topic: ClassVar[str] = "scores"

    response_id: Id
    completion_index: int
    reward_version: int
    score: float
    normalized_score: float


class Metric(Record):
    """One named number at one step of a phase."""

    topic: ClassVar[str] = "metrics"

    phase: str
    batch_number: int
    step: int
    metrics: dict[str, float]


class Incident(Record):
    """What stopped or paused training, in words and numbers. `voided_batch_id` is a batch that is given up: its rows are free."""

    topic: ClassVar[str] = "incidents"

    phase: str
    title: str
    detail: str
    metrics: dict[str, float] = Field(default_factory=dict)
    voided_batch_id: Id | None = None


class Pause(Record):
    """A training phase is paused, or goes on again. The newest record of a phase counts."""

    topic: ClassVar[str] = "pauses"

    phase: str
    paused: bool
    reason: str = ""

    @property
    def key(self) -> bytes:
        return self.record_id.encode()


class DroppedRollout(Record):
    """A record that was left out of a batch, and why."""

    topic: ClassVar[str] = "dropped-rollouts"

    dropped_id: Id
    reason: str


class ProducerOffset(Record):
    """Where a producer stands in one input: the next line to read."""

    topic: ClassVar[str] = "producer-offsets"

    name: str
    content_hash: str
    next_line: int
    published: int

    @property
    def key(self) -> bytes:
        return self.record_id.encode()


class DeadLetterRetry(Record):
    """A dead letter was published again, for the stage that gave up on it. `parent_ids` names the dead letter."""

    topic: ClassVar[str] = "dead-letter-retries"

    dead_letter_id: Id
    source_topic: str


class Erasure(Record):
    """Everything that was made of the prompt `prompt_id` is to be deleted from every database, and never written again."""

    topic: ClassVar[str] = "erasures"

    reason: str = ""


class Header(AvroModel):
    key: str
    value: bytes


class DeadLetter(Record):
    """A message that could not be processed: its bytes and headers untouched, where it was, and why."""

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
