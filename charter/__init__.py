"""Charter is an event-driven streaming data engine for Constitutional AI."""

from charter.shadowing import require_own_packages

__version__ = "0.1.0"

require_own_packages()
