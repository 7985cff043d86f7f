"""Define the settings. One tree contains all settings. The settings file is `charter.toml`.

A setting can have several sources. The first of these sources that sets it has precedence:

1. a command-line flag;
2. the environment variable `CHARTER_<SECTION>__<KEY>`;
3. the settings file;
4. values that a command sets itself (for example, the demo);
5. the recipe selected by `critique.preset`, `judge.preset` or `train.rl_method` (PRESETS below);
6. the default below.

A recipe sets only the keys that no other source sets. For example, `critique.preset = "course"` with `critique.rounds = 2`
gives the course recipe with two rounds. `load_settings` returns the settings and the origin of each value. For an unknown
name it raises an error that suggests the nearest name. Functions in other modules take plain arguments, not `Settings`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.database_paths import find_unsupported_char
from engine.errors import UsageError
from engine.pairing import COMPLETIONS_PAIRING

SETTINGS_FILE = "charter.toml"
_ADDRESS_PATTERN = re.compile(r"[a-z+]+:/|[\w.-]+:\d+(,|$)", re.IGNORECASE)
_ENVIRONMENT_PREFIX = "CHARTER_"


class _Section(BaseModel):
    """A table of the settings file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_mixture(entries: list[str]) -> dict[str, float]:
    """Return the share of each source from entries such as `helpful=0.27`. Raise ValueError when an entry is malformed."""
    shares: dict[str, float] = {}
    for entry in entries:
        source, _, share = entry.rpartition("=")
        if not source or float(share) <= 0:
            raise ValueError(f"{entry!r} is not SOURCE=SHARE with a share above 0")
        shares[source] = float(share)
    if shares and "*" not in shares:
        raise ValueError("a mixture needs an entry for all other sources, e.g. *=0.5")
    return shares


