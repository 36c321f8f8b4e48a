"""The model card (`README.md`) of a checkpoint, rendered from what its run recorded and from nothing else.

pvlf-hf card outputs/mine --name you/pvlf-mine --license bsd-3-clause
hf upload you/pvlf-mine outputs/mine --exclude "checkpoint-*"

The text between `<!-- pvlf-hf: results -->` and `<!-- pvlf-hf: end of results -->` is rendered, and so are the other
sections. Everything else in a card is its author's, and is kept byte for byte when the card is rendered again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id, yaml_dump

from ..atomic_files import whole
from ..data.benchmark import Protocol
from ..embeddings.encoding import FORMER_NAME
from ..evaluation.results import Evaluation, environment, recorded_dtype
from .eval_results import write_eval_results

PICTURE = "retrievals.png"
"""File name of a sheet of queries and results ([`retrieval_sheet`]); shown if it is beside the card."""

_DEFAULTS = {
    "library_name": "transformers",
    "pipeline_tag": "image-feature-extraction",  # the Hub has no task for composed retrieval, see the tag below
    "tags": ["composed-image-retrieval", "pvlf"],
}
_LEADING = ("library_name", "pipeline_tag", "base_model")
"""Metadata that the Hub indexes, which comes first in a new card."""

_METHODS = {
    "pvlf": "PVLF",
    "transagg": "TransAgg",
    "case": "CASE",
    "compodiff": "CompoDiff",
    "pic2word": "Pic2Word",
    "searle": "SEARLE",
    "lincir": "LinCIR",
    "context_i2w": "Context-I2W",
    "palavra": "PALAVRA",
}

_ABOUT = """\
{method} for composed image retrieval: a reference image and a relative caption are embedded into the space
of gallery images, and the nearest gallery images by cosine are returned. Built on {base},
trained on {data}."""

_USAGE = """\
```python
from transformers import AutoModel, AutoProcessor

# The code comes with the checkpoint; with `import pvlf_hf` instead, trust_remote_code is not needed.{unpinned}
model = AutoModel.from_pretrained("{name}", {pin}trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", {pin}trust_remote_code=True)

gallery = model.get_image_features(**processor.process_targets(images)).pooler_output  # (n, d)
query = model.get_query_features(**processor.process_queries(image, "the same but red")).pooler_output
best = (query @ gallery.T).argsort(descending=True)  # embeddings are unit vectors: this is the cosine
```"""

_UNPINNED = (
    '\n# Pass revision="<commit>" to run the code and the weights of the commit that you have read, and no later ones.'
)

_CITATION = """\
```bibtex
@inproceedings{wang2024pvlf,
  title     = {Prompting Vision-Language Fusion for Zero-Shot Composed Image Retrieval},
  author    = {Wang and Chen and Zhao and Su},
  booktitle = {Asian Conference on Machine Learning (ACML)},
  year      = {2024}
}
```"""


def write_card(
    folder: str | Path,
    name: str | None = None,
    results: str | Path | Mapping[str, Any] | None = None,
    revision: str | None = None,
    hub_ids: Mapping[str, str] | None = None,
    **metadata: Any,
) -> Path:
    """Render `README.md` in a checkpoint's folder, and `.eval_results/`; an existing card keeps its author's text.

    Args:
        folder: folder of the checkpoint, as the Trainer or `save_pretrained` wrote it.
        name: Hub name of the model, `you/pvlf-mine`; by default the folder's name.
        results: results and training settings, a file of [`write_results`] or its content; by default `results.json`
            in the folder. Without one the card states that nothing was measured.
        revision: see [`render_card`].
        hub_ids: benchmark data sets on the Hub, see [`~pvlf_hf.checkpoints.eval_results.eval_result_entries`].
        metadata: further fields of [`~huggingface_hub.ModelCardData`]: `license`, `language`, `base_model`, ...

    Raises:
        ValueError: as [`render_card`].
    """
    folder = Path(folder)
    file = folder / "README.md"
    if results is None:
        results = folder / "results.json" if (folder / "results.json").exists() else {}
    facts = results if isinstance(results, Mapping) else json.loads(Path(results).read_text(encoding="utf-8"))
    picture = PICTURE if (folder / PICTURE).exists() else None
    card = file.read_bytes().decode() if file.exists() else ""  # bytes: line ends stay as they are
    text = render_card(facts, name or folder.resolve().name, card, picture, revision, **metadata)
    write_eval_results(folder, facts, name, hub_ids)
    with whole(file) as partial:
        partial.write_bytes(text.encode())
    return file


def render_card(
    results: Mapping[str, Any],
    name: str,
    card: str = "",
    picture: str | None = None,
    revision: str | None = None,
    **metadata: Any,
) -> str:
    """Render a model card. Every figure comes from `results`; results that are absent are stated to be absent.

    Args:
        results: the content of a run's `results.json`: `model`, `data`, `training`, `evaluations`, `environment`.
        name: Hub name of the model.
        card: the existing card. Its rendered sections are rendered again; a card without any, such as the library's,
            gets all of them at its end. In its metadata, `model-index` and the fields of `results` and `metadata` are
            replaced. The rest is unchanged.
        picture: an example to show, a file beside the card.
        revision: commit that the usage example loads; known once the checkpoint is on the Hub.
        metadata: further fields of [`~huggingface_hub.ModelCardData`].

    Returns:
        the card with its metadata; `huggingface_hub.ModelCard` takes it and can push it.

    Raises:
        ValueError: if a section of the card has a start and no end, or the reverse, or occurs twice.
    """
    sections = {
        "about": (f"# {name.rpartition('/')[2]}", _about(results, picture)),
        "usage": ("## Usage", _usage(name, revision)),
        "results": ("## Results", results_tables(results.get("evaluations", []))),
        "protocols": ("## How it was measured", _protocols(results)),
        "training": ("## Training", _training(results)),
        "citation": ("## Citation", _CITATION),
    }
    line_end = "\r\n" if "\r\n" in card else "\n"
    present = [(span, section) for section in sections if (span := _span(card, section))]
    for (start, end), section in sorted(present, reverse=True):  # from the end: earlier positions stay valid
        card = card[:start] + _marked(section, sections[section][1]).replace("\n", line_end) + card[end:]
    if not present:
        gap = "\n" if card.endswith("\n") or not card else "\n\n"
        headed = [f"{heading}\n\n{_marked(section, text)}\n" for section, (heading, text) in sections.items()]
        card += (gap + "\n".join(headed)).replace("\n", line_end)
    return with_metadata(card, _metadata(results, name, metadata), line_end)


def _usage(name: str, revision: str | None) -> str:
    pin = "" if revision is None else f'revision="{revision}", '
    return _USAGE.format(name=name, pin=pin, unpinned="" if pin else _UNPINNED)


def results_tables(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Render results of [`write_results`] as Markdown tables, one per set of metrics, semantic aspects separately."""
    if not evaluations:
        return "Not measured."
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for evaluation in evaluations:
        groups.setdefault(tuple(evaluation["metrics"]), []).append(evaluation)
    tables = []
    for names, rows in groups.items():
        for columns in ([n for n in names if "/" not in n], [n for n in names if "/" in n]):
            tables += [_table(rows, columns)] if columns else []
    with_intervals = all("intervals" in evaluation for evaluation in evaluations)
    return "\n\n".join(
        ["Percent" + (", with 95 % bootstrap intervals over queries." if with_intervals else "."), *tables]
    )


