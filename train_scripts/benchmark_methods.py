"""Cost of a query by methods of other papers: text passes, optimised tokens, sampling (others: benchmark.py).

    python train_scripts/benchmark_methods.py --write      # text encoder of CLIP ViT-L/14; tables of PERFORMANCE.md
    python train_scripts/benchmark_methods.py --size tiny  # to check that it runs

Alternatives are timed in turn. Weights, images and captions are random: speed does not depend on them. Image encoders
have one layer, because images are encoded before a text pass is timed.
"""

from collections.abc import Callable
from functools import partial

import torch
from measuring import Table, Timing, measure, parser_of, side_by_side
from torch import Tensor
from transformers import CLIPModel

from pvlf_hf import CompoDiffConfig, CompoDiffModel, InversionConfig, InversionModel
from pvlf_hf.models.configuration_inversion import METHODS

LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
TOKENS = 16
IMAGES = 32
STEPS = 5


def clip_settings(size: str) -> dict[str, object]:
    """Return settings of a CLIP: ViT-L/14 with one layer in its image encoder, or a small one."""
    text, width = (LARGE, 1024) if size == "base" else (SMALL, 64)
    vision = {**text, "hidden_size": width, "num_attention_heads": width // 16, "num_hidden_layers": 1}
    vision |= {"patch_size": 14} if size == "base" else {"patch_size": 8, "image_size": 32}
    return {
        "model_type": "clip",
        "projection_dim": text["hidden_size"],
        "text_config": {**text, "eos_token_id": 49407},
        "vision_config": vision,
    }


def captions(model: InversionModel, batch: int) -> Tensor:
    """Return random token ids `(batch, TOKENS)` with one placeholder and an end token."""
    ids = torch.randint(300, 40_000, (batch, TOKENS))
    ids[:, 3], ids[:, -1] = model.config.placeholder_id, 49407
    return ids


def text_passes(size: str, rounds: int) -> list[Table]:
    """Measure what a mapping network and its pseudo word add to plain text encoding."""
    tables = []
    for batch in (1, 16):
        alternatives: dict[str, Callable[[], object]] = {}
        for method in (name for name, facts in METHODS.items() if not facts.steps):
            model = InversionModel(InversionConfig(vl_config=clip_settings(size), method=method)).eval()
            ids = captions(model, batch)
            if not alternatives:
                plain = CLIPModel(model.config.vl_config).eval()
                alternatives["CLIP in Transformers"] = partial(plain.get_text_features, input_ids=ids)
            side = model.config.vl_config.vision_config.image_size
            with torch.inference_mode():
                images = model.encode_images(torch.randn(batch, 3, side, side))
            alternatives[method] = partial(text_pass, model, *images, ids)
        with torch.inference_mode():
            timings = side_by_side(alternatives, rounds, calls=4 if batch == 1 else 1)
        title = f"Text pass of {batch} {'query' if batch == 1 else 'queries'}, {size}"
        tables.append(Table(title, timings, {"more time": more_time(timings)}))
    return tables


def more_time(timings: dict[str, Timing]) -> list[str]:
    """Return how much longer each alternative takes than the first, in percent: the median over the rounds."""
    first = next(iter(timings.values()))
    return [f"{100 / timing.speedup_over(first)[0] - 100:+.1f} %" for timing in timings.values()]


def text_pass(model: InversionModel, tokens: Tensor, features: Tensor, ids: Tensor) -> Tensor:
    """Embed queries whose images are encoded."""
    return model.encode_text(ids, None, model.pseudo_words_of(tokens, features, ids))


def optimised_tokens(size: str, rounds: int) -> list[Table]:
    """Measure SEARLE-OTI on images one by one and together, always on the small model."""
    settings = {"method": "searle_oti", "inversion_steps": STEPS}
    model = InversionModel(InversionConfig(vl_config=clip_settings("tiny"), **settings)).eval()
    images, prompts = torch.randn(IMAGES, 3, 32, 32), captions(model, 24)

    def invert(at_once: int) -> None:
        model.inverted_words.clear()
        for batch in images.split(at_once):
            model.invert(batch, prompts)

    alternatives = {"one by one": partial(invert, 1), f"{IMAGES} together": partial(invert, IMAGES)}
    return [Table(f"SEARLE-OTI, {IMAGES} images, {STEPS} steps, tiny", side_by_side(alternatives, rounds), {})]


def samples(size: str, rounds: int) -> list[Table]:
    """Measure CompoDiff's samples of a query one by one and together."""
    settings = {} if size == "base" else {"denoiser_layers": 2, "denoiser_heads": 2, "head_width": 32}
    settings |= {"negative_ids": [49406, 49407], "pad_id": 0}
    model = CompoDiffModel(CompoDiffConfig(vl_config=clip_settings(size), **settings)).eval()
    side = model.config.vl_config.vision_config.image_size
    query = {"pixel_values": torch.randn(1, 3, side, side), "input_ids": torch.randint(300, 40_000, (1, 77))}
    query["input_ids"][:, -1] = 49407

    @torch.inference_mode()
    def sample(count: int, times: int) -> None:
        for _ in range(times):
            model.get_query_features(**query, num_samples=count)

    alternatives = {"4 times 1 sample": partial(sample, 1, 4), "4 samples": partial(sample, 4, 1)}
    return [Table(f"CompoDiff, a query, {size}", side_by_side(alternatives, rounds), {})]


PARTS = {"text": text_passes, "tokens": optimised_tokens, "samples": samples}


def main() -> None:
    """Measure, print Markdown and write JSON."""
    args = parser_of("benchmark_methods.py", __doc__, PARTS, rounds=5).parse_args()
    parts = {name: partial(part, args.size, args.rounds) for name, part in PARTS.items()}
    measure("benchmark_methods.py", parts, args)


if __name__ == "__main__":
    main()
