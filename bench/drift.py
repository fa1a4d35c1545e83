"""Does a story keep together? Chains, selection, subjects and the plan, on the painter's truth.

    python bench/drift.py                            a few stories, the main arms (minutes)
    python bench/drift.py --stories 100 --arms all   the study (an hour on two cores); its figures
                                                     go into results/drift_study.json
    python bench/drift.py --report                   the tables of what is there, nothing is run

Every arm runs the whole pipeline: the sandbox's agents (one iteration: the plan needs them, and
further ones state more framings and hours, but no subject, colour or style), the painter, the
trained scorers, four variations. The same story has the same seed in all arms (common random
numbers), so arms differ only by what they do, and differences are paired by story. No story has
markers: scene 1 states subject, colour and style, later scenes the subject, a place and one thing
more. The first four scenes of a story of twelve are a story of four.

An image is *kept* if its subject, colour and style are those of the image selected for scene 1.
*Carried* is the share of those three, over scenes 2 to 12. *Fidelity* is the share of what the
scene's own prompt states that was drawn. Selection: the default scorers (PickScore .5, CLIP-Score
.25, aesthetic .1) and consistency at a weight beside them; "oracle" is a consistency scorer that
reads the truth, at weight .6; "tower" is consistency without its head, the plain cosine of
clip_score's vectors. Killed and started again it goes on (output/drift/).
"""

import argparse
import asyncio
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import numpy as np
import pandas as pd

from bench.study import told
from refimg import Pipeline, Scene, Story, Subject
from refimg.adapters.towers import Embedder
from refimg.sandbox import painter as painter_room
from refimg.sandbox.agents import Critic, Director
from refimg.sandbox.painter import Painter, choose_attributes, paint_picture, truth
from refimg.sandbox.scorers import (
    SandboxAesthetic,
    SandboxClipScore,
    SandboxConsistency,
    SandboxPickScore,
    agreement,
)
from refimg.sandbox.world import VOCABULARY, read_prompt
from refimg.score import Batch, RawScore, raw_scores
from refimg.validate.statistics import paired_interval, wilson
from tools.train_sandbox.pictures import attributes_by_chance

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "bench" / "results" / "drift_study.json"
SEED, SCENES, WIDTH = 15_2026, 12, 128
CARRIED = ("subject", "colour", "style")  # what a reference of the painter hands on
BASE = {"pickscore": 0.5, "clip_score": 0.25, "aesthetic": 0.1}
WEIGHTS = (0.0, 0.1, 0.25, 0.4, 0.6)
ORACLE = 0.6


class Arm(NamedTuple):
    """One way of working."""

    chain: str
    weight: float = 0.0  # of consistency, beside those of `BASE`
    oracle: bool = False  # consistency reads the truth
    plan: bool = False
    subjects: str = ""  # "given": with image and description, "sheet": with the image alone
    tower: bool = False  # consistency is the plain cosine of clip_score's vectors
    rule: str = ""  # of the painter: "" p = .8, "p=.6", "first preferred"
    gap: str = ""  # stories of three: "gap" scene 2 lacks the subject, "no gap" it has it

    @property
    def select(self) -> str:
        """How the image is selected, for the tables."""
        weight = f"c {self.weight:g}" + " tower" * self.tower
        return "oracle" if self.oracle else weight if self.weight else "score"

    @property
    def name(self) -> str:
        """The arm in one line."""
        more = ["plan"] * self.plan + [f"subjects {self.subjects}"] * bool(self.subjects)
        return ", ".join([self.chain, self.select, *more, *filter(None, (self.rule, self.gap))])


TODAY = Arm("previous")
DEFAULT = Arm("anchored", 0.25)
BOUND = Arm("anchored", ORACLE, oracle=True)
MAIN = (TODAY, Arm("anchored"), DEFAULT, BOUND, Arm("first", 0.25))
SELECTIONS = [*((w, False) for w in WEIGHTS), (ORACLE, True)]
TABLE = [Arm(chain, weight, oracle) for chain in ("previous", "none", "first", "anchored")
         for weight, oracle in SELECTIONS]