REWARD_MODEL, JUDGE = "reward_model", "judge"


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward of a completion: weight * value (`train.rewards`).

    `source` is `reward_model`, `judge` or the name of a grader. The value is the normalized score of the reward model, the win
    rate against the other completions of the prompt, or the score of the grader. With a `label`, the value is 1 if the grader
    gave this label, and otherwise 0.
    """

    source: str
    label: str
    weight: float

    @property
    def name(self) -> str:
        return f"{self.source}.{self.label}" if self.label else self.source

    @property
    def is_grader(self) -> bool:
        return self.source not in (REWARD_MODEL, JUDGE)


def parse_rewards(entries: Iterable[str]) -> list[RewardTerm]:
    """Return the terms of entries such as `length=-0.1` or `refusal.refuses=1`. Raise ValueError when an entry is malformed."""
    terms = []
    for entry in entries:
        name, _, weight = entry.rpartition("=")
        source, dot, label = name.partition(".")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not source or not math.isfinite(value) or value == 0 or (dot and not label):
            raise ValueError(f"{entry!r} is not SOURCE=WEIGHT or GRADER.LABEL=WEIGHT with a weight other than 0")
        terms.append(RewardTerm(source, label, value))
    for term in terms:
        if term.label and not term.is_grader:
            raise ValueError(f"{term.source} has no labels; write {term.source}={term.weight:g}")
    names = [term.name for term in terms]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} occurs twice")
    if not terms:
        raise ValueError("there must be at least one entry, e.g. reward_model=1")
    return terms


class DataSettings(_Section):
    folder: str = Field(".charter", description="Folder that contains the database, the embedded log and the checkpoints.")

    @field_validator("folder")
    @classmethod
    def _require_supported_path(cls, folder: str) -> str:
        """Reject a folder in which DuckDB cannot open the database, before anything is written to it."""
        if not folder or "\0" in folder:
            raise ValueError("the data folder is the path of a folder, such as .charter")
        if char := find_unsupported_char(Path(folder)):
            raise ValueError(f"DuckDB does not support the character {char} in the path {Path(folder).absolute()}")
        return folder


class BusSettings(_Section):
    address: str = Field(
        "",
        description="Address of the log: kafka://HOST:PORT[,HOST:PORT], or the folder of an embedded log. If empty, the embedded log in data.folder is used.",
    )
    prefix: str = Field(
        "",
        description="Prefix of all topic names, consumer groups and transactional ids. Use it on a Kafka cluster with other users.",
    )
    partitions: int = Field(
        12,
        ge=1,
        description="Number of partitions of a new topic. At most this number of instances of one stage can work in parallel.",
    )
    replication: int = Field(
        -1, ge=-1, description="Replication factor of a new topic on Kafka. -1 selects the default of the broker."
    )
    retention_ms: int = Field(
        -1,
        ge=-1,
        description="Retention time of new topics in milliseconds. -1 means no limit. Prompts have their own setting. Manifests and erasures are always kept.",
    )
    prompts_retention_ms: int = Field(
        -1,
        ge=-1,
        description="Retention time of a new topic prompts in milliseconds. -1 means no limit. Kafka keeps an erased prompt for this time.",
    )
    static_members: bool = Field(
        False,
        description="Use static membership on Kafka. A stopped instance then keeps its partitions until its session times out.",
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Security protocol of the connection to Kafka."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "AWS_MSK_IAM"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism. It is used only if the security protocol is SASL_PLAINTEXT or SASL_SSL."
    )
    sasl_username: str = Field("", description="SASL user name, for PLAIN and SCRAM.")
    sasl_password_env: str = Field(
        "CHARTER_KAFKA_PASSWORD", description="Name of the environment variable that contains the SASL password."
    )
    sasl_password_file: str = Field("", description="File that contains the SASL password. It overrides sasl_password_env.")
    sasl_token_command: list[str] = Field(
        [],
        description="Command that prints a token for OAUTHBEARER: a program and its arguments, without a shell. They must not contain a secret.",
    )
    sasl_token_url: str = Field(
        "",
        description="URL of an OAuth 2.0 token endpoint for OAUTHBEARER with client credentials: https://, or http:// on this machine.",
    )
    sasl_client_id: str = Field("", description="Client id for the token endpoint.")
    sasl_client_secret_env: str = Field(
        "CHARTER_KAFKA_CLIENT_SECRET", description="Name of the environment variable that contains the client secret."
    )
    sasl_client_secret_file: str = Field(
        "",
        description="File that contains the client secret. It overrides sasl_client_secret_env, and is read for each token.",
    )
    sasl_client_auth: Literal["client_secret_basic", "client_secret_post"] = Field(
        "client_secret_basic",
        description="How the token endpoint gets the client id and the secret: in the header Authorization, or in the form.",
    )
    sasl_scope: str = Field("", description="Scope of the token that is requested from the endpoint. If empty, none is sent.")
    sasl_audience: str = Field(
        "", description="Audience of the token that is requested from the endpoint. If empty, none is sent."
    )
    sasl_token_lifetime_s: float = Field(
        0.0,
        ge=0,
        description="Maximum lifetime of a token in seconds. It is required for tokens that do not state their expiry. 0 means no limit.",
    )
    sasl_extensions: list[str] = Field(
        [],
        description="SASL extensions that are sent with a token, as NAME=VALUE. Confluent Cloud needs logicalCluster and identityPoolId.",
    )
    ssl_cafile: str = Field(
        "", description="PEM file with the CA certificates to trust. If empty, the CA certificates of the system are used."
    )
    ssl_certfile: str = Field(
        "", description="PEM file with the client certificate, for brokers that require a client certificate."
    )
    ssl_keyfile: str = Field(
        "",
        description="PEM file with the private key of the client certificate. If empty, ssl_certfile must also contain the key.",
    )
    ssl_key_password_env: str = Field(
        "CHARTER_KAFKA_KEY_PASSWORD",
        description="Name of the environment variable that contains the password of the private key.",
    )
    ssl_key_password_file: str = Field(
        "", description="File that contains the password of the private key. It overrides ssl_key_password_env."
    )
    ssl_check_hostname: bool = Field(
        True, description="Check that the certificate of the broker matches the host name of the broker."
    )
    framing: Literal["single-object", "confluent"] = Field(
        "single-object", description="Framing of Avro records. The value confluent also requires bus.schema_registry."
    )
    schema_registry: str = Field("", description="URL of a schema registry that is compatible with Confluent's.")
    schema_registry_auth_env: str = Field(
        "CHARTER_REGISTRY_AUTH",
        description="Name of the environment variable that contains USER:PASSWORD for the schema registry.",
    )

    @field_validator("address")
    @classmethod
    def _require_kafka_or_folder(cls, address: str) -> str:
        """Reject HOST:PORT and other protocols.

        Without this check such an address would be used as the folder of an embedded log.
        """
        if _ADDRESS_PATTERN.match(address) and not address.startswith("kafka://"):
            raise ValueError("the address of a broker has the form kafka://HOST:PORT; any other value is a folder")
        return address


_RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class RunSettings(_Section):
    id: str = Field(
        "live",
        min_length=1,
        description="Id of the current run. New records get this id, and stages skip the records of other runs.",
    )
    constitution: str = Field("default", description="Name of a constitution that Charter includes, or path of a TOML file.")
    from_base: bool = Field(
        False,
        description="Sample the responses of this run from the base model (policy 0), also if training has published newer policies.",
    )

    @field_validator("id")
    @classmethod
    def _require_safe_id(cls, run_id: str) -> str:
        """Reject an id that could not be part of a file name, a group or a transactional id."""
        if not _RUN_ID_PATTERN.fullmatch(run_id):
            raise ValueError(
                "a run id has 1 to 100 letters, digits, dots, underscores and hyphens, and does not start with a dot"
            )
        return run_id


class ModelsSettings(_Section):
    policy: str = Field(
        "smollm2", description="Policy model: smollm2, a model folder, a Hugging Face Hub id, or http://HOST:PORT/v1#MODEL."
    )
    critic: str = Field("", description="Model that writes critiques and revisions. If empty, version 0 of the policy is used.")
    judge: str = Field("", description="Model that labels preference pairs. If empty, version 0 of the policy is used.")
    generator: str = Field(
        "", description="Model that `produce --generate` samples new prompts from. If empty, version 0 of the policy is used."
    )
    follow: list[Literal["critic", "judge"]] = Field(
        [], description="Roles (critic, judge) that use the newest policy instead of a fixed model."
    )
    weight_sync: str = Field(
        "",
        description="How a server gets a new policy: its adapter (vllm-lora), all weights (vllm), or a command run as COMMAND FOLDER NAME. If empty, never.",
    )
    threads: int = Field(2, ge=1, description="Number of CPU threads that a local model uses.")
    max_batch_size: int = Field(32, ge=1, description="Maximum number of sequences in one batch of a local model.")
    timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds to the first token of an endpoint and between two tokens, or to a whole response without streaming. A timeout doubles it.",
    )
    concurrency: int = Field(
        16,
        ge=1,
        description="Maximum number of concurrent requests to an endpoint. They start at 4, rise while it is quick, and are halved at an overload.",
    )
    stream: bool = Field(
        True,
        description="Stream completions from an endpoint that can stream all parts of a response. Turn it off for a server with faulty streams.",
    )
    send_seed: bool = Field(
        True,
        description="Send a seed with each request to an endpoint. Turn it off for a server that fails on requests with a seed.",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Name of the environment variable that contains the API key of endpoints, or a comma-separated list of HOST=VARIABLE.",
    )


class PromptsSettings(_Section):
    max_chars: int = Field(
        32_000, ge=1, description="Maximum length of a prompt in characters. The command `produce` rejects longer prompts."
    )
    eval_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Fraction of prompts that are held out from training. A hash of the prompt decides whether it is held out.",
    )

    rl_fraction: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="Fraction of prompts that only RL trains on. The others train the reward model. 0 does not divide them. Needs a training loop.",
    )
    duplicate_threshold: float = Field(
        0.6,
        ge=0.5,
        le=1,
        description="Similarity from which two prompts are near-duplicates: their shared words and word pairs, divided by all of theirs.",
    )


class GenerateSettings(_Section):
    recipe: str = Field(
        "default",
        description="Recipe of `produce --generate`: the name of a recipe that Charter includes, or path of a TOML file.",
    )
    seed: int = Field(0, ge=0, description="Random seed of generated prompts. Another seed is another sequence of prompts.")
    batch_size: int = Field(
        8, ge=1, description="Number of requests to the model for one index. Their prompts are published in one transaction."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of generated prompts.")
    top_p: float = Field(0.95, gt=0, le=1, description="Threshold of nucleus sampling of generated prompts.")
    max_tokens: int = Field(128, ge=8, description="Maximum length of one response of the generator in tokens.")
    max_waiting: int = Field(
        256,
        ge=0,
        description="Number of prompts that wait for the stage respond, from which the generator waits. 0 means no limit.",
    )
    max_fruitless: int = Field(
        20, ge=1, description="Number of consecutive indexes without an accepted prompt after which the generator stops."
    )


class RespondSettings(_Section):
    num_completions: int = Field(2, ge=1, description="Number of completions that are sampled for each prompt.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of completions. PPO requires a value above 0.")
    top_p: float = Field(1.0, gt=0, le=1, description="Threshold of nucleus sampling. PPO requires 1.0.")
    max_tokens: int = Field(256, ge=1, description="Maximum length of a completion in tokens.")
    max_thinking_tokens: int = Field(
        0,
        ge=0,
        description="Maximum length of the reasoning before a completion, in tokens. 0 turns thinking off. PPO does not use completions with reasoning.",
    )


class CritiqueSettings(_Section):
    preset: Literal["charter", "bai2022", "course"] = Field(
        "charter",
        description="Recipe that sets the other keys of this section, unless they are set elsewhere: charter, bai2022 or course.",
    )
    selection: Literal["constitution", "sample", "rotate"] = Field(
        "constitution",
        description="How a principle is selected in each round: as the constitution specifies, by random sampling, or in the order of the file.",
    )
    rounds: int = Field(4, ge=1, description="Maximum number of revisions of one response.")
    early_stop: Literal["verdict", "phrases", "none"] = Field(
        "verdict",
        description="When a chain ends early: at a verdict without a flaw (verdict), at a critique that finds no flaw (phrases), or never (none).",
    )
    few_shot: bool = Field(True, description="Add the examples of the constitution to critique prompts and revision prompts.")
    max_tokens: int = Field(128, ge=1, description="Maximum length of a critique in tokens.")
    max_thinking_tokens: int = Field(
        0,
        ge=0,
        description="Maximum length of the reasoning before a critique, in tokens. 0 turns thinking off.",
    )
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of critiques and revisions.")
    min_option_mass: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Minimum total probability of the options of a verdict. A verdict below this minimum is discarded.",
    )
    accept_threshold: float = Field(
        0.6,
        ge=0.5,
        le=1,
        description="A chain may end at a revision if the revision is preferred with at least this probability.",
    )
    reject_threshold: float = Field(
        0.4, ge=0, le=0.5, description="A revision is discarded if it is preferred with at most this probability."
    )
    similarity_threshold: float = Field(
        0.97, ge=0, le=1, description="Two responses count as identical if their similarity is above this threshold."
    )
    skip_sources: list[str] = Field(
        ["helpful"], description="Sources whose prompts get a response, but no critique and no revision."
    )


class ReviseSettings(_Section):
    max_tokens: int = Field(256, ge=1, description="Maximum length of a revision in tokens.")
    max_thinking_tokens: int = Field(
        0,
        ge=0,
        description="Maximum length of the reasoning before a revision, in tokens. 0 turns thinking off.",
    )


class JudgeSettings(_Section):
    pairing: Literal["neighbors", "circular", "all", "revision", "contrast"] = Field(
        "neighbors",
        description="Pairs: adjacent completions (neighbors), in a circle (circular), all, a revision and its origin (revision), or contrast pairs (contrast).",
    )
    preset: Literal["lee2023", "bai2022", "bai2022-cot", "ensemble-k", "course"] = Field(
        "lee2023",
        description="Recipe that sets the other keys of this section, unless they are set elsewhere: lee2023, bai2022, bai2022-cot, ensemble-k or course.",
    )
    answer_mode: Literal["logprobs", "reasoning", "letter"] = Field(
        "logprobs",
        description="How the judge decides: by option probabilities, directly (logprobs) or after written reasoning (reasoning), or by a letter (letter).",
    )
    principles: Literal["constitution", "sample", "all"] = Field(
        "constitution",
        description="Principles for each pair: as specified by the constitution (constitution), a random sample (sample), or all in one question (all).",
    )
    num_principles: int = Field(1, ge=1, description="Number of principles that are sampled to judge each pair.")
    label_order: Literal["both", "seeded"] = Field(
        "both",
        description="Order of the responses for the label: the average of both orders (both), or one order that the seed selects (seeded).",
    )
    clamp: float = Field(0.0, ge=0, le=0.5, description="Clamp labels to the range [clamp, 1 - clamp]. 0 means no clamping.")
    min_option_mass: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Minimum total probability of the options A and B. A pair below this minimum gets no label.",
    )
    reject_position_flips: bool = Field(
        False, description="Exclude a label from training if the preferred response changes with the order of the responses."
    )
    max_tokens: int = Field(256, ge=1, description="Maximum length of the judge's reasoning or explanation in tokens.")
    max_thinking_tokens: int = Field(
        0,
        ge=0,
        description="Maximum length of the judge's reasoning before a written reply (answer_mode reasoning or letter), in tokens. 0 turns thinking off.",
    )
    timeout_s: float = Field(
        300.0,
        gt=0,
        description="Timeout of one judgment in seconds. After a timeout the pair gets no label and the outcome TIMEOUT.",
    )

    @field_validator("pairing", mode="before")
    @classmethod
    def _translate_earlier_name(cls, pairing: object) -> object:
        """Accept the name that `neighbors` had when it was the only pairing of completions."""
        return "neighbors" if pairing == COMPLETIONS_PAIRING else pairing

    @field_validator("max_thinking_tokens")
    @classmethod
    def _require_written_reply(cls, limit: int, info: ValidationInfo) -> int:
        """Reject a limit that has no effect: option probabilities are read at the first token, so this judge does not think."""
        if limit and info.data.get("answer_mode") == "logprobs":
            raise ValueError(
                "with judge.answer_mode = logprobs the judge writes no reply; set judge.answer_mode to reasoning or letter"
            )
        return limit


class ContrastSettings(_Section):
    constitution_role: Literal["user", "system"] = Field(
        "user",
        description="Message that contains the constitution in the prompt of a contrast completion: the last user message, or the system message.",
    )
    num_principles: int = Field(
        0,
        ge=0,
        description="Number of principles that are drawn for the prompt of each contrast completion. 0 means all principles that apply.",
    )
    ask_judge: bool = Field(
        True,
        description="Ask the judge about contrast pairs. Its answer does not change the label; contrast_stats has the share in which it agrees.",
    )


class GradeSettings(_Section):
    graders: list[str] = Field(
        ["refusal", "length"],
        description="Graders of responses: refusal, length, one-sentence, instructions, principles, or a Python file. An empty list turns grading off.",
    )
    subjects: list[Literal["completion", "final_response", "contrast_completion"]] = Field(
        ["completion"],
        min_length=1,
        description="What is graded: sampled completions (completion), final responses of chains (final_response), contrast completions (contrast_completion).",
    )
    num_principles: int = Field(
        0,
        ge=0,
        description="Number of critique principles that the grader principles samples for each response. 0 means all principles that apply.",
    )


class EvaluationSettings(_Section):
    suites_folder: str = Field(
        "",
        description="Folder with the files of evaluation suites (xstest, harmbench, strongreject, ifeval) for the command `eval run`.",
    )


class WorkerSettings(_Section):
    max_in_flight: int = Field(
        1024,
        ge=1,
        description="Maximum number of records that one stage has read but not yet committed.",
    )
    max_uncommitted: int = Field(
        768,
        ge=1,
        description="Maximum number of records that one stage processes, or has finished but not yet committed. A crash repeats their model calls.",
    )
    max_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1,
        description="Maximum total size in bytes of the records that one stage has read but not yet committed.",
    )
    max_attempts: int = Field(3, ge=1, description="Number of failed attempts after which a record becomes a dead letter.")
    retry_timeout_s: float = Field(
        600.0,
        gt=0,
        description="Maximum time in seconds during which a failing record is retried. After this time the record becomes a dead letter.",
    )
    max_consecutive_dead_letters: int = Field(
        10,
        ge=0,
        description="Number of consecutive dead letters with the same error class after which the stage stops. 0 means no limit.",
    )
    shutdown_timeout_s: float = Field(
        25.0, gt=0, description="Maximum time in seconds from a stop signal to the end of the process."
    )
    call_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Maximum duration of one call to the log in seconds. The watchdog ends the process if a call takes longer.",
    )


class SinkSettings(_Section):
    max_rows: int = Field(2000, ge=1, description="Maximum number of rows in one DuckDB transaction.")


class TelemetrySettings(_Section):
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the Prometheus endpoint of this process. 0 means no endpoint."
    )
    metrics_host: str = Field("127.0.0.1", description="Address on which the Prometheus endpoint listens.")
    traces: bool = Field(
        False, description="Write the OpenTelemetry trace context into record headers. This requires the extra `otel`."
    )


class BudgetSettings(_Section):
    max_tokens: int = Field(0, ge=0, description="Number of tokens after which a run accepts no new prompts. 0 means no limit.")
    max_cost: float = Field(
        0.0,
        ge=0,
        description="Cost after which all stages of a run pause. It is computed from budget.prices. 0 means no limit.",
    )
    prices: list[str] = Field(
        [],
        description="Prices of endpoint models for one million prompt tokens and one million completion tokens, e.g. MODEL=0.15/0.60.",
    )


class TrainSettings(_Section):
    sft_rows: int = Field(512, ge=1, description="Number of new finished chains that start supervised fine-tuning.")
    reward_rows: int = Field(
        512,
        ge=2,
        description="Number of new labeled pairs that start an update of the reward model, or a DPO update (rl_method dpo).",
    )
    ppo_rows: int = Field(256, ge=1, description="Number of new rollouts of the current policy that start a PPO update.")
    group_completions: int = Field(
        512,
        ge=1,
        description="Number of new completions, in complete groups, that start a GRPO or RLOO update. A group has the completions of one prompt.",
    )
    max_rows: int = Field(
        4096,
        ge=1,
        description="Maximum number of rows in one training batch. With groups, it limits the number of completions.",
    )
    lora_rank: int = Field(0, ge=0, description="Rank of the LoRA adapters. 0 means that all weights are trained.")
    max_length: int = Field(1024, ge=8, description="Maximum length of a training sequence in tokens.")
    micro_batch_size: int = Field(
        4,
        ge=1,
        description="Number of sequences in one forward and backward pass. A lower value needs less memory. Gradients are accumulated over one optimizer step.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass. This needs less memory and is about a third slower."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Precision of matrix products. auto selects bf16 if the hardware supports it. Trained weights are always fp32.",
    )
    base_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Type of the frozen weights under LoRA adapters. bf16 halves their memory. Adapters and checkpoints are always fp32.",
    )
    rl_method: Literal["ppo", "dpo", "grpo", "rloo", "distill"] = Field(
        "ppo",
        description="Training method: ppo (with a reward model), dpo (on pairs), grpo or rloo (on groups, train.rewards), or distill (no rewards).",
    )
    rewards: list[str] = Field(
        ["reward_model=1"],
        description="Reward of GRPO and RLOO: SOURCE=WEIGHT (reward_model, judge for the win rate, or a grader for its score) or GRADER.LABEL=WEIGHT.",
    )
    contrast_pairs: list[Literal["reward", "dpo"]] = Field(
        [], description="Phases that also train on contrast pairs (judge.pairing = contrast): reward, dpo, or both."
    )
    objective: Literal["alternate", "combined"] = Field(
        "alternate", description="Loss of a PPO step: the RL loss (alternate), or L_SL + alpha * L_RL (combined)."
    )
    alpha: float = Field(1.0, ge=0, description="Weight of the RL loss in the combined objective.")
    sft_mixture: list[str] = Field(
        ["*=0.73", "helpful=0.27"],
        description="Share of each prompt source in an SFT batch. The entry * is the share of all other sources. An empty list means no fixed shares.",
    )
    reward_mixture: list[str] = Field(
        ["helpful=0.43", "*=0.57"],
        description="Share of each prompt source in a batch of the reward model. The format is the same as in sft_mixture.",
    )
    max_staleness: int = Field(4, ge=0, description="Maximum age of a rollout or of a DPO pair, in policy versions.")
    max_reward_staleness: int = Field(
        4,
        ge=0,
        description="Maximum age of a rollout whose reward is a reward model: the number of reward-model versions that were published after sampling.",
    )
    max_age_s: float = Field(0.0, ge=0, description="Maximum age of a rollout or of a DPO pair in seconds. 0 means no limit.")
    rollouts_ahead: float = Field(
        1.0,
        ge=0,
        description="Number of RL updates (1 or more) whose rollouts a training loop wants in advance. Responders hold other prompts. 0 means never.",
    )
    allow_overlap: bool = Field(False, description="Allow RL to train on prompts that the reward model was also trained on.")
    seed: int = Field(0, description="Random seed for shuffling and for the initial weights of new heads.")
    base_model: str = Field(
        "", description="Model that provides the initial weights for training. If empty, models.policy is used."
    )
    checkpoint_url: str = Field(
        "",
        description="URL to which the trainer copies checkpoints (s3://, gs://, file://), so that responders need no shared disk. If empty, none.",
    )
    save_total_limit: int = Field(
        3,
        ge=1,
        description="Number of newest checkpoints of each kind that are kept. Checkpoints that are in use are also kept.",
    )
    report_to: Literal["", "trackio", "wandb"] = Field(
        "", description="Experiment tracker that also receives the metrics of each step. If empty, no tracker is used."
    )

    @field_validator("base_dtype")
    @classmethod
    def _require_frozen_weights(cls, dtype: str, info: ValidationInfo) -> str:
        if dtype == "bf16" and not info.data.get("lora_rank"):
            raise ValueError("train.lora_rank is 0, so all weights are trained, and bf16 weights would lose small steps")
        if dtype == "bf16" and info.data.get("precision") == "fp32":
            raise ValueError("train.precision is fp32, but bf16 weights are multiplied in bf16")
        return dtype

    @field_validator("rewards")
    @classmethod
    def _require_terms(cls, entries: list[str]) -> list[str]:
        parse_rewards(entries)
        return entries

    @field_validator("sft_mixture", "reward_mixture")
    @classmethod
    def _require_shares(cls, entries: list[str]) -> list[str]:
        parse_mixture(entries)
        return entries


class SFTSettings(_Section):
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate. It is multiplied by 10 with LoRA.")
    epochs: int = Field(1, ge=1, description="Number of passes over the batch.")
    batch_size: int = Field(8, ge=1, description="Number of examples in one optimizer step.")
    rounds: list[PositiveInt] = Field(
        [],
        description="Numbers of the rounds whose revisions are training targets. An empty list selects only the final response of each chain.",
    )


class RewardSettings(_Section):
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate. It is multiplied by 10 with LoRA.")
    epochs: int = Field(1, ge=1, description="Number of passes over the batch.")
    batch_size: int = Field(8, ge=1, description="Number of pairs in one optimizer step.")
    replay_ratio: float = Field(
        1.0,
        ge=0,
        description="Number of earlier labels that are added to a batch for each new label, within train.max_rows. 0 means none.",
    )
    require_above_chance: bool = Field(
        True, description="Reject a reward model if its agreement with held-out labels is not above chance (97.5% confidence)."
    )
    center_rewards_coefficient: float = Field(
        0.01, ge=0, description="Weight of the penalty on the squared sum of the two rewards of a pair."
    )
    ensemble_size: int = Field(
        1,
        ge=1,
        description="Number of reward models in the ensemble. 3 to 5 models reduce over-optimization; 1 model is the cheapest.",
    )
    variance_penalty: float = Field(
        0.1,
        ge=0,
        description="Penalty on disagreement in the ensemble. The score is mean - variance_penalty * variance over the reward models.",
    )


class DPOSettings(_Section):
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate. It is multiplied by 10 with LoRA.")
    epochs: int = Field(1, ge=1, description="Number of passes over the batch.")
    batch_size: int = Field(8, ge=1, description="Number of pairs in one optimizer step.")
    beta: float = Field(0.1, gt=0, description="Beta of DPO. A higher value keeps the policy closer to the reference policy.")


class PPOSettings(_Section):
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate. It is multiplied by 10 with LoRA.")
    lr_scheduler_type: Literal["linear", "constant"] = Field(
        "linear",
        description="Schedule of the learning rate within an update: warm-up and then linear decay to 0 (linear), or no warm-up and no decay (constant).",
    )
    warmup_ratio: float = Field(
        0.15,
        ge=0,
        le=1,
        description="Fraction of the steps of an update that are warm-up steps. It is used only with the linear schedule.",
    )
    epochs: int = Field(4, ge=1, description="Number of passes over the rollouts.")
    batch_size: int = Field(8, ge=1, description="Number of rollouts in one optimizer step.")
    clip: float = Field(0.2, gt=0, description="Clipping range of the probability ratio between the new and the old policy.")
    value_clip: float = Field(0.2, gt=0, description="Clipping range of the predicted value.")
    value_coefficient: float = Field(0.1, ge=0, description="Weight of the value loss.")
    gae_gamma: float = Field(1.0, gt=0, le=1, description="Discount factor of generalized advantage estimation.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of generalized advantage estimation.")
    beta: float = Field(
        0.02,
        ge=0,
        description="Initial and minimum weight of the KL penalty in the reward. The adaptive controller can raise the weight.",
    )
    kl_target: float = Field(
        6.0,
        gt=0,
        description="Target KL to the reference policy, in nats per sequence. The adaptive controller of beta uses it.",
    )
    kl_coefficient: float = Field(
        0.05, ge=0, description="Weight of an additional loss term: the per-token KL to the policy at the start of the update."
    )
    max_kl_update: float = Field(
        6.0,
        gt=0,
        description="Maximum KL to the policy at the start of the update, in nats per sequence. A higher KL ends the update.",
    )
    max_kl: float = Field(
        30.0, gt=0, description="Maximum KL to the reference policy, in nats per sequence. A higher KL ends the update."
    )
    max_kl_base: float = Field(
        200.0,
        gt=0,
        description="Maximum KL to the base model (policy version 0), in nats per sequence. A higher KL ends the update.",
    )
    baseline: Literal["prompt", "batch"] = Field(
        "prompt",
        description="Baseline of a score: the mean score of the other completions of the same prompt (prompt), or of the batch (batch).",
    )
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Penalty that is subtracted from the score of a completion that reached the token limit."
    )


class _GroupSettings(_Section):
    """The settings that GRPO and RLOO have in common."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate. It is multiplied by 10 with LoRA.")
    lr_scheduler_type: Literal["linear", "constant"] = Field(
        "linear",
        description="Schedule of the learning rate within an update: warm-up and then linear decay to 0 (linear), or no warm-up and no decay (constant).",
    )
    warmup_ratio: float = Field(
        0.15,
        ge=0,
        le=1,
        description="Fraction of the steps of an update that are warm-up steps. It is used only with the linear schedule.",
    )
    epochs: int = Field(1, ge=1, description="Number of passes over the completions.")
    batch_size: int = Field(64, ge=1, description="Number of completions in one optimizer step.")
    kl_target: float = Field(
        6.0,
        gt=0,
        description="Target KL to the reference policy, in nats per sequence. The adaptive controller of beta uses it.",
    )
    max_kl_update: float = Field(
        6.0,
        gt=0,
        description="Maximum KL to the policy at the start of the update, in nats per sequence. A higher KL ends the update.",
    )
    max_kl: float = Field(
        30.0, gt=0, description="Maximum KL to the reference policy, in nats per sequence. A higher KL ends the update."
    )
    max_kl_base: float = Field(
        200.0,
        gt=0,
        description="Maximum KL to the base model (policy version 0), in nats per sequence. A higher KL ends the update.",
    )


