"""Import rules, checked on the sources: one direction, and checkpoint code imports nothing else of the package."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from forked import run_python

import pvlf_hf
from pvlf_hf.registration import import_after

PACKAGE = Path(pvlf_hf.__file__).parent

# A folder imports only folders listed before it; a module imports only modules of its folder listed before it.
FOLDERS = {
    "": ["digests", "atomic_files", "dtypes", "lazy_names", "registration"],
    "models": [
        "image_formats_pvlf",
        "image_processing_pvlf",
        "loss_pvlf",
        "interface_pvlf",
        "pipeline_pvlf",
        "configuration_pvlf",
        "prompts_pvlf",
        "encoder_pvlf",
        "backbones_pvlf",
        "fusion_pvlf",
        "dual_encoder_pvlf",
        "modeling_pvlf",
        "compositions_training_free",
        "configuration_training_free",
        "modeling_training_free",
        "processing_pvlf",
        "pipeline_training_free",
        "configuration_case",
        "loss_case",
        "modeling_case",
        "processing_case",
        "configuration_inversion",
        "mapping_inversion",
        "loss_inversion",
        "optimization_inversion",
        "objectives_inversion",
        "modeling_inversion",
        "processing_inversion",
        "configuration_compodiff",
        "denoiser_compodiff",
        "sampler_compodiff",
        "objective_compodiff",
        "processing_compodiff",
        "modeling_compodiff",
    ],
    "data": ["checks", "tables", "benchmark", "image_files", "triplets", "keywords", "samples"],
    "data.emoji_cir": ["names", "captions", "dataset"],
    "data ": [
        "annotations",
        "examination",
        "laion_cir",
        "cirr",
        "fashioniq",
        "circo",
        "icir",
        "pinpoint",
        "circled",
        "genecis",
        "refined_cirr",
        "refined_fashioniq",
        "l_cirr",
        "edir",
        "streaming",
        "protocols",
        "doctor",
    ],
    "data.making": [
        "grammar",
        "vocabulary",
        "edits",
        "pairs",
        "near_pairs",
        "image_signatures",
        "screening",
        "measures",
        "triplet_report",
        "pipeline",
        "instruct",
    ],
    "embeddings": [
        "similarity",
        "combined",
        "fingerprints",
        "embedding_store",
        "query_parts",
        "fastest",
        "encoding",
        "model_views",
        "openvino_encoder",
        "int8_encoder",
    ],
    "evaluation": [
        "ranking",
        "definitions",
        "metrics",
        "significance",
        "results",
        "scoring",
        "submission",
        "costs",
        "comparison",
        "comparison_page",
        "retrieval_sheet",
    ],
    "checkpoints": [
        "loading",
        "eval_results",
        "model_card",
        "pushing",
        "golden",
        "weight_names",
        "convert",
        "case_weights",
        "inversion_weights",
        "compodiff_weights",
    ],
    "search": [
        "vectors",
        "locations",
        "shards",
        "faiss_index",
        "vector_index",
        "nearest",
        "mining",
        "pages",
        "filters",
        "query",
        "terms",
        "query_encoding",
        "image_folder",
        "indexing",
        "gallery_files",
        "metadata",
        "replacement",
        "int8_index",
        "building",
        "previews",
        "result",
        "image_search",
        "shard_sets",
        "indexed_images",
    ],
    "search.milvus": ["connection", "schema", "store", "filters", "nearest", "filling", "bulk", "indexing", "gallery"],
    "search ": [
        "gallery",
        "sharded_gallery",
        "parts",
        "part_encoder",
        "ray_job",
        "requests",
        "results_page",
        "middleware",
        "demo_session",
        "demo_page",
        "web_demo",
        "api_page",
        "batching",
        "server",
        "workers",
    ],
    "training": [
        "batches",
        "negatives",
        "cpu_dropout",
        "cpu_memory",
        "gradient_cache",
        "own_forward",
        "text_groups",
        "feature_cache",
        "gather",
        "optimization",
        "argument_contract",
        "training_args",
        "data_checks",
        "objectives",
        "text_anchored",
        "methods",
        "atomic_checkpoints",
        "hub",
        "trainer",
    ],
    "commands": ["arguments", "output", "evaluate", "train", "gallery", "convert", "compare", "triplets"],
    " ": ["onnx_encoder", "export", "sentence_transformer", "mteb_model"],
}
ORDER = [f"{folder.strip()}.{module}".lstrip(".") for folder, modules in FOLDERS.items() for module in modules]
TRAVELLING = [name for name in ORDER if name.startswith("models.")]
TRAVELS_WITH = {"torch", "transformers", "huggingface_hub", "fsspec", "numpy", "PIL"}  # the Hub's client needs fsspec


def path_of(module):
    return PACKAGE / f"{module.replace('.', '/')}.py"


def imports_of(module):
    """Return the package's modules and the other top-level packages that a module imports anywhere in its source."""
    ours, others = [], set()
    folders = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert module not in TRAVELLING or (node.level == 1 and node.module and "." not in node.module), (
                f"{module}: write `from .name import ...`; checkpoints need it"
            )
            above = folders[: len(folders) - node.level + 1]
            base = [*above, *(node.module.split(".") if node.module else [])]
            submodules = [".".join([*base, alias.name]) for alias in node.names]
            found = [name for name in submodules if path_of(name).exists()]
            ours += found if len(found) == len(submodules) else [".".join(base)]
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others.update(alias.name.split(".")[0] for alias in node.names)
    return ours, others


