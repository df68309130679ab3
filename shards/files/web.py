"""Web servers: that http:// protects nothing is said once, and redirects may not leave https or the host.

The client underneath (obstore) follows redirects without a word. So before it reads an object for the first time in a
process, one byte of it is asked for here by a request that follows none; where that leads may be read only if every
step stays. To a server that answers otherwise the next moment this is no protection, and needs none: bytes are compared
with their checksums. Over https:// the client itself refuses what is not https.

MASKSTREAM_REDIRECTS=any in the environment allows all redirects, such as those of servers that hand over to a CDN.
"""

from __future__ import annotations

import http.client
import logging
import multiprocessing
import os
from urllib.error import HTTPError
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from shards.errors import StorageError
from shards.shown_text import masked

SETTING = "MASKSTREAM_REDIRECTS"
_MOST_STEPS = 5
_log = logging.getLogger(__name__)
_said: set[str] = set()


class _Stay(HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: an answer that redirects is raised as an HTTPError."""


_opener = build_opener(_Stay)


def say_if_unprotected(url: str) -> None:
    """Warn, once in a run, of an http:// URL, or of an endpoint in the environment that is one."""
    endpoints = [f"{name}={value}" for name, value in os.environ.items()
                 if url.startswith("s3:") and name.startswith("AWS_ENDPOINT") and value.startswith("http:")]
    for place in [masked(found) for found in ([url] if url.startswith("http:") else endpoints)]:
        first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
        if first and place not in _said:
            _log.warning("warning: %s is http://: what is sent there, credentials too, and what comes back can be read "
                         "and changed on the way; use https:// outside of a network that you trust", place)
        _said.add(place)


def check_redirects(url: str, timeout: float) -> None:
    """Raise StorageError when reading the URL leads to another host or away from https, OSError without an answer."""
    if os.environ.get(SETTING) == "any":
        return
    place = urlsplit(url)
    place = place._replace(netloc=place.netloc.rpartition("@")[2])  # the client sends no user information either
    for _ in range(_MOST_STEPS):
        location = _redirect_of(urlunsplit(place), timeout)
        if location is None:
            return
        target = urlsplit(urljoin(urlunsplit(place), location))
        if not _stays(place, target):
            raise StorageError(f"{url} redirects to {urlunsplit(target)}, which is another host or not https; name "
                               f"that place itself, or set {SETTING}=any in the environment if you trust it")
        place = target
    raise StorageError(f"{url} redirects more than {_MOST_STEPS} times; name the place itself")


def _stays(place: SplitResult, target: SplitResult) -> bool:
    """On the same host and port, or from its http to its https."""
    if place.scheme == "http" and target.scheme == "https":
        return place.hostname == target.hostname and place.port in (None, 80) and target.port in (None, 443)
    return (place.scheme, place.netloc) == (target.scheme, target.netloc)


def _redirect_of(url: str, timeout: float) -> str | None:
    """Where the server sends us, if it does. What else it says is for the client to read."""
    try:
        with _opener.open(Request(url, headers={"Range": "bytes=0-0"}), timeout=timeout):
            return None
    except HTTPError as answer:
        with answer:
            is_redirect = 300 <= answer.code < 400 and answer.code != http.HTTPStatus.NOT_MODIFIED
            return answer.headers.get("Location") if is_redirect else None
    except http.client.HTTPException as error:
        raise OSError(f"the server's answer is no HTTP: {error!r}") from error
