"""Publishes a checkpoint's folder on the Hub with a card that names the commit of the weights.

pvlf-hf card outputs/mine --name you/pvlf-mine --license bsd-3-clause --push

A commit is known once it is made, so the folder is uploaded first, and then the card again, which loads that commit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import validate_repo_id

from .eval_results import FOLDER
from .model_card import write_card

LEFT_OUT = ("checkpoint-*", "*/checkpoint-*", "*optimizer.pt", "*scheduler.pt", "*rng_state*.pth")
"""Patterns of files that a training run keeps to be resumed, which are not uploaded."""


def push_checkpoint(
    folder: str | Path,
    name: str,
    results: str | Path | Mapping[str, Any] | None = None,
    hub_ids: Mapping[str, str] | None = None,
    private: bool | None = None,
    **metadata: Any,
) -> str:
    """Upload a checkpoint's folder, and pin the usage example of its card to the commit that holds it.

    Args:
        folder: folder of the checkpoint; its card and `.eval_results/` are written, see [`write_card`].
        name: Hub name of the model, with its owner: `you/pvlf-mine`. It is made if it does not exist.
        results: see [`write_card`].
        hub_ids: see [`write_card`].
        private: whether a new repository is private; by default the owner's setting.
        metadata: see [`write_card`].

    Returns:
        The commit that the card loads. The card itself is in the one after it.

    Raises:
        ValueError: if the name has no owner or is none that the Hub takes, the folder holds no checkpoint, or as
            [`write_card`].
        HfHubHTTPError: if the Hub refuses, for example because the token may not write there.
    """
    if "/" not in name:
        raise ValueError(f"name {name!r} has no owner: write {f'you/{name}'!r}, with your name on the Hub")
    validate_repo_id(name)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no checkpoint (no config.json), and all its files would be uploaded: name one that does"
        )
    write_card(folder, name, results, hub_ids=hub_ids, **metadata)
    create_repo(name, private=private, exist_ok=True)
    message = "Upload model, processor and card"
    commit = upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[*LEFT_OUT]).oid
    write_card(folder, name, results, revision=commit, hub_ids=hub_ids, **metadata)
    card = ["README.md", f"{FOLDER}/*"]
    upload_folder(repo_id=name, folder_path=folder, commit_message=f"Card loads {commit[:7]}", allow_patterns=card)
    return commit


__all__ = ["push_checkpoint"]
