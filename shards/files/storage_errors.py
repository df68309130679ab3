"""Errors of object storage: decide whether to retry, and condense them to one line."""

from __future__ import annotations

import re

from obstore import exceptions

from shards.shown_text import masked

_CLIENT_ERROR = re.compile(r"status code: (4\d\d)")
_SERVER_MESSAGE = re.compile(r"<(?:Code|Message)>([^<]*)")
_PERMANENT_ERRORS = (
    FileNotFoundError, PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError,
    exceptions.InvalidPathError, exceptions.NotSupportedError, exceptions.AlreadyExistsError,
    exceptions.UnknownConfigurationKeyError, exceptions.PreconditionError,
)


def refused_by(error: BaseException) -> str | None:
    """The HTTP 4xx status code behind an error, if there is one."""
    found = _CLIENT_ERROR.search(str(error))
    return found[1] if found else None


def is_transient(error: BaseException) -> bool:
    """Whether to retry: not if the response says that the request itself is wrong."""
    if isinstance(error, _PERMANENT_ERRORS) or not isinstance(error, exceptions.BaseError | OSError):
        return False
    return refused_by(error) in (None, "408", "429")  # 408: request timeout, 429: too many requests


def brief(error: BaseException | None, url: str = "") -> str:
    """An error in one line: the client's message without its debug dump, and the server's code and message, with the
    credentials of `url` masked. Masks the error itself too, as it may be shown as the cause of another."""
    if error is not None:
        error.args = tuple(masked(item, url) if isinstance(item, str) else item for item in error.args)
    text = " ".join(masked(str(error), url).split("Debug source:")[0].split())
    said = ": ".join(_SERVER_MESSAGE.findall(text))
    text = text.split("<?xml")[0].rstrip(": ")
    return f"{text[:400]}{f' ({said})' if said else ''}"
