"""Constitutions: written principles as versioned TOML files, and their loader."""
