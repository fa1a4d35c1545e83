"""Somebody looks at each image: questions, answers, and who decides between the two best."""

from refimg.inspection.checklist import (
    Answer,
    Checklist,
    ChecklistScorer,
    Inspection,
    Question,
    inspect_image,
    write_checklist,
)

__all__ = [
    "Answer",
    "Checklist",
    "ChecklistScorer",
    "Inspection",
    "Question",
    "inspect_image",
    "write_checklist",
]
