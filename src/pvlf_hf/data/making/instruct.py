"""Writes relative captions with a local language model: any chat checkpoint of Transformers.

This is level 2 of `make_triplets`. The model reads both captions and answers in JSON. Its answers are kept in a file,
so that an interrupted run resumes, and every one of them is checked: models decline, chatter, and invent.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...digests import id_number, sequence_digest
from .measures import content_words
from .pipeline import Judged
from .screening import Row
from .vocabulary import Vocabulary

Mode = Literal["write", "paraphrase"]

PROMPT_VERSION = "1"
"""Version of the prompts; answers to another version are not reused."""

MOST_WORDS = 20
"""Longest relative caption that is taken (our choice)."""

ROWS_AT_ONCE = 256
"""Rows whose prompts are sorted by length, so that batches have little padding (our choice)."""

RETRY_TEMPERATURE = 0.7
"""Temperature of the second attempt, after an answer that cannot be used (our choice)."""

SYSTEM = {
    "write": (
        "You help to search for photos. A person holds photo A and wants photo B. You know what each shows. Write "
        "what the person says to get from A to B: name only what differs, in at most 15 words, in the language of the "
        "descriptions. Do not repeat what both share, and do not speak of photos or descriptions. Answer with JSON "
        'alone: {"edit": "...", "possible": true}. If A and B have nothing in common, answer {"possible": false}.'
    ),
    "paraphrase": (
        "You reword short requests. Keep the meaning and every thing, colour and number that is named; change the "
        'sentence. At most 15 words, in the same language. Answer with JSON alone: {"edit": "..."}.'
    ),
}

EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "write": [
        (
            "A: a black dog on a lawn\nB: a black dog on a beach\nSay it as a wish.",
            '{"edit": "the dog should be at the seaside", "possible": true}',
        ),
        (
            "A: three cups on a table\nB: one cup on a table\nSay it in a few words.",
            '{"edit": "just a single cup", "possible": true}',
        ),
        ("A: a bride\nB: a steam engine\nSay it as an order.", '{"possible": false}'),
    ],
    "paraphrase": [
        ("replace the dog with a cat", '{"edit": "a cat rather than the dog"}'),
        ("make the dress longer", '{"edit": "the same dress reaching further down"}'),
    ],
}

STYLES = (
    "Say it as a wish.",
    "Say it as an order.",
    "Say it in a few words.",
    "Say what is different.",
    "Say what is no longer there, and what is there.",
)
"""Ways to say an edit; they describe kinds of edits without naming them, because names leak into answers."""


class InstructWriter:
    """Writes relative captions with a chat model, for `make_triplets(writer=...)`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        vocabulary: word list of the captions' language, which answers are checked by.
        mode: `"write"` makes a caption of the two descriptions; `"paraphrase"` rewords the one that is there, which is
            safer: the edit stays known, and a row whose rewording cannot be used keeps its caption.
        answers: JSON Lines in which answers are kept; None keeps none.
        name: name of the model; answers of another are not reused.
        seed: decides the style of each caption and the second attempts.
        batch_size: prompts answered at once.
        max_new_tokens: longest answer.
        progress: show a progress bar.

    Attributes:
        settings: what identifies the writer in the report.

    Raises:
        ValueError: if the tokenizer has no chat template, or the mode is unknown.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        vocabulary: Vocabulary,
        mode: Mode = "write",
        answers: Path | None = None,
        name: str = "",
        seed: int = 0,
        batch_size: int = 16,
        max_new_tokens: int = 64,
        progress: bool = True,
    ) -> None:
        if mode not in SYSTEM:
            raise ValueError(f"mode={mode!r}: choose from {list(SYSTEM)}")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name or 'the tokenizer'} has no chat template: pass an instruct or chat checkpoint")
        self.model, self.tokenizer, self.vocabulary, self.mode = model.eval(), tokenizer, vocabulary, mode
        self.file, self.seed, self.batch_size = answers, seed, batch_size
        self.max_new_tokens, self.progress = max_new_tokens, progress
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.settings = {"model": name, "mode": mode, "prompt": PROMPT_VERSION, "seed": seed, "tokens": max_new_tokens}
        self._known = dict(_read_answers(answers)) if answers is not None and answers.is_file() else {}

    def write(self, rows: Iterable[Row]) -> Judged:
        """Yield rows with the model's captions, and the reason where it wrote none that can be used."""
        rows = iter(tqdm(rows, "writing captions", unit="triplet", disable=not self.progress))
        while block := list(islice(rows, ROWS_AT_ONCE)):
            written = self._judge(block, [self.messages(row) for row in block], attempt=0)
            again = [at for at, (_, reason) in enumerate(written) if reason not in (None, DECLINED)]
            retried = self._judge([block[at] for at in again], [self.messages(block[at]) for at in again], attempt=1)
            for at, result in zip(again, retried, strict=True):
                written[at] = result
            for row, (caption, reason) in zip(block, written, strict=True):
                if reason is not None and self.mode == "paraphrase":
                    yield row, None  # as it was
                else:
                    yield {**row, "caption": caption or row["caption"], "writer": self.settings["model"]}, reason

    def _judge(self, rows: Sequence[Row], messages: list[Any], attempt: int) -> list[tuple[str | None, str | None]]:
        """Return for each row the caption, or why there is none."""
        answers = self.answers(messages, attempt)
        return [caption_of(answer, row, self.vocabulary) for answer, row in zip(answers, rows, strict=True)]

    def messages(self, row: Row) -> list[dict[str, str]]:
        """Return the conversation that asks for a row's caption."""
        if self.mode == "paraphrase":
            question = row["caption"]
        else:
            style = STYLES[id_number(f"{self.seed}/{row['reference']}/{row['target']}/style") % len(STYLES)]
            question = f"A: {row['reference_caption']}\nB: {row['target_caption']}\n{style}"
        turns = [("system", SYSTEM[self.mode])]
        for user, assistant in EXAMPLES[self.mode]:
            turns += [("user", user), ("assistant", assistant)]
        return [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]

    def answers(self, messages: Sequence[list[dict[str, str]]], attempt: int = 0) -> list[str]:
        """Return the model's answers to conversations; those that are kept are not asked for again.

        Args:
            messages: the conversations.
            attempt: 0 decodes greedily; 1 samples, by the seed.
        """
        keys = [self._key(one, attempt) for one in messages]
        new = {key: one for key, one in zip(keys, messages, strict=True) if key not in self._known}
        prompts = {
            key: self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
            for key, one in new.items()
        }
        order = sorted(prompts, key=lambda key: (len(prompts[key]), key))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found = dict(zip(batch, self._generate([prompts[key] for key in batch], attempt), strict=True))
            self._known |= found
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.writelines(
                        json.dumps({"key": k, "answer": a}, ensure_ascii=False) + "\n" for k, a in found.items()
                    )
        return [self._known[key] for key in keys]

    def _key(self, messages: list[dict[str, str]], attempt: int) -> str:
        return sequence_digest(json.dumps(self.settings), str(attempt), json.dumps(messages))

    @torch.inference_mode()
    def _generate(self, prompts: list[str], attempt: int) -> list[str]:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if attempt:
            sampling = {"do_sample": True, "temperature": RETRY_TEMPERATURE}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(id_number(f"{self.seed} {prompts[0]}") % 2**63)
            output = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
            )
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load_writer(name: str, vocabulary: Vocabulary, **options: Any) -> InstructWriter:
    """Load a chat model as a writer, on the accelerator if there is one.

    Args:
        name: folder or Hub name.
        vocabulary: see [`InstructWriter`].
        **options: see [`InstructWriter`].

    Raises:
        ValueError: if there is no such model, or it is no chat model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise ValueError(f"no chat model {name!r}: {' '.join(str(error).split())}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return InstructWriter(model.to(device), tokenizer, vocabulary, name=name, **options)


def _read_answers(file: Path) -> Iterator[tuple[str, str]]:
    """Yield keys and answers; a last line that was cut off is asked for again."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            yield record["key"], record["answer"]
        except (ValueError, KeyError, TypeError):
            continue


