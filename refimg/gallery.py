"""The gallery under the name that it had in 0.1; the code is in `refimg.view.gallery`."""

from __future__ import annotations

from refimg.engine.decisions import human_agreement, preferences, veto
from refimg.view.gallery import Gallery

__all__ = ["Gallery", "human_agreement", "preferences", "veto"]
