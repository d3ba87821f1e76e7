"""How fast, beside what the hardware gives; beside EG3D's renderer; what sampling steps bring.

    python results/benchmark.py                         # about a minute on two CPU cores
    python results/benchmark.py --eg3d ~/eg3d           # beside EG3D's renderer, from your clone
    python results/benchmark.py --quality --count 512   # generated pictures by steps: hours

Prints Markdown tables, or one object with `--json`. Times are medians. A share is the time that
the counted work would take at the rates measured in the same run, over the time that it took:
    products    FLOP of convolutions and other matrix products, two a multiply-add, as torch's
                FlopCounterMode knows them: nothing elementwise, no look-ups
    traffic     bytes into and out of every operation that runs, against a copy of 256 MB: caches,
                which such a copy does not have, can bring it above 100 %
EG3D (github.com/NVlabs/eg3d) has a licence of its own and is imported from where you have it.
"""
import argparse
import contextlib
import io
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from data import camera_rays, synthetic


# ---- Measuring ---------------------------------------------------------------------------------

def now():
    """The time, once the GPU has done all that it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(*runs, least=0.5):
    """Median seconds of each callable. They take turns, so that a slow spell hits all of them."""
    times = [[] for _ in runs]
    while len(times[0]) < 4 or sum(map(sum, times)) < least * len(runs):
        for run, mine in zip(runs, times):
            start = now()
            run()
            mine.append(now() - start)
    return [float(np.median(mine[1:])) for mine in times]       # the first one warms up


class Traffic(TorchDispatchMode):
    """Counts the bytes into and out of every operation but views, which move nothing."""
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if torch.is_tensor(x)]
                       for tree in ((args, kwargs), out))
        owners = {x.untyped_storage().data_ptr() for x in given}
        view = all(x.untyped_storage().data_ptr() in owners for x in made)
        if "empty" not in str(func) and (func._schema.is_mutable or not view):
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in given + made)
        return out


def count(run):
    """What run() asks of the hardware: FLOP of convolutions, of other products, and bytes."""
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        run()
    kinds = flops.get_flop_counts().get("Global", {}).items()
    convolutions = sum(n for kind, n in kinds if "convolution" in str(kind))
    return np.array([convolutions, flops.get_total_flops() - convolutions, traffic.bytes])


class Report:
    """Rows of what was measured, the hardware's own rates first: `cost` is seconds a FLOP or byte
    of what `count` gives, in float32, and `cost_bf16` where that is what a GPU or CPU is good at.
    """

    def __init__(self, device):
        self.device, self.bf16, self.rows = device, rd.bf16_is_fast(device), []
        large = device.type == "cuda"
        n, (B, C, S) = (8192, (64, 256, 64)) if large else (1024, (16, 96, 32))
        source = torch.randn(2 ** 26, device=device)
        target = torch.empty_like(source)
        copy = self.add("copy of 256 MB, read and written", lambda: target.copy_(source),
                        2e-9 * source.nbytes, "GB")

        def rates(dtype):
            a, b = torch.randn(2, n, n, device=device, dtype=dtype)
            x = torch.randn(B, C, S, S, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            weight = torch.randn(C, C, 3, 3, device=device, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            return (self.add(f"3x3 convolution, {C} channels, {S} x {S}, {name}",
                             lambda: F.conv2d(x, weight, padding=1), 18e-9 * B * (C * S) ** 2,
                             "GFLOP"),
                    self.add(f"matrix product, {n} x {n}, {name}", lambda: a @ b, 2e-9 * n ** 3,
                             "GFLOP"))
        self.cost = 1e-9 / np.array([*rates(torch.float32), copy])
        self.cost_bf16 = (1e-9 / np.array([*rates(torch.bfloat16), copy]) if self.bf16
                          else self.cost)

    def add(self, what, run, amount, unit, work=None, bf16=False):
        """A row, and the rate in it: run(), or so many seconds, did `amount` of `unit`."""
        second = medians(run)[0] if callable(run) else run
        row = dict(what=what, rate=amount / second, unit=f"{unit}/s", seconds=second)
        if work is not None:
            convolution, product, row["traffic"] = work * (
                self.cost_bf16 if bf16 else self.cost) / second
            row["products"] = convolution + product
        self.rows.append(row)
        return row["rate"]

    def measure(self, what, run, amount, unit, bf16=False):
        self.add(what, run, amount, unit, count(run), bf16)


# ---- Parts, training, sampling, memory ---------------------------------------------------------

def parts(report, model):
    """Tracer, U-Net, look-ups and renderer, at the sizes of a training step."""
    config, device = model.config, report.device
    B, S, R, K, C = (config.batch, config.resolution, config.rays, config.samples,
                     config.plane_channels)

    def scenes():
        return synthetic(config.data, B, 1, S, device=device, depth=False)
    report.measure(f"tracer, {S} x {S}, 2 x 2 rays a pixel", scenes, B, "images")
    views, t = scenes(), torch.arange(B, device=device)
    images, poses = views.images[:, 0], views.poses[:, 0]

    def encode():
        return model.encode(images, t)
    model.bf16 = report.bf16                                    # as `train` does
    with torch.no_grad():
        planes = encode()
        report.measure("U-Net, forward", encode, B, "images", report.bf16)
    model.unet.requires_grad_(True)
    report.measure("U-Net, forward and backward", lambda: encode().square().sum().backward(), B,
                   "images", report.bf16)
    model.unet.requires_grad_(False)

    points = torch.rand(B, R * K, 3, device=device) * 2 - 1
    floats = 3 + 3 * 4 * C + C          # a point, four texels of each plane, and what they sum to
    report.add("plane look-ups, forward; traffic: four texels a plane",
               lambda: rd.sample_triplanes(planes, points).contiguous(), B * R * K / 1e6,
               "M points", np.array([0, 0, 4 * floats * B * R * K]))
    jitter = torch.rand(B, R, K, device=device)
    rays = [x[:, :R] for x in camera_rays(poses, config.focal, S)]
    for name, run, number in (
            (f"{K} samples", lambda: model.march(planes, *rays, jitter, False)[0], B * R),
            (f"{K} + {config.fine_samples} samples", lambda: model.render(planes, poses)[0],
             B * S * S)):
        report.measure(f"renderer, {name}, forward", run, number, "rays")
        model.mlp.requires_grad_(True)
        planes.requires_grad_(True)
        report.measure(f"renderer, {name}, forward and backward",
                       lambda: run().square().sum().backward(), number, "rays")
        model.mlp.requires_grad_(False)
        planes.requires_grad_(False)


class Enough(Exception):
    """Leaves a training that was watched for long enough."""


def train_steps(config, device, steps):
    """Runs `steps` + 1 steps of `train` itself -> the seconds of each but the first."""
    starts = []

    def loss(*args):
        starts.append(now())
        if len(starts) == steps + 2:
            raise Enough
        return rd.denoising_loss(*args)

    with (tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()),
          contextlib.suppress(Enough)):
        rd.train(replace(config, out=out, device=str(device), resume=False), loss)
    return np.diff(starts)[1:]


def whole(report, model):
    """A step of training, and sampling."""
    cpu, config = report.device.type == "cpu", model.config
    times = train_steps(config, report.device, 10 if cpu else 100)
    work = count(lambda: train_steps(config, report.device, 2)) / 3
    report.add("training, a whole step", float(np.median(times)), config.batch, "images", work,
               report.bf16)
    B = 8 if cpu else 64
    poses = rd.turn_poses(model, 0, B)
    second, = medians(lambda: rd.generate(model, poses, steps=5))
    work = count(lambda: rd.generate(model, poses, steps=5))
    for n in (10, 50, 250):             # every step costs the same, so five of them tell
        report.add(f"sampling, {n} steps, {B} at once: {second * n / 5 / B:.2f} s an image",
                   second * n / 5, B, "images", work * n / 5)


def memory(device):
    """Rows of the peak memory of what one does, each in a process of its own."""
    rows = []
    for job, what in (("train", "training"), ("generate", "sampling, 8 at once"),
                      ("render", "rendering at 256 x 256 from a 32 x 32 model")):
        done = subprocess.run([sys.executable, __file__, "--job", job, "--device", str(device),
                               "--threads", str(torch.get_num_threads())],
                              stdout=subprocess.PIPE, text=True, check=True)
        rows.append(dict(what=what, megabytes=float(done.stdout.split()[-1])))
    return rows


def peak_of(job, model):
    """MB at a job's peak: allocated on a GPU, or beyond what torch and the model take."""
    device, status = model.background.device, Path("/proc/self/status")

    def megabytes(key):
        if status.exists():             # getrusage's peak includes the process that started this
            return int(status.read_text().split(key + ":")[1].split()[0]) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20     # bytes on a Mac

    poses, before = rd.turn_poses(model, 0, 8), megabytes("VmRSS")
    if job == "train":
        train_steps(model.config, device, 3)
    else:
        _, planes = rd.generate(model, poses[:8 if job == "generate" else 1], steps=2)
        if job == "render":
            model.render(planes, poses[:1], resolution=256)
    return (torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda"
            else megabytes("VmHWM") - before)


