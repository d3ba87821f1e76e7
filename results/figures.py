"""Remakes the tables of README.md, and pictures, from checkpoints.

    python results/figures.py scores --checkpoint cars chairs
    python results/figures.py turn pictures --checkpoint clevr1_blender --out results
    python results/figures.py t_r --checkpoint clevr1 --data clevr1_blender

scores      novel views of held-out scenes, beside what needs no 3D; overfitting; depth, where it is
            known; by shape and material, where these are
turn        NAME_turn.gif: generated scenes, turning
pictures    NAME_reconstruct.png, NAME_inpaint.png: held-out pictures, the truth, ours, depth;
            a hole filled in two ways
generation  how good generated scenes are, by networks that judge.py trains on the set itself
t_r         NAME_t_r.png, NAME_t_r_pictures.png: novel views by t_r, for pictures like the training
            set's and not; with --data a table alone, of another set's pictures
inpainting  NAME_holes.png: fillings of a hole of 40 % of the side; how well, how varied
steps       NAME_steps.png: the same noise, by network calls, with times and Frechet distances

Prints Markdown tables, writes pictures to --out. Scenes are held out: trainings do not see them.
A checkpoint is a file or a name in checkpoints/; what is made of it has the name of its file. On
two CPU cores a 64x64 scene takes 0.6 s to generate, so all of this takes an hour or more.
"""
import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from data import (CLEVR_NAMES, CLEVR_SHAPES, SETS, camera_rays, load, progress, random_scenes,
                  trace)
from judge import frechet, judge, parameters, train_reader


def table(*rows):
    """Rows of cells as a Markdown table; the first is the heading."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    print("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n", flush=True)


def held_out(model, count, views, name=None):
    """`Views` of scenes of the model's own set, or another, that its training left out."""
    return load(name or model.config.data, count, views, model.config.resolution, "test",
                device=model.background.device)


@torch.no_grad()
def compare(model, planes, views, v):
    """Mean PSNR of planes (N, ...) seen from view v of `Views`, against its picture."""
    shown = model.render(planes, views.poses[:, v], focal=views.focal)[0]
    return rd.psnr(rd.to_unit(shown), rd.to_unit(views.images[:, v])).mean().item()


