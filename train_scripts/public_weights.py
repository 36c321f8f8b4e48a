"""Recipes that fill the columns of 2026: commands for public weights and PVLF, and the GPU hours to expect.

    python train_scripts/public_weights.py                    # all commands, and the hours
    python train_scripts/public_weights.py --rows "CLIP-L, product" SEARLE --data_root data

Each row is evaluated under all protocols by one command, and `pvlf-hf compare` makes the table. Files that authors
released are converted first; PVLF has no public weights and is trained first, by the paper's recipe. No result is
given here, because this project has measured none of these rows. All hours are estimates, made of counts and
published figures as the text under the table says; none was measured.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_hours import (
    CAPTION_TOKENS,
    DUAL_ENCODERS,
    GPU,
    PEAK_FLOPS,
    UTILISATION,
    encoding_flops,
    flops_of_layers,
    gpu_hours,
    model_config,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPTextModel, CLIPTextModelWithProjection

from pvlf_hf import CompoDiffConfig, CompoDiffModel, InversionConfig
from pvlf_hf.commands.train import ModelArguments, parse_arguments
from pvlf_hf.data import circled, circo, cirr, edir, fashioniq, genecis, icir, pinpoint
from pvlf_hf.data.protocols import PROTOCOLS

CLIP_L, BLIP_B = "openai/clip-vit-large-patch14", "Salesforce/blip-itm-base-coco"

RECIPES = Path(__file__).resolve().parent / "configs" / "paper"

FASHION_IQ = tuple(map(sum, zip(*fashioniq.EXPECTED_COUNTS["val"].values(), strict=True)))


@dataclass(frozen=True)
class Column:
    """A data set of the table.

    Args:
        protocols: protocols that are measured together.
        queries: queries of all protocols.
        images: by the name of a set of images, how many there are to encode; None where that is not published.
    """

    protocols: tuple[str, ...]
    queries: int
    images: dict[str, int | None]


CIRR_IMAGES = {"cirr": cirr.EXPECTED_COUNTS["val"][1]}
FASHION_IMAGES = {"fashioniq": FASHION_IQ[1]}
CIRCO_IMAGES = {"circo": circo.EXPECTED_IMAGES}
CIRCLED = tuple(name for name in PROTOCOLS if name.startswith("circled-"))
CIRCLED_QUERIES = sum(
    circled.expected_counts(subset)["queries"] for subset in circled.SUBSETS if subset.endswith("_val")
)

COLUMNS = {
    "CIRR": Column(("cirr-val",), cirr.EXPECTED_COUNTS["val"][0], CIRR_IMAGES),
    "FashionIQ": Column(("fashioniq",), FASHION_IQ[0], FASHION_IMAGES),
    "CIRCO": Column(("circo-val",), circo.EXPECTED_COUNTS["val"], CIRCO_IMAGES),
    "i-CIR": Column(("icir",), icir.EXPECTED_COUNTS["queries"], {"icir": icir.ABOUT_IMAGES}),
    "PinPoint": Column(("pinpoint",), pinpoint.EXPECTED_COUNTS["pinpoint_licensed.parquet"], {"pinpoint": None}),
    "GeneCIS": Column(("genecis",), sum(genecis.EXPECTED_COUNTS.values()), {"genecis": None}),
    "EDIR": Column(("edir",), edir.EXPECTED_COUNTS["queries"], {"edir": edir.EXPECTED_COUNTS["gallery images"]}),
    "CIRCLED": Column(CIRCLED, CIRCLED_QUERIES, {**CIRR_IMAGES, **FASHION_IMAGES, **CIRCO_IMAGES}),
    # At most the queries of the split that is rewritten: how many the files have is not verified.
    "Refined-CIRR": Column(("refined-cirr-val",), cirr.EXPECTED_COUNTS["val"][0], CIRR_IMAGES),
    "Refined-FashionIQ": Column(("refined-fashioniq",), FASHION_IQ[0], FASHION_IMAGES),
    "L-CIRR": Column(("l-cirr-val",), cirr.EXPECTED_COUNTS["val"][0], CIRR_IMAGES),
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        encoder: dual encoder that embeds the images.
        composition: how the plain encoder composes queries; None for a method with weights of its own.
        methods: baselines of the plain encoder, in the place of a composition.
        convert: arguments of `pvlf-hf convert`, after which the model is in `{folder}`.
        recipe: name of a recipe in `configs/paper` that is trained first.
        method: method of [`InversionModel`] that trains nothing, whose model is saved first.
    """

    encoder: str
    composition: str | None = None
    methods: tuple[str, ...] = ()
    convert: str | None = None
    recipe: str | None = None
    method: str | None = None


