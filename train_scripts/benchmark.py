"""Speed of encoding, ranking, searching and starting up: alternatives in turn, in one run, as ratios.

    python train_scripts/benchmark.py                 # BLIP ViT-B/16 at 384 px: some ten minutes on two cores
    python train_scripts/benchmark.py --size tiny     # the same on toy sizes: does it run?
    python train_scripts/benchmark.py --only ranking search
    python train_scripts/benchmark.py --only encoding --device cuda

Weights, pictures and embeddings are random: speed does not depend on them. What was found, with floors and what was
predicted, is in PERFORMANCE.md, whose tables `--write` renews. Training: benchmark_training.py.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from measuring import matrix_rate, peak_memory, side_by_side, table
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.blip.modeling_blip import BlipAttention

from pvlf_hf import PVLFConfig, PVLFModel
from pvlf_hf.metrics import subset_ranks, target_ranks, top_k
from pvlf_hf.vector_index import ExactIndex, FaissIndex

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "PERFORMANCE.md"
TINY = HERE.parent / "model_cards" / "pvlf-emoji-tiny"


def make_model(size: str, device: str) -> PVLFModel:
    """Random weights, in eval mode."""
    torch.manual_seed(0)
    config = PVLFConfig() if size == "base" else AutoConfig.from_pretrained(TINY)
    return PVLFModel(config).to(device).eval()


def as_written_out(model: PVLFModel) -> PVLFModel:
    """A copy with Transformers' own attention in the ViT, as the baseline computes it."""
    copy = deepcopy(model)
    for layer in copy.backbone.vision_model.encoder.layers:
        layer.self_attn.__class__ = BlipAttention
    return copy


def embeds(rows: int, width: int = 256) -> torch.Tensor:
    """float32 `(rows, width)` unit vectors."""
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)), dim=1)


@torch.inference_mode()
def encoding(size: str, device: str, rounds: int) -> str:
    """Gallery pictures in batches of four (CPU) or 64, without decoding; and a single query, picture and words."""
    model = make_model(size, device)
    ways = {
        "float32, attention written out (the baseline's)": as_written_out(model),
        "float32": model,
        "bfloat16": deepcopy(model).to(torch.bfloat16),
    }
    pixels = model.config.vl_config.vision_config.image_size
    batch = 64 if device != "cpu" else 4
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    ids = torch.full((1, 12), 5, device=device)
    text = []
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for what, its_rounds in (("gallery", rounds), ("query", 2 * rounds)):
        for name, way in ways.items():
            if what == "gallery":
                calls[name] = lambda way=way: way.get_image_features(images).pooler_output.cpu()
            else:
                calls[name] = lambda way=way: way.get_query_features(images[:1], ids).pooler_output.cpu()
        first, *others = [call() for call in calls.values()]
        cosines = ", ".join(f"{(first * other).sum(1).min().item():.6f}" for other in others)
        rows = f"{batch} pictures" if what == "gallery" else "one query"
        text += [f"**Encoding: {rows}**", "", table(side_by_side(calls, its_rounds)), ""]
        text += [f"Lowest cosine with the first: {cosines}.", ""]
    rates = [matrix_rate(), matrix_rate(dtype=torch.bfloat16)]
    text.append(f"Matrix products: float32 {rates[0] / 1e9:.0f}, bfloat16 {rates[1] / 1e9:.0f} GFLOP/s.")
    return "\n".join(text)


def plain_ranks(queries: torch.Tensor, gallery: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The definition at once: float64 products, ties in gallery order, sorted."""
    scores = (queries.double() @ gallery.double().T).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return (order == target[:, None]).int().argmax(dim=1)


def ranking(size: str, device: str, rounds: int) -> str:
    """CIRR's validation split: 4,181 queries, 2,297 images, subsets of six."""
    count, images = (4181, 2297) if size == "base" else (300, 200)
    queries, gallery = embeds(count), embeds(images)
    target = torch.arange(count) % images
    subset = (target[:, None] + torch.arange(6)) % images
    calls: dict[str, Callable[[], object]] = {
        "all at once, float64, sorted": lambda: plain_ranks(queries, gallery, target),
        "target_ranks": lambda: target_ranks(queries, gallery, target),
        "target_ranks and subset_ranks": lambda: (
            target_ranks(queries, gallery, target),
            subset_ranks(queries, gallery, subset, target),
        ),
    }
    timings = side_by_side(calls, rounds)
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport torch, benchmark\n"
        "from pvlf_hf.metrics import target_ranks\n"
        f"q, g = benchmark.embeds({count}), benchmark.embeds({images})\n"
    )
    scratch = peak_memory(program + f"target_ranks(q, g, torch.arange({count}) % {images})") - peak_memory(program)
    return "\n".join(
        [
            f"**Ranking: {count} queries, {images} images of width 256**",
            "",
            table(timings),
            "",
            f"Memory beyond the embeddings: {scratch / 2**20:.0f} MiB.",
        ]
    )


