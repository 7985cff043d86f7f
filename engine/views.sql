-- The main views for users and the trainer. They use the deduplicated views of tables.py, so they need no window functions over
-- record ids.

-- The prompts that are held out from training. commit_seq is the first commit with split EVAL, and created_at is the time of the
-- first record with split EVAL. A prompt is held out if any of its records has split EVAL, in any run or epoch. So a prompt stays
-- held out if it is sampled again in another epoch, or produced with another prompts.eval_fraction. Rows that were committed and
-- created earlier stay in the training views. Both conditions are needed: if the database is restored from the log, the commits
-- get another order, and clocks can be wrong. Prompts of evaluation suites (split SUITE) have separate ids, so they hold no
-- prompt out.
CREATE OR REPLACE VIEW held_out_prompts AS
SELECT prompt_id, min(commit_seq) AS commit_seq, min(created_at) AS created_at
FROM (
    SELECT prompt_id, commit_seq, created_at FROM raw.prompts WHERE split = 'EVAL'
    UNION ALL
    SELECT prompt_id, commit_seq, created_at FROM raw.demonstrations WHERE split = 'EVAL'
    UNION ALL
    SELECT prompt_id, commit_seq, created_at FROM raw.preferences WHERE split = 'EVAL' AND label_source = 'HUMAN'
    UNION ALL
    SELECT later.prompt_id, first.commit_seq, first.created_at
    FROM raw.prompts later JOIN raw.prompts first ON later.messages = first.messages
    WHERE later.epoch > 0 AND first.split = 'EVAL')
GROUP BY prompt_id;

-- The last record of each critique-revision chain. rejection_reason is the reason why the newest response of the chain is
-- unusable, or 'NONE'.
CREATE OR REPLACE VIEW revision_chains AS
SELECT record_id, prompt_id, run_id, response_id, messages, source, tags, split, epoch, constitution, principle_id, model,
       response_model, policy_version, initial_response, initial_finish_reason, rounds, round, end_reason, final_response, final_finish_reason,
       rejection_reason, 'critique' AS stage, created_at, commit_seq
FROM critiques WHERE final
UNION ALL BY NAME
SELECT record_id, prompt_id, run_id, response_id, messages, source, tags, split, epoch, constitution, principle_id, model,
       response_model, policy_version, initial_response, initial_finish_reason, rounds, round, end_reason, final_response, final_finish_reason,
       rejection_reason, 'revise' AS stage, created_at, commit_seq
FROM revisions WHERE final;

-- All responses that are suitable for training. Rows with label_source AI are the final responses of usable chains, including
-- clean responses without a revision. Responses of the policy to helpful prompts have end_reason = 'SKIPPED'. Rows with
-- label_source HUMAN are demonstrations by people. Their end_reason and constitution are null. engine/eligibility.py decides which
-- responses are usable. has_control_markers is true if a marker of a chat format (<|im_end|>) is part of the text: Charter breaks
-- it up when it trains, other programs may encode it as a control token. has_reasoning_marks is true if the text mentions a mark of
-- reasoning (<think>): the text may be about the mark, or may contain reasoning that was not recognized. Responses to prompts of
-- evaluation suites are not included.
CREATE OR REPLACE VIEW trainable_responses AS
SELECT record_id, prompt_id, run_id, messages, final_response AS completion, final_finish_reason AS finish_reason, source, end_reason,
       round AS rounds, constitution, principle_id, policy_version, 'AI' AS label_source,
       has_control_markers(final_response) AS has_control_markers, has_reasoning_marks(final_response) AS has_reasoning_marks, split, created_at, commit_seq
FROM revision_chains
WHERE end_reason IN ('SATISFIED', 'LAST_ROUND', 'LOST', 'SKIPPED') AND split <> 'SUITE'
  AND find_rejection_reason(final_response, final_finish_reason) = 'NONE'
UNION ALL BY NAME
SELECT record_id, prompt_id, run_id, messages, completion, finish_reason, source, 0 AS rounds, label_source,
       has_control_markers(completion) AS has_control_markers, has_reasoning_marks(completion) AS has_reasoning_marks, split, created_at, commit_seq
FROM demonstrations WHERE split <> 'SUITE' AND find_rejection_reason(completion, finish_reason) = 'NONE';

-- The training data of supervised fine-tuning. The shares of a mixture refer to the column `source`, e.g. helpful.
CREATE OR REPLACE VIEW sft_examples AS
SELECT e.* EXCLUDE (split)
FROM trainable_responses e LEFT JOIN held_out_prompts h ON h.prompt_id = e.prompt_id
WHERE e.split = 'TRAIN' AND (h.prompt_id IS NULL OR (h.commit_seq > e.commit_seq AND h.created_at > e.created_at));

-- The prompts that a training view may have contained, in this epoch or in another epoch of the same prompt.
CREATE OR REPLACE VIEW trained_prompts AS
SELECT prompt_id FROM raw.prompts WHERE split = 'TRAIN'
UNION
SELECT prompt_id FROM raw.demonstrations WHERE split = 'TRAIN'
UNION
SELECT prompt_id FROM raw.preferences WHERE split = 'TRAIN' AND label_source = 'HUMAN'
UNION
SELECT later.prompt_id
FROM raw.prompts later JOIN raw.prompts first ON later.messages = first.messages
WHERE later.epoch > 0 AND first.split = 'TRAIN';

