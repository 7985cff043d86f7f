"""Load the results of an evaluation, and the responses of two policies side by side, for the evaluation view and the report."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from charter.evaluation.results import (
    RUN_PATTERN,
    SuiteCompletion,
    compute_plane,
    compute_rates,
    list_evaluations,
    load_completions,
    make_run_pattern,
    resolve_policy,
)
from engine.errors import UsageError
from engine.store import QueryFunction

_PAGE_SIZE = 10  # prompts with the responses of two policies


def load_evaluation(query: QueryFunction, run: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the rates and the plane of one evaluation, and the responses of the selected cell.

    The evaluation is `parameters["name"]`, or that of `run`, or the newest one. Without any evaluation, `name` is None.
    """
    evaluations = list_evaluations(query)
    match = re.match(RUN_PATTERN, run)
    name = parameters.get("name") or (match[1] if match else next(iter(evaluations), None))
    if name is not None and name not in evaluations:
        raise UsageError(
            f"there is no evaluation {name}",
            f"the database has: {', '.join(evaluations) or 'no evaluation'}",
            "choose an evaluation on the page: /evaluation",
        )
    completions = load_completions(query, name) if name else []
    policies = evaluations[name] if name else []
    # All queries come first, because the read session has a time limit.
    responses = _load_responses(query, name, policies, completions, parameters) if name and "suite" in parameters else None
    return {
        "names": list(evaluations),
        "name": name,
        "policies": policies,
        "rows": _group_rates(completions, policies),
        "plane": compute_plane(completions),
        "responses": responses,
    }


def _group_rates(completions: Sequence[SuiteCompletion], policies: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row for each cell, with the rates of the policies in order. A policy without responses has None."""
    cells: dict[tuple[str, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in compute_rates(completions):
        interval = None if row.low is None else (row.low, row.high)
        cells[row.suite, row.subset, row.transform, row.metric][row.policy] = asdict(row) | {"interval": interval}
    return [
        dict(zip(("suite", "subset", "transform", "metric"), cell, strict=True)) | {"rates": [rates.get(p) for p in policies]}
        for cell, rates in cells.items()
    ]


def _load_responses(
    query: QueryFunction,
    name: str,
    policies: Sequence[int],
    completions: Sequence[SuiteCompletion],
    parameters: Mapping[str, str],
) -> dict[str, Any]:
    """Return one page of the prompts of a cell, with the completions of the policies `a` and `b` and their labels.

    Prompts on which the labels differ come first.
    """
    a, b = (
        resolve_policy(parameters.get(key) or str(default), name, policies)
        for key, default in (("a", policies[0]), ("b", policies[-1]))
    )
    cell = {key: parameters.get(key, "") for key in ("suite", "subset", "transform")}
    by_prompt: dict[str, dict[int, list[SuiteCompletion]]] = defaultdict(lambda: {a: [], b: []})
    for c in completions:
        if (
            c.policy in (a, b)
            and (c.suite, c.transform) == (cell["suite"], cell["transform"])
            and cell["subset"] in ("", c.subset)
        ):
            by_prompt[c.prompt_id][c.policy].append(c)
    differs = {prompt: _list_labels(of[a]) != _list_labels(of[b]) for prompt, of in by_prompt.items()}
    ordered = sorted(by_prompt, key=lambda prompt: (not differs[prompt], prompt))
    skip = int(text) if (text := parameters.get("skip", "")).isdecimal() else 0
    page = ordered[skip : skip + _PAGE_SIZE]
    texts = _load_texts(query, name, page)
    prompts = [
        texts[prompt]
        | {
            "differs": differs[prompt],
            "sides": [
                _make_side(policy, by_prompt[prompt][policy], texts[prompt]["completions"]) for policy in dict.fromkeys((a, b))
            ],
        }
        for prompt in page
    ]
    return cell | {
        "a": a,
        "b": b,
        "prompts": [{key: value for key, value in prompt.items() if key != "completions"} for prompt in prompts],
        "num_prompts": len(ordered),
        "num_differing": sum(differs.values()),
        "skip": skip,
        "next_skip": skip + _PAGE_SIZE if skip + _PAGE_SIZE < len(ordered) else None,
        "page_size": _PAGE_SIZE,
    }


def _list_labels(completions: Sequence[SuiteCompletion]) -> list[list[tuple[str, str]]]:
    """Return the labels of the completions, without those of the length, which differ nearly always."""
    return sorted(sorted((grader, g.label) for grader, g in c.grades.items() if grader != "length") for c in completions)


def _load_texts(query: QueryFunction, name: str, prompt_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the messages of each prompt, and the texts of its completions by (response id, index)."""
    sql = """SELECT prompt_id::VARCHAR, item, subset, messages, response_id::VARCHAR, completion_index, response, finish_reason
             FROM suite_responses
             WHERE regexp_full_match(run_id, $pattern) AND prompt_id IN (SELECT unnest($page::UUID[]))"""
    parameters = {"pattern": make_run_pattern(name), "page": list(prompt_ids)}
    texts: dict[str, dict[str, Any]] = {}
    for prompt_id, item, subset, messages, response_id, index, text, finish_reason in query(sql, parameters).rows:
        prompt = {"prompt_id": prompt_id, "item": item, "subset": subset, "messages": messages, "completions": {}}
        texts.setdefault(prompt_id, prompt)["completions"][response_id, index] = (text, finish_reason)
    return texts


def _make_side(
    policy: int, completions: Sequence[SuiteCompletion], texts: Mapping[tuple[str, int], tuple[str, str]]
) -> dict[str, Any]:
    rows = []
    for c in sorted(completions, key=lambda c: c.completion_index):
        text, finish_reason = texts[c.response_id, c.completion_index]
        labels = {grader: grade.label or "not graded" for grader, grade in sorted(c.grades.items())}
        rows.append({"text": text, "finish_reason": finish_reason, "labels": labels})
    return {"policy": policy, "completions": rows}
