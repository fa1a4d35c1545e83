"""The report: one file that shows everything, asks nobody, runs nothing, and tells no lies."""

from __future__ import annotations

import json
import os
import re
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from refimg.engine.protocols import visible_text
from refimg.engine.results import Event
from refimg.enhance import Critique, ImagePromptEnhancementResult, Iteration, Usage
from refimg.gallery import Gallery
from refimg.pipeline import Pipeline, Progress, StoryResult, choose
from refimg.validate import best_of_k, curve_chart, distribution_chart, runs_table
from refimg.view import (
    dimension_rise,
    iteration_histogram,
    progress_bar,
    report,
    save_table,
    score_distributions,
    timeline,
)

from .browser import Trouble, barriers, opened, served
from .fakes import FakeImages
from .test_view import (
    BIDI,
    FEW,
    HOSTILE,
    KINDS,
    VOID,
    carried,
    chain_of,
    scene_of,
    shot,
    story_of,
    variation,
    views,
)

SCRIPTED = re.compile(r"<(?:script|iframe|object|embed|form|link|base)\b|\son\w+\s*=", re.I)


class Page(HTMLParser):
    """Elements, texts and headings of a page; every element is closed where it should be."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(path.read_text("utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID | {"meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & {*self.open}:
            self.words.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:40]}")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "secret-folder"
    made.mkdir()
    return made


def iteration(number: int, prompt: str, usage: Usage | None = None) -> Iteration:
    scores = dict.fromkeys(("completeness", "specificity", "professionalism", "cinematography",
                            "brand_alignment"), 70.0 + number)  # fmt: skip
    said = Critique(**scores, critique=f"judged {number}", improvements=[f"wish {number}"])
    return Iteration(number=number, enhanced_prompt=prompt, critique=said, seconds=1.0, usage=usage)


def enhanced(scene, *usages: Usage | None, reason="threshold", **over):
    """The scene with rounds of enhancement of those usages."""
    rounds = [iteration(n, f"{scene.prompt}, version {n}", u) for n, u in enumerate(usages, 1)]
    made = ImagePromptEnhancementResult(
        original_prompt=scene.prompt, final_prompt=f"{scene.prompt} in the rain, 35 mm",
        iterations=rounds, final_score=None, total_iterations=len(rounds), stop_reason=reason,
        director="acme/llm", critic="acme/llm", seconds=2.0, **over,
    )  # fmt: skip
    return scene.model_copy(update={"enhancement": made})


def costs(page: Page) -> dict[str, list[str]]:
    """The rows of the table of costs."""
    told = page.text.split("What each scene cost", 1)[1].split("From start to end", 1)[0]
    numbers = r"(?:unknown|(?:at least )?[\d,.]+)"
    rows = re.findall(rf"(scene \d+|run) ((?:{numbers} ?){{6}})", told)
    return {name: re.findall(numbers, row) for name, row in rows}


# what it says


def test_a_report_shows_each_scene_and_the_run(folder):
    result = chain_of(folder, 2, count=2)
    spent = {"timings": {"enhance_start": 0.0, "enhance": 1.0}}
    scenes = [enhanced(s, Usage(input_tokens=10, output_tokens=5)).model_copy(update=spent)
              for s in result.scenes]  # fmt: skip
    scenes[1] = scenes[1].model_copy(update={"warnings": ["below threshold: 12.0 < 30"]})
    result = result.model_copy(update={
        "scenes": scenes, "settings": {"seed": 7, "weights": None, "chain": "previous"},
        "versions": {"refimg": "9.9"}, "timings": {"total": 12.5}})
    page = Page(report(choose(result, 1, 2, "the quieter image"), folder / "r.html"))
    for words in ("A keeper on a beach", "in the rain,", "A keeper on a beach, 35 mm", "judged 1",
                  "wish 1", "threshold", "below threshold: 12.0 < 30", "rank 2", "clip_score 98.0",
                  "acme/clip @ 1", "linear-3", "seed 7", "refimg 9.9", "12.5 seconds",
                  "the quieter image", "chosen by a person", "0" * 64, "123456"):
        assert words in page.text, words  # fmt: skip
    assert len(page.all("img")) == 2 + 2 * 2 + 4
    assert page.all("del") == [] and len(page.all("ins")) >= 2


def test_what_is_not_known_is_unknown_and_never_zero(folder):
    known, more, lost = (scene_of(folder, n, count=1) for n in (1, 2, 3))
    known = enhanced(known, Usage(input_tokens=1000, output_tokens=200), cost=0.5)
    known = known.model_copy(update={"variations": [
        variation(known.reference, selected=True, cost=0.25)],
        "timings": {"enhance": 1.0, "generate": 2.0, "score": 0.5}})  # fmt: skip
    more = enhanced(more, Usage(input_tokens=40, output_tokens=2), reason="error")
    lost = enhanced(lost, Usage(input_tokens=40, output_tokens=2), None)
    rows = costs(Page(report(story_of([known, more, lost]), folder / "r.html")))
    assert rows["scene 1"] == ["1,200", "1", "1.0", "2.0", "0.5", "0.7500"]
    assert rows["scene 2"] == ["at least 42", "1", *["unknown"] * 4]
    assert rows["scene 3"] == ["unknown", "1", *["unknown"] * 4]
    assert rows["run"] == ["unknown", "3", *["unknown"] * 4]


def test_a_run_without_anything_still_has_a_report(folder):
    path = shot(folder, 1, 1)
    result = story_of([carried(folder, 1, path), carried(folder, 2, folder / "gone.png")])
    page = Page(report(result, folder / "r.html"))
    assert "gone.png is missing or unreadable" in page.text
    assert "Not enhanced: skipped." in page.text


def test_it_stands_beside_the_pictures_or_where_it_should(folder):
    result = chain_of(folder, 1)
    assert report(result) == folder / "run_report.html"
    assert report(result, folder / "new" / "x.html").is_file()
    assert not list(folder.rglob("*.part"))
    with pytest.raises(ValueError, match="generation_id"):
        report(result.model_copy(update={"generation_id": "../../x"}))


def test_a_folder_is_no_place_for_it_and_nothing_is_left_behind(folder, monkeypatch):
    result = chain_of(folder, 1)
    place = folder / "page.html"
    place.mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=r"must be a file, got the folder .*page\.html"):
        report(result, place)
    assert sorted(folder.iterdir()) == before
    place.rmdir()
    place.write_text("the old one")
    monkeypatch.setattr("os.replace", Mock(side_effect=PermissionError("in use")))
    with pytest.raises(PermissionError):
        report(result, place)
    assert sorted(folder.iterdir()) == before and place.read_text() == "the old one"


def test_a_long_prompt_does_not_make_it_slow(folder):
    scene = scene_of(folder, 1, count=1, prompt="a " * 20_000, sent_prompt="b " * 20_000)
    page = Page(report(story_of([enhanced(scene, None)]), folder / "r.html"))
    assert page.text.count("b b b b") > 1000


def test_the_history_is_told_where_there_is_one(folder):
    result = chain_of(folder, 2, count=2)
    assert "History" not in Page(report(result, folder / "r.html")).text
    events = [
        Event(kind="choose", scene=1, variation=2, reason="a <b>calmer</b> sea",
              after={"variation": 2, "blind": True}),
        Event(kind="rerun", scene=2, at="2026-11-28T09:00:00+00:00", before={"prompt": "old"},
              after={"prompt": HOSTILE[0], "scenes": [2, 3], "settings": {"seed": 7}}),
        Event(kind="rescore", after={"weights": {"aesthetic": 1.0}, "changed": [1]}),
        Event(kind="edit", after={"scenes": 3, "variation": HOSTILE[1], "prompt": ["x"]}),
    ]  # fmt: skip
    page = Page(report(result.model_copy(update={"history": events}), folder / "r.html"))
    for words in ("History", "a <b>calmer</b> sea", "selected: v2", "decided without seeing",
                  "drawn again: scene 2, 3", HOSTILE[0], "another reference: scene 1",
                  "2026-11-28T09:00:00+00:00", "drawn again: scene 3", HOSTILE[1]):
        assert words in page.text, words  # fmt: skip


def test_a_stale_scene_says_so_and_is_counted(folder):
    result = choose(chain_of(folder, 3, count=2), 1, 2, "better light")
    page = Page(report(result, folder / "r.html"))
    assert result.scenes[1].warnings == [] and page.text.count(f"stale: {result.scenes[1].stale}")
    assert "2 warnings" in page.text


def test_without_matplotlib_the_charts_are_left_out_and_it_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(report(chain_of(folder, 2), folder / "r.html"))
    assert 'The charts are left out: matplotlib is not installed: pip install "refimg[notebook]".' \
        in page.text
    assert "Provenance" in page.text and "Enhancement iterations" not in page.text
    with pytest.raises(ImportError, match=r"refimg\[notebook\]"):
        iteration_histogram(chain_of(folder, 2))


# what it may do


@pytest.mark.parametrize("text", FEW)
def test_hostile_texts_stay_texts(folder, text):
    own = variation(shot(folder, 1, 1), selected=True, model_name=text, provider_id=text)
    scene = scene_of(folder, 1, [own], prompt=text, sent_prompt=text, warnings=[text], agent=text)
    scene = enhanced(scene, None, reason="error")
    said = iteration(1, text).critique.model_copy(update={"critique": text, "improvements": [text]})
    rounds = [iteration(1, text).model_copy(update={"critique": said})]
    made = scene.enhancement.model_copy(update={
        "iterations": rounds, "final_prompt": text, "negative_prompt": text})  # fmt: skip
    scene = scene.model_copy(update={"enhancement": made})
    result = story_of([scene], title=text, settings={text: text, "choices": [{"reason": text}]},
                      versions={text: text})  # fmt: skip
    path = report(result, folder / "r.html")
    page = Page(path)
    source = path.read_text("utf-8")
    tags = re.sub(r'="[^"]*"', '=""', "".join(re.findall(r"<[a-z][^>]*>", source)))
    assert not SCRIPTED.search(tags)
    assert not BIDI.search(source)
    assert len(page.all("img")) == 5 and page.all("title")
    assert "secret-folder" not in source


def test_its_policy_lets_nothing_out(folder):
    path = report(chain_of(folder, 2), folder / "r.html")
    page = Page(path)
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert {a["href"][0] for a in page.all("a")} == {"#"}
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {a["href"][1:] for a in page.all("a")} <= {*ids}


# in a browser


@pytest.fixture(scope="module")
def page():
    with opened() as page:
        yield page


def hostile_story(folder: Path) -> StoryResult:
    """A run with every hostile text as a prompt, with and without scores, warnings and rounds."""
    scenes = []
    texts = HOSTILE if os.environ.get("REFIMG_TEST_ALL") == "1" else [HOSTILE[n] for n in KINDS]
    for n, text in enumerate(texts, 1):
        spent = {"timings": {"generate_start": float(n), "generate": 1.0}}
        made = scene_of(folder, n, count=2, prompt=text, warnings=[text], agent="sandbox-x")
        scenes.append(enhanced(made, None).model_copy(update=spent))
    return story_of(scenes, title=HOSTILE[0], timings={"total": 30.0}, settings={"a": HOSTILE[1]})


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [
    (400, "dark"), pytest.param(1280, "light", marks=pytest.mark.all),
    pytest.param(1280, "dark", marks=pytest.mark.all),
    pytest.param(400, "light", marks=pytest.mark.all),
])
def test_it_can_be_read_by_everybody_and_runs_nothing(page, folder, scheme, width):
    report(hostile_story(folder), folder / "r.html")
    trouble, asked = Trouble(page), []
    page.on("dialog", lambda dialog: asked.append(dialog.message) or dialog.dismiss())
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    with served(folder) as url:
        page.goto(f"{url}/r.html", wait_until="load")
        page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true })")
        broken = "images => images.filter(i => !i.complete || !i.naturalWidth).length"
        assert page.eval_on_selector_all("img", broken) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not barriers(page)
        lost = "links => links.filter(a => !document.querySelector(a.getAttribute('href'))).length"
        assert page.eval_on_selector_all("a", lost) == 0
    assert not asked and not trouble.found
    assert HOSTILE[0] in page.title()


def every_view(folder: Path) -> list:
    """All views and charts of the hostile story, and of a study of it; the gallery's twin too."""
    result = hostile_story(folder)
    story = result.model_copy(update={"scenes": result.scenes[:1]})
    gallery = Gallery(Pipeline(None, None, FakeImages(), []), choose(story, 1, 2, HOSTILE[0]))
    gallery.veto(1, 1, HOSTILE[1])
    charts = [draw(result) for draw in
              (score_distributions, iteration_histogram, dimension_rise, timeline)]
    return [*views(result), *charts, gallery.static(), *studied(result)]


