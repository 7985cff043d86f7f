"""Constitutions: lists of written principles in versioned TOML files, and the code that loads them."""
