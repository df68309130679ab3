"""Integrity of weight files: hashes are checked before a file's content is used.

    any file                      FILE.sha256 next to it: hash of all its bytes, in the format of `sha256sum -c`
    our torch files               a zip comment at the end: _BEGIN, sha256 of all bytes before it, _END
    our safetensors files         "sha256" in the metadata: of all bytes, with zeros in place of the hash's own digits
    config.json of an export      "sha256" in it: of the rest in canonical form

The markers are redundant, so that no single damaged byte makes one of our files look like one without a hash. Torch
itself verifies nothing, not even the CRC-32s of its zip; for zips without any of the above they are verified here. Each
file is read once.
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
_CHUNK_BYTES = 4 << 20
_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors library
_CONFIG_KEYS = {"model_type", "format", "layer_norm_eps", "num_attention_heads", "classes", "settings", "backbone",
                "sha256"}
_HASH = re.compile(rb"\b[0-9a-fA-F]{64}\b")


class SealedFile:
    """A file object for `torch.save`; `seal` appends the hash."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self._last = b""  # held back: a zip without a comment ends with the comment's length, two zero bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        tail = self._last + bytes(view[-2:])
        self._put(tail[:-2] if len(view) < 2 else self._last)
        self._put(view[:-2])
        self._last = tail[-2:]
        return len(view)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> str:
        """Append the hash; return the sha256 of the whole file."""
        assert self._last == b"\0\0", "torch.save writes a zip without a comment"
        self._put(_SEAL_BYTES.to_bytes(2, "little"))
        self._put(_BEGIN + self.sha256.hexdigest().encode() + _END)
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.sha256.hexdigest()

    def _put(self, data: Any) -> None:
        self.sha256.update(data)
        self.file.write(data)


def safetensors_metadata(version: str) -> dict[str, str]:
    """Metadata for a safetensors file to be sealed by `seal_safetensors`."""
    return {"format": "pt", "maskstream": version, "sha256": _UNSEALED}


def seal_safetensors(path: Path) -> None:
    """Write the file's hash into the placeholder in its metadata."""
    with path.open("r+b") as file:
        place = _header(file).index(_UNSEALED.encode())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(place)
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


def write_hash_beside(path: Path) -> None:
    """Write NAME.sha256 next to a file, for `sha256sum -c`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path.with_name(path.name + HASH_SUFFIX).write_bytes(hash_line(digest, path.name))


def hash_line(digest: str, name: str) -> bytes:
    """The content of NAME.sha256."""
    return f"{digest}  {name}\n".encode()


def check_file(path: Path, shown: str | None = None) -> None:
    """Raise ConfigError, naming the file (as `shown`), unless it matches the hashes stored next to it or in it."""
    shown = shown or str(path)
    expected = _hash_beside(path, shown)
    while expected is not None:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual == expected:
            return
        before, expected = expected, _hash_beside(path, shown)
        if expected == before:  # otherwise a training run has just replaced the file: check again
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
    """The content of an export's config.json, with its hash added."""
    return {**content, "sha256": hash_of(content)}


def check_config(content: dict[str, Any], path: Path) -> None:
    """Raise ConfigError if an export's config.json does not match its hash, if it has one, or has unknown keys, as one
    of these could be the hash's own key, damaged."""
    if unknown := sorted(content.keys() - _CONFIG_KEYS):
        raise ConfigError(f"{path} has the unknown key {unknown[0]!r}, so it is damaged or was edited; legal: "
                          f"{', '.join(sorted(_CONFIG_KEYS))}")
    expected = content.get("sha256")
    if expected is not None and expected != hash_of({key: content[key] for key in content if key != "sha256"}):
        raise ConfigError(f"{path} does not match its own sha256, so it is damaged or was edited; export again, or "
                          "remove \"sha256\" from it if you edited it yourself")


def _hash_beside(path: Path, shown: str) -> str | None:
    beside = path.with_name(path.name + HASH_SUFFIX)
    try:
        match = _HASH.search(beside.read_bytes()[:_CHUNK_BYTES])
    except FileNotFoundError:
        return None
    if match is None:
        raise ConfigError(f"{shown}{HASH_SUFFIX} contains no sha256 of 64 hexadecimal digits; remove it, or recreate "
                          f"it with `sha256sum {path.name} > {beside.name}` if you trust the file")
    return match[0].decode().lower()


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
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, RuntimeError) as error:
        raise _damaged(shown, str(error)) from error
    if damaged is not None:
        raise _damaged(shown, f"the CRC-32 of {damaged!r} in it differs")


def _check_safetensors(file: BinaryIO, shown: str) -> None:
    header = _header(file)
    try:
        metadata = json.loads(header[8:]).get("__metadata__") or {}
        sealed, digest = "maskstream" in metadata or "sha256" in metadata, metadata.get("sha256")
    except (ValueError, RecursionError, AttributeError, TypeError):
        return  # malformed: the error is raised when it is parsed
    if not sealed:
        return
    start = header.find(str(digest).encode())
    if "maskstream" not in metadata or not isinstance(digest, str) or len(digest) != _DIGITS or start < 0:
        raise _damaged(shown, "the sha256 in its metadata is damaged")
    sha256 = hashlib.sha256(header[:start] + _UNSEALED.encode() + header[start + _DIGITS :])
    while chunk := file.read(_CHUNK_BYTES):
        sha256.update(chunk)
    if sha256.hexdigest() != digest:
        raise _damaged(shown, "its sha256 is not the one in its metadata")


def _header(file: BinaryIO) -> bytes:
    """The length and JSON at the start of a safetensors file; the file position is then after them."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))


def _digest_until(file: BinaryIO, end: int) -> str:
    sha256 = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(min(_CHUNK_BYTES, end - file.tell())):
        sha256.update(chunk)
    return sha256.hexdigest()


def _damaged(shown: str, why: str) -> ConfigError:
    return ConfigError(f"checkpoint {shown} cannot be read, it is damaged: {why}; use another copy of it")
