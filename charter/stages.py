"""Define the built-in stages: their names, their model roles, and the topics that they read and write."""

from __future__ import annotations

STAGES = ("respond", "critique", "revise", "judge")
STAGE_ROLES = {"respond": "policy", "critique": "critic", "revise": "critic", "judge": "judge"}
STAGE_OUTPUTS = {"respond": "responses", "critique": "critiques", "revise": "revisions", "judge": "preferences"}


def get_stage_inputs(pairing: str) -> dict[str, tuple[str, ...]]:
    """Return the input topics of each stage. `pairing` is the value of the setting judge.pairing."""
    judge_inputs = ("responses",) if pairing == "completions" else ("critiques", "revisions")
    return {
        "respond": ("prompts",),
        "critique": ("revisions", "responses"),
        "revise": ("critiques",),
        "judge": judge_inputs,
    }


def get_downstream_stages(stage: str, pairing: str) -> tuple[str, ...]:
    """Return a stage and all stages that depend on its output, directly or indirectly, in the order of STAGES."""
    inputs = get_stage_inputs(pairing)
    reached, topics = {stage}, {STAGE_OUTPUTS[stage]}
    while readers := {name for name in STAGES if name not in reached and topics & set(inputs[name])}:
        reached |= readers
        topics |= {STAGE_OUTPUTS[name] for name in readers}
    return tuple(name for name in STAGES if name in reached)
