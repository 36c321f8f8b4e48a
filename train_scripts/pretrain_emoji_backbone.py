"""Pretrains the tiny BLIP-shaped dual encoder that `make demo` builds PVLF on (`model_cards/blip-emoji-tiny`).

Image-text contrastive training on the emoji of the six training vendors, with their CLDR names as captions. Google's
images, EmojiCIR's gallery, are never trained on. Several vendors draw every name, so the loss takes every image of a
name as its positive. Batches hold groups of look-alikes ("woman running" in all skin tones, or anyone of one skin
tone): these are the hard negatives, and would seldom share a random batch.

    python train_scripts/pretrain_emoji_backbone.py --output_dir outputs/blip-emoji-tiny

After an interruption the same command resumes. The committed backbone is the result of four runs; its card has their
settings and times.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from pvlf_hf import (
    PVLFImageProcessor,
    PVLFModel,
    PVLFProcessor,
    load_emoji_cir_train,
    load_emoji_pictures,
)
from pvlf_hf.data.emoji_cir.dataset import TEST_VENDOR
from pvlf_hf.embeddings.encoding import encode_gallery
from pvlf_hf.evaluation.metrics import recall_at_k
from pvlf_hf.evaluation.ranking import target_ranks
from pvlf_hf.evaluation.results import environment
from pvlf_hf.models.image_processing_pvlf import opened

IMAGE_SIZE = 72  # pixels, the side of nearly all drawings
SKIN_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
VARIANT = re.compile(SKIN_TONE.pattern + r"|\b(man|woman|person|men|women|people)\b")


@dataclass
class PretrainingArguments(TrainingArguments):
    """Training arguments with this script's defaults, all our choice: there is no published recipe."""

    output_dir: str = field(default="outputs/blip-emoji-tiny", metadata={"help": "Folder for checkpoints and model."})
    num_train_epochs: float = field(default=30, metadata={"help": "Epochs of 18,706 draws."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images, and so captions, a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Fraction of the steps that warm up."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    bf16: bool = field(default=True, metadata={"help": "bfloat16 autocast, about twice as fast on recent CPUs."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between log lines."})
    save_steps: float = field(default=400, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator makes the model's inputs."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Only full batches."})
    look_alikes: int = field(default=8, metadata={"help": "Images of one group of look-alikes sampled together."})
    warp: float = field(default=0.05, metadata={"help": "How far images are bent, a fraction of half their side."})
    colour_mix: float = field(default=0.08, metadata={"help": "How far colours are mixed into each other."})
    init_from: str | None = field(default=None, metadata={"help": "Model of this script to start from."})

    def __post_init__(self) -> None:
        self.use_cpu = not torch.cuda.is_available()  # the Trainer requires this setting when bf16 is on
        super().__post_init__()


def train_tokenizer(texts: list[str]) -> BertTokenizer:
    """Train a WordPiece tokenizer on all texts that the text encoder will see."""
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(texts, vocab_size=3000, min_frequency=2, show_progress=False)
    return BertTokenizer(vocab=trainer.get_vocab(), do_lower_case=True)


def tiny_blip_config(tokenizer: BertTokenizer) -> BlipConfig:
    """Return a configuration of 2.9 M parameters: a ViT of six layers on 6 x 6 patches, a BERT of three, width 128."""
    ids = {"bos_token_id": None, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}
    return BlipConfig(
        image_text_hidden_size=128,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": 40,
            "pad_token_id": tokenizer.pad_token_id,
            "is_decoder": False,
            **ids,
        },
        vision_config={
            "hidden_size": 160,
            "num_hidden_layers": 6,
            "num_attention_heads": 5,
            "intermediate_size": 640,
            "image_size": IMAGE_SIZE,
            "patch_size": 12,
            "initializer_range": 0.02,
        },
    )


