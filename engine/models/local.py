"""Run local models with transformers: sample in batches, and score options in one forward pass over shared prefixes.

Weights are loaded from safetensors, or from the installed GGUF file, which is converted once. Pickle files and remote code are
never loaded. Prompts are sorted by length, and the number of rows in a batch is limited. The keys and values of a prompt are
computed once for all its completions. Finished rows are removed from the batch, and rows of waiting prompts take their places.

Reasoning and response have separate token limits. The reasoning is separated from the response (engine/models/reasoning.py).

This module has its own decode loop. To return log-probabilities, `model.generate` would keep the logits of every step. These
logits have the size (steps, rows, vocabulary).

Each row has a separate random generator. For each step it samples one uniform number, which selects a token from the cumulative
distribution. So the completion of a row does not depend on the other rows of the batch, except for rounding.

On a GPU, tokens are read only after several steps, because reading makes the GPU wait. Tokens after the end of a row are discarded.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from engine.checkpoints import compute_revision
from engine.errors import CharterError, PermanentRecordError, UsageError
from engine.models import smollm2
from engine.models.chat_template import (
    DIALOGUE_MARKER,
    MAX_MARKER_TOKENS,
    decode_completion,
    encode_prompt,
    find_stop_token_ids,
    opens_reasoning,
)
from engine.models.decode_batch import DecodeBatch, SampledSequence
from engine.models.interface import LOCAL_CAPABILITIES, Generation, GenerationRequest, OptionScores, Result, Usage
from engine.models.prefix_tree import PrefixTree, build_prefix_trees
from engine.models.reasoning import has_closing_mark, has_opening_mark, report_reasoning
from engine.models.tree_attention import build_branches, supports_tree_attention, use_tree_attention
from engine.progress import track_work
from engine.thread_limit import require_thread_limit

# Charter prints its own progress. The progress bars of transformers would disturb this output.
transformers.utils.logging.disable_progress_bar()

_MAX_PREFILL_TOKENS = 16_384  # limit of the number of rows times the length of a batch; this limits the memory
_MAX_TREE_TOKENS = 4096  # limit of the tokens of one prefix tree; larger trees share more tokens but need more memory
_MAX_MASKED_TREE_TOKENS = 1024  # the limit on a CPU without tree attention, because masked scores are then computed as well
STEPS_PER_CHECK = {"cpu": 1, "cuda": 8}  # steps between two checks for the ends of rows


def open_local(spec: str, folder: Path, *, threads: int = 2, max_batch_size: int = 32) -> LocalModel:
    """Load the model in `folder`. `spec` is its setting: smollm2, a folder, or a hub id."""
    name = smollm2.MODEL_NAME if spec == "smollm2" else (spec if not Path(spec).is_dir() else folder.name)
    with track_work(f"loading the model {name}"):
        return LocalModel(folder, name=name, threads=threads, max_batch_size=max_batch_size)


def _check_weights(folder: Path) -> None:
    """Raise UsageError if a folder has no model configuration or no safetensors."""
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{folder} is not a model folder", "the folder has no config.json", "give a folder written by save_pretrained"
        )
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} has no safetensors",
            "weights in other formats can run code when they are loaded, so Charter does not load them",
            "convert the weights: model.save_pretrained(FOLDER, safe_serialization=True)",
        )


def _choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_weights(folder: Path, device: str) -> Any:
    """Load a model in bf16 and merge its LoRA adapter, if it has one.

    On tested hardware, bf16 decodes faster than fp32 and needs half the memory.
    """
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        adapted = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return adapted.merge_and_unload().to(device=device, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False)
    return model.to(device)


@dataclass(frozen=True)
class TokenLimits:
    """The limits of the tokens of a response and of its reasoning. `thinking` is 0 if the model does not think."""

    response: int
    thinking: int = 0

    @property
    def total(self) -> int:
        return self.response + self.thinking


class LocalModel:
    """A causal language model in this process. It is not thread-safe: one thread may use it at a time."""

    capabilities = LOCAL_CAPABILITIES

    def __init__(
        self, folder: Path, *, name: str = "", threads: int = 2, max_batch_size: int = 32, dtype: torch.dtype | None = None
    ) -> None:
        _check_weights(folder)
        torch.set_num_threads(threads)
        require_thread_limit(threads)
        self.id, self.folder, self.max_batch_size = name or folder.name, folder, max_batch_size
        self.revision = compute_revision(folder)
        self.device = _choose_device()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = _load_weights(folder, self.device).eval()
        if dtype is not None:
            self.model = self.model.to(dtype)
        self.context_length = int(AutoConfig.from_pretrained(folder).max_position_embeddings)
        self.max_batch_tokens = _MAX_PREFILL_TOKENS
        self.steps_per_check = STEPS_PER_CHECK[self.device]
        self.stop_token_ids = self.get_stop_token_ids()

    def get_stop_token_ids(self) -> set[int]:
        """Return the end tokens of the generation configuration, the tokenizer and the chat template."""
        eos = self.model.generation_config.eos_token_id
        configured = {int(token_id) for token_id in (eos if isinstance(eos, list) else [eos]) if token_id is not None}
        return configured | find_stop_token_ids(self.tokenizer)

    # The Model interface

    @torch.inference_mode()
    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        max_thinking_tokens: int = 0,
    ) -> list[Result[list[Generation]]]:
        limits = TokenLimits(max_tokens, max_thinking_tokens)
        encoded = self.encode_batch(batch, limits.total, thinking=max_thinking_tokens > 0)
        fitting = [i for i, prompt in enumerate(encoded) if not isinstance(prompt, CharterError)]
        generations = iter(
            self.generate_fitting(
                [batch[i] for i in fitting], _select_prompts(encoded), num_completions, temperature, top_p, limits
            )
        )
        return [prompt if isinstance(prompt, CharterError) else next(generations) for prompt in encoded]

    def generate_fitting(
        self,
        batch: Sequence[GenerationRequest],
        prompts: list[list[int]],
        num_completions: int,
        temperature: float,
        top_p: float,
        limits: TokenLimits,
    ) -> list[list[Generation]]:
        """Sample completions of prompts that fit into the context.

        The longest prompts are first, so that an out-of-memory error occurs early.
        """
        queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        rows: list[SampledSequence] = []
        active: DecodeBatch | None = None
        while queue or active:
            if active is None or (queue and active.accepts_rows):
                active_rows = active.rows if active else []
                if indices := self.take_prompts(queue, prompts, active_rows, num_completions, limits.total):
                    new = self.start_rows(indices, batch, prompts, num_completions, limits)
                    rows += new.rows
                    if active:
                        active.extend(new)
                    else:
                        active = new
            assert active is not None  # a prompt always fits into an empty batch
            tokens = self.sample_tokens(active, batch, temperature, top_p, limits)
            tokens = active.drop_finished(tokens)
            if active.rows:
                active.run_step(self.model, tokens)
            else:
                active = None
        results: list[list[Generation]] = [[] for _ in batch]
        for row in rows:
            results[row.request_index].append(self.make_generation(row, prompts[row.request_index]))
        return results

    @torch.inference_mode()
    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[Result[OptionScores]]:
        encoded = self.encode_batch(batch, 1)
        fitting = [request for request, prompt in zip(batch, encoded, strict=True) if not isinstance(prompt, CharterError)]
        scores = iter(self.score_fitting(fitting, _select_prompts(encoded), options))
        return [prompt if isinstance(prompt, CharterError) else next(scores) for prompt in encoded]

    def score_fitting(
        self, batch: Sequence[GenerationRequest], prompts: list[list[int]], options: Sequence[str]
    ) -> list[OptionScores]:
        """Score the options of prompts that fit into the context."""
        results: list[OptionScores | None] = [None] * len(batch)
        for tree in self.build_trees(prompts):
            logprobs = torch.log_softmax(self.compute_end_logits(tree).float(), dim=-1)
            for row, (i, num_shared) in enumerate(zip(tree.prompt_indices, tree.num_shared_tokens, strict=True)):
                scores = self.compute_option_scores(logprobs[row], options, batch[i].prefill)
                results[i] = replace(scores, usage=Usage(len(prompts[i]), 0, num_shared))
        return [result for result in results if result is not None]

    def build_trees(self, prompts: Sequence[Sequence[int]]) -> list[PrefixTree]:
        """Build the prefix trees of the prompts. Each tree is one forward pass.

        If the model does not support custom masks, each prompt has a separate tree.
        """
        if not self.supports_custom_mask:
            return [tree for i, prompt in enumerate(prompts) for tree in _build_single_tree(i, prompt)]
        is_fast = self.uses_tree_attention or self.device == "cuda"
        max_tokens = _MAX_TREE_TOKENS if is_fast else _MAX_MASKED_TREE_TOKENS
        return build_prefix_trees(prompts, min(self.context_length, max_tokens))

    @property
    def supports_custom_mask(self) -> bool:
        """Whether a custom mask can replace the mask of the model. Sliding windows and recurrent layers do not support this."""
        config = self.model.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        uses_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        attention = getattr(config, "_attn_implementation", "sdpa")
        return layer_types == {"full_attention"} and not uses_window and attention in ("sdpa", "eager")

    @property
    def uses_tree_attention(self) -> bool:
        """Whether to compute attention per branch. On a GPU this is false, because one kernel over the whole tree is faster."""
        return self.device == "cpu" and self.model.config._attn_implementation == "sdpa" and supports_tree_attention(self.model)

    def compute_end_logits(self, tree: PrefixTree) -> torch.Tensor:
        """Return the logits at the end of each prompt of a tree (P, V)."""
        options: dict[str, Any] = {}
        if len(tree.prompt_indices) > 1:  # for a single prompt, use the mask of the model, because some models require it
            options["attention_mask"] = self.make_attention_mask(tree.make_visibility_mask())
        if options and self.uses_tree_attention:
            options["branches"] = build_branches(tree, options["attention_mask"])
        with _use_fp32_lm_head(self.model), use_tree_attention(self.model, "branches" in options):
            out = self.model(
                input_ids=torch.tensor([tree.token_ids], device=self.device),
                position_ids=torch.tensor([tree.position_ids], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(tree.end_indices, device=self.device),
                **options,
            )
        return out.logits[0]

    def make_attention_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Return the additive attention mask (1, 1, N, N): 0 for visible tokens, the smallest finite number for others."""
        mask = torch.zeros(1, 1, *visible.shape, dtype=self.model.dtype)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)
        return mask.to(self.device)

    # Prompts

    def encode_batch(
        self, batch: Sequence[GenerationRequest], max_tokens: int, *, thinking: bool = False
    ) -> list[Result[list[int]]]:
        """Return the token ids of each prompt, or the error of a prompt that cannot be used."""
        return [self.encode_or_fail(request, max_tokens, thinking) for request in batch]

    def encode_or_fail(self, request: GenerationRequest, max_tokens: int, thinking: bool) -> Result[list[int]]:
        try:
            return self.encode_request(request, max_tokens, thinking=thinking)
        except PermanentRecordError as error:
            return error

    def encode_request(self, request: GenerationRequest, max_tokens: int, *, thinking: bool = False) -> list[int]:
        """Return the token ids of a prompt. Raise PermanentRecordError if prompt and completion exceed the context length."""
        ids = encode_prompt(self.tokenizer, request.messages, request.prefill, thinking=thinking)
        if len(ids) + max_tokens > self.context_length:
            raise PermanentRecordError(
                f"a prompt of {len(ids)} tokens and a completion of up to {max_tokens} tokens do not fit the context",
                f"{self.id} has a context length of {self.context_length} tokens",
                "shorten the prompt, or lower max_tokens or max_thinking_tokens of the stage",
            )
        return ids

    def take_prompts(
        self,
        queue: deque[int],
        prompts: Sequence[Sequence[int]],
        rows: Sequence[SampledSequence],
        num_completions: int,
        max_new_tokens: int,
    ) -> list[int]:
        """Remove the first prompts from the queue that fit into a batch with these rows. Return their indices.

        All completions of a prompt begin together. The first prompt always fits into an empty batch.
        """
        indices: list[int] = []
        longest = max((row.num_prompt_tokens for row in rows), default=0)
        while queue:
            longest = max(longest, len(prompts[queue[0]]))
            num_rows = len(rows) + (len(indices) + 1) * num_completions
            is_full = num_rows > self.max_batch_size or num_rows * (longest + max_new_tokens) > self.max_batch_tokens
            if is_full and (rows or indices):
                break
            indices.append(queue.popleft())
        return indices

    def run_prefill(self, prompts: Sequence[Sequence[int]], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the cache. Return the logits at the end of each prompt (B, V) and the mask of the left-padded batch (B, T)."""
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

    def start_rows(
        self,
        prompt_indices: Sequence[int],
        batch: Sequence[GenerationRequest],
        prompts: Sequence[Sequence[int]],
        num_completions: int,
        limits: TokenLimits,
    ) -> DecodeBatch:
        """Compute these prompts. Return the rows of all their completions, before their first token."""
        cache = DynamicCache(config=self.model.config)
        logits, mask = self.run_prefill([prompts[i] for i in prompt_indices], cache)
        if num_completions > 1:
            cache.batch_repeat_interleave(num_completions)
            logits, mask = logits.repeat_interleave(num_completions, 0), mask.repeat_interleave(num_completions, 0)
        started = time.monotonic()
        rows = [
            SampledSequence(
                i,
                random.Random(f"{batch[i].seed}/{n}"),
                len(prompts[i]),
                started,
                is_thinking=limits.thinking > 0 and not batch[i].prefill,
                has_opening=opens_reasoning(self.tokenizer, prompts[i]),
            )
            for i in prompt_indices
            for n in range(num_completions)
        ]
        return DecodeBatch(rows, cache, logits, mask, mask.sum(-1))

    def sample_tokens(
        self,
        active: DecodeBatch,
        batch: Sequence[GenerationRequest],
        temperature: float,
        top_p: float,
        limits: TokenLimits,
    ) -> torch.Tensor:
        """Sample the next tokens of each row, and append them to the unfinished rows. Return the newest tokens (R,).

        The model has not computed the newest tokens yet. No row gets more tokens than the limits allow.
        """
        remaining = min(limits.total - len(row.token_ids) for row in active.rows if not row.is_finished)
        num_steps = min(self.steps_per_check, remaining)
        uniforms = None
        if temperature > 0:
            samples = [[row.rng.random() for _ in range(num_steps)] for row in active.rows]
            uniforms = torch.tensor(samples, dtype=torch.float64, device=self.device)
        tokens: list[torch.Tensor] = []
        logprobs: list[torch.Tensor] = []
        for step in range(num_steps):
            if step:
                active.run_step(self.model, tokens[-1])
            step_uniforms = None if uniforms is None else uniforms[:, step]
            step_tokens, step_logprobs = self.choose_tokens(active, step, step_uniforms, temperature, top_p)
            tokens.append(step_tokens)
            logprobs.append(step_logprobs)
        num_finished = active.num_finished
        for values in zip(torch.stack(tokens).tolist(), torch.stack(logprobs).tolist(), strict=True):
            self.append_tokens(active.rows, *values, limits)
        _stop_timed_out(active.rows, batch)
        if active.num_finished > num_finished:
            active.freeze_finished()
        return tokens[-1]

    def choose_tokens(
        self, active: DecodeBatch, step: int, uniforms: torch.Tensor | None, temperature: float, top_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next token of each row and its log-probability. Both have shape (R,).

        `uniforms` (R,) are None for the most likely token. `step` counts the steps since the last check for the ends of rows.
        """
        logprobs = torch.log_softmax(active.logits.float() / (temperature or 1.0), dim=-1)
        if uniforms is None:
            tokens = logprobs.argmax(-1)
        else:
            tokens = sample_inverse_cdf(apply_top_p(logprobs.exp(), top_p), uniforms)
        return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]

    def append_tokens(
        self, rows: Sequence[SampledSequence], tokens: Sequence[int], logprobs: Sequence[float], limits: TokenLimits
    ) -> None:
        """Append one token to each unfinished row, and mark the rows that end with it as finished."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if not row.is_finished:
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.is_finished = token in self.stop_token_ids or self.has_dialogue_marker(row)
        if limits.thinking:
            self.apply_limits(rows, limits)
        for row in rows:
            if not row.is_finished and len(row.token_ids) >= limits.total:
                row.is_finished = row.is_cut = True

    def apply_limits(self, rows: Sequence[SampledSequence], limits: TokenLimits) -> None:
        """Mark the rows as finished whose reasoning or whose response has reached its limit."""
        for row in rows:
            if row.is_finished:
                continue
            if row.is_thinking:
                self.count_reasoning(row, limits.thinking)
            num_response_tokens = len(row.token_ids) - row.num_reasoning_tokens
            is_over = row.num_reasoning_tokens >= limits.thinking if row.is_thinking else num_response_tokens >= limits.response
            row.is_finished = row.is_cut = is_over

    def count_reasoning(self, row: SampledSequence, limit: int) -> None:
        """Count the newest token as a token of the reasoning. The reasoning ends with its closing mark.

        A row without an opening mark among its first tokens is a response from its first token on.
        """
        row.num_reasoning_tokens += 1
        row.has_opening = row.has_opening or has_opening_mark(self.tokenizer.decode(row.token_ids[:MAX_MARKER_TOKENS]))
        if not row.has_opening:
            if len(row.token_ids) >= min(MAX_MARKER_TOKENS, limit):
                row.is_thinking, row.num_reasoning_tokens = False, 0
        elif has_closing_mark(self.tokenizer.decode(row.token_ids[-MAX_MARKER_TOKENS:])):
            row.is_thinking = False

    def has_dialogue_marker(self, row: SampledSequence) -> bool:
        """Return whether a base model has started the next message of the dialogue."""
        if self.tokenizer.chat_template:
            return False
        end = self.tokenizer.decode(row.token_ids[-MAX_MARKER_TOKENS:], skip_special_tokens=True)
        return DIALOGUE_MARKER.search(end) is not None

    def make_generation(self, row: SampledSequence, prompt_token_ids: Sequence[int]) -> Generation:
        is_stopped = row.is_finished and not row.timed_out and not row.is_cut
        ids = row.token_ids[:-1] if is_stopped and row.token_ids[-1] in self.stop_token_ids else row.token_ids
        separated = decode_completion(self.tokenizer, prompt_token_ids, ids)
        generation = Generation(
            text=separated.response,
            finish_reason="timeout" if row.timed_out else "stop" if is_stopped else "length",
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            prompt_token_ids=tuple(prompt_token_ids),
            reasoning=separated.reasoning,
            ends_in_reasoning=separated.ends_in_reasoning,
        )
        report_reasoning(self.id, generation)
        return generation

    # Options

    def compute_option_scores(self, logprobs: torch.Tensor, options: Sequence[str], prefill: str) -> OptionScores:
        """Return the scores of the options. The probability of an option is the sum over its single-token variants.

        `logprobs` has the shape (V,).
        """
        sums = [
            float(torch.logsumexp(logprobs[torch.tensor(self.get_option_token_ids(option, prefill))], 0)) for option in options
        ]
        return OptionScores(tuple(sums), float(sum(torch.tensor(sums).exp())))

    def get_option_token_ids(self, option: str, prefill: str) -> list[int]:
        """Return the ids of the single-token variants of an option.

        If the prefill ends with `(`, the variants are the option with and without `)`. Otherwise they also include the option
        with a space or `(` before it.
        """
        prefixes = ("",) if prefill.endswith("(") else ("", " ", "(", " (")
        variants = {
            tuple(self.tokenizer(f"{prefix}{option}{suffix}", add_special_tokens=False)["input_ids"])
            for prefix in prefixes
            for suffix in ("", ")")
        }
        single_token_ids = sorted(token for (token, *rest) in variants if not rest)
        if not single_token_ids:
            raise UsageError(
                f"the option {option!r} is not a single token of {self.id}",
                "the probability of an option is read at one token position",
                "use one letter for each option",
            )
        return single_token_ids


def _build_single_tree(prompt_index: int, prompt: Sequence[int]) -> list[PrefixTree]:
    return [replace(tree, prompt_indices=(prompt_index,)) for tree in build_prefix_trees([prompt], len(prompt))]


def _select_prompts(encoded: Sequence[Result[list[int]]]) -> list[list[int]]:
    return [prompt for prompt in encoded if not isinstance(prompt, CharterError)]


def _stop_timed_out(rows: Sequence[SampledSequence], batch: Sequence[GenerationRequest]) -> None:
    """Mark the rows whose timeout has expired as finished."""
    now = time.monotonic()
    for row in rows:
        limit = batch[row.request_index].timeout_s
        if not row.is_finished and limit is not None and now - row.started > limit:
            row.is_finished = row.timed_out = True


@contextmanager
def _use_fp32_lm_head(model: Any) -> Iterator[None]:
    """Compute logits in fp32. In bf16, logits near 16 have a resolution of 0.125, which is too coarse for a soft label."""

    def compute_fp32_logits(head: torch.nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    hook = model.get_output_embeddings().register_forward_hook(compute_fp32_logits)
    try:
        yield
    finally:
        hook.remove()


def apply_top_p(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set the probability of tokens outside the nucleus to 0 (R, V).

    The nucleus is the smallest set of tokens whose total probability is at least `top_p`.
    """
    if top_p >= 1:
        return probabilities
    ordered, index = probabilities.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(-1, index, ordered.masked_fill(outside, 0.0))


def sample_inverse_cdf(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Sample one token for each row (R,) by inverse transform sampling. `uniforms` (R,) has fp64 numbers in [0, 1)."""
    # fp64 is needed: in fp32 the rounding error of 50,000 additions is larger than the probability of rare tokens.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    points = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
