"""The command line `pvlf-hf`: index and search images, train, evaluate, check data, convert, run the web demo.

It is a module beside the package, most of which imports PyTorch and the models of Transformers, which takes seconds:
`--help`, completion and usage errors must answer at once. This module declares the arguments of each command;
`pvlf_hf.commands`, which a command imports when it runs, implements it.
"""

import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pvlf_hf_client
from pvlf_hf_cli_files import PLAIN, Json, compare, convert, parse_numbers, report, submit, triplets, weighted
from pvlf_hf_cli_index import MODEL, Composition, Database, Model, index

INDEX = "gallery.parquet"
"""File that a folder made by `pvlf-hf index` holds, `pvlf_hf.search.gallery_files.TABLE`."""


class Commands(TyperGroup):
    """Commands whose user errors print one line; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = user_message(error)
            if message is None or ctx.params["debug"]:
                raise
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from error


def user_message(error: Exception) -> str | None:
    """Return the line to print for a user error, None for a bug."""
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):  # of the Hub's client
        return f"the Hub cannot be reached ({error}): check the connection, or go on without it by HF_HUB_OFFLINE=1"
    if isinstance(error, BrokenPipeError):  # `pvlf-hf ... | head`, which Typer ends quietly
        return None
    if isinstance(error, ImportError) and (error.name or "").startswith("pvlf_hf"):
        return None
    return str(error) if isinstance(error, ValueError | OSError | ImportError) else None


# Both `--output-dir` and `--output_dir`, as in train and evaluate.
SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}
# Everything after the command is read by the parser that the scripts and recipes use too.
HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(cls=Commands, context_settings=SETTINGS, pretty_exceptions_enable=False, **PLAIN)
app.add_typer(submit, name="submit")
app.add_typer(convert, name="convert")


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        typer.echo(version("pvlf-hf"))
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", envvar="PVLF_DEBUG", help="Show tracebacks of errors.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Composed image retrieval with PVLF: find images by an image and what should be different.

    \b
    export PVLF_MODEL=outputs/mine
    pvlf-hf index photos/ --path photos.gallery
    pvlf-hf search photos.gallery --image dress.jpg --text "without sleeves" --sheet result.html

    Every command explains itself with --help. It exits with 0 when done, 1 if it failed (stderr says why), 2 if
    it was called wrongly.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names may have letters that a console or pipe cannot encode
            stream.reconfigure(errors="backslashreplace")


app.command(no_args_is_help=True)(index)


@app.command(no_args_is_help=True)
def search(
    context: typer.Context,
    index: Annotated[
        str | None,
        typer.Argument(
            help="Folder or URL that `pvlf-hf index` made, or name of a store in --milvus; none with --server.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a running `pvlf-hf serve`, which answers at once: no model is loaded.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Reference image, file or URL; several are averaged, see --text.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="What should be different; alone, what to look for. Several count together, each with a weight "
            'before it: "2:red", "-stripes" (away from it), "-0.5:stripes".'
        ),
    ] = None,
    id: Annotated[
        list[str] | None, typer.Option(help='Indexed image to search by, "a.jpg", or away from, "-a.jpg".')
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="Part of the image to search by: left,top,right,bottom in pixels.")
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(help="Condition on columns of the metadata: \"price < 50 and brand in ('Acme', 'Zen')\"."),
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out results that score less.")] = None,
    offset: Annotated[int, typer.Option(min=0, help="Results to pass over, those of earlier pages.")] = 0,
    fold: Annotated[
        float | None, typer.Option(help="Fold near-duplicates of a result, from this cosine on (try 0.98).")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results (our choice).")] = 10,
    weights: Annotated[
        str,
        typer.Option(help="Weights of image, composition and text (eq. 13); by default the composition alone."),
    ] = "0,1,0",
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet: a file ending in .png or .html.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also print weights and attention of the model.")] = False,
    milvus: Database = None,
    composition: Composition = None,
    as_json: Json = False,
) -> None:
    """Search by an image, by a text, or by an image and a change.

    \b
    pvlf-hf search photos.gallery --image dress.jpg --text "without sleeves" -k 5 --sheet result.html
    pvlf-hf search photos.gallery --image dress.jpg --text "in blue" --weights 1,1,0    # more of the image
    pvlf-hf search photos.gallery --text "2:red dress" --text "-stripes" --filter "price < 50" --fold 0.98
    pvlf-hf search photos --milvus http://127.0.0.1:19530 --text "red dress"    # a store that others may change
    pvlf-hf search --server http://127.0.0.1:8000 --image dress.jpg --text "without sleeves"
    """
    if sheet and sheet.suffix not in (".png", ".html"):
        raise typer.BadParameter(f"{sheet}: name a file that ends in .png or .html", param_hint="--sheet")
    parts = parse_numbers(weights, 3, "--weights", "three numbers, of image, composition and text, such as 1,1,0")
    terms = {
        "images": [weighted(one, "--image") for one in image or ()],
        "texts": dict(weighted(one, "--text") for one in text or ()),
        "ids": dict(weighted(one, "--id") for one in id or ()),
    }
    sides = box and parse_numbers(box, 4, "--box", "left,top,right,bottom in pixels")
    settings = {"filter": filter, "min_score": min_score, "offset": offset, "fold": fold, "box": sides}
    if server is not None:
        check_for_server(context)
        return pvlf_hf_client.search(server, terms, settings, k, parts, as_json)
    if index is None or model is None:
        missing = "INDEX" if index is None else "--model"
        raise typer.BadParameter("it is needed, unless a --server searches", param_hint=missing)
    if milvus is None:
        check_index(index)
    from pvlf_hf.commands import gallery

    gallery.search(index, model, terms, settings, k, parts, sheet, explain, as_json, composition, milvus)


def check_for_server(context: typer.Context) -> None:
    """Refuse arguments that have no effect where a server searches."""
    reasons = {
        "index": "the server has its own index",
        "model": "the server has its own model",
        "composition": "the server has its own model",
        "milvus": "the server has its own index",
        "sheet": "it is drawn from the files of the images, which only the server has",
        "explain": "a server does not explain",
    }
    for name, reason in reasons.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":  # PVLF_MODEL may be set
            hint = "INDEX" if name == "index" else f"--{name}"
            raise typer.BadParameter(f"{reason}: leave it out, or leave --server out", param_hint=hint)


@app.command(no_args_is_help=True)
def serve(
    index: Annotated[
        str,
        typer.Argument(
            help="Folder or URL that `pvlf-hf index` made, or name of a store in --milvus.", show_default=False
        ),
    ],
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; each has its own model. Several serve no web page.")
    ] = 1,
    per_minute: Annotated[
        int, typer.Option(min=1, help="Requests a client may send to a worker in a minute (our choice).")
    ] = 6000,
    milvus: Database = None,
    memory: Annotated[
        str | None,
        typer.Option(help="With shards: memory that a worker's searches take, such as 8GB (default: 1.5GB)."),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(help="Numbers compared in memory, float32 to int8; results are the same (default: the fastest)."),
    ] = None,
    composition: Composition = None,
) -> None:
    """Serve an index over HTTP: searches, embeddings and the web page.

    \b
    pvlf-hf serve photos.gallery --model outputs/mine

    From the shell:

    \b
    curl -F image=@dress.jpg -F text="without sleeves" -F k=5 http://127.0.0.1:8000/search

    From Python (pip install requests):

    \b
    import requests
    query = {"texts": {"red dress": 1, "stripes": -0.5}, "filter": "price < 50", "k": 5}
    print(requests.post("http://127.0.0.1:8000/search", json=query).json()["results"])

    /docs describes POST /search, /search/batch and /v1/embeddings and GET /health; /page is the web page, where Gradio
    is installed. Requests that arrive together are encoded together.

    The server answers from the index as it was when it started: after `pvlf-hf index`, start it again. With several
    workers, SIGHUP to the first process replaces them one by one, without a gap. A worker takes the memory of the
    model, and 2 bytes for each number of the embeddings (1 with --vectors int8); the index itself is memory-mapped,
    and shared.

    Shards (`pvlf-hf index --engine ray`) are read where they lie, at a folder or URL; what fits into --memory is kept
    there. Parts that are added are seen after a new start; where one is replaced or removed, searches answer 503 until
    then. With --milvus the database answers, with what others change there at once; a .db file takes one worker.
    """
    for module in ("fastapi", "uvicorn", "python_multipart"):
        if find_spec(module) is None:
            raise ImportError(f'the server needs {module}: `pip install "pvlf-hf[serve]"`')
    if milvus is None:
        check_index(index)
    from pvlf_hf.commands import gallery

    settings = {"uri": milvus, "memory": memory, "vectors": vectors}
    gallery.serve(index, model, host, port, workers, per_minute, composition, settings)


@app.command()
def demo(
    model: Model,
    images: Annotated[
        str | None,
        typer.Argument(
            help="Folder of images, folder or URL that `pvlf-hf index` made, or name of a store in --milvus; without, "
            "emoji.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port (default: a free one).")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    milvus: Database = None,
    composition: Composition = None,
) -> None:
    """Search in the browser.

    \b
    pvlf-hf demo photos.gallery --model outputs/mine
    """
    if find_spec("gradio") is None:
        raise ImportError('the web demo needs Gradio: `pip install "pvlf-hf[demo]"`')
    from pvlf_hf.commands import gallery

    gallery.demo(images, model, host, port, browser, composition, milvus)


@app.command(context_settings=HANDED_ON)
def train(context: typer.Context) -> None:
    """Train PVLF on a recipe or your own triplets, and evaluate it.

    pvlf-hf train --model Salesforce/blip-itm-base-coco --train_file triplets.csv --image_folder photos/ --output_dir
    outputs/mine
    """
    from pvlf_hf.commands.train import main

    main(context.args)


@app.command(context_settings=HANDED_ON)
def evaluate(context: typer.Context) -> None:
    """Evaluate a model under named protocols.

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
    license: Annotated[str | None, typer.Option(help="Licence of the weights, as the Hub names it.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the base model, if the run loaded it from a folder.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit on the Hub that the usage example loads.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Benchmark on the Hub, emoji-cir=you/emoji-cir; repeat it.")
    ] = None,
    push: Annotated[
        bool, typer.Option("--push", help="Upload the folder as --name, and pin the example to that commit.")
    ] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository (default: your setting).")
    ] = None,
) -> None:
    """Write the model card of a checkpoint, and .eval_results/.

    \b
    pvlf-hf card outputs/mine --name you/pvlf-mine --license bsd-3-clause --push

    An existing card keeps its author's text.
    """
    from pvlf_hf import write_card
    from pvlf_hf.checkpoints.pushing import push_checkpoint

    given = {"license": license, "base_model": base_model, "revision": revision}
    ids = dict(one.split("=", 1) for one in benchmark or () if "=" in one)
    if len(ids) != len(benchmark or ()):
        raise typer.BadParameter("write NAME=OWNER/DATASET, each name once", param_hint="--benchmark")
    known: dict[str, Any] = {key: value for key, value in given.items() if value}
    if push and (name is None or revision is not None):
        raise typer.BadParameter("needs --name, and takes no --revision: it is the commit that is made")
    if private is not None and not push:
        raise typer.BadParameter("is of a repository: add --push", param_hint="--private/--public")
    if push:
        commit = push_checkpoint(folder, str(name), results, ids, private, **known)
        typer.echo(f"https://huggingface.co/{name}, loads {commit}")
    else:
        typer.echo(str(write_card(folder, name, results, hub_ids=ids, **known)))


