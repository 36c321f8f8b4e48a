"""PVLF as a module of the library `sentence-transformers`: composed queries, images and texts in one `encode`.

A folder that `SentenceTransformer.save` wrote stays a PVLF checkpoint, for `AutoModel` as before.

Example:
    ```python
    from sentence_transformers import SentenceTransformer
    from pvlf_hf.sentence_transformer import PVLFSentenceModule

    encoder = SentenceTransformer(modules=[PVLFSentenceModule.load("you/mine")])
    query = encoder.encode([{"image": "dress.jpg", "text": "the same but sleeveless"}])
    scores = encoder.similarity(query, encoder.encode([{"image": path} for path in paths]))
    encoder.save("mine-st")  # from now on SentenceTransformer("mine-st", trust_remote_code=True)
    ```
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

from .models.configuration_pvlf import BACKBONES
from .models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor, check_adapter
from .models.pipeline_training_free import AutoComposedRetrievalModel
from .models.processing_pvlf import PVLFProcessor

IMAGE_ENDINGS = (".avif", ".bmp", ".gif", ".heic", ".jp2", ".jpeg", ".jpg", ".jxl", ".png", ".tif", ".tiff", ".webp")
"""File extensions that are recognised as images."""


MODALITIES_FILE = "sentence_bert_config.json"

MODALITIES = {"modality_config": {"text": {"method": "get_text_features"}, "image": {"method": "get_image_features"}}}
"""Content of `MODALITIES_FILE`: inputs of each kind, and the method of the model that embeds them."""


class PVLFSentenceModule(InputModule):
    """Module that embeds image and text as a composed query, and either of them alone in the same space.

    Inputs are dictionaries with `image`, `text` or both, an image (PIL, array, tensor, path or URL of one) or a
    string; each input of a batch may be of another kind.

    Args:
        model: the model.
        processor: its processor.
    """

    # "message" is what the library calls a batch of several kinds; conversations are refused in `preprocess`.
    modalities: list[Any] = ["text", "image", ("image", "text"), "message"]

    def __init__(self, model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> None:
        super().__init__()
        check_adapter(model)
        if model.combine is not None:
            raise ValueError(
                "sentence-transformers compares embeddings by cosine, and this model's composition scores by two "
                "similarities: load it with composition='slerp' or 'sum'"
            )
        self.model, self.processor = model, processor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        """Tokenizer of the processor."""
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Number of tokens that texts are truncated to."""
        return self.processor.max_text_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", tokens)
        if not self.tokenizer.num_special_tokens_to_add() < tokens <= longest:
            raise ValueError(f"max_seq_length={tokens}: the text encoder takes up to {longest} tokens")
        self.processor.max_text_length = tokens

    @classmethod
    def load(  # type: ignore[override]  # where to look is in kwargs
        cls,
        model_name_or_path: str,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "PVLFSentenceModule":
        """Load any PVLF checkpoint, or a plain dual encoder, which composes queries by Slerp.

        Args:
            model_name_or_path: Hub name or local folder.
            model_kwargs: passed to `AutoModel.from_pretrained` (`dtype`, `attn_implementation`, ...); of a plain dual
                encoder also `composition`.
            processor_kwargs: settings of [`PVLFProcessor`].
            **kwargs: `subfolder`, `token`, `revision`, `cache_folder` and `local_files_only` say where to look; what
                the library passes besides is for modules of other kinds.
        """
        names = ("subfolder", "token", "revision", "local_files_only")
        where: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
        where["cache_dir"] = kwargs.get("cache_folder")
        model = AutoComposedRetrievalModel.from_pretrained(model_name_or_path, **where, **(model_kwargs or {}))
        processor: Any
        if AutoConfig.from_pretrained(model_name_or_path, **where).model_type not in BACKBONES:
            processor = AutoProcessor.from_pretrained(model_name_or_path, **where, **(processor_kwargs or {}))
        elif processor_kwargs:
            raise ValueError(
                f"{model_name_or_path} is a plain dual encoder: set {[*processor_kwargs]} on the processor"
            )
        else:
            processor = PVLFProcessor.from_vl_pretrained(model_name_or_path, **where)
        return cls(model, processor)

    def save(self, output_path: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Write an ordinary PVLF checkpoint; other arguments of the library make no difference.

        `sentence_bert_config.json` says what the model embeds, which `mteb` reads there.
        """
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)
        Path(output_path, MODALITIES_FILE).write_text(json.dumps(MODALITIES, indent=2) + "\n", encoding="utf-8")

    def get_embedding_dimension(self) -> int:
        """Return the joint width `d`."""
        return self.model.embedding_width

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Turn a batch into tensors.

        Args:
            inputs: see the class.
            prompt: prepended to every text.
            processing_kwargs: settings of this call for `"text"`, `"image"` or both (`"common"`), as [`PVLFProcessor`]
                takes them.
            **kwargs: `task` and others of the library, not used.

        Returns:
            `has_image` and `has_text`, bool `(batch,)`; `pixel_values`, if any input has an image; `input_ids` and
            `attention_mask`, if any has a text. All have a row for each input, so that the library can cut a batch
            into smaller ones; rows of inputs without an image or a text are zeros.

        Raises:
            ValueError: for an input of another kind, an empty text, an image that cannot be read, or settings for
                something else.
        """
        settings = processing_kwargs or {}
        if unknown := settings.keys() - {"text", "image", "common"}:
            raise ValueError(f"processing_kwargs has {sorted(unknown)}: it takes 'text', 'image' and 'common'")
        common = settings.get("common", {})
        parts = [self._parts(one) for one in inputs]
        features: dict[str, Tensor] = {}
        images = [part["image"] for part in parts if "image" in part]
        texts = [(prompt or "") + part["text"] for part in parts if "text" in part]
        for name in ("image", "text"):
            features[f"has_{name}"] = torch.tensor([name in part for part in parts])
        if images:
            prepared = self.processor(images=images, images_kwargs=settings.get("image"), common_kwargs=common)
            features |= _spread(prepared, features["has_image"])
        if texts:
            prepared = self.processor(text=texts, text_kwargs=settings.get("text"), common_kwargs=common)
            features |= _spread(prepared, features["has_text"])
        return features

    def _parts(self, one: Any) -> dict[str, Any]:
        kind: Any = infer_modality(one, self.modalities)
        if isinstance(one, list | tuple) or kind == "message":
            raise ValueError(f"an input is {one!r:.80}: pass an image, a text or {{'image': ..., 'text': ...}}")
        if kind == "text" and isinstance(one, str) and _looks_like_image_path(one):
            raise ValueError(
                f"{one!r:.200} looks like the path of an image, but there is no such file: correct the path, or pass "
                "{'text': ...} if it is a text"
            )
        return one if isinstance(one, dict) else {kind: one}

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Add `sentence_embedding`, float32 `(batch, d)`, L2-normalised."""
        has_image, has_text = features["has_image"], features["has_text"]
        both = has_image & has_text
        kinds: tuple[tuple[Tensor, Any, list[str]], ...] = (
            (both, self.model.get_query_features, ["pixel_values", "input_ids", "attention_mask"]),
            (has_image & ~both, self.model.get_image_features, ["pixel_values"]),
            (has_text & ~both, self.model.get_text_features, ["input_ids", "attention_mask"]),
        )
        embeds = torch.empty(len(both), self.get_embedding_dimension(), device=both.device)
        for rows, embed, names in kinds:
            if rows.any():
                embeds[rows] = embed(**{name: features[name][rows] for name in names}).pooler_output
        features["sentence_embedding"] = embeds
        return features


def _spread(prepared: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Put the rows of prepared inputs where `rows`, bool `(batch,)`, is true, and zeros elsewhere."""
    spread = {}
    for name, tensor in prepared.items():
        spread[name] = tensor.new_zeros(len(rows), *tensor.shape[1:])
        spread[name][rows] = tensor
    return spread


def _looks_like_image_path(text: str) -> bool:
    """Return whether a string ends like an image's file name and is one word or has a folder in it."""
    return text.lower().endswith(IMAGE_ENDINGS) and (len(text.split()) == 1 or bool({"/", "\\"} & set(text)))


__all__ = ["PVLFSentenceModule"]
