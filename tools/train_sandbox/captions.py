"""Texts to learn from: what a picture shows, said in many ways and never said completely.

Each caption is read back with the sandbox's own reader: one that does not state exactly what it
was meant to state is thrown away.
"""

from __future__ import annotations

import re

import numpy as np

from refimg.sandbox.world import VOCABULARY, plural, read_prompt

PEOPLE = {"lighthouse keeper", "man", "woman", "old man", "child", "musician"}
HIS = {"him": "his", "her": "her", "it": "its", "them": "their"}
THEM = {"woman": "her", "man": "him", "old man": "him", "lighthouse keeper": "him"}
CLOTHES = ("coat", "jacket", "raincoat", "overcoat", "cloak")
SITUATED = {
    "coast": ("on the", "on a", "along the"), "beach": ("on the", "on a", "by the"),
    "harbour": ("in the", "at the", "by the"), "forest": ("in the", "in a", "at the edge of a"),
    "mountains": ("in the", "high in the", "below the"), "meadow": ("in a", "in the", "across a"),
    "city": ("in the", "in a", "in an old"), "desert": ("in the", "across the", "among the"),
    "lake": ("by the", "by a", "on the shore of a"),
}
WHEN = {
    "by day": "by day", "daytime": "in the daytime", "daylight": "in daylight",
    "afternoon": "in the afternoon", "morning": "in the morning", "evening": "in the evening",
    "early morning": "in the early morning", "setting sun": "under a setting sun",
    "blue hour": "in the blue hour", "moonlight": "in moonlight", "moonlit": "on a moonlit night",
    "starry": "on a starry night", "under the stars": "under the stars",
}
OUTSIDE = {
    "clear sky": "under a clear sky", "clear skies": "under clear skies",
    "cloudless": "under a cloudless sky", "sunny": "in sunny weather",
    "clear weather": "in clear weather", "sunshine": "in sunshine", "cloudy": "in cloudy weather",
    "overcast": "under an overcast sky", "grey sky": "under a grey sky",
    "grey skies": "under grey skies", "heavy clouds": "under heavy clouds",
    "rainy": "in rainy weather", "raining": "while it is raining", "drizzle": "in a drizzle",
    "downpour": "in a downpour", "snow": "in the snow", "snowy": "in snowy weather",
    "snowing": "while it is snowing", "snowflakes": "among snowflakes",
    "blizzard": "in a blizzard", "foggy": "in foggy weather", "mist": "in the mist",
    "misty": "in misty air", "storm": "in a storm", "stormy": "under a stormy sky",
    "thunderstorm": "in a thunderstorm", "tempest": "in a tempest", "lightning": "under lightning",
}
VERBS = ("stands", "waits", "rests", "stays", "is seen", "pauses", "holds out", "that comes home")
FILLERS = (
    "soft light", "a quiet mood", "looking away", "seen from eye level", "35mm lens", "calm",
    "a gentle breeze", "long shadows", "rich detail", "a lonely mood", "depth of field",
    "the wind is picking up", "waiting for someone", "muted palette", "warm highlights",
    "holding a letter", "careful composition", "a hopeful atmosphere", "fine texture",
    "counting the sails: one is missing", "patient and hopeful", "coming home at last",
    "the wind has risen", "much air above", "low angle", "consistent finish throughout",
    "the same paper and the same pigments", "balanced, off-centre composition",
)


def pick(rng: np.random.Generator, options) -> str:
    """One of them by chance."""
    return options[int(rng.integers(len(options)))]


def thing(rng: np.random.Generator, said: dict[str, str], kind: str) -> str:
    """The subject with its count and colour, as far as they are stated."""
    several = said.get("count") in ("two", "three")
    noun = pick(rng, VOCABULARY["subject"][kind])
    noun = plural(noun) if several else noun
    lead = pick(rng, VOCABULARY["count"][said["count"]]) if "count" in said else pick(rng, "aA.")
    lead = {"a": "a", "A": "the", ".": "a", "lone": "a lone", "solitary": "a solitary",
            "single": "a single"}.get(lead, lead)
    if "colour" not in said:
        return f"{lead} {noun}"
    colour = pick(rng, VOCABULARY["colour"][said["colour"]])
    if kind in PEOPLE:
        coat = pick(rng, CLOTHES)
        own = "a" if rng.random() < 0.7 else HIS[THEM.get(kind, "them")]
        worn = f"{colour} {coat}s" if several else f"{own} {colour} {coat}"
        return f"{lead} {noun} {pick(rng, ('in', 'wearing', 'dressed in'))} {worn}"
    return f"{lead} {colour} {noun}"


