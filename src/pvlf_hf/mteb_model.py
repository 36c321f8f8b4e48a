"""PVLF for the benchmark library `mteb`, whose composed retrieval tasks come from M-BEIR and EDIR.

Their CIRR and FashionIQ have the galleries of M-BEIR, leave reference images in them and report nDCG@10. The numbers
compare with mteb's leaderboard, not with the paper (for its protocols see `pvlf_hf.data.protocols`).

All encoding is `SentenceTransformer.encode`. A folder that `SentenceTransformer.save` wrote states its modalities in
`sentence_bert_config.json`, by which `mteb.get_model(name, trust_remote_code=True)` finds them on the Hub.

Example:
    ```python
    import mteb
    from pvlf_hf.mteb_model import PVLFEncoder

    tasks = mteb.get_tasks(["CIRRIT2IRetrieval", "FashionIQIT2IRetrieval", "EDIRIT2IRetrieval"])
    results = mteb.evaluate(PVLFEncoder("you/mine"), tasks, encode_kwargs={"batch_size": 64})
    ```
"""

from pathlib import Path
from typing import Any

from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_meta import ScoringFunction
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from .embeddings.embedding_store import made_by
from .models.image_processing_pvlf import opened
from .sentence_transformer import PVLFSentenceModule


class PVLFEncoder(SentenceTransformerEncoderWrapper):
    """Encoder for [`mteb.evaluate`]: composed queries, images and texts, as [`PVLFSentenceModule`] embeds them.

    Task instructions, which are meant for language models, are not prepended to captions.

    Args:
        model_name: Hub name or local folder of a PVLF checkpoint.
        revision: revision of the Hub repository. Without it `mteb` records the model's fingerprint, so that its cache
            never returns results of other weights.
        device: by default an accelerator, where there is one.
        kwargs: passed to [`PVLFSentenceModule.load`].
    """

    def __init__(self, model_name: str, revision: str | None = None, device: str | None = None, **kwargs: Any) -> None:
        module = PVLFSentenceModule.load(model_name, revision=revision, **kwargs)
        super().__init__(SentenceTransformer(modules=[module], device=device))
        path = Path(model_name)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"local/{path.resolve().name}" if path.is_dir() else model_name,
                "revision": revision or made_by(module.model, module.processor)["fingerprint"],
                "loader": type(self),
                "modalities": ["image", "text"],
                "languages": ["eng-Latn"],
                "n_parameters": module.model.num_parameters(),
                "embed_dim": module.get_embedding_dimension(),
                "max_tokens": module.max_seq_length,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["Sentence Transformers", "Transformers", "PyTorch"],
                "open_weights": True,
                "use_instructions": False,
            }
        )

    def encode(self, inputs: DataLoader, **kwargs: Any) -> Any:
        """Embed a loader's inputs as the base class does, with images opened by [`opened`] and not by `datasets`."""
        loader = DataLoader(
            opened(inputs.dataset),
            batch_size=inputs.batch_size,
            sampler=inputs.sampler,
            num_workers=inputs.num_workers,
            collate_fn=inputs.collate_fn,
        )
        return super().encode(loader, **kwargs)


__all__ = ["PVLFEncoder"]