def plot(path, curves, xlabel, ylabel):
    """Write a PNG: curves is a dict from a label to x and y."""
    figure = Figure(figsize=(7, 3), dpi=128, layout="constrained")
    axis = figure.subplots()
    for label, (x, y) in curves.items():
        axis.plot(x, y, "o-", ms=4, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    rd.write(path, lambda file: figure.savefig(file, format="png"))


# ---- Held-out scenes ---------------------------------------------------------------------------

@torch.no_grad()
def depth_error(model, views):
    """Mean |error| of expected depth where an object is seen, from view 1 of scenes reconstructed
    from view 0, beside that of the empty ground, cut off at the cube like ours (in world units)."""
    poses = views.poses[:, 1]
    origins, directions = camera_rays(poses, views.focal, views.images.shape[-1])
    ground = (SETS[views.name].ground - origins[..., 2]) / directions[..., 2]
    ground = torch.where(ground > 0, ground, math.inf)                         # above the horizon
    _, far = rd.ray_interval(origins, directions)
    truth = views.depth[:, 1]
    ground, empty = ground.view_as(truth), ground.minimum(far).view_as(truth)
    _, depth, _ = model.render(rd.reconstruct(model, views.images[:, 0]), poses)
    seen = truth < ground - 0.01
    return [(guess - truth).abs()[seen].mean().item() for guess in (depth, empty)]


def kinds_of(views):
    """Numbers of the scenes of single CLEVR objects, by shape and by material."""
    if views.name not in ("clevr1", "clevr1_blender"):
        return {}
    values = parameters(views.name, len(views))
    masks = {shape: values[:, :3].argmax(1) == k for k, shape in enumerate(CLEVR_SHAPES)}
    masks |= {"rubber": values[:, 6] == 0, "metal": values[:, 6] > 0}
    return {kind: mask.nonzero()[:, 0] for kind, mask in masks.items() if mask.any()}


def scores(models, args, count=256):
    """A row for each checkpoint: `evaluate` on `count` scenes x 4 novel views; the input view of as
    many training pictures; depth; and a row for each shape and material."""
    rows = [("set", "scenes", "input view", "**novel views**", "mean image", "input copied",
             "training pictures' input view, dB", "depth error", "of the empty ground")]
    kinds = [("set", "kind", "scenes", "input view", "novel views")]
    for name, model in models.items():
        config, views = model.config, held_out(model, count, 5)
        shown = ["{psnr:.2f} / {ssim:.3f}".format(**score)
                 for score in rd.evaluate(model, views).values()]
        trained = load(config.data, len(views), 1, config.resolution, "train", config.seed,
                       model.background.device)
        parts = [trained[i:i + 32] for i in range(0, len(trained), 32)]
        trained = sum(len(some) * compare(model, rd.reconstruct(model, some.images[:, 0]), some, 0)
                      for some in parts) / len(trained)
        depths = ["", ""] if views.depth is None else map("{:.3f}".format,
                                                          depth_error(model, views[:64]))
        rows.append((name, len(views), shown[0], f"**{shown[1]}**", *shown[2:], f"{trained:.2f}",
                     *depths))
        print(*rows[-1], sep=" | ", file=sys.stderr)            # the table comes after all of them
        for kind, chosen in kinds_of(views).items():
            some = rd.evaluate(model, views[chosen.to(views.images.device)])
            kinds.append((name, kind, len(chosen), *("{psnr:.2f} / {ssim:.3f}".format(**some[key])
                                                     for key in ("input", "novel"))))
    print("PSNR in dB / SSIM, t_r = 0, 4 novel views a scene; depth in world units, of 64 scenes")
    table(*rows)
    if len(kinds) > 1:
        table(*kinds)


# ---- Generated scenes --------------------------------------------------------------------------

def turn(models, args, count=4, frames=24, colors=256):
    """Generated scenes side by side, turning once round, in one palette, which makes a GIF of half
    the size."""
    for name, model in models.items():
        path = args.out / f"{name}_turn.gif"
        _, planes = rd.generate(model, rd.turn_poses(model, 0, count), seed=args.seed)
        rd.save_turntable(path, model, planes, frames)
        with Image.open(path) as gif:
            shown = []
            for i in range(gif.n_frames):
                gif.seek(i)
                shown.append(np.array(gif.convert("RGB")))
        palette = Image.fromarray(np.concatenate(shown)).quantize(colors)
        shown = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
                 for frame in shown]
        rd.write(path, lambda file: shown[0].save(file, format="GIF", save_all=True, loop=0,
                                                  duration=80, append_images=shown[1:]))
        print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB")


