-- Statistics of runs. docs/sql.md shows queries. The columns *_low and *_high contain Wilson's 95% interval of a share (Wilson
-- 1927). A share of zero rows is null. Every view has the column run_id. If several runs produced the same record, it has the
-- run_id of the first run. Lengths are in characters.

CREATE OR REPLACE MACRO share(hits, n) AS CASE WHEN n > 0 THEN hits / n END;
-- The constants below are z = 1.959963984540054, z*z/2, z*z/4 and z*z.
CREATE OR REPLACE MACRO wilson_low(hits, n) AS CASE WHEN hits = 0 AND n > 0 THEN 0.0 WHEN n > 0 THEN
    (hits + 1.920729410347062 - 1.959963984540054 * sqrt(hits * (n - hits) / n + 0.960364705173531)) / (n + 3.841458820694124) END;
CREATE OR REPLACE MACRO wilson_high(hits, n) AS CASE WHEN hits = n AND n > 0 THEN 1.0 WHEN n > 0 THEN
    (hits + 1.920729410347062 + 1.959963984540054 * sqrt(hits * (n - hits) / n + 0.960364705173531)) / (n + 3.841458820694124) END;
-- Return 1 for a probability above 0.5, 0 for a probability below 0.5, and 0.5 for a tie.
CREATE OR REPLACE MACRO wins(p) AS (sign(p - 0.5) + 1) / 2;

-- The votes on pairs, one row for each principle, with the results of both orders. A judgment without votes is one row with the
-- outcome of the judgment. Pairs that cannot be compared have no row, because the judge was not asked: see unjudged_pair_stats.
CREATE OR REPLACE VIEW judge_votes AS
WITH judged AS (
    SELECT record_id, prompt_id, run_id, preset, pairing, constitution, model, label_order, response_a, response_b, votes, principle_id, outcome, commit_seq
    FROM preferences WHERE label_source = 'AI' AND outcome NOT IN ('EMPTY', 'WITHHELD', 'REASONING', 'IDENTICAL', 'NOT_NEEDED')),
votes AS (
    SELECT * EXCLUDE (votes, vote, principle_id, outcome), vote.principle_id AS principle_id,
           CASE WHEN vote.outcome IS NULL OR vote.outcome = 'UNKNOWN' THEN outcome ELSE vote.outcome END AS outcome,
           vote.p_forward AS p_forward, vote.p_backward AS p_backward
    FROM (SELECT *, unnest(votes) AS vote FROM judged)
    UNION ALL BY NAME
    SELECT * EXCLUDE (votes) FROM judged WHERE len(votes) = 0 OR votes IS NULL)
SELECT *, CASE WHEN outcome <> 'OK' THEN NULL
               WHEN label_order = 'forward' THEN p_forward
               WHEN label_order = 'backward' THEN p_backward
               ELSE (p_forward + p_backward) / 2 END AS p_a
FROM votes;

-- The number of pairs that no judge was asked about, by outcome: a response is empty (EMPTY), a filter of the server withheld it
-- (WITHHELD), a response contains what looks like reasoning (REASONING), both responses are the same (IDENTICAL), or the
-- prompt is for RL (NOT_NEEDED).
CREATE OR REPLACE VIEW unjudged_pair_stats AS
SELECT run_id, pairing, outcome, outcome_reason, count(*) AS pairs, min(created_at) AS first_at, max(created_at) AS last_at
FROM preferences WHERE outcome IN ('EMPTY', 'WITHHELD', 'REASONING', 'IDENTICAL', 'NOT_NEEDED') GROUP BY ALL;

