"""Ids are deterministic, and every input that changes a result changes them."""

from hypothesis import given
from hypothesis import strategies as st

from schemas import ids
from schemas.records import ChatMessage


def make_messages(*contents):
    return [ChatMessage(role="user", content=content) for content in contents]


def test_ids_do_not_change_between_versions():
    # With another id every replay would repeat all work. A change needs a migration, not a new expected value.
    assert ids.compute_prompt_id(make_messages("hello")) == "8e69355a-4aa2-65be-6d73-5bc9a99a118b"


@given(st.text(), st.text())
def test_prompt_id_depends_on_message_boundaries(a, b):
    assert ids.compute_prompt_id(make_messages(a, b)) != ids.compute_prompt_id(make_messages(a + b))


def test_id_depends_on_epoch_stage_parents_configuration_and_sample():
    base = ids.compute_record_id("judge", ["p"], "f", 0)
    others = [
        ids.compute_record_id("respond", ["p"], "f", 0),
        ids.compute_record_id("judge", ["q"], "f", 0),
        ids.compute_record_id("judge", ["p"], "g", 0),
        ids.compute_record_id("judge", ["p"], "f", 1),
        ids.compute_prompt_id(make_messages("p"), 1),
    ]
    assert len({base, *others}) == 6
    assert ids.compute_record_id("judge", ["p"], "f", 0) == base


def test_fingerprint_does_not_depend_on_the_order_of_its_keys():
    assert ids.compute_fingerprint("custom_stage", a=1, b=2) == ids.compute_fingerprint("custom_stage", b=2, a=1)
    assert ids.compute_fingerprint("custom_stage", a=1, b=2) != ids.compute_fingerprint("custom_stage", a=2, b=1)


def test_seeds_fit_in_63_bits():
    assert all(0 <= ids.compute_seed(ids.compute_id(i)) < 2**63 for i in range(100))
