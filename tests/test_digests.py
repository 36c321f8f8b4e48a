"""Digests are stored on disk and in published data: none may change, and one module makes them all."""

import ast
from pathlib import Path

import pvlf_hf
from pvlf_hf.digests import annotations_digest, content_digest, id_number, sequence_digest, sha1_digest

PACKAGE = Path(pvlf_hf.__file__).parent


def test_digests_equal_recorded_values(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    assert annotations_digest(tmp_path / "a", tmp_path / "b") == "sha256:ba7816bf8f01"
    assert sha1_digest(b"abc") == "a9993e364706816aba3e25717850c26c9cd0d89d"
    assert content_digest([b"ab", b"c"]) == "cf4ab791c62b8d2b2109c90275287816"
    assert sequence_digest("None", b"abc") == "089a083d0c56eb0bf2be14730ab59e92"
    assert id_number("red.png") == 2062745506515602827


def test_sequence_digest_differs_from_joined_content():
    assert sequence_digest("ab", "c") != sequence_digest("a", "bc")
    assert content_digest([b"ab", b"c"]) == content_digest([b"abc"])
    assert sequence_digest("é") == sequence_digest("é".encode())


def test_all_hashing_is_in_one_module():
    users = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "models":  # is saved with checkpoints, so it imports nothing from the package
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, ast.Import | ast.ImportFrom) and "hashlib" in names:
                users.add(path.relative_to(PACKAGE).as_posix())
    assert users == {"digests.py"}
