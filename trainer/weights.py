"""Loading weights for training, LoRA around them, and saving them for serving.

Master weights are fp32: at PPO's learning rate AdamW in pure bf16 changed 0.4 % of SmolLM2's weights in two steps. What is
saved is one whole folder of fp32 safetensors in every case: adapters are merged in fp32 first, so that whoever serves a
checkpoint needs nothing beside it.

The RL phase (PPO, DPO) with LoRA. SFT merges its adapter, and the result is the reference of the RL phase. The first RL update
starts with a fresh adapter of zeros on it; each one saves, beside the merged weights, the adapter itself (`rl/`). The next one
takes the reference's weights and that adapter: adapter on is the policy, adapter off the reference, and no second copy of the
weights is ever in memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from engine.checkpoints import MANIFEST, hash_files
from engine.delivery import ADAPTER
from engine.errors import UsageError

# The caller shows one line a step. A fresh scorer's missing head is no news either: we set it ourselves.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft still asks for it

LORA_SPEEDUP = 10.0  # adapters start at zero and are few: they take ten times the learning rate
RL = "rl"  # the folder beside a policy's merged weights: its adapter and its value head
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them
REFERENCE = "reference.json"
VALUE = "value.safetensors"


@dataclass(frozen=True)
class Hardware:
    """How an update uses the machine: rows in one pass, activations computed twice instead of kept, and the arithmetic."""

    micro_rows: int = 4
    checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    @property
    def bf16(self) -> bool:
        """Whether matrices are multiplied in bf16."""
        return self.precision == "bf16" or (self.precision == "auto" and multiplies_bf16())

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """bf16 where it pays; weights and their updates stay fp32."""
        with torch.autocast(device(), dtype=torch.bfloat16, enabled=self.bf16):
            yield


DEFAULT = Hardware()


def multiplies_bf16() -> bool:
    """Whether the GPU, or else the processor, multiplies bf16 in hardware; where it does not, bf16 is slower than fp32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Loading


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn the libraries' many complaints about a folder that is no whole model into one that says what to do."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"the weights in {folder} cannot be loaded",
            reason[0][:200],
            "restore the folder from a copy, or name another model (models.policy)",
        ) from error


def load_tokenizer(folder: Path) -> Any:
    with readable(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from safetensors; raises UsageError when a weight is missing or cut short."""
    with readable(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    refuse_missing(folder, info["missing_keys"])
    return model.to(device())


def load_scorer(folder: Path, *, trained: bool = False) -> Any:
    """A model with one number as its output; a fresh head starts at zero, so that every text begins with the same score.

    `trained` says that the folder must hold such a head already.
    """
    with readable(folder):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    fresh = {key for key in info["missing_keys"] if key.startswith("score.")}
    refuse_missing(folder, info["missing_keys"] if trained else set(info["missing_keys"]) - fresh)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model.to(device())


def refuse_missing(folder: Path, missing: Iterable[str]) -> None:
    """transformers fills a weight that a folder lacks with noise and goes on; we do not."""
    if names := sorted(missing):
        raise UsageError(
            f"the weights in {folder} cannot be loaded",
            f"{len(names)} of them are missing, {names[0]} among them: the folder is incomplete, or of another architecture",
            "restore the folder from a copy, or name another model (models.policy)",
        )


def require_kin(policy: Path, other: Path, what: str) -> None:
    """Raise UsageError unless `other` (the reference, the reward model) has the policy's architecture and tokenizer."""
    if policy == other:
        return
    with readable(policy):
        ours = AutoConfig.from_pretrained(policy).model_type
    with readable(other):
        theirs = AutoConfig.from_pretrained(other).model_type
    if ours != theirs:
        raise UsageError(
            f"{what} in {other} is a {theirs}, the policy in {policy} a {ours}",
            "they were not made from one model: models.policy was changed in a data folder that has trained already",
            "set models.policy back, or begin a new data folder (--data DIR)",
        )
    if tokenizer_of(policy) != tokenizer_of(other):
        raise UsageError(
            f"{what} in {other} and the policy in {policy} have different tokenizers",
            "the same token ids would mean different texts",
            "set models.policy back, or begin a new data folder (--data DIR)",
        )


def tokenizer_of(folder: Path) -> tuple[object, ...]:
    """What makes two tokenizers the same to us: vocabulary, end token, chat template."""
    tokenizer = load_tokenizer(folder)
    return tokenizer.get_vocab(), tokenizer.eos_token, tokenizer.chat_template


# LoRA


def with_lora(model: Any, rank: int, task: str, keep: Sequence[str] = ()) -> Any:
    """Adapters of this rank on every linear layer; `keep` names whole modules that are trained too. Rank 0: the model."""
    if not rank:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task, modules_to_save=list(keep) or None
    )
    return get_peft_model(model, config)


