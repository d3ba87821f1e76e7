"""RenderDiffusion: image diffusion whose denoiser goes through 3D. Unofficial, in one file.

Anciukevicius et al., "RenderDiffusion: Image Diffusion for 3D Reconstruction, Inpainting and
Generation", CVPR 2023, arXiv 2211.09869. A U-Net turns a noisy picture into three axis-aligned
feature planes, an MLP reads density and colour from them at any point, and volume rendering from
the picture's own camera gives the denoised picture. Trained on single pictures with known
cameras, it generates, reconstructs and inpaints scenes that can be looked at from any side.

    python renderdiffusion.py demo                       # everything, from the shipped weights
    python renderdiffusion.py train --minutes 30         # from nothing; writes out/clevr1.pt
    python renderdiffusion.py generate --count 8
    python renderdiffusion.py reconstruct --image photo.png --t-r 300
    python renderdiffusion.py inpaint --image photo.png --mask mask.png
    python renderdiffusion.py evaluate --json
    python renderdiffusion.py export                     # coloured points (.ply)

Beyond the paper the encoder estimates its camera (`fold`, `lay_down`), and later in training some
pictures are encoded from another side (`other_side`): options, all of them. What else differs, or
is our choice where the paper does not say: README.md, "Differences".

Conventions
    world    right-handed, z up; the scene fills the cube [-1, 1]^3, which the planes cover
    pose     camera-to-world 4x4, OpenCV axes: x right, y down, z into the scene (data.py)
    focal    in image widths; principal point in the middle, pixel centres at +0.5
    images   float32 (B, 3, S, S) in [-1, 1]; composited and compared in [0, 1]
    t        noising steps, 0 (clean) to T; alpha_bar has T + 1 entries
    planes   (B, 3, C, N, N) in the order xy, xz, yz
    depth    distance along the unit ray; where a ray does not end, its exit from the cube
Shapes
    B batch, S image side, R rays, K samples a ray, C plane channels, N plane side, P points
"""
import argparse
import copy
import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import time
from functools import lru_cache
from io import BytesIO
from json import dumps
from pathlib import Path
from zipfile import ZipFile

import matplotlib
from matplotlib.figure import Figure
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import SETS, camera_rays, load, mix, open_picture, orbit, read_image, read_mask, synthetic


