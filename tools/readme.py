"""Make README.md from nbs/index.ipynb: no hidden cells, no directives, images in nbs/images/."""

import posixpath
import re
import sys
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from tidy import tidy

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from nbs/index.ipynb: change that and run `make readme`. -->\n\n"
KINDS = ("text/markdown", "image/png", "image/jpeg", "image/svg+xml", "text/plain")
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z]+:|[#/])([^)"'\s]+)""")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|private|var|opt)/")
REPR = re.compile(r"\s*\[?<")
STEM = "readme"
ALT = "A run of the story that ships with refimg: one row per scene, the winner framed"


def rehang(text: str) -> str:
    """Markdown whose relative links start at the repository, not at nbs/."""
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)


def markdown_table(html: str) -> str:
    """A table's HTML as Markdown."""
    found = BeautifulSoup(html, "html.parser").find_all("tr")
    rows = [[cell.get_text(strip=True) for cell in row.find_all(["th", "td"])] for row in found]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plain(output: NotebookNode) -> NotebookNode | None:
    """The output in the first form a repository page can show, or None."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data = output.get("data", {})
    if 'class="dataframe"' in data.get("text/html", ""):
        data = {"text/markdown": markdown_table(data["text/html"])}
    kind = next((k for k in KINDS if k in data), None)
    if kind is None or (kind == "text/plain" and REPR.match(data[kind])):
        return None
    output.data = {kind: data[kind]}
    return output


def cleaned(nb: NotebookNode) -> NotebookNode:
    """The notebook as the README shows it."""
    nb.metadata.language_info = {"name": "python"}  # what its fences are marked with
    for cell in tidy(nb).cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in map(plain, cell.outputs) if o is not None]
        else:
            cell.source = rehang(cell.source)
    return nb


def readme(source: Path) -> tuple[str, dict[str, bytes]]:
    """README.md's text and its images by file name."""
    exporter = MarkdownExporter()
    resources = {"unique_key": STEM, "output_files_dir": "nbs/images"}
    nb = cleaned(nbformat.read(source, as_version=4))
    text, resources = exporter.from_notebook_node(nb, resources)
    if found := ABSOLUTE.search(text):
        sys.exit(f"{source.name} shows an absolute path: {text[found.start() :][:60]}")
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"^[ \t]+$", "", text, flags=re.MULTILINE))
    text = text.replace('"../', '"')
    text = re.sub(r"!\[(?:png|jpeg)\]", f"![{ALT}]", text)
    images = {Path(name).name: data for name, data in resources["outputs"].items()}
    return HEAD + text.strip() + "\n", images


def write(root: Path, source: Path) -> None:
    """Writes README.md and its images below root; images it no longer has go away."""
    text, images = readme(source)
    folder = root / "nbs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{STEM}_*"):
        stale.unlink()
    for name, data in images.items():
        (folder / name).write_bytes(data)
    (root / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(ROOT, ROOT / "nbs" / "index.ipynb")
