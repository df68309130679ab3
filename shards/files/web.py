"""Web servers: warn once about plain http://, and refuse redirects to another host or away from https.

The underlying client (obstore) follows redirects silently. So before an object is first read in a process, one byte of
it is requested here without following redirects, and every redirect on the way is checked. A server that answers
differently the next moment can evade this, but all bytes are compared with their checksums anyway. Over https:// the
client itself refuses plain http.

MASKSTREAM_REDIRECTS=any in the environment allows all redirects, e.g. to a CDN.
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
_MAX_REDIRECTS = 5
_log = logging.getLogger(__name__)
_warned: set[str] = set()


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Returning None makes a redirect raise HTTPError."""


_opener = build_opener(_NoRedirects)


def warn_if_unencrypted(url: str) -> None:
    """Warn, once per run, about an http:// URL or an http:// endpoint in the environment."""
    endpoints = [f"{name}={value}" for name, value in os.environ.items()
                 if url.startswith("s3:") and name.startswith("AWS_ENDPOINT") and value.startswith("http:")]
    for place in [masked(found) for found in ([url] if url.startswith("http:") else endpoints)]:
        first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
        if first and place not in _warned:
            _log.warning("warning: %s is plain http://: requests, including credentials, and responses can be read and "
                         "modified in transit; use https:// unless you trust the network", place)
        _warned.add(place)


def check_redirects(url: str, timeout: float) -> None:
    """Raise StorageError if the URL redirects to another host or away from https, OSError if the server fails."""
    if os.environ.get(SETTING) == "any":
        return
    place = urlsplit(url)
    place = place._replace(netloc=place.netloc.rpartition("@")[2])  # like the client, send no user information
    for _ in range(_MAX_REDIRECTS):
        location = _redirect_of(urlunsplit(place), timeout)
        if location is None:
            return
        target = urlsplit(urljoin(urlunsplit(place), location))
        if not _stays(place, target):
            raise StorageError(f"{url} redirects to {urlunsplit(target)}, which is another host or not https; use that "
                               f"URL directly, or set {SETTING}=any in the environment if you trust it")
        place = target
    raise StorageError(f"{url} redirects more than {_MAX_REDIRECTS} times; use the final URL directly")


def _stays(place: SplitResult, target: SplitResult) -> bool:
    """Whether a redirect keeps scheme, host and port, or upgrades the same host from http to https."""
    if place.scheme == "http" and target.scheme == "https":
        return place.hostname == target.hostname and place.port in (None, 80) and target.port in (None, 443)
    return (place.scheme, place.netloc) == (target.scheme, target.netloc)


def _redirect_of(url: str, timeout: float) -> str | None:
    """The target of the server's redirect, or None; other responses are left to the client."""
    try:
        with _opener.open(Request(url, headers={"Range": "bytes=0-0"}), timeout=timeout):
            return None
    except HTTPError as answer:
        with answer:
            is_redirect = 300 <= answer.code < 400 and answer.code != http.HTTPStatus.NOT_MODIFIED
            return answer.headers.get("Location") if is_redirect else None
    except http.client.HTTPException as error:
        raise OSError(f"the server's response is not valid HTTP: {error!r}") from error
