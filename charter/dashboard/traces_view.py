"""Search prompts, and load all records of one prompt, for the traces view."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from charter.constitution_texts import load_constitutions
from charter.sent_prompts import StageInputs, list_verdict_options, list_vote_options, load_stage_inputs
from engine.budget import Price
from engine.errors import UsageError
from engine.store import QueryFunction
from producers.replay import record_from_row
from schemas.records import Record
from schemas.topics import TOPICS

_PAGE_SIZE = 25
_EXCERPT_LENGTH = 240  # characters of a prompt in the list
_ID_PREFIX_PATTERN = re.compile(r"[0-9a-f]{4,8}(-[0-9a-f-]*)?")
SEARCH_SCOPES = {"prompts": "prompts", "everything": "all text"}
_TRACE_TABLES = ("responses", "critiques", "revisions", "preferences")

# The SQL condition of each filter. For example, the parameter `$source` is the value of the filter `source`.
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
_COMPLETIONS_TEXT_SQL = "array_to_string(list_transform(completions, lambda completion: completion.text), chr(10))"


def search_traces(query: QueryFunction, run: str, filters: Mapping[str, str]) -> dict[str, Any]:
    """Return one page of the matching prompts, newest first, each with a summary of its records.

    Without a run, a filter or a search text, the prompts of evaluation suites are left out.
    The page has only prompts whose commit sequence number is below `filters["before"]`. For the next page, pass `next_before`.
    """
    conditions, values = _build_conditions(filters)
    if not run and not filters.get("q") and not any(filters.get(name) for name in _FILTER_CONDITIONS):
        conditions.append("split <> 'SUITE'")
    # `prompts` has only the first run that produced a prompt. `raw.prompts` has all runs.
    table = "raw.prompts" if run else "prompts"
    if run:
        conditions.append("run_id = $run")
        values["run"] = run
    sql = f"""SELECT prompt_id, commit_seq, created_at, source, tags, split, epoch, len(messages) AS messages,
                     messages[-1].content[:{_EXCERPT_LENGTH + 1}] AS prompt
              FROM {table} WHERE {" AND ".join(conditions) or "TRUE"} ORDER BY commit_seq DESC LIMIT {_PAGE_SIZE + 1}"""
    rows = query(sql, values).to_dicts()
    next_before = rows[_PAGE_SIZE - 1]["commit_seq"] if len(rows) > _PAGE_SIZE else None
    rows = rows[:_PAGE_SIZE]
    _add_summaries(query, rows)
    return {
        "traces": rows,
        "next_before": next_before,
        "filters": {name: filters[name] for name in _FILTER_CONDITIONS if filters.get(name)},
    }


def _build_conditions(filters: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """Return the WHERE clauses of a search and the values of their parameters."""
    conditions = [clause for name, clause in _FILTER_CONDITIONS.items() if filters.get(name)]
    values: dict[str, Any] = {name: filters[name] for name in _FILTER_CONDITIONS if filters.get(name)}
    if before := filters.get("before"):
        conditions.append("commit_seq < $before")
        values["before"] = _parse_integer(before)
    terms = (filters.get("q") or "").lower().split()
    text_condition = " AND ".join(_build_text_condition(f"$term{n}", filters.get("scope", "")) for n in range(len(terms)))
    if len(terms) == 1 and (id_range := _compute_id_range(terms[0])):
        text_condition = f"({text_condition}) OR prompt_id BETWEEN $first::UUID AND $last::UUID"
        values |= {"first": id_range[0], "last": id_range[1]}
    if terms:
        conditions.append(f"({text_condition})")
        values |= {f"term{n}": term for n, term in enumerate(terms)}
    return conditions, values


def _build_text_condition(term: str, scope: str) -> str:
    """Return the SQL condition for prompts with a term. Scope `everything` also searches responses, critiques and revisions."""
    in_prompts = f"contains(lower({_MESSAGES_TEXT_SQL}), {term})"
    if scope != "everything":
        return in_prompts
    return f"""({in_prompts} OR prompt_id IN (
        SELECT prompt_id FROM responses WHERE contains(lower({_COMPLETIONS_TEXT_SQL}), {term})
        UNION ALL SELECT prompt_id FROM critiques WHERE contains(lower(critique), {term})
        UNION ALL SELECT prompt_id FROM revisions WHERE contains(lower(response), {term})))"""


def _compute_id_range(term: str) -> tuple[str, str] | None:
    """Return the smallest and the largest id that begin with `term`. Return None if ids cannot begin with `term`."""
    digits = term.replace("-", "")
    if not _ID_PREFIX_PATTERN.fullmatch(term) or len(digits) > 32:
        return None
    return digits.ljust(32, "0"), digits.ljust(32, "f")


def _parse_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"before={text[:40]} is not a page of the list", "it must be a whole number", "open the first page: /traces"
        ) from None


def _add_summaries(query: QueryFunction, traces: list[dict[str, Any]]) -> None:
    """Add a summary to each trace of a page: policies, number of completions, end of the chain, labels, best reward."""
    parameters = {"page": [trace["prompt_id"] for trace in traces]}
    on_page = "WHERE prompt_id IN (SELECT unnest($page::UUID[]))"
    responses = f"""SELECT prompt_id, list(DISTINCT policy_version ORDER BY policy_version) AS policies,
                           sum(len(completions))::BIGINT AS num_completions FROM responses {on_page} GROUP BY 1"""
    ends = f"SELECT prompt_id, arg_max(end_reason, commit_seq) AS end_reason, max(round) AS rounds FROM revision_chains {on_page} GROUP BY 1"
    labels = f"""SELECT prompt_id, count(*) AS labels, arg_max(p_a, commit_seq) AS p_a, arg_max(outcome, commit_seq) AS outcome,
                        bool_or(position_flip) AS position_flip FROM preferences {on_page} GROUP BY 1"""
    rewards = f"SELECT prompt_id, max(normalized_score) AS reward FROM scores {on_page} GROUP BY 1"
    for sql in (responses, ends, labels, rewards):
        result = query(sql, parameters)
        by_prompt = {row["prompt_id"]: row for row in result.to_dicts()}
        for trace in traces:
            trace.update(by_prompt.get(trace["prompt_id"]) or dict.fromkeys(result.columns[1:]))


def load_facets(query: QueryFunction, run: str) -> dict[str, list[Any]]:
    """Return the values that the user can select in each filter."""
    queries = {
        "source": "SELECT DISTINCT source FROM prompts",
        "tag": "SELECT DISTINCT unnest(tags) FROM prompts",
        "end_reason": "SELECT DISTINCT end_reason FROM revision_chains",
        "principle": "SELECT DISTINCT principle_id FROM critiques UNION SELECT DISTINCT principle_id FROM preferences",
        "policy": "SELECT DISTINCT policy_version FROM responses",
        "outcome": "SELECT DISTINCT outcome FROM preferences",
    }
    return {
        name: sorted((value for (value,) in query(sql, (), 200).rows if value is not None), key=lambda v: (str(type(v)), v))
        for name, sql in queries.items()
    }


# One trace

# Selects a prompt from the topic prompts, or a prompt that exists only in imported human data.
_PROMPT_SQL = """SELECT a.*, p.run_id FROM all_prompts a LEFT JOIN prompts p USING (prompt_id)
         WHERE a.prompt_id = TRY_CAST(? AS UUID) AND (p.prompt_id IS NULL OR p.prompt_id = TRY_CAST(? AS UUID)) LIMIT 1"""


def load_trace(query: QueryFunction, prompt_id: str) -> dict[str, Any]:
    """Return all records of one prompt. `prompt` is None if the database has no prompt with this id."""
    prompts = query(_PROMPT_SQL, [prompt_id, prompt_id]).to_dicts()
    if not prompts:
        return {"prompt": None, "id": prompt_id}
    rows = {
        table: query(f"SELECT * FROM {table} WHERE prompt_id = ?::UUID ORDER BY commit_seq", [prompt_id], 200).to_dicts()
        for table in (*_TRACE_TABLES, "scores", "demonstrations")
    }
    dead_letters = "SELECT record_id, stage, kind, error_class, error_message AS message, created_at FROM dead_letters WHERE source_key = encode(?)"
    for row in rows["preferences"]:
        for vote in row["votes"] or []:
            vote["options"] = list_vote_options(vote)
    for row in rows["critiques"]:
        for verdict in row["verdicts"] or []:
            verdict["options"] = list_verdict_options(verdict)
    return {
        "id": prompt_id,
        "prompt": prompts[0],
        "responses": _attach_scores(rows["responses"], rows["scores"]),
        "chains": _group_chains(rows["critiques"], rows["revisions"]),
        "preferences": rows["preferences"],
        "demonstrations": rows["demonstrations"],
        "dead_letters": query(dead_letters, [prompt_id], 50).to_dicts(),
        "principles": _load_principles(query, [row["constitution"] for table in _TRACE_TABLES for row in rows[table]]),
    }


def load_inputs(query: QueryFunction, prompt_id: str, prices: Mapping[str, Price]) -> StageInputs:
    """Return the records of a prompt and the manifests of their runs, from which the sent prompts are rebuilt."""
    specs = [spec for spec in TOPICS.values() if spec.table in ("prompts", *_TRACE_TABLES)]
    sql = "SELECT * FROM {} WHERE prompt_id = TRY_CAST(? AS UUID) ORDER BY commit_seq"
    records: list[Record] = [
        record_from_row(spec.record_class, row)
        for spec in specs
        for row in query(sql.format(spec.table), [prompt_id], 200).to_dicts()
    ]
    return load_stage_inputs(query, records, prices)


def _attach_scores(responses: list[dict[str, Any]], scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the score of the newest reward model to each completion, and remove the token ids and logprobs.

    The page needs only the number of tokens and the mean logprob, so they replace the arrays.
    """
    newest = {(str(s["response_id"]), s["completion_index"]): s for s in sorted(scores, key=lambda s: s["reward_version"])}
    for response in responses:
        response.pop("prompt_token_ids")
        for completion in response["completions"]:
            completion["num_tokens"] = len(completion.pop("token_ids") or [])
            logprobs = completion.pop("logprobs") or []
            completion["mean_logprob"] = sum(logprobs) / len(logprobs) if logprobs else None
            score = newest.get((str(response["record_id"]), completion["index"]))
            completion["reward"] = score and {name: score[name] for name in ("reward_version", "score", "normalized_score")}
    return responses


