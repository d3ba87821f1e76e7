"""How good generated scenes are, by small networks trained here on the set itself.

    python results/figures.py generation                        # all checkpoints
    python results/figures.py generation --checkpoints clevr1 --scenes 256

`Reader` reads a scene's parameters off a picture; its features give a Frechet distance and a
coverage. Both are ours: they compare rows of one table, and nothing with Inception's FID. A network
of the same build tries to tell pictures from traced ones. Each figure stands beside the same for
traced pictures of other scenes, which is what a perfect generator would have, and for pictures of
reconstructed scenes, which look as this renderer draws: what they lack, sampling is not to blame
for.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from benchmark import frechet
from data import CLEVR_COLORS, random_scenes, synthetic


class Reader(nn.Module):
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


def fit(network, images, targets, loss, epochs, batch=64):
    """Train a network on pictures (M, 3, S, S), M at least `batch`, and targets (M, ...)."""
    torch.manual_seed(0)
    steps = epochs * (len(images) // batch)
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
    """Scenes' parameters (N, D): of each primitive which kind it is, its colour and transform."""
    scenes = random_scenes(name, count, seed)
    there = (scenes.kind >= 0)[..., None]
    kind = F.one_hot(scenes.kind.clamp(min=0), 3)
    values = torch.cat([kind, scenes.color, scenes.to_world.flatten(2)], 2) * there    # (N, P, 18)
    return values.flatten(1)


def reader(name, resolution, count):
    """A `Reader` of `count` traced pictures, and what undoes the scaling of its targets.

    Where cameras stand is not among the targets; objects' places in the world are.
    """
    seed = rd.HELD_OUT - 3
    images = synthetic(name, count, 1, resolution, seed, depth=False).images[:, 0]
    targets = parameters(name, count, seed)
    mean, std = targets.mean(0), targets.std(0)
    varied = std > 1e-3
    network = Reader(int(varied.sum()))
    fit(network, images, ((targets - mean) / std)[:, varied], F.mse_loss, 12)

    @torch.no_grad()
    def read(images):
        """Pictures -> scenes' parameters (B, D)."""
        found = mean.expand(len(images), -1).clone()
        found[:, varied] += network(images) * std[varied]
        return found
    return network, read


def told_apart(images, traced):
    """The share of held-out pictures that a `Reader` puts on the right side, generated or traced.

    Both (2M, 3, S, S), views of a scene side by side: the first three quarters train it.
    """
    cut, M = len(images) * 3 // 8 * 2, len(images)      # both views of a scene on one side
    train = torch.cat([images[:cut], traced[:cut]])
    right = torch.cat([torch.ones(cut, 1), torch.zeros(cut, 1)])
    torch.manual_seed(0)
    network = fit(Reader(1), train, right, F.binary_cross_entropy_with_logits, 30)
    with torch.no_grad():
        correct = (network(images[cut:]) > 0).sum() + (network(traced[cut:]) < 0).sum()
    return correct.item() / (2 * (M - cut))


def coverage(generated, real, k=5):
    """The share of real features (M, D) with a generated one nearer than their k-th real neighbour
    (Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models")."""
    radius = torch.cdist(real, real).kthvalue(k + 1).values     # the nearest is the point itself
    return (torch.cdist(real, generated).min(1).values < radius).float().mean().item()


@torch.no_grad()
def pictures_of(model, count):
    """Dicts, from what it is: to pictures (2 count, 3, S, S), two sides of each of `count` scenes;
    to consistency in dB, that of the second side shown by a reconstruction from the first."""
    config, shown, agree = model.config, {}, {}
    views = synthetic(config.data, count, 3, config.resolution, rd.HELD_OUT - 1, depth=False)
    for i in range(0, count, 16):
        some = views[i:i + 16]

        def sides(planes):
            return torch.stack([model.render(planes, some.poses[:, v])[0] for v in (0, 1)], 1)
        _, planes = rd.generate(model, some.poses[:, 2], 20, eta=0.0, seed=i)
        for what, pictures in (("traced", some.images[:, :2]),
                               ("reconstructed", sides(rd.reconstruct(model, some.images[:, 2]))),
                               ("generated", sides(planes))):
            guess = model.render(rd.reconstruct(model, pictures[:, 0]), some.poses[:, 1])[0]
            shown.setdefault(what, []).append(pictures.flatten(0, 1))
            agree.setdefault(what, []).append(rd.psnr(rd.to_unit(guess),
                                                      rd.to_unit(pictures[:, 1])))
    return ({what: torch.cat(some) for what, some in shown.items()},
            {what: torch.cat(some).mean().item() for what, some in agree.items()})


def shares(kinds, options):
    """How often each number below `options` occurs, in percent."""
    return [f"{100 * share:.0f}" for share in kinds.bincount(minlength=options) / len(kinds)]


def judge(models, count=256, readable=8192):
    """Rows of the table, for each checkpoint; and clevr1's shapes and colours, as read."""
    rows = [("set", "pictures", "Frechet", "coverage", "told apart", "the other side, dB")]
    kinds = [("clevr1, %", "sphere", "cube", "cylinder", "grey", "red", "blue", "green", "brown",
              "purple", "cyan", "yellow")]
    for name, model in models.items():
        S = model.config.resolution
        real = synthetic(name, count, 2, S, rd.HELD_OUT, depth=False).images.flatten(0, 1)
        pictures, agree = pictures_of(model, count)
        network, read = reader(name, S, readable)
        with torch.no_grad():
            truth = network.features(real)
            features = {what: network.features(images) for what, images in pictures.items()}
        for what, found in features.items():
            rows.append((name, what, f"{frechet(found, truth):.2f}",
                         f"{coverage(found, truth):.0%}",
                         f"{told_apart(pictures[what], real):.0%}", f"{agree[what]:.1f}"))
            if name == "clevr1":
                values = read(pictures[what])
                color = torch.cdist(values[:, 3:6], torch.tensor(CLEVR_COLORS)).argmin(1)
                kinds.append((what, *shares(values[:, :3].argmax(1), 3), *shares(color, 8)))
    return rows, kinds