class NamedImages(Dataset):
    """All images decoded once into one uint8 tensor, their names, and the two groups of look-alikes of each."""

    def __init__(self, processor: PVLFProcessor) -> None:
        images = load_emoji_pictures()
        batches = []
        for rows in opened(images).iter(batch_size=512):
            pixels = processor.image_processor(
                rows["image"], do_rescale=False, do_normalize=False, return_tensors="pt"
            )
            batches.append(pixels["pixel_values"].to(torch.uint8))
        self.pixels = torch.cat(batches)  # (images, 3, 72, 72)
        self.names = list(images["name"])
        numbers = {name: i for i, name in enumerate(sorted(set(self.names)))}
        self.name_ids = torch.tensor([numbers[name] for name in self.names])
        vendors = list(images["vendor"])
        # Look-alikes: one object in all skin tones and genders; anyone of one skin tone by one vendor.
        self.group_names = [
            (VARIANT.sub("", name), (vendor, *SKIN_TONE.findall(name)))
            for name, vendor in zip(self.names, vendors, strict=True)
        ]
        self.groups: dict[object, list[int]] = defaultdict(list)
        for row, names in enumerate(self.group_names):
            for name in names:
                self.groups[name].append(row)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> int:
        return row


class LookAlikeSampler(Sampler[int]):
    """Sampler of random images, each followed by `look_alikes - 1` others of one of its two groups."""

    def __init__(self, images: NamedImages, look_alikes: int, seed: int) -> None:
        self.images, self.look_alikes, self.seed, self.epoch = images, look_alikes, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as the Trainer does, so that epochs differ and a resumed epoch is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        left = len(self)
        for first in torch.randperm(len(self), generator=random).tolist():
            choice = int(torch.randint(2, (), generator=random))
            group = self.images.groups[self.images.group_names[first][choice]]
            others = torch.randperm(len(group), generator=random)[: self.look_alikes].tolist()
            rows = [first, *(group[i] for i in others if group[i] != first)][: min(self.look_alikes, left)]
            yield from rows
            left -= len(rows)
            if not left:
                return


class ContrastivePretrainer(Trainer):
    """HF Trainer with the multi-positive contrastive loss, batches of look-alikes, and augmentation."""

    def __init__(self, *args: object, images: NamedImages, processor: PVLFProcessor, **kwargs: object) -> None:
        super().__init__(*args, train_dataset=images, data_collator=self.collate, **kwargs)
        self.images, self.processor = images, processor

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LookAlikeSampler:
        return LookAlikeSampler(self.images, self.args.look_alikes, self.args.seed)

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        """Make a batch of `NameMatcher` inputs, with augmented images."""
        text = self.processor.tokenizer([self.images.names[row] for row in rows], padding=True, return_tensors="pt")
        images = augment(self.images.pixels[rows].float() / 255, self.args.warp, self.args.colour_mix)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in self.normalisation)
        return {
            "pixel_values": (images - mean) / std,
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "name_ids": self.images.name_ids[rows],
        }

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation that the image processor normalises with."""
        return self.processor.image_processor.image_mean, self.processor.image_processor.image_std

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: object) -> Tensor:
        """Return the loss, which is the model's output."""
        return model(**inputs)