def _group_chains(critiques: list[dict[str, Any]], revisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group critiques and revisions into chains.

    A step belongs to the chain of its parent. A step without a parent starts a chain.
    """
    steps = [row | {"step": "critique"} for row in critiques] + [row | {"step": "revision"} for row in revisions]
    chains: dict[str, dict[str, Any]] = {}
    chain_ids: dict[str, str] = {}  # record id -> chain id
    for row in sorted(steps, key=lambda row: (row["round"], row["step"] == "critique", row["commit_seq"])):
        parents = [chain_ids[str(parent)] for parent in row["parent_ids"] or [] if str(parent) in chain_ids]
        chain_id = parents[0] if parents else str(row["record_id"])
        chain_ids[str(row["record_id"])] = chain_id
        first = {"initial_response": row["initial_response"], "run_id": row["run_id"], "constitution": row["constitution"]}
        chain = chains.setdefault(chain_id, first | {"policy_version": row["policy_version"], "steps": [], "end_reason": None})
        chain["steps"].append(row)
        if row["final"]:
            chain |= {"end_reason": row["end_reason"], "final_response": row["final_response"]}
    return list(chains.values())


def _load_principles(query: QueryFunction, constitutions: list[dict[str, Any] | None]) -> dict[str, dict[str, str]]:
    """Return {principle id: {name, text}} from the constitutions in the run manifests."""
    principles: dict[str, dict[str, str]] = {}
    for constitution in load_constitutions(query, [c["hash"] for c in constitutions if c]).values():
        principles |= {p.id: {"name": p.name, "text": p.critique_prompt} for p in constitution.critique}
        principles |= {p.id: {"name": p.name, "text": p.judge_prompt} for p in constitution.judge}
    return principles
