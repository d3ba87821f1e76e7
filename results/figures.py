"""Remakes the pictures and tables of README.md from the checkpoints.

    python results/figures.py --out results             # all of them: long
    python results/figures.py scores --checkpoints clevr1 cars
    python results/figures.py samples t_r inpainting --scenes 16

scores      novel views and depth on held-out scenes, beside what needs no 3D
shapes      clevr1 by shape, and how far cubes are turned as they should be
marching    novel views by how many samples a ray has
samples     NAME_samples.gif: 64 generated scenes, turning
steps       steps.png: the same noise, by network calls, with times
t_r         t_r.png, t_r_pictures.png: novel views by t_r, for inputs like the training set and not
inpainting  NAME_inpainting.png: fillings of a hole of 40 % of the side; how well, how varied
loss        loss.png: mean error by t
generation  how good generated scenes are, by networks that judge.py trains on the set itself
together    together.png: scenes put together from clevr1's objects, beside clevr's
training    training.png: samples and novel views during thirty minutes of training

Prints Markdown tables, writes pictures to --out. Scenes are held out: trainings use other seeds
(but `together` shows what a training sees).
"""
import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from ablations import put_together
from judge import judge
from data import CLEVR_SHAPES, SETS, camera_rays, random_scenes, synthetic, trace


def table(*rows):
    """Rows of cells as a Markdown table; the first is the heading."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    print("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n", flush=True)


def compare(model, planes, views, v):
    """Mean PSNR of planes (N, ...) seen from view v of `Views`, against its picture."""
    shown = model.render(planes, views.poses[:, v])[0]
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


def scores(models, out, count=256):
    """A row for each checkpoint: `evaluate` on `count` scenes x 4 novel views, and depth."""
    rows = [("set", "input view", "**novel views**", "mean image", "input copied",
             "depth error", "of the empty ground")]
    for name, model in models.items():
        views = synthetic(name, count, 5, model.config.resolution, rd.HELD_OUT)
        found = ["{psnr:.2f} / {ssim:.3f}".format(**score)
                 for score in rd.evaluate(model, views).values()]
        novel, mean, copied = found[1:]
        depths = map("{:.3f}".format, depth_error(model, views[:min(count, 64)]))
        rows.append((name, found[0], f"**{novel}**", mean, copied, *depths))
    print(f"PSNR in dB / SSIM, {count} held-out scenes x 4 novel views; depth in world units")
    table(*rows)


@torch.no_grad()
def turn_correlation(model, planes, scenes, height=-0.2):
    """How far planes (N, 3, C, n, n) of `Scenes` of one cube show its turn, one number: 1 as they
    should, 0 not at all (discs), below 0 wrongly.

    The correlation of predicted with true occupancy on a level grid through the cubes, each less
    its mean over the cubes of that size: what is left is what their turns make of it.
    """
    x, y = torch.meshgrid(torch.linspace(-0.6, 0.6, 33), torch.linspace(-0.6, 0.6, 33),
                          indexing="ij")
    points = torch.stack([x, y, torch.full_like(x, height)], dim=-1).view(1, -1, 3)
    matrix = scenes.to_world[:, 0]                                             # (N, 3, 4)
    inside = torch.linalg.solve(matrix[..., :3], (points - matrix[:, None, :, 3]).mT).abs().amax(1)
    points = points.expand(len(planes), -1, 3)
    density, _ = model.mlp(points, rd.sample_triplanes(planes, points))
    found, true = 1 - torch.exp(-0.1 * density), (inside < 1).float()          # (N, P)
    large = matrix[..., 0].norm(dim=1) > 0.28               # half sides are 0.25 and 0.31
    found, true = (torch.cat([some[size] - some[size].mean(0) for size in (large, ~large)])
                   for some in (found, true))
    return F.cosine_similarity(found.flatten(), true.flatten(), dim=0).item()


@torch.no_grad()
def shapes(models, out, count=288):
    """Mean PSNR of the input and two novel views of each of clevr1's shapes."""
    if "clevr1" not in models:
        return
    model, rows = models["clevr1"], [("clevr1", "scenes", "input view, dB", "novel views, dB")]
    views = synthetic("clevr1", count, 3, model.config.resolution, rd.HELD_OUT, depth=False)
    scenes = random_scenes("clevr1", count, rd.HELD_OUT)
    for kind, name in enumerate(CLEVR_SHAPES):
        chosen = (scenes.kind[:, 0] == kind).nonzero()[:, 0]
        some = views[chosen]
        planes = rd.reconstruct(model, some.images[:, 0])
        novel = (compare(model, planes, some, 1) + compare(model, planes, some, 2)) / 2
        rows.append((name, len(chosen), f"{compare(model, planes, some, 0):.1f}", f"{novel:.1f}"))
        if name == "cube":
            cubes = replace(scenes, to_world=scenes.to_world[chosen])
            turn = turn_correlation(model, planes, cubes)
            print(f"correlation with the cubes' turns: {turn:.2f}")
    table(*rows)


