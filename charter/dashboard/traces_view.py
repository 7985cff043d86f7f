"""The stories: prompts, searched and filtered, and everything that became of one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.errors import UsageError
from engine.store import QueryFunction

_PAGE_SIZE = 25
_EXCERPT_LENGTH = 240  # characters of a prompt in the list
_ID_PREFIX_PATTERN = re.compile(r"[0-9a-f]{4,8}(-[0-9a-f-]*)?")
SEARCH_SCOPES = {"prompts": "in prompts", "everything": "in everything"}
_TRACE_TABLES = ("responses", "critiques", "revisions", "preferences")

# Each filter of the list: which prompts it keeps. `$name` is its value.
_FILTER_CONDITIONS = {
    "source": "source = $source",
    "split": "split = $split",
    "tag": "list_contains(tags, $tag)",
    "end_reason": "prompt_id IN (SELECT prompt_id FROM revision_chains WHERE end_reason = $end_reason)",
    "principle": """prompt_id IN (SELECT prompt_id FROM critiques WHERE principle_id = $principle
                                  UNION ALL SELECT prompt_id FROM preferences WHERE principle_id = $principle)""",
    "policy": "prompt_id IN (SELECT prompt_id FROM responses WHERE policy_version = TRY_CAST($policy AS BIGINT))",
    "outcome": "prompt_id IN (SELECT prompt_id FROM preferences WHERE outcome = $outcome)",
    "label": """prompt_id IN (SELECT prompt_id FROM preferences
                              WHERE CASE $label WHEN 'position_flip' THEN position_flip WHEN 'human' THEN label_source = 'HUMAN'
                                                WHEN 'sure' THEN abs(p_a - 0.5) >= 0.4
                                                WHEN 'unsure' THEN abs(p_a - 0.5) < 0.1 END)""",
}
_MESSAGES_TEXT_SQL = "array_to_string(list_transform(messages, lambda message: message.content), chr(10))"
_COMPLETIONS_TEXT_SQL = "array_to_string(list_transform(completions, lambda answer: answer.text), chr(10))"


def search_traces(query: QueryFunction, run: str, filters: Mapping[str, str]) -> dict[str, Any]:
    """One page of the prompts that fit, newest first, each with what became of it. `before` is where the page begins."""
    conditions, values = _build_conditions(filters)
    made_by = "raw.prompts" if run else "prompts"
    if run:
        conditions.append("run_id = $run")
        values["run"] = run
    sql = f"""SELECT prompt_id, commit_seq, created_at, source, tags, split, epoch, len(messages) AS messages,
                     messages[-1].content[:{_EXCERPT_LENGTH + 1}] AS prompt
              FROM {made_by} WHERE {" AND ".join(conditions) or "TRUE"} ORDER BY commit_seq DESC LIMIT {_PAGE_SIZE + 1}"""
    rows = query(sql, values).to_dicts()
    more = rows[_PAGE_SIZE - 1]["commit_seq"] if len(rows) > _PAGE_SIZE else None
    rows = rows[:_PAGE_SIZE]
    _add_summaries(query, rows)
    return {
        "stories": rows,
        "older": more,
        "filters": {name: filters[name] for name in _FILTER_CONDITIONS if filters.get(name)},
    }


def _build_conditions(filters: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """The WHERE clauses of a search and their values."""
    conditions = [clause for name, clause in _FILTER_CONDITIONS.items() if filters.get(name)]
    values: dict[str, Any] = {name: filters[name] for name in _FILTER_CONDITIONS if filters.get(name)}
    if before := filters.get("before"):
        conditions.append("commit_seq < $before")
        values["before"] = _parse_integer(before)
    terms = (filters.get("q") or "").lower().split()
    found = " AND ".join(_build_text_condition(f"$term{n}", filters.get("scope", "")) for n in range(len(terms)))
    if terms and (span := _compute_id_range(terms[0])) and len(terms) == 1:
        found = f"({found}) OR prompt_id BETWEEN $first::UUID AND $last::UUID"
        values |= {"first": span[0], "last": span[1]}
    if terms:
        conditions.append(f"({found})")
        values |= {f"term{n}": term for n, term in enumerate(terms)}
    return conditions, values


def _build_text_condition(term: str, scope: str) -> str:
    """Prompts that contain a term or, in everything, whose answers, critiques or revisions do."""
    in_prompts = f"contains(lower({_MESSAGES_TEXT_SQL}), {term})"
    if scope != "everything":
        return in_prompts
    return f"""({in_prompts} OR prompt_id IN (
        SELECT prompt_id FROM responses WHERE contains(lower({_COMPLETIONS_TEXT_SQL}), {term})
        UNION ALL SELECT prompt_id FROM critiques WHERE contains(lower(critique), {term})
        UNION ALL SELECT prompt_id FROM revisions WHERE contains(lower(response), {term})))"""


def _compute_id_range(term: str) -> tuple[str, str] | None:
    """The smallest and the largest id that begin with a term; None if it is no beginning of an id."""
    digits = term.replace("-", "")
    if not _ID_PREFIX_PATTERN.fullmatch(term) or len(digits) > 32:
        return None
    return digits.ljust(32, "0"), digits.ljust(32, "f")


def _parse_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"{text[:40]} is no place in the list", "it must be a whole number", "go back to the first page"
        ) from None


def _add_summaries(query: QueryFunction, traces: list[dict[str, Any]]) -> None:
    """Add to each story of a page: the policies that answered, how its chain ended, its labels, its best reward."""
    parameters = {"page": [story["prompt_id"] for story in traces]}
    on_page = "WHERE prompt_id IN (SELECT unnest($page::UUID[]))"
    responses = f"""SELECT prompt_id, list(DISTINCT policy_version ORDER BY policy_version) AS policies,
                           sum(len(completions))::BIGINT AS answers FROM responses {on_page} GROUP BY 1"""
    ends = f"SELECT prompt_id, arg_max(end_reason, commit_seq) AS end_reason, max(round) AS rounds FROM revision_chains {on_page} GROUP BY 1"
    labels = f"""SELECT prompt_id, count(*) AS labels, arg_max(p_a, commit_seq) AS p_a, arg_max(outcome, commit_seq) AS outcome,
                        bool_or(position_flip) AS position_flip FROM preferences {on_page} GROUP BY 1"""
    rewards = f"SELECT prompt_id, max(normalized_score) AS reward FROM scores {on_page} GROUP BY 1"
    for sql in (responses, ends, labels, rewards):
        found = query(sql, parameters)
        by_prompt = {row["prompt_id"]: row for row in found.to_dicts()}
        for story in traces:
            story.update(by_prompt.get(story["prompt_id"]) or dict.fromkeys(found.columns[1:]))


def load_facets(query: QueryFunction, run: str) -> dict[str, list[Any]]:
    """What the filters offer."""
    questions = {
        "source": "SELECT DISTINCT source FROM prompts",
        "tag": "SELECT DISTINCT unnest(tags) FROM prompts",
        "end_reason": "SELECT DISTINCT end_reason FROM revision_chains",
        "principle": "SELECT DISTINCT principle_id FROM critiques UNION SELECT DISTINCT principle_id FROM preferences",
        "policy": "SELECT DISTINCT policy_version FROM responses",
        "outcome": "SELECT DISTINCT outcome FROM preferences",
    }
    return {
        name: sorted((value for (value,) in query(sql, most=200).rows if value is not None), key=lambda v: (str(type(v)), v))
        for name, sql in questions.items()
    }


# One story

# A prompt of the stream, or one that only people's data is about.
_PROMPT_SQL = """SELECT a.*, p.run_id FROM all_prompts a LEFT JOIN prompts p USING (prompt_id)
         WHERE a.prompt_id = TRY_CAST(? AS UUID) AND (p.prompt_id IS NULL OR p.prompt_id = TRY_CAST(? AS UUID)) LIMIT 1"""


def load_trace(query: QueryFunction, prompt_id: str) -> dict[str, Any]:
    """Everything that became of the prompt with this id; the prompt is None when there is no such one (any more)."""
    found = query(_PROMPT_SQL, [prompt_id, prompt_id]).to_dicts()
    if not found:
        return {"prompt": None, "id": prompt_id}
    rows = {
        table: query(f"SELECT * FROM {table} WHERE prompt_id = ?::UUID ORDER BY commit_seq", [prompt_id], most=200).to_dicts()
        for table in (*_TRACE_TABLES, "scores", "demonstrations")
    }
    letters = "SELECT record_id, stage, kind, error_class, error_message AS message, created_at FROM dead_letters WHERE source_key = encode(?)"
    return {
        "id": prompt_id,
        "prompt": found[0],
        "answers": _attach_scores(rows["responses"], rows["scores"]),
        "chains": _group_chains(rows["critiques"], rows["revisions"]),
        "preferences": rows["preferences"],
        "demonstrations": rows["demonstrations"],
        "dead_letters": query(letters, [prompt_id], most=50).to_dicts(),
        "principles": _load_principles(query, [row["constitution"] for table in _TRACE_TABLES for row in rows[table]]),
    }


def _attach_scores(responses: list[dict[str, Any]], scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The responses, each candidate with the newest reward model's score of it; token ids stay in the database."""
    newest = {(str(s["response_id"]), s["completion_index"]): s for s in sorted(scores, key=lambda s: s["reward_version"])}
    for response in responses:
        response.pop("prompt_token_ids")
        for candidate in response["completions"]:
            candidate["tokens"] = len(candidate.pop("token_ids") or [])
            logprobs = candidate.pop("logprobs") or []
            candidate["mean_logprob"] = sum(logprobs) / len(logprobs) if logprobs else None
            score = newest.get((str(response["record_id"]), candidate["index"]))
            candidate["reward"] = score and {name: score[name] for name in ("reward_version", "score", "normalized_score")}
    return responses


