"""The command line `pvlf-hf`: index and search pictures, train, evaluate, check data, convert, show.

It stands beside the package, because importing that imports PyTorch and the models of Transformers, which takes
seconds: `--help`, a completion and a wrong call have to answer at once. Each command imports what it needs.
"""

import json
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pvlf_hf import Explanation, Gallery, PVLFModel, PVLFProcessor

LISTED = 20
"""Skipped pictures that `index` prints; `--json` has them all."""


LOADING = {
    "blip": [
        ("model", "from pvlf_hf import PVLFModel", "PVLFModel.from_vl_pretrained"),
        ("processor", "from pvlf_hf import PVLFProcessor", "PVLFProcessor.from_vl_pretrained"),
    ],
    "transagg": [
        ("model", "import pvlf_hf; from transformers import AutoModel", "AutoModel.from_pretrained"),
        ("processor", "from transformers import AutoProcessor", "AutoProcessor.from_pretrained"),
    ],
}
"""What a conversion is loaded with."""


class Precision(StrEnum):
    """In what a model computes; `auto` is what its checkpoint is saved in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Commands(TyperGroup):
    """Says in a sentence what the user can mend; what only we can mend keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            said = sentence(error)
            if said is None or ctx.params["debug"]:
                raise
            typer.echo(f"error: {said}", err=True)
            raise typer.Exit(1) from error


def sentence(error: Exception) -> str | None:
    """What to tell the user; None of what is no fault of theirs."""
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):  # of the Hub's client
        return f"the Hub cannot be reached ({error}): check the connection, or go on without it by HF_HUB_OFFLINE=1"
    if isinstance(error, BrokenPipeError):  # `pvlf-hf ... | head`, which Typer ends quietly
        return None
    if isinstance(error, ImportError) and (error.name or "").startswith("pvlf_hf"):
        return None
    return str(error) if isinstance(error, ValueError | OSError | ImportError) else None


# Both `--output-dir` and `--output_dir`, as in train and evaluate.
SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}
# Everything after the command is read by the parser that is also behind the scripts and recipes.
HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True}

app = typer.Typer(cls=Commands, context_settings=SETTINGS, pretty_exceptions_enable=False, **PLAIN)
submit = typer.Typer(help="Check files for the servers of CIRR and CIRCO.", **PLAIN)
convert = typer.Typer(help="Make checkpoints of other code bases ours.", **PLAIN)
app.add_typer(submit, name="submit")
app.add_typer(convert, name="convert")

Model = Annotated[
    str, typer.Option(envvar="PVLF_MODEL", help="PVLF checkpoint: folder or Hub name.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and everything else to stderr.")]


