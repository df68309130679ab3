"""What object storage says when a request fails: whether another try makes sense, and its words in one line."""

from __future__ import annotations

import re

from obstore import exceptions

from shards.shown_text import masked

_REFUSED = re.compile(r"status code: (4\d\d)")
_SAID = re.compile(r"<(?:Code|Message)>([^<]*)")
_PERMANENT_ERRORS = (
    FileNotFoundError, PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError,
    exceptions.InvalidPathError, exceptions.NotSupportedError, exceptions.AlreadyExistsError,
    exceptions.UnknownConfigurationKeyError, exceptions.PreconditionError,
)


def refused_by(error: BaseException) -> str | None:
    """The 4xx status code in the error, if it is of one."""
    found = _REFUSED.search(str(error))
    return found[1] if found else None


def is_transient(error: BaseException) -> bool:
    """Whether another try makes sense: not for an answer that says what is wrong with the request."""
    if isinstance(error, _PERMANENT_ERRORS) or not isinstance(error, exceptions.BaseError | OSError):
        return False
    return refused_by(error) in (None, "408", "429")  # took too long, too many requests


def brief(error: BaseException | None, url: str = "") -> str:
    """One line of an error's text: what clients say without their debug dumps, and the server's code and message; the
    credentials in `url` are masked. In the error itself too, which may be shown as the cause of another."""
    if error is not None:
        error.args = tuple(masked(item, url) if isinstance(item, str) else item for item in error.args)
    text = " ".join(masked(str(error), url).split("Debug source:")[0].split())
    said = ": ".join(_SAID.findall(text))
    text = text.split("<?xml")[0].rstrip(": ")
    return f"{text[:400]}{f' ({said})' if said else ''}"
