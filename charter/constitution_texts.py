"""Load the constitutions of runs from the database, and find the question that a pair was judged by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from constitutions.loader import ALL_PRINCIPLES_ID, Constitution, ConstitutionError, parse_constitution
from engine.notices import NOTICES
from engine.store import QueryFunction

_CONSTITUTIONS_SQL = """
    SELECT DISTINCT ON (constitution.hash) constitution.hash, constitution_text FROM raw.runs
    WHERE constitution.hash IN (SELECT unnest($hashes::VARCHAR[])) ORDER BY commit_seq"""


def load_constitutions(query: QueryFunction, hashes: Iterable[str]) -> dict[str, Constitution]:
    """Return {hash: constitution} from the run manifests.

    A constitution that this version of Charter cannot read, or reads with another hash, is reported and omitted.
    """
    constitutions = {}
    for hash_, text in query(_CONSTITUTIONS_SQL, {"hashes": sorted(set(hashes))}).rows:
        try:
            constitution = parse_constitution(text, "the run's constitution")
        except ConstitutionError as error:
            NOTICES.report("constitution", hash_, f"the stored constitution {hash_[:12]} cannot be read: {error.what}")
            continue
        if constitution.hash == hash_:
            constitutions[hash_] = constitution
        else:
            message = f"the stored constitution {hash_[:12]} now has the hash {constitution.hash[:12]}, so its questions are not shown"
            NOTICES.report("constitution", hash_, message)
    return constitutions


def find_judge_questions(constitution: Constitution, preference: Mapping[str, Any]) -> list[str]:
    """Return the questions that a pair was judged by, one for each vote. Omit principles that the constitution does not have.

    `preference` is a row of the table preferences.
    """
    principle_ids = [vote["principle_id"] for vote in preference["votes"] or []] or [preference["principle_id"]]
    prompts = {p.id: p.judge_prompt for p in constitution.judge} | {ALL_PRINCIPLES_ID: constitution.combined_judge_prompt}
    return [prompts[id_] for id_ in principle_ids if id_ in prompts]
