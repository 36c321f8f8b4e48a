"""`PVLFConfig`: defaults, nesting, invalid settings, round trip, and numbers of weights."""

import json

import pytest
import torch
from reference import CONFIGS
from tiny import BACKBONES, tiny_config
from transformers import BertConfig, BlipConfig, CLIPConfig

from pvlf_hf import PVLFConfig, PVLFModel


def test_defaults_are_deep_prompts_on_blip_base():
    config = PVLFConfig()
    assert (config.num_prompts, config.prompt_depth, config.fusion_layers) == (25, 2, 2)
    assert (config.alpha, config.gamma, config.temperature) == (1.0, 2.0, 0.01)
    text, vision = config.vl_config.text_config, config.vl_config.vision_config
    # Values of the released checkpoint; `BlipConfig()` differs in the first and the last two.
    assert (text.num_attention_heads, text.hidden_size, text.is_decoder) == (12, 768, False)
    assert (vision.image_size, vision.layer_norm_eps, vision.initializer_range) == (384, 1e-6, 0.02)
    assert config.joint_width == config.hidden_size == 256


def test_each_config_has_a_backbone_of_its_own():
    first, second = PVLFConfig(), PVLFConfig()
    first.vl_config.text_config.vocab_size = 7
    assert second.vl_config.text_config.vocab_size != 7
    assert PVLFConfig().to_dict() == second.to_dict()


@pytest.mark.parametrize("width", [8, 48, 256])
@pytest.mark.parametrize(
    ("backbone", "field"), [(BlipConfig, "image_text_hidden_size"), (CLIPConfig, "projection_dim")]
)
def test_joint_width_is_that_of_the_backbone(backbone, field, width):
    vl_config = backbone(**{field: width})
    for given in (vl_config, vl_config.to_dict()):
        config = PVLFConfig(vl_config=given)
        assert type(config.vl_config) is backbone
        assert config.joint_width == width


def test_depth_follows_the_layers_unless_given():
    assert PVLFConfig(fusion_layers=5).prompt_depth == 5
    assert PVLFConfig(fusion_layers=5, prompt_depth=1).prompt_depth == 1


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"vl_config": BertConfig()}, "BlipConfig or a CLIPConfig"),
        ({"vl_config": "blip"}, "pass a BlipConfig, a CLIPConfig or a dict"),
        ({"fusion_heads": 5}, r"does not divide the joint width 32 .* choose one of \[1, 2, 4, 8, 16\]"),
        ({"fusion_heads": 0}, "fusion_heads=0 must be at least 1"),
        ({"num_prompts": 0}, "num_prompts=0 must be at least 1"),
        ({"fusion_layers": 0}, "fusion_layers=0 must be at least 1"),
        ({"fusion_ffn_size": -1}, "fusion_ffn_size=-1 must be at least 1"),
        ({"prompt_depth": 3}, "prompt_depth=3 .* lower prompt_depth or raise fusion_layers"),
        ({"prompt_depth": 0}, "prompt_depth=0 must lie between 1 and fusion_layers=2"),
        ({"aggregation_mlp_input": "encoder"}, "set one of them to 'fused'"),
        ({"residual": "post_norm"}, "residual='post_norm': choose one of"),
        ({"aggregation_mlp_input": "both"}, "aggregation_mlp_input='both': choose one of"),
        ({"aggregation_sum_input": "both"}, "aggregation_sum_input='both': choose one of"),
        ({"text_padding": "none"}, "text_padding='none': choose one of"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
        ({"dropout": -0.1}, "dropout=-0.1 is out of range"),
        ({"temperature": 0.0}, "temperature=0.0 is out of range"),
        ({"gamma": -1.0}, "gamma >= 0"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"prompt_init_std": -1.0}, "prompt_init_std >= 0"),
    ],
)
def test_invalid_settings_raise_with_a_remedy(settings, advice):
    with pytest.raises(ValueError, match=advice):
        PVLFConfig(**{"vl_config": CONFIGS["blip"], **settings})


def test_configuration_of_the_caller_is_not_modified():
    given = BlipConfig()
    assert not PVLFConfig(vl_config=given).vl_config.text_config.is_decoder
    assert given.text_config.is_decoder


def test_settings_made_invalid_later_raise_on_save(tmp_path):
    config = tiny_config()
    config.fusion_heads = 5
    with pytest.raises(Exception, match="choose one of"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        PVLFConfig,
        PVLFConfig.transagg,
        *(lambda b=b: tiny_config(b) for b in BACKBONES),
        lambda: tiny_config("clip", fusion_layers=3, prompt_depth=2, residual="paper", temperature=1, gamma=0.5),
        lambda: tiny_config("blip", aggregation_mlp_input="encoder", aggregation_sum_input="fused"),
    ],
)
def test_json_round_trip_is_exact(make, tmp_path):
    config = make()
    config.save_pretrained(tmp_path)
    again = PVLFConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert type(again.vl_config) is type(config.vl_config)
    assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
    first = (tmp_path / "config.json").read_text()
    again.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == first
    assert json.loads(first)["auto_map"] == {"AutoConfig": "configuration_pvlf.PVLFConfig"}


def test_transagg_is_one_shallow_prompt_and_cross_entropy():
    config = PVLFConfig.transagg()
    assert (config.num_prompts, config.prompt_depth, config.gamma) == (1, 1, 0.0)
    other = PVLFConfig.transagg(vl_config=CONFIGS["clip"], gamma=2.0)
    assert (other.joint_width, other.num_prompts, other.gamma) == (32, 1, 2.0)


@pytest.mark.parametrize(
    ("config", "new_weights"),
    # fusion 2,630,144 + combiner 1,050,624 + output 524,544 + weights 771 + prompts of width 256
    [(PVLFConfig(), 4_206_083 + 2 * 25 * 256), (PVLFConfig.transagg(), 4_206_083 + 256)],
    ids=["pvlf", "transagg"],
)
def test_number_of_new_weights_at_blip_base(config, new_weights):
    assert new_weights in (4_218_883, 4_206_339)
    with torch.device("meta"):
        model = PVLFModel(config)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("backbone.")) == new_weights
    assert not [n for n in model.state_dict() if "crossattention" in n]
