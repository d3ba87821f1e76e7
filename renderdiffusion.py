"""RenderDiffusion: image diffusion whose denoiser goes through 3D. Unofficial, in one file.

Anciukevicius et al., "RenderDiffusion: Image Diffusion for 3D Reconstruction, Inpainting and
Generation", CVPR 2023, arXiv 2211.09869. Trained on single pictures with known cameras, it
generates, reconstructs and inpaints scenes that can be looked at from any side.

  x_t, t --UNet--> planes --on rays of a pose--> features --MLP--> density, colour --march--> x0_hat
   ^                                                                                            |
   +--- training: noise x0 to x_t, compare x0_hat with x0. Sampling: x_s, s < t, from x0_hat ---+

    python renderdiffusion.py demo                       # everything, from the shipped weights
    python renderdiffusion.py train --minutes 30         # from nothing; writes out/clevr1.pt
    python renderdiffusion.py reconstruct --image photo.png     # --help lists the other commands

The paper comes first. Compass and other side, which go beyond it, are one section, after
inpainting; 0 for `fold` and `other_side` is without. Smaller choices: README.md, "Differences".

Conventions
    world    right-handed, z up; the scene fills the cube [-1, 1]^3, which the planes cover
    pose     camera-to-world 4x4, OpenCV axes: x right, y down, z into the scene (data.py)
    focal    in image widths; principal point in the middle, pixel centres at +0.5
    images   float32 (B, 3, S, S) in [-1, 1]; composited, and judged by PSNR and SSIM, in [0, 1]
    t        noising steps, 0 (clean) to T; alpha_bar has T + 1 entries
    planes   (B, 3, C, N, N) in the order xy, xz, yz
    depth    distance along the unit ray; where a ray does not end, its exit from the cube
    letters  B batch, S image side, R rays, K samples a ray, P points, C plane channels, N its side
"""
import argparse
import copy
import dataclasses
import math
import os
import sys
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import (camera_rays, load, mix, open_picture, orbit, progress, read_image, read_mask,
                  test_views, training_pictures, turn_poses)


# ---- Configuration -----------------------------------------------------------------------------

def option(default, text, least=0, most=1e9, among=None):
    """A field of `Config`: its default, its help, and what it can be."""
    return dataclasses.field(default=default, metadata=dict(text=text, least=least, most=most,
                                                            among=among))


@dataclasses.dataclass
class Config:
    """What a training depends on: `train`'s options, saved in every checkpoint. ValueError, one
    sentence, for a number out of its range."""
    # data
    data: str = option("clevr1", "a built-in set, a name in subsets/, or a path")
    scenes: int = option(0, "scenes to train on; 0: all there are; of a built-in set ever new ones")
    views: int = option(1, "pictures of a scene, each an example of its own", 1)
    resolution: int = option(32, "image side S", among=(16, 32, 64, 128, 256))
    # model
    plane_size: int = option(32, "triplane side N", among=(16, 32, 64, 128, 256, 512))
    plane_channels: int = option(16, "triplane features C", 1, 1024)
    unet_channels: int = option(48, "the U-Net's channels at side 16, a multiple of 16", 16, 1024)
    unet_blocks: int = option(1, "residual blocks a stage at sides of 16 and more", 1, 16)
    mlp_hidden: int = option(64, "width of the MLP's two hidden layers", 1, 4096)
    fold: int = option(4, "the U-Net is told this times the azimuth; 0: nothing (the paper)", 0, 8)
    samples: int = option(12, "stratified samples a ray", 1, 4096)
    fine_samples: int = option(12, "importance samples a ray, where those met matter", 0, 4096)
    # diffusion
    timesteps: int = option(1000, "T", 1, 1e6)
    schedule: str = option("cosine", "alpha_bar", among=("cosine", "linear"))
    loss: str = option("l1", "how a pixel's error is measured", among=("l1", "l2"))
    clean_share: float = option(0.2, "share of examples without noise, for `reconstruct`", 0, 1)
    other_side: float = option(0.5, "share encoded from another side; 0: none (the paper)", 0, 1)
    other_side_from: float = option(0.4, "from this part of the training on", 0, 1)
    # training
    batch: int = option(16, "pictures a step and process", 1, 1e6)
    rays: int = option(256, "rays a picture", 1, 65536)
    steps: int = option(6400, "optimiser steps", 1)
    minutes: float = option(0.0, "train by the clock instead; 0: by steps")
    lr: float = option(1e-3, "Adam's learning rate between warm-up and decay", 1e-9, 10)
    seed: int = option(0, "of weights, scenes and noise")
    compile: bool = option(False, "torch.compile the U-Net: a minute to start, for long trainings")
    device: str = option("auto", "cuda, mps or cpu; auto: the first that works")
    out: str = option("out", "folder for the checkpoint, samples and a table")
    resume: bool = option(False, "go on with the checkpoint in `out`")
    init: str = option("", "begin with these weights: a file, or a name in checkpoints/")
    # what `train` copies from the set, and no options
    focal: float = 1.6                      # in image widths
    background: tuple = (0.5, 0.5, 0.5)     # RGB in [-1, 1] of what lies behind the cube
    radius: float = 2.7                     # the cameras' distance from the middle
    elevation: tuple = (20.0, 50.0)         # the lowest and the highest camera, in degrees

    def __post_init__(self):
        check_config(self)


# ---- Noise schedule: q(x_t | x_0) and q(x_s | x_t, x_0) ----------------------------------------

