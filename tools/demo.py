"""The demo: a story through the whole pipeline, offline, in the sandbox.

Runs nbs/03_pipeline.ipynb, which writes output/demo/images and output/demo/run.json, shows that run
on a page, output/demo/story.html, keeps the notebook as it ran, output/demo/03_pipeline.html, and
prints the scores. The committed notebook is not touched.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from nbconvert import HTMLExporter
from nbformat import NotebookNode
from run_nbs import executed
from tidy import tidy

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "03_pipeline.ipynb"
OUT = ROOT / "output" / "demo"
KEYS = re.compile(r"(REFIMG|OPENAI|REPLICATE)_")
CDN = ("mathjax_url", "require_js_url", "jquery_url", "widget_renderer_url")
LOADER = re.compile(
    r"""<script[^>]*\bsrc=(?:""|'')[^>]*>\s*</script>"""
    r"""|<script type="module">.*?mermaid.*?</script>""",
    re.DOTALL,
)
FETCH = re.compile(
    r"""<(?!a\b)[a-z]+\b[^<>]*?\s(?:src|href|data|poster)\s*=\s*["']?\s*(?:https?:)?//[^"'\s>]+"""
    r"""|url\(\s*["']?(?:https?:)?//[^)]+|\bimport\b[^;\n]*["']https?://[^"']+""",
    re.IGNORECASE,
)


def sandboxed() -> None:
    """Takes away what could turn the sandbox off, here and in the kernel."""
    for name in [n for n in os.environ if KEYS.match(n)]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"


def page(nb: NotebookNode) -> str:
    """The notebook as one HTML page that holds its images and asks nobody for anything."""
    exporter = HTMLExporter(embed_images=True)
    for name in CDN:
        setattr(exporter, name, "")
    html, _ = exporter.from_notebook_node(tidy(nb), {"metadata": {"path": str(NOTEBOOK.parent)}})
    html = LOADER.sub("", html)
    if outside := FETCH.findall(html):
        sys.exit(f"{NOTEBOOK.stem}.html would fetch {outside[:3]}")
    return html


def show() -> None:
    """Writes the page of the run, prints its scores and where to look."""
    from refimg import StoryResult
    from refimg.view import report

    result = StoryResult.load(OUT / "run.json")
    story = report(result, OUT / "story.html")
    frame = result.frame()
    metrics = [name for name in frame.columns if f"raw_{name}" in frame.columns]
    columns = ["scene", "variation", "rank", "selected", "overall", *metrics]
    print(f"\nscores, 0-100{' (sandbox)' if result.sandbox else ''}")
    print(frame[columns].round(1).to_string(index=False))
    print(f"\nlook at   {story}\nimages    {OUT / 'images'}\nresult    {OUT / 'run.json'}")
    print(f"notebook  {OUT / NOTEBOOK.stem}.html")


def main() -> None:
    """Runs the demo; an error in the notebook ends it with that error."""
    sandboxed()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    print(f"running nbs/{NOTEBOOK.name} offline, in the sandbox ...", flush=True)
    html = page(executed(NOTEBOOK))
    (OUT / f"{NOTEBOOK.stem}.html").write_text(html, encoding="utf-8")
    show()


if __name__ == "__main__":
    main()
