"""The documentation: links resolve, commands exist and accept their flags, examples run."""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from fnmatch import fnmatch
from functools import cache
from itertools import dropwhile, groupby
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import typer.main
from miniatures import make_all
from squares import COLOURS, draw
from typer.testing import CliRunner

import pvlf_hf_cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("model_cards", "notebooks", "tests", "train_scripts")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPTS = sorted(path for name in ("src", "train_scripts", "tests") for path in (ROOT / name).rglob("*.py"))
PAGES = [*DOCUMENTS, *NOTEBOOKS]

OTHERS = {"pip", "hf", "git", "export", "cd"}
"""Programs in examples that are not part of this project."""

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
PROGRAM = re.compile(r"^ +((?:python|pvlf-hf|accelerate launch|torchrun|make) (?:.*\\\n)*.*)$", re.MULTILINE)
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def text_of(page):
    """Return the Markdown of a document, or of a notebook's cells."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    cells = nbformat.read(page, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def prose(page):
    """Return the Markdown outside code fences."""
    return FENCE.sub("", text_of(page))


@cache
def anchors(page):
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_resolve(page):
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        url = urlsplit(target)
        if url.scheme:
            assert url.scheme == "https" and "." in url.netloc, target  # tests have no network
            continue
        file = page.parent / unquote(url.path) if url.path else page
        assert file.exists() and file.resolve().is_relative_to(ROOT), f"{target}: no such file"
        assert not url.fragment or url.fragment in anchors(file), f"{target}: no such heading"


@each_page
def test_named_files_exist(page):
    folders = "|".join(("src", *FOLDERS))
    for name in re.findall(rf"`((?:{folders})/[\w./*-]+)`", prose(page)):
        assert list(ROOT.glob(name.rstrip("/"))), f"{name}: no such file"


MAX_WORDS = 1300


def test_readme_is_short():
    """Count as `wc -w` does: prose, tables and code."""
    words = len(text_of(ROOT / "README.md").split())
    assert words <= MAX_WORDS, f"README.md has {words} words: move what is not needed there to a folder's README"


def test_tree_of_the_readme_equals_the_repository():
    """Compare the tree's lines with folders and root modules; files of other folders are in those folders' READMEs."""
    (tree,) = (block for language, block in FENCE.findall(text_of(ROOT / "README.md")) if language == "text")
    sections = dict(re.findall(r"^(\S+/)(.*(?:\n .*)*)", tree, re.MULTILINE))
    for folder, listing in sections.items():
        named = set(re.findall(r"[\w*]+\.(?:py|json|md|\*)", listing))
        named |= {name for line in listing.splitlines() for name in re.findall(r"\w+/", line.strip().split("  ")[0])}
        assert all(list((ROOT / folder).glob(name.rstrip("/"))) for name in named), (folder, sorted(named))
    modules = {path.name for path in (ROOT / "src" / "pvlf_hf").glob("*.py")} - {"__init__.py"}
    listed = {*re.findall(r"\w+\.py", sections["src/pvlf_hf/"])}
    assert modules <= listed, f"src/pvlf_hf/ lacks {sorted(modules - listed)}"
    assert all(f"src/{path.name}" in tree for path in (ROOT / "src").glob("*.py"))
    folders = {path.parent.name for path in (ROOT / "src" / "pvlf_hf").glob("*/__init__.py")}
    assert all(f"  {name}/ " in tree for name in folders), "each folder of the package has its line"
    assert {"src/pvlf_hf/", *(f"{folder}/" for folder in FOLDERS)} <= sections.keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_readme_of_a_folder_names_its_files(folder):
    text = text_of(ROOT / folder / "README.md")
    files = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".ipynb", ".md")}
    folders = {
        path.name for path in (ROOT / folder).iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    }
    left_out = {
        "README.md",
        "conftest.py",
        *(name for name in files if name.startswith("test_") and folder == "tests"),
    }
    patterns = [pattern.rstrip("/") for pattern in re.findall(r"[\w*.]+\.\w+|[\w.-]+/|[\w-]+", text)]
    missing = {name for name in (files | folders) - left_out if not any(fnmatch(name, p) for p in patterns)}
    assert not missing, f"{folder}/README.md does not name {sorted(missing)}"


def commands(text):
    """Yield the commands of shell lines, each split into its arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for is_operator, group in groupby(words, lambda word: word in ("&&", "||", "|", ";")):
            command = [*dropwhile(re.compile(r"[A-Z_]+=").match, group)]
            if command and not is_operator:
                yield command


