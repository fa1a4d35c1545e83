"""What must hold for every chart: true in words and in the drawing, harmless, small, repeatable."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import re
import statistics
import subprocess
import sys
import threading
import warnings
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from io import BytesIO
from itertools import product
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from PIL import Image

from refimg.engine.results import Event
from refimg.enhance import Critique, ImagePromptEnhancementResult, Iteration
from refimg.pipeline import Pipeline, Scene, SceneResult, Story, StoryResult
from refimg.score import ImageScores
from refimg.view import (
    Html,
    dimension_rise,
    iteration_histogram,
    score_distributions,
    timeline,
)
from tests.fakes import FakeImages, FakeScorer, critic, director
from tests.sampling import sampled
from tests.test_view import HOSTILE, carried, enhancement, read, scene_of, shot, story_of, variation

CHARTS = [iteration_histogram, dimension_rise, score_distributions, timeline]
DIMENSIONS = [
    "completeness", "specificity", "professionalism", "cinematography", "brand_alignment",
]  # fmt: skip
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Plain(HTMLParser):
    """The alternative text and the caption of a view."""

    def __init__(self, view: Html):
        super().__init__()
        self.alt, self.src, self.words = "", "", []
        self.feed(str(view))

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.alt, self.src = dict(attrs)["alt"], dict(attrs)["src"]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join([self.alt, *self.words])


def alt(view: Html) -> str:
    return Plain(view).alt


def drawing(view: Html) -> str:
    """The source of a chart's SVG."""
    kind, data = Plain(view).src.split(",", 1)
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode("utf-8")


def written(view: Html) -> list[str]:
    """Every text that is drawn in a chart."""
    return ["".join(e.itertext()) for e in ElementTree.fromstring(drawing(view)).iter(f"{SVG}text")]


SVG = "{http://www.w3.org/2000/svg}"


def iterations_of(*overalls: float, reason: str = "threshold") -> ImagePromptEnhancementResult:
    """An enhancement whose rounds have these overalls; the dimensions are near them."""
    apart = dict(zip(DIMENSIONS, (-4, 4, -5, 0, 20 / 3), strict=True))
    made = [
        Iteration(
            number=k, enhanced_prompt="p", seconds=0.1,
            critique=Critique(critique="c", improvements=[],
                              **{name: value + d for name, d in apart.items()}),
        )
        for k, value in enumerate(overalls, start=1)
    ]  # fmt: skip
    best = max(made, key=lambda item: item.critique.overall, default=None)
    return enhancement("p").model_copy(update={
        "iterations": made, "total_iterations": len(made), "stop_reason": reason,
        "final_score": best.critique if best else None,
    })  # fmt: skip


def times(start: float, generate: float = 2.0, *, enhance: float = 1.0) -> dict[str, float]:
    return {
        "enhance_start": 0.0, "enhance": enhance, "wait": start - enhance, "generate_start": start,
        "generate": generate, "score_start": start + generate, "score": 0.25,
    }  # fmt: skip


def run_of(folder, scenes: int = 3, count: int = 4, *, rounds=(50.0, 70.0), **over) -> StoryResult:
    """A run with everything that a chart can show."""
    path = shot(folder, 1, 1)
    prompt, agent = over.pop("prompt", "A keeper"), over.pop("agent", "acme/llm")
    made = []
    for n in range(1, scenes + 1):
        values = [30.0 + 10 * ((n + 3 * k) % 6) for k in range(count)]
        best = values.index(max(values))
        own = [
            variation(path, selected=k == best, rank=k + 1, scores=ImageScores(
                metrics={"clip_score": v, "aesthetic": v / 2}, overall=v,
                models={"clip_score": "acme/clip", "aesthetic": "acme/taste"}))
            for k, v in enumerate(values)
        ]  # fmt: skip
        scene = scene_of(folder, n, own, prompt=prompt, agent=agent, timings=times(2.5 * n - 1.0))
        done = iterations_of(*rounds).model_copy(update={"director": agent, "critic": agent})
        made.append(scene.model_copy(update={"enhancement": done}))
    settings = {"quality_threshold": 45.0, "max_enhancement_iterations": 4}
    settings |= over.pop("settings", {})
    total = {"total": 2.5 * scenes + 1.5}
    return story_of(made, settings=settings, timings=total, **over)