-- The evaluation data of supervised fine-tuning: responses to prompts that no training view has ever contained.
CREATE OR REPLACE VIEW held_out_examples AS
SELECT e.* EXCLUDE (split) FROM trainable_responses e ANTI JOIN trained_prompts USING (prompt_id) WHERE e.split = 'EVAL';

-- The labels that a person has overridden, and the record that replaces each label. If a label has several overrides, the
-- newest override counts. An override with the outcome NOT_APPLICABLE has no label, so the pair has no label either.
CREATE OR REPLACE VIEW overridden_labels AS
WITH overrides AS (
    SELECT parent_ids[1] AS label_id, record_id, commit_seq
    FROM preferences WHERE label_source = 'HUMAN' AND len(parent_ids) > 0),
newest AS (
    SELECT label_id, arg_max(record_id, commit_seq) AS overridden_by FROM overrides GROUP BY label_id)
SELECT record_id, any_value(overridden_by) AS overridden_by
FROM (
    SELECT label_id AS record_id, overridden_by FROM newest
    UNION ALL
    SELECT record_id, overridden_by FROM overrides JOIN newest USING (label_id) WHERE record_id <> overridden_by)
GROUP BY record_id;

-- All labels by judges and people, and of contrast pairs, except of prompts of evaluation suites. This includes held-out labels and overridden labels (see overridden_by), so that a batch
-- from the time before an override can be rebuilt. p_a is the probability that response_a is better. exclusion_reason is the
-- reason why the pair may not train and is not exported (EMPTY, WITHHELD, REASONING or IDENTICAL, see engine/eligibility.py), or null.
CREATE OR REPLACE VIEW preference_labels AS
SELECT p.record_id, p.prompt_id, p.run_id, p.response_id, p.messages, p.response_a, p.response_b, p.finish_reason_a, p.finish_reason_b, p.p_a, p.p_forward,
       p.p_backward, p.position_gap, p.option_mass, p.position_flip, p.source, p.pairing, p.constitution, p.principle_id, p.label_source, p.policy_version, p.split, p.epoch, p.purpose,
       o.overridden_by, find_pair_outcome(p.response_a, p.response_b, p.finish_reason_a, p.finish_reason_b) AS exclusion_reason,
       has_control_markers(p.response_a) OR has_control_markers(p.response_b) AS has_control_markers,
       has_reasoning_marks(p.response_a) OR has_reasoning_marks(p.response_b) AS has_reasoning_marks, p.created_at, p.commit_seq
FROM preferences p LEFT JOIN overridden_labels o ON o.record_id = p.record_id
WHERE p.outcome = 'OK' AND p.p_a IS NOT NULL AND p.split <> 'SUITE';

-- The contrast pairs of replays. A replay of the judge stage makes another record of the same pair with the same label. Only the first
-- record of a response may train. The order is that of created_at, which a restored database keeps.
CREATE OR REPLACE VIEW repeated_contrast_pairs AS
SELECT record_id, response_id
FROM (SELECT record_id, response_id, row_number() OVER (PARTITION BY response_id ORDER BY created_at, record_id) AS nth
      FROM preferences WHERE label_source = 'CONTRAST' AND response_id IS NOT NULL) WHERE nth > 1;

-- All valid labels that may train, each once: preference_pairs and contrast_pairs together. An override by a person replaces the label
-- and has its own commit_seq.
CREATE OR REPLACE VIEW training_pairs AS
SELECT l.* EXCLUDE (split, epoch, overridden_by, exclusion_reason)
FROM preference_labels l LEFT JOIN held_out_prompts h ON h.prompt_id = l.prompt_id
ANTI JOIN repeated_contrast_pairs r ON r.record_id = l.record_id
WHERE l.split = 'TRAIN' AND l.overridden_by IS NULL AND l.exclusion_reason IS NULL AND (h.prompt_id IS NULL OR (h.commit_seq > l.commit_seq AND h.created_at > l.created_at));

-- The training data of the reward model and of DPO: labels by judges and people. The shares of a mixture refer to the column `source`.
-- Labels by people have label_source HUMAN.
CREATE OR REPLACE VIEW preference_pairs AS
SELECT * FROM training_pairs WHERE label_source <> 'CONTRAST';

-- Contrast pairs (judge.pairing = contrast). response_a was sampled with the constitution in its prompt and response_b without it, so
-- p_a is 1. p_forward and p_backward are the answers of the judge, or null. Only the phases in train.contrast_pairs train on them.
CREATE OR REPLACE VIEW contrast_pairs AS
SELECT * FROM training_pairs WHERE label_source = 'CONTRAST';

