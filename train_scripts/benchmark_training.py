"""Speed and memory of training: cached features, captions by length, both encoders, batches larger than memory.

    python train_scripts/benchmark_training.py               # BLIP ViT-B/16 at 384 px: 20 minutes on two cores
    python train_scripts/benchmark_training.py --size tiny   # on the emoji checkpoint, to check that it runs

Alternatives are timed in turn. Weights and images are random: neither speed nor memory depends on them. A step is
forward, backward, clipping and AdamW; with cached or encoded images it includes making the batch, in the same process.
The floor of an alternative is the time its matrix products would take at the rate of large products on the same
machine, in the same dtype, timed in turn with it. PERFORMANCE.md has predictions and results; `--write` replaces its
tables.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from benchmark import CAPTION, TINY, make_processor
from datasets import Dataset, Image
from measuring import Pace, Table, Timing, formats, measure, paced, parser_of, peak_memory, side_by_side
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoProcessor
from transformers.models.blip.modeling_blip import BlipAttention

from pvlf_hf import PVLFConfig, PVLFModel, cache_features, focal_info_nce, load_emoji_cir_train
from pvlf_hf.training.batches import PVLFCollator
from pvlf_hf.training.cpu_dropout import fast_cpu_dropout
from pvlf_hf.training.cpu_memory import kept_memory
from pvlf_hf.training.feature_cache import accept_cached_features
from pvlf_hf.training.gradient_cache import embed_in_chunks
from pvlf_hf.training.text_groups import GROUP_SIZE, encode_captions

HERE = Path(__file__).parent
IMPORT = f"import sys; sys.path.insert(0, {str(HERE)!r}); import benchmark_training; "  # in a fresh process


@dataclass(frozen=True)
class Way:
    """How a training step is computed."""

    fused: bool = True  # fused attention in the ViT
    whole: bool = False  # computes the last fusion layer at every position, although two are read
    plain_dropout: bool = False  # PyTorch's, not the trainer's for CPUs
    bf16: bool = False  # autocast
    checkpointing: bool = False  # activation checkpointing, layer by layer
    one_pass: bool = False  # references and targets through the ViT together
    chunk_size: int | None = None  # rows a chunk of gradient caching


EAGER = Way(fused=False, whole=True, plain_dropout=True)  # the baseline's
BOTH = {
    "as the baseline: eager attention, float32": EAGER,
    "fused attention": Way(),
    "fused, references and targets in one pass": Way(one_pass=True),
    "fused, activation checkpointing": Way(checkpointing=True),
    "fused, bf16": Way(bf16=True),
    "fused, bf16, activation checkpointing": Way(bf16=True, checkpointing=True),
}


def make_model(size: str, finetuning: str) -> PVLFModel:
    """Build a model with random weights, in train mode."""
    torch.manual_seed(0)
    config = PVLFConfig() if size == "base" else AutoConfig.from_pretrained(TINY, dropout=0.5)
    model = PVLFModel(config)
    model.set_finetuning(finetuning)
    return model.train()


def make_triplets(folder: Path, batch: int, pixels: int) -> Dataset:
    """Make as many triplets as a batch has, each with two images of its own."""
    generator = np.random.default_rng(0)
    files = []
    for number in range(2 * batch):
        noise = generator.integers(0, 256, (pixels // 8, pixels // 6, 3), dtype=np.uint8)
        files.append(str(folder / f"{number}.jpg"))
        PILImage.fromarray(noise).resize((pixels * 4 // 3, pixels)).save(files[-1])
    columns = {"reference": files[:batch], "target": files[batch:], "target_id": files[batch:]}
    triplets = Dataset.from_dict({**columns, "caption": [CAPTION] * batch})
    return triplets.cast_column("reference", Image()).cast_column("target", Image())


def make_batch(model: PVLFModel, batch: int) -> dict[str, Tensor]:
    """Make pixel values and token ids of random triplets."""
    pixels = model.config.vl_config.vision_config.image_size
    ids = torch.full((batch, 12), 5)
    images = torch.randn(2, batch, 3, pixels, pixels)
    return {
        "pixel_values": images[0],
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "target_pixel_values": images[1],
    }


def make_optimizer(model: PVLFModel) -> torch.optim.Optimizer:
    """Make the Trainer's default AdamW, with its states in memory as after the first step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def step(model: PVLFModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], way: Way = Way()) -> Tensor:
    """Do one training step and return the loss before it."""
    set_way(model, way)
    autocast = torch.autocast(model.device.type, torch.bfloat16) if way.bf16 else nullcontext()
    with nullcontext() if way.plain_dropout else fast_cpu_dropout(model):
        with autocast:
            loss = loss_of(model, batch, way)
        loss.backward()  # layers that run again need the same dropout
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def loss_of(model: PVLFModel, batch: dict[str, Tensor], way: Way) -> Tensor:
    """Compute the loss of a batch."""
    if way.one_pass:
        images = torch.cat([batch["pixel_values"], batch["target_pixel_values"]])
        reference, target = model.get_image_features(images).last_hidden_state.chunk(2)
        features = {"image_tokens": reference, "target_tokens": target[:, :1]}
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        accept_cached_features(model)
        return model(**texts, encoder_outputs=features).loss
    if way.chunk_size:
        output = embed_in_chunks(model, batch, way.chunk_size)
        return model.loss(output.query_embeds, output.target_embeds)
    return model(**batch, output_hidden_states=way.whole).loss


