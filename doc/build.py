"""Builds everything in doc/ that is made from records: tables, figures, the report and the slides.

    python -m doc.build                # tables, figures, report.md and, with pandoc and LibreOffice, documents and PDFs
    python -m doc.build --predictions  # and predicted_vs_measured.md, whose dry runs take minutes
    python -m doc.build --check        # write nothing; fail if anything but figures is not what it would make

The texts are doc/source/report.md and slides.md. They have no number that records or a model's shape could tell, and
their conclusions name the condition under which they hold: the build fails where one does not.
Word, PowerPoint and PDF files are left alone where they are of the same text and pictures; remove one to have it made
again. doc/office.py says what to install for them.
"""

import argparse
import functools
import hashlib
import io
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib

from doc import evidence, facts, office, pictures, tables
from doc.evidence import ROOT
from src.utils import ExitStatus, UsageError, error_line, write_atomically

DOC = ROOT / "doc"

# File -> table of doc/tables.py and the folder of its records.
DOCUMENTS = {
    "measured.md": ("measured", "doc/data"),
    "offload.md": ("offload", "doc/data"),
    "scaling.md": ("scaling", "doc/data"),
    "levers.md": ("levers", "doc/data/h200_offload"),
    "peak.md": ("peak", "doc/data"),
    "original.md": ("original", "doc/data"),
    "best.md": ("best", "doc/data"),
}
PREDICTIONS = {"predicted_vs_measured.md": ("predicted", "doc/data/h100_single_gpu")}

# The source of each text, what is made of it, and by what. The slides' Markdown is not kept.
REPORT = ("report.md", "group_10_midterm.docx", office.to_docx)
SLIDES = ("slides.md", "group_10_liger_kernel.pptx", office.to_pptx)


def render(name: str) -> str:
    """A text of doc/source with every expression in it replaced. Raises `UsageError` that names the line."""
    loader = jinja2.FileSystemLoader(DOC / "source")
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= facts.context()
    environment.filters |= evidence.FILTERS
    try:
        return reflow(environment.get_template(name).render())
    except (UsageError, jinja2.TemplateError) as error:
        raise UsageError(f"{_place(error, name)}: {error}") from error


def reflow(text: str) -> str:
    """Markdown with its paragraphs and list items broken at 120 columns, and one empty line between them."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(map(_reflow_block, blocks)) + "\n"


def _reflow_block(block: str) -> str:
    if re.match(r"\s*(\||#|!\[|>|%)", block):
        return block
    lines = []
    for item in re.split(r"\n(?=\s*(?:-|\d+\.) )", block):
        marker = re.match(r"\s*(?:(?:-|\d+\.) )?", item)[0]
        words = " ".join(item[len(marker) :].split())
        lines += textwrap.wrap(
            words,
            120,
            initial_indent=marker,
            subsequent_indent=" " * len(marker),
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines)


def _place(error: Exception, name: str) -> str:
    """The template's line at which an error arose."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"doc/source/{error.name}, line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == DOC / "source"]
    return f"doc/source/{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else f"doc/source/{name}"


def texts(predictions: bool = False) -> Iterator[tuple[Path, Callable[[], str]]]:
    """Each Markdown file of doc/, and what makes it."""
    for name, (table, folder) in (DOCUMENTS | (PREDICTIONS if predictions else {})).items():
        command = f"python -m doc.tables {table} {folder}"
        document = functools.partial(tables.TABLES[table].text, Path(folder), command)
        yield DOC / name, lambda document=document: document() + "\n"
    yield DOC / REPORT[0], lambda: render(REPORT[0])


def fingerprint(text: str) -> str:
    """Tells a text and the pictures it shows from another."""
    digest = hashlib.sha256(text.encode())
    for path in sorted(DOC.glob("image/*.png")):
        if f"image/{path.name}" in text:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def stale() -> list[str]:
    """Files of doc/ that are not what the records and sources make."""
    found = [p.name for p, make in texts() if not p.exists() or p.read_text() != make()]
    for source, document, _ in (REPORT, SLIDES):
        if office.fingerprint_in(DOC / document) != fingerprint(render(source)):
            found.append(document)
    return found


def build(predictions: bool) -> None:
    """Write everything; says what it wrote, and what it could not for want of programs."""
    for path in DOC.glob("image/study_*.png"):
        path.unlink()  # its records may be gone
    for name, figure in pictures.all_figures():
        path = DOC / "image" / name
        write_atomically(path, lambda temporary, figure=figure: _save(figure, temporary))
        _wrote(path)
    for path, make in texts(predictions):
        text = make()
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        _wrote(path)
    if lacking := office.missing():
        print(f"No Word, PowerPoint and PDF files: {', '.join(lacking)} missing; doc/office.py says what to install.")
        return
    for source, document, convert in (REPORT, SLIDES):
        _make_document(source, DOC / document, convert)


def _make_document(source: str, document: Path, convert: Callable[[Path, Path, str], None]) -> None:
    text, pdf = render(source), document.with_suffix(".pdf")
    if pdf.exists() and office.fingerprint_in(document) == fingerprint(text):
        print(f"{document.relative_to(ROOT)} and {pdf.name} are up to date")
        return
    rendered = document.with_suffix(".md")  # beside the pictures
    try:
        rendered.write_text(text)
        convert(rendered, document, fingerprint(text))
    finally:
        rendered.unlink(missing_ok=True)
    office.to_pdf(document, pdf)
    _wrote(document)
    _wrote(pdf)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size of one of all."""
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="png", dpi=(150, 150))


def _wrote(path: Path) -> None:
    print(path.relative_to(ROOT))


def main() -> int:
    """Build or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    parser.add_argument("--predictions", action="store_true", help="make predicted_vs_measured.md too")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    os.chdir(ROOT)  # the documents name their records' folders relative to it
    try:
        if not arguments.check:
            build(arguments.predictions)
        elif found := stale():
            raise UsageError(f"out of date, run python -m doc.build: {', '.join(found)}")
    except UsageError as error:
        error_line(error)
        return ExitStatus.FAILED
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
