"""Which completions are compared, and the sample index of a pair."""

from itertools import combinations

import pytest

from engine.errors import UsageError
from engine.pairing import compute_pair_index, list_pairs, name_pairing
from engine.settings import load_settings


def test_pairs_of_each_pairing():
    assert list_pairs("neighbors", 4) == [(0, 1), (1, 2), (2, 3)]
    assert list_pairs("circular", 4) == [(0, 1), (1, 2), (2, 3), (0, 3)]
    assert list_pairs("all", 4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [list_pairs(pairing, 2) for pairing in ("neighbors", "circular", "all")] == [[(0, 1)]] * 3
    assert [list_pairs(pairing, 1) for pairing in ("neighbors", "circular", "all")] == [[]] * 3


def test_each_pair_has_its_own_index_and_neighbors_keep_theirs():
    pairs = list(combinations(range(40), 2))
    assert len({compute_pair_index(a, b) for a, b in pairs}) == len(pairs)
    assert [compute_pair_index(a, a + 1) for a in range(40)] == list(range(40))


def test_the_earlier_name_of_neighbors_is_accepted_and_records_keep_it():
    settings, _ = load_settings({"judge.pairing": "completions"}, environment={})
    assert settings.judge.pairing == "neighbors" == load_settings({}, environment={})[0].judge.pairing
    assert [name_pairing(pairing) for pairing in ("neighbors", "circular", "all", "revision")] == ["completions"] * 3 + [
        "revision"
    ]
    with pytest.raises(UsageError, match=r"judge\.pairing"):
        load_settings({"judge.pairing": "pairs"}, environment={})
