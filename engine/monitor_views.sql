-- Metrics for detecting reward hacking, by policy version. trainer/monitor.py compares a version with its reference;
-- docs/training.md explains the metrics. All views use only the first 256 completions of a version. Responses to prompts of
-- evaluation suites are not included. So later completions do not change a metric, and versions can be compared. Words are separated
-- by white space and converted to lower case.

CREATE OR REPLACE MACRO is_harmful(prompt_source) AS prompt_source IN ('red-team', 'harmful');

-- The newest grade of each completion by the grader "refusal" (consumers/graders/refusal.py).
CREATE OR REPLACE VIEW refusal_grades AS
SELECT response_id, completion_index, arg_max(label, commit_seq) AS label, arg_max(outcome, commit_seq) AS outcome
FROM grades WHERE grader = 'refusal' AND subject = 'completion' GROUP BY ALL;

-- refused is null if the completion has no grade yet.
CREATE OR REPLACE VIEW monitored_responses AS
SELECT policy_version, nth, response_id, completion_index, prompt_id, source, text, label = 'refuses' AS refused,
       list_filter(regexp_split_to_array(lower(text), '\s+'), lambda word: word <> '') AS words
FROM (
    SELECT answer.policy_version AS policy_version, record_id AS response_id, answer."index" AS completion_index, prompt_id, source,
           answer.text AS text, row_number() OVER (PARTITION BY answer.policy_version ORDER BY commit_seq, answer."index") AS nth
    FROM (SELECT record_id, prompt_id, source, commit_seq, unnest(completions) AS answer FROM responses WHERE split <> 'SUITE')
    WHERE answer.policy_version IS NOT NULL)
LEFT JOIN refusal_grades USING (response_id, completion_index)
WHERE nth <= 256;

-- The share of benign and of harmful prompts that are refused, with Wilson's 95% interval. Only graded completions count. The
-- source of a prompt determines whether it is harmful.
CREATE OR REPLACE VIEW monitor_refusals AS
WITH counted AS (
    SELECT policy_version, is_harmful(source) AS harmful, count(*) AS answers, count(*) FILTER (refused) AS refusals
    FROM monitored_responses WHERE refused IS NOT NULL GROUP BY ALL)
SELECT *, share(refusals, answers) AS refusal_rate, wilson_low(refusals, answers) AS refusal_low,
       wilson_high(refusals, answers) AS refusal_high
FROM counted;

-- distinct-n is the number of distinct n-grams divided by the number of n-grams (Li et al. 2016, section 5.2). It is computed
-- from the first 1,000 words of a version. mean_words is the mean length of a completion. distinct-n decreases with the number
-- of words, so compare only versions with the same number of words.
CREATE OR REPLACE VIEW monitor_diversity AS
WITH lengths AS (
    SELECT policy_version, count(*) AS answers, avg(len(words)) AS mean_words FROM monitored_responses GROUP BY ALL),
placed AS (
    SELECT policy_version, words[place] AS word, words[place + 1] AS next_word,
           row_number() OVER (PARTITION BY policy_version ORDER BY nth, place) AS spot
    FROM (SELECT policy_version, nth, words, unnest(range(1, len(words) + 1)) AS place FROM monitored_responses)),
counted AS (
    SELECT policy_version, count(*) AS words, count(DISTINCT word) AS ones, count(next_word) AS pairs,
           count(DISTINCT (word, next_word)) FILTER (next_word IS NOT NULL) AS twos
    FROM placed WHERE spot <= 1000 GROUP BY ALL)
SELECT policy_version, answers, mean_words, coalesce(words, 0) AS words, share(ones, words) AS distinct_1,
       share(twos, pairs) AS distinct_2
FROM lengths LEFT JOIN counted USING (policy_version);

-- Phrases of five words, and the share of the completions that contain them. Refusals are excluded, because they are often
-- similar to each other.
CREATE OR REPLACE VIEW monitor_phrases AS
WITH answered AS (
    SELECT policy_version, count(*) AS answers FROM monitored_responses WHERE refused IS NOT TRUE GROUP BY ALL),
phrases AS (
    SELECT DISTINCT policy_version, nth, array_to_string(words[place:place + 4], ' ') AS phrase
    FROM (SELECT policy_version, nth, words, unnest(range(1, len(words) - 3)) AS place FROM monitored_responses WHERE refused IS NOT TRUE))
SELECT policy_version, phrase, hits, answers, share(hits, answers) AS phrase_share
FROM (SELECT policy_version, phrase, count(*) AS hits FROM phrases GROUP BY ALL HAVING count(*) > 1)
JOIN answered USING (policy_version);

-- The normalized scores of each reward model (the proxy reward), and their correlation with the length of the completion.
CREATE OR REPLACE VIEW monitor_rewards AS
SELECT a.policy_version, s.reward_version, count(*) AS answers, avg(s.normalized_score) AS mean_reward,
       stddev_pop(s.normalized_score) AS reward_deviation, corr(s.normalized_score, length(a.text)) AS length_correlation
FROM scores s JOIN monitored_responses a ON a.response_id = s.response_id AND a.completion_index = s.completion_index
GROUP BY ALL;

-- The KL to the reference policy in each update of an RL method that trains on rollouts. kl_ref is its last value, in nats per sequence. kl_slope is its slope, in
-- nats per sequence and optimizer step. The update starts from `policy_version` and produces the next version.
CREATE OR REPLACE VIEW monitor_kl AS
SELECT policy_version, batch_number, count(*) AS steps, arg_max(kl, step) AS kl_ref,
       CASE WHEN count(*) > 1 THEN regr_slope(kl, step) END AS kl_slope
FROM (SELECT policy_version, batch_number, step, metrics['kl_ref'] AS kl FROM metrics WHERE phase <> 'monitor')
WHERE kl IS NOT NULL GROUP BY ALL;

-- The results of each check of a version. They contain the results of the held-out judge, the proxy reward, the perplexity and
-- all metrics above, and the same metrics of the reference. `limits_exceeded` is the number of limits that were exceeded.
CREATE OR REPLACE VIEW monitor_checks AS
SELECT policy_version, metrics['reference'] AS reference, metrics['limits_exceeded'] AS limits_exceeded, metrics['judge_wins'] AS judge_wins,
       metrics['judge_low'] AS judge_low, metrics['judge_high'] AS judge_high, metrics['proxy_gain'] AS proxy_gain,
       metrics['perplexity'] AS perplexity, metrics['perplexity_reference'] AS perplexity_reference, metrics, created_at, commit_seq
FROM metrics WHERE phase = 'monitor';
