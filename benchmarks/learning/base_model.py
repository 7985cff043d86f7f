"""Train the base model, a Llama of 1.4 million parameters, on dialogues in the language of `benchmarks.learning.language`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.learning.language import ToyQuestion, generate_questions, write_response

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
_VOCAB_SIZE = 768


def _train_tokenizer(texts: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=_SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": _SPECIAL_TOKENS[1:]})
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _build_model(seed: int, hidden_size: int, num_layers: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE, hidden_size=hidden_size, intermediate_size=hidden_size * 14 // 5, num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 32, max_position_embeddings=1024, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _generate_dialogues(seed: int, questions: Iterator[ToyQuestion]) -> Iterator[str]:
    rng = random.Random(f"dialogues/{seed}")
    for question in questions:
        yield f"<|user|>{question.text}<|end|><|assistant|>{write_response(question, rng)}<|end|>"


def train_base_model(
    folder: Path,
    seed: int = 0,
    steps: int = 400,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    hidden_size: int = 160,
    num_layers: int = 4,
) -> float:
    """Train and save the base model. Return the mean loss of the last 20 steps (nats per token)."""
    stream = _generate_dialogues(seed, _repeat_questions(seed))
    tokenizer, model = _train_tokenizer(list(islice(stream, 2000))), _build_model(seed, hidden_size, num_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        encoded = tokenizer(list(islice(stream, batch_size)), padding=True, add_special_tokens=False, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(losses[-20:]) / 20


def _repeat_questions(seed: int) -> Iterator[ToyQuestion]:
    """Yield training questions without end. They are sampled from 3000 questions, with replacement."""
    questions = list(islice(generate_questions(10_000 + seed), 3000))
    rng = random.Random(f"recurring/{seed}")
    while True:
        yield rng.choice(questions)
