"""What must hold for every view: nothing harmful, fetched, hidden or broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from refimg.enhance import ImagePromptEnhancementResult
from refimg.generate import ImageGenerationResult
from refimg.pipeline import Scene, SceneResult, Story, StoryResult, Variation, choose
from refimg.score import ImageScores
from refimg.view import (
    Html,
    chain_strip,
    contact_sheet,
    element,
    sandbox_models,
    score_table,
    thumbnail,
    variation_grid,
    visible,
)

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "</bdi></div></table><style>*{display:none}</style>",
    "<!-- ",
    "<![CDATA[",
    "&lt;b&gt; &amp;lt; &#60;i&#62;",
    "\" onmouseover=\"alert(1)\" style='position:fixed'",
    "javascript:alert(1) data:text/html,<script>",
    r"$\frac{ $$x$$ \(y\) {{ template }} {% raw %}",
    r"$\frac{",
    "[/red] [bold]text[/bold] [link=http://example.org]link[/link]",
    '=HYPERLINK("http://example.org","text")',
    "\x1b[31mred\x1b[0m \x1b]8;;http://example.org\x07link",
    "abc\u202egnp.exe \u2066x\u2069 \u200f",
    "nul\x00l",
    "tag\U000e0041\U000e0042 zero\u200bwidth \ufeff",
    "line\u2028separator\x85next",
    "A" * 20_000,
    "灯台守 🏮 مرحبا é",
]
# Two texts of different kinds (a closed element, an invisible character) for `make test`,
# where a single text takes long; the others for `make test-all`.
KINDS = (2, 15)
FEW = [pytest.param(text, id=str(n), marks=() if n in KINDS else pytest.mark.all)
       for n, text in enumerate(HOSTILE)]  # fmt: skip
BIDI = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
VOID = {"img", "br"}
ALLOWED = {
    "div", "span", "strong", "bdi", "figure", "figcaption", "img", "ul", "li", "details",
    "summary", "table", "caption", "thead", "tbody", "tr", "th", "td", "sup",
    "ins", "del", "br", "ol",
}  # fmt: skip
ATTRIBUTES = {"class", "style", "src", "alt", "role", "aria-label", "scope", "tabindex"}


class Reader(HTMLParser):
    """Collects elements and text, and holds that every element is closed where it should be."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:40]}")

    def handle_decl(self, decl):
        raise AssertionError(f"a declaration: {decl[:40]}")

    unknown_decl = handle_pi = handle_decl

    @property
    def words(self) -> str:
        return " ".join(self.text)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(view: Html) -> Reader:
    """The view parsed, after what must hold for every view."""
    source = str(view)
    reader = Reader(source)
    assert {tag for tag, _ in reader.elements} <= ALLOWED
    for tag, attributes in reader.elements:
        assert set(attributes) <= ATTRIBUTES, (tag, attributes)
        style = attributes.get("style", "").lower()
        assert not re.search(r"url\(|@import|expression|position\s*:\s*fixed", style)
        assert not re.search(r"background[^;]*:\s*(#f{3,6}\b|white)", style)
    for image in reader.all("img"):
        assert image["src"].startswith(("data:image/webp;base64,", "data:image/svg+xml;base64,"))
        assert image["alt"].strip()
    for tag, attributes in reader.elements:
        if attributes.get("role") == "img":
            assert attributes["aria-label"].strip(), tag
    assert not BIDI.search(source)
    source.encode("utf-8")
    json.dumps(source).encode("utf-8")
    return reader


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder whose name would be recognised anywhere in a view."""
    made = tmp_path / "secret-folder"
    made.mkdir()
    return made


def shot(folder: Path, scene: int, number: int, size=(320, 180), exists: bool = True) -> Path:
    path = folder / f"run_scene_{scene:02d}_v{number}.png"
    if exists:
        Image.new("RGB", size, (40 * number % 256, 60 * scene % 256, 120)).save(path)
    return path


def scored(overall: float | None = 50.0, model: str = "acme/clip @ 1", **notes: str) -> ImageScores:
    return ImageScores(
        metrics={"clip_score": overall, "aesthetic": None if "aesthetic" in notes else 61.25},
        overall=overall,
        models={"clip_score": model, "aesthetic": model},
        calibrations={"clip_score": "linear-3"},
        notes=notes,
    )


def variation(
    path: Path, *, selected=False, rank=1, scores=None, references=(), **over
) -> Variation:
    image = {
        "image_path": path, "model_name": "acme/images", "prompt": "p", "seed": 123456,
        "aspect_ratio": "16:9", "references": tuple(references), "width": 320, "height": 180,
        "sha256": "0" * 64, "generation_time": 1.0, "timestamp": "2026-01-01T00:00:00+00:00",
    } | over  # fmt: skip
    scores = scored() if scores is None else scores
    return Variation(
        image=ImageGenerationResult(**image), scores=scores, rank=rank, selected=selected
    )


def enhancement(prompt: str, agent: str = "acme/llm") -> ImagePromptEnhancementResult:
    return ImagePromptEnhancementResult(
        original_prompt=prompt, final_prompt=prompt, iterations=[], final_score=None,
        total_iterations=0, stop_reason="skipped", director=agent, critic=agent, seconds=0.0,
    )  # fmt: skip


def scene_of(
    folder: Path, number: int = 1, variations: list[Variation] | None = None, *, count: int = 4,
    prompt: str = "A keeper on a beach", reference: Path | None = None, source: str = "ranked",
    agent: str = "acme/llm", references=(), size=(320, 180), **over,
) -> SceneResult:  # fmt: skip
    if variations is None:
        variations = [
            variation(shot(folder, number, k, size), rank=k, selected=k == 1, references=references,
                      scores=scored(100.0 - k), width=size[0], height=size[1])
            for k in range(1, count + 1)
        ]  # fmt: skip
    chosen = [v.image.image_path for v in variations if v.selected]
    return SceneResult(
        scene=number, prompt=prompt, enhancement=enhancement(prompt, agent),
        sent_prompt=over.pop("sent_prompt", f"{prompt}, 35 mm"), variations=variations,
        reference=reference or chosen[0], reference_from=source, **over,
    )  # fmt: skip


def carried(folder: Path, number: int, reference: Path, **over) -> SceneResult:
    return scene_of(folder, number, [], reference=reference, source="carried", **over)


def story_of(
    scenes: list[SceneResult], *, image: Path | None = None, title="", **over
) -> StoryResult:
    story = Story(
        scenes=[Scene(prompt=s.prompt) for s in scenes], title=title,
        initial_reference_image=image,
    )  # fmt: skip
    return StoryResult(
        generation_id="run", scenes=scenes, references=[s.reference for s in scenes],
        sandbox=over.pop("sandbox", False), story=story, **over,
    )  # fmt: skip


def chain_of(folder: Path, length: int, count: int = 1, image: Path | None = None) -> StoryResult:
    scenes, before = [], image
    for number in range(1, length + 1):
        sent = (before,) if before else ()
        scenes.append(scene_of(folder, number, count=count, references=sent))
        before = scenes[-1].reference
    return story_of(scenes, image=image)


def views(result: StoryResult) -> list[Html]:
    """Everything that can be shown of a result as HTML."""
    grids = [variation_grid(scene) for scene in result.scenes]
    tables = [score_table(scene) for scene in result.scenes]
    return [*grids, *tables, score_table(result), chain_strip(result)]


# hostile texts


@pytest.mark.parametrize("text", FEW)
def test_no_text_of_a_result_becomes_markup(folder, text):
    scores = ImageScores(
        metrics={text: None, "overall ": 3.0}, overall=None, models={text: text},
        calibrations={text: text}, notes={text: text, "overall": text},
    )  # fmt: skip
    path = shot(folder, 1, 1)
    own = variation(path, selected=True, rank=None, scores=scores, model_name=text)
    scene = scene_of(
        folder, 1, [own], prompt=text, source="first", sent_prompt=text, warnings=[text],
        agent=f"sandbox-{text}",
    )  # fmt: skip
    result = story_of([scene, carried(folder, 2, path, prompt=text)], title=text)
    for view in views(result):
        assert read(view).words
    assert contact_sheet(result).width == 1200


def test_a_hostile_text_is_still_read_as_it_was_written(folder):
    text = '<img src=x onerror="alert(1)"> & $5'
    reader = read(variation_grid(scene_of(folder, prompt=text)))
    assert text in reader.words
    assert all(text in image["alt"] for image in reader.all("img"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x00", "[U+0000]"), ("\x1b[1m", "[U+001B][1m"), ("\x7f", "[U+007F]"), ("\u202e", "[U+202E]"),
     ("\u2066", "[U+2066]"), ("\U000e0041", "[U+E0041]"), ("\ud83c", "[U+D83C]"),
     ("\x85", "[U+0085]"), ("👩‍🚀", "👩‍🚀"), ("a\r\n\tb", "a b")],
)  # fmt: skip
def test_unseen_characters_are_named(text, shown):
    assert visible(text) == shown


def test_formulas_are_not_made_of_prompts(folder):
    for view in views(chain_of(folder, 1)):
        assert "mathjax_ignore" in read(view).elements[0][1]["class"]


def test_an_element_escapes_attributes_and_texts_but_not_elements():
    made = element("b", element("i", "<"), "<", None, title='"<', aria_label=None, class_="c")
    assert str(made) == '<b title="&quot;&lt;" class="c"><i>&lt;</i>&lt;</b>'


# paths


def test_no_view_shows_a_folder(folder):
    missing = shot(folder, 1, 2, exists=False)
    note = f"ValueError: image {str(missing)!r}: no file; C:\\Users\\me\\secret-folder\\x.png"
    scores = ImageScores(metrics={"a": None}, notes={"a": note, "overall": note})
    own = [
        variation(shot(folder, 1, 1), selected=True, rank=None, scores=scores),
        variation(missing, rank=None, scores=scores),
    ]
    first = scene_of(folder, 1, own, source="first", warnings=[f"file of variation 2: {note}"])
    image = shot(folder, 0, 1)
    result = story_of([first, carried(folder, 2, first.reference)], image=image)
    for view in views(result):
        source = str(view)
        assert "secret-folder" not in source and str(folder.parent) not in source
        assert "Users" not in source
    assert missing.name in read(score_table(result)).words


@pytest.mark.parametrize("text", ["and/or", "https://a.example/b/c", "1/2 at f/2.8", "16/9 it is"])
def test_a_slash_in_a_message_is_no_path(folder, text):
    assert text in read(variation_grid(scene_of(folder, warnings=[text]))).words


# files that are not there


def broken(folder: Path) -> list[Path]:
    """Paths without a picture: nothing, a folder, a text, half a picture, a link to nowhere."""
    whole = shot(folder, 9, 9).read_bytes()
    (folder / "is-folder.png").mkdir()
    (folder / "text.png").write_text("<svg onload=alert(1)>")
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    names = ("gone.png", "is-folder.png", "text.png", "half.png", "empty.png", "link.png")
    return [folder / name for name in names]


def test_a_missing_picture_is_a_box_with_its_words(folder):
    paths = broken(folder)
    own = [variation(p, rank=k, selected=k == 1) for k, p in enumerate(paths, start=1)]
    scene = scene_of(folder, 1, own, prompt="the <keeper>")
    reader = read(variation_grid(scene))
    boxes = [a["aria-label"] for _, a in reader.elements if a.get("role") == "img"]
    assert not reader.all("img")
    for path, box in zip(paths, boxes, strict=True):
        assert path.name in box and "the <keeper>" in box
    result = story_of([scene, carried(folder, 2, paths[0])], image=paths[2])
    for view in views(result):
        read(view)
    assert contact_sheet(result).width == 1200


def test_a_thumbnail_of_no_picture_is_refused_by_name(folder):
    for path in broken(folder):
        with pytest.raises(ValueError, match=path.name):
            thumbnail(path)


@pytest.mark.parametrize("width", [0, 15, -1, 4096])
def test_a_thumbnail_has_a_sensible_width(width):
    with pytest.raises(ValueError, match="16 to 2048"):
        thumbnail(Image.new("RGB", (20, 20)), width)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_a_picture_in_memory_is_not_changed(mode):
    image = Image.new(mode, (600, 300))
    assert thumbnail(image, 100).startswith("data:image/webp;base64,")
    assert (image.size, image.mode) == ((600, 300), mode)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (90, 160)])
def test_odd_forms_fit(folder, size):
    result = story_of([scene_of(folder, count=2, size=size)])
    for view in views(result):
        assert read(view)
    sheet = contact_sheet(result)
    assert sheet.width == 1200 and sheet.height < 2000


# states of a scene


def test_a_carried_scene_shows_what_it_borrows(folder):
    first = scene_of(folder, 1)
    result = story_of([first, carried(folder, 2, first.reference, warnings=["carried: nothing"])])
    reader = read(variation_grid(result.scenes[1]))
    assert len(reader.all("img")) == 1
    assert first.reference.name in reader.all("img")[0]["alt"]
    assert "carried" in reader.words and "carried: nothing" in reader.words
    rows = str(score_table(result)).split("<tr>")[2:]
    assert len(rows) == 5 and "carried" in rows[-1] and first.reference.name in rows[-1]
    assert "→" in read(chain_strip(result)).words


def test_a_first_scene_that_borrows_from_a_later_one_says_so(folder):
    second = scene_of(folder, 2)
    result = story_of([carried(folder, 1, second.reference), second])
    words = read(chain_strip(result)).words
    assert "borrowed from scene 2" in words and "→" not in words


def test_an_unscored_scene_says_why(folder):
    scores = ImageScores(overall=None, notes={"overall": "no scorer is configured"})
    own = [variation(shot(folder, 1, k), selected=k == 1, rank=None, scores=scores) for k in (1, 2)]
    scene = scene_of(folder, 1, own, source="first")
    words = read(variation_grid(scene)).words
    assert words.count("unscored: no scorer is configured") == 2
    assert "v1 · unscored" in words and "★ taken first, unscored" in words and "rank" not in words
    table = read(score_table(scene)).words
    assert table.count("overall: no scorer is configured") == 1 and "–" in table
    assert "unscored" in read(chain_strip(story_of([scene]))).words


def test_a_missing_metric_is_a_dash_with_its_reason_once(folder):
    lost = "RuntimeError: out of memory"
    own = [
        variation(shot(folder, 1, k), selected=k == 1, rank=k, scores=scored(40, aesthetic=lost))
        for k in (1, 2, 3)
    ]
    scene = scene_of(folder, 1, own)
    assert read(variation_grid(scene)).words.count(f"aesthetic: {lost}") == 3
    table = str(score_table(scene))
    assert table.count(lost) == 1
    assert len(re.findall("–(</strong>)?<sup [^>]*>1</sup>", table)) == 3


def test_a_note_on_a_number_that_is_there_is_shown_too(folder):
    own = [variation(shot(folder, 1, 1), selected=True, scores=scored(40, clip_score="2 windows"))]
    table = str(score_table(scene_of(folder, 1, own)))
    assert re.search("40.0</strong><sup [^>]*>1</sup>", table)
    assert "clip_score: 2 windows" in table


def test_a_metric_that_only_some_scenes_have_is_a_dash_in_the_others(folder):
    other = ImageScores(metrics={"beauty": 7.04}, overall=7.04, models={"beauty": "b"})
    own = [variation(shot(folder, 2, 1), selected=True, scores=other)]
    result = story_of([scene_of(folder, 1, count=1), scene_of(folder, 2, own)])
    rows = str(score_table(result)).split("<tr>")[2:]
    assert [row.count("–") for row in rows] == [1, 2]
    assert "7.0" in rows[1] and "unknown map" in str(score_table(result))


def test_each_way_to_be_chosen_has_its_word(folder):
    words = {"ranked": "★ winner", "first": "★ taken first", "fallback": "★ fallback",
             "human": "★ chosen by a person"}  # fmt: skip
    for source, word in words.items():
        scene = scene_of(folder, 1, source=source)
        for view in (variation_grid(scene), score_table(scene)):
            assert read(view).words.count("★") == 1 and word in read(view).words


def test_a_picture_without_a_seed_says_so(folder):
    scene = scene_of(folder, 1, [variation(shot(folder, 1, 1), selected=True, seed=None)])
    assert "seedless" in read(variation_grid(scene)).words
    assert "seedless" in read(score_table(scene)).words


def test_numbers_have_one_decimal(folder):
    own = [variation(shot(folder, 1, 1), selected=True, scores=scored(86.2499))]
    for view in (variation_grid(scene_of(folder, 1, own)), score_table(scene_of(folder, 1, own))):
        assert "86.2" in read(view).words and "86.24" not in read(view).words


# the chain


def test_arrows_follow_the_records(folder):
    image = shot(folder, 0, 1)
    assert read(chain_strip(chain_of(folder, 4, image=image))).words.count("→") == 4
    assert read(chain_strip(chain_of(folder, 4))).words.count("→") == 3
    loose = story_of([scene_of(folder, k) for k in (1, 2, 3)])
    reader = read(chain_strip(loose))
    assert "→" not in reader.words and reader.words.count("drawn without a reference") == 3


def test_a_chain_from_the_first_scene_says_so(folder):
    first = scene_of(folder, 1)
    rest = [scene_of(folder, k, references=(first.reference,)) for k in (2, 3, 4)]
    words = read(chain_strip(story_of([first, *rest]))).words
    assert words.count("→") == 1 and words.count("drawn from scene 1") == 2


def test_a_choice_breaks_the_arrow_behind_it(folder):
    result = choose(chain_of(folder, 3, count=2), 1, 2, "better light")
    words = read(chain_strip(result)).words
    assert words.count("→") == 1 and "no longer selected" in words and "stale" in words
    grid = read(variation_grid(result.scenes[1])).words
    assert "⚠ warnings" in grid and f"stale: {result.scenes[1].stale}" in grid


def test_twelve_scenes_in_order(folder):
    reader = read(chain_strip(chain_of(folder, 12, image=shot(folder, 0, 1))))
    labels = [text for text in reader.text if re.fullmatch(r"Scene \d+", text)]
    assert labels == [f"Scene {k}" for k in range(1, 13)] and len(reader.all("img")) == 13


# how many


@pytest.mark.parametrize("count", [1, 20])
def test_one_and_twenty_variations(folder, count):
    scene = scene_of(folder, count=count)
    assert len(read(variation_grid(scene)).all("img")) == count
    assert len(read(score_table(scene)).all("tr")) == count + 1


def test_a_page_of_many_pictures_stays_small(folder):
    scene = scene_of(folder, count=20, size=(1280, 720))
    assert len(str(variation_grid(scene))) < 20 * 30_000


def test_the_text_form_of_a_view_is_short(folder):
    assert len(repr(variation_grid(scene_of(folder)))) < 60


# sandbox


def test_a_real_run_is_not_called_sandbox(folder):
    result = chain_of(folder, 2)
    assert sandbox_models(result) == []
    assert not any("sandbox" in str(view) for view in views(result))


@pytest.mark.parametrize("part", ["agent", "scorer", "images"])
def test_one_stand_in_is_enough(folder, part):
    over = {"model_name": "sandbox-x"} if part == "images" else {}
    scores = scored(model="sandbox-x") if part == "scorer" else scored()
    own = [variation(shot(folder, 1, 1), selected=True, scores=scores, **over)]
    agent = "sandbox-x" if part == "agent" else "acme/llm"
    result = story_of([scene_of(folder, 1, own, agent=agent)], sandbox=True)
    assert sandbox_models(result) == ["sandbox-x"]
    assert all("sandbox-x" in read(view).words for view in views(result))


def test_a_result_that_is_sandbox_says_so_even_without_names(folder):
    result = chain_of(folder, 1).model_copy(update={"sandbox": True})
    assert "sandbox" in read(chain_strip(result)).words
    assert "sandbox" in read(score_table(result)).words


def test_the_sheet_of_a_sandbox_differs_from_a_real_one_in_its_foot(folder):
    real = contact_sheet(chain_of(folder, 1))
    marked = contact_sheet(chain_of(folder, 1).model_copy(update={"sandbox": True}))
    top = (0, 0, 1200, real.height - 50)
    assert real.crop(top).tobytes() == marked.crop(top).tobytes()
    assert real.tobytes() != marked.tobytes()


# the contact sheet


@pytest.mark.parametrize(("length", "count"), [(1, 1), (4, 4), (12, 4), (2, 20)])
def test_the_sheet_is_as_wide_as_it_should_be(folder, length, count):
    sheet = contact_sheet(chain_of(folder, length, count))
    assert (sheet.mode, sheet.width) == ("RGB", 1200)
    assert 200 < sheet.height < 12 * 400


def test_the_sheet_frames_the_chosen_picture(folder):
    frame = (90, 167, 255)

    def framed(result):
        colours = {c: n for n, c in contact_sheet(result).getcolors(1 << 24)}
        return colours.get(frame, 0)

    own = [variation(shot(folder, 1, k), rank=k, selected=False) for k in (1, 2)]
    none = story_of([scene_of(folder, 1, own, reference=shot(folder, 1, 1))])
    result = chain_of(folder, 1, count=2)
    assert framed(result) > 1000
    assert framed(story_of([*result.scenes, result.scenes[0]])) == 2 * framed(result)
    assert framed(none) > 0


def test_the_sheet_is_the_same_every_time(folder):
    result = chain_of(folder, 2, count=3)
    assert contact_sheet(result).tobytes() == contact_sheet(result).tobytes()


def test_the_sheet_of_one_scene(folder):
    assert contact_sheet(scene_of(folder)).width == 1200


def test_a_sheet_of_scenes_without_pictures(folder):
    image = shot(folder, 0, 1)
    scenes = [carried(folder, k, image) for k in (1, 2)]
    assert contact_sheet(story_of(scenes, image=image)).width == 1200


# results show themselves


def test_records_show_their_views(folder):
    result = chain_of(folder, 2)
    assert result.scenes[0]._repr_html_() == str(variation_grid(result.scenes[0]))
    assert result._repr_html_() == str(chain_strip(result)) + str(score_table(result))


def test_the_view_needs_no_heavy_package():
    heavy = ("pandas", "matplotlib", "torch", "IPython")
    code = f"import sys, refimg.view; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
