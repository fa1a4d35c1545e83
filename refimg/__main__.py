"""`python -m refimg`: the command `refimg`, whose notebook is `nbs/07_cli.ipynb`."""

from __future__ import annotations

from refimg.cli import app

if __name__ == "__main__":
    app(prog_name="refimg")
