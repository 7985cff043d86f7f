"""Define the commands. Each file has the options and the output of one verb. `charter/cli.py` imports only the file it needs."""
