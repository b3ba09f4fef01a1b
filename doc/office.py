"""From Markdown to Word, PowerPoint and PDF: pandoc and LibreOffice, and their reference documents.

apt-get install pandoc libreoffice-writer libreoffice-impress fonts-liberation fonts-crosextra-carlito
pip install -r doc/requirements.txt
"""

import contextlib
import importlib.util
import io
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from src.utils import UsageError

PROGRAMS = ("pandoc", "soffice")
PACKAGES = ("docx", "pptx")  # of doc/requirements.txt
FONT = "Liberation Sans"
INK = "1F3A5F"
CAPTION = '<a:buNone/><a:defRPr sz="1500"/>'  # of a slide's picture
TABLE_STYLE = "Table Text"
TALLEST_CM = 8.6  # of a picture on a page


def missing() -> list[str]:
    """Programs and packages that are not installed."""
    programs = [name for name in PROGRAMS if shutil.which(name) is None]
    return programs + [f"python-{name}" for name in PACKAGES if importlib.util.find_spec(name) is None]


def to_docx(source: Path, target: Path, fingerprint: str) -> None:
    """Make a Word document of a Markdown file whose first heading is the title."""
    with _reference("docx", _adjust_docx) as reference:
        _pandoc(source, target, reference, fingerprint, "--shift-heading-level-by=-1")
    _finish_docx(target)


def to_pptx(source: Path, target: Path, fingerprint: str) -> None:
    """Make slides of a Markdown file: one for each heading, with a picture, words, or a picture above words."""
    with _reference("pptx", _adjust_pptx) as reference:
        _pandoc(source, target, reference, fingerprint, "--slide-level=1")


# As sharp as the pictures are, and links to the other documents that hold wherever the folder lies.
_PDF_OPTIONS = {
    "Quality": {"type": "long", "value": "90"},
    "ReduceImageResolution": {"type": "boolean", "value": "false"},
    "ExportLinksRelativeFsys": {"type": "boolean", "value": "true"},
}