def search(size: str, device: str, rounds: int) -> str:
    """The 50 best of a million, for one query and for 256; FAISS's graph with its recall, on fewer."""
    images = 1_000_000 if size == "base" else 20_000
    gallery, queries = embeds(images), embeds(256)
    index, query = ExactIndex(gallery), queries[0]
    one = side_by_side(
        {"the bytes read once (sum)": gallery.sum, "exact, 50 best": lambda: index.candidates(query, 50)}, rounds
    )
    many = side_by_side(
        {"the matrix product": lambda: queries @ gallery.T, "top_k, 50 best": lambda: top_k(queries, gallery, 50)},
        max(1, rounds // 2),
    )
    fewer = gallery[: 50_000 if size == "base" else 5_000]
    graph, exact = FaissIndex(fewer), ExactIndex(fewer)
    found = [len({*graph.candidates(q, 10).tolist()} & {*best(exact, q, 10)}) for q in queries]
    approximate = side_by_side(
        {"exact": lambda: exact.candidates(query, 10), "FAISS": lambda: graph.candidates(query, 10)}, rounds, calls=10
    )
    return "\n".join(
        [
            f"**Search: one query, {images:,} images of width 256 ({gallery.nbytes / 1e9:.2f} GB)**",
            "",
            table(one),
            "",
            f"**Search: 256 queries, {images:,} images**",
            "",
            table(many),
            "",
            f"**Search: one query, {len(fewer):,} random images, 10 best**",
            "",
            table(approximate),
            "",
            f"FAISS finds {sum(found) / 10 / len(found):.1%} of the ten best.",
        ]
    )


def best(index: ExactIndex, query: torch.Tensor, k: int) -> list[int]:
    """The k best among an index's candidates."""
    rows = index.candidates(query, k)
    return rows[(index.embeds[rows] @ query).topk(k).indices].tolist()


def startup(size: str, device: str, rounds: int) -> str:
    """Imports in fresh processes, and the bytes that loading the emoji checkpoint reads."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    base = (
        "import torch; from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, "
        "BlipForImageTextRetrieval, CLIPModel, Pipeline, PreTrainedModel, ProcessorMixin; "
        "from transformers.image_processing_backends import PilBackend; from transformers.pipelines import pipeline"
    )
    timings = side_by_side(
        {"torch, and what we use of transformers": run(base), "import pvlf_hf": run("import pvlf_hf")}, rounds
    )
    code = (
        "import pvlf_hf; from transformers import AutoModel\n"
        "def read(): return int(open('/proc/self/io').read().split()[1])\n"
        f"before = read(); AutoModel.from_pretrained({str(TINY)!r}); print(read() - before)"
    )
    text = ["**Start-up: fresh processes**", "", table(timings)]
    if Path("/proc/self/io").exists():
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        weights = (TINY / "model.safetensors").stat().st_size
        text += [
            "",
            f"Loading read {int(done.stdout.split()[-1]):,} bytes by calls; the weights, mapped, are {weights:,}.",
        ]
    return "\n".join(text)


PARTS = {"encoding": encoding, "ranking": ranking, "search": search, "startup": startup}


def written(document: str, found: dict[str, str]) -> str:
    """The document with the tables of the parts that were measured."""
    for name, text in found.items():
        start, end = f"<!-- {name}: written by benchmark.py -->", f"<!-- end of {name} -->"
        head, _, rest = document.partition(start)
        document = f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}"
    return document


def main() -> None:
    """Measures, prints Markdown and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "base"], default="base")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--device", default="cpu", help="Where encoders run.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--write", action="store_true", help="Renew the tables of PERFORMANCE.md.")
    args = parser.parse_args()
    found = {}
    for name in args.only:
        found[name] = PARTS[name](args.size, args.device, args.rounds)
        print(found[name] + "\n", flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {"size": args.size, "machine": machine, "threads": torch.get_num_threads(), "parts": found}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if args.write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
