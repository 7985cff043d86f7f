"""Groups of completions with grades and labels, for GRPO and RLOO."""

from schemas import ids
from schemas.records import Completion, FinishReason, Grade, ModelRef, Outcome
from tests.support.records import make_preference, make_response


def make_group(name, state, count=4, **more):
    """Return a response of the current policy with `count` completions."""
    version = state.policy_version
    completions = [
        Completion(
            index=n, text=f"{name} {n}", token_ids=[1, 5 + n], logprobs=[-1.0, -1.0], finish_reason=FinishReason.STOP,
            policy_version=version,
        )
        for n in range(count)
    ]  # fmt: skip
    origin = {"model": ModelRef(id="policy", revision=state.model_revisions[version]), "policy_version": version}
    return make_response(f"group {name}", **more).model_copy(update=origin | {"completions": completions})


def make_grade(
    response, index, score, *, grader="length", label="complete", outcome=Outcome.OK, principle_id=None, version="1"
):
    return Grade(
        record_id=ids.compute_id("grade", [response.record_id, index, grader, principle_id, version]), prompt_id=response.prompt_id,
        run_id="r", stage="grade", response_id=response.record_id, source="test", subject="completion", completion_index=index,
        grader=grader, grader_version=version, label=label, score=score, outcome=outcome, principle_id=principle_id,
    )  # fmt: skip


def make_group_grades(response, scores, **more):
    """Return one grade per completion. A score of None is a grade that cannot be read."""
    return [
        make_grade(response, n, score, outcome=Outcome.OK if score is not None else Outcome.EMPTY, **more)
        for n, score in enumerate(scores)
    ]


def make_pair_label(response, a, b, p_a, **more):
    """Return the judge's label of two completions of a response."""
    values = {"response_id": response.record_id, "completion_index_a": a, "completion_index_b": b} | more
    return make_preference(f"{response.record_id} {a} {b}", response.messages[0].content, p_a, **values)
