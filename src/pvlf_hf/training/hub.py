"""Pushes of a training run to the Hub: a repository checked before the first step, and a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import auth_check
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer

from ..checkpoints.model_card import write_card
from ..evaluation.results import environment


class HubMixin(Trainer):
    """Trainer mixin that checks the right to push before the first step and writes this project's model card."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the Hub repository and check the token before the first step; pushes in training fail silently.

        Raises:
            ValueError: if the token may not write there.
        """
        try:
            super().init_hf_repo(token, private)
            if self.is_world_process_zero():
                repository: Any = self.hub_model_id
                auth_check(repository, token=token or self.args.hub_token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).name
            raise ValueError(
                f"this token may not write to {name} on the Hub: log in with one that may (`hf auth login`) or name a "
                f"repository of yours as hub_model_id. The Hub says: {error.server_message}"
            ) from error

    def create_model_card(  # type: ignore[override]  # takes only metadata of the library's arguments
        self, results: str | Path | Mapping[str, Any] | None = None, model_name: str | None = None, **metadata: Any
    ) -> None:
        """Write `README.md` in the output folder, see [`~pvlf_hf.checkpoints.model_card.write_card`].

        [`~transformers.Trainer.push_to_hub`] calls it with its own further arguments:
        `trainer.push_to_hub(results="results.json", license="apache-2.0")`.

        Args:
            results: measured results, a file of [`write_results`] or its content. No other file is read: one of an
                earlier run is not about these weights. Without results the card says that nothing was measured.
            model_name: name of the model where it has none on the Hub.
            metadata: further fields of [`~huggingface_hub.ModelCardData`].
        """
        if self.is_world_process_zero():
            args: Any = self.args  # PVLFTrainingArguments
            training = args.settings() | ({"finetuning": "adapter"} if has_adapter(self.model) else {})
            run = {"training": training, "environment": environment()}
            write_card(str(self.args.output_dir), self.hub_model_id or model_name, results or run, **metadata)


def has_adapter(model: Any) -> bool:
    """Return whether PEFT has put adapters into a model and chosen which weights train."""
    return bool(getattr(model, "peft_config", None))


__all__ = ["HubMixin", "has_adapter"]
