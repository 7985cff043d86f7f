"""Measure which principle prevents what (`charter eval principles`): leave each critique principle out, under jailbreak prompts.

The input is an evaluation of one policy on suites of harmful prompts, with jailbreak transformations. Its responses are replayed from
the stage critique: once under the full constitution (the control), and once without each principle. The grader "refusal" grades the
final responses. The outcome is the share of final responses that do not refuse. If it is higher without a principle than under the
full constitution, the principle prevents something. All runs revise the same responses, so the comparison is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from charter.evaluation.ablation import AblationRun, plan_ablations
from constitutions.loader import load_constitution
from consumers.grade import FINAL_RESPONSE
from consumers.graders.refusal import PARTLY, REFUSES
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.settings import Settings
from engine.statistics import compute_holm_p, compute_mcnemar_p, compute_paired_interval, compute_wilson_interval
from engine.store import Store
from producers.replay import LATEST

_REFUSED = (REFUSES, PARTLY)
_TIMEOUT_S = 60.0
INITIAL, CONTROL = "(no revision)", "(nothing)"
# The first completion of each prompt of the evaluation begins a chain.
_INITIAL_SQL = """
    SELECT suite, item, transform, response_id::VARCHAR, label FROM suite_grades
    WHERE run_id = ? AND grader = 'refusal' AND completion_index = 0 AND outcome = 'OK'"""
_FINAL_SQL = """
    SELECT response_id::VARCHAR, label FROM raw.grades
    WHERE run_id = ? AND grader = 'refusal' AND subject = 'final_response' AND outcome = 'OK'
    QUALIFY row_number() OVER (PARTITION BY response_id ORDER BY commit_seq DESC) = 1"""


@dataclass(frozen=True)
class PrincipleEffect:
    """The share of final responses that do not refuse, under a constitution and a transformation ("" is the original prompt).

    `excluded_principle` is CONTROL for the full constitution, and INITIAL for the responses before any revision. `responses` are those
    with a usable final response. `difference` is the share minus that of the control on the responses of both, with its 95 % interval.
    `p_holm` is McNemar's p after Holm's correction for all rows with a difference.
    """

    excluded_principle: str
    transform: str
    responses: int
    not_refused: float | None
    low: float | None
    high: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_holm: float | None = None
    run: str = ""


def require_critique_principles(settings: Settings, principles: Sequence[str]) -> None:
    """Raise ConstitutionError or UsageError if one of these principles (or, without any, each of them) cannot be left out."""
    constitution = load_constitution(settings.run.constitution)
    critique = [principle.id for principle in constitution.critique]
    for principle in principles or critique:
        constitution.without_principles([principle])
        if principle not in critique:
            raise UsageError(
                f"{principle} cannot be left out of the critiques",
                "it is a judge principle, and only critique principles change final responses",
                f"name one of {', '.join(critique)}, or type: charter constitution ablate",
            )


def plan_principle_runs(settings: Settings, bus: Bus, evaluation_run: str, principles: Sequence[str]) -> list[AblationRun]:
    """Return the control and one replay for each critique principle."""
    grade = settings.grade.model_copy(update={"graders": ["refusal"], "subjects": [FINAL_RESPONSE]})
    run = settings.run.model_copy(update={"id": evaluation_run})
    settings = settings.model_copy(update={"grade": grade, "run": run})
    start = f"run:{evaluation_run}"
    return list(
        plan_ablations(
            settings, bus, principles, start=start, end=LATEST, archive=False, stages=("critique",), revises_suites=True
        )
    )


def compute_principle_effects(store: Store, evaluation_run: str, runs: Sequence[AblationRun]) -> list[PrincipleEffect]:
    """Return a row for each transformation and constitution: without revision, the control, and without each principle.

    Raises UsageError if the evaluation has got prompts after the replays began.
    """
    initial = {
        response: (transform, label in _REFUSED)
        for _, _, transform, response, label in store.query(_INITIAL_SQL, [evaluation_run], limit_s=_TIMEOUT_S).rows
    }
    finals = {run.run_id: _load_finals(store, run.run_id, initial) for run in runs}
    control = finals[runs[0].run_id]
    rows = []
    for transform in sorted({transform for transform, _ in initial.values()}):
        of_transform = {response: refused for response, (name, refused) in initial.items() if name == transform}
        rows.append(_make_row(INITIAL, transform, of_transform, None, evaluation_run))
        for run in runs:
            refused = {response: value for response, value in finals[run.run_id].items() if response in of_transform}
            rows.append(
                _make_row(
                    run.excluded_principle or CONTROL, transform, refused, control if run is not runs[0] else None, run.run_id
                )
            )
    return _correct(rows)


def _load_finals(store: Store, run_id: str, initial: Mapping[str, object]) -> dict[str, bool]:
    sql = "SELECT count(DISTINCT response_id) FROM raw.critiques WHERE run_id = ?"
    ((num_chains,),) = store.query(sql, [run_id], limit_s=_TIMEOUT_S).rows
    if num_chains < len(initial):
        raise UsageError(
            f"the replay {run_id} has {num_chains} of {len(initial)} responses",
            "prompts were added to the evaluation after the replay began",
            "give another name: --name NAME",
        )
    return {response: label in _REFUSED for response, label in store.query(_FINAL_SQL, [run_id], limit_s=_TIMEOUT_S).rows}


def _make_row(
    name: str, transform: str, refused: Mapping[str, bool], control: Mapping[str, bool] | None, run: str
) -> PrincipleEffect:
    num_hits = sum(not value for value in refused.values())
    low, high = compute_wilson_interval(num_hits, len(refused)) or (None, None)
    row = PrincipleEffect(name, transform, len(refused), num_hits / len(refused) if refused else None, low, high, run=run)
    shared = [(refused[key], control[key]) for key in refused if key in control] if control is not None else []
    if not shared:
        return row
    only_control, only_this = (sum(a == first and b != first for a, b in shared) for first in (True, False))
    interval = compute_paired_interval(only_control, only_this, len(shared))
    assert interval is not None
    return replace(
        row,
        difference=(only_this - only_control) / len(shared),
        difference_low=interval[0],
        difference_high=interval[1],
        p_holm=compute_mcnemar_p(only_control, only_this),
    )


def _correct(rows: Sequence[PrincipleEffect]) -> list[PrincipleEffect]:
    """Return the rows with Holm's correction. It covers all rows with a difference."""
    corrected = iter(compute_holm_p([row.p_holm for row in rows if row.p_holm is not None]))
    return [row if row.p_holm is None else replace(row, p_holm=next(corrected)) for row in rows]
