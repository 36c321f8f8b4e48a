"""The interface of a composed retrieval model: all that training, evaluation and search need.

Saved with checkpoints. A model implements three embedding methods and a loss, and names the modules of its image
side and its text side; [`ComposedRetrievalModel`] derives `forward` and the choice of what trains from them.

Shapes: `batch` queries, `n` text tokens, `d` the width of embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .loss_pvlf import cosine_similarity

FINETUNING = {"frozen": (False, False), "text": (False, True), "both": (True, True)}
"""Name of a finetuning mode to whether the image side and the text side train (Table 3 of the paper)."""


@dataclass
class QueryOutput(ModelOutput):
    """Query embeddings, as `get_query_features` returns them.

    Args:
        pooler_output (float32 `(batch, d)`): query embeddings, L2-normalised; of a model that scores by `combine`
            `(batch, 2d)`.
        image_embeds (float32 `(batch, d)`, *optional*): embeddings of the reference images alone, L2-normalised, where
            the model has computed them on the way.
        text_embeds (float32 `(batch, d)`, *optional*): embeddings of the relative captions alone, likewise.
    """

    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclass
class ComposedRetrievalOutput(ModelOutput):
    """Embeddings of queries and targets and their comparison, as `forward` returns them.

    Args:
        loss (float32 scalar, with queries and targets unless `return_loss=False`): the model's loss over the batch.
        query_embeds (float32 `(batch, d)`, with queries): query embeddings, L2-normalised.
        target_embeds (float32 `(targets, d)`, with targets): target image embeddings, L2-normalised.
        similarity (float32 `(batch, targets)`, as the loss): their cosine similarities.
    """

    loss: Tensor | None = None
    query_embeds: Tensor | None = None
    target_embeds: Tensor | None = None
    similarity: Tensor | None = None


class ComposedRetrievalModel(PreTrainedModel):
    """Base class of models that embed queries (a reference image and a relative caption) and gallery images.

    A subclass defines [`get_image_features`], [`get_text_features`], [`get_query_features`], [`loss`],
    [`image_side`] and [`text_side`]. Its processor prepares queries by `process_queries(images, text)` and gallery
    images by `process_targets(images)`, see [`ComposedRetrievalProcessor`].
    """

    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    ranks_queries = False  # whether `loss` also takes `all_query_embeds`, the queries of all processes
    explains = False  # whether queries come with `aggregation_weights` and `attentions` on request
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides under accumulation

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed images: gallery images, training targets, and reference images alone.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised.
        """
        raise NotImplementedError

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed captions alone, in the space of the images.

        Args:
            input_ids: int64 `(batch, n)`.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised.
        """
        raise NotImplementedError

    def get_query_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> QueryOutput:
        """Embed queries.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            **kwargs: options of the model, and `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised.
        """
        raise NotImplementedError

    def compose_embeds(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor | None:
        """Compose queries from embeddings that are known already, such as that of an indexed image.

        Args:
            image_embeds: `(batch, d)`, from [`~ComposedRetrievalModel.get_image_features`].
            text_embeds: `(batch, d)`, from [`~ComposedRetrievalModel.get_text_features`].

        Returns:
            as `pooler_output` of [`~ComposedRetrievalModel.get_query_features`]; None, by default, where the model
            reads more of images or texts than these.
        """
        return None

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """Compute the training loss of queries against the targets of the batch.

        Args:
            query_embeds: `(batch, d)`, L2-normalised.
            target_embeds: `(targets, d)`, L2-normalised; more than queries when gathered from other processes.
            **kwargs: `positives`, `target_ids` and `chunk_size`, see [`focal_info_nce`].

        Returns:
            float32 scalar.
        """
        raise NotImplementedError

    def loss_inputs(self, output: ComposedRetrievalOutput) -> tuple[Tensor, Tensor]:
        """Return the rows that `loss` compares, `(batch, w)` and `(targets, w)`, of an output of `forward`.

        By default queries and targets. A model with a second objective, such as CASE's way back, places its rows
        beside them, so that targets gathered from other processes serve both.
        """
        return output.query_embeds, output.target_embeds  # type: ignore[return-value]  # both are there by then

    @property
    def combine(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Function of two similarities that scores an image, None where the score is the cosine of embeddings.

        A composition other than an inner product has no query embedding of width `d`. Its `get_query_features` returns
        the embeddings of image and text side by side, `(batch, 2d)`, and this function takes the similarities of a
        gallery image with the two, centred by the gallery's mean ([`halves`]), and returns its score. It works
        element by element and must not decrease in either similarity: exact search rests on that.
        """
        return None

    def score(self, query_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Score images for queries.

        Args:
            query_embeds: `(queries, d)`, or `(queries, 2d)` where the model has `combine`, L2-normalised.
            image_embeds: `(images, d)`, L2-normalised: the whole gallery, whose mean centres similarities.

        Returns:
            `(queries, images)`, higher is better: cosines, or what `combine` makes of two similarities; float32, and
            float64 where `combine` gets float64.
        """
        if self.combine is None:
            return cosine_similarity(query_embeds, image_embeds)
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)
        images = image_embeds.to(dtype)
        vectors, offsets = halves(query_embeds.to(dtype), images.mean(dim=0))
        return self.combine(*((vectors @ images.T) - offsets[..., None]).unbind(dim=1))

    @property
    def embedding_width(self) -> int:
        """Width `d` of embeddings."""
        return self.config.hidden_size

    @property
    def encoder_config(self) -> PreTrainedConfig:
        """Part of the configuration that the encoders are built from; by default all of it."""
        return self.config

    @property
    def image_config(self) -> PreTrainedConfig:
        """Part of the configuration that the image side is built from; `encoder_config` unless overridden.

        A gallery depends on it, on the weights of `image_side` and `gallery_prompts`, on the image processor, and on
        nothing else: models that agree in these search the same gallery.
        """
        return self.encoder_config

    @property
    def image_side(self) -> dict[str, nn.Module]:
        """Modules that embed images: the image encoder and its projection.

        Their names are those that all models on the same encoder give them, see `image_config`.
        """
        raise NotImplementedError

    @property
    def gallery_prompts(self) -> nn.Module | None:
        """Module of prompts that gallery images pass the image encoder with, on which their embeddings depend, too."""
        return None

    @property
    def text_side(self) -> dict[str, nn.Module]:
        """Modules of the pretrained text encoder and its projection, by their name in the model."""
        raise NotImplementedError

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
        """Embed queries, target images, or both, and compare them.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions.
            attention_mask: `(batch, n)`, 0 for padding.
            target_pixel_values: `(targets, 3, height, width)`; for a loss the target of each query, in order.
            target_ids: int64 `(targets,)`, equal for equal targets, which are then no negatives of each other.
            return_loss: compare queries with targets; by default whenever there are both. With False the output has
                no loss and no similarity. A model that scores by `combine` has no loss.
            **kwargs: options of [`~ComposedRetrievalModel.get_query_features`], and `return_dict=False` for a tuple.

        Raises:
            ValueError: if there is nothing to embed, half a query, or a loss is requested without queries or targets.
        """
        if (pixel_values is None) != (input_ids is None):
            raise ValueError(
                "a query is pixel_values and input_ids together; for one of them alone use get_image_features or "
                "get_text_features"
            )
        if pixel_values is None and target_pixel_values is None:
            raise ValueError("nothing to embed: pass pixel_values with input_ids, target_pixel_values, or all three")
        query = None
        if pixel_values is not None and input_ids is not None:
            query = self.get_query_features(pixel_values, input_ids, attention_mask, **kwargs)
        output = self.start_output(query)
        if target_pixel_values is not None:
            output.target_embeds = self.get_image_features(target_pixel_values).pooler_output
        return self.compare(output, target_ids, return_loss)

    def start_output(self, query: QueryOutput | None) -> ComposedRetrievalOutput:
        """Start the output of `forward` from that of `get_query_features`; a subclass adds further fields."""
        return ComposedRetrievalOutput(query_embeds=None if query is None else query.pooler_output)

    def compare(
        self, output: ComposedRetrievalOutput, target_ids: Tensor | None, return_loss: bool | None
    ) -> ComposedRetrievalOutput:
        """Add similarities and the loss to an output that holds queries and targets.

        Raises:
            ValueError: if `return_loss` is True without queries or targets.
        """
        if output.query_embeds is not None and output.target_embeds is not None:
            if return_loss is not False:
                output.similarity = self.score(output.query_embeds, output.target_embeds)
            if return_loss or (return_loss is None and self.combine is None):
                output.loss = self.loss(*self.loss_inputs(output), target_ids=target_ids)
        elif return_loss:
            raise ValueError("return_loss=True needs queries and target_pixel_values, one target image for each query")
        return output

    def set_finetuning(self, finetuning: str) -> None:
        """Choose which weights train (Table 3 of the paper); those on neither side always do.

        Args:
            finetuning: `"frozen"` trains no encoder, `"text"` the text encoder and its projection, `"both"` all.
                A frozen side stays in eval mode when the model is put in train mode, so that its features do not
                depend on the step (TransAgg leaves its dropout on).

        Raises:
            ValueError: for another name.
        """
        if finetuning not in FINETUNING:
            raise ValueError(f"finetuning={finetuning!r}: choose one of {sorted(FINETUNING)}")
        self.requires_grad_(True)  # PEFT leaves the base weights frozen after an adapter is merged
        for side, trains in zip((self.image_side, self.text_side), FINETUNING[finetuning], strict=True):
            for module in side.values():
                module.requires_grad_(trains)
        self.train(self.training)

    def add_adapter(self, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add an adapter of PEFT, see the base class.

        Raises:
            ValueError: also if it is prompt learning.
        """
        check_adapter_config(adapter_config)
        super().add_adapter(adapter_config, *args, **kwargs)

    def train(self, mode: bool = True) -> "ComposedRetrievalModel":
        """Set train mode, except for encoders that [`~ComposedRetrievalModel.set_finetuning`] froze."""
        super().train(mode)
        for module in (*self.image_side.values(), *self.text_side.values()):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self


class ComposedRetrievalProcessor(ProcessorMixin):
    """Base class of the processors of composed retrieval models.

    Attributes:
        image_processor: prepares images; its settings are part of what identifies embeddings.
        tokenizer: tokenizes captions.
        max_text_length: tokens that captions are truncated to.
        train_text_length: tokens that captions are truncated to in training; None for as many.
        padding: `"longest"` or `"max_length"`.
    """

    image_processor: Any
    tokenizer: Any
    max_text_length: int
    train_text_length: int | None = None
    padding: str

    @property
    def training_settings(self) -> dict[str, Any]:
        """Settings of a call that prepares training captions."""
        length = self.train_text_length
        return {} if length is None else {"text_kwargs": {"max_length": length}}

    def process_queries(self, images: Any, text: Any, **kwargs: Any) -> BatchFeature:
        """Prepare queries, each a reference image with its relative caption.

        Returns:
            the inputs of [`ComposedRetrievalModel.get_query_features`].
        """
        raise NotImplementedError

    def process_captions(self, text: Any, **kwargs: Any) -> BatchFeature:
        """Prepare the relative captions of queries whose images are prepared separately, as in a pipeline.

        Returns:
            all inputs of a query but `pixel_values`.
        """
        return self(text=text, **kwargs)

    def process_targets(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Prepare gallery images.

        Returns:
            `pixel_values`, the input of [`ComposedRetrievalModel.get_image_features`].
        """
        raise NotImplementedError


def check_adapter(model: Any) -> None:
    """Refuse a model that PEFT wrapped for prompt learning; other adapters pass, and so does a plain model.

    PEFT would hand the words with its vectors before them to a single language model. The methods that embed never
    see these vectors, so that the plain model would answer in the adapter's place.

    Raises:
        ValueError: if an adapter of the model is prompt learning.
    """
    adapters = getattr(model, "peft_config", None)
    for settings in adapters.values() if isinstance(adapters, dict) else ():
        check_adapter_config(settings)


def check_adapter_config(settings: Any) -> None:
    """Refuse an adapter's configuration if it is prompt learning, see [`check_adapter`]."""
    if getattr(settings, "is_prompt_learning", False):
        raise ValueError(
            f"{type(settings).__name__} is prompt learning, which PEFT offers for a single language model and not for "
            "image and text: use an adapter such as LoraConfig, or the model's own prompts (num_prompts of PVLFConfig)"
        )


def unwrap(model: nn.Module) -> "ComposedRetrievalModel":
    """Return the composed retrieval model inside an adapter of PEFT, DDP or FSDP, or the model itself.

    It is recognised by its methods, because the code of a checkpoint defines a class of its own.

    Raises:
        ValueError: if the adapter is prompt learning.
    """
    check_adapter(model)
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "get_query_features"))  # type: ignore[return-value]


def halves(query_embeds: Tensor, gallery_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Split query embeddings of a model that scores by `combine` into their image and their text.

    Similarities are centred by the gallery's mean m: (x - m) . (v - m) with the image v, (x - m) . t with the text t.
    The step is BASIC's (i-CIR, NeurIPS 2025), with the mean of the gallery that is searched in place of LAION's; the
    gallery gives no mean of texts, and that of the similarities, m . t, takes its place.

    Args:
        query_embeds: `(queries, 2d)`, image and text side by side.
        gallery_mean: `(d,)`, mean of the gallery's embeddings, each L2-normalised.

    Returns:
        vectors `(queries, 2, d)` and offsets `(queries, 2)`: an image x has the similarities `vectors @ x - offsets`.
    """
    parts = F.normalize(query_embeds.unflatten(-1, (2, -1)), dim=-1)
    centred = torch.stack([parts[:, 0] - gallery_mean, parts[:, 1]], dim=1)
    return centred, centred @ gallery_mean


def normalize(features: Tensor) -> Tensor:
    """L2-normalise `(batch, d)` in float32 whatever the model's dtype: cosines are compared to many digits."""
    return F.normalize(features.float(), dim=-1)


__all__ = [
    "ComposedRetrievalModel",
    "ComposedRetrievalOutput",
    "ComposedRetrievalProcessor",
    "QueryOutput",
    "check_adapter",
]
