"""What matters: short trainings of equal time that differ from the plain one in one thing each.
Plain is the paper's scheme: no compass (`fold=0`), no other side.

    python results/ablations.py --minutes 6                     # all of them, one after the other
    python results/ablations.py --only plain l2 --data cars
    python results/ablations.py --only plain other_side two_views --init cars

Each starts from nothing, or from the weights --init, whose set and network it keeps, sees single
views (but for `two_views`) and is measured on 128 held-out scenes. Prints a line after each run and
a Markdown table at the end. Differences smaller than that between the first two rows mean nothing.
What is changed is in here: renderdiffusion.py has no branch for any of it.
"""
import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from data import SETS, camera_rays, orbit, synthetic


# ---- What is changed: losses, called as `denoising_loss` is, and networks ----------------------

def min_snr(model, ema, *rest):
    """Examples weigh min(SNR, 5), as Hang et al. 2023, section 3.4, has it for x0 prediction."""
    def weighted(x_t, t, *more):
        x0_hat, alpha_bar = model(x_t, t, *more), ema.schedule.at(t, x_t).view(-1, 1, 1)
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5)
        x0_hat.register_hook(lambda gradient: gradient * weight / weight.mean())
        return x0_hat
    weighted.unet = getattr(model, "module", model).unet
    return rd.denoising_loss(weighted, ema, *rest)


def two_views(model, ema, x0, poses, progress, rank=0, world=1):
    """Encoded from one view of a scene; half of the examples are compared with another one."""
    config, B = ema.config, len(x0)
    views = synthetic(config.data, B, 2, config.resolution, config.seed + 1, x0.device,
                      start=torch.randint(2 ** 30, ()).item() + rank * B, depth=False)
    pick = torch.arange(B), torch.randperm(B) % 2
    return rd.denoising_loss(model, ema, views.images[pick], views.poses[pick], progress, rank,
                             world, seen=(views.images[:, 0], views.poses[:, 0]))


def extent(model, ema, x0, poses, *rest):
    """`denoising_loss`, and a view from another picture's camera must differ from the background
    by as much as the picture does, on average (mean of the difference, and of its square; 256
    random pixels against the whole picture). A streak along the picture's rays looks larger from
    there, or paler. Objects do not look equally large from all sides, but on average they do. Use
    one process.
    """
    config, background, seen = ema.config, ema.background * 2 - 1, []

    def looking_twice(x_t, t, poses, pixels, jitter):
        rays = camera_rays(poses, config.focal, config.resolution)
        there = torch.rand(len(x_t), config.resolution ** 2, device=x_t.device).topk(256).indices
        # by 2: the next one's camera may be the other side that was encoded
        both = [torch.cat([r.take_along_dim(pixels[..., None], 1),
                           r.roll(2, 0).take_along_dim(there[..., None], 1)], 1) for r in rays]
        B, _, K = jitter.shape
        jitter = torch.cat([jitter, torch.rand(B, 256, K, device=jitter.device)], dim=1)
        shown = model.march(model.encode(x_t, t), *both, jitter)[0] * 2 - 1
        seen.append(shown[:, pixels.shape[1]:])
        return shown[:, :pixels.shape[1]]
    looking_twice.unet = model.unet
    value = rd.denoising_loss(looking_twice, ema, x0, poses, *rest)
    found, true = (seen[0] - background).abs(), (x0.flatten(2).mT - background).abs()
    for power in (1, 2):
        much = [(x ** power).mean((1, 2)) for x in (found, true)]                  # (B,) each
        value = value + nn.functional.l1_loss(*much)
    return value


