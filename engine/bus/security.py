"""Build the kafka-python options for a secured cluster.

Secrets are read from the environment or from a file. They are not settings, because settings are printed and recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from engine.settings import BusSettings

_SSL_FILE_OPTIONS = ("ssl_cafile", "ssl_certfile", "ssl_keyfile")


def make_client_options(bus: BusSettings, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the security options of kafka-python, empty for PLAINTEXT. Never print them, because they contain the password."""
    options: dict[str, Any] = {}
    if bus.security_protocol != "PLAINTEXT":
        options["security_protocol"] = bus.security_protocol
    if bus.security_protocol.endswith("SSL"):
        options |= {name: _check_file(name, getattr(bus, name)) for name in _SSL_FILE_OPTIONS if getattr(bus, name)}
        options["ssl_check_hostname"] = bus.ssl_check_hostname
    if bus.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": bus.sasl_mechanism,
            "sasl_plain_username": _require_username(bus),
            "sasl_plain_password": _read_password(bus, os.environ if environment is None else environment),
        }
    return options


def _check_file(name: str, path: str) -> str:
    if not Path(path).is_file():
        raise UsageError(
            f"bus.{name}: there is no file {path}", "the setting must name an existing file", f"type: --set bus.{name}=FILE"
        )
    return path


def _require_username(bus: BusSettings) -> str:
    if not bus.sasl_username:
        raise UsageError(
            "there is no Kafka user name",
            f"bus.security_protocol = {bus.security_protocol} requires a user name",
            "set bus.sasl_username",
        )
    return bus.sasl_username


def _read_password(bus: BusSettings, environment: Mapping[str, str]) -> str:
    """Return the password. Remove the newline that editors add at the end of a file."""
    if bus.sasl_password_file:
        return Path(_check_file("sasl_password_file", bus.sasl_password_file)).read_text(encoding="utf-8").rstrip("\r\n")
    if password := environment.get(bus.sasl_password_env):
        return password
    raise UsageError(
        f"there is no password for the Kafka user {bus.sasl_username}",
        f"the environment variable {bus.sasl_password_env} is not set, and bus.sasl_password_file is empty",
        f"type: export {bus.sasl_password_env}=...    or: --set bus.sasl_password_file=FILE",
    )
