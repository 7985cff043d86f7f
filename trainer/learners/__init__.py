"""The learners are SFT, the reward model, PPO, GRPO, RLOO and DPO, with one file each. They do not use the log or the database."""