class NoiseSchedule:
    """How much of the picture is left after t noising steps: alpha_bar (T+1,), from 1 to nearly 0.

    kind "cosine" (Nichol & Dhariwal 2021, eq. 17, offset 0.008) or "linear" (Ho et al. 2020,
    betas from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T). Raises ValueError for others.
    """

    def __init__(self, T=1000, kind="cosine"):
        if kind not in ("cosine", "linear") or not T >= 1:
            raise ValueError(f"a schedule is cosine or linear, of at least 1 step, not {kind}, {T}")
        if kind == "cosine":
            f = torch.cos((torch.arange(T + 1).double() / T + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        else:
            betas = torch.linspace(0.02, 1e-4, T).flip(0).double() * 1000 / T  # T = 1 has 0.02
        # No level but the last may be all noise: the posterior divides by alpha_bar at s < t.
        kept = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)
        self.T, self.alpha_bar = T, F.pad(kept, (1, 0), value=1.0).float()     # (T+1,)

    def at(self, t, x):
        """alpha_bar[t] for a number or a (B,) tensor, shaped to multiply x (B, ...)."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return self.alpha_bar.to(x.device)[t].view(-1, *[1] * (x.dim() - 1))

    def add_noise(self, x, t, noise, s=0):
        """x, which is at level s, noised on to t: q(x_t | x_s); s = 0 is Ho et al. 2020, eq. 4."""
        kept = self.at(t, x) / self.at(s, x)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def posterior(self, x0, x_t, t, s, eta=1.0):
        """Mean and variance of q(x_s | x_t, x0) for 0 <= s < t <= T, numbers or (B,): Song et al.
        2021, eq. 12 and 16. eta = 1: Ho et al. 2020, eq. 7, for steps of any length; eta = 0: DDIM,
        without noise."""
        ab_t, ab_s = self.at(t, x_t), self.at(s, x_t)
        variance = eta ** 2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        eps = (x_t - ab_t.sqrt() * x0) / (1 - ab_t).sqrt()     # what the noise was, if x0 is right
        return ab_s.sqrt() * x0 + (1 - ab_s - variance).clamp(min=0).sqrt() * eps, variance


# ---- U-Net encoder: noisy picture -> planes ----------------------------------------------------

def zero(layer):
    """The layer, its weights set to zero: it changes nothing at first where its output is added."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Block(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, t's embedding scaling and shifting in between; then
    self-attention over all positions, where there are few. Starts as the identity."""

    def __init__(self, c, c_emb, attention):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c), nn.Conv2d(c, c, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c), zero(nn.Conv2d(c, c, 3, padding=1))
        self.emb = nn.Linear(c_emb, 2 * c)
        self.attention = attention
        if attention:
            self.norm3, self.qkv = nn.GroupNorm(8, c), nn.Conv2d(c, 3 * c, 1)
            self.out = zero(nn.Conv2d(c, c, 1))

    def forward(self, x, emb):
        B, c, H, W = x.shape
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)         # (B, c, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        x = x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        if self.attention:
            q, k, v = self.qkv(self.norm3(x)).reshape(B, 3, c // 16, 16, H * W).mT.unbind(1)
            h = F.scaled_dot_product_attention(q, k, v)                        # (B, heads, H*W, 16)
            x = x + self.out(h.mT.reshape(B, c, H, W))
        return x


class UNet(nn.Module):
    """The encoder e: x_t (B, 3, S, S), t (B,) -> planes (B, 3C, N, N). No pose goes in: how the
    world is turned, it has to see in the picture.

    A stage is named by its side, which sets its width; skips are added. From side 16 on, or if the
    largest, one on the way down has a stem, which takes in the picture at twice the side, and one
    up a head, which gives planes of twice the side; smaller planes are doubled and added. So a
    small picture's network is part of a larger one's, whose rest adds zero at first (`grow`).
    """

    def __init__(self, config):
        super().__init__()
        S, N, base = config.resolution, config.plane_size, config.unet_channels
        width = {4: 4 * base, 8: 2 * base, 16: base}
        width |= dict.fromkeys((32, 64, 128, 256), math.ceil(base / 24) * 16)  # 2/3 base
        down, up = [s for s in reversed(width) if s < S], [s for s in width if s < N]

        def by_side(make, sides):
            return nn.ModuleDict({str(side): make(side, width[side]) for side in sides})

        def stage(side, c):
            blocks = config.unet_blocks if side >= 16 else 1
            return nn.ModuleList(Block(c, 4 * base, side <= 8 or (side == 16 and i > 0))
                                 for i in range(blocks))

        def shrink(side, c):
            conv = nn.Conv2d(width[2 * side], c, 3, stride=2, padding=1)
            return zero(conv) if side >= 16 else conv

        def head(side, c):
            conv = nn.Conv2d(c, 3 * config.plane_channels, 3, padding=1)
            return nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), zero(conv) if side > 16 else conv)

        self.base = base
        self.embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(),
                                   nn.Linear(4 * base, 4 * base))
        self.stem = by_side(lambda side, c: nn.Conv2d(3, c, 4, stride=2, padding=1),
                            [side for side in down if side >= min(16, S // 2)])
        self.shrink = by_side(shrink, down[1:])
        self.down, self.up = by_side(stage, down), by_side(stage, up)
        self.middle = Block(width[4], 4 * base, True)
        self.grow = by_side(lambda side, c: nn.Conv2d(width[side // 2], c, 1), up[1:])
        self.head = by_side(head, [side for side in up if side >= min(16, N // 2)])
        self.compass = Compass(config) if config.fold else None                # beyond the paper

    def forward(self, x_t, t):
        phase = t[:, None] * 1e4 ** -torch.linspace(0, 1, self.base // 2, device=t.device)
        emb = self.embed(torch.cat([phase.sin(), phase.cos()], dim=1))         # (B, 4 base)
        skips, planes = {}, None
        for side, blocks in self.down.items():                                 # S/2, ..., 8, 4
            h = self.shrink[side](h) if side in self.shrink else 0
            if side in self.stem:
                h = h + self.stem[side](F.adaptive_avg_pool2d(x_t, 2 * int(side)))
            for block in blocks:
                h = block(h, emb)                                              # (B, c, side, side)
            skips[side] = h
        h = self.middle(h, emb)
        if self.compass:
            emb = emb + self.compass.embed(x_t)
        for side, blocks in self.up.items():                                   # 4, 8, ..., N/2
            if side in self.grow:
                h = F.interpolate(self.grow[side](h), scale_factor=2)
            h = h + skips.get(side, 0)
            for block in blocks:
                h = block(h, emb)
            if side in self.head:
                new = self.head[side](F.interpolate(h, scale_factor=2))
                # doubled as `sample_triplanes` reads them: outermost texels stay at -1 and 1
                planes = new if planes is None else new + F.interpolate(
                    planes, scale_factor=2, mode="bilinear", align_corners=True)
        return planes                                                          # (B, 3C, N, N)


# ---- Triplanes and MLP: points -> density and colour -------------------------------------------

def sample_triplanes(planes, points):
    """Planes (B, 3, C, N, N) at points (B, P, 3) in [-1, 1]^3 -> features (B, P, C): bilinear at
    the projections on xy, xz and yz, summed (Chan et al. 2022, section 3). In xz, say, x is
    the column and z the row; -1 and 1 are the outermost texels' centres."""
    B, _, C, N, _ = planes.shape
    grid = points[:, :, [[0, 1], [0, 2], [1, 2]]].transpose(1, 2).reshape(B * 3, -1, 1, 2)
    features = F.grid_sample(planes.reshape(B * 3, C, N, N), grid, align_corners=True)
    return features.view(B, 3, C, -1).sum(dim=1).transpose(1, 2)               # (B, P, C)


class RadianceMLP(nn.Module):
    """s(p, P[p]): points (B, P, 3), features (B, P, C) -> density per world unit (B, P), RGB in
    [0, 1] (B, P, 3). It starts as a fog of density about 25 softplus(-3) = 1.2: what starts opaque
    hides its inside from the gradient for good."""

    def __init__(self, C, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 + C, hidden), nn.ReLU(inplace=True),
                                    nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
                                    nn.Linear(hidden, 4))

    def forward(self, points, features):
        # as (B P, 3 + C): on 3-D input the backward pass of Linear copies its gradient
        x = torch.cat([points, features], dim=-1)
        out = self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])           # (B, P, 4)
        return 25 * F.softplus(out[..., 0] - 3), torch.sigmoid(out[..., 1:])


# ---- Ray marching: density and colour -> pixels ------------------------------------------------

def ray_interval(origins, directions):
    """Distances near, far (B, R), at least 0, between which rays (B, R, 3) are in the cube
    [-1, 1]^3; for a ray that misses it, both are where it comes closest to the middle."""
    d = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    a, b = (-1 - origins) / d, (1 - origins) / d    # distances to the two faces across each axis
    near = torch.minimum(a, b).amax(-1).clamp(min=0)
    far = torch.maximum(a, b).amin(-1)
    closest = -(origins * directions).sum(-1).clamp(max=0)
    hit = far > near
    return torch.where(hit, near, closest), torch.where(hit, far, closest)


def composite(density, color, deltas, background):
    """Volume rendering by quadrature (Mildenhall et al. 2020, eq. 3): density, deltas (B, R, K),
    color (B, R, K, 3), background (3,) -> rgb (B, R, 3) and weights (B, R, K); the background gets
    1 minus their sum. Colours are in [0, 1]."""
    optical_depth = density * deltas
    # the sum over the samples before each; on GPUs this matrix product is much faster than cumsum
    K = density.shape[-1]
    before = optical_depth @ density.new_ones(K, K).triu(1)
    weights = torch.exp(-before) * -torch.expm1(-optical_depth)                # T_i alpha_i
    left = 1 - weights.sum(-1, keepdim=True)
    return (weights[..., None] * color).sum(-2) + left * background, weights


def importance_samples(edges, weights, u):
    """Distances (B, R, n) drawn by coarse weights (B, R, K) between edges (B, R, K+1): the inverse
    CDF at u (B, R, n) in [0, 1]. Weights spread to their neighbours, and have a floor, for what the
    coarse samples just missed (Barron et al. 2021, eq. 18)."""
    padded = F.pad(weights, (1, 1), mode="replicate")
    pdf = F.avg_pool1d(F.max_pool1d(padded, 2, 1), 2, 1) + 0.01                # (B, R, K)
    cdf = F.pad(torch.cumsum(pdf, -1) / pdf.sum(-1, keepdim=True), (1, 0))     # (B, R, K+1)
    i = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(1, pdf.shape[-1])
    low, high = cdf.gather(-1, i - 1), cdf.gather(-1, i)
    a, b = edges.gather(-1, i - 1), edges.gather(-1, i)
    return a + (b - a) * ((u - low) / (high - low)).clamp(0, 1)


