"""Correctness and speed on a CUDA GPU, in one command of under eight minutes.

    python train_scripts/gpu_check.py --write                   # checks, speed, profile; its section of PERFORMANCE.md
    python train_scripts/gpu_check.py --device cpu --size tiny  # the same code at toy size, before a GPU is rented

The checks are those that a CPU cannot answer for: half precision, fused attention, compilation, CUDA graphs, FSDP and
determinism. Weights and images are random. A check compares two computations of the same numbers; a distance is the
norm of their difference over that of the second. On a CPU, compilation stops before code is generated, and what needs
CUDA is skipped by name.
"""

import argparse
import copy
import gc
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, send_to_device
from benchmark import image_operations, make_processor
from benchmark_training import Way, make_optimizer, operations, step
from benchmark_training import make_batch as make_triplets
from gpu_hours import DUAL_ENCODERS
from measuring import DOCUMENT, Pace, Table, described, machine, markdown, paced, waited_for, write_between
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from pvlf_hf import PVLFConfig, PVLFModel, PVLFTrainer, PVLFTrainingArguments
from pvlf_hf.evaluation.results import environment
from pvlf_hf.training.feature_cache import accept_cached_features

ENCODERS = {
    "BLIP base, 384 px": DUAL_ENCODERS["Salesforce/blip-itm-base-coco"],
    "CLIP-L, 224 px": DUAL_ENCODERS["openai/clip-vit-large-patch14"],
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

ENCODING_TARGET, TRAINING_TARGET = 0.5, 0.35
"""Shares of the matrix rate to reach in encoding and in a training step of both encoders (our choice)."""

LIMIT = 480
"""Seconds after which no further part starts."""

ROUNDINGS = 32
"""Roundings that a distance may amount to. A layer rounds about ten times in sequence, forward and again backward:
for the 26 layers of CLIP-L the root of 520 independent roundings, 23, is expected of a gradient."""

SUMS = 64
"""Factor for float32, where products are summed in float32, too: about the root of their 3,072 terms."""


class Setup(NamedTuple):
    """What the parts run on."""

    size: str
    device: str
    rounds: int

    @property
    def backend(self) -> str:
        """Backend of `torch.compile`; on a CPU the one that traces and runs, because generating code takes minutes."""
        return "inductor" if self.device == "cuda" else "aot_eager"


class Row(NamedTuple):
    """Outcome of a check."""

    check: str
    distance: str
    bound: str
    outcome: str


def compared(check: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Row]:
    """Compare tensors by name, with the bound of a dtype."""
    bound = ROUNDINGS * torch.finfo(dtype).eps / 2 * (SUMS if dtype == torch.float32 else 1)
    for name, wanted in theirs.items():
        distance = ((ours[name] - wanted).norm() / wanted.norm()).item()
        outcome = "passed" if distance <= bound else "failed"
        yield Row(f"{check}: {name}", f"{distance:.2g}", f"{bound:.2g}", outcome)


def skipped(check: str, reason: str) -> Row:
    """Return the row of a check that cannot run here."""
    return Row(check, "", "", f"skipped: {reason}")


# ---- models and inputs ----


def make_model(setup: Setup, encoder: str = "BLIP base, 384 px", **settings: Any) -> PVLFModel:
    """Build a model with random weights on the device, in eval mode."""
    torch.manual_seed(0)
    vl_config = copy.deepcopy(ENCODERS[encoder])
    if setup.size == "tiny":
        for side in ("vision_config", "text_config"):
            vl_config[side] |= SMALL
        vl_config["vision_config"] |= {"image_size": 32, "patch_size": 8}
        vl_config["projection_dim" if vl_config["model_type"] == "clip" else "image_text_hidden_size"] = 32
        settings = {"fusion_layers": 1, "fusion_ffn_size": 64} | settings
    return PVLFModel(PVLFConfig(vl_config=vl_config, **settings)).to(setup.device).eval()


def make_batch(model: PVLFModel, rows: int) -> dict[str, Tensor]:
    """Make random triplets on the model's device; every other caption is padded."""
    torch.manual_seed(1)
    batch = make_triplets(model, rows)
    batch["attention_mask"][::2, -4:] = 0
    return send_to_device(batch, model.device)


def make_cached_batch(model: PVLFModel, rows: int) -> dict[str, Any]:
    """Make random encoder outputs on the model's device, as the feature cache holds them."""
    vision, width = model.config.vl_config.vision_config, model.config.joint_width
    tokens = {"image_tokens": 1 + (vision.image_size // vision.patch_size) ** 2, "target_tokens": 1, "text_tokens": 12}
    torch.manual_seed(1)
    features = {name: torch.randn(rows, count, width).half() for name, count in tokens.items()}
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[::2, -4:] = 0
    features["text_position"] = torch.zeros(rows, dtype=torch.long)
    return send_to_device({"encoder_outputs": features, "attention_mask": mask}, model.device)


def outcome(
    model: PVLFModel,
    embed: Callable[[], tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0**12,
) -> dict[str, Tensor]:
    """Return embeddings, and the gradient of the sum of their cosines, computed under autocast to a dtype.

    Gradients are scaled, because float16 would lose small ones, and by less where it overflows, as in training.
    """
    model.zero_grad()
    with torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext():
        first, second = embed()
        total = scale * (first * second).sum()
    total.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / scale
    if not gradient.isfinite().all() and scale > 1:
        return outcome(model, embed, dtype, scale / 16)
    return {"embeddings": torch.cat([first, second]).detach(), "gradient": gradient}


def triplets(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Embed queries and targets."""
    output = model(**batch, return_loss=False)
    return output.query_embeds, output.target_embeds


def images(model: PVLFModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Embed references and targets as images."""
    parts = [model.get_image_features(batch[name]).pooler_output for name in ("pixel_values", "target_pixel_values")]
    return parts[0], parts[1]


# ---- checks ----


def half_precision(setup: Setup) -> Iterator[Row]:
    """Compare autocast to bfloat16 and float16 with float32."""
    for encoder in ENCODERS:
        model = make_model(setup, encoder)
        embed = partial(triplets, model, make_batch(model, 4))
        wanted = outcome(model, embed)
        for dtype in (torch.bfloat16, torch.float16):
            name = f"{encoder}, autocast to {str(dtype).removeprefix('torch.')}, against float32"
            yield from compared(name, outcome(model, embed, dtype), wanted, dtype)


def fused_attention(setup: Setup) -> Iterator[Row]:
    """Compare the kernels of fused attention in the image encoder, and of the fusion, with plain products."""
    model = make_model(setup)
    batch = make_batch(model, 4)
    embed = partial(images, model, batch)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = outcome(model, embed)
    for backend, dtype in (
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    ):
        name = f"{backend.name.lower()}, {str(dtype).removeprefix('torch.')}, against plain products in float32"
        try:
            with sdpa_kernel(backend):
                found = outcome(model, embed, dtype)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            yield skipped(name, f"PyTorch has no such kernel for these inputs on {setup.device}")
        else:
            yield from compared(name, found, wanted, dtype)
    embed = partial(triplets, model, batch)
    model.set_attn_implementation({"": "eager"})
    wanted = outcome(model, embed)
    for implementation, dtype in (("sdpa", torch.float32), ("flash_attention_2", torch.bfloat16)):
        name = f"fusion by {implementation}, against eager in float32"
        if implementation != "sdpa" and (setup.device == "cpu" or not find_spec("flash_attn")):
            yield skipped(name, "needs CUDA and the package flash-attn")
            continue
        model.set_attn_implementation({"": implementation})
        yield from compared(name, outcome(model, embed, dtype), wanted, dtype)


def compilation(setup: Setup) -> Iterator[Row]:
    """Compare the compiled image encoder and training step with eager ones, in float32 at toy size."""
    model = make_model(setup._replace(size="tiny"))
    batch = make_batch(model, 4)
    for name, embed in (("image encoder", images), ("step", triplets)):
        compiled = copy.deepcopy(model)
        (compiled.backbone.vision_model if embed is images else compiled).compile(backend=setup.backend)
        found, wanted = (outcome(one, partial(embed, one, batch)) for one in (compiled, model))
        yield from compared(f"compiled {name}, against eager", found, wanted, torch.float32)


def cached_step(
    model: PVLFModel, optimizer: torch.optim.Optimizer, batch: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    """Do a training step of cached features that waits for nothing on the device, and return the loss before it."""
    optimizer.zero_grad()
    with torch.autocast(model.device.type, dtype, cache_enabled=False) if dtype != torch.float32 else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 5.0)
    optimizer.step()
    return loss.detach()


def cached_steps(setup: Setup, rows: int, dtype: torch.dtype, **settings: Any) -> Callable[[], Tensor]:
    """Return the function that does the next step of a model with frozen encoders, always on the same batch."""
    model = make_model(setup, **settings)
    model.set_finetuning("frozen")
    accept_cached_features(model.train())
    trained = [p for p in model.parameters() if p.requires_grad]
    # Its count of steps is on the device, too.
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05, fused=True, capturable=setup.device == "cuda")
    return partial(cached_step, model, optimizer, make_cached_batch(model, rows), dtype)


def captured(call: Callable[[], Tensor], setup: Setup) -> Callable[[], Tensor]:
    """Call a step three times, capture a fourth in a CUDA graph, and return its replay; on a CPU the step itself."""
    if setup.device == "cpu":
        for _ in range(3):
            call()
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def cuda_graphs(setup: Setup) -> Iterator[Row]:
    """Compare the losses of cached steps that are replayed from a CUDA graph with those of eager ones."""
    settings = {"dropout": 0.0, "temperature": 1.0}
    eager, call = (cached_steps(setup, 8, torch.float32, **settings) for _ in range(2))
    replay = captured(call, setup)
    wanted = torch.stack([eager().clone() for _ in range(6)])[3:]
    found = torch.stack([replay().clone() for _ in range(3)])
    if setup.device == "cpu":
        yield skipped("the graph itself", "CUDA graphs need CUDA; the step it captures runs eagerly here")
    yield from compared(
        "cached steps from a CUDA graph, against eager", {"losses": found}, {"losses": wanted}, torch.float32
    )


def train_briefly(
    setup: Setup, seed: int, sharded: bool, dropout: float, **settings: Any
) -> tuple[dict[str, list[float]], str]:
    """Train both encoders for three steps in this process; return losses and norms of the weights, and a digest."""
    gc.freeze()  # the trainer's collections would take longer in all that was imported than its steps
    if sharded:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        settings["fsdp_config"] = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    model = make_model(setup._replace(device="cpu"), temperature=1.0, dropout=dropout)
    batch = make_batch(model, 12)
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(12)]
    with TemporaryDirectory() as folder:
        args = PVLFTrainingArguments(
            folder, finetuning="both", learning_rate=1e-3, encoder_learning_rate=1e-4, max_steps=3, seed=seed,
            per_device_train_batch_size=4, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=setup.device == "cpu", fsdp=sharded, **settings,
        )  # fmt: skip
        if sharded and setup.device == "cpu":  # Accelerate shards on GPUs only, although its code runs on CPUs, too
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        processor = make_processor(model)
        trainer = PVLFTrainer(model, args, rows, processing_class=processor, data_collator=default_collate)
        trainer.train()
    if trainer.is_fsdp_enabled != sharded:
        raise RuntimeError(f"the run is {'not ' * sharded}sharded")
    digest, norms = hashlib.sha256(), []
    for parameter in trainer.model.parameters():
        whole = (parameter.full_tensor() if sharded else parameter).detach().float().cpu()
        digest.update(whole.numpy().tobytes())
        norms.append(whole.norm().item())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "norms of the weights": norms}, digest.hexdigest()


def training_runs(setup: Setup) -> Iterator[Row]:
    """Compare short runs of the trainer, each in a process of its own: sharded or not, and the same one twice."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pvlf_hf.training.trainer", "transformers.trainer"])
    deterministic = {"full_determinism": True, "bf16": True}
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        run = partial(pool.submit, train_briefly, setup)
        runs = [run(0, sharded, 0.0) for sharded in (False, True)]
        runs += [run(seed, False, 0.1, **deterministic) for seed in (0, 0, 1)]
        wanted, found = ({name: torch.tensor(v) for name, v in run.result()[0].items()} for run in runs[:2])
        yield from compared("FSDP in one process, against none", found, wanted, torch.float32)
        one, again, other = (run.result() for run in runs[2:])
    equal, differs = one == again, one != other
    yield Row("two runs with full determinism in bfloat16", "", "the same bits", "passed" if equal else "failed")
    yield Row("a run with another seed", "", "other bits", "passed" if differs else "failed")


CHECKS = {
    "training runs": training_runs,
    "half precision": half_precision,
    "fused attention": fused_attention,
    "compilation": compilation,
    "CUDA graphs": cuda_graphs,
}


# ---- speed ----


def encoding_speed(setup: Setup, encoder: str) -> tuple[Table, str, str]:
    """Measure the image encoder in bfloat16, eager and compiled."""
    model, batch = make_model(setup, encoder).to(torch.bfloat16), 128 if setup.size == "base" else 4
    compiled = copy.deepcopy(model)
    compiled.backbone.vision_model.compile(backend=setup.backend)
    pixels = model.config.vl_config.vision_config.image_size
    pictures = torch.randn(batch, 3, pixels, pixels, device=setup.device, dtype=torch.bfloat16)

    @torch.inference_mode()
    def embed(one: PVLFModel) -> Tensor:
        return waited_for(one(target_pixel_values=pictures).target_embeds, setup.device)

    calls = {"bfloat16": partial(embed, model), "bfloat16, compiled": partial(embed, compiled)}
    work = dict.fromkeys(calls, image_operations(model) * batch)
    paces = paced(calls, dict.fromkeys(calls, torch.bfloat16), work, setup.size, setup.rounds, 3, setup.device)
    title = f"Encoding, {encoder}, batch of {batch}"
    return (
        speed_table(title, paces, batch, "images"),
        verdict(title, paces, ENCODING_TARGET),
        profile(embed, setup, model),
    )


def training_speed(setup: Setup, encoder: str) -> tuple[Table, str, str]:
    """Measure a step that trains both encoders in bfloat16, with the largest batch of 128 or fewer that fits."""
    rows = 128 if setup.size == "base" else 4
    while True:
        try:
            return steps_of(setup, encoder, rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        torch.cuda.empty_cache()


def steps_of(setup: Setup, encoder: str, rows: int) -> tuple[Table, str, str]:
    """Measure [`training_speed`] at one batch size."""
    model = make_model(setup, encoder)
    model.set_finetuning("both")
    compiled = copy.deepcopy(model.train())
    compiled.compile(backend=setup.backend)
    batch, way = make_batch(model, rows), Way(bf16=True)

    def call(one: PVLFModel, optimizer: torch.optim.Optimizer) -> Tensor:
        return waited_for(step(one, optimizer, batch, way), setup.device)

    models = {"bfloat16": model, "bfloat16, compiled": compiled}
    calls = {name: partial(call, one, make_optimizer(one)) for name, one in models.items()}
    work = dict.fromkeys(calls, operations(model, batch))
    paces = paced(calls, dict.fromkeys(calls, torch.bfloat16), work, setup.size, setup.rounds, 3, setup.device)
    title = f"Training both encoders, {encoder}, batch of {rows}"
    table = speed_table(title, paces, rows, "triplets")
    return table, verdict(title, paces, TRAINING_TARGET), profile(calls["bfloat16"], setup)


def cached_speed(setup: Setup) -> tuple[Table, str, str]:
    """Measure a step of cached features, eager and from a CUDA graph."""
    rows = 64 if setup.size == "base" else 4
    eager, call = (cached_steps(setup, rows, torch.bfloat16) for _ in range(2))
    calls = {"bfloat16": eager, "bfloat16, CUDA graph": captured(call, setup)}
    timed = {name: lambda one=one: waited_for(one(), setup.device) for name, one in calls.items()}
    work = dict.fromkeys(calls, operations(eager.args[0], eager.args[2]))
    paces = paced(timed, dict.fromkeys(calls, torch.bfloat16), work, setup.size, setup.rounds, 3, setup.device)
    title = f"Training on cached features, frozen, {next(iter(ENCODERS))}, batch of {rows}"
    return speed_table(title, paces, rows, "triplets"), "", profile(timed["bfloat16"], setup)


def speed_table(title: str, paces: dict[str, Pace], rows: int, unit: str) -> Table:
    """Return the table of alternatives with their share of the matrix rate."""
    columns = {
        f"{unit} a second": [f"{rows / pace.timing.median:.0f}" for pace in paces.values()],
        "share of the matrix rate": [f"{pace.share:.2f}" for pace in paces.values()],
    }
    return Table(title, {name: pace.timing for name, pace in paces.items()}, columns)


def verdict(title: str, paces: dict[str, Pace], target: float) -> str:
    """Say whether the fastest alternative reaches its target."""
    best = max(pace.share for pace in paces.values())
    return f"- {title}: {best:.2f} of the matrix rate, target {target}: **{'met' if best >= target else 'not met'}**"


def profile(call: Callable[..., Any], setup: Setup, *arguments: Any, shown: int = 10) -> str:
    """Return the operators that take most of a call, as Markdown; on a GPU its kernels."""
    with torch.profiler.profile() as profiler:
        call(*arguments)
    kind = torch.autograd.DeviceType.CUDA if setup.device == "cuda" else torch.autograd.DeviceType.CPU
    own = "self_device_time_total" if setup.device == "cuda" else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    total = sum(getattr(event, own) for event in events)
    lines = ["| operator | calls | share of the time |", "| --- | --- | --- |"]
    for event in sorted(events, key=lambda event: -getattr(event, own))[:shown]:
        name = event.key.replace("|", " ")[:80]
        lines.append(f"| `{name}` | {event.count} | {getattr(event, own) / total:.2f} |")
    return "\n".join(lines)


SPEEDS: dict[str, Callable[[Setup], tuple[Table, str, str]]] = {
    **{f"encoding, {name}": partial(encoding_speed, encoder=name) for name in ENCODERS},
    **{f"training, {name}": partial(training_speed, encoder=name) for name in ENCODERS},
    "cached features": cached_speed,
}


# ---- the command ----


class Report:
    """What the parts have found, printed as it is found."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tables: list[str] = []
        self.verdicts: list[str] = []
        self.seconds: dict[str, float] = {}

    def add(self, row: Row) -> None:
        """Add the outcome of a check."""
        self.rows.append(row)
        print(" | ".join(filter(None, row)), flush=True)

    def run(self, name: str, part: Callable[[Setup], Any], setup: Setup) -> None:
        """Run a part; an error is its outcome, so that one does not cost the others."""
        start = time.perf_counter()
        try:
            if name in CHECKS:
                for row in part(setup):
                    self.add(row)
            else:
                table, reached, operators = part(setup)
                self.tables += [markdown(table), operators, ""]
                self.verdicts += filter(None, [reached])
                print(markdown(table), operators, reached, sep="\n", flush=True)
        except Exception as error:
            traceback.print_exc()
            self.add(Row(name, "", "", f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"))
        self.seconds[name] = time.perf_counter() - start
        if setup.device == "cuda":
            torch.cuda.empty_cache()

    def text(self, facts: dict[str, Any]) -> str:
        """Render it as Markdown."""
        heads = ["| check | distance | bound | outcome |", "| --- | --- | --- | --- |"]
        lines = [f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in self.rows]
        took = f"{sum(self.seconds.values()):.0f} s on {facts['device']}. {described(facts)}"
        return "\n".join([took, "", *self.verdicts, "", *heads, *lines, "", *self.tables])


def main() -> None:
    """Check, measure, print and write; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(
        "gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["tiny", "base"], default="base")
    parser.add_argument("--only", choices=[*CHECKS, *SPEEDS], nargs="+", default=[*CHECKS, *SPEEDS])
    parser.add_argument("--rounds", type=int, default=5, help="timings of each alternative (default: 5)")
    parser.add_argument("--write", action="store_true", help=f"replace the section of {DOCUMENT.name}")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"))
    args = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the trainer would use all of them
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here: --device cpu --size tiny runs the same code at toy size")
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # float32 is the reference
    setup, report, start = Setup(args.size, args.device, args.rounds), Report(), time.perf_counter()
    for name in args.only:
        if time.perf_counter() - start > LIMIT:
            report.add(skipped(name, f"{LIMIT} s are over"))
        else:
            report.run(name, (CHECKS | SPEEDS)[name], setup)
    facts = machine(args.size, args.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = {"machine": facts, "environment": environment(), **vars(report)}
    (args.output_dir / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(*report.verdicts, sep="\n")
    if args.write:
        write_between("<!-- gpu: written by gpu_check.py -->", "<!-- end of gpu -->", report.text(facts))
    sys.exit(any(row.outcome.startswith("failed") for row in report.rows))


if __name__ == "__main__":
    main()
