"""Build the documentation from the notebooks and from nbs/pages.

The local site needs no network and no Quarto: it goes to _docs/, or with --to to another folder.
Where Quarto is installed, nbdev_docs then makes the published site in _docs/ from the same pages,
and the local one, which checks them, goes to build/docs/.
"""

import argparse
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import docs_pages
import docs_site
import docs_stage
from docs_stage import NBS, ROOT


def sources() -> list[Path]:
    """Every file that becomes a page."""
    return [*docs_stage.notebooks(), *sorted((NBS / "pages").glob("*.md"))]


def check_sidebar() -> None:
    """Stops where a page is in no section of the sidebar."""
    listed = {name for files in docs_site.sections().values() for name in files}
    names = {path.relative_to(NBS).as_posix() for path in sources()} - {"index.ipynb"}
    if missing := sorted(names - listed):
        raise SystemExit(f"in no section of the sidebar in _quarto.yml: {', '.join(missing)}")


def stage(target: Path) -> None:
    """Writes every page as readers should see it, and what pages show."""
    for path in sources():
        make = docs_pages if path.suffix == ".md" else docs_stage
        make.stage(path, target / path.relative_to(NBS))
    if (NBS / "images").is_dir():
        shutil.copytree(NBS / "images", target / "images", dirs_exist_ok=True)


def local(site: Path) -> None:
    """Builds the local site; the folder is changed only when that has worked."""
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder, "staged")
        stage(staged)
        made = docs_site.build(staged, Path(folder, "work"))
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(made, site, ignore=shutil.ignore_patterns("_sources", ".buildinfo"))
    print(f"read {site / 'index.html'}")


def published() -> None:
    """Builds the published site with Quarto, from the same pages."""
    from nbdev import quarto, serve

    def proc_nbs(*args, **kwargs) -> Path:
        cache = original(*args, **kwargs | {"n_workers": 0, "force": True})
        for path in sorted((NBS / "pages").glob("*.md")):
            docs_pages.stage(path, cache / path.relative_to(NBS))
        return cache

    original, quarto.proc_nbs = quarto.proc_nbs, proc_nbs
    serve.FilterDefaults = docs_stage.Readable
    (ROOT / "README.md").touch()
    quarto.nbdev_docs.__wrapped__()


def main() -> None:
    """Builds what can be built here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, help="build only the local site, in this folder")
    wanted = parser.parse_args().to
    quarto = shutil.which("quarto") and not wanted
    check_sidebar()
    local((wanted or ROOT / ("build/docs" if quarto else "_docs")).resolve())
    if quarto:
        published()


if __name__ == "__main__":
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
    main()
