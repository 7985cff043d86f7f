-- The share of each label for each policy, suite, subset, transformation and grader, with Wilson's 95% interval. `responses` is
-- the number of graded completions; completions without a grade are not in it. If a prompt has several completions, the interval
-- is too narrow, because they are not independent: `charter eval show` counts each prompt once.
CREATE OR REPLACE VIEW suite_label_stats AS
WITH counted AS (
    SELECT run_id, policy_version, suite, subset, transform, grader, label, count(*) AS hits FROM suite_grades GROUP BY ALL),
totals AS (
    SELECT run_id, policy_version, suite, subset, transform, grader, count(*) AS responses FROM suite_grades GROUP BY ALL)
SELECT c.*, t.responses, share(hits, responses) AS label_rate, wilson_low(hits, responses) AS label_low,
       wilson_high(hits, responses) AS label_high
FROM counted c JOIN totals t USING (run_id, policy_version, suite, subset, transform, grader);
