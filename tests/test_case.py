"""CASE: numbers of the reference implementation (CoVR's), its objectives, bad input, training, what a save carries."""

import copy
import os
import pickle

import pytest
import torch
from dual_encoders import save_dual_encoder, tokenizer_of
from error_bounds import function_error, rounding, training_error
from forked import run_without_package
from fused import FIXTURES, TOLERANCES, case_inputs, case_model, io_of, relative, tensors_of, within
from PIL import Image
from processes import run_in_processes
from reference import CONFIGS
from safetensors.torch import load_file, save_file
from squares import save_squares, square_triplets
from test_convert import load_as_printed, meta_tensors, write_tokenizer
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import AutoModel, AutoProcessor, BlipConfig, BlipForImageTextRetrieval
from transformers.activations import ACT2FN

from pvlf_hf import (
    CASEConfig,
    CASEModel,
    CASEProcessor,
    Gallery,
    PVLFModel,
    PVLFTrainer,
    PVLFTrainingArguments,
    convert_case,
)
from pvlf_hf.checkpoints.case_weights import LICENCE, case_from_covr
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.commands.train import parse_arguments
from pvlf_hf.embeddings.fingerprints import image_fingerprint
from pvlf_hf.models.loss_case import hn_nce
from pvlf_hf.models.loss_inversion import symmetric_info_nce
from pvlf_hf.training.feature_cache import accept_cached_features, cache_features
from pvlf_hf.training.gradient_cache import embed_in_chunks

TOKENS = {"enc_token_id": 98, "reverse_token_id": 97}


def make_case(seed=0, **settings):
    """A seeded random CASE on the tiny BLIP, in eval mode."""
    torch.manual_seed(seed)
    return CASEModel(CASEConfig(vl_config=CONFIGS["blip"], **{**TOKENS, **settings})).eval()


