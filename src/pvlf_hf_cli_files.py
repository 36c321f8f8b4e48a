"""Commands of `pvlf-hf` on files: `compare`, `submit lint`, `convert`, `triplets`, `report`; and what others share."""

from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else to stderr.")]

submit = typer.Typer(help="Check files for the servers of CIRR and CIRCO.", **PLAIN)
convert = typer.Typer(help="Convert checkpoints of other code bases.", **PLAIN)


@submit.command(no_args_is_help=True)
def lint(
    files: Annotated[
        list[Path], typer.Argument(help="For CIRR (recall, recall_subset) or CIRCO, test split.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Check files before an upload.

    \b
    pvlf-hf submit lint outputs/mine/evaluation/submissions/composed/*/*.json

    `pvlf-hf evaluate --protocols cirr-test1 circo-test` writes such files. Exits with 1 if one would be refused.
    """
    from pvlf_hf.commands.output import print_json
    from pvlf_hf.evaluation.submission import is_error, lint_submission

    problems = {str(file): lint_submission(file) for file in files}
    if as_json:
        print_json(files=problems)
    else:
        typer.echo("\n".join(f"{file}: {one}" for file, listed in problems.items() for one in listed or ["fine"]))
    raise typer.Exit(int(any(map(is_error, (one for listed in problems.values() for one in listed)))))


def compare(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Results of `pvlf-hf evaluate` or `train`, or submission files for CIRR or CIRCO; NAME=FILE names a "
            "row, and files of one name are its runs.",
            show_default=False,
        ),
    ],
    against: Annotated[str | None, typer.Option(help="Row that the others are tested against, paired.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to show, such as recall@5; repeat it (default: the usual ones).")
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder of the data sets: annotations to score submission files by, validation split."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write comparison.md, .html (with plots) and .json here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods: a table of intervals, tests and costs.

    \b
    pvlf-hf compare PVLF=outputs/pvlf-*/results.json TransAgg=outputs/transagg/results.json --against TransAgg

    All values of a column are measured under one protocol, or the command refuses. p-values are corrected for the
    number of tests in the table (Holm). A file without NAME= is called by its model, or else by the nearest folder
    with a name of its own (not `evaluation`); two of one name are refused. Submission files are scored by annotations
    alone, without images.
    """
    from pvlf_hf.commands import compare

    compare.run(files, against, metric, data_root, output_dir, as_json)


Checkpoint = Annotated[Path, typer.Argument(help=".pth, .pt, .ckpt, .bin or .safetensors.", show_default=False)]
OutputDir = Annotated[Path, typer.Option(help="A new or empty folder.", show_default=False)]
Tokenizer = Annotated[str | None, typer.Option(help="Hub name, folder, or BERT's vocab.txt; writes a processor too.")]
VisionHeads = Annotated[int | None, typer.Option(help="Image encoder's attention heads, if its size is unusual.")]
TextHeads = Annotated[int | None, typer.Option(help="Text encoder's attention heads, if its size is unusual.")]


@convert.command(no_args_is_help=True)
def blip(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    tokenizer: Tokenizer = None,
    image_size: Annotated[
        int | None, typer.Option(help="Interpolate position embeddings to this image side, in pixels.")
    ] = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
) -> None:
    """Convert BLIP as Salesforce released it, which PVLF is built on.

    \b
    pvlf-hf convert blip model_base_retrieval_coco.pth --tokenizer vocab.txt --output-dir outputs/blip

    Runs no code of the file. A checkpoint that is not exactly of this kind is refused.
    """
    from pvlf_hf.commands import convert

    convert.blip(checkpoint, output_dir, tokenizer, image_size, vision_heads, text_heads)


@convert.command(no_args_is_help=True)
def transagg(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    tokenizer: Tokenizer = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
) -> None:
    """Convert the baseline TransAgg, trained on BLIP or on CLIP.

    \b
    pvlf-hf convert transagg model.pt --tokenizer bert-base-uncased --output-dir outputs/transagg

    Runs no code of the file. A checkpoint that is not exactly of this kind is refused.
    """
    from pvlf_hf.commands import convert

    convert.transagg(checkpoint, output_dir, tokenizer, vision_heads, text_heads)


@convert.command(no_args_is_help=True)
def case(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    tokenizer: Tokenizer = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
) -> None:
    """Convert CoVR's BLIP, whose query encoder is CASE's.

    \b
    pvlf-hf convert case ckpt_5.ckpt --tokenizer bert-base-uncased --output-dir outputs/case

    Runs no code of the file. A checkpoint that is not exactly of this kind is refused.
    """
    from pvlf_hf.commands import convert

    convert.case(checkpoint, output_dir, tokenizer, vision_heads, text_heads)


@convert.command(no_args_is_help=True)
def inversion(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    method: Annotated[str, typer.Option(help="pic2word, searle, lincir or context_i2w.", show_default=False)],
    backbone: Annotated[
        str, typer.Option(help="The CLIP it was trained on, tokenizer included: Hub name or folder.")
    ] = "openai/clip-vit-large-patch14",
    extractor_heads: Annotated[
        int | None, typer.Option(help="Attention heads of Context-I2W's extractor, if its size is unusual.")
    ] = None,
) -> None:
    """Convert a mapping network of textual inversion.

    \b
    pvlf-hf convert inversion lincir_large.pt --method lincir --output-dir outputs/lincir

    Runs no code of the file. A file that is not exactly of this method is refused.
    """
    from pvlf_hf.commands import convert

    convert.inversion(checkpoint, output_dir, method, backbone, extractor_heads)


@convert.command(no_args_is_help=True)
def compodiff(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    image_encoder: Annotated[
        str, typer.Option(help="The CLIP whose images it generates: Hub name or folder.")
    ] = "openai/clip-vit-large-patch14",
    text_encoder: Annotated[
        str, typer.Option(help="The CLIP whose text encoder it reads, tokenizer included: Hub name or folder.")
    ] = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
) -> None:
    """Convert CompoDiff's denoiser.

    \b
    pvlf-hf convert compodiff model.safetensors --output-dir outputs/compodiff

    Runs no code of the file. A file that is not exactly of this kind is refused.
    """
    from pvlf_hf.commands import convert

    convert.compodiff(checkpoint, output_dir, image_encoder, text_encoder)


def triplets(
    table: Annotated[Path, typer.Argument(help="Table with the columns image and caption.", show_default=False)],
    images: Annotated[Path, typer.Option(help="Folder of the images.", show_default=False)],
    output: Annotated[Path, typer.Option(help="File to write, ending in .jsonl.", show_default=False)],
    count: Annotated[int | None, typer.Option(min=1, help="Number of triplets (default: all that are found).")] = None,
    language: Annotated[str, typer.Option(help="Language of the captions, en or de, or a word list of yours.")] = "en",
    seed: Annotated[int, typer.Option(help="Decides which pairs and wordings are taken.")] = 0,
    group: Annotated[
        str | None, typer.Option(help="Column, such as an artist, that reference and target share.")
    ] = None,
    near: Annotated[
        bool,
        typer.Option(
            "--near",
            help="Pair further captions, alike but for one listed word (TF-IDF). On EmojiCIR's regular names 70 % of "
            "the pairs that it adds are right, where those of the others are 88 %; so it is off.",
        ),
    ] = False,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Folder of benchmark images, copies of which are left out.")
    ] = None,
    rejected: Annotated[Path | None, typer.Option(help="File for the rows left out, with reasons.")] = None,
    check_images: Annotated[bool, typer.Option(help="Open the images, to leave out copies and broken ones.")] = True,
    model: Annotated[
        str | None, typer.Option(help="Dual encoder that finds further pairs and verifies all: folder or Hub name.")
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="Chat model that writes the relative captions anew: folder or Hub name.")
    ] = None,
    paraphrase: Annotated[
        bool, typer.Option("--paraphrase", help="Let the writer only reword the captions, which is safer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make training triplets of images and their captions.

    \b
    pvlf-hf triplets captions.csv --images photos/ --output triplets.jsonl
    pvlf-hf train --train_file triplets.jsonl --image_folder photos/ --output_dir outputs/mine

    Captions that differ in a phrase or two make pairs, and their difference the relative caption. The report lies
    beside the output. An interrupted run resumes.
    """
    from pvlf_hf.commands import triplets as command

    settings: dict[str, Any] = {"count": count, "language": language, "seed": seed, "check_images": check_images}
    settings |= {"group": group, "near": near}
    settings |= {"held_out": tuple(map(str, exclude or ()))}
    command.make(table, images, output, settings, rejected, model, writer, paraphrase, as_json)


def report(
    file: Annotated[Path, typer.Argument(help="Triplets: a table, or JSON as published.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Folder of the images, to show some.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Path of .md, .json and .html (default: beside the file).")
    ] = None,
    language: Annotated[str, typer.Option(help="Language of the captions, en or de, or a word list of yours.")] = "en",
    model: Annotated[
        str | None, typer.Option(help="Dual encoder that measures what image and text are needed for.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Report on training triplets, your own or published ones.

    The report has repetition, grammar, overlap with the captions and false negatives.

    \b
    pvlf-hf report triplets.jsonl --images photos/
    pvlf-hf report data/laion-cir/laion_llm_info.json
    """
    from pvlf_hf.commands import triplets as command

    command.report(file, images, output, language, model, as_json)


def parse_numbers(given: str, count: int, option: str, expected: str) -> tuple[float, ...]:
    """Parse numbers, separated by commas."""
    try:
        numbers = tuple(map(float, given.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(isfinite, numbers)):
        raise typer.BadParameter(f"{given!r}: give {expected}", param_hint=option)
    return numbers


def weighted(given: str, option: str) -> tuple[str, float]:
    """Split a weight off an argument: `red`, `-red`, `2:red`, `-0.5:red`; `1:-red` is the text "-red"."""
    head, colon, rest = given.partition(":")
    try:
        weight = float(head)
    except ValueError:
        return (given[1:], -1.0) if given.startswith("-") and len(given) > 1 else (given, 1.0)
    if not colon or not isfinite(weight):
        return given, 1.0
    if weight == 0 or not rest.strip():
        raise typer.BadParameter(f"{given!r}: write a weight other than 0 and what it weighs", param_hint=option)
    return rest, weight


__all__ = [
    "PLAIN",
    "Json",
    "compare",
    "convert",
    "parse_numbers",
    "report",
    "submit",
    "triplets",
    "weighted",
]
