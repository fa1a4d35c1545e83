"""Numbers that others published: the LAION heads on mean embeddings, and CLIPs with their weights.

`pytest -m weights` runs the latter where the checkpoints are in the local cache:
`ClipScore("ViT-B-32-quickgelu", "openai").fetch()` and so on brings them there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refimg.adapters.clip import Aesthetic, ClipScore, PickScore, _head, fold
from refimg.adapters.weights import HEADS
from refimg.score import Batch

from .clips import picture, tiny_open_clip

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "scoring"
FILES = {"v1": DATA / "laion_v1" / "sa_0_4_vit_l_14_linear.pth",
         "v2": DATA / "laion_v2" / "sac+logos+ava1-l14-linearMSE.pth"}
RATED = {
    "v1": [-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304],
    "v2": [1.656, 2.359, 3.070, 3.673, 4.238, 4.701, 5.073, 5.365, 5.577, 5.747],
}  # of the mean embeddings of pictures that people rated 0 to 9
shared = pytest.mark.skipif(not DATA.is_dir(), reason="the shared example data is not here")


@pytest.fixture
def heads(tmp_path, monkeypatch):
    """The real heads, copied to where `fetch` puts them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    for version, head in HEADS.items():
        head.place().parent.mkdir(parents=True)
        head.place().write_bytes(FILES[version].read_bytes())
    yield
    _head.cache_clear()


def embeddings():
    """The ten mean embeddings, (10, 768)."""
    import torch

    folder = DATA / "laion_v1" / "vit_l_14_embeddings"
    rows = [np.load(folder / f"rating{i}.npy").reshape(-1) for i in range(10)]
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.all
@shared
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_real_heads_rate_the_mean_embeddings_as_published(version, heads):
    import torch

    weight, bias = _head(HEADS[version])
    points = torch.nn.functional.normalize(embeddings(), dim=-1)
    assert (points @ weight + bias).tolist() == pytest.approx(RATED[version], abs=1e-3)


@shared
def test_the_folded_v2_head_is_its_five_layers():
    import torch

    state = torch.load(FILES["v2"], weights_only=True, map_location="cpu")
    points = torch.nn.functional.normalize(torch.randn(256, 768), dim=-1)
    points = torch.cat([points, embeddings()])
    rows = points
    for name in (n.removesuffix("weight") for n in state if n.endswith("weight")):
        rows = rows @ state[f"{name}weight"].T + state[f"{name}bias"]
    weight, bias = fold(state)
    assert len(state) == 10 and bias == pytest.approx(5.2366, abs=1e-4)
    assert float(weight.norm()) == pytest.approx(17.996, abs=1e-3)
    assert (points @ weight + bias - rows[:, 0]).abs().max() <= 1e-5


@pytest.mark.all
@shared
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_scorer_reads_the_real_head(version, heads):
    scorer = Aesthetic(version, folder=tiny_open_clip(), device="cpu")
    found = scorer.score(Batch((picture(),), "any"))[0].value
    vector = scorer.embedder().images(Batch((picture(),), ""), scorer.view)[0]
    weight, bias = _head(HEADS[version])
    assert found == pytest.approx(float(vector @ weight + bias), abs=1e-5)


def present(*scorers) -> None:
    """Skips the test, with the reason, unless all of these can score."""
    for scorer in scorers:
        if reason := scorer.missing():
            pytest.skip(reason)


def cosines(model: str, images: list[Image.Image], text: str) -> list[float]:
    """CLIP-Score by one of OpenAI's models, in 32 bits on the CPU."""
    scorer = ClipScore(model, "openai", device="cpu")
    present(scorer)
    return [found.value for found in scorer.score(Batch(tuple(images), text))]


@pytest.mark.all
@pytest.mark.weights
def test_the_doctest_of_torchmetrics():
    import torch

    made = torch.randint(255, (3, 224, 224), generator=torch.manual_seed(42))
    image = Image.fromarray(made.permute(1, 2, 0).numpy().astype("uint8"))
    found = cosines("ViT-B-16-quickgelu", [image], "a photo of a cat")
    assert 100 * found[0] == pytest.approx(24.4260, abs=2e-3)


@shared
@pytest.mark.weights
@pytest.mark.parametrize("captions, wanted", [("good", 0.8585), ("bad", 0.7153)])
def test_the_example_of_clipscore(captions, wanted):
    folder = DATA / "clipscore_example"
    texts = json.loads((folder / f"{captions}_captions.json").read_text())
    found = []
    for name, text in texts.items():
        image = Image.open(folder / "images" / f"{name}.jpg").convert("RGB")
        found += cosines("ViT-B-32-quickgelu", [image], f"A photo depicts {text}")
    assert np.mean([2.5 * max(c, 0) for c in found]) == pytest.approx(wanted, abs=1e-3)


@shared
@pytest.mark.weights
def test_the_example_of_openais_readme():
    scorer = ClipScore("ViT-B-32-quickgelu", "openai", device="cpu")
    present(scorer)
    image = Image.open(DATA / "openai_clip_example" / "CLIP.png").convert("RGB")
    scale = scorer.embedder().towers().scale
    texts = ("a diagram", "a dog", "a cat")
    logits = np.array([scale * scorer.score(Batch((image,), text))[0].value for text in texts])
    shares = np.exp(logits - logits.max())
    assert (shares / shares.sum()).tolist() == pytest.approx(
        [0.9927937, 0.00421068, 0.00299572], abs=2e-3)


@pytest.mark.weights
def test_the_public_checkpoints_score_in_their_usual_range():
    scorers = [PickScore(device="cpu"), ClipScore(device="cpu"), Aesthetic(device="cpu")]
    present(*scorers)
    batch = Batch((picture(1), picture(2)), "coarse coloured noise")
    for scorer, low, high in zip(scorers, (10, 0.05, 0), (30, 0.5, 10), strict=True):
        assert all(low < found.value < high for found in scorer.score(batch))