MORE = [arm._replace(plan=plan, subjects=subjects) for arm in (TODAY, Arm("anchored"), DEFAULT)
        for plan, subjects in ((True, ""), (False, "given"), (True, "given"))]
MORE += [DEFAULT._replace(subjects="sheet"), Arm("first", 0.25, plan=True),
         BOUND._replace(plan=True)]
TABLE += [Arm("first", 1.0), Arm("anchored", 1.0)]
TOWER = [DEFAULT._replace(tower=True), Arm("first", 0.25, tower=True)]
RULES = [arm._replace(rule=rule) for rule in ("p=.6", "first preferred")
         for arm in (TODAY, Arm("first", 0.25), Arm("anchored"), DEFAULT)]
GAPS = [arm._replace(gap=gap) for arm in (TODAY, Arm("first", 0.25), Arm("anchored"), DEFAULT)
        for gap in ("no gap", "gap")]
FEW = [*MAIN, DEFAULT._replace(plan=True), Arm("anchored")._replace(subjects="given"),
       DEFAULT._replace(subjects="given")]


FIRST = [*MAIN, *(Arm("anchored", weight) for weight in (0.1, 0.4, 0.6, 1.0)), Arm("none"),
         Arm("first"), Arm("first", 0.6), Arm("first", ORACLE, oracle=True), *FEW,
         *(arm._replace(plan=True) for arm in MAIN)]  # of a whole study


def arms_of(which: str) -> list[list[Arm]]:
    """The arms of stories of twelve scenes in groups: all stories of a group before the next."""
    first = list(dict.fromkeys(FIRST))
    rest = dict.fromkeys([*MORE, *TABLE, *TOWER, *RULES])
    return [first, [arm for arm in rest if arm not in first]] if which == "all" else [FEW]


# stories


def story_of(number: int, arm: Arm) -> Story:
    """The story of that number: one subject, no markers."""
    rng = np.random.default_rng([SEED, number])
    first = attributes_by_chance(rng) | {"count": "one"}
    texts = [told(rng, first, set(CARRIED), 4)]
    while len(texts) < (3 if arm.gap else SCENES):
        later = attributes_by_chance(rng) | {"subject": first["subject"], "count": "one"}
        later = {a: v for a, v in later.items() if a not in ("colour", "style")}
        if later.get("companion") != first["subject"]:
            texts.append(told(rng, later, {"subject", "setting"}, 3))
    name = VOCABULARY["subject"][first["subject"]][0]
    own: dict = {"subjects": [name]} if arm.subjects else {}
    scenes = [Scene(prompt=text, **own) for text in texts]
    if arm.gap == "gap":
        where = VOCABULARY["setting"][read_prompt(texts[1])["setting"]][0]
        scenes[1] = Scene(prompt=f"The {where} at dusk, deserted", subject_present=False)
    return Story(scenes=scenes, subjects=[Subject(name=name)] if arm.subjects else [])


async def with_sheet(story: Story, number: int, arm: Arm, folder: Path) -> Story:
    """The story whose subject has an image: the best of four by the default scorers."""
    said = read_prompt(story.scenes[0].prompt)
    looks = f"{VOCABULARY['subject'][said['subject']][0]} in {said['colour']}"
    text = f"A {looks}, medium shot, {VOCABULARY['style'][said['style']][0]}"
    pipeline = Pipeline(
        director=Agent(Director()), critic=Agent(Critic()), image_model=Painter(width=WIDTH),
        scorers=scorers_of(Arm("none"))[:3], max_enhancement_iterations=0, seed=SEED + number)
    result = await pipeline.run(Story(scenes=[Scene(prompt=text)]), output_dir=folder / "sheet",
                                generation_id="sheet")
    told_of = looks if arm.subjects == "given" else ""
    subject = story.subjects[0].model_copy(
        update={"images": [result.references[0]], "description": told_of})
    return story.model_copy(update={"subjects": [subject]})


