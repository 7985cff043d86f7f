"""Who may ask the dashboard, and what its pages may do.

* A browser on this machine can be sent here by any page that it shows. So the Host header must be this machine's name (against
  DNS rebinding), requests that another site's page makes are refused (Sec-Fetch-Site; opening a page by a link is no harm), and
  a POST needs this page's own Origin.
* Bound elsewhere than to loopback, every request needs the token: once in the address, from then on in a cookie that other
  sites' requests do not carry, or as a bearer token. The cookie belongs to the name in the address, so the Host may be any.
* Pages load nothing but this server's own files and run no script but its own file.
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
    "referrer-policy": "same-origin",  # with no-referrer a browser hides the Origin of this page's own form, too
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class SecurityMiddleware:
    """Lets requests through to `app`; `token` is None when the server listens on loopback alone."""

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

        answer = self.check_request(scope, Headers(scope=scope))
        await (answer or self.app)(scope, receive, with_headers)

    def check_request(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that may not pass; None lets it through."""
        host = headers.get("host", "")
        if self.token is None and _parse_hostname(host) not in _LOOPBACK_HOSTS:
            return _refuse(
                f"this dashboard is not called {_parse_hostname(host) or 'nothing'}", "open it as http://localhost:PORT"
            )
        if not _is_same_site(scope, headers):
            return _refuse("another site's page has asked for this", "open the dashboard itself")
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin", "") not in (f"http://{host}", f"https://{host}"):
            return _refuse("only the dashboard's own page may change something", "press the button there")
        return None if self.token is None else self.check_token(scope, headers, self.token)

    def check_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in pairs if name == "token"]
        if given and _is_same_token(given[0], token):
            rest = urlencode([(name, value) for name, value in pairs if name != "token"])
            answer = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(_COOKIE_NAME, token, httponly=True, samesite="strict")
            return answer
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _is_same_token(bearer, token) or _is_same_token(_read_token_cookie(headers), token):
            return None
        return _refuse("this dashboard asks for its token", "open the address that charter dashboard has printed", 401)


def _parse_hostname(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_same_site(scope: Scope, headers: Headers) -> bool:
    """Whether the browser says that no other site's page asked, or only by opening a page without a question in it."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    opened = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
    token_only = scope["query_string"] == b"" or scope["query_string"].startswith(b"token=")
    return opened and token_only


def _read_token_cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(_COOKIE_NAME)
    except CookieError:
        return ""
    return found.value if found else ""


def _is_same_token(candidate: str, token: str) -> bool:
    return hmac.compare_digest(candidate.encode(), token.encode())


def _refuse(why: str, fix: str, status_code: int = 403) -> Response:
    return PlainTextResponse(f"refused: {why}\n{fix}\n", status_code)
