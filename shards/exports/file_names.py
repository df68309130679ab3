"""Names of exported files, made from keys that others chose.

A key is kept where it is a plain path, so that an export looks like the dataset it came from:

    aachen/aachen_000 019     ->  aachen/aachen_000 019
    ../../x                   ->  %2E./%2E./x           (no part begins with a dot, so nothing leads out of the folder)
    /etc/x                    ->  %2F/etc/x             (an empty part)
    a\\0b                      ->  a%00b
    a part of 300 letters     ->  its first 117 bytes, ~, and half of its sha256

Different keys get different names: the signs % and ~ themselves are always escaped. Names have at most 800 bytes, and
their parts 150, so there is room for a suffix and for the folder they are in.
"""

from __future__ import annotations

import hashlib
import unicodedata

_PLAIN = set(" ._-+=@,()")  # beside letters, digits and marks of any script
_MOST_PART, _MOST_NAME, _KEPT = 150, 800, 117  # bytes
_OF_PICTURES = (".jpg", ".jpeg", ".png")
_EMPTY = "%2F"  # never the escape of a "/", as keys are split there


def file_name(key: str) -> str:
    """The relative path of a sample's files, without suffix; see the module."""
    *folders, last = key.split("/")
    parts = [_safe_part(part, is_folder=True) for part in folders] + [_safe_part(last)]
    name = "/".join(parts)
    return name if len(name.encode()) <= _MOST_NAME else _cut(name, key)


def _safe_part(part: str, is_folder: bool = False) -> str:
    if not part:
        return _EMPTY
    text = "".join(char if _is_plain(char) else _escaped(char) for char in part)
    if text[0] in ". ":  # hidden files, and ".."
        text = _escaped(text[0]) + text[1:]
    if text[-1] in ". ":  # Windows drops them
        text = text[:-1] + _escaped(text[-1])
    if is_folder and text.lower().endswith(_OF_PICTURES):  # the folder a.jpg beside the image of the key a
        stem, _, suffix = text.rpartition(".")
        text = f"{stem}%2E{suffix}"
    return text if len(text.encode()) <= _MOST_PART else _cut(text, part)


def _is_plain(char: str) -> bool:
    return char in _PLAIN or unicodedata.category(char)[0] in "LMN"


def _escaped(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))


def _cut(text: str, whole: str) -> str:
    start = text.replace("/", _EMPTY).encode()[:_KEPT].decode(errors="ignore")
    return f"{start}~{hashlib.sha256(whole.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