def set_way(model: PVLFModel, way: Way) -> None:
    """Set the model's attention, its own or that of Transformers, and activation checkpointing."""
    if way.fused:
        model.backbone.fuse_attention()
    else:
        for layer in model.backbone.vision_model.encoder.layers:
            layer.self_attn.__class__ = BlipAttention
    model.activation_checkpointing_enable() if way.checkpointing else model.activation_checkpointing_disable()


def operations(model: PVLFModel, batch: dict[str, Any]) -> int:
    """Count the operations of the matrix products of a forward and backward pass, on shapes alone."""
    with torch.device("meta"):
        shapes = PVLFModel(model.config)
    accept_cached_features(shapes)
    for name, parameter in shapes.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    left_out = ("attention_mask", "target_ids")
    rows = send_to_device({name: value for name, value in batch.items() if name not in left_out}, "meta")
    with FlopCounterMode(display=False) as counter:
        output = shapes.train()(**rows, return_loss=False)
        (output.query_embeds * output.target_embeds).sum().backward()
    return counter.get_total_flops()


def cache(size: str, rounds: int) -> list[Table]:
    """Measure steps that encode their images against steps that read them from the feature cache.

    Each table is measured as PyTorch is, and with memory that the C library keeps, as the trainer has it.
    """
    return [encoded_or_cached(size, mode, rounds, keep) for mode in ("frozen", "text") for keep in (False, True)]


def encoded_or_cached(size: str, finetuning: str, rounds: int, keep: bool) -> Table:
    """Measure one mode of [`cache`], with kept memory or without."""
    model = make_model(size, finetuning)
    processor, optimizer = make_processor(model), make_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        triplets = make_triplets(Path(folder), 8, model.config.vl_config.vision_config.image_size)
        known, collate_known = cache_features(model, processor, triplets, folder, batch_size=4, progress=False)
        accept_cached_features(model)
        collate = PVLFCollator(processor)

        def encoded() -> dict[str, Tensor]:
            return collate([triplets[row] for row in range(8)])

        def cached() -> dict[str, Tensor]:
            return collate_known([known[row] for row in range(8)])

        ways = {
            "as the baseline: encoded, eager attention": (encoded, EAGER),
            "encoded": (encoded, Way()),
            "encoded, bf16": (encoded, Way(bf16=True)),
            "cached": (cached, Way()),
            "cached, bf16": (cached, Way(bf16=True)),
        }
        ways = {name: (batch, way) for name, (batch, way) in ways.items() if is_native(way)}
        calls = {name: lambda b=batch, w=way: step(model, optimizer, b(), w) for name, (batch, way) in ways.items()}
        work = {name: operations(model, batch()) for name, (batch, _) in ways.items()}
        with kept_memory(keep):
            paces = paced(calls, {name: dtype_of(way) for name, (_, way) in ways.items()}, work, size, rounds)
        peaks = [peak(size, finetuning, batch(), way, keep, steps=3) for batch, way in ways.values()]
    title = f"finetuning={finetuning}, batch 8" + ", memory kept" * keep
    return Table(title, timings_of(paces), floors(paces) | memory(peaks))