OTI_STEPS: Any = InversionConfig(method="searle_oti").inversion_steps
UNTRAINED = ("image", "text", "image+text")
ROWS = {
    **{f"CLIP-L, {name}": Row(CLIP_L, name) for name in ("sum", "slerp", "product")},
    **{f"BLIP-B, {name}": Row(BLIP_B, name) for name in ("slerp", "product")},
    "CLIP-L, untrained": Row(CLIP_L, methods=UNTRAINED),
    "BLIP-B, untrained": Row(BLIP_B, methods=UNTRAINED),
    "Pic2Word": Row(CLIP_L, convert="inversion pic2word.pt --method pic2word"),
    "SEARLE": Row(CLIP_L, convert="inversion searle.pt --method searle"),
    "SEARLE-OTI": Row(CLIP_L, method="searle_oti"),
    "LinCIR": Row(CLIP_L, convert="inversion lincir_large.pt --method lincir"),
    "Context-I2W": Row(CLIP_L, convert="inversion context_i2w.pt --method context_i2w"),
    "CompoDiff": Row(CLIP_L, convert="compodiff model.safetensors"),
    "TransAgg": Row(BLIP_B, convert="transagg model.pt --tokenizer bert-base-uncased"),
    "CASE (CoVR)": Row(BLIP_B, convert="case ckpt_5.ckpt --tokenizer bert-base-uncased"),
    "PVLF, BLIP-B": Row(BLIP_B, recipe="pvlf-blip-both-combined"),
    "PVLF, CLIP-L": Row(CLIP_L, recipe="pvlf-clip-both-combined"),
}

SAVE = (
    "from pvlf_hf import InversionModel, InversionProcessor; "
    "processor = InversionProcessor.from_vl_pretrained({encoder!r}, {method!r}); "
    "model = InversionModel.from_vl_pretrained({encoder!r}, {method!r}, placeholder_id=processor.placeholder_id); "
    "[part.save_pretrained({folder!r}) for part in (model, processor)]"
)

NOTES = f"""\
All hours are estimates; nothing in this table was measured. Hours = operations / ({PEAK_FLOPS / 1e12:.0f} TFLOP/s x
{UTILISATION:.0%}) / 3600: the peak of an {GPU} in bfloat16 by its data sheet, of which that share is assumed.
Images must be read as fast.

- Operations are those that PyTorch counts for one query and one image on shapes alone, with {CAPTION_TOKENS} tokens a
  caption (CompoDiff: 77), times the published numbers of queries and images (`EXPECTED_COUNTS` of the loaders). Plain
  encoders, textual inversion and CASE count PVLF's query on their encoder, whose fusion they lack or have in another
  form.
- SEARLE-OTI: the image of every query is new, and its token takes {OTI_STEPS} steps, each a sentence through the text
  encoder and back.
- CompoDiff: two passes of the text encoder of bigG, and the denoiser at its default steps and samples.
- i-CIR counts about {icir.ABOUT_IMAGES:,} images, as its card does. Refined-CIRR, Refined-FashionIQ and L-CIRR count
  every query of the split that they rewrite, which is the most that they can have.
- A column counts its images as if it were measured alone. "all" counts every set of images once, as one command with
  kept embeddings does, and leaves out columns with "-", whose number of images is not published.
- Untrained baselines are the image, the text and their sum, of one encoding.
- PVLF has no public weights: "training" is the estimate of `gpu_hours.py` for its recipe, which `reproduce.py` also
  prints."""


def home_of(name: str, folder: str = "outputs/public") -> str:
    """Return the folder of a row."""
    return f"{folder}/{'-'.join(re.findall('[a-z0-9]+', name.casefold()))}"


def commands(name: str, data_root: str = "data", folder: str = "outputs/public") -> list[str]:
    """Return the commands of a row: what makes the model, if there is any, and the evaluation under all protocols."""
    row, home = ROWS[name], home_of(name, folder)
    model, lines = row.encoder, []
    made = f"{home}/model"
    if row.convert is not None:
        lines.append(f"pvlf-hf convert {row.convert} --output-dir {made}")
    if row.method is not None:
        lines.append(f'python -c "{SAVE.format(encoder=row.encoder, method=row.method, folder=made)}"')
    if row.recipe is not None:
        recipe = f"train_scripts/configs/paper/{row.recipe}.yaml"
        lines.append(f"pvlf-hf train {recipe} --data_root {data_root} --output_dir {made}")
    if lines:
        model = made
    how = f" --composition {row.composition}" if row.composition else ""
    how += f" --methods {' '.join(row.methods)}" if row.methods else ""
    protocols = " ".join(protocol for column in COLUMNS.values() for protocol in column.protocols)
    rest = f"--protocols {protocols} --data_root {data_root} --dtype bfloat16 --output_dir {home}/evaluation"
    return [*lines, f"pvlf-hf evaluate --model {model}{how} {rest}"]


