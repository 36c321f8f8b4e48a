"""Batches for the objectives of methods that train without triplets, see `OBJECTIVES` of `objectives_inversion`.

A further objective takes an entry in `SAMPLES` and its function in the model's file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from torch import Tensor, nn

from ..data.checks import caption_problem
from ..data.keywords import replace_keywords
from ..data.samples import image_sets
from ..digests import id_number
from ..embeddings.fingerprints import fingerprint, image_digests, image_settings, text_settings
from ..models.configuration_inversion import OTI_PROMPTS, InversionConfig
from ..models.image_processing_pvlf import opened
from ..models.interface_pvlf import unwrap
from ..models.modeling_inversion import InversionModel
from ..models.modeling_training_free import TrainingFreeModel
from ..models.optimization_inversion import INVERTED_AT_ONCE
from ..models.processing_inversion import InversionProcessor
from .feature_cache import FeatureCache

Rows = list[dict[str, Any]]


class SampleCollator:
    """Collator that makes the inputs of a model's own objective, with `return_loss=True`, of rows of samples.

    Args:
        processor: the processor of the model.
        crop_scale: least share of an image's area in random crops; 1 for no crops.
        samples: what the objective trains on; by default that of the processor's method.

    Attributes:
        features: features of the images by digest, where they were computed before; else None.
        teacher_words: optimised words of the images by digest, for the method that distils them; else None.
    """

    def __init__(self, processor: Any, crop_scale: float = 1.0, samples: "Samples | None" = None) -> None:
        self.processor, self.crop_scale = processor, crop_scale
        self.samples = samples or SAMPLES[processor.method]
        self.features: FeatureCache | None = None
        self.teacher_words: FeatureCache | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the method's rows must have."""
        return self.samples.columns

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """Make a batch of rows.

        Raises:
            ValueError: if a column is missing or a caption cannot be used; names the row's position in the batch.
        """
        return self.samples.collate(self, rows)

    def images(self, rows: Rows, column: str = "image") -> dict[str, Tensor]:
        """Return `pixel_values` `(batch, 3, height, width)`, or `image_features` `(batch, d)` computed before."""
        if self.features is not None:
            return {"image_features": torch.stack([self.features[row[digest_name(column)]][0] for row in rows])}
        images = [row[column] for row in rows]
        if self.crop_scale < 1:
            images = [random_crop(image, self.crop_scale) for image in images]
        return {"pixel_values": self.processor.process_targets(images)["pixel_values"]}

    def texts(self, texts: list[str], name: str = "") -> dict[str, Tensor]:
        """Tokenize texts as they are into `{name}_ids` and their mask, by default `input_ids`; long ones are cut."""
        batch = self.processor(text=texts)
        prefix = f"{name}_" if name else ""
        return {f"{prefix or 'input_'}ids": batch["input_ids"], f"{prefix}attention_mask": batch["attention_mask"]}


def digest_name(column: str) -> str:
    """Return the name of the column of digests that takes the place of a column of images."""
    return f"{column}_digest"


def random_crop(image: Image.Image, scale: float) -> Image.Image:
    """Crop a random rectangle and stretch it to a square of the image's shorter side, as Pic2Word's augmentation does.

    The rectangle has between `scale` and all of the area, and a width of 3/4 to 4/3 of its height, as far as it fits.
    Random numbers are PyTorch's.
    """
    width, height = image.size
    uniform = torch.rand(2).tolist()
    area = width * height * (scale + (1 - scale) * uniform[0])
    ratio = exp((2 * uniform[1] - 1) * log(4 / 3))
    wide, high = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = (int(torch.randint(free + 1, ())) for free in (width - wide, height - high))
    side = min(width, height)
    return image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + wide, top + high))


def _captions(rows: Rows) -> list[str]:
    for number, row in enumerate(rows):
        if problem := caption_problem(row.get("caption")):
            raise ValueError(f"row {number} of a batch: caption {problem}; fix it or drop the row")
    return [row["caption"] for row in rows]


