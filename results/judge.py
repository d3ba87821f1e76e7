"""How good generated scenes are, by small networks trained here on the set itself.

    python results/figures.py generation                        # all checkpoints, some minutes each
    python results/figures.py generation --checkpoints clevr1 --scenes 256

Three kinds of pictures are judged, two sides of each scene, against traced pictures of other
scenes: traced ones, which is what a perfect generator would make; reconstructions of these, which
look as this renderer draws, so that sampling is not blamed for it; and generated ones.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from benchmark import frechet
from data import CLEVR_COLORS, CLEVR_NAMES, CLEVR_SHAPES, random_scenes, synthetic

REAL, JUDGED, READ = (rd.HELD_OUT - i for i in (0, 1, 3))       # seeds: no scene is in two of them


# ---- Networks ----------------------------------------------------------------------------------

class Network(nn.Module):
    """A CNN: pictures (B, 3, S, S) in [-1, 1] -> (B, outputs); `features` (B, 128) before that."""

    def __init__(self, outputs):
        super().__init__()
        layers = [layer for c_in, c in ((3, 32), (32, 64), (64, 128)) for layer in
                  (nn.Conv2d(c_in, c, 3, stride=2, padding=1), nn.BatchNorm2d(c), nn.SiLU(),
                   nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU())]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, outputs)

    def features(self, images):
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def fit(images, targets, loss, epochs, batch=64):
    """A `Network` trained on pictures (M, 3, S, S), M at least `batch`, and targets (M, D)."""
    torch.manual_seed(0)
    network, steps = Network(targets.shape[1]), epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for some in torch.randperm(len(images)).split(batch)[:len(images) // batch]:
            optimizer.zero_grad()
            loss(network(images[some]), targets[some]).backward()
            optimizer.step()
            decay.step()
    return network.eval()


def parameters(name, count, seed):
    """What is visible of scenes (N, 13 P): each primitive's kind (3 numbers, one of them 1), colour
    (3), shine, centre (3) and extents (3). Objects of `clevr`, which have no order, go by x."""
    scenes = random_scenes(name, count, seed)
    there, center = (scenes.kind >= 0)[..., None], scenes.to_world[..., 3]
    values = torch.cat([F.one_hot(scenes.kind.clamp(min=0), 3), scenes.color,
                        scenes.shine[..., None], center, scenes.to_world[..., :3].norm(dim=2)],
                       dim=2) * there                                          # (N, P, 13)
    if name == "clevr":
        order = torch.where(there[..., 0], center[..., 0], torch.inf).argsort(1)
        values = values.gather(1, order[..., None].expand_as(values))
    return values.flatten(1)


def train_reader(name, resolution, count):
    """A network that reads a scene's parameters off a picture, taught by `count` traced ones.

    Returns two functions: describe, pictures -> features (B, 32), the principal components of the
    network's own, each of variance 1 over the teaching pictures; read, pictures -> (B, 13 P).
    """
    images = synthetic(name, count, 1, resolution, READ, depth=False).images[:, 0]
    values = parameters(name, count, READ)
    mean, std = values.mean(0), values.std(0)
    varied = std > 1e-3
    network = fit(images, ((values - mean) / std)[:, varied], F.mse_loss, 12)

    @torch.no_grad()
    def features(images):
        return torch.cat([network.features(some) for some in images.split(256)])
    known = features(images)
    middle = known.mean(0)
    _, S, Vh = torch.linalg.svd(known - middle, full_matrices=False)

    def describe(images):
        return (features(images) - middle) @ Vh[:32].T * count ** 0.5 / S[:32]

    @torch.no_grad()
    def read(images):
        found = mean.expand(len(images), -1).clone()
        found[:, varied] += network(images) * std[varied]
        return found
    return describe, read


# ---- Figures of merit --------------------------------------------------------------------------

def told_apart(images, others):
    """The share of held-out pictures that a network of the same build puts on the right side.

    Both (2N, 3, S, S), the two sides of a scene next to each other; the first three quarters of the
    scenes teach it. A better network might tell more: this is what can be told at least.
    """
    cut = len(images) // 2 * 3 // 4 * 2
    train = torch.cat([images[:cut], others[:cut]])
    side = torch.cat([torch.ones(cut, 1), torch.zeros(cut, 1)])
    network = fit(train, side, F.binary_cross_entropy_with_logits, 30)
    with torch.no_grad():
        right = torch.cat([network(images[cut:]) > 0, network(others[cut:]) < 0])
    return right.float().mean().item()


def coverage(found, real, k=5):
    """The share of real features (M, D) with one of found (M', D) nearer than their k-th real
    neighbour (Naeem et al. 2020, Reliable fidelity and diversity metrics, section 3)."""
    radius = torch.cdist(real, real).kthvalue(k + 1).values     # the nearest is the point itself
    return (torch.cdist(real, found).min(1).values < radius).float().mean().item()


def sides(model, planes, poses):
    """Planes of N scenes from the first two of their poses (N, V, 4, 4) -> (N, 2, 3, S, S)."""
    return torch.stack([model.render(planes, poses[:, v])[0] for v in (0, 1)], 1)


@torch.no_grad()
def pictures_of(model, count):
    """Two dicts, by kind: pictures (2 count, 3, S, S), and consistency.

    Reconstructions start from a third side of the scene and generated scenes are denoised from
    there, so that both sides are novel views. Consistency is the mean PSNR of the second side in a
    reconstruction from the first. It can be too high: what is blurred or empty agrees with itself.
    """
    config, shown, agree = model.config, {}, {}
    views = synthetic(config.data, count, 3, config.resolution, JUDGED, depth=False)
    for i in range(0, count, 16):
        images, poses = views[i:i + 16].images, views[i:i + 16].poses
        _, planes = rd.generate(model, poses[:, 2], 20, eta=0.0, seed=i)
        kinds = {"traced": images[:, :2], "generated": sides(model, planes, poses),
                 "reconstructed": sides(model, rd.reconstruct(model, images[:, 2]), poses)}
        for kind, pictures in kinds.items():
            guess = sides(model, rd.reconstruct(model, pictures[:, 0]), poses)[:, 1]
            shown.setdefault(kind, []).append(pictures.flatten(0, 1))
            agree.setdefault(kind, []).append(rd.psnr(*map(rd.to_unit, (guess, pictures[:, 1]))))
    return ({kind: torch.cat(some) for kind, some in shown.items()},
            {kind: torch.cat(some).mean().item() for kind, some in agree.items()})


def clevr_kinds(values):
    """What `parameters` of clevr1 (N, 13) say: shape, 0 to 2 (N,), and colour, 0 to 7 (N,)."""
    distance = torch.cdist(values[:, 3:6], torch.tensor(CLEVR_COLORS))
    return values[:, :3].argmax(1), distance.argmin(1)


def shares(kinds, options):
    """How often each number below `options` occurs, in percent."""
    return [f"{100 * share:.0f}" for share in kinds.bincount(minlength=options) / len(kinds)]


def judge(models, count=256, readable=8192):
    """Rows of two tables: all figures of each checkpoint, and clevr1's shapes and colours as read.

    The Frechet distance is that of `describe`'s features, and of one set: each has a reader of its
    own, and it is not comparable with Inception's FID. ValueError below 64 scenes.
    """
    if count < 64:
        raise ValueError(f"64 scenes at least are needed to judge, not {count}")
    rows = [("set", "pictures", "Frechet", "coverage", "told from traced",
             "told from reconstructed", "consistency, dB")]
    kinds = [("clevr1, %", *CLEVR_SHAPES, *CLEVR_NAMES)]
    for name, model in models.items():
        S = model.config.resolution
        real = synthetic(name, count, 2, S, REAL, depth=False).images.flatten(0, 1)
        pictures, agree = pictures_of(model, count)
        describe, read = train_reader(name, S, readable)
        truth = describe(real)
        for kind in ("traced", "reconstructed", "generated"):
            found = describe(pictures[kind])
            rows.append((name, kind, f"{frechet(found, truth):.2f}",
                         f"{coverage(found[::2], truth[::2]):.0%}",         # a side of each scene
                         f"{told_apart(pictures[kind], real):.0%}",
                         f"{told_apart(pictures[kind], pictures['reconstructed']):.0%}"
                         if kind == "generated" else "", f"{agree[kind]:.1f}"))
        if name == "clevr1":
            true = clevr_kinds(parameters(name, count, JUDGED))
            seen = {kind: clevr_kinds(read(some)) for kind, some in pictures.items()}
            right = [(a == b.repeat_interleave(2)).float().mean()
                     for a, b in zip(seen["traced"], true)]
            kinds += [(kind, *shares(shape, 3), *shares(color, 8))
                      for kind, (shape, color) in {"the truth": true, **seen}.items()]
            kinds.append(("read rightly, traced", f"{right[0]:.0%} of shapes", "", "",
                          f"{right[1]:.0%} of colours", *[""] * 7))
    return rows, kinds
