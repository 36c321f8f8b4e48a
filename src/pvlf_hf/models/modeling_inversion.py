"""Textual inversion: the reference image becomes a word of the query. Saved with checkpoints.

A query is one sentence for the text encoder in which the embedding of one token, the placeholder, is made from the
reference image: `q = normalize(text(template with s))` with `s = mapping(image feature)`. The dual encoder, CLIP in
everything published, is frozen in all methods, so the gallery is its own and one index serves them all.

Shapes: `batch` queries, `n` text tokens, `m` image patches, `d` the joint width, `w` the width of token embeddings,
`v` the width of the image encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .configuration_inversion import METHODS, InversionConfig
from .dual_encoder_pvlf import DualEncoderModel
from .interface_pvlf import ComposedRetrievalOutput, QueryOutput, normalize
from .loss_inversion import symmetric_info_nce
from .mapping_inversion import Mapping, build_mapping, init_linear
from .objectives_inversion import own_objective
from .optimization_inversion import digests, palavra_words, searle_words, through_cache


@dataclass
class InversionQueryOutput(QueryOutput):
    """Query embeddings and the pseudo words in them, as [`InversionModel.get_query_features`] returns them.

    Args:
        pseudo_words (`(batch, w)`): embeddings that took the placeholder's position.
    """

    pseudo_words: Tensor | None = None


class InversionModel(DualEncoderModel):
    """Composed image retrieval by textual inversion; the mapping network is that of `config.method`.

    Images and captions alone are embedded as the dual encoder does, so that its gallery serves this model.

    Attributes:
        inverted_words (`dict`): words that were optimised for images (SEARLE-OTI, PALAVRA), float32 on the CPU, by a
            digest of the image. Clear it when weights or `config.inversion_steps` change.

    Example:
        >>> import torch
        >>> from pvlf_hf import InversionConfig, InversionModel

        >>> model = InversionModel(InversionConfig(method="pic2word")).eval()
        >>> caption = torch.tensor([[49406, 320, 1125, 539, 265, 267, 736, 49407]])  # "a photo of * , red"
        >>> output = model.get_query_features(torch.zeros(1, 3, 224, 224), caption)
        >>> output.pooler_output.shape, output.pseudo_words.shape
        (torch.Size([1, 512]), torch.Size([1, 512]))
    """

    config_class = InversionConfig
    base_model_prefix = "inversion"
    ranks_queries = True  # its contrastive loss is symmetric

    def __init__(self, config: InversionConfig) -> None:
        super().__init__(config)
        self.mapping = build_mapping(config)
        # PALAVRA's A, from text features to image features.
        self.text_map = nn.Linear(config.joint_width, config.joint_width) if config.method == "palavra" else None
        self.inverted_words: dict[str, Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a mapping network as its method's own code does, unlike the base class's normal(0, 0.02)."""
        super()._init_weights(module)
        if isinstance(module, Mapping):
            module.initialize()
        elif isinstance(module, InversionModel) and module.text_map is not None:
            init_linear(module.text_map)

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, method: str = "pic2word", **kwargs: Any) -> "InversionModel":
        """Build a model on a pretrained dual encoder, with a fresh mapping network.

        Args:
            name_or_path: Hub name or local folder of a CLIP checkpoint.
            method: a name in `METHODS`.
            **kwargs: settings of [`InversionConfig`]; the rest is passed to `from_pretrained` (`revision`, `token`).

        Returns:
            the model in eval mode. A log message says which weights are new.

        Raises:
            ValueError: if [`InversionConfig`] refuses the checkpoint, or a setting is out of range.
        """
        return super().from_vl_pretrained(name_or_path, method=method, **kwargs)  # type: ignore[return-value]

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images, in one pass, into everything that a method reads.

        Args:
            pixel_values: `(batch, 3, height, width)`.

        Returns:
            tokens `(batch, 1 + m, v)`, see [`DualEncoder.image_features`], and features `(batch, d)`, not normalised.
        """
        return self.backbone.image_features(self._sized(pixel_values))

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pseudo_words: Tensor | None = None
    ) -> Tensor:
        """Encode captions, with pseudo words in the position of their placeholders.

        A pseudo word replaces the token's embedding before the position embedding is added.

        Args:
            input_ids: int64 `(batch, n)`.
            attention_mask: `(batch, n)`, 0 for padding; None to end each caption at its first end token.
            pseudo_words: `(batch, w)`; None to embed placeholders as ordinary tokens.

        Returns:
            features `(batch, d)`, not normalised.

        Raises:
            ValueError: if a row has no placeholder, or there is not one pseudo word for each row.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if pseudo_words is not None:
            mask = self._placeholders(input_ids, len(pseudo_words))
            embeds = torch.where(mask[..., None], pseudo_words.to(embeds.dtype)[:, None], embeds)
        return self.backbone.text_features(input_ids, attention_mask, embeds)

    def _placeholders(self, input_ids: Tensor, words: int) -> Tensor:
        """Mark the tokens that pseudo words replace, bool `(batch, n)`."""
        if words != len(input_ids):
            raise ValueError(f"{words} reference images but {len(input_ids)} captions: one of each makes a query")
        mask = input_ids == self.config.placeholder_id
        if not bool((has_one := mask.any(dim=1)).all()):
            rows = (~has_one).nonzero()[:, 0].tolist()
            raise ValueError(
                f"rows {rows[:10]} of input_ids hold no placeholder (token {self.config.placeholder_id}), so the "
                "reference image would be ignored: prepare queries by process_queries of this model's processor, "
                "whose placeholder has this id"
            )
        return mask & (mask.cumsum(dim=1) == 1) if self.config.replace == "first" else mask

    def get_pseudo_words(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **sentences: Tensor,
    ) -> Tensor:
        """Turn images into pseudo words, to be used in several queries.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            input_ids: int64 `(batch, n)`, captions; needed by Context-I2W alone, whose pseudo words depend on them.
            attention_mask: `(batch, n)`, 0 for padding.
            **sentences: `prompt_ids`, `replaced_ids` and `phrase_ids`, see [`~InversionModel.invert`].

        Returns:
            `(batch, w)`.

        Raises:
            ValueError: if the method reads captions, or prompts, and there are none.
        """
        if METHODS[self.config.method].steps:
            return self.invert(pixel_values, **sentences)
        return self.pseudo_words_of(*self.encode_images(pixel_values), input_ids, attention_mask)

    def invert(
        self,
        pixel_values: Tensor,
        prompt_ids: Tensor | None = None,
        replaced_ids: Tensor | None = None,
        phrase_ids: Tensor | None = None,
    ) -> Tensor:
        """Optimise a token for each image that was not inverted before (SEARLE-OTI, PALAVRA).

        This takes `config.inversion_steps` passes of the text encoder and back for up to 32 images together, with a
        progress bar. An image's token does not depend on the images beside it.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            prompt_ids: int64 `(prompts, n)`, from [`InversionProcessor.process_queries`].
            replaced_ids: int64 `(batch, phrases, n)`, phrases about each image with the placeholder for its concept;
                SEARLE-OTI's regularisation, left out by default.
            phrase_ids: int64 `(batch, phrases, n)`, the phrases as they are.

        Returns:
            float32 `(batch, w)`, kept in `inverted_words`.

        Raises:
            ValueError: if an image is new and there are no prompts, or half of the phrases is missing.
        """
        if (replaced_ids is None) != (phrase_ids is None):
            raise ValueError(
                "replaced_ids and phrase_ids go together: the same phrases, with the placeholder and without"
            )
        keys, prompts = digests(pixel_values, replaced_ids, phrase_ids), prompt_ids
        if prompts is None and not self.inverted_words.keys() >= {*keys}:
            raise ValueError(
                f"{self.config.method} optimises a token for each new image, by prompt_ids: pass all that "
                "process_queries of this model's processor returns"
            )

        def invert(rows: list[int]) -> Tensor:
            with torch.no_grad():
                _, features = self.encode_images(pixel_values[rows].clone())
                words = None if self.mapping is None else self.pseudo_words_of(features, features)
            steps, ids = self.config.inversion_steps, prompts.clone()  # type: ignore[union-attr]  # checked above
            if words is not None:
                return palavra_words(self._encode_words, features, words, self.text_map, steps, ids)  # type: ignore[arg-type]
            phrases = [None if t is None else t[rows].clone() for t in (replaced_ids, phrase_ids)]
            kept = [keys[row] for row in rows]
            return searle_words(self._encode_words, features, kept, self.config.word_width, steps, ids, *phrases)

        return through_cache(self.inverted_words, keys, invert).to(pixel_values.device)

    def _encode_words(self, input_ids: Tensor, pseudo_words: Tensor | None) -> Tensor:
        return self.encode_text(input_ids, self.backbone.padding_mask(input_ids), pseudo_words)

    def pseudo_words_of(
        self,
        tokens: Tensor | None,
        features: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Map images that are encoded already, by [`~InversionModel.encode_images`], to pseudo words `(batch, w)`."""
        mapping: Any = self.mapping
        if not mapping.reads_tokens:
            return mapping(normalize(features).to(features.dtype) if self.config.normalize_features else features)
        if tokens is None:
            raise ValueError(f"{self.config.method} reads all tokens of an image: pass pixel_values, not its features")
        if input_ids is None:
            raise ValueError(f"pseudo words of {self.config.method} depend on the caption: pass input_ids, too")
        if len(input_ids) != len(tokens):
            raise ValueError(
                f"{len(tokens)} reference images but {len(input_ids)} captions: one of each makes a query"
            )
        return mapping(tokens, self.encode_text(input_ids, attention_mask))

    @can_return_tuple
    def get_query_features(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        replaced_ids: Tensor | None = None,
        phrase_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> InversionQueryOutput:
        """Embed queries: captions in the method's template, with the reference image as one of their words.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, captions with a placeholder, from [`InversionProcessor.process_queries`].
            attention_mask: `(batch, n)`, 0 for padding; None to end each caption at its first end token.
            context_ids: int64 `(batch, k)`, other captions that Context-I2W's mapping network reads; by default those
                of the query.
            context_attention_mask: `(batch, k)`, likewise.
            prompt_ids: see [`~InversionModel.invert`], for methods that optimise tokens; as are the next two.
            replaced_ids: likewise.
            phrase_ids: likewise.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`, `image_embeds`: float32 `(batch, d)`, L2-normalised; `pseudo_words`: `(batch, w)`.

        Raises:
            ValueError: as [`~InversionModel.encode_text`], and for options that the model does not have.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise ValueError(f"{unknown}: an inversion model has no such option of a query")
        tokens, features = self.encode_images(pixel_values)
        context = (input_ids, attention_mask) if context_ids is None else (context_ids, context_attention_mask)
        if METHODS[self.config.method].steps:
            pseudo_words = self.invert(pixel_values, prompt_ids, replaced_ids, phrase_ids)
        else:
            pseudo_words = self.pseudo_words_of(tokens, features, *context)
        return InversionQueryOutput(
            pooler_output=normalize(self.encode_text(input_ids, attention_mask, pseudo_words)),
            image_embeds=normalize(features),
            pseudo_words=pseudo_words,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        target_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> ComposedRetrievalOutput:
        """Embed queries, target images, or both; or compute the method's own objective, which needs no triplets.

        With target images, and without `return_loss=True`, see [`ComposedRetrievalModel.forward`]. With
        `return_loss=True` and no target images the loss is the method's own, see `OBJECTIVES`.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, sentences with a placeholder.
            attention_mask: `(batch, n)`, 0 for padding.
            target_pixel_values: `(targets, 3, height, width)`.
            target_ids: int64 `(targets,)`, equal for equal targets.
            return_loss: compute a loss; by default whenever there are queries and targets.
            **kwargs: options of [`~InversionModel.get_query_features`], or further inputs of the method's own
                objective; and `return_dict=False` for a tuple.

        Raises:
            ValueError: if inputs are missing.
        """
        if not return_loss or target_pixel_values is not None:
            return super().forward(
                pixel_values, input_ids, attention_mask, target_pixel_values, target_ids, return_loss, **kwargs
            )
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return own_objective(self, {name: t for name, t in {**given, **kwargs}.items() if isinstance(t, Tensor)})

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """Compute [`symmetric_info_nce`] with this configuration's temperature."""
        return symmetric_info_nce(query_embeds, target_embeds, self.config.temperature, **kwargs)


InversionModel.register_for_auto_class("AutoModel")

__all__ = ["METHODS", "InversionModel", "InversionQueryOutput"]
