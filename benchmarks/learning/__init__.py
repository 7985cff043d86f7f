"""The proof of learning on real parts; see `benchmarks.learning.__main__`."""
