"""Speed of encoding, queries, ranking, search and start-up (for training see benchmark_training.py).

    python train_scripts/benchmark.py                        # BLIP ViT-B/16 at 384 px: some minutes on two idle cores
    python train_scripts/benchmark.py --only ranking search  # some parts
    python train_scripts/benchmark.py --size tiny            # on the emoji checkpoint, to check that it runs

For a GPU see gpu_check.py. Alternatives are timed in turn. Weights and images are random: speed does not depend on
them. A floor is the time that the matrix products of an alternative, or the bytes it reads, would take at the rate
that this machine sustains in large products, timed in turn with it, or in one pass over memory. PERFORMANCE.md has
predictions and results; `--write` replaces its tables.
"""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image
from measuring import Table, Timing, measure, paced, parser_of, side_by_side
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, BertTokenizer
from transformers.models.blip.modeling_blip import BlipAttention

from pvlf_hf import PVLFConfig, PVLFImageProcessor, PVLFModel, PVLFProcessor, encode_by_openvino
from pvlf_hf.embeddings import encoding
from pvlf_hf.embeddings.encoding import prefetch_map
from pvlf_hf.embeddings.int8_encoder import calibrate
from pvlf_hf.embeddings.similarity import top_k
from pvlf_hf.evaluation.ranking import subset_ranks, target_ranks
from pvlf_hf.models.image_processing_pvlf import open_rgb
from pvlf_hf.search.faiss_index import FaissIndex
from pvlf_hf.search.filters import passing_rows
from pvlf_hf.search.indexing import DecodeOptions, least_side, open_cell
from pvlf_hf.search.nearest import nearest
from pvlf_hf.search.vector_index import ExactIndex, VectorIndex

HERE = Path(__file__).parent
TINY = HERE.parent / "model_cards" / "pvlf-emoji-tiny"
CAPTION = "the same dress but shorter and with long dark sleeves"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BF16 = torch.bfloat16

BASES = {  # imports of the Transformers classes that PVLF builds on, and of the models
    "Transformers' own classes": "from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, "
    "AutoTokenizer, BlipForImageTextRetrieval, CLIPModel, PreTrainedModel, ProcessorMixin); "
    "from transformers.image_processing_backends import PilBackend",
    "import pvlf_hf.models": "import pvlf_hf.models",
}


class Options(NamedTuple):
    """Arguments of the command line."""

    size: str
    rounds: int


# ---- models and images ----


def make_model(size: str) -> PVLFModel:
    """Build a model with random weights, in eval mode."""
    torch.manual_seed(0)
    return PVLFModel(PVLFConfig() if size == "base" else AutoConfig.from_pretrained(TINY)).eval()


def make_processor(model: PVLFModel) -> PVLFProcessor:
    """Build a processor for the model's image size, with the vocabulary of `CAPTION`."""
    pixels = model.config.vl_config.vision_config.image_size
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *CAPTION.split()])}
    images = PVLFImageProcessor(size={"shortest_edge": pixels}, crop_size=pixels)
    return PVLFProcessor(images, BertTokenizer(vocab=vocabulary))


def as_transformers(model: PVLFModel) -> PVLFModel:
    """Return a copy with the attention of Transformers' BLIP, the reference of the comparison."""
    model = copy.deepcopy(model)
    for layer in model.backbone.vision_model.encoder.layers:
        layer.self_attn.__class__ = BlipAttention
    return model


