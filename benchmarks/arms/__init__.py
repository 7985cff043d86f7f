"""Compare ways to train a policy (arms) on the same held-out prompts: `python -m benchmarks.arms`."""
