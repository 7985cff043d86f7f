"""The commands: one file for each verb, with its options and its output. `charter/cli.py` loads the one that is called."""
