"""The learners, one file each: SFT, the reward model, PPO and DPO. They need neither the log nor the database."""
