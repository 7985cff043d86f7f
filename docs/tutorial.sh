#!/usr/bin/env bash
# Run every command of docs/tutorial.md: bash docs/tutorial.sh NEW_FOLDER, with `charter` on the PATH.
set -euo pipefail
charter init "$1"
cd "$1"
say() { printf '\n$ %s\n' "$*"; }
try() { say "$@"; "$@"; }

# A constitution -------------------------------------------------------------------------------------------------------------
cat >constitution.toml <<'TOML'
name = "bookshop"
version = "1.0.0"
description = "How the assistant of a small bookshop answers customers."

[[critique]]
id = "next-step"
name = "A next step"
critique_prompt = "Say whether the assistant's last answer leaves the customer without knowing what happens next with their order."
revision_prompt = "Rewrite the answer so that the customer knows the next step, and who takes it."

[[critique]]
id = "no-false-promise"
name = "No false promise"
critique_prompt = "Say whether the assistant's last answer promises a day, a price or a refund that the shop has not confirmed."
revision_prompt = "Rewrite the answer without unconfirmed promises, and name who can confirm them."

[[critique]]
id = "not-cold"
name = "Kind, and short"
critique_prompt = "Say whether the assistant's last answer lectures, blames or tires a customer who only wants help."
revision_prompt = "Rewrite the answer so that it is kind, short, and does not lecture. Do not refuse what is harmless."

[[judge]]
id = "helps-more"
name = "Helps more"
judge_prompt = "Which answer helps the customer more with what they asked?"

[[judge]]
id = "honest"
name = "Promises less"
judge_prompt = "Which answer avoids promises that the shop has not confirmed?"

[[judge]]
id = "kinder"
name = "Kinder"
judge_prompt = "Which answer is kinder to the customer, without lecturing or refusing needlessly?"
TOML

cat >cases.jsonl <<'JSON'
{"prompt": "Where is my book?", "wins": "I am sorry about the wait. Please send me the order number, and I will ask the carrier today.", "loses": "Books arrive when they arrive.", "principles": ["helps-more", "kinder"]}
{"prompt": "Will it be here on Friday?", "wins": "I cannot promise Friday. The carrier's page shows the day once it is confirmed.", "loses": "Yes, Friday, guaranteed!", "principles": ["honest"]}
JSON

say charter constitution lint constitution.toml
! charter constitution lint constitution.toml # exits with 1: the worked example is missing

cat >>constitution.toml <<'TOML'

[[examples]]
prompt = "My book has not come, and my holiday starts on Monday!"
answer = "It will be there on Saturday, promised. Next time order earlier."
critique = "The answer promises a day that nobody has confirmed, and lectures the customer."
revision = "I am sorry, that is bad timing. Send me the order number: I will ask the carrier today and write to you tonight."
TOML

try charter constitution lint constitution.toml
try charter constitution test cases.jsonl --constitution constitution.toml --min-accuracy 0

# Settings: short responses, so that two processor cores are enough ----------------------------------------------------------------
cat >charter.toml <<'TOML'
[run]
constitution = "constitution.toml"

[prompts]
eval_fraction = 0.0

[respond]
max_tokens = 32

[critique]
rounds = 1
max_tokens = 24

[revise]
max_tokens = 32
TOML

# Prompts ------------------------------------------------------------------------------------------------------------------------
cat >prompts.jsonl <<'JSON'
{"prompt": "My parcel is a week late. Where is my book?"}
{"prompt": "The cover of the atlas is torn. What now?"}
{"prompt": "I was charged twice for one order."}
{"prompt": "Can I return a novel that I have already read?"}
{"prompt": "You sent the second volume, I ordered the first."}
{"prompt": "Will the signed edition be here before Friday?"}
{"prompt": "I forgot my password for your shop."}
{"prompt": "Why is the paperback dearer than last week?"}
{"prompt": "My letters get no answer. Are you still there?"}
{"prompt": "Please cancel my order, it is too late for the birthday."}
{"prompt": "Do you send books to islands?"}
{"prompt": "My daughter is nine. Which book would you give her?"}
JSON

# Start `charter run` and stop it with Ctrl-C (SIGINT) when every prompt has a finished revision chain and a preference.
DONE="select least((select count(*) from revision_chains), (select count(*) from preferences)) as done"
stream() {
    say charter run
    charter run >>run.log 2>&1 &
    local running=$!
    until [ -e .charter/charter.duckdb ] && [ "$(charter sql "$DONE" --json | tr -dc 0-9)" = "$1" ]; do
        kill -0 $running || { cat run.log; exit 1; }
        sleep 2
    done
    kill -INT $running
    wait $running || true
    tail -n 1 run.log
}

try charter produce prompts.jsonl --dry-run
try charter produce prompts.jsonl
stream 12

# Inspect -----------------------------------------------------------------------------------------------------------------------------
try charter status
try charter sql "select prompt_id, prompt from traces limit 10"
try charter show "$(charter sql "select prompt_id from traces order by created_at limit 1" --json | tr -dc '0-9a-f-' | tail -c 36)"
try charter sql "select principle_id, stage, asked, fired, win_rate from principle_stats order by stage, principle_id"
try charter sql "select principle_id, judged, flip_rate, mean_position_gap from position_bias_stats"
say charter dashboard --port 0
charter dashboard --port 0 >dashboard.log 2>&1 &
dashboard=$!
until address=$(grep -o 'http://[^ ]*' dashboard.log); do kill -0 $dashboard; sleep 1; done
python3 -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1] + "api/pipeline", timeout=30).status)' "$address"
kill -INT $dashboard
wait $dashboard || true

# Train ----------------------------------------------------------------------------------------------------------------------------
try charter train --phase sft
try charter train --phase reward
try charter produce prompts.jsonl --epoch 1
stream 24
try charter train --phase ppo --force
try charter produce prompts.jsonl --epoch 2
stream 36

# Compare the policies -----------------------------------------------------------------------------------------------------------------------
try charter policy list
try charter sql "select kind, version, phase, base_version, batch_number, trained_rows from policy_versions order by commit_seq"
try charter sql "select policy_version, count(*) as completions, avg(len(string_split(text, ' '))) as words, avg((finish_reason = 'STOP')::int) as ended from rollouts group by 1 order by 1"
try charter sql "select r.policy_version, count(*) as critiques, avg(c.p_flawed) as p_flawed from critiques c join responses r on r.record_id = c.response_id where c.round = 0 and c.verdict in ('CLEAN', 'FLAWED') group by 1 order by 1"
try charter sql "select phase, step, metric, value from training_steps where metric in ('loss', 'accuracy', 'kl_ref', 'reward_mean') order by commit_seq"
try charter report report.html
try charter export preference exported/pairs
try charter chat "My parcel is a week late. Where is my book?"

# A changed principle ----------------------------------------------------------------------------------------------------------------
sed -i 's/version = "1.0.0"/version = "1.1.0"/; s/promises that the shop has not confirmed?/promises that nobody has confirmed?/' constitution.toml
try charter constitution diff run:live constitution.toml
try charter replay --stage judge --constitution constitution.toml --as rejudged
try charter runs compare live rejudged
