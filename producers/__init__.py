"""Producers: publish prompts from files, standard input and the shipped set, and replay records of earlier runs."""
