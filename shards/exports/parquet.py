"""Export to Parquet files that Hugging Face `datasets` loads, with pictures as pictures and classes by name.

    README.md                              which files are which split; `datasets` reads it
    data/SPLIT-00000-of-00003.parquet      columns: key, image, label (a PNG of class ids), classes (ids that occur)

Needs pyarrow, from the extra `hf`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.errors import ConfigError
from shards.exports.export import Progress, samples_of
from shards.exports.pictures import exported_image, label_png, write_new
from shards.files.atomic import naming
from shards.files.storage import Storage
from shards.files.strict_json import to_json
from shards.manifest import Manifest
from shards.rle import ignore_value

_GROUP_BYTES, _GROUP_SAMPLES = 64 << 20, 100  # written at once; held in memory
_FILE_BYTES = 500 << 20


def export_parquet(storage: Storage, manifest: Manifest, splits: list[str], folder: Path, progress: Progress) -> None:
    """Write the splits into an empty folder. Raises as `ShardReader.read`, OSError, and ConfigError when pyarrow is
    missing or two splits would have the same name."""
    needs_pyarrow()
    names = split_names(splits)
    (folder / "data").mkdir()
    for split in splits:
        files = _SplitFiles(folder / "data", names[split], manifest)
        for sample in samples_of(storage, manifest, split, progress):
            image, suffix = exported_image(sample)
            label = label_png(sample.label_map(), manifest.classes, palette=False)
            files.add({"key": sample.key, "image": {"bytes": image, "path": f"image.{suffix}"},
                       "label": {"bytes": label, "path": "label.png"}, "classes": sample.labels.tolist()},
                      len(image) + len(label))
        files.close()
    write_new(folder / "README.md", _readme(manifest, list(names.values())).encode())


def needs_pyarrow() -> None:
    """Raise ConfigError when pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format hf: {error}; it needs: pip install 'maskstream[hf]'") from error


def split_names(splits: list[str]) -> dict[str, str]:
    """Split -> its name for `datasets`, which allows no '-'. Raises ConfigError when two become the same."""
    names = {split: split.replace("-", "_") for split in splits}
    if len(set(names.values())) < len(names):
        raise ConfigError(f"--format hf: the splits {', '.join(sorted(names))} would not differ, as Hugging Face "
                          "allows no '-' in their names; export them one by one, with --split")
    return names


def features_of(manifest: Manifest) -> dict[str, Any]:
    """The columns, in the form in which `datasets` stores them in Parquet files."""
    names = [info.name for info in manifest.classes]
    return {"key": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}, "label": {"_type": "Image"},
            "classes": {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}}


class _SplitFiles:
    """Writes rows to files of about 500 MB, which get their final names when their number is known."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        picture = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        features = to_json({"info": {"features": features_of(manifest)}})
        self._schema = pyarrow.schema({"key": pyarrow.string(), "image": picture, "label": picture,
                                       "classes": pyarrow.list_(pyarrow.int64())}, metadata={"huggingface": features})
        self.folder, self.split = folder, split
        self._done: list[Path] = []
        self._writer: Any = None
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = self._file_bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        self._rows.append(row)
        self._row_bytes += size
        if self._row_bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_SAMPLES:
            self._write()

    def close(self) -> None:
        if self._rows or not self._done:
            self._write()  # a split without samples has one file without rows
        self._end_file()
        for number, path in enumerate(self._done):
            path.rename(self.folder / f"{self.split}-{number:05d}-of-{len(self._done):05d}.parquet")

    def _write(self) -> None:
        if self._writer is None:
            path = self.folder / f"{self.split}-{len(self._done):05d}.tmp"
            self._done.append(path)
            with naming(path):
                self._writer = self._parquet.ParquetWriter(path, self._schema, compression="none",
                                                           write_page_index=True)
        with naming(self._done[-1]):
            self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._file_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0
        if self._file_bytes >= _FILE_BYTES:
            self._end_file()

    def _end_file(self) -> None:
        if self._writer is not None:
            with naming(self._done[-1]):
                self._writer.close()
        self._writer, self._file_bytes = None, 0


def _readme(manifest: Manifest, splits: list[str]) -> str:
    files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in splits)
    return (f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
            f"Semantic segmentation, exported from a MaskStream shard set ({manifest.sha256}).\n\n"
            f"`label` holds class ids, {ignore_value(manifest.num_classes)} where ignored. `classes` lists the classes "
            "that occur in an image; their names are in its feature.\n")
