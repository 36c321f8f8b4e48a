"""CASE: the caption reads the reference image by cross-attention, layer by layer. Saved with checkpoints.

A query is BLIP's image-grounded text encoder on the reference image's tokens and the relative caption; its first
token, projected, is the embedding. Gallery images are embedded by the image encoder alone, as in any other model on
the same BLIP, so one index serves them all. In training CASE also asks for the way back: from the target image and the
marked caption to the reference image.

Shapes: `batch` queries, `n` text tokens, `m` image patches, `v` the image encoder's width, `d` the joint width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_case import CASEConfig
from .dual_encoder_pvlf import DualEncoderModel
from .interface_pvlf import ComposedRetrievalOutput, QueryOutput, normalize
from .loss_case import hn_nce
from .loss_pvlf import focal_info_nce

EQUAL_WITHIN = 1e-3
"""Distance up to which two embeddings are of one image (our choice): rounding makes 1e-6, a changed pixel more."""


@dataclass
class CASEOutput(ComposedRetrievalOutput):
    """Embeddings of queries and targets, and those of the way back.

    Args:
        reverse_query_embeds (float32 `(batch, d)`, with queries, targets and a loss or in train mode): embeddings of
            target images with marked captions, L2-normalised.
        reference_embeds (float32 `(batch, d)`, likewise): embeddings of the reference images, their answers.
    """

    reverse_query_embeds: Tensor | None = None
    reference_embeds: Tensor | None = None


class CASEModel(DualEncoderModel):
    """Composed image retrieval by BLIP's image-grounded text encoder, see [`CASEConfig`].

    Example:
        >>> import torch
        >>> from pvlf_hf import CASEConfig, CASEModel

        >>> text = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
        >>> blip = {"model_type": "blip", "text_config": text, "vision_config": vision, "image_text_hidden_size": 16}
        >>> model = CASEModel(CASEConfig(vl_config=blip, enc_token_id=89, reverse_token_id=88)).eval()
        >>> query = model.get_query_features(torch.zeros(1, 3, 32, 32), torch.tensor([[2, 17, 5, 3]]))
        >>> query.pooler_output.shape
        torch.Size([1, 16])
    """

    config_class = CASEConfig
    base_model_prefix = "case"
    may_be_new = ".crossattention."
    backbone: Any  # a BlipDualEncoder

    def __init__(self, config: CASEConfig) -> None:
        super().__init__(config)
        self.post_init()

    def project_images(self, image_tokens: Tensor) -> Tensor:
        """Project tokens of images to embeddings.

        Args:
            image_tokens: `(batch, 1 + m, v)`, `last_hidden_state` of [`~CASEModel.get_image_features`].

        Returns:
            float32 `(batch, d)`, L2-normalised.
        """
        # All tokens and then the first, as in the other models on BLIP: embeddings are equal bit by bit.
        return normalize(self.backbone.vision_proj(image_tokens.to(self.dtype))[:, 0])

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed images as BLIP does: what a gallery is indexed by, and a training target.

        Args:
            pixel_values: `(batch, 3, height, width)`, from the processor's `process_targets`.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised; `last_hidden_state`: `(batch, 1 + m, v)`, all tokens
            after the final norm, not projected: what a caption attends to.
        """
        tokens = self._image_tokens(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=self.project_images(tokens))

    def encode_image_tokens(self, pixel_values: Tensor, as_query: bool = False) -> Tensor:
        """Encode images without projecting them."""
        return self.backbone.vision_model(pixel_values=pixel_values).last_hidden_state

    @can_return_tuple
    def get_query_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> QueryOutput:
        """Embed queries, each a reference image and a relative caption.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions; all from [`CASEProcessor.process_queries`].
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output` and `image_embeds`: float32 `(batch, d)`, L2-normalised.

        Raises:
            ValueError: if the numbers of images and captions differ, or attentions are requested.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value):
            raise ValueError(f"{unknown}: CASE returns the embeddings of queries alone")
        tokens = self._image_tokens(pixel_values)
        return QueryOutput(
            pooler_output=self.compose(tokens, input_ids, attention_mask), image_embeds=self.project_images(tokens)
        )

    def compose(
        self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """Embed captions that read images which are encoded already.

        Args:
            image_tokens: `(batch, 1 + m, v)`, `last_hidden_state` of [`~CASEModel.get_image_features`].
            input_ids: int64 `(batch, n)`, relative captions, `[CLS]` or `[ENC]` first.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            reverse: mark the captions for the way back, from the target image to the reference.

        Returns:
            float32 `(batch, d)`, L2-normalised.

        Raises:
            ValueError: if the numbers of images and captions differ, or a marked caption is too long.
        """
        if image_tokens.shape[0] != input_ids.shape[0]:  # export follows shapes, not len
            raise ValueError(f"{image_tokens.shape[0]} reference images but {input_ids.shape[0]} relative captions")
        if self.config.first_token == "enc":
            first = torch.full_like(input_ids[:, :1], self.config.enc_token_id)
            input_ids = torch.cat([first, input_ids[:, 1:]], dim=1)
        if reverse:
            input_ids, attention_mask = self._mark(input_ids, attention_mask)
        hidden = self.backbone.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_tokens.to(self.dtype)
        ).last_hidden_state
        return normalize(self.backbone.text_proj(hidden[:, 0]))

    def _mark(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Insert the token of the way back before each caption, after its first token."""
        longest = self.config.vl_config.text_config.max_position_embeddings
        if input_ids.shape[1] >= longest:
            raise ValueError(
                f"captions of {input_ids.shape[1]} tokens leave no position for the token of the way back "
                f"({longest} in all): set the processor's train_text_length below {longest}, or reverse_weight=0"
            )
        marker = torch.full_like(input_ids[:, :1], self.config.reverse_token_id)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask[:, :1], attention_mask], dim=1)
        return torch.cat([input_ids[:, :1], marker, input_ids[:, 1:]], dim=1), attention_mask

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
        """Embed queries, target images, or both, and compare them, see [`ComposedRetrievalModel.forward`].

        With both, each image is encoded once for all that reads it.

        Returns:
            [`CASEOutput`].
        """
        if pixel_values is None or input_ids is None or target_pixel_values is None or any(kwargs.values()):
            return super().forward(
                pixel_values, input_ids, attention_mask, target_pixel_values, target_ids, return_loss, **kwargs
            )
        images, targets = self._image_tokens(pixel_values), self._image_tokens(target_pixel_values)
        return self.compare_tokens(images, targets, input_ids, attention_mask, target_ids, return_loss)

    def compare_tokens(
        self,
        image_tokens: Tensor,
        target_tokens: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        target_ids: Tensor | None = None,
        return_loss: bool | None = None,
    ) -> CASEOutput:
        """Compute what `forward` does from tokens of images, such as those that were kept before training.

        Args:
            image_tokens: `(batch, 1 + m, v)` of reference images, from [`~CASEModel.get_image_features`].
            target_tokens: `(targets, 1 + m, v)`, or `(targets, 1, v)` of the first alone where `reverse_weight` is 0.
            input_ids: see `forward`, as are the others.
            attention_mask: likewise.
            target_ids: likewise.
            return_loss: likewise.
        """
        output = CASEOutput(
            query_embeds=self.compose(image_tokens, input_ids, attention_mask),
            target_embeds=self.project_images(target_tokens),
        )
        if self.config.reverse_weight and (self.training or return_loss is not False):
            if len(target_tokens) != len(image_tokens):
                raise ValueError(
                    f"{len(image_tokens)} queries but {len(target_tokens)} targets: the way back starts from the "
                    "target of each query; pass one for each, or return_loss=False in eval mode"
                )
            output.reverse_query_embeds = self.compose(target_tokens, input_ids, attention_mask, reverse=True)
            output.reference_embeds = self.project_images(image_tokens)
        return self.compare(output, target_ids, return_loss)  # type: ignore[return-value]  # what it got

    def loss_inputs(self, output: ComposedRetrievalOutput) -> tuple[Tensor, Tensor]:
        """Return both ways side by side, each `(batch, 2d)`, see [`ComposedRetrievalModel.loss_inputs`]."""
        queries, targets = super().loss_inputs(output)
        if not isinstance(output, CASEOutput) or output.reverse_query_embeds is None:
            return queries, targets
        pairs = ((queries, output.reverse_query_embeds), (targets, output.reference_embeds))
        return torch.cat(pairs[0], dim=1), torch.cat(pairs[1], dim=1)  # type: ignore[arg-type]  # they come together

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """Compute the configuration's objective, of both ways where there are both.

        Args:
            query_embeds: `(batch, d)`, L2-normalised; or `(batch, 2d)` from [`~CASEModel.loss_inputs`].
            target_embeds: `(targets, d)` or `(targets, 2d)`.
            **kwargs: `positives`, `target_ids` and `chunk_size`, see [`focal_info_nce`].

        Returns:
            float32 scalar.
        """
        width = self.embedding_width
        forth = self._contrast(query_embeds[:, :width], target_embeds[:, :width], **kwargs)
        if query_embeds.shape[1] == width:
            return forth
        references = target_embeds[:, width:]
        # An image that is the reference of two queries is no negative of either, as with equal targets. Its embeddings
        # of two processes differ by rounding, about 1e-6; the first one that is as near gives the id.
        apart = torch.cdist(references.detach(), references.detach(), compute_mode="donot_use_mm_for_euclid_dist")
        ids = (apart < EQUAL_WITHIN).int().argmax(dim=1)
        back = self._contrast(query_embeds[:, width:], references, **{**kwargs, "target_ids": ids})
        return forth + self.config.reverse_weight * back

    def _contrast(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        c = self.config
        if c.objective == "hn_nce":
            released = c.hn_nce_as_released
            return hn_nce(query_embeds, target_embeds, c.temperature, c.alpha, c.beta, released, **kwargs)
        return focal_info_nce(query_embeds, target_embeds, c.temperature, alpha=1.0, gamma=0.0, **kwargs)


CASEModel.register_for_auto_class("AutoModel")

__all__ = ["CASEModel", "CASEOutput"]
