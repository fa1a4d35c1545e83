"""The gallery under its name of version 0.1; the notebook is `nbs/view/gallery.ipynb`."""

from __future__ import annotations

from refimg.engine.decisions import human_agreement, preferences, veto
from refimg.view.gallery import Gallery

__all__ = ["Gallery", "human_agreement", "preferences", "veto"]
