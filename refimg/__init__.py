"""Good reference images for video: enhance, draw, score, chain."""

__version__ = "0.1.0"

from refimg.enhance import enhance_prompt_iterative
from refimg.generate import GenerationFailed, generate_images
from refimg.pipeline import (
    GenerationCancelled,
    Pipeline,
    Scene,
    Story,
    StoryFailure,
    StoryResult,
    Subject,
    choose,
    draft_story,
    generate_enhanced_reference_images_with_sequential_references,
    plan_story,
    rescore,
)
from refimg.score import rank_images_by_quality, score_image, score_images
from refimg.storage.secrets import guard_loggers

guard_loggers(__name__, __path__)

__all__ = [
    "GenerationCancelled",
    "GenerationFailed",
    "Pipeline",
    "Scene",
    "Story",
    "StoryFailure",
    "StoryResult",
    "Subject",
    "choose",
    "draft_story",
    "enhance_prompt_iterative",
    "generate_enhanced_reference_images_with_sequential_references",
    "generate_images",
    "plan_story",
    "rank_images_by_quality",
    "rescore",
    "score_image",
    "score_images",
]