-- Statistics of each principle. Rows with stage 'critique' are about critiques, rows with stage 'judge' about judgments.
-- Columns of stage 'critique':
--   asked      the number of verdicts that were requested
--   answered   the number of verdicts that are CLEAN or FLAWED
--   fired      the number of verdicts that are FLAWED; fire_rate is fired / answered
--   compared   the number of revisions that were compared with the previous response
--   wins       the number of compared revisions that are better than the previous response; a tie counts as half a win
--   length_correlation   the correlation of p(flawed) with the length of the response
-- Columns of stage 'judge':
--   asked      the number of judgments
--   compared   the number of pairs with a label
--   wins       the number of pairs whose response_a is better; a tie counts as half a win. With pairing 'revision', response_a
--              is the revision. Otherwise it is the completion that was sampled first.
--   refused    the number of judgments with outcome REFUSED
--   length_correlation   the correlation of p(A is better) with the length of response_a minus the length of response_b
CREATE OR REPLACE VIEW principle_stats AS
WITH verdicts AS (
    SELECT run_id, constitution.name AS constitution, verdict.principle_id AS principle_id, verdict.verdict AS verdict,
           verdict.p_flawed AS p_flawed, response
    FROM (SELECT run_id, constitution, response, unnest(verdicts) AS verdict FROM critiques)),
revised AS (
    SELECT run_id, constitution.name AS constitution, rounds[-1].principle_id AS principle_id, p_better
    FROM critiques WHERE round > 0 AND p_better IS NOT NULL),
counted AS (
    SELECT run_id, 'critique' AS stage, constitution, principle_id, '' AS pairing, count(*) AS asked,
           count(*) FILTER (verdict IN ('CLEAN', 'FLAWED')) AS answered, count(*) FILTER (verdict = 'FLAWED') AS fired,
           0 AS compared, 0.0 AS wins, 0 AS refused,
           corr(p_flawed, length(response)) FILTER (verdict IN ('CLEAN', 'FLAWED')) AS length_correlation
    FROM verdicts GROUP BY ALL
    UNION ALL BY NAME
    SELECT run_id, 'critique' AS stage, constitution, principle_id, '' AS pairing, count(*) AS compared, sum(wins(p_better)) AS wins
    FROM revised GROUP BY ALL
    UNION ALL BY NAME
    SELECT run_id, 'judge' AS stage, constitution.name AS constitution, principle_id, pairing, count(*) AS asked,
           count(p_a) AS compared, sum(wins(p_a)) AS wins, count(*) FILTER (outcome = 'REFUSED') AS refused,
           corr(p_a, length(response_a) - length(response_b)) AS length_correlation
    FROM judge_votes GROUP BY ALL),
summed AS (
    SELECT run_id, stage, constitution, principle_id, pairing, coalesce(sum(asked), 0)::BIGINT AS asked,
           coalesce(sum(answered), 0)::BIGINT AS answered, coalesce(sum(fired), 0)::BIGINT AS fired,
           coalesce(sum(compared), 0)::BIGINT AS compared, coalesce(sum(wins), 0)::DOUBLE AS wins,
           coalesce(sum(refused), 0)::BIGINT AS refused, any_value(length_correlation) AS length_correlation
    FROM counted GROUP BY ALL)
SELECT run_id, stage, constitution, principle_id, pairing, asked,
       answered, fired, share(fired, answered) AS fire_rate, wilson_low(fired, answered) AS fire_low,
       wilson_high(fired, answered) AS fire_high,
       compared, wins, share(wins, compared) AS win_rate, wilson_low(wins, compared) AS win_low,
       wilson_high(wins, compared) AS win_high,
       refused, share(refused, asked) AS refusal_rate, wilson_low(refused, asked) AS refusal_low,
       wilson_high(refused, asked) AS refusal_high,
       CASE WHEN NOT isnan(length_correlation) THEN length_correlation END AS length_correlation
FROM summed;

-- Leaks: how often a model repeated a part of its prompt, by stage, model and template. `part` is 'quotation mark', 'role name' or
-- 'preamble' (removed from the text), 'instruction', 'critique', 'example', 'heading' or 'conversation' (the text is unusable), or 'any'.
CREATE OR REPLACE VIEW leak_stats AS
WITH written AS (
    SELECT run_id, stage, model.id AS model, template_hash, leaks FROM critiques
    WHERE (critique <> '' OR len(leaks) > 0) AND split <> 'SUITE'
    UNION ALL
    SELECT run_id, stage, model.id, template_hash, leaks FROM revisions WHERE split <> 'SUITE'),