def march(field, origins, directions, samples, fine_samples, background, jitter=False):
    """Render rays (B, R, 3) of a field -> rgb (B, R, 3) in [0, 1], depth, opacity (B, R).

    field: points (B, P, 3) -> density (B, P), colour (B, P, 3). Here t is a distance along the ray;
    depth its mean, the cube's far side for what passes. jitter: samples anywhere in their parts.
    """
    near, far = (x[..., None] for x in ray_interval(origins, directions))      # (B, R, 1)

    def stratified(count):
        """One in each of `count` equal parts of [0, 1]: (B, R, count)."""
        middle = torch.full_like(near, 0.5).expand(-1, -1, count)
        place = torch.rand_like(middle) if jitter else middle
        return (torch.arange(count, device=near.device) + place) / count

    def evaluate(t):
        """Density and colour at distances t (B, R, K), side by side: (B, R, K, 4)."""
        points = origins[:, :, None] + t[..., None] * directions[:, :, None]
        density, color = field(points.flatten(1, 2))
        return torch.cat([density[..., None], color], dim=-1).view(*t.shape, 4)

    def intervals(t):
        """Each sample stands for what is nearer to it than to its neighbours."""
        return torch.cat([near, (t[..., 1:] + t[..., :-1]) / 2, far], dim=-1)  # (B, R, K+1)

    t = near + (far - near) * stratified(samples)
    seen = evaluate(t)
    if fine_samples:
        edges = intervals(t)
        with torch.no_grad():
            _, weights = composite(seen[..., 0], seen[..., 1:], edges.diff(dim=-1), background)
            t_fine = importance_samples(edges, weights, stratified(fine_samples))
        t, order = torch.sort(torch.cat([t, t_fine], dim=-1), dim=-1)
        seen = torch.cat([seen, evaluate(t_fine)], dim=-2).take_along_dim(order[..., None], dim=-2)
    rgb, weights = composite(seen[..., 0], seen[..., 1:], intervals(t).diff(dim=-1), background)
    opacity = weights.sum(-1)
    depth = (weights * t).sum(-1) + (1 - opacity) * far[..., 0]
    return rgb, depth, opacity


# ---- The model ---------------------------------------------------------------------------------

class RenderDiffusion(nn.Module):
    """The denoiser g: x_t, t -> planes -> the picture x0_hat that they show from a pose."""

    points_at_once = 2 ** 15        # bounds memory; larger parts do not fit a CPU cache

    def __init__(self, config):
        super().__init__()
        self.config, self.bf16 = config, False
        self.schedule = NoiseSchedule(config.timesteps, config.schedule)
        self.unet = UNet(config).to(memory_format=torch.channels_last)
        self.mlp = RadianceMLP(config.plane_channels, config.mlp_hidden)
        background = torch.tensor(config.background) / 2 + 0.5
        self.register_buffer("background", background, persistent=False)      # (3,) in [0, 1]

    def encode(self, x_t, t):
        """x_t (B, 3, S, S) in [-1, 1], t a number or (B,) -> planes (B, 3, C, N, N)."""
        S, N = self.config.resolution, self.config.plane_size
        if x_t.shape[1:] != (3, S, S):
            raise ValueError(f"the model takes images (B, 3, {S}, {S}), not {tuple(x_t.shape)}")
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        device = x_t.device.type if self.bf16 else "cpu"        # some devices have no autocast
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            planes = self.unet(x_t, t)
        return planes.float().reshape(len(x_t), 3, -1, N, N)

    def march(self, planes, origins, directions, jitter=False):
        """The function `march` on rays (B, R, 3) through planes -> rgb (B, R, 3) in
        [0, 1], depth, opacity (B, R)."""
        return march(lambda points: self.mlp(points, sample_triplanes(planes, points)), origins,
                     directions, self.config.samples, self.config.fine_samples, self.background,
                     jitter)

    def render(self, planes, poses, focal=None, resolution=None):
        """Planes (B, 3, C, N, N) from poses (B, 4, 4) or a single one -> rgb (B, 3, S, S) in
        [-1, 1], depth and opacity (B, S, S). focal and resolution: None is the config's."""
        S, poses = resolution or self.config.resolution, poses.to(planes).expand(len(planes), 4, 4)
        origins, directions = camera_rays(poses, focal or self.config.focal, S)
        points = self.points_at_once * (1 if planes.device.type == "cpu" else 64)
        rays = points // (len(planes) * self.config.samples) + 1
        parts = [self.march(planes, o, d)
                 for o, d in zip(origins.split(rays, 1), directions.split(rays, 1))]
        rgb, depth, opacity = (torch.cat(part, dim=1) for part in zip(*parts))
        return (rgb.mT.reshape(-1, 3, S, S) * 2 - 1, depth.view(-1, S, S), opacity.view(-1, S, S))

    def forward(self, x_t, t, poses, pixels=None):
        """x0_hat (B, 3, S, S) in [-1, 1]; or, of the pixels numbered (B, n) alone, (B, n, 3), in
        training with jittered samples."""
        planes = self.encode(x_t, t)
        if pixels is None:
            return self.render(planes, poses)[0]
        rays = camera_rays(poses.to(planes), self.config.focal, self.config.resolution)
        origins, directions = (r.take_along_dim(pixels[..., None], dim=1) for r in rays)
        return self.march(planes, origins, directions, jitter=self.training)[0] * 2 - 1


# ---- Training ----------------------------------------------------------------------------------

# Mere background is soon learnt: its pixels are drawn with this weight or more, others with 1.
EMPTY_RAYS = 0.1


def draw_pixels(x0, background, noise_share, count):
    """Numbers (B, count) of different pixels of x0 (B, 3, S, S), most of them on objects: not the
    background (3,) in [-1, 1], or a pixel beside. But the more of x_t is noise (noise_share:
    1 - alpha_bar, (B, 1, 1, 1)), the more evenly. Of noise alone x0_hat has to suit all pictures at
    once, and pixels chosen by what this x0 shows would make its objects too large. Up to a share of
    a half x_t still tells where they are: hence the fourth power."""
    unlike = (x0 - background.view(3, 1, 1)).abs().amax(1, keepdim=True) > 0.02
    weight = torch.maximum(F.max_pool2d(unlike.float(), 3, 1, 1), noise_share ** 4).flatten(1)
    return torch.multinomial(weight.clamp(min=EMPTY_RAYS), min(count, weight.shape[1]))


def draw_levels(config, B, device):
    """t (B,): 0 for a share `clean_share`, else uniform on 1..T; stratified over the batch."""
    u = (torch.randperm(B, device=device) + torch.rand(B, device=device)) / B
    noisy = (u - config.clean_share) / max(1 - config.clean_share, 1e-9)       # below 0: clean
    return (1 + noisy * config.timesteps).long().clamp(0, config.timesteps)


def denoising_loss(model, x0, poses, source=None):
    """The paper's loss on images x0 (B, 3, S, S) from poses (B, 4, 4): noise x0 to random levels,
    encode it, render the planes from the poses, compare with x0 at some pixels. What is noised and
    encoded in place of x0 is source (`from_another_side`). A loss of one's own takes the same."""
    inner = getattr(model, "module", model)                     # `module`: of a parallel one
    source = x0 if source is None else source
    t = draw_levels(inner.config, len(x0), x0.device)
    x_t = inner.schedule.add_noise(source, t, torch.randn_like(x0))            # q(x_t | source)
    background, noise_share = inner.background * 2 - 1, 1 - inner.schedule.at(t, x0)
    pixels = draw_pixels(x0, background, noise_share, inner.config.rays)       # (B, n)
    x0_hat = model(x_t, t, poses, pixels)                                      # (B, n, 3)
    target = x0.flatten(2).mT.take_along_dim(pixels[..., None], dim=1)
    compare = F.l1_loss if inner.config.loss == "l1" else F.mse_loss
    return compare(x0_hat, target)


def learning_rate(config, step, done):
    """Warm-up over 100 steps, then constant, and a linear fall to 2 % over the last 30 %."""
    return config.lr * min(1, (step + 1) / 100, max(0.02, (1 - done) / 0.3))


