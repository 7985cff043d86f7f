"""Control access to the dashboard, and set the content security policy of its pages.

* A web page of another site can send requests to the dashboard if a browser on this machine shows the page. Therefore the Host
  header must be a loopback name (against DNS rebinding). Requests from pages of other sites are refused (Sec-Fetch-Site). Links
  to a page are allowed. A POST needs the Origin of the dashboard.
* On all other addresses, every request needs the token. The first request of a browser has the token as a URL parameter. Later
  requests have the token in a SameSite cookie. Other clients can send a bearer token. The browser binds the cookie to the host
  name, so every Host header is allowed.
* Pages load only files of this server and run only its scripts.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
_COOKIE_NAME = "charter_token"
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_SECURITY_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer, browsers send "Origin: null" with the form of the page
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class SecurityMiddleware:
    """Passes allowed requests to `app`. `token` is None if the server listens on loopback only."""

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_SECURITY_HEADERS)
            await send(message)

        refusal = self.check_request(scope, Headers(scope=scope))
        await (refusal or self.app)(scope, receive, with_headers)

    def check_request(self, scope: Scope, headers: Headers) -> Response | None:
        """Return an error response for a request that must be refused. Return None if the request is allowed."""
        host = headers.get("host", "")
        if self.token is None and _parse_hostname(host) not in _LOOPBACK_HOSTS:
            return _refuse(f"the Host header is {host!r}, not a name of this machine", "open http://localhost:PORT")
        if not _is_same_site(scope, headers):
            return _refuse("a page of another site sent the request", "open the address of the dashboard")
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin", "") not in (f"http://{host}", f"https://{host}"):
            return _refuse("the Origin header is not the address of the dashboard", "use the button on the dashboard page")
        return None if self.token is None else self.check_token(scope, headers, self.token)

    def check_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in pairs if name == "token"]
        if tokens and _is_same_token(tokens[0], token):
            query = urlencode([(name, value) for name, value in pairs if name != "token"])
            redirect = RedirectResponse(scope["path"] + (f"?{query}" if query else ""), 303)
            redirect.set_cookie(_COOKIE_NAME, token, httponly=True, samesite="strict")
            return redirect
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _is_same_token(bearer, token) or _is_same_token(_read_token_cookie(headers), token):
            return None
        return _refuse("the token is missing or wrong", "open the address that charter dashboard printed", 401)


def _parse_hostname(host: str) -> str:
    """Return the name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_same_site(scope: Scope, headers: Headers) -> bool:
    """Return whether the request comes from this site, from the address bar, or from a link without parameters except token."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    is_navigation = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
    token_only = scope["query_string"] == b"" or scope["query_string"].startswith(b"token=")
    return is_navigation and token_only


def _read_token_cookie(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(_COOKIE_NAME)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def _is_same_token(candidate: str, token: str) -> bool:
    return hmac.compare_digest(candidate.encode(), token.encode())


def _refuse(why: str, fix: str, status_code: int = 403) -> Response:
    return PlainTextResponse(f"refused: {why}\n{fix}\n", status_code)
