"""Loading weights for training, LoRA around them, and saving them for serving.

Master weights are fp32: at PPO's learning rate AdamW in pure bf16 changed 0.4 % of SmolLM2's weights in two steps. What is
saved is one whole folder of fp32 safetensors in every case: adapters are merged in fp32 first, so that whoever serves a
checkpoint needs nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# The caller shows one line a step. A fresh scorer's missing head is no news either: we set it ourselves.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
datasets.disable_progress_bars()

LORA_SPEEDUP = 10.0  # adapters start at zero and are few: they take ten times the learning rate


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from safetensors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return model.to(device())


def load_scorer(folder: Path) -> Any:
    """A model with one number as its output; a fresh head starts at zero, so that every text begins with the same score."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if any("score" in key for key in info["missing_keys"]):
        torch.nn.init.zeros_(model.score.weight)
    return model.to(device())


def with_lora(model: Any, rank: int, task: str, keep: Sequence[str] = ()) -> Any:
    """Adapters of this rank on every linear layer; `keep` names whole modules that are trained too. Rank 0: the model."""
    if not rank:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task, modules_to_save=list(keep) or None
    )
    return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """The whole model, adapters merged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def saver(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """A function that saves the merged model and its tokenizer into a folder."""

    def save(folder: Path) -> None:
        merged(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save


@contextmanager
def autocast() -> Iterator[None]:
    """bf16 where it pays; weights and their updates stay fp32."""
    with torch.autocast(device(), dtype=torch.bfloat16):
        yield


def unused_id(sequences: Iterable[Sequence[int]], vocabulary: int) -> int:
    """A token id that occurs in none of the sequences, to pad with.

    transformers pools a classifier at the last token that is not padding; SmolLM2 pads with its end token, and the real end
    of a text would be taken for padding.
    """
    used = {token for sequence in sequences for token in sequence}
    return next(token for token in range(vocabulary - 1, -1, -1) if token not in used)