def studied(result: StoryResult) -> list:
    """What `validate` shows of two arms whose metrics have hostile names."""
    def renamed(scores):
        given = dict.fromkeys(HOSTILE[:12], 50.0)
        return scores.model_copy(update={"metrics": scores.metrics | given, "raw": given})

    scenes = [s.model_copy(update={"variations": [
        v.model_copy(update={"scores": renamed(v.scores)}) for v in s.variations]})
        for s in result.scenes]  # fmt: skip
    table = runs_table(result.model_copy(update={"scenes": scenes}))
    table = table.assign(arm=HOSTILE[3], score_text="original", chain="none")
    made = [distribution_chart(table), curve_chart(best_of_k(table))]
    assert all(escape(HOSTILE[0]) in str(chart) for chart in made)
    return made


@pytest.mark.all
@pytest.mark.slow
def test_no_view_runs_anything_even_where_no_policy_forbids_it(page, folder):
    shown = "".join(map(str, every_view(folder)))
    (folder / "v.html").write_text(f"<!doctype html><meta charset=utf-8>{shown}", "utf-8")
    trouble, asked = Trouble(page), []
    page.on("dialog", lambda dialog: asked.append(dialog.message) or dialog.dismiss())
    with served(folder) as url:
        page.goto(f"{url}/v.html", wait_until="load")
        words = page.inner_text("body")
        made = "document.querySelectorAll('script, style, [onerror], [src=x], a').length"
        assert page.evaluate(made) == 0
    assert not asked and not [f for f in trouble.found if "favicon" not in f and "404" not in f]
    for text in ("<img src=x onerror=alert(1)>", "</script>", r"$\frac{", "[/red]", "=HYPERLINK("):
        assert text in words, text


