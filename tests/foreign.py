"""A model class that shares nothing with PVLF: its embeddings are colours."""

import torch
from tiny import VOCABULARY
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, BertTokenizer, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pvlf_hf import ComposedRetrievalModel, PVLFImageProcessor, PVLFProcessor, QueryOutput, focal_info_nce


class ColourConfig(PreTrainedConfig):
    model_type = "colour_cir"

    hidden_size: int = 8


class ColourModel(ComposedRetrievalModel):
    """Model in ten lines: a query is the image's mean colour plus a vector for each token."""

    config_class = ColourConfig

    def __init__(self, config):
        super().__init__(config)
        self.colours, self.tokens = (
            nn.Linear(3, config.hidden_size),
            nn.EmbeddingBag(99, config.hidden_size, mode="sum"),
        )
        self.post_init()

    image_side = property(lambda self: {"colours": self.colours})
    text_side = property(lambda self: {"tokens": self.tokens})

    def get_image_features(self, pixel_values, **kwargs):
        embeds = nn.functional.normalize(self.colours(pixel_values.mean(dim=(2, 3))), dim=-1)
        return BaseModelOutputWithPooling(pooler_output=embeds)

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = self.tokens(input_ids, per_sample_weights=mask.to(self.dtype))
        return BaseModelOutputWithPooling(pooler_output=nn.functional.normalize(embeds, dim=-1))

    def get_query_features(self, pixel_values, input_ids, attention_mask=None, **kwargs):
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        query = nn.functional.normalize(image.pooler_output + text.pooler_output, dim=-1)
        return QueryOutput(pooler_output=query)

    def loss(self, query_embeds, target_embeds, **kwargs):
        return focal_info_nce(query_embeds, target_embeds, temperature=0.1, **kwargs)


AutoConfig.register("colour_cir", ColourConfig, exist_ok=True)
AutoModel.register(ColourConfig, ColourModel, exist_ok=True)
AutoProcessor.register(ColourConfig, PVLFProcessor, exist_ok=True)
ColourConfig.register_for_auto_class()
ColourModel.register_for_auto_class("AutoModel")


def make_foreign(seed=0):
    torch.manual_seed(seed)
    images = PVLFImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    return ColourModel(ColourConfig()).eval(), PVLFProcessor(images, BertTokenizer(vocab=dict(VOCABULARY)))
