"""Producers publish prompts from files, standard input and the shipped file, and replay records of earlier runs."""