# the same work is done once in a process


class Memory(OrderedDict):
    """The last results by key."""

    def once(self, key, make, most: int = 20_000):
        """What `make` gives, or gave before."""
        if key not in self:
            self[key] = make()
            if len(self) > most:
                self.popitem(last=False)
        return self[key]


class Agent:
    """A chat model made of rules: the same messages have the same answer."""

    def __init__(self, model):
        self.model, self.name = model, model.name

    async def reply(self, messages, schema=None):
        """The answer, from memory if it was given before."""
        key = (self.name, json.dumps([m.model_dump(mode="json") for m in messages]))
        if key not in ANSWERS:
            ANSWERS[key] = await self.model.reply(messages, schema)
        return ANSWERS[key]


ANSWERS, VECTORS, PAINTED = {}, Memory(), Memory()


def prepare() -> None:
    """One core, no log; an image is painted once, and embedded once by each tower."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("refimg").setLevel(logging.ERROR)
    embed = Embedder.images

    def images(self, batch, *view, **more):
        def vector(image):
            key = (self.folder, hashlib.blake2b(image.tobytes()).digest())
            return VECTORS.once(key, lambda: embed(self, Batch((image,), ""), *view, **more)[0])

        return torch.stack([vector(image) for image in batch.images])

    def paint(attributes, seed, width, height, look=None, palette=None):
        key = (tuple(sorted(attributes.items())), seed, width, look)
        make = functools.partial(paint_picture, attributes, seed, width, height, look, palette)
        return PAINTED.once(key, make, 3000)

    Embedder.images, painter_room.paint_picture = images, paint


# one run


class OracleConsistency:
    """Reads from the painter's record how much of subject, colour and style agrees."""

    name, model, calibration = "consistency", "sandbox-oracle", "share-of-carried-attributes"

    def to_100(self, raw):
        """The share in per cent."""
        return 100 * raw

    def score(self, batch):
        """The mean share over the references, 0..1."""
        shown = [truth(image)["attributes"] for image in batch.references]
        if not shown:
            return [RawScore(None, "no reference", applicable=False)] * len(batch.images)
        drawn = [truth(image)["attributes"] for image in batch.images]
        return [RawScore(float(np.mean([[a[n] == r[n] for n in CARRIED] for r in shown])))
                for a in drawn]


class TowerConsistency(SandboxConsistency):
    """Consistency without its head."""

    middle, width = 0.311, 0.2181  # the curve fitted to the same pairs

    def __init__(self):
        super().__init__()
        self.calibration = "plain-cosine-logistic"

    def embed_images(self, batch):
        """The vectors of clip_score."""
        return self.embedder.images(batch, self.view)

    def to_100(self, raw):
        """A logistic curve of its own."""
        return 100 / (1 + np.exp((self.middle - raw) / self.width))


def scorers_of(arm: Arm) -> list:
    """The scorers of an arm; consistency is always asked, whatever its weight."""
    kind = TowerConsistency if arm.tower else SandboxConsistency
    last = OracleConsistency() if arm.oracle else kind()
    return [SandboxPickScore(), SandboxClipScore(), SandboxAesthetic(), last]


def pipeline_of(number: int, arm: Arm) -> Pipeline:
    """The pipeline of one run; its seed is the story's."""
    follow = {"p=.6": 0.6}.get(arm.rule, 0.8)
    return Pipeline(
        director=Agent(Director()), critic=Agent(Critic()),
        image_model=Painter(width=WIDTH, follow=follow,
                            prefer_first=arm.rule == "first preferred"),
        scorers=scorers_of(arm), weights=BASE | {"consistency": arm.weight},
        max_enhancement_iterations=1, chain=arm.chain, plan=arm.plan, seed=SEED + number,
        max_concurrency=1)