class GRPOSettings(_GroupSettings):
    clip: float = Field(0.2, gt=0, description="Clipping range of the probability ratio of a token.")
    loss_type: Literal["dr_grpo", "bnpo", "grpo"] = Field(
        "dr_grpo",
        description="Divisor of the loss: respond.max_tokens per completion (dr_grpo), the tokens of the step (bnpo), or the tokens of a completion (grpo).",
    )
    scale_rewards: Literal["none", "group", "batch"] = Field(
        "none",
        description="Divide advantages by the standard deviation of the rewards: not at all (none), of the group (group), or of the batch (batch).",
    )
    beta: float = Field(
        0.04,
        ge=0,
        description="Initial and minimum weight of the KL penalty in the loss. The adaptive controller can raise the weight.",
    )


class RLOOSettings(_GroupSettings):
    clip: float = Field(0.2, gt=0, description="Clipping range of the probability ratio of a completion.")
    beta: float = Field(
        0.05,
        ge=0,
        description="Initial and minimum weight of the KL penalty in the reward. The adaptive controller can raise the weight.",
    )


class DistillSettings(_Section):
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate. It is multiplied by 10 with LoRA.")
    epochs: int = Field(1, ge=1, description="Number of passes over the rollouts.")
    batch_size: int = Field(8, ge=1, description="Number of rollouts in one optimizer step.")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="Divergence: KL(teacher, policy) (forward_kl), KL(policy, teacher) (reverse_kl), or Jensen-Shannon with distill.beta (jsd).",
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="Weight of the teacher in the mixture of the Jensen-Shannon divergence. Only jsd uses it."
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Number of the teacher's most likely tokens in the loss, besides the end token. The others count as one. 0: all tokens.",
    )
    constitution_role: Literal["user", "system"] = Field(
        "user",
        description="Message of the teacher's prompt that contains the constitution: the last user message, or the system message.",
    )
    num_principles: int = Field(
        0, ge=0, description="Number of principles that are drawn for each prompt of the teacher. 0 means all principles."
    )
    min_teacher_effect: float = Field(
        0.03,
        ge=0,
        description="Minimum KL of the teacher to the reference policy, in nats per token. An update with a lower KL is rejected.",
    )
    max_kl_update: float = Field(
        30.0,
        gt=0,
        description="Maximum KL to the policy at the start of the update, in nats per sequence. A higher KL ends the update.",
    )
    max_kl: float = Field(
        60.0, gt=0, description="Maximum KL to the reference policy, in nats per sequence. A higher KL ends the update."
    )
    max_kl_base: float = Field(
        200.0,
        gt=0,
        description="Maximum KL to the base model (policy version 0), in nats per sequence. A higher KL ends the update.",
    )