@torch.no_grad()
def update_average(ema, model, step, decay=0.999):
    """Move the averaged weights towards the model's; at first faster, to forget the start."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                         1 - min(decay, (1 + step) / (10 + step)))


def train(config, loss=denoising_loss):
    """Train from single posed pictures -> the averaged model, in eval mode.

    Writes OUT/DATA.pt at the start and, with .csv and .png, every two minutes, never over another
    training's; `resume` goes on after Ctrl-C or a crash. Under torchrun each process has scenes of
    its own and gradients are averaged. ValueError or OSError for what cannot be trained or written,
    FloatingPointError when loss or weights are no longer finite.
    """
    path, device = training_path(config), pick_device(config.device)
    there = [p for kind in (".pt", ".csv", ".png") if (p := path.with_suffix(kind)).is_file()]
    if there and not config.resume:
        raise ValueError(f"{there[0]} is there: go on with it by --resume (.pt), or change --out")
    writable(path.parent)
    rank, world = join_processes(device)
    draw, cameras = training_pictures(config, device, rank, world)
    config = dataclasses.replace(config, **cameras)
    torch.manual_seed(config.seed)
    model = RenderDiffusion(config).to(device)
    if config.init and not config.resume:
        grow(model, load_checkpoint(config.init, device))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.bf16 = bf16_is_fast(device)
    if config.compile:
        compile_unet(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                 fused=device.type in ("cuda", "cpu"))
    step, seconds = resume(path, model, ema, optimizer) if config.resume else (0, 0.0)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    journal = Journal(path, model, ema, optimizer, step) if rank == 0 else None
    start = time.time() - seconds
    while (done := progress_of(config, step, seconds)) < 1:
        torch.manual_seed(mix(mix(mix(config.seed) ^ step) ^ rank))     # resumed, it draws the same
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, done)
        x0, poses = draw(step)
        source, seen_from = from_another_side(ema, x0, poses, done)
        value = loss(parallel, x0, poses, source)
        if model.unet.compass:
            value = value + compass_loss(model.unet.compass, source, seen_from)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(ema, model, step)
        step, seconds = step + 1, shared_clock(time.time() - start, world, device)
        if journal:
            journal.add(value.detach(), step, seconds, world)
    if journal:
        print(f"wrote {path}")
    if world > 1:
        torch.distributed.destroy_process_group()
    return ema


# ---- Sampling ----------------------------------------------------------------------------------

def noise_levels(schedule, steps, top=None):
    """steps + 1 levels from `top` (None: T) to 0, all but the outermost about even in log(SNR), as
    in DPM-Solver (Lu et al. 2022, arXiv 2206.00927): in t short near all noise, where it is
    decided what the picture shows, and near none. ValueError for fewer levels than steps."""
    top = schedule.T if top is None else top
    if not 1 <= steps <= top:
        raise ValueError(f"steps must be from 1 to {top}, not {steps}")
    log_snr = schedule.alpha_bar[:top + 1].logit()                             # falls
    # log(SNR) is infinite at 0 and nearly so at T: the grid goes from `end` to top - end
    end = max(1, top // (6 * steps))
    levels = torch.searchsorted(-log_snr, -torch.linspace(*log_snr[[end, top - end]], steps + 1))
    levels[0], levels[-1], i = 0, top, torch.arange(steps + 1)
    # rounded, some coincide. No two do where level i minus i never falls; top - steps leaves room
    levels = (levels - i).cummax(0).values.clamp(max=top - steps) + i
    return [int(level) for level in levels.flip(0)]


def standard_normal(like, generator):
    """Noise of a picture's shape, drawn on the CPU: a seed means the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


@torch.no_grad()
def denoise(model, x_t, poses, levels, eta, generator, watch=None):
    """From x_t at the first of the falling `levels` to their last, 0 -> images, planes.

    With eta = 0 x0_hat is extrapolated from the last two, linearly in log(SNR): DPM-Solver++(2M)
    (Lu et al. 2022, arXiv 2211.01095, algorithm 2). watch(t, x_t, x0_hat, depth) sees each step.
    """
    log_snr, before = model.schedule.alpha_bar.logit(), None                   # infinite at 0
    for t, s in progress(zip(levels, levels[1:]), len(levels) - 1, "denoising"):
        planes = model.encode(x_t, t)
        x0_hat, depth, _ = model.render(planes, poses)
        x0_ahead = x0_hat = x0_hat.clamp(-1, 1)
        if watch:
            watch(t, x_t, x0_hat, depth)
        if eta == 0 and before and s > 0:                       # the last step returns x0_hat
            u, x0_hat_u = before
            slope = (x0_hat - x0_hat_u) / (log_snr[t] - log_snr[u])
            x0_ahead = x0_hat + (log_snr[s] - log_snr[t]) / 2 * slope           # in mid-step
        mean, variance = model.schedule.posterior(x0_ahead, x_t, t, s, eta)
        x_t, before = mean + variance.sqrt() * standard_normal(x_t, generator), (t, x0_hat)
    return x_t, planes


def generate(model, poses, steps=20, eta=0.0, seed=0):
    """New scenes: poses (B, 4, 4), through which they are denoised -> images (B, 3, S, S), planes.
    eta = 1: Ho et al. 2020, algorithm 2, in `steps` of T; eta = 0: no fresh noise."""
    S, generator = model.config.resolution, torch.Generator().manual_seed(seed)
    poses = poses.to(model.background).reshape(-1, *poses.shape[-2:])
    x_T = standard_normal(poses.new_empty(len(poses), 3, S, S), generator)
    return denoise(model, x_T, poses, noise_levels(model.schedule, steps), eta, generator)


# ---- Reconstruction ----------------------------------------------------------------------------

@torch.no_grad()
def reconstruct(model, images, poses=None, t_r=0, steps=None, seed=0):
    """Images (B, 3, S, S) in [-1, 1] -> planes, which `model.render` shows from anywhere.

    t_r = 0 encodes the picture as it is. With t_r up to T it is noised to level t_r and denoised
    through poses (B, 4, 4) (None: found) in `steps` (None: 50 for all of T): the more noise, the
    more it is like the training set, and the less like itself. ValueError for other images or t_r.
    """
    images, T = in_range(images), model.config.timesteps
    if t_r not in range(T + 1):         # NaN is not, 300.0 is
        raise ValueError(f"t_r must be a whole number from 0 to {T}, not {t_r}")
    if (t_r := int(t_r)) == 0:
        return model.encode(images, 0)
    poses = find_poses(model, images) if poses is None else poses
    generator = torch.Generator().manual_seed(seed)
    x_t = model.schedule.add_noise(images, t_r, standard_normal(images, generator))
    steps = min(t_r, math.ceil(50 * t_r / T)) if steps is None else steps
    return denoise(model, x_t, poses, noise_levels(model.schedule, steps, t_r), 1.0, generator)[1]


# ---- Inpainting --------------------------------------------------------------------------------

def repaint_schedule(steps, jump_length, jump_n_sample):
    """RePaint's walk over noise levels (Lugmayr et al. 2022, released code): a list of indices.

    Indices count noisy states, -1 is clean. From steps - 1 down to -1; at each multiple of
    `jump_length` up by as much and down again, where there is room, `jump_n_sample` - 1 times.
    """
    if min(steps, jump_length, jump_n_sample) < 1:
        raise ValueError("steps, jump_length and jump_n_sample must be at least 1")
    indices = []
    for i in range(steps - 1, -2, -1):
        indices.append(i)
        if i in range(0, steps - jump_length, jump_length):     # up, and down to it again
            indices += [*range(i + 1, i + jump_length), *range(i + jump_length, i - 1, -1)] * (
                jump_n_sample - 1)
    return indices


def guidance_gradient(model, x_t, t, poses, images, known):
    """x0_hat (B, 3, S, S), and the gradient in x_t of its distance from the images over the pixels
    that are known (B, 1, S, S): as in Chung et al. 2023, algorithm 1."""
    with torch.inference_mode(False), torch.enable_grad():
        x_t, poses, images, known = (x.clone() for x in (x_t, poses, images, known))
        x_t.requires_grad_()
        x0_hat = model.render(model.encode(x_t, t), poses)[0]
        misfit = ((known * (x0_hat - images)).square().sum((1, 2, 3)) + 1e-12).sqrt()
        gradient, = torch.autograd.grad(misfit.sum(), x_t)
    return x0_hat.detach(), gradient


@torch.no_grad()
def inpaint(model, images, masks, poses=None, steps=20, jump_length=5, jump_n_sample=2, seed=0,
            guidance=4.0):
    """Fill images (B, 3, S, S) in [-1, 1] where masks (B, 1, S, S) are 0 -> images, planes.

    RePaint (Lugmayr et al. 2022, algorithm 1) as its code has it: before each step down, the known
    pixels are set to the picture noised to the level of x_t; each jump up noises everything. (The
    paper's line 5 misprints that noise's factor; it is sqrt(1 - alpha_bar).) Beyond RePaint, each
    step down but the last subtracts `guidance` times a gradient, or else what fills a large hole
    ignores what is round it. Then the known pixels are put back, and this picture is encoded. Poses
    (B, 4, 4) are found if None. ValueError for images or masks that do not fit or hide none or all.
    """
    if masks.shape != (shape := (len(images), 1, *images.shape[2:])):
        raise ValueError(f"masks must be {shape} to fit the images, not {tuple(masks.shape)}")
    known = (masks > 0.5).to(in_range(images))
    if any(share in (0, 1) for share in known.mean((1, 2, 3)).tolist()):
        raise ValueError("a mask must hide a part of the picture: 1 is known, 0 is to be filled")
    schedule, generator = model.schedule, torch.Generator().manual_seed(seed)
    poses = find_poses(model, images, known) if poses is None else poses
    levels = noise_levels(schedule, steps)      # T, ..., 0; index i of the walk is levels[-2 - i]
    walk = [levels[-2 - i] for i in repaint_schedule(steps, jump_length, jump_n_sample)]
    x = standard_normal(images, generator)
    for t, s in progress(zip(walk, walk[1:]), len(walk) - 1, "inpainting"):
        noise = standard_normal(x, generator)
        if s > t:                                               # a jump up
            x = schedule.add_noise(x, s, noise, t)
            continue
        x = known * schedule.add_noise(images, t, noise) + (1 - known) * x
        if s > 0:
            x0_hat, gradient = guidance_gradient(model, x, t, poses, images, known)
            mean, variance = schedule.posterior(x0_hat.clamp(-1, 1), x, t, s)
            x = mean + variance.sqrt() * standard_normal(x, generator) - guidance * gradient
    x = known * images + (1 - known) * model.render(model.encode(x, t), poses)[0].clamp(-1, 1)
    return x, model.encode(x, 0)