# ---- Configuration -----------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    """Everything a training depends on: `train`'s options, and saved in every checkpoint."""
    # data
    data: str = "clevr1"        # a built-in set (clevr1, clevr, cars, chairs, planes) or a folder
    scenes: int = 0             # scenes to train on; 0: fresh ones for ever (built-in sets)
    views: int = 1              # pictures of a scene (of a fixed number of scenes), each on its own
    resolution: int = 32        # image side S, a power of two from 16 to 256
    focal: float = 1.6          # in image widths; training copies it from the set, and these too:
    background: tuple = (0.5, 0.5, 0.5)     # RGB in [-1, 1] of what lies behind the cube
    radius: float = 2.7         # the cameras' distance from the middle
    elevation: tuple = (20.0, 50.0)         # the lowest and the highest camera, in degrees
    # model
    plane_size: int = 32        # triplane side N, a power of two, at least 16
    plane_channels: int = 16    # triplane features C
    unet_channels: int = 48     # channels at S / 2, a multiple of 16; up to four times that below
    mlp_hidden: int = 64        # width of the MLP's two hidden layers
    fold: int = 4               # planes get this times the azimuth found; 0: nothing (the paper)
    lay_down: bool = False      # lay features on a level plane, for objects that stand anywhere
    samples: int = 12           # stratified samples a ray
    fine_samples: int = 12      # importance samples where those saw matter
    # diffusion
    timesteps: int = 1000       # T
    schedule: str = "cosine"    # cosine or linear
    loss: str = "l1"            # l1 or l2
    clean: float = 0.2          # share of examples without noise, which t_r = 0 needs
    other_side: float = 0.5     # share of a batch encoded from another side; 0: the paper's scheme
    other_side_from: float = 0.4    # from this part of the training on
    shift: float = 0.0          # these scenes are moved by up to this along x and y
    # training
    batch: int = 16             # images a step and process
    rays: int = 256             # rays an image
    empty_rays: float = 0.1     # weight of background pixels when rays are drawn; the others' is 1
    steps: int = 6400           # optimiser steps
    minutes: float = 0.0        # train by the clock instead; 0: by steps
    lr: float = 1e-3            # Adam's learning rate between warm-up and decay
    ema: float = 0.999          # decay of the weights' moving average, which is what is used
    seed: int = 0               # of weights, scenes and noise; 0 or more
    compile: bool = False       # torch.compile the U-Net: a minute to start, for long trainings
    device: str = "auto"        # auto (cuda, mps or cpu, the first there is) or a torch device
    out: str = "out"            # folder for the checkpoint and pictures
    resume: bool = False        # continue from the checkpoint in `out`
    init: str = ""              # begin with these weights: a file, or a name in checkpoints/

    def validate(self):
        """Returns itself, or raises ValueError: one sentence on the first field that is off."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            kind = (int, float) if isinstance(field.default, float) else type(field.default)
            numbers = value if isinstance(value, tuple) else ()
            if (not isinstance(value, kind) or np.size(value) != np.size(field.default)
                    or not all(isinstance(number, (int, float)) for number in numbers)):
                raise ValueError(f"{name} must be like {field.default!r}, not {value!r}")
            check(name, value)
        if self.init and self.resume:
            raise ValueError("init begins a training and resume goes on with one: give one of them")
        return self


LIMITS = {      # of a field or an option, or all that it can be; not here: from 0 to a billion
    "views": (1, 1e9), "resolution": [16, 32, 64, 128, 256], "focal": (1e-3, 1e3),
    "background": (-1, 1), "radius": (1e-3, 1e3), "elevation": (-90, 90), "azimuth": (-360, 360),
    "plane_size": [16, 32, 64, 128, 256, 512], "plane_channels": (1, 1024),
    "unet_channels": range(16, 1025, 16), "mlp_hidden": (1, 4096), "fold": (0, 8),
    "samples": (1, 4096), "timesteps": (1, 1e6), "schedule": ["cosine", "linear"],
    "loss": ["l1", "l2"], "clean": (0, 0.99), "other_side": (0, 1), "other_side_from": (0, 1),
    "shift": (0, 1), "batch": (1, 1e6), "rays": (1, 65536), "empty_rays": (1e-3, 1),
    "steps": (1, 1e9), "lr": (1e-9, 10), "ema": (0, 0.99999), "count": (1, 1000), "eta": (0, 1),
    "fillings": (1, 100)}


def check(name, value):
    """ValueError where a value, or one of several, is not within its LIMITS, or is NaN."""
    limits = LIMITS.get(name, (0, 1e9))
    for one in value if isinstance(value, (tuple, list)) else (value,):
        if not isinstance(limits, tuple):
            if one not in limits:
                raise ValueError(f"{name} must be one of {limits}, not {one!r}")
        elif isinstance(one, (int, float)) and not limits[0] <= one <= limits[1]:
            raise ValueError("{} must be from {:g} to {:g}, not {!r}".format(name, *limits, one))


# ---- Noise schedule: q(x_t | x_0) and q(x_s | x_t, x_0) ----------------------------------------

class NoiseSchedule:
    """How much of the picture is left after t noising steps: alpha_bar (T+1,), from 1 to nearly 0.

    kind "cosine" (Nichol & Dhariwal 2021, eq. 17, offset 0.008) or "linear" (Ho et al. 2020,
    betas from 1e-4 to 0.02 at T = 1000, scaled by 1000 / T). Raises ValueError for others.
    """

    def __init__(self, T=1000, kind="cosine"):
        check("timesteps", T)
        check("schedule", kind)
        if kind == "cosine":
            f = torch.cos((torch.arange(T + 1).double() / T + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1 - f[1:] / f[:-1]
        else:
            # from the end: T = 1 has the last beta
            betas = torch.linspace(0.02, 1e-4, T).flip(0).double() * 1000 / T
        # No level but the last may be all noise: the posterior divides by alpha_bar at s < t.
        kept = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)
        self.T = T
        self.alpha_bar = torch.cat([torch.ones(1).double(), kept]).float()     # (T+1,)

    def at(self, t, x):
        """alpha_bar[t] for a number or a (B,) tensor, shaped to multiply x (B, ...)."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return self.alpha_bar.to(x.device)[t].view(-1, *[1] * (x.dim() - 1))

    def add_noise(self, x0, t, noise):
        """A draw of q(x_t | x0) (Ho et al. 2020, eq. 4), given standard normal noise like x0."""
        alpha_bar = self.at(t, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def posterior(self, x0, x_t, t, s, eta=1.0):
        """Mean and variance of q(x_s | x_t, x0) for any 0 <= s < t <= T (numbers or (B,)).

        eta = 1: Ho et al. 2020, eq. 7, for steps of any length. eta = 0: DDIM, without noise. Both
        are Song et al. 2021, eq. 12 and 16.
        """
        ab_t, ab_s = self.at(t, x_t), self.at(s, x_t)
        variance = eta ** 2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        eps = (x_t - ab_t.sqrt() * x0) / (1 - ab_t).sqrt()     # what the noise was, if x0 is right
        return ab_s.sqrt() * x0 + (1 - ab_s - variance).clamp(min=0).sqrt() * eps, variance


# ---- U-Net encoder: noisy picture -> planes ----------------------------------------------------

class Block(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, t's embedding scaling and shifting in between; then
    self-attention over all positions, where there are few. Starts close to the identity.
    """

    def __init__(self, c, c_emb, attention):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c), nn.Conv2d(c, c, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c), nn.Conv2d(c, c, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c)
        nn.init.zeros_(self.conv2.weight)
        self.attention = attention
        if attention:
            self.norm3, self.qkv = nn.GroupNorm(8, c), nn.Conv2d(c, 3 * c, 1)
            self.out = nn.Conv2d(c, c, 1)
            nn.init.zeros_(self.out.weight)

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


def multiply_angle(z, count):
    """Vectors (B, 2) -> (B, 2) at `count` times their angles, their lengths to the power `count`:
    an estimate that is unsure is short, and so counts for less.
    """
    length, angle = z.norm(dim=1, keepdim=True), torch.atan2(z[:, 1:], z[:, :1])
    return length ** count * torch.cat([(count * angle).cos(), (count * angle).sin()], dim=1)


class Compass(nn.Module):
    """Estimates where a picture was taken from: x_t (B, 3, S, S) -> (B, numbers), the cosine and
    sine of the camera's azimuth and, as a third number, the sine of its elevation. Taught by the
    squared error, it gives the mean over what the picture leaves open: for the azimuth a vector the
    shorter, the less can be told. `depth` (1 or 2) convolutions a size, from S / 2 down to 4 x 4.
    """

    def __init__(self, S, numbers, depth):
        super().__init__()
        layers, a = [], 3
        for i in range(int(math.log2(S)) - 2):
            b = min(32 << i, 128)
            for stride in (2, 1)[:depth]:
                layers += [nn.Conv2d(a, b, 3, stride, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
                a = b
        self.layers = nn.Sequential(*layers, nn.Conv2d(a, numbers, 4))         # all of 4 x 4

    def forward(self, x_t):
        return self.layers(x_t)[:, :, 0, 0].float()


def lay_down(features, facing, focal, radius):
    """Features (B, c, H, H) of pictures, laid on the level plane z = 0 -> (B, c, H, H), in row y
    and column x: what a picture has where the point (x, y, 0) is seen, 0 outside of it.

    facing (B, 3) tells where the camera is, as the compass does; it looks at the origin from
    `radius` world units, with `focal` image widths. Known as inverse perspective mapping.
    """
    (c, s), sin = F.normalize(facing[:, :2], dim=1).mT[..., None, None], facing[:, 2, None, None]
    H = features.shape[-1]
    x = (2 * torch.arange(H, device=facing.device) + 1) / H - 1                 # texels' middles
    y = x[:, None]
    near, right = c * x + s * y, c * y - s * x                  # towards the camera, (B, H, H)
    depth = radius - near * (1 - sin ** 2).clamp(min=0).sqrt()
    # what is behind a camera that stands within the cube is not to be divided by zero
    grid = 2 * focal * torch.stack([right, near * sin], dim=-1) / depth.clamp(min=0.1)[..., None]
    return F.grid_sample(features.float(), grid, align_corners=False).to(features)


class UNet(nn.Module):
    """The encoder e: x_t (B, 3, S, S), t (B,) -> planes (B, 3C, N, N). It is not told the camera.

    From S / 2 down to 4 x 4, up again to N / 2 with skips, added, and the last doubling without:
    a plane's texel lies in the world, a pixel before the camera, so there is nothing to copy.

    A picture shows an object's turn against the camera, a; planes need its turn in the world,
    a + b with b the camera's azimuth. cos(a + b) = cos a cos b - sin a sin b is made of products,
    which plain training does not find (README.md, "What matters"). So `compass` estimates b, and
    the estimate scales and shifts the stages on the way up, as t does. These are told not b but
    `fold` * b: with 4, cameras a quarter turn apart are the same to them, enough for how a box is
    turned, and too little for a relief: a shape that looks right from the picture's side alone.

    Where an object stands follows from b itself and from the elevation. With `lay_down` the compass
    estimates both, and the stages on the way up get features laid on a level plane: they know the
    camera then, and reliefs are possible again.
    """

    def __init__(self, config):
        super().__init__()
        S, N, base = config.resolution, config.plane_size, config.unet_channels

        def width(side):
            return base * min(4, max(1, S // 2 // side))

        def block(side):
            return Block(width(side), 4 * base, attention=side <= 8)

        down = [S // 2 >> i for i in range(int(math.log2(S)) - 2)]             # S/2, ..., 8, 4
        up = [4 << i for i in range(int(math.log2(N)) - 2)]                    # 4, 8, ..., N/2
        self.base = base
        self.embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(),
                                   nn.Linear(4 * base, 4 * base))
        self.stem = nn.Conv2d(3, base, 4, stride=2, padding=1)
        self.down = nn.ModuleList(block(side) for side in down)
        self.shrink = nn.ModuleList(nn.Conv2d(width(2 * side), width(side), 3, stride=2, padding=1)
                                    for side in down[1:])
        self.middle = block(4)
        self.config, self.facing = config, None
        self.compass = (Compass(S, 3, depth=2) if config.lay_down else
                        Compass(S, 2, depth=1) if config.fold else None)
        self.turn = nn.Linear(2, 4 * base) if config.fold else None
        self.up = nn.ModuleList(block(side) for side in up)
        self.grow = nn.ModuleList(nn.Conv2d(width(side // 2), width(side), 1) for side in up[1:])
        self.out = nn.Sequential(nn.GroupNorm(8, width(N // 2)), nn.SiLU(), nn.Conv2d(
            width(N // 2), 3 * config.plane_channels, 3, padding=1))

    def forward(self, x_t, t):
        frequencies = 1e4 ** -torch.linspace(0, 1, self.base // 2, device=t.device)
        phase = t[:, None] * frequencies
        emb = self.embed(torch.cat([phase.sin(), phase.cos()], dim=1))         # (B, 4 base)
        h, skips = self.stem(x_t), {}                                          # (B, base, S/2, S/2)
        for i, block in enumerate(self.down):
            h = skips[h.shape[-1]] = block(self.shrink[i - 1](h) if i else h, emb)
        h = self.middle(h, emb)                                                # (B, c, 4, 4)
        if self.compass:
            self.facing = self.compass(x_t)                                    # (B, 2 or 3)
            facing = self.facing.detach()
        if self.config.fold:
            emb = emb + self.turn(multiply_angle(facing[:, :2], self.config.fold))
        if self.config.lay_down:
            camera = facing, self.config.focal, self.config.radius
            h, skips = lay_down(h, *camera), {side: lay_down(skip, *camera) for side, skip in
                                              skips.items() if side <= self.config.plane_size // 2}
        for i, block in enumerate(self.up):
            if i:
                h = F.interpolate(self.grow[i - 1](h), scale_factor=2)
            h = block(h + skips.get(h.shape[-1], 0), emb)                  # last: (B, c, N/2, N/2)
        return self.out(F.interpolate(h, scale_factor=2))                      # (B, 3C, N, N)


# ---- Triplanes and MLP: points -> density and colour -------------------------------------------

def sample_triplanes(planes, points):
    """Planes (B, 3, C, N, N) at points (B, P, 3) in [-1, 1]^3 -> features (B, P, C).

    Bilinear at the point's projections on xy, xz and yz, summed (Chan et al. 2022, section 3.1).
    A plane's first axis runs along its columns; -1 and 1 are its outermost texels' centres.
    """
    B, _, C, N, _ = planes.shape
    grid = points[:, :, [[0, 1], [0, 2], [1, 2]]].transpose(1, 2).reshape(B * 3, -1, 1, 2)
    features = F.grid_sample(planes.reshape(B * 3, C, N, N), grid, align_corners=True)
    return features.view(B, 3, C, -1).sum(dim=1).transpose(1, 2)               # (B, P, C)


class RadianceMLP(nn.Module):
    """s(p, P[p]): points (B, P, 3), features (B, P, C) -> density (B, P), colour (B, P, 3).

    Colour is RGB in [0, 1]. Density is per world unit and starts nearly transparent: a volume that
    starts opaque hides its inside from the gradient, and stays so.
    """

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
    """Where rays (B, R, 3) are inside the cube [-1, 1]^3 -> near, far (B, R), at least 0; both the
    point closest to the origin where a ray misses it."""
    d = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    a, b = (-1 - origins) / d, (1 - origins) / d
    near = torch.minimum(a, b).amax(-1).clamp(min=0)
    far = torch.maximum(a, b).amin(-1)
    closest = -(origins * directions).sum(-1).clamp(max=0)
    hit = far > near
    return torch.where(hit, near, closest), torch.where(hit, far, closest)


def composite(density, color, deltas, background):
    """Volume rendering by quadrature (Mildenhall et al. 2020, eq. 3).

    density, deltas (B, R, K), color (B, R, K, 3), background (3,) -> rgb (B, R, 3) and weights
    (B, R, K); the background gets 1 minus their sum. Colours are in [0, 1].
    """
    optical_depth = density * deltas
    before = F.pad(torch.cumsum(optical_depth, dim=-1)[..., :-1], (1, 0))
    weights = torch.exp(-before) * -torch.expm1(-optical_depth)                # T_i alpha_i
    left = 1 - weights.sum(-1, keepdim=True)
    return (weights[..., None] * color).sum(-2) + left * background, weights


def stratified(count, jitter):
    """The middle of each of `count` equal parts of [0, 1], or by jitter (..., count) anywhere."""
    return (torch.arange(count, device=jitter.device) + jitter) / count


def importance_samples(edges, weights, u):
    """Distances (B, R, F) drawn from coarse weights (B, R, K) over edges (B, R, K+1).

    u (B, R, F) in [0, 1] goes through their inverse distribution. Smoothing and a floor let it see
    what the coarse samples just missed (Barron et al. 2021, eq. 18).
    """
    padded = F.pad(weights, (1, 1), mode="replicate")
    smooth = torch.maximum(padded[..., :-1], padded[..., 1:])
    pdf = 0.5 * (smooth[..., :-1] + smooth[..., 1:]) + 0.01
    cdf = F.pad(torch.cumsum(pdf, -1) / pdf.sum(-1, keepdim=True), (1, 0))     # (B, R, K+1)
    i = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(1, pdf.shape[-1])
    low, high = cdf.gather(-1, i - 1), cdf.gather(-1, i)
    a, b = edges.gather(-1, i - 1), edges.gather(-1, i)
    return a + (b - a) * ((u - low) / (high - low)).clamp(0, 1)


def march(field, origins, directions, samples, fine_samples, background, jitter=None):
    """Render rays (B, R, 3) of a field -> rgb (B, R, 3) in [0, 1], depth, opacity (B, R).

    field: points (B, P, 3) -> density (B, P), colour (B, P, 3). Depth is the expected distance,
    to the cube's far side for what passes through. jitter (B, R, samples + fine_samples) in [0, 1]
    places samples at random, None in the middle.
    """
    near, far = (x[..., None] for x in ray_interval(origins, directions))      # (B, R, 1)
    if jitter is None:
        jitter = torch.full_like(near, 0.5).expand(*near.shape[:2], samples + fine_samples)

    def evaluate(t):                                                           # (B, R, K)
        points = origins[:, :, None] + t[..., None] * directions[:, :, None]
        density, color = field(points.flatten(1, 2))
        return density.view(t.shape), color.view(*t.shape, 3)

    def intervals(t):
        """Each sample stands for what is nearer to it than to its neighbours."""
        return torch.cat([near, (t[..., 1:] + t[..., :-1]) / 2, far], dim=-1)  # (B, R, K+1)

    t = near + (far - near) * stratified(samples, jitter[..., :samples])
    density, color = evaluate(t)
    if fine_samples:
        edges = intervals(t)
        with torch.no_grad():
            _, weights = composite(density, color, edges.diff(dim=-1), background)
            u = stratified(fine_samples, jitter[..., samples:])
            t_fine = importance_samples(edges, weights, u)
        density_fine, color_fine = evaluate(t_fine)
        t, order = torch.sort(torch.cat([t, t_fine], dim=-1), dim=-1)
        density = torch.cat([density, density_fine], dim=-1).gather(-1, order)
        color = torch.cat([color, color_fine], dim=-2).take_along_dim(order[..., None], dim=-2)
    rgb, weights = composite(density, color, intervals(t).diff(dim=-1), background)
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

    def march(self, planes, origins, directions, jitter=None, fine=True):
        """Rays (B, R, 3) through planes -> rgb (B, R, 3) in [0, 1], depth, opacity (B, R); without
        importance samples if not `fine`. jitter: as for the function of this name.
        """
        def field(points):
            return self.mlp(points, sample_triplanes(planes, points))
        return march(field, origins, directions, self.config.samples,
                     self.config.fine_samples if fine else 0, self.background, jitter)

    def render(self, planes, poses, focal=None, resolution=None, fine=True):
        """Planes (B, 3, C, N, N) from poses (B, 4, 4) or a single one -> rgb (B, 3, S, S) in
        [-1, 1], depth and opacity (B, S, S). focal and resolution: None is the config's. Not
        `fine`: by stratified samples alone, in half the time.
        """
        S, poses = resolution or self.config.resolution, poses.expand(len(planes), 4, 4)
        origins, directions = camera_rays(poses, focal or self.config.focal, S)
        points = self.points_at_once * (1 if planes.device.type == "cpu" else 64)
        rays = points // (len(planes) * self.config.samples) + 1
        parts = [self.march(planes, o, d, fine=fine)
                 for o, d in zip(origins.split(rays, 1), directions.split(rays, 1))]
        rgb, depth, opacity = (torch.cat(part, dim=1) for part in zip(*parts))
        return (rgb.mT.reshape(-1, 3, S, S) * 2 - 1, depth.view(-1, S, S), opacity.view(-1, S, S))

    def forward(self, x_t, t, poses, pixels=None, jitter=None):
        """x0_hat (B, 3, S, S), or at the pixel numbers (B, n) alone (B, n, 3), in [-1, 1]."""
        planes = self.encode(x_t, t)
        if pixels is None:
            return self.render(planes, poses)[0]
        rays = camera_rays(poses, self.config.focal, self.config.resolution)
        origins, directions = (r.take_along_dim(pixels[..., None], dim=1) for r in rays)
        return self.march(planes, origins, directions, jitter)[0] * 2 - 1


# ---- Training ----------------------------------------------------------------------------------

AHEAD = {"cuda": 64}                # steps' scenes traced at once: tracing waits for the GPU
HELD_OUT = -1                       # the seed of scenes that training, which refuses it, never sees


def denoising_loss(model, ema, x0, poses, progress, rank=0, world=1, seen=None):
    """One step's loss on images x0 (B, 3, S, S) seen from poses (B, 4, 4), at random t and pixels.

    The paper's scheme: noise the picture, encode it, render it again from its own camera. From
    `other_side_from` on, in a share of the examples what is noised is what the averaged model shows
    of the scene from another picture's camera. So planes must hold where the camera did not look,
    and training still sees one view a scene. With `shift` that scene is moved along the ground: so
    what is sharp in the middle teaches what stands off it. seen: images and poses, like x0 and
    poses, that are encoded in their place (None: themselves).
    Each of `world` processes draws the numbers of all and takes its own: together they are one, but
    that each encodes the first of its own pictures from another side, from cameras of its own.
    """
    config, B, device = ema.config, len(x0), x0.device
    mine = slice(rank * B, (rank + 1) * B)

    def draw(*shape):
        return torch.rand(world * B, *shape, device=device)[mine]

    # t: one draw in each of B equal parts; the first ones, a share `clean`, are 0, the rest 1..T
    u = (torch.randperm(world * B, device=device)[mine] + draw()) / (world * B)
    noisy = 1 + ((u - config.clean) / (1 - config.clean) * config.timesteps).long()
    t = torch.where(u < config.clean, 0, noisy.clamp(1, config.timesteps))
    source, seen_from = seen or (x0, poses)
    others = round(B * config.other_side) if progress >= config.other_side_from else 0
    if others:                                  # the first ones: t is random in any case
        source, seen_from = source.clone(), seen_from.clone()
        seen_from[:others] = poses.roll(1, dims=0)[:others]
        moved = torch.zeros_like(poses)         # by as much as a scene: the camera sees no change
        moved[:others, :2, 3] = config.shift * (2 * draw(2)[:others] - 1)
        with torch.no_grad():
            planes = ema.encode(x0[:others], 0)
            source[:others] = ema.render(planes, (seen_from - moved)[:others])[0]
        poses = poses + moved
    noise = torch.randn(world * B, *x0.shape[1:], device=device)[mine]
    x_t = ema.schedule.add_noise(source, t, noise)
    # Mere background is soon learnt: its pixels have weight `empty_rays` in the draw, all others
    # and a margin of a pixel 1. The loss is not corrected for it: what is to be seen counts more.
    unlike = (x0 - (ema.background * 2 - 1).view(3, 1, 1)).abs().amax(1, keepdim=True) > 0.02
    weight = F.max_pool2d(unlike.float(), 3, 1, 1).flatten(1).clamp(min=config.empty_rays)
    keys = draw(weight.shape[1]).log() / weight         # the largest: Efraimidis & Spirakis 2006
    pixels = keys.topk(min(config.rays, keys.shape[1])).indices                # (B, n)
    jitter = draw(pixels.shape[1], config.samples + config.fine_samples)
    x0_hat = model(x_t, t, poses, pixels, jitter)                              # (B, n, 3)
    target = x0.flatten(2).mT.take_along_dim(pixels[..., None], dim=1)
    loss = F.l1_loss(x0_hat, target) if config.loss == "l1" else F.mse_loss(x0_hat, target)
    if ema.unet.compass:        # teaches the compass alone: the planes are not to bend its estimate
        unet = getattr(model, "module", model).unet         # `module`: of a parallel one
        facing, unet.facing = unet.facing, None             # kept, it would forbid deepcopy
        azimuth, sine = F.normalize(seen_from[:, :3, 3], dim=1).split((2, 1), dim=1)
        truth = torch.cat([F.normalize(azimuth, dim=1), sine], dim=1)
        error = facing - truth[:, :facing.shape[1]]
        error[:, 2:] *= 5                                   # elevations differ by less
        loss = loss + 0.1 * error.square().mean()
    return loss


def training_pictures(config, device, rank, world):
    """A function step -> images, poses; and the config with the set's own fields.

    With `scenes` = 0 no scene comes twice in a training, but another one with the same seed has the
    same scenes; else the pictures of a fixed set come in random order.
    """
    B, S, built_in = config.batch, config.resolution, SETS.get(config.data)
    fresh, ahead = built_in and config.scenes == 0, AHEAD.get(device.type, 1)
    views = load(config.data, 1 if fresh else config.scenes or None, config.views, S, config.seed)
    images, poses = views.images.flatten(0, 1), views.poses.flatten(0, 1)

    @lru_cache(maxsize=1)
    def trace(i):
        """The scenes of `ahead` steps, from step i * ahead on."""
        return synthetic(config.data, ahead * B, 1, S, config.seed, device,
                         start=(i * world + rank) * ahead * B, depth=False)

    def draw(step):
        if fresh:
            i = step % ahead * B
            new = trace(step // ahead)[i:i + B]
            return new.images[:, 0], new.poses[:, 0]
        chosen = torch.randint(len(images), (world * B,))[rank * B:(rank + 1) * B]
        return images[chosen].to(device), poses[chosen].to(device)

    radius = poses[:, :3, 3].norm(dim=-1)
    angles = torch.rad2deg(torch.asin(poses[:, 2, 3] / radius))
    elevation = built_in.elevation if built_in else (angles.min().item(), angles.max().item())
    return draw, dataclasses.replace(
        config, focal=views.focal, background=tuple(views.background.tolist()),
        radius=radius.mean().item(), elevation=elevation)


def train(config, loss=denoising_loss):
    """Train from single posed pictures; logs, checkpoints, resumes -> the averaged model.

    Writes OUT/DATA.pt and OUT/DATA_samples.png every two minutes. An earlier OUT/DATA.pt is gone
    on with under `resume`, else kept as DATA.old.pt. Under torchrun each process has scenes of its
    own and gradients are averaged. Raises ValueError for what cannot be trained, and
    FloatingPointError when loss or weights are no longer finite. `loss`: as `denoising_loss`.
    """
    config.validate()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))    # what "cuda" means from here on
    device = pick_device(config.device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    pictures, config = training_pictures(config, device, rank, world)
    torch.manual_seed(config.seed)
    model = RenderDiffusion(config).to(device)
    if config.init:
        weights = load_checkpoint(config.init, device)
        for name in ("resolution", "plane_size", "plane_channels", "unet_channels", "mlp_hidden",
                     "fold", "lay_down"):
            if (its := getattr(weights.config, name)) != getattr(config, name):
                raise ValueError(f"the weights {config.init} are of another model: give this one, "
                                 f"too, {name} = {its}")
        model.load_state_dict(weights.state_dict())
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.bf16 = bf16_is_fast(device)
    if config.compile:
        model.unet.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                 fused=device.type in ("cuda", "cpu"))
    path = Path(config.out) / f"{Path(config.data).resolve().name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"nothing can be written to {path.parent}: choose another --out")
    step, seconds, losses = 0, 0.0, []
    if config.resume:
        step, seconds = resume(path, model, ema, optimizer)
    elif path.exists() and rank == 0:
        os.replace(path, path.with_suffix(".old.pt"))
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    saved = logged = time.time()
    start = saved - seconds
    stop, ended = [], False         # Ctrl-C waits for the step's end: half a one cannot be resumed
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        while True:
            progress = seconds / 60 / config.minutes if config.minutes else step / config.steps
            done = progress >= 1 or ended
            save = rank == 0 and (done or time.time() - saved > 120)
            if losses and (done or save or time.time() - logged > 5):
                values = torch.stack(losses).tolist()           # waits for a GPU
                finite = [*map(math.isfinite, values),
                          all(weight.isfinite().all() for weight in model.parameters())]
                if not all(finite):
                    raise FloatingPointError(
                        "the loss or the weights are not finite at step "
                        f"{step - len(values) + finite.index(False)}: try a lower --lr; what was "
                        f"saved before is in {config.out}")
                if rank == 0:
                    speed = len(values) * config.batch * world / (time.time() - logged)
                    print(f"step {step}  loss {np.mean(values):.4f}  {speed:.0f} images/s  "
                          f"{seconds / 60:.1f} min, {seconds / 60 * (1 / progress - 1):.1f} left",
                          flush=True)
                losses, logged = [], time.time()
            if save:
                save_checkpoint(path, ema, dict(model=model.state_dict(), step=step,
                                                seconds=seconds, optimizer=optimizer.state_dict()))
                if not ended:
                    print(health(ema, path.with_name(path.stem + "_samples.png")), flush=True)
                saved = logged = time.time()
            if done:
                break
            for group in optimizer.param_groups:                # warm-up, constant, decay
                group["lr"] = config.lr * min(1, (step + 1) / 100, max(0.02, (1 - progress) / 0.3))
            torch.manual_seed(mix(mix(config.seed) ^ step))     # resumed, it draws the same
            value = loss(parallel, ema, *pictures(step), progress, rank, world)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                                     1 - min(config.ema, (1 + step) / (10 + step)))
            losses.append(value.detach())
            step, seconds, ended = step + 1, time.time() - start, bool(stop)
            if world > 1:                                       # all stop at the same step
                shared = torch.tensor([seconds, ended], device=device)
                torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
                seconds, ended = shared[0].item(), bool(shared[1])
    finally:
        signal.signal(signal.SIGINT, before)
    if rank == 0:
        print(f"{step} steps, {seconds / 60:.1f} minutes; wrote {path}"
              + "; go on with --resume" * ended)
    if world > 1:
        torch.distributed.destroy_process_group()
    return ema


# ---- Sampling ----------------------------------------------------------------------------------

def noise_levels(schedule, steps, top=None):
    """steps + 1 levels rising from 0 to `top` (None: T): few of them lie evenly in log(SNR), as in
    DPM-Solver (Lu et al. 2022, arXiv 2206.00927), and the more there are, the more evenly in t.
    So steps are short near all noise, where it is decided what the picture shows, and near none.
    ValueError where there are fewer levels than steps.
    """
    top = schedule.T if top is None else top
    if not 1 <= steps <= top:
        raise ValueError(f"steps must be from 1 to {top}, not {steps}")
    log_snr = schedule.alpha_bar[:top + 1].logit()                             # falls
    # log(SNR) is infinite at 0 and nearly so at T: even but for a sixth of a usual step at each end
    end = max(1, top // (6 * steps))
    even = torch.linspace(*log_snr[[end, top - end]], steps + 1)
    found = torch.searchsorted(-log_snr, -even).tolist()
    # i + ...: each is at least one above the last, also where `even` lies closer than levels do
    return [0, *(i + (top - steps) * found[i] // top for i in range(1, steps)), top]


def standard_normal(like, generator):
    """Noise of a picture's shape, drawn on the CPU: a seed means the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


@torch.no_grad()
def denoise(model, x_t, poses, levels, eta, generator, watch=None):
    """From x_t at the last of the rising `levels` down to their first, 0 -> images, planes.

    With eta = 0 x0_hat is first moved on along the way it went since the step before:
    DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), of which DDIM is the first
    order. watch(t, x_t, x0_hat, depth), if given, sees every step.
    """
    lam, before = model.schedule.alpha_bar.logit() / 2, None    # log(alpha / sigma), infinite at 0
    for t, s in zip(levels[:0:-1], levels[-2::-1]):
        planes = model.encode(x_t, t)
        x0_hat, depth, _ = model.render(planes, poses, fine=s == 0)            # fine: what is kept
        D = x0_hat = x0_hat.clamp(-1, 1)
        if watch:
            watch(t, x_t, x0_hat, depth)
        if eta == 0 and before and s > 0:                       # the last step returns x0_hat
            u, x0_hat_u = before
            D = x0_hat + (lam[s] - lam[t]) / (lam[t] - lam[u]) / 2 * (x0_hat - x0_hat_u)
        mean, variance = model.schedule.posterior(D, x_t, t, s, eta)
        x_t, before = mean + variance.sqrt() * standard_normal(x_t, generator), (t, x0_hat)
    return x_t, planes


def generate(model, poses, steps=50, eta=1.0, seed=0):
    """New scenes: poses (B, 4, 4), through which they are denoised -> images (B, 3, S, S), planes.

    eta = 1: Ho et al. 2020, algorithm 2, in `steps` of T; eta = 0: no fresh noise, 20 suffice.
    """
    S, generator = model.config.resolution, torch.Generator().manual_seed(seed)
    x_T = standard_normal(poses.new_empty(len(poses), 3, S, S), generator)
    return denoise(model, x_T, poses, noise_levels(model.schedule, steps), eta, generator)


# ---- Reconstruction ----------------------------------------------------------------------------

@torch.no_grad()
def find_poses(model, images, masks=None):
    """The cameras (B, 4, 4) of images (B, 3, S, S), known where masks (B, 1, S, S) are 1.

    The encoder needs none, so the picture's planes are rendered from candidates on the training
    cameras' sphere, and round the best one on finer and finer grids.
    """
    config, device = model.config, images.device
    low, high = config.elevation
    known = torch.ones_like(images[:, :1]) if masks is None else masks.to(images)
    images = torch.where(known > 0.5, images, (model.background * 2 - 1).view(3, 1, 1))
    planes = model.encode(images, 0)
    best = torch.zeros(2, len(images), device=device)           # azimuth, elevation
    best[1] = (low + high) / 2
    for side, width, height, m, n in ((2, 180.0, (high - low) / 2, 30, 4), (1, 9.0, 5.0, 5, 5),
                                      (1, 3.0, 2.0, 5, 5)):
        S = config.resolution // side
        target, weight = F.interpolate(images, (S, S), mode="area"), F.adaptive_avg_pool2d(known, S)
        middle, lowest = best, torch.full((len(images),), math.inf, device=device)
        for a in torch.linspace(-width, width, m).tolist():
            for e in torch.linspace(-height, height, n).tolist():
                candidate = torch.stack([middle[0] + a, (middle[1] + e).clamp(low, high)])
                shown, _, _ = model.render(planes, orbit(*candidate, config.radius), resolution=S)
                error = (weight * (shown - target).square()).mean((1, 2, 3))
                best = torch.where(error < lowest, candidate, best)
                lowest = torch.minimum(error, lowest)
    return orbit(*best, config.radius)


@torch.no_grad()
def reconstruct(model, images, poses=None, t_r=0, steps=None, seed=0):
    """Images (B, 3, S, S) in [-1, 1] -> planes, which `model.render` shows from anywhere.

    t_r = 0 encodes the picture as it is. With t_r up to T it is noised to level t_r and denoised
    in `steps` (None: 50 for all of T), which moves it towards the training set's, and loses what
    the noise hides. poses (B, 4, 4) serve t_r > 0 alone, and are found where None. ValueError for a
    t_r outside 0..T.
    """
    T = model.config.timesteps
    if t_r not in range(T + 1):         # NaN is not, 300.0 is
        raise ValueError(f"t_r must be a whole number from 0 to {T}, not {t_r}")
    if (t_r := int(t_r)) == 0:
        return model.encode(images, 0)
    poses = find_poses(model, images) if poses is None else poses
    generator = torch.Generator().manual_seed(seed)
    x_t = model.schedule.add_noise(images, t_r, standard_normal(images, generator))
    steps = min(t_r, math.ceil(50 * t_r / T)) if steps is None else steps
    levels = noise_levels(model.schedule, steps, t_r)
    return denoise(model, x_t, poses, levels, 1.0, generator)[1]


# ---- Inpainting --------------------------------------------------------------------------------

def repaint_schedule(steps, jump_length, jump_n_sample):
    """RePaint's walk over noise levels (Lugmayr et al. 2022, released code): a list of indices.

    From steps - 1 down to -1 by ones, and after every `jump_length` of them back up again,
    `jump_n_sample` - 1 times at each place. Index i is the state at level i + 1; -1 is clean.
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


@torch.no_grad()
def inpaint(model, images, masks, poses=None, steps=50, jump_length=5, jump_n_sample=5, seed=0,
            guidance=4.0):
    """Fill images (B, 3, S, S) where masks (B, 1, S, S) are 0 -> images, planes.

    RePaint (Lugmayr et al. 2022, algorithm 1) as its code has it: before each step down, the known
    pixels are set to the picture noised to the level of x_t; each jump up noises everything. (The
    paper's line 5 misprints that noise's factor; it is sqrt(1 - alpha_bar).) Beyond RePaint, each
    step also goes down the gradient of what x0_hat gets wrong where the picture is known (Chung et
    al. 2023, algorithm 1), or else what fills a large hole ignores what is round it; guidance = 0
    leaves this away. At the end the known pixels are put back as they are, and this picture is
    encoded at t = 0: it shows the known part exactly, the planes reconstruct it. Poses (B, 4, 4)
    are found where None. ValueError for masks that do not fit.
    """
    if masks.shape != (shape := (len(images), 1, *images.shape[2:])):
        raise ValueError(f"masks must be {shape} to fit the images, not {tuple(masks.shape)}")
    schedule, generator = model.schedule, torch.Generator().manual_seed(seed)
    known = (masks > 0.5).to(images)
    poses = find_poses(model, images, known) if poses is None else poses
    levels = noise_levels(schedule, steps)
    x = standard_normal(images, generator)
    indices = repaint_schedule(steps, jump_length, jump_n_sample)
    for i, j in zip(indices, indices[1:]):
        t, s = levels[i + 1], levels[j + 1]
        noise = standard_normal(x, generator)
        if s > t:                                               # a jump up
            left = schedule.alpha_bar[s] / schedule.alpha_bar[t]
            x = left.sqrt() * x + (1 - left).sqrt() * noise
            continue
        x = known * schedule.add_noise(images, t, noise) + (1 - known) * x
        if s == 0:                              # what is kept: with importance samples
            x = model.render(model.encode(x, t), poses)[0]
            break
        with torch.enable_grad():
            x.requires_grad_()
            x0_hat = model.render(model.encode(x, t), poses, fine=False)[0]
            misfit = ((known * (x0_hat - images)).square().sum((1, 2, 3)) + 1e-12).sqrt()
            gradient, = torch.autograd.grad(misfit.sum(), x)
        x, x0_hat = x.detach(), x0_hat.detach().clamp(-1, 1)
        mean, variance = schedule.posterior(x0_hat, x, t, s)
        x = mean + variance.sqrt() * standard_normal(x, generator) - guidance * gradient
    x = known * images + (1 - known) * x.clamp(-1, 1)
    return x, model.encode(x, 0)


# ---- Evaluation --------------------------------------------------------------------------------

def to_unit(images):
    """[-1, 1] -> [0, 1], cut off."""
    return (images / 2 + 0.5).clamp(0, 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images (B, 3, S, S) in [0, 1] -> (B,)."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity of images (B, 3, S, S) in [0, 1] -> (B,), by Wang et al. 2004, eq. 13.

    Gaussian window, sigma 1.5, 11 x 11 pixels, wherever it lies inside the picture.
    """
    window = torch.softmax(-(torch.arange(11, device=a.device) - 5.0) ** 2 / 4.5, dim=0)

    def blur(images):
        return F.conv2d(F.conv2d(images.flatten(0, 1)[:, None], window.view(1, 1, 1, 11)),
                        window.view(1, 1, 11, 1))                              # (3B, 1, S-10, S-10)
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a ** 2 + blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    similarity = ((2 * mean_a * mean_b + 1e-4) / (mean_a ** 2 + mean_b ** 2 + 1e-4)
                  * (2 * covariance + 9e-4) / (variances + 9e-4))
    return similarity.view(len(a), -1).mean(1)


@torch.no_grad()
def evaluate(model, views, t_r=0):
    """Reconstruct view 0 of each scene, compare with all views -> dict of psnr (dB) and ssim.

    Keys: input (view 0), novel (the others), and for the novel views what needs no 3D at all:
    baseline_mean_image, baseline_input_copied. ValueError for `Views` of one view a scene.
    """
    if views.images.shape[1] < 2:
        raise ValueError("evaluation needs at least 2 views a scene: the input and a novel one")
    scores, mean_image = {}, views.images.flatten(0, 1).mean(0)
    for some in (views[i:i + 16] for i in range(0, len(views), 16)):
        planes = reconstruct(model, some.images[:, 0], some.poses[:, 0], t_r)
        for v, (truth, poses) in enumerate(zip(some.images.unbind(1), some.poses.unbind(1))):
            shown = model.render(planes, poses, focal=views.focal)[0]
            guesses = {"input": shown} if v == 0 else {
                "novel": shown, "baseline_mean_image": mean_image.expand_as(truth),
                "baseline_input_copied": some.images[:, 0]}
            for key, guess in guesses.items():
                pair = to_unit(guess), to_unit(truth)
                scores.setdefault(key, []).append(torch.stack([psnr(*pair), ssim(*pair)]))
    return {key: dict(zip(("psnr", "ssim"), torch.cat(score, dim=1).mean(1).tolist()))
            for key, score in scores.items()}


def health(model, path):
    """What the loss does not tell: held-out novel views, samples (written to path), the volume."""
    config, device, text = model.config, model.background.device, ""
    if config.data in SETS:
        scores = evaluate(model, synthetic(config.data, 32, 3, config.resolution, HELD_OUT, device,
                                           depth=False))
        text = "  held-out PSNR: input view {:.2f} dB, novel views {:.2f} dB\n".format(
            *(scores[key]["psnr"] for key in ("input", "novel")))
    images, planes = generate(model, turn_poses(model, 0, 8), min(10, config.timesteps), eta=0.0)
    save_grid(path, {"samples": images})
    points = torch.rand(8, 4096, 3, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    density, _ = model.mlp(points, sample_triplanes(planes, points))
    filled = (density > 10).float().mean()          # half of the light is gone after 0.07 units
    if filled < 1e-3 or filled > 0.9:
        text += (f"  warning: the volume is {'empty' if filled < 0.5 else 'opaque'} everywhere; "
                 "if it stays so, train anew with a lower --lr\n")
    return f"{text}  samples: {path}"


# ---- Checkpoints and devices -------------------------------------------------------------------

VERSION, SHIPPED = 1, Path(__file__).resolve().parent / "checkpoints"


def write(path, writer):
    """Call writer(file) on a temporary file, then rename it to path: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, training=None):
    """Write the (averaged) model's weights and config, in half precision, to share; or in full,
    with the dict `training` beside them, to resume."""
    weights, config = model.state_dict(), model.config
    if training is None:
        weights = {name: weight.half() for name, weight in weights.items()}
        config = dataclasses.replace(config, device="auto", out="out", resume=False, init="")
    state = {"version": VERSION, "config": dataclasses.asdict(config), "ema": weights}
    buffer = BytesIO()          # to a file, torch makes a RuntimeError of a full disk's OSError
    torch.save({**state, **(training or {})}, buffer)
    write(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(name_or_path, device="cpu"):
    """The averaged model in eval mode, with `.config`, from a file or a name in checkpoints/;
    ValueError or OSError, one sentence, where there is none that fits."""
    shipped = SHIPPED / f"{name_or_path}.pt"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.pt")))
        raise FileNotFoundError(f"there is no checkpoint {path}; train one, or name one: {names}")
    try:
        with ZipFile(path) as file:                 # torch does not look at the check sums
            damaged = sum(part.file_size for part in file.infolist()) > path.stat().st_size
            if damaged or file.testzip():
                raise ValueError("its parts do not have their sizes or check sums")
        state = torch.load(path, map_location=device, weights_only=True)
        if state["version"] != VERSION:
            raise ValueError(f"its format is {state['version']}, and this program's {VERSION}")
        names = [f.name for f in dataclasses.fields(Config)]        # what the model depends on:
        if missing := set(names[:names.index("loss")]) - set(state["config"]):
            raise ValueError(f"its config has no {', '.join(sorted(missing))}")
        config = Config(**state["config"]).validate()
        with torch.device("meta"):                  # its sizes, before memory is taken for them
            RenderDiffusion(config).load_state_dict(state["ema"], assign=True)
        if not all(weight.abs().max() < 1e6 for weight in state["ema"].values()):
            raise ValueError("its weights are not finite, or beyond a million")
        model = RenderDiffusion(config)
        model.load_state_dict(state["ema"])
    except Exception as error:                      # torch.load alone raises a dozen kinds
        raise ValueError(f"{path} is no checkpoint that fits this program, or is damaged: "
                         f"{first_line(error)}") from None
    return model.to(device).eval().requires_grad_(False)


def resume(path, model, ema, optimizer):
    """Fill these three from a training's checkpoint -> its step and seconds; ValueError, one
    sentence, for what cannot be gone on with."""
    load_checkpoint(path)                           # says what is wrong with weights and config
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        if "optimizer" not in state:
            raise ValueError("it holds weights alone; train anew, without --resume")
        for name in ("data", "resolution", "fold", "lay_down", "timesteps", "schedule", "seed"):
            if state["config"][name] != getattr(model.config, name):
                raise ValueError(f"it was trained with {name} = {state['config'][name]!r}")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if any(value.layout != torch.strided or value.shape not in ((), weight.shape)
               for weight, kept in optimizer.state.items() for value in kept.values()):
            raise ValueError("its optimizer's state does not fit its weights")
        for name in ("step", "seconds"):
            check(name, state[name])
        return int(state["step"]), float(state["seconds"])
    except Exception as error:                      # torch raises half a dozen kinds
        raise ValueError(f"{path} cannot be gone on with: {first_line(error)}") from None


def first_line(error):
    """An error's first line, shortened: what fits into one sentence."""
    return str(error).strip().split("\n")[0][:300]


def pick_device(name):
    """A torch device; auto is cuda, mps or cpu, the first there is. ValueError for unknown ones."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {first_line(error)}") from None


def bf16_is_fast(device):
    """Whether bfloat16 pays for the U-Net: old GPUs and CPUs have it by slow emulation alone."""
    if device.type == "cpu":                        # an old torch has neither: `bool()` is False
        return any(getattr(torch.cpu, f"_is_{name}_supported", bool)()
                   for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ---- Pictures ----------------------------------------------------------------------------------

def to_bytes(images):
    """(B, 3, S, S) in [-1, 1] -> (B, S, S, 3) numpy uint8."""
    return (to_unit(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def depth_colors(depth):
    """Depth (B, S, S) as colours (B, 3, S, S) in [-1, 1]: near is blue, far is red."""
    near, far = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    unit = (depth - near) / (far - near).clamp(min=1e-6)
    colors = matplotlib.colormaps["jet"](unit.cpu().numpy())[..., :3]
    return torch.tensor(colors).permute(0, 3, 1, 2).float() * 2 - 1


def turn_poses(model, azimuth, count):
    """`count` poses (count, 4, 4) round the scene from `azimuth` on, at the middle elevation."""
    azimuths = azimuth + torch.arange(count, device=model.background.device) * 360 / count
    return orbit(azimuths, sum(model.config.elevation) / 2, model.config.radius)


def save_grid(path, rows):
    """Write a PNG: rows is a dict from a label to images (B, 3, S, S), a column a scene."""
    width = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.4 + width, len(rows)), dpi=128, layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for line, (label, images) in zip(axes, rows.items()):
        for axis, image in zip(line, to_bytes(images)):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    write(path, lambda file: figure.savefig(file, format="png"))


def save_turntable(path, model, planes, frames=24):
    """Write a GIF of all planes (B, ...) side by side, turning once round."""
    pictures, zoom = [], max(1, 128 // model.config.resolution)
    for pose in turn_poses(model, 0, frames):
        strip = np.concatenate(list(to_bytes(model.render(planes, pose)[0])), axis=1)
        pictures.append(Image.fromarray(strip.repeat(zoom, 0).repeat(zoom, 1)))
    write(path, lambda file: pictures[0].save(file, format="GIF", save_all=True, loop=0,
                                              duration=80, append_images=pictures[1:]))


def surface_points(model, planes, poses, resolution=64, samples=128):
    """Where rays from poses (V, 4, 4) are half stopped by one scene's planes (1, 3, C, N, N):
    points, unit normals and colours in [0, 1], each (P, 3).
    """
    def field(points):
        return model.mlp(points, sample_triplanes(planes, points))

    parts = []
    for pose in poses:
        origins, directions = camera_rays(pose[None], model.config.focal, resolution)
        near, far = (x[..., None] for x in ray_interval(origins, directions))  # (1, R, 1)
        step = (far - near) / samples
        edges = near + step * torch.arange(samples + 1, device=near.device)    # (1, R, K + 1)
        middles = (edges[..., 1:] - step / 2)[..., None]                       # (1, R, K, 1)
        points = origins[:, :, None] + middles * directions[:, :, None]
        with torch.no_grad():
            density, _ = field(points.flatten(1, 2))
        depth = F.pad(torch.cumsum(density.view(points.shape[:-1]) * step, -1), (1, 0))
        i = (depth < math.log(2)).sum(-1, keepdim=True)         # the first edge with half stopped
        hit, i = i[..., 0] <= samples, i.clamp(max=samples)
        a, b = depth.gather(-1, i - 1), depth.gather(-1, i)     # optical depths
        t = edges.gather(-1, i - 1) + step * (math.log(2) - a) / (b - a).clamp(min=1e-9)
        points = (origins + t * directions)[hit][None].requires_grad_()        # (1, P, 3)
        with torch.enable_grad():
            density, color = field(points)
            normal = -torch.autograd.grad(density.sum(), points)[0]            # out of the matter
        parts.append(torch.stack([points.detach(), F.normalize(normal, dim=-1), color.detach()]))
    return torch.cat(parts, dim=2)[:, 0]                                       # (3, P, 3)


def save_ply(path, points, normals, colors):
    """Write points, normals and colours in [0, 1], each (P, 3), as a binary .ply point cloud."""
    header = "\n".join([
        "ply", "format binary_little_endian 1.0", f"element vertex {len(points)}",
        *(f"property float {name}" for name in ("x", "y", "z", "nx", "ny", "nz")),
        *(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header", ""])
    floats = torch.cat([points, normals], dim=1).view(torch.uint8)             # (P, 24) bytes
    rows = torch.cat([floats, (colors * 255).round().byte()], dim=1).cpu().numpy()
    write(path, lambda file: file.write(header.encode() + rows.tobytes()))


# ---- Command line ------------------------------------------------------------------------------

def finish(rows, model, planes, out, name):
    """Write OUT/NAME.png from rows and OUT/NAME.gif from planes (B, ...), and name them."""
    png, gif = Path(out) / f"{name}.png", Path(out) / f"{name}.gif"
    save_grid(png, rows)
    save_turntable(gif, model, planes)
    print(f"wrote {png} and {gif}")


def around(model, planes, poses, views, mark=""):
    """Rows for `finish`: depth from poses (B, 4, 4), then views from all sides."""
    rows = {f"depth{mark}": depth_colors(model.render(planes, poses)[1])}
    return rows | {f"view {v + 1}{mark}": model.render(planes, pose)[0]
                   for v, pose in enumerate(turn_poses(model, 45, views))}


def input_pictures(model, image, fit, azimuth, elevation, seed, count):
    """The picture file and its camera, if it is given, or scenes that training never saw -> images
    (B, 3, S, S), poses (B, 4, 4) or one or None, four other cameras, and what they see if known."""
    config, device = model.config, model.background.device
    if image is None:
        views = load(config.data, count, 5, config.resolution, HELD_OUT - seed, device)
        (images, *truths), (poses, *others) = views.images.unbind(1), views.poses.unbind(1)
        return images, poses, others, truths
    if (azimuth is None) != (elevation is None):
        raise ValueError("a camera needs both --azimuth and --elevation, or leave both away")
    images = read_image(image, config.resolution, config.background, fit)[None].to(device)
    pose = None if azimuth is None else orbit(azimuth, elevation, config.radius).to(device)
    return images, pose, turn_poses(model, 45, 4), []


def run_generate(model, out, seed, count=8, steps=20, eta=0.0, name="generate"):
    """New scenes, each seen from four more sides."""
    poses = turn_poses(model, 0, count)
    images, planes = generate(model, poses, steps, eta, seed)
    finish({"generated": images} | around(model, planes, poses, 4), model, planes, out, name)


def run_reconstruct(model, out, seed, image=None, fit="crop", t_r=(0,), steps=None, azimuth=None,
                    elevation=None, name="reconstruct"):
    """3D from one picture, seen from its own camera and from others; beside the truth if known."""
    def decibels(a, b):
        return f"{psnr(to_unit(a), to_unit(b)).mean():.2f} dB"

    images, poses, others, truths = input_pictures(model, image, fit, azimuth, elevation, seed, 8)
    poses = find_poses(model, images) if poses is None else poses
    rows, views = {"input": images}, {}
    for level in t_r:
        planes = reconstruct(model, images, poses, level, steps, seed)
        rgb, depth, _ = model.render(planes, poses)
        rows |= {f"t_r = {level}": rgb, f"depth, t_r = {level}": depth_colors(depth)}
        views[level] = [model.render(planes, other)[0] for other in others]
        print(f"t_r = {level}: PSNR {decibels(rgb, images)} input view" + (
            f", {decibels(torch.cat(views[level]), torch.cat(truths))} novel views"
            if truths else ""))
    for v in range(4 if len(t_r) == 1 else 2):
        rows |= {f"view {v + 1}, truth": truths[v]} if truths else {}
        rows |= {f"view {v + 1}, t_r = {level}": views[level][v] for level in t_r}
    finish(rows, model, planes, out, name)


def run_inpaint(model, out, seed, image=None, mask=None, fit="crop", steps=20, azimuth=None,
                elevation=None, fillings=1, name="inpaint"):
    """Fill the masked part of a picture, and look at the result from other sides."""
    images, poses, _, _ = input_pictures(model, image, fit, azimuth, elevation, seed, 4)
    masks, S = torch.ones_like(images[:, :1]), images.shape[-1]
    if mask is None:                                # a square of 40 % of the side, in the middle
        masks[:, :, round(0.3 * S):round(0.7 * S), round(0.3 * S):round(0.7 * S)] = 0
    else:
        masks[:] = read_mask(mask, S, image and open_picture(image).size, fit)
    poses = find_poses(model, images, masks) if poses is None else poses
    rows = {"input": images, "masked": images * masks + masks - 1}
    for k in range(fillings):
        filled, planes = inpaint(model, images, masks, poses, steps, jump_n_sample=2, seed=seed + k)
        mark = f", filling {k + 1}" if fillings > 1 else ""
        rows |= {f"result{mark}": filled}
        rows |= around(model, planes, poses, 4 if fillings == 1 else 2, mark)
    finish(rows, model, planes, out, name)


def run_demo(model, out, seed):
    """All from the shipped weights: generation, reconstruction at three t_r, two inpaintings."""
    run_generate(model, out, seed, name="demo_generate")
    run_reconstruct(model, out, seed, t_r=(0, 200, 500), name="demo_reconstruct")
    run_inpaint(model, out, seed, fillings=2, name="demo_inpaint")


def run_export(model, out, seed, image=None, fit="crop", count=4):
    """Scenes, generated or from a picture, as coloured point clouds for Blender or MeshLab."""
    if image is None:
        _, planes = generate(model, turn_poses(model, 0, count), steps=20, eta=0.0, seed=seed)
    else:
        planes = reconstruct(model, input_pictures(model, image, fit, None, None, seed, 1)[0])
    azimuths = torch.arange(0, 360, 30.0, device=model.background.device)
    poses = torch.cat([orbit(azimuths, e, model.config.radius) for e in (-20.0, 20.0, 60.0)])
    for i in range(len(planes)):
        path = Path(out) / f"export_{i + 1}.ply"
        save_ply(path, *surface_points(model, planes[i:i + 1], poses))
        print(f"wrote {path}")


def run_evaluate(model, out, seed, data=None, scenes=64, views=5, t_r=0, json=False):
    """PSNR and SSIM of reconstructions of held-out scenes, beside what needs no 3D."""
    held_out = load(data or model.config.data, scenes, views, model.config.resolution,
                    HELD_OUT - seed, model.background.device)
    scores = evaluate(model, held_out, t_r)
    print(dumps(scores) if json else "\n".join(
        f"{key:22s} {score['psnr']:6.2f} dB PSNR  {score['ssim']:.3f} SSIM"
        for key, score in scores.items()))


def run_train(**fields):
    """Train a model from single posed pictures."""
    train(Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))


COMMANDS = {"demo": run_demo, "train": run_train, "generate": run_generate,
            "reconstruct": run_reconstruct, "inpaint": run_inpaint, "evaluate": run_evaluate,
            "export": run_export}
HELP = {    # an option, its type where the default does not tell, what it is
    "checkpoint": (str, "a file, or a name in checkpoints/"),
    "out": (str, "folder for what is written"),
    "seed": (int, "of noise and of scenes; the same gives the same picture"),
    "device": (str, "auto (cuda, mps or cpu, the first there is) or a torch device"),
    "count": (int, "how many scenes"),
    "steps": (int, "noise levels on the way down; None: 50 for all T"),
    "eta": (float, "1: noise anew at each step (ancestral); 0: none, and 20 steps suffice"),
    "image": (str, "picture file; None: scenes that training never saw"),
    "fit": (str, "make the picture square: crop to its middle, or pad with the background"),
    "mask": (str, "mask file, white = keep; None: a square in the middle is filled"),
    "fillings": (int, "in how many ways to fill it"),
    "t_r": (int, "noise level to reconstruct from, 0 to T"),
    "azimuth": (float, "the picture's camera in degrees; None: it is found"),
    "elevation": (float, "the picture's camera in degrees; None: it is found"),
    "data": (str, "built-in set or folder; None: the model's own"),
    "scenes": (int, "how many scenes"),
    "views": (int, "views a scene: the input and novel ones"),
    "json": (bool, "print one JSON object"),
}


def parse(argv):
    """The command line as (command, its arguments); exits with 2 on bad ones, saying why.

    A command's options are its function's parameters; `train`'s are the fields of `Config`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.
                                     RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for name, run in COMMANDS.items():
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        if name == "train":
            options = {f.name: (f.default, type(f.default), comments[f.name])
                       for f in dataclasses.fields(Config)}
        else:
            defaults = {k: p.default for k, p in inspect.signature(run).parameters.items()}
            defaults |= dict(checkpoint="clevr1", out="out", seed=0, device="auto")
            options = {k: (v, *HELP[k]) for k, v in defaults.items() if k in HELP}
        for key, (default, kind, text) in options.items():
            how = (dict(action="store_true") if kind is bool else
                   dict(type=float if kind is tuple else kind,
                        nargs="+" if isinstance(default, tuple) else None))
            sub.add_argument("--" + key.replace("_", "-"), default=default, **how,
                             help=f"{text} (default {default})".replace("%", "%%"))
    args = vars(parser.parse_args(argv))
    return args.pop("command"), args


def main(argv=None):
    """Run one command; what the user can mend is said in one sentence, with exit code 2."""
    command, args = parse(argv)
    try:
        for name, value in args.items():
            check(name, value)
        if command != "train":
            args["model"] = load_checkpoint(args.pop("checkpoint"), pick_device(args.pop("device")))
        COMMANDS[command](**args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
