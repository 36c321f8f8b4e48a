"""Level 2 of making triplets: a chat model of Transformers, tiny and random, and recorded answers of a real one."""

import json
from importlib.util import find_spec

import pytest
import torch
from test_triplet_making import catalogue, rows_of  # noqa: F401  # the fixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import pvlf_hf_cli
from pvlf_hf.data.making.instruct import DECLINED, InstructWriter, caption_of, first_object, load_writer
from pvlf_hf.data.making.vocabulary import load_vocabulary

pytestmark = pytest.mark.skipif(find_spec("inflect") is None, reason="needs inflect")

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

ROWS = [
    {
        "reference": "a",
        "target": "b",
        "caption": "make it blue",
        "reference_caption": "a red car",
        "target_caption": "a blue car",
    },
    {
        "reference": "b",
        "target": "c",
        "caption": "add a dog",
        "reference_caption": "a lawn",
        "target_caption": "a lawn with a dog",
    },
]


@pytest.fixture(scope="module")
def english():
    return load_vocabulary("en")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """Return the folder of a random Llama of two layers whose tokenizer knows bytes."""
    folder = tmp_path_factory.mktemp("chat")
    vocabulary = {
        letter: number
        for number, letter in enumerate(["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=4096, eos_token_id=1, pad_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def writer_of(chat_model, english, answers=None, **options):
    return load_writer(str(chat_model), english, answers=answers, max_new_tokens=6, progress=False, **options)


def record(writer, file, row, answer, attempt=0):
    """Keep an answer as if the model had given it."""
    key = writer._key(writer.messages(row), attempt)
    with file.open("a") as stream:
        stream.write(json.dumps({"key": key, "answer": answer}) + "\n")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"edit": "a blue one", "possible": true}', "a blue one"),
        ('```json\n{"edit": "the car in blue"}\n```', "the car in blue"),
        ('Sure! {not json} Here: {"edit": "now  blue"} Enjoy {"edit": "x"}', "now blue"),
        ('{"possible": false}', DECLINED),
        ("I cannot do that", "holds no JSON"),
        ('{"edit": ""}', "has no edit"),
        ('{"edit": ["blue"]}', "has no edit"),
        ('{"edit": "%s"}' % ("blue " * 30), "more than 20 words"),
        ('{"edit": "Attribute: blue"}', "named the kind"),
        ('{"edit": "make the image blue"}', "spoke of images"),
        ('{"edit": "the car of B is blue"}', "spoke of images"),
        ('{"edit": "A blue car."}', "repeated a caption"),
        ('{"edit": "turn it into a submarine"}', "nothing that differs"),
        ('{"edit": "сделай синим blue машину"}', "another script"),
    ],
)
def test_answers_are_read_tolerantly_and_checked(answer, expected, english):
    caption, reason = caption_of(answer, ROWS[0], english)
    assert caption == expected or expected in (reason or "")
    assert (caption is None) != (reason is None)


def test_first_object():
    assert first_object('x {"a": {"b": 1}} {"c": 2}') == {"a": {"b": 1}}
    assert first_object("[1, 2] {") is None


def test_a_model_that_answers_nonsense_gives_reasons_and_keeps_answers(chat_model, english, tmp_path):
    file = tmp_path / "answers.jsonl"
    judged = list(writer_of(chat_model, english, file).write(ROWS))
    assert [reason for _, reason in judged] == ["the language model's answer holds no JSON"] * 2
    lines = file.read_text().splitlines()
    assert len(lines) == 4, "each row has a second attempt"
    again = writer_of(chat_model, english, file)
    again.model = None  # all answers are kept
    assert list(again.write(ROWS)) == judged
    file.write_text("\n".join(lines)[:-5])  # the last line is cut off: only that answer is missing
    repaired = writer_of(chat_model, english, file)
    assert list(repaired.write(ROWS)) == judged
    assert len(file.read_text().splitlines()) >= 4


def test_answers_do_not_depend_on_the_batch(chat_model, english):
    """Left padding and the mask are right: greedy answers are those of single prompts."""
    together = writer_of(chat_model, english, batch_size=2)
    alone = writer_of(chat_model, english, batch_size=1)
    messages = [together.messages(row) for row in ROWS]
    assert together.answers(messages) == alone.answers(messages)
    assert len({len(str(one)) for one in messages}) == 2, "the prompts differ in length"


def test_recorded_answers_become_captions(chat_model, english, tmp_path):
    file = tmp_path / "answers.jsonl"
    plain = writer_of(chat_model, english)
    record(plain, file, ROWS[0], 'Here you go: {"edit": "the same in blue", "possible": true}')
    record(plain, file, ROWS[1], '{"edit": "there is an elephant"}')
    record(plain, file, ROWS[1], '{"edit": "let a dog play there"}', attempt=1)
    (first, _), (second, reason) = writer_of(chat_model, english, file).write(ROWS)
    assert first["caption"] == "the same in blue" and first["writer"] == str(chat_model)
    assert second["caption"] == "let a dog play there" and reason is None


def test_a_paraphrase_that_cannot_be_used_leaves_the_caption(chat_model, english, tmp_path):
    file = tmp_path / "answers.jsonl"
    plain = writer_of(chat_model, english, mode="paraphrase")
    record(plain, file, ROWS[0], '{"edit": "please turn it blue"}')
    (first, _), (second, reason) = writer_of(chat_model, english, file, mode="paraphrase").write(ROWS)
    assert first["caption"] == "please turn it blue"
    assert second == ROWS[1] and reason is None


def test_models_that_cannot_chat_are_refused(chat_model, english, tmp_path):
    with pytest.raises(ValueError, match="no chat model"):
        load_writer(str(tmp_path), english)
    writer = writer_of(chat_model, english)
    writer.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        InstructWriter(writer.model, writer.tokenizer, english)
    with pytest.raises(ValueError, match="mode='x'"):
        writer_of(chat_model, english, mode="x")


def test_the_command_writes_captions(catalogue, chat_model, tmp_path):  # noqa: F811
    output = tmp_path / "out.jsonl"
    words = [
        "triplets",
        str(catalogue / "captions.jsonl"),
        "--images",
        str(catalogue),
        "--output",
        str(output),
        "--count",
        "4",
    ]
    done = CliRunner().invoke(pvlf_hf_cli.app, [*words, "--writer", str(chat_model), "--paraphrase"])
    assert done.exit_code == 0, done.output
    assert 1 <= len(rows_of(output)) <= 4 and (tmp_path / "out.jsonl.answers").is_file()
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["settings"]["writer"]["mode"] == "paraphrase"
    done = CliRunner().invoke(pvlf_hf_cli.app, [*words, "--paraphrase"])
    assert done.exit_code == 1 and "--writer" in done.output