def test_every_module_is_in_the_import_order():
    found = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    modules = [".".join(path.parts) for path in found if "evaluate_modules" not in path.parts]
    assert sorted(name for name in modules if not name.endswith("__init__")) == sorted(ORDER)


def test_imports_run_one_way():
    for index, module in enumerate(ORDER):
        ours, others = imports_of(module)
        assert set(ours) <= set(ORDER[:index]), f"{module} imports a module listed after it in ORDER"
        assert "pvlf_hf" not in others, f"{module} imports its own package by name"


def test_checkpoint_code_imports_only_itself():
    for module in TRAVELLING:
        ours, others = imports_of(module)
        assert set(ours) <= set(TRAVELLING)
        assert others <= TRAVELS_WITH | sys.stdlib_module_names, f"{module} imports {others}"


def test_the_onnx_encoder_runs_without_torch():
    ours, others = imports_of("onnx_encoder")
    assert not ours and others <= {"numpy", "onnxruntime", "PIL", "tokenizers"} | sys.stdlib_module_names


def test_importing_the_package_imports_no_library():
    code = "import sys; before = {*sys.modules}; import pvlf_hf; print(*sys.modules.keys() - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in run.stdout.split()}
    assert imported - sys.stdlib_module_names == {"pvlf_hf"}


def test_a_module_is_imported_once_its_library_is(tmp_path, monkeypatch):
    library = tmp_path / "awaited_library"
    library.mkdir()
    (library / "__init__.py").write_text("raise RuntimeError('not yet')")
    (library / "piece.py").write_text("")
    (tmp_path / "awaiting_module.py").write_text("import awaited_library\nassert awaited_library.complete")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    finders = [*sys.meta_path]
    import_after("awaited_library", "awaiting_module")
    assert importlib.util.find_spec("awaited_library").submodule_search_locations == [str(library)]
    with pytest.raises(RuntimeError, match="not yet"):
        import_module("awaited_library.piece")
    assert "awaiting_module" not in sys.modules  # a library that is looked for, or fails, is not imported
    (library / "__init__.py").write_text("complete = True")
    import_module("awaited_library.piece")
    assert "awaiting_module" in sys.modules and sys.meta_path == finders
    assert sys.modules["awaited_library"].__loader__.get_source("awaited_library") == "complete = True"
    del sys.modules["awaiting_module"]
    import_after("awaited_library", "awaiting_module")  # it is imported already
    assert "awaiting_module" in sys.modules and sys.meta_path == finders


FIRST = """
import importlib.util, sys
{first}
assert ("transformers" in sys.modules) == {imported} and importlib.util.find_spec("transformers")
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline
import pvlf_hf
folder = sys.argv[1]
kinds = [kind.from_pretrained(folder) for kind in (AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor)]
assert [type(one) for one in kinds] == [
    pvlf_hf.PVLFConfig, pvlf_hf.PVLFImageProcessor, pvlf_hf.PVLFModel, pvlf_hf.PVLFProcessor
]
assert isinstance(pipeline("composed-image-retrieval", folder), pvlf_hf.ComposedImageRetrievalPipeline)
assert not any(type(finder).__module__ == "pvlf_hf.registration" for finder in sys.meta_path)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, imported",
    [
        ("import pvlf_hf", False),
        ("from pvlf_hf import load_cirr", True),  # which begins to import the models before Transformers
    ],
)
def test_models_are_registered_whatever_is_imported_first(tiny_checkpoint, first, imported):
    done = run_python(["-c", FIRST.format(first=first, imported=imported), tiny_checkpoint])
    assert done.returncode == 0, done.stderr


def test_modules_stay_below_450_lines():
    files = {module: path_of(module) for module in ORDER} | {file.stem: file for file in PACKAGE.parent.glob("*.py")}
    lengths = {module: len(file.read_text().splitlines()) for module, file in files.items()}
    assert {module: length for module, length in lengths.items() if length > 450} == {}


def test_folders_describe_and_export_their_names():
    handed_on = set()
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        package = importlib.import_module(f"pvlf_hf.{folder.name}")
        assert package.__doc__.startswith(f"{folder.name.capitalize()}: "), folder.name
        names = getattr(package, "__all__", [])
        assert list(names) == sorted(names) and all(hasattr(package, name) for name in names), folder.name
        if hasattr(package, "__getattr__"):  # which is not asked for a name that a module has, too
            assert not any((folder / f"{name}.py").exists() for name in names), folder.name
        handed_on |= set(names)
    assert handed_on == set(pvlf_hf.__all__)


def test_every_public_name_can_be_imported():
    assert pvlf_hf.__all__ == sorted(pvlf_hf.__all__)
    for name in pvlf_hf.__all__:
        value = getattr(pvlf_hf, name)
        assert value.__module__.startswith("pvlf_hf."), name
        assert value.__doc__, name
    assert not hasattr(pvlf_hf, "nothing_of_this_name")