totals AS (SELECT run_id, stage, model, template_hash, count(*) AS texts FROM written GROUP BY ALL),
parts AS (
    SELECT run_id, stage, model, template_hash, 'any' AS part, count(*) FILTER (len(leaks) > 0) AS leaks FROM written GROUP BY ALL
    UNION ALL
    SELECT run_id, stage, model, template_hash, part, count(*) FROM (SELECT * EXCLUDE (leaks), unnest(leaks) AS part FROM written) GROUP BY ALL)
SELECT parts.*, texts, share(leaks, texts) AS leak_rate, wilson_low(leaks, texts) AS leak_low, wilson_high(leaks, texts) AS leak_high
FROM parts JOIN totals  -- a record of another program may have no model or no template
  ON parts.run_id = totals.run_id AND parts.stage = totals.stage AND parts.model IS NOT DISTINCT FROM totals.model
  AND parts.template_hash IS NOT DISTINCT FROM totals.template_hash;

-- Statistics of each round of revision. `unusable` is the number of revisions that are empty, a copy or an echo. win_rate and
-- mean_p_better compare revisions with the previous responses. mean_similarity and mean_length_change also refer to the
-- previous responses. `satisfied`, `lost` and `last_round` count the chains that end in this round, by end_reason.
CREATE OR REPLACE VIEW revision_stats AS
WITH made AS (
    SELECT run_id, round, count(*) AS revisions, count(*) FILTER (rejection_reason NOT IN ('NONE', 'UNKNOWN')) AS unusable,
           avg(similarity) AS mean_similarity, avg(length(response) - length(previous_response)) AS mean_length_change
    FROM revisions GROUP BY ALL),
weighed AS (
    SELECT run_id, round, count(p_better) AS compared, sum(wins(p_better)) AS wins, avg(p_better) AS mean_p_better,
           count(*) FILTER (end_reason = 'SATISFIED') AS satisfied, count(*) FILTER (end_reason = 'LOST') AS lost,
           count(*) FILTER (end_reason = 'LAST_ROUND') AS last_round
    FROM critiques WHERE round > 0 GROUP BY ALL)
SELECT run_id, round, revisions, unusable, coalesce(compared, 0) AS compared, mean_p_better, wins,
       share(wins, compared) AS win_rate, wilson_low(wins, compared) AS win_low, wilson_high(wins, compared) AS win_high,
       mean_similarity, mean_length_change, coalesce(satisfied, 0) AS satisfied, coalesce(lost, 0) AS lost,
       coalesce(last_round, 0) AS last_round
FROM made LEFT JOIN weighed USING (run_id, round);

-- The position bias of a judge. `judged` is the number of votes that have a result in both orders and the outcome OK or
-- POSITION_FLIP. `flips` is the number of votes in which the same position won in both orders. p_forward is p(A is better) when
-- response_a is shown first. p_backward is p(A is better) when response_b is shown first. first_place is the mean probability
-- of the response that is shown first. It is 0.5 if there is no bias.
CREATE OR REPLACE VIEW position_bias_stats AS
WITH counted AS (
    SELECT run_id, preset, model.id AS model, principle_id, count(*) AS judged,
           count(*) FILTER ((p_forward > 0.5 AND p_backward < 0.5) OR (p_forward < 0.5 AND p_backward > 0.5)) AS flips,
           avg(p_forward) AS mean_p_forward, avg(p_backward) AS mean_p_backward, avg(abs(p_forward - p_backward)) AS mean_position_gap
    FROM judge_votes WHERE outcome IN ('OK', 'POSITION_FLIP') AND p_forward IS NOT NULL AND p_backward IS NOT NULL GROUP BY ALL)
SELECT run_id, preset, model, principle_id, judged, flips, share(flips, judged) AS flip_rate, wilson_low(flips, judged) AS flip_low,
       wilson_high(flips, judged) AS flip_high, mean_p_forward, mean_p_backward,
       (mean_p_forward + 1 - mean_p_backward) / 2 AS first_place, mean_position_gap
FROM counted;

-- Pairs that have a label by a judge and a label by a person. A person can override the label of a judge. A file of comparisons
-- by people can also contain the same two responses to the same prompt, in either order. p_ai and p_human are the probabilities
-- that the response_a of the judge's record is better.
CREATE OR REPLACE VIEW ai_human_labels AS
WITH people AS (
    SELECT p.record_id, p.prompt_id, p.parent_ids, p.response_a, p.response_b, p.p_a
    FROM preferences p ANTI JOIN overridden_labels o ON o.record_id = p.record_id
    WHERE p.label_source = 'HUMAN' AND p.outcome = 'OK'),
