"""The base model: a Llama of 1.4 million parameters, trained here on dialogues of `benchmarks.learning.language`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.learning.language import Question, answer, questions

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCABULARY = 768
PAD = 0


def make_tokenizer(texts: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int, width: int, layers: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 14 // 5, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=1024, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dialogues(seed: int, asked: Iterator[Question]) -> Iterator[str]:
    rng = random.Random(f"dialogues/{seed}")
    for question in asked:
        yield f"<|user|>{question.text}<|end|><|assistant|>{answer(question, rng)}<|end|>"


def train_base(
    folder: Path, seed: int = 0, steps: int = 400, rows: int = 64, rate: float = 3e-3, width: int = 160, layers: int = 4
) -> float:
    """Train and save the base model; returns the mean loss of the last 20 steps (nats per token)."""
    stream = dialogues(seed, recurring(seed))
    tokenizer, model = make_tokenizer(list(islice(stream, 2000))), make_model(seed, width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        encoded = tokenizer(list(islice(stream, rows)), padding=True, add_special_tokens=False, return_tensors="pt")
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


def recurring(seed: int) -> Iterator[Question]:
    """Questions to train on, the same ones again after a while."""
    known = list(islice(questions(10_000 + seed), 3000))
    rng = random.Random(f"recurring/{seed}")
    while True:
        yield rng.choice(known)