def load_for_rl(policy: Path, reference: Path, rank: int) -> tuple[Any, bool]:
    """The policy to train, and whether it is the reference when its adapter is off.

    An adapter that an earlier update of this RL phase left goes on; its rank then stays what it was until the next SFT.
    """
    if rank and policy == reference:
        return with_lora(load_policy(reference), rank, "CAUSAL_LM"), True
    if rank and adapter_is_on(policy, reference):
        from peft import PeftModel

        with readable(policy / RL):
            return PeftModel.from_pretrained(load_policy(reference), policy / RL, is_trainable=True), True
    # The weights themselves were trained since the reference: a fresh adapter lies on them, and off is not the reference.
    return with_lora(load_policy(policy), rank, "CAUSAL_LM"), False


def adapter_is_on(policy: Path, reference: Path) -> bool:
    """Whether the policy's checkpoint holds an adapter that belongs on this reference."""
    note = policy / RL / REFERENCE
    return note.exists() and bool(json.loads(note.read_text())["weights"] == fingerprint(reference))


def fingerprint(folder: Path) -> str:
    """The content hash of a model folder: its checkpoint's, or of the files of a model that is not ours."""
    manifest = folder / MANIFEST
    if manifest.exists():
        return str(json.loads(manifest.read_text())["content_hash"])
    return hash_files(folder)


def adapted(model: Any) -> bool:
    return hasattr(model, "merge_and_unload")


def merged(model: Any) -> Any:
    """The whole model, adapters merged."""
    return model.merge_and_unload() if adapted(model) else model


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Inside, the model is what it was before its adapter."""
    with model.disable_adapter():
        yield


def prepare(model: Any, hardware: Hardware) -> Any:
    """Turn dropout off, and have activations computed twice instead of kept, where that is asked for."""
    model.eval()
    if hardware.checkpointing:
        model.activation_checkpointing_enable()
        if adapted(model):
            model.enable_input_require_grads()
        model.train()  # transformers computes activations twice only in training mode
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    return model


# Saving


def saver(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """A function that saves the merged model and its tokenizer into a folder."""

    def save(folder: Path) -> None:
        merged(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save


def rl_saver(
    model: Any, tokenizer: Any, value: dict[str, torch.Tensor] | None, reference: Path | None
) -> Callable[[Path], None]:
    """As `saver`, and into `rl/` what the next RL update goes on from: the value head, and the adapter where it lies on
    `reference` (None: it lies on other weights, and is merged for good)."""
    on = None if reference is None or not adapted(model) else fingerprint(reference)

    def save(folder: Path) -> None:
        (folder / RL).mkdir()
        if on is not None:
            save_delta(model, folder / RL)
            (folder / RL / REFERENCE).write_text(json.dumps({"weights": on}))
        if value is not None:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in value.items()}, folder / RL / VALUE)
        saver(model, tokenizer)(folder)

    return save


def save_delta(model: Any, folder: Path) -> None:
    """Save a model's adapter alone, before it is merged."""
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)


def add_adapter(folder: Path, delta: Path, lies_on: Path, first: Path) -> None:
    """Put into a checkpoint's `adapter/` all that was learned since the first model's weights, for a server that has those.

    That is the adapter in `delta` beside the one of the checkpoint that it lies on: B1 A1 + B2 A2 = [B1 B2] [A1; A2], so ranks
    add up and nothing is lost. Where a link of the chain was trained with all weights there is no adapter.
    """
    earlier = lies_on / ADAPTER
    if not (delta / ADAPTER_WEIGHTS).exists() or (lies_on != first and not earlier.exists()):
        return
    tensors, config = load_file(delta / ADAPTER_WEIGHTS), json.loads((delta / ADAPTER_CONFIG).read_text())
    if lies_on != first:
        before, old = load_file(earlier / ADAPTER_WEIGHTS), json.loads((earlier / ADAPTER_CONFIG).read_text())
        tensors = {name: torch.cat([before[name], tensors[name]], dim=0 if ".lora_A." in name else 1) for name in tensors}
        config |= {name: config[name] + old[name] for name in ("r", "lora_alpha")}  # their ratio, the scale, stays 2
    config["base_model_name_or_path"] = None  # a server knows what it serves
    (folder / ADAPTER).mkdir(exist_ok=True)
    save_file(tensors, folder / ADAPTER / ADAPTER_WEIGHTS)
    (folder / ADAPTER / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))


def load_value(policy: Path) -> dict[str, torch.Tensor] | None:
    """The value head that the last PPO update of this RL phase left; None when there is none."""
    file = policy / RL / VALUE
    if not file.exists():
        return None
    with readable(policy / RL):
        return dict(load_file(file))


def unused_id(sequences: Iterable[Sequence[int]], vocabulary: int) -> int:
    """A token id that occurs in none of the sequences, to pad with.

    transformers pools a classifier at the last token that is not padding; SmolLM2 pads with its end token, and the real end
    of a text would be taken for padding.
    """
    used = {token for sequence in sequences for token in sequence}
    return next(token for token in range(vocabulary - 1, -1, -1) if token not in used)
