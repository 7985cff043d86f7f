"""Records to feed the stages with."""

import pytest

from schemas import ids
from schemas.records import ChatMessage, Completion, FinishReason, ModelRef, Prompt, Response


@pytest.fixture(scope="session")
def make_prompt():
    def make(text="How do magnets work?", source="test", **more):
        messages = [ChatMessage(role="user", content=text)]
        key = ids.compute_prompt_id(messages)
        return Prompt(
            record_id=ids.compute_record_id("produce", [key], ""), prompt_id=key, run_id="r", stage="produce", messages=messages,
            source=source, **more
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def make_response(make_prompt):
    def make(answers=("first answer", "second answer"), **more):
        prompt = make_prompt(**more)
        completions = [Completion(index=i, text=t, finish_reason=FinishReason.STOP) for i, t in enumerate(answers)]
        return Response(
            record_id=ids.compute_record_id("respond", [prompt.record_id], "f"), prompt_id=prompt.prompt_id, run_id="r",
            stage="respond", messages=prompt.messages, source=prompt.source, completions=completions, policy_version=3,
            model=ModelRef(id="m", revision="v"),
        )  # fmt: skip

    return make
