"""All images come in by one door: PostScript that poses as an image never reaches Ghostscript."""

import io
import os

import pytest
from PIL import EpsImagePlugin, Image

from pvlf_hf import web_demo


def postscript():
    """An EPS file of a small image: Pillow hands it to Ghostscript when it decodes it."""
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), "navy").save(stream, "EPS")
    return stream.getvalue()


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that a stand-in for Ghostscript leaves when it is run."""
    ghostscript, ran = tmp_path / "bin/gs", tmp_path / "ran"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return ran


@pytest.fixture
def eps(tmp_path):
    """PostScript under the names of images."""
    files = [tmp_path / f"photo.{ending}" for ending in ("png", "jpg")]
    for file in files:
        file.write_bytes(postscript())
    return files


def test_pillow_itself_runs_the_stand_in(ran, eps):
    with pytest.raises(OSError), Image.open(eps[0]) as picture:
        picture.load()
    assert ran.exists()


def test_an_upload_of_the_web_demo(ran, eps, tmp_path, monkeypatch):
    for file in eps:
        with pytest.raises(ValueError, match="this file is not a picture that can be read"):
            web_demo.open_upload(file)
    assert not ran.exists(), "Ghostscript was run"
    (tmp_path / "data:image").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "data:image/mine.png")
    monkeypatch.chdir(tmp_path)
    assert web_demo.open_upload("data:image/mine.png").size == (9, 7)  # a name is a file's, never an address