def make_processor():
    return CASEProcessor.for_backbone(CASEConfig(vl_config=CONFIGS["blip"], **TOKENS).vl_config, tokenizer_of("blip"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A retrieval checkpoint, whose text encoder has cross-attention."""
    folder = tmp_path_factory.mktemp("blip")
    save_dual_encoder("blip", folder)
    return folder


# --- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("first_token", ["enc", "cls"])
@pytest.mark.reliability(
    7,
    "CASE's queries are CoVR's",
    broken=(
        "src/pvlf_hf/models/modeling_case.py",
        "attention_mask=attention_mask, encoder_hidden_states=image_tokens.to(self.dtype)",
        "encoder_hidden_states=image_tokens.to(self.dtype)",
    ),
)
def test_queries_equal_the_reference(first_token, figure):
    model, io = case_model(first_token=first_token), io_of("case_blip")
    query = model.get_query_features(**case_inputs(targets=False))
    expected = io["query" if first_token == "enc" else "query_cls"]
    within(query.pooler_output, expected)
    within(query.image_embeds, io["reference_normalised"])
    within(model.get_image_features(io["reference_images"]).last_hidden_state, io["vit_tokens_ref"])
    within(model.get_image_features(io["target_images"]).pooler_output, io["target_normalised"])
    if first_token == "enc":  # [ENC] stays [ENC]
        ids = {**case_inputs(targets=False), "input_ids": io["input_ids"]}
        assert torch.equal(model.get_query_features(**ids).pooler_output, query.pooler_output)
    figure(f"{first_token}: query within 1e-5")


@torch.no_grad()
def test_all_hidden_states_equal_the_reference():
    model, io = case_model(), io_of("case_blip")
    hidden = model.backbone.text_encoder(
        io["input_ids"], io["attention_mask"], encoder_hidden_states=io["vit_tokens_ref"]
    ).last_hidden_state
    within(hidden, io["text_hidden"])


def _eps(norms, eps):
    for module in norms:
        module.eps = eps


@torch.no_grad()
def wrong(model, detail):
    """The query with one wrong detail."""
    io, inputs = io_of("case_blip"), case_inputs(targets=False)
    backbone, tokens = model.backbone, model.get_image_features(inputs["pixel_values"]).last_hidden_state
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    norms = [m for m in backbone.text_encoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    if detail == "[CLS] first":
        model.config.first_token = "cls"
    elif detail == "BERT eps":
        _eps(norms, 1e-6)
    elif detail == "ViT eps":
        _eps([m for m in backbone.vision_model.modules() if isinstance(m, torch.nn.LayerNorm)], 1e-5)
        tokens = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    elif detail == "tanh":
        for layer in backbone.text_encoder.encoder.layer:
            layer.intermediate.intermediate_act_fn = ACT2FN["gelu_new"]
    elif detail == "padding":
        mask = None
    elif detail == "no image [CLS]":
        tokens = tokens[:, 1:]
    elif detail == "no image":
        return model.get_text_features(io["input_ids"], mask).pooler_output
    elif detail == "before the final norm":
        backbone.vision_model.post_layernorm = torch.nn.Identity()
        tokens = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    return model.compose(tokens, ids, mask)


@pytest.mark.parametrize(
    ("detail", "effect"),
    [
        ("[CLS] first", 3.0e-1),
        ("BERT eps", 3.0e-4),
        ("ViT eps", 1.5e-3),
        ("tanh", 9.1e-5),
        ("padding", 2.3e-1),
        ("no image [CLS]", 3.0e-2),
        ("no image", 5.2e-1),
        ("before the final norm", 4.5e-1),
    ],
)
def test_each_wrong_detail_moves_the_query_as_in_the_reference(detail, effect):
    """By what was measured there, to its two digits: far more than the tolerance of the tests above."""
    moved = (wrong(case_model(), detail) - io_of("case_blip")["query"]).abs().max().item()
    assert moved == pytest.approx(effect, rel=0.06) and moved > 5e-5


@pytest.mark.reliability(
    7,
    "CASE's loss and gradients are the published objective on the reference's embeddings, both ways",
    broken=(
        "src/pvlf_hf/models/modeling_case.py",
        "return forth + self.config.reverse_weight * back",
        "return forth + 0.99 * self.config.reverse_weight * back",
    ),
)
def test_loss_and_gradients_equal_the_reference(figure):
    model, io = case_model(), io_of("case_blip")
    output = model(**case_inputs())
    within(output.reverse_query_embeds, io["reverse_query"])
    within(output.reference_embeds, io["reference_normalised"])
    within(output.loss[None], io["case.loss"])
    model.config.reverse_weight = 0.0
    within(model(**case_inputs()).loss[None], io["case.loss_query_to_target"])
    model.config.reverse_weight = 1.0
    output.loss.backward()
    count = compare_gradients(model, "case.grad.")
    figure(f"loss within 1e-5, {count} gradients")


def compare_gradients(model, prefix):
    names = [name for name in io_of("case_blip") if name.startswith(prefix)]
    for name in names:
        ours = model.get_parameter(f"backbone.{name.removeprefix(prefix)}").grad
        assert relative(ours, io_of("case_blip")[name]) < TOLERANCES["gradient"], name
    assert all(p.grad is None for module in model.image_side.values() for p in module.parameters())
    return len(names)


@pytest.mark.reliability(
    7,
    "HN-NCE with CoVR's slip is CoVR's loss, and without it another",
    broken=("src/pvlf_hf/models/loss_case.py", "scale[None] if across", "scale[:, None] if across"),
)
def test_hn_nce_equals_the_reference(figure):
    io = io_of("case_blip")
    model = case_model(objective="hn_nce", reverse_weight=0, hn_nce_as_released=True)
    output = model(**case_inputs())
    assert output.reverse_query_embeds is None
    within(output.loss[None], io["covr.loss_hn_nce"])
    output.loss.backward()
    count = compare_gradients(model, "covr.grad_hn_nce.")
    model.config.hn_nce_as_released = False
    slip = (model(**case_inputs()).loss - io["covr.loss_hn_nce"]).abs().item()
    assert slip == pytest.approx(0.38, abs=0.01)
    within(symmetric_info_nce(output.query_embeds, output.target_embeds, 0.07)[None], io["covr.loss_symmetric_ce"])
    figure(f"{count} gradients within 1e-5; the slip is worth {slip:.2f}")


# --- objectives ------------------------------------------------------------------------------------------------------


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_hn_nce_equals_its_formula():
    queries, targets = unit(5, 8), unit(5, 8, seed=1)
    alpha, beta = 0.7, 0.3
    scores = queries.double() @ targets.double().T / 0.07

    def direction(scores):
        total = 0.0
        for i in range(5):
            others = [k for k in range(5) if k != i]
            hardness = {k: torch.exp(beta * scores[i, k]) for k in others}
            weights = {k: 4 * h / sum(hardness.values()) for k, h in hardness.items()}
            inside = alpha * torch.exp(scores[i, i]) + sum(weights[k] * torch.exp(scores[i, k]) for k in others)
            total += torch.log(inside) - scores[i, i]
        return total / 5

    expected = direction(scores) + direction(scores.T)
    error = function_error(lambda *pair: hn_nce(*pair, 0.07, alpha, beta), queries, targets)
    assert hn_nce(queries, targets, 0.07, alpha, beta).item() == pytest.approx(expected.item(), rel=0, abs=error)
    # Without weights it is cross-entropy, both ways.
    plain = 2 * symmetric_info_nce(queries.double(), targets.double(), 0.07)
    error = function_error(lambda *pair: hn_nce(*pair, 0.07, beta=0.0), queries, targets)
    assert hn_nce(queries, targets, 0.07, beta=0.0).item() == pytest.approx(plain.item(), rel=0, abs=error)


def test_hn_nce_of_equal_targets_single_rows_and_gathered_targets():
    queries, targets = unit(4, 8).requires_grad_(), unit(4, 8, seed=1)
    assert hn_nce(queries[:1], targets[:1]).item() == 0
    same = hn_nce(queries, targets, target_ids=torch.tensor([3, 3, 3, 3]))  # no negatives at all
    assert same.item() == 0
    same.backward()
    assert queries.grad.abs().max() == 0
    ids = torch.tensor([1, 2, 1, 3])
    left = [0, 1, 3]
    # Row 0 sees what it would without its double.
    gathered = hn_nce(queries[:1], targets, positives=torch.tensor([0]), target_ids=ids)
    alone = hn_nce(queries[:1], targets[left], positives=torch.tensor([0]))
    error = function_error(lambda *pair: hn_nce(*pair, positives=torch.tensor([0])), queries[:1], targets[left])
    torch.testing.assert_close(gathered, alone, rtol=0, atol=error)
    with pytest.raises(ValueError, match="loss_chunk_size"):
        hn_nce(queries, targets, chunk_size=2)
    with pytest.raises(ValueError, match="gather_negatives=False"):
        hn_nce(queries[:2], targets, as_released=True, positives=torch.tensor([0, 1]))


def test_loss_of_gathered_targets_is_the_loss_of_the_whole_batch():
    model = make_case()
    queries, targets = (torch.cat([unit(6, 32, seed=s), unit(6, 32, seed=s + 1)], dim=1) for s in (0, 2))
    ids = torch.tensor([0, 1, 2, 2, 4, 5])
    whole = model.loss(queries, targets, target_ids=ids)
    halves = [model.loss(queries[rows], targets, target_ids=ids, positives=rows) for rows in torch.arange(6).split(3)]
    error = function_error(lambda *pair: model.loss(*pair, target_ids=ids), queries, targets)
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=0, atol=error)
    assert whole > model.loss(queries[:, :32], targets[:, :32], target_ids=ids)


def test_equal_references_are_no_negatives_of_the_way_back():
    """With two queries of one image the way back has nothing to tell it from."""
    model = make_case()
    # Of two processes, which round otherwise; the first coordinate lies on both sides of half a decimal.
    first = torch.tensor([[0.10005 - 2e-6], [0.10005 + 2e-6]])
    queries, references = unit(2, 32), torch.cat([first, (1 - first**2).sqrt() * unit(1, 31, seed=5)], dim=1)
    both = torch.cat([queries, queries], dim=1), torch.cat([unit(2, 32, seed=3), references], dim=1)
    error = function_error(model.loss, *both)
    torch.testing.assert_close(model.loss(*both), model.loss(both[0][:, :32], both[1][:, :32]), rtol=0, atol=error)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vl_config": CONFIGS["clip"]}, "'clip', but CASE is defined on BLIP alone.*use PVLF"),
        (
            {"enc_token_id": None},
            r"99 tokens, not the 30524.*\[ENC\] is unknown: pass enc_token_id.*'cls'",
        ),
        ({"reverse_token_id": None}, r"\[DEC\] is unknown: pass reverse_token_id.*or reverse_weight=0"),
        ({"reverse_token_id": 99}, "reverse_token_id=99 is not a token of vl_config, whose vocabulary has 99"),
        ({"first_token": "dec"}, "first_token='dec': choose one of"),
        ({"objective": "ce"}, "objective='ce': choose one of"),
        ({"hn_nce_as_released": True}, "is for objective='hn_nce'"),
        ({"temperature": 0}, "need temperature > 0"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        CASEConfig(**{"vl_config": CONFIGS["blip"], **TOKENS, **settings})


def test_a_clip_is_refused_before_it_is_loaded(tmp_path):
    save_dual_encoder("clip", tmp_path)
    for build in (CASEModel, CASEProcessor):
        with pytest.raises(ValueError, match="CASE is defined on BLIP alone"):
            build.from_vl_pretrained(tmp_path)


def test_captions_are_cut_at_64_and_in_training_at_35():
    processor = CASEProcessor(make_processor().image_processor, tokenizer_of("blip"))
    caption, image = "red " * 100, Image.new("RGB", (32, 32))
    assert processor.process_queries(image, caption)["input_ids"].shape == (1, 64)
    assert processor(text=caption, **processor.training_settings)["input_ids"].shape == (1, 35)
    tiny = make_processor()  # 40 positions, one of which the way back takes
    assert (tiny.max_text_length, tiny.train_text_length) == (40, 35)
    with pytest.raises(ValueError, match="train_text_length 2 leaves no room"):
        CASEProcessor(tiny.image_processor, tokenizer_of("blip"), train_text_length=2)


def test_bad_batches_are_refused():
    model, inputs = make_case(), case_inputs()
    long = {**inputs, "input_ids": torch.full((3, 40), 9), "attention_mask": None}
    with pytest.raises(ValueError, match="captions of 40 tokens leave no position.*train_text_length below 40"):
        model(**long)
    assert model(**long, return_loss=False).query_embeds.shape == (3, 32)
    with pytest.raises(ValueError, match="3 queries but 2 targets: the way back"):
        model(**{**inputs, "target_pixel_values": inputs["target_pixel_values"][:2]})
    with pytest.raises(ValueError, match="2 reference images but 3 relative captions"):
        model.get_query_features(inputs["pixel_values"][:2], inputs["input_ids"])
    with pytest.raises(ValueError, match="output_attentions.*embeddings of queries alone"):
        model(**inputs, output_attentions=True)


# --- on a pretrained BLIP --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.reliability(
    7,
    "CASE embeds gallery images as a plain BLIP does, bit by bit, and searches its index",
    broken=(
        "src/pvlf_hf/models/modeling_case.py",
        "self.backbone.vision_proj(image_tokens.to(self.dtype))[:, 0]",
        "self.backbone.vision_proj(image_tokens.to(self.dtype)).mean(dim=1)",
    ),
)
def test_an_index_of_the_plain_blip_is_searched(blip, tmp_path, figure):
    photos = save_squares(tmp_path)
    plain, processor = load_model(str(blip))
    case, own = CASEModel.from_vl_pretrained(blip, **TOKENS), CASEProcessor.from_vl_pretrained(blip)
    assert image_fingerprint(case, own) == image_fingerprint(plain, processor)
    pixels = own.process_targets([Image.new("RGB", (32, 32), "red"), Image.new("RGB", (40, 32), "blue")])
    embeds = case.get_image_features(**pixels).pooler_output
    assert torch.equal(embeds, plain.get_image_features(**pixels).pooler_output)
    index = tmp_path / "index"
    Gallery.from_folder(photos, plain, processor, path=index, progress=False)
    found = Gallery.load(index, case, own).search(Image.open(photos / "red.png"), "is blue")
    assert len(found.ids) == 9
    figure("embeddings equal bit by bit, one fingerprint")


def test_untrained_cross_attention_is_named_in_a_message(blip, tmp_path, caplog):
    whole = CASEModel.from_vl_pretrained(blip, **TOKENS)
    assert "lacks" not in caplog.text and not whole.training
    kept = load_file(blip / "model.safetensors")
    assert all(torch.equal(kept[name.removeprefix("backbone.")], w) for name, w in whole.named_parameters())
    unimodal = {**CONFIGS["blip"], "text_config": {**CONFIGS["blip"]["text_config"], "is_decoder": False}}
    BlipForImageTextRetrieval(BlipConfig(**unimodal)).save_pretrained(tmp_path)
    model = CASEModel.from_vl_pretrained(tmp_path, **TOKENS)
    assert "lacks 20 weights named *.crossattention.*" in caplog.text and "must be trained before use" in caplog.text
    assert model(**case_inputs()).loss.isfinite()


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    model = make_case()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "backbone.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    weights[name] = torch.zeros(20, 32)
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"crossattention.*32.*24|ignore_mismatched_sizes"):
        AutoModel.from_pretrained(tmp_path)


# --- training --------------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "black", "white", "yellow")
DISTINCT = (0, 6, 12, 18, 24, 25)
"""Rows of six triplets whose references, and targets, are all different: from each colour to the next."""


@pytest.fixture
def squares(tmp_path):
    return square_triplets(tmp_path, COLOURS, lambda reference, target: f"make it {target} and {reference}")


def losses_of_a_process(folder, batch_size):
    """What one of several processes logs, each with a share of six rows a step."""
    own = folder / os.environ.get("RANK", "0")  # no process reads what another is writing
    own.mkdir()
    triplets = square_triplets(own, COLOURS, lambda reference, target: f"make it {target} and {reference}")
    return train(without_dropout(make_case()), triplets, folder, per_device_train_batch_size=batch_size).tolist()


@pytest.mark.slow
def test_two_processes_train_both_ways_as_one(tmp_path):
    """Targets of all, and references of all on the way back."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    alone = losses_of_a_process(folders[0], 6)
    triplets = square_triplets(tmp_path, COLOURS, lambda reference, target: f"make it {target} and {reference}")
    error = losses_error(without_dropout(make_case()), inputs_of(triplets, DISTINCT))
    for losses in run_in_processes(2, losses_of_a_process, folders[1], 3):
        assert losses == pytest.approx(alone, rel=0, abs=error)


def train(model, triplets, folder, **settings):
    args = PVLFTrainingArguments(
        str(folder / "run"),
        finetuning="text",
        optim="sgd",
        encoder_learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"per_device_train_batch_size": 6, "max_steps": 3, **settings},
    )
    trainer = PVLFTrainer(model, args, triplets, processing_class=make_processor())
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def losses_error(model, inputs, stored=None):
    """Return how far apart the losses of two runs of `train` may be; its rate of the encoders falls from 0.01."""
    model.set_finetuning("text")
    error = training_error(model.train(), inputs, 3, 1e-2, stored=stored)["losses"]
    assert error < 0.002
    return error


def inputs_of(triplets, rows):
    """Return the batch of some triplets."""
    rows = [triplets[row] for row in rows]
    return dict(make_processor()(*([row[name] for row in rows] for name in ("reference", "caption", "target"))))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("reverse_weight", [0.0, 1.0])
def test_trains_from_cached_images_as_from_images(squares, tmp_path, reverse_weight):
    settings = {"reverse_weight": reverse_weight, "temperature": 0.2}  # a mild one, which magnifies rounding less
    plain, cached = (without_dropout(make_case(**settings)) for _ in range(2))
    before = copy.deepcopy(plain.state_dict())
    losses = train(plain, squares, tmp_path)
    again = train(cached, squares, tmp_path, feature_cache=str(tmp_path / "cache"))
    known, collate = cache_features(cached, make_processor(), squares, tmp_path / "cache", progress=False)
    batch = in_float32(collate([known[row] for row in DISTINCT]))
    error = losses_error(cached, batch, stored=torch.float16)  # images are kept in float16
    torch.testing.assert_close(again, losses, rtol=0, atol=error)
    moved = {name.split(".")[1] for name, w in plain.state_dict().items() if not torch.equal(w, before[name])}
    assert moved == {"text_encoder", "text_proj"}
    assert (losses[0] - losses[-1]).abs() > error


def in_float32(batch):
    """Return a batch of the feature cache with its features in float32."""
    return tree_map(lambda t: t.float() if t.is_floating_point() else t, batch)


def test_the_trainer_adds_the_way_back(squares, tmp_path):
    """Two objectives of six rows each, so about twice the loss."""
    forth, both = (train(make_case(reverse_weight=w), squares, tmp_path / str(w), max_steps=1)[0] for w in (0.0, 1.0))
    assert 1.5 < both / forth < 2.5


def test_cached_images_are_not_those_of_another_model(squares, tmp_path):
    """CASE keeps tokens that are not projected, PVLF those that are: one folder, two caches."""
    model, processor = make_case(), make_processor()
    model.set_finetuning("text")
    known, collate = cache_features(model, processor, squares, tmp_path / "cache", progress=False)
    batch = collate([known[0], known[7]])
    assert batch["encoder_outputs"]["image_tokens"].shape == batch["encoder_outputs"]["target_tokens"].shape
    assert batch["encoder_outputs"]["image_tokens"].shape == (2, 17, 24)
    accept_cached_features(model)
    names = ("query_embeds", "target_embeds", "reverse_query_embeds", "reference_embeds")

    def embeds(model, inputs):
        output = model(**inputs)
        return {name: output[name] for name in names}

    with torch.no_grad():
        cached, whole = embeds(model, batch), embeds(model, inputs_of(squares, (0, 7)))
        error = rounding(embeds, model, in_float32(batch), stored=torch.float16)
    for name in names:
        assert error[name] < 0.01
        torch.testing.assert_close(cached[name], whole[name], rtol=0, atol=error[name])
    assert torch.equal(pickle.loads(pickle.dumps(model)).backbone.text_proj.bias, model.backbone.text_proj.bias)
    pvlf = PVLFModel.from_pretrained(save_pvlf(model, tmp_path / "pvlf"))
    pvlf.set_finetuning("frozen")
    known, collate = cache_features(pvlf, processor, squares, tmp_path / "cache", progress=False)
    assert collate([known[0]])["encoder_outputs"]["image_tokens"].shape == (1, 17, 32)
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 3


def save_pvlf(case, folder):
    """PVLF on the same encoders."""
    from tiny import make_model

    model = make_model("blip")
    model.backbone.load_state_dict(case.backbone.state_dict(), strict=False)
    model.save_pretrained(folder)
    return folder


def test_gradient_caching_trains_the_way_back_too():
    model = without_dropout(make_case())
    model.set_finetuning("text")
    model.train()
    inputs = case_inputs()

    def in_one_piece(model, inputs):
        return model(**inputs, return_loss=False)

    def gradients(model, inputs, embed=in_one_piece):
        model.zero_grad()
        model.loss(*model.loss_inputs(embed(model, inputs))).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, error = gradients(model, inputs), rounding(gradients, model, inputs)
    chunked = gradients(model, inputs, lambda model, inputs: embed_in_chunks(model, inputs, 2))
    assert whole.keys() == chunked.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=0, atol=error[name], msg=name)
    model.config.reverse_weight = 0.0
    forth = gradients(model, inputs, lambda model, inputs: embed_in_chunks(model, inputs, 2))
    assert relative(forth["backbone.text_proj.weight"], whole["backbone.text_proj.weight"]) > 0.1


