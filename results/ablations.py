"""What matters: short trainings of equal time that differ from the plain one in one thing each.
Plain is the paper's scheme: no compass (`fold=0`), no other side.

    python results/ablations.py --minutes 6                     # all of them, one after the other
    python results/ablations.py --only plain l2 --data cars
    python results/ablations.py --only plain other_side two_views --init cars
    python results/ablations.py --only default varied --init clevr1 --test clevr1_blender
    python results/ablations.py --only default nothing mixed --init clevr1 --data clevr1_blender

Each starts from nothing, or from the weights --init, whose network it keeps and whose set, too, if
there is no --data, sees single views (but for `two_views`) and is measured on 128 held-out scenes,
of its own set or of --test.
Prints a line after each run and a Markdown table at the end. Differences smaller than that between
the first two rows mean nothing. What is changed is in here: renderdiffusion.py has no branch for
any of it.
"""
import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import renderdiffusion as rd
from data import camera_rays, load, orbit, synthetic


# ---- Losses, called as `denoising_loss` is -----------------------------------------------------

def min_snr(model, *rest):
    """Examples weigh min(SNR, 5), as Hang et al. 2023, section 3.4, has it for x0 prediction."""
    inner = getattr(model, "module", model)

    def weighted(x_t, t, *more):
        x0_hat, alpha_bar = model(x_t, t, *more), inner.schedule.at(t, x_t).view(-1, 1, 1)
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5)
        x0_hat.register_hook(lambda gradient: gradient * weight / weight.mean())
        return x0_hat
    weighted.module = inner
    return rd.denoising_loss(weighted, *rest)


def two_views(model, x0, poses, source=None):
    """Encoded from one view of a scene; half of the examples are compared with another one."""
    config, B = getattr(model, "module", model).config, len(x0)
    views = synthetic(config.data, B, 2, config.resolution, config.seed + 1, x0.device,
                      start=torch.randint(2 ** 30, ()).item(), depth=False)
    pick = torch.arange(B), torch.randperm(B) % 2
    return rd.denoising_loss(model, views.images[pick], views.poses[pick], views.images[:, 0])


def front(config, device="cpu"):
    """The one camera (4, 4) from which `billboard` takes every picture to be."""
    return orbit(0.0, sum(config.elevation) / 2, config.radius).to(device)


def billboard(model, x0, poses, source=None):
    """All cameras in one frame: the model is told that every picture is taken from the front."""
    config = getattr(model, "module", model).config
    return rd.denoising_loss(model, x0, front(config, x0.device).expand_as(poses), source)


# ---- Networks, and the ray tracer --------------------------------------------------------------

class Told(rd.RenderDiffusion):
    """The encoder is told the camera: it sees each pixel's ray, origin and direction."""

    def __init__(self, config):
        super().__init__(config)
        for side, stem in self.unet.stem.items():
            self.unet.stem[side] = nn.Conv2d(9, stem.out_channels, 4, stride=2, padding=1)
        self.unet.to(memory_format=torch.channels_last)

    def encode(self, x_t, t):
        S, N = self.config.resolution, self.config.plane_size
        rays = torch.cat(camera_rays(self.poses, self.config.focal, S), dim=-1)         # (B, R, 6)
        x_t = torch.cat([x_t, rays.mT.reshape(-1, 6, S, S)], dim=1)
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return self.unet(x_t, t).float().reshape(len(x_t), 3, -1, N, N)

    def forward(self, x_t, t, poses, *rest):
        self.poses = poses
        return super().forward(x_t, t, poses, *rest)


# kept: while a run lasts, the modules are given others
Block, trace, training_pictures = rd.Block, data.trace, rd.training_pictures


def attending(everywhere):
    """What to call instead of `Block`: attention in every block, or in none."""
    return lambda c, c_emb, attention: Block(c, c_emb, everywhere)


def varied_trace(scenes, poses, focal, resolution, samples=2, depth=True, lamps=4):
    """As `trace`, each scene in a light, paint, size and grey of the ground of its own: by `lamps`
    of random strength, from any side and more or less spread, which makes soft shadows; shadows and
    ambient light of any strength; a highlight of any sharpness; colours faded and tinted. No depth.
    """
    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(shape, device=poses.device)

    images = []
    for i in range(len(poses)):
        own = replace(scenes, **{key: getattr(scenes, key)[i:i + 1] for key in (
            "kind", "to_world", "color", "shine")})
        fade, size, grey = draw(0, 0.4), draw(0.5, 1.1), draw(0.9, 1.1).item()
        own.to_world = size * own.to_world
        own.to_world[..., 2, 3] += (1 - size) * own.ground                     # it stays on it
        own.color = ((1 - fade) * own.color + fade * draw(0, 1)) * draw(0.8, 1.1, 3)
        own.shine = own.shine * draw(0, 3)
        own.background = tuple(min(1.0, grey * c) for c in own.background)
        azimuth, height, spread = draw(0, 6.283), draw(0.8, 3.5), draw(0, 0.7)
        strength = draw(0.1, 1, lamps)
        constants = dict(AMBIENT=draw(0.3, 0.7), DIFFUSE=draw(0.3, 0.7), SHADOW=draw(0.4, 0.85),
                         FILL=draw(0, 0.4), EXPONENT=draw(10, 100).item())
        with mock.patch.multiple(data, **{key: float(x) for key, x in constants.items()}):
            shown = []
            for share in strength / strength.sum():
                x, y = azimuth.cos() + spread * draw(-1, 1), azimuth.sin() + spread * draw(-1, 1)
                own.light = (x.item(), y.item(), height.item())
                lit, _ = trace(own, poses[i:i + 1], focal, resolution, samples, False)
                shown.append(share * lit)
        images.append(sum(shown))
    return torch.cat(images), None


