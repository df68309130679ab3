"""What of a text may be stored, shown or raised: no credentials of URLs, no characters that steer a terminal or a page.

    https://user:password@host/path?sig=…     ->  https://***@host/path?***
    a name with ESC in it                     ->  a name with \\\\x1b in it

Every error of ours goes through here, every stored configuration, and every text that others wrote and a terminal or a
report is to show. It is the one place that decides.
"""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>]+)")
_WHOLE_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(.+)", re.DOTALL)
_AFTER_URL = "),.:;]}"  # belongs to the sentence around it
# C0 and C1 controls, surrogates, line and paragraph separators, and what turns the direction of writing
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u2029\u202a-\u202e\u2066-\u2069]")
_SHORT_SECRET = 4  # characters; shorter ones would be found in words


def masked(text: str, url: str = "") -> str:
    """The text without the user information, query and fragment of URLs in it, nor those of `url` by themselves, as
    servers repeat them."""
    text = _URL.sub(lambda found: found[1] + _without_credentials(found[2]), text)
    for secret in _secrets_of(url):
        text = text.replace(secret, MASK)
    return text


def masked_value(value: Any) -> Any:
    """A setting's value as it may be stored: `masked`, at any depth; of a string that is a URL, to its very end."""
    if isinstance(value, str):
        found = _WHOLE_URL.fullmatch(value)
        return found[1] + _without_credentials(found[2], whole=True) if found else masked(value)
    if isinstance(value, dict):
        return {key: masked_value(item) for key, item in value.items()}
    return type(value)(map(masked_value, value)) if isinstance(value, list | tuple) else value


def is_masked(url: str) -> bool:
    """Whether credentials were taken out of the URL, so that it cannot be used any more."""
    return f"://{MASK}@" in url or f"?{MASK}" in url or f"#{MASK}" in url


def shown(text: object) -> str:
    """The text in one line for a terminal or a page: `masked`, and control characters escaped."""
    return _CONTROL.sub(_escaped, masked(str(text)))


def shown_lines(text: str) -> str:
    """`shown` for a text that may have several lines."""
    return "\n".join(map(shown, text.split("\n")))


def has_control_characters(text: str) -> bool:
    """Whether `shown` would escape something."""
    return _CONTROL.search(text) is not None


def _secrets_of(url: str) -> list[str]:
    """The credentials in a URL, longest first."""
    head, _, query = url.partition("?")
    user = head.partition("://")[2].partition("/")[0].rpartition("@")[0]
    parts = [query, *(part.partition("=")[2] for part in query.split("&")), user, user.partition(":")[2]]
    return sorted({part for part in parts if len(part) >= _SHORT_SECRET}, key=len, reverse=True)


def _without_credentials(rest: str, whole: bool = False) -> str:
    """Of a URL without its scheme; `whole`: nothing of a sentence comes after it."""
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
