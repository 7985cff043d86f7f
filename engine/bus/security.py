"""Build the kafka-python options for a secured cluster, and refuse settings that do not match.

Secrets are read from the environment or from a file, or printed by a command. They are not settings, because settings are printed
and recorded.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine.errors import UsageError
from engine.settings import BusSettings

if TYPE_CHECKING:
    from engine.bus.tokens import TokenCommand, TokenEndpoint, TokenProvider

_SSL_FILE_OPTIONS = ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
_SSL_SETTINGS = (*_SSL_FILE_OPTIONS, "ssl_key_password_env", "ssl_key_password_file", "ssl_check_hostname")
_PASSWORD_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PASSWORD_SETTINGS = ("sasl_username", "sasl_password_env", "sasl_password_file")
_ENDPOINT_SETTINGS = (
    "sasl_client_id",
    "sasl_client_secret_env",
    "sasl_client_secret_file",
    "sasl_client_auth",
    "sasl_scope",
    "sasl_audience",
)
_TOKEN_SETTINGS = (
    "sasl_token_command",
    "sasl_token_url",
    *_ENDPOINT_SETTINGS,
    "sasl_token_lifetime_s",
    "sasl_extensions",
)
_CREDENTIAL_SETTINGS = (*_PASSWORD_SETTINGS, *_TOKEN_SETTINGS)


def make_client_options(bus: BusSettings, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the security options of kafka-python, empty for PLAINTEXT. Never print them, because they contain the password.

    Raise UsageError if a setting is missing, or has no effect with the other settings. The provider of tokens in the options is not
    started yet: `KafkaBus` starts and closes it.
    """
    environment = os.environ if environment is None else environment
    _require_consistent(bus)
    options: dict[str, Any] = {}
    if bus.security_protocol != "PLAINTEXT":
        options["security_protocol"] = bus.security_protocol
    if bus.security_protocol.endswith("SSL"):
        options |= _make_ssl_options(bus, environment)
    if bus.security_protocol.startswith("SASL"):
        options |= {"sasl_mechanism": bus.sasl_mechanism, **_make_sasl_options(bus, environment)}
    return options


def sends_secret_unencrypted(bus: BusSettings) -> bool:
    """Return whether a password or a token is sent to the broker without encryption."""
    return bus.security_protocol == "SASL_PLAINTEXT" and bus.sasl_mechanism in ("PLAIN", "OAUTHBEARER")


# Settings that do not match


def _require_consistent(bus: BusSettings) -> None:
    """Raise UsageError for a setting that would have no effect. A user who sets it expects an effect."""
    protocol, mechanism = bus.security_protocol, bus.sasl_mechanism
    if not protocol.endswith("SSL"):
        fix = "set bus.security_protocol to SSL or SASL_SSL, or remove bus.{}"
        _refuse_set(bus, _SSL_SETTINGS, f"bus.security_protocol = {protocol} does not use TLS", fix)
    if not protocol.startswith("SASL"):
        why = f"bus.security_protocol = {protocol} does not use SASL"
        fix = "set bus.security_protocol to SASL_SSL, or remove bus.{}"
        _refuse_set(bus, ("sasl_mechanism", *_CREDENTIAL_SETTINGS), why, fix)
        return
    if mechanism not in _PASSWORD_MECHANISMS:
        why = f"bus.sasl_mechanism = {mechanism} does not use a user name and a password"
        _refuse_set(bus, _PASSWORD_SETTINGS, why, "remove bus.{}, or set bus.sasl_mechanism to another mechanism")
    if mechanism != "OAUTHBEARER":
        why = f"bus.sasl_mechanism = {mechanism} does not use tokens"
        _refuse_set(bus, _TOKEN_SETTINGS, why, "set bus.sasl_mechanism to OAUTHBEARER, or remove bus.{}")
    elif bus.sasl_token_command:
        why = "bus.sasl_token_command is set, so the token does not come from an endpoint"
        _refuse_set(bus, ("sasl_token_url", *_ENDPOINT_SETTINGS), why, "remove bus.{} or bus.sasl_token_command")
    if mechanism == "AWS_MSK_IAM" and protocol != "SASL_SSL":
        raise UsageError(
            f"bus.security_protocol = {protocol} cannot be used with AWS_MSK_IAM",
            "MSK accepts this mechanism only over TLS",
            "set bus.security_protocol to SASL_SSL",
        )


def _refuse_set(bus: BusSettings, names: tuple[str, ...], why: str, fix: str) -> None:
    """Raise UsageError if one of the settings does not have its default. `fix` contains {} for the name of the setting."""
    for name in names:
        if getattr(bus, name) != BusSettings.model_fields[name].default:
            raise UsageError(f"the setting bus.{name} would have no effect", why, fix.format(name))


# TLS


