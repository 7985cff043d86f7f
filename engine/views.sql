-- The views that people and the trainer read. Built on the deduplicated views of tables.py; no window over record ids.

-- The one record that ends each critique-revision chain.
CREATE OR REPLACE VIEW chain_ends AS
SELECT record_id, prompt_id, run_id, response_id, turns, source, tags, split, epoch, constitution, principle_id, model,
       answer_model, policy_version, first_answer, first_stopped, rounds, number, ended, final_text, final_stopped,
       'critique' AS stage, created_at, commit_seq
FROM critiques WHERE final
UNION ALL BY NAME
SELECT record_id, prompt_id, run_id, response_id, turns, source, tags, split, epoch, constitution, principle_id, model,
       answer_model, policy_version, first_answer, first_stopped, rounds, number, ended, final_text, final_stopped,
       'revise' AS stage, created_at, commit_seq
FROM revisions WHERE final;

-- What supervised fine-tuning trains on: the final text of each usable chain, clean unrevised answers included.
CREATE OR REPLACE VIEW sft_examples AS
SELECT record_id, prompt_id, run_id, turns, final_text AS completion, final_stopped AS stopped, source, ended, number AS rounds,
       constitution, principle_id, policy_version, created_at, commit_seq
FROM chain_ends
WHERE split = 'TRAIN' AND ended IN ('SATISFIED', 'LAST_ROUND', 'LOST', 'SKIPPED') AND length(trim(final_text)) > 0;

-- What the reward model trains on: soft labels that a judge really gave. p_a is the probability that `a` is better.
CREATE OR REPLACE VIEW preference_pairs AS
SELECT record_id, prompt_id, run_id, response_id, turns, a, b, a_stopped, b_stopped, p_a, gap, mass, flipped, source, pairing,
       constitution, principle_id, label_source, policy_version, created_at, commit_seq
FROM preferences
WHERE split = 'TRAIN' AND outcome = 'OK' AND p_a IS NOT NULL;

-- Every sampled answer, and why PPO may not train on it (null: it may, as far as the record alone tells).
CREATE OR REPLACE VIEW rollouts AS
SELECT record_id AS response_id, prompt_id, run_id, turns, source, epoch, model, prompt_token_ids, sampling.temperature AS temperature,
       candidate."index" AS candidate, candidate.text AS text, candidate.token_ids AS token_ids,
       candidate.logprobs AS logprobs, candidate.finish_reason = 'STOP' AS stopped, candidate.policy_version AS policy_version,
       CASE WHEN split <> 'TRAIN' THEN 'held out'
            WHEN candidate.policy_version IS NULL THEN 'answered by another model than the policy'
            WHEN len(candidate.token_ids) = 0 OR len(candidate.token_ids) <> len(candidate.logprobs)
                 THEN 'no exact tokens and log-probabilities'
            WHEN len(prompt_token_ids) = 0 THEN 'no exact prompt tokens'
            WHEN sampling.top_p < 1 THEN 'sampled with top_p below 1'
            WHEN sampling.temperature <= 0 THEN 'not sampled'
       END AS excluded_because,
       created_at, commit_seq
FROM (SELECT *, unnest(candidates) AS candidate FROM responses);

-- A prompt with everything that was made of it.
CREATE OR REPLACE VIEW stories AS
SELECT p.prompt_id, p.turns[-1].content AS prompt, p.source, p.tags, p.split, p.epoch, p.turns, p.created_at,
       r.responses, c.critiques, v.revisions, e.ended, e.final_text, j.preferences
FROM prompts p
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, policy_version: policy_version, model: model,
                            answers: list_transform(candidates, lambda x: x.text)} ORDER BY commit_seq) AS responses
    FROM responses GROUP BY prompt_id) r USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, number: number, principle_id: principle_id, verdict: verdict,
                            p_flawed: p_flawed, p_better: p_better, critique: critique, ended: ended} ORDER BY commit_seq) AS critiques
    FROM critiques GROUP BY prompt_id) c USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, number: number, principle_id: principle_id, revision: text,
                            similarity: similarity, fault: fault} ORDER BY commit_seq) AS revisions
    FROM revisions GROUP BY prompt_id) v USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, arg_max(ended, commit_seq) AS ended, arg_max(final_text, commit_seq) AS final_text
    FROM chain_ends GROUP BY prompt_id) e USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, principle_id: principle_id, a: a, b: b, p_a: p_a, gap: gap,
                            mass: mass, outcome: outcome} ORDER BY commit_seq) AS preferences
    FROM preferences GROUP BY prompt_id) j USING (prompt_id);
