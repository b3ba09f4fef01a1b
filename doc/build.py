"""Builds everything in doc/ that is made from records: tables, figures, the report and the slides.

    python -m doc.build                          # all of it; with pandoc and LibreOffice also documents and PDFs
    python -m doc.build --check                  # write nothing; fail if anything but figures is not what it would make
    python -m doc.build --predictions            # first predict anew what was measured, which takes minutes
    python -m doc.build --table scaling results  # print a document made from the records of another folder

The texts are templates in doc/source/. They have no number that records or a model's shape could tell, and their
conclusions name the condition under which they hold: the build fails where one does not.
Word, PowerPoint and PDF files are left alone where text and pictures are the same; remove one to have it made again.
"""

from src import program

if __name__ == "__main__":  # before the other imports: Ctrl-C while they are read is one line
    program.begin()

import argparse
import functools
import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import mdformat
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib

from doc import evidence, long, pictures, studies, tables
from doc.evidence import ROOT
from src.advise.request import LEFT_FREE
from src.check import curves
from src.machine import H100
from src.offload import host_memory
from src.predict import frontier
from src.study.answers import setting_words
from src.utils import ExitStatus, UsageError, error_line, write_atomically

DOC = ROOT / "doc"

# Each text and the folder of the records that it is made from.
TEXTS = [
    "measured",
    "peers",
    "people",
    "predicted_time",
    "advice",
    "offload",
    "long",
    "scaling",
    "peak",
    "parity",
    "original",
    "best",
    "report",
]
DOCUMENTS = dict.fromkeys(TEXTS, "doc/data")
DOCUMENTS |= {"predicted_offload": "doc/data"}
DOCUMENTS |= {"levers": "doc/data/h200_offload", "predicted_vs_measured": "doc/data/h100_single_gpu"}
# What pandoc makes, of which text, and with which options. The slides' Markdown is not kept.
OFFICE = {
    "group_10_midterm.docx": ("report", "--shift-heading-level-by=-1", f"--lua-filter={evidence.SOURCE}/tables.lua"),
    "group_10_liger_kernel.pptx": ("slides", "--slide-level=1", "--from=markdown-implicit_figures"),
}
AUTHOR = "The Liger Kernel Study authors"
SLIDES_ARE = f"<dc:title>What do the Liger kernels save?</dc:title><dc:creator>{AUTHOR}</dc:creator>"
# Links to the other documents hold wherever the folder lies.
PDF_OPTIONS = '{"ExportLinksRelativeFsys":{"type":"boolean","value":"true"}}'


def holds(condition: bool, caller: Callable[[], str]) -> str:
    """The text of a `{% call holds(...) %}` block. Raises `UsageError` if the records say otherwise."""
    text = " ".join(caller().split())
    if not condition:
        raise UsageError(f"the records no longer show this: {text!r}")
    return text


def context(folder: str, command: str) -> dict[str, Any]:
    """Every name that a template may use, but for the filters."""
    return {
        "records": functools.partial(evidence.listed, Path(ROOT, folder)),
        "command": command,
        "evidence": evidence,
        "long": long,
        "curves": curves,
        "studies": studies,
        "tables": tables,
        "holds": holds,
        "share": evidence.share,
        "setting_words": setting_words,
        "H100": H100,
        "frontier": frontier,
        "host_memory": host_memory,
        "left_free": LEFT_FREE,
    }


@functools.cache
def render(name: str, folder: str = "", command: str = "python -m doc.build") -> str:
    """A text of doc/source with every expression in it replaced. Raises `UsageError` that names the line."""
    names = context(folder or DOCUMENTS.get(name, "doc/data"), command)
    try:
        text = tables.templates().get_template(f"{name}.md").render(names)
        return mdformat.text(text, options={"wrap": 120, "number": True}, extensions={"gfm"})
    except (UsageError, jinja2.TemplateError) as error:
        raise UsageError(f"{_place(error, name)}: {error}") from error