# ---- Beyond the paper: the compass and the other side ------------------------------------------

class Compass(nn.Module):
    """Estimates the azimuth of a picture's camera: x_t (B, 3, S, S) -> cosine and sine (B, 2).

    A picture shows an object's turn against the camera, a; planes need its turn in the world, a + b
    with b the camera's azimuth. cos(a + b) = cos a cos b - sin a sin b is made of products, which
    plain training does not find (results/README.md). So a small network estimates b, from light and
    shadow, and `fold` * b joins t in scaling and shifting the encoder's stages on the way up. With
    4, cameras a quarter turn apart are the same to them: enough to turn a box, which has the same
    symmetry, and too little to know the camera's side and build a relief for it alone.
    Taught by the squared error, it gives the mean of the vectors that the picture allows: short
    where it is unsure. It sees the picture averaged down to 32.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.schedule = config, NoiseSchedule(config.timesteps, config.schedule)
        self.side, layers = min(config.resolution, 32), []
        widths = [3, 32, 64, 128] if self.side == 32 else [3, 32, 64]          # down to 4 x 4
        for c_in, c in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c, 3, stride=2, padding=1), nn.GroupNorm(8, c), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 2, 4))
        self.turn = nn.Linear(2, 4 * config.unet_channels)

    def forward(self, x_t):
        return self.layers(F.adaptive_avg_pool2d(x_t, self.side))[:, :, 0, 0].float()

    def embed(self, x_t):
        """What joins the encoder's embedding of t on the way up: (B, 4 unet_channels). As a complex
        number to the power `fold` the estimate has that many times the angle, and a short, unsure
        one is shorter still. Detached: only `compass_loss` trains it."""
        c, s = x, y = self(x_t).detach().unbind(1)
        for _ in range(self.config.fold - 1):
            x, y = x * c - y * s, x * s + y * c
        return self.turn(torch.stack([x, y], dim=1))


def compass_loss(compass, pictures, poses):
    """Squared error of the azimuths that it finds in pictures (B, 3, S, S) seen from poses
    (B, 4, 4), noised to random levels; beside the denoising loss, with a tenth of its weight."""
    t = draw_levels(compass.config, len(pictures), pictures.device)
    x_t = compass.schedule.add_noise(pictures, t, torch.randn_like(pictures))
    return 0.1 * F.mse_loss(compass(x_t), F.normalize(poses[:, :2, 3], dim=1))


@torch.no_grad()
def from_another_side(ema, x0, poses, done=1.0):
    """What is encoded, (B, 3, S, S), and from where it is seen: x0, but for a share `other_side`,
    from `other_side_from` of the training on, what the averaged model shows of that scene from
    another picture's camera. What is compared stays x0 at its own camera: so planes must hold where
    the encoder did not look, though each scene has one real view."""
    n = round(len(x0) * ema.config.other_side * (done >= ema.config.other_side_from))
    source, seen_from = x0.clone(), poses.clone()
    if n:
        seen_from[:n] = poses.roll(1, dims=0)[:n]
        source[:n] = ema.render(ema.encode(x0[:n], 0), seen_from[:n])[0]
    return source, seen_from


# ---- Evaluation --------------------------------------------------------------------------------

def to_unit(images):
    """[-1, 1] -> [0, 1], cut off."""
    return (images / 2 + 0.5).clamp(0, 1)


def in_range(images):
    """The images; ValueError for what is not finite and, but for rounding, in [-1, 1]."""
    if not (images.abs() <= 1.01).all():            # NaN, too
        raise ValueError("images must be in [-1, 1], and finite")
    return images


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images (B, 3, S, S) in [0, 1] -> (B,)."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity of images (B, 3, S, S) in [0, 1] -> (B,), by Wang et al. 2004, eq. 13:
    a Gaussian window, sigma 1.5, 11 x 11 pixels, wherever it lies inside the picture."""
    window = torch.softmax(-(torch.arange(11, device=a.device) - 5.0) ** 2 / 4.5, dim=0)
    maps = torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 2)[:, None]     # (15 B, 1, S, S)
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, 1, 11)), window.view(1, 1, 11, 1))
    mean_a, mean_b, aa, bb, ab = maps.view(5, len(a), -1)                      # (B, 3 (S-10)^2)
    product, squares = mean_a * mean_b, mean_a ** 2 + mean_b ** 2
    return ((2 * product + 1e-4) / (squares + 1e-4)
            * (2 * (ab - product) + 9e-4) / (aa + bb - squares + 9e-4)).mean(1)


@torch.no_grad()
def evaluate(model, views, t_r=0):
    """Reconstruct view 0 of each scene, compare with all views -> dict of psnr (dB) and ssim. Keys:
    input (view 0); of more than one view novel (the others), and for these what needs no 3D at all:
    baseline_mean_image (of all the views), baseline_input_copied."""
    scores, mean_image = {}, views.images.flatten(0, 1).mean(0)
    parts = [views[i:i + 8] for i in range(0, len(views), 8)]
    for some in progress(parts, len(parts), "scenes by eights"):
        planes = reconstruct(model, some.images[:, 0], some.poses[:, 0], t_r)
        for v, (truth, poses) in enumerate(zip(some.images.unbind(1), some.poses.unbind(1))):
            shown = model.render(planes, poses, focal=views.focal)[0]
            guesses = {"novel": shown, "baseline_mean_image": mean_image.expand_as(truth),
                       "baseline_input_copied": some.images[:, 0]} if v else {"input": shown}
            for key, guess in guesses.items():
                pair = to_unit(guess), to_unit(truth)
                scores.setdefault(key, []).append(torch.stack([psnr(*pair), ssim(*pair)]))
    return {key: dict(zip(("psnr", "ssim"), torch.cat(score, dim=1).mean(1).tolist()))
            for key, score in scores.items()}


@torch.no_grad()
def find_poses(model, images, masks=None):
    """The cameras (B, 4, 4) of images (B, 3, S, S), known where masks (B, 1, S, S) are 1. The
    encoder needs none, so the picture's planes are rendered from candidates all over the training
    cameras' sphere, then round the best one in steps that halve."""
    (low, high), radius, S = model.config.elevation, model.config.radius, model.config.resolution
    known = torch.ones_like(images[:, :1]) if masks is None else masks.to(images)
    images = torch.where(known > 0.5, images, (model.background * 2 - 1).view(3, 1, 1))
    planes = model.encode(images, 0)
    sides = torch.cartesian_prod(torch.arange(0.0, 360, 12),
                                 torch.linspace(low, high, 2 + int((high - low) / 12)))
    around = torch.cartesian_prod(*[torch.tensor([-1.0, 0, 1])] * 2)
    best = images.new_zeros(len(images), 2)                     # azimuths and elevations
    # from half the grid's step on: no gaps
    for offsets, side in [(sides, 16), *((step * around, 32) for step in (6.0, 3.0, 1.5, 0.8))]:
        target, weight = (F.adaptive_avg_pool2d(x, min(S, side)) for x in (images, known))
        candidates = best + offsets.to(images)[:, None]                        # (K, B, 2)
        candidates[..., 1].clamp_(low, high)
        shown = (model.render(planes, orbit(*angles.T, radius), resolution=min(S, side))[0]
                 for angles in progress(candidates, len(candidates), "cameras"))
        errors = torch.stack([(weight * (x - target) ** 2).mean((1, 2, 3)) for x in shown])
        best = candidates[errors.argmin(0), torch.arange(len(images))]
    return orbit(*best.T, radius)


