"""Results as the Hub reads them: `.eval_results/*.yaml` in a model's repository, shown on its page and leaderboards.

The Hub's documentation calls the metadata `model-index` of a card, which [`render_card`] writes too, legacy. A result
belongs to a task of a benchmark data set on the Hub, which its `eval.yaml` lists, as that of `model_cards/emoji-cir`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from ..atomic_files import whole
from ..data.protocols import HUB_IDS
from ..embeddings.encoding import FORMER_NAME
from ..evaluation.metrics import metrics_named

FOLDER = ".eval_results"


def task_id(benchmark: str, metric: str) -> str:
    """Return the id of a task: `test-plain-recall_at_10` of `emoji-cir/test/plain` and `recall@10`."""
    return "-".join([*benchmark.split("/")[1:], metric.replace("@", "_at_")])


def eval_result_entries(
    results: Mapping[str, Any], name: str | None = None, hub_ids: Mapping[str, str] | None = None
) -> dict[str, list[EvalResultEntry]]:
    """Return the entries of a model by data set, in percent; baselines have none.

    Args:
        results: the content of a run's `results.json`.
        name: Hub name of the model, whose results file the entries name as their source.
        hub_ids: ids of benchmark data sets on the Hub by the data set's name here, such as `{"emoji-cir":
            "you/emoji-cir"}`, in addition to `HUB_IDS`. Data sets without one are left out.
    """
    known = {**HUB_IDS, **(hub_ids or {})}
    entries: dict[str, list[EvalResultEntry]] = {}
    source = {"source_url": f"https://huggingface.co/{name}/blob/main/results.json", "source_name": "results.json"}
    for e in results.get("evaluations", []):
        data_set, protocol = e["benchmark"].partition("/")[0], e["protocol"]
        if data_set not in known or e["method"] not in ("composed", FORMER_NAME):
            continue
        notes = f"percent; protocol {protocol['name']}, reference {protocol['reference']}, data {protocol['revision']}"
        entries.setdefault(data_set, []).extend(
            EvalResultEntry(
                dataset_id=known[data_set],
                task_id=task_id(e["benchmark"], metric),
                value=round(100 * e["metrics"][metric], 2),
                notes=notes,
                **(source if name is not None and "/" in name else {}),
            )
            for metric in metrics_named(protocol["metrics"]).headline
            if metric in e["metrics"]
        )
    return entries


def write_eval_results(
    folder: str | Path,
    results: Mapping[str, Any],
    name: str | None = None,
    hub_ids: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `.eval_results/<data set>.yaml` into a checkpoint's folder, and return the files.

    Files of data sets that the results do not hold are left as they are; arguments are those of
    [`eval_result_entries`]. Entries name a source only if the folder has the `results.json` that will be there.
    """
    files = []
    source = name if (Path(folder) / "results.json").is_file() else None
    for data_set, entries in eval_result_entries(results, source, hub_ids).items():
        file = Path(folder) / FOLDER / f"{data_set}.yaml"
        with whole(file) as partial:
            partial.write_text(yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
        files.append(file)
    return files


__all__ = ["eval_result_entries", "task_id", "write_eval_results"]
