"""What puts prompts on topics: files, standard input, and the shipped set."""
