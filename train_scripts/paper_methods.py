"""How rows that the paper quotes from other papers are run here: recipe, training data, protocols, differences.

Training data lie in the data root, in a folder for each set: images with `train.csv`, or shards that `write_shards`
wrote. None of it is distributed here. What this package converts of released weights needs no training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """A method of another paper.

    Args:
        model: pretrained dual encoder of a method that trains nothing.
        recipe: name of a file in `configs/methods`; None for a method that trains nothing.
        data: what it trains on, a path in the data root: a table beside its images, or a folder of shards.
        needs: what that data are.
        protocols: protocols under which its authors join captions, in place of a table's own.
        weights: command that converts released weights; None where there are none.
        differs: how our run differs from the authors'.
    """

    recipe: str | None = None
    model: str | None = None
    data: str | None = None
    needs: str = ""
    protocols: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None
    differs: str = ""

    def data_flags(self, data_root: Path) -> list[str]:
        """Return the arguments of train_pvlf.py that name the training data."""
        if self.data is None:
            return []
        file = data_root / self.data
        if file.suffix == ".csv":
            return [f"--train_file={file}", f"--image_folder={file.parent}"]
        return [f"--train_shards={file}"]


AS_WRITTEN = {"fashioniq": "fashioniq-and-reversed-as-written"}
BOTH_ORDERS = {"fashioniq": "fashioniq-both-mean"}
CONVERT = "pvlf-hf convert {} FILE --output-dir FOLDER"

PUBLISHED = {
    "Pic2Word": Published(
        recipe="pic2word",
        data="cc3m/train.csv",
        needs="the images of CC3M, column image",
        protocols=AS_WRITTEN,
        weights=CONVERT.format("inversion --method pic2word"),
        differs="trained on the images of CC3M that are at hand",
    ),
    "PALAVRA": Published(
        recipe="palavra",
        data="coco-objects/train.csv",
        needs="objects cut out of COCO's images, columns image, caption and concept",
        protocols=BOTH_ORDERS,
        differs="template and joined captions are SEARLE's, as its use for composed retrieval is unpublished",
    ),
    "SEARLE-XL-OTI": Published(
        model="openai/clip-vit-large-patch14",
        protocols=BOTH_ORDERS,
        differs="tokens are optimised without the phrases of GPT-Neo",
    ),
    "CompoDiff w/T5-XL": Published(
        recipe="compodiff",
        data="synthtriplets18m",
        needs="shards of SynthTriplets18M, columns reference, caption and target",
        weights=CONVERT.format("compodiff"),
        differs="text encoder CLIP bigG, as released, not T5-XL; one stage of training on triplets, not two",
    ),
    "Context-I2W": Published(
        recipe="context_i2w",
        data="cc3m/train.csv",
        needs="the images of CC3M, columns image and caption",
        protocols=AS_WRITTEN,
        weights=CONVERT.format("inversion --method context_i2w"),
        differs="objects in captions are found by our rule, as the authors' is not in their repository",
    ),
    "CASE Pre-LaSCo.Ca.": Published(
        recipe="case-lasco",
        data="lasco/train.csv",
        needs="triplets of LaSCo on COCO's images, some with COCO's caption of the target for a relative one",
        differs="temperature, weight of the way back and schedule are ours, as the authors' are unpublished",
    ),
}
"""Name of a row in `paper_tables.json` to its method."""

__all__ = ["PUBLISHED", "Published"]
