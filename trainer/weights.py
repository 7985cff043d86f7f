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

from engine.checkpoints import MANIFEST_FILENAME, hash_files
from engine.errors import UsageError
from engine.weight_sync import ADAPTER_FOLDER

# The caller shows one line a step. A fresh scorer's missing head is no news either: we set it ourselves.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft still asks for it

LORA_LEARNING_RATE_FACTOR = 10.0  # adapters start at zero and are few: they take ten times the learning rate
RL_FOLDER = "rl"  # the folder beside a policy's merged weights: its adapter and its value head
_ADAPTER_WEIGHTS_FILE, _ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # as peft names them
_REFERENCE_FILE = "reference.json"
_VALUE_HEAD_FILE = "value.safetensors"


@dataclass(frozen=True)
class Hardware:
    """How an update uses the machine: rows in one pass, activations computed twice instead of kept, and the arithmetic."""

    micro_batch_size: int = 4
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    @property
    def bf16(self) -> bool:
        """Whether matrices are multiplied in bf16."""
        return self.precision == "bf16" or (self.precision == "auto" and _supports_bf16())

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """bf16 where it pays; weights and their updates stay fp32."""
        with torch.autocast(_get_device(), dtype=torch.bfloat16, enabled=self.bf16):
            yield


DEFAULT_HARDWARE = Hardware()


def _supports_bf16() -> bool:
    """Whether the GPU, or else the processor, multiplies bf16 in hardware; where it does not, bf16 is slower than fp32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def _get_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Loading


@contextmanager
def _translate_load_errors(folder: Path) -> Iterator[None]:
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
    with _translate_load_errors(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from safetensors; raises UsageError when a weight is missing or cut short."""
    with _translate_load_errors(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    _require_no_missing_weights(folder, info["missing_keys"])
    return model.to(_get_device())


def load_scorer(folder: Path, *, trained: bool = False) -> Any:
    """A model with one number as its output; a fresh head starts at zero, so that every text begins with the same score.

    `trained` says that the folder must hold such a head already.
    """
    with _translate_load_errors(folder):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    fresh = {key for key in info["missing_keys"] if key.startswith("score.")}
    _require_no_missing_weights(folder, info["missing_keys"] if trained else set(info["missing_keys"]) - fresh)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model.to(_get_device())


def _require_no_missing_weights(folder: Path, missing_keys: Iterable[str]) -> None:
    """transformers fills a weight that a folder lacks with noise and goes on; we do not."""
    if names := sorted(missing_keys):
        raise UsageError(
            f"the weights in {folder} cannot be loaded",
            f"{len(names)} of them are missing, {names[0]} among them: the folder is incomplete, or of another architecture",
            "restore the folder from a copy, or name another model (models.policy)",
        )


def require_compatible_models(policy: Path, other: Path, description: str) -> None:
    """Raise UsageError unless `other` (the reference, the reward model) has the policy's architecture and tokenizer."""
    if policy == other:
        return
    with _translate_load_errors(policy):
        ours = AutoConfig.from_pretrained(policy).model_type
    with _translate_load_errors(other):
        theirs = AutoConfig.from_pretrained(other).model_type
    if ours != theirs:
        raise UsageError(
            f"{description} in {other} is a {theirs}, the policy in {policy} a {ours}",
            "they were not made from one model: models.policy was changed in a data folder that has trained already",
            "set models.policy back, or begin a new data folder (--data DIR)",
        )
    if _get_tokenizer_signature(policy) != _get_tokenizer_signature(other):
        raise UsageError(
            f"{description} in {other} and the policy in {policy} have different tokenizers",
            "the same token ids would mean different texts",
            "set models.policy back, or begin a new data folder (--data DIR)",
        )


def _get_tokenizer_signature(folder: Path) -> tuple[object, ...]:
    """What makes two tokenizers the same to us: vocabulary, end token, chat template."""
    tokenizer = load_tokenizer(folder)
    return tokenizer.get_vocab(), tokenizer.eos_token, tokenizer.chat_template


# LoRA


def add_lora(model: Any, rank: int, task_type: str, modules_to_save: Sequence[str] = ()) -> Any:
    """Adapters of this rank on every linear layer; `keep` names whole modules that are trained too. Rank 0: the model."""
    if not rank:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type=task_type,
        modules_to_save=list(modules_to_save) or None,
    )
    return get_peft_model(model, config)


def load_policy_for_rl(policy: Path, reference: Path, rank: int) -> tuple[Any, bool]:
    """The policy to train, and whether it is the reference when its adapter is off.

    An adapter that an earlier update of this RL phase left goes on; its rank then stays what it was until the next SFT.
    """
    if rank and policy == reference:
        return add_lora(load_policy(reference), rank, "CAUSAL_LM"), True
    if rank and has_adapter_for_reference(policy, reference):
        from peft import PeftModel

        with _translate_load_errors(policy / RL_FOLDER):
            return PeftModel.from_pretrained(load_policy(reference), policy / RL_FOLDER, is_trainable=True), True
    # The weights themselves were trained since the reference: a fresh adapter lies on them, and off is not the reference.
    return add_lora(load_policy(policy), rank, "CAUSAL_LM"), False


