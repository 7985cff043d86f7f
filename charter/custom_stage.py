"""A stage of one's own, in one file: `charter run --stage FILE.py` (docs/extending.md).

The file has a function `stage(settings, models) -> Stage`. With `ROLE = "policy"`, `"critic"` or `"judge"` it shares that
role's model and waits for its turn at it; without, it has a thread of its own.
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
    """What a file says: how to make its stage, and whose model that uses."""

    path: Path
    make_stage: Callable[[Settings, RoleModels], Stage]
    role: str | None


def load_custom_stage(path: str, roles: tuple[str, ...]) -> CustomStage:
    """The stage of a file; a UsageError says what the file lacks."""
    there = Path(path)
    if not there.is_file():
        raise UsageError(f"there is no file {path}", "a stage is a name or a Python file", "type: charter run --help")
    spec = importlib.util.spec_from_file_location(f"charter_stage_{there.stem}", there)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make, role = getattr(module, "stage", None), getattr(module, "ROLE", None)
    if not callable(make):
        raise UsageError(f"{path} has no stage", "it needs a function stage(settings, models)", "see docs/extending.md")
    if role not in (None, *roles):
        known = ", ".join(dict.fromkeys(roles))
        raise UsageError(f"{path}: ROLE cannot be {role!r}", f"the roles are {known}", "or leave ROLE out")
    return CustomStage(there, make, role)


def validate_custom_stage(stage: Stage, path: Path, reserved_names: tuple[str, ...]) -> Stage:
    """The stage, if its name is free and its topics exist."""
    if stage.name in reserved_names:
        raise UsageError(
            f"{path}: the name {stage.name} is taken", f"Charter's stages are {', '.join(reserved_names)}", "rename it"
        )
    if unknown := [topic for topic in (*stage.inputs, *stage.outputs) if topic not in TOPICS]:
        raise UsageError(f"{path}: there is no topic {unknown[0]}", f"the topics are {', '.join(TOPICS)}", "mend the file")
    return stage
