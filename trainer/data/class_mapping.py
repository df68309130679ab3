"""From the classes of one set to those of another, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError
from shards.rle import Runs, ignore_value
from shards.sampling import ClassLists
from shards.shown_text import shown
from trainer.data_config import SourceConfig

_MOST_LISTED = 12  # names in an error or a line of the log
_NEARBY = 0.6  # how alike names are to be suggested, as in errors about settings


@dataclass(frozen=True, eq=False)
class ClassMapping:
    """What each class of a source is to the network.

    `targets`, int64 [classes of the source]: class of the network, or -1 where pixels are ignored. Several may have the
    same; then they are one class, with one mask per sample.
    """

    targets: npt.NDArray[np.int64]
    num_targets: int

    def renumbered(self, labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(classes of the network [M], ascending; of each of a sample's labels [N] its index among them, or -1)"""
        targets = self.targets[labels]
        present = np.unique(targets[targets >= 0])
        return present, np.where(targets < 0, -1, np.searchsorted(present, targets))

    def of_segment_map(self, segment_map: npt.NDArray[Any], labels: npt.NDArray[np.int64]
                       ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """A segment map [H, W] with indices into `labels` as one with indices into the classes of the network that
        those become; uint8, or uint16 if these are more than 255."""
        present, index = self.renumbered(labels)
        ignored = ignore_value(present.size)
        table = np.full(np.iinfo(segment_map.dtype).max + 1, ignored, np.uint8 if ignored == 255 else np.uint16)
        table[: labels.size] = np.where(index < 0, ignored, index)
        return table[segment_map], present

    def of_runs(self, runs: Runs, labels: npt.NDArray[np.int64]) -> tuple[Runs, npt.NDArray[np.int64]]:
        """The same for runs, without those that are ignored. Runs of merged classes may touch."""
        present, index = self.renumbered(labels)
        label_index = index[runs.label_index]
        kept = label_index >= 0
        return Runs(runs.start[kept], runs.length[kept], label_index[kept]), present

    def of_counts(self, counts: Sequence[int]) -> npt.NDArray[np.int64]:
        """Counts per class of the source, summed per class of the network."""
        summed = np.zeros(self.num_targets, np.int64)
        kept = self.targets >= 0
        np.add.at(summed, self.targets[kept], np.asarray(counts, np.int64)[kept])
        return summed

    def of_lists(self, lists: ClassLists) -> ClassLists:
        """The network's classes of each sample."""
        targets = self.targets[lists.ids]
        sample = np.repeat(np.arange(len(lists.counts)), lists.counts)
        kept = targets >= 0
        both = np.unique(sample[kept] * self.num_targets + targets[kept])  # once where classes are merged
        counts = np.bincount(both // self.num_targets, minlength=len(lists.counts))
        return ClassLists(counts.astype(lists.counts.dtype), (both % self.num_targets).astype(lists.ids.dtype))

    @property
    def merges(self) -> bool:
        """Whether several classes become one."""
        kept = self.targets[self.targets >= 0]
        return np.unique(kept).size < kept.size


def map_classes(names: Sequence[str], target_names: Sequence[str], config: SourceConfig, where: str,
                target_where: str) -> ClassMapping | None:
    """The mapping of a source's class table, of these names, to the network's; None if no id changes. Names are unique
    in either, as a manifest's are.

    A class goes where `config.classes` says, else to the class of its name, to the letter; one that has neither is
    an error, unless `config.unmatched` is ignore. `where` is the entry of the settings, `target_where` the network's
    table, in errors. Raises ConfigError for names that do not exist, and where no class is left.
    """
    source, number_of = f"{where} ({config.root})", {name: number for number, name in enumerate(target_names)}
    for kind, wanted, existing, owner in (
            ("key", config.classes, names, source),
            ("value", (value for value in config.classes.values() if value is not None), target_names, target_where)):
        if unknown := [name for name in wanted if name not in set(existing)]:
            raise ConfigError(f"{where}.classes: {owner} has no class of this {kind}'s name: "
                              f"{_with_nearest(unknown, existing)}")
    found = [config.classes.get(name, name) for name in names]
    lacking = [name for name, target in zip(names, found, strict=True)
               if target is not None and target not in number_of]
    if lacking and config.unmatched == "error":
        raise ConfigError(f"{len(lacking)} of {len(names)} classes of {source} are not among those of {target_where}: "
                          f"{_with_nearest(lacking, target_names)}. List them in {where}.classes as {{its name: name "
                          f"there}}, or {{its name: null}} to ignore their pixels; {where}.unmatched=ignore does so "
                          "for all")
    targets = np.array([-1 if target is None else number_of.get(target, -1) for target in found], np.int64)
    if (targets < 0).all():
        raise ConfigError(f"no class of {source} is among those of {target_where}, so all of its pixels would be "
                          f"ignored; set {where}.classes")
    return None if np.array_equal(targets, np.arange(len(names))) else ClassMapping(targets, len(target_names))


def described(names: Sequence[str], target_names: Sequence[str], mapping: ClassMapping | None) -> str:
    """What becomes of a source's classes, in one line."""
    if mapping is None:
        return f"{len(names)} classes"
    pairs = [(name, None if target < 0 else target_names[target])
             for name, target in zip(names, mapping.targets.tolist(), strict=True)]
    renamed = [f"{name} → {target}" for name, target in pairs if target not in (None, name)]
    ignored = [name for name, target in pairs if target is None]
    same = len(pairs) - len(renamed) - len(ignored)
    parts = [f"{same} of the same name"] if same else []
    parts += [f"{len(which)} {what} ({_listed(which)})"
              for what, which in (("mapped", renamed), ("ignored", ignored)) if which]
    return shown(f"{len(names)} classes: {', '.join(parts)}")


def _with_nearest(names: Sequence[str], existing: Sequence[str]) -> str:
    near = {name: difflib.get_close_matches(name, existing, n=1, cutoff=_NEARBY) for name in names[:_MOST_LISTED]}
    return shown(_listed([f"'{name}'" + (f" (did you mean '{near[name][0]}'?)" if near.get(name) else "")
                          for name in names]))


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _MOST_LISTED} more" if len(texts) > _MOST_LISTED else ""
    return ", ".join(texts[:_MOST_LISTED]) + more
