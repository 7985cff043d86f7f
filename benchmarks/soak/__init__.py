"""The soak test: every process of Charter at once, killed at random times, and proofs that nothing was lost or doubled."""