# ---- EG3D's renderer ---------------------------------------------------------------------------

class SmallMLP(nn.Module):
    """An MLP C-64-4 that both renderers can use, density being softplus(x - 1) as EG3D has it."""

    def __init__(self, C):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(C, 64), nn.Softplus(), nn.Linear(64, 4))

    def forward(self, points, features):                        # as RadianceMLP
        out = self.layers(features)
        return F.softplus(out[..., 0] - 1), torch.sigmoid(out[..., 1:])

    def decode(self, features, points):                         # as EG3D's decoder
        out = self.layers(features.sum(1))
        return {"sigma": out[..., :1], "rgb": torch.sigmoid(out[..., 1:])}


def load_eg3d(path):
    """EG3D's renderer as a function: planes, decode, origins, directions, samples of each kind ->
    rgb in [0, 1] on black, opacity. decode: features (B, 3, P, C), points (B, P, 3) -> a dict."""
    sys.path.insert(0, str(Path(path) / "eg3d"))
    from training.volumetric_rendering.renderer import ImportanceRenderer

    class Renderer(ImportanceRenderer):
        def run_model(self, planes, decoder, points, directions, options):
            return super().run_model(planes, lambda features, _: decoder(features, points), points,
                                     directions, options)

    renderer = Renderer()
    # As released the planes are xy, xz and zx; the third becomes yz, which costs the same.
    renderer.plane_axes[2] = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])

    def render(planes, decode, origins, directions, samples):
        N = planes.shape[-1]            # its planes end at the edges of texels, ours at centres
        options = dict(ray_start="auto", ray_end="auto", box_warp=2 * N / (N - 1),
                       depth_resolution=samples, depth_resolution_importance=samples,
                       disparity_space_sampling=False, clamp_mode="softplus")
        rgb, _, opacity = renderer(planes, decode, origins, directions, options)
        return rgb / 2 + 0.5, opacity

    return render