@torch.no_grad()
def put_together(teacher, config, near="clevr1", count=6, most=4, reach=0.55, apart=0.9,
                 scales=(0.17 / 0.35, 0.28 / 0.44)):
    """`count` scenes, each of one to `most` objects that `teacher` reconstructs from new pictures
    of the set `near`. An object is scaled by one of `scales` (here `clevr1`'s radii, 0.35 and 0.44,
    become 0.17 to 0.28, as `clevr`'s are), stands on the ground of the set `config.data` within
    `reach` of the middle along x and y, and keeps `apart` times the mean of both scales from each
    other one. Without a place after 16 tries it is left out. Both sets are built in.
    -> two pairs of pictures (count, 3, S, S) and poses (count, 4, 4), from random cameras.
    """
    device, S = teacher.background.device, config.resolution
    number = torch.randint(1, most + 1, (count,), device=device)
    places = reach * (2 * torch.rand(count, most, 2, device=device) - 1)
    sizes = torch.tensor(scales, device=device)[
        torch.randint(len(scales), (count, most), device=device)]               # (B, most)
    there = torch.arange(most, device=device) < number[:, None]                 # (B, most)
    for k in range(1, most):
        for _ in range(16):
            distance = (places[:, :k] - places[:, k:k + 1]).norm(dim=-1)
            too_close = distance < apart * (sizes[:, :k] + sizes[:, k:k + 1]) / 2
            clash = (there[:, :k] & too_close).any(1)                           # (B,)
            places[clash, k] = reach * (2 * torch.rand_like(places[clash, k]) - 1)
        there[:, k] &= ~clash
    scene, part = there.nonzero(as_tuple=True)                                  # (M,) parts
    scale = sizes[scene, part, None, None]                                      # (M, 1, 1)
    lift = SETS[config.data].ground - scale * SETS[near].ground                 # on the ground
    move = torch.cat([places[scene, part, None], lift], dim=-1)                 # (M, 1, 3)
    pictures = synthetic(near, len(scene), 1, S, config.seed + 1, device, depth=False,
                         start=torch.randint(2 ** 30, ()).item()).images[:, 0]
    planes = teacher.encode(pictures, 0)

    def field(points):
        """Densities add up, and colours are their mean, weighted by them."""
        p = (points[scene] - move) / scale                                      # (M, P, 3)
        density, color = teacher.mlp(p, rd.sample_triplanes(planes, p))
        density = density * (p.abs() < 1).all(-1) / scale[..., 0]               # a length's inverse
        total = torch.zeros_like(points[..., 0]).index_add_(0, scene, density)  # (B, P)
        color = torch.zeros_like(points).index_add_(0, scene, density[..., None] * color)
        return total, color / total.clamp(min=1e-6)[..., None]

    views, (low, high) = [], config.elevation
    for _ in range(2):
        azimuth, height = torch.rand(2, count, device=device)
        poses = orbit(360 * azimuth, low + (high - low) * height, config.radius)
        rgb, _, _ = rd.march(field, *camera_rays(poses, config.focal, S), teacher.config.samples,
                             teacher.config.fine_samples, teacher.background)
        views.append((rgb.mT.reshape(-1, 3, S, S) * 2 - 1, poses))
    return views


def composed(teacher, **options):
    """A loss for sets of several objects: beside the batch, scenes that are `put_together` by a
    `teacher`, a model of the set `near` (clevr1, unless `options`, those of `put_together`, say
    another). Each is encoded from either of two cameras and compared from the other. The teacher
    was trained on single views alone, so no two real views of a scene are used. Several processes
    would put the same scenes together: use one.
    """
    def loss(model, ema, x0, poses, progress, rank=0, world=1):
        (a, from_a), (b, from_b) = put_together(teacher, ema.config, **options)
        return rd.denoising_loss(
            model, ema, torch.cat([x0, a, b]), torch.cat([poses, from_a, from_b]), progress, rank,
            world, seen=(torch.cat([x0, b, a]), torch.cat([poses, from_b, from_a])))
    return loss


def front(config, device="cpu"):
    """The one camera (4, 4) from which `billboard` takes every picture to be."""
    return orbit(0.0, sum(config.elevation) / 2, config.radius).to(device)


def billboard(model, ema, x0, poses, *rest):
    """All cameras in one frame: the model is told that every picture is taken from the front."""
    return rd.denoising_loss(model, ema, x0, front(ema.config, x0.device).expand_as(poses), *rest)


class Told(rd.RenderDiffusion):
    """The encoder is told the camera: it sees each pixel's ray, origin and direction."""

    def __init__(self, config):
        super().__init__(config)
        self.unet.stem = nn.Conv2d(9, config.unet_channels, 4, stride=2, padding=1)
        self.unet.to(memory_format=torch.channels_last)

    def encode(self, x_t, t):
        S, N = self.config.resolution, self.config.plane_size
        rays = torch.cat(camera_rays(self.poses, self.config.focal, S), dim=-1)         # (B, R, 6)
        x_t = torch.cat([x_t, rays.mT.reshape(-1, 6, S, S)], dim=1)
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            planes = self.unet(x_t, t)
        return planes.float().reshape(len(x_t), 3, -1, N, N)

    def forward(self, x_t, t, poses, *rest):
        self.poses = poses
        return super().forward(x_t, t, poses, *rest)


Block = rd.Block        # kept: rd.Block is another while a run lasts


def attending(everywhere):
    """What to call instead of `Block`: attention in every block, or in none."""
    return lambda c, c_emb, attention: Block(c, c_emb, everywhere)


