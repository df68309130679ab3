"""Check that weights fit a model. Errors name every mismatch; keys are skipped only on explicit request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from shards.errors import ConfigError

_LISTED_KEYS = 5  # per group of an error message


def check_fit(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], *, what: str, advice: str, ignore: Sequence[str] = ()
) -> list[str]:
    """Compare keys and shapes; raise ConfigError naming `what` and the keys missing, unexpected or of another shape.

    Keys that match an `ignore` pattern (fnmatch, whole key) are not compared. Returns those of them in `own`, which
    must not be loaded. A pattern that matches no key at all is a ConfigError too.
    """
    for pattern in ignore:
        if not matching(own.keys() | found.keys(), [pattern]):
            raise ConfigError(f"load.ignore pattern {pattern!r} matches no key, neither of the model nor of {what}; "
                              f"keys look like {min(own)}")
    ignored = matching(own.keys() | found.keys(), ignore)
    misshaped = [f"{key} {tuple(found[key].shape)} instead of {tuple(own[key].shape)}"
                 for key in (own.keys() & found.keys()) - ignored if own[key].shape != found[key].shape]
    problems = grouped(missing=own.keys() - found.keys() - ignored, unexpected=found.keys() - own.keys() - ignored,
                       misshaped=misshaped)
    if problems:
        raise ConfigError(f"{what} do not fit this model; {problems}. {advice}")
    return sorted(ignored & own.keys())


def grouped(*, missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]) -> str:
    """The mismatched keys as text, in three groups; empty when there are none."""
    groups = {"missing": listed(missing), "unexpected": listed(unexpected), "of another shape": listed(misshaped)}
    return "; ".join(f"{name}: {keys}" for name, keys in groups.items() if keys)


def matching(keys: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The keys that match at least one fnmatch pattern."""
    return {key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)}


def listed(keys: Iterable[str]) -> str:
    """The first few keys, sorted, and how many more there are."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - _LISTED_KEYS} more" if len(ordered) > _LISTED_KEYS else ""
    return ", ".join(ordered[:_LISTED_KEYS]) + more