@torch.no_grad()
def loss(models, out, count=64):
    """Mean |x0_hat - x0| by t, from the picture's own camera."""
    times, curves = [0, 100, 250, 400, 550, 700, 800, 900, 950, 1000], {}
    for name, model in models.items():
        views = synthetic(name, count, 1, model.config.resolution, rd.HELD_OUT, depth=False)
        x0, poses, errors = views.images[:, 0], views.poses[:, 0], []
        torch.manual_seed(0)
        for t in times:
            x_t = model.schedule.add_noise(x0, t, torch.randn_like(x0))
            errors.append((model(x_t, t, poses) - x0).abs().mean().item())
        curves[name] = times, errors
    plot(out / "loss.png", curves, "t", "mean |error|, images in [-1, 1]")
    table(("t", *times), *((name, *map("{:.3f}".format, y)) for name, (_, y) in curves.items()))


@torch.no_grad()
def marching(models, out, count=24):
    """Novel views by samples a ray: at random, as training places them, or evenly, as `render`."""
    ways = ((16, 0, True), (24, 0, True), (32, 0, True), (12, 12, True), (12, 12, False),
            (16, 16, False), (64, 64, False))           # stratified, importance, at random
    rows = [("novel views, dB", *(f"{k} + {fine}" + " random" * loose for k, fine, loose in ways))]
    for name, model in models.items():
        S = model.config.resolution
        views = synthetic(name, count, 2, S, rd.HELD_OUT, depth=False)
        planes, truth = rd.reconstruct(model, views.images[:, 0]), rd.to_unit(views.images[:, 1])
        rays = camera_rays(views.poses[:, 1], views.focal, S)

        def field(points):
            return model.mlp(points, rd.sample_triplanes(planes, points))
        torch.manual_seed(0)
        shown = [rd.march(field, *rays, k, fine, model.background,
                          torch.rand(count, S * S, k + fine) if loose else None)[0]
                 for k, fine, loose in ways]
        rows.append((name, *(f"{rd.psnr(rgb.mT.reshape(-1, 3, S, S), truth).mean():.2f}"
                             for rgb in shown)))
    table(*rows)


# ---- Generated scenes --------------------------------------------------------------------------

@torch.no_grad()
def samples(models, out, count=64, frames=16):
    """Generated scenes of each set, eight a row, turning once round."""
    for name, model in models.items():
        S, rows = model.config.resolution, math.ceil(count / 8)
        _, planes = rd.generate(model, rd.turn_poses(model, 0, 8 * rows), steps=20, eta=0)
        pictures = []
        for pose in rd.turn_poses(model, 0, frames):
            shown = model.render(planes, pose)[0].view(rows, 8, 3, S, S)
            shown = shown.permute(2, 0, 3, 1, 4).reshape(1, 3, rows * S, 8 * S)
            frame = Image.fromarray(rd.to_bytes(shown)[0])
            pictures.append(frame.resize((16 * S, 2 * rows * S), Image.Resampling.NEAREST))
        rd.write(out / f"{name}_samples.gif", lambda file: pictures[0].save(
            file, format="GIF", save_all=True, loop=0, duration=120, append_images=pictures[1:]))


def steps(models, out, count=8, calls=(10, 15, 20, 25, 50, 250, 1000)):
    """The same noise denoised by more and more network calls, by the first checkpoint."""
    for model in list(models.values())[:1]:
        rows, poses = {}, rd.turn_poses(model, 0, count)
        rd.generate(model, poses, 1)                                           # warms up
        for n in calls:
            start = time.time()
            images, _ = rd.generate(model, poses, n, eta=0, seed=1)
            rows[f"{n} calls, {(time.time() - start) / count:.2f} s each"] = images
        rd.save_grid(out / "steps.png", rows)


