"""Your pictures by COLMAP: writes FOLDER/transforms.json from its cameras, exported as text.

    colmap image_undistorter --image_path PICTURES --input_path sparse/0 --output_path FOLDER
    colmap model_converter --input_path FOLDER/sparse --output_path FOLDER --output_type TXT
    python subsets/colmap.py FOLDER
    python renderdiffusion.py train --data FOLDER

FOLDER holds `cameras.txt`, `images.txt`, `points3D.txt` and the pictures in `images/`. The median
of the points becomes the origin, and the world is turned upright: z is up. All pictures must be
of one camera without distortion (`--ImageReader.single_camera 1` where COLMAP finds its features).
Formats: https://colmap.github.io/format.html
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np


# ---- COLMAP's text files -----------------------------------------------------------------------

def read_rows(path):
    """The lines of one of COLMAP's text files without its comments; empty ones stay."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: export it by colmap model_converter "
                                "--output_type TXT")
    return [line for line in path.read_text("utf-8-sig", "replace").splitlines()
            if not line.startswith("#")]


def numbers(path, row, first, last):
    """Fields first to last - 1 of a row as finite numbers; ValueError that quotes the row."""
    try:
        values = np.array(row.split()[first:last], dtype=float)
        if len(values) == last - first and np.isfinite(values).all():
            return values
    except ValueError:
        pass
    raise ValueError(f"{path} has a line that is not as COLMAP writes it: {row[:60]!r}")


def read_lens(path):
    """The lens of the one camera in cameras.txt, as transforms.json has it, in pixels."""
    rows = [row for row in read_rows(path) if row.strip()]
    if len(rows) != 1:
        raise ValueError(f"{path} has {len(rows)} cameras, and all pictures must be of one: "
                         "--ImageReader.single_camera 1 in colmap feature_extractor")
    model = (*rows[0].split(), "", "")[1]
    if model not in ("PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(f"the camera in {path} is {model or 'none'}, and only PINHOLE and "
                         "SIMPLE_PINHOLE have no distortion: run colmap image_undistorter first")
    fields = 8 if model == "PINHOLE" else 7
    w, h, *focal, cx, cy = numbers(path, rows[0], 2, fields)
    return {"w": int(w), "h": int(h), "fl_x": focal[0], "fl_y": focal[-1], "cx": cx, "cy": cy}


def read_poses(path):
    """Names (a list) and camera-to-world poses (n, 4, 4), OpenCV axes, of images.txt.

    An image has two lines: id, quaternion (w, x, y, z) and shift from world to camera, camera,
    name; then its points in the picture, three numbers each, of which there may be none.
    """
    names, poses, rows = [], [], read_rows(path)
    for row in rows[1::2]:      # of a file without these lines, every other image would be lost
        numbers(path, row, 0, -(-len(row.split()) // 3) * 3)
    for row in rows[::2]:
        w, x, y, z, *shift = numbers(path, row, 1, 8)
        fields = row.split(maxsplit=9)
        length = np.linalg.norm([w, x, y, z])
        if len(fields) < 10 or not length > 0:
            raise ValueError(f"{path} has a line that is not as COLMAP writes it: {row[:60]!r}")
        w, x, y, z = np.array([w, x, y, z]) / length
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rotation = np.eye(3) + 2 * w * cross + 2 * cross @ cross            # world to camera
        poses.append(np.eye(4))
        poses[-1][:3] = np.c_[rotation.T, -rotation.T @ shift]
        names.append(fields[9].strip())
    if not names:
        raise ValueError(f"{path} has no pictures")
    return names, np.array(poses)


def read_points(path):
    """The points (P, 3) of points3D.txt."""
    rows = [row for row in read_rows(path) if row.strip()]
    if not rows:
        raise ValueError(f"{path} has no points")
    return np.array([numbers(path, row, 1, 4) for row in rows])


# ---- A world with the subject at the origin and z up -------------------------------------------

def find_up(poses):
    """The direction (3,) that is up, from camera-to-world poses (n, 4, 4).

    Pictures are taken level, so up is at right angles to every camera's right, by least squares;
    where all have the same right, so that many directions are, the mean up decides.
    """
    right, down = poses[:, :3, 0], poses[:, :3, 1]
    up = np.linalg.solve(right.T @ right / len(right) + 1e-6 * np.eye(3), -down.mean(0))
    return up / np.linalg.norm(up)


def upright(poses, center, up):
    """The poses in a world whose origin is `center` (3,) and whose z is `up` (3,).

    x goes where the first picture's right does.
    """
    x = poses[0, :3, 0] - up * (up @ poses[0, :3, 0])
    x /= np.linalg.norm(x)
    world = np.eye(4)
    world[:3, :3] = np.stack([x, np.cross(up, x), up])
    world[:3, 3] = -world[:3, :3] @ center
    return world @ poses


def convert(folder):
    """What transforms.json is to hold, and a sentence on how the world was turned."""
    lens = read_lens(folder / "cameras.txt")
    names, poses = read_poses(folder / "images.txt")
    points = read_points(folder / "points3D.txt")
    for name in names:
        if not (folder / "images" / name).is_file():
            raise FileNotFoundError(f"there is no picture {folder / 'images' / name}")
    up = find_up(poses)
    head_down = int((poses[:, :3, 1] @ up > 0).sum())
    if head_down > len(poses) / 5:
        raise ValueError(f"{folder}: no direction is up for the cameras, {head_down} of "
                         f"{len(poses)} would be head down: turn pictures that lie on their side "
                         "before colmap reads them")
    roll = np.degrees(np.median(np.abs(np.arcsin(poses[:, :3, 0] @ up))))
    poses = upright(poses, np.median(points, 0), up)
    frames = [{"file_path": f"images/{name}", "transform_matrix": (pose * [1, -1, -1, 1]).tolist()}
              for name, pose in zip(names, poses)]                          # OpenGL axes
    return {**lens, "frames": frames}, (
        f"{len(names)} cameras; the median of {len(points):,} points is the origin; up is where "
        f"the pictures are level (off by {roll:.1f} degrees in the median)")


def main(argv=None):
    """The command of this file's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds COLMAP's text files and images/")
    parser.add_argument("--force", action="store_true", help="write over a transforms.json")
    args = parser.parse_args(argv)
    path = args.folder / "transforms.json"
    try:
        if path.exists() and not args.force:
            raise FileExistsError(f"{path} is there already: --force writes over it")
        about, sentence = convert(args.folder)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{path}: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    main()
