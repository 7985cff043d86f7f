"""`charter dashboard`: serve a live dashboard. The web server is imported only when it starts, so other commands stay fast."""

from __future__ import annotations

from contextlib import suppress

import click

from charter.console import common_options
from engine.settings import Settings


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. All addresses except loopback require a token.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8400, show_default=True, help="Port to listen on; 0 selects a free port."
)
@common_options
def dashboard(settings: Settings, host: str, port: int) -> None:
    """Serve a live dashboard for the browser.

    The views are pipeline, traces, preferences, labels, training, dead letters, SQL and runs.

    The default address accepts connections from this machine only. With another --host, every request needs a token. The token is
    the value of the environment variable CHARTER_DASHBOARD_TOKEN. If it is not set, the command generates and prints a token.

    \b
    Examples:
      charter dashboard
      charter dashboard --port 9000 --data /tmp/demo
      charter dashboard --host 0.0.0.0
    """
    from charter.dashboard.serve import serve_dashboard

    with suppress(KeyboardInterrupt):  # Ctrl-C is the normal way to stop the server
        serve_dashboard(settings, host, port)


COMMAND = dashboard
