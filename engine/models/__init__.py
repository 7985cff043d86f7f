"""Models behind one small port: local weights, an OpenAI-compatible server, and a scripted one for tests."""

from __future__ import annotations

import os
from typing import Any

from engine.errors import UsageError
from engine.models.port import Model

SCRIPTED = "scripted"


def open_model(spec: str, **options: Any) -> Model:
    """The model that a setting names.

    `smollm2` is the packaged small model; `http://HOST:PORT/v1#NAME` an OpenAI-compatible server; anything else a folder with
    safetensors or a hub id. Raises UsageError or ModelUnreachable when there is no such model.
    """
    if spec == SCRIPTED:
        return open_scripted()
    if spec.startswith(("http://", "https://")):
        from engine.models.endpoint import open_endpoint

        return open_endpoint(spec, **options)
    from engine.models.local import open_local

    return open_local(spec, **options)


def open_scripted() -> Model:
    if os.environ.get("CHARTER_ALLOW_SCRIPTED") != "1":
        raise UsageError(
            "the scripted model is a fake for tests",
            "it answers by hashing the prompt; nothing it says means anything",
            "set models.policy to smollm2, a folder, a hub id or a server's address",
        )
    from engine.models.scripted import ScriptedModel

    return ScriptedModel()
