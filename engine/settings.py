"""The settings: one tree, one file `charter.toml`, one precedence.

A flag beats `CHARTER_<SECTION>__<KEY>` in the environment, that beats the file, that beats a command's own values (the demo's),
those beat a recipe that is chosen by name (`critique.preset`, `judge.preset`: RECIPES below), and that beats the default below.
So a recipe fixes what nobody has set: `critique.preset = "course"` with `critique.rounds = 2` is the course's recipe in two
rounds. `load` resolves all this and remembers where each value came from; an unknown name is an error that names the nearest
one. Functions elsewhere take plain arguments, not this tree.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.errors import UsageError

SETTINGS_FILE = "charter.toml"
_ADDRESS_PATTERN = re.compile(r"[a-z+]+:/|[\w.-]+:\d+(,|$)", re.IGNORECASE)
_ENVIRONMENT_PREFIX = "CHARTER_"


class _Section(BaseModel):
    """A table of the file: strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_mixture(entries: list[str]) -> dict[str, float]:
    """Source -> share, from entries like `helpful=0.27`; raises ValueError when they are not shares."""
    shares: dict[str, float] = {}
    for entry in entries:
        source, _, share = entry.rpartition("=")
        if not source or float(share) <= 0:
            raise ValueError(f"{entry!r} is not SOURCE=SHARE with a share above 0")
        shares[source] = float(share)
    if shares and "*" not in shares:
        raise ValueError("a mix needs an entry for all other sources, e.g. *=0.5")
    return shares


class DataSettings(_Section):
    folder: str = Field(".charter", description="Where the database, the embedded log and the checkpoints live.")


class BusSettings(_Section):
    address: str = Field("", description="kafka://HOST:PORT or a folder; empty: an embedded log in the data folder.")
    prefix: str = Field("", description="Put before topics, groups and transactional ids on a shared cluster.")
    partitions: int = Field(12, ge=1, description="Partitions of a new topic; they bound the useful copies of a stage.")
    replication: int = Field(-1, ge=-1, description="Replicas of a new topic on Kafka; -1: the broker's default.")
    retention_ms: int = Field(-1, ge=-1, description="How long topics are kept, -1 for ever; prompts always are.")
    static_members: bool = Field(False, description="Keep a stopped copy's partitions for it until its session ends.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How to talk to Kafka."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How to log in, with a SASL protocol."
    )
    sasl_username: str = Field("", description="The user to log in as.")
    sasl_password_env: str = Field("CHARTER_KAFKA_PASSWORD", description="The environment variable with the password.")
    sasl_password_file: str = Field("", description="A file with the password; used instead of the variable.")
    ssl_cafile: str = Field("", description="The certificates to trust (PEM); empty: the system's.")
    ssl_certfile: str = Field("", description="This client's certificate (PEM), for a broker that asks for one.")
    ssl_keyfile: str = Field("", description="The key of this client's certificate (PEM).")
    ssl_check_hostname: bool = Field(True, description="Whether the broker's certificate must name the host.")
    framing: Literal["single-object", "confluent"] = Field(
        "single-object", description="How Avro records are framed; confluent needs a schema registry."
    )
    schema_registry: str = Field("", description="URL of a Confluent-compatible schema registry.")
    schema_registry_auth_env: str = Field(
        "CHARTER_REGISTRY_AUTH", description="The environment variable with the registry's USER:PASSWORD."
    )

    @field_validator("address")
    @classmethod
    def _require_kafka_or_folder(cls, address: str) -> str:
        """HOST:PORT, or another protocol, would else be taken for a folder, and its log for the broker's."""
        if _ADDRESS_PATTERN.match(address) and not address.startswith("kafka://"):
            raise ValueError("a broker's address is written kafka://HOST:PORT; anything else is a folder")
        return address


class RunSettings(_Section):
    id: str = Field("live", min_length=1, description="The run that records belong to; stages skip other runs' records.")
    constitution: str = Field("default", description="A shipped constitution's name or the path of a TOML file.")