def operations(name: str) -> tuple[float, float]:
    """Count the operations to embed a query and a gallery image of a row."""
    row = ROWS[name]
    query, image = encoding_flops(model_config(ModelArguments(model=row.encoder)).to_json_string())
    if row.method is not None:
        return query + inversion_flops(), image
    return (compodiff_flops(), image) if name == "CompoDiff" else (query, image)


@cache
def inversion_flops() -> int:
    """Count the operations to optimise the token of an image: the text encoder there and back in every step."""
    settings: Any = {k: v for k, v in DUAL_ENCODERS[CLIP_L].items() if k != "model_type"}

    def a_step(layers: Sequence[int]) -> int:
        config = CLIPConfig(**settings).text_config
        (config.num_hidden_layers,) = layers
        with torch.device("meta"):
            text = CLIPTextModelWithProjection(config).requires_grad_(False)
            text.text_model.embeddings.token_embedding.requires_grad_(True)  # what reaches the token passes here
            ids = torch.empty(1, CAPTION_TOKENS, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            text(input_ids=ids).text_embeds.sum().backward()
        return counter.get_total_flops()

    return flops_of_layers(a_step, [CLIPConfig(**settings).text_config.num_hidden_layers]) * OTI_STEPS


@cache
def compodiff_flops() -> int:
    """Count the operations of a query: image, caption and empty text once, and every call of the denoiser."""
    config = CompoDiffConfig()
    vision, text = config.vl_config.vision_config, config.vl_config.text_config
    return flops_of_layers(
        _compodiff_flops, [vision.num_hidden_layers, text.num_hidden_layers, config.denoiser_layers]
    )


def _compodiff_flops(layers: Sequence[int]) -> int:
    """Count the same with other numbers of layers: of the image encoder, the text encoder and the denoiser."""
    config = CompoDiffConfig(denoiser_layers=layers[2])
    config.vl_config.vision_config.num_hidden_layers, config.vl_config.text_config.num_hidden_layers = layers[:2]
    samples, width, side = config.num_samples, config.joint_width, config.mask_size
    with FakeTensorMode(), torch.no_grad():  # tensors without content
        model = CompoDiffModel(config).eval()
        text = CLIPTextModel(config.vl_config.text_config).eval()
        with FlopCounterMode(display=False) as once:
            model.encode_images(torch.empty(1, 3, *[config.vl_config.vision_config.image_size] * 2))
            own, empty = text(input_ids=torch.zeros(2, config.text_length, dtype=torch.long)).last_hidden_state
            memory = model.denoiser.read(
                torch.stack([own, empty, empty]), torch.empty(3, width), torch.empty(3, side, side)
            )
        with FlopCounterMode(display=False) as each:
            model.denoiser(torch.empty(3, samples, width), torch.tensor(1), memory)
    return once.get_total_flops() + (config.steps - 1) * each.get_total_flops()


def hours(name: str) -> dict[str, float | None]:
    """Estimate a row's GPU hours of each column, of "all" and of "training"; None where a number is not known."""
    query, image = operations(name)
    rate = PEAK_FLOPS * UTILISATION * 3600
    found: dict[str, float | None] = {}
    sets: dict[str, int] = {}
    queries = 0
    for column, facts in COLUMNS.items():
        known = {of: count for of, count in facts.images.items() if count is not None}
        if len(known) < len(facts.images):
            found[column] = None
            continue
        found[column] = (facts.queries * query + sum(known.values()) * image) / rate
        sets |= known
        queries += facts.queries
    found["all"] = (queries * query + sum(sets.values()) * image) / rate
    recipe = ROWS[name].recipe
    found["training"] = None if recipe is None else gpu_hours(*parse_arguments([str(RECIPES / f"{recipe}.yaml")]))
    return found


def rendered(names: list[str], data_root: str) -> str:
    """Render commands and hours in Markdown."""
    parts = [f"```bash\n{chr(10).join([f'# {name}', *commands(name, data_root)])}\n```" for name in names]
    files = [f"'{name}={home_of(name)}/evaluation/results.json'" for name in names]
    compare = " \\\n    ".join(["pvlf-hf compare", *files, "--output-dir outputs/public"])
    parts.append(f"```bash\n{compare}\n```")
    heads = ["estimated GPU hours", *COLUMNS, "all", "training"]
    lines = [heads, ["---"] * len(heads)]
    lines += [[name, *("-" if h is None else f"{h:.3g}" for h in hours(name).values())] for name in names]
    parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines), NOTES]
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
