"""Settings of one of several training sets."""

from __future__ import annotations

from dataclasses import dataclass

from shards.cli.settings import place, setting


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set to train on, beside others."""

    root: str | None = place("folder or URL of the shard set; null: data.root", may_be_empty=False)
    split: str | None = setting(None, "split of it to train on; null: data.train_split", may_be_empty=False)
    weight: float = setting(1.0, "weights of all sources are in the proportion of their training samples", minimum=1e-6,
                            maximum=1e6)
    classes: dict[str, str | None] = setting({}, "its class: class of data.root that its pixels are given, or null: "
                                             "they are ignored. Classes of the same name need no entry")
    unmatched: str = setting("error", "classes of it that data.root lacks and that classes does not list: error; or "
                             "ignore their pixels", choices=("error", "ignore"))