def _group_chains(critiques: list[dict[str, Any]], revisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chains of critique and revision: a step follows the step that is its parent, else it begins a chain."""
    steps = [row | {"step": "critique"} for row in critiques] + [row | {"step": "revision"} for row in revisions]
    chains: dict[str, dict[str, Any]] = {}
    chain_of: dict[str, str] = {}
    for row in sorted(steps, key=lambda row: (row["round"], row["step"] == "critique", row["commit_seq"])):
        parents = [chain_of[str(parent)] for parent in row["parent_ids"] or [] if str(parent) in chain_of]
        chain_id = parents[0] if parents else str(row["record_id"])
        chain_of[str(row["record_id"])] = chain_id
        first = {"initial_response": row["initial_response"], "run_id": row["run_id"], "constitution": row["constitution"]}
        chain = chains.setdefault(chain_id, first | {"policy_version": row["policy_version"], "steps": [], "end_reason": None})
        chain["steps"].append(row)
        if row["final"]:
            chain |= {"end_reason": row["end_reason"], "final_response": row["final_response"]}
    return list(chains.values())


def _load_principles(query: QueryFunction, constitutions: list[dict[str, Any] | None]) -> dict[str, dict[str, str]]:
    """Principle id -> its name and words, from the constitutions that the runs have recorded."""
    from constitutions.loader import ConstitutionError, parse_constitution

    hashes = sorted({each["hash"] for each in constitutions if each})
    sql = """SELECT DISTINCT ON (constitution.hash) constitution_text FROM raw.runs
             WHERE constitution.hash IN (SELECT unnest($hashes::VARCHAR[])) ORDER BY commit_seq"""
    found: dict[str, dict[str, str]] = {}
    for (text,) in query(sql, {"hashes": hashes}).rows:
        try:
            constitution = parse_constitution(text, "the run's constitution")
        except ConstitutionError:
            continue  # of another version of Charter: its principles keep their ids alone
        found |= {p.id: {"name": p.name, "text": p.critique_prompt} for p in constitution.critique}
        found |= {p.id: {"name": p.name, "text": p.judge_prompt} for p in constitution.judge}
    return found