class ModelsSettings(_Section):
    policy: str = Field("smollm2", description="smollm2, a folder, a hub id, or http://HOST:PORT/v1#MODEL.")
    critic: str = Field("", description="Who criticises and revises; empty: the policy's first version, pinned.")
    judge: str = Field("", description="Who judges pairs; empty: the policy's first version, pinned.")
    follow: list[Literal["critic", "judge"]] = Field(
        [], description="Which of these are the newest policy, as responders are, instead of a pinned one."
    )
    weight_sync: str = Field(
        "", description="How new policies reach a server: vllm (adapters), or a command (FOLDER NAME follow); empty: never."
    )
    threads: int = Field(2, ge=1, description="Processor threads of a local model.")
    max_batch_size: int = Field(32, ge=1, description="Most sequences in one local batch.")
    timeout_s: float = Field(120.0, gt=0, description="Longest wait for one request to an endpoint, in seconds.")
    concurrency: int = Field(16, ge=1, description="Requests under way at an endpoint at once.")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="The environment variable with endpoints' key, or HOST=VARIABLE for each, by commas."
    )


class PromptsSettings(_Section):
    max_chars: int = Field(32_000, ge=1, description="Longest prompt that `produce` accepts, in characters.")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="Share of prompts held out from training, by hash.")


class RespondSettings(_Section):
    num_completions: int = Field(2, ge=1, description="Answers sampled for each prompt.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; PPO needs it above 0.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; PPO trains only on 1.0.")
    max_tokens: int = Field(256, ge=1, description="Longest answer in tokens.")


class CritiqueSettings(_Section):
    preset: Literal["charter", "bai2022", "course"] = Field(
        "charter", description="The recipe of the keys below that are not set: charter, bai2022 or course."
    )
    selection: Literal["constitution", "sample", "rotate"] = Field(
        "constitution", description="A round's principle: as the constitution says, drawn, or in turn."
    )
    rounds: int = Field(4, ge=1, description="Most revisions of one answer.")
    early_stop: Literal["verdict", "phrases", "none"] = Field(
        "verdict", description="End a chain at a clean verdict (probabilities), at a critique that finds nothing, or never."
    )
    few_shot: bool = Field(True, description="Put the constitution's worked examples before critique and revision.")
    max_tokens: int = Field(128, ge=1, description="Longest critique in tokens.")
    temperature: float = Field(1.0, ge=0, description="Temperature of critiques and revisions.")
    min_option_mass: float = Field(0.5, ge=0, le=1, description="Least probability that a verdict's options must catch.")
    accept_threshold: float = Field(
        0.6, ge=0.5, le=1, description="A revision that wins with this probability may end the chain."
    )
    reject_threshold: float = Field(0.4, ge=0, le=0.5, description="A revision that wins with at most this is discarded.")
    similarity_threshold: float = Field(0.97, ge=0, le=1, description="Texts more similar than this count as the same.")
    skip_sources: list[str] = Field(["helpful"], description="Prompts of these sources are answered but not revised.")


class ReviseSettings(_Section):
    max_tokens: int = Field(256, ge=1, description="Longest revision in tokens.")


class JudgeSettings(_Section):
    pairing: Literal["completions", "revision"] = Field(
        "completions", description="Compare sampled answers, or the final revision with the first answer."
    )
    preset: Literal["lee2023", "bai2022", "bai2022-cot", "ensemble-k", "course"] = Field(
        "lee2023", description="The recipe of the keys below: lee2023, bai2022, bai2022-cot, ensemble-k or course."
    )
    answer_mode: Literal["logprobs", "reasoning", "letter"] = Field(
        "logprobs", description="Probabilities of the letters, the same after written reasoning, or a written letter."
    )
    principles: Literal["constitution", "sample", "all"] = Field(
        "constitution", description="Judge by principles drawn for each pair, by all in one question, or as the file says."
    )
    num_principles: int = Field(1, ge=1, description="How many drawn principles judge each pair.")
    label_order: Literal["both", "seeded"] = Field(
        "both", description="The label: both orders averaged, or one that the seed picks (both are stored)."
    )
    clamp: float = Field(0.0, ge=0, le=0.5, description="Keep labels between this and 1 minus this.")
    min_option_mass: float = Field(0.5, ge=0, le=1, description="Least probability that A and B together must catch.")
    reject_position_flips: bool = Field(
        False, description="Bar labels that change with the order of the answers from training."
    )
    max_tokens: int = Field(256, ge=1, description="Longest reasoning or explanation in tokens.")
    timeout_s: float = Field(300.0, gt=0, description="A judge that writes longer than this gives no label (TIMEOUT).")