def test_recipe_builds_case_on_the_emoji_blip(tmp_path, caplog):
    recipe = str(FIXTURES.parents[2] / "train_scripts" / "configs" / "methods" / "case.yaml")
    model_args, _, args = parse_arguments([recipe, f"--output_dir={tmp_path}"])
    model, processor = model_args.build()
    assert type(model) is CASEModel and type(processor) is CASEProcessor and args.finetuning == "text"
    assert (model.config.first_token, model.config.reverse_token_id) == ("cls", 4)
    assert processor.tokenizer.convert_ids_to_tokens(4) == "[MASK]"
    assert "lacks 30 weights named *.crossattention.*" in caplog.text
    model_args, _, _ = parse_arguments([recipe, f"--output_dir={tmp_path}", "--num_prompts=3"])
    with pytest.raises(ValueError, match=r"\['num_prompts'\]: case has no such setting"):
        model_args.build()


# --- checkpoints -----------------------------------------------------------------------------------------------------

STRANGER = """
import sys
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.process_queries(Image.open(folder + "/picture.png"), "is red")
save_file({"query": model.get_query_features(**inputs).pooler_output.detach()}, folder + "/outputs.safetensors")
"""


@pytest.mark.slow
@torch.no_grad()
def test_loads_with_and_without_the_package(tmp_path):
    folder, processor = tmp_path / "case", make_processor()
    make_case(objective="hn_nce", reverse_weight=0.5).save_pretrained(folder)
    processor.save_pretrained(folder)
    picture = Image.linear_gradient("L").resize((40, 28)).convert("RGB")
    picture.save(folder / "picture.png")
    model, again = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert (type(model), type(again)) == (CASEModel, CASEProcessor)
    assert (model.config.objective, model.config.reverse_weight, again.train_text_length) == ("hn_nce", 0.5, 35)
    query = model.get_query_features(**again.process_queries(picture, "is red")).pooler_output
    run_without_package(STRANGER, tmp_path, folder)
    assert torch.equal(load_file(folder / "outputs.safetensors")["query"], query)