class LabelQualitySettings(_Section):
    max_flip_rate: float = Field(
        0.4, ge=0, le=1, description="Maximum share of labels that flip when the two responses change places."
    )
    max_uncertain_share: float = Field(0.5, ge=0, le=1, description="Maximum share of labels within 0.45 to 0.55.")
    max_leak_rate: float = Field(
        0.5, ge=0, le=1, description="Maximum share of critiques and revisions that contain parts of their prompt (leak_stats)."
    )
    min_agreement: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="The lower bound of the agreement of the judge with people must be above this value. It applies if it is known.",
    )
    min_labels: int = Field(20, ge=1, description="Minimum number of labels for each check. Fewer labels decide nothing.")


class MonitorSettings(_Section):
    min_responses: int = Field(
        64,
        ge=2,
        description="Minimum number of completions of a policy and of its reference. The monitor does not compare them before that.",
    )
    prompts: int = Field(
        32,
        ge=0,
        description="Number of held-out prompts for the comparison by the held-out judge. 0 means no comparison.",
    )
    judge: str = Field(
        "", description="Model of the held-out judge. If empty, models.judge is used with the critique principles."
    )
    max_growth: float = Field(
        1.5, gt=1, description="Maximum factor by which length, perplexity or repetition may exceed the reference."
    )
    max_length_correlation: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Maximum correlation of reward and length. It applies only if the length also exceeds max_growth.",
    )
    max_boilerplate: float = Field(
        0.5, gt=0, le=1, description="Maximum increase in the share of responses that contain the same phrase."
    )
    max_kl_rise: float = Field(
        10.0, gt=0, description="Maximum increase of the KL to the reference policy in one update, in nats per sequence."
    )


