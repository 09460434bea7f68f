"""The outermost layer: which requests are looked at, how long they may be, and what every answer carries.

A page elsewhere can make a visitor's browser send requests to a service on loopback. Three rules close that: the
Host header is on a list (DNS rebinding), an unsafe request of a foreign origin is refused (forms need no CORS), and
nothing is allowed by CORS. Bodies are counted while they arrive, since Content-Length may be missing or wrong.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import Problem
from service.settings import Settings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class BodyTooLarge(HTTPException):
    """Raised while a body is read; an HTTPException, so that FastAPI passes it on."""

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(413, body_too_large(max_body_bytes).detail)


def body_too_large(max_body_bytes: int) -> Problem:
    """The refusal of a body over the limit."""
    return Problem(
        413, "body_too_large", f"A body may have {max_body_bytes} bytes here, but this one has more; send less at once."
    )


def host_of(value: str) -> str:
    """The host name of a Host header or an origin, lower-case and without port or brackets.

    Raises:
        ValueError: If it is none.
    """
    return (urlsplit(value if "//" in value else f"//{value}").hostname or "").lower()


class Gatekeeper:
    """ASGI middleware that applies the rules of this module."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = settings.accepted_hosts
        self.max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith("/api/"):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["method"])
        if refusal is not None:
            await refusal.response(scope["path"])(scope, receive, send_with_headers)
            return

        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            return message

        await self.app(scope, receive_counted, send_with_headers)

    def _refusal(self, headers: Headers, method: str) -> Problem | None:
        host = headers.get("host", "")
        try:
            is_accepted = host_of(host) in self.hosts
        except ValueError:
            is_accepted = False
        if not is_accepted:
            return Problem(
                421,
                "host_not_allowed",
                f"This server does not answer for host {host!r}; use localhost, or name the host in "
                "PRUNEFRONT_ALLOWED_HOSTS.",
            )
        if method not in SAFE_METHODS and self._is_cross_origin(headers, host):
            return Problem(
                403,
                "cross_origin",
                "A page of another origin may not change anything here; use the page of this server.",
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return body_too_large(self.max_body_bytes)
        return None

    @staticmethod
    def _is_cross_origin(headers: Headers, host: str) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            return urlsplit(origin).netloc.lower() != host.lower()
        return headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
