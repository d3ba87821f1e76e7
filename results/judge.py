"""How good generated scenes are, by small networks trained here on the set itself.

    python results/figures.py generation --checkpoint cars clevr1_blender

Three kinds of pictures, two sides of each scene, are compared with real ones: real ones again,
which is what a perfect generator would make; reconstructions of scenes from a third side, which
look as this renderer draws, so that sampling is not blamed for it; and generated ones. Of a
built-in set all of them are of other scenes. Of a set from files the reader is taught by the
training pictures, and all the rest is of the same test scenes: what is compared has other cameras,
but the first two kinds have an advantage over the third.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import renderdiffusion as rd
from data import (CLEVR_COLORS, CLEVR_NAMES, CLEVR_SHAPES, SETS, load, progress, random_scenes,
                  synthetic)

REAL, JUDGED, READ = -1, -2, -4         # seeds of built-in sets: no scene is in two of them
GROUND = {name: about.ground for name, about in SETS.items()} | {"clevr1_blender": -0.45}


# ---- What is in a scene ------------------------------------------------------------------------

def parameters(name, count=None, seed=REAL, split="test"):
    """What is visible of scenes (N, D): of each object or primitive the shape (3 numbers, one of
    them 1), colour (3) and shine, then its sizes; of primitives the centre, too.

    `seed` is of a built-in set; `split` of one from files, whose .npz has `objects` (the README of
    subsets/). ValueError for others.
    """
    if name in SETS:
        scenes = random_scenes(name, count, seed)
        values = torch.cat([F.one_hot(scenes.kind.clamp(min=0), 3), scenes.color,
                            scenes.shine[..., None], scenes.to_world[..., :3].norm(dim=2),
                            scenes.to_world[..., 3]], dim=2)
        return (values * (scenes.kind >= 0)[..., None]).flatten(1)             # (N, 13 P)
    folder = Path(data.__file__).resolve().parent / "subsets" / name
    file = (folder if folder.is_dir() else Path(name)) / f"{split}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            words = [text.split() for text in arrays["objects"][:count]]
        shapes = list(CLEVR_SHAPES)
        return torch.tensor([[*np.eye(3)[shapes.index(shape)],
                              *CLEVR_COLORS[CLEVR_NAMES.index(color)], material == "metal",
                              float(size)] for shape, material, color, size, _ in words]).float()
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} does not say what is in its scenes, so nothing can be taught to "
                         f"read it: name a built-in set or clevr1_blender ({error})") from None


def clevr_kinds(values):
    """Of `parameters` of one object (N, D): shape, 0 to 2 (N,), and colour, 0 to 7 (N,)."""
    distance = torch.cdist(values[:, 3:6], torch.tensor(CLEVR_COLORS).to(values))
    return values[:, :3].argmax(1), distance.argmin(1)


def shares(kinds, options):
    """How often each number below `options` occurs, in percent."""
    return [f"{100 * share:.0f}" for share in kinds.bincount(minlength=options) / len(kinds)]


# ---- Networks ----------------------------------------------------------------------------------

class Network(nn.Module):
    """A CNN: pictures (B, 3, S, S) in [-1, 1], S from 16 on -> (B, outputs); `features` (B, 128)
    before that. Its stages have sides 16, 8 and 4."""

    def __init__(self, side, outputs):
        super().__init__()
        layers = []
        for c_in, c, step in ((3, 32, side // 16), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(c_in, c, 2 * step, step, step // 2), nn.BatchNorm2d(c), nn.SiLU(),
                       nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, outputs)

    def features(self, images):
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


@torch.enable_grad()
def fit(images, targets, loss, steps, what, batch=64):
    """A `Network` trained on pictures (M, 3, S, S) and targets (M, D)."""
    torch.manual_seed(0)
    network = Network(images.shape[-1], targets.shape[1]).to(images.device)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), steps, what):
        some = torch.randint(len(images), (batch,)).to(images.device)
        optimizer.zero_grad()
        loss(network(images[some]), targets[some]).backward()
        optimizer.step()
        decay.step()
    return network.eval()


@torch.no_grad()
def train_reader(name, resolution, readable=8192, steps=1500, device="cpu"):
    """A network that reads a scene's `parameters` off a picture, taught by `readable` traced ones
    or by all training pictures of a set from files.

    Returns two functions: describe, pictures -> features (B, 32), the principal components of the
    network's own, each of variance 1 over the teaching pictures; read, pictures -> (B, D).
    """
    if name in SETS:
        views = synthetic(name, readable, 1, resolution, READ, device, depth=False)
    else:
        views = load(name, None, 1, resolution, "train", device=device)
    images, values = views.images[:, 0], parameters(name, len(views), READ, "train").to(device)
    mean, std = values.mean(0), values.std(0)
    varied = std > 1e-3
    network = fit(images, ((values - mean) / std)[:, varied], F.mse_loss, steps, "reader")

    def features(images):
        return torch.cat([network.features(some) for some in images.split(256)])
    known = features(images)
    middle = known.mean(0)
    _, S, Vh = torch.linalg.svd(known - middle, full_matrices=False)

    def describe(images):
        with torch.no_grad():
            return (features(images) - middle) @ Vh[:32].T * len(known) ** 0.5 / S[:32]

    def read(images):
        found = mean.expand(len(images), -1).clone()
        with torch.no_grad():
            found[:, varied] += network(images) * std[varied]
        return found
    return describe, read


# ---- Figures of merit --------------------------------------------------------------------------

def frechet(a, b):
    """The Frechet distance of Gaussians that fit two sets of features (N, D): the squared distance
    of the means plus the trace of A + B - 2 (A B)^1/2 for covariances A and B."""
    (mean_a, A), (mean_b, B) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def coverage(found, real, k=5):
    """The share of real features (M, D) with one of found (M', D) nearer than their k-th real
    neighbour (Naeem et al. 2020, Reliable fidelity and diversity metrics, section 3)."""
    radius = torch.cdist(real, real).kthvalue(k + 1).values     # the nearest is the point itself
    return (torch.cdist(real, found).min(1).values < radius).float().mean().item()


def told_apart(images, others, steps=300):
    """The share of held-out pictures that a network of the same build puts on the right side.

    Both (2N, 3, S, S), the two sides of a scene next to each other; the first three quarters of the
    scenes teach it. A better network might tell more: this is what can be told at least.
    """
    cut = len(images) // 2 * 3 // 4 * 2
    train = torch.cat([images[:cut], others[:cut]])
    side = torch.cat([torch.ones(cut, 1), torch.zeros(cut, 1)]).to(images.device)
    network = fit(train, side, F.binary_cross_entropy_with_logits, steps, "telling apart")
    with torch.no_grad():
        right = torch.cat([network(images[cut:]) > 0, network(others[cut:]) < 0])
    return right.float().mean().item()


@torch.no_grad()
def solidness(model, planes, poses, ground):
    """Mean opacity where the object is (B,): of what is above the ground, so without shadows, where
    it differs from the background at least half as much as where it differs most. So neither soft
    edges nor a haze that cannot be seen count. 1 is solid, a ghost has less, nothing at all has 0.
    """
    def above(mlp, inputs, outputs):
        return outputs[0] * (inputs[0][..., 2] > ground + 0.03), outputs[1]
    hook = model.mlp.register_forward_hook(above)
    rgb, _, opacity = model.render(planes, poses)
    hook.remove()
    contrast = (rgb - (model.background * 2 - 1).view(3, 1, 1)).abs().amax(1)  # (B, S, S)
    here = contrast > contrast.amax((1, 2), keepdim=True) / 2
    least = 0.002 * here[0].numel()             # fewer pixels than these are no object
    return (opacity * here).sum((1, 2)) / here.sum((1, 2)).clamp(min=least)


# ---- Judging -----------------------------------------------------------------------------------

def scenes_to_judge(model, count):
    """`Views` of three views, and real pictures (N, 2, 3, S, S) to compare with."""
    config, device = model.config, model.background.device
    if config.data in SETS:
        draw = partial(synthetic, config.data, count, resolution=config.resolution, device=device,
                       depth=False)
        return draw(views=3, seed=JUDGED), draw(views=2, seed=REAL).images
    views = load(config.data, count, 5, config.resolution, "test", device=device)
    if not views.held_out or views.images.shape[1] < 5:
        raise ValueError(f"{config.data}: judging needs test scenes of five views")
    return views, views.images[:, 3:]


@torch.no_grad()
def pictures_of(model, views, seed=0):
    """Two dicts, by kind: pictures (2N, 3, S, S), and solidness (N,), which real ones have not.

    Reconstructions start from a third side of the scene, and generated scenes are denoised through
    the cameras that the command `generate` has, so that both sides are novel views.
    """
    shown, solid = {"real": [views.images[:, :2].flatten(0, 1)]}, {}
    ground, starts = GROUND.get(model.config.data, -1.0), range(0, len(views), 16)
    for i in progress(starts, len(starts), "sixteen scenes of each kind"):
        images, poses = views[i:i + 16].images[:, 2], views[i:i + 16].poses
        cameras = rd.turn_poses(model, 0, len(poses))
        made = {"reconstructed": rd.reconstruct(model, images),
                "generated": rd.generate(model, cameras, seed=seed + i)[1]}
        for kind, planes in made.items():
            both = [model.render(planes, poses[:, v])[0] for v in (0, 1)]
            shown.setdefault(kind, []).append(torch.stack(both, 1).flatten(0, 1))
            solid.setdefault(kind, []).append(solidness(model, planes, poses[:, 0], ground))
    return [{kind: torch.cat(some) for kind, some in by_kind.items()} for by_kind in (shown, solid)]


def judge(name, model, count=128, readable=8192, steps=1500):
    """Rows of two tables: all figures of a checkpoint, and of single CLEVR objects shapes and
    colours as read.

    The Frechet distance is that of `describe`'s features, and of one set: each has a reader of its
    own, and it is not comparable with Inception's FID. ValueError below 64 scenes.
    """
    if count < 64:
        raise ValueError(f"64 scenes at least are needed to judge, not {count}")
    config, device = model.config, model.background.device
    describe, read = train_reader(config.data, config.resolution, readable, steps, device)
    views, real = scenes_to_judge(model, count)
    pictures, solid = pictures_of(model, views)
    real, rows, kinds = real.flatten(0, 1), [], []
    truth = describe(real)
    for kind, some in pictures.items():
        found = describe(some)
        row = [name, kind, f"{frechet(found, truth):.2f}",
               f"{coverage(found[::2], truth[::2]):.0%}",             # a side of each scene
               f"{told_apart(some, real):.0%}", "", "", ""]
        if kind in solid:
            row[-2:] = f"{solid[kind].mean():.2f}", f"{(solid[kind] < 0.9).sum()} of {len(views)}"
        if kind == "generated":
            row[5] = f"{told_apart(some, pictures['reconstructed']):.0%}"
        rows.append(row)
    if config.data in ("clevr1", "clevr1_blender"):
        true = clevr_kinds(parameters(config.data, len(views), JUDGED).to(device))
        seen = {kind: clevr_kinds(read(some)) for kind, some in pictures.items()}
        right = [(a == b.repeat_interleave(2)).float().mean() for a, b in zip(seen["real"], true)]
        kinds = [(name, kind, *shares(shape, 3), *shares(color, 8))
                 for kind, (shape, color) in {"the truth": true, **seen}.items()]
        kinds.append((name, "read rightly, real", f"{right[0]:.0%} of shapes", "", "",
                      f"{right[1]:.0%} of colours", *[""] * 7))
    return rows, kinds