def large(tensors):
    """The shapes of BLIP with ViT-L at 384 px: another image encoder, and keys and values that read it."""
    blocks = {name.replace("blocks.0.", f"blocks.{i}."): t for i in range(24) for name, t in tensors.items()}
    sizes = {768: 1024, 2304: 3072, 3072: 4096}

    def widened(name, shape):
        if name.startswith(("visual_encoder.", "vision_proj.weight")):
            return [
                sizes.get(side, side) if "patch_embed" not in name or i == 0 else side for i, side in enumerate(shape)
            ]
        if "crossattention.self.key.weight" in name or "crossattention.self.value.weight" in name:
            return [768, 1024]
        return list(shape)

    return {name: torch.empty(widened(name, t.shape), device="meta") for name, t in {**blocks, **tensors}.items()}


@pytest.mark.parametrize("size", ["base", "large"])
def test_every_weight_of_a_checkpoint_at_real_size(size):
    _, tensors, _ = meta_tensors("salesforce_blip_keys.json")
    tensors = large(tensors) if size == "large" else tensors
    model = case_from_covr({f"module.{name}": tensor for name, tensor in tensors.items()})
    vision, text = model.config.vl_config.vision_config, model.config.vl_config.text_config
    expected = (768, 12, 12) if size == "base" else (1024, 24, 16)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == expected
    assert (text.num_attention_heads, text.encoder_hidden_size) == (12, expected[0])
    crossing = [name for name in model.state_dict() if "crossattention.self.key.weight" in name]
    assert len(crossing) == 12 and model.get_parameter(crossing[0]).shape == (768, expected[0])
    assert (model.config.enc_token_id, model.config.reverse_token_id) == (30523, 30522)