def rows_of(result, number: int, arm: Arm) -> list[dict]:
    """One row an image."""
    rows = []
    for scene in result.scenes:
        stated = read_prompt(scene.prompt)
        for k, variation in enumerate(scene.variations, start=1):
            drawn = truth(variation.image.image_path)["attributes"]
            rows.append({
                "arm": arm.name, "story": number, "scene": scene.scene, "k": k,
                "selected": variation.selected, "overall": variation.scores.overall,
                **{n: variation.scores.metrics.get(n) for n in (*BASE, "consistency")},
                **{n: drawn[n] for n in CARRIED}, "stated": len(stated),
                "right": agreement(stated, drawn).value})
    return rows


async def run_arm(number: int, arm: Arm) -> list[dict]:
    """The rows of one run; its images are gone."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, story = Path(temporary), story_of(number, arm)
        if arm.subjects:
            story = await with_sheet(story, number, arm, folder)
        result = await pipeline_of(number, arm).run(
            story, generation_id="drift", output_dir=folder / "images")
        return rows_of(result, number, arm)


def make_part(path: Path, number: int, arms: list[Arm]) -> Path:
    """The rows of one story in all arms, in a file, made if it is not there."""
    if not path.exists():

        async def work() -> list[dict]:
            return [row for arm in arms for row in await run_arm(number, arm)]

        part = path.with_suffix(".part")
        pd.DataFrame(asyncio.run(work())).to_parquet(part, index=False)
        for memory in (ANSWERS, VECTORS, PAINTED):
            memory.clear()
        os.replace(part, path)
    return path


def make(stories: int, gaps: int, groups: list[list[Arm]], folder: Path) -> list[Path]:
    """All parts, by two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = []
    for arms in groups:
        name = hashlib.sha256("\n".join(arm.name for arm in arms).encode()).hexdigest()[:6]
        todo += [(folder / f"{name}-{n:03d}.parquet", n, arms) for n in range(stories)]
    todo[stories:stories] = [
        (folder / f"gap-{n:03d}.parquet", 1000 + n, GAPS) for n in range(gaps)]
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=prepare) as pool:
        return list(pool.map(make_part, *zip(*todo, strict=True)))


# the tables


def with_kept(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with `kept`, `kept_colour` and `carried`, against the selected image of scene 1."""
    first = table[table.selected & (table.scene == 1)].set_index(["arm", "story"])[list(CARRIED)]
    rows = table.join(first.add_suffix("_1"), on=["arm", "story"])
    same = pd.DataFrame({n: rows[n] == rows[f"{n}_1"] for n in CARRIED})
    return rows.assign(kept=same.all(axis=1), kept_colour=same.colour, carried=same.mean(axis=1))


def by_story(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Each figure of an arm by story."""
    won = rows[rows.selected]
    at = {n: won[won.scene == n].set_index("story") for n in (3, 4, SCENES)}
    return {
        "kept4": at[4].kept.astype(float), "kept12": at[SCENES].kept.astype(float),
        "colour3": at[3].kept_colour.astype(float), "kept3": at[3].kept.astype(float),
        "carried": won[won.scene > 1].groupby("story").carried.mean(),
        "fidelity": won.groupby("story").right.mean()}


def share(values: pd.Series) -> str:
    """A share with Wilson's interval."""
    low, high = wilson(values.sum(), len(values))
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def mean(values: pd.Series) -> str:
    """A mean over stories with its interval."""
    found = paired_interval(values.to_numpy())
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def gap(a: pd.Series, b: pd.Series) -> str:
    """The paired difference by story, with its interval."""
    d = (a - b).dropna().to_numpy()
    found = paired_interval(d)
    flat = np.isnan(found.low)
    span = "" if flat else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.mean:+.3f}{span}"


