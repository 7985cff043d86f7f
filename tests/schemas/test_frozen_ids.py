"""Ids and seeds do not change between versions: the values here must never be edited.

With other ids a replay would repeat finished work, and records that refer to each other would no longer match.
"""

import hashlib
import json

import pytest

from charter.api import Charter
from schemas import ids

# Subject -> the fingerprint of its keys, each with its own name in the hash as its value.
FINGERPRINTS = {
    "prompt": "5700f499-c6fc-73f0-654b-4336f3b154d9",
    "suite_prompt": "31f69c39-ece4-2364-47b9-a6c7933a801b",
    "source": "554ba33f-95f5-c2b3-edab-893466297561",
    "generation": "e203b489-fe02-086a-98f3-a4dbe0ddd069",
    "human_preference": "13a6a0bf-67dd-df91-9c70-18ed19337c1f",
    "demonstration": "7cefbd01-df02-1120-80ef-63d9fd099cdb",
    "template": "8f0590e4-d977-5b38-04cf-bf57a0e7612a",
    "respond": "4c26ed43-a7b7-6af8-aae9-256b36dff2b2",
    "contrast_prompt": "9d3c6923-c550-33c8-bf55-392921d93d60",
    "contrast": "130ee5ef-6f67-0ab6-0df0-4bb800e8cfdb",
    "critique": "2775f862-32f4-4fb2-b569-1e2920916fc7",
    "revise": "b6ca0257-8ec2-4bef-60fb-cef0fcbbde83",
    "judge": "7d3c5de5-07cb-ec3a-6a85-9c7ee61e02dd",
    "grade": "db9c669f-7def-a418-6f61-bac864dd9940",
    "imported_pair": "6f8137cf-195c-6196-fa8d-73224babe484",
    "human_label": "cee433ce-b268-d187-7745-faab2c5001f0",
    "served_model": "52e8ee93-c265-2ee2-478f-02cc9745aaa5",
    "run": "98f0e484-15e4-4a70-4eba-37ef67707097",
    "run_configuration": "1742c858-f6f5-386b-a179-53fd3b9da79a",
    "replay": "d8638bba-76cb-b4ba-ed8c-9bd3ef8af856",
    "batch": "28e1715f-6494-3676-c3e5-762633e0b53a",
    "policy_update": "41aa651e-a952-a69b-89a5-f60a9802d82d",
    "policy_restore": "04eed88b-00d7-d484-6e1b-32f66f232ac9",
    "run_start": "1a34e0e7-eaa3-3199-f949-9e167fc36dec",
    "pause": "68cf73b3-e672-6cd7-80e0-c0e36e2dcbe0",
    "allowance": "13316a98-1451-26b6-8549-c97a0ab52a49",
    "not_needed": "5700f499-c6fc-73f0-654b-4336f3b154d9",
    "metric": "4893a79e-b327-6574-41d4-461dc96a96af",
    "score": "9cc56e38-befa-e3cd-1b48-499916c8ff0d",
    "dropped_rollout": "d4b05519-eb91-e900-417b-764da6dc12c0",
    "rollback_incident": "d4b05519-eb91-e900-417b-764da6dc12c0",
    "incident": "054f7058-1ec1-a0ea-40ec-95582ae64b07",
    "monitor": "4039568b-3310-c397-bf5e-ce1f90048afa",
}
# Settings -> stage -> (number of records, hash over their ids and seeds).
RECORDS = [
    (
        {},
        {
            "critique": (7, "923f1296849db042"),
            "judge": (6, "9f8b32e743960097"),
            "respond": (6, "9aed7618edb28fbc"),
            "revise": (1, "04b35c0c15cf4b3b"),
        },
    ),
    (
        {"critique.preset": "bai2022", "judge.preset": "ensemble-k"},
        {
            "critique": (30, "57e909e07b9883dd"),
            "judge": (6, "1b39e6ad9dbf6b79"),
            "respond": (6, "9aed7618edb28fbc"),
            "revise": (24, "3466e2f7cf9f1090"),
        },
    ),
    (
        {"judge.pairing": "revision"},
        {"critique": (7, "923f1296849db042"), "respond": (6, "9aed7618edb28fbc"), "revise": (1, "04b35c0c15cf4b3b")},
    ),
    (
        {"critique.preset": "course", "judge.preset": "course"},
        {
            "critique": (24, "5ea873235a8f1083"),
            "judge": (6, "cd553b24a929ca64"),
            "respond": (6, "9aed7618edb28fbc"),
            "revise": (18, "c51a99c58fbd0bea"),
        },
    ),
    (
        {"judge.preset": "bai2022-cot"},
        {
            "critique": (7, "923f1296849db042"),
            "judge": (6, "928e6bc7d341b35c"),
            "respond": (6, "9aed7618edb28fbc"),
            "revise": (1, "04b35c0c15cf4b3b"),
        },
    ),
    (
        {"judge.preset": "bai2022"},
        {
            "critique": (7, "923f1296849db042"),
            "judge": (6, "7baedfb57c9a5575"),
            "respond": (6, "9aed7618edb28fbc"),
            "revise": (1, "04b35c0c15cf4b3b"),
        },
    ),
]


@pytest.mark.parametrize("subject", list(ids.FINGERPRINT_KEYS))
def test_fingerprint_of_each_subject_does_not_change(subject):
    keys = ids.FINGERPRINT_KEYS[subject]
    assert ids.compute_fingerprint(subject, **keys) == FINGERPRINTS[subject]
    assert len(set(keys.values())) == len(keys)


def test_unknown_subject_key_or_purpose_raises_key_error():
    with pytest.raises(KeyError):
        ids.compute_fingerprint("respond", color="red")
    with pytest.raises(KeyError):
        ids.compute_fingerprint("new stage")
    with pytest.raises(KeyError):
        ids.compute_stage_seed("new stage", "id", 0)


def test_stage_seeds_do_not_change():
    seeds = {
        purpose: ids.compute_stage_seed(purpose, "00000000-0000-0000-0000-000000000001", 2) for purpose in ids.SEED_PURPOSES
    }
    assert seeds == {
        "principle": 6470905821573877933,
        "critique": 5107093964522324837,
        "revise": 5003543452615648219,
        "judge": 516733593008490830,
    }


@pytest.mark.parametrize(("settings", "expected"), RECORDS)
def test_record_ids_and_seeds_do_not_change(settings, expected):
    api = Charter(settings={"models.policy": "scripted", **settings})
    seeds_by_stage = {}
    for pair in api.generate_preference_pairs([f"prompt number {n}" for n in range(6)]):
        chain = pair.chain or api.self_critique_loop(pair.response)
        for record in (*chain.records, *pair.records):
            seeds_by_stage.setdefault(record.stage, {})[record.record_id] = record.seed
    hashes = {
        stage: (len(seeds), hashlib.sha256(json.dumps(sorted(map(list, seeds.items()))).encode()).hexdigest()[:16])
        for stage, seeds in seeds_by_stage.items()
    }
    assert hashes == expected
