"""What every Charter process shares: settings, errors, the bus, the store, the models and the worker loop."""
