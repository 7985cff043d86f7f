"""Export of training data: the data files and their dataset card."""
