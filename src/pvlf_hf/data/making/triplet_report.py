"""Reports on a set of triplets: what it is, what is wrong with it, and what to change; Markdown, JSON and HTML."""

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from heapq import heappush, heappushpop
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from ...atomic_files import whole
from ...digests import id_number
from ...models.image_processing_pvlf import open_rgb
from ..image_files import escapes_folder
from .measures import measure, read_rows
from .screening import Row
from .vocabulary import Vocabulary

SHEET_ROWS, THUMBNAIL = 100, 112
"""Random rows of a sheet, and pixels of an image's longer side there (our choice): about a megabyte."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 2rem auto; max-width: 60rem;
       padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #e4e7eb } img { max-width: 7rem; max-height: 7rem }
.advice { background: #fff8c5; padding: .5rem 1rem } small { color: #57606a; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class TripletReport:
    """Report on a set of triplets; `str(report)` is Markdown, [`~TripletReport.write`] writes all three forms.

    Args:
        subject: the file.
        measures: see [`measure`].
        modality: R@10 by kind of the image alone, the text alone and their sum; empty where no model was used.
        rejected: rows that were left out, by reason.
        settings: settings of the run that made the set.
        advice: what to change.
        sheet: random rows.
    """

    subject: str
    measures: dict[str, Any]
    modality: dict[str, dict[str, float]] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    sheet: tuple[Row, ...] = ()

    def tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Return the tables of the report: heading, and rows of cells, the first of which are headings."""
        found = self.measures
        tables = [("Kinds", [("kind", "rows", "share"), *_shares(found["kinds"], found["rows"])])]
        if not found["rows"]:
            return [*self._rejected()]
        uses = [
            (name, str(found[name]["distinct"]), "; ".join(f"{k} ({n})" for k, n in found[name]["most_used"].items()))
            for name in ("captions", "references", "targets")
        ]
        tables.append(("Repetition", [("what", "distinct", "most used"), *uses]))
        sizes = list(next(iter(found["repeated_in_batch"].values())))
        chances = [(name, *map(_percent, by.values())) for name, by in found["repeated_in_batch"].items()]
        tables.append(("Probability that a random batch holds one twice", [("what", *sizes), *chances]))
        length = found["length"]
        texts = [("words of a caption", f"{length['least']} to {length['most']}, mean {length['mean']:.1f}")]
        if "overlap" in found:
            texts.append(("words of the target's caption that the edit names", _percent(found["overlap"])))
        if "cycle" in found:
            texts.append(
                ("words of the edit that only the target's caption has", _percent(found["cycle"]["precision"]))
            )
            texts.append(("words that only the target's caption has, in the edit", _percent(found["cycle"]["recall"])))
        texts += [(f"fault: {fault}", _percent(share)) for fault, share in found["faults"].items()]
        tables.append(("Captions", [("measure", "value"), *texts]))
        if found["scores"]:
            scores = [
                (kind, str(one["rows"]), f"{one['mean']:.3f}", f"{one['median']:.3f}", _percent(one["share_negative"]))
                for kind, one in found["scores"].items()
            ]
            heading = "How much truer the target's caption is of the target than of the reference (cosines)"
            tables.append((heading, [("kind", "rows", "mean", "median", "not above 0"), *scores]))
        if self.modality:
            arms = list(next(iter(self.modality.values())))
            lines = [
                (kind, *(str(int(v)) if arm == "rows" else _percent(v) for arm, v in by.items()))
                for kind, by in self.modality.items()
            ]
            tables.append(("Modality need: R@10 among the images of the set", [("kind", *arms), *lines]))
        return [*tables, *self._rejected()]

    def _rejected(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        rows = [(reason, str(number)) for reason, number in sorted(self.rejected.items(), key=lambda x: (-x[1], x[0]))]
        return [("Left out", [("reason", "rows"), *rows])] if rows else []

    def __str__(self) -> str:
        lines = [f"# Triplets: {self.subject}", "", f"{self.measures['rows']} triplets", ""]
        lines += [*(f"- {one}" for one in self.advice), ""] if self.advice else []
        for heading, (head, *rows) in self.tables():
            lines += [f"## {heading}", "", _line(head), _line(["---"] * len(head)), *map(_line, rows), ""]
        if self.settings:
            settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v not in (None, [], ()))
            lines += [f"Made with {settings}.", ""]
        return "\n".join(lines)

    def page(self, image_of: Callable[[str], Any] | None = None) -> str:
        """Return the report as an HTML page with a sheet of random rows.

        Args:
            image_of: opens an image by its name; None shows names alone.
        """
        parts = [f"<h1>Triplets: {escape(self.subject)}</h1><p>{self.measures['rows']} triplets</p>"]
        parts += [f'<p class="advice">{escape(one)}</p>' for one in self.advice]
        for heading, rows in self.tables():
            parts.append(f"<h2>{escape(heading)}</h2>{_table(rows)}")
        if self.sheet:
            cells = "\n".join(_sheet_row(row, image_of) for row in self.sheet)
            parts.append(f"<h2>{len(self.sheet)} random rows</h2><table>{cells}</table>")
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Triplets</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
        )

    def write(self, file: Path, image_of: Callable[[str], Any] | None = None) -> list[Path]:
        """Write `{file}.md`, `{file}.json` and `{file}.html`; return their paths.

        Args:
            file: path without an ending.
            image_of: see [`~TripletReport.page`].

        Raises:
            OSError: if they cannot be written.
        """
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        texts = {".md": str(self), ".json": content + "\n", ".html": self.page(image_of)}
        paths = [file.with_name(file.name + ending) for ending in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            with whole(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return paths


def _shares(counts: dict[str, int], rows: int) -> list[tuple[str, ...]]:
    return [(name, str(number), _percent(number / max(rows, 1))) for name, number in counts.items()]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(rows: Sequence[Sequence[str]]) -> str:
    tags = ["th", *["td"] * (len(rows) - 1)]
    lines = [
        "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True)
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _sheet_row(row: Row, image_of: Callable[[str], Any] | None) -> str:
    images = [_thumbnail(row[name], image_of) for name in ("reference", "target")]
    captions = [f"<br><small>{escape(row.get(f'{name}_caption', ''))}</small>" for name in ("reference", "target")]
    left, right = (f"<td>{image}{caption}</td>" for image, caption in zip(images, captions, strict=True))
    kind = f"<br><small>{escape(row.get('kind', ''))}</small>"
    return f'<tr>{left}<td dir="auto">{escape(row["caption"])}{kind}</td>{right}</tr>'


def _thumbnail(name: str, image_of: Callable[[str], Any] | None) -> str:
    if image_of is None:
        return escape(name)
    try:
        small = image_of(name).copy()
    except Exception as error:  # Pillow's decoders raise anything; the row is worth showing all the same
        return f"{escape(name)} ({escape(type(error).__name__)})"
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}" alt="{escape(name)}">'


def opener(folder: Path | None) -> Callable[[str], Any] | None:
    """Return what opens the images of a folder by name; published ids such as `42` are `0000042.png`."""
    if folder is None:
        return None

    def open_image(name: str) -> Any:
        names = [name, *(f"{name.zfill(7)}{ending}" for ending in (".png", ".jpg"))]
        inside = [one for one in names if not escapes_folder(folder, one)]
        return open_rgb(next(folder / one for one in inside if (folder / one).is_file()))

    return open_image


class RandomRows:
    """Random rows of a stream: those `SHEET_ROWS` whose numbers hash lowest.

    Attributes:
        rows: the rows, in random order.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Row]] = []
        self._count = 0

    def among(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield all rows and remember some."""
        for row in rows:
            item = (-id_number(f"sheet {self._count}"), self._count, row)
            (heappush if len(self._heap) < SHEET_ROWS else heappushpop)(self._heap, item)
            self._count += 1
            yield row

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows that were remembered."""
        return tuple(row for _, _, row in sorted(self._heap, reverse=True))


def advice_on(measures: dict[str, Any], modality: dict[str, dict[str, float]] | None = None) -> tuple[str, ...]:
    """Return what to change about a set of triplets; the bounds are our choice."""
    rows = measures["rows"]
    if not rows:
        return ("there is no triplet: see what was left out",)
    advice = []
    kind, most = next(iter(measures["kinds"].items()))
    if most > 0.5 * rows and kind != "not stated":
        advice.append(f"{kind} makes {_percent(most / rows)} of the rows: add captions that differ in other ways")
    for name in ("caption", "target"):
        chance = measures["repeated_in_batch"][name]["64"]
        if chance > 0.3:
            how = "train with --distinct_by " + ("caption" if name == "caption" else "target_id")
            advice.append(
                f"a batch of 64 holds one {name} twice with probability {chance:.2f}: {how}, or cap its uses"
            )
    faults = {fault: share for fault, share in measures["faults"].items() if share > 0.01}
    advice += [f"{_percent(share)} of the captions have the fault: {fault}" for fault, share in faults.items()]
    if measures.get("overlap", 0) > 0.5:
        advice.append(
            f"edits name {_percent(measures['overlap'])} of the target's caption: the text alone may find the target; "
            "longer captions, or shorter edits, make the image needed"
        )
    total = (modality or {}).get("all")
    if total and max(total["text"], total["image"]) > 0.9 * max(total["sum"], 1e-9):
        alone = "text" if total["text"] >= total["image"] else "image"
        advice.append(f"the {alone} alone finds the target nearly as often as both: the other is hardly needed")
    return tuple(advice)


def report_on(file: Path, vocabulary: Vocabulary, **facts: Any) -> TripletReport:
    """Report on a file of triplets.

    Args:
        file: see [`read_rows`].
        vocabulary: word list of the captions' language.
        **facts: further arguments of [`TripletReport`].

    Raises:
        ValueError: if it cannot be read.
    """
    sheet = RandomRows()
    measures = measure(sheet.among(read_rows(file)), vocabulary)
    facts = {"advice": advice_on(measures, facts.get("modality")), "sheet": sheet.rows, **facts}
    return TripletReport(file.name, measures, **facts)


__all__ = ["RandomRows", "TripletReport", "advice_on", "opener", "report_on"]
