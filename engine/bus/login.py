"""Log in to a Kafka broker once, to find out why a broker rejects a login.

kafka-python retries a rejected login without end, and its errors report only a timeout. It also discards the reason of a
rejection if it reads the reason and the end of the connection together. So this module opens one connection and returns its error.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from kafka import errors
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from engine.errors import BusUnreachable, CharterError, LoginRejected

_LOGIN_TIMEOUT_MS = 15_000
_REJECTION_ERRORS = (
    errors.SaslAuthenticationFailedError,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    errors.KafkaConfigurationError,
)
# What OpenSSL reports when the broker does not accept the certificate of the client: "sslv3 alert certificate unknown", ...
_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")
_HOST_MISMATCH_CODES = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL
_FIX_HOST = "use the host name of the certificate in bus.address, or set bus.ssl_check_hostname=false"
_FIX_CA = "set bus.ssl_cafile to the CA certificates of the broker"
_EXPLANATIONS = {
    errors.UnsupportedSaslMechanismError: "the listener does not offer this mechanism",
    errors.IllegalSaslStateError: "the listener does not use SASL",
}
_FIXES = {
    errors.UnsupportedSaslMechanismError: "set bus.sasl_mechanism to a mechanism of the listener, or use another port",
    errors.IllegalSaslStateError: "set bus.security_protocol to SSL or PLAINTEXT, or use another port",
}
_FIX_PASSWORD = "check bus.sasl_username, the password and bus.sasl_mechanism"
_FIXES_BY_MECHANISM = {
    "OAUTHBEARER": "check the issuer, the audience, the scope and the lifetime of the token, and the clock of this machine",
    "AWS_MSK_IAM": "check the AWS credentials, AWS_DEFAULT_REGION, and the IAM policy of the cluster",
}


class _ManagerWithFullReads(KafkaConnectionManager):
    """Delivers all data before the end of a connection is reported, so that the reason of a rejection is not lost."""

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at=timeout_at)
        receive = transport._sock_recv

        def receive_before_error() -> tuple[bytes, Exception | None]:
            data, error = receive()
            return data, None if data else error  # the next call returns the error again

        transport._sock_recv = receive_before_error
        return transport


def require_login(client_options: Mapping[str, Any]) -> None:
    """Raise LoginRejected if the brokers reject the login, and the error of the token provider if it has no valid token.

    Return if one of the servers accepts the login, and also if they end the connections without a reason. Raise BusUnreachable
    if no server answers.
    """
    rejection: LoginRejected | None = None
    silent_servers = []
    servers = client_options["bootstrap_servers"]
    for server in servers:
        error = _log_in(server, client_options)
        if error is None:
            return
        if isinstance(error, CharterError):
            raise error
        if isinstance(error, errors.KafkaTimeoutError):
            silent_servers.append(server)
        rejection = rejection or find_rejection(error, server, client_options)
    if rejection:
        raise rejection
    if len(silent_servers) == len(servers):  # kafka-python would wait for the handshake without a limit
        raise BusUnreachable(
            f"Kafka at {','.join(servers)} is unreachable",
            f"it accepts connections, but a login does not end within {_LOGIN_TIMEOUT_MS / 1000:.0f} s",
            "check the broker, bus.address and bus.security_protocol",
        )


def _log_in(server: str, client_options: Mapping[str, Any]) -> Exception | None:
    """Open a connection to one server and close it. Return the error of the connection, if there is one."""
    net = NetworkSelector()
    options = {name: value for name, value in client_options.items() if name != "bootstrap_servers"}
    manager = _ManagerWithFullReads(net, bootstrap_servers=[server], **options)

    async def connect() -> None:
        connection = manager.get_connection("bootstrap-0", timeout_ms=_LOGIN_TIMEOUT_MS)
        await manager.wait_for(connection.init_future, _LOGIN_TIMEOUT_MS)  # a handshake of TLS has no timeout

    try:
        net.run(connect)
    except (errors.KafkaError, OSError, CharterError) as error:  # an OSError is also an error of TLS
        return error
    finally:
        manager.close()
        net.close()
    return None


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes. kafka-python wraps the errors of TLS in other errors."""
    while error is not None:
        yield error
        argument = error.args[0] if error.args else None
        error = error.__cause__ or error.__context__ or (argument if isinstance(argument, BaseException) else None)


def find_rejection(error: BaseException, server: str, client_options: Mapping[str, Any]) -> LoginRejected | None:
    """Return the error for the user if a connection failed because the login is wrong, and None after any other failure."""
    mechanism = client_options.get("sasl_mechanism")
    for cause in _list_causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return LoginRejected(
                f"the certificate of the Kafka broker at {server} is not trusted",
                cause.verify_message,
                _FIX_HOST if cause.verify_code in _HOST_MISMATCH_CODES else _FIX_CA,
            )
        if isinstance(cause, ssl.SSLError) and any(word in (cause.reason or "") for word in _CERTIFICATE_ALERTS):
            return LoginRejected(
                f"Kafka at {server} rejects the client certificate",
                f"the broker answers {cause.reason}" if client_options.get("ssl_certfile") else "bus.ssl_certfile is not set",
                "set bus.ssl_certfile and bus.ssl_keyfile to a certificate that the broker trusts, and to its key",
            )
        if isinstance(cause, _REJECTION_ERRORS):
            return LoginRejected(
                f"Kafka at {server} rejects the login with {mechanism}",
                _EXPLANATIONS.get(type(cause)) or _describe(cause, client_options),
                _FIXES.get(type(cause)) or _FIXES_BY_MECHANISM.get(mechanism or "") or _FIX_PASSWORD,
            )
    return None


def _describe(error: BaseException, client_options: Mapping[str, Any]) -> str:
    """Return the message of the broker. Mask the password, in case that the broker repeats it."""
    text = str(error.args[0] if error.args else error).removeprefix("SaslAuthenticationFailedError: ")
    password = client_options.get("sasl_plain_password")
    return text.replace(password, "***") if password else text