@torch.no_grad()
def test_a_whole_file_is_converted(tmp_path, caplog):
    tensors = {f"module.{name}": tensor for name, tensor in tensors_of("case_blip").items()}
    tensors["module.temp"] = torch.tensor(0.07)
    tensors["module.itm_head.weight"] = torch.zeros(2, 20)
    torch.save({"model": tensors, "epoch": 5, "optimizer": {"state": {0: {"step": 3}}}}, tmp_path / "ckpt_5.ckpt")
    vocabulary = write_tokenizer("blip", tmp_path, missing=9)  # 90 tokens
    convert_case(tmp_path / "ckpt_5.ckpt", tmp_path / "case", vocabulary, vision_heads=4, text_heads=4)
    assert LICENCE in caplog.text and "image-text matching (1 tensors)" in caplog.text
    model, processor = AutoModel.from_pretrained(tmp_path / "case"), AutoProcessor.from_pretrained(tmp_path / "case")
    assert type(model) is CASEModel and type(processor) is CASEProcessor
    assert (model.config.objective, model.config.reverse_weight) == ("hn_nce", 0.0)
    within(model.get_query_features(**case_inputs(targets=False)).pooler_output, io_of("case_blip")["query"])


def test_convert_command_writes_a_model_that_loads_as_printed(tmp_path):
    torch.save({"model": tensors_of("case_blip")}, tmp_path / "ckpt_5.ckpt")
    vocabulary = write_tokenizer("blip", tmp_path, missing=9)
    command = ["case", tmp_path / "ckpt_5.ckpt", "--output-dir", tmp_path / "case", "--tokenizer", vocabulary]
    model, processor = load_as_printed(*command, "--vision-heads", 4, "--text-heads", 4)
    assert type(model) is CASEModel and type(processor) is CASEProcessor