def in_documents():
    for page in PAGES:
        text = text_of(page)
        blocks = [block for language, block in FENCE.findall(text) if language in ("bash", "sh", "shell")]
        inline = re.findall(r"`((?:python|pvlf-hf|make|accelerate launch|torchrun) [^`\n]+)`", prose(page))
        yield page, [*blocks, *inline]


def in_docstrings():
    for script in SCRIPTS:
        documented = DOCSTRING.findall(script.read_text(encoding="utf-8"))
        yield script, [line for text in documented for line in PROGRAM.findall(text)]


@pytest.mark.slow
@pytest.mark.parametrize("source", [in_documents, in_docstrings])
def test_commands_exist_and_take_their_flags(source):
    checked = 0
    for page, blocks in source():
        for words in (words for block in blocks for words in commands(block)):
            try:
                check(words, page.parent)
            except AssertionError as error:
                raise AssertionError(f"{page.relative_to(ROOT)}: {shlex.join(words)}: {error}") from error
            checked += 1
    assert checked > 10


def check(words, folder):
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= {*targets}, "no such target"
    elif program in ("accelerate", "torchrun"):  # options of the launcher, then the program
        start = next(index for index, word in enumerate(rest) if word.endswith(".py") or word == "-m")
        for word in rest[:start]:
            assert not word.endswith(".yaml") or (ROOT / word).exists(), f"{word}: no such file"
        check(["python", *rest[start:]], folder)
    elif program == "python" and rest[0] == "-m":
        if rest[1] not in ("pytest", "pip", "venv"):
            file = Path(importlib.util.find_spec(rest[1]).origin)
            assert '__name__ == "__main__"' in file.read_text(), f"{rest[1]} is not a program"
            check_flags(rest[2:], flags_of(file, rest[1]))
    elif program == "python":
        copied = ROOT / "src" / "pvlf_hf" / Path(rest[0]).name  # the export writes a program beside its files
        file = next((file for file in (ROOT / rest[0], folder / rest[0], copied) if file.exists()), None)
        assert file, f"{rest[0]}: no such file"
        check_flags(rest[1:], flags_of(file))
    elif program == "pvlf-hf":
        check_flags(rest, flags_of_the_command_line(*rest[:2]))
    else:
        assert program in OTHERS, "unknown program"
    for extras in re.findall(r"(?:pvlf-hf|\.)\[([\w,-]+)\]", " ".join(rest) if program == "pip" else ""):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {*extras.split(",")} <= known.keys(), "no such extra"


def check_flags(words, known):
    own = words[: words.index("--")] if "--" in words else words
    flags = {word.partition("=")[0] for word in own if re.match(r"--\w", word)}
    unknown = flags - known - {"--help"}
    assert not unknown, f"no such flag: {sorted(unknown)}"