# ---- Checkpoints, and what a training says -----------------------------------------------------

VERSION, SHIPPED = 2, Path(__file__).resolve().parent / "checkpoints"


def check_config(config):
    """ValueError, one sentence, for the first field of a dataclass that is out of its range. A Path
    or numpy's number becomes what its field says, or no checkpoint with it would load."""
    for field in dataclasses.fields(config):
        limits, value = field.metadata or option(0, "", -1e9).metadata, getattr(config, field.name)
        _, least, most, among = limits.values()
        numbers = [] if value is None or field.type is str else np.ravel(value)
        whole = field.type is int
        if (not all(least <= n <= most and not (whole and n % 1) for n in numbers)
                or value not in (among or [value])):
            wanted = f"one of {among}" if among else f"from {least:g} to {most:g}"
            raise ValueError(f"{field.name} must be {wanted}, not {value!r}")
        if value is not None and field.type in (str, int, float):
            setattr(config, field.name, field.type(value))
    if getattr(config, "unet_channels", 0) % 16:
        raise ValueError(f"unet_channels must be a multiple of 16, not {config.unet_channels}")


def writable(folder):
    """Make a folder; OSError now, before the work, where nothing can be written to it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


def write(path, writer):
    """Write what writer(file) makes to a temporary file, then rename it: never half a file."""
    path, buffer = Path(path), BytesIO()
    writer(buffer)              # to a file, torch makes a RuntimeError of a full disk's OSError
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, training=None):
    """Write the (averaged) model's weights and config, in half precision, to share; or in full,
    with the dict `training` beside them, to resume. FloatingPointError for weights not to load."""
    weights, config = model.state_dict(), model.config
    if not all(weight.abs().max() < 1e4 for weight in weights.values()):       # NaN, too
        raise FloatingPointError("the weights are not finite or beyond 10,000: try a lower --lr")
    if training is None:
        weights = {name: weight.half().cpu() for name, weight in weights.items()}  # for any machine
        config = dataclasses.replace(config, device="auto", out="out", resume=False, init="")
    state = dict(training or {}, version=VERSION, config=vars(config), weights=weights)
    write(path, lambda file: torch.save(state, file))


def load_checkpoint(name_or_path, device="cpu"):
    """The averaged model in eval mode, with `.config`, from a file or a name in checkpoints/;
    ValueError where there is none that fits."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.pt"))}
    path = shipped.get(str(name_or_path), name_or_path)
    try:
        with ZipFile(path) as file:
            if file.testzip():                      # torch does not look at the check sums
                raise ValueError("a part of it does not have its check sum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise ValueError(f"its format is {state['version']}, and this program's {VERSION}")
        model = RenderDiffusion(Config(**state["config"]))
        model.load_state_dict(state["weights"])
    except Exception as error:                      # torch.load alone raises a dozen kinds
        raise ValueError(f"{path} is no checkpoint that fits this program, nor one of "
                         f"{', '.join(shipped)}: {error}") from None
    return model.to(device).eval().requires_grad_(False)


def resume(path, model, ema, optimizer):
    """Fill these three from a training's checkpoint -> its step and seconds; ValueError for weights
    alone, for those of another set or model, and for a training that is at its end."""
    saved, state = load_checkpoint(path), torch.load(path, map_location="cpu", weights_only=True)
    if "optimizer" not in state:
        raise ValueError(f"{path} holds weights alone: begin a training with them by --init")
    for name in list(vars(model.config))[:14]:                  # from data to schedule
        if (its := getattr(saved.config, name)) != getattr(model.config, name):
            raise ValueError(f"{path} was trained with {name} = {its!r}")
    step, seconds = state["step"], state["seconds"]
    if not progress_of(model.config, step, seconds) < 1:        # NaN, too
        raise ValueError(f"{path} has had {step} steps, {seconds / 60:.1f} minutes: give more")
    ema.load_state_dict(saved.state_dict())
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step, seconds


@torch.no_grad()
def grow(model, weights):
    """Fill `model` from the model `weights` of its own size or a smaller one: the same function at
    first. Pictures (from 32 on) may be two or four times as large, planes larger, stages deeper.
    ValueError, naming what differs, for weights that do not fit."""
    for name in list(vars(model.config))[3:10]:                 # from resolution to fold
        its, ours = getattr(weights.config, name), getattr(model.config, name)
        grows = {"unet_blocks": its < ours, "plane_size": 32 <= its < ours,
                 "resolution": 32 <= its < ours <= 4 * its}
        if its != ours and not grows.get(name):
            raise ValueError(f"the weights have {name} = {its}, which cannot become {ours}")
    model.load_state_dict(weights.state_dict(), strict=False)
    for side in weights.unet.up.keys() & (model.unet.stem.keys() - weights.unet.stem.keys()):
        zero(model.unet.stem[side])                 # a skip new to a trained stage


def progress_of(config, step, seconds):
    """How much of a training is done: 0 to 1, by the clock if `minutes` are given."""
    return seconds / 60 / config.minutes if config.minutes else step / config.steps


class Journal:
    """What a training says and writes, by one process: a line every five seconds; every two minutes
    the checkpoint, eight samples, what held-out views say, and a line of OUT/DATA.csv of it."""

    def __init__(self, path, model, ema, optimizer, step):
        self.path, self.ema, self.training = path, ema, dict(model=model, optimizer=optimizer)
        self.losses, self.logged, self.saved = [], time.time(), time.time()
        self.views = test_views(ema.config, 32, 3, model.background.device)
        if step == 0:
            self.save(0, 0.0)                       # which --resume takes from the start on

    def save(self, step, seconds):
        states = {name: part.state_dict() for name, part in self.training.items()}
        save_checkpoint(self.path, self.ema, states | dict(step=step, seconds=seconds))

    def add(self, loss, step, seconds, world):
        """Take note of a step's loss, a tensor; FloatingPointError where it is not finite."""
        self.losses.append(loss)
        now, done = time.time(), progress_of(self.ema.config, step, seconds)
        if now < self.logged + 5 and done < 1:
            return
        mean, minutes = torch.stack(self.losses).mean().item(), seconds / 60   # waits for a GPU
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is not finite by step {step}: try a lower --lr; "
                                     f"what was saved before is in {self.path}")
        speed = len(self.losses) * self.ema.config.batch * world / (now - self.logged)
        print(f"step {step}  loss {mean:.4f}  {speed:.0f} images/s  {minutes:.1f} min, "
              f"{max(0, minutes / done - minutes):.1f} left", flush=True)
        if now > self.saved + 120 or done >= 1:
            self.save(step, seconds)
            try:
                self.judge(f"{step},{minutes:.2f},{mean:.5f}")
            except OSError as error:
                print(f"warning: {error}; training goes on", file=sys.stderr)
            self.saved = time.time()
        self.losses, self.logged = [], time.time()

    def judge(self, line):
        """Say what held-out views and samples say; add to OUT/DATA.csv, and write OUT/DATA.png."""
        scores = evaluate(self.ema, self.views) if self.views else {}
        dB = [f"{scores[key]['psnr']:.2f}" if scores else "" for key in ("input", "novel")]
        if scores:
            print("  held-out PSNR: input view {} dB, novel views {} dB".format(*dB), flush=True)
        poses = turn_poses(self.ema, 0, 8)
        images, planes = generate(self.ema, poses, min(10, self.ema.config.timesteps))
        filled = self.ema.render(planes, poses)[2].mean().item()
        if not 0.01 < filled < 0.99:
            print(f"  warning: all rays {'miss' if filled < 0.5 else 'end in'} the volume; if it "
                  "stays so, train anew with a lower --lr")
        with open(self.path.with_suffix(".csv"), "a") as table:
            head = "" if table.tell() else "step,minutes,loss,input_psnr,novel_psnr\n"
            table.write(f"{head}{line},{dB[0]},{dB[1]}\n")
        save_grid(self.path.with_suffix(".png"), {"samples": images})


# ---- Devices and processes ---------------------------------------------------------------------

def pick_device(name):
    """A torch device; auto is cuda, mps or cpu, the first that works. ValueError for others."""
    for kind in ["cuda", "mps", "cpu"] if name == "auto" else [name]:
        try:                                        # older torch lacks this step on mps
            planes = torch.ones(1, 1, 2, 2, device=kind, requires_grad=True)
            F.grid_sample(planes, planes.new_zeros(1, 2, 2, 2), align_corners=True).sum().backward()
            return torch.device(kind)               # without a number: "cuda" is this process's
        except Exception as error:                  # each kind of device has its own
            said = f"device {name!r} cannot be used: {error}"
    raise ValueError(said)


