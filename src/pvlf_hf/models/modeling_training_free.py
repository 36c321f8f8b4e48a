"""Composed image retrieval by a pretrained dual encoder alone, without training. Saved with checkpoints.

The reference image and the relative caption are embedded by the dual encoder, and a formula makes one query of the two
(`compositions_training_free.py`). It has no weights of its own: a gallery that it indexed is that of PVLF on the same
encoder, too, as long as fine-tuning leaves the image side as it is.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.utils import can_return_tuple

from .compositions_training_free import COMPOSITIONS
from .configuration_training_free import TrainingFreeConfig
from .dual_encoder_pvlf import DualEncoderModel
from .interface_pvlf import QueryOutput
from .loss_pvlf import focal_info_nce


class TrainingFreeModel(DualEncoderModel):
    """Composed image retrieval with a pretrained dual encoder and a formula, see [`TrainingFreeConfig`].

    Example:
        ```python
        model = TrainingFreeModel.from_vl_pretrained("openai/clip-vit-base-patch32", composition="slerp")
        processor = PVLFProcessor.from_vl_pretrained("openai/clip-vit-base-patch32")
        query = model.get_query_features(**processor.process_queries(image, "the same in blue"))
        ```
    """

    config_class = TrainingFreeConfig
    base_model_prefix = "training_free"

    def __init__(self, config: TrainingFreeConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def get_query_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> QueryOutput:
        """Embed queries, each a reference image and a relative caption, by the configuration's composition.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions; all from [`PVLFProcessor.process_queries`].
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`, `image_embeds` and `text_embeds`: float32 `(batch, d)`, L2-normalised; the first of the
            composition `"product"` `(batch, 2d)`.

        Raises:
            ValueError: if the numbers of images and captions differ, or attentions are requested.
        """
        if len(pixel_values) != len(input_ids):
            raise ValueError(f"{len(pixel_values)} reference images but {len(input_ids)} relative captions")
        if unknown := sorted(name for name, value in kwargs.items() if value):
            raise ValueError(f"{unknown}: the composition {self.config.composition!r} is a formula and has none")
        image = self.get_image_features(pixel_values).pooler_output
        text = self.get_text_features(input_ids, attention_mask).pooler_output
        return QueryOutput(pooler_output=self.compose_embeds(image, text), image_embeds=image, text_embeds=text)

    def compose_embeds(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compose queries from embeddings, see [`ComposedRetrievalModel.compose_embeds`]."""
        compose = COMPOSITIONS[self.config.composition].compose
        return compose(image_embeds, text_embeds, self.config.composition_weight)

    @property
    def combine(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Function of two similarities that the composition scores by, see [`ComposedRetrievalModel.combine`]."""
        combine = COMPOSITIONS[self.config.composition].combine
        if combine is None:
            return None
        weight = self.config.composition_weight
        return lambda image, text: combine(image, text, weight)

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """Compute InfoNCE with this configuration's temperature, see [`focal_info_nce`].

        Raises:
            ValueError: if the composition has no query embedding.
        """
        if self.combine is not None:
            raise ValueError(
                f"the composition {self.config.composition!r} is no query embedding that a loss could train: "
                "fine-tune with composition='slerp' or 'sum', and set model.config.composition afterwards"
            )
        return focal_info_nce(query_embeds, target_embeds, self.config.temperature, alpha=1.0, gamma=0.0, **kwargs)


TrainingFreeModel.register_for_auto_class("AutoModel")

__all__ = ["TrainingFreeModel"]