pairs AS (
    SELECT record_id AS human_id, parent_ids[1] AS ai_id, p_a AS p_human FROM people WHERE len(parent_ids) > 0
    UNION ALL
    SELECT human.record_id, ai.record_id, human.p_a
    FROM people human JOIN preferences ai ON ai.prompt_id = human.prompt_id AND ai.response_a = human.response_a AND ai.response_b = human.response_b
    WHERE len(human.parent_ids) = 0
    UNION ALL
    SELECT human.record_id, ai.record_id, 1 - human.p_a
    FROM people human JOIN preferences ai ON ai.prompt_id = human.prompt_id AND ai.response_a = human.response_b AND ai.response_b = human.response_a
    WHERE len(human.parent_ids) = 0)
SELECT ai.record_id, human_id, ai.prompt_id, ai.run_id, ai.preset, ai.model.id AS model, ai.principle_id, ai.split, ai.source,
       ai.p_a AS p_ai, p_human, CASE WHEN ai.p_a <> 0.5 AND p_human <> 0.5 THEN (ai.p_a > 0.5) = (p_human > 0.5) END AS agree
FROM pairs JOIN preferences ai ON ai.record_id = ai_id
WHERE ai.label_source = 'AI' AND ai.outcome = 'OK' AND ai.p_a IS NOT NULL;

-- The share of pairs for which judge and person prefer the same response, without ties, and the Brier score of the judge.
CREATE OR REPLACE VIEW label_agreement_stats AS
WITH counted AS (
    SELECT run_id, preset, model, principle_id, count(*) AS pairs, count(agree) AS decided, count(*) FILTER (agree) AS agreed,
           avg((p_ai - p_human) ** 2) AS brier
    FROM ai_human_labels GROUP BY ALL)
SELECT run_id, preset, model, principle_id, pairs, decided, agreed, share(agreed, decided) AS agreement,
       wilson_low(agreed, decided) AS agreement_low, wilson_high(agreed, decided) AS agreement_high, brier
FROM counted;

-- How often a judge or a grader agrees with the labels of contrast pairs, i.e. prefers the completion with the constitution. A row has
-- the judge model (`source` is 'judge') or a grader (`source` is 'grader').
--   pairs    the contrast pairs that the judge was asked about, or whose two completions both have grades of this grader
--   decided  of these, the pairs with a preference: p(A is better) of the judge is not 0.5, or the two mean scores differ
--   agreed   of these, the pairs in which the judge prefers the completion with the constitution, or it has the higher mean score
-- A grader documents the meaning of its score; a higher score is not better for every grader.
CREATE OR REPLACE VIEW contrast_stats AS
WITH judged AS (
    SELECT run_id, constitution.name AS constitution, model.id AS name, wins((p_forward + p_backward) / 2) AS win
    FROM preferences WHERE label_source = 'CONTRAST' AND outcome = 'OK' AND model IS NOT NULL),
scores AS (
    SELECT response_id, grader, avg(score) FILTER (subject = 'contrast_completion') AS with_constitution,
           avg(score) FILTER (subject = 'completion' AND completion_index = 0) AS without_constitution
    FROM grades WHERE outcome = 'OK' GROUP BY ALL),
graded AS (
    SELECT p.run_id, p.constitution.name AS constitution, s.grader AS name, (sign(with_constitution - without_constitution) + 1) / 2 AS win
    FROM preferences p JOIN scores s ON s.response_id = p.response_id
    WHERE p.label_source = 'CONTRAST' AND p.outcome = 'OK' AND with_constitution IS NOT NULL AND without_constitution IS NOT NULL),
counted AS (
    SELECT run_id, constitution, 'judge' AS source, name, count(*) AS pairs, count(*) FILTER (win <> 0.5) AS decided,
           count(*) FILTER (win = 1) AS agreed FROM judged GROUP BY ALL
    UNION ALL
    SELECT run_id, constitution, 'grader', name, count(*), count(*) FILTER (win <> 0.5), count(*) FILTER (win = 1) FROM graded GROUP BY ALL)