def drawn_again(*scenes: object) -> list[Event]:
    """A history in which these scenes were drawn again, one by one."""
    return [Event(kind="rerun", after={"scenes": [number]}) for number in scenes]


def with_scenes(result: StoryResult, *scenes: SceneResult) -> StoryResult:
    return result.model_copy(update={"scenes": list(scenes)})


def changed(scene: SceneResult, **update) -> SceneResult:
    return scene.model_copy(update=update)


# every chart


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize(("scenes", "count", "rounds"), sampled([
    (1, 1, 1), (1, 20, 10), (3, 4, 2), (12, 20, 4), (12, 4, 10),
], 3))  # fmt: skip
def test_a_chart_is_small_and_sound(tmp_path, chart, scenes, count, rounds):
    scores = [40.0 + 5 * k for k in range(rounds)]
    view = chart(run_of(tmp_path, scenes, count, rounds=scores))
    assert len(str(view)) <= 40_000
    reader = read(view)
    assert len(reader.all("img")) == 1 and len(reader.all("figcaption")) == 1
    if "svg" in Plain(view).src[:20]:
        ElementTree.fromstring(drawing(view))
    else:
        image = Image.open(BytesIO(base64.b64decode(Plain(view).src.split(",", 1)[1])))
        assert image.width >= 7.6 * 72


@pytest.mark.parametrize(("chart", "text"), sampled(product(CHARTS, HOSTILE), 11))
def test_no_text_of_a_result_harms_a_chart(tmp_path, chart, text):
    scores = ImageScores(metrics={text: 50.0, f"b{text}": None}, overall=50.0, models={text: text},
                         notes={text: text})  # fmt: skip
    own = [variation(shot(tmp_path, 1, 1), selected=True, scores=scores, model_name=text)]
    scene = scene_of(tmp_path, 1, own, prompt=text, sent_prompt=text, warnings=[text],
                     agent=f"sandbox-{text}", timings=times(2.0) | {text: 3.0})  # fmt: skip
    made = iterations_of(50.0).model_copy(update={"director": f"sandbox-{text}"})
    settings = {"quality_threshold": text, "max_enhancement_iterations": text}
    result = story_of([changed(scene, enhancement=made)], title=text, settings=settings,
                      history=drawn_again(1, text), timings={"total": 5.0})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = chart(result)
    assert read(view).words
    assert "sandbox" in alt(view)


@pytest.mark.parametrize("chart", CHARTS)
def test_a_drawing_fetches_nothing_and_runs_nothing(tmp_path, chart):
    source = drawing(chart(run_of(tmp_path)))
    tree = ElementTree.fromstring(source)
    names = {e.tag.removeprefix(SVG) for e in tree.iter()}
    assert names <= {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clipPath",
                     "rect", "pattern"}  # fmt: skip
    for e in tree.iter():
        for name, value in e.attrib.items():
            assert not name.lower().startswith("on")
            if name.endswith("href"):
                assert value.startswith("#")
            assert not re.search(r"url\((?!#)", value)
    assert "@import" not in source and "<!ENTITY" not in source


@pytest.mark.parametrize("chart", CHARTS)
def test_what_a_drawing_refers_to_is_there(tmp_path, chart):
    tree = ElementTree.fromstring(drawing(chart(run_of(tmp_path))))
    ids = [e.attrib["id"] for e in tree.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    for e in tree.iter():
        for value in e.attrib.values():
            for name in re.findall(r"url\(#([^)]+)\)|^#([0-9a-z]{8,})$", value):
                assert "".join(name) in ids


@pytest.mark.parametrize("chart", CHARTS)
def test_the_sandbox_is_marked_in_words_and_in_the_drawing(tmp_path, chart):
    real, marked = chart(run_of(tmp_path)), chart(run_of(tmp_path, agent="sandbox-x", sandbox=True))
    assert "sandbox" not in str(real) and "sandbox" not in drawing(real)
    assert "sandbox-x" in read(marked).words and "sandbox" in alt(marked)
    assert any("sandbox" in text for text in written(marked))


@pytest.mark.parametrize("chart", CHARTS)
def test_an_empty_chart_is_words_and_still_marked(tmp_path, chart):
    image = shot(tmp_path, 0, 1)
    result = story_of([carried(tmp_path, k, image) for k in (1, 2)], image=image, sandbox=True)
    reader = read(chart(result))
    assert "sandbox" in reader.words
    assert len(reader.all("img")) == (chart is iteration_histogram)


@pytest.mark.all
@pytest.mark.parametrize("chart", CHARTS)
def test_records_of_another_class_will_do(tmp_path, chart):
    result = run_of(tmp_path)
    twin = SimpleNamespace(**{name: getattr(result, name) for name in type(result).model_fields})
    twin.scenes = [
        SimpleNamespace(**{name: getattr(s, name) for name in type(s).model_fields})
        for s in result.scenes
    ]
    assert str(chart(twin)) == str(chart(result))


@pytest.mark.all
@pytest.mark.parametrize("chart", CHARTS)
def test_a_result_read_from_disk_gives_the_same_bytes(tmp_path, chart):
    result = run_of(tmp_path)
    result.save(tmp_path / "run.json")
    first = str(chart(result))
    assert str(chart(result)) == first
    assert str(chart(StoryResult.load(tmp_path / "run.json"))) == first


def in_a_fresh_process(code: str, *arguments: str, seed: str = "0") -> str:
    environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "MPLBACKEND": "TkAgg"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          check=True, env=environment)  # fmt: skip
    return done.stdout.strip()