-- The evaluation data of the reward model: valid labels of prompts that no training view has ever contained.
CREATE OR REPLACE VIEW held_out_pairs AS
SELECT l.* EXCLUDE (split, epoch, overridden_by, exclusion_reason)
FROM preference_labels l
ANTI JOIN trained_prompts USING (prompt_id)
WHERE l.label_source <> 'CONTRAST' AND l.split = 'EVAL' AND l.overridden_by IS NULL AND l.exclusion_reason IS NULL;

-- All sampled completions of the prompts, without contrast completions, except of prompts of evaluation suites (see suite_responses). exclusion_reason is the reason why PPO cannot train on a completion, or null if it can. PPO trains on
-- an empty completion, because the policy really sampled it and has to learn that it is worse.
CREATE OR REPLACE VIEW rollouts AS
SELECT record_id AS response_id, r.prompt_id, run_id, messages, source, tags, epoch, r.purpose, model, prompt_token_ids,
       sampling.temperature AS temperature, completion."index" AS completion_index, completion.text AS text,
       completion.token_ids AS token_ids, completion.logprobs AS logprobs, completion.finish_reason AS finish_reason,
       completion.policy_version AS policy_version, completion.reasoning AS reasoning,
       CASE WHEN completion.policy_version IS NULL THEN 'answered by another model than the policy'
            WHEN completion.finish_reason = 'REFUSED' THEN 'withheld by a content filter of the server'
            WHEN completion.reasoning <> '' THEN 'contains reasoning'
            WHEN len(completion.token_ids) = 0 OR len(completion.token_ids) <> len(completion.logprobs)
                 THEN 'no exact tokens and log-probabilities'
            WHEN len(prompt_token_ids) = 0 THEN 'no exact prompt tokens'
            WHEN sampling.top_p < 1 THEN 'sampled with top_p below 1'
            WHEN sampling.temperature <= 0 THEN 'not sampled'
            WHEN split <> 'TRAIN' OR h.commit_seq < r.commit_seq OR h.created_at < r.created_at THEN 'held out'
       END AS exclusion_reason,
       r.created_at, r.commit_seq
FROM (SELECT *, unnest(completions) AS completion FROM responses WHERE split <> 'SUITE') r
LEFT JOIN held_out_prompts h ON h.prompt_id = r.prompt_id;

-- All prompts. Prompts that occur only in data from people are included, although the pipeline generates no responses to them.
CREATE OR REPLACE VIEW all_prompts AS
SELECT prompt_id, messages, source, tags, split, epoch, created_at FROM prompts
UNION ALL
SELECT prompt_id, arg_min(messages, commit_seq), arg_min(source, commit_seq), arg_min(tags, commit_seq), arg_min(split, commit_seq),
       arg_min(epoch, commit_seq), min(created_at)
FROM (
    SELECT prompt_id, messages, source, tags, split, epoch, created_at, commit_seq FROM demonstrations
    UNION ALL
    SELECT prompt_id, messages, source, tags, split, epoch, created_at, commit_seq FROM preferences
    WHERE label_source = 'HUMAN' AND len(parent_ids) = 0)
ANTI JOIN prompts USING (prompt_id)
GROUP BY prompt_id;

-- Each prompt with all records that were produced from it.
CREATE OR REPLACE VIEW traces AS
SELECT p.prompt_id, p.messages[-1].content AS prompt, p.source, p.tags, p.split, p.epoch, p.messages, p.created_at,
       r.responses, c.critiques, v.revisions, e.end_reason, e.final_response, j.preferences, d.demonstrations
FROM all_prompts p
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, policy_version: policy_version, model: model,
                            answers: list_transform(completions, lambda x: x.text),
                            reasoning: list_transform(completions, lambda x: x.reasoning)} ORDER BY commit_seq) AS responses
    FROM responses GROUP BY prompt_id) r USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, round: round, principle_id: principle_id, verdict: verdict, verdicts: verdicts,
                            rejection_reason: rejection_reason, p_flawed: p_flawed, p_better: p_better, critique: critique, end_reason: end_reason} ORDER BY commit_seq) AS critiques
    FROM critiques GROUP BY prompt_id) c USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, round: round, principle_id: principle_id, revision: response,
                            similarity: similarity, rejection_reason: rejection_reason} ORDER BY commit_seq) AS revisions
    FROM revisions GROUP BY prompt_id) v USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, arg_max(end_reason, commit_seq) AS end_reason, arg_max(final_response, commit_seq) AS final_response
    FROM revision_chains GROUP BY prompt_id) e USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, principle_id: principle_id, response_a: response_a, response_b: response_b, p_a: p_a, p_forward: p_forward, p_backward: p_backward, position_gap: position_gap,
                            option_mass: option_mass, outcome: outcome, outcome_reason: outcome_reason, label_source: label_source, labeler: labeler, parent_ids: parent_ids,
                            explanation: explanation} ORDER BY commit_seq) AS preferences
    FROM preferences GROUP BY prompt_id) j USING (prompt_id)
LEFT JOIN (
    SELECT prompt_id, list({record_id: record_id, run_id: run_id, source: source, completion: completion} ORDER BY commit_seq)
           AS demonstrations
    FROM demonstrations GROUP BY prompt_id) d USING (prompt_id);
