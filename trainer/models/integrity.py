"""Is a weight file what was written? Its hashes are compared before anything in it is believed.

    FILE.sha256 beside it     of all its bytes, as `sha256sum -c` reads it; whoever wrote it
    a torch file of ours      a zip comment, the last bytes: _BEGIN, sha256 of all bytes before, _END
    a safetensors file of ours    "sha256" in its metadata: of all its bytes, the hash's own digits taken for zeros
    config.json of an export      "sha256" in it: of the rest in canonical form

The marks come twice, so that no single damaged byte makes a file of ours look like one without a hash. Torch itself
compares nothing, not even the CRC-32 of its zip; of zips without any of the above that is done here. Each file is read
once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import ConfigError
from shards.manifest import hash_of

HASH_SUFFIX = ".sha256"
_BEGIN, _END = b"MaskStream sha256 ", b" MaskStream\n"
_DIGITS = 64
_SEAL_BYTES = len(_BEGIN) + _DIGITS + len(_END)
_UNSEALED = "0" * _DIGITS
_PIECE = 4 << 20
_LARGEST_HEADER = 100 << 20  # of a safetensors file, as its own reader says
_CONFIG_KEYS = {"model_type", "format", "layer_norm_eps", "classes", "settings", "sha256"}
_HASH = re.compile(rb"\b[0-9a-fA-F]{64}\b")


class SealedFile:
    """A file that `torch.save` writes to; `seal` ends it with its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self._last = b""  # a zip without a comment ends in the comment's length: two zero bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        kept = self._last + bytes(view[-2:])
        self._put(kept[:-2] if len(view) < 2 else self._last)
        self._put(view[:-2])
        self._last = kept[-2:]
        return len(view)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> str:
        """Write the hash, and return that of the whole file."""
        assert self._last == b"\0\0", "torch.save ends in a zip without a comment"
        self._put(_SEAL_BYTES.to_bytes(2, "little"))
        self._put(_BEGIN + self.sha256.hexdigest().encode() + _END)
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.sha256.hexdigest()

    def _put(self, data: Any) -> None:
        self.sha256.update(data)
        self.file.write(data)


def safetensors_metadata(version: str) -> dict[str, str]:
    """The metadata of a safetensors file that is to be sealed by `seal_safetensors`."""
    return {"format": "pt", "maskstream": version, "sha256": _UNSEALED}


def seal_safetensors(path: Path) -> None:
    """Put the file's hash where its metadata keep the place for it."""
    with path.open("r+b") as file:
        place = _header(file).index(_UNSEALED.encode())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(place)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def write_hash_beside(path: Path) -> None:
    """`sha256sum` of a file, for `sha256sum -c`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path.with_name(path.name + HASH_SUFFIX).write_bytes(hash_line(digest, path.name))


def hash_line(digest: str, name: str) -> bytes:
    """The content of NAME.sha256."""
    return f"{digest}  {name}\n".encode()


def check_file(path: Path, shown: str | None = None) -> None:
    """Raise ConfigError, naming the file (as `shown`), unless its bytes are those of the hash beside or inside it."""
    shown = shown or str(path)
    expected = _hash_beside(path, shown)
    while expected is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == expected:
            return
        before, expected = expected, _hash_beside(path, shown)
        if expected == before:  # or a training run has just put a newer file here
            raise _damaged(shown, f"its sha256 is not the one in {path.name}{HASH_SUFFIX}")
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            _check_safetensors(file, shown)
        elif zipfile.is_zipfile(file):
            _check_zip(file, shown)


def check_folder(folder: Path) -> None:
    """`check_file` for each safetensors file of a model directory."""
    for path in sorted(folder.glob("*.safetensors")):
        check_file(path)


def sealed_config(content: dict[str, Any]) -> dict[str, Any]:
    """The content of an export's config.json with its own hash."""
    return {**content, "sha256": hash_of(content)}


def check_config(content: dict[str, Any], path: Path) -> None:
    """Raise ConfigError unless an export's config.json has the hash in it, if one is; and for unknown keys, as one may
    be the hash's, damaged."""
    if unknown := sorted(content.keys() - _CONFIG_KEYS):
        raise ConfigError(f"{path} has the unknown key {unknown[0]!r}, it is damaged or edited; legal: "
                          f"{', '.join(sorted(_CONFIG_KEYS))}")
    expected = content.get("sha256")
    if expected is not None and expected != hash_of({key: content[key] for key in content if key != "sha256"}):
        raise ConfigError(f"{path} does not match its own sha256, it is damaged or edited; export again, or remove "
                          "\"sha256\" from it if the change is yours")


def _hash_beside(path: Path, shown: str) -> str | None:
    beside = path.with_name(path.name + HASH_SUFFIX)
    try:
        found = _HASH.search(beside.read_bytes()[:_PIECE])
    except FileNotFoundError:
        return None
    if found is None:
        raise ConfigError(f"{shown}{HASH_SUFFIX} holds no sha256 of 64 hexadecimal digits; remove it, or write it anew "
                          f"by `sha256sum {path.name} > {beside.name}` if you trust the file")
    return found[0].decode().lower()


def _check_zip(file: BinaryIO, shown: str) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL_BYTES))
    seal = file.read()
    if seal.startswith(_BEGIN) or seal.endswith(_END):
        digest = _digest_until(file, size - _SEAL_BYTES)
        if seal != _BEGIN + digest.encode() + _END:
            raise _damaged(shown, "its sha256 is not the one at its end")
        return
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, RuntimeError) as error:
        raise _damaged(shown, str(error)) from error
    if wrong is not None:
        raise _damaged(shown, f"the CRC-32 of {wrong!r} in it differs")


def _check_safetensors(file: BinaryIO, shown: str) -> None:
    header = _header(file)
    try:
        metadata = json.loads(header[8:]).get("__metadata__") or {}
        sealed, digest = "maskstream" in metadata or "sha256" in metadata, metadata.get("sha256")
    except (ValueError, RecursionError, AttributeError, TypeError):
        return  # whoever parses it says what is wrong with it
    if not sealed:
        return
    place = header.find(str(digest).encode())
    if "maskstream" not in metadata or not isinstance(digest, str) or len(digest) != _DIGITS or place < 0:
        raise _damaged(shown, "the sha256 in its metadata is damaged")
    sha256 = hashlib.sha256(header[:place] + _UNSEALED.encode() + header[place + _DIGITS :])
    while piece := file.read(_PIECE):
        sha256.update(piece)
    if sha256.hexdigest() != digest:
        raise _damaged(shown, "its sha256 is not the one in its metadata")


def _header(file: BinaryIO) -> bytes:
    """The length and JSON that a safetensors file begins with; the file stands behind them then."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _LARGEST_HEADER))


def _digest_until(file: BinaryIO, end: int) -> str:
    sha256 = hashlib.sha256()
    file.seek(0)
    while piece := file.read(min(_PIECE, end - file.tell())):
        sha256.update(piece)
    return sha256.hexdigest()


def _damaged(shown: str, why: str) -> ConfigError:
    return ConfigError(f"checkpoint {shown} cannot be read, it is damaged: {why}; use another copy of it")
