"""Make text safe to store and display: mask credentials in URLs, escape control characters.

    https://user:password@host/path?sig=…     ->  https://***@host/path?***
    a name with ESC in it                     ->  a name with \\\\x1b in it

All our errors, all stored configurations, and all untrusted text shown in a terminal or report pass through here.
"""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>]+)")
_WHOLE_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(.+)", re.DOTALL)
_AFTER_URL = "),.:;]}"  # punctuation of the surrounding sentence
# C0 and C1 controls, surrogates, line and paragraph separators, bidirectional overrides
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u2029\u202a-\u202e\u2066-\u2069]")
_SHORT_SECRET = 4  # characters; shorter secrets would match parts of words


def masked(text: str, url: str = "") -> str:
    """Mask user information, query and fragment of all URLs in a text, and credentials of `url` wherever they occur, as
    servers may echo them."""
    text = _URL.sub(lambda found: found[1] + _without_credentials(found[2]), text)
    for secret in _secrets_of(url):
        text = text.replace(secret, MASK)
    return text


def masked_value(value: Any) -> Any:
    """A setting's value, safe to store: `masked` at any depth; a string that is a URL is masked to its very end."""
    if isinstance(value, str):
        found = _WHOLE_URL.fullmatch(value)
        return found[1] + _without_credentials(found[2], whole=True) if found else masked(value)
    if isinstance(value, dict):
        return {key: masked_value(item) for key, item in value.items()}
    return type(value)(map(masked_value, value)) if isinstance(value, list | tuple) else value


def is_masked(url: str) -> bool:
    """Whether the URL's credentials were masked, which makes it unusable."""
    return f"://{MASK}@" in url or f"?{MASK}" in url or f"#{MASK}" in url


def shown(text: object) -> str:
    """The text as one safe line for a terminal or report: `masked`, with control characters escaped."""
    return _CONTROL.sub(_escaped, masked(str(text)))


def shown_lines(text: str) -> str:
    """`shown` for text of several lines."""
    return "\n".join(map(shown, text.split("\n")))


def has_control_characters(text: str) -> bool:
    """Whether `shown` would escape any character."""
    return _CONTROL.search(text) is not None


def _secrets_of(url: str) -> list[str]:
    """The credentials in a URL, longest first."""
    head, _, query = url.partition("?")
    user = head.partition("://")[2].partition("/")[0].rpartition("@")[0]
    parts = [query, *(part.partition("=")[2] for part in query.split("&")), user, user.partition(":")[2]]
    return sorted({part for part in parts if len(part) >= _SHORT_SECRET}, key=len, reverse=True)


def _without_credentials(rest: str, whole: bool = False) -> str:
    """Mask a URL, given without its scheme; `whole`: no punctuation of a sentence follows it."""
    end = len(rest) if whole else len(rest.rstrip(_AFTER_URL))
    url, after = rest[:end], rest[end:]
    authority = re.match(r"[^/?#]*", url)
    assert authority is not None
    user, at, host = authority[0].rpartition("@")
    path = url[authority.end() :]
    cut = re.search(r"[?#]", path)
    if cut is not None:
        path = path[: cut.end()] + (MASK if len(path) > cut.end() else "")
    return (f"{MASK}{at}" if user else at) + host + path + after


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
