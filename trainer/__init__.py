"""This package samples batches from DuckDB, trains them with four learners, and publishes the new models."""
