"""EmojiCIR: composed retrieval on emoji of several vendors, built from installed packages: names, captions, images."""

from .dataset import load_emoji_cir, load_emoji_cir_train, load_emoji_pictures, load_emoji_samples

__all__ = ["load_emoji_cir", "load_emoji_cir_train", "load_emoji_pictures", "load_emoji_samples"]
