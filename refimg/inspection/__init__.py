"""Somebody looks at each image: questions about a scene, answers, and a score made of them."""

from refimg.inspection.checklist import (
    Answer,
    Checklist,
    Inspection,
    Question,
    inspect_image,
    write_checklist,
)
from refimg.inspection.scorer import ChecklistScorer

__all__ = [
    "Answer",
    "Checklist",
    "ChecklistScorer",
    "Inspection",
    "Question",
    "inspect_image",
    "write_checklist",
]