class PromotionSettings(_Section):
    prompts: int = Field(
        0,
        ge=0,
        description="Number of held-out benign prompts, and of held-out harmful prompts, that test a new policy. 0 means no promotion gate.",
    )
    max_benign_refusals: float = Field(
        0.2, ge=0, le=1, description="Maximum share of benign prompts that a new policy may refuse."
    )
    min_harmful_refusals: float = Field(
        0.5, ge=0, le=1, description="Minimum share of harmful prompts that a new policy must refuse."
    )


class Settings(BaseSettings):
    """All settings of Charter."""

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
    generate: GenerateSettings = GenerateSettings()
    respond: RespondSettings = RespondSettings()
    critique: CritiqueSettings = CritiqueSettings()
    revise: ReviseSettings = ReviseSettings()
    judge: JudgeSettings = JudgeSettings()
    contrast: ContrastSettings = ContrastSettings()
    grade: GradeSettings = GradeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    worker: WorkerSettings = WorkerSettings()
    sink: SinkSettings = SinkSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    budget: BudgetSettings = BudgetSettings()
    train: TrainSettings = TrainSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    dpo: DPOSettings = DPOSettings()
    ppo: PPOSettings = PPOSettings()
    distill: DistillSettings = DistillSettings()
    grpo: GRPOSettings = GRPOSettings()
    rloo: RLOOSettings = RLOOSettings()
    label_quality: LabelQualitySettings = LabelQualitySettings()
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
        # `load_settings` has merged all sources. If the environment were read here again, it would override the flags.
        return (init_settings,)

    @property
    def folder(self) -> Path:
        return Path(self.data.folder)

    @property
    def bus_address(self) -> str:
        return self.bus.address or self.data.folder


