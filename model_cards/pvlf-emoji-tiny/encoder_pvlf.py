"""The interface of a dual encoder, to which `backbones_pvlf.py` fits each family. Saved with checkpoints."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer


class DualEncoder(nn.Module):
    """A pretrained image encoder and text encoder that project *every* token to one joint width `d`.

    Subclasses build the modules that `vision_modules` and `text_modules` name, and define the two `*_tokens` methods.

    Textual inversion also needs the two `*_features` methods; `INVERTIBLE` of its configuration lists who has them.

    Attributes:
        vision_modules, text_modules: names of the submodules of each side, projection included.
    """

    vision_modules: tuple[str, ...]
    text_modules: tuple[str, ...]

    def image_tokens(self, pixel_values: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Embed images as projected tokens (V_0 of section 3.1).

        Args:
            pixel_values: `(batch, 3, height, width)` at the resolution of the vision config.
            prompts: `(depth, p, w)`, see [`TowerPrompts`].

        Returns:
            `(batch, 1 + patches, d)`, not normalised; row 0 is the global image feature.
        """
        raise NotImplementedError

    def text_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed captions as projected tokens (W_0 of section 3.1), and locate the global one.

        Args:
            input_ids: int64 `(batch, length)`, padded on the right.
            attention_mask: `(batch, length)`, 1 for tokens and 0 for padding; None when nothing is padded.
            prompts: `(depth, p, w)`, see [`TowerPrompts`].

        Returns:
            `(batch, length, d)`, not normalised, and int64 `(batch,)`, the position of the global text feature, which
            counts as a token even where the mask calls it padding.
        """
        raise NotImplementedError

    def image_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as the encoder's own tokens, and as global features.

        Args:
            pixel_values: `(batch, 3, height, width)` at the resolution of the vision config.

        Returns:
            `(batch, 1 + patches, v)`, `last_hidden_state` in the width of the image encoder, and `(batch, d)`, row 0
            of [`~DualEncoder.image_tokens`].
        """
        raise NotImplementedError

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None, embeds: Tensor) -> Tensor:
        """Encode captions from the embeddings of their tokens, of which some may be no token's.

        Args:
            input_ids: int64 `(batch, length)`, padded on the right; they locate the global feature.
            attention_mask: `(batch, length)`, 0 for padding; None when nothing is padded.
            embeds: `(batch, length, w)`, without positions.

        Returns:
            `(batch, d)`, the global feature, not normalised.
        """
        raise NotImplementedError

    def padding_mask(self, input_ids: Tensor) -> Tensor | None:
        """Return the attention mask that token ids imply; None for an encoder that ignores what follows a caption."""
        return None

    def fuse_attention(self) -> None:
        """Replace eager attention by a fused kernel where Transformers has no other; weights are unchanged."""

    def set_attn_implementation(self, name: str) -> None:
        """Switch the attention of both encoders."""
        for encoder in (self.vision_modules[0], self.text_modules[0]):
            getattr(self, encoder).set_attn_implementation(name)

    @classmethod
    def check_checkpoint(cls, name_or_path: str, config: PreTrainedConfig) -> None:
        """Raise a `ValueError` for checkpoints that would load without an error and give wrong embeddings."""

    @property
    def _no_split_modules(self) -> set[str]:
        """Class names of modules that a device map keeps on one device: all layers, and what the library names."""
        named = {name for module in self.children() for name in getattr(module, "_no_split_modules", None) or ()}
        return named | {
            type(module).__name__ for module in self.modules() if isinstance(module, GradientCheckpointingLayer)
        }


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Select from `(batch, length, d)` at int64 `(batch,)` -> `(batch, d)`; at `(batch, k)` -> `(batch, k, d)`."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    return tokens[rows if positions.ndim == 1 else rows[:, None], positions]


__all__ = ["DualEncoder", "gather_tokens"]