# ---- answers ----

DECLINED = "the language model declined"

_OF_PHOTOS = re.compile(
    r"\b(?:[Pp]hoto|[Ii]mage|[Pp]icture|[Cc]aption|[Dd]escription) [AB]\b|\b(?:to|than|in|of|from) A\b|\bB\b"
)


def caption_of(answer: str, row: Row, vocabulary: Vocabulary) -> tuple[str | None, str | None]:
    """Return the relative caption that an answer holds, or why it cannot be used.

    Args:
        answer: what the model wrote: JSON, maybe in a fence or amid other text.
        row: the triplet, with both captions.
        vocabulary: word list of the captions' language.
    """
    content = first_object(answer)
    if content is None:
        return None, "the language model's answer holds no JSON"
    if content.get("possible") is False:
        return None, DECLINED
    caption = content.get("edit")
    if not isinstance(caption, str) or not caption.strip():
        return None, "the language model's answer has no edit"
    caption = " ".join(caption.split())
    reason = _problem(caption, row, vocabulary)
    return (None, reason) if reason else (caption, None)


def first_object(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, or None."""
    decoder = json.JSONDecoder()
    for found in re.finditer(r"\{", text):
        try:
            content, _ = decoder.raw_decode(text, found.start())
        except ValueError:
            continue
        if isinstance(content, dict):
            return content
    return None


def _problem(caption: str, row: Row, vocabulary: Vocabulary) -> str | None:
    words = [word.strip(".,:;!?-\"'").lower() for word in caption.split()]
    if len(words) > MOST_WORDS:
        return f"the language model wrote more than {MOST_WORDS} words"
    if problem := vocabulary.problem(caption):
        return f"the language model wrote a {problem}"
    if not vocabulary.leaks.isdisjoint(words):
        return "the language model named the kind of edit"
    if not vocabulary.meta.isdisjoint(words) or _OF_PHOTOS.search(caption):
        return "the language model spoke of images or captions"
    if caption.lower().rstrip(".") in (row["reference_caption"].lower(), row["target_caption"].lower()):
        return "the language model repeated a caption"
    reference, target = (content_words(row[f"{side}_caption"], vocabulary) for side in ("reference", "target"))
    if not content_words(caption, vocabulary) & (reference ^ target):
        return "the language model named nothing that differs"
    return None


__all__ = ["InstructWriter", "caption_of", "first_object", "load_writer"]
