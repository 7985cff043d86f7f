"""Load a custom stage from a Python file for `charter run --stage FILE.py` (docs/extending.md).

The file defines a function `stage(settings, models) -> Stage`. If the file sets `ROLE` to `"policy"`, `"critic"` or `"judge"`,
the stage runs in the executor of the model of that role. Without `ROLE`, the stage runs in a separate thread.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from charter.models import RoleModels
from engine.errors import UsageError
from engine.settings import Settings
from engine.worker import Stage
from schemas.topics import TOPICS


@dataclass(frozen=True)
class CustomStage:
    """Holds two values of a stage file: the function that makes the stage, and the role of the model that the stage uses."""

    path: Path
    make_stage: Callable[[Settings, RoleModels], Stage]
    role: str | None


def load_custom_stage(path: str, roles: tuple[str, ...]) -> CustomStage:
    """Import a stage file. Raises UsageError if the file or its function is missing, or if its role is invalid."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(
            f"there is no file {path}", "--stage must be the name of a stage or a Python file", "type: charter run --help"
        )
    spec = importlib.util.spec_from_file_location(f"charter_stage_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make_stage, role = getattr(module, "stage", None), getattr(module, "ROLE", None)
    if not callable(make_stage):
        raise UsageError(
            f"{path} has no stage", "the file must define a function stage(settings, models)", "see docs/extending.md"
        )
    if role not in (None, *roles):
        valid_roles = ", ".join(dict.fromkeys(roles))
        raise UsageError(f"{path}: ROLE cannot be {role!r}", f"the roles are {valid_roles}", "use one of them, or remove ROLE")
    return CustomStage(file, make_stage, role)


def validate_custom_stage(stage: Stage, path: Path, reserved_names: tuple[str, ...]) -> Stage:
    """Return the stage unchanged. Raises UsageError if its name is reserved or one of its topics does not exist."""
    if stage.name in reserved_names:
        raise UsageError(
            f"{path}: the name {stage.name} is taken",
            f"the built-in stages are {', '.join(reserved_names)}",
            "rename the stage",
        )
    if unknown := [topic for topic in (*stage.inputs, *stage.outputs) if topic not in TOPICS]:
        raise UsageError(
            f"{path}: there is no topic {unknown[0]}", f"the topics are {', '.join(TOPICS)}", "correct the topic name"
        )
    return stage
