"""Evaluation: agreement with human labels, comparison of constitutions, ablation of principles."""