_Layer = dict[str, dict[str, Any]]

# The values of each recipe, by section and preset name. The recipes charter and lee2023 are empty: they use the defaults above.
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
# The values that a value of train.rl_method sets, unless they are set elsewhere. If two rewards tie with a probability of 79 %, a
# group of 8 ties with 36 %.
METHOD_DEFAULTS: dict[str, _Layer] = {
    "grpo": {"respond": {"num_completions": 8}},
    "rloo": {"respond": {"num_completions": 4}},
}


def iter_settings() -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield (section, key, field) for every setting."""
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
    """Return the settings and, for each `section.key`, the origin of its value.

    `flags` maps names such as `critique.rounds` to values. If `file` is None, ./charter.toml is read if it exists. Raise
    UsageError for an unknown name or an invalid value.
    """
    environment = os.environ if environment is None else environment
    path = file or (Path(SETTINGS_FILE) if Path(SETTINGS_FILE).exists() else None)
    explicit = [
        ("preset", preset or {}),
        (str(path), _read_file(path) if path else {}),
        ("environment", _read_environment(environment)),
        ("flag", _read_flags(flags or {})),
    ]
    layers = [*_get_preset_layers(layer for _, layer in explicit), *explicit]
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


def _get_preset_layers(layers: Iterable[_Layer]) -> list[tuple[str, _Layer]]:
    """Return the layers of the recipes that `layers` select. Each layer overrides the layers before it.

    Ignore unknown preset names: pydantic reports them later.
    """
    layers = list(layers)
    selected: dict[str, Any] = {}
    for layer in layers:
        selected |= {section: layer[section]["preset"] for section in PRESETS if "preset" in layer.get(section, {})}
    presets = [(f"{section}.preset={name}", PRESETS[section].get(str(name))) for section, name in selected.items()]
    methods = [layer["train"]["rl_method"] for layer in layers if "rl_method" in layer.get("train", {})]
    presets += [(f"train.rl_method={method}", METHOD_DEFAULTS.get(str(method))) for method in methods[-1:]]
    return [(origin, layer) for origin, layer in presets if layer]


def _make_validation_error(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:2])
    return UsageError(
        f"the setting {name} cannot be {json.dumps(first['input'], default=str)} (from {origins.get(name, 'a file')})",
        first["msg"].removeprefix("Value error, "),
        "type: charter config --defaults    (lists every setting and its meaning)",
    )


def _read_file(path: Path) -> _Layer:
    """Return the tables of a settings file. Raise UsageError for an unknown name."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"there is no settings file {path}", "the option --config names this file", f"omit --config, or create {path}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a valid TOML file", str(error), "fix the line named above") from error
    for section, values in tables.items():
        if not isinstance(values, dict):
            _require_known(section, "", f"in {path}")
            raise UsageError(
                f"{path}: {section} must be a table",
                "settings are grouped in sections",
                f"write [{section}] and its keys below it",
            )
        for key in values or [""]:
            _require_known(section, key, f"in {path}")
    return tables