def has_adapter_for_reference(policy: Path, reference: Path) -> bool:
    """Whether the policy's checkpoint holds an adapter that belongs on this reference."""
    note = policy / RL_FOLDER / _REFERENCE_FILE
    return note.exists() and bool(json.loads(note.read_text())["weights"] == _hash_model_folder(reference))


def _hash_model_folder(folder: Path) -> str:
    """The content hash of a model folder: its checkpoint's, or of the files of a model that is not ours."""
    manifest = folder / MANIFEST_FILENAME
    if manifest.exists():
        return str(json.loads(manifest.read_text())["content_hash"])
    return hash_files(folder)


def has_adapter(model: Any) -> bool:
    return hasattr(model, "merge_and_unload")


def merge_adapter(model: Any) -> Any:
    """The whole model, adapters merged."""
    return model.merge_and_unload() if has_adapter(model) else model


@contextmanager
def disable_adapter(model: Any) -> Iterator[None]:
    """Inside, the model is what it was before its adapter."""
    with model.disable_adapter():
        yield


def prepare_for_training(model: Any, hardware: Hardware) -> Any:
    """Turn dropout off, and have activations computed twice instead of kept, where that is asked for."""
    model.eval()
    if hardware.gradient_checkpointing:
        model.activation_checkpointing_enable()
        if has_adapter(model):
            model.enable_input_require_grads()
        model.train()  # transformers computes activations twice only in training mode
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    return model


# Saving


def make_saver(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """A function that saves the merged model and its tokenizer into a folder."""

    def save(folder: Path) -> None:
        merge_adapter(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save


def make_rl_saver(
    model: Any, tokenizer: Any, value_head_state: dict[str, torch.Tensor] | None, reference: Path | None
) -> Callable[[Path], None]:
    """As `saver`, and into `rl/` what the next RL update goes on from: the value head, and the adapter where it lies on
    `reference` (None: it lies on other weights, and is merged for good)."""
    on = None if reference is None or not has_adapter(model) else _hash_model_folder(reference)

    def save(folder: Path) -> None:
        (folder / RL_FOLDER).mkdir()
        if on is not None:
            save_adapter(model, folder / RL_FOLDER)
            (folder / RL_FOLDER / _REFERENCE_FILE).write_text(json.dumps({"weights": on}))
        if value_head_state is not None:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in value_head_state.items()},
                folder / RL_FOLDER / _VALUE_HEAD_FILE,
            )
        make_saver(model, tokenizer)(folder)

    return save


def save_adapter(model: Any, folder: Path) -> None:
    """Save a model's adapter alone, before it is merged."""
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)


def save_combined_adapter(folder: Path, adapter_folder: Path, start_folder: Path, base_folder: Path) -> None:
    """Put into a checkpoint's `adapter/` all that was learned since the first model's weights, for a server that has those.

    That is the adapter in `delta` beside the one of the checkpoint that it lies on: B1 A1 + B2 A2 = [B1 B2] [A1; A2], so ranks
    add up and nothing is lost. Where a link of the chain was trained with all weights there is no adapter.
    """
    earlier = start_folder / ADAPTER_FOLDER
    if not (adapter_folder / _ADAPTER_WEIGHTS_FILE).exists() or (start_folder != base_folder and not earlier.exists()):
        return
    tensors, config = (
        load_file(adapter_folder / _ADAPTER_WEIGHTS_FILE),
        json.loads((adapter_folder / _ADAPTER_CONFIG_FILE).read_text()),
    )
    if start_folder != base_folder:
        before, old = load_file(earlier / _ADAPTER_WEIGHTS_FILE), json.loads((earlier / _ADAPTER_CONFIG_FILE).read_text())
        tensors = {name: torch.cat([before[name], tensors[name]], dim=0 if ".lora_A." in name else 1) for name in tensors}
        config |= {name: config[name] + old[name] for name in ("r", "lora_alpha")}  # their ratio, the scale, stays 2
    config["base_model_name_or_path"] = None  # a server knows what it serves
    (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
    save_file(tensors, folder / ADAPTER_FOLDER / _ADAPTER_WEIGHTS_FILE)
    (folder / ADAPTER_FOLDER / _ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2))


def load_value_head(policy: Path) -> dict[str, torch.Tensor] | None:
    """The value head that the last PPO update of this RL phase left; None when there is none."""
    file = policy / RL_FOLDER / _VALUE_HEAD_FILE
    if not file.exists():
        return None
    with _translate_load_errors(policy / RL_FOLDER):
        return dict(load_file(file))


def find_unused_token_id(sequences: Iterable[Sequence[int]], vocab_size: int) -> int:
    """A token id that occurs in none of the sequences, to pad with.

    transformers pools a classifier at the last token that is not padding; SmolLM2 pads with its end token, and the real end
    of a text would be taken for padding.
    """
    used = {token for sequence in sequences for token in sequence}
    return next(token for token in range(vocab_size - 1, -1, -1) if token not in used)
