"""Load weights for training, add LoRA adapters, and save checkpoints for serving.

Trained weights are in fp32. At PPO's learning rate, AdamW in pure bf16 changed only 0.4 % of SmolLM2's weights in two steps.
Frozen weights under LoRA adapters can be in bf16 (`train.base_dtype`). A checkpoint is always one complete folder of fp32
safetensors. Adapters are merged in fp32 before saving, so a checkpoint can be served without any other files.

The RL phase (PPO, DPO) uses LoRA as follows. SFT merges its adapter. The merged policy is the reference of the RL phase. The
first RL update adds a new adapter of zeros to the reference. Each update saves the adapter itself (`rl/`) next to the merged
weights. The next update loads the weights of the reference and the saved adapter. With the adapter enabled, the model is the
policy. With the adapter disabled, the model is the reference. Memory therefore never holds a second copy of the weights.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from engine.checkpoints import MANIFEST_FILENAME, hash_files
from engine.errors import UsageError
from engine.models.control_tokens import find_end_token_id
from engine.thread_limit import require_thread_limit
from engine.weight_sync import ADAPTER_FOLDER
from trainer import sharding
from trainer.distributed import get_rank

if TYPE_CHECKING:
    from engine.settings import TrainSettings

# The caller prints one line per step, so the libraries print nothing. The libraries would also warn that a new scorer has no
# head, but `load_scorer` initializes the head.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft still reads this attribute
# A new scorer's head gets random values first, and `load_scorer` replaces them.
warnings.filterwarnings("ignore", "DTensor random operators may not", UserWarning)

# Adapters start at zero and have few parameters, so they need ten times the learning rate.
LORA_LEARNING_RATE_FACTOR = 10.0
RL_FOLDER = "rl"  # this folder in a policy's checkpoint holds the adapter and the value head
_ADAPTER_WEIGHTS_FILE, _ADAPTER_CONFIG_FILE = (
    "adapter_model.safetensors",
    "adapter_config.json",
)  # the file names that peft uses
_REFERENCE_FILE = "reference.json"
_VALUE_HEAD_FILE = "value.safetensors"


@dataclass(frozen=True)
class Hardware:
    """These settings define how an update uses the machine.

    The settings are the number of rows per pass, whether activations are recomputed to save memory, the precision of matrix
    products, and the type of the frozen weights under LoRA adapters.
    """

    micro_batch_size: int = 4
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    base_dtype: Literal["fp32", "bf16"] = "fp32"

    @classmethod
    def from_settings(cls, settings: TrainSettings) -> Hardware:
        """Return the settings `train.*` that concern the machine."""
        return cls(settings.micro_batch_size, settings.gradient_checkpointing, settings.precision, settings.base_dtype)

    @property
    def bf16(self) -> bool:
        """Return whether matrices are multiplied in bf16. Weights in bf16 are always multiplied in bf16."""
        automatic = self.base_dtype == "bf16" or _supports_bf16()
        return self.precision == "bf16" or (self.precision == "auto" and automatic)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Return the type of the weights that LoRA does not train. The adapters are always fp32."""
        return torch.bfloat16 if self.base_dtype == "bf16" else torch.float32

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in bf16 inside the block if `bf16` is true. Weights and their updates stay in fp32."""
        with torch.autocast(_get_device(), dtype=torch.bfloat16, enabled=self.bf16):
            yield


DEFAULT_HARDWARE = Hardware()


def _supports_bf16() -> bool:
    """Return whether the GPU multiplies bf16 in hardware. Without a GPU, check the CPU.

    Without hardware support, bf16 is slower than fp32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def _get_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Loading


