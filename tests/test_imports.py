"""How the modules hang together, read from their sources: arrows one way, and what travels stands alone."""

import ast
import sys
from pathlib import Path

import pvlf_hf

PACKAGE = Path(pvlf_hf.__file__).parent

# A module imports only what stands before it.
ORDER = [
    "image_processing_pvlf",
    "pipeline_pvlf",
    "configuration_pvlf",
    "backbones_pvlf",
    "loss_pvlf",
    "modeling_pvlf",
    "processing_pvlf",
    "whole_files",
    "benchmark",
    "data",
    "emoji_names",
    "emoji_captions",
    "emoji_cir",
    "annotations",
    "laion_cir",
    "cirr",
    "fashioniq",
    "circo",
    "streaming",
    "cosines",
    "metrics",
    "significance",
    "feature_cache",
    "embedding_store",
    "encoding",
    "evaluation",
    "protocols",
    "model_card",
    "golden",
    "submission",
    "precision",
    "measurement",
    "doctor",
    "sheet",
    "vector_index",
    "gallery_encoding",
    "gallery",
    "search_page",
    "request_guard",
    "web_demo",
    "training_args",
    "trainer",
    "training",
    "convert",
    "openvino_encoder",
    "onnx_encoder",
    "export",
    "sentence_transformer",
    "mteb_model",
    "__init__",
]
TRAVELLING = [name for name in ORDER if name.endswith("_pvlf")]
TRAVELS_WITH = {"torch", "transformers", "huggingface_hub", "fsspec", "numpy", "PIL"}  # the Hub's client needs fsspec


def imports_of(module):
    """The modules of this package, and the other top-level packages, that a module imports anywhere in it."""
    ours, others = [], set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            named = node.module or module not in TRAVELLING
            assert node.level == 1 and named, f"{module}: write `from .name import ...`; checkpoints need it"
            ours += [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others.update(alias.name.split(".")[0] for alias in node.names)
    return ours, others


def test_every_module_has_its_place():
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(ORDER)


def test_arrows_point_one_way():
    for place, module in enumerate(ORDER):
        ours, others = imports_of(module)
        assert set(ours) <= set(ORDER[:place]), f"{module} imports a module that stands after it in ORDER"
        assert "pvlf_hf" not in others, f"{module} imports its own package by name"


def test_what_travels_stands_alone():
    for module in TRAVELLING:
        ours, others = imports_of(module)
        assert set(ours) <= set(TRAVELLING)
        assert others <= TRAVELS_WITH | sys.stdlib_module_names, f"{module} imports {others}"


def test_the_onnx_encoder_runs_without_torch():
    ours, others = imports_of("onnx_encoder")
    assert not ours and others <= {"numpy", "onnxruntime", "PIL", "tokenizers"} | sys.stdlib_module_names


def test_importing_the_package_imports_only_what_travels():
    module = ast.parse((PACKAGE / "__init__.py").read_text())
    at_import = {node.module for node in module.body if isinstance(node, ast.ImportFrom) and node.level}
    assert at_import <= set(TRAVELLING)


def test_every_public_name_can_be_imported():
    assert pvlf_hf.__all__ == sorted(pvlf_hf.__all__)
    for name in pvlf_hf.__all__:
        value = getattr(pvlf_hf, name)
        assert value.__module__.startswith("pvlf_hf."), name
        assert value.__doc__, name
    assert not hasattr(pvlf_hf, "nothing_of_this_name")