EVERY = "from refimg.view import *; charts = [iteration_histogram, dimension_rise, " \
        "score_distributions, timeline]; from refimg.pipeline import StoryResult; import sys, " \
        "hashlib; result = StoryResult.load(sys.argv[1]); made = [str(c(result)) for c in charts]; "


@pytest.mark.all
def test_another_process_gives_the_same_bytes(tmp_path):
    run_of(tmp_path, 12, 20).save(tmp_path / "run.json")
    code = EVERY + "print(hashlib.sha256(''.join(made).encode()).hexdigest())"
    first, second = (in_a_fresh_process(code, str(tmp_path / "run.json"), seed=s) for s in "12")
    assert len(first) == 64 and first == second


def test_pyplot_is_never_imported(tmp_path):
    run_of(tmp_path).save(tmp_path / "run.json")
    code = EVERY + "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    assert in_a_fresh_process(code, str(tmp_path / "run.json")) == "True False"


@pytest.mark.all
def test_the_style_of_the_notebook_is_left_alone_and_does_not_matter(tmp_path):
    import matplotlib

    result = run_of(tmp_path)
    before = [str(chart(result)) for chart in CHARTS]
    own = {"text.color": "red", "font.size": 30, "text.usetex": True, "savefig.dpi": 7,
           "axes.facecolor": "black", "savefig.bbox": "tight"}  # fmt: skip
    with matplotlib.rc_context(own):
        held = copy.copy(dict(matplotlib.rcParams))
        assert [str(chart(result)) for chart in CHARTS] == before
        assert dict(matplotlib.rcParams) == held


