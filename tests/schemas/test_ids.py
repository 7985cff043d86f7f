"""Ids are deterministic, and nothing that changes a result leaves them the same."""

from hypothesis import given
from hypothesis import strategies as st

from schemas import ids
from schemas.records import ChatMessage


def messages(*contents):
    return [ChatMessage(role="user", content=content) for content in contents]


def test_ids_do_not_change_between_versions():
    # A change here would make every replay new work: it needs a migration, not a new number.
    assert ids.compute_prompt_id(messages("hello")) == "8e69355a-4aa2-65be-6d73-5bc9a99a118b"


@given(st.text(), st.text())
def test_the_same_words_cut_elsewhere_are_another_prompt(a, b):
    assert ids.compute_prompt_id(messages(a, b)) != ids.compute_prompt_id(messages(a + b))


def test_epoch_stage_parents_configuration_and_sample_all_count():
    base = ids.compute_record_id("judge", ["p"], "f", 0)
    others = [
        ids.compute_record_id("respond", ["p"], "f", 0),
        ids.compute_record_id("judge", ["q"], "f", 0),
        ids.compute_record_id("judge", ["p"], "g", 0),
        ids.compute_record_id("judge", ["p"], "f", 1),
        ids.compute_prompt_id(messages("p"), 1),
    ]
    assert len({base, *others}) == 6
    assert ids.compute_record_id("judge", ["p"], "f", 0) == base


def test_a_fingerprint_does_not_depend_on_the_order_of_its_parts():
    assert ids.compute_fingerprint("custom_stage", a=1, b=2) == ids.compute_fingerprint("custom_stage", b=2, a=1)
    assert ids.compute_fingerprint("custom_stage", a=1, b=2) != ids.compute_fingerprint("custom_stage", a=2, b=1)


def test_seeds_fit_in_63_bits():
    assert all(0 <= ids.compute_seed(ids.compute_id(i)) < 2**63 for i in range(100))
