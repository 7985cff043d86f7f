"""Get the tokens of the SASL mechanism OAUTHBEARER, and replace each token before it expires.

A token comes from a command or from an endpoint for client credentials (RFC 6749, section 4.4). `TokenProvider` gives the current
token to all Kafka clients of a bus. A thread fetches the next token after three quarters of the lifetime. kafka-python logs in
again with it before the broker ends the session (KIP-368). If a fetch fails, the thread reports the reason and tries again. When
the token has expired, new connections fail, and the processes wait.

Tokens and client secrets are never part of a message.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote_plus

import httpx
from kafka.net.sasl.oauth import AbstractTokenProvider

from engine.backoff import compute_backoff
from engine.bus.token_statistics import TOKEN_STATISTICS
from engine.errors import BusUnreachable, CharterError, UsageError
from schemas.http_client import ClientSettingsError, create_http_client

logger = logging.getLogger("charter.bus")

_COMMAND_TIMEOUT_S = 60.0
_REQUEST_TIMEOUT_S = 10.0
_MAX_TOKEN_BYTES = 64 * 1024
_MAX_RESPONSE_BYTES = 1024 * 1024
_TOKEN_PATTERN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1
_REFRESH_SHARE = 0.75  # kafka-python logs in again after at least 0.85 of the lifetime
_MIN_REFRESH_INTERVAL_S = 0.2
_RETRY_RANGE_S = (1.0, 30.0)
_REPORT_INTERVAL_S = 30.0
_MIN_RENEWAL_AGE_S = 10.0
_MAX_DESCRIPTION_CHARS = 200
# Answers of an endpoint that a retry does not change (RFC 6749, section 5.2).
_PERMANENT_STATUSES = (400, 401, 403, 404, 405)
_FIX_LIFETIME = "set bus.sasl_token_lifetime_s to the lifetime of the token in seconds"


@dataclass(frozen=True)
class Token:
    """A token. `expires_at` is a time on the monotonic clock, so a change of the wall clock has no effect."""

    text: str = field(repr=False)
    expires_at: float

    @property
    def remaining_s(self) -> float:
        return self.expires_at - time.monotonic()


def make_token(text: str, source: str, lifetimes_s: Sequence[float | None]) -> Token:
    """Return a token that expires at the earliest of `exp` (if it is a JWT) and the known lifetimes.

    `source` is the origin of the token in messages. Raise UsageError if the text is not a bearer token or no expiry is known, and
    BusUnreachable if the token has expired.
    """
    if not _TOKEN_PATTERN.fullmatch(text):
        raise UsageError(
            f"{source} did not give a token",
            "a token consists of letters, digits and the characters -._~+/=; the output is not displayed, because it can be secret",
            "let it give only the token, without a prefix such as Bearer and without JSON",
        )
    expiry = _read_expiry(text)
    known = [expiry - time.time()] if expiry is not None else []
    known += [lifetime for lifetime in lifetimes_s if lifetime]
    if not known:
        raise UsageError(f"the token of {source} has no known expiry", "it is not a JWT with the claim exp", _FIX_LIFETIME)
    if min(known) <= 0:
        raise BusUnreachable(
            f"the token of {source} has expired",
            f"it expired {-min(known):.0f} s ago by the clock of this machine",
            "check the source of the token and the clock",
        )
    return Token(text, time.monotonic() + min(known))


def _read_expiry(text: str) -> float | None:
    """Return the claim `exp` of a JWT in seconds since 1970, or None if the token is not a JWT or has no such claim.

    The signature is not checked: the broker does that.
    """
    parts = text.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        return None
    expiry = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expiry, bool) or not isinstance(expiry, int | float) or not math.isfinite(expiry):
        return None
    return float(expiry)


class TokenCommand:
    """Runs a command that prints a token. The command is a program and its arguments; no shell interprets them."""

    def __init__(self, arguments: Sequence[str], lifetime_s: float = 0.0) -> None:
        self.arguments, self.lifetime_s = list(arguments), lifetime_s
        self.name = f"the command {arguments[0]} (bus.sasl_token_command)"
        self.process: subprocess.Popen[bytes] | None = None

    def fetch(self) -> Token:
        """Return the token that the command prints. What the command prints to standard error is discarded."""
        try:
            # In a new session, so that Ctrl-C does not end the command, and a timeout ends all its processes.
            self.process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.name} cannot be started",
                getattr(error, "strerror", None) or str(error),
                'type: --set \'bus.sasl_token_command=["PROGRAM", "ARGUMENT"]\'    (no shell runs it)',
            ) from None
        has_timed_out = threading.Event()

        def end_command() -> None:
            has_timed_out.set()
            self.cancel()

        timer = threading.Timer(_COMMAND_TIMEOUT_S, end_command)
        timer.daemon = True
        timer.start()
        with self.process as process:
            assert process.stdout
            output = process.stdout.read(_MAX_TOKEN_BYTES + 1)
            if len(output) > _MAX_TOKEN_BYTES:
                self.cancel()
            status = process.wait()
        timer.cancel()
        if has_timed_out.is_set():
            raise self.make_failure(f"it did not end within {_COMMAND_TIMEOUT_S:.0f} s")
        if len(output) > _MAX_TOKEN_BYTES:
            raise self.make_failure(f"it printed more than {_MAX_TOKEN_BYTES} bytes")
        if status:
            raise self.make_failure(f"it ended with exit code {status}; its output is not displayed, because it can be secret")
        return make_token(output.decode("utf-8", "replace").strip(), self.name, [self.lifetime_s])

    def make_failure(self, why: str) -> BusUnreachable:
        return BusUnreachable(f"{self.name} failed", why, "run the command in a terminal to see its output")

    def cancel(self) -> None:
        """End the command and all processes that it has started, if it is running."""
        if self.process and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class TokenEndpoint:
    """Requests tokens from an OAuth 2.0 endpoint, with client credentials. `read_secret` returns the client secret."""

    def __init__(
        self,
        url: str,
        client_id: str,
        read_secret: Callable[[], str],
        *,
        scope: str = "",
        audience: str = "",
        sends_secret_in_body: bool = False,
        lifetime_s: float = 0.0,
    ) -> None:
        self.url, self.client_id, self.read_secret = url, client_id, read_secret
        self.scope, self.audience, self.sends_secret_in_body = scope, audience, sends_secret_in_body
        self.lifetime_s = lifetime_s
        self.name = f"the token endpoint {url.partition('?')[0]}"

    def fetch(self) -> Token:
        secret = self.read_secret()
        status, body = self.post(secret)
        try:
            response = json.loads(body)
        except (ValueError, RecursionError):
            response = None
        if not isinstance(response, dict):
            response = {}
        if status != 200:
            raise self.make_status_error(status, response, secret)
        text, kind = response.get("access_token"), response.get("token_type")
        if not isinstance(text, str) or not isinstance(kind, str) or kind.lower() != "bearer":
            raise UsageError(
                f"{self.name} did not return a bearer token",
                "its response is not JSON with access_token and token_type = Bearer",
                "set bus.sasl_token_url to the token endpoint of the authorization server",
            )
        return make_token(text, self.name, [_parse_lifetime(response.get("expires_in")), self.lifetime_s])

    def post(self, secret: str) -> tuple[int, bytes]:
        """Send the request. Return the status and the body of the response."""
        form = {"grant_type": "client_credentials", "scope": self.scope, "audience": self.audience}
        auth = None
        if self.sends_secret_in_body:
            form |= {"client_id": self.client_id, "client_secret": secret}
        else:
            auth = (quote_plus(self.client_id), quote_plus(secret))  # RFC 6749, section 2.3.1
        # A request to this machine must not go to a proxy. A redirect would forward the secret.
        options = {"timeout": _REQUEST_TIMEOUT_S, "follow_redirects": False, "trust_env": self.url.startswith("https://")}
        deadline = time.monotonic() + _REQUEST_TIMEOUT_S
        try:
            with (
                create_http_client(**options) as client,
                client.stream(
                    "POST",
                    self.url,
                    data={name: value for name, value in form.items() if value},
                    auth=auth,
                    headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                ) as response,
            ):
                body = b""
                for data in response.iter_raw():
                    body += data
                    if len(body) > _MAX_RESPONSE_BYTES:
                        raise self.make_failure(f"its response has more than {_MAX_RESPONSE_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise self.make_failure(f"its response did not end within {_REQUEST_TIMEOUT_S:.0f} s")
                return response.status_code, body
        except ClientSettingsError as error:
            raise UsageError(error.what, error.why, error.fix) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = f"{type(error).__name__}: {self.mask(str(error), secret)}"
            raise BusUnreachable(f"{self.name} is unreachable", why, "check the server and bus.sasl_token_url") from None

    def make_status_error(self, status: int, response: Mapping[str, Any], secret: str) -> CharterError:
        described = [self.mask(str(response[key]), secret) for key in ("error", "error_description") if response.get(key)]
        why = ": ".join([f"status {status}", *described])
        if 300 <= status < 400:
            return UsageError(
                f"{self.name} redirects the request", why, "set bus.sasl_token_url to the address that it redirects to"
            )
        if status in _PERMANENT_STATUSES:
            fix = "check bus.sasl_client_id, the client secret, bus.sasl_scope, bus.sasl_audience and bus.sasl_client_auth"
            return UsageError(f"{self.name} rejects the request", why, fix)
        return self.make_failure(why)

    def make_failure(self, why: str) -> BusUnreachable:
        return BusUnreachable(f"{self.name} failed", why, "check the server and bus.sasl_token_url")

    def mask(self, text: str, secret: str) -> str:
        """Return the start of a message on one line, without the secret in any form in which it was sent."""
        pair = f"{quote_plus(self.client_id)}:{quote_plus(secret)}"
        for form in (secret, quote_plus(secret), base64.b64encode(pair.encode()).decode()):
            text = text.replace(form, "***")
        return "".join(c if c.isprintable() else " " for c in text)[:_MAX_DESCRIPTION_CHARS]

    def cancel(self) -> None:
        """Do nothing: a request ends by its timeout."""


def _parse_lifetime(value: object) -> float | None:
    """Return `expires_in` of a response in seconds. Some servers send it as text."""
    with suppress(TypeError, ValueError):
        if not isinstance(value, bool) and math.isfinite(lifetime := float(value)):  # type: ignore[arg-type]
            return lifetime
    return None


class TokenProvider(AbstractTokenProvider):
    """Gives the current token to the Kafka clients of one bus. The clients never wait for a fetch."""

    def __init__(self, source: TokenCommand | TokenEndpoint, extensions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.source, self._extensions = source, dict(extensions or {})
        self._token: Token | None = None
        self._fetched_at = 0.0
        self._last_error: CharterError | None = None
        self._fetch_lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh_until_closed, name="kafka-token", daemon=True)

    def start(self) -> None:
        """Fetch the first token, and start the thread that replaces it. Raise the error of the source."""
        self._fetch()
        self._thread.start()

    @property
    def remaining_s(self) -> float:
        return self._token.remaining_s if self._token else 0.0

    def token(self) -> str:
        """Return the current token. Raise the error of the last fetch if the token has expired."""
        if self._token is None or self._token.remaining_s <= 0:
            raise self._last_error or BusUnreachable(
                "the Kafka token has expired", f"{self.source.name} has not given a new one yet", "wait for the next attempt"
            )
        return self._token.text

    def extensions(self) -> dict[str, str]:
        """Return the SASL extensions that are sent with each token."""
        return self._extensions

    def renew(self) -> None:
        """Fetch a new token, because a broker has rejected the current one. Do nothing if the token is new."""
        if time.monotonic() - self._fetched_at > _MIN_RENEWAL_AGE_S:
            self._fetch()

    def close(self) -> None:
        """Stop the thread, and end a running command."""
        self._closed.set()
        TOKEN_STATISTICS.expiries.pop(id(self), None)
        self.source.cancel()

    def _fetch(self) -> Token:
        """Replace the token. Count the outcome, and raise the error of the source."""
        with self._fetch_lock:
            try:
                token = self.source.fetch()
            except CharterError as error:
                TOKEN_STATISTICS.fetch_counts["failure"] += 1
                self._last_error = error
                raise
            TOKEN_STATISTICS.fetch_counts["success"] += 1
            self._token, self._last_error, self._fetched_at = token, None, time.monotonic()
            if not self._closed.is_set():
                TOKEN_STATISTICS.expiries[id(self)] = token.expires_at
            return token

    def _refresh_until_closed(self) -> None:
        failures, reported, reported_at = 0, ("", False), 0.0
        delay_s = self.remaining_s * _REFRESH_SHARE
        while not self._closed.wait(max(_MIN_REFRESH_INTERVAL_S, delay_s)):
            try:
                token = self._fetch()
            except CharterError as error:
                if self._closed.is_set():
                    return
                failures += 1
                delay_s = compute_backoff(failures - 1, _RETRY_RANGE_S)
                report = (f"{error.what}: {error.why}", self.remaining_s <= 0)
                if report != reported or time.monotonic() - reported_at >= _REPORT_INTERVAL_S:
                    logger.warning("the Kafka token cannot be replaced: %s; %s", report[0], self._describe_state())
                    reported, reported_at = report, time.monotonic()
            else:
                if failures:
                    logger.warning("the Kafka token was replaced after %d failed attempts", failures)
                failures, reported = 0, ("", False)
                delay_s = token.remaining_s * _REFRESH_SHARE

    def _describe_state(self) -> str:
        if self.remaining_s <= 0:
            return "the current token has expired, so new connections to Kafka fail until an attempt succeeds"
        return f"the current token is valid for {self.remaining_s:.0f} s"
