"""Exported towers: the same embeddings from `torch.export` and from ONNX Runtime without torch."""

import json
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from error_bounds import embedding_error, rounding
from PIL import Image
from reference import CONFIGS
from tiny import make_inputs, make_model, make_processor
from transformers import CLIPTokenizer

from pvlf_hf import CASEConfig, CASEModel, PVLFModel, PVLFProcessor, export
from pvlf_hf.export import check_parity, export_onnx, export_program
from pvlf_hf.onnx_encoder import OnnxEncoder

pytestmark = pytest.mark.slow

OTHERS = {
    "maple": lambda: make_model(prompt_location="both", prompt_coupling="linear", prompt_gallery=True, num_prompts=4),
    "case": lambda: CASEModel(CASEConfig(vl_config=CONFIGS["blip"], enc_token_id=98, reverse_token_id=97)).eval(),
}
"""Models that insert tokens into the encoders."""

CAPTIONS = ["red", "the same but more green and with two dogs", "dark", "a b c", "blue hat"]

STRANGER = """
import sys
for name in ("torch", "transformers", "pvlf_hf", "sentence_transformers"):
    sys.modules[name] = None  # importing it fails, as where it is not installed

import json
import numpy as np
import onnx_encoder

image_files, captions = json.load(open("queries.json"))
encoder = onnx_encoder.OnnxEncoder(".")
np.savez("found.npz", queries=encoder.embed_queries(image_files, captions), images=encoder.embed_images(image_files))
sys.argv = ["onnx_encoder.py", image_files[0], captions[0], *image_files]
onnx_encoder.main()
"""


