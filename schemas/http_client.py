"""Create HTTP clients, and explain proxy settings of the environment that cannot be used.

httpx reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE (in upper or lower case) when a client is created. Its
errors for invalid values do not name the variable, and can contain a password. The errors of this module name the variable, and
mask the user and password of a proxy.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    import httpx

_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_FIX_PROXY = "write it as http://HOST:PORT, or type: unset {}"


class ClientSettingsError(ValueError):
    """The environment has proxy or certificate settings that cannot be used: what happened, why, and what to type."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what, self.why, self.fix = what, why, fix


def create_http_client(**options: Any) -> httpx.Client:
    """Create a client that uses the proxies of the environment. Raise ClientSettingsError if their settings cannot be used."""
    import httpx

    try:
        return httpx.Client(**{"verify": _load_certificates(options.get("trust_env", True))} | options)
    except (ValueError, ImportError, httpx.InvalidURL):
        # The original error can contain the password of a proxy.
        raise _describe_proxy_problem() from None
    except OSError as error:
        names = ", ".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name))
        raise ClientSettingsError(
            "the certificates for HTTPS cannot be read",
            f"{names or 'the certificates of httpx'}: {error.strerror}",
            f"set {names} to an existing file or folder, or type: unset {names}"
            if names
            else "install httpx and certifi again",
        ) from error


def _load_certificates(trust_env: bool) -> ssl.SSLContext:
    """Return the certificates that httpx would read for each client. To read a file takes most of the time to create a client."""
    import httpx

    path = os.environ.get("SSL_CERT_FILE", "") if trust_env else ""
    if not path and trust_env and os.environ.get("SSL_CERT_DIR"):
        return httpx.create_ssl_context()  # reads the files of a folder only when it needs them
    return _read_certificates(path, Path(path).stat().st_mtime_ns if path else 0)


@lru_cache(maxsize=2)
def _read_certificates(path: str, _changed_at_ns: int) -> ssl.SSLContext:
    """Read a file of certificates once, and again after it has changed. An empty path is the file of httpx."""
    import httpx

    return httpx.create_ssl_context(trust_env=bool(path))


def find_proxy_variable(url: str) -> str:
    """Return the name of the variable whose proxy gets the requests for a URL, or an empty string."""
    parts, proxies = urlsplit(url), urllib.request.getproxies()
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), "")
    return next((name for name, _ in _read_variables(f"{scheme}_PROXY".upper())), "") if scheme else ""


def _read_variables(*names: str) -> Iterator[tuple[str, str]]:
    """Yield the names and values of environment variables that are set, in upper or lower case."""
    for name in names:
        for variant in (name.lower(), name):  # the lower-case name has precedence
            if value := os.environ.get(variant, "").strip():
                yield variant, value


def _mask_credentials(value: str) -> str:
    start, at, host = value.rpartition("@")
    scheme = start.partition("://")[0] + "://" if "://" in start else ""
    return f"{scheme}***@{host}" if at else value


def _describe_proxy_problem() -> ClientSettingsError:
    """Return the error that names the first variable that cannot be used."""
    for name, value in _read_variables(*_PROXY_VARIABLES):
        scheme = value.partition("://")[0].lower() if "://" in value else "http"
        what = f"the proxy in the environment variable {name} cannot be used"
        if scheme not in _PROXY_SCHEMES:
            why = f"its address is {_mask_credentials(value)}, and the schemes of a proxy are {', '.join(_PROXY_SCHEMES)}"
            return ClientSettingsError(what, why, _FIX_PROXY.format(name))
        if scheme.startswith("socks") and find_spec("socksio") is None:
            why = f"its address is {_mask_credentials(value)}, and a SOCKS proxy needs the Python package socksio"
            return ClientSettingsError(what, why, f"type: pip install 'httpx[socks]', or type: unset {name}")
        if not _is_valid_address(value if "://" in value else f"http://{value}"):
            why = f"its address {_mask_credentials(value)} is not a valid URL"
            return ClientSettingsError(what, why, _FIX_PROXY.format(name))
    for name, value in _read_variables("NO_PROXY"):
        for entry in (entry.strip() for entry in value.split(",")):
            if entry and not _is_valid_exception(entry):
                return ClientSettingsError(
                    f"the environment variable {name} cannot be used",
                    f"its entry {entry} is neither a host name nor an IP address",
                    f"write an IPv6 address without brackets and without a prefix length, e.g. export {name}=localhost,::1",
                )
    names = ", ".join(name for name, _ in _read_variables(*_PROXY_VARIABLES, "NO_PROXY"))
    return ClientSettingsError(
        "the proxy settings of the environment cannot be used", f"httpx rejects the values of {names}", f"type: unset {names}"
    )


def _is_valid_address(address: str) -> bool:
    import httpx

    try:
        httpx.URL(address)
    except httpx.InvalidURL:
        return False
    return True


def _is_valid_exception(entry: str) -> bool:
    """Return whether httpx accepts an entry of NO_PROXY: a host name, an address, or a URL."""
    try:
        is_ipv6 = ipaddress.ip_address(entry.partition("/")[0]).version == 6
    except ValueError:
        is_ipv6 = False
    return _is_valid_address(entry if "://" in entry else f"all://[{entry}]" if is_ipv6 else f"all://*{entry}")