def equal_work(eg3d, device, B=4, C=32, N=64, K=24):
    """Rows of rays/s of both renderers with the same planes, rays, MLP and K + K evaluations."""
    model = rd.RenderDiffusion(rd.Config(plane_size=N, plane_channels=C, samples=K,
                                         fine_samples=K)).to(device)
    model.mlp, S = SmallMLP(C).to(device), model.config.resolution
    planes = torch.randn(B, 3, C, N, N, device=device, requires_grad=True)
    poses, rows = rd.turn_poses(model, 0, B), []
    rays = camera_rays(poses, model.config.focal, S)

    def run(render, backward):
        with torch.set_grad_enabled(backward):
            shown = render()
            if backward:
                shown.square().mean().backward()

    for what in ("forward", "forward and backward"):
        ours, theirs = (B * S * S / second for second in medians(
            lambda: run(lambda: model.render(planes, poses)[0], what != "forward"),
            lambda: run(lambda: eg3d(planes, model.mlp.decode, *rays, K)[0], what != "forward"),
            least=2))
        rows.append(dict(what=what, ours=ours, eg3d=theirs, ratio=ours / theirs))
    return rows


@torch.no_grad()
def equal_error(eg3d, model):
    """Rows of the root mean square error of pictures of held-out scenes and the time they take, by
    samples a ray, with the time that EG3D's renderer takes for the same error.

    The error is against the same renderer's picture from 512 samples a ray; four of them for
    EG3D, whose samples are random; these two differ by the last value returned.
    """
    device, config = model.background.device, model.config
    views = synthetic(config.data, 4, 1, config.resolution, rd.HELD_OUT, device, depth=False)
    poses, planes = views.poses[:, 0], model.encode(views.images[:, 0], 0).contiguous()
    rays = camera_rays(poses, config.focal, config.resolution)
    torch.manual_seed(0)

    def decode(features, points):
        density, rgb = model.mlp(points, features.sum(1))
        density = density.clamp(min=1e-6)       # sigma, so that softplus(sigma - 1) is the density
        return {"sigma": (1 + density + (-torch.expm1(-density)).log())[..., None], "rgb": rgb}

    def ours(K):
        model.config = replace(config, samples=K, fine_samples=K)
        return model.render(planes, poses)[0].flatten(2).mT / 2 + 0.5

    def theirs(K):
        rgb, opacity = eg3d(planes, decode, *rays, K)
        return rgb + (1 - opacity) * model.background

    def rmse(a, b):
        return (a - b).square().mean().sqrt().item()

    def curve(render, exact, counts):
        """Errors and seconds for each number of samples."""
        return {K: (rmse(render(K), exact), *medians(lambda: render(K), least=0.2)) for K in counts}

    exact, other = ours(256), torch.stack([theirs(256) for _ in range(4)]).mean(0)
    mine = curve(ours, exact, (4, 6, 8, 12, 16))
    its = curve(theirs, other, (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128))
    log_error, log_second = np.log(list(its.values())).T
    rows = []
    for K, (error, second) in mine.items():
        needed = np.exp(np.interp(-np.log(error), -log_error, log_second)).item()
        rows.append(dict(what=f"{K} + {K}", error=error, ms=1e3 * second, eg3d_error=its[K][0],
                         eg3d_ms=1e3 * its[K][1], eg3d_ms_for_our_error=1e3 * needed,
                         reached=min(its.values())[0] <= error, ratio=needed / second))
    model.config = config
    return rows, rmse(exact, other)


