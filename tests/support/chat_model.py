"""A tiny local model over single characters, with marks of reasoning as tokens, that writes a given text."""

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.models.local import LocalModel

SPECIAL_TOKENS = ("<|end|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "[THINK]", "[/THINK]")
ORDINARY_TOKENS = ("<think>", "</think>")


def make_chat_model(folder):
    """Return a local model whose weights are random."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ORDINARY_TOKENS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|return|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template="{{ messages }}",
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return LocalModel(folder, dtype=torch.float32)


def script_completion(model, monkeypatch, text):
    """Let the model write a text and its end token after every prompt. Return the token ids."""
    ids = [*model.tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]

    def choose(active, step, uniforms, temperature, top_p):
        lengths = [len(row.token_ids) + step for row in active.rows]  # a finished row may wait for its removal
        return torch.tensor([ids[min(length, len(ids) - 1)] for length in lengths]), torch.full((len(lengths),), -0.5)

    monkeypatch.setattr(model, "choose_tokens", choose)
    return ids