def figures(f: dict[str, pd.Series]) -> dict[str, list[float]]:
    """Stories, and the mean of each figure with its interval."""
    found: dict = {"stories": len(f["carried"])}
    for name, values in f.items():
        if len(values):
            kept = name.startswith(("kept", "colour"))
            low, high = (wilson(values.sum(), len(values)) if kept
                         else paired_interval(values.to_numpy())[1:3])
            found[name] = [round(float(v), 4) for v in (values.mean(), low, high)]
    return found


def show(title: str, lines: list[list[str]]) -> None:
    """A table for people."""
    print(f"\n{title}")
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def show_arms(title: str, arms: list[Arm], found: dict, base: Arm) -> None:
    """The figures of some arms, and their differences to a base."""
    own = found[base.name]
    lines = [["arm", "stories", "kept at 4", "kept at 12", "carried", "fidelity",
              f"kept at 12 less '{base.name}'", "carried less it", "fidelity less it"]]
    for arm in (arm for arm in arms if arm.name in found):
        f = found[arm.name]
        lines.append([arm.name, str(len(f["kept12"])), share(f["kept4"]), share(f["kept12"]),
                      mean(f["carried"]), mean(f["fidelity"]),
                      *(gap(f[n], own[n]) for n in ("kept12", "carried", "fidelity"))])
    show(title, lines)


def auc(rows: pd.DataFrame, weight: float, kept: str) -> pd.Series:
    """By story: how often the kept image of two of a scene has the higher overall."""
    rows = rows[(rows.scene > 1) & rows.consistency.notna()]
    weights = BASE | {"consistency": weight}
    value = sum(w * rows[n] for n, w in weights.items()) / sum(weights.values())
    pairs = rows.assign(value=value)[["story", "scene", "value", kept]]
    both = pairs[pairs[kept]].merge(pairs[~pairs[kept]], on=["story", "scene"])
    right = np.sign(both.value_x - both.value_y) / 2 + 0.5
    return right.groupby(both.story).mean()


def show_auc(table: pd.DataFrame, arms: list[Arm]) -> dict[str, float]:
    """How well the overall tells which variation kept, by weight; the AUC of the default."""
    lines, result = [["images of", "weight", "kept (all three)", "kept the colour"]], {}
    for arm in arms:
        rows = table[table.arm == arm.name]
        for weight in WEIGHTS:
            both = [auc(rows, weight, column) for column in ("kept", "kept_colour")]
            lines.append([arm.name, f"{weight:g}", *map(mean, both)])
            result[f"auc_{arm.name}_{weight:g}"] = round(float(both[0].mean()), 4)
    show("AUC: of two images of a scene, one kept and one not, the kept one has the higher overall "
         "(mean over stories)", lines)
    return result


def show_gaps(found: dict) -> dict[str, list[float]]:
    """Scene 3 after a scene 2 without the subject, less the same without a gap."""
    lines = [["arm", "colour kept, no gap", "colour kept, gap", "difference",
              "all kept, no gap", "all kept, gap", "difference"]]
    result = {}
    for plain in dict.fromkeys(arm._replace(gap="") for arm in GAPS):
        a, b = (found[plain._replace(gap=g).name] for g in ("no gap", "gap"))
        lines.append([plain.name, *(text for n in ("colour3", "kept3") for text in (
            share(a[n]), share(b[n]), gap(b[n], a[n])))])
        d = paired_interval((b["colour3"] - a["colour3"]).to_numpy())
        result[plain.name] = [None if np.isnan(v) else round(float(v), 4)
                              for v in (b["colour3"].mean(), *d[:3])]
    show("Scene 3 after a scene without the subject", lines)
    return result


