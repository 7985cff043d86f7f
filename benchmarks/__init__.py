"""Speed and memory, each as a ratio or against a limit in the same run."""