def captions(size: str, rounds: int) -> list[Table]:
    """Measure the emoji checkpoint's text encoder, forward and backward, on captions in one batch and in groups."""
    model, processor = make_model("tiny", "text"), AutoProcessor.from_pretrained(TINY)
    texts = list(load_emoji_cir_train()["caption"])
    tables = []
    for batch in (64, 128):
        inputs = processor(text=texts[:: len(texts) // batch][:batch])
        padding = 1 - inputs["attention_mask"].float().mean().item()
        groups = f"in groups of {GROUP_SIZE}"
        ways = {"in one batch": model.encode_text_tokens, groups: partial(encode_captions, model)}
        timings = side_by_side({name: partial(train_text, encode, **inputs) for name, encode in ways.items()}, rounds)
        title = f"Text encoder, {batch} captions of EmojiCIR, {padding:.0%} padding in one batch"
        tables.append(Table(title, timings, {}))
    return tables


def train_text(encode: Callable[..., tuple[Tensor, Tensor]], input_ids: Tensor, attention_mask: Tensor) -> None:
    """Encode captions, forward and backward; add to the gradients."""
    tokens, _ = encode(input_ids, attention_mask)
    (tokens * attention_mask[..., None]).square().mean().backward()


def is_native(way: Way) -> bool:
    """Return whether the processor computes natively in the alternative's dtype."""
    return not way.bf16 or torch.bfloat16 in formats()


def dtype_of(way: Way) -> torch.dtype:
    """Return the dtype that the alternative multiplies matrices in."""
    return torch.bfloat16 if way.bf16 else torch.float32


def timings_of(paces: dict[str, Pace]) -> dict[str, Timing]:
    """Return the timings of paces."""
    return {name: pace.timing for name, pace in paces.items()}


def floors(paces: dict[str, Pace]) -> dict[str, list[str]]:
    """Return columns of floors and of the shares of the matrix rate."""
    return {
        "floor, s": [f"{pace.floor.median:.2g}" for pace in paces.values()],
        "share of the matrix rate": [f"{pace.share:.2f}" for pace in paces.values()],
    }


def both(size: str, rounds: int) -> list[Table]:
    """Measure ways to train both encoders."""
    ways = {name: way for name, way in BOTH.items() if is_native(way)}
    paces = timed_steps(size, {name: (4, way) for name, way in ways.items()}, rounds)
    batch = make_batch(make_model(size, "both"), 4)
    columns = floors(paces) | memory([peak(size, "both", batch, way) for way in ways.values()])
    return [Table("finetuning=both, batch 4", timings_of(paces), columns)]


def memory(peaks: list[int]) -> dict[str, list[str]]:
    """Return a column of peaks, with their share of the first."""
    return {"peak memory, GB": [f"{peak / 1e9:.2f} ({peak / peaks[0]:.0%})" for peak in peaks]}


def large_batch(size: str, rounds: int) -> list[Table]:
    """Measure gradient caching, compared by the triplet, and the loss in chunks."""
    tables = []
    for model_size, small, large in [("tiny", 4, 32)] if size == "tiny" else [("base", 2, 8), ("tiny", 64, 1024)]:
        ways = {
            f"batch {small}": (small, Way()),
            f"batch {large} in chunks of {small}": (large, Way(chunk_size=small)),
            f"batch {large}": (large, Way()),
        }
        model = make_model(model_size, "both")  # peaks first: what a large step leaves here takes memory from them
        peaks = memory([peak(model_size, "both", make_batch(model, rows), way) for rows, way in ways.values()])
        paces = timed_steps(model_size, ways, rounds)
        each = by_the_triplet(timings_of(paces), [rows for rows, _ in ways.values()])
        tables.append(Table(f"{model_size}, finetuning=both: seconds a triplet", each, peaks))

    queries, chunks = 8192 if size == "base" else 1024, {"whole": None, "in chunks of 256": 256}
    timings = side_by_side({name: partial(loss, queries, chunk) for name, chunk in chunks.items()}, rounds)
    peaks = memory([peak_memory(f"{IMPORT}benchmark_training.loss({queries}, {chunk})") for chunk in chunks.values()])
    return [*tables, Table(f"Loss of {queries:,} queries and targets, forward and backward", timings, peaks)]


def by_the_triplet(timings: dict[str, Timing], rows: list[int]) -> dict[str, Timing]:
    """Divide the seconds of batches by their sizes."""
    each = zip(timings.items(), rows, strict=True)
    return {name: Timing(name, [seconds / count for seconds in timing.seconds]) for (name, timing), count in each}


def timed_steps(size: str, ways: dict[str, tuple[int, Way]], rounds: int) -> dict[str, Pace]:
    """Time ways of training both encoders, each a batch size and a way."""
    model = make_model(size, "both")
    optimizer = make_optimizer(model)
    batches = {rows: make_batch(model, rows) for rows, _ in ways.values()}
    counted = {rows: operations(model, batch) for rows, batch in batches.items()}
    step(model, optimizer, make_batch(model, 1))  # warms up
    calls = {name: partial(step, model, optimizer, batches[rows], way) for name, (rows, way) in ways.items()}
    # With checkpointing and with chunks layers run forward twice: four operations in place of three.
    again = {name: 4 / 3 if way.checkpointing or way.chunk_size else 1.0 for name, (_, way) in ways.items()}
    work = {name: counted[rows] * again[name] for name, (rows, _) in ways.items()}
    return paced(calls, {name: dtype_of(way) for name, (_, way) in ways.items()}, work, size, rounds, warmup=0)


def loss(queries: int, chunk_size: int | None) -> None:
    """Compute focal InfoNCE of random embeddings, forward and backward."""
    embeds = torch.nn.functional.normalize(torch.randn(2, queries, 256), dim=-1).requires_grad_()
    focal_info_nce(*embeds, chunk_size=chunk_size).backward()


def peak(size: str, finetuning: str, batch: Mapping[str, Any], way: Way, keep: bool = False, steps: int = 1) -> int:
    """Return the peak memory, in bytes, of a new process that does steps on a batch, with kept memory or without."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(dict(batch), file.name)
        arguments = f"{size!r}, {finetuning!r}, {file.name!r}, benchmark_training.{way!r}, {keep}, {steps}"
        return peak_memory(f"{IMPORT}benchmark_training.do_steps({arguments})")


def do_steps(size: str, finetuning: str, batch: str, way: Way, keep: bool, steps: int) -> None:
    """Do the steps that [`peak`] measures, on a batch in a file."""
    model = make_model(size, finetuning)
    accept_cached_features(model)
    optimizer, rows = make_optimizer(model), torch.load(batch)
    with kept_memory(keep):
        for _ in range(steps):
            step(model, optimizer, rows, way)


PARTS: dict[str, Callable[[str, int], list[Table]]] = {
    "cache": cache,
    "captions": captions,
    "both": both,
    "large_batch": large_batch,
}


def main() -> None:
    """Measure, print Markdown and write JSON."""
    args = parser_of("benchmark_training.py", __doc__, PARTS, rounds=2).parse_args()
    parts = {name: partial(part, args.size, args.rounds) for name, part in PARTS.items()}
    measure("benchmark_training.py", parts, args)


if __name__ == "__main__":
    main()
