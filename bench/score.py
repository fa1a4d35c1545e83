"""PickScore, CLIP-Score and the aesthetic score on four images: naive, as they are here, bare.

ViT-H and ViT-L with random weights, on the CPU in 32 bits. naive: each image alone, ViT-H image and
text, ViT-L image and text, ViT-L image again for the aesthetic score. bare: the two image towers at
batch 4 and one text pass each, on pixels and tokens that are ready. `--small` is a try with tiny
models, `--gpu` adds the towers in half precision on a GPU. The weights take 5.7 GB of disk. All
ways see the center of each image, one pass; by tiles an image at 16:9 is two.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # bench/statistics.py hides nothing

import statistics

from PIL import Image

from refimg.adapters import clip, towers, weights
from refimg.score import Batch, raw_scores

LONG = True
SMALL, GPU = "--small" in sys.argv, "--gpu" in sys.argv
IMAGES, ROUNDS, PROMPT = 4, 3, "A lighthouse keeper on a rocky coast at night, take"
GFLOP = {"H image": 334.6, "H text": 47.1, "L image": 162.0, "L text": 13.3}
NAIVE = IMAGES * (GFLOP["H image"] + GFLOP["H text"] + 2 * GFLOP["L image"] + GFLOP["L text"])
OURS = IMAGES * (GFLOP["H image"] + GFLOP["L image"]) + GFLOP["H text"] + GFLOP["L text"]
TEXT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
          "num_attention_heads": 16, "projection_dim": 1024, "vocab_size": 49408,
          "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
VISION_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 16, "projection_dim": 1024, "patch_size": 14,
            "image_size": 224}


def make_weights(folder: Path) -> None:
    """Writes both models and a head of LAION's shape, all random, as the public ones are saved."""
    import torch
    from safetensors.torch import save_file

    from tests.clips import write_tokenizer

    h, l14 = folder / "h", folder / "l"
    l14.mkdir()
    library = towers.import_transformers()
    config = library.CLIPConfig(text_config=TEXT_H, vision_config=VISION_H, projection_dim=1024)
    model = library.CLIPModel(config)
    model.save_pretrained(h)
    write_tokenizer(h)
    del model
    config = towers.import_open_clip().get_model_config("ViT-L-14-quickgelu")
    model = towers.import_open_clip().CLIP(**config)
    save_file(model.state_dict(), l14 / "open_clip_model.safetensors")
    (l14 / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save({"weight": torch.randn(1, 768), "bias": torch.zeros(1)}, folder / "head.pth")


def link_small(folder: Path) -> None:
    """The same folders with tiny models."""
    import torch

    from tests.clips import tiny_open_clip, tiny_transformers

    os.rename(tiny_transformers(), folder / "h")
    os.rename(tiny_open_clip(), folder / "l")
    torch.save({"weight": torch.randn(1, 768), "bias": torch.zeros(1)}, folder / "head.pth")


def scorers(folder: Path, **options: str) -> list:
    """The three, on the models of the folder."""
    data = (folder / "head.pth").read_bytes()
    url = (folder / "head.pth").as_uri()
    head = weights.WebFile(url, hashlib.sha256(data).hexdigest(), len(data))
    clip.HEADS["v2"] = head
    head.fetch()
    options["view"] = "center"
    return [clip.PickScore(folder / "h", **options), clip.ClipScore(folder / "l", **options),
            clip.Aesthetic(folder=folder / "l", **options)]


def pictures(count: int) -> tuple[Image.Image, ...]:
    """Coloured noise at 16:9, in memory."""
    size = (1024, 576)
    return tuple(Image.frombytes("RGB", size, os.urandom(3 * 1024 * 576)) for _ in range(count))


class Bare:
    """The models as their libraries give them."""

    def __init__(self, folder: Path):
        library = towers.import_open_clip()
        self.h, self.h_pixels, self.h_tokens = towers._clip_parts(folder / "h")
        self.l14, self.l_pixels = towers._open_clip_model(folder / "l", "", "")
        self.l_tokens = library.get_tokenizer(f"local-dir:{folder / 'l'}")

    def pixels(self, images):
        """What both image towers read."""
        import torch

        ours = self.h_pixels(images=list(images), return_tensors="pt")["pixel_values"]
        return ours, torch.stack([self.l_pixels(image) for image in images])

    def tokens(self, prompt: str):
        """What both text towers read."""
        return self.h_tokens([prompt], return_tensors="pt"), self.l_tokens([prompt])

    def images(self, h, l14):
        """One pass of each image tower."""
        return towers._unit(self.h.get_image_features(h)), towers._unit(self.l14.encode_image(l14))

    def texts(self, h, l14):
        """One pass of each text tower."""
        return towers._unit(self.h.get_text_features(**h)), towers._unit(self.l14.encode_text(l14))

    def naive(self, images, prompt: str) -> list[list[float]]:
        """For each image PickScore over the scale, CLIP-Score, and the vector for the head."""
        found = []
        for image in images:
            h, l14 = self.pixels([image])
            (h_image, l_image), (h_text, l_text) = self.images(h, l14), self.texts(
                *self.tokens(prompt))
            again = towers._unit(self.l14.encode_image(self.pixels([image])[1]))
            found.append([float(h_image[0] @ h_text[0]), float(l_image[0] @ l_text[0]),
                          float(again[0, 0])])
        return found


def seconds(work) -> float:
    """How long the work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path) -> dict[str, float]:
    """The medians of some rounds, the three ways one after another in each."""
    import torch

    made, bare, images = scorers(folder, device="cpu"), Bare(folder), pictures(IMAGES)
    for scorer in made:
        scorer.load()
    with torch.inference_mode():
        check(made, bare, images)
        rounds = [three_ways(made, bare, images, f"{PROMPT} {k}") for k in range(ROUNDS)]
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def check(made: list, bare: Bare, images) -> None:
    """Nothing, if both ways find the same cosines."""
    scale = made[0].embedder().towers().scale
    rows = raw_scores(Batch(images, PROMPT), made)
    for row, (pick, close, _) in zip(rows, bare.naive(images, PROMPT), strict=True):
        assert abs(row["pickscore"].value / scale - pick) < 1e-4
        assert abs(row["clip_score"].value - close) < 1e-4


def three_ways(made: list, bare: Bare, images, text: str) -> dict[str, float]:
    """Seconds of the same work, on a text that no one has seen."""
    pixels, tokens = bare.pixels(images), bare.tokens(text)
    return {
        "naive_s": seconds(lambda: bare.naive(images, text)),
        "ours_s": seconds(lambda: raw_scores(Batch(images, text), made)),
        "bare_s": seconds(lambda: (bare.images(*pixels), bare.texts(*tokens))),
    }


def resident(field: str) -> int:
    """Bytes that /proc says of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(folder: Path) -> None:
    """Prints the peak of scoring above what the imports take, and the size of the weights."""
    towers.import_open_clip()
    for kind in ("CLIPModel", "CLIPTokenizer", "CLIPImageProcessorPil"):
        getattr(towers.import_transformers(), kind)
    before, made = resident("VmRSS"), scorers(folder, device="cpu")
    raw_scores(Batch(pictures(IMAGES), PROMPT), made)
    size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    print(json.dumps({"peak_gb": (resident("VmHWM") - before) / 1e9, "weights_gb": size / 1e9}))


def gpu(folder: Path) -> dict | None:
    """Images a second and share of the matrix peak of both towers, and end to end."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU could be used here: nothing was measured on one")
        return None
    made, bare = scorers(folder, device="cuda"), Bare(folder)
    half = getattr(torch, towers.resolve_placement("cuda")[1])
    for model in (bare.h, bare.l14):
        model.to("cuda", half)
    peak = matrix_peak(half)
    found = {count: gpu_batch(made, bare, count, half, peak) for count in (4, 64)}
    return {"device": torch.cuda.get_device_name(), "matrix_tflops": peak / 1e12, **found}


def gpu_batch(made: list, bare: Bare, count: int, half, peak: float) -> dict[str, float]:
    """What one size of batch reaches: the towers on resident inputs, and all from the pictures."""
    images, takes = pictures(count), itertools.count()
    pixels = [p.to("cuda", half) for p in bare.pixels(images)]
    passes = count / cuda_seconds(lambda: bare.images(*pixels))
    whole = count / cuda_seconds(
        lambda: raw_scores(Batch(images, f"{PROMPT} {next(takes)}"), made))
    share = passes * 1e9 * (GFLOP["H image"] + GFLOP["L image"]) / peak
    print(f"batch {count:<3} {passes:8.1f} images/s  {share:5.1%} of the matrix peak of "
          f"{peak / 1e12:.0f} TFLOP/s  {whole:8.1f} images/s end to end")
    return {"images_per_s": passes, "share_of_peak": share, "end_to_end": whole}


def cuda_seconds(work) -> float:
    """The median time of the work on the GPU, after three tries."""
    import torch

    def once() -> float:
        torch.cuda.synchronize()
        return seconds(lambda: (work(), torch.cuda.synchronize()))

    with torch.inference_mode():
        return statistics.median([once() for _ in range(23)][3:])


def matrix_peak(half) -> float:
    """FLOP a second of a product of two large matrices, measured."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda").to(half) for _ in range(2))
    return 2 * 8192**3 / cuda_seconds(lambda: a @ b)


