"""The shapes of the models, and models with random weights. Nothing is downloaded, and no weights are written to disk.

A shape has the sizes of a published model. The tokenizer is trained on the prompts and constitutions of this repository, so it has
fewer tokens than a shape. Random weights sample every token with nearly the same probability. So a completion is decoded with its
token ids modulo the size of the tokenizer. A model never stops, so that every completion has the full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from engine.models.local import STEPS_PER_CHECK, LocalModel
from engine.models.reasoning import SeparatedText

_ROOT = Path(__file__).parents[2]
_TOKENIZER_SIZE = 4096
_END_TOKEN = "<|end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{{ message.content }}" + _END_TOKEN + "\n{% endfor %}assistant:\n"
)


@dataclass(frozen=True)
class Sizes:
    """How much work one measurement does. Lengths are in tokens.

    `batch_sizes`, `prompt` and `completion` belong to generation. `pairs` are labeled, and the one-by-one judge gets only
    `peer_pairs` of them and writes replies of `reply` tokens. An update makes `steps` steps of `rows` rollouts, in passes of
    `micro_batch` rollouts. The stream gets `stream_prompts` prompts, and each of its texts has `stream_tokens` tokens.
    """

    batch_sizes: tuple[int, ...] = (1, 32, 256)
    prompt: int = 128
    completion: int = 128
    pairs: int = 64
    peer_pairs: int = 2
    reply: int = 148  # what SmolLM2 writes on average as the lesson's judge (docs/performance.md)
    rows: int = 16
    rollout_prompt: int = 128
    rollout_completion: int = 256
    micro_batch: int = 8
    steps: int = 3
    stream_prompts: int = 256
    stream_tokens: int = 107


SMALL_SIZES = Sizes(
    batch_sizes=(1, 4, 8), prompt=16, completion=8, pairs=3, peer_pairs=1, reply=8, rows=4, rollout_prompt=20,
    rollout_completion=8, micro_batch=2, steps=3, stream_prompts=4, stream_tokens=8,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. `time_factor` scales the time limits of the measurements."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool
    time_factor: float = 1.0
    checkpointing: bool = False
    sizes: Sizes = Sizes()

    def to_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads, max_position_embeddings=8192, tie_word_embeddings=self.is_tied,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def describe(self) -> str:
        return f"{self.name} ({self.layers} layers of {self.hidden}, vocabulary {self.vocabulary:,})"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1b", 2048, 8192, 16, 32, 8, 128_256, True),  # Llama 3.2 1B
        Shape("8b", 4096, 14_336, 32, 32, 8, 128_256, False, time_factor=1.8, checkpointing=True),  # Llama 3.1 8B
        Shape("small", 64, 128, 2, 4, 2, 5000, True, sizes=SMALL_SIZES),
    )
}


def get_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the GPU has finished. Without a GPU, do nothing."""
    if get_device() == "cuda":
        torch.cuda.synchronize()


@cache
def _make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = [*_ROOT.glob("producers/prompts/*.jsonl"), *_ROOT.glob("constitutions/*.toml")]
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENIZER_SIZE,
        special_tokens=[_END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in sorted(files)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END_TOKEN, chat_template=_CHAT_TEMPLATE)


def write_model_folder(shape: Shape, folder: Path) -> Path:
    """Write the configuration and the tokenizer of a shape. The folder has no weights."""
    shape.to_config().save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)
    return folder


def build_random_weights(folder: Path, dtype: torch.dtype) -> Any:
    """Return a model with random weights of the configuration in `folder`, on the device."""
    torch.manual_seed(0)
    with torch.device(get_device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.generation_config.eos_token_id = None
    return model


def count_weight_bytes(model: Any) -> int:
    """Return the bytes that one decoding step reads: all weights, but only the rows of an embedding that is not the output layer."""
    embedding = model.get_input_embeddings().weight
    is_read_once = embedding is not model.get_output_embeddings().weight
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return total - is_read_once * embedding.numel() * embedding.element_size()


def count_kv_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token."""
    return 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * dtype.itemsize


class RandomModel(LocalModel):
    """A local model with random weights, which never stops: bf16 on a GPU, fp32 on a CPU.

    The limit of the tokens of a batch is raised, so that batches have `max_batch_size` rows.
    """

    def __init__(self, shape: Shape, folder: Path, *, max_batch_size: int) -> None:
        write_model_folder(shape, folder)
        self.shape, self.folder, self.id, self.revision = shape, folder, f"random {shape.name}", "random"
        self.device = get_device()
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = build_random_weights(folder, self.dtype).eval()
        self.context_length = int(self.model.config.max_position_embeddings)
        self.stop_token_ids = set()
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_size * 1024
        self.steps_per_check = STEPS_PER_CHECK[self.device]

    def decode_completion(self, token_ids: Sequence[int], *, is_open: bool) -> SeparatedText:
        return super().decode_completion([1 + i % (len(self.tokenizer) - 1) for i in token_ids], is_open=is_open)