def _masked(processor: InversionProcessor, rows: Rows) -> list[str]:
    """Replace the keywords of captions by the placeholder; in a caption without any, a random word."""
    masked = []
    for row, caption in zip(rows, _captions(rows), strict=True):
        text = replace_keywords(caption, processor.placeholder, row.get("keywords"))
        if processor.placeholder not in text.split():
            words = text.split() or [""]
            words[int(torch.randint(len(words), ()))] = processor.placeholder
            text = " ".join(words)
        masked.append(text)
    return masked


def _with_placeholder(collator: SampleCollator, texts: list[str]) -> dict[str, Tensor]:
    """Tokenize texts with placeholders; the method's prompt takes the place of one whose placeholders are cut away."""
    processor = collator.processor
    lengths = collator.texts(texts)["input_ids"] == processor.placeholder_id
    kept = [
        text if has else processor.prompts[0] for text, has in zip(texts, lengths.any(dim=1).tolist(), strict=True)
    ]
    return collator.texts(kept)


def _prompted_images(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Make a batch of Pic2Word: images, each with "a photo of *"."""
    return collator.images(rows) | collator.texts(collator.processor.prompts[:1] * len(rows))


def _images_and_masked_captions(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Make a batch of Context-I2W: as Pic2Word's, with captions whose keywords are masked."""
    return _prompted_images(collator, rows) | collator.texts(_masked(collator.processor, rows), "caption")


def _masked_captions(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Make a batch of LinCIR: captions, with keywords replaced and as they are."""
    processor = collator.processor
    lowered = [{**row, "caption": caption.lower()} for row, caption in zip(rows, _captions(rows), strict=True)]
    plain = [" ".join(row["caption"].replace(processor.placeholder, " ").split()) or "a photo" for row in lowered]
    return _with_placeholder(collator, _masked(processor, lowered)) | collator.texts(plain, "caption")


def _replaced_concepts(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Tokenize captions as they are, and with the placeholder for their concept."""
    processor, captions = collator.processor, _captions(rows)
    replaced = []
    for row, caption in zip(rows, captions, strict=True):
        replaced.append(text := replace_keywords(caption, processor.placeholder, [row["concept"]]))
        if processor.placeholder not in text.split():
            raise ValueError(
                f"concept {row['concept']!r} is no part of its caption {row['caption']!r}, which holds it by the same "
                "words: fix the column concept, or drop the row"
            )
    return _with_placeholder(collator, replaced) | collator.texts(captions, "caption")


def _images_with_teachers(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Make a batch of SEARLE: images, the words optimised for them, and phrases about their concepts."""
    teachers: Any = collator.teacher_words
    words = torch.stack([teachers[row["image_digest"]][0] for row in rows]).float()
    return collator.images(rows) | _replaced_concepts(collator, rows) | {"teacher_words": words}


def _sets_of_images(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Make a batch of PALAVRA: sets of images of one concept, its name, and a caption."""
    processor = collator.processor
    names = sorted({name.removesuffix("_digest") for name in rows[0] if name.startswith("image_")})
    images = [collator.images(rows, name) for name in names]
    template = OTI_PROMPTS[int(torch.randint(len(OTI_PROMPTS), ()))]
    names_of_rows = [row["concept"] for row in rows]
    first_tokens = [ids[0] for ids in processor.tokenizer(names_of_rows, add_special_tokens=False)["input_ids"]]
    return {
        **{name: torch.stack([one[name] for one in images], dim=1) for name in images[0]},
        "name_ids": torch.tensor(first_tokens),
        **collator.texts([template.replace("$", processor.placeholder)] * len(rows)),
        **collator.texts([template.replace("$", name) for name in names_of_rows], "caption"),
        **collator.texts(_captions(rows), "align"),
    }


def _images_and_captions(collator: SampleCollator, rows: Rows) -> dict[str, Tensor]:
    """Make a batch of text-anchored tuning; images of equal captions are no negatives of each other."""
    captions = _captions(rows)
    ids = torch.tensor([id_number(caption) for caption in captions])
    images = {"target_pixel_values": collator.images(rows)["pixel_values"], "target_ids": ids}
    return images | collator.texts(captions, "caption")


@dataclass(frozen=True)
class Samples:
    """Training data of a method's own objective.

    Args:
        columns: columns of its rows.
        collate: makes a batch of rows.
        prepare: makes the rows of the data set that a user has; None to take them as they are.
        takes_features: whether it needs no more of an image than its feature, which may be kept.
        distils: whether it needs words that were optimised for the images.
    """

    columns: tuple[str, ...]
    collate: Callable[[SampleCollator, Rows], dict[str, Tensor]]
    prepare: Callable[[Dataset], Dataset] | None = None
    takes_features: bool = False
    distils: bool = False


SAMPLES = {
    "pic2word": Samples(("image",), _prompted_images, takes_features=True),
    "context_i2w": Samples(("image", "caption"), _images_and_masked_captions),
    "searle": Samples(("image", "caption", "concept"), _images_with_teachers, takes_features=True, distils=True),
    "lincir": Samples(("caption",), _masked_captions),
    "palavra": Samples(("image", "caption", "concept"), _sets_of_images, prepare=image_sets, takes_features=True),
}
"""Name of a method to what its own objective trains on."""


TEXT_ANCHORED = Samples(("image", "caption"), _images_and_captions)
"""Training data of text-anchored tuning, see `pvlf_hf.training.text_anchored`."""


def own_samples(model: Any, dataset: Any, args: Any) -> Samples | None:
    """Return what a model's own objective trains on, or None where it trains on triplets.

    Args:
        model: the model. Textual inversion trains on triplets, too, where the data set has their images.
        dataset: the training set.
        args: [`PVLFTrainingArguments`].

    Raises:
        ValueError: if an argument cannot go with the objective, or needs one.
    """
    inner = None if model is None else unwrap(model)
    columns = {*(getattr(dataset, "column_names", None) or ())}
    if isinstance(inner, TrainingFreeModel) and {*TEXT_ANCHORED.columns} <= columns:
        return _text_anchored(model, dataset, args)
    method = inner.config.method if isinstance(inner, InversionModel) else None
    if method not in SAMPLES or {"reference", "target"} <= columns:
        if args.crop_scale < 1:
            raise ValueError("crop_scale crops single images, and has no effect on triplets: leave it at 1")
        return None
    if args.finetuning != "frozen":
        raise ValueError(
            f"finetuning={args.finetuning!r}: {method}'s objective keeps both encoders as they are; set 'frozen', or "
            "train on triplets"
        )
    if args.gradient_cache_chunk_size:
        raise ValueError(f"gradient_cache_chunk_size works on triplets, not on {method}'s objective: leave it out")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}: {method}'s objective takes a datasets.Dataset with "
            f"the columns {SAMPLES[method].columns}"
        )
    return SAMPLES[method]


def _text_anchored(model: Any, dataset: Any, args: Any) -> Samples:
    """Return what text-anchored tuning trains on; raise a `ValueError` if it cannot."""
    if not getattr(model, "peft_config", None):
        raise ValueError(
            "text-anchored tuning trains an adapter of the image encoder: pass tune_image_encoder(model), or "
            "--method tat"
        )
    if args.gradient_cache_chunk_size or args.feature_cache:
        raise ValueError("text-anchored tuning takes no feature_cache or gradient_cache_chunk_size: leave them out")
    if not isinstance(dataset, Dataset):
        raise ValueError(f"train_dataset is a {type(dataset).__name__}: text-anchored tuning takes a datasets.Dataset")
    return TEXT_ANCHORED


def sample_rows(dataset: Dataset, samples: Samples, batch_by: str | None) -> Dataset:
    """Return the rows that a collator reads: no other columns, so that no other images are opened."""
    wanted = [*samples.columns, "keywords", batch_by]
    kept = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    return kept if samples.prepare is None else samples.prepare(kept)


def keep_features(
    model: nn.Module, collator: SampleCollator, samples: Dataset, folder: str | Path, batch_size: int, progress: bool
) -> Dataset:
    """Compute what an objective reads of frozen encoders, once, and let the collator read it.

    This is the features of the images, and for SEARLE the words that SEARLE-OTI optimises for them, which takes
    `inversion_steps` passes of the text encoder and back for `INVERTED_AT_ONCE` images. Both stay in `folder`, in
    float16; an interrupted call resumes.

    Args:
        model: the model, on the device it trains on; its encoders are frozen.
        collator: of the model.
        samples: the training set.
        folder: where features of all models live.
        batch_size: images encoded at once.
        progress: show progress bars.

    Returns:
        The training set with digests in place of the images, in columns of their own, see [`digest_name`].

    Raises:
        ValueError: if the objective reads more of an image than its feature, or none, or images are changed when they
            are read.
    """
    inner: Any = unwrap(model)
    facts = SAMPLES[inner.config.method]
    columns = [name for name, kind in samples.features.items() if isinstance(kind, ImageColumn)]
    if not facts.takes_features:
        why = f"its objective reads {'all tokens of an image' if columns else 'no images'}"
    else:
        why = "its images are cropped at random (crop_scale)" if collator.crop_scale < 1 else ""
        why = why or ("its images are transformed when they are read" if samples.format["type"] == "custom" else "")
    if why:
        raise ValueError(
            f"features of images cannot be kept for {inner.config.method}: {why}; leave feature_cache out"
        )
    digests_of = {name: image_digests(samples, name) for name in columns}
    images = {name: opened(samples.select_columns(name)) for name in columns}
    places = [(name, row) for name in columns for row in range(len(samples))]
    digests = [digests_of[name][row] for name, row in places]
    processor = collator.processor

    def pixels(rows: list[int]) -> Tensor:
        asked = [images[name][row][name] for name, row in (places[i] for i in rows)]
        return processor.process_targets(asked)["pixel_values"].to(inner.device)

    def encode(rows: list[int]) -> tuple[list[Tensor], list[int]]:
        return [feature[None] for feature in inner.encode_images(pixels(rows))[1]], [0] * len(rows)

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            own = fingerprint(list(inner.image_side.values()), inner, f"feature {image_settings(processor)}")
            collator.features = FeatureCache(folder, own)
            collator.features.fill(digests, encode, batch_size, "images", progress)
        if facts.distils:
            collator.teacher_words = _teacher_words(inner, processor, digests, pixels, folder, progress)
    finally:
        model.train(was_training)
    for name in columns:
        samples = samples.add_column(digest_name(name), digests_of[name])  # before removal: it may be the only column
    return samples.remove_columns(columns)


def _teacher_words(
    model: InversionModel,
    processor: InversionProcessor,
    digests: list[str],
    pixels: Callable[[list[int]], Tensor],
    folder: str | Path,
    progress: bool,
) -> FeatureCache:
    """Optimise words of images by SEARLE-OTI on the model's own encoders, without its regularising phrases."""
    steps = model.config.inversion_steps or None  # 0 is that of a method that optimises nothing for a query
    config = {**model.config.to_dict(), "method": "searle_oti", "mapping_width": None, "inversion_steps": steps}
    with torch.device("meta"):
        teacher = InversionModel(InversionConfig(**config))
    teacher.backbone = model.backbone
    teacher.eval()
    prompts = [prompt.replace("$", processor.placeholder) for prompt in OTI_PROMPTS]
    prompt_ids = processor(text=prompts)["input_ids"].to(model.device)

    def invert(rows: list[int]) -> tuple[list[Tensor], list[int]]:
        words = teacher.invert(pixels(rows), prompt_ids)
        teacher.inverted_words.clear()
        return [word[None] for word in words], [0] * len(rows)

    settings = (
        f"word {teacher.config.inversion_steps} {prompts} {image_settings(processor)} {text_settings(processor)}"
    )
    sides = [*model.image_side.values(), *model.text_side.values()]
    words = FeatureCache(folder, fingerprint(sides, model, settings))
    words.fill(digests, invert, INVERTED_AT_ONCE, "words of images", progress)
    return words


__all__ = [
    "SAMPLES",
    "TEXT_ANCHORED",
    "SampleCollator",
    "Samples",
    "keep_features",
    "own_samples",
    "random_crop",
    "sample_rows",
]