# ---- Sampling steps ----------------------------------------------------------------------------

def frechet(a, b):
    """The Frechet distance of Gaussians that fit two sets of features (N, D): the squared distance
    of the means plus the trace of A + B - 2 (A B)^1/2 for covariances A and B."""
    (mean_a, A), (mean_b, B) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()


@torch.no_grad()
def quality(model, total, steps):
    """Rows of Frechet distances of `total` generated to as many traced pictures, by network calls.

    In two spaces of 32 principal components of 2,048 other traced pictures: of their pixels
    (layout, colours, blur), and, each scaled to variance 1, of the U-Net's middle at t = 0, mean
    and deviation over positions (shapes, as the model sees them). The cameras are the traced
    pictures' own. The first row is the floor: traced pictures of other scenes.
    """
    config, device = model.config, model.background.device

    def traced(seed, number):
        views = synthetic(config.data, number, 1, config.resolution, seed, device, depth=False)
        return views.images[:, 0], views.poses[:, 0]

    def middle(images):
        seen = []
        hook = model.unet.middle.register_forward_hook(lambda *call: seen.append(call[2]))
        for some in images.split(64):
            model.encode(some, 0)
        hook.remove()
        h = torch.cat(seen).flatten(2)
        return torch.cat([h.mean(2), h.std(2)], 1)

    many, spaces = traced(rd.HELD_OUT - 2, 2048)[0], {}
    for name, describe in (("pixels", lambda x: x.flatten(1)), ("middle", middle)):
        x = describe(many)
        _, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        scale = 1 if name == "pixels" else len(x) ** 0.5 / S[:32]
        spaces[name] = describe, Vh[:32].T * scale
    real, poses = traced(rd.HELD_OUT, total)

    def row(what, images, **more):
        return dict(what=what, **more) | {
            name: frechet(describe(images) @ basis, describe(real) @ basis)
            for name, (describe, basis) in spaces.items()}

    rows = [row("traced", traced(rd.HELD_OUT - 1, total)[0])]
    for n in steps:
        for eta in (0.0, 1.0):
            start = now()
            images = torch.cat([rd.generate(model, some, n, eta, seed=i)[0]
                                for i, some in enumerate(poses.split(32))])
            rows.append(row(f"{n} steps, eta {eta:g}", images, seconds=(now() - start) / total))
            print(rows[-1], file=sys.stderr, flush=True)        # hours: show that it goes on
    return rows


