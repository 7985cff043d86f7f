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
    suite_id = ids.compute_suite_prompt_id("xstest", "v2-1", "role-play", make_messages("How?"))
    assert suite_id == "51bd6f88-f15c-6eb0-b65d-5ea0c95aad90"


def test_a_suite_prompt_has_an_id_for_each_place_in_a_suite():
    places = [("a", "1", ""), ("b", "1", ""), ("a", "2", ""), ("a", "1", "role-play"), ("a1", "", "")]
    suite_ids = [ids.compute_suite_prompt_id(*place, make_messages("hello")) for place in places]
    other_text = ids.compute_suite_prompt_id("a", "1", "", make_messages("hello", ""))
    assert len({*suite_ids, other_text, ids.compute_prompt_id(make_messages("hello"))}) == len(places) + 2


@given(st.text(min_size=1), st.text(min_size=1))
def test_prompt_id_depends_on_message_boundaries(a, b):
    split_elsewhere = make_messages(a + b[:1], b[1:])
    assert len({ids.compute_prompt_id(m) for m in (make_messages(a, b), make_messages(a + b), split_elsewhere)}) == 3


@given(st.lists(st.text(max_size=3), min_size=2, max_size=4), st.lists(st.text(max_size=3), min_size=2, max_size=4))
def test_different_parts_have_different_ids(first, second):
    assert (ids.compute_id(*first) == ids.compute_id(*second)) == (first == second)


def test_record_id_depends_on_stage_parents_configuration_and_sample():
    base = ids.compute_record_id("judge", ["p"], "f", 0)
    others = [
        ids.compute_record_id("respond", ["p"], "f", 0),
        ids.compute_record_id("judge", ["q"], "f", 0),
        ids.compute_record_id("judge", ["p"], "g", 0),
        ids.compute_record_id("judge", ["p"], "f", 1),
        ids.compute_record_id("judge", ["p", "q"], "f", 0),
    ]
    assert len({base, *others}) == 6


def test_prompt_id_depends_on_the_epoch():
    assert len({ids.compute_prompt_id(make_messages("p"), epoch) for epoch in range(3)}) == 3


def test_fingerprint_does_not_depend_on_the_order_of_its_keys():
    assert ids.compute_fingerprint("custom_stage", a=1, b=2) == ids.compute_fingerprint("custom_stage", b=2, a=1)
    assert ids.compute_fingerprint("custom_stage", a=1, b=2) != ids.compute_fingerprint("custom_stage", a=2, b=1)


def test_seeds_fit_in_63_bits_and_differ():
    # torch.Generator.manual_seed takes a signed 64-bit integer.
    seeds = {ids.compute_seed(ids.compute_id(i)) for i in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)
