"""Configuration of CASE. Saved with checkpoints."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_pvlf import DualEncoderConfig

OBJECTIVES = ("info_nce", "hn_nce")

BLIP_VOCABULARY = 30524
"""BERT's 30,522 tokens, then Salesforce's [DEC] and [ENC]."""


@strict
class CASEConfig(DualEncoderConfig):
    """Configuration of a [`CASEModel`].

    CASE is "Data Roaming and Quality Assessment for Composed Image Retrieval" (AAAI 2024), which has no public code.
    CoVR (AAAI 2024) runs the same query encoder, and its code settles what the paper leaves open.

    Args:
        vl_config (`BlipConfig` or `dict`, *optional*, defaults to BLIP base): the dual encoder. Its text encoder gets
            cross-attention.
        first_token (`"enc"` or `"cls"`, *optional*, defaults to `"enc"`): token that a caption starts with where it
            reads an image: `[ENC]`, as in BLIP's training and CoVR, or `[CLS]`, as in Transformers' BLIP.
        enc_token_id (`int`, *optional*): id of `[ENC]`; by default the last of Salesforce's 30,524 tokens.
        reverse_weight (`float`, *optional*, defaults to 1.0): weight of the way back, from the target image and the
            marked caption to the reference image (CASE); 0 leaves it out (CoVR).
        reverse_token_id (`int`, *optional*): token that marks a caption of the way back. By default `[DEC]`, which no
            query has otherwise; CASE's own is unknown.
        objective (`"info_nce"` or `"hn_nce"`, *optional*, defaults to `"info_nce"`): cross-entropy from queries to
            targets (CASE), or CoVR's loss with weighted negatives in both directions, see [`hn_nce`].
        temperature (`float`, *optional*, defaults to 0.07): tau (CoVR; CASE's is unknown).
        alpha (`float`, *optional*, defaults to 1.0): weight of the positive in HN-NCE (CoVR).
        beta (`float`, *optional*, defaults to 0.5): how much more hard negatives weigh in HN-NCE (CoVR).
        hn_nce_as_released (`bool`, *optional*, defaults to `False`): repeat a slip of CoVR's code, see [`hn_nce`].

    Raises:
        ValueError: if the settings cannot go together; the message says what to change.

    Example:
        >>> from pvlf_hf import CASEConfig
        >>> config = CASEConfig()
        >>> config.enc_token_id, config.reverse_token_id, config.vl_config.text_config.is_decoder
        (30523, 30522, True)
    """

    model_type = "case"

    first_token: str = "enc"
    enc_token_id: int | None = None
    reverse_weight: float | int = 1.0
    reverse_token_id: int | None = None
    objective: str = "info_nce"
    temperature: float | int = 0.07
    alpha: float | int = 1.0
    beta: float | int = 0.5
    hn_nce_as_released: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vl_config.model_type == "blip":
            text, vision = self.vl_config.text_config, self.vl_config.vision_config
            # In the configuration this is cross-attention; in a call it would be a causal mask.
            text.is_decoder = True
            text.encoder_hidden_size = vision.hidden_size
            if text.vocab_size == BLIP_VOCABULARY:
                self.enc_token_id = BLIP_VOCABULARY - 1 if self.enc_token_id is None else self.enc_token_id
                self.reverse_token_id = BLIP_VOCABULARY - 2 if self.reverse_token_id is None else self.reverse_token_id
        self.validate_architecture()  # raises a ValueError, which @strict would wrap, see PVLFConfig

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for settings that cannot go together (also called by `@strict` when saved)."""
        super().validate_architecture()
        if self.vl_config.model_type != "blip":
            raise ValueError(
                f"vl_config has model_type {self.vl_config.model_type!r}, but CASE is defined on BLIP alone, whose "
                "text encoder reads the image by cross-attention: pass a BlipConfig, or use PVLF on this one"
            )
        for name, choices in (("first_token", ("enc", "cls")), ("objective", OBJECTIVES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {choices}")
        if self.hn_nce_as_released and self.objective != "hn_nce":
            raise ValueError("hn_nce_as_released=True is for objective='hn_nce': set that, or leave it out")
        if self.temperature <= 0 or self.alpha <= 0 or self.beta < 0 or self.reverse_weight < 0:
            raise ValueError(
                f"need temperature > 0, alpha > 0, beta >= 0 and reverse_weight >= 0, got {self.temperature}, "
                f"{self.alpha}, {self.beta} and {self.reverse_weight}"
            )
        self._check_token("enc_token_id", "[ENC]", self.first_token == "enc", "first_token='cls'")
        self._check_token("reverse_token_id", "[DEC]", self.reverse_weight > 0, "reverse_weight=0")

    def _check_token(self, name: str, usual: str, needed: bool, other: str) -> None:
        """Raise a `ValueError` for a token that is needed and not there, or not in the vocabulary."""
        vocab_size, token = self.vl_config.text_config.vocab_size, getattr(self, name)
        if token is None and needed:
            raise ValueError(
                f"vl_config has {vocab_size} tokens, not the {BLIP_VOCABULARY} of Salesforce's BLIP, so which one is "
                f"{usual} is unknown: pass {name}, a token that captions do not have, or {other}"
            )
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name}={token} is not a token of vl_config, whose vocabulary has {vocab_size}")


CASEConfig.register_for_auto_class()

__all__ = ["CASEConfig"]
