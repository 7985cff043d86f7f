-- Views of training progress: versions, the rows of each batch and their age, excluded rows, pauses and metrics.

-- Every version on the log. If two updates have the same version, the first update counts. `weights_of` is the version that was
-- trained with these weights. After a rollback it is an earlier version. wall_s is the duration of the update in seconds.
-- duckdb_share is the share of this duration that was spent in DuckDB.
CREATE OR REPLACE VIEW policy_versions AS
SELECT p.kind, p.version, p.phase, p.base_version, coalesce(p.restored_version, p.version) AS weights_of, b.batch_number,
       len(b.record_ids) AS trained_rows, b.base_reward_version AS reward_version, b.mixture, p.metrics['wall_s'] AS wall_s,
       p.metrics['duckdb_share'] AS duckdb_share, p.metrics, p.uri, p.batch_id, p.created_at, p.commit_seq
FROM policies p LEFT JOIN batches b ON b.record_id = p.batch_id AND p.restored_version IS NULL
QUALIFY row_number() OVER (PARTITION BY p.kind, p.version ORDER BY p.commit_seq) = 1;

-- The rows of every batch. `place` is the position of a row in the order of training. `trained` is true if the update of the
-- batch is on the log. `voided` is true if the batch was voided. `replayed` is true if an earlier batch of the phase has
-- already trained on the row.
CREATE OR REPLACE VIEW batch_rows AS
WITH placed AS (
    SELECT b.record_id AS batch_id, b.phase, b.batch_number, unnest(b.record_ids) AS row_id,
           generate_subscripts(b.record_ids, 1) AS place, b.base_policy_version, b.base_reward_version,
           b.reference_policy_version, b.record_id IN (SELECT batch_id FROM policies WHERE restored_version IS NULL) AS trained,
           b.record_id IN (SELECT voided_batch_id FROM incidents WHERE voided_batch_id IS NOT NULL) AS voided, b.created_at
    FROM batches b),
again AS (SELECT record_id AS batch_id, unnest(replayed_record_ids) AS row_id, true AS replayed FROM batches)
SELECT placed.*, coalesce(replayed, false) AS replayed FROM placed LEFT JOIN again USING (batch_id, row_id);

-- The staleness of each rollout of an RL batch. Only such batches have responses as rows. policies_behind is measured in policy versions. rewards_behind is the number of
-- reward models that were published after the policy of the rollout. age_s is the time from sampling to the batch in seconds.
CREATE OR REPLACE VIEW trained_rollouts AS
WITH sampled AS (
    SELECT p.version AS policy_version, count(r.version) AS rewards_then
    FROM policy_versions p LEFT JOIN policy_versions r ON r.kind = 'REWARD' AND r.commit_seq < p.commit_seq
    WHERE p.kind = 'POLICY' GROUP BY ALL)
SELECT b.batch_id, b.batch_number, b.row_id AS response_id, r.policy_version, b.base_policy_version, b.reference_policy_version,
       b.base_policy_version - r.policy_version AS policies_behind,
       b.base_reward_version - coalesce(s.rewards_then, 0) AS rewards_behind,
       epoch(b.created_at - r.created_at) AS age_s, b.trained
FROM batch_rows b JOIN responses r ON r.record_id = b.row_id LEFT JOIN sampled s ON s.policy_version = r.policy_version;

-- The number of rollouts that RL can no longer train on, by reason. Each rollout is a row of `dropped_rollouts`.
CREATE OR REPLACE VIEW dropped_rollout_stats AS
SELECT reason, policy_version, count(*) AS rollouts, min(created_at) AS first_at, max(created_at) AS last_at
FROM dropped_rollouts GROUP BY ALL;

-- The training phases that are paused now, with the reason and the start of the pause.
CREATE OR REPLACE VIEW paused_phases AS
SELECT phase, reason, created_at AS since
FROM (SELECT *, row_number() OVER (PARTITION BY phase ORDER BY commit_seq DESC) AS nth FROM pauses) WHERE nth = 1 AND paused;

-- The metrics of every training step, one row per metric: policy_loss, value_loss, entropy, approx_kl, clipfrac,
-- explained_variance and others. Rows with a null step are metrics of a whole update, for example reward/accuracy on held-out
-- labels, reward_mean and kl_rollouts. Rows with phase "loop" are durations of the training loop in seconds, one set per
-- update.
CREATE OR REPLACE VIEW training_steps AS
WITH steps AS (
    SELECT phase, batch_number, step, policy_version, unnest(map_keys(metrics)) AS metric,
           unnest(map_values(metrics)) AS value, created_at, commit_seq
    FROM metrics),
updates AS (
    SELECT p.phase, b.batch_number, NULL::INTEGER AS step, b.base_policy_version AS policy_version,
           unnest(map_keys(p.metrics)) AS metric, unnest(map_values(p.metrics)) AS value, p.created_at, p.commit_seq
    FROM policies p JOIN batches b ON b.record_id = p.batch_id WHERE p.restored_version IS NULL)
SELECT * FROM steps
UNION ALL
SELECT u.* FROM updates u ANTI JOIN steps s USING (phase, batch_number, metric);
