"""This package samples batches from DuckDB, trains with four learners, and publishes new policies and reward models."""