def compiled(model: PVLFModel) -> PVLFModel:
    """Compile the image encoder in place, with its weights laid out once."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    model.backbone.vision_model.compile()
    return model


def model_alternatives(size: str) -> dict[str, PVLFModel]:
    """Return the alternatives by name; compiling needs a C++ compiler, OpenVINO its package."""
    model = make_model(size)
    alternatives = {
        "float32, attention of Transformers": as_transformers(model),
        "float32": model,
        "bfloat16": copy.deepcopy(model).to(BF16),
    }
    if size != "tiny" and any(map(shutil.which, ("g++", "c++", "clang++"))):
        alternatives["bfloat16, compiled"] = compiled(copy.deepcopy(alternatives["bfloat16"]))
    if find_spec("openvino"):
        for name in ("float32", "bfloat16"):
            alternatives[f"{name}, OpenVINO"] = encode_by_openvino(copy.deepcopy(alternatives[name]))
    return alternatives


def quantised(model: PVLFModel, pixels: int) -> Callable[[Tensor], Tensor]:
    """Return the image encoder in int8, calibrated on ten random images."""
    images = list(torch.randn(17, 1, 3, pixels, pixels))
    made = calibrate(model, "", images[:10], images[10:], lambda image: image, progress=False)
    return torch.inference_mode()(made.encoder_of(model))


def make_jpeg(width: int, height: int) -> bytes:
    """Make a JPEG of smooth noise, with about as many bytes as a photograph of that size."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    stream = BytesIO()
    PILImage.fromarray(noise).resize((width, height), PILImage.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def image_operations(model: PVLFModel) -> int:
    """Count the operations of the matrix products that embed one image, on shapes alone."""
    with torch.device("meta"):
        shapes, pixels = PVLFModel(model.config).eval(), model.config.vl_config.vision_config.image_size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shapes(target_pixel_values=torch.empty(1, 3, pixels, pixels))
    return counter.get_total_flops()


def cosine(a: Tensor, b: Tensor) -> str:
    """Render the lowest cosine of corresponding rows."""
    return f"{F.cosine_similarity(a.cpu(), b.cpu()).min():.5f}"


# ---- the parts ----


def encoding_speed(options: Options) -> list[Table]:
    """Measure the image encoder, batches prepared ahead, and decoding."""
    batch, models = 4, model_alternatives(options.size)
    pixels = next(iter(models.values())).config.vl_config.vision_config.image_size
    images = torch.randn(batch, 3, pixels, pixels)
    embed = torch.inference_mode()(lambda model: model(target_pixel_values=images).target_embeds)
    calls = {name: partial(embed, model) for name, model in models.items()}
    dtypes = {name: model.dtype for name, model in models.items()}
    if options.size != "tiny" and find_spec("openvino") and find_spec("nncf"):
        calls["int8, OpenVINO"] = partial(quantised(models["float32"], pixels), images)
        dtypes["int8, OpenVINO"] = BF16  # its share is one of the rate of bfloat16
    found = {name: call() for name, call in calls.items()}
    work = image_operations(models["float32"]) * batch
    paces = paced(calls, dtypes, dict.fromkeys(calls, work), options.size, options.rounds)
    first, timings = next(iter(found.values())), {name: pace.timing for name, pace in paces.items()}
    columns = {
        "images a second": [f"{batch / timing.median:.2f}" for timing in timings.values()],
        "share of the matrix rate": [f"{pace.share:.2f}" for pace in paces.values()],
        "least cosine": [cosine(first, embeds) for embeds in found.values()],
    }
    floors = listed([pace.floor.median for pace in paces.values()])
    tables = [Table(f"Image encoder, batch of {batch}; floors {floors} s", timings, columns)]
    return [*tables, ahead(models["bfloat16"], options), *decoding(options)]


def ahead(model: PVLFModel, options: Options) -> Table:
    """Measure `encode_gallery` with batches prepared in turn with encoding, and prefetched."""
    processor, cell = make_processor(model), {"bytes": make_jpeg(1200, 900), "path": None}
    gallery = Dataset.from_dict({"image": [cell] * 16}, Features({"image": Image()}))

    def encode(way: Callable[..., Generator[Any]]) -> Tensor:
        encoding.prefetch_map = way
        return encoding.encode_gallery(model, processor, gallery, batch_size=4, progress=False)

    ways = {
        "in turn": lambda work, tasks, _: (work(task) for task in tasks),
        "1 thread ahead": lambda work, tasks, _: prefetch_map(work, tasks, 1),
        "2 threads ahead": lambda work, tasks, _: prefetch_map(work, tasks, 2),
    }
    try:
        timings = side_by_side({n: partial(encode, way) for n, way in ways.items()}, options.rounds, warmup=0)
    finally:
        encoding.prefetch_map = prefetch_map
    return Table("`encode_gallery`, bfloat16, 16 JPEGs of 1200 x 900", timings, {})


def decoding(options: Options) -> list[Table]:
    """Measure decoding and preparing JPEGs of the sizes of web pages, shops and phones."""
    processor, tables = make_processor(make_model(options.size)), []
    for width, height in [(640, 480), (1600, 1200), (4000, 3000)]:
        cell = {"bytes": make_jpeg(width, height), "path": None}
        ways = {"in full": DecodeOptions(None), "`draft`": DecodeOptions(None, least_side(processor))}
        calls = {name: partial(prepared, processor, cell, how) for name, how in ways.items()}
        timings = side_by_side(calls, options.rounds)
        tables.append(Table(f"Decoding and preparing a JPEG of {width} x {height}, one thread", timings, {}))
    return tables


def prepared(processor: PVLFProcessor, cell: dict[str, Any], how: DecodeOptions) -> Any:
    """Prepare one undecoded image."""
    return processor.process_targets(open_cell(cell, how))


def query_speed(options: Options) -> list[Table]:
    """Measure one query, from reference image and text to its embedding."""
    models = model_alternatives(options.size)
    processor = make_processor(models["float32"])
    reference = open_rgb(make_jpeg(640, 480))

    @torch.inference_mode()
    def embed(model: PVLFModel) -> Tensor:
        return model.get_query_features(**processor.process_queries(reference, CAPTION)).pooler_output

    found = [embed(model) for model in models.values()]
    timings = side_by_side({name: partial(embed, model) for name, model in models.items()}, options.rounds)
    return [Table("One query", timings, {"cosine": [cosine(found[0], embeds) for embeds in found]})]


def ranking_speed(options: Options) -> list[Table]:
    """Measure ranking at the size of CIRR's validation split, and the growth of time and memory."""
    sizes = (4181, 2297) if options.size == "base" else (300, 200)
    inputs = ranking_inputs(*sizes)
    ways = {"plain: float64 scores, sorted": plain_ranks, "one float32 product": product, "`metrics`": fast_ranks}
    if not torch.equal(plain_ranks(*inputs), fast_ranks(*inputs)):
        raise RuntimeError("ranks differ from the plain definition")
    timings = side_by_side({name: partial(way, *inputs) for name, way in ways.items()}, options.rounds)
    memory = {"memory over the inputs": [megabytes(added_memory(partial(way, *inputs))) for way in ways.values()]}
    tables = [Table(f"Ranks and subset ranks, {sizes[0]:,} queries x {sizes[1]:,} images", timings, memory)]

    unit = 10_000 if options.size == "base" else 500
    grown = [(unit // 5, unit), (unit // 5, 4 * unit), (unit * 4 // 5, 4 * unit)]
    timings, memory = {}, {"seconds for 10^9 pairs": [], "memory over the inputs": []}
    for queries, images in grown:
        name, inputs = f"{queries:,} queries x {images:,} images", ranking_inputs(queries, images)[:4]
        timings |= side_by_side({name: partial(target_ranks, *inputs)}, options.rounds)
        memory["seconds for 10^9 pairs"].append(f"{timings[name].median / queries / images * 1e9:.3g}")
        memory["memory over the inputs"].append(megabytes(added_memory(partial(target_ranks, *inputs))))
    return [*tables, Table("`target_ranks`: growth", timings, memory)]


def ranking_inputs(num_queries: int, num_images: int) -> tuple[Tensor, ...]:
    """Make queries near their targets, a gallery, targets, references and subsets, shaped as in CIRR."""
    torch.manual_seed(0)
    gallery = random_units(num_images, 256)
    target = torch.randint(num_images, (num_queries,))
    members = (target[:, None] + torch.arange(6)) % num_images
    queries = F.normalize(gallery[target] + 0.2 * torch.randn(num_queries, 256), dim=1)
    return queries, gallery, target, (target + 1) % num_images, members


def random_units(rows: int, width: int) -> Tensor:
    """Return random rows (rows, width) in float32, normalised in place to save a copy."""
    embeds = torch.randn(rows, width)
    for part in embeds.split(50_000):
        part /= part.norm(dim=1, keepdim=True)
    return embeds


def plain_ranks(queries: Tensor, gallery: Tensor, target: Tensor, exclude: Tensor, subset: Tensor) -> Tensor:
    """Return (2, Q) ranks in the gallery and in the subset, by the definition on the complete matrix."""
    scores = (F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T).float()
    ranking = scores.sort(dim=1, descending=True, stable=True).indices
    ranking = ranking[ranking != exclude[:, None]].view(len(queries), -1)
    members = (ranking[:, :, None] == subset[:, None]).any(dim=2)
    hit = ranking == target[:, None]
    return torch.stack([hit.int().argmax(dim=1), (members.cumsum(dim=1) - 1)[hit]])


def product(queries: Tensor, gallery: Tensor, *_: Tensor) -> Tensor:
    """Compute the product alone, the floor."""
    return queries @ gallery.T


def fast_ranks(queries: Tensor, gallery: Tensor, target: Tensor, exclude: Tensor, subset: Tensor) -> Tensor:
    """Return the same as `plain_ranks`, by the functions of the package."""
    ranks = target_ranks(queries, gallery, target, exclude)
    return torch.stack([ranks, subset_ranks(queries, gallery, subset, target, exclude)])


def added_memory(call: Callable[[], Any]) -> int:
    """Return the peak memory of a call in bytes, beyond the memory held before (Linux only)."""
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory, so that its use counts
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = held("VmRSS")
    call()
    return held("VmHWM") - before


def held(which: str) -> int:
    """Return the resident memory of this process in bytes, now (`VmRSS`) or at its peak (`VmHWM`)."""
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) * 1024


def search_speed(options: Options) -> list[Table]:
    """Measure exact search for one query and many, and approximate search."""
    rows, k = (1_000_000, 50) if options.size == "base" else (5_000, 10)
    queries = random_units(256, 256)
    gallery = random_units(rows, 256)
    tables = [*exact_search(gallery, queries, k, options), filtered_search(gallery, queries, k, options)]
    del gallery
    return [*tables, approximate_search(min(rows, 30_000), queries, options)]


def exact_search(gallery: Tensor, queries: Tensor, k: int, options: Options) -> list[Table]:
    """Measure one query against a pass over the gallery, and many against their product with it."""
    index = ExactIndex(gallery)
    one = {
        "reading the gallery once": lambda: gallery.view(-1).amax(),
        f"exact, the best {k}": lambda: nearest(index, gallery, queries[0], k),
    }
    many = {
        "one product, nothing searched": lambda: queries @ gallery.T,
        f"exact, the best {k}": lambda: top_k(queries, gallery, k),
    }
    title = f"{len(gallery):,} images of width 256 ({megabytes(gallery.nbytes)})"
    return [
        Table(f"One query, {title}", side_by_side(one, options.rounds * 3), {}),
        Table(f"256 queries, {title}", side_by_side(many, options.rounds, warmup=0), {}),
    ]


def filtered_search(gallery: Tensor, queries: Tensor, k: int, options: Options) -> Table:
    """Measure one query with filters that let 1, 10 and 50 % pass, the filter itself included, against none."""
    size = len(gallery)
    index, random = ExactIndex(gallery), np.random.default_rng(0)
    brands = np.array([f"brand {number}" for number in range(100)])
    columns = {"price": random.integers(0, 1000, size), "brand": brands[random.integers(0, 100, size)]}
    metadata = pa.table(columns)

    def search(condition: str | None) -> Tensor:
        rows = None if condition is None else torch.from_numpy(passing_rows(condition, metadata))
        return nearest(index, gallery, queries[0], k, rows)[1]

    filters = {f"price < {10 * share}, {share} % pass": f"price < {10 * share}" for share in (1, 10, 50)}
    filters["a brand of 100, 1 % pass"] = "brand == 'brand 7'"
    ways = {"no filter": partial(search, None)} | {name: partial(search, one) for name, one in filters.items()}
    title = f"One query with a filter, the best {k} of {size:,} images of width 256"
    return Table(title, side_by_side(ways, options.rounds * 3), {})


def approximate_search(rows: int, queries: Tensor, options: Options) -> Table:
    """Measure FAISS's graph on vectors without structure, the worst case, and on vectors of 32 directions."""
    directions = torch.randn(32, 256)
    galleries = {
        "without structure": (random_units(rows, 256), queries),
        "of 32 directions": (random_units(rows, 32) @ directions, random_units(256, 32) @ directions),
    }
    timings: dict[str, Timing] = {}
    columns: dict[str, list[str]] = {"recall@10": [], "seconds to build": [], "index of a million": []}
    for name, pair in galleries.items():
        gallery, unit_queries = (F.normalize(embeds, dim=1) for embeds in pair)
        start = time.perf_counter()
        indices = {"exact": ExactIndex(gallery), "FAISS": FaissIndex(gallery)}
        built = time.perf_counter() - start
        for way, index in indices.items():
            timings |= side_by_side({f"{way}, {name}": partial(best_ten, index, unit_queries[:32])}, options.rounds)
        columns["recall@10"] += [f"{recall(index, unit_queries, gallery):.3f}" for index in indices.values()]
        columns["seconds to build"] += ["0", f"{built:.1f}"]
        bytes_of = (indices["exact"].compared.nbytes, serialized(indices["FAISS"].graph))
        columns["index of a million"] += [megabytes(1e6 / rows * size) for size in bytes_of]
    return Table(f"32 queries in turn, the best 10 of {rows:,} images", timings, columns)


def best_ten(index: VectorIndex, queries: Tensor) -> list[set[int]]:
    """Return the ten candidates of an index for each query."""
    return [set(index.candidates(query, 10).tolist()) for query in queries]


def recall(index: VectorIndex, queries: Tensor, gallery: Tensor) -> float:
    """Return the fraction of the ten nearest that an index finds."""
    nearest = top_k(queries, gallery, 10)[1].tolist()
    return float(
        np.mean(
            [len(ten.intersection(best)) / 10 for ten, best in zip(best_ten(index, queries), nearest, strict=True)]
        )
    )


def serialized(graph: Any) -> int:
    """Return the bytes of a FAISS index, vectors included."""
    import faiss

    return faiss.serialize_index(graph).nbytes


def startup_speed(options: Options) -> list[Table]:
    """Measure importing the models, and reading a checkpoint."""
    calls = {name: partial(in_new_process, code) for name, code in BASES.items()}
    imports = side_by_side(calls, options.rounds * 2)
    with tempfile.TemporaryDirectory(dir=HERE.parent) as folder:  # /tmp may be memory, which is not read from
        make_model(options.size).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        size, shares = file.stat().st_size, []
        for _ in range(options.rounds):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # evicted from the page cache
            shares.append(int(in_new_process(READING.format(folder=folder))) / size)
        loading = side_by_side({"loading a checkpoint": partial(in_new_process, READING.format(folder=folder))}, 1)
    read = {"bytes read from disk / bytes of the file": [f"{median(shares):.3f}"]}
    return [
        Table("Import, in a fresh process", imports, {}),
        Table(f"Checkpoint of {size / 1e6:.0f} MB, import included", loading, read),
    ]


READING = """
from pvlf_hf import PVLFModel
from transformers.utils import logging
logging.disable_progress_bar()
count = lambda: int(open("/proc/self/io").read().split(" read_bytes: ".strip())[1].split()[0])
before = count()
total = sum(float(p.detach().sum()) for p in PVLFModel.from_pretrained({folder!r}).parameters())
print(count() - before)
"""


def in_new_process(code: str) -> str:
    """Return what a new Python process prints."""
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout


# ---- rendering ----


def listed(numbers: list[float]) -> str:
    """Render the distinct numbers, in their order."""
    return " / ".join(dict.fromkeys(f"{number:.2g}" for number in numbers))


def megabytes(size: float) -> str:
    """Render a size in bytes as megabytes."""
    return f"{size / 1e6:,.0f} MB"


PARTS: dict[str, Callable[[Options], list[Table]]] = {
    "encoding": encoding_speed,
    "query": query_speed,
    "ranking": ranking_speed,
    "search": search_speed,
    "startup": startup_speed,
}


def main() -> None:
    """Measure, print Markdown and write JSON."""
    parser = parser_of("benchmark.py", __doc__, PARTS, rounds=3)
    args = parser.parse_args()
    options = Options(args.size, args.rounds)
    measure("benchmark.py", {name: partial(part, options) for name, part in PARTS.items()}, args)


if __name__ == "__main__":
    main()