@contextmanager
def _translate_load_errors(folder: Path) -> Iterator[None]:
    """Translate the libraries' errors for an incomplete or damaged model folder into a UsageError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"the weights in {folder} cannot be loaded",
            reason[0][:200],
            "restore the folder from a copy, or set another model (models.policy)",
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer. Raise UsageError when the folder does not contain a tokenizer."""
    with _translate_load_errors(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model from safetensors. Raise UsageError when a weight is missing or truncated."""
    return _move_to_device(_read_policy(folder, dtype, sharding.load_model))


def _read_policy(folder: Path, dtype: torch.dtype, load: Callable[..., Any]) -> Any:
    require_thread_limit(torch.get_num_threads())
    with _translate_load_errors(folder):
        model, info = load(
            AutoModelForCausalLM, folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    _require_no_missing_weights(folder, info["missing_keys"])
    return model


def load_scorer(folder: Path, *, trained: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model that outputs one score. A missing head is initialized with zeros.

    With a head of zeros, every response has the same score. If `trained` is true, a missing head raises UsageError.
    """
    return _move_to_device(_read_scorer(folder, dtype, sharding.load_model, trained=trained))


def _read_scorer(folder: Path, dtype: torch.dtype, load: Callable[..., Any], *, trained: bool = False) -> Any:
    require_thread_limit(torch.get_num_threads())
    with _translate_load_errors(folder):
        model, info = load(
            AutoModelForSequenceClassification,
            folder,
            num_labels=1,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    fresh = {key for key in info["missing_keys"] if key.startswith("score.")}
    _require_no_missing_weights(folder, info["missing_keys"] if trained else set(info["missing_keys"]) - fresh)
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model


def _move_to_device(model: Any) -> Any:
    """Move a model to the GPU, if there is one. The parts of a sharded model are already there."""
    return model if sharding.is_sharded(model) else model.to(_get_device())


def _require_no_missing_weights(folder: Path, missing_keys: Iterable[str]) -> None:
    """Raise UsageError when weights are missing in the folder.

    Without this check, transformers would fill the missing weights with random values and continue.
    """
    if names := sorted(missing_keys):
        raise UsageError(
            f"the weights in {folder} cannot be loaded",
            f"{len(names)} of them are missing, for example {names[0]}. The folder is incomplete, or its model has another architecture",
            "restore the folder from a copy, or set another model (models.policy)",
        )


def require_compatible_models(policy: Path, other: Path, description: str) -> None:
    """Raise UsageError if the architecture or the tokenizer of `other` differs from the policy's.

    `other` is the folder of the reference or of the reward model.
    """
    if policy == other:
        return
    with _translate_load_errors(policy):
        ours = AutoConfig.from_pretrained(policy).model_type
    with _translate_load_errors(other):
        theirs = AutoConfig.from_pretrained(other).model_type
    if ours != theirs:
        raise UsageError(
            f"{description} in {other} is a {theirs} model, but the policy in {policy} is a {ours} model",
            "both must come from the same model, but models.policy was changed after training had started in this data folder",
            "set models.policy back, or start a new data folder (--data DIR)",
        )
    if _get_tokenizer_signature(policy) != _get_tokenizer_signature(other):
        raise UsageError(
            f"{description} in {other} and the policy in {policy} have different tokenizers",
            "the same token ids have different meanings for the two models",
            "set models.policy back, or start a new data folder (--data DIR)",
        )


def _get_tokenizer_signature(folder: Path) -> tuple[object, ...]:
    """Return the vocabulary, the end token and the chat template of a tokenizer.

    Two tokenizers are interchangeable if all three are equal.
    """
    tokenizer = load_tokenizer(folder)
    return tokenizer.get_vocab(), tokenizer.eos_token, tokenizer.chat_template


# LoRA


def add_lora(model: Any, rank: int, task_type: str, modules_to_save: Sequence[str] = ()) -> Any:
    """Add adapters of this rank to every linear layer. The modules in `modules_to_save` are trained in full.

    With rank 0, return the unchanged model.
    """
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
    return _prepare_adapter(get_peft_model(model, config))


def _prepare_adapter(model: Any) -> Any:
    """Make the trainable parameters fp32 in a model with adapters. If the base model is sharded, make them complete."""
    base = model.get_base_model()
    if sharding.is_sharded(base):
        sharding.replace_trainable_parts(model)
        model.base_model.forward = base.__call__  # peft would call base.forward, which does not gather weights
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def load_policy_for_rl(policy: Path, reference: Path, rank: int, hardware: Hardware = DEFAULT_HARDWARE) -> tuple[Any, bool]:
    """Load the policy to train. Also return whether the policy with its adapter disabled is the reference.

    If an earlier update of this RL phase saved an adapter, training continues with this adapter. Until the next SFT update, the
    adapter keeps its rank.
    """
    dtype = hardware.weights_dtype if rank else torch.float32
    if rank and policy == reference:
        return add_lora(load_policy(reference, dtype), rank, "CAUSAL_LM"), True
    if rank and has_adapter_for_reference(policy, reference):
        from peft import PeftModel

        with _translate_load_errors(policy / RL_FOLDER):
            model = PeftModel.from_pretrained(load_policy(reference, dtype), policy / RL_FOLDER, is_trainable=True)
        return _prepare_adapter(model), True
    # An update after the reference trained all weights. The policy without the new adapter is therefore not the reference.
    return add_lora(load_policy(policy, dtype), rank, "CAUSAL_LM"), False


def has_adapter_for_reference(policy: Path, reference: Path) -> bool:
    """Return whether the policy's checkpoint holds an adapter that was trained on this reference."""
    note = policy / RL_FOLDER / _REFERENCE_FILE
    return note.exists() and bool(json.loads(note.read_text())["weights"] == _hash_model_folder(reference))


def _hash_model_folder(folder: Path) -> str:
    """Return the content hash of a model folder.

    For a checkpoint, read the hash from its manifest. For a downloaded model, hash the files.
    """
    manifest = folder / MANIFEST_FILENAME
    if manifest.exists():
        return str(json.loads(manifest.read_text())["content_hash"])
    return hash_files(folder)


def has_adapter(model: Any) -> bool:
    """Return whether a model has LoRA adapters."""
    return hasattr(model, "merge_and_unload")


def merge_adapter(model: Any) -> Any:
    """Return the complete model with its adapters merged."""
    return model.merge_and_unload() if has_adapter(model) else model


@contextmanager
def disable_adapter(model: Any) -> Iterator[None]:
    """Disable the adapter inside the block."""
    with model.disable_adapter():
        yield


def prepare_for_training(model: Any, hardware: Hardware) -> Any:
    """Disable dropout. If `hardware.gradient_checkpointing` is true, recompute activations in the backward pass."""
    model.eval()
    if hardware.gradient_checkpointing:
        model.activation_checkpointing_enable()
        if has_adapter(model):
            model.enable_input_require_grads()
        model.train()  # transformers recomputes activations only in training mode
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    return model


# Saving


def gather_model(model: Any) -> Any:
    """Return a trained model for saving: complete, and with fp32 weights. All processes of a learner call this function.

    An adapter is put on weights that are read again, because a merge into bf16 weights would lose small steps. The result of a
    sharded model is on the CPU of the main process. The other processes get the model that they have.
    """
    base = model.get_base_model() if has_adapter(model) else model
    if not sharding.is_sharded(base) and base.dtype == torch.float32:
        return model
    sharding.release_gathered_weights(base)
    if has_adapter(model):
        return model if get_rank() else _read_with_adapter(model, base)
    state = sharding.gather_state(base)
    if get_rank():
        return model
    config = copy.deepcopy(base.config)
    del config.distributed_config
    with torch.device("meta"):
        complete = type(base)(config)
    complete.load_state_dict(state, assign=True)
    complete.tie_weights()
    if base.can_generate():
        complete.generation_config = base.generation_config
    return complete


def _read_with_adapter(model: Any, base: Any) -> Any:
    """Return the adapter of a model on complete fp32 weights that are read from the folder of its base model."""
    from peft import PeftModel

    folder = Path(base.name_or_path)
    read = _read_policy if base.can_generate() else _read_scorer
    # With the weights of the base model, peft would gather them from all processes.
    adapter = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with tempfile.TemporaryDirectory() as adapter_folder:
        model.save_pretrained(adapter_folder, selected_adapters=["default"], state_dict=adapter)
        complete = read(folder, torch.float32, lambda auto_class, *a, **named: auto_class.from_pretrained(*a, **named))
        return PeftModel.from_pretrained(complete, adapter_folder)


def make_saver(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """Return a function that saves the merged model and its tokenizer into a folder."""

    def save(folder: Path) -> None:
        merged = merge_adapter(model)
        if merged.can_generate():  # a reward model has no generation configuration
            _add_stop_token(merged, find_end_token_id(tokenizer))
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save


def _add_stop_token(model: Any, token_id: int | None) -> None:
    """Add a token to the end tokens of the generation configuration, so that a server stops where training ends a message."""
    eos = model.generation_config.eos_token_id
    stop_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if token_id is not None and token_id not in stop_ids:
        model.generation_config.eos_token_id = [*stop_ids, token_id]


def make_rl_saver(
    model: Any, tokenizer: Any, value_head_state: dict[str, torch.Tensor] | None, reference: Path | None
) -> Callable[[Path], None]:
    """Return a function that saves the merged model. In `rl/`, the function also saves what the next RL update needs.

    The folder `rl/` gets the value head. If the adapter belongs to the weights in `reference`, the folder also gets the
    adapter. If `reference` is None, the adapter belongs to other weights and is only merged.
    """
    reference_hash = None if reference is None or not has_adapter(model) else _hash_model_folder(reference)

    def save(folder: Path) -> None:
        (folder / RL_FOLDER).mkdir()
        if reference_hash is not None:
            save_adapter(model, folder / RL_FOLDER)
            (folder / RL_FOLDER / _REFERENCE_FILE).write_text(json.dumps({"weights": reference_hash}))
        if value_head_state is not None:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in value_head_state.items()},
                folder / RL_FOLDER / _VALUE_HEAD_FILE,
            )
        make_saver(model, tokenizer)(folder)

    return save


def save_adapter(model: Any, folder: Path) -> None:
    """Save only the adapter of a model. Call this function before the adapter is merged."""
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)


