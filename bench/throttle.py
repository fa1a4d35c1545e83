"""What throttling and passing errors cost: 15 % of all answers are a 429, 500 or 503.

Stories of four scenes run in a process each, through both real SDKs against local servers, once
without faults and once with them; the first back-off is a second or more. `asked_s` is what the
servers asked for by Retry-After, here 0; `slowdown` is faulty / (clean + asked). Figures with
`fast_` are of agents that answer in .05 s and images in .2 s, with back-offs as they are. At last
one story asks a chat server with a token bucket for twice as much as it has: `bucket_accepted` is
the share of its rate that was used, `bucket_rejected` the share of all calls that it refused.
"""

import asyncio
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

from refimg import Pipeline, Scene, Story
from refimg.adapters import retry
from refimg.adapters.openai import OpenAIChat
from refimg.adapters.replicate import ReplicateImages
from tests.fakes import FakeScorer
from tests.servers.images import start_image_server
from tests.servers.llm import start_llm_server

LONG = True
STORIES, SCENES, SHARE = 8, 4, 0.15
AFTER = 0.0  # seconds that an answer with a Retry-After asks for
CHAT, IMAGES = ("429-after", "500", "503"), ("429", "500", "503")
RATE, BURST = 8.0, 16.0  # of the token bucket, in calls a second and in calls


def faults(seed: int, names: tuple[str, ...], **more: object) -> list[dict]:
    """A long script in which each answer goes wrong by chance."""
    chance = random.Random(seed)
    wrong = (chance.random() < SHARE for _ in range(400))
    return [more | {"fault": chance.choice(names) if bad else None} for bad in wrong]


def story(scenes: int) -> Story:
    """A story of so many scenes in one style."""
    told = [Scene(prompt=f"Scene {n}: a keeper in a red coat") for n in range(1, scenes + 1)]
    return Story(scenes=told, consistency_markers={"style": "watercolour"})


async def seconds(llm, images, scenes: int, **settings: object) -> float:
    """How long a story takes with models that are loaded; every scene must have its reference."""
    chat = OpenAIChat("any", base_url=llm.base_url, api_key="not-a-key")
    drawn = ReplicateImages(base_url=images.base_url, api_token="not-a-token")
    await asyncio.gather(chat.load(), drawn.load())
    pipeline = Pipeline(director=chat, critic=chat, image_model=drawn, scorers=[FakeScorer()],
                        quality_threshold=0, **settings)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        result = await pipeline.run(story(scenes), output_dir=Path(folder, "images"))
        took = time.perf_counter() - begun
    assert len(result.references) == scenes
    return took


def both(seed: int, chat: float, image: float) -> tuple[float, float, float]:
    """Seconds of a story without and with faults, and what the servers asked for."""
    retry._BACKOFF = (1.0, 20.0) if chat >= 1 else retry._BACKOFF
    with start_llm_server(seconds=chat) as llm, start_image_server(seconds=image) as images:
        asyncio.run(seconds(llm, images, 1, num_variations=1, max_enhancement_iterations=1))
        clean = asyncio.run(seconds(llm, images, SCENES))
        llm.script(faults(seed, CHAT, after=AFTER))
        kinds = ("create", "get", "output", "upload")
        more = {"retry_after": AFTER, "seconds": 0}
        images.script([one for k, on in enumerate(kinds, 1)
                       for one in faults(seed + 100 * k, IMAGES, on=on, **more)])
        faulty = asyncio.run(seconds(llm, images, SCENES))
        asked = [one for one in llm.requests() if one["fault"] in ("429-after", "503")]
        asked += [one for one in images.requests() if one["fault"]]
        return clean, faulty, AFTER * len(asked)


def mixture(chat: float, image: float) -> tuple[list[tuple], dict[str, float]]:
    """Every story's seconds, and the means."""
    pool = ProcessPoolExecutor(STORIES, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        found = list(pool.map(both, range(STORIES), [chat] * STORIES, [image] * STORIES))
    clean, faulty, asked = (sum(one) / STORIES for one in zip(*found, strict=True))
    return found, {"clean_s": clean, "faulty_s": faulty, "asked_s": asked,
                   "slowdown": faulty / (clean + asked)}


def bucket() -> dict[str, float]:
    """What becomes of a chat server's token bucket, when one story asks for more than it has."""
    settings = {"num_variations": 1, "chain": "none", "max_concurrency": 16}
    with (start_llm_server(seconds=1.0, bucket=(RATE, BURST)) as llm,
          start_image_server(seconds=0.05) as images):
        asyncio.run(seconds(llm, images, 40, **settings))
        seen = llm.requests()
    served = [one for one in seen if one["fault"] is None]
    took = max(one["at"] for one in served) - min(one["at"] for one in served)
    return {"bucket_accepted": (len(served) - BURST) / took / RATE,
            "bucket_rejected": 1 - len(served) / len(seen)}


def main() -> None:
    """Runs the mixture twice and the token bucket once, and reports."""
    result = {}
    for name, latencies in (("", (1.0, 5.0)), ("fast_", (0.05, 0.2))):
        found, means = mixture(*latencies)
        print(f"agents {latencies[0]:g} s, images {latencies[1]:g} s: slowdown "
              f"{means['slowdown']:.2f}, at most {max(f / (c + a) for c, f, a in found):.2f}")
        result |= {name + key: round(value, 3) for key, value in means.items()}
    result |= {key: round(value, 3) for key, value in bucket().items()}
    print(f"token bucket: {result['bucket_accepted']:.0%} of its rate used, "
          f"{result['bucket_rejected']:.0%} of all calls refused")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