SELECT run_id, constitution, source, name, pairs, decided, agreed, share(agreed, decided) AS agreement,
       wilson_low(agreed, decided) AS agreement_low, wilson_high(agreed, decided) AS agreement_high
FROM counted;

-- The calibration of a judge. Each row is one bin: the pairs for which the judge's p(A is better) is between p_from and
-- p_from + 0.1. human_share is the mean label of people for these pairs. For a calibrated judge, mean_p_ai is close to
-- human_share in every bin.
CREATE OR REPLACE VIEW label_calibration_stats AS
WITH counted AS (
    SELECT run_id, preset, model, least(floor(p_ai * 10), 9) / 10 AS p_from, count(*) AS pairs, avg(p_ai) AS mean_p_ai,
           sum(p_human) AS human_wins
    FROM ai_human_labels GROUP BY ALL)
SELECT run_id, preset, model, p_from, pairs, mean_p_ai, share(human_wins, pairs) AS human_share,
       wilson_low(human_wins, pairs) AS human_low, wilson_high(human_wins, pairs) AS human_high
FROM counted;

-- One row with the numbers that decide whether the labels are good enough to train on (charter/label_quality.py): the labels
-- that train, the labels that were judged in both orders, how many of these flip with the order (including flips that give no
-- label), how many labels are within 0.45 to 0.55, how many critiques and
-- revisions (`written`) contain parts of their prompt, the agreement with people, and the accuracy of the newest reward model on
-- held-out labels in comparison with a rule that always prefers the longer response.
CREATE OR REPLACE VIEW label_quality AS
WITH trained AS (
    SELECT p_a, position_flip, label_source = 'AI' AND p_forward IS NOT NULL AND p_backward IS NOT NULL AS both_orders
    FROM preference_pairs
    UNION ALL
    SELECT NULL, position_flip, TRUE FROM preferences
    WHERE outcome = 'POSITION_FLIP' AND split = 'TRAIN' AND prompt_id NOT IN (SELECT prompt_id FROM held_out_prompts)),
counted AS (
    SELECT count(p_a) AS labels, count(*) FILTER (both_orders) AS both_orders, count(*) FILTER (both_orders AND position_flip) AS flips,
           count(*) FILTER (abs(p_a - 0.5) <= 0.05 + 1e-9) AS uncertain
    FROM trained),
written AS (
    SELECT coalesce(sum(texts), 0)::BIGINT AS written, coalesce(sum(leaks), 0)::BIGINT AS leaks FROM leak_stats WHERE part = 'any'),
people AS (SELECT count(agree) AS compared, count(*) FILTER (agree) AS agreed FROM ai_human_labels),
reward AS (
    SELECT max(version) AS reward_version, arg_max(metrics, version) AS metrics FROM policies WHERE kind = 'REWARD')
SELECT labels, both_orders, flips, share(flips, both_orders) AS flip_rate, uncertain, share(uncertain, labels) AS uncertain_share,
       written, leaks, share(leaks, written) AS leak_rate, compared, agreed, wilson_low(agreed, compared) AS agreement_low, reward_version,
       coalesce(metrics['reward/held_out'], 0)::BIGINT AS held_out, metrics['reward/accuracy'] AS reward_accuracy,
       metrics['reward/length_accuracy'] AS length_accuracy
FROM counted, written, people, reward;

-- How many of the texts that a generator sampled became prompts (producers/generate.py). One row is a recipe and a seed in a run, with
-- its newest position. `rejected` counts the other texts by reason. Texts over the limit of a command do not count for the yield.
CREATE OR REPLACE VIEW generation_stats AS
WITH counted AS (
    SELECT *, published + coalesce(list_sum(map_values(rejected)), 0)::BIGINT - coalesce(rejected['over_limit'], 0) AS texts
    FROM producer_offsets WHERE stage = 'generate')
SELECT run_id, name AS recipe, recipe_hash, seed, model.id AS model, next_line AS next_index, published, texts,
       share(published, texts) AS yield, rejected, prompt_tokens, completion_tokens, created_at
FROM counted;