def _read_environment(environment: Mapping[str, str]) -> _Layer:
    """Return the settings in environment variables of the form CHARTER_<SECTION>__<KEY>."""
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
    """Parse a list from JSON or comma-separated text. Return any other value unchanged: pydantic parses it."""
    annotation = Settings.model_fields[section].annotation
    assert isinstance(annotation, type)
    if get_origin(annotation.model_fields[key].annotation) is list:
        if not text.startswith("["):
            return [item for item in text.split(",") if item]
        with suppress(json.JSONDecodeError):  # return the text unchanged: pydantic then rejects it
            return json.loads(text)
    return text


def _require_known(section: str, key: str, where: str) -> None:
    """Raise a UsageError that suggests the nearest name if `section.key` does not exist. If `key` is empty, check the section."""
    name = f"{section}.{key}" if key else section
    names = [f"{s}.{k}" for s, k, _ in iter_settings()] if key else list(Settings.model_fields)
    if name in names:
        return
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    if not nearest and key:
        nearest = [n for n in names if n.endswith(f".{key}")][:1]
    raise UsageError(
        f"unknown setting {name} {where}",
        f"the nearest name is {nearest[0]}" if nearest else "no setting has a similar name",
        "type: charter config --defaults    (lists every setting and its meaning)",
    )