def test_charts_of_several_threads_do_not_disturb_each_other(tmp_path):
    import matplotlib

    result, made, held = run_of(tmp_path), [], dict(matplotlib.rcParams)
    once = str(score_distributions(result))
    threads = [threading.Thread(target=lambda: made.append(str(score_distributions(result))))
               for _ in range(6)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [once] * 6 and dict(matplotlib.rcParams) == held


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_leaves_the_records_as_they_were(tmp_path, chart):
    result = run_of(tmp_path)
    before = result.model_dump_json()
    chart(result)
    assert result.model_dump_json() == before


async def test_charts_of_a_real_run(tmp_path):
    pipeline = Pipeline(
        director=director(), critic=critic(40, 70, 90), image_model=FakeImages(),
        scorers=[FakeScorer()], max_concurrency=4,
    )  # fmt: skip
    story = Story(scenes=[Scene(prompt=f"scene {k}") for k in (1, 2, 3)])
    result = await pipeline.run(story, generation_id="run", output_dir=tmp_path / "images")
    again = await pipeline.rerun(result, 3)
    for chart in CHARTS:
        assert alt(chart(result)) and alt(chart(again))
    assert "kept" not in Plain(timeline(result)).text
    assert "2 scenes kept from an earlier run" in alt(timeline(again))
    second = await pipeline.rerun(result, 2)
    await asyncio.sleep(0.2)  # runs are told apart by when their images came
    newest = await pipeline.rerun(second, 3)
    assert "2 scenes kept from an earlier run" in alt(timeline(newest))
    newest = await pipeline.rerun(again, 2)
    assert "1 scene kept from an earlier run" in alt(timeline(newest))


# iterations


def iterations_run(folder, *given: tuple[int, str], **settings) -> StoryResult:
    result = run_of(folder, len(given), 1, settings=settings)
    made = [iterations_of(*range(50, 50 + n), reason=why) for n, why in given]
    pairs = zip(result.scenes, made, strict=True)
    return with_scenes(result, *(changed(s, enhancement=e) for s, e in pairs))


def test_the_histogram_counts_rounds_and_reasons(tmp_path):
    given = [(1, "threshold"), (3, "converged"), (0, "failed"), (3, "threshold"), (2, "error")]
    view = iteration_histogram(iterations_run(tmp_path, *given))
    words = alt(view)
    mean = statistics.fmean(n for n, _ in given)
    for said in (
        "5 scenes", "1 scene with 0 iterations (1 failed)",
        "1 scene with 1 iteration (1 threshold)", "1 scene with 2 iterations (1 error)",
        "2 scenes with 3 iterations (1 threshold · 1 converged)",
        f"{mean:.1f} iterations per scene", "4 allowed", "2 threshold · 1 converged",
    ):  # fmt: skip
        assert said in words
    assert {"0", "1", "2", "3", "4", "1 threshold · 1 converged"} <= set(written(view))


def test_every_bar_says_its_reasons_in_words(tmp_path):
    reasons = ["threshold", "converged", "max_iterations", "error", "failed", "skipped"]
    view = iteration_histogram(iterations_run(tmp_path, *((k, r) for k, r in enumerate(reasons))))
    assert {f"1 {reason}" for reason in reasons} <= set(written(view))


def test_the_axis_goes_to_what_was_allowed_or_to_what_was_taken(tmp_path):
    few = iterations_run(tmp_path, (1, "threshold"), max_enhancement_iterations=10)
    assert {"0", "10"} <= set(written(iteration_histogram(few)))
    more = iterations_run(tmp_path, (6, "converged"), max_enhancement_iterations=2)
    assert "6" in written(iteration_histogram(more))
    unknown = few.model_copy(update={"settings": {}})
    assert "allowed" not in alt(iteration_histogram(unknown))
    absurd = few.model_copy(update={"settings": {"max_enhancement_iterations": 1e12}})
    assert iteration_histogram(absurd)


@pytest.mark.parametrize("chart", [
    *CHARTS[:3], pytest.param(timeline, marks=pytest.mark.all),
])  # fmt: skip
def test_a_hundred_scenes_still_say_sandbox(tmp_path, chart):
    words = alt(chart(run_of(tmp_path, 100, 1, agent="sandbox-x", sandbox=True)))
    assert len(words) < 2700 and words.endswith("(sandbox · not from real models.)")


def test_a_hundred_scenes_fit_without_their_numbers(tmp_path):
    view = iteration_histogram(iterations_run(tmp_path, *[(2, "threshold")] * 100))
    assert "100 scenes with 2 iterations (100 threshold)" in alt(view)
    assert len(str(view)) <= 40_000


# what the iterations brought


def test_the_rise_is_from_the_first_round_to_the_one_that_won(tmp_path):
    result = run_of(tmp_path, 2)
    made = [iterations_of(50, 80, 60), iterations_of(40, 45)]
    result = with_scenes(result, *(changed(s, enhancement=e)
                                   for s, e in zip(result.scenes, made, strict=True)))  # fmt: skip
    words, won = alt(dimension_rise(result)), [e.final_score for e in made]
    for name in (*DIMENSIONS, "overall"):
        first = statistics.fmean(e.iterations[0].critique.scores[name] for e in made)
        last = statistics.fmean(critique.scores[name] for critique in won)
        assert f"{name.replace('_', ' ')} from {first:.1f} to {last:.1f}" in words
    assert "scene 1 iteration 2, scene 2 iteration 2" in words
    assert "overall 45 → 62" in written(dimension_rise(result))


def test_the_earlier_of_two_equal_rounds_won(tmp_path):
    result = run_of(tmp_path, 1, rounds=(50.0, 70.0, 70.0))
    assert "scene 1 iteration 2" in alt(dimension_rise(result))


def test_a_scene_without_a_round_is_counted_in_words(tmp_path):
    result = run_of(tmp_path, 3)
    failed = changed(result.scenes[1], enhancement=iterations_of(reason="failed"))
    result = with_scenes(result, result.scenes[0], failed, result.scenes[2])
    view = dimension_rise(result)
    assert "mean of 2 scenes" in alt(view) and "1 scene without a usable iteration" in alt(view)
    assert "1 scene without a usable iteration" in read(view).words


def test_one_round_is_no_rise(tmp_path):
    texts = written(dimension_rise(run_of(tmp_path, 1, rounds=(50.0,))))
    assert "overall 50" in texts and not any("→" in text for text in texts)


# scores


def test_the_spread_is_told_with_its_numbers(tmp_path):
    result = run_of(tmp_path, 3)
    words = alt(score_distributions(result))
    shown = [v for s in result.scenes for v in s.variations]
    assert f"Scores of {len(shown)} images" in words
    for name in ("overall", "clip_score", "aesthetic"):
        values = [(v.scores.metrics | {"overall": v.scores.overall})[name] for v in shown]
        pairs = zip(values, shown, strict=True)
        chosen = ", ".join(f"{value:.1f}" for value, v in pairs if v.selected)
        assert (f"{name}: {len(values)} of {len(values)} scored, {min(values):.1f} to "
                f"{max(values):.1f}, median {statistics.median(values):.1f}, selected {chosen}"
                ) in words  # fmt: skip


def test_the_threshold_is_drawn_and_counted(tmp_path):
    result = run_of(tmp_path, 3, 2)
    chosen = [v.scores.overall for s in result.scenes for v in s.variations if v.selected]
    threshold = statistics.median(chosen)
    result = result.model_copy(update={"settings": {"quality_threshold": threshold}})
    view, below = score_distributions(result), sum(value < threshold for value in chosen)
    words = f"{below} of {len(chosen)} selected below the quality threshold {threshold:g}"
    assert words in alt(view)
    assert f"quality threshold {threshold:g}" in written(view)
    bare = score_distributions(result.model_copy(update={"settings": {}}))
    assert "threshold" not in alt(bare) + drawing(bare)


@pytest.mark.parametrize("threshold", [0, 100, 0.0, 49.5])
def test_a_threshold_at_the_edge_is_drawn(tmp_path, threshold):
    view = score_distributions(run_of(tmp_path, 1, settings={"quality_threshold": threshold}))
    assert f"quality threshold {threshold:g}" in written(view)


def test_unscored_pictures_are_no_zeros(tmp_path):
    result = run_of(tmp_path, 1, 4)
    own = list(result.scenes[0].variations)
    lost = ImageScores(metrics={"clip_score": None, "aesthetic": 12.0}, overall=None)
    own[0] = own[0].model_copy(update={"scores": lost, "rank": None, "selected": False})
    view = score_distributions(with_scenes(result, changed(result.scenes[0], variations=own)))
    values = [v.scores.overall for v in own[1:]]
    assert f"overall: 3 of 4 scored, {min(values):.1f} to" in alt(view)
    assert "1 of 4 images unscored" in alt(view)
    assert "1 of 4 images unscored" in read(view).words
    assert "aesthetic: 4 of 4 scored" in alt(view)


def test_all_unscored_is_said_in_every_row(tmp_path):
    none = ImageScores(metrics={"clip_score": None}, overall=None, notes={"overall": "no weights"})
    own = [variation(shot(tmp_path, 1, k), selected=k == 1, rank=None, scores=none) for k in (1, 2)]
    view = score_distributions(story_of([scene_of(tmp_path, 1, own, source="first")]))
    assert "2 of 2 images unscored" in alt(view)
    assert "overall: no scores. clip_score: no scores" in alt(view)
    assert written(view).count("no image has this score") == 2


def test_a_metric_called_overall_does_not_hide_the_overall(tmp_path):
    scores = ImageScores(metrics={"overall": 10.0}, overall=77.0)
    own = [variation(shot(tmp_path, 1, 1), selected=True, scores=scores)]
    words = alt(score_distributions(story_of([scene_of(tmp_path, 1, own)])))
    assert "77.0" in words


# what ran when


def test_the_timeline_tells_every_part(tmp_path):
    result = run_of(tmp_path, 3)
    view, words = timeline(result), alt(timeline(result))
    work = sum(s.timings[k] for s in result.scenes for k in ("enhance", "generate", "score"))
    assert f"{work:.1f} s of work in {result.timings['total']:.1f} s" in words
    assert "scene 2: enhance 1.0 s, wait 3.0 s, generate 2.0 s, score 0.25 s" in words
    assert f"end {result.timings['total']:.1f} s" in written(view)
    assert {"scene 1", "scene 3", "seconds", "wait for the chain"} <= set(written(view))


def test_the_overlap_is_told(tmp_path):
    result = run_of(tmp_path, 2)
    slow = changed(result.scenes[1], timings=times(6.0, enhance=4.0))
    words = alt(timeline(with_scenes(result, result.scenes[0], slow)))
    assert "the last prompt was ready 2.5 s after drawing had begun" in words
    assert "had begun" not in alt(timeline(result))


@pytest.mark.parametrize("timings", [
    {}, {"generate": 3.0}, {"enhance_start": 1.0}, {"enhance_start": float("nan"), "enhance": 1.0},
    {"generate_start": float("inf"), "generate": 1.0, "wait": 2.0},
    {"score_start": 0.0, "score": -1.0},
])  # fmt: skip
def test_a_scene_without_usable_timings_says_so(tmp_path, timings):
    result = run_of(tmp_path, 2)
    second = changed(result.scenes[1], timings=timings)
    view = timeline(with_scenes(result, result.scenes[0], second))
    assert "1 scene without timings" in alt(view) and "1 scene without timings" in read(view).words
    assert "no timings" in written(view)


def test_a_scene_that_broke_off_shows_what_it_has(tmp_path):
    result = run_of(tmp_path, 2)
    broken = {"enhance_start": 0.0, "enhance": 1.5, "wait": 0.5, "generate_start": 2.0}
    image = result.scenes[0].reference
    view = timeline(with_scenes(result, result.scenes[0],
                                carried(tmp_path, 2, image, timings=broken)))  # fmt: skip
    assert "scene 2: enhance 1.5 s, wait 0.50 s" in alt(view).rstrip(".")
    assert "without timings" not in alt(view)


@pytest.mark.parametrize("total", [{}, {"total": 0.0}, {"total": float("nan")}, {"total": 1.0}])
def test_the_axis_holds_every_bar_whatever_the_total_says(tmp_path, total):
    result = run_of(tmp_path, 2).model_copy(update={"timings": total})
    end = max(s.timings["score_start"] + s.timings["score"] for s in result.scenes)
    assert f"in {end:.1f} s" in alt(timeline(result))


def drawn_at(scene: SceneResult, moment: datetime) -> SceneResult:
    stamped = [
        v.model_copy(update={"image": v.image.model_copy(update={"timestamp": moment.isoformat()})})
        for v in scene.variations
    ]
    return changed(scene, variations=stamped)


def test_scenes_of_an_earlier_run_have_no_bars(tmp_path):
    result = run_of(tmp_path, 4, history=drawn_again(2, 3, 4, 4))
    moments = [0.0, 60.0, 3602.0 + 2.5 * 3 - 1.0, 3602.0 + 2.5 * 4 - 1.0]
    scenes = [drawn_at(s, NOON + timedelta(seconds=t))
              for s, t in zip(result.scenes, moments, strict=True)]  # fmt: skip
    view = timeline(with_scenes(result, *scenes))
    assert "2 scenes kept from an earlier run" in alt(view)
    assert "scene 1:" not in alt(view) and "scene 2:" not in alt(view)
    assert "scene 3:" in alt(view) and "scene 4:" in alt(view)
    assert written(view).count("kept from an earlier run") == 2


@pytest.mark.parametrize("stamp", ["", "yesterday", "2026-01-01", "2026-01-01T00:00:00"])
def test_a_stamp_that_cannot_be_read_breaks_nothing(tmp_path, stamp):
    result = run_of(tmp_path, 2, history=drawn_again(2))
    own = [v.model_copy(update={"image": v.image.model_copy(update={"timestamp": stamp})})
           for v in result.scenes[1].variations]  # fmt: skip
    second = changed(result.scenes[1], variations=own)
    view = timeline(with_scenes(result, result.scenes[0], second))
    assert "1 scene kept from an earlier run" in alt(view) and "scene 2:" in alt(view)


def test_a_chart_survives_json(tmp_path):
    for chart in CHARTS:
        assert json.loads(json.dumps(str(chart(run_of(tmp_path)))))
