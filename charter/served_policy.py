"""Check that the server of the policy serves the model that the trainer trains (train.base_model), or the policy that it loaded.

The server completes one short prompt. Its token ids must have the same texts in the tokenizer of the base model, and its
log-probabilities must be close to those of the base model's weights. The weights are read only if they are on this machine and
small, because a responder may have no room for them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter.stages import STAGES, get_stage_role
from engine.errors import ModelUnreachable, UsageError
from engine.models import resolve_model_folder
from engine.models.interface import Generation, GenerationRequest, require_results
from engine.models.vllm import DEV_MODE_FIX, VllmServer
from engine.settings import Settings
from engine.weight_sync import VLLM
from schemas.records import ChatMessage

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

logger = logging.getLogger("charter.models")

_PROMPT = "Write one sentence about a lighthouse and a violin."
_MAX_TOKENS = 32
_MAX_WEIGHT_BYTES = 2 * 1024**3
# Mean absolute difference of the log-probabilities of sampled tokens. Rounding and quantization cause less than 0.2.
_MAX_LOGPROB_DIFFERENCE = 0.5
_MAX_RELOADED_DIFFERENCE = 0.2  # the same server had the base model, so only rounding is expected
_REPLACEMENT = "\ufffd"  # a character of which only some tokens were decoded
_MAX_SHOWN_CHARS = 60


def require_base_model(
    endpoint: Endpoint, base_model: str, *, needs_rollouts: bool = False, compare_weights: bool = True
) -> None:
    """Raise UsageError if the server uses another tokenizer or other weights than `base_model`.

    `compare_weights` is false if the server has the weights of a later policy. If RL must train on the completions
    (`needs_rollouts`), also raise it if the server lacks token ids or their log-probabilities.
    Otherwise a server without token ids is not compared with the base model, because RL skips its completions.
    """
    if not endpoint.capabilities.exact_logprobs:
        _report_missing_rollouts(endpoint, needs_rollouts)
    if not endpoint.capabilities.token_ids:
        return
    generation = _generate(endpoint)
    source, is_local = _find_base_model(base_model)
    if difference := _find_text_difference(source, generation):
        raise UsageError(
            f"{endpoint.id} on {endpoint.url} does not use the tokenizer of train.base_model ({base_model})",
            f"{difference}; the trainer would train on wrong tokens",
            f"set train.base_model to the model that the server serves, or serve {base_model}",
        )
    if not compare_weights:
        return
    if not generation.logprobs or not is_local or not _is_small(source):
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


def load_base_tokenizer(base_model: str) -> Any:
    """Return the tokenizer of `train.base_model`. Raise UsageError if it is not set, or if the tokenizer cannot be loaded."""
    from trainer.weights import load_tokenizer

    if not base_model or base_model.startswith(("http://", "https://")):
        raise UsageError(
            "there is no tokenizer of the policy on this machine",
            f"train.base_model is {base_model or 'not set'}",
            "set train.base_model to the model that the server serves",
        )
    return load_tokenizer(_find_base_model(base_model)[0])


def _find_base_model(base_model: str) -> tuple[Path, bool]:
    """Return the folder of a base model, and whether it is on this machine. Otherwise the folder is the hub id."""
    is_local = base_model == "smollm2" or Path(base_model).expanduser().is_dir()
    return (resolve_model_folder(base_model) if is_local else Path(base_model)), is_local


def require_reloaded_weights(endpoint: Endpoint, folder: Path) -> bool:
    """Raise ModelUnreachable if the log-probabilities of the server are not those of the weights in `folder`, which it has loaded.

    Return False, and log a warning, if they are not compared: the weights are too large for a forward pass on this machine, or the
    server has no exact log-probabilities.
    """
    generation = _generate(endpoint)
    if not generation.logprobs or not _is_small(folder):
        reason = "they are larger than 2 GB" if generation.logprobs else "the server returns no exact log-probabilities"
        logger.warning("%s: the loaded weights of %s are not verified, because %s", endpoint.url, folder, reason)
        return False
    mean_difference = _compute_logprob_difference(folder, generation)
    logger.info("mean difference of the log-probabilities of %s and %s: %.4f", endpoint.url, folder, mean_difference)
    if not mean_difference <= _MAX_RELOADED_DIFFERENCE:
        raise ModelUnreachable(
            f"{endpoint.url} does not have the weights of {folder}, although it reported that it has loaded them",
            f"the log-probabilities of {len(generation.logprobs)} tokens differ by {mean_difference:.2f} on average (at most {_MAX_RELOADED_DIFFERENCE:g})",
            "restart the server; if this happens again, set models.weight_sync to vllm-lora",
        )
    return True


def require_reload_support(endpoint: Endpoint, base_folder: Path) -> None:
    """Raise UsageError if the weights of the server cannot be replaced (models.weight_sync = vllm).

    vLLM on a processor keeps a copy of the output layer in another memory layout. If this layer shares its weights with the
    input embeddings, `reload_weights` does not replace the copy (seen with vLLM 0.32.0).
    """
    from transformers import AutoConfig

    server = VllmServer(endpoint)
    try:
        server.get_weight_version()
        device = server.get_device()
    except ModelUnreachable as error:
        raise UsageError(
            f"the weights of {endpoint.url} cannot be replaced (models.weight_sync = vllm)",
            f"{error.what}: {error.why}",
            DEV_MODE_FIX,
        ) from error
    if device == "cpu" and AutoConfig.from_pretrained(base_folder, trust_remote_code=False).tie_word_embeddings:
        raise UsageError(
            f"the weights of {endpoint.url} cannot be replaced (models.weight_sync = vllm)",
            "vLLM runs on a processor and keeps the old output layer of a model with tied embeddings (tie_word_embeddings)",
            "set models.weight_sync to vllm-lora, or serve the model on a GPU",
        )


def require_separate_server(settings: Settings) -> None:
    """Raise UsageError if a critic or judge uses the server whose weights are replaced (models.weight_sync = vllm)."""
    models = settings.models
    if models.weight_sync != VLLM:
        return
    roles = {"models.critic": models.critic or models.policy}
    if settings.monitor.prompts:
        roles["monitor.judge"] = settings.monitor.judge or models.judge or models.policy
    if any(get_stage_role(stage, settings) == "judge" for stage in STAGES):
        roles["models.judge"] = models.judge or models.policy
    for name, spec in roles.items():
        if _get_server(spec) == _get_server(models.policy):
            raise UsageError(
                f"{name} uses the server of the policy ({models.policy.partition('#')[0]})",
                "models.weight_sync = vllm replaces all weights of this server, so its labels would change with each policy",
                f"set {name} to another model or server, or set models.weight_sync to vllm-lora",
            )


def _get_server(spec: str) -> str:
    """Return the host and the port of a model on a server, or the whole setting of another model."""
    import httpx  # it imports click and rich, which the Python API does not need

    url = httpx.URL(spec.partition("#")[0]) if spec.startswith(("http://", "https://")) else None
    return spec if url is None else f"{'127.0.0.1' if url.host == 'localhost' else url.host}:{url.port or url.scheme}"


def _generate(endpoint: Endpoint) -> Generation:
    request = GenerationRequest((ChatMessage(role="user", content=_PROMPT),))
    ((generation,),) = require_results(endpoint.generate([request], max_tokens=_MAX_TOKENS))
    return generation


def _is_small(folder: Path) -> bool:
    """Return whether a folder has weights, and they are small enough for a forward pass on this machine."""
    return 0 < sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= _MAX_WEIGHT_BYTES


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