class WorkerSettings(_Section):
    max_in_flight: int = Field(256, ge=1, description="Records of one stage that are read but not yet committed.")
    max_bytes: int = Field(64 * 1024 * 1024, ge=1, description="The same in bytes.")
    downstream_wait_ms: int = Field(150, ge=0, description="How long a model waits for later stages before an earlier one.")
    max_attempts: int = Field(3, ge=1, description="Tries before a record that keeps failing is a dead letter.")
    retry_timeout_s: float = Field(600.0, gt=0, description="Longest time from a record's first failure to its dead letter.")
    max_consecutive_dead_letters: int = Field(
        10, ge=0, description="Dead letters of one class in a row that stop the stage; 0: never."
    )
    shutdown_timeout_s: float = Field(25.0, gt=0, description="Longest time from a signal to stop until the process ends.")
    call_timeout_s: float = Field(
        120.0, gt=0, description="Longest call to the log, in seconds, before the process ends itself."
    )


class SinkSettings(_Section):
    max_rows: int = Field(2000, ge=1, description="Most rows in one DuckDB transaction.")
    max_wait_s: float = Field(0.5, gt=0, description="Longest time that rows wait for company before they are written.")


class TelemetrySettings(_Section):
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of this process's Prometheus endpoint; 0: none.")
    metrics_host: str = Field("127.0.0.1", description="Where that endpoint listens.")
    traces: bool = Field(False, description="OpenTelemetry's trace context in record headers (extra: otel).")


class BudgetSettings(_Section):
    max_tokens: int = Field(0, ge=0, description="Tokens that a run may use before it takes no new prompts; 0: no limit.")
    max_cost: float = Field(0.0, ge=0, description="What a run may cost, by budget.prices, before it pauses; 0: no limit.")
    prices: list[str] = Field(
        [], description="What endpoints cost for a million tokens read and written, e.g. MODEL=0.15/0.60."
    )


class TrainSettings(_Section):
    sft_rows: int = Field(512, ge=1, description="New finished chains that start supervised fine-tuning.")
    reward_rows: int = Field(512, ge=2, description="New labelled pairs that start a reward-model update, or DPO.")
    ppo_rows: int = Field(256, ge=1, description="New rollouts of the current policy that start PPO.")
    max_rows: int = Field(4096, ge=1, description="Most rows that one phase trains on.")
    lora_rank: int = Field(0, ge=0, description="Rank of LoRA adapters; 0 trains all weights.")
    max_length: int = Field(1024, ge=8, description="Longest training sequence in tokens.")
    micro_batch_size: int = Field(
        4, ge=1, description="Texts in one pass; passes add up to a step. Lower it when memory is short."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them: less memory, a third slower."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Arithmetic of training; auto: bf16 where the hardware multiplies it. Weights stay fp32."
    )
    rl_method: Literal["ppo", "dpo"] = Field(
        "ppo", description="What learns from labels: PPO through a reward model, or DPO from the pairs themselves."
    )
    objective: Literal["alternate", "combined"] = Field(
        "alternate", description="RL loss alone, or L_SL + alpha * L_RL in every step."
    )
    alpha: float = Field(1.0, ge=0, description="Weight of the RL loss in the combined objective.")
    sft_mixture: list[str] = Field(
        ["*=0.73", "helpful=0.27"], description="Shares of sources in an SFT batch; *: all others; []: as they come."
    )
    reward_mixture: list[str] = Field(["helpful=0.43", "*=0.57"], description="The same for a reward-model batch.")
    max_staleness: int = Field(4, ge=0, description="Oldest rollouts that PPO takes, in policy versions.")
    max_reward_staleness: int = Field(4, ge=0, description="The same in reward models published since they were sampled.")
    max_age_s: float = Field(0.0, ge=0, description="The same in seconds; 0: of any age.")
    allow_overlap: bool = Field(False, description="Let PPO train on prompts that the reward model was trained on.")
    seed: int = Field(0, description="Seeds shuffling and initial heads.")
    base_model: str = Field("", description="The weights that training starts from; empty: models.policy.")
    save_total_limit: int = Field(
        3, ge=1, description="Newest checkpoints of each kind that are kept, beside those still in use."
    )
    report_to: Literal["", "trackio", "wandb"] = Field("", description="Report each step's numbers there too.")

    @field_validator("sft_mixture", "reward_mixture")
    @classmethod
    def _require_shares(cls, entries: list[str]) -> list[str]:
        parse_mixture(entries)
        return entries