def report(result: dict) -> None:
    """Prints the table for people."""
    for name in ("naive_s", "ours_s", "bare_s"):
        ratio = result[name] / result["bare_s"]
        print(f"{name[:-2]:<6} {result[name]:8.2f} s  {ratio:5.2f} x bare")
    print(f"speedup {result['speedup']:.2f}, needed 1.6; by arithmetic alone {NAIVE / OURS:.2f}")
    print(f"overhead {result['overhead']:.2f}, at most 1.10")
    ratio = result["peak_gb"] / result["weights_gb"]
    print(f"peak {result['peak_gb']:.2f} GB for {result['weights_gb']:.2f} GB of weights, "
          f"{ratio:.2f} x, at most 1.15")


def main() -> None:
    """Prints a table and, as the last line, the result as JSON."""
    if "--memory" in sys.argv:
        return memory(Path(sys.argv[-1]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, __file__, "--memory", place]
        (link_small if SMALL else make_weights)(folder)
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = measure(folder) | json.loads(made.stdout.strip().splitlines()[-1])
        result |= {"speedup": result["naive_s"] / result["ours_s"],
                   "overhead": result["ours_s"] / result["bare_s"]}
        report(result)
        result["gpu"] = gpu(folder) if GPU else None
    if SMALL:
        print("tiny models: these figures say nothing")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
