"""Queries of a gallery: encoded once, weighed as often as wanted, and explained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from numbers import Real
from operator import index
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F

from ..embeddings.combined import Combine, CombinedQueries, CombinedScores
from ..embeddings.encoding import device_of
from ..models.image_processing_pvlf import ImageInput
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..models.modeling_pvlf import PVLFQueryOutput

Weights = tuple[float, float, float]
"""Weights of the image, the model's composition and the text in a query, in the order of the paper's eq. 13."""

FUSION: Weights = (0.0, 1.0, 0.0)
"""Weights of the model's own composition."""

Source = Literal["text", "prompts", "image"]


class Explanation(NamedTuple):
    """Explanation of a query: the weights of image and text, and the attention of the fusion Transformer.

    Args:
        weights: w of eq. 13, for the image, the fused feature and the text; free, they need not sum to 1.
        tokens: tokens of the text, special tokens included.
        attention: float32 `(layers, length, length)`, mean over heads; row i is the attention of position i. Positions
            are the tokens, the prompts, the image as a whole, and its patches row by row.
        num_prompts: number of prompts.
    """

    weights: Weights
    tokens: list[str]
    attention: Tensor
    num_prompts: int

    @property
    def places(self) -> dict[str, slice]:
        """Returns the positions of `"text"`, `"prompts"` and `"image"`."""
        text, prompts = len(self.tokens), len(self.tokens) + self.num_prompts
        return {"text": slice(0, text), "prompts": slice(text, prompts), "image": slice(prompts, None)}

    def shares(self, source: Source = "prompts") -> dict[str, Tensor]:
        """Return how a part divides its attention among all parts: float32 `(layers,)` each, which sum to 1."""
        given = self.attention[:, self.places[source]].mean(dim=1)  # (layers, length)
        return {part: given[:, positions].sum(dim=1) for part, positions in self.places.items()}

    def words(self, source: Source = "prompts", layer: int = -1) -> list[float]:
        """Return the attention from a part to each token of the text, in order."""
        return self.attention[layer, self.places[source], self.places["text"]].mean(dim=0).tolist()

    def patches(self, source: Source = "prompts", layer: int = -1) -> Tensor:
        """Return the attention from a part to each patch: float32 `(rows, columns)` of the cropped image."""
        given = self.attention[layer, self.places[source], self.places["image"]].mean(dim=0)[1:]
        return given.view(math.isqrt(len(given)), -1)


@dataclass(frozen=True)
class Query:
    """An encoded query; other weights, another k or another gallery of the same model need no encoder.

    Args:
        images: the reference images, RGB.
        text: the text, or None.
        fused: float32 `(d,)`, the model's composition; for a query of images or text alone, their embedding.
        image_embeds: float32 `(d,)`, embedding of the images alone (the mean of several); None without images.
        text_embeds: float32 `(d,)`, embedding of the text alone; None without a text.
        made_by: provenance, see [`images_made_by`].
        why: one explanation per reference image, if requested.
        combine: function of two similarities that scores images, where `fused` is image and text side by side, see
            [`ComposedRetrievalModel.combine`].
    """

    images: tuple[PILImage.Image, ...]
    text: str | None
    fused: Tensor = field(repr=False)
    image_embeds: Tensor | None = field(repr=False)
    text_embeds: Tensor | None = field(repr=False)
    made_by: dict[str, str] = field(repr=False)
    why: tuple[Explanation, ...] = field(default=(), repr=False)
    combine: Combine | None = field(default=None, repr=False)

    def scored_by(self, weights: Weights, embeds: Tensor, mean: Tensor | None = None) -> Tensor | CombinedScores:
        """Return what a gallery is searched by: the query's embedding, or scores that are combined.

        Args:
            weights: see [`~Query.embed`].
            embeds: of the gallery, `(images, d)`.
            mean: of them, where it is known.

        Raises:
            ValueError: as [`~Query.embed`], and if a composition that is no embedding is to be mixed with one.
        """
        image, fused, text = check_weights(weights)
        if self.combine is None or fused == 0:
            return self.embed(weights)
        if image or text:
            raise ValueError(
                f"weights {weights}: this composition scores by two similarities and is no embedding to mix: weigh it "
                "(0, 1, 0), or leave it out; the model's composition_weight balances image and text"
            )
        return CombinedQueries(self.fused[None], self.combine).against(embeds, mean)

    def embed(self, weights: Weights = FUSION) -> Tensor:
        """Return normalize(w_image image_embeds + w_fused fused + w_text text_embeds), float32 `(d,)`.

        Args:
            weights: (w_image, w_fused, w_text) of unit vectors: `(0, 1, 0)` is the model's composition,
                `(0.5, 1, 0)` more of the image, `(1, 0, 0)` the image alone, `(0, 0, 1)` the text alone;
                a negative weight leads away from its part.

        Raises:
            ValueError: if they are not three finite numbers, all are 0, or the query lacks a part of nonzero weight.
        """
        parts = {"image": self.image_embeds, "fused": self.fused, "text": self.text_embeds}
        total = torch.zeros(())
        for (name, embeds), weight in zip(parts.items(), check_weights(weights), strict=True):
            if weight == 0:
                continue
            if embeds is None:
                raise ValueError(f"weights {weights}: the query has no {name}; pass it to the search, or weigh it 0")
            total = total + weight * embeds
        if not total.any():
            raise ValueError(f"weights {weights} leave nothing of the query: pass at least one that is not 0")
        return F.normalize(total, dim=0)