def mixed_pictures(config, device, rank=0, world=1):
    """As `training_pictures`, half of each batch from the ray tracer's endless `clevr1` instead."""
    half = replace(config, batch=config.batch // 2)
    draw, camera = training_pictures(half, device, rank, world)
    traced, its = training_pictures(replace(half, data="clevr1", scenes=0), device, rank, world)
    if abs(its["focal"] - camera["focal"]) > 1e-3 * its["focal"]:
        raise ValueError(f"{config.data} has another lens than clevr1: it cannot be mixed with it")

    def draw_both(step):
        return tuple(torch.cat(pair) for pair in zip(draw(step), traced(step)))
    return draw_both, camera


RUNS = {    # what it is, fields of Config, loss, what of the module is another thing
    "plain": ("as it is", {}, rd.denoising_loss, {}),
    "again": ("the same from another seed", dict(seed=1), rd.denoising_loss, {}),
    "uniform": ("rays anywhere, as likely on the background", {}, rd.denoising_loss,
                dict(EMPTY_RAYS=1.0)),
    "l2": ("loss L2 instead of L1", dict(loss="l2"), rd.denoising_loss, {}),
    "min_snr": ("L1 weighted by min(SNR, 5)", {}, min_snr, {}),
    "no_clean": ("no examples at t = 0", dict(clean_share=0.0), rd.denoising_loss, {}),
    "clean": ("60 % of the examples at t = 0", dict(clean_share=0.6), rd.denoising_loss, {}),
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
    "other_side": ("half of the examples from the other side, all the time",
                   dict(other_side=0.5, other_side_from=0.0), rd.denoising_loss, {}),
    "default": ("both, the other side later: the defaults", dict(fold=4, other_side=0.5),
                rd.denoising_loss, {}),
    "relief": ("the azimuth itself is told to the planes (`--fold 1`)", dict(fold=1),
               rd.denoising_loss, {}),
    "varied": ("the defaults on scenes of random light, paint and size (`varied_trace`)",
               dict(fold=4, other_side=0.5), rd.denoising_loss, dict(trace=varied_trace)),
    "nothing": ("the defaults, from nothing in spite of --init", dict(
        fold=4, other_side=0.5, init=""), rd.denoising_loss, {}),
    "mixed": ("the defaults, half of the pictures from the ray tracer (`mixed_pictures`)",
              dict(fold=4, other_side=0.5), rd.denoising_loss,
              dict(training_pictures=mixed_pictures)),
}


# ---- Running and measuring ---------------------------------------------------------------------

@torch.no_grad()
def measure(model, name, views):
    """Mean PSNR of the input view and of novel views, as `evaluate` has them at t_r = 0."""
    total = torch.zeros(2)
    for some in (views[i:i + 8] for i in range(0, len(views), 8)):     # `evaluate` takes so many
        if name == "billboard":         # everything is where it is relative to the first camera
            first = torch.linalg.inv(some.poses[:, :1])
            some.poses = front(model.config, first.device) @ first @ some.poses
        model.poses = some.poses[:, 0]
        score = rd.evaluate(model, some)
        total += len(some) * torch.tensor([score[key]["psnr"] for key in ("input", "novel")])
    return (total / len(views)).tolist()


def run(name, config, test=None, scenes=128):
    """Train one variant -> its row of the table, as text."""
    text, fields, loss, others = RUNS[name]
    steps, said = [], time.time()

    def counted(*args):
        nonlocal said
        steps.append(time.time())
        if steps[-1] > said + 20:
            said = steps[-1]
            print(f"{name}: {len(steps)} steps, {(said - steps[0]) / 60:.1f} of "
                  f"{config.minutes:g} minutes", file=sys.stderr)
        return loss(*args)
    with contextlib.ExitStack() as stack:
        for key, other in {"Journal": mock.MagicMock(), **others}.items():
            module = rd if hasattr(rd, key) else data
            stack.enter_context(mock.patch.object(module, key, other))
        model = rd.train(replace(config, **fields), counted)
    views = load(test or config.data, scenes, 3, config.resolution, "test",
                 device=model.background.device)
    return "| {} | {} | {:.2f} | {:.2f} |".format(text, len(steps), *measure(model, name, views))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="of each training")
    parser.add_argument("--data", help="as of `train`; default: of --init, or clevr1")
    parser.add_argument("--init", help="begin with these weights: a file, or a name")
    parser.add_argument("--test", help="measure on this set; default: the training's own")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="these runs")
    args = parser.parse_args(argv)
    try:
        base = rd.Config(data=args.data or "clevr1", fold=0)
        if args.init:
            base = replace(rd.load_checkpoint(args.init).config, init=args.init, scenes=0)
            base = replace(base, data=args.data or base.data)
        for name in args.only:
            fields, others = RUNS[name][1], RUNS[name][3]
            if args.init and (fields.get("fold", base.fold) != base.fold
                              or {"Block", "RenderDiffusion"} & set(others)):
                parser.error(f"{name} has another network than --init: name other runs by --only")
        rows = []
        for name in args.only:
            with tempfile.TemporaryDirectory() as out:
                config = replace(base, minutes=args.minutes, batch=args.batch, lr=args.lr, out=out,
                                 other_side=0.0, resume=False, device="auto")
                rows.append(run(name, config, args.test))
            print(rows[-1], flush=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(["", f"| {base.data}, {args.minutes:g} minutes each | steps | input view, dB | "
                     "novel views, dB |", "|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