def print_version(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        typer.echo(version("pvlf-hf"))
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", envvar="PVLF_DEBUG", help="Show tracebacks of errors.")] = False,
    its_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Composed image retrieval with PVLF: find images by a picture and what should be different.

    \b
    export PVLF_MODEL=outputs/mine
    pvlf-hf index photos/ --path photos.gallery
    pvlf-hf search photos.gallery --image dress.jpg --text "without sleeves" --sheet result.html

    Every command explains itself with --help. It exits with 0 when done, 1 if it failed (stderr says why), 2 if
    it was called wrongly.
    """


@app.command(no_args_is_help=True)
def index(
    photos: Annotated[Path, typer.Argument(help="Folder of pictures; subfolders count.", show_default=False)],
    model: Model,
    path: Annotated[Path, typer.Option(help="Folder that keeps the index.", show_default=False)],
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures encoded at once (ours).")] = 64,
    dtype: Annotated[
        Precision,
        typer.Option(
            help="Of the model; bfloat16 takes half the time on most devices. Searches and later runs take the same."
        ),
    ] = Precision.AUTO,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="Encode by OpenVINO, on CPUs the fastest, most so in bfloat16.")
    ] = False,
    draft: Annotated[
        bool, typer.Option("--draft", help="Decode large JPEGs at reduced size: fast, nearly the same embeddings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed a folder of pictures, to search it.

    \b
    pvlf-hf index photos/ --model outputs/mine --path photos.gallery

    Run it again after an interruption or when pictures changed: only what is new is encoded, what is gone is dropped.
    Pictures that cannot be read are skipped, listed and counted.
    """
    from pvlf_hf import Gallery

    before = known_digests(path)
    encoder, processor = load(model, precision(path) if dtype is Precision.AUTO else dtype.value)
    if openvino:
        from pvlf_hf import encode_by_openvino

        encode_by_openvino(encoder)
    gallery = Gallery.from_folder(photos, encoder, processor, path=path, batch_size=batch_size, draft=draft)
    new = len({*gallery.digests} - before)
    if as_json:
        print_json(path=str(path), pictures=len(gallery), new=new, skipped=gallery.skipped)
        return
    typer.echo(f"{path}: {len(gallery)} pictures, {new} new, {len(gallery.skipped)} skipped")
    for image_id, reason in list(gallery.skipped.items())[:LISTED]:
        typer.echo(f"skipped {image_id}: {reason}")
    if len(gallery.skipped) > LISTED:
        typer.echo(f"and {len(gallery.skipped) - LISTED} more; --json lists them all")


@app.command(no_args_is_help=True)
def search(
    index: Annotated[Path, typer.Argument(help="Folder that `pvlf-hf index` made.", show_default=False)],
    model: Model,
    image: Annotated[
        list[str] | None, typer.Option(help="Reference picture, file or address; several are averaged.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="What should be different; alone, what to look for.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many results (ours).")] = 10,
    weights: Annotated[
        str, typer.Option(help="Of picture, composition and words (eq. 13); by default the model's composition alone.")
    ] = "0,1,0",
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet: a file ending in .png or .html.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also say what the model looked at.")] = False,
    as_json: Json = False,
) -> None:
    """Search by a picture, by words, or by a picture and a change.

    \b
    pvlf-hf search photos.gallery --image dress.jpg --text "without sleeves" -k 5 --sheet result.html
    pvlf-hf search photos.gallery --image dress.jpg --text "in blue" --weights 1,1,0    # more of the picture
    """
    if sheet and sheet.suffix not in (".png", ".html"):
        raise typer.BadParameter(f"{sheet}: name a file that ends in .png or .html", param_hint="--sheet")
    shares = numbers(weights)
    if not is_index(index):
        raise ValueError(f"{index} is no index: make it with `pvlf-hf index PHOTOS --path {index}`")
    from pvlf_hf import Gallery

    gallery = Gallery.load(index, *load(model, precision(index)))
    if text:
        check_words(gallery.processor.tokenizer, text)
    result = gallery.search(image, text, k, weights=shares, explain=explain)
    if sheet and sheet.suffix == ".png":
        result.sheet(k=k).save(sheet)
    elif sheet:
        from pvlf_hf.search.results_page import search_page

        sheet.write_text(search_page(result), encoding="utf-8")
    found: list[dict[str, Any]] = [
        {"id": image_id, "score": score, "path": path}
        for image_id, score, path in zip(result.ids, result.scores, result.paths, strict=True)
    ]
    if as_json:
        why = [explained(its) for its in result.why]
        print_json(results=found, sheet=str(sheet) if sheet else None, **({"why": why} if explain else {}))
        return
    for place, its in enumerate(found, 1):
        typer.echo(f"{place:>3}  {its['score']:.4f}  {its['id']}")
    for its in map(explained, result.why):
        typer.echo("weights: " + ", ".join(f"{part} {weight:.2f}" for part, weight in its["weights"].items()))
        looked = sorted(zip(its["attention"], its["tokens"], strict=True), reverse=True)
        typer.echo("looked at: " + ", ".join(f"{token} {share:.3f}" for share, token in looked))
    if sheet:
        typer.echo(f"see {sheet}")


@app.command()
def demo(
    model: Model,
    pictures: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of pictures, or one that `pvlf-hf index` made; without, emoji.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port (default: a free one).")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Search in the browser.

    \b
    pvlf-hf demo photos.gallery --model outputs/mine
    """
    if find_spec("gradio") is None:
        raise ImportError('the web demo needs Gradio: `pip install "pvlf-hf[demo]"`')
    from pvlf_hf.search.web_demo import launch

    dtype = precision(pictures) if pictures and is_index(pictures) else "auto"
    launch(open_gallery(pictures, *load(model, dtype)), host=host, port=port, open_browser=browser)


@app.command(context_settings=HANDED_ON)
def train(context: typer.Context) -> None:
    """Train PVLF on a recipe or one's own triplets, and measure it.

    pvlf-hf train --model Salesforce/blip-itm-base-coco --train_file triplets.csv --image_folder photos/ --output_dir
    outputs/mine
    """
    from pvlf_hf.commands.train import main

    main(context.args)


@app.command(context_settings=HANDED_ON)
def evaluate(context: typer.Context) -> None:
    """Measure a model under named protocols.

    pvlf-hf evaluate --model outputs/mine --data_root data --protocols cirr-val --output_dir outputs/mine/evaluation
    """
    from pvlf_hf.commands.evaluate import main

    main(context.args)


@app.command(no_args_is_help=True)
def card(
    folder: Annotated[Path, typer.Argument(help="The checkpoint's folder.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Hub name of the model (default: the folder's name).")] = None,
    results: Annotated[
        Path | None, typer.Option(help="results.json of its run (default: the one in the folder).")
    ] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's name of the licence of the weights.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of what it was built on, where the run had it as a folder.")
    ] = None,
) -> None:
    """Write the model card of a checkpoint, from its results.

    \b
    pvlf-hf card outputs/mine --name you/pvlf-mine --license bsd-3-clause

    A card that is there keeps what its author wrote.
    """
    from pvlf_hf import write_card

    given = {"license": license, "base_model": base_model}
    typer.echo(str(write_card(folder, name, results, **{key: value for key, value in given.items() if value})))


class Subject(StrEnum):
    """What the doctor examines."""

    LAION_CIR = "laion-cir"
    CIRR = "cirr"
    FASHIONIQ = "fashioniq"
    CIRCO = "circo"
    TRIPLETS = "triplets"


@app.command(no_args_is_help=True)
def doctor(
    subject: Annotated[Subject, typer.Argument(help="Which data set; triplets are your own.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="Its folder; of triplets the table.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Split, of laion-cir the subset (default: val, combined).")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Triplets: folder of the images (default: that of the table).")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Model whose tokenizer counts the captions' tokens.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Do not compare counts with the published ones.")] = False,
    as_json: Json = False,
) -> None:
    """Examine a data set before GPU hours are spent on it.

    \b
    pvlf-hf doctor cirr data/cirr --split val
    pvlf-hf doctor triplets triplets.csv --images photos/

    Exits with 1 if there is an error; there may be warnings.
    """
    from dataclasses import asdict

    from pvlf_hf.data.doctor import examine

    report = examine(subject.value, path, split, images, tokenizer, check_counts=not partial)
    if as_json:
        print_json(healthy=report.healthy, **asdict(report))
    else:
        typer.echo(str(report))
    raise typer.Exit(0 if report.healthy else 1)


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
    from pvlf_hf.evaluation.submission import is_error, lint_submission

    found = {str(file): lint_submission(file) for file in files}
    if as_json:
        print_json(files=found)
    else:
        typer.echo("\n".join(f"{file}: {problem}" for file, its in found.items() for problem in its or ["fine"]))
    raise typer.Exit(int(any(is_error(problem) for its in found.values() for problem in its)))


Checkpoint = Annotated[Path, typer.Argument(help=".pth, .pt or .safetensors.", show_default=False)]
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
        int | None, typer.Option(help="Interpolate the positions to this many pixels a side.")
    ] = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
) -> None:
    """BLIP as Salesforce released it, which PVLF is built on.

    \b
    pvlf-hf convert blip model_base_retrieval_coco.pth --tokenizer vocab.txt --output-dir outputs/blip

    Runs nothing that is in the file. A checkpoint that is not exactly of this kind is refused.
    """
    from pvlf_hf import convert_salesforce_blip

    convert_salesforce_blip(checkpoint, output_dir, tokenizer, image_size, vision_heads, text_heads)
    describe_conversion("blip", output_dir, bool(tokenizer))


@convert.command(no_args_is_help=True)
def transagg(
    checkpoint: Checkpoint,
    output_dir: OutputDir,
    tokenizer: Tokenizer = None,
    vision_heads: VisionHeads = None,
    text_heads: TextHeads = None,
) -> None:
    """The baseline TransAgg, trained on BLIP or on CLIP.

    \b
    pvlf-hf convert transagg model.pt --tokenizer bert-base-uncased --output-dir outputs/transagg

    Runs nothing that is in the file. A checkpoint that is not exactly of this kind is refused.
    """
    from pvlf_hf import convert_transagg

    convert_transagg(checkpoint, output_dir, tokenizer, vision_heads, text_heads)
    describe_conversion("transagg", output_dir, bool(tokenizer))


def open_gallery(pictures: Path | None, model: "PVLFModel", processor: "PVLFProcessor") -> "Gallery":
    """An index, a folder (embedded in memory), or Google's emoji, whose index is kept in Hugging Face's cache."""
    from huggingface_hub.constants import HF_HOME

    from pvlf_hf import Gallery, load_emoji_pictures
    from pvlf_hf.data.emoji_cir.dataset import TEST_VENDOR
    from pvlf_hf.embeddings.embedding_store import made_by

    if pictures is None:
        cache = Path(HF_HOME) / "pvlf_hf" / f"emoji-{made_by(model, processor)['fingerprint'][:16]}"
        return Gallery.from_dataset(load_emoji_pictures([TEST_VENDOR]), model, processor, cache)
    if is_index(pictures):
        return Gallery.load(pictures, model, processor)
    return Gallery.from_folder(pictures, model, processor)


def precision(index: Path) -> str:
    """In what the model computed the embeddings of an index."""
    from pvlf_hf import EmbeddingStore

    made_by = EmbeddingStore(index).model
    return made_by["dtype"] if made_by else "auto"


def load(name: str, dtype: str) -> tuple["PVLFModel", "PVLFProcessor"]:
    """Model and processor, on the accelerator if there is one."""
    from accelerate import PartialState

    from pvlf_hf.commands.evaluate import load_model

    model, processor = load_model(name, dtype=dtype)
    return model.to(PartialState().device), processor


def is_index(folder: Path) -> bool:
    """Whether `pvlf-hf index` made it."""
    return (folder / "gallery.parquet").is_file()


def known_digests(folder: Path) -> set[str]:
    """Digests of the pictures in an index; none where there is no index yet."""
    import pyarrow.parquet as pq

    return set(pq.read_table(folder / "gallery.parquet")["digest"].to_pylist()) if is_index(folder) else set()


def numbers(weights: str) -> tuple[float, float, float]:
    """Three numbers of an option."""
    try:
        of_image, of_fusion, of_text = map(float, weights.split(","))
        if isfinite(of_image + of_fusion + of_text):
            return of_image, of_fusion, of_text
    except ValueError:
        pass
    raise typer.BadParameter(
        f"{weights!r}: give three numbers, of picture, composition and words, such as 1,1,0", param_hint="--weights"
    )


def check_words(tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    """Says which words are unknown to the model; a `ValueError` if it knows none, as of another script."""
    words = {word: tokenizer.tokenize(word) for word in text.split()}
    unknown = [word for word, tokens in words.items() if tokenizer.unk_token in tokens]
    if words and all({*tokens} <= {tokenizer.unk_token} for tokens in words.values()):
        raise ValueError(f"the model's tokenizer knows nothing of {text!r}: say it in the language it was trained on")
    if unknown:
        typer.echo(f"the model's tokenizer does not know {', '.join(unknown)}; the search goes by the rest", err=True)


def explained(why: "Explanation") -> dict[str, Any]:
    """Weights of eq. 13, and how much the prompts looked at each token, in the last layer."""
    weights = dict(zip(("picture", "composition", "words"), why.weights, strict=True))
    return {"weights": weights, "tokens": why.tokens, "attention": why.words()}


def describe_conversion(kind: str, folder: Path, with_processor: bool) -> None:
    """Says what was written and how to load it."""
    typer.echo(f"{folder} holds:")
    for path in sorted(folder.iterdir()):
        typer.echo(f"  {path.name:32} {path.stat().st_size:>13,} bytes")
    typer.echo("\nLoad it with:")
    for name, imported, loader in LOADING[kind]:
        if name == "model" or with_processor:
            typer.echo(f'  {imported}\n  {name} = {loader}("{folder}")')
    if not with_processor:
        typer.echo("It has no tokenizer: pass --tokenizer to have the processor too.")


def print_json(**content: Any) -> None:
    """The one thing that `--json` leaves on stdout."""
    typer.echo(json.dumps(content, indent=2))


def main(command_line: Sequence[str] | None = None) -> None:
    """The command line."""
    app(args=command_line, prog_name="pvlf-hf")


if __name__ == "__main__":
    main()
