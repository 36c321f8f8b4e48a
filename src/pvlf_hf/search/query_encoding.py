"""Encodes queries of a gallery: images and texts by the model, indexed images by the embeddings that are there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from ..embeddings.encoding import device_of
from ..embeddings.model_views import inference_view
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor, check_adapter
from ..models.modeling_pvlf import PVLFQueryOutput
from .query import Explanation, Query
from .terms import Terms


class QueryEncoder:
    """Encodes the terms of queries; the model stays as it is, whatever other threads do with it.

    Args:
        model: embeds images and texts.
        processor: the model's processor.
        made_by: provenance of the embeddings.
        embedding_of: returns the embedding `(d,)` of an indexed image.
        image_of: opens an indexed image, where the model composes by more than its embedding.
    """

    def __init__(
        self,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        made_by: dict[str, str],
        embedding_of: Callable[[str], Tensor],
        image_of: Callable[[str], PILImage.Image],
    ) -> None:
        check_adapter(model)
        self.model, self.processor, self.made_by = inference_view(model), processor, made_by
        self.embedding_of, self.image_of = embedding_of, image_of

    @torch.inference_mode()
    def encode(self, terms: Terms, explain: bool = False) -> Query:
        """Encode a query.

        Terms of positive weight are composed, every text with every image, and their weighted mean is the query's
        composition. Those of negative weight are embedded alone, and what they add to the query is kept apart.

        Raises:
            ValueError: if `explain` is set without images and one text, or the model explains nothing.
        """
        toward, away = (_signed(terms, sign) for sign in (1, -1))
        if explain and not (toward.images and len(toward.texts) == 1 and not toward.ids):
            raise ValueError("explain=True needs an image and a text: only their composition can be explained")
        query = self._compose(toward, explain)
        shown = tuple(image for image, _ in terms.images)
        rest: dict[str, Any] = {"ids": tuple(image_id for image_id, _ in terms.ids)}
        if any(away):
            rest["away"] = (self._sum_of_images(away), self._sum_of_texts(away))
        return query(images=shown, text=terms.text, made_by=self.made_by, **rest)

    def _compose(self, terms: Terms, explain: bool) -> Callable[..., Query]:
        """Return what makes a query of the terms of positive weight."""
        if not terms.texts:
            alone = mean_embedding(*self._embed_images(terms))
            return partial(Query, fused=alone, image_embeds=alone, text_embeds=None)
        if not terms.images and not terms.ids:
            alone = mean_embedding(*self._embed_texts(terms))
            return partial(Query, fused=alone, image_embeds=None, text_embeds=alone)
        if terms.ids:
            (images, of_images), (texts, of_texts) = self._embed_images(terms), self._embed_texts(terms)
            pairs = images.repeat_interleave(len(texts), dim=0), texts.repeat(len(images), 1)
            fused = self.model.compose_embeds(*pairs)
            if fused is not None:
                means = mean_embedding(images, of_images), mean_embedding(texts, of_texts)
                weights = torch.outer(of_images, of_texts).flatten()
                return self._query(mean_embedding(fused, weights), *means)
            opened = [(self.image_of(image_id), weight) for image_id, weight in terms.ids]
            terms = Terms([*terms.images, *opened], [], terms.texts)
        return self._compose_inputs(terms, explain)

    def _compose_inputs(self, terms: Terms, explain: bool) -> Callable[..., Query]:
        """Compose images and texts by the model, every text with every image."""
        pairs = [(image, text, a * b) for image, a in terms.images for text, b in terms.texts]
        images, texts = [image for image, _, _ in pairs], [text for _, text, _ in pairs]
        weights = torch.tensor([weight for _, _, weight in pairs])
        inputs = self.processor.process_queries(images, texts).to(device_of(self.model))
        options: dict[str, Any] = {"output_attentions": True} if explain else {}
        output: Any = self.model.get_query_features(**inputs, **options)
        of_images, of_texts = output.image_embeds, output.text_embeds
        if of_images is None:  # the model computes queries without it
            of_images = self.model.get_image_features(inputs["pixel_values"]).pooler_output
        if of_texts is None:
            of_texts = self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        why: list[Explanation] = []
        if explain:
            tokens = self.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
            prompts = getattr(self.model.config, "fusion_prompts", 0)
            why = [explanation(output, row, tokens, prompts) for row in range(len(images))]
        parts = (mean_embedding(part, weights) for part in (output.pooler_output, of_images, of_texts))
        return partial(self._query(*parts), why=tuple(why))

    def _query(self, fused: Tensor, image_embeds: Tensor, text_embeds: Tensor) -> Callable[..., Query]:
        combine = getattr(self.model, "combine", None)
        return partial(Query, fused=fused, image_embeds=image_embeds, text_embeds=text_embeds, combine=combine)

    def _embed_images(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """Embed images and ids: `(n, d)` on the model's device, and their weights `(n,)`."""
        device, parts = device_of(self.model), []
        if terms.images:
            inputs = self.processor(images=[image for image, _ in terms.images]).to(device)
            output: Any = self.model.get_image_features(**inputs)
            parts.append(output.pooler_output)
        if terms.ids:
            parts.append(torch.stack([self.embedding_of(image_id) for image_id, _ in terms.ids]).to(device))
        return torch.cat(parts), torch.tensor([weight for _, weight in (*terms.images, *terms.ids)])

    def _embed_texts(self, terms: Terms) -> tuple[Tensor, Tensor]:
        inputs = self.processor(text=[text for text, _ in terms.texts]).to(device_of(self.model))
        output: Any = self.model.get_text_features(**inputs)
        return output.pooler_output, torch.tensor([weight for _, weight in terms.texts])

    def _sum_of_images(self, terms: Terms) -> Tensor:
        return _weighted_sum(*self._embed_images(terms)) if terms.images or terms.ids else self._zeros()

    def _sum_of_texts(self, terms: Terms) -> Tensor:
        return _weighted_sum(*self._embed_texts(terms)) if terms.texts else self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.model.embedding_width)


def _signed(terms: Terms, sign: int) -> Terms:
    kept: list[Any] = [[term for term in part if term[1] * sign > 0] for part in terms]
    return Terms(*kept)


def _weighted_sum(embeds: Tensor, weights: Tensor) -> Tensor:
    """Sum `(n, d)` by weights `(n,)` to float32 `(d,)`, on the CPU."""
    return (weights[:, None] * embeds.float().cpu()).sum(dim=0)


def mean_embedding(embeds: Tensor, weights: Tensor) -> Tensor:
    """Average `(n, d)` by weights `(n,)` to float32 `(d,)`, normalised, on the CPU."""
    return F.normalize(_weighted_sum(embeds, weights) / weights.sum(), dim=0)


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


__all__ = ["QueryEncoder"]
