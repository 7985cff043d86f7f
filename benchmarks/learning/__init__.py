"""The learning benchmark checks that the whole loop learns a known preference. See `benchmarks.learning.__main__`."""
