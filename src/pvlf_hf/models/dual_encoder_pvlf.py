"""Base class of composed retrieval models built on a pretrained dual encoder. Saved with checkpoints.

It embeds images and captions; a subclass says how the two become a query.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, logging

from .backbones_pvlf import DUAL_ENCODERS, gather_tokens, load_pretrained_dual_encoder
from .configuration_pvlf import load_vl_config
from .interface_pvlf import ComposedRetrievalModel, normalize

logger = logging.get_logger(__name__)


class DualEncoderModel(ComposedRetrievalModel):
    """A composed retrieval model built on the dual encoder of its [`DualEncoderConfig`], `config.vl_config`.

    A subclass defines `config_class`, [`~ComposedRetrievalModel.get_query_features`] and
    [`~ComposedRetrievalModel.loss`].
    """

    may_be_new: str | None = None  # part of the names of encoder weights that a pretrained checkpoint may lack
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.backbone = DUAL_ENCODERS[config.vl_config.model_type](config.vl_config)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: in custom code the library initialises only modules that hold weights themselves.

        PVLF's weights are set by the module around them, through `transformers.initialization`, which leaves loaded
        weights alone.
        """
        return False

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, **kwargs: Any) -> "DualEncoderModel":
        """Build the model on a pretrained dual encoder.

        Args:
            name_or_path: Hub name or local folder of a checkpoint of one of `BACKBONES`.
            kwargs: settings of the configuration class; the rest is passed to `from_pretrained` (`revision`, `token`,
                `cache_dir`, ...).

        Returns:
            the model in eval mode. A log message says which weights are new.

        Raises:
            ValueError: if the checkpoint is not one of a supported dual encoder.
        """
        # Annotations are the fields of this class alone: dtype, which is inherited, goes to from_pretrained.
        settings = {k: kwargs.pop(k) for k in cls.config_class.__annotations__ if k in kwargs}
        if refused := {"vl_config", "device_map"} & {*settings, *kwargs}:
            raise ValueError(
                f"{sorted(refused)}: the checkpoint is its own vl_config, and a device is set by model.to()"
            )
        attention = {
            "": kwargs.pop("attn_implementation", None)
        }  # not the encoders': the library's BLIP has eager only
        vl_config = load_vl_config(name_or_path, **{k: v for k, v in kwargs.items() if k != "dtype"})
        config = cls.config_class(vl_config=vl_config, **settings)  # type: ignore[call-arg, misc]
        encoder = load_pretrained_dual_encoder(name_or_path, config.vl_config, cls.may_be_new, **kwargs)
        model = cls._from_config(config, attn_implementation=attention)
        model.backbone = encoder
        model.to(dtype=next(encoder.parameters()).dtype)
        if new := sorted(n for n, _ in model.named_parameters() if not n.startswith("backbone.")):
            logger.warning(
                f"{cls.__name__}: the dual encoder comes from {name_or_path}; {len(new)} other weights are new and "
                f"must be trained before use: {new}"
            )
        return model.eval()

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Switch the attention of the model's own layers, and of encoders whose Transformers class can switch.

        Args:
            attn_implementation: `"eager"`, `"sdpa"`, ...; `{"": name}` leaves the encoders as they are.
            allow_all_kernels: see the library.
        """
        # The library's own would set the encoders' configurations without asking whether they can switch.
        by_part = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        if by_part.keys() != {""}:
            super().set_attn_implementation(attn_implementation, allow_all_kernels)
            return
        name = self.get_correct_attn_implementation(by_part[""])
        self.config._attn_implementation = {"": name, "vl_config": {}}
        if by_part is not attn_implementation:
            self.backbone.set_attn_implementation(name)

    def get_input_embeddings(self) -> nn.Module:
        """Return the text encoder's token embeddings."""
        return getattr(self.backbone, self.backbone.text_modules[0]).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text encoder's token embeddings."""
        getattr(self.backbone, self.backbone.text_modules[0]).set_input_embeddings(value)

    def enable_input_require_grads(self) -> None:
        """Let gradients reach adapters through checkpointed layers, see the library."""
        super().enable_input_require_grads()
        # BLIP adds positions to the embeddings in place, which autograd forbids for the tensors marked by the library.
        copies = self.get_input_embeddings().register_forward_hook(_copy_output)
        self._require_grads_hooks.append(copies)

    def resize_token_embeddings(  # type: ignore[override]  # the rest of the signature is passed on
        self, new_num_tokens: int | None = None, **kwargs: Any
    ) -> nn.Module:
        """Resize the text encoder's vocabulary, and record its size in the encoder's configuration."""
        embeddings = super().resize_token_embeddings(new_num_tokens, **kwargs)
        self.config.vl_config.text_config.vocab_size = embeddings.num_embeddings
        return embeddings

    @property
    def encoder_config(self) -> PreTrainedConfig:
        """The dual encoder's configuration, see [`ComposedRetrievalModel.encoder_config`]."""
        return self.config.vl_config

    @property
    def image_config(self) -> PreTrainedConfig:
        """The image encoder's configuration, see [`ComposedRetrievalModel.image_config`]."""
        return self.config.vl_config.vision_config

    @property
    def image_side(self) -> dict[str, nn.Module]:
        """Modules that embed images, see [`ComposedRetrievalModel.image_side`]."""
        return {name: getattr(self.backbone, name) for name in self.backbone.vision_modules}

    @property
    def text_side(self) -> dict[str, nn.Module]:
        """Modules that embed captions, see [`ComposedRetrievalModel.text_side`]."""
        return {name: getattr(self.backbone, name) for name in self.backbone.text_modules}

    def _sized(self, pixel_values: Tensor) -> Tensor:
        """Return pixels in the model's dtype; raise a `ValueError` if the encoder was built for another size."""
        size = self.config.vl_config.vision_config.image_size
        expected = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])} pixels, the image encoder was built for "
                f"{expected}: use the processor saved with this checkpoint, or set its size and crop_size"
            )
        return pixel_values.to(self.dtype)

    def _image_tokens(self, pixel_values: Tensor, as_query: bool = False) -> Tensor:
        return self.encode_image_tokens(self._sized(pixel_values), as_query)

    def encode_image_tokens(self, pixel_values: Tensor, as_query: bool = False) -> Tensor:
        """Encode images of the right size as tokens, see [`DualEncoder.image_tokens`].

        Args:
            pixel_values: `(batch, 3, height, width)`.
            as_query: whether they are reference images of queries, which a subclass may encode in another way.
        """
        return self.backbone.image_tokens(pixel_values)

    def encode_text_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode captions as tokens, see [`DualEncoder.text_tokens`]."""
        return self.backbone.text_tokens(input_ids, attention_mask)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embed images: what a gallery is indexed by, and a training target.

        Args:
            pixel_values: `(batch, 3, height, width)`, from the processor's `process_targets`.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised; `last_hidden_state`: `(batch, 1 + m, d)`, all
            projected tokens, not normalised.
        """
        tokens = self._image_tokens(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=normalize(tokens[:, 0]))

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed captions alone, in the same space as [`~DualEncoderModel.get_image_features`].

        Args:
            input_ids: int64 `(batch, n)`.
            attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.
            **kwargs: `return_dict=False` for a tuple.

        Returns:
            `pooler_output`: float32 `(batch, d)`, L2-normalised; `last_hidden_state`: `(batch, n, d)`, all projected
            tokens, not normalised.
        """
        tokens, position = self.encode_text_tokens(input_ids, attention_mask)
        pooled = normalize(gather_tokens(tokens, position))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def _copy_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.clone()


__all__ = ["DualEncoderModel"]