def check_weights(weights: Any) -> Weights:
    """Return the weights as floats; raise a `ValueError` unless they are three finite numbers."""
    values = list(weights) if isinstance(weights, Sequence | Tensor) or hasattr(weights, "tolist") else []
    numbers = [float(value) for value in values if isinstance(value, Real | Tensor) and math.isfinite(value)]
    if len(numbers) != 3 or len(values) != 3:
        raise ValueError(
            f"weights={weights!r}: pass three numbers, of image, composition and text, such as (0.5, 1, 0)"
        )
    return numbers[0], numbers[1], numbers[2]


def check_positive(name: str, value: Any) -> int:
    """Return the value of an argument as an int; raise a `ValueError` unless it is a whole number above 0."""
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: pass a whole number of at least 1")
    return number


def encode_query(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    made_by: dict[str, str],
    image: ImageInput | Sequence[ImageInput] | None = None,
    text: str | None = None,
    explain: bool = False,
) -> Query:
    """Encode a query; several images are each composed with the text, and their embeddings averaged.

    The model stays as it is, whatever other threads do with it.

    Raises:
        ValueError: if there is neither image nor text, an image cannot be read, the text is no string or empty, or
            `explain` is set without both.
    """
    if image is None and text is None:
        raise ValueError("nothing to search by: pass an image, a text or both")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text={text!r}: pass one string, or None to search by the image alone")
    if text is not None and not text.strip():
        raise ValueError("text is empty: say what to look for, or leave text out to search by the image alone")
    if explain and (image is None or text is None):
        raise ValueError("explain=True needs an image and a text: only their composition can be explained")
    given = [] if image is None else image if isinstance(image, list | tuple) else [image]
    arrays = [processor.image_processor.process_image(one) for one in given]
    images = tuple(PILImage.fromarray(array.transpose(1, 2, 0)) for array in arrays)
    if image is not None and not images:
        raise ValueError("image is an empty list: pass at least one image, or leave it out")
    with torch.inference_mode():
        return _encode(inference_view(model), processor, made_by, images, text, explain)


def _encode(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    made_by: dict[str, str],
    images: tuple[PILImage.Image, ...],
    text: str | None,
    explain: bool,
) -> Query:
    device = device_of(model)
    if text is None:
        inputs = processor(images=list(images)).to(device)
        image_features: Any = model.get_image_features(**inputs)
        image_embeds = mean_embedding(image_features.pooler_output)
        return Query(images, None, image_embeds, image_embeds, None, made_by)
    if not images:
        text_features: Any = model.get_text_features(**processor(text=text).to(device))
        text_embeds = mean_embedding(text_features.pooler_output)
        return Query((), text, text_embeds, None, text_embeds, made_by)
    inputs = processor.process_queries(list(images), [text] * len(images)).to(device)
    options: dict[str, Any] = {"output_attentions": True} if explain else {}
    output: Any = model.get_query_features(**inputs, **options)
    of_images, of_text = output.image_embeds, output.text_embeds
    if of_images is None:  # the model computes queries without it
        of_images = model.get_image_features(inputs["pixel_values"]).pooler_output
    if of_text is None:
        of_text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    why: list[Explanation] = []
    if explain:
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        why = [explanation(output, row, tokens, getattr(model.config, "num_prompts", 0)) for row in range(len(images))]
    fused, image_embeds, text_embeds = map(mean_embedding, (output.pooler_output, of_images, of_text))
    return Query(images, text, fused, image_embeds, text_embeds, made_by, tuple(why), model.combine)


def inference_view(model: ComposedRetrievalModel) -> ComposedRetrievalModel:
    """Return the model if it is in eval mode, else a copy of its modules in eval mode that shares all weights.

    Other threads may be using the model, one of them for training, so its mode is never changed.
    """
    return _view(model, {}) if any(module.training for module in model.modules()) else model


def _view(module: Any, views: dict[nn.Module, Any]) -> Any:
    if module in views:
        return views[module]
    view = views[module] = module.__class__.__new__(module.__class__)
    attributes = vars(module).copy()  # weights, buffers and hooks are shared
    attributes["training"] = False
    attributes["_modules"] = {
        name: child if child is None else _view(child, views) for name, child in module._modules.items()
    }
    for name, value in attributes.items():  # Accelerate's hooks keep the module's own methods
        if isinstance(value, MethodType) and value.__self__ is module:
            attributes[name] = MethodType(value.__func__, view)
        elif isinstance(value, partial) and any(argument is module for argument in value.args):
            arguments = [view if argument is module else argument for argument in value.args]
            attributes[name] = update_wrapper(partial(value.func, *arguments, **value.keywords), value)
    view.__dict__.update(attributes)
    return view


def explanation(output: PVLFQueryOutput, row: int, tokens: list[str], num_prompts: int) -> Explanation:
    """Explain one row of a composed batch that was computed with attentions; `tokens` are the caption's.

    Raises:
        ValueError: if the model returns neither weights nor attentions.
    """
    if getattr(output, "aggregation_weights", None) is None or getattr(output, "attentions", None) is None:
        raise ValueError("explain=True: this model returns no aggregation weights or attentions; leave explain out")
    image, fused, text = output.aggregation_weights[row].tolist()  # type: ignore[index]  # checked above
    attention = torch.stack([layer[row].float().mean(dim=0) for layer in output.attentions]).cpu()  # type: ignore[union-attr]
    return Explanation((image, fused, text), tokens, attention, num_prompts)


def mean_embedding(embeds: Tensor) -> Tensor:
    """Average `(n, d)` to float32 `(d,)`, normalised, on the CPU."""
    return F.normalize(embeds.float().mean(dim=0), dim=0).cpu()


__all__ = ["FUSION", "Explanation", "Query", "Weights", "encode_query"]