@pytest.mark.slow
def test_the_keyboard_and_paper_reach_everything(page, folder):
    scenes = [enhanced(s, None) for s in chain_of(folder, 2, count=4).scenes]
    report(story_of(scenes), folder / "r.html")
    page.emulate_media(color_scheme="dark")
    with served(folder) as url:
        page.goto(f"{url}/r.html", wait_until="load")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "to the content"
        page.locator("#scene-1 ~ details summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("#scene-1 ~ details").first.evaluate("d => d.open")
        page.emulate_media(media="print", color_scheme="dark")
        ink = page.evaluate("getComputedStyle(document.body).color")
        closed = page.locator("#scene-2 ~ details > div").first.evaluate("d => d.offsetHeight")
        page.set_viewport_size({"width": 680, "height": 1000})  # A4 without its margins
        figures, heads = page.locator("#scene-1 ~ div figure"), page.locator("th[scope=col]")
        tops = figures.evaluate_all("all => all.map(figure => figure.offsetTop)")
        highest = max(heads.evaluate_all("all => all.map(head => head.offsetHeight)"))
        wide = page.evaluate("document.documentElement.scrollWidth")
    assert ink == "rgb(31, 35, 40)"
    assert closed > 0
    assert len(tops) == 4 and len({*tops}) == 1
    assert highest < 25 and wide <= 680


# progress


def steps(count: int, **over) -> list[Progress]:
    return [Progress(stage="generate", message="Generating", scene=1, scenes=2,
                     percent=100 * n / count, **over) for n in range(count + 1)]  # fmt: skip


def test_a_bar_leaves_one_line(capsys):
    show = progress_bar()
    for step in steps(3):
        show(step)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"2 scenes in [\d.]+ s\n", out)
    assert "Generating: scene 1 of 2" in err


