"""Training: batches drawn from DuckDB, three learners, and the loop that publishes what they make."""
