"""Whether anybody still waits for a job: work whose page is gone is not done.

Gradio drops the waiting jobs of a page that closes. It does not notice a job whose sender never opened the stream that
carries its results (a POST to /gradio_api/call/generate and no GET behind it), and goes on with one that is running.
"""

import time
from collections import Counter
from typing import Any
from urllib.parse import parse_qs

ARRIVED = "x-fixclip-arrived"  # request header, set here: when the request came, by `time.monotonic`


class Listeners:
    """The sessions that have a stream of results open.

    Args:
        patience: seconds after a job's arrival in which its stream may be opened, or opened again.
    """

    def __init__(self, patience: float = 10.0):
        self.patience = patience
        self._open: Counter[str] = Counter()

    def opened(self, session: str) -> None:
        self._open[session] += 1

    def closed(self, session: str) -> None:
        self._open[session] -= 1
        if not self._open[session]:
            del self._open[session]

    def waits(self, request: Any) -> bool:
        """Whether somebody waits for the job that this request (`gradio.Request`) asked for.

        True too where the server runs without `TrackListeners`, so that nothing is known.
        """
        arrived = request.headers.get(ARRIVED) if request is not None else None
        if arrived is None or request.session_hash in self._open:
            return True
        return time.monotonic() - float(arrived) < self.patience


class TrackListeners:
    """ASGI middleware that tells `listeners` of every stream of results, and each request when it arrived."""

    def __init__(self, app: Any, listeners: Listeners):
        self.app = app
        self.listeners = listeners

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = ARRIVED.encode()
        headers = [(key, value) for key, value in scope["headers"] if key != name]
        scope = {**scope, "headers": [*headers, (name, str(time.monotonic()).encode())]}
        session = _session_of_stream(scope)
        if session is None:
            await self.app(scope, receive, send)
            return
        self.listeners.opened(session)
        try:
            await self.app(scope, receive, send)
        finally:
            self.listeners.closed(session)


def _session_of_stream(scope: dict[str, Any]) -> str | None:
    """The session of GET .../queue/data?session_hash=S or GET .../call/NAME/S (there the job's id is its session)."""
    if scope["method"] != "GET":
        return None
    parts = scope["path"].rstrip("/").split("/")
    if parts[-2:] == ["queue", "data"]:
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    return parts[-1] if parts[-3:-2] == ["call"] else None
