"""Runs tables with known numbers: an arm is made of the scores of its images."""

from __future__ import annotations

import numpy as np
import pandas as pd

COLUMNS = {
    "score_text": "original", "chain": "none", "sandbox": False, "num_variations": 4,
    "max_enhancement_iterations": 0, "selected_by": "pickscore", "overall_of": "pickscore",
    "scorer_pickscore": "pick @ 1 · map", "quality_threshold": 30.0, "stop_reason": "skipped",
    "iterations": 0, "critic_score": np.nan,
}  # fmt: skip


def arm(scores, looked=None, run: str = "run", **columns) -> pd.DataFrame:
    """An arm of `scores[story][scene][image]`; `looked` are those of a held-out verifier."""
    scores = np.asarray(scores, float)
    looked = scores if looked is None else np.asarray(looked, float)
    rows = [
        {"generation_id": f"{run}-{story}", "story": f"s{story}", "scene": scene + 1,
         "variation": image + 1, "text": f"text {story}.{scene + 1}", "overall": value,
         "pickscore": value, "raw_pickscore": value, "seen": looked[story, scene, image],
         "raw_seen": looked[story, scene, image],
         "selected": image == np.nanargmax([-1, *scores[story, scene]]) - 1}
        for (story, scene, image), value in np.ndenumerate(scores)
    ]
    table = pd.DataFrame(rows).assign(**COLUMNS | {"num_variations": scores.shape[2]} | columns)
    below = table["overall"] < table["quality_threshold"]
    table["below_threshold"] = below.astype(object).where(table["overall"].notna(), None)
    return table


def random_arm(seed: int, stories: int = 12, scenes: int = 1, images: int = 4, better=0.0, **more):
    """An arm of random scores between 0 and 100; the same texts whatever the seed."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(20, 80, (stories, scenes, images)) + better
    return arm(scores, scores + rng.normal(0, 5, scores.shape), run=f"r{seed}", **more)
