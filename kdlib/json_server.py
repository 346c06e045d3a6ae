"""Questions to a JSON server over HTTP: deadlines, retries, and errors that say why.

Knows nothing of what is asked; remote.py does. http.client rather than a library,
because a deadline for the whole answer needs the socket in hand.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

from kdlib.errors import ArgumentError, ModelError

FIRST_WAIT = 0.5  # seconds before the first retry; doubled for each further one
SHOWN = 200  # characters of an answer that a message quotes
REMEDIES = {
    401: "give the api_key that the server was started with",
    403: "give the api_key that the server was started with",
    404: "check the url and the model's name",
}


class JsonServer:
    """One server.

    url:     "http://HOST:PORT", with a path if there is one
    timeout: seconds for one request, from connecting to the last byte
    retries: how often a request is repeated after 429, 5xx or a dropped connection;
             the waits between are 0.5, 1, 2, ... seconds
    api_key: sent as a bearer token

    Raises ArgumentError for an option that cannot work.
    """

    def __init__(
        self, url: str, *, timeout: float, retries: int, api_key: str | None = None
    ):
        try:
            parts = urlsplit(url)
            self._address = parts.hostname, parts.port
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("it names no web server")
        except ValueError as error:  # the port may be no number
            raise ArgumentError(
                f"url={url!r}: {error}", 'write it as "http://HOST:PORT"'
            ) from error
        if not timeout > 0:
            raise ArgumentError(f"timeout={timeout}", "use a positive time in seconds")
        if retries < 0:
            raise ArgumentError(f"retries={retries}", "use 0 or more")
        secure = parts.scheme == "https"
        self._connection = (
            http.client.HTTPSConnection if secure else http.client.HTTPConnection
        )
        self.url, self._path = url.rstrip("/"), parts.path.rstrip("/")
        self.timeout, self.retries = timeout, retries
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, path: str, body: dict | None = None, stop=None):
        """The server's answer, parsed. POST where there is a body, else GET.

        stop: a threading.Event that, once set, ends the wait for a retry

        Raises ModelError for a server that is too slow, refuses (4xx is never asked
        again), answers no JSON, or fails at every attempt.
        """
        stop = stop or threading.Event()
        for attempt in range(self.retries + 1):
            try:
                status, kind, content = self._request(path, body)
            except TimeoutError as error:
                raise ModelError(
                    f"{self.url} did not answer within timeout={self.timeout} s",
                    "raise timeout, lower workers, or look at the server's log",
                ) from error
            except (OSError, http.client.HTTPException) as error:
                fault = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return self._parsed(content, kind)
                fault = f"HTTP {status}: {_message(content)}"
                if status != 429 and status < 500:
                    raise ModelError(
                        f"{self.url}{path} refused: {fault}",
                        REMEDIES.get(status, "change what the server complains about"),
                    )
            if attempt < self.retries and stop.wait(FIRST_WAIT * 2**attempt):
                break
        raise ModelError(
            f"{self.url} failed {attempt + 1} times, at last with {fault}",
            "see that the server runs and is not overloaded, or raise retries",
        )

    def _request(self, path: str, body: dict | None) -> tuple[int, str, bytes]:
        """Status, content type and content."""
        connection = self._connection(*self._address, timeout=self.timeout)
        late = threading.Event()

        # The connection's own timeout is for each read: a server that sends a byte now
        # and then would never meet it.
        def cut_off():
            late.set()
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

        start = time.monotonic()
        try:
            connection.connect()
            line = connection.sock
            left = self.timeout - (time.monotonic() - start)
            deadline = threading.Timer(left, cut_off)
            deadline.daemon = True
            deadline.start()
            try:
                connection.request(
                    "GET" if body is None else "POST",
                    self._path + path,
                    None if body is None else json.dumps(body),
                    self._headers,
                )
                response = connection.getresponse()
                content = response.read()
            finally:
                deadline.cancel()
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError from error
            raise
        finally:
            connection.close()
        if late.is_set():
            raise TimeoutError
        return response.status, response.getheader("Content-Type", ""), content

    def _parsed(self, content: bytes, kind: str):
        try:
            return json.loads(content)
        except ValueError as error:
            raise ModelError(
                f"{self.url} answered no JSON but {kind}: {quoted(content)}",
                "check the url: this may be a proxy, or another program's page",
            ) from error


def _message(content: bytes) -> str:
    """What the server says about an error, in OpenAI's form or any other."""
    try:
        answer = json.loads(content)
        return quoted(answer.get("error", answer)["message"])
    except (ValueError, AttributeError, TypeError, KeyError):
        return quoted(content)


def quoted(answer) -> str:
    """The beginning of an answer, for a message."""
    if isinstance(answer, bytes):
        answer = answer.decode("utf-8", "replace")
    text = str(answer)
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."