# ---- Pictures unlike the training set, and pictures with a hole --------------------------------

def unlike(name, count, resolution):
    """`Views` of the same held-out scenes, two views each, as they are and changed.

    What belongs to the scene (light, ground, colours) is changed in both views, what belongs to
    the picture (noise, stripes, blur) in the first alone: the second is the truth.
    """
    plain = synthetic(name, count, 2, resolution, rd.HELD_OUT, depth=False)
    scenes = random_scenes(name, count, rd.HELD_OUT)
    stripes = torch.where(torch.arange(resolution) % 4 < 2, -1.0, 1.0)     # two pixels wide each
    noise = torch.randn(plain.images[:, 0].shape, generator=torch.Generator().manual_seed(0))

    def traced(**changes):
        images, _ = trace(replace(scenes, **changes), plain.poses, plain.focal, resolution,
                          depth=False)
        return replace(plain, images=images)

    def taken(change):
        images = plain.images.clone()
        images[:, 0] = change(images[:, 0]).clamp(-1, 1)
        return replace(plain, images=images)

    return {"as it is": plain,
            "a palette never seen": traced(color=scenes.color.roll(1, -1) * 0.6 + 0.3),     # paler
            "yellowish ground": traced(background=(0.80, 0.70, 0.45)),
            "light from another side": traced(light=(1.0, -1.0, 2.8284)),
            "noise": taken(lambda x: x + 0.4 * noise),
            "stripes": taken(lambda x: x + 0.3 * stripes),
            "blur": taken(lambda x: F.interpolate(F.avg_pool2d(x, 4), x.shape[2:],
                                                  mode="bilinear"))}


def t_r(models, out, count=32, levels=(0, 25, 50, 100, 200, 300, 500, 700, 1000)):
    """Novel views by t_r, of the first checkpoint."""
    for name, model in list(models.items())[:1]:
        curves, rows = {}, {}
        for what, views in unlike(name, count, model.config.resolution).items():
            planes = [rd.reconstruct(model, views.images[:, 0], views.poses[:, 0], level)
                      for level in levels]
            curves[what] = levels, [compare(model, some, views, 1) for some in planes]
            rows[what] = torch.cat([views.images[:1, 0], *(
                model.render(some[:1], views.poses[:1, 1])[0] for some in planes),
                views.images[:1, 1]])
        plot(out / "t_r.png", curves, "t_r", "novel view, PSNR in dB")
        labels = ["input", *(f"t_r = {level}" for level in levels), "truth"]
        columns = torch.stack(list(rows.values()), 1)              # (labels, kinds, 3, S, S)
        rd.save_grid(out / "t_r_pictures.png", dict(zip(labels, columns)))
        table((f"{name}, t_r", *levels), *((what, *map("{:.1f}".format, y))
                                           for what, (_, y) in curves.items()))


def inpainting(models, out, count=32, fillings=3):
    """Holes of 40 % of the side: error, variety, and how well planes keep what was known."""
    rows = [("set", "error in the hole", "other colour", f"std of {fillings} fillings",
             "known pixels, planes", "the same, nothing hidden", "novel view, dB")]
    for name, model in models.items():
        S = model.config.resolution
        views = synthetic(name, count, 2, S, rd.HELD_OUT, depth=False)
        images, poses, masks = views.images[:, 0], views.poses[:, 0], torch.ones(count, 1, S, S)
        masks[:, :, round(0.3 * S):round(0.7 * S), round(0.3 * S):round(0.7 * S)] = 0
        hole = (masks < 0.5).expand_as(images)

        def known(planes):
            error = ((model.render(planes, poses)[0] - images) / 2)[~hole].view(count, -1)
            return -10 * error.square().mean(1).log10().mean().item()
        made = [rd.inpaint(model, images, masks, poses, 20, jump_n_sample=2, seed=seed)
                for seed in range(fillings)]
        filled = torch.stack([image for image, _ in made])                     # (F, B, 3, S, S)
        error = torch.stack([(image - images).abs()[hole].view(count, -1).mean(1)
                             for image in filled])                             # (F, B)
        rows.append((name, f"{error.mean():.3f}", f"{(error > 0.2).sum()} of {error.numel()}",
                     f"{filled.std(0)[hole].mean():.3f}", f"{known(made[0][1]):.1f} dB",
                     f"{known(rd.reconstruct(model, images)):.1f} dB",
                     f"{sum(compare(model, planes, views, 1) for _, planes in made) / fillings:.1f}"
                     ))
        shown = {"input": images[:8], "masked": (images * masks + masks - 1)[:8]}
        for k, (image, planes) in enumerate(made):
            shown[f"filling {k + 1}"] = image[:8]
            shown[f"{k + 1}, from the side"] = model.render(planes[:8], views.poses[:8, 1])[0]
        rd.save_grid(out / f"{name}_inpainting.png",
                     shown | {"the side's truth": views.images[:8, 1]})
    table(*rows)


