"""Runs `pvlf-hf convert`: checkpoints of other code bases."""

from pathlib import Path

import typer

from ..checkpoints.case_weights import convert_case
from ..checkpoints.compodiff_weights import convert_compodiff
from ..checkpoints.convert import convert_salesforce_blip, convert_transagg
from ..checkpoints.inversion_weights import convert_inversion

DUAL_ENCODER = [
    ("model", "from pvlf_hf import PVLFModel", "PVLFModel.from_vl_pretrained"),
    ("processor", "from pvlf_hf import PVLFProcessor", "PVLFProcessor.from_vl_pretrained"),
]
COMPOSED_MODEL = [
    ("model", "import pvlf_hf; from transformers import AutoModel", "AutoModel.from_pretrained"),
    ("processor", "from transformers import AutoProcessor", "AutoProcessor.from_pretrained"),
]
"""Imports and loaders of a converted checkpoint."""


def blip(
    checkpoint: Path,
    output_dir: Path,
    tokenizer: str | None,
    image_size: int | None,
    vision_heads: int | None,
    text_heads: int | None,
) -> None:
    """Convert BLIP as Salesforce released it, and print what was written."""
    convert_salesforce_blip(checkpoint, output_dir, tokenizer, image_size, vision_heads, text_heads)
    describe(DUAL_ENCODER, output_dir, bool(tokenizer))


def transagg(
    checkpoint: Path, output_dir: Path, tokenizer: str | None, vision_heads: int | None, text_heads: int | None
) -> None:
    """Convert TransAgg, and print what was written."""
    convert_transagg(checkpoint, output_dir, tokenizer, vision_heads, text_heads)
    describe(COMPOSED_MODEL, output_dir, bool(tokenizer))


def case(
    checkpoint: Path, output_dir: Path, tokenizer: str | None, vision_heads: int | None, text_heads: int | None
) -> None:
    """Convert CoVR's BLIP, and print what was written."""
    convert_case(checkpoint, output_dir, tokenizer, vision_heads, text_heads)
    describe(COMPOSED_MODEL, output_dir, bool(tokenizer))


def inversion(checkpoint: Path, output_dir: Path, method: str, backbone: str, extractor_heads: int | None) -> None:
    """Convert a mapping network of textual inversion, and print what was written."""
    convert_inversion(checkpoint, method, backbone, output_dir, extractor_heads)
    describe(COMPOSED_MODEL, output_dir, with_processor=True)


def compodiff(checkpoint: Path, output_dir: Path, image_encoder: str, text_encoder: str) -> None:
    """Convert CompoDiff's denoiser, and print what was written."""
    convert_compodiff(checkpoint, image_encoder, text_encoder, output_dir)
    describe(COMPOSED_MODEL, output_dir, with_processor=True)


def describe(loading: list[tuple[str, str, str]], folder: Path, with_processor: bool) -> None:
    """Print what was written and how to load it."""
    typer.echo(f"{folder} holds:")
    for path in sorted(folder.iterdir()):
        typer.echo(f"  {path.name:32} {path.stat().st_size:>13,} bytes")
    typer.echo("\nLoad it with:")
    for name, imported, loader in loading:
        if name == "model" or with_processor:
            typer.echo(f'  {imported}\n  {name} = {loader}("{folder}")')
    if not with_processor:
        typer.echo("It has no tokenizer: pass --tokenizer to have the processor too.")
