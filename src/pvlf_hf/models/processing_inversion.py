"""Processor of textual inversion: puts relative captions into the method's template. Saved with checkpoints."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_inversion import METHODS, InversionConfig
from .configuration_pvlf import load_vl_config
from .processing_pvlf import Padding, PVLFProcessor, all_tokens, as_captions


class InversionProcessor(PVLFProcessor):
    """Bundles the image processor, the tokenizer and the template of a textual inversion model.

    A caption alone (`processor(text=...)`) stays as it is; one with its reference image is put into the template.

    Args:
        image_processor: [`PVLFImageProcessor`] with the image size of CLIP.
        tokenizer: CLIP's.
        max_text_length: tokens that the text encoder reads, special tokens included.
        padding: see [`PVLFProcessor`].
        method: a name in `METHODS`, which gives the next two.
        template: sentence with `{caption}` and the placeholder in it, by default the method's.
        placeholder: word of one token that stands for the reference image, by default the method's.
        truncation: cut captions that are too long for the template, with a log message, instead of refusing them. On
            other families than CLIP (ours) they are cut, as other models on that family do.

    Attributes:
        placeholder_id (`int`): id of that token, which [`InversionConfig`] must have, too.

    Raises:
        ValueError: if the method is unknown, the placeholder is not one token, or the template lacks one of the two.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 77,
        padding: Padding = "longest",
        method: str = "pic2word",
        template: str | None = None,
        placeholder: str | None = None,
        truncation: bool = False,
    ) -> None:
        super().__init__(image_processor, tokenizer, max_text_length, padding)
        if method not in METHODS:
            raise ValueError(f"method={method!r}: choose one of {sorted(METHODS)}")
        self.method, self.truncation = method, truncation
        facts = METHODS[method]
        self.placeholder = facts.placeholder if placeholder is None else placeholder
        own_template = facts.template.replace(facts.placeholder, self.placeholder)
        self.template = own_template if template is None else template
        ids = self._tokens_of([self.placeholder])[0]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"placeholder {self.placeholder!r} must be one token of the vocabulary, but it is {ids}: choose a "
                "rare word of the tokenizer, such as '*' or '$' of CLIP's"
            )
        self.placeholder_id = ids[0]
        self._placeholders = self._tokens_of([self.template.replace("{caption}", "")])[0].count(ids[0])
        if self.template.count("{caption}") != 1 or not self._placeholders:
            raise ValueError(
                f"template {self.template!r} must hold {{caption}} once, and {self.placeholder!r} with a blank or "
                f"nothing on both sides (else it is another token), as in {METHODS[method].template!r}"
            )

    @classmethod
    def from_vl_pretrained(cls, name_or_path: str, method: str = "pic2word", **kwargs: Any) -> "InversionProcessor":
        """Build the processor that goes with [`InversionModel.from_vl_pretrained`] of the same checkpoint.

        Args:
            name_or_path: Hub name or local folder of a CLIP checkpoint.
            method: a name in `METHODS`.
            **kwargs: `template`, `placeholder` and `unpublished_backbone`, see [`InversionConfig`]; the rest is passed
                to `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: for a checkpoint that [`InversionConfig`] refuses.
        """
        names = ("template", "placeholder", "unpublished_backbone")
        settings = {name: kwargs.pop(name) for name in names if name in kwargs}
        config = load_vl_config(name_or_path, **kwargs)
        return cls.for_backbone(config, AutoTokenizer.from_pretrained(name_or_path, **kwargs), method, **settings)

    @classmethod
    def for_backbone(
        cls,
        vl_config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        method: str = "pic2word",
        unpublished_backbone: bool = False,
        **settings: Any,
    ) -> "InversionProcessor":
        """Build the processor of a dual encoder from its configuration and its tokenizer."""
        # Raises for a dual encoder on which the method is not defined.
        InversionConfig(
            vl_config=vl_config, method=method, placeholder_id=0, unpublished_backbone=unpublished_backbone
        )
        plain = PVLFProcessor.for_backbone(vl_config, tokenizer)
        plain.image_processor.do_target_pad = METHODS[method].target_pad
        settings = {"truncation": vl_config.model_type != "clip", **settings}
        return cls(plain.image_processor, tokenizer, plain.max_text_length, plain.padding, method, **settings)  # type: ignore[arg-type]

    def __call__(
        self,
        images: Any = None,
        text: str | Iterable[str] | None = None,
        target_images: Any = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare reference images, relative captions and target images, or some of them.

        Args:
            images: one or a batch of reference images.
            text: one or a batch of relative captions. With images they are put into the template.
            target_images: one or a batch of target images.
            return_tensors: "pt" or "np".
            **kwargs: overrides for the image processor.

        Returns:
            as [`PVLFProcessor`], and for queries of a method that optimises tokens `prompt_ids` int64
            `(prompts, length)`.

        Raises:
            ValueError: as [`PVLFProcessor`]; if a caption holds the placeholder, or is too long for the template.
        """
        if images is None or text is None:
            return super().__call__(images, text, target_images, return_tensors, **kwargs)
        return self._with_prompts(
            super().__call__(images, self._sentences(text, kwargs), target_images, return_tensors, **kwargs)
        )

    def process_captions(self, text: str | Iterable[str], return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare relative captions in the template, see [`ComposedRetrievalProcessor.process_captions`]."""
        return self._with_prompts(
            super().__call__(None, self._sentences(text, kwargs), None, return_tensors, **kwargs)
        )

    def _sentences(self, text: str | Iterable[str], settings: dict[str, Any]) -> list[str]:
        """Put captions into the template by the settings of a call, alone or in its `text_kwargs`."""
        asked = {**(settings.get("text_kwargs") or {}), **settings}
        return self.fill_template(text, asked.get("truncation"), asked.get("max_length"))

    def _with_prompts(self, batch: BatchFeature) -> BatchFeature:
        """Add the prompts of a method that optimises tokens, as tensors or arrays like the captions."""
        if METHODS[self.method].steps:
            return_tensors = "pt" if isinstance(batch["input_ids"], Tensor) else "np"
            batch["prompt_ids"] = self._tokenize(self.prompts, return_tensors)["input_ids"]
        return batch

    @property
    def prompts(self) -> list[str]:
        """Sentences of an image alone, with this processor's placeholder."""
        facts = METHODS[self.method]
        return [prompt.replace(facts.placeholder, self.placeholder) for prompt in facts.prompts]

    def process_prompts(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Prepare images alone, each with the method's prompt, for training by `return_loss=True`.

        Args:
            images: one or a batch of images.
            **kwargs: see `__call__`.

        Returns:
            `pixel_values`, `input_ids` and `attention_mask`.
        """
        batch = super().__call__(images, **kwargs)
        return BatchFeature({**batch, **self._tokenize(self.prompts[:1] * len(batch["pixel_values"]), "pt")})

    def fill_template(
        self, text: str | Iterable[str], truncation: bool | None = None, max_length: int | None = None
    ) -> list[str]:
        """Put captions into the template.

        Args:
            text: one or a batch of relative captions.
            truncation: cut captions that are too long, instead of refusing them; by default the processor's.
            max_length: tokens of a sentence; by default `max_text_length`.

        Raises:
            ValueError: naming the first caption that holds the placeholder, or is too long for the template.
        """
        captions = as_captions(text)
        longest = self.max_text_length if max_length is None else max_length
        special = self.tokenizer.num_special_tokens_to_add()
        sentences = [self.template.replace("{caption}", caption) for caption in captions]
        if self.truncation if truncation is None else truncation:
            lengths = {row: len(ids) + special for row, ids in enumerate(self._tokens_of(sentences))}
            if truncation is None:
                self._report_cuts(captions, {r: length for r, length in lengths.items() if length > longest}, longest)
            captions = [self._cut(caption, longest) for caption in captions]
            sentences = [self.template.replace("{caption}", caption) for caption in captions]
        for row, ids in enumerate(self._tokens_of(sentences)):
            length = len(ids) + special
            if excess := max(0, length - longest):
                raise ValueError(
                    f"caption {row} has {length} tokens in the template {self.template!r}, {excess} more than the "
                    f"text encoder reads ({longest}): shorten it, or pass a shorter template, or "
                    "truncation=True to cut it off"
                )
            if ids.count(self.placeholder_id) != self._placeholders:
                raise ValueError(
                    f"caption {row}, {captions[row]!r}, holds {self.placeholder!r}, the placeholder of the reference "
                    "image: write it in other words, or pass a template with another placeholder"
                )
        return sentences

    def _cut(self, caption: str, longest: int) -> str:
        """Cut a caption to the tokens that the template leaves."""
        template, first = (self._encodings([one])[0] for one in (self.template.replace("{caption}", ""), caption))
        left = max(0, longest - sum(template.attention_mask))
        ends = [end for (_, end), special in zip(first.offsets, first.special_tokens_mask, strict=True) if not special]
        return caption if len(ends) <= left else caption[: ends[left - 1] if left else 0]

    def _tokens_of(self, sentences: list[str]) -> list[list[int]]:
        return list(map(all_tokens, self._encodings(sentences)))

    def _encodings(self, sentences: list[str]) -> list[Any]:
        return self._encode(sentences).encodings or []

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything `__call__` can return."""
        return [*super().model_input_names, "prompt_ids"]


InversionProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["InversionProcessor"]
