"""Evaluate judges and constitutions: agreement with human labels, comparison of constitutions, ablation of principles."""