# ---- Tables ------------------------------------------------------------------------------------

def table(rows, first, **columns):
    """An aligned Markdown table: `what` of each row under `first`, then key="heading|format"."""
    lines = [[first, *(form.split("|")[0] for form in columns.values())]]
    for row in rows:
        lines.append([row["what"], *("" if row.get(key) is None else form.split("|")[1].format(
            row[key]) for key, form in columns.items())])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "".join("| " + " | ".join(
        cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        + " |\n" for line in lines)


def machine(device):
    """What the numbers hold for."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else [platform.processor()]
    name = torch.cuda.get_device_name() if device.type == "cuda" else (names or ["unknown CPU"])[0]
    return f"{name}, {device.type}, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto or a torch device")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--eg3d", metavar="PATH", help="only beside EG3D's renderer, in a clone")
    parser.add_argument("--quality", action="store_true", help="only pictures by sampling steps")
    parser.add_argument("--count", type=int, default=512, help="pictures a row of --quality")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 15, 20, 30, 50, 100, 250],
                        help="network calls for --quality")
    parser.add_argument("--job", help=argparse.SUPPRESS)        # the processes of `memory`
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = rd.pick_device(args.device)
    model = rd.load_checkpoint("clevr1", device)
    if args.job:
        return print(peak_of(args.job, model))
    found, text = {"machine": machine(device)}, [machine(device) + "\n"]
    if args.eg3d:
        eg3d = load_eg3d(args.eg3d)
        found["equal_work"] = equal_work(eg3d, device)
        found["equal_error"], found["references_differ"] = equal_error(eg3d, model)
        text += [table(found["equal_work"], "equal work", ours="ours, rays/s|{:,.0f}",
                       eg3d="EG3D, rays/s|{:,.0f}", ratio="ratio|{:.2f}"),
                 table(found["equal_error"], "samples a ray", error="our error|{:.5f}",
                       ms="ms|{:.0f}", eg3d_error="EG3D's error|{:.5f}", eg3d_ms="ms|{:.0f}",
                       eg3d_ms_for_our_error="EG3D's ms for our error|{:.0f}",
                       reached="reached|{}", ratio="ratio|{:.1f}"),
                 f"The two references differ by {found['references_differ']:.5f}.\n"]
    elif args.quality:
        found["quality"] = quality(model, args.count, args.steps)
        text.append(table(found["quality"], f"{args.count} pictures", pixels="pixels|{:.2f}",
                          middle="U-Net's middle|{:.2f}", seconds="s an image|{:.2f}"))
    else:
        report = Report(device)
        parts(report, model)
        whole(report, rd.load_checkpoint("clevr1", device))
        found |= {"speed": report.rows, "memory": memory(device)}
        text += [table(report.rows, "what", rate="rate|{:,.1f}", unit="|{}",
                       products="products|{:.0%}", traffic="traffic|{:.0%}"),
                 table(found["memory"], "peak memory", megabytes="MB|{:,.0f}")]
    print(json.dumps(found) if args.json else "\n".join(text))


if __name__ == "__main__":
    main()
