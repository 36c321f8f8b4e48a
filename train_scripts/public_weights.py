"""Recipes that fill the columns of 2026 with public weights: commands, and the GPU hours to expect.

    python train_scripts/public_weights.py                    # all commands, and the hours
    python train_scripts/public_weights.py --rows "CLIP-L, product" SEARLE --data_root data

Nothing is trained: each row is evaluated under all protocols by one command, and `pvlf-hf compare` makes the table.
Files that authors released are converted first. No figure is given here, because this project has measured none of
these rows yet. Hours are those of encoding every image and query once, estimated as `gpu_hours.py` does; reading the
images must keep up with them.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from gpu_hours import ASSUMPTIONS, GPU, PEAK_FLOPS, UTILISATION, encoding_flops, model_config

from pvlf_hf.commands.train import ModelArguments
from pvlf_hf.data import circo, cirr, edir, fashioniq, genecis, icir, pinpoint

CLIP_L, BLIP_B = "openai/clip-vit-large-patch14", "Salesforce/blip-itm-base-coco"

# Queries and images of each protocol; None where the number is not published.
SIZES: dict[str, tuple[int, int | None]] = {
    "cirr-val": cirr.EXPECTED_COUNTS["val"],
    "fashioniq": tuple(map(sum, zip(*fashioniq.EXPECTED_COUNTS["val"].values(), strict=True))),  # type: ignore[dict-item]
    "circo-val": (circo.EXPECTED_COUNTS["val"], circo.EXPECTED_IMAGES),
    "icir": (icir.EXPECTED_COUNTS["queries"], 750_000),  # about as many
    "pinpoint": (pinpoint.EXPECTED_COUNTS["pinpoint_licensed.parquet"], None),
    "genecis": (sum(genecis.EXPECTED_COUNTS.values()), None),
    "edir": (edir.EXPECTED_COUNTS["queries"], edir.EXPECTED_COUNTS["gallery images"]),
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        encoder: dual encoder that embeds the images, of which hours are estimated.
        composition: how the plain encoder composes queries; None for a method with weights of its own.
        convert: arguments of `pvlf-hf convert`, after which the model is in `{folder}`.
    """

    encoder: str
    composition: str | None = None
    convert: str | None = None


ROWS = {
    **{f"CLIP-L, {name}": Row(CLIP_L, name) for name in ("sum", "slerp", "product")},
    **{f"BLIP-B, {name}": Row(BLIP_B, name) for name in ("slerp", "product")},
    "Pic2Word": Row(CLIP_L, convert="inversion pic2word.pt --method pic2word"),
    "SEARLE": Row(CLIP_L, convert="inversion searle.pt --method searle"),
    "LinCIR": Row(CLIP_L, convert="inversion lincir_large.pt --method lincir"),
    "Context-I2W": Row(CLIP_L, convert="inversion context_i2w.pt --method context_i2w"),
    "TransAgg": Row(BLIP_B, convert="transagg model.pt --tokenizer bert-base-uncased"),
    "CASE (CoVR)": Row(BLIP_B, convert="case ckpt_5.ckpt --tokenizer bert-base-uncased"),
}


def home_of(name: str, folder: str = "outputs/public") -> str:
    """Return the folder of a row."""
    return f"{folder}/{'-'.join(re.findall('[a-z0-9]+', name.casefold()))}"


def commands(name: str, data_root: str = "data", folder: str = "outputs/public") -> list[str]:
    """Return the commands of a row: the conversion, if there is one, and the evaluation under all protocols."""
    row, home = ROWS[name], home_of(name, folder)
    model, lines = row.encoder, []
    if row.convert is not None:
        model = f"{home}/model"
        lines.append(f"pvlf-hf convert {row.convert} --output-dir {model}")
    composed = f" --composition {row.composition}" if row.composition else ""
    protocols = " ".join(SIZES)
    rest = f"--protocols {protocols} --data_root {data_root} --dtype bfloat16 --output_dir {home}/evaluation"
    return [*lines, f"pvlf-hf evaluate --model {model}{composed} {rest}"]


def hours(encoder: str) -> dict[str, float | None]:
    """Estimate the GPU hours that encoding takes under each protocol; None where a number of images is not known."""
    query, image = encoding_flops(model_config(ModelArguments(model=encoder)).to_json_string())
    return {
        protocol: None if images is None else (queries * query + images * image) / (PEAK_FLOPS * UTILISATION) / 3600
        for protocol, (queries, images) in SIZES.items()
    }


def rendered(names: list[str], data_root: str) -> str:
    """Render commands and hours in Markdown."""
    parts = [f"```bash\n{chr(10).join([f'# {name}', *commands(name, data_root)])}\n```" for name in names]
    files = [f"'{name}={home_of(name)}/evaluation/results.json'" for name in names]
    compare = " \\\n    ".join(["pvlf-hf compare", *files, "--output-dir outputs/public"])
    parts.append(f"```bash\n{compare}\n```")
    lines = [["encoder", *SIZES], ["---"] * (len(SIZES) + 1)]
    for encoder in dict.fromkeys(ROWS[name].encoder for name in names):
        lines.append([encoder, *("-" if h is None else f"{h:.3f}" for h in hours(encoder).values())])
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append(f"Hours on {GPU}, for images and queries of one row; -: the number of images is not published.")
    parts.append(ASSUMPTIONS.partition(" Assumed:")[2].strip())
    return "\n\n".join(parts)


def main() -> None:
    """Print the recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows to print")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of the data sets")
    args = parser.parse_args()
    print(rendered(args.rows, str(args.data_root)))


if __name__ == "__main__":
    main()
