"""The benchmarks measure speed and memory. Each result is a ratio within one run, or is compared with a limit."""
