"""The codec: records round-trip, and invalid bytes raise a specific error."""

import contextlib
import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas import codec
from schemas.ids import compute_id
from schemas.records import (
    RECORDS,
    ChatMessage,
    Completion,
    DeadLetter,
    DeadLetterKind,
    FinishReason,
    Metric,
    Preference,
    PrincipleVote,
    Prompt,
    Response,
    Score,
)

ID = compute_id("x")


def make_prompt(content="hello", **more):
    return Prompt(
        record_id=ID,
        prompt_id=ID,
        run_id="r",
        stage="s",
        messages=[ChatMessage(role="user", content=content)],
        source="x",
        **more,
    )


def make_response():
    completion = Completion(index=0, text="hi", token_ids=[1, 2], logprobs=[-0.5, -1.5], finish_reason=FinishReason.STOP)
    return Response(record_id=ID, run_id="r", stage="respond", messages=[], source="x", completions=[completion])


def test_header_is_the_avro_single_object_encoding():
    data = codec.encode_record(make_prompt())
    assert data[:2] == b"\xc3\x01"
    assert data[2:10] == codec.compute_schema_fingerprint(codec.get_schema(Prompt))


def test_schema_fingerprint_matches_the_avro_specification():
    # From the Avro specification: the fingerprint of "int" is 0x7275d51a3f395c8f, written little-endian.
    assert codec.compute_schema_fingerprint("int") == struct.pack("<Q", 0x7275D51A3F395C8F)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 2**31), st.lists(st.text("abc")))
def test_any_prompt_round_trips(text, epoch, tags):
    record = make_prompt(text, epoch=epoch, tags=tags)
    assert codec.decode_record(codec.encode_record(record), Prompt) == record


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1)))
def test_timestamps_keep_their_microseconds(created_at):
    record = make_prompt(created_at=created_at.replace(tzinfo=UTC))
    assert codec.decode_record(codec.encode_record(record), Prompt).created_at == record.created_at


def test_nested_records_and_bytes_round_trip():
    record = make_response()
    assert codec.decode_record(codec.encode_record(record), Response) == record
    dead_letter = DeadLetter(
        record_id=ID, run_id="r", stage="s", kind=DeadLetterKind.DECODE, source_topic="t", source_partition=1, source_offset=2,
        value=b"\x00\xff", error_class="E", error_message="m",
    )  # fmt: skip
    assert codec.decode_record(codec.encode_record(dead_letter), DeadLetter) == dead_letter


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_truncated_bytes_raise_a_record_error(length):
    with pytest.raises((codec.Truncated, codec.NotARecord, codec.Malformed)):
        codec.decode_record(codec.encode_record(make_prompt())[:length], Prompt)


def test_left_over_bytes_raise_truncated():
    with pytest.raises(codec.Truncated, match="extra bytes"):
        codec.decode_record(codec.encode_record(make_prompt()) + b"x", Prompt)


def test_error_for_an_unknown_fingerprint_contains_it():
    data = codec.encode_record(make_prompt())
    with pytest.raises(codec.UnknownFingerprint, match="00" * 8):
        codec.decode_record(data[:2] + bytes(8) + data[10:], Prompt)


def test_error_for_a_wrong_record_type_names_both_types():
    with pytest.raises(codec.WrongRecord, match="expected a Preference, found a Prompt"):
        codec.decode_record(codec.encode_record(make_prompt()), Preference)


def test_invalid_id_raises_malformed():
    record = Prompt.model_construct(**{**make_prompt().model_dump(), "record_id": "not an id", "messages": []})
    with pytest.raises(codec.Malformed):
        codec.decode_record(codec.encode_record(record), Prompt)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_a_record_error(data):
    with pytest.raises(codec.RecordError):
        codec.decode_record(data, Prompt)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_record_decodes_or_raises_a_record_error(data):
    encoded = bytearray(codec.encode_record(make_response()))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(10, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(codec.RecordError):
        codec.decode_record(bytes(encoded), Response)


def test_every_record_has_a_separate_topic():
    assert len({model.topic for model in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("invalid", [float("nan"), float("inf"), -float("inf")])
def test_a_number_without_a_finite_value_becomes_null_in_a_vote(invalid):
    vote = PrincipleVote(
        principle_id="p", p_forward=invalid, p_backward=0.5, option_mass_forward=invalid, option_mass_backward=0.0
    )
    assert (vote.p_forward, vote.p_backward, vote.option_mass_forward) == (None, 0.5, None)


def test_a_metric_without_a_finite_value_is_omitted():
    metric = Metric(
        record_id=ID,
        run_id="r",
        stage="s",
        phase="ppo",
        batch_number=1,
        step=0,
        metrics={"loss": 0.5, "kl": float("nan"), "reward": float("inf")},
    )
    assert codec.decode_record(codec.encode_record(metric), Metric).metrics == {"loss": 0.5}


def test_a_required_number_rejects_nan():
    with pytest.raises(ValidationError, match="finite number"):
        Score(
            record_id=ID,
            run_id="r",
            stage="s",
            response_id=ID,
            completion_index=0,
            reward_version=1,
            score=float("nan"),
            normalized_score=0.0,
        )
