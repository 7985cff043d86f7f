"""The codec: what goes in comes out; whatever is wrong with bytes is a named error."""

import contextlib
import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import codec
from schemas.ids import compute_id
from schemas.records import (
    RECORDS,
    ChatMessage,
    Completion,
    DeadLetter,
    DeadLetterKind,
    FinishReason,
    Preference,
    Prompt,
    Response,
)

ID = compute_id("x")


def prompt(content="hello", **more):
    return Prompt(
        record_id=ID,
        prompt_id=ID,
        run_id="r",
        stage="s",
        messages=[ChatMessage(role="user", content=content)],
        source="x",
        **more,
    )


def response():
    candidate = Completion(index=0, text="hi", token_ids=[1, 2], logprobs=[-0.5, -1.5], finish_reason=FinishReason.STOP)
    return Response(record_id=ID, run_id="r", stage="respond", messages=[], source="x", completions=[candidate])


def test_header_is_the_avro_single_object_encoding():
    data = codec.encode_record(prompt())
    assert data[:2] == b"\xc3\x01"
    assert data[2:10] == codec.compute_schema_fingerprint(codec.get_schema(Prompt))


def test_crc_64_avro_is_the_specifications():
    # From the Avro specification: the fingerprint of "int" is 0x7275d51a3f395c8f, written little-endian.
    assert codec.compute_schema_fingerprint("int") == struct.pack("<Q", 0x7275D51A3F395C8F)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 2**31), st.lists(st.text("abc")))
def test_any_prompt_round_trips(text, epoch, tags):
    record = prompt(text, epoch=epoch, tags=tags)
    assert codec.decode_record(codec.encode_record(record), Prompt) == record


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1)))
def test_times_keep_their_microseconds(when):
    record = prompt(created_at=when.replace(tzinfo=UTC))
    assert codec.decode_record(codec.encode_record(record), Prompt).created_at == record.created_at


def test_nested_records_and_bytes_round_trip():
    record = response()
    assert codec.decode_record(codec.encode_record(record), Response) == record
    letter = DeadLetter(
        record_id=ID, run_id="r", stage="s", kind=DeadLetterKind.DECODE, source_topic="t", source_partition=1, source_offset=2,
        value=b"\x00\xff", error_class="E", error_message="m",
    )  # fmt: skip
    assert codec.decode_record(codec.encode_record(letter), DeadLetter) == letter


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_truncated_bytes_are_a_named_error(cut):
    with pytest.raises((codec.Truncated, codec.NotARecord, codec.Malformed)):
        codec.decode_record(codec.encode_record(prompt())[:cut], Prompt)


def test_left_over_bytes_are_a_named_error():
    with pytest.raises(codec.Truncated, match="left over"):
        codec.decode_record(codec.encode_record(prompt()) + b"x", Prompt)


def test_unknown_fingerprint_names_it():
    data = codec.encode_record(prompt())
    with pytest.raises(codec.UnknownFingerprint, match="00" * 8):
        codec.decode_record(data[:2] + bytes(8) + data[10:], Prompt)


def test_wrong_record_type_names_both():
    with pytest.raises(codec.WrongRecord, match="expected a Preference, found a Prompt"):
        codec.decode_record(codec.encode_record(prompt()), Preference)


def test_an_id_that_is_none_is_malformed():
    record = Prompt.model_construct(**{**prompt().model_dump(), "record_id": "not an id", "messages": []})
    with pytest.raises(codec.Malformed):
        codec.decode_record(codec.encode_record(record), Prompt)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(data):
    with pytest.raises(codec.RecordError):
        codec.decode_record(data, Prompt)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_records_decode_or_are_a_named_error(data):
    good = bytearray(codec.encode_record(response()))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(10, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(codec.RecordError):
        codec.decode_record(bytes(good), Response)


def test_every_record_has_a_topic_of_its_own():
    assert len({model.topic for model in RECORDS}) == len(RECORDS)