def show_width(count: int = 40) -> dict[str, float]:
    """Whether scores depend on the width at which an image is painted."""
    text = "A red fox in a snowy forest at dusk, wide shot, watercolour"
    stated, kinds = read_prompt(text), scorers_of(DEFAULT)
    made = [choose_attributes(stated, seed, 0.3) for seed in range(count + 1)]
    found = {}
    for width in (WIDTH, 768):
        painted = [paint_picture(a, seed, width, width * 9 // 16) for seed, a in enumerate(made)]
        batch = Batch(tuple(painted[1:]), text, tuple(painted[:1]))
        rows = raw_scores(batch, kinds)
        found[width] = {s.name: [s.to_100(row[s.name].value) for row in rows] for s in kinds}
    a, b = found.values()
    result = {n: round(float(np.corrcoef(a[n], b[n])[0, 1]), 3) for n in a}
    lines = [["scorer", "correlation", "mean difference of the two widths, of 100"]]
    lines += [[n, f"{r:.3f}", f"{np.mean(np.subtract(a[n], b[n])):+.1f}"]
              for n, r in result.items()]
    show(f"{count} images painted {WIDTH} and 768 pixels wide; what is drawn does not depend on it",
         lines)
    return result


def report(table: pd.DataFrame, arms: list[Arm]) -> dict:
    """Prints the tables and returns the figures."""
    table = with_kept(table)
    found = {name: by_story(rows) for name, rows in table.groupby("arm")}
    stories = len(found[TODAY.name]["kept12"])
    print(f"{stories} stories of {SCENES} scenes in each arm, 95 % intervals, by story")
    in_table = [arm for arm in [*TABLE, *TOWER] if arm in arms]
    show_arms("Chain and selection, no plan, no subjects", in_table, found, TODAY)
    kinds = [arm for arm in [*MAIN, *MORE, *FEW] if arm in arms]
    show_arms("Plan and subjects", list(dict.fromkeys(kinds)), found, DEFAULT)
    for rule in ("p=.6", "first preferred"):
        own = [arm for arm in RULES if arm in arms and arm.rule == rule]
        if own:
            show_arms(f"The painter's merge rule: {rule}", own, found, own[0])
    for chain in ("first", "anchored"):
        curve = [arm for arm in in_table if arm.chain == chain and not (arm.oracle or arm.tower)]
        if Arm(chain) in curve:
            show_arms(f"The weight of consistency, chain {chain}", curve, found, Arm(chain))
    result: dict = {"stories": stories}
    result["arms"] = {name: figures(f) for name, f in found.items()}
    result |= show_auc(table, [arm for arm in (Arm("anchored"), DEFAULT, *TOWER[:1])
                               if arm in arms])
    if GAPS[0].name in found:
        result["gap"] = show_gaps(found)
    result["width"] = show_width()
    named = {"plain": Arm("anchored"), "subjects": Arm("anchored")._replace(subjects="given"),
             "consistency": DEFAULT, "both": DEFAULT._replace(subjects="given"), "oracle": BOUND,
             "today": TODAY, "default": DEFAULT._replace(plan=True)}
    for key, arm in named.items():
        f = found[arm.name]
        result[key] = round(float(f["carried"].mean()), 4)
        result |= {f"{n}_{key}": round(float(f[n].mean()), 4)
                   for n in ("kept4", "kept12", "fidelity")}
    return result


def main() -> None:
    """Makes what is missing, prints the tables and, as the last line, a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=3, help="of twelve scenes")
    parser.add_argument("--gaps", type=int, help="stories of three; left out: twice as many")
    parser.add_argument("--arms", choices=("main", "all"), default="main")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "drift")
    parser.add_argument("--report", action="store_true", help="only the tables of what is there")
    given, started = parser.parse_args(), time.time()
    gaps = 2 * given.stories if given.gaps is None else given.gaps
    groups = arms_of(given.arms)
    if given.report:
        paths = sorted(given.folder.glob("*.parquet"))
    else:
        paths = make(given.stories, gaps, groups, given.folder)
    table = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
    result = report(table, [arm for arms in groups for arm in arms])
    result["minutes"] = round((time.time() - started) / 60, 1)
    if given.arms == "all":
        STUDY.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
