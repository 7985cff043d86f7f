"""Run the web server of the dashboard (uvicorn): open the socket, choose the token, and serve the pages."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket

import click
import uvicorn

from charter.dashboard.app import Dashboard
from engine.errors import UsageError
from engine.settings import Settings

TOKEN_VARIABLE = "CHARTER_DASHBOARD_TOKEN"
_MAX_CONCURRENT_REQUESTS = 64


def serve_dashboard(settings: Settings, host: str, port: int) -> None:
    """Serve the dashboard until Ctrl-C."""
    token = None if is_loopback(host) else os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    server_socket = open_socket(host, port)
    click.echo(f"dashboard of {settings.folder.resolve()}: {format_address(host, server_socket.getsockname()[1], token)}")
    click.echo("stop with Ctrl-C", err=True)
    config = uvicorn.Config(
        Dashboard(settings).build_app(token),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONCURRENT_REQUESTS,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[server_socket])


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(addresses[0][4][:2], family=addresses[0][0])
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen on {host}:{port}", why, "choose another port: charter dashboard --port 9000"
        ) from error


def format_address(host: str, port: int, token: str | None) -> str:
    """Return the address to open in a browser."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