def augment(images: Tensor, warp: float, colour_mix: float) -> Tensor:
    """Shift, rotate, zoom, bend, recolour and blur images on white, to imitate other drawing styles.

    Images are not mirrored: captions distinguish left and right.

    Args:
        images: float `(batch, 3, height, width)` in [0, 1].
        warp: standard deviation of the bends, a fraction of half the side.
        colour_mix: standard deviation of the entries of a random matrix added to the identity and applied to RGB.
    """
    batch, _, height, width = images.shape
    angle = (torch.rand(batch) - 0.5) * 0.35  # radians, +-10 degrees
    zoom = 0.85 + torch.rand(batch, 2) * 0.45
    shift = (torch.rand(batch, 2) - 0.5) * 0.2
    row1 = torch.stack([zoom[:, 0] * angle.cos(), -zoom[:, 0] * angle.sin(), shift[:, 0]], dim=1)
    row2 = torch.stack([zoom[:, 1] * angle.sin(), zoom[:, 1] * angle.cos(), shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([row1, row2], dim=1), list(images.shape), align_corners=False)
    bends = F.interpolate(torch.randn(batch, 2, 5, 5) * warp, size=(height, width), mode="bicubic")
    inverted = F.grid_sample(1 - images, grid + bends.permute(0, 2, 3, 1), align_corners=False)
    mixing = torch.eye(3) + colour_mix * torch.randn(batch, 3, 3)  # keeps white
    images = 1 - torch.einsum("bij,bjhw->bihw", mixing, inverted)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    images = middle + (images - middle) * (0.75 + 0.5 * torch.rand(batch, 1, 1, 1))
    images = (images * (0.85 + 0.3 * torch.rand(batch, 1, 1, 1))).clamp(0, 1)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(images, blurred, torch.rand(batch, 1, 1, 1))


class NameMatcher(nn.Module):
    """BLIP's two towers and a contrastive loss with a learned temperature (as CLIP's, from 0.07)."""

    def __init__(self, blip: BlipForImageTextRetrieval) -> None:
        super().__init__()
        self.blip = blip
        self.log_scale = nn.Parameter(torch.tensor(0.07).log().neg())

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, name_ids: Tensor) -> Tensor:
        """Return the mean of the image-to-text and text-to-image cross-entropies; `name_ids` is int64 `(batch,)`."""
        image = self.blip.vision_model(pixel_values=pixel_values).last_hidden_state[:, 0]
        text = self.blip.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        image = F.normalize(self.blip.vision_proj(image).float(), dim=-1)
        text = F.normalize(self.blip.text_proj(text).float(), dim=-1)
        same = (name_ids[:, None] == name_ids[None]).float()
        wanted = same / same.sum(dim=1, keepdim=True)
        with torch.autocast(image.device.type, enabled=False):
            logits = self.log_scale.clamp(max=4.6).exp() * image @ text.T
            return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def main() -> None:
    """Train, then save and evaluate model and processor."""
    (args,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    if args.init_from:
        processor = PVLFProcessor.from_pretrained(args.init_from)
        model = NameMatcher(BlipForImageTextRetrieval.from_pretrained(args.init_from))
    else:
        tokenizer = train_tokenizer([*load_emoji_pictures()["name"], *load_emoji_cir_train()["caption"]])
        image_processor = PVLFImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        )
        processor = PVLFProcessor(image_processor, tokenizer)
        model = NameMatcher(BlipForImageTextRetrieval(tiny_blip_config(tokenizer)))
    trainer = ContrastivePretrainer(model=model, args=args, images=NamedImages(processor), processor=processor)
    resumable = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=resumable or None)
    save(model.blip, processor, Path(args.output_dir))
    measure(Path(args.output_dir))


def save(blip: BlipForImageTextRetrieval, processor: PVLFProcessor, folder: Path) -> None:
    """Save the weights in float16, under a config that loads them as float32."""
    blip.half().save_pretrained(folder)
    blip.config.dtype = torch.float32
    blip.config.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.inference_mode()
def measure(folder: Path) -> None:
    """Write recall of Google's 3,633 images by their names to `results.json`; none of them was trained on."""
    model, processor = PVLFModel.from_vl_pretrained(str(folder)), PVLFProcessor.from_vl_pretrained(str(folder))
    images = load_emoji_pictures([TEST_VENDOR])
    gallery = encode_gallery(model, processor, images)
    texts = processor.tokenizer(list(images["name"]), padding=True, return_tensors="pt")
    names = model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
    ranks = target_ranks(names, gallery, torch.arange(len(names)))
    results = {
        "task": "name to image, Google's drawings",
        "counts": {"queries": len(names), "gallery": len(gallery)},
        "metrics": {f"recall@{k}": recall for k, recall in recall_at_k(ranks, (1, 5, 10, 50)).items()},
        "environment": environment(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(results["metrics"])


if __name__ == "__main__":
    main()