RUNS = {    # what it is, fields of Config, loss, what of the module is another thing
    "plain": ("as it is", {}, rd.denoising_loss, {}),
    "again": ("the same from another seed", dict(seed=1), rd.denoising_loss, {}),
    "uniform": ("rays anywhere, as likely on the background", dict(empty_rays=1.0),
                rd.denoising_loss, {}),
    "l2": ("loss L2 instead of L1", dict(loss="l2"), rd.denoising_loss, {}),
    "min_snr": ("L1 weighted by min(SNR, 5)", {}, min_snr, {}),
    "no_clean": ("no examples at t = 0", dict(clean=0.0), rd.denoising_loss, {}),
    "clean": ("60 % of the examples at t = 0", dict(clean=0.6), rd.denoising_loss, {}),
    "attention": ("attention in every block", {}, rd.denoising_loss,
                  dict(Block=attending(True))),
    "no_attention": ("no attention", {}, rd.denoising_loss,
                     dict(Block=attending(False))),
    "told": ("the encoder is told the camera", {}, rd.denoising_loss, dict(RenderDiffusion=Told)),
    "billboard": ("all cameras in one frame", {}, billboard, {}),
    "two_views": ("two views a scene, half of the examples compared with the other; tracing takes "
                  "three times as long", {}, two_views, {}),
    "fold": ("the azimuth is estimated and fourfold told to the planes (`--fold 4`)", dict(fold=4),
             rd.denoising_loss, {}),
    "default": ("the same, later half of the examples from the other side: the defaults",
                dict(fold=4, other_side=0.5), rd.denoising_loss, {}),
    "lay_down": ("the defaults, and features are laid on a level plane (`--lay-down`)",
                 dict(fold=4, lay_down=True, other_side=0.5), rd.denoising_loss, {}),
    "extent": ("so from the start, and as much is to be seen from another side", dict(
        fold=4, lay_down=True, other_side=0.5, other_side_from=0.0), extent, {}),
    "other_side": ("half of the examples from the other side, all the time",
                   dict(other_side=0.5, other_side_from=0.0), rd.denoising_loss, {}),
    "relief": ("the azimuth itself is told to the planes (`--fold 1`)", dict(fold=1),
               rd.denoising_loss, {}),
}


# ---- Running and measuring ---------------------------------------------------------------------

@torch.no_grad()
def measure(model, name, scenes):
    """Mean PSNR of the input view and of two novel views, as `evaluate` has them at t_r = 0."""
    config, device, scores = model.config, model.background.device, []
    views = synthetic(config.data, scenes, 3, config.resolution, rd.HELD_OUT, device, depth=False)
    for some in (views[i:i + 16] for i in range(0, scenes, 16)):
        if name == "billboard":         # everything is where it is relative to the first camera
            move = front(config, device) @ torch.linalg.inv(some.poses[:, :1])
            some.poses = move @ some.poses
        model.poses = some.poses[:, 0]
        score = rd.evaluate(model, some)
        scores.append([score[key]["psnr"] for key in ("input", "novel")])
    return torch.tensor(scores).mean(0).tolist()


def run(name, config, scenes=128):
    """Train one variant -> its row of the table, as text."""
    text, fields, loss, others = RUNS[name]
    config, steps = replace(config, **fields), []

    def counted(*args):
        steps.append(1)
        return loss(*args)
    with mock.patch.multiple(rd, health=lambda *_: "", **others):
        model = rd.train(config, counted)
    return "| {} | {} | {:.2f} | {:.2f} |".format(text, len(steps), *measure(model, name, scenes))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="of each training")
    parser.add_argument("--data", default="clevr1", help="built-in set")
    parser.add_argument("--init", help="begin with these weights: a file, or a name")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="these runs")
    args = parser.parse_args()
    networks = {"attention", "no_attention", "told", "fold", "default", "lay_down", "extent",
                "relief"}
    if args.init and networks & set(args.only):
        parser.error("with --init, name runs by --only that leave the network as it is")
    base, rows = rd.Config(data=args.data, fold=0), []
    if args.init:
        base = replace(rd.load_checkpoint(args.init).config, init=args.init, resume=False,
                       device="auto")
    for name in args.only:
        with tempfile.TemporaryDirectory() as out:
            rows.append(run(name, replace(base, minutes=args.minutes, other_side=0.0, out=out)))
        print(rows[-1], flush=True)
    print("\n".join(["", f"| {base.data}, {args.minutes:g} minutes each | steps | input view, dB | "
                     "novel views, dB |", "|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
