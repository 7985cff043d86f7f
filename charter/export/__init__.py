"""Export training data: write the data files and their dataset card."""
