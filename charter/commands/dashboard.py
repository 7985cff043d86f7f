"""`charter dashboard`: the command. Everything that serves is imported when it runs."""

from __future__ import annotations

from contextlib import suppress

import click

from charter.console import common_options
from engine.settings import Settings

TOKEN_VARIABLE = "CHARTER_DASHBOARD_TOKEN"


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; beyond loopback a token is asked for."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8400, show_default=True, help="Port to listen on; 0 takes a free one."
)
@common_options
def dashboard(settings: Settings, host: str, port: int) -> None:
    """Show everything in a browser, live.

    Pipeline, stories, preferences, training, dead letters, SQL, runs.

    It listens on this machine alone unless --host says otherwise; then every visitor needs the token that is printed (or that
    the variable CHARTER_DASHBOARD_TOKEN gives).

    \b
    Examples:
      charter dashboard
      charter dashboard --port 9000 --data /tmp/demo
      charter dashboard --host 0.0.0.0
    """
    from charter.dashboard.serve import serve_dashboard

    with suppress(KeyboardInterrupt):  # the way to stop it
        serve_dashboard(settings, host, port)


COMMAND = dashboard
