"""The modules that all Charter processes use: settings, errors, the bus, the store, the models and the worker loop."""