@torch.no_grad()
def pictures(models, args, count=6):
    """Held-out pictures: the truth from another side, ours and depth; half of each filled in two
    ways, and seen from other sides."""
    for name, model in models.items():
        views = held_out(model, count, 2)
        images, poses, there = views.images[:, 0], views.poses[:, 0], views.poses[:, 1]
        planes = rd.reconstruct(model, images)
        shown, depth = rd.show(model, planes, there)
        rd.save_grid(args.out / f"{name}_reconstruct.png", {
            "input": images, "truth, another side": views.images[:, 1], "ours, there": shown,
            "its depth": depth, "ours, turned by 160°": rd.show(model, planes, poses, 160)[0]})
        masks = torch.ones_like(images[:, :1])
        masks[:, :, :masks.shape[-1] * 9 // 16] = 0             # the upper half of most objects
        rows = {"input": images, "hidden in part": images * masks - 0.5 * (1 - masks)}
        for k in (1, 2):
            filled, planes = rd.inpaint(model, images, masks, poses, seed=args.seed + k)
            rows |= {f"filling {k}": filled} | {
                f"{k}, turned by {angle}°": rd.show(model, planes, poses, angle)[0]
                for angle in (40, 160)}
        rd.save_grid(args.out / f"{name}_inpaint.png", rows)
        print(f"wrote {args.out / name}_reconstruct.png and {name}_inpaint.png")


def generation(models, args, count=128, **options):
    """How good generated scenes are: `judge`'s tables."""
    rows = [("set", "pictures", "Frechet", "coverage", "told from real", "told from reconstructed",
             "solidness", "scenes below 0.9")]
    kinds = [("set", "pictures, %", *CLEVR_SHAPES, *CLEVR_NAMES)]
    for name, model in models.items():
        for total, new in zip((rows, kinds), judge(name, model, count, **options)):
            total += new
            print(*(" | ".join(row) for row in new), sep="\n", file=sys.stderr)
    print(f"up to {count} scenes of each kind, two pictures of each; told: 50 % is chance, +- "
          f"{100 * math.sqrt(0.5 / count):.0f} %; solidness: mean opacity where the object is")
    table(*rows)
    if len(kinds) > 1:
        table(*kinds)


def steps(models, args, count=64, calls=(5, 10, 20, 50), **options):
    """The same noise denoised by more and more network calls; the Frechet distance of `count`
    pictures to as many held-out ones, as `judge` has it, beside that of other held-out ones."""
    for name, model in models.items():
        config, device, rows = model.config, model.background.device, {}
        describe, _ = train_reader(config.data, config.resolution, device=device, **options)
        views = held_out(model, count, 2)
        real = describe(views.images[:, 0])
        others = f"{frechet(describe(views.images[:, 1]), real):.2f}"
        found = [(f"{name}: network calls", "Frechet", "s a picture"), ("other views", others, "")]
        for n in calls:
            start = time.time()
            images = torch.cat([rd.generate(model, some, n, seed=i)[0]
                                for i, some in enumerate(views.poses[:, 0].split(16))])
            second = (time.time() - start) / count
            rows[f"{n} calls, {second:.2f} s each"] = images[:8]
            found.append((n, f"{frechet(describe(images), real):.2f}", f"{second:.2f}"))
        rd.save_grid(args.out / f"{name}_steps.png", rows)
        table(*found)


# ---- Pictures unlike the training set, and pictures with a hole --------------------------------

def unlike(views):
    """`Views` of two views as they are and changed, by what is changed.

    What belongs to the scene (light, ground, colours) is changed in both views, of built-in sets
    alone; what belongs to the picture (noise, stripes, blur) in the first: the second is the truth.
    """
    S, device = views.images.shape[-1], views.images.device
    stripes = torch.where(torch.arange(S, device=device) % 4 < 2, -1.0, 1.0)   # two pixels wide
    noise = rd.standard_normal(views.images[:, 0], torch.Generator().manual_seed(0))

    def traced(**changes):
        scenes = random_scenes(views.name, len(views), -1, device=device)
        changes = {key: change(getattr(scenes, key)) for key, change in changes.items()}
        return replace(views, images=trace(replace(scenes, **changes), views.poses, views.focal, S,
                                           depth=False)[0])

    def taken(change):
        images = views.images.clone()
        images[:, 0] = change(images[:, 0]).clamp(-1, 1)
        return replace(views, images=images)

    return {"as it is": views} | ({} if views.name not in SETS else {
        "a palette never seen": traced(color=lambda x: x.roll(1, -1) * 0.6 + 0.3),      # paler
        "yellowish ground": traced(background=lambda x: (0.80, 0.70, 0.45)),
        "light from another side": traced(light=lambda x: (1.0, -1.0, 2.8284))}) | {
        "noise": taken(lambda x: x + 0.4 * noise),
        "stripes": taken(lambda x: x + 0.3 * stripes),
        "blur": taken(lambda x: F.interpolate(F.avg_pool2d(x, 4), x.shape[2:], mode="bilinear"))}


@torch.no_grad()
def t_r(models, args, count=16, levels=(0, 25, 50, 100, 200, 300, 500, 700, 1000)):
    """Novel views by t_r, of pictures like the training set's and not; or of --data's pictures."""
    for name, model in models.items():
        views, curves, rows = held_out(model, count, 2, args.data), {}, {}
        sets = {args.data: views} if args.data else unlike(views)
        for what, views in sets.items():
            planes = [rd.reconstruct(model, views.images[:, 0], views.poses[:, 0], level)
                      for level in progress(levels, len(levels), f"{what}, levels of noise")]
            curves[what] = levels, [compare(model, some, views, 1) for some in planes]
            rows[what] = torch.cat([views.images[:1, 0], *(
                model.render(some[:1], views.poses[:1, 1])[0] for some in planes),
                views.images[:1, 1]])
        heading, found = [f"{name}, t_r", *levels], [[what, *map("{:.1f}".format, y)]
                                                     for what, (_, y) in curves.items()]
        if args.data:
            truth = rd.to_unit(views.images[:, 1])
            guesses = views.images.mean((0, 1)), views.images[:, 0]
            found[0] += [f"{rd.psnr(rd.to_unit(guess.expand_as(truth)), truth).mean():.1f}"
                         for guess in guesses]
            heading += ["mean image", "input copied"]
        else:
            plot(args.out / f"{name}_t_r.png", curves, "t_r", "novel view, PSNR in dB")
            labels = ["input", *(f"t_r = {level}" for level in levels), "truth"]
            columns = torch.stack(list(rows.values()), 1)          # (labels, kinds, 3, S, S)
            rd.save_grid(args.out / f"{name}_t_r_pictures.png", dict(zip(labels, columns)))
        print(f"{len(views)} held-out scenes, novel view, PSNR in dB")
        table(heading, *found)


@torch.no_grad()
def inpainting(models, args, count=16, fillings=3):
    """Holes of 40 % of the side: error, variety, and how well planes keep what was known."""
    rows = [("set", "error in the hole", "other colour", f"std of {fillings} fillings",
             "known pixels, planes", "the same, nothing hidden", "novel view, dB")]
    for name, model in models.items():
        views = held_out(model, count, 2)
        images, poses, S = views.images[:, 0], views.poses[:, 0], views.images.shape[-1]
        N, masks = len(views), torch.ones_like(images[:, :1])
        masks[:, :, round(0.3 * S):round(0.7 * S), round(0.3 * S):round(0.7 * S)] = 0
        hole = (masks < 0.5).expand_as(images)

        def known(planes):
            error = ((model.render(planes, poses)[0] - images) / 2)[~hole].view(N, -1)
            return -10 * error.square().mean(1).log10().mean().item()
        made = [rd.inpaint(model, images, masks, poses, seed=seed) for seed in range(fillings)]
        filled = torch.stack([image for image, _ in made])                     # (F, N, 3, S, S)
        error = torch.stack([(image - images).abs()[hole].view(N, -1).mean(1)
                             for image in filled])                             # (F, N)
        rows.append((name, f"{error.mean():.3f}", f"{(error > 0.2).sum()} of {error.numel()}",
                     f"{filled.std(0)[hole].mean():.3f}", f"{known(made[0][1]):.1f} dB",
                     f"{known(rd.reconstruct(model, images)):.1f} dB",
                     f"{sum(compare(model, planes, views, 1) for _, planes in made) / fillings:.1f}"
                     ))
        shown = {"input": images[:8], "masked": (images * masks + masks - 1)[:8]}
        for k, (image, planes) in enumerate(made):
            shown[f"filling {k + 1}"] = image[:8]
            shown[f"{k + 1}, from the side"] = model.render(planes[:8], views.poses[:8, 1])[0]
        rd.save_grid(args.out / f"{name}_holes.png",
                     shown | {"the side's truth": views.images[:8, 1]})
    table(*rows)


FIGURES = {f.__name__: f for f in (scores, turn, pictures, generation, t_r, inpainting, steps)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--checkpoint", "--checkpoints", nargs="+", metavar="NAME",
                        default=sorted(path.stem for path in rd.SHIPPED.glob("*.pt")),
                        help="names in checkpoints/, or files; default: all that are shipped")
    parser.add_argument("--data", help="another set, for t_r")
    parser.add_argument("--scenes", type=int, help="how many, 64 at least for generation and "
                        "steps; default: each figure's own number")
    parser.add_argument("--seed", type=int, default=0, help="of generated scenes and fillings")
    parser.add_argument("--device", default="auto", help="auto or a torch device")
    parser.add_argument("--out", type=Path, default="out", help="folder for the pictures")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(FIGURES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(FIGURES)}")
    least = 64 if {"generation", "steps"} & set(args.what) else 1
    if args.scenes is not None and args.scenes < least:
        parser.error(f"--scenes must be at least {least}, not {args.scenes}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        device = rd.pick_device(args.device)
        models = {Path(name).name.removesuffix(".pt"): rd.load_checkpoint(name, device)
                  for name in args.checkpoint}
        for what in args.what:
            FIGURES[what](models, args, **({"count": args.scenes} if args.scenes else {}))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