def generation(models, out, count=256, readable=8192):
    """How good generated scenes are: `judge`'s tables."""
    rows, kinds = judge(models, count, readable)
    print(f"{count} scenes of each kind, two pictures of each; told: 50 % is chance, +- "
          f"{100 * math.sqrt(0.5 / count):.0f} %")
    table(*rows)
    if len(kinds) > 1:
        table(*kinds)


def together(models, out, count=8):
    """What taught `clevr`: scenes of clevr1's objects, from two sides; below, others of the set."""
    if not {"clevr1", "clevr"} <= set(models):
        return
    config = models["clevr"].config
    torch.manual_seed(3)
    (a, _), (b, _) = put_together(models["clevr1"], config, count=count)
    views = synthetic("clevr", count, 1, config.resolution, rd.HELD_OUT, depth=False)
    rd.save_grid(out / "together.png", {"put together": a, "from another side": b,
                                        "others, traced": views.images[:, 0]})


def training(models, out, count=64, minutes=30.0, marks=(1, 2, 5, 10)):
    """One training of the first set from nothing, looked at after some minutes (its clock runs on
    meanwhile, some seconds) and at its end, where the learning rate has fallen."""
    name, rows, scored = next(iter(models)), {}, [("minutes", "input view, dB", "novel views, dB")]
    marks = [mark for mark in marks if mark < minutes]
    views = synthetic(name, count, 3, 32, rd.HELD_OUT, depth=False)

    def look(model, mark):
        scores = rd.evaluate(model, views)
        scored.append((f"{mark:g}", *(f"{scores[key]['psnr']:.1f}" for key in ("input", "novel"))))
        rows[f"{mark:g} min"], _ = rd.generate(model, rd.turn_poses(model, 0, 8), 20, eta=0.0)

    def watched(model, ema, x0, poses, progress, *rest):
        if marks and progress * minutes >= marks[0]:
            look(ema, marks.pop(0))
        return rd.denoising_loss(model, ema, x0, poses, progress, *rest)
    with tempfile.TemporaryDirectory() as folder:
        config = rd.Config(data=name, minutes=minutes, out=folder, device="cpu")
        look(rd.train(config, watched), minutes)
    rd.save_grid(out / "training.png", rows)
    table(*zip(*scored))


FIGURES = {f.__name__: f for f in (scores, shapes, marching, samples, steps, t_r, inpainting, loss,
                                   generation, together, training)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--checkpoints", nargs="+", metavar="NAME", help="in checkpoints/",
                        default=[name for name in SETS if (rd.SHIPPED / f"{name}.pt").is_file()])
    parser.add_argument("--scenes", type=int, help="how many, 64 at least for generation; "
                        "default: each figure's own number")
    parser.add_argument("--out", type=Path, default="out", help="folder for the pictures")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(FIGURES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(FIGURES)}")
    if unknown := set(args.checkpoints) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))}: name shipped checkpoints")
    if args.scenes and args.scenes < 64 and "generation" in (args.what or FIGURES):
        parser.error(f"--scenes {args.scenes} is too few to judge generated scenes: 64 at least")
    models = {name: rd.load_checkpoint(name) for name in args.checkpoints}
    for name in args.what or FIGURES:
        FIGURES[name](models, args.out, *([args.scenes] if args.scenes else []))


if __name__ == "__main__":
    main()
