"""CLEVR's own pictures [Johnson et al. 2017], one a scene, with the cameras that it does not state.

    python subsets/clevr_cameras.py CLEVR_v1.0 clevr_64.npz --scenes 5000
    python renderdiffusion.py train --data clevr_64.npz

FOLDER is CLEVR v1.0 (https://cs.stanford.edu/people/jcjohns/clevr/) or what its generator writes:
`CLEVR_scenes.json` and `images/`. The camera looks at the origin with z up and its lens is known,
so where it stands follows from the objects' `3d_coords` and `pixel_coords`. Scenes without their
picture, and scenes that no camera fits, are skipped and counted. OUT.npz is what `data.load_npz`
reads. All cameras look from one side, a few degrees apart: expect billboards.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import CLEVR_SCALE
from render_clevr1 import save_npz

LENS = 35 / 32                              # focal length in picture widths, at any size
MEAN_CENTER = 7.48113, -6.50764, 5.34367    # where the generator has its camera, before its jitter


# ---- The camera --------------------------------------------------------------------------------

def look_at_origin(center):
    """The pose (4, 4) of a camera at `center` (3,) that looks at the origin with z up.

    As `data.orbit`, in double precision: the depths to fit are exact to 1e-5.
    """
    into = -center / np.linalg.norm(center)
    right = np.array([into[1], -into[0], 0]) / math.hypot(into[0], into[1])
    return np.stack([*np.stack([right, np.cross(into, right), into, center], 1), [0, 0, 0, 1]])


def solve_camera(points, seen, width, height):
    """The pose (4, 4), in CLEVR's units, of the camera that saw a scene's objects, or None if they
    do not fit together; and the root mean square error in pixels.

    points, seen: their `3d_coords` and `pixel_coords`, (P, 3) each; of the latter x and y are
    rounded to pixels, and z is the exact depth. Least squares for the camera's centre, three
    numbers, by Gauss-Newton. One bad object of three or more is left out.
    """
    if len(points) < 2:
        return None, math.nan

    def residual(center, keep):
        """Errors (3 P,), in units of the error that rounding alone can make."""
        x, y, z = ((points[keep] - center) @ look_at_origin(center)[:3, :3]).T
        focal = LENS * width
        pixels = np.stack([focal * x / z + width / 2, focal * y / z + height / 2, z], 1)
        return ((pixels - seen[keep]) / (0.5, 0.5, 1e-5)).ravel()

    def fit(keep):
        center = np.array(MEAN_CENTER)
        for _ in range(5):
            slope = [(residual(center + e, keep) - residual(center - e, keep)) / 2e-4
                     for e in 1e-4 * np.eye(3)]
            try:
                center -= np.linalg.lstsq(np.transpose(slope), residual(center, keep), None)[0]
            except np.linalg.LinAlgError:                       # it went astray
                return math.inf, tuple(center), math.nan
        error = residual(center, keep).reshape(-1, 3)
        return np.abs(error).max(), tuple(center), 0.5 * np.sqrt((error[:, :2] ** 2).mean())

    every = np.arange(len(points))
    worst, center, error = fit(every)
    if worst > 3 and len(points) > 2:
        worst, center, error = min(fit(np.delete(every, i)) for i in every)
    return look_at_origin(np.array(center)) if worst <= 3 else None, error


# ---- CLEVR's files -----------------------------------------------------------------------------

def find_files(folder, split=None):
    """The file of the scenes and the folder of their pictures, of the first split that is there."""
    tried = [(folder / "scenes" / f"CLEVR_{name}_scenes.json", folder / "images" / name)
             for name in ([split] if split else ["train", "val"])]
    if not split:
        tried.append((folder / "CLEVR_scenes.json", folder / "images"))     # the generator's
    for file, pictures in tried:
        if file.is_file() and pictures.is_dir():
            return file, pictures
    raise FileNotFoundError("there is neither " + " nor ".join(
        f"{file} with {pictures}" for file, pictures in tried))


def read_scenes(file):
    """The scenes (a list of dicts) of a CLEVR file, without what is not used: v1.0 has 70,000."""
    def shorter(item):
        return {key: item[key] for key in item if key not in ("relationships", "directions")}
    try:
        with open(file, encoding="utf-8-sig") as text:
            return list(json.load(text, object_hook=shorter)["scenes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no file of CLEVR's scenes, or is damaged: "
                         f"{type(error).__name__}, {error}") from None


def read_objects(scene):
    """`3d_coords` and `pixel_coords` of a scene's objects, (P, 3) each."""
    columns = [np.array([thing[key] for thing in scene["objects"]], dtype=float).reshape(-1, 3)
               for key in ("3d_coords", "pixel_coords")]
    if len(columns[0]) != len(columns[1]) or not np.isfinite(columns).all():
        raise ValueError("coordinates have to be three finite numbers")
    return columns


