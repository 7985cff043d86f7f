"""Open models: a local model, a model on an OpenAI-compatible server, or the scripted model for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.errors import ModelUnreachable, UsageError
from engine.models.interface import Model
from engine.progress import track_work
from schemas.http_client import ClientSettingsError, create_http_client

SCRIPTED_SPEC = "scripted"


def open_model(spec: str, **options: Any) -> Model:
    """Open the model that a setting specifies.

    `smollm2` is the packaged small model. `http://HOST:PORT/v1#NAME` is a model on an OpenAI-compatible server. Any other value
    is a folder with safetensors or a hub id. Raise UsageError or ModelUnreachable if the model does not exist.
    """
    if spec == SCRIPTED_SPEC:
        return _open_scripted()
    if spec.startswith(("http://", "https://")):
        from engine.models.endpoint import open_endpoint

        return open_endpoint(spec, **options)
    folder = resolve_model_folder(spec)  # raise its errors before the import of PyTorch, which takes seconds
    from engine.models.local import open_local

    return open_local(spec, folder, **options)


def resolve_model_folder(spec: str) -> Path:
    """Return the folder of a local model. `spec` is smollm2, a folder, or a hub id. A hub model is downloaded once."""
    if spec == "smollm2":
        from engine.models import smollm2

        return smollm2.get_model_folder()
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if spec == SCRIPTED_SPEC or spec.startswith(("http://", "https://")):
        raise UsageError(
            f"{spec} has no local weights",
            "the trainer needs a local model as models.policy",
            "set models.policy to smollm2, a folder or a hub id; models.critic and models.judge can be servers",
        )
    if folder.is_absolute() or spec.startswith((".", "~")) or spec.count("/") != 1:
        raise ModelUnreachable(
            f"there is no model at {spec}",
            "the folder does not exist",
            "set models.policy to smollm2 (packaged), an existing folder, or a hub id such as OWNER/NAME",
        )
    return _download_model(spec)


def _download_model(hub_id: str) -> Path:
    """Download a hub model into the local cache. Only weights, tokenizer and configuration are downloaded, not code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        create_http_client().close()  # the hub's library reads the same proxy settings, but its errors do not name them
        with track_work(f"downloading the model {hub_id}"):
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except ClientSettingsError as error:
        raise UsageError(error.what, error.why, error.fix) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnreachable(
            f"there is no model {hub_id!r}: the folder does not exist, and the download from the hub failed",
            f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            "set models.policy to smollm2 (packaged, needs no hub), an existing folder, or a hub id that you can reach",
        ) from error


def _open_scripted() -> Model:
    if os.environ.get("CHARTER_ALLOW_SCRIPTED") != "1":
        raise UsageError(
            "the scripted model is a fake for tests",
            "its completions are words without meaning, selected by a hash of the prompt",
            "set models.policy to smollm2, a folder, a hub id or the address of a server",
        )
    from engine.models.scripted import ScriptedModel

    return ScriptedModel()