def company(rng: np.random.Generator, said: dict[str, str], kind: str) -> str:
    """Words for the companion and its place; "" where it is not stated."""
    if "companion" not in said:
        return ""
    other = f"{pick(rng, ('a', 'the'))} {pick(rng, VOCABULARY['companion'][said['companion']])}"
    if "relation" not in said:
        return pick(rng, (f"and {other}", f"with {other}", f"together with {other}"))
    several = said.get("count") in ("two", "three")
    them = "them" if several else THEM.get(kind, "it")
    if said["relation"] in ("left of", "right of") and rng.random() < 0.3:
        return f"{other} to {HIS[them]} {said['relation'].removesuffix(' of')}"
    place = pick(rng, VOCABULARY["relation"][said["relation"]])
    where = place if place.endswith(("ground", "front")) else f"{place} {them}"
    if place.startswith(("on the", "to the")) and not place.endswith("of"):
        where = place
    return pick(rng, (f"with {other} {where}", f"{other} {where}", f"with {other} {where}"))


def parts_of(rng: np.random.Generator, said: dict[str, str], kind: str) -> dict[str, str]:
    """A phrase for each thing that is stated."""
    parts = {"what": thing(rng, said, kind), "company": company(rng, said, kind)}
    if "setting" in said:
        place = pick(rng, VOCABULARY["setting"][said["setting"]])
        parts["where"] = f"{pick(rng, SITUATED[said['setting']])} {place}"
    if "time" in said:
        word = pick(rng, VOCABULARY["time"][said["time"]])
        parts["when"] = WHEN.get(word, f"at {word}")
    if "weather" in said:
        word = pick(rng, VOCABULARY["weather"][said["weather"]])
        parts["outside"] = OUTSIDE.get(word, f"in {word}")
    for name in ("framing", "style"):
        parts[name] = pick(rng, VOCABULARY[name][said[name]]) if name in said else ""
    return {name: text for name, text in parts.items() if text}


def tags(rng: np.random.Generator, parts: dict[str, str]) -> str:
    """All in one line with commas, the subject first or after the framing."""
    first = [parts.pop("what") + " " + parts.pop("company", "")]
    rest = list(parts.values())
    rng.shuffle(rest)
    filler = [pick(rng, FILLERS)] if rng.random() < 0.3 else []
    if rng.random() < 0.25 and "framing" in parts:
        rest.remove(parts["framing"])
        first = [f"{parts['framing']} of {first[0]}"]
    return ", ".join([*first, *rest, *filler])


def sentence(rng: np.random.Generator, parts: dict[str, str]) -> str:
    """One sentence about the subject, then short ones about how it is drawn."""
    place = [parts[n] for n in ("where", "when") if n in parts]
    outside = parts.get("outside", "")
    if rng.random() < 0.5:
        rng.shuffle(place)
    middle = [parts["what"], pick(rng, VERBS) if rng.random() < 0.5 else "", *place]
    near = parts.get("company", "")
    apart = near and not near.startswith(("and", "with", "together")) and rng.random() < 0.5
    line = " ".join(w for w in middle if w)
    if near and not apart:
        line = " ".join(w for w in (middle[0], near, *middle[2:]) if w)
    line += (", " if rng.random() < 0.6 else " ") + outside if outside else ""
    ends = [near] if apart else []
    ends += [pick(rng, FILLERS) for _ in range(rng.integers(3))]
    ends += [parts[n] for n in ("framing", "style") if n in parts]
    glue = ". " if rng.random() < 0.5 else ", "
    return glue.join([line, *ends])


def caption(rng: np.random.Generator, attributes: dict[str, str], keep: str = "") -> str | None:
    """A text that states `keep` and some of the rest; None if none was found in a few tries."""
    for _ in range(6):
        share = rng.uniform(0.25, 1.0)
        said = {n: v for n, v in attributes.items() if n == keep or rng.random() < share}
        said["subject"] = attributes["subject"]
        if "relation" in said:
            said["companion"] = attributes["companion"]
        parts = parts_of(rng, said, said["subject"])
        text = tags(rng, parts) if rng.random() < 0.4 else sentence(rng, parts)
        text = re.sub(r"\b([aA]) (?=[aeiou])", r"\1n ", text).replace(" ,", ",")
        if read_prompt(text) == {n: said[n] for n in VOCABULARY if n in said}:
            return text[0].upper() + text[1:] if rng.random() < 0.7 else text
    return None