def bf16_is_fast(device):
    """Whether bfloat16 pays for the U-Net: old GPUs have it by slow emulation alone. Of CPUs many
    do, and some that have it are still slower by it, so a convolution is timed."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    conv, seconds = nn.Conv2d(64, 64, 3, padding=1), {True: [], False: []}
    x = torch.ones(8, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    for bf16 in [True, False] * 5:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            conv(x).sum().backward()
        seconds[bf16].append(time.perf_counter() - start)
    return min(seconds[True]) < min(seconds[False])


def compile_unet(model):
    """torch.compile the U-Net; ValueError where there is no compiler for it."""
    try:
        torch.compile(torch.sin)(model.background)
    except Exception as error:                      # of torch's compilers, each has its own
        raise ValueError(f"--compile finds no working compiler: {error}") from None
    model.unet.compile()


def training_path(config):
    """Where `train` writes: OUT/DATA.pt."""
    return Path(config.out) / f"{Path(config.data).resolve().name.removesuffix('.npz')}.pt"


def join_processes(device):
    """Join those that torchrun started -> this one's number and how many there are; ValueError for
    more processes than GPUs, or, torch's own, where the environment is incomplete."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:       # some clusters set it for a single one
        return 0, 1
    if device.type == "cuda":
        if (local := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local)                # what "cuda" means from here on
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def shared_clock(seconds, world, device):
    """The same seconds for all processes, the most of any: they end at the same step."""
    if world > 1:
        seconds = torch.tensor(seconds, device=device)
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return float(seconds)


# ---- Pictures ----------------------------------------------------------------------------------

def to_bytes(images):
    """(B, 3, S, S) in [-1, 1] -> (B, S, S, 3) numpy uint8."""
    return (to_unit(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def depth_colors(depth):
    """Depth (B, S, S) as colours (B, 3, S, S) in [-1, 1]: near bright, far dark, NaN white."""
    from matplotlib import colormaps, colors    # imported late: a kernel's MPLBACKEND may not exist
    unit = colors.Normalize()(np.ma.masked_invalid(depth.cpu().numpy()))
    rgb = colormaps["viridis_r"].with_extremes(bad="white")(unit)[..., :3]
    return torch.tensor(rgb).permute(0, 3, 1, 2).float() * 2 - 1


def show(model, planes, poses, angle=0):
    """What planes (B, ...) show from poses turned round the z axis by an angle, at twice the
    training's size or more, since they are continuous: images; and depth, NaN where rays are
    mostly not stopped."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = torch.tensor([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).to(poses)
    side = max(128, 2 * model.config.resolution)
    images, depth, opacity = model.render(planes, turn @ poses, resolution=side)
    return images, torch.where(opacity > 0.5, depth, math.nan)


def views_around(model, planes, poses, angles=(40, 80, 160, 240)):
    """Rows for `save_grid`: planes (B, ...) seen from poses turned by these angles, and depth."""
    rows = {f"turned by {angle}°": show(model, planes, poses, angle)[0] for angle in angles}
    return rows | {"depth": show(model, planes, poses)[1]}


def save_grid(path, rows):
    """Write a PNG: rows is a dict from a label to images (B, 3, S, S) or depth maps (B, S, S), a
    column a scene; a single scene is laid out as a row. Depth maps share one scale."""
    from matplotlib.figure import Figure
    depths = [images[images.isfinite()].cpu() for images in rows.values() if images.dim() == 3]
    near, far = torch.cat(depths).aminmax() if any(map(len, depths)) else (0, 1)
    count, B = len(rows), len(next(iter(rows.values())))
    lines, columns = (count, B) if B > 1 else (1, count)
    figure = Figure((1.3 * columns + 1.6, 1.3 * lines + 0.3), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).reshape(count, B)
    for line, (label, images) in zip(axes, rows.items()):
        is_depth = images.dim() == 3
        for axis, image in zip(line, images.cpu().numpy() if is_depth else to_bytes(images)):
            shown = axis.imshow(image, "viridis_r", vmin=near, vmax=far)       # RGB stays RGB
            axis.set(xticks=[], yticks=[], frame_on=False)
        if B > 1:
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        else:
            line[0].set_title(label, fontsize=9)
        if is_depth:
            figure.colorbar(shown, ax=list(line), shrink=0.8)
    write(path, lambda file: figure.savefig(file, format="png"))


def save_turntable(path, model, planes, frames=20):
    """Write a GIF of all planes (B, ...) side by side, turning once round."""
    first, *others = [Image.fromarray(np.hstack(to_bytes(show(model, planes, pose)[0])))
                      for pose in progress(turn_poses(model, 0, frames), frames, "turntable")]
    write(path, lambda file: first.save(file, format="GIF", save_all=True, loop=0, duration=80,
                                        append_images=others))


@torch.no_grad()
def surface_points(model, planes, poses, resolution=64):
    """Where rays from poses (V, 4, 4) are mostly stopped by one scene's planes (1, 3, C, N, N):
    points, unit normals and colours in [0, 1], each (P, 3)."""
    parts = []
    for pose in progress(poses.to(planes), len(poses), "surface"):
        origins, directions = camera_rays(pose[None], model.config.focal, resolution)
        far = ray_interval(origins, directions)[1]
        _, depth, opacity = model.march(planes, origins, directions)
        t = (depth - (1 - opacity) * far) / opacity.clamp(min=1e-3)     # of what is stopped
        parts.append((origins + t[..., None] * directions)[opacity > 0.5])
    with torch.inference_mode(False), torch.enable_grad():
        points = torch.cat(parts)[None].requires_grad_()                       # (1, P, 3)
        density, color = model.mlp(points, sample_triplanes(planes.clone(), points))
        normal = -torch.autograd.grad(density.sum(), points)[0]                # out of the matter
    return points[0].detach(), F.normalize(normal[0], dim=-1), color[0].detach()


def save_ply(path, points, normals, colors):
    """Write points, normals and colours in [0, 1], each (P, 3), as a binary .ply point cloud."""
    kinds = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")] + [
        (name, "u1") for name in ("red", "green", "blue")]
    rows = torch.cat([points, normals, (colors * 255).round()], dim=1).cpu().numpy()
    table = np.rec.fromarrays(rows.T, dtype=kinds)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n" + "".join(
        f"property {'uchar' if kind == 'u1' else 'float'} {name}\n" for name, kind in kinds)
    write(path, lambda file: file.write(f"{header}end_header\n".encode() + table.tobytes()))


# ---- Command line ------------------------------------------------------------------------------

def usual_steps(model):
    """How many noise levels a command goes down where none are asked for."""
    return min(20, model.config.timesteps)


def held_out_views(model, args, scenes, views, spec=None):
    """`Views` of --data, or else of the model's own set; stderr says where training had these."""
    found = load(spec or model.config.data, scenes, views, model.config.resolution, "test",
                 args.seed, model.background.device)
    if not (spec or found.held_out):
        print(f"{model.config.data}: nothing is held out, so training had these", file=sys.stderr)
    return found


def input_pictures(model, args, masks=None):
    """A picture file with its camera, given or found, or scenes that training never saw -> lists of
    images (B, 3, S, S) and of poses (B, 4, 4): of the input, and of the scenes' other views."""
    config, device, camera = model.config, model.background.device, (args.azimuth, args.elevation)
    if camera != (None, None) and None in (*camera, args.image):
        raise ValueError("a camera is --azimuth and --elevation of an --image: give all three")
    if args.image is None:
        views = held_out_views(model, args, args.count, 5)
        return views.images.unbind(1), views.poses.unbind(1)
    images = read_image(args.image, config.resolution, config.background, args.fit)[None].to(device)
    if args.azimuth is not None:
        return [images], [orbit(*camera, config.radius)[None].to(device)]
    poses = find_poses(model, images, masks)
    x, y, z = poses[0, :3, 3].tolist()
    angles = math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y)))
    print("camera found at azimuth {:.0f}, elevation {:.0f} degrees".format(*angles))
    return [images], [poses]


def run_generate(model, args):
    """New scenes, each seen from four more sides."""
    poses = turn_poses(model, 0, args.count)
    _, planes = generate(model, poses, args.steps or usual_steps(model), args.eta, args.seed)
    return {"generated": show(model, planes, poses)[0]} | views_around(model, planes, poses), planes


