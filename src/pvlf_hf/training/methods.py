"""The methods that `pvlf-hf train` trains, by name: how each is built on a pretrained dual encoder.

A further method takes an entry in `METHODS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import AutoConfig

from ..models.configuration_case import CASEConfig
from ..models.configuration_compodiff import CompoDiffConfig
from ..models.configuration_inversion import InversionConfig
from ..models.configuration_pvlf import TRANSAGG, PVLFConfig
from ..models.configuration_training_free import TrainingFreeConfig
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..models.modeling_case import CASEModel
from ..models.modeling_compodiff import CompoDiffModel
from ..models.modeling_inversion import InversionModel
from ..models.modeling_pvlf import PVLFModel
from ..models.modeling_training_free import TrainingFreeModel
from ..models.processing_case import CASEProcessor
from ..models.processing_compodiff import CompoDiffProcessor
from ..models.processing_inversion import InversionProcessor
from ..models.processing_pvlf import PVLFProcessor
from .objectives import SAMPLES
from .text_anchored import RANK, tune_image_encoder

Pair = tuple[ComposedRetrievalModel, ComposedRetrievalProcessor]


@dataclass(frozen=True)
class Method:
    """A method of composed image retrieval, to be trained.

    Args:
        build: makes model and processor, from the name of a pretrained dual encoder and settings.
        settings: names of the settings that it takes.
        fixed: settings that define the method.
    """

    build: Callable[..., Pair]
    settings: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def make(self, name: str, pretrained: str, settings: Mapping[str, Any]) -> Pair:
        """Build model and processor.

        Args:
            name: name of the method, for errors.
            pretrained: dual encoder, a name on the Hub or a folder.
            settings: settings that differ from the defaults.

        Raises:
            ValueError: if the method has no such setting.
        """
        if unknown := sorted(settings.keys() - {*self.settings}):
            raise ValueError(f"{unknown}: {name} has no such setting; it has {sorted(self.settings)}")
        return self.build(pretrained, **{**self.fixed, **settings})


def _pvlf(pretrained: str, **settings: Any) -> Pair:
    if is_tuned(pretrained):
        tuned: Any = TrainingFreeModel.from_pretrained(pretrained)
        attention = {"": settings.pop("attn_implementation", None)}
        config = PVLFConfig(vl_config=tuned.config.vl_config, **settings)
        model = PVLFModel._from_config(config, attn_implementation=attention)
        model.backbone = tuned.backbone
        return _fitted(model.eval(), PVLFProcessor.from_pretrained(pretrained))
    return _fitted(PVLFModel.from_vl_pretrained(pretrained, **settings), PVLFProcessor.from_vl_pretrained(pretrained))


def is_tuned(name: str) -> bool:
    """Return whether a name is that of a [`TrainingFreeModel`], such as text-anchored tuning makes."""
    return isinstance(AutoConfig.from_pretrained(name), TrainingFreeConfig)


def _case(pretrained: str, **settings: Any) -> Pair:
    return _fitted(CASEModel.from_vl_pretrained(pretrained, **settings), CASEProcessor.from_vl_pretrained(pretrained))


def _fitted(model: Any, processor: Any) -> Pair:
    """Let captions leave positions for prompts in the text encoder."""
    processor.max_text_length = min(processor.max_text_length, model.config.text_positions)
    return model, processor


def _compodiff(pretrained: str, **settings: Any) -> Pair:
    towers = {name: settings[name] for name in ("text_encoder",) if name in settings}
    processor = CompoDiffProcessor.from_vl_pretrained(pretrained, **towers)
    return CompoDiffModel.from_vl_pretrained(pretrained, **settings), processor


def _inversion(method: str, pretrained: str, **settings: Any) -> Pair:
    own = {name: settings.pop(name) for name in ("template", "placeholder") if name in settings}
    shared = {name: settings[name] for name in ("unpublished_backbone",) if name in settings}
    processor = InversionProcessor.from_vl_pretrained(pretrained, method, **own, **shared)
    settings = {"placeholder_id": processor.placeholder_id, **settings}
    return InversionModel.from_vl_pretrained(pretrained, method, **settings), processor


def _tat(pretrained: str, rank: int = RANK, **settings: Any) -> Pair:
    model = TrainingFreeModel.from_vl_pretrained(pretrained, **settings)
    return tune_image_encoder(model, rank), PVLFProcessor.from_vl_pretrained(pretrained)


def _fields(config: type, *more: str) -> tuple[str, ...]:
    return (*(name for name in config.__annotations__ if name not in ("vl_config", "method")), *more)


_PVLF = _fields(PVLFConfig, "attn_implementation")
_INVERSION = _fields(InversionConfig, "template", "placeholder")

METHODS = {
    "pvlf": Method(_pvlf, _PVLF),
    "transagg": Method(_pvlf, _PVLF, TRANSAGG),
    "case": Method(_case, _fields(CASEConfig)),
    "compodiff": Method(_compodiff, _fields(CompoDiffConfig, "text_encoder")),
    "tat": Method(_tat, _fields(TrainingFreeConfig, "rank")),
    **{name: Method(partial(_inversion, name), _INVERSION) for name in SAMPLES},
}
"""Name of a method to how it is built."""

__all__ = ["METHODS", "Method", "is_tuned"]