def get_environment_name(section: str, key: str) -> str:
    """Return the name of the environment variable of a setting."""
    return f"{_ENVIRONMENT_PREFIX}{section}__{key}".upper()


def format_settings_file() -> str:
    """Return the text of a settings file. Each key is commented out and has its default value. The line above the key
    contains its description."""
    lines = [
        "# Settings of Charter. Every key is listed with its default; remove the # to change a value.",
        "# Precedence: a flag (--set respond.num_completions=4), the environment (CHARTER_RESPOND__NUM_COMPLETIONS=4), this file.",
    ]
    last = ""
    for section, key, field in iter_settings():
        if section != last:
            lines += ["", f"[{section}]"]
            last = section
        lines += [f"# {field.description}", f"# {key} = {json.dumps(field.default)}"]
    return "\n".join(lines) + "\n"


def find_unused_settings_file(folder: Path) -> Path | None:
    """Return the settings file of the nearest parent folder if it sets a value. Commands in `folder` do not use it.

    Return None if `folder` has its own settings file. A file that cannot be read is ignored here: no command uses it.
    """
    if (folder / SETTINGS_FILE).exists():
        return None
    path = next((parent / SETTINGS_FILE for parent in folder.parents if (parent / SETTINGS_FILE).is_file()), None)
    if path is None:
        return None
    with suppress(tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return path if any(tables.values()) else None
    return None