class Subject(StrEnum):
    """Kinds of data that the doctor examines."""

    LAION_CIR = "laion-cir"
    CIRR = "cirr"
    FASHIONIQ = "fashioniq"
    CIRCO = "circo"
    ICIR = "icir"
    PINPOINT = "pinpoint"
    CIRCLED = "circled"
    GENECIS = "genecis"
    REFINED_CIRR = "refined-cirr"
    REFINED_FASHIONIQ = "refined-fashioniq"
    L_CIRR = "l-cirr"
    EDIR = "edir"
    TRIPLETS = "triplets"


@app.command(no_args_is_help=True)
def doctor(
    subject: Annotated[Subject, typer.Argument(help="Which dataset; triplets are your own.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="Its folder; for triplets the table.", show_default=False)],
    split: Annotated[
        str | None, typer.Option(help="Split; of laion-cir and circled the subset (default: val, or all).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Triplets: folder of the images (default: that of the table).")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Model whose tokenizer counts the captions' tokens.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Do not compare counts with the published ones.")] = False,
    as_json: Json = False,
) -> None:
    """Examine a dataset before GPU hours are spent on it.

    \b
    pvlf-hf doctor cirr data/cirr --split val
    pvlf-hf doctor triplets triplets.csv --images photos/

    Exits with 1 if there is an error; there may be warnings.
    """
    from dataclasses import asdict

    from pvlf_hf.commands.output import print_json
    from pvlf_hf.data.doctor import examine

    report = examine(subject.value, path, split, images, tokenizer, check_counts=not partial)
    if as_json:
        print_json(healthy=report.healthy, **asdict(report))
    else:
        typer.echo(str(report))
    raise typer.Exit(0 if report.healthy else 1)


def check_index(index: str) -> None:
    """Refuse a folder that holds neither an index nor shards; amid a replacement an index is elsewhere."""
    folder = Path(index)
    if "://" in index or (folder / INDEX).is_file() or any(folder.glob("part-*.parquet")):
        return
    if not folder.with_name(f"{folder.name}.being-replaced").is_dir():
        raise ValueError(f"{index} is not an index: build it with `pvlf-hf index PHOTOS --path {index}`")


for command in (compare, triplets, report):  # of the other module; help lists commands in the order of registration
    app.command(no_args_is_help=True)(command)


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the command line."""
    app(args=command_line, prog_name="pvlf-hf")


if __name__ == "__main__":
    main()
