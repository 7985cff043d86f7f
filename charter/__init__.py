"""Charter is an event-driven streaming data engine for Constitutional AI."""

__version__ = "0.1.0"