def test_a_bar_tells_the_cost_where_it_is_known(capsys):
    show = progress_bar()
    for step in steps(2, cost=0.125):
        show(step)
    out, err = capsys.readouterr()
    assert "0.1250 USD so far" in err
    assert out.endswith(", 0.1250 USD\n")


def test_a_run_can_be_watched(capsys, tmp_path):
    from .test_gallery import pipeline, story

    pipeline().run_sync(story(2), output_dir=tmp_path, on_progress=progress_bar())
    assert capsys.readouterr().out.startswith("2 scenes in ")


# tables

FORMULAS = ["=HYPERLINK(\"http://x\")", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "|calc",
            "\n=1", "＝1", "\ufeff=1", "\ufeff @x", *HOSTILE]  # fmt: skip


def test_a_csv_holds_nothing_that_runs_and_keeps_every_text(tmp_path):
    frame = pd.DataFrame({"text": FORMULAS, "=1": -1.5, "n": range(len(FORMULAS))})
    save_table(frame, tmp_path / "t.csv")
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)
    assert list(back.columns) == ["text", "'=1", "n"]
    for made, text in zip(back["text"], FORMULAS, strict=True):
        assert made.lstrip("\ufeff\t\n\r ")[0] not in "=+-@|％＝" and made.removeprefix("'") == text
    assert back["'=1"].eq(-1.5).all()


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_json_and_parquet_are_exact(tmp_path, kind):
    frame = pd.DataFrame({"text": FORMULAS, "score": [1.5, *[None] * (len(FORMULAS) - 1)]})
    save_table(frame, tmp_path / f"t.{kind}")
    if kind == "json":
        rows = json.loads((tmp_path / "t.json").read_text("utf-8"))
        assert [row["text"] for row in rows] == FORMULAS
        assert rows[1]["score"] is None
    else:
        assert pd.read_parquet(tmp_path / "t.parquet")["text"].tolist() == FORMULAS