def _make_ssl_options(bus: BusSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {name: _check_file(name, getattr(bus, name)) for name in _SSL_FILE_OPTIONS if getattr(bus, name)}
    options["ssl_check_hostname"] = bus.ssl_check_hostname
    if not bus.ssl_certfile:
        why, fix = "bus.ssl_certfile is empty", "set bus.ssl_certfile to the client certificate, or remove bus.{}"
        _refuse_set(bus, ("ssl_keyfile", "ssl_key_password_env", "ssl_key_password_file"), why, fix)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if bus.ssl_cafile:
        try:
            context.load_verify_locations(bus.ssl_cafile)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(
                f"bus.ssl_cafile: {bus.ssl_cafile} has no certificates that can be read",
                getattr(error, "reason", None) or error.strerror or type(error).__name__,
                "set it to a PEM file with the CA certificates of the broker",
            ) from None
    if bus.ssl_certfile:
        options |= _load_certificate(context, bus, environment)
    return options


def _load_certificate(context: ssl.SSLContext, bus: BusSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    """Check that the certificate and the key can be loaded. Return the option with the password of the key, if there is one.

    Without a password, OpenSSL would ask for it on the terminal.
    """
    if bus.ssl_key_password_file:
        password = _read_secret_file("ssl_key_password_file", bus.ssl_key_password_file)
    else:
        password = environment.get(bus.ssl_key_password_env, "")
    was_asked = False

    def get_password() -> str:
        nonlocal was_asked
        was_asked = True
        return password

    try:
        context.load_cert_chain(bus.ssl_certfile, bus.ssl_keyfile or None, get_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        key_file = bus.ssl_keyfile or bus.ssl_certfile
        if was_asked:
            raise UsageError(
                f"the private key in {key_file} cannot be decrypted",
                "its password is wrong" if password else f"it has a password, and {bus.ssl_key_password_env} is not set",
                f"type: export {bus.ssl_key_password_env}=...    or: --set bus.ssl_key_password_file=FILE",
            ) from None
        raise UsageError(
            f"the client certificate {bus.ssl_certfile} with the key in {key_file} cannot be used",
            getattr(error, "reason", None) or "the files are not a PEM certificate and its PEM key",
            "set bus.ssl_certfile and bus.ssl_keyfile to a certificate and to the key of this certificate",
        ) from None
    return {"ssl_password": password} if was_asked else {}


def _check_file(name: str, path: str) -> str:
    if not Path(path).is_file():
        raise UsageError(
            f"bus.{name}: there is no file {path}", "the setting must name an existing file", f"type: --set bus.{name}=FILE"
        )
    return path


# SASL


def _make_sasl_options(bus: BusSettings, environment: Mapping[str, str]) -> dict[str, Any]:
    if bus.sasl_mechanism == "OAUTHBEARER":
        return {"sasl_oauth_token_provider": _make_token_provider(bus, environment)}
    if bus.sasl_mechanism == "AWS_MSK_IAM":
        _require_aws_configuration()
        return {}
    return {"sasl_plain_username": _require_username(bus), "sasl_plain_password": _read_password(bus, environment)}


def _require_aws_configuration() -> None:
    """Raise UsageError if the AWS library, a region or credentials are missing. The client would only report a timeout."""
    if find_spec("botocore") is None:
        raise UsageError(
            "bus.sasl_mechanism = AWS_MSK_IAM needs the Python package botocore",
            "it is not installed",
            "type: pip install botocore",
        )
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session()
    try:
        missing = "region" if not session.get_config_variable("region") else "" if session.get_credentials() else "credentials"
    except BotoCoreError as error:
        raise UsageError("the configuration of AWS cannot be used", str(error), "type: aws sts get-caller-identity") from None
    if missing:
        raise UsageError(
            f"bus.sasl_mechanism = AWS_MSK_IAM needs AWS {missing}",
            "botocore finds none in the environment, in its files and in the role of this machine",
            "type: export AWS_DEFAULT_REGION=REGION" if missing == "region" else "type: aws sts get-caller-identity",
        )


def _make_token_provider(bus: BusSettings, environment: Mapping[str, str]) -> TokenProvider:
    from engine.bus.tokens import TokenCommand, TokenProvider

    source: TokenCommand | TokenEndpoint
    if bus.sasl_token_command:
        if not bus.sasl_token_command[0]:
            raise UsageError(
                "bus.sasl_token_command has no program",
                "its first entry is empty",
                'type: --set \'bus.sasl_token_command=["PROGRAM", "ARGUMENT"]\'',
            )
        source = TokenCommand(bus.sasl_token_command, bus.sasl_token_lifetime_s)
    elif bus.sasl_token_url:
        source = _make_token_endpoint(bus, environment)
    else:
        raise UsageError(
            "there is no source of Kafka tokens",
            "bus.sasl_mechanism = OAUTHBEARER needs a command or an endpoint that gives tokens",
            "set bus.sasl_token_command, or bus.sasl_token_url and bus.sasl_client_id",
        )
    return TokenProvider(source, dict(_parse_extension(entry) for entry in bus.sasl_extensions))


def _make_token_endpoint(bus: BusSettings, environment: Mapping[str, str]) -> TokenEndpoint:
    from engine.bus.tokens import TokenEndpoint

    _check_token_url(bus.sasl_token_url)
    if not bus.sasl_client_id:
        raise UsageError(
            "there is no client id for the token endpoint",
            "bus.sasl_token_url requires the id of a client",
            "set bus.sasl_client_id",
        )
    read_secret = _make_secret_reader(bus, environment)
    read_secret()  # raise the error for a missing secret now
    return TokenEndpoint(
        bus.sasl_token_url,
        bus.sasl_client_id,
        read_secret,
        scope=bus.sasl_scope,
        audience=bus.sasl_audience,
        sends_secret_in_body=bus.sasl_client_auth == "client_secret_post",
        lifetime_s=bus.sasl_token_lifetime_s,
    )


def _check_token_url(url: str) -> None:
    """Raise UsageError unless the URL is https, or http on this machine. Messages do not contain a user or a password."""
    try:
        parts = urlsplit(url)
        host, has_credentials, is_valid = parts.hostname or "", "@" in parts.netloc, parts.port != 0
    except ValueError:
        host, has_credentials, is_valid = "", "@" in url, False
    if has_credentials:
        raise UsageError(
            "bus.sasl_token_url must not contain a user or a password",
            "settings are printed and recorded",
            "set bus.sasl_client_id, and put the secret into the variable that bus.sasl_client_secret_env names",
        )
    if not (is_valid and host and not parts.fragment and parts.scheme in ("http", "https")):
        raise UsageError(
            f"bus.sasl_token_url cannot be {url!r}", "it is not a URL", "type: --set bus.sasl_token_url=https://HOST/PATH"
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise UsageError(
            f"bus.sasl_token_url cannot be {url!r}",
            "the client secret would be sent without encryption",
            "use https://; http:// is accepted only for localhost",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse_extension(entry: str) -> tuple[str, str]:
    """Return the name and the value of an entry NAME=VALUE. RFC 7628 allows letters in names and printable values."""
    name, equals, value = entry.partition("=")
    if not (equals and name.isascii() and name.isalpha() and name != "auth" and value.isascii() and value.isprintable()):
        raise UsageError(
            f"bus.sasl_extensions cannot contain {entry!r}",
            "an extension is NAME=VALUE; its name has only letters and is not auth",
            "type: --set bus.sasl_extensions=logicalCluster=lkc-1,identityPoolId=pool-1",
        )
    return name, value


def _make_secret_reader(bus: BusSettings, environment: Mapping[str, str]) -> Callable[[], str]:
    """Return a function that reads the client secret. A file is read for each token, because its content can change."""

    def read_secret() -> str:
        return _read_secret(bus, environment, "sasl_client_secret", f"secret for the client {bus.sasl_client_id}")

    return read_secret


def _require_username(bus: BusSettings) -> str:
    if not bus.sasl_username:
        raise UsageError(
            "there is no Kafka user name",
            f"bus.security_protocol = {bus.security_protocol} requires a user name",
            "set bus.sasl_username",
        )
    return bus.sasl_username


def _read_password(bus: BusSettings, environment: Mapping[str, str]) -> str:
    return _read_secret(bus, environment, "sasl_password", f"password for the Kafka user {bus.sasl_username}")


def _read_secret(bus: BusSettings, environment: Mapping[str, str], name: str, description: str) -> str:
    """Return a secret from the file of the setting NAME_file, or else from the environment variable that NAME_env names."""
    path, variable = getattr(bus, f"{name}_file"), getattr(bus, f"{name}_env")
    if path:
        return _read_secret_file(f"{name}_file", path)
    if secret := environment.get(variable):
        return secret
    raise UsageError(
        f"there is no {description}",
        f"the environment variable {variable} is not set, and bus.{name}_file is empty",
        f"type: export {variable}=...    or: --set bus.{name}_file=FILE",
    )


def _read_secret_file(name: str, path: str) -> str:
    """Return the secret in a file, without the newline that editors add at its end."""
    try:
        secret = Path(_check_file(name, path)).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "the file is not UTF-8 text"
        raise UsageError(f"bus.{name}: {path} cannot be read", why, f"type: --set bus.{name}=FILE") from None
    if not secret:
        raise UsageError(f"bus.{name}: {path} is empty", "the file must contain the secret", "write the secret into the file")
    return secret
