"""Digests by which files, rows and models are recognised. All hashing of the package is in this module.

Digests are kept on disk (galleries, feature caches, results) and seed the order and the captions of EmojiCIR, so that
none of these algorithms may change.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def content_digest(parts: Iterable[bytes]) -> str:
    """Return 32 hexadecimal digits (BLAKE2b) of parts that are read as one content."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return 32 hexadecimal digits of the names and contents of a folder's files; hidden ones do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {file: file.relative_to(folder) for file in files}
    parts: list[str] = []
    for file in files:
        if not any(part.startswith(".") for part in names[file].parts):
            with file.open("rb") as stream:
                parts += [names[file].as_posix(), content_digest(iter(lambda: stream.read(2**20), b""))]
    return sequence_digest(*parts)


def sequence_digest(*parts: bytes | str) -> str:
    """Return 32 hexadecimal digits (BLAKE2b) of a sequence: the same bytes divided differently differ."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        hasher.update(len(raw).to_bytes(8, "big") + raw)
    return hasher.hexdigest()


def annotations_digest(*files: Path) -> str:
    """Return the revision of annotation files: `"sha256:"` and 12 hexadecimal digits of their joint content."""
    return "sha256:" + hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def sha1_digest(content: bytes) -> str:
    """Return the 40 hexadecimal digits of SHA-1, which the published EmojiCIR is defined by."""
    return hashlib.sha1(content).hexdigest()


def id_number(name: str) -> int:
    """Return the same int64 for the same id in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


__all__ = ["annotations_digest", "content_digest", "folder_digest", "id_number", "sequence_digest", "sha1_digest"]