def test_another_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.csv, \.json or \.parquet"):
        save_table(pd.DataFrame(), tmp_path / "t.xlsx")


def indexed() -> list[tuple[pd.DataFrame, list[str]]]:
    """Tables, and the columns that they have on disk."""
    table = pd.DataFrame({"=arm": ["=x", "b"], "story": [1, 2], "rate": [0.5, 1.0]})
    rates = table["rate"]
    return [
        (table, ["=arm", "story", "rate"]),
        (table[::-1], ["=arm", "story", "rate"]),
        (table.set_index("=arm"), ["=arm", "story", "rate"]),
        (table.set_index(["=arm", "story"]), ["=arm", "story", "rate"]),
        (rates.rename_axis("row").to_frame(), ["row", "rate"]),
        (pd.DataFrame({"rate": [0.5, 1.0]}, index=["=x", "b"]), ["index", "rate"]),
    ]


@pytest.mark.parametrize("frame, columns", indexed(), ids=range(len(indexed())))
def test_an_index_with_names_or_labels_is_kept(tmp_path, frame, columns):
    for kind in ("csv", "json", "parquet"):
        save_table(frame, tmp_path / f"t.{kind}")
    assert list(pd.read_parquet(tmp_path / "t.parquet").columns) == columns
    assert list(json.loads((tmp_path / "t.json").read_text("utf-8"))[0]) == columns
    back = pd.read_csv(tmp_path / "t.csv")
    assert list(back.columns) == [c.replace("=", "'=") for c in columns]
    assert not any(str(v).startswith("=") for v in back.iloc[:, 0])
    assert "index" not in frame.columns