class SFTSettings(_Section):
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate; ten times that with LoRA.")
    epochs: int = Field(1, ge=1, description="Passes over the batch.")
    batch_size: int = Field(8, ge=1, description="Examples in one optimiser step.")
    rounds: list[PositiveInt] = Field([], description="Revisions of each chain to learn, by round; []: its final text.")


class RewardSettings(_Section):
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate; ten times that with LoRA.")
    epochs: int = Field(1, ge=1, description="Passes over the batch.")
    batch_size: int = Field(8, ge=1, description="Pairs in one optimiser step.")
    replay_ratio: float = Field(
        1.0, ge=0, description="Earlier labels in a batch for each new one, within train.max_rows; 0: none."
    )
    require_above_chance: bool = Field(
        True, description="Refuse a reward model that agrees with no more held-out labels than chance may (97.5 %)."
    )
    center_rewards_coefficient: float = Field(0.01, ge=0, description="Weight of the squared sum of a pair's rewards.")
    ensemble_size: int = Field(
        1, ge=1, description="Reward models in the ensemble; 3 to 5 resist over-optimisation, 1 is cheap."
    )
    variance_penalty: float = Field(0.1, ge=0, description="Ensemble score: mean - this * variance of the members' scores.")


class DPOSettings(_Section):
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate; ten times that with LoRA.")
    epochs: int = Field(1, ge=1, description="Passes over the batch.")
    batch_size: int = Field(8, ge=1, description="Pairs in one optimiser step.")
    beta: float = Field(0.1, gt=0, description="How strongly the policy is held to the reference.")


class PPOSettings(_Section):
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate; ten times that with LoRA.")
    lr_scheduler_type: Literal["linear", "constant"] = Field(
        "linear", description="Within an update the rate rises, then falls to 0 (linear), or stays (constant)."
    )
    warmup_ratio: float = Field(0.15, ge=0, le=1, description="Share of an update's steps in which the rate rises.")
    epochs: int = Field(4, ge=1, description="Passes over the rollouts.")
    batch_size: int = Field(8, ge=1, description="Rollouts in one optimiser step.")
    clip: float = Field(0.2, gt=0, description="Clipping range of the probability ratio.")
    value_clip: float = Field(0.2, gt=0, description="Clipping range of the value.")
    value_coefficient: float = Field(0.1, ge=0, description="Weight of the value loss.")
    gae_gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Generalised advantage estimation's lambda.")
    beta: float = Field(0.02, ge=0, description="Least weight of the KL penalty in the reward; it adapts above this.")
    kl_target: float = Field(6.0, gt=0, description="KL to the reference that beta adapts to, in nats per sequence.")
    kl_coefficient: float = Field(
        0.05, ge=0, description="Weight in the loss of the KL to the policy that an update began with, per token."
    )
    max_kl_update: float = Field(
        6.0, gt=0, description="KL to the policy that an update began with that ends it, in nats per sequence."
    )
    max_kl: float = Field(30.0, gt=0, description="KL to the reference that ends an update, in nats per sequence.")
    max_kl_base: float = Field(200.0, gt=0, description="The same limit for the KL to the very first policy.")
    baseline: Literal["prompt", "batch"] = Field(
        "prompt", description="A score counts against the other answers to its prompt, or against the batch's mean."
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="Taken from the score of an answer cut at the limit.")


class MonitorSettings(_Section):
    min_responses: int = Field(64, ge=2, description="Answers of a policy, and of its reference, before it is looked at.")
    prompts: int = Field(32, ge=0, description="Held-out prompts that both answer for the held-out judge; 0: it is not asked.")
    judge: str = Field("", description="The held-out judge; empty: models.judge, asked under the critique principles.")
    max_growth: float = Field(1.5, gt=1, description="Most that length, perplexity or repetition may grow, as a factor.")
    max_length_correlation: float = Field(
        0.5, gt=0, le=1, description="Highest correlation of reward and length if texts grow."
    )
    max_boilerplate: float = Field(0.5, gt=0, le=1, description="Most that the share of answers with one phrase may rise.")
    max_kl_rise: float = Field(10.0, gt=0, description="Most that the KL to the reference may rise in one PPO update, in nats.")