@cache
def flags_of(file, module=None):
    """Return the flags in a program's calls of argparse, or in its `--help` if another module makes the calls."""
    source = file.read_text(encoding="utf-8")
    written = re.findall(r"""add_argument\(\s*"(--[\w-]+)""", source)
    if written and "import argparse" in source:
        return {*written}
    argv, path, printed = sys.argv, sys.path[:], io.StringIO()
    sys.argv, sys.path[:0] = [str(file), "--help"], [str(file.parent)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            if module:
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    return {*re.findall(r"--[\w-]+", printed.getvalue())}


def flags_of_the_command_line(*words):
    """Return the flags of a command of `pvlf-hf`, in both spellings, with `-` and `_`."""
    if words[0] in ("train", "evaluate"):
        module = f"pvlf_hf.commands.{words[0]}"
        return flags_of(Path(importlib.util.find_spec(module).origin), module)
    command = typer.main.get_command(pvlf_hf_cli.app)
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if not hasattr(command, "commands"):
            break
        assert word in command.commands or word.startswith("-"), f"no such command: {word}"
        command = command.commands.get(word, command)
        options |= {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    return options | {"--" + option[2:].replace("-", "_") for option in options}


# Examples.

EXAMPLES = [path for path in sorted((ROOT / "src").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_run(path, monkeypatch, tmp_path):
    """Run them in a temporary copy of the root, where they may write to `outputs/`."""
    for name in ("model_cards", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    source = path.read_text(encoding="utf-8")
    dotted = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    module = importlib.import_module("evaluate" if "evaluate_modules" in path.parts else dotted)
    names = {**vars(module), module.__name__: module}
    report, runner, parser = io.StringIO(), doctest.DocTestRunner(), doctest.DocTestParser()
    for documented in DOCSTRING.findall(source):
        runner.run(parser.get_doctest(dedent(documented), names, path.stem, str(path), 0), out=report.write)
    assert runner.tries and not runner.failures, report.getvalue()


@each_page
def test_imports_in_examples_resolve(page):
    if page.suffix == ".md":
        blocks = [dedent(block) for language, block in FENCE.findall(text_of(page)) if language == "python"]
    else:
        blocks = [cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "code"]
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pvlf_hf":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


SHORTER = {
    "openai/clip-vit-base-patch32": "model_cards/blip-emoji-tiny",
    "--finetuning text": "--finetuning text --max_steps 1 --per_device_train_batch_size 4",
    "--protocols emoji-cir": "--protocols cirr-val --data_root data --no_check_counts",
}
"""Text of the README's shell commands, and its replacement where there is no network and little time."""


@pytest.fixture
def clone(monkeypatch, tmp_path):
    """Enter an empty folder that has the committed checkpoints of a clone."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_blocks(language):
    return [block for name, block in FENCE.findall(text_of(ROOT / "README.md")) if name == language]


def test_python_of_the_readme_runs(clone, capsys):
    """Run the blocks unchanged and in order, with nothing defined before."""
    blocks, names = readme_blocks("python"), {}
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    ids = ast.literal_eval(capsys.readouterr().out)
    assert len(ids) == 5 and all("man_firefighter" in one for one in ids) and (clone / "session.png").exists()


@pytest.mark.slow
def test_commands_of_the_readme_run(clone, monkeypatch):
    """Run the commands in order, on files that the text tells the user to provide; the web demo is not started."""
    photos = clone / "photos"
    photos.mkdir()
    for row, colour in enumerate(COLOURS):
        draw(row).save(photos / f"{colour}.png")
    draw(3).save(photos / "dress.jpg")
    rows = [f"{a}.png,make it {b},{b}.png" for a in COLOURS[:3] for b in COLOURS[:3] if a != b]
    for table in ("triplets.csv", "held_out.csv"):
        (clone / table).write_text("\n".join(["reference,caption,target", *rows]))
    (clone / "captions.csv").write_text("\n".join(["image,caption", *(f"{c}.png,a {c} square" for c in COLOURS)]))
    (clone / "prices.csv").write_text("file_name,price\n" + "".join(f"{one.name},40\n" for one in photos.iterdir()))
    make_all(clone / "data")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = []
    for block in readme_blocks("bash"):
        for text, shorter in SHORTER.items():
            block = block.replace(text, shorter)
        for program, *rest in commands(block):
            if program == "export":
                monkeypatch.setenv(*rest[0].split("="))
            if program == "pvlf-hf" and rest[0] not in ("demo", "serve"):
                done = CliRunner().invoke(pvlf_hf_cli.app, rest, catch_exceptions=False)
                run.append(rest[0])
                damaged = rest[0] == "doctor"  # a data set this small lacks most of the published queries
                assert done.exit_code == int(damaged), done.stderr
    assert run == ["index", "search", "search", "triplets", "train", "search", "evaluate", "doctor"]
    assert "<html" in (clone / "result.html").read_text() and (clone / "outputs" / "mine" / "results.json").exists()
    assert (clone / "outputs" / "emoji-evaluation" / "results.md").exists()
