"""Factories for input records of the stages."""

import pytest

from schemas import ids
from schemas.records import ChatMessage, Completion, FinishReason, ModelRef, Prompt, Response


@pytest.fixture(scope="session")
def make_prompt():
    def make(text="How do magnets work?", source="test", **more):
        messages = [ChatMessage(role="user", content=text)]
        prompt_id = ids.compute_prompt_id(messages)
        return Prompt(
            record_id=ids.compute_record_id("produce", [prompt_id], ""), prompt_id=prompt_id, run_id="r", stage="produce", messages=messages,
            source=source, **more
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def make_response(make_prompt):
    def make(responses=("first answer", "second answer"), **more):
        prompt = make_prompt(**more)
        completions = [Completion(index=i, text=t, finish_reason=FinishReason.STOP) for i, t in enumerate(responses)]
        return Response(
            record_id=ids.compute_record_id("respond", [prompt.record_id], "f"), prompt_id=prompt.prompt_id, run_id="r",
            stage="respond", messages=prompt.messages, source=prompt.source, completions=completions, policy_version=3,
            model=ModelRef(id="m", revision="v"),
        )  # fmt: skip

    return make