def _table(evaluations: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    def cell(evaluation: Mapping[str, Any], metric: str) -> str:
        percent = f"{100 * evaluation['metrics'][metric]:.2f}"
        if "intervals" not in evaluation:
            return percent
        low, high = evaluation["intervals"][metric]
        return f"{percent} ({100 * low:.1f} to {100 * high:.1f})"

    lines = [["benchmark", "protocol", "method", *map(short_name, columns)], ["---"] * (len(columns) + 3)]
    for e in evaluations:
        labels = [e["benchmark"], e["protocol"].get("name", "not recorded"), e["method"]]
        lines.append([*(label.replace("|", "/") for label in labels), *(cell(e, metric) for metric in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short_name(metric: str) -> str:
    """`recall_subset@1` -> `Rs@1`, and so on, for the heads of tables."""
    return metric.replace("recall_subset", "Rs").replace("recall", "R").replace("map", "mAP")


def _about(results: Mapping[str, Any], picture: str | None) -> str:
    model, data = results.get("model", {}), results.get("data", {})
    base, trained_on = model.get("model"), data.get("dataset") or data.get("train_file")
    text = _ABOUT.format(
        method=_METHODS.get(model.get("method"), "`PVLFModel`"),
        base=f"`{_shown(base)}`" if base else "a dual encoder that was not recorded",
        data=f"`{_shown(trained_on)}`" if trained_on else "data that was not recorded",
    )
    return text + (f"\n\n![Queries with what was retrieved]({picture})" if picture else "")


def _protocols(results: Mapping[str, Any]) -> str:
    facts = results.get("environment", {"versions": "not recorded", "commit": None})
    unknown = {field.name: "not recorded" for field in fields(Protocol)}
    evaluations = []
    for e in results.get("evaluations", []):
        known = {name: value for name, value in e["protocol"].items() if name in (*unknown, "template")}
        protocol = {**unknown, **known}
        dtype = recorded_dtype(e)
        evaluations.append(Evaluation(e["benchmark"], e["method"], e["metrics"], e["counts"], protocol, dtype, {}))
    return protocol_cards(evaluations, facts) or "Nothing was measured."


def _training(results: Mapping[str, Any]) -> str:
    groups = (results.get("model", {}), results.get("data", {}), results.get("training", {}))
    settings = {name: value for group in groups for name, value in group.items() if value is not None}
    rows = [f"| {name} | {_shown(value)} |" for name, value in settings.items()]
    parts = ["Settings that are not listed keep their defaults.\n\n| setting | |\n| --- | --- |\n" + "\n".join(rows)]
    if best := results.get("best"):
        parts.append(f"In training, {best['metric']} was best at `{best['checkpoint']}`: {best['value']}.")
    environment = results.get("environment", {})
    versions = [f"{name} {version}" for name, version in environment.items() if name != "commit"]
    commit = f"; commit {environment['commit']}" if environment.get("commit") else ""
    parts.append(f"Run with {', '.join(versions)}{commit}." if versions else "Versions were not recorded.")
    return "\n\n".join(parts if rows else ["Settings were not recorded.", *parts[1:]])


def _shown(value: Any) -> str:
    """Render a setting for publication: for a local path, its last part only."""
    is_path = isinstance(value, str) and Path(value).expanduser().is_absolute()
    return str(Path(value).name if is_path else value).replace("|", "/")


def _metadata(results: Mapping[str, Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of `results` and of the caller; `model-index` is None where nothing was measured."""
    base = results["base_model"] if "base_model" in results else hub_name(results.get("model", {}).get("model"))
    dataset = results.get("data", {}).get("dataset")
    stated = {"base_model": base, "datasets": [dataset] if dataset else None, **given}
    if stated.get("tags"):
        tags = stated["tags"]
        stated["tags"] = [*_DEFAULTS["tags"], *([tags] if isinstance(tags, str) else tags)]
    data = ModelCardData(eval_results=_eval_results(results) or None, model_name=name.rpartition("/")[2], **stated)
    metadata = data.to_dict()
    metadata.pop("model_name", None)  # what the library leaves of a model-index without results
    return {**metadata, "model-index": metadata.get("model-index")}


def hub_name(name: str | None) -> str | None:
    """Return a name that can be one on the Hub: not that of a local folder, and valid there; otherwise None."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if Path(str(name)).exists() else name


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """List the metrics of the model, not of its baselines, as fractions for the card's metadata."""
    return [
        EvalResult(
            task_type="composed-image-retrieval",
            task_name="Composed image retrieval",
            dataset_type=e["benchmark"].partition("/")[0],
            dataset_name=e["benchmark"],
            dataset_config=e["protocol"].get("name"),
            dataset_split=e["benchmark"].partition("/")[2] or None,
            dataset_revision=e["protocol"].get("revision"),
            dataset_args=dict(e["protocol"]),
            metric_type=metric,
            metric_name=short_name(metric),
            metric_value=value,
        )
        for e in results.get("evaluations", [])
        if e["method"] in ("composed", FORMER_NAME)
        for metric, value in e["metrics"].items()
    ]


def _marked(section: str, text: str) -> str:
    return f"<!-- pvlf-hf: {section} -->\n{text}\n<!-- pvlf-hf: end of {section} -->"


def _span(card: str, section: str) -> tuple[int, int] | None:
    """Return start and end of a section with its markers; None if the card does not have it."""
    starts, ends = (
        [match.span() for match in re.finditer(re.escape(f"<!-- pvlf-hf: {prefix}{section} -->"), card)]
        for prefix in ("", "end of ")
    )
    if not starts and not ends:
        return None
    if len(starts) != 1 or len(ends) != 1 or ends[0][0] < starts[0][1]:
        raise ValueError(
            f"the card must have one <!-- pvlf-hf: {section} --> and after it one <!-- pvlf-hf: end of {section} -->, "
            f"but has {len(starts)} and {len(ends)}; fix it, or remove both to write the section yourself"
        )
    return starts[0][0], ends[0][1]


def with_metadata(card: str, stated: Mapping[str, Any], line_end: str = "\n") -> str:
    """Return the card with keys of its YAML block replaced, removed (None) or added; defaults are only added.

    A leading key is added after the leading ones before it, any other at the end.
    """
    opening, front, closing, body = f"---{line_end}", "", f"---{line_end}", card
    if block := REGEX_YAML_BLOCK.match(card):
        closing = block.group(3).lstrip("\r\n")
        opening, front = block.group(1), card[block.end(1) : block.end(3) - len(closing)]
        body = card[block.end() :]
    given = {**_DEFAULTS, **stated}
    for key, value in {**{key: given[key] for key in _LEADING if key in given}, **given}.items():
        match = _entry(front, key)
        if match and key not in stated:
            continue
        text = "" if value is None else yaml_dump({key: value}, sort_keys=False).replace("\n", line_end)
        before = [found.end() for lead in _LEADING if key in _LEADING and (found := _entry(front, lead))]
        start, end = match.span() if match else (max(before, default=len(front)),) * 2
        front = front[:start] + text + front[end:]
    return opening + front + closing + body


def _entry(front: str, key: str) -> re.Match[str] | None:
    """Find a key with its value, which may have several lines."""
    return re.search(rf"^{re.escape(key)}:[^\n]*\n(?:[ -][^\n]*\n)*", front, re.MULTILINE)


def protocol_cards(evaluations: Sequence[Evaluation], facts: dict[str, str | None] | None = None) -> str:
    """Render the protocols of evaluations, each benchmark's once; arguments as [`protocol_card`]."""
    cards: dict[tuple[str, str], str] = {}
    for evaluation in evaluations:
        key = evaluation.benchmark, evaluation.protocol["name"]
        if key not in cards or "template" in evaluation.protocol:  # a baseline beside it has none
            cards[key] = protocol_card(evaluation, facts)
    return "\n\n".join(cards.values())


def protocol_card(evaluation: Evaluation, facts: dict[str, str | None] | None = None) -> str:
    """Render the protocol of an evaluation as a Markdown table.

    Args:
        evaluation: the evaluation.
        facts: versions and commit, from a results file; by default the current ones.
    """
    protocol = evaluation.protocol
    facts = environment() if facts is None else facts
    rows = {
        "protocol": protocol["name"],
        "gallery": f"{protocol['gallery']} ({evaluation.counts['gallery']:,} images)",
        "queries": f"{evaluation.counts['queries']:,}",
        "reference image": f"{protocol['reference']}",
        "captions": protocol["captions"],
        **({"template": protocol["template"]} if "template" in protocol else {}),
        "metrics": protocol["metrics"],
        "order of equal scores": protocol["ties"],
        "left out": protocol["missing"],
        "precision": evaluation.dtype,
        "data revision": protocol["revision"],
        "code": f"commit {facts['commit'] or 'unknown'}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.items() if name != "commit"),
    }
    cells = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join([f"| {evaluation.benchmark} | |", "| --- | --- |", *cells])


__all__ = ["PICTURE", "hub_name", "render_card", "results_tables", "with_metadata", "write_card"]
