-- The responses to prompts of evaluation suites (`charter eval run`) and their grades. Each policy of an evaluation has its own run,
-- so these views read the raw tables: a record that several runs made belongs to each of them. If a run has a record twice, its
-- first one counts.

-- All sampled completions. num_tokens is the number of sampled tokens, or null if the server does not report it for one completion.
CREATE OR REPLACE VIEW suite_responses AS
SELECT run_id, policy_version, suite_item.suite AS suite, suite_item.item AS item, suite_item.subset AS subset,
       suite_item.transform AS transform, prompt_id, record_id AS response_id, completion."index" AS completion_index, messages,
       completion.text AS response, completion.finish_reason AS finish_reason,
       CASE WHEN len(completion.token_ids) > 0 THEN len(completion.token_ids) WHEN len(completions) = 1 THEN completion_tokens END AS num_tokens,
       created_at
FROM (SELECT *, unnest(completions) AS completion FROM raw.responses WHERE suite_item IS NOT NULL
      QUALIFY row_number() OVER (PARTITION BY run_id, record_id ORDER BY commit_seq) = 1);

-- The grades of these completions. If a grader graded a completion in several versions, only the grades of the newest one count. A
-- grader that returns several grades for one completion has a row for each: they differ in principle_id.
CREATE OR REPLACE VIEW suite_grades AS
WITH graded AS (
    SELECT run_id, response_id, completion_index, grader, grader_version, principle_id, label, score, outcome, outcome_reason, details,
           commit_seq
    FROM raw.grades WHERE split = 'SUITE' AND subject = 'completion'
    QUALIFY row_number() OVER (PARTITION BY run_id, record_id ORDER BY commit_seq) = 1),
newest AS (
    SELECT * FROM graded
    QUALIFY grader_version = arg_max(grader_version, commit_seq) OVER (PARTITION BY run_id, response_id, completion_index, grader))
SELECT r.run_id, r.policy_version, r.suite, r.item, r.subset, r.transform, r.prompt_id, r.response_id, r.completion_index, g.grader,
       g.grader_version, g.label, g.score, g.outcome, g.outcome_reason, g.details, r.finish_reason, g.principle_id
FROM suite_responses r
JOIN newest g ON g.run_id = r.run_id AND g.response_id = r.response_id AND g.completion_index = r.completion_index;
