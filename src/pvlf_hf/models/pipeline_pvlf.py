"""`pipeline("composed-image-retrieval")`: searches a gallery by composed queries. Saved with checkpoints.

`import pvlf_hf` registers the task; without the package `trust_remote_code=True` finds this file beside the weights.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from numbers import Integral
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline

from .image_processing_pvlf import opened
from .interface_pvlf import check_adapter
from .loss_pvlf import exact_unit_rows, pairwise_sum

TASK = "composed-image-retrieval"

# Entry of config.json for this file, as the library writes it; "pt" names the class that loads the model.
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_pvlf.ComposedImageRetrievalPipeline", "pt": ["AutoModel"], "type": "multimodal"}
}


class ComposedImageRetrievalPipeline(Pipeline):
    """Retrieves gallery images by a reference image and a relative caption.

    Args:
        gallery: the gallery to search, unless a call passes another: images (files, URLs, PIL images, arrays, a column
            of a data set), or their embeddings, float `(n, d)`, from [`~ComposedImageRetrievalPipeline.embed_gallery`]
            or `Gallery.embeds`. Images passed here are embedded once; images passed to a call, in that call.
        top_k: number of results, 10 by default (our choice); a smaller gallery returns all its images.
        **kwargs: arguments of the library: `model`, `processor`, `device`, `batch_size`, ...

    Raises:
        ValueError: if the model is not PVLF or the gallery not as above.

    Example:
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> import pvlf_hf

        >>> images = [Image.new("RGB", (72, 72), colour) for colour in ("red", "gold", "navy")]
        >>> pipe = pipeline("composed-image-retrieval", model="model_cards/pvlf-emoji-tiny", gallery=images)
        >>> results = pipe({"image": images[0], "text": "please colour this yellow"}, top_k=2)
        >>> [sorted(result) for result in results]
        [['image', 'index', 'score'], ['image', 'index', 'score']]
    """

    processor: Any  # PVLFProcessor; a checkpoint's own class where its code is loaded with it

    _load_processor: Any = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not hasattr(model, "get_query_features"):
            raise ValueError(
                f"{TASK} needs a PVLF model, not {type(model).__name__}: pass a checkpoint of one, or what "
                "pvlf_hf.load_model(name) returns, model and processor"
            )
        check_adapter(model)
        super().__init__(**kwargs)

    def __call__(self, inputs: Any, text: str | Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Search the gallery for one query or many.

        Args:
            inputs: a query `{"image": image, "text": relative caption}`, a list of them, or a data set or generator
                of them, which is read lazily. With `text`, one reference image or a list of them.
            text: the relative caption, or a list of as many as there are images.
            **kwargs: `gallery` and `top_k` for this call; `batch_size`, queries encoded at a time (1), `num_workers`.

        Returns:
            for a query its results, best first, ties in the order of the gallery:
            `[{"score": score, "index": position in the gallery, "image": gallery item}, ...]`, without "image" if the
            gallery is embeddings. For a list a list of these, for other inputs an iterator over them.

        Raises:
            ValueError: if there is no gallery, a query lacks its image or text, `top_k` is below 1, or an image cannot
                be read.
        """
        if "gallery_embeds" not in self._forward_params and kwargs.get("gallery") is None:
            raise ValueError(
                f"no gallery to search in: pass it to the call, or once to pipeline({TASK!r}, ..., gallery=images)"
            )
        one_query = str | Mapping | np.ndarray | Tensor
        inputs = opened(inputs)
        if text is not None:
            inputs = _pair(inputs, text)
        elif hasattr(inputs, "__iter__") and not isinstance(inputs, one_query | list | Dataset):
            inputs = (query for query in inputs)  # the library takes a `datasets.Dataset` for a single query
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    @torch.no_grad()
    def embed_gallery(self, images: Sequence[Any], batch_size: int = 64) -> Tensor:
        """Embed gallery images, to be searched many times; equal ones once, so that their embeddings are equal.

        Args:
            images: the images.
            batch_size: images embedded at once (as `Gallery`).

        Returns:
            float32 `(n, d)`, L2-normalised, on the pipeline's device.

        Raises:
            ValueError: if there are none, or one cannot be read.
        """
        if len(images) == 0:
            raise ValueError("the gallery is empty: pass at least one image")
        images = opened(images)
        known: dict[bytes, int] = {}  # which embedding an image has, by the digest of its pixels
        rows, embeds = [], []
        for start in range(0, len(images), batch_size):
            pixels = self.processor.process_targets(images[start : start + batch_size])["pixel_values"]
            digests = [sha256(image.numpy().tobytes()).digest() for image in pixels]
            new = {digest: row for row, digest in enumerate(digests) if digest not in known}
            known |= {digest: len(known) + number for number, digest in enumerate(new)}
            rows += [known[digest] for digest in digests]
            if new:
                embeds.append(
                    self._embed(target_pixel_values=pixels[list(new.values())].to(self.device)).target_embeds
                )
        return torch.cat(embeds)[rows]

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Save model and processor, with the code of this pipeline; the gallery is not saved."""
        # The library's own method would save tokenizer and image processor, but not the processor that holds both.
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self, gallery: Any = None, top_k: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward: dict[str, Any] = {}
        gallery = opened(gallery)
        if gallery is not None:
            device = "cpu" if self.device.type == "mps" else self.device  # which has no float64
            forward["gallery_embeds"] = exact_unit_rows(self._gallery_embeds(gallery).to(device))
        if top_k is not None:
            if not isinstance(top_k, Integral) or top_k < 1:
                raise ValueError(f"top_k={top_k!r}: pass a whole number of at least 1")
            forward["top_k"] = top_k
        postprocess = {} if gallery is None else {"gallery": None if isinstance(gallery, Tensor) else gallery}
        return {}, forward, postprocess

    def _gallery_embeds(self, gallery: Any) -> Tensor:
        if isinstance(gallery, Tensor):
            width = self.model.embedding_width
            if gallery.ndim != 2 or gallery.shape[1] != width or not len(gallery):
                raise ValueError(
                    f"gallery is a tensor of shape {tuple(gallery.shape)}; embeddings of this model are (n, {width}), "
                    "from embed_gallery(images)"
                )
            return gallery
        if hasattr(gallery, "column_names"):
            raise ValueError(
                f"gallery is a {type(gallery).__name__} with columns {gallery.column_names}: pass its column of "
                "images, gallery=dataset['image']"
            )
        if isinstance(gallery, str | Mapping) or not (hasattr(gallery, "__len__") and hasattr(gallery, "__getitem__")):
            raise ValueError(f"gallery is {type(gallery).__name__}: pass a list of images, or their embeddings")
        return self.embed_gallery(gallery)

    def preprocess(self, query: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Prepare the `pixel_values` `(1, 3, H, W)` of a query, with its caption."""
        if not isinstance(query, Mapping) or query.get("image") is None or query.get("text") is None:
            given = sorted(query) if isinstance(query, Mapping) else type(query).__name__
            raise ValueError(f'a query is {{"image": image, "text": relative caption}}, got {given}')
        inputs = self.processor.process_queries(query["image"], query["text"])
        return {"pixel_values": inputs["pixel_values"], "text": query["text"]}

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, Any], gallery_embeds: Tensor, top_k: int = 10
    ) -> dict[str, Tensor]:
        # Captions are tokenised a batch at a time: the library would pad them on the side that the tokenizer names,
        # but BLIP's text embedding is the token at position 0.
        tokens = self.processor.process_captions(model_inputs["text"]).to(self.device)
        query = self._embed(pixel_values=model_inputs["pixel_values"], **tokens).query_embeds
        model, query = cast(Any, self.model), query.to(gallery_embeds.device)
        if getattr(model, "combine", None) is None:  # code that came with an older checkpoint does not know it
            scores = _scores(exact_unit_rows(query), gallery_embeds)  # (batch, n)
        else:
            scores = model.score(query.double(), gallery_embeds).float()
        best = scores.sort(dim=1, descending=True, stable=True)
        return {"scores": best.values[:, :top_k], "indices": best.indices[:, :top_k]}

    def postprocess(self, model_outputs: dict[str, Tensor], gallery: Any = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """Turn scores and gallery positions, `(1, k)` each, into results."""
        ranked = zip(model_outputs["scores"][0].tolist(), model_outputs["indices"][0].tolist(), strict=True)
        return [
            {"score": score, "index": index} | ({} if gallery is None else {"image": gallery[index]})
            for score, index in ranked
        ]

    def _embed(self, **inputs: Tensor) -> Any:
        self.model.eval()  # the library leaves a model that has just been trained in train mode
        return self.model(**inputs)


def _scores(queries: Tensor, gallery: Tensor) -> Tensor:
    """Score unit rows in float64, `(c, d)` and `(n, d)`, as float32 `(c, n)` that depend on the two rows alone.

    The last bit of a matrix product depends on where a row lies in the matrix. Where it decides how the product is
    rounded, halves are added instead, as the package's exact search does.
    """
    products, error = queries @ gallery.T, queries.shape[1] * 2.0**-50
    scores, upper = (products - error).float(), (products + error).float()
    rows, columns = (scores != upper).nonzero(as_tuple=True)
    scores[rows, columns] = pairwise_sum(queries[rows] * gallery[columns]).float()
    return scores


def _pair(images: Any, text: str | Sequence[str]) -> Any:
    """Pair an image with its caption as a query, or lists of both as a list of queries."""
    if isinstance(text, str):
        return {"image": images, "text": text}
    images, text = list(images), list(text)
    if len(images) != len(text):
        raise ValueError(f"one of each makes a query, but there are {len(images)} images and {len(text)} captions")
    return [{"image": image, "text": caption} for image, caption in zip(images, text, strict=True)]


__all__ = ["CUSTOM_PIPELINES", "TASK", "ComposedImageRetrievalPipeline"]
