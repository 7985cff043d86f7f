"""Training: batches sampled from DuckDB, four learners, and the loop that publishes their policies and reward models."""