def run_reconstruct(model, args):
    """3D from one picture, seen from its own camera and from others, beside the truth if known."""
    images, poses = input_pictures(model, args)
    rows, scenes = {}, [reconstruct(model, images[0], poses[0], t_r, args.steps, args.seed)
                        for t_r in args.t_r]
    for v, (truth, pose) in enumerate(zip(images[:3], poses)):
        rows[f"side {v}, truth" if v else "input"] = truth
        for t_r, planes in zip(args.t_r, scenes):
            label = (f"side {v}" if v else "reconstructed") + f", t_r = {t_r}" * (len(scenes) > 1)
            rows[label] = show(model, planes, pose)[0]
    angles = () if images[1:] else (40, 80, 160, 240)
    return rows | views_around(model, planes, poses[0], angles), planes


def run_inpaint(model, args):
    """Fill the masked part of a picture, and look at the result from other sides."""
    S = model.config.resolution
    if args.mask is None:                       # the upper half, of most objects too
        mask = (torch.arange(S) >= S * 9 // 16).float().view(1, S, 1).expand(1, S, S)
    else:
        mask = read_mask(args.mask, S, args.image and open_picture(args.image).size, args.fit)
    (images, *_), (poses, *_) = input_pictures(model, args, mask[None])
    masks = mask.to(images).expand(len(images), 1, S, S)
    rows = {"input": images, "hidden in part": images * masks - 0.5 * (1 - masks)}
    for k in range(args.fillings):
        filled, planes = inpaint(model, images, masks, poses, args.steps or usual_steps(model),
                                 seed=args.seed + k)
        mark = f"filling {k + 1}" if args.fillings > 1 else "filled"
        rows |= {mark: filled} | {f"{mark}, turned by {a}°": show(model, planes, poses, a)[0]
                                  for a in (40, 160)}
    return rows, planes


def finish(model, out, name, rows, planes, gif=True):
    """Write OUT/NAME.png from rows and, if `gif`, OUT/NAME.gif from planes; name them."""
    path = Path(out) / f"{name}.png"
    save_grid(path, rows)
    if gif:
        save_turntable(path.with_suffix(".gif"), model, planes)
    print(f"wrote {path}" + f" and {path.with_suffix('.gif')}" * gif)


def run_demo(model, args):
    """All from the shipped weights: generation, reconstruction, one hole filled in two ways."""
    finish(model, args.out, "demo_generate", *run_generate(model, args))
    finish(model, args.out, "demo_reconstruct", *run_reconstruct(model, args), gif=False)
    twice = dataclasses.replace(args, fillings=2)
    finish(model, args.out, "demo_inpaint", *run_inpaint(model, twice), gif=False)


def run_export(model, args):
    """Scenes, generated or from a picture, as coloured point clouds for Blender or MeshLab."""
    config = model.config
    if args.image is None:
        poses = turn_poses(model, 0, args.count)
        _, planes = generate(model, poses, usual_steps(model), seed=args.seed)
    else:
        image = read_image(args.image, config.resolution, config.background, args.fit)
        planes = reconstruct(model, image[None].to(model.background.device))
    poses = torch.cat([orbit(torch.arange(0, 360, 30.0), elevation, config.radius)
                       for elevation in (-20.0, 20.0, 60.0)])
    for i, scene in enumerate(planes.split(1), 1):
        save_ply(path := Path(args.out) / f"export_{i}.ply", *surface_points(model, scene, poses))
        print(f"wrote {path}")


def run_evaluate(model, args):
    """PSNR and SSIM of reconstructions of held-out scenes, beside what needs no 3D."""
    views = held_out_views(model, args, args.scenes, args.views, args.data)
    for t_r in args.t_r:
        print(f"t_r = {t_r}")
        for key, score in evaluate(model, views, t_r).items():
            print(f"{key:22s} {score['psnr']:6.2f} dB PSNR  {score['ssim']:.3f} SSIM")


def run_train(typed):
    """Train a model from single posed pictures."""
    init, start, ours = typed.get("init"), {}, ["out", "device", "resume"]
    if init and typed.get("resume"):
        raise ValueError("--init begins a training and --resume goes on with one: give one")
    if init or typed.get("resume"):     # what is not typed is the checkpoint's own, but for `ours`
        start = vars(load_checkpoint(init or training_path(Config(**typed))).config)
        ours += ["minutes"] * ("steps" in typed)
    if init:
        ours += "scenes views batch rays steps minutes lr seed compile".split()
    train(Config(**{name: value for name, value in start.items() if name not in ours} | typed))


@dataclasses.dataclass
class Options:
    """The options of all commands but `train`; those of `train` are the fields of `Config`."""
    checkpoint: str = option("cars", "a file, or a name in checkpoints/")
    out: str = option("out", "folder for what is written")
    seed: int = option(0, "of noise and scenes")
    device: str = option("auto", "cuda, mps or cpu; auto: the first that works")
    # a GIF is at most 65,535 pixels wide, and a scene in it up to 512
    count: int = option(4, "how many scenes (without --image)", 1, 127)
    steps: int = option(None, "noise levels on the way down; else 20, or as t_r needs", 1)
    eta: float = option(0.0, "1: fresh noise at each step; 0: none", 0, 1)
    image: str = option(None, "picture file; else scenes that training never saw")
    fit: str = option("crop", "how a picture is made square", among=("crop", "pad"))
    azimuth: float = option(None, "of its camera in degrees; else found", -360, 360)
    elevation: float = option(None, "of its camera in degrees; else found", -90, 90)
    t_r: tuple = option((0,), "noise levels to reconstruct from, 0 to T")
    mask: str = option(None, "mask file, white = keep; else the upper half is filled")
    fillings: int = option(1, "in how many ways", 1, 100)
    data: str = option(None, "a built-in set, a name in subsets/ or a path; else the model's own")
    scenes: int = option(64, "held-out scenes", 1)
    views: int = option(5, "of a scene: the input and novel ones", 2)


COMMON = "checkpoint out seed device "
COMMANDS = {        # what runs them, and what they take; `train`: all fields of `Config`
    "demo": (run_demo, COMMON),
    "train": (run_train, ""),
    "generate": (run_generate, COMMON + "count steps eta"),
    "reconstruct": (run_reconstruct, COMMON + "count steps image fit azimuth elevation t_r"),
    "inpaint": (run_inpaint, COMMON + "count steps image fit azimuth elevation mask fillings"),
    "evaluate": (run_evaluate, COMMON + "data scenes views t_r"),
    "export": (run_export, COMMON + "count image fit")}
GROUPS = {"data": "data", "plane_size": "model", "timesteps": "diffusion", "batch": "training"}


def parse(argv):
    """The command's name, and a dict of what is typed after it; exits with 2, saying why."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command, (run, names) in COMMANDS.items():
        group = sub = commands.add_parser(command, help=run.__doc__, description=run.__doc__)
        for field in dataclasses.fields(Options if names else Config):
            if not names and field.name in GROUPS:
                group = sub.add_argument_group(GROUPS[field.name])
            if field.metadata and (not names or field.name in names.split()):
                how = {bool: dict(action="store_true"), tuple: dict(type=int, nargs="+")}.get(
                    field.type, dict(type=field.type, choices=field.metadata["among"]))
                text, default = field.metadata["text"], str(field.default).strip("(,)")
                text += f" (default: {default})" * (default not in ("None", ""))
                group.add_argument("--" + field.name.replace("_", "-"), help=text,
                                   default=argparse.SUPPRESS, **how)
    args, unknown = parser.parse_known_args(argv)
    if unknown:                         # said with the command's own usage
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    typed = vars(args)
    return typed.pop("command"), typed


def main(argv=None):
    """Run one command; what the user can mend is said in one sentence, with exit code 2."""
    command, typed = parse(argv)
    try:
        if command == "train":
            return run_train(typed)
        args = Options(**typed)
        check_config(args)
        if command != "evaluate":
            writable(args.out)
        for given in filter(None, (args.image, args.mask)):
            for made in (Path(args.out, command + kind) for kind in (".png", ".gif")):
                if made.exists() and made.samefile(given):
                    raise ValueError(f"the result would replace {given}: give another --out")
        model = load_checkpoint(args.checkpoint, pick_device(args.device))
        if made := COMMANDS[command][0](model, args):           # rows of pictures, and planes
            finish(model, args.out, command, *made)
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]   # of torch's errors the first lines will do
        said = said or "stopped; a training goes on from its last save by --resume"
        if isinstance(error, RuntimeError):         # of the CPU, and torch's own of a GPU
            if "memory" not in said:
                raise
            said = f"out of memory: lower --batch, --rays or --count ({said})"
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):         # names beyond a code page end no training
        stream.reconfigure(errors="replace")
    main()
