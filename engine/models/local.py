"""Local models through transformers: batched sampling, and option scores in one forward pass that computes shared text once.

Weights load from safetensors (or the packaged GGUF, converted once), never from pickles and never with remote code. Batches
are sorted by length and bounded in rows; a prompt's keys and values are computed once for all of its samples; rows that have
ended leave the batch. The decode loop is our own because `model.generate` keeps every step's whole logits to give
log-probabilities back: (steps, rows, vocabulary) floats.

Each row draws one uniform number per step from a generator of its own and takes the token at that point of the cumulated
distribution, so a row's sample does not depend on the rows beside it, up to rounding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from engine.checkpoints import compute_revision
from engine.errors import PermanentRecordError, UsageError
from engine.models import resolve_model_folder, smollm2
from engine.models.chat_template import DIALOGUE_MARKER, encode_prompt
from engine.models.interface import LOCAL_CAPABILITIES, Generation, GenerationRequest, OptionScores, Usage
from engine.models.prefix_tree import PrefixTree, build_prefix_trees
from engine.models.tree_attention import build_branches, supports_tree_attention, use_tree_attention

# Our own output is the progress of the stream; a bar for each loading would tear it apart.
transformers.utils.logging.disable_progress_bar()

_MAX_PREFILL_TOKENS = 16_384  # rows times length in one forward pass: bounds the memory of a batch
_MAX_TREE_TOKENS = 4096  # in one tree of prompts: longer ones share more, and hold more memory
_MAX_MASKED_TREE_TOKENS = 1024  # the same, where a processor computes attention also to what a token does not see
_MAX_MARKER_TOKENS = 16  # so many tokens hold what begins a message of the plain format, however a tokenizer cuts it
_COMPACTION_FRACTION = 0.25  # drop finished rows from the batch once they are this share of it


def open_local(spec: str, *, threads: int = 2, max_batch_size: int = 32) -> LocalModel:
    """The packaged model, a folder, or a hub id."""
    folder = resolve_model_folder(spec)
    name = smollm2.MODEL_NAME if spec == "smollm2" else (spec if not Path(spec).is_dir() else folder.name)
    return LocalModel(folder, name=name, threads=threads, max_batch_size=max_batch_size)


def _check_weights(folder: Path) -> None:
    """Refuse a folder without a configuration or whose weights are pickles."""
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise UsageError(f"{folder} is no model", "it has no config.json", "give the folder that save_pretrained wrote")
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} has no safetensors",
            "weights in other formats can run code when they are loaded, so they are not",
            "convert them: model.save_pretrained(FOLDER, safe_serialization=True)",
        )


def _choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_weights(folder: Path, device: str) -> Any:
    """The model in bf16 (on the processors that we know, bf16 decodes faster than fp32 and holds half the memory)."""
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        adapted = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return adapted.merge_and_unload().to(device=device, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False)
    return model.to(device)


@dataclass
class SampledSequence:
    """One sequence that is being sampled."""

    request_index: int
    rng: random.Random
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_finished: bool = False
    timed_out: bool = False


class LocalModel:
    """A causal language model in this process; one thread uses it at a time."""

    capabilities = LOCAL_CAPABILITIES

    def __init__(
        self, folder: Path, *, name: str = "", threads: int = 2, max_batch_size: int = 32, dtype: torch.dtype | None = None
    ) -> None:
        _check_weights(folder)
        torch.set_num_threads(threads)
        self.id, self.folder, self.max_batch_size = name or folder.name, folder, max_batch_size
        self.revision = compute_revision(folder)
        self.device = _choose_device()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = _load_weights(folder, self.device).eval()
        if dtype is not None:
            self.model = self.model.to(dtype)
        self.context_length = int(AutoConfig.from_pretrained(folder).max_position_embeddings)
        self.stop_token_ids = self.get_stop_token_ids()

    def get_stop_token_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        return {int(end) for end in (*listed, self.tokenizer.eos_token_id) if end is not None}

    # The port

    @torch.inference_mode()
    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        prompts = [self.encode_request(ask, max_tokens) for ask in batch]
        results: list[list[Generation]] = [[] for _ in batch]
        for chunk in self.batch_by_length(prompts, rows_per_prompt=num_completions, max_new_tokens=max_tokens):
            rows = self.sample_batch(chunk, batch, prompts, num_completions, temperature, top_p, max_tokens)
            for row in rows:
                results[row.request_index].append(self.make_generation(row, prompts[row.request_index]))
        return results

    @torch.inference_mode()
    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        prompts = [self.encode_request(ask, 1) for ask in batch]
        results: list[OptionScores | None] = [None] * len(batch)
        for tree in self.build_trees(prompts):
            logprobs = torch.log_softmax(self.compute_end_logits(tree).float(), dim=-1)
            for row, (i, shared) in enumerate(zip(tree.prompt_indices, tree.num_shared_tokens, strict=True)):
                scored = self.compute_option_scores(logprobs[row], options, batch[i].prefill)
                results[i] = replace(scored, usage=Usage(len(prompts[i]), 0, shared))
        return [result for result in results if result is not None]

    def build_trees(self, prompts: Sequence[Sequence[int]]) -> list[PrefixTree]:
        """The prompts in as many passes as needed; one for each where the model cannot be told what a token may see."""
        if not self.supports_custom_mask:
            return [tree for prompt in enumerate(prompts) for tree in _build_single_tree(*prompt)]
        most = _MAX_TREE_TOKENS if self.uses_tree_attention or self.device == "cuda" else _MAX_MASKED_TREE_TOKENS
        return build_prefix_trees(prompts, min(self.context_length, most))

    @property
    def supports_custom_mask(self) -> bool:
        """Whether a mask of our own replaces the model's: not where some layers have a window or a state of their own."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        attention = getattr(config, "_attn_implementation", "sdpa")
        return kinds == {"full_attention"} and not windowed and attention in ("sdpa", "eager")

    @property
    def uses_tree_attention(self) -> bool:
        """Whether attention goes branch by branch: on a GPU one kernel over the whole tree is faster than many small ones."""
        return self.device == "cpu" and self.model.config._attn_implementation == "sdpa" and supports_tree_attention(self.model)

    def compute_end_logits(self, tree: PrefixTree) -> torch.Tensor:
        """Logits at the end of each of the tree's prompts (P, V)."""
        # A single prompt is an ordinary sequence, for models whose own mask must stay.
        told: dict[str, Any] = (
            {"attention_mask": self.make_attention_mask(tree.make_visibility_mask())} if len(tree.prompt_indices) > 1 else {}
        )
        if told and self.uses_tree_attention:
            told["branches"] = build_branches(tree, told["attention_mask"])
        with _use_fp32_lm_head(self.model), use_tree_attention(self.model, "branches" in told):
            out = self.model(
                input_ids=torch.tensor([tree.token_ids], device=self.device),
                position_ids=torch.tensor([tree.position_ids], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(tree.end_indices, device=self.device),
                **told,
            )
        return out.logits[0]

    def make_attention_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """What is added to attention scores (1, 1, N, N): nothing where a token may see, the least there is elsewhere."""
        added = torch.zeros(1, 1, *visible.shape, dtype=self.model.dtype)
        added.masked_fill_(~visible, torch.finfo(added.dtype).min)
        return added.to(self.device)

    # Prompts

    def encode_request(self, request: GenerationRequest, max_tokens: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, request.messages, request.prefill)
        if len(ids) + max_tokens > self.context_length:
            raise PermanentRecordError(
                f"a prompt of {len(ids)} tokens with {max_tokens} to come does not fit",
                f"{self.id} has a context of {self.context_length} tokens",
                "shorten the prompt, or lower respond.max_tokens",
            )
        return ids

    def batch_by_length(
        self, prompts: Sequence[Sequence[int]], *, rows_per_prompt: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Indices of prompts in batches of similar length, longest first (trouble with memory shows at once)."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        chunks: list[list[int]] = []
        for i in order:
            longest = len(prompts[chunks[-1][0]]) if chunks else 0
            full = not chunks or (len(chunks[-1]) + 1) * rows_per_prompt > self.max_batch_size
            if full or (len(chunks[-1]) + 1) * rows_per_prompt * (longest + max_new_tokens) > _MAX_PREFILL_TOKENS:
                chunks.append([])
            chunks[-1].append(i)
        return chunks

    def run_prefill(self, prompts: Sequence[Sequence[int]], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the end of each prompt (B, V) and the attention mask (B, T) of the left-padded batch."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        mask = mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], mask

    # Sampling

    def sample_batch(
        self,
        prompt_indices: Sequence[int],
        batch: Sequence[GenerationRequest],
        prompts: Sequence[Sequence[int]],
        num_completions: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> list[SampledSequence]:
        """Sample every row of one batch to its end."""
        cache = DynamicCache(config=self.model.config)
        logits, mask = self.run_prefill([prompts[i] for i in prompt_indices], cache)
        rows = [
            SampledSequence(i, random.Random(f"{batch[i].seed}/{n}")) for i in prompt_indices for n in range(num_completions)
        ]
        if num_completions > 1:
            cache.batch_repeat_interleave(num_completions)
            logits, mask = logits.repeat_interleave(num_completions, 0), mask.repeat_interleave(num_completions, 0)
        live, positions, began = list(rows), mask.sum(-1), time.monotonic()
        for step in range(max_tokens):
            tokens = self.sample_next_tokens(logits, live, temperature, top_p)
            _stop_timed_out(live, batch, time.monotonic() - began)
            if step + 1 == max_tokens or all(row.is_finished for row in live):
                break
            live, tokens, mask, positions = _drop_finished_rows(cache, live, tokens, mask, positions)
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
            out = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits, positions = out.logits[:, -1], positions + 1
        return rows

    def sample_next_tokens(
        self, logits: torch.Tensor, rows: Sequence[SampledSequence], temperature: float, top_p: float
    ) -> torch.Tensor:
        """Draw the next token of each row (R,), and note it with its log-probability in rows that go on."""
        logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
        if temperature == 0:
            tokens = logprobs.argmax(-1)
        else:
            tokens = sample_inverse_cdf(apply_top_p(logprobs.exp(), top_p), [row.rng.random() for row in rows])
        taken = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
        for row, token, logprob in zip(rows, tokens.tolist(), taken, strict=True):
            if not row.is_finished:
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.is_finished = token in self.stop_token_ids or self.has_dialogue_marker(row)
        return tokens

    def has_dialogue_marker(self, row: SampledSequence) -> bool:
        """Whether a base model has ended its answer and gone on with the dialogue."""
        if self.tokenizer.chat_template:
            return False
        return (
            DIALOGUE_MARKER.search(self.tokenizer.decode(row.token_ids[-_MAX_MARKER_TOKENS:], skip_special_tokens=True))
            is not None
        )

    def make_generation(self, row: SampledSequence, prompt_token_ids: Sequence[int]) -> Generation:
        ended = row.is_finished and not row.timed_out
        ids = row.token_ids[:-1] if ended and row.token_ids[-1] in self.stop_token_ids else row.token_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Generation(
            text=text if self.tokenizer.chat_template else DIALOGUE_MARKER.split(text, 1)[0],
            finish_reason="timeout" if row.timed_out else "stop" if ended else "length",
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            prompt_token_ids=tuple(prompt_token_ids),
        )

    # Options

    def compute_option_scores(self, logprobs: torch.Tensor, options: Sequence[str], prefill: str) -> OptionScores:
        """Sum each option's probability over its single-token variants; `logprobs` is (V,)."""
        sums = [
            float(torch.logsumexp(logprobs[torch.tensor(self.get_option_token_ids(option, prefill))], 0)) for option in options
        ]
        return OptionScores(tuple(sums), float(sum(torch.tensor(sums).exp())))

    def get_option_token_ids(self, option: str, prefill: str) -> list[int]:
        """The token ids that mean this option here: after `(` the bare letter, elsewhere also with a space or `(` before it."""
        before = ("",) if prefill.endswith("(") else ("", " ", "(", " (")
        ids = {
            tuple(self.tokenizer(f"{lead}{option}{tail}", add_special_tokens=False)["input_ids"])
            for lead in before
            for tail in ("", ")")
        }
        single = sorted(token for (token, *rest) in ids if not rest)
        if not single:
            raise UsageError(
                f"the option {option!r} is no single token of {self.id}",
                "its probability could not be read off one position",
                "use one letter for an option",
            )
        return single


def _build_single_tree(prompt_index: int, prompt: Sequence[int]) -> list[PrefixTree]:
    return [replace(tree, prompt_indices=(prompt_index,)) for tree in build_prefix_trees([prompt], len(prompt))]


def _stop_timed_out(rows: Sequence[SampledSequence], batch: Sequence[GenerationRequest], elapsed_s: float) -> None:
    """End the rows that have been written for longer than they may."""
    for row in rows:
        limit = batch[row.request_index].timeout_s
        if not row.is_finished and limit is not None and elapsed_s > limit:
            row.is_finished = row.timed_out = True


@contextmanager
def _use_fp32_lm_head(model: Any) -> Iterator[None]:
    """Compute logits in fp32: bf16 logits near 16 lie 0.125 apart, too coarse for a soft label."""

    def exact(head: torch.nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    hook = model.get_output_embeddings().register_forward_hook(exact)
    try:
        yield
    finally:
        hook.remove()


def apply_top_p(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches `top_p` (R, V)."""
    if top_p >= 1:
        return probabilities
    ordered, index = probabilities.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(-1, index, ordered.masked_fill(outside, 0.0))


def sample_inverse_cdf(probabilities: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """The token of each row at a uniform point of its cumulated distribution (R,)."""
    # Doubles: 50,000 additions in fp32 would be off by more than the rarest tokens weigh.
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    points = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, points, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def _drop_finished_rows(
    cache: DynamicCache, rows: list[SampledSequence], tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> tuple[list[SampledSequence], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take finished rows out of the batch once there are enough of them to pay for the copy."""
    ended = sum(row.is_finished for row in rows)
    if ended < max(1, _COMPACTION_FRACTION * len(rows)):
        return rows, tokens, mask, positions
    keep = torch.tensor([i for i, row in enumerate(rows) if not row.is_finished], device=tokens.device)
    cache.batch_select_indices(keep)
    return [row for row in rows if not row.is_finished], tokens[keep], mask[keep], positions[keep]