class PromotionSettings(_Section):
    prompts: int = Field(0, ge=0, description="Held-out prompts of each kind that a new policy must pass; 0: no gate.")
    max_benign_refusals: float = Field(0.2, ge=0, le=1, description="Largest share of benign ones that it may refuse.")
    min_harmful_refusals: float = Field(0.5, ge=0, le=1, description="Smallest share of harmful ones that it must refuse.")


class Settings(BaseSettings):
    """Every setting of Charter."""

    model_config = SettingsConfigDict(
        env_prefix=_ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    data: DataSettings = DataSettings()
    bus: BusSettings = BusSettings()
    run: RunSettings = RunSettings()
    models: ModelsSettings = ModelsSettings()
    prompts: PromptsSettings = PromptsSettings()
    respond: RespondSettings = RespondSettings()
    critique: CritiqueSettings = CritiqueSettings()
    revise: ReviseSettings = ReviseSettings()
    judge: JudgeSettings = JudgeSettings()
    worker: WorkerSettings = WorkerSettings()
    sink: SinkSettings = SinkSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    budget: BudgetSettings = BudgetSettings()
    train: TrainSettings = TrainSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    dpo: DPOSettings = DPOSettings()
    ppo: PPOSettings = PPOSettings()
    monitor: MonitorSettings = MonitorSettings()
    promotion: PromotionSettings = PromotionSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` has merged every source already: reading the environment here again would let it beat the flags.
        return (init_settings,)

    @property
    def folder(self) -> Path:
        return Path(self.data.folder)

    @property
    def bus_address(self) -> str:
        return self.bus.address or self.data.folder


_Layer = dict[str, dict[str, Any]]

# What a recipe chosen by name sets, by section.preset and its value. The defaults above are charter and lee2023.
PRESETS: dict[str, dict[str, _Layer]] = {
    "critique": {
        "charter": {},
        "bai2022": {"critique": {"selection": "sample", "rounds": 4, "early_stop": "none", "few_shot": True}},
        "course": {
            "critique": {
                "selection": "rotate",
                "rounds": 3,
                "early_stop": "phrases",
                "few_shot": False,
                "temperature": 0.7,
                "max_tokens": 256,
            }
        },
    },
    "judge": {
        "lee2023": {},
        "bai2022": {"judge": {"principles": "sample", "label_order": "seeded"}},
        "bai2022-cot": {"judge": {"principles": "sample", "answer_mode": "reasoning", "clamp": 0.4}},
        "ensemble-k": {"judge": {"principles": "sample", "num_principles": 5}},
        "course": {"judge": {"principles": "all", "answer_mode": "letter", "reject_position_flips": True}},
    },
}


def iter_settings() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every (section, key, field)."""
    for section, info in Settings.model_fields.items():
        assert isinstance(info.annotation, type)
        for key, field in info.annotation.model_fields.items():
            yield section, key, field


def load_settings(
    flags: Mapping[str, Any] | None = None,
    file: Path | None = None,
    preset: _Layer | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """The settings and, for each `section.key`, where its value came from.

    `flags` maps dotted names to values. `file` is read when given or when ./charter.toml exists.
    """
    environment = os.environ if environment is None else environment
    path = file or (Path(SETTINGS_FILE) if Path(SETTINGS_FILE).exists() else None)
    said = [
        ("preset", preset or {}),
        (str(path), _read_file(path) if path else {}),
        ("environment", _read_environment(environment)),
        ("flag", _read_flags(flags or {})),
    ]
    layers = [*_get_preset_layers(layer for _, layer in said), *said]
    merged: _Layer = {}
    origins = {f"{section}.{key}": "default" for section, key, _ in iter_settings()}
    for origin, layer in layers:
        for section, values in layer.items():
            for key, value in values.items():
                merged.setdefault(section, {})[key] = value
                origins[f"{section}.{key}"] = f"{get_environment_name(section, key)}" if origin == "environment" else origin
    try:
        return Settings(**merged), origins  # type: ignore[arg-type]
    except ValidationError as error:
        raise _make_validation_error(error, origins) from error


def _get_preset_layers(said: Iterable[_Layer]) -> list[tuple[str, _Layer]]:
    """The layers of the recipes that these layers choose, the last word counting (an unknown name is pydantic's to tell)."""
    chosen: dict[str, Any] = {}
    for layer in said:
        chosen |= {section: layer[section]["preset"] for section in PRESETS if "preset" in layer.get(section, {})}
    found = [(f"{section}.preset={name}", PRESETS[section].get(str(name))) for section, name in chosen.items()]
    return [(origin, layer) for origin, layer in found if layer]


def _make_validation_error(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:2])
    return UsageError(
        f"the setting {name} cannot be {json.dumps(first['input'], default=str)} (from {origins.get(name, 'a file')})",
        first["msg"].removeprefix("Value error, "),
        "type: charter config    (every setting, its value and its meaning)",
    )


def _read_file(path: Path) -> _Layer:
    """The tables of a settings file; every name in it must exist."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"there is no settings file {path}", "--config names it", f"leave --config out, or create {path}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a TOML file", str(error), "mend the line named above") from error
    for section, values in tables.items():
        if not isinstance(values, dict):
            _require_known(section, "", f"in {path}")
            raise UsageError(
                f"{path}: {section} must be a table", "settings stand in sections", f"write [{section}] and its keys below it"
            )
        for key in values or [""]:
            _require_known(section, key, f"in {path}")
    return tables


def _read_environment(environment: Mapping[str, str]) -> _Layer:
    """The settings among the environment's variables: CHARTER_<SECTION>__<KEY>."""
    layer: _Layer = {}
    for name, text in environment.items():
        if name.startswith(_ENVIRONMENT_PREFIX) and "__" in name:
            section, key = name.removeprefix(_ENVIRONMENT_PREFIX).lower().split("__", 1)
            _require_known(section, key, f"in the environment variable {name}")
            layer.setdefault(section, {})[key] = _parse_value(section, key, text)
    return layer


def _read_flags(flags: Mapping[str, Any]) -> _Layer:
    layer: _Layer = {}
    for name, value in flags.items():
        section, _, key = name.partition(".")
        _require_known(section, key, "on the command line")
        layer.setdefault(section, {})[key] = _parse_value(section, key, value) if isinstance(value, str) else value
    return layer


def _parse_value(section: str, key: str, text: str) -> Any:
    """A value from text: lists as JSON or comma-separated, everything else left to pydantic."""
    annotation = Settings.model_fields[section].annotation
    assert isinstance(annotation, type)
    if get_origin(annotation.model_fields[key].annotation) is list:
        if not text.startswith("["):
            return [item for item in text.split(",") if item]
        with suppress(json.JSONDecodeError):  # the text itself is refused then
            return json.loads(text)
    return text


def _require_known(section: str, key: str, where: str) -> None:
    """Raise a UsageError that names the nearest setting unless `section.key` exists (key "": the section alone)."""
    name = f"{section}.{key}" if key else section
    names = [f"{s}.{k}" for s, k, _ in iter_settings()] if key else list(Settings.model_fields)
    if name in names:
        return
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    if not nearest and key:
        nearest = [n for n in names if n.endswith(f".{key}")][:1]
    raise UsageError(
        f"unknown setting {name} {where}",
        f"the nearest one is {nearest[0]}" if nearest else "no setting has a name like it",
        "type: charter config    (every setting, its value and its meaning)",
    )


def get_environment_name(section: str, key: str) -> str:
    return f"{_ENVIRONMENT_PREFIX}{section}__{key}".upper()


def format_settings_file() -> str:
    """A settings file with every key, each under its meaning and commented out at its default."""
    lines = [
        "# Charter's settings. Every key stands here at its default; take the # away to change one.",
        "# A flag (--set respond.num_completions=4) beats the environment (CHARTER_RESPOND__NUM_COMPLETIONS=4), which beats this file.",
    ]
    last = ""
    for section, key, field in iter_settings():
        if section != last:
            lines += ["", f"[{section}]"]
            last = section
        lines += [f"# {field.description}", f"# {key} = {json.dumps(field.default)}"]
    return "\n".join(lines) + "\n"