def clip_processor():
    """Return a processor with a vocabulary of letters and the tiny CLIP's end token; it truncates to 35 tokens."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    tokens = {token: number for number, token in enumerate(letters)} | {"<|startoftext|>": 78, "<|endoftext|>": 79}
    return PVLFProcessor(make_processor().image_processor, CLIPTokenizer(vocab=tokens, merges=[]))


@pytest.fixture(scope="module", params=["blip", "clip"])
def exported(request, tmp_path_factory):
    """Return model, processor, folder and the `torch.export` programs made during the export to ONNX."""
    folder, programs = tmp_path_factory.mktemp(request.param), {}

    def keep(model, tower):
        return programs.setdefault(tower, export_program(model, tower))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_program", keep)
        if request.param == "blip":
            model, processor = make_model("blip"), make_processor()
            differences = export_onnx(model, processor, folder)
            assert differences.keys() == {"query", "gallery"}
            assert max(differences.values()) <= embedding_error(model, make_inputs("blip"))["query_embeds"]
        else:  # by the command line, from half precision
            make_model("clip").bfloat16().save_pretrained(folder / "model")
            clip_processor().save_pretrained(folder / "model")
            export.main(["--model", str(folder / "model"), "--output_dir", str(folder)])
            model = PVLFModel.from_pretrained(folder / "model", dtype=torch.float32)
            processor = PVLFProcessor.from_pretrained(folder / "model")
    return model, processor, folder, programs


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    """Return unusual image files: rotated by EXIF, transparent, palette, 16-bit; elongated, at the limit, tiny."""
    folder, generator = tmp_path_factory.mktemp("image_files"), np.random.default_rng(1)

    def noise(width, height, channels=3):
        return Image.fromarray(generator.integers(0, 256, (height, width, channels), dtype=np.uint8))

    turned, deep = Image.Exif(), Image.fromarray(generator.integers(0, 65536, (40, 50), dtype=np.uint16))
    turned[0x0112] = 6
    noise(90, 50).save(folder / "turned.jpg", exif=turned)
    noise(60, 45, 4).save(folder / "transparent.png")
    noise(60, 45).quantize(16).save(folder / "palette.png", transparency=3)
    noise(60, 45).convert("LA").save(folder / "gray.png")
    deep.save(folder / "deep.png")
    for width, height in ((200, 41), (33, 170), (50, 40), (51, 40), (3, 2), (32, 32)):
        noise(width, height).save(folder / f"{width}x{height}.png")
    return sorted(folder.iterdir())


def test_onnx_encoder_embeds_the_same_without_torch(exported, image_files):
    model, processor, folder, _ = exported
    image_files = [str(image_file) for image_file in image_files[: len(CAPTIONS)]]
    (folder / "queries.json").write_text(json.dumps([image_files, CAPTIONS]))
    command = [sys.executable, "-c", STRANGER]
    ran = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=True)
    found = np.load(folder / "found.npz")
    with torch.no_grad():
        queries = model.get_query_features(**processor.process_queries(image_files, CAPTIONS)).pooler_output
        images = model.get_image_features(**processor.process_targets(image_files)).pooler_output
    inputs = processor(images=image_files, text=CAPTIONS, target_images=image_files)
    error = embedding_error(model, dict(inputs))
    np.testing.assert_allclose(found["queries"], queries, rtol=0, atol=error["query_embeds"])
    np.testing.assert_allclose(found["images"], images, rtol=0, atol=error["target_embeds"])
    scores, order = (queries[0] @ images.T).sort(descending=True)
    printed = [line.split(" ", 1) for line in ran.stdout.splitlines()]
    assert [path for _, path in printed] == [image_files[index] for index in order]
    rounded = 0.5e-4 + error["similarity"]  # printed with four digits
    assert [float(score) for score, _ in printed] == pytest.approx(scores.tolist(), abs=rounded)


def test_images_and_captions_are_prepared_as_by_the_processor(exported, image_files):
    model, processor, folder, _ = exported
    encoder = OnnxEncoder(folder)
    for image_file in image_files:
        expected = processor(images=image_file, return_tensors="np")["pixel_values"]
        assert np.array_equal(encoder.pixel_values([image_file]), expected), image_file.name
    many, once = encoder.embed_images(image_files * 4), encoder.embed_images(image_files)  # several batches
    error = embedding_error(model, {"target_pixel_values": processor.process_targets(image_files)["pixel_values"]})
    np.testing.assert_allclose(many, np.tile(once, (4, 1)), rtol=0, atol=error["target_embeds"])
    expected = processor(text=CAPTIONS, return_tensors="np")
    tokens = encoder.tokenizer.encode_batch(CAPTIONS)
    assert [t.ids for t in tokens] == expected["input_ids"].tolist()
    assert [t.attention_mask for t in tokens] == expected["attention_mask"].tolist()


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (5, 6), (3, 7)])
def test_exported_programs_accept_other_sizes(exported, batch, length):
    model, _, _, programs = exported
    inputs = make_inputs(model.config.vl_config.model_type, batch=batch, seed=5)
    targets = inputs.pop("target_pixel_values")
    inputs |= {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs, target_pixel_values=targets)
        query = programs["query"].module()(**inputs)
        gallery = programs["gallery"].module()(pixel_values=targets)
    error = embedding_error(model, {**inputs, "target_pixel_values": targets})
    torch.testing.assert_close(query, expected.query_embeds, atol=error["query_embeds"], rtol=0)
    torch.testing.assert_close(gallery, expected.target_embeds, atol=error["target_embeds"], rtol=0)


def test_export_checks_parity(exported, tmp_path):
    model, processor, folder, _ = exported
    backbone = model.config.vl_config.model_type
    assert (
        max(check_parity(model, processor, folder).values())
        <= embedding_error(model, make_inputs(backbone))["query_embeds"]
    )
    with pytest.raises(
        ValueError, match=r"query\.onnx differs from the model by .*, more than 1e-05: export it again"
    ):
        check_parity(make_model(backbone, seed=1), processor, folder)
    unmasked = make_model(backbone, text_padding="transagg")  # attends to text padding; all else is equal
    unmasked.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"query\.onnx differs from the model by \d\.\de-01"):
        check_parity(unmasked, processor, folder)


def test_invalid_export_input_raises(exported, image_files, tiny_processor, tmp_path):
    _, _, folder, _ = exported
    with pytest.raises(ValueError, match=r"in torch.bfloat16, .* export model.float\(\)"):
        export_onnx(make_model().bfloat16(), tiny_processor, tmp_path)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        export_onnx(make_model().train(), tiny_processor, tmp_path)
    with pytest.raises(ValueError, match="tower='text': choose one of"):
        export_program(make_model(), "text")
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        OnnxEncoder(folder).embed_queries(image_files[:2], ["red"])
    with pytest.raises(ValueError, match="no caption is empty"):
        OnnxEncoder(folder).embed_queries(image_files[:1], [" "])
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["do_center_crop"] = False
    for name in ("query.onnx", "query.onnx.data", "gallery.onnx", "gallery.onnx.data"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="export with a processor that does the same"):
        OnnxEncoder(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_insert_tokens_are_exported(kind):
    model, inputs = OTHERS[kind](), make_inputs(batch=5)
    pixels = inputs.pop("target_pixel_values")
    program = export_program(model, "query").module()
    for rows, length in ((5, 8), (1, 3), (3, 20)):
        some = {
            "pixel_values": inputs["pixel_values"][:rows],
            "input_ids": torch.full((rows, length), 9),
            "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        }
        close(model, program, lambda model, inputs: model.get_query_features(**inputs).pooler_output, some)
    program = export_program(model, "gallery").module()
    close(
        model,
        program,
        lambda model, inputs: model.get_image_features(**inputs).pooler_output,
        {"pixel_values": pixels},
    )


def close(model, program, compute, inputs):
    """Assert that a program gives what the model computes of the inputs."""
    error = rounding(lambda model, inputs: {"embeds": compute(model, inputs)}, model, inputs)["embeds"]
    torch.testing.assert_close(program(**inputs), compute(model, inputs), rtol=0, atol=error)