def to_pdf(source: Path, target: Path) -> None:
    """Let LibreOffice print a document. It keeps its settings to itself."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "out")
        folder.mkdir()
        copied = shutil.copy(source, folder)  # links become relative to the PDF, which it writes there
        filter_name = "impress_pdf_Export" if source.suffix == ".pptx" else "writer_pdf_Export"
        _call(
            "soffice",
            f"-env:UserInstallation={Path(home, 'profile').as_uri()}",
            "--headless",
            "--convert-to",
            f"pdf:{filter_name}:{json.dumps(_PDF_OPTIONS, separators=(',', ':'))}",
            "--outdir",
            str(folder),
            copied,
        )
        shutil.copyfile(Path(copied).with_suffix(".pdf"), target)


def with_column_widths(text: str) -> str:
    """Markdown whose tables have dashes in proportion to their cells: pandoc makes columns of such widths."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if not (line.startswith("| :---") and lines[start - 1].startswith("|")):
            continue
        stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
        rows = [row.strip("| ").split(" | ") for row in (lines[start - 1], *lines[start + 1 : stop])]
        # Four for each letter: pandoc heeds the dashes of lines longer than 72.
        widths = [4 * _width(list(column)) for column in itertools.zip_longest(*rows, fillvalue="")]
        lines[start] = "|" + "|".join(":" + "-" * w if i == 0 else "-" * w + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join(lines) + "\n"


def _width(column: Sequence[str]) -> int:
    """Room for a column: headings break between words, short cells do not, long ones take two lines."""
    heading, *cells = column
    longest = max(map(len, cells), default=0)
    return 3 + max(*map(len, heading.split()), longest if longest < 36 else max(36, longest * 6 // 10))


def fingerprint_in(document: Path) -> str | None:
    """What `to_docx` or `to_pptx` wrote into a document to tell from which text and pictures it was made."""
    try:
        with zipfile.ZipFile(document) as archive:
            found = re.search(r"sha256 ([0-9a-f]+)", archive.read("docProps/core.xml").decode())
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
    return found and found[1]


def _pandoc(source: Path, target: Path, reference: Path, fingerprint: str, *arguments: str) -> None:
    source.write_text(with_column_widths(source.read_text()))
    _call(
        "pandoc",
        str(source),
        "--from=markdown-implicit_figures" if target.suffix == ".pptx" else "--from=markdown",
        f"--reference-doc={reference}",
        f"--resource-path={target.parent}",
        f"--metadata=description:sha256 {fingerprint}",
        *arguments,
        f"--output={target}",
    )


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


@contextlib.contextmanager
def _reference(kind: str, adjust: Callable[[io.BytesIO, Path], None]) -> Iterator[Path]:
    """Pandoc's own reference document of a kind, adjusted."""
    command = ["pandoc", "--print-default-data-file", f"reference.{kind}"]
    found = subprocess.run(command, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"reference.{kind}")
        adjust(io.BytesIO(found.stdout), path)
        yield path


def _adjust_docx(source: io.BytesIO, target: Path) -> None:
    """A4, one font, small tables with lines, dark headings."""
    import docx
    from docx.enum.style import WD_STYLE_TYPE
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls, qn
    from docx.shared import Cm, Pt, RGBColor

    document = docx.Document(source)
    section = document.sections[0]
    section.page_width, section.page_height = Cm(21), Cm(29.7)
    section.left_margin = section.right_margin = Cm(2.2)
    section.top_margin = section.bottom_margin = Cm(2)
    sizes = {"Normal": 10, "Body Text": 10, "First Paragraph": 10, "Compact": 10, "Title": 22, "Heading 1": 15}
    sizes |= {"Heading 2": 12, "Heading 3": 10.5, "Image Caption": 8.5, "Table Caption": 8.5, "Verbatim Char": 9}
    styles = {style.name: style for style in document.styles}
    for name, size in sizes.items():
        style = styles[name]
        style.font.size = Pt(size)
        if name != "Verbatim Char":
            style.font.name = FONT
            fonts = style.element.get_or_add_rPr().get_or_add_rFonts()
            for theme in ("asciiTheme", "hAnsiTheme", "eastAsiaTheme", "cstheme"):
                fonts.attrib.pop(qn(f"w:{theme}"), None)
        if name.startswith(("Title", "Heading")):
            style.font.color.rgb = RGBColor.from_string(INK)
    for name, (before, after) in {"Compact": (1.5, 1.5), "Image Caption": (2, 8), "Captioned Figure": (8, 2)}.items():
        spacing = styles[name].paragraph_format
        spacing.space_before, spacing.space_after = Pt(before), Pt(after)
    styles["Captioned Figure"].paragraph_format.keep_with_next = True
    cell = document.styles.add_style(TABLE_STYLE, WD_STYLE_TYPE.PARAGRAPH)
    cell.base_style, cell.font.size = styles["Compact"], Pt(8.5)
    lines = "".join(f'<w:{side} w:val="single" w:sz="4" w:color="BBBBBB"/>' for side in ("top", "bottom", "insideH"))
    table = styles["Table"].element
    for borders in table.findall(f".//{qn('w:tblBorders')}"):
        borders.getparent().remove(borders)
    margins = table.find(f"{qn('w:tblPr')}/{qn('w:tblCellMar')}")  # which the schema has borders before
    margins.addprevious(parse_xml(f"<w:tblBorders {nsdecls('w')}>{lines}</w:tblBorders>"))
    document.save(target)


def _finish_docx(path: Path) -> None:
    """Small type in tables, which stay on one page and repeat their header if they cannot; pictures not too tall."""
    import docx
    from docx.oxml import OxmlElement
    from docx.oxml.ns import qn
    from docx.shared import Cm, Pt
    from docx.text.paragraph import Paragraph

    document = docx.Document(path)
    for table in document.tables:
        table.rows[0]._tr.get_or_add_trPr().append(OxmlElement("w:tblHeader"))
        for row in table.rows:
            row._tr.get_or_add_trPr().append(OxmlElement("w:cantSplit"))
            for paragraph in (paragraph for cell in row.cells for paragraph in cell.paragraphs):
                paragraph.style = TABLE_STYLE
                paragraph.paragraph_format.keep_with_next = row._tr is not table.rows[-1]._tr
        for side, preceding in (("space_after", True), ("space_before", False)):
            for node in itertools.islice(table._tbl.itersiblings(qn("w:p"), preceding=preceding), 1):
                neighbour = Paragraph(node, document._body)
                if not neighbour.style.name.startswith("Heading"):
                    setattr(neighbour.paragraph_format, side, Pt(7))
    for picture in document.inline_shapes:
        scale = min(1, Cm(TALLEST_CM) / picture.height)
        picture.width, picture.height = round(picture.width * scale), round(picture.height * scale)
    document.save(path)


def _adjust_pptx(source: io.BytesIO, target: Path) -> None:
    """Titles on the left at the top, pictures as large as the slide allows, words in a strip below them."""
    from pptx import Presentation
    from pptx.enum.text import MSO_ANCHOR
    from pptx.oxml import parse_xml
    from pptx.oxml.ns import nsdecls, qn
    from pptx.util import Emu

    presentation = Presentation(source)
    width, height = presentation.slide_width, presentation.slide_height
    margin = width // 25
    top, bottom = height // 7, height // 8
    wide = width - 2 * margin
    boxes = {
        "Title Slide": {0: (margin, height // 3, wide, top), 1: (margin, height // 3 + top, wide, top)},
        "Title and Content": {
            0: (margin, margin // 2, wide, top),
            1: (margin, top + margin // 2, wide, height - top - margin),
        },
        "Content with Caption": {
            0: (margin, margin // 2, wide, top),
            1: (margin, top + margin // 2, wide, height - top - bottom - margin // 2),
            2: (margin, height - bottom, wide, bottom - margin // 2),
        },
    }
    for layout in presentation.slide_layouts:
        for place in layout.placeholders:
            index = place.placeholder_format.idx
            if index not in boxes.get(layout.name, {}):
                continue
            place.left, place.top, place.width, place.height = map(Emu, boxes[layout.name][index])
            # Words look as the master says, not as each layout does, but for those below a picture.
            for own in place._element.findall(f".//{qn('a:lstStyle')}"):
                own.clear()
                if layout.name != "Title and Content" and index:
                    own.append(parse_xml(f'<a:lvl1pPr {nsdecls("a")} marL="0" indent="0">{CAPTION}</a:lvl1pPr>'))
            place.text_frame.vertical_anchor = MSO_ANCHOR.TOP
            if index == 0:
                place.text_frame.vertical_anchor = MSO_ANCHOR.BOTTOM if "Slide" in layout.name else MSO_ANCHOR.MIDDLE
    _style(presentation.slide_master.element, "p:titleStyle", 2400, bold=True, colour=INK)
    _style(presentation.slide_master.element, "p:bodyStyle", 2000)
    presentation.save(target)


def _style(element: Any, name: str, size: int, *, bold: bool = False, colour: str | None = None) -> None:
    """Set the size, in hundredths of a point, and the looks of every level of a text style; aligned to the left."""
    from pptx.oxml import parse_xml
    from pptx.oxml.ns import nsdecls, qn

    for level in element.find(f".//{qn(name)}"):
        level.set("algn", "l")
        run = level.find(qn("a:defRPr"))
        run.set("sz", str(size))
        run.set("b", str(int(bold)))
        if colour:
            for fill in run.findall(qn("a:solidFill")):
                run.remove(fill)
            run.insert(0, parse_xml(f'<a:solidFill {nsdecls("a")}><a:srgbClr val="{colour}"/></a:solidFill>'))
