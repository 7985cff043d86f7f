"""Export of training data: the files and their dataset card."""