def test_json_is_valid_whatever_a_cell_holds(tmp_path):
    odd = [np.inf, -np.inf, np.nan, pd.NA, pd.NaT, [1.0, np.nan, np.inf], {"a": np.nan, 2: [None]},
           np.array([[1, 2], [3, 4]]), np.array([1.5, np.nan]), (np.int64(2**60 + 1),), True, "=1",
           pd.Timestamp("2026-01-01"), [], {}, {1.5}]  # fmt: skip
    frame = pd.DataFrame({"v": pd.Series(odd, dtype=object)})
    save_table(frame, tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert [row["v"] for row in rows] == [
        *[None] * 5, [1.0, None, None], {"a": None, "2": [None]}, [[1, 2], [3, 4]], [1.5, None],
        [2**60 + 1], True, "=1", "2026-01-01 00:00:00", [], {}, [1.5]]  # fmt: skip
    floats = pd.DataFrame({"x": [1.0, np.inf, np.nan]})
    save_table(floats, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == [{"x": 1.0}, {"x": None}, {"x": None}]


@pytest.mark.parametrize("value", [b"=1+1", [b"\xff"], {"a": bytearray(b"x")}, np.bytes_(b"x")])
def test_bytes_are_refused_by_the_name_of_their_column(tmp_path, value):
    place = tmp_path / "t.json"
    place.write_text("the old one")
    with pytest.raises(ValueError, match=r"column 'raw' must be .* got byte"):
        save_table(pd.DataFrame({"raw": [value]}), place)
    assert [*tmp_path.iterdir()] == [place] and place.read_text() == "the old one"


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_table_that_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path, kind):
    place = tmp_path / f"t.{kind}"
    place.write_text("the old one")
    frame = pd.DataFrame({"m": pd.Series(["ok", "half \ud800"], dtype=object)})
    with pytest.raises(ValueError, match="surrogates"):
        save_table(frame, place)
    assert [*tmp_path.iterdir()] == [place] and place.read_text() == "the old one"
    with pytest.raises(ValueError, match="got the folder"):
        save_table(frame, (tmp_path / f"x.{kind}").mkdir() or tmp_path / f"x.{kind}")


# what was saved


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_saved_result_holds_what_can_be_seen_of_a_text_exactly(folder, text):
    result = chain_of(folder, 1)
    chosen = choose(result, 1, 1, text)
    chosen.save(folder / "r.json")
    assert StoryResult.load(folder / "r.json").history[0].reason == visible_text(text)


# logs


@pytest.mark.parametrize("text", FEW)
def test_a_log_line_of_a_run_is_one_line_without_control_characters(tmp_path, caplog, text):
    from refimg.pipeline import Scene, Story

    from .fakes import FakeImages, FakeScorer, picture
    from .test_gallery import pipeline

    def draw(request, number):
        return RuntimeError(text) if number == 1 else picture()

    p = pipeline(FakeImages(draw, name=f"x{text[:200]}"))
    p.scorers = [FakeScorer("pickscore", lambda image, prompt: RuntimeError(text))]
    with caplog.at_level("INFO"):
        p.run_sync(Story(scenes=[Scene(prompt=f"{text} x")]), output_dir=tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert any("unscored" in line for line in lines)
    assert not [line for line in lines if re.search("[\x00-\x1f\x7f-\x9f\u202e\u2066]", line)]
