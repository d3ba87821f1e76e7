"""How fast, at 64x64 and 32x32, beside what the hardware gives.

    python results/benchmark.py                         # minutes on two CPU cores
    python results/benchmark.py --checkpoint planes --device cuda

Prints Markdown tables. Times are medians. "Of the time" is the share that the convolutions and
other matrix products of the work would take at the rates measured in the same run (two FLOP a
multiply-add, as torch's FlopCounterMode knows them: nothing elementwise, no look-ups).
"""
import argparse
import contextlib
import io
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import renderdiffusion as rd
from data import SETS, camera_rays, synthetic
from figures import table


# ---- Measuring ---------------------------------------------------------------------------------

def now():
    """The time, once the GPU has done all that it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median(run, least=0.5):
    """Median seconds of a callable."""
    times = []
    while len(times) < 4 or sum(times) < least:
        start = now()
        run()
        times.append(now() - start)
    return float(np.median(times[1:]))                          # the first one warms up


def count(run):
    """FLOP of convolutions and of other products that run() asks for."""
    with FlopCounterMode(display=False) as flops:
        run()
    kinds = flops.get_flop_counts().get("Global", {}).items()
    convolutions = sum(n for kind, n in kinds if "convolution" in str(kind))
    return np.array([convolutions, flops.get_total_flops() - convolutions])


class Report:
    """Rows of what was measured, the hardware's own rates first: `cost` is seconds a FLOP of what
    `count` gives, in float32, and `cost_bf16` where that is what a GPU or CPU is good at."""

    def __init__(self, device):
        self.device, self.bf16 = device, rd.bf16_is_fast(device)
        self.rows = [("what", "rate", "", "of the time")]
        n, (B, C, S) = (8192, (64, 256, 64)) if device.type == "cuda" else (1024, (16, 96, 32))

        def costs(dtype):
            a, b = torch.randn(2, n, n, device=device, dtype=dtype)
            x = torch.randn(B, C, S, S, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            weight = torch.randn(C, C, 3, 3, device=device, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            return 1e-9 / np.array([
                self.add(f"3x3 convolution, {C} channels, {S} x {S}, {name}",
                         lambda: F.conv2d(x, weight, padding=1), 18e-9 * B * (C * S) ** 2, "GFLOP"),
                self.add(f"matrix product, {n} x {n}, {name}", lambda: a @ b, 2e-9 * n ** 3,
                         "GFLOP")])
        self.cost = costs(torch.float32)
        self.cost_bf16 = costs(torch.bfloat16) if self.bf16 else self.cost

    def add(self, what, run, amount, unit, work=None, bf16=False):
        """A row, and the rate in it: run(), or so many seconds, did `amount` of `unit`."""
        second = median(run) if callable(run) else run
        share = "" if work is None else (
            f"{(work * (self.cost_bf16 if bf16 else self.cost)).sum() / second:.0%}")
        self.rows.append((what, f"{amount / second:,.1f}", f"{unit}/s", share))
        print(what, file=sys.stderr, flush=True)                # minutes: show that it goes on
        return amount / second

    def measure(self, what, run, amount, unit, bf16=False):
        self.add(what, run, amount, unit, count(run), bf16)


# ---- Parts, training, sampling, memory ---------------------------------------------------------

def parts(report, model):
    """Tracer, U-Net and renderer, at the sizes of a training step of 16 pictures."""
    config, device, B = model.config, report.device, 16
    S, R = config.resolution, config.rays

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
    model.bf16 = False

    rays = [x[:, :R] for x in camera_rays(poses, config.focal, S)]
    name = f"renderer, {config.samples} + {config.fine_samples} samples"

    def march():
        return model.march(planes, *rays)[0]
    report.measure(f"{name}, forward", march, B * R, "rays")
    for part in (model.mlp, planes):
        part.requires_grad_(True)
    report.measure(f"{name}, forward and backward", lambda: march().square().sum().backward(),
                   B * R, "rays")
    model.mlp.requires_grad_(False)


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

    with (tempfile.TemporaryDirectory() as out, contextlib.suppress(Enough),
          contextlib.redirect_stdout(io.StringIO()),
          mock.patch.object(rd, "Journal", mock.MagicMock())):
        rd.train(replace(config, out=out, device=str(device), resume=False, init="", scenes=0,
                         batch=16, minutes=0.0, steps=10 ** 6), loss)
    return np.diff(starts)[1:]


def trainings(model):
    """What is trained in the rows on training: a label, and its `Config`."""
    small, large = rd.Config(data=model.config.data, fold=0), model.config
    for config in (small, large):
        for share in (0.0, 0.5):
            side = f"{config.resolution} x {config.resolution}"
            yield (f"training, {side}, 16 at once" + ", half from the other side" * (share > 0),
                   replace(config, other_side=share, other_side_from=0.0 if share else 1.0))


def whole(report, model):
    """Steps of training, and sampling."""
    cpu = report.device.type == "cpu"
    for what, config in trainings(model):
        times = train_steps(config, report.device, 4 if cpu else 100)
        work = count(lambda: train_steps(config, report.device, 2)) / 3
        report.add(what, float(np.median(times)), 16, "images", work, report.bf16)
    B, S = 8, model.config.resolution
    poses = rd.turn_poses(model, 0, B)
    second = median(lambda: rd.generate(model, poses, steps=5))
    work = count(lambda: rd.generate(model, poses, steps=5))
    for n in (10, 20, 50):              # every step costs the same, so five of them tell
        report.add(f"sampling, {S} x {S}, {n} calls, {B} at once: {second * n / 5 / B:.2f} s a "
                   "picture", second * n / 5, B, "images", work * n / 5)


def demo(device):
    """A row: the seconds of `renderdiffusion.py demo`, by one process from its start on."""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        subprocess.run([sys.executable, rd.__file__, "demo", "--out", out, "--device", str(device)],
                       check=True, capture_output=True)
        second = time.perf_counter() - start
    return "demo, from its start", f"{second:.0f}", "s", ""


JOBS = {"train32": "training, 32 x 32, 16 at once", "train": "training, 64 x 64, 16 at once",
        "generate": "sampling, 8 at once", "render": "one scene, rendered at 256 x 256"}


def memory(args):
    """Rows of the peak memory of what one does, each in a process of its own."""
    rows = [("peak memory", "MB")]
    for job, what in JOBS.items():
        done = subprocess.run(
            [sys.executable, __file__, "--job", job, "--device", args.device, "--checkpoint",
             args.checkpoint, "--threads", str(torch.get_num_threads())], stdout=subprocess.PIPE,
            text=True, check=True)
        rows.append((what, f"{float(done.stdout.split()[-1]):,.0f}"))
    return rows


def peak_of(job, model):
    """MB at a job's peak: allocated on a GPU, or beyond what torch and the model take."""
    device, status = model.background.device, Path("/proc/self/status")

    def megabytes(key):
        if status.exists():             # getrusage's peak includes the process that started this
            return int(status.read_text().split(key + ":")[1].split()[0]) / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20     # bytes on a Mac

    poses, before = rd.turn_poses(model, 0, 8), megabytes("VmRSS")
    if job.startswith("train"):
        train_steps([config for _, config in trainings(model)][0 if job == "train32" else 2],
                    device, 3)
    else:
        _, planes = rd.generate(model, poses[:8 if job == "generate" else 1], steps=2)
        if job == "render":
            model.render(planes, poses[:1], resolution=256)
    return (torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda"
            else megabytes("VmHWM") - before)


# ---- Command line ------------------------------------------------------------------------------

def machine(device):
    """What the numbers hold for."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else [platform.processor()]
    name = torch.cuda.get_device_name() if device.type == "cuda" else (names or ["unknown CPU"])[0]
    return f"{name}, {device.type}, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="cars", help="a file, or a name in checkpoints/")
    parser.add_argument("--device", default="auto", help="auto or a torch device")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # the processes of `memory`
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = rd.pick_device(args.device)
        model = rd.load_checkpoint(args.checkpoint, device)
        if model.config.data not in SETS:
            raise ValueError(f"{args.checkpoint} is of {model.config.data}: name one of a built-in "
                             "set, whose scenes are traced")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.job:
        return print(peak_of(args.job, model))
    print(machine(device) + "\n")
    report = Report(device)
    parts(report, model)
    whole(report, model)
    table(*report.rows, demo(device))
    table(*memory(args))


if __name__ == "__main__":
    main()