def _place(error: Exception, name: str) -> str:
    """The template's line at which an error arose."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"doc/source/{error.name}, line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == evidence.SOURCE]
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else f"{name}.md"
    return f"doc/source/{where}"


def fingerprint(text: str) -> str:
    """Tells a text and the pictures it shows from another."""
    digest = hashlib.sha256(text.encode())
    for path in sorted(DOC.glob("image/*.png")):
        if f"image/{path.name}" in text:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint_in(document: Path) -> str | None:
    """What `_make_document` wrote into a document to tell from which text and pictures it was made."""
    try:
        with zipfile.ZipFile(document) as archive:
            found = re.search(r"sha256 ([0-9a-f]+)", archive.read("docProps/core.xml").decode())
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
    return found and found[1]


def stale() -> list[str]:
    """Files of doc/ that are not what the records and sources make."""
    texts = {f"{name}.md": render(name) for name in DOCUMENTS}
    found = [name for name, text in texts.items() if not (DOC / name).exists() or (DOC / name).read_text() != text]
    made_of = {name: fingerprint(render(source)) for name, (source, *_) in OFFICE.items()}
    return found + [name for name, expected in made_of.items() if fingerprint_in(DOC / name) != expected]


def build() -> None:
    """Write everything; says what it wrote, and what it could not for want of programs."""
    for path in DOC.glob("image/study_*.png"):
        path.unlink()  # its records may be gone
    for name, figure in pictures.all_figures():
        _write(DOC / "image" / name, functools.partial(_save, figure))
    for name in DOCUMENTS:
        _write(DOC / f"{name}.md", lambda path, name=name: path.write_text(render(name)))
    if lacking := [program for program in ("pandoc", "soffice") if shutil.which(program) is None]:
        print(f"No Word, PowerPoint and PDF files without {', '.join(lacking)}: python -m doc.build --help")
        return
    for name in OFFICE:
        _make_document(DOC / name)


def _make_document(document: Path) -> None:
    """A Word or PowerPoint file whose looks are those of doc/source/reference.*, and its PDF."""
    name, *options = OFFICE[document.name]
    text, pdf = render(name), document.with_suffix(".pdf")
    if pdf.exists() and fingerprint_in(document) == fingerprint(text):
        print(f"{document.relative_to(ROOT)} and {pdf.name} are up to date")
        return
    looks = f"--reference-doc={evidence.SOURCE / 'reference'}{document.suffix}"
    mark = f"--metadata=description:sha256 {fingerprint(text)}"
    told = [f"--metadata=author:{AUTHOR}", f"--metadata=date:{evidence.newest()}"] if document.suffix == ".docx" else []
    _call("pandoc", *options, looks, mark, *told, f"--resource-path={DOC}", f"--output={document}", text=text)
    _finish(document)
    kind = "impress" if document.suffix == ".pptx" else "writer"
    to_pdf = f"pdf:{kind}_pdf_Export:{PDF_OPTIONS}"
    with tempfile.TemporaryDirectory() as home:  # LibreOffice keeps its settings there
        copied = shutil.copy(document, home)  # links become relative to the PDF, which it writes beside
        own = f"-env:UserInstallation={Path(home, 'profile').as_uri()}"
        _call("soffice", own, "--headless", "--convert-to", to_pdf, "--outdir", home, copied)
        shutil.copyfile(Path(copied).with_suffix(".pdf"), pdf)
    print(document.relative_to(ROOT))
    print(pdf.relative_to(ROOT))


def _finish(document: Path) -> None:
    """What pandoc does not do: rows of tables stay whole; a slide has its number, and the slides' file its author."""
    finished = io.BytesIO()
    with zipfile.ZipFile(document) as old, zipfile.ZipFile(finished, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name).decode() if name.endswith(".xml") else old.read(name)
            if name == "word/document.xml":
                content = content.replace("<w:tr>", "<w:tr><w:trPr><w:cantSplit/></w:trPr>")
            elif name == "docProps/core.xml" and document.suffix == ".pptx":
                content = re.sub(r"<dc:(title|creator)>.*?</dc:\1>|<dc:(title|creator) */>", "", content)
                content = content.replace("<dc:description>", f"{SLIDES_ARE}<dc:description>")
            elif found := re.fullmatch(r"ppt/slides/slide(\d+)\.xml", name):
                size = re.search(r'<p:sldSz cx="(\d+)" cy="(\d+)"', old.read("ppt/presentation.xml").decode())
                place = {"left": int(size[1]) - 700000, "top": int(size[2]) - 340000}
                number = (evidence.SOURCE / "slide_number.xml").read_text().format(number=found[1], **place)
                content = content.replace("</p:spTree>", number)
            new.writestr(name, content)
    document.write_bytes(finished.getvalue())


def _call(*command: str, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size of one of all."""
    file, dpi = io.BytesIO(), 200 if figure.get_figwidth() <= pictures.WIDTH else 150
    figure.savefig(file, dpi=dpi, format="png")
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="png", dpi=(dpi, dpi))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    write_atomically(path, write)
    print(path.relative_to(ROOT))


def main() -> int:
    """Build, check or print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    asked.add_argument("--predictions", action="store_true", help="predict anew what was measured on one GPU")
    asked.add_argument("--table", nargs=2, metavar=("NAME", "FOLDER"), help=f"print one of {', '.join(DOCUMENTS)}")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.table:
        name, folder = arguments.table
        if name not in DOCUMENTS:
            raise UsageError(f"no table {name!r}: choose from {', '.join(DOCUMENTS)}")
        print(render(name, os.path.abspath(folder), f"python -m doc.build --table {name} {folder}").rstrip())
        return ExitStatus.FAILED if evidence.strange else ExitStatus.DONE
    os.chdir(ROOT)  # records name their folders relative to it
    if arguments.predictions:
        evidence.predict_all()
    if not arguments.check:
        build()
    elif found := stale():
        error_line(f"out of date, run python -m doc.build: {', '.join(found)}")
        return ExitStatus.FAILED
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(program.guarded(main))
