"""Requirements of Transformers' own test suite (ModelTesterMixin, which is not shipped), checked on all our models.

`test_modeling.py` goes deeper where PVLF is concerned; here every check runs on every family and kind of model.
"""

import copy
import inspect
import json
from functools import cached_property

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from accelerate.utils import FullyShardedDataParallelPlugin, compute_module_sizes
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from diffused import make_model as make_compodiff
from diffused import make_processor as make_compodiff_processor
from dual_encoders import FAMILIES, tokenizer_of
from error_bounds import assert_within, rounding
from inverted import make_model as make_inversion
from inverted import make_processor as make_inversion_processor
from safetensors.torch import load_file, save_file
from test_backbones import random_images
from transformers import AutoConfig, AutoModel

from pvlf_hf import (
    CASEConfig,
    CASEModel,
    CompoDiffModel,
    InversionModel,
    PVLFConfig,
    PVLFModel,
    PVLFProcessor,
    TrainingFreeConfig,
    TrainingFreeModel,
)

INVERSIONS = ("pic2word", "context_i2w")
DIFFUSED = ("compodiff-clip", "compodiff-blip")
ARMS = {
    "pvlf": {"num_prompts": 3},
    "pvlf_text": {"prompt_location": "text", "num_prompts": 4},
    "pvlf_sum": {"prompt_location": "text", "num_prompts": 4, "composition": "sum"},
    "pvlf_maple": {
        "prompt_location": "both",
        "prompt_coupling": "linear",
        "prompt_gallery": True,
        "num_prompts": 4,
    },
}
"""Where prompts sit."""
FREE = ("training_free-blip", "training_free-siglip")
OTHERS = ("pvlf_text-blip", "pvlf_sum-clip", "pvlf_maple-blip", *FREE, "case-blip")
KINDS = [*(f"pvlf-{family}" for family in FAMILIES), *OTHERS, *DIFFUSED, *INVERSIONS]


class Case:
    """A model in eval mode, inputs of three queries with their targets, and a function that builds the model again."""

    def __init__(self, kind):
        torch.manual_seed(0)
        name, _, family = kind.partition("-")
        self.kind, self.family = kind, family or "clip"
        if kind in INVERSIONS:
            self.model, processor = make_inversion(kind, reference=False), make_inversion_processor(kind)
        elif kind in DIFFUSED:
            self.model, processor = make_compodiff(family), make_compodiff_processor(family)
        else:
            vl_config = AutoConfig.for_model(**{"model_type": family, **copy.deepcopy(FAMILIES[family])})
            make = {
                **{
                    kind: lambda arm=arm: PVLFModel(
                        PVLFConfig(vl_config=vl_config, fusion_heads=4, dropout=0.0, **arm)
                    )
                    for kind, arm in ARMS.items()
                },
                "training_free": lambda: TrainingFreeModel(TrainingFreeConfig(vl_config=vl_config)),
                "case": lambda: CASEModel(CASEConfig(vl_config=vl_config, enc_token_id=98, reverse_token_id=97)),
            }
            self.model = make[name]().eval()
            processor = PVLFProcessor.for_backbone(self.model.config.vl_config, tokenizer_of(family))
        self.processor = processor
        self.query = dict(processor.process_queries(random_images(3), ["is red", "blue", "face with hat"]))
        self.inputs = {
            **self.query,
            "target_pixel_values": processor.process_targets(random_images(3, 1))["pixel_values"],
        }

    @cached_property
    def error(self):
        """Bound of the difference between two computations of the same embeddings."""
        return rounding(found, self.model, self.inputs)


def found(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return {name: output[name] for name in ("query_embeds", "target_embeds") if output.get(name) is not None}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def close(ours, theirs, case):
    if same(ours, theirs):  # needs no bound, which takes nine runs in float64
        return
    error = case.error
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=error[name], msg=name)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """Return a case that no test changes, and its checkpoint."""
    case, folder = Case(request.param), tmp_path_factory.mktemp(request.param)
    case.model.save_pretrained(folder)
    return case, folder


@pytest.fixture
def case(saved):
    """Return a case with a model that a test may change."""
    saved[0].error  # noqa: B018  # computed once and cached
    one = copy.copy(saved[0])
    one.model = copy.deepcopy(one.model)
    return one


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_model_loads_without_missing_or_unexpected_weights(saved):
    case, folder = saved
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is type(case.model) and not model.training
    assert not any(report.values()), report
    ours, theirs = case.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() == load_file(folder / "model.safetensors").keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_model_saved_in_shards_computes_the_same(saved, tmp_path):
    case, folder = saved
    once = AutoModel.from_pretrained(folder)
    once.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path)
    close(found(again, case.inputs), found(once, case.inputs), case)


