"""What people look at: the variations of a scene, the scores, the chain, and the whole run.

Every public name of the rooms can be imported from here. The gallery comes only when it is asked
for, because it knows the pipeline.
"""

from typing import TYPE_CHECKING, Any

from refimg.view.charts import (
    dimension_rise,
    iteration_histogram,
    score_distributions,
    timeline,
)
from refimg.view.failures import failure_chart
from refimg.view.html import Html, element, sandbox_models, thumbnail, visible
from refimg.view.repairs import repairs
from refimg.view.report import report
from refimg.view.sheet import contact_sheet
from refimg.view.tables import (
    chain_strip,
    progress_bar,
    save_table,
    score_table,
    variation_grid,
)

if TYPE_CHECKING:
    from refimg.view.gallery import Gallery

__all__ = [
    "Gallery",
    "Html",
    "chain_strip",
    "contact_sheet",
    "dimension_rise",
    "element",
    "failure_chart",
    "iteration_histogram",
    "progress_bar",
    "repairs",
    "report",
    "sandbox_models",
    "save_table",
    "score_distributions",
    "score_table",
    "thumbnail",
    "timeline",
    "variation_grid",
    "visible",
]


def __getattr__(name: str) -> Any:
    if name != "Gallery":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from refimg.view.gallery import Gallery

    return Gallery
