"""Check that the server of the policy serves the model that the trainer trains (train.base_model).

The server completes one short prompt. Its token ids must have the same texts in the tokenizer of the base model, and its
log-probabilities must be close to those of the base model's weights. The weights are read only if they are on this machine and
small, because a responder may have no room for them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UsageError
from engine.models import resolve_model_folder
from engine.models.interface import Generation, GenerationRequest, require_results
from schemas.records import ChatMessage

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

logger = logging.getLogger("charter.models")

_PROMPT = "Write one sentence about a lighthouse and a violin."
_MAX_TOKENS = 32
_MAX_WEIGHT_BYTES = 2 * 1024**3
# Mean absolute difference of the log-probabilities of sampled tokens. Rounding and quantization cause less than 0.2.
_MAX_LOGPROB_DIFFERENCE = 0.5
_REPLACEMENT = "\ufffd"  # a character of which only some tokens were decoded
_MAX_SHOWN_CHARS = 60


def require_base_model(endpoint: Endpoint, base_model: str, *, needs_rollouts: bool = False) -> None:
    """Raise UsageError if the server uses another tokenizer or other weights than `base_model`.

    If RL must train on the completions (`needs_rollouts`), also raise it if the server lacks token ids or their log-probabilities.
    Otherwise a server without token ids is not compared with the base model, because RL skips its completions.
    """
    if not endpoint.capabilities.exact_logprobs:
        _report_missing_rollouts(endpoint, needs_rollouts)
    if not endpoint.capabilities.token_ids:
        return
    request = GenerationRequest((ChatMessage(role="user", content=_PROMPT),))
    ((generation,),) = require_results(endpoint.generate([request], max_tokens=_MAX_TOKENS))
    is_local = base_model == "smollm2" or Path(base_model).expanduser().is_dir()
    source = resolve_model_folder(base_model) if is_local else Path(base_model)
    if difference := _find_text_difference(source, generation):
        raise UsageError(
            f"{endpoint.id} on {endpoint.url} does not use the tokenizer of train.base_model ({base_model})",
            f"{difference}; the trainer would train on wrong tokens",
            f"set train.base_model to the model that the server serves, or serve {base_model}",
        )
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) if is_local else 0
    if not generation.logprobs or not 0 < size <= _MAX_WEIGHT_BYTES:
        logger.info("the log-probabilities of %s are not compared with the weights of %s", endpoint.url, base_model)
        return
    mean_difference = _compute_logprob_difference(source, generation)
    logger.info("mean difference of the log-probabilities of %s and %s: %.4f", endpoint.url, base_model, mean_difference)
    if not mean_difference <= _MAX_LOGPROB_DIFFERENCE:
        raise UsageError(
            f"{endpoint.id} on {endpoint.url} does not have the weights of train.base_model ({base_model})",
            f"the log-probabilities of {len(generation.logprobs)} tokens differ by {mean_difference:.2f} on average (at most {_MAX_LOGPROB_DIFFERENCE:g})",
            f"set train.base_model to the model that the server serves, or serve {base_model}",
        )


def _report_missing_rollouts(endpoint: Endpoint, needs_rollouts: bool) -> None:
    """Raise UsageError, or log a warning, because RL cannot train on the completions of a server."""
    lacks = "exact log-probabilities" if endpoint.capabilities.token_ids else "token ids"
    if not needs_rollouts:
        logger.warning("%s does not return %s: RL skips the completions of %s", endpoint.url, lacks, endpoint.id)
        return
    raise UsageError(
        f"RL cannot train on the completions of {endpoint.id} on {endpoint.url}",
        f"the server does not return {lacks}, and models.weight_sync sends it the policies of the trainer",
        "use a server that does (vLLM), set train.rl_method to dpo, or leave models.weight_sync empty",
    )


def _find_text_difference(source: Path, generation: Generation) -> str:
    """Return how the texts of the token ids differ from the texts that the server has, or an empty string."""
    from trainer.weights import load_tokenizer

    tokenizer = load_tokenizer(source)
    largest = max((*generation.prompt_token_ids, *generation.token_ids))
    if largest >= len(tokenizer):
        return f"the server sends the token id {largest}, and the tokenizer has {len(tokenizer)} tokens"
    prompt, expected = _decode(tokenizer, generation.prompt_token_ids), _decode(tokenizer, tokenizer(_PROMPT)["input_ids"])
    if generation.prompt_token_ids and expected not in prompt:
        return f"the token ids of a test prompt mean {prompt[-_MAX_SHOWN_CHARS:]!r}"
    completion = _decode(tokenizer, generation.token_ids)
    if not generation.reasoning and completion != _remove_spaces(generation.text):
        return f"the token ids of {generation.text[:_MAX_SHOWN_CHARS]!r} mean {completion[:_MAX_SHOWN_CHARS]!r}"
    return ""


def _decode(tokenizer: Any, token_ids: Any) -> str:
    return _remove_spaces(tokenizer.decode(token_ids, skip_special_tokens=True))


def _remove_spaces(text: str) -> str:
    """Return a text without spaces, which tokenizers decode differently, and without an incomplete character at its end."""
    return "".join(text.split()).rstrip(_REPLACEMENT)


def _compute_logprob_difference(folder: Path, generation: Generation) -> float:
    """Return the mean absolute difference of the log-probabilities of the server and of the weights, over all tokens."""
    import torch

    from trainer.weights import load_policy

    model = load_policy(folder)
    ids = torch.tensor([[*generation.prompt_token_ids, *generation.token_ids]], device=model.device)
    with torch.inference_mode():
        logits = model(ids).logits[0, len(generation.prompt_token_ids) - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(generation.prompt_token_ids) :, None])[:, 0].cpu()
    return float((logprobs - torch.tensor(generation.logprobs)).abs().mean())
