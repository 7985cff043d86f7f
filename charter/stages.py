"""Define the built-in stages: their names, their model roles, and the topics that they read and write."""

from __future__ import annotations

from engine.pairing import CONTRAST_PAIRING, REVISION_PAIRING
from engine.settings import Settings

PRINCIPLES_GRADER = "principles"

STAGES = ("respond", "critique", "revise", "judge", "grade")
STAGE_OUTPUTS = {
    "respond": "responses",
    "critique": "critiques",
    "revise": "revisions",
    "judge": "preferences",
    "grade": "grades",
}
MODEL_ROLES = ("policy", "critic", "judge")
STAGE_ROLES = {"respond": "policy", "critique": "critic", "revise": "critic", "judge": "judge"}


def get_stage_role(stage: str, settings: Settings) -> str | None:
    """Return the role of the model that a stage uses, or None.

    The stage grade uses the judge if a grader asks a model. Contrast pairs need no judge, unless contrast.ask_judge is set.
    """
    if stage == "judge" and settings.judge.pairing == CONTRAST_PAIRING and not settings.contrast.ask_judge:
        return None
    if stage == "grade":
        return "judge" if PRINCIPLES_GRADER in settings.grade.graders else None
    return STAGE_ROLES[stage]


def get_stage_inputs(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Return the input topics of each stage."""
    chain_topics = ("critiques", "revisions")
    graded_topics = {"completion": ("responses",), "contrast_completion": ("responses",), "final_response": chain_topics}
    graded = [topic for name, topics in graded_topics.items() if name in settings.grade.subjects for topic in topics]
    return {
        "respond": ("prompts",),
        "critique": ("revisions", "responses"),
        "revise": ("critiques",),
        "judge": chain_topics if settings.judge.pairing == REVISION_PAIRING else ("responses",),
        "grade": tuple(dict.fromkeys(graded)),
    }


def get_downstream_stages(stage: str, settings: Settings) -> tuple[str, ...]:
    """Return a stage and all stages that depend on its output, directly or indirectly, in the order of STAGES."""
    inputs = get_stage_inputs(settings)
    reached, topics = {stage}, {STAGE_OUTPUTS[stage]}
    while readers := {name for name in STAGES if name not in reached and topics & set(inputs[name])}:
        reached |= readers
        topics |= {STAGE_OUTPUTS[name] for name in readers}
    return tuple(name for name in STAGES if name in reached)
