"""Command `pvlf-hf index`, and the arguments that it shares with other commands."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pvlf_hf_cli_files import Json

MODEL = typer.Option(
    envvar="PVLF_MODEL", help="PVLF checkpoint, or a plain CLIP or SigLIP: folder or Hub name.", show_default=False
)
Model = Annotated[str, MODEL]
Composition = Annotated[
    str | None, typer.Option(help="How a plain dual encoder composes queries: slerp, sum or product (default: slerp).")
]
Database = Annotated[
    str | None,
    typer.Option(
        help="Milvus database to search: a .db file or a URL. INDEX is the name of a store there, or the folder that "
        "filled one. Nothing is written."
    ),
]


class Precision(StrEnum):
    """Dtypes that images are embedded in; `auto` is the checkpoint's, `fastest` is measured, `int8` is OpenVINO's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FASTEST = "fastest"
    INT8 = "int8"


class Engine(StrEnum):
    """Machinery that encodes: this process (or those of `accelerate launch`), or the workers of Ray."""

    HERE = "here"
    RAY = "ray"


def index(
    photos: Annotated[
        str, typer.Argument(help="Folder of images, subfolders included; with ray also a URL.", show_default=False)
    ],
    model: Model,
    path: Annotated[str, typer.Option(metavar="PATH", help="Folder that keeps the index.", show_default=False)],
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once, at most (our choice).")] = 64,
    dtype: Annotated[
        Precision,
        typer.Option(
            help="Dtype of the model; fastest measures float32 and bfloat16 here; int8 is calibrated on these images, "
            "and checked. Later runs and searches keep it."
        ),
    ] = Precision.AUTO,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="Encode by OpenVINO, on many CPUs the fastest, above all in bfloat16.")
    ] = False,
    draft: Annotated[
        bool, typer.Option("--draft", help="Decode large JPEGs at reduced size: fast, nearly the same embeddings.")
    ] = False,
    include_hidden: Annotated[
        bool, typer.Option("--include-hidden", help="Index images in hidden and system folders (@eaDir) too.")
    ] = False,
    metadata: Annotated[
        Path | None, typer.Option(help="CSV, Parquet or JSON lines with a column file_name: what to filter by.")
    ] = None,
    exif: Annotated[
        bool, typer.Option("--exif", help="Read date, size and location of the photos, to filter by.")
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="ray: encode in actors of Ray, on this machine or a cluster, into shards.")
    ] = Engine.HERE,
    address: Annotated[
        str | None, typer.Option(help="With ray: the cluster, auto on one of its machines, or HOST:6379.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With ray: actors that encode (default: one a GPU, or one for two CPUs).")
    ] = None,
    vectors: Annotated[
        str | None, typer.Option(help="With ray: numbers to store: float32, float16 (default), int8 or int8+float16.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="With ray: column of Parquet files that holds images (default: image).")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="With ray: column of Parquet files that names them (default: image_id).")
    ] = None,
    milvus: Annotated[
        str | None, typer.Option(help="Milvus database to fill, too: a .db file or a URL. Its other stores stay.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="With --milvus: name of the store (default: one kept in --path; ray needs it).")
    ] = None,
    composition: Composition = None,
    as_json: Json = False,
) -> None:
    """Embed a folder of images, to search it.

    \b
    pvlf-hf index photos/ --model outputs/mine --path photos.gallery

    Run it again after an interruption or when images changed: only new images are encoded, deleted ones are dropped.
    Images that cannot be read are skipped, listed and counted.

    --dtype int8 calibrates the image encoder on 300 of the images, for OpenVINO, and refuses the result where it
    changes the embeddings of 100 others too much. The encoder is kept in --path, for images that are added; queries
    are in float32. Calibrating takes longer than encoding the same images: it is for large folders and large models.

    Any model on the same image encoder searches the index, however it composes queries. With another image encoder
    the new index is built beside the old one, which serves until it is complete.

    More images than one machine takes are encoded on a Ray cluster, into shards, which the other commands open, too:

    \b
    pip install "pvlf-hf[ray]"    # on every machine
    ray start --head              # on the first; the others: ray start --address FIRST:6379
    pvlf-hf index s3://bucket/photos --path s3://bucket/shards --engine ray --address auto --model NAME

    PHOTOS and --path are folders or URLs that every machine sees. PHOTOS may also hold Parquet files with a column of
    images, or the .tar files of a WebDataset. Without --address Ray runs on this machine. A repeated call goes on
    where one ended; images that cannot be read are listed in broken-*.parquet in --path.

    With --milvus a store of a Milvus database is made to hold these images and no others. `pvlf-hf search NAME
    --milvus URI` searches it as it is then, with what others add and remove.
    """
    from pvlf_hf.commands import gallery

    if milvus is None:
        _refuse({"name": name}, "it names a store: pass --milvus with it")
    ours: dict[str, Any] = {"include_hidden": include_hidden, "metadata": metadata, "exif": exif}
    alone = ours | {"openvino": openvino}
    columns = {"image_column": image_column, "id_column": id_column}
    rays: dict[str, Any] = {"address": address, "workers": workers, "vectors": vectors, **columns}
    common: dict[str, Any] = {"batch_size": batch_size, "draft": draft}
    if engine is Engine.RAY:
        _refuse(alone, "--engine ray does not have it: leave one of them out")
        if dtype is Precision.FASTEST:
            raise typer.BadParameter("the machines of a cluster differ: name the dtype", param_hint="--dtype")
        if dtype is Precision.INT8:
            raise typer.BadParameter("int8 is calibrated by one process: leave --engine ray out", param_hint="--dtype")
        if milvus and name is None:
            raise typer.BadParameter("--engine ray with --milvus needs the name of a store", param_hint="--name")
        given = {option: value for option, value in rays.items() if value is not None}
        options = common | given | {"dtype": dtype.value, "composition": composition}
        return gallery.index_on_cluster(photos, path, model, as_json, options, milvus, name)
    _refuse(rays, "it has an effect with --engine ray only")
    ours |= {"index": "milvus", "uri": milvus, "name": name} if milvus else {}
    gallery.index(Path(photos), model, Path(path), dtype.value, openvino, as_json, composition, common | ours)


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Refuse options that are given."""
    for name, value in options.items():
        if value not in (None, False):
            raise typer.BadParameter(reason, param_hint="--" + name.replace("_", "-"))