def read_picture(path):
    """A picture file as an RGB image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:                      # PIL raises a dozen kinds
        raise ValueError(f"{path} is no picture, or is damaged: {error}") from None


def crop_middle(image, side):
    """The full-height middle square of an RGB image, made smaller: (side, side, 3) uint8."""
    left = (image.width - image.height) / 2
    box = (left, 0, left + image.height, image.height)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box))


def convert(file, pictures, count=None, side=64):
    """The arrays of OUT.npz for the first `count` scenes that fit, and a sentence about them."""
    print(f"reading {file}", file=sys.stderr)
    scenes = read_scenes(file)
    images, poses, errors, size, unseen, unfit = [], [], [], None, 0, 0
    start = said = time.monotonic()
    for i, scene in enumerate(scenes):
        if len(images) == count:
            break
        try:
            path, (points, seen) = pictures / scene["image_filename"], read_objects(scene)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"scene {i} of {file} is not as CLEVR has it: "
                             f"{type(error).__name__}, {error}") from None
        if not path.is_file():
            unseen += 1
            continue
        image = read_picture(path)
        size = size or image.size
        if image.size != size or not side <= image.height <= image.width:
            raise ValueError(f"{path} is {image.width} x {image.height} pixels: all pictures must "
                             f"be of one size, no taller than wide, and at least {side} high "
                             "(--resolution)")
        pose, error = solve_camera(points, seen, *size)
        if pose is None:
            unfit += 1
            continue
        images.append(crop_middle(image, side))
        pose[:3, 3] /= CLEVR_SCALE
        poses.append(pose)
        errors.append(error)
        now = time.monotonic()
        if now > said + 5:
            said = now
            done = max((i + 1) / len(scenes), len(images) / (count or math.inf))
            print(f"scene {i + 1:,} of {len(scenes):,}: {len(images):,} cameras, "
                  f"{(now - start) * (1 / done - 1) / 60:.1f} min left", file=sys.stderr)
    about = f"skipped {unfit} scenes that no camera fits, and {unseen} without a picture"
    if not images:
        raise ValueError(f"{file} has no scene to take: {about}")
    ground = np.median(np.stack(images[:64]).reshape(-1, 3), 0)
    arrays = {"images": np.stack(images)[:, None], "poses": np.float32(poses)[:, None],
              "focal": np.float32(LENS * size[0] / size[1]), "background": np.uint8(ground)}
    return arrays, (f"{len(images):,} pictures, whose cameras fit to {np.median(errors):.2f} "
                    f"pixels in the median; {about}")


def main(argv=None):
    """The command of this file's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="CLEVR v1.0, or what its generator wrote")
    parser.add_argument("out", type=Path, help="the file, OUT.npz")
    parser.add_argument("--scenes", type=int, help="how many, of those that fit (all)")
    parser.add_argument("--resolution", type=int, default=64, help="side of a picture (64)")
    parser.add_argument("--split", choices=("train", "val"), help="the first that is there")
    args = parser.parse_args(argv)
    try:
        if args.resolution < 1 or args.scenes is not None and args.scenes < 1:
            raise ValueError("--scenes and --resolution must be at least 1")
        if args.out.suffix != ".npz" or not args.out.parent.is_dir():
            raise ValueError(f"{args.out} must end in .npz, in a folder that is there")
        if args.out.exists():
            raise FileExistsError(f"{args.out} is there already: name another file")
        files = find_files(args.folder, args.split)
        arrays, sentence = convert(*files, args.scenes, args.resolution)
        save_npz(args.out, **arrays)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.out}: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    main()
