"""The modules that all Charter processes use. They define settings, errors, the bus, the store, models and the worker loop."""