def test_unknown_missing_and_unsafe_files_are_refused(tmp_path):
    tensors, heads = tensors_of("case_blip"), {"vision_heads": 4, "text_heads": 4}
    name = "text_encoder.encoder.layer.1.crossattention.self.value.bias"
    with pytest.raises(ValueError, match=r"lacks 1 weights, first \['backbone\.text_encoder.*self\.value\.bias"):
        case_from_covr({n: t for n, t in tensors.items() if n != name}, **heads)
    with pytest.raises(ValueError, match=r"has unknown 1 weights, first \['backbone\.extra"):
        case_from_covr({**tensors, "extra": torch.zeros(1)}, **heads)
    wider = {**tensors, "text_encoder.encoder.layer.1.crossattention.self.key.weight": torch.zeros(20, 32)}
    with pytest.raises(ValueError, match=r"self\.key\.weight is \(20, 32\) but the other weights call for \(20, 24\)"):
        case_from_covr(wider, **heads)
    torch.save({"model": tensors, "args": Image.new("RGB", (2, 2))}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        convert_case(tmp_path / "evil.ckpt", tmp_path / "out")


def queries(model, inputs):
    return {"query": model.get_query_features(**inputs).pooler_output}


@torch.no_grad()
def test_half_precision_stays_near():
    model, inputs = make_case(), case_inputs(targets=False)
    plain, error = queries(model, inputs)["query"], rounding(queries, model, inputs, torch.bfloat16)["query"]
    half = queries(model.bfloat16(), inputs)["query"]
    assert half.dtype == torch.float32 and torch.allclose(half, plain, rtol=0, atol=error)