def save_combined_adapter(folder: Path, adapter_folder: Path, start_folder: Path, base_folder: Path) -> None:
    """Save one adapter for the base model in the `adapter/` folder of a checkpoint. A server with the base model can use it.

    The adapter in `adapter_folder` was trained on the checkpoint in `start_folder`. The adapter is joined with the adapter of
    that checkpoint: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. Ranks add up, and the result is exact. If an earlier update trained all
    weights, no adapter is saved.
    """
    start_adapter = start_folder / ADAPTER_FOLDER
    if not (adapter_folder / _ADAPTER_WEIGHTS_FILE).exists() or (start_folder != base_folder and not start_adapter.exists()):
        return
    tensors, config = _load_adapter(adapter_folder)
    if start_folder != base_folder:
        start_tensors, start_config = _load_adapter(start_adapter)
        tensors = {
            name: torch.cat([start_tensors[name], tensor], dim=0 if ".lora_A." in name else 1)
            for name, tensor in tensors.items()
        }
        config |= {name: config[name] + start_config[name] for name in ("r", "lora_alpha")}  # the scale lora_alpha / r stays 2
    config["base_model_name_or_path"] = None  # the server sets the path
    (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
    save_file(tensors, folder / ADAPTER_FOLDER / _ADAPTER_WEIGHTS_FILE)
    (folder / ADAPTER_FOLDER / _ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _load_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of an adapter by name, and its configuration."""
    return load_file(folder / _ADAPTER_WEIGHTS_FILE), json.loads((folder / _ADAPTER_CONFIG_FILE).read_text())


def load_value_head(policy: Path) -> dict[str, torch.Tensor] | None:
    """Load the value head that the last PPO update of this RL phase saved.

    Return None before the first PPO update.
    """
    file = policy / RL_FOLDER / _VALUE_HEAD_FILE
    if not file.exists():
        return None
    with _translate_load_errors(policy / RL_FOLDER):
        return dict(load_file(file))


def find_unused_token_id(sequences: Iterable[Sequence[int]], vocab_size: int) -> int:
    """Return a token id that is not in the sequences and can be used for padding.

    transformers reads a classifier's score at the last token that is not padding. SmolLM2 uses its end token for padding. With
    that token, the real end token of a response would count as padding.
    """
    used = {token for sequence in sequences for token in sequence}
    return next(token for token in range(vocab_size - 1, -1, -1) if token not in used)