def test_torch_saves_and_loads_the_whole_model(case, tmp_path):
    torch.save(case.model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same(found(again, case.inputs), found(case.model, case.inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_model_loads_in_the_requested_dtype(saved, dtype, tmp_path):
    case, folder = saved
    half = type(case.model).from_pretrained(folder, dtype=dtype)
    float32 = tuple(half._keep_in_fp32_modules_strict or ())  # modules that half precision would harm
    wanted = {name: torch.float32 if name.startswith(float32) else getattr(torch, dtype) for name in half.state_dict()}
    assert {name: parameter.dtype for name, parameter in half.named_parameters()} == wanted
    assert half.config.dtype == getattr(torch, dtype)
    half.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == getattr(torch, dtype)
    assert found(half, case.inputs)["query_embeds"].isfinite().all()


def test_every_missing_weight_is_initialised(saved, tmp_path):
    """Compare each weight with a new model's: equal constants, random weights with the same standard deviation."""
    case, folder = saved
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = type(case.model).from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {name for name, _ in case.model.named_parameters()}
    for name, weight in model.named_parameters():
        new = case.model.get_parameter(name)
        assert weight.isfinite().all() and not weight.is_meta, name
        if new.numel() == 1 or new.std() == 0:
            assert torch.equal(weight, new) or new.numel() == 1, name
        else:  # five standard errors of a standard deviation, for uniform and normal weights
            margin = 5 / (2 * new.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(new.std().item(), rel=2 * margin), name


def test_mismatched_weights_are_refused_or_initialised(saved, tmp_path):
    case, folder = saved
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "position" in name and weights[name].ndim == 2)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({**weights, name: weights[name][:-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(tmp_path)
    model, report = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [entry[0] for entry in report["mismatched_keys"]] == [name]
    assert model.get_parameter(name).shape == weights[name].shape and model.get_parameter(name).isfinite().all()


# --- configuration ---------------------------------------------------------------------------------------------------


def test_configuration_round_trip(saved, tmp_path):
    config = saved[0].model.config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and again.to_diff_dict() == config.to_diff_dict()
    assert type(config).from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert type(config)().model_type == config.model_type  # without arguments
    assert type(config)(output_hidden_states=True).output_hidden_states
    assert config.get_text_config().vocab_size == saved[0].model.get_input_embeddings().num_embeddings
    assert type(saved[0].model).config_class is type(config)


# --- forward ---------------------------------------------------------------------------------------------------------


def test_forward_takes_the_processors_outputs(saved):
    case, _ = saved
    names = [*inspect.signature(case.model.forward).parameters]
    assert names[0] == case.model.main_input_name == "pixel_values"
    for name in case.query:
        assert name in names or "kwargs" in names, name


def test_forward_is_deterministic_and_leaves_its_inputs(saved):
    case, _ = saved
    before = {name: tensor.clone() for name, tensor in case.inputs.items()}
    assert same(found(case.model, case.inputs), found(case.model, case.inputs))
    assert all(torch.equal(before[name], case.inputs[name]) for name in before)


def test_tuple_outputs_equal_the_named_outputs(saved):
    case, _ = saved
    with torch.no_grad():
        named, values = case.model(**case.inputs), case.model(**case.inputs, return_dict=False)
    assert type(values) is tuple and len(values) == len(named.to_tuple()) >= 2
    for value, other in zip(values, named.to_tuple(), strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_a_row_does_not_depend_on_its_batch(saved):
    case, _ = saved
    whole = found(case.model, case.inputs)
    for row in range(3):
        alone = found(case.model, {name: tensor[row : row + 1] for name, tensor in case.inputs.items()})
        close(alone, {name: tensor[row : row + 1] for name, tensor in whole.items()}, case)


def test_eager_and_sdpa_agree(case):
    plain, _ = found(case.model, case.inputs), case.error  # the bound of the attention that it was built with
    for name in ("eager", "sdpa"):
        case.model.set_attn_implementation(name)
        assert case.model.config._attn_implementation == name
        close(found(case.model, case.inputs), plain, case)
    with pytest.raises(ValueError, match="flash|attn_implementation"):
        case.model.set_attn_implementation("quick")


def test_hidden_states_and_attentions_keep_their_gradients(case):
    if not case.model.explains:
        refused = "output_hidden_states|output_attentions|neither attentions nor hidden states"
        with pytest.raises((ValueError, TypeError), match=refused):
            case.model(**case.query, output_hidden_states=True, output_attentions=True)
        return
    output = case.model(**case.query, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == len(output.attentions) + 1 == case.model.config.fusion_layers + 1
    for tensor in (*output.hidden_states, *output.attentions):
        tensor.retain_grad()
    output.query_embeds[0, 0].backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in (*output.hidden_states, *output.attentions))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_activation_checkpointing_trains_as_without(case):
    if case.kind in INVERSIONS:
        names = ["input_ids", "pixel_values", "target_pixel_values", "attention_mask"]
        case.inputs = {name: case.inputs[name] for name in names if name in case.inputs}

    def gradients(model, inputs):
        model.zero_grad()
        torch.manual_seed(0)  # of noise that a loss draws
        model(**inputs).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert case.model.supports_gradient_checkpointing and not case.model.is_activation_checkpointing
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    case.model.train()
    case.model.config.temperature = 1.0
    plain = gradients(case.model, case.inputs)
    case.model.activation_checkpointing_enable()
    assert case.model.is_activation_checkpointing
    again = gradients(case.model, case.inputs)
    case.model.activation_checkpointing_disable()
    assert not case.model.is_activation_checkpointing and plain
    assert_within(again, plain, lambda: rounding(gradients, case.model, case.inputs, draws=4))


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_input_embeddings_are_replaced_and_resized(case):
    old = copy.deepcopy(case.model.get_input_embeddings())
    count = old.num_embeddings
    plain = found(case.model, case.query)
    case.model.resize_token_embeddings(count + 10)
    new = case.model.get_input_embeddings()
    assert new.num_embeddings == case.model.config.get_text_config().vocab_size == count + 10
    assert torch.equal(new.weight[:count], old.weight)
    close(found(case.model, case.query), plain, case)
    case.model.set_input_embeddings(old)
    assert case.model.get_input_embeddings() is old


# --- devices ---------------------------------------------------------------------------------------------------------


def layers_of(model):
    """Return the layers of encoders, fusion, mapping and denoiser by name: the modules in lists of several."""
    lists = [part for part in model.named_modules() if isinstance(part[1], torch.nn.ModuleList) and len(part[1]) > 1]
    return {f"{name}.{i}": layer for name, layers in lists for i, layer in enumerate(layers) if any(layer.children())}


def test_no_split_modules_cover_every_layer(saved):
    case, _ = saved
    layers, sides = layers_of(case.model), (case.model.image_side, case.model.text_side)
    for side in sides if case.kind != "context_i2w" else ():  # whose encoders have one layer each
        assert {id(m) for part in side.values() for m in part.modules()} & {id(m) for m in layers.values()}
    assert (getattr(case.model, "fusion", None) is not None) == any(name.startswith("fusion") for name in layers)
    assert {type(layer).__name__ for layer in layers.values()} <= {*case.model._no_split_modules}


def test_device_maps_cut_no_layer(saved):
    """By Accelerate's function for `device_map="auto"`, on a device that has room for a part of the model."""
    model, parts = saved[0].model, []
    for percent in range(5, 100, 5):
        room = {"cpu": percent * compute_module_sizes(model)[""] // 100, "disk": 10**12}
        places = infer_auto_device_map(model, room, no_split_module_classes=[*model._no_split_modules])
        for layer in layers_of(model):
            assert sum(not place or f"{layer}.".startswith(f"{place}.") for place in places) == 1, (layer, places)
        parts.append(len({*places.values()}))
    assert 2 in parts  # some are cut, though not within a layer


def test_every_layer_is_a_unit_of_fsdp(saved):
    """By Accelerate's function for FSDP 2, which is told no class."""
    model = saved[0].model
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    is_unit, layers = fsdp2_prepare_auto_wrap_policy(plugin, model), layers_of(model)
    units = {name for name, module in model.named_modules() if is_unit(module)}
    assert layers.keys() <= units
    assert not [unit for unit in units for layer in layers if unit.startswith(f"{layer}.")]  # none within another


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_offloading_changes_nothing(saved, device, tmp_path):
    case, folder = saved
    model = AutoModel.from_pretrained(folder)
    plain = found(model, case.inputs)
    # PyTorch's MultiheadAttention reads its submodule's weights directly: modules with one are loaded as a unit.
    whole = {"preload_module_classes": ["SiglipMultiheadAttentionPoolingHead"]}
    if device == "cpu":
        cpu_offload(model, torch.device("cpu"), **whole)
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"), **whole)
    assert any(parameter.is_meta for parameter in model.parameters())
    again = found(model, case.inputs)
    for name, tensor in plain.items():
        assert (again[name] - tensor).abs().max() == 0, name


def test_model_is_created_on_the_meta_device(saved):
    model = saved[0].model
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(tensor.is_meta for tensor in empty.parameters())
    assert {name: tensor.shape for name, tensor in empty.named_parameters()} == {
        name: tensor.shape for name, tensor in model.named_parameters()
    }


@pytest.mark.parametrize("family", [PVLFModel, TrainingFreeModel, InversionModel, CASEModel, CompoDiffModel])
def test_checkpoint_of_another_family_raises_instead_of_loading_fresh_weights(family, tmp_path):
    kind = "blip" if family is PVLFModel else "pvlf"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    message = rf"is of model_type '{kind}', not '{family.config_class.model_type}': load it by AutoModel"
    with pytest.raises(ValueError, match=message):
        family.from_pretrained(tmp_path)
