"""Somebody looks at each image: questions, answers, a score, a judge, and what to repair."""

from refimg.inspection.checklist import (
    Answer,
    Checklist,
    Inspection,
    Question,
    inspect_image,
    write_checklist,
)
from refimg.inspection.judge import Judgement, ask_judge, judge_pair
from refimg.inspection.repair import ask_edit, edit_prompt
from refimg.inspection.scorer import ChecklistScorer

__all__ = [
    "Answer",
    "Checklist",
    "ChecklistScorer",
    "Inspection",
    "Judgement",
    "Question",
    "ask_edit",
    "ask_judge",
    "edit_prompt",
    "inspect_image",
    "judge_pair",
    "write_checklist",
]
