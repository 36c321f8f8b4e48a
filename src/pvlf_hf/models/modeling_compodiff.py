"""CompoDiff: a query is the image embedding that is generated for it. Saved with checkpoints.

A denoiser (`denoiser_compodiff.py`) turns noise into an embedding of CLIP's image space, step by step
(`sampler_compodiff.py`). The mean of a few samples, with a share of the reference image's embedding, is the query. The
encoders are frozen, so the gallery is the backbone's own.

Shapes: `batch` queries, `n` text tokens, `w` the text width, `d` the joint width.
"""

from copy import deepcopy
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, CLIPTextModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .backbones_pvlf import load_pretrained_dual_encoder
from .configuration_compodiff import CompoDiffConfig
from .configuration_pvlf import load_vl_config
from .denoiser_compodiff import Denoiser, Memory, SelfAttention
from .dual_encoder_pvlf import DualEncoderModel
from .interface_pvlf import ComposedRetrievalOutput, QueryOutput, normalize
from .objective_compodiff import predict_targets
from .processing_compodiff import CompoDiffProcessor
from .sampler_compodiff import draw_noise, sample, sampling_times

logger = logging.get_logger(__name__)


class CompoDiffModel(DualEncoderModel):
    """Composed image retrieval by diffusion, see [`CompoDiffConfig`].

    All queries start from the same noise, drawn from `config.seed`: a query's embedding depends on nothing but its
    image, its caption and the configuration.

    Example:
        ```python
        towers = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
        model = CompoDiffModel.from_vl_pretrained(*towers)
        processor = CompoDiffProcessor.from_vl_pretrained(*towers)
        query = model.get_query_features(**processor.process_queries(image, "the same in blue"), steps=5)
        ```
    """

    config_class = CompoDiffConfig
    base_model_prefix = "compodiff"
    _no_split_modules = ["DenoiserLayer"]  # the backbone adds its layers
    _keep_in_fp32_modules_strict = {"denoiser"}

    def __init__(self, config: CompoDiffConfig) -> None:
        super().__init__(config)
        if len(self.backbone.text_modules) == 2:  # the denoiser reads text tokens before their projection
            setattr(self.backbone, self.backbone.text_modules[1], nn.Identity())
        self.denoiser = Denoiser(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the denoiser by PyTorch's defaults, unlike the base class's normal(0, 0.02) (ours)."""
        super()._init_weights(module)
        if isinstance(module, Denoiser):
            init.normal_(module.relative_bias.weight)
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    bound = part.in_features**-0.5
                    for weight in part.parameters():
                        init.uniform_(weight, -bound, bound)
                elif isinstance(part, SelfAttention | Memory):
                    init.normal_(part.null_key_value)

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, text_encoder: str | None = None, **kwargs: Any) -> "CompoDiffModel":
        """Build a model on pretrained encoders, with a fresh denoiser.

        Args:
            name_or_path: Hub name or local folder of a dual encoder, one of `BACKBONES`.
            text_encoder: Hub name or local folder of another CLIP, whose text encoder takes the place of its own.
            **kwargs: settings of [`CompoDiffConfig`]; the rest is passed to `from_pretrained` (`revision`, `token`).

        Returns:
            the model in eval mode. A log message says which weights are new.

        Raises:
            ValueError: if a checkpoint is not one of a supported encoder, or a setting is out of range.
        """
        # Annotations are the fields of this class alone: dtype, which is inherited, goes to from_pretrained.
        settings = {name: kwargs.pop(name) for name in CompoDiffConfig.__annotations__ if name in kwargs}
        if refused := {"vl_config", "device_map"} & {*settings, *kwargs}:
            raise ValueError(
                f"{sorted(refused)}: the checkpoint is its own vl_config, and a device is set by model.to()"
            )
        files = {name: value for name, value in kwargs.items() if name != "dtype"}
        own = load_vl_config(name_or_path, **files)
        if text_encoder is None:
            config = CompoDiffConfig(vl_config=own, **settings)
            encoder = load_pretrained_dual_encoder(name_or_path, config.vl_config, **kwargs)
        else:
            config = CompoDiffConfig(vl_config=_with_text_encoder(own, text_encoder, **files), **settings)
            encoder = load_pretrained_dual_encoder(name_or_path, own, **kwargs)
            encoder.text_model = _load_text_encoder(config.vl_config.text_config, text_encoder, **kwargs)
        if config.negative_ids is None:
            processor = CompoDiffProcessor.from_vl_pretrained(name_or_path, text_encoder, **files)
            config.negative_ids, config.pad_id = processor.negative["negative_ids"], processor.negative["pad_id"]
        config.validate_architecture()
        model = cls._from_config(config, attn_implementation={"": None})  # not the encoders': BLIP has eager only
        for name in (*encoder.vision_modules, encoder.text_modules[0]):
            setattr(model.backbone, name, getattr(encoder, name))
        model.backbone.to(dtype=next(encoder.parameters()).dtype)
        new = sum(parameter.numel() for parameter in model.denoiser.parameters())
        logger.warning(
            f"{cls.__name__}: the encoders come from {name_or_path}"
            f"{f' and {text_encoder}' if text_encoder else ''}; the {new:,} weights of the denoiser are new and must "
            "be trained before use"
        )
        return model.eval()

    def set_finetuning(self, finetuning: str) -> None:
        """Choose which weights train, see [`ComposedRetrievalModel.set_finetuning`].

        Raises:
            ValueError: for `"both"`, under which the image encoder would make its targets easy to predict.
        """
        if finetuning == "both":
            raise ValueError(
                "finetuning='both': the denoising loss compares embeddings that the image encoder itself makes, and "
                "training it would shrink them all to one: pass finetuning='frozen', as published, or 'text'"
            )
        super().set_finetuning(finetuning)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encode images into what the denoiser reads and predicts: float32 `(batch, d)`, not normalised."""
        return self._image_tokens(pixel_values)[:, 0].float()

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode captions into all their tokens, before any projection.

        Args:
            input_ids: int64 `(batch, n)`, padded to the full length.
            attention_mask: `(batch, n)`, 0 for padding.

        Returns:
            `(batch, n, w)`.

        Raises:
            ValueError: if captions have another length.
        """
        if input_ids.shape[1] != self.config.text_length:
            raise ValueError(
                f"captions are {input_ids.shape[1]} tokens long, but the denoiser reads all {self.config.text_length} "
                'that they are padded to: pass padding="max_length", as the processor saved with this checkpoint does'
            )
        if self.config.vl_config.model_type == "siglip":  # it was trained without a mask
            return self.backbone.text_tokens(input_ids, attention_mask)[0]
        encoder = getattr(self.backbone, self.backbone.text_modules[0])
        return encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def encode_negative(
        self,
        like: Tensor,
        attention_mask: Tensor | None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode the negative text of queries, the configuration's unless one is given: `(batch, n, w)`."""
        if negative_input_ids is None:
            ids = self.config.negative_ids
            if ids is None:
                raise ValueError(
                    "the configuration has no negative_ids, the empty text that guidance leads away from: set "
                    "model.config.negative_ids and pad_id to those of processor.negative"
                )
            padding = self.config.text_length - len(ids)
            negative_input_ids = like.new_tensor([ids + [self.config.pad_id] * padding])
            negative_attention_mask = like.new_tensor([[1] * len(ids) + [0] * padding])
        if len(negative_input_ids) not in (1, len(like)):
            raise ValueError(f"{len(negative_input_ids)} negative texts for {len(like)} queries: pass one, or as many")
        if self.config.negative_mask == "caption" and attention_mask is not None:
            negative_input_ids, negative_attention_mask = negative_input_ids.expand_as(like), attention_mask
        return self.encode_text(negative_input_ids, negative_attention_mask).expand(len(like), -1, -1)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed captions alone: the image embeddings that are generated for them without a reference image.

        Args:
            input_ids: int64 `(batch, n)`.
            attention_mask: `(batch, n)`, 0 for padding.
            **kwargs: options of [`~CompoDiffModel.get_query_features`], and `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised.
        """
        query = self.get_query_features(None, input_ids, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(pooler_output=query.pooler_output)

    @can_return_tuple
    @torch.no_grad()
    def get_query_features(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        steps: int | None = None,
        guidance: tuple[float, float] | None = None,
        num_samples: int | None = None,
        source_weight: float | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> QueryOutput:
        """Generate queries: normalize((1 - weight) mean of the samples + weight reference image). Gives no gradients.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images; None for queries by text alone.
            input_ids: int64 `(batch, n)`, relative captions, from [`CompoDiffProcessor.process_queries`].
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            mask: `(batch, mask_size, mask_size)`, 1 where the image is to change; None for no mask.
            negative_input_ids: int64 `(batch, n)` or `(1, n)`, from [`CompoDiffProcessor.process_negative`]; by
                default the empty text.
            negative_attention_mask: likewise.
            steps: times of sampling; these and the next three are by default the configuration's.
            guidance: scales for image and text; 1 is none.
            num_samples: samples whose mean is the query.
            source_weight: weight of the reference image.
            generator: draws other noise, for each query its own, in place of that of `config.seed`.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output` and, with images, `image_embeds`: float32 `(batch, d)`, L2-normalised.

        Raises:
            ValueError: if numbers of images, captions and masks differ, a mask has another size, captions are not
                padded to the full length, or an option is out of range or unknown.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise ValueError(f"{unknown}: CompoDiff has no such option of a query")
        if pixel_values is not None and len(pixel_values) != len(input_ids):
            raise ValueError(f"{len(pixel_values)} reference images but {len(input_ids)} captions: a query has both")
        text = self.encode_text(input_ids, attention_mask)
        negative = self.encode_negative(input_ids, attention_mask, negative_input_ids, negative_attention_mask)
        config = self.config
        weight = config.source_weight if source_weight is None else source_weight
        if pixel_values is None:
            image, weight = text.new_zeros(len(text), config.joint_width, dtype=torch.float32), 0.0
        else:
            image = self.encode_images(pixel_values)
        times = sampling_times(self._checked("steps", steps, 2, config.timesteps), config.timesteps)
        shape = len(times), len(text), self._checked("num_samples", num_samples, 1), config.joint_width
        if generator is None:  # the same for all queries, so that the batch makes no difference
            shape, generator = (shape[0], 1, *shape[2:]), torch.Generator().manual_seed(config.seed)
        noise = draw_noise(shape, generator, text.device).expand(-1, len(text), -1, -1)
        scales = (config.image_guidance, config.text_guidance) if guidance is None else guidance
        mean = self.generate(text, negative, image, self.checked_mask(mask, text), noise, times, scales)
        query = (1 - weight) * mean + weight * image
        return QueryOutput(
            pooler_output=normalize(query), image_embeds=None if pixel_values is None else normalize(image)
        )

    def generate(
        self,
        text: Tensor,
        negative: Tensor,
        image: Tensor,
        mask: Tensor,
        noise: Tensor,
        times: list[int],
        guidance: tuple[float, float],
    ) -> Tensor:
        """Generate image embeddings from conditions that are encoded already.

        Args:
            text: `(batch, n, w)`, caption tokens.
            negative: `(batch, n, w)`, tokens of the negative text.
            image: `(batch, d)`, not normalised; zeros for none.
            mask: `(batch, mask_size, mask_size)`.
            noise: `(times, batch, samples, d)`.
            times: from [`sampling_times`].
            guidance: scales for image and text.

        Returns:
            `(batch, d)`, means of the samples, not normalised.
        """
        predict = self.guided(text, negative, image, mask, guidance)
        samples = sample(predict, noise, times, self.config.timesteps)
        return samples.mean(dim=1) / self.config.image_embed_scale

    def guided(
        self, text: Tensor, negative: Tensor, image: Tensor, mask: Tensor, guidance: tuple[float, float]
    ) -> Any:
        """Return the guided prediction, a function of noised embeddings `(batch, samples, d)` and their time."""
        of_image, of_text = guidance
        # The three passes of guidance are one batch: with both conditions, without the text, without either.
        conditions = torch.cat([text, negative, negative]), torch.cat([image, image, image * 0]), mask.repeat(3, 1, 1)
        memory = self.denoiser.read(*conditions)

        def predict(noised: Tensor, time: int) -> Tensor:
            times = torch.tensor(time, device=noised.device)
            both, without_text, without = self.denoiser(noised.repeat(3, 1, 1), times, memory).chunk(3)
            return without + of_text * (both - without_text) + of_image * (without_text - without)

        return predict

    def _checked(self, name: str, value: int | None, least: int, most: int | None = None) -> int:
        value = getattr(self.config, name) if value is None else value
        if value < least or (most is not None and value > most):
            raise ValueError(f"{name}={value} must be at least {least}{f' and at most {most}' if most else ''}")
        return value

    def checked_mask(self, mask: Tensor | None, text: Tensor) -> Tensor:
        """Return float32 masks for captions `(batch, n, w)`, all 0 for None; raise a `ValueError` for another size."""
        expected = len(text), self.config.mask_size, self.config.mask_size
        if mask is None:
            return text.new_zeros(expected, dtype=torch.float32)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"mask is {tuple(mask.shape)} but must be {expected}, 1 where the image is to change: resize it with "
                "torch.nn.functional.interpolate(mask[:, None].float(), size)[:, 0]"
            )
        return mask.float()

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
        """Embed queries, target images, or both; in train mode, predict targets from their noised embeddings.

        In eval mode, see [`ComposedRetrievalModel.forward`], except that there is no loss unless `return_loss=True`.
        In train mode, or with `return_loss=True`, queries with targets are not sampled: `target_embeds` are the
        targets' embeddings, not normalised, and `query_embeds` what the denoiser makes of them, noised to random
        times, and of the conditions. [`~CompoDiffModel.loss`] compares the two.

        Args:
            pixel_values: `(batch, 3, height, width)`, reference images.
            input_ids: int64 `(batch, n)`, relative captions.
            attention_mask: `(batch, n)`, 0 for padding.
            target_pixel_values: `(targets, 3, height, width)`.
            target_ids: without effect on the loss: other rows' targets are no negatives.
            return_loss: compute the loss; by default in train mode, where there are queries and targets.
            **kwargs: options of [`~CompoDiffModel.get_query_features`], or of [`predict_targets`]; and
                `return_dict=False` for a tuple.
        """
        if (
            pixel_values is None
            or input_ids is None
            or target_pixel_values is None
            or not (self.training or return_loss)
        ):
            return super().forward(
                pixel_values, input_ids, attention_mask, target_pixel_values, target_ids, return_loss, **kwargs
            )
        image, target = self.encode_images(pixel_values), self.encode_images(target_pixel_values)
        return self.denoise(image, target, input_ids, attention_mask, return_loss, **kwargs)

    def denoise(
        self,
        image: Tensor,
        target: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> ComposedRetrievalOutput:
        """Compute what `forward` does in train mode, from images `(batch, d)` that are encoded already."""
        predicted, clean = predict_targets(self, image, target, input_ids, attention_mask, **kwargs)
        loss = None if return_loss is False else self.loss(predicted, clean)
        return ComposedRetrievalOutput(loss=loss, query_embeds=predicted, target_embeds=clean)

    def compare(
        self, output: ComposedRetrievalOutput, target_ids: Tensor | None, return_loss: bool | None
    ) -> ComposedRetrievalOutput:
        """Add similarities; sampled queries have no loss."""
        if return_loss:
            return super().compare(output, target_ids, return_loss)  # raises: queries or targets are missing
        if output.query_embeds is not None and output.target_embeds is not None and return_loss is None:
            output.similarity = self.score(output.query_embeds, output.target_embeds)
        return output

    def loss(self, query_embeds: Tensor, target_embeds: Tensor, **kwargs: Any) -> Tensor:
        """Compute the mean square of what `forward` in train mode predicts wrong. There are no negatives.

        Args:
            query_embeds: `(batch, d)`, predictions.
            target_embeds: `(targets, d)`, clean embeddings.
            **kwargs: `positives`, int64 `(batch,)`, position of each query's target, by default the same; `target_ids`
                has no effect, and `chunk_size` is refused.

        Returns:
            float32 scalar.
        """
        if (chunk_size := kwargs.get("chunk_size")) is not None:
            raise ValueError(
                f"loss_chunk_size={chunk_size}: the denoising loss compares each prediction with its own target "
                "alone, so that there is nothing to split: leave it out"
            )
        positives = kwargs.get("positives")
        return F.mse_loss(query_embeds, target_embeds if positives is None else target_embeds[positives])


def _with_text_encoder(vl_config: PreTrainedConfig, name_or_path: str, **files: Any) -> PreTrainedConfig:
    """Return a CLIP's configuration with the text encoder of another CLIP."""
    if vl_config.model_type != "clip":
        raise ValueError(
            f"text_encoder={name_or_path!r}: only the text encoder of a CLIP can be replaced, and the dual encoder is "
            f"a {vl_config.model_type}: leave text_encoder out"
        )
    loaded = AutoConfig.from_pretrained(name_or_path, **files)
    text_config = getattr(loaded, "text_config", loaded)
    if text_config.model_type != "clip_text_model":
        raise ValueError(f"text_encoder={name_or_path!r} is a {loaded.model_type!r} checkpoint: pass a CLIP")
    changed = deepcopy(vl_config)
    changed.text_config = text_config
    return changed


def _load_text_encoder(text_config: Any, name_or_path: str, **kwargs: Any) -> CLIPTextModel:
    """Load the text encoder of a CLIP and nothing else; raise a `ValueError` if it lacks weights."""
    loaded: Any = CLIPTextModel.from_pretrained(name_or_path, config=text_config, output_loading_info=True, **kwargs)
    encoder, info = loaded
    if missing := sorted(name for name in info["missing_keys"] if "position_ids" not in name):
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights of the text encoder, first: {missing[:3]}: pass a CLIP"
        )
    return encoder


CompoDiffModel.register_for_auto_class("AutoModel")

__all__ = ["CompoDiffModel"]
