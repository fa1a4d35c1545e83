"""Technical defects: what makes a picture worse whatever it shows."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

KINDS = ("blur", "noise", "exposure", "contrast", "banding")


def blur(images: torch.Tensor, harm: torch.Tensor) -> torch.Tensor:
    """Out of focus: the more, the larger the circle."""
    size, out, width = images.shape[-1], images, 0.4 + 2.6 * harm
    reach = torch.arange(-7, 8, dtype=torch.float32) * 96 / size
    kernel = torch.exp(-0.5 * (reach / width[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    for shape, pad in (((1, 15), (7, 7, 0, 0)), ((15, 1), (0, 0, 7, 7))):
        flat = out.reshape(1, -1, *out.shape[2:])
        weight = kernel.repeat_interleave(3, 0).view(-1, 1, *shape)
        out = F.conv2d(F.pad(flat, pad, mode="replicate"), weight, groups=len(weight))
        out = out.view_as(images)
    return out


def apply(kind: str, images: torch.Tensor, harm: torch.Tensor,
          rng: np.random.Generator) -> torch.Tensor:
    """The images, (n, 3, h, w) in -1..1, each with that defect, `harm` from 0 to 1 each."""
    amount = harm[:, None, None, None]
    if kind == "blur":
        return blur(images, harm)
    if kind == "noise":
        grain = torch.from_numpy(rng.normal(size=tuple(images.shape)).astype(np.float32))
        return (images + grain * 0.5 * amount).clamp(-1, 1)
    if kind == "exposure":
        up = torch.from_numpy(rng.random(len(images)) < 0.5)[:, None, None, None]
        light = (images + 1) * torch.where(up, 1 + 1.6 * amount, 1 - 0.75 * amount)
        return (light - 1).clamp(-1, 1)
    if kind == "contrast":
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + (images - mean) * (1 - 0.85 * amount)
    levels = 2 + 14 * (1 - amount) ** 2
    return torch.round((images + 1) / 2 * levels) / levels * 2 - 1


def spoil(images: torch.Tensor, rng: np.random.Generator,
          share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The images, some of them with one defect, and the harm that was done, 0..1."""
    harm = torch.zeros(len(images))
    kinds = rng.integers(0, len(KINDS), len(images))
    hit = rng.random(len(images)) < share
    harm[torch.from_numpy(hit)] = torch.from_numpy(rng.uniform(0.15, 1, hit.sum())).float()
    out = images.clone()
    for k, kind in enumerate(KINDS):
        index = torch.from_numpy(np.flatnonzero(hit & (kinds == k)))
        if len(index):
            out[index] = apply(kind, images[index], harm[index], rng)
    return out, harm
