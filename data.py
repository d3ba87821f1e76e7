"""Posed images for RenderDiffusion: cameras, loaders, and ray-traced scenes that need no download.

    views = load("clevr1", scenes=8, views=4)           # images, poses, focal, background, depth
    origins, directions = camera_rays(views.poses[:, 0], views.focal, 64)
    views = load("data/cars", scenes=200)               # ShapeNet-SRN, NMR, CLEVR, .npz, your own

world   right-handed, z up; a scene and its shadows are inside the cube [-1, 1]^3
pose    camera-to-world 4x4, OpenCV axes: x right, y down, z into the scene
focal   in image widths; principal point in the middle, pixel centres at +0.5
images  float32 in [-1, 1]
depth   distance along the unit ray through the pixel's centre to the first hit, inf in the sky
shapes  B images, N scenes, V views, S image side, R = S^2 rays, P primitives, M, H some of them
"""
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


# ---- Cameras and posed images ------------------------------------------------------------------

def orbit(azimuth, elevation, radius, target=(0.0, 0.0, 0.0)):
    """Poses (..., 4, 4) of cameras on a sphere around `target`, looking at it with z up. Azimuth
    (from +x towards +y) and elevation (from the ground up) are in degrees; all arguments are
    numbers or tensors that broadcast, `target` with a last dimension of three."""
    given = azimuth, elevation, radius, target
    device = next((a.device for a in given if torch.is_tensor(a)), None)
    azimuth, elevation, radius, target = (
        torch.as_tensor(a, dtype=torch.float32, device=device) for a in given)
    azimuth, elevation, radius, _ = torch.broadcast_tensors(
        azimuth.deg2rad(), elevation.deg2rad(), radius, target[..., 0])
    ca, sa, ce, se = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    right = torch.stack([-sa, ca, torch.zeros_like(ca)], -1)
    down = torch.stack([se * ca, se * sa, -ce], -1)
    into = torch.stack([-ce * ca, -ce * sa, -se], -1)
    poses = torch.stack([right, down, into, target - radius[..., None] * into], -1)   # (..., 3, 4)
    last_row = poses.new_tensor([0, 0, 0, 1]).expand_as(poses[..., :1, :])
    return torch.cat([poses, last_row], -2)


def camera_rays(poses, focal, resolution):
    """World rays through the pixel centres: origins and unit directions (B, R, 3), row by row."""
    across = ((torch.arange(resolution, device=poses.device) + 0.5) / resolution - 0.5) / focal
    y, x = torch.meshgrid(across, across, indexing="ij")
    x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)                               # (1, R, 1)
    right, down, into, center = poses[:, None, :3].unbind(-1)                     # (B, 1, 3) each
    directions = (right * x + down * y + into) / (x * x + y * y + 1).sqrt()       # (B, R, 3)
    return center.expand_as(directions), directions


def turn_poses(model, azimuth, count):
    """Poses (count, 4, 4) to look from and to denoise through: round a model's scene from `azimuth`
    (degrees) on, a quarter up its cameras' range; from higher, spheres prevail (results/README.md).
    """
    azimuths = azimuth + torch.arange(count, device=model.background.device) * 360 / count
    low, high = model.config.elevation
    return orbit(azimuths, low + (high - low) / 4, model.config.radius)


@dataclass
class Views:
    """Posed images of N scenes, V views each. `len(views)` is N and `views[i:j]` some scenes."""
    images: torch.Tensor                # (N, V, 3, S, S) in [-1, 1]
    poses: torch.Tensor                 # (N, V, 4, 4) camera-to-world
    focal: float                        # in image widths, one for the set
    background: torch.Tensor            # (3,) in [-1, 1]
    name: str
    scale: float = 1.0                  # world units a cube unit, 1 for the built-in sets
    depth: torch.Tensor | None = None   # (N, V, S, S) to the first hit, inf where there is none
    held_out: bool = False              # whether training leaves them out

    def __len__(self):
        return len(self.images)

    def to(self, device):
        """The same on another device."""
        return replace(self, **{name: field.to(device) for name, field in vars(self).items()
                                if torch.is_tensor(field)})

    def __getitem__(self, scenes):
        """The scenes of a slice, a list or an index tensor; one scene is `views[i:i + 1]`."""
        return replace(self, images=self.images[scenes], poses=self.poses[scenes],
                       depth=None if self.depth is None else self.depth[scenes])


def progress(items, total, what):
    """The same items; every five seconds stderr is told how far it is and how long it will take."""
    start = said = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) > said + 5:
            said, left = now, (now - start) * (total / count - 1)
            print(f"{what}: {count:,} of {total:,}, {left:.0f} s left", file=sys.stderr)


# ---- The ray tracer ----------------------------------------------------------------------------

SPHERE, BOX, CYLINDER, EMPTY = 0, 1, 2, -1  # the unit sphere; [-1, 1]^3; radius 1, z in [-1, 1]
AMBIENT, DIFFUSE, SHADOW, EXPONENT = 0.50, 0.50, 0.55, 30.0
FILL = 0.35     # more ambient light from one side than from the other: faces in the dark differ


@dataclass
class Scenes:
    """N scenes of at most P primitives each, on a ground plane under one directional light."""
    kind: torch.Tensor          # (N, P) int64: SPHERE, BOX, CYLINDER, or EMPTY (padding)
    to_world: torch.Tensor      # (N, P, 3, 4) affine transform of the unit primitive, invertible
    color: torch.Tensor         # (N, P, 3) in [0, 1]
    shine: torch.Tensor         # (N, P) strength of the white highlight, 0 = matte
    ground: float               # height of the ground plane
    background: tuple           # the lit ground's and the sky's colour, in [0, 1]
    light: tuple = (-1.0, -1.0, 2.8284)     # towards the light: a shadow is half a height long


def take(x, index):
    """Columns of x (..., M) by their numbers; on a CPU much faster than x[..., index]."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def linear(matrix, vectors):
    """The linear part of affine matrices (3, 4, ..., M) applied to vectors (3, ..., M)."""
    return matrix[:, 0] * vectors[0] + matrix[:, 1] * vectors[1] + matrix[:, 2] * vectors[2]


def inverse(matrix):
    """The inverse of affine matrices (3, 4, M): its rows are cross products of their columns."""
    a, b, c, shift = matrix.unbind(1)                                             # (3, M) each
    rows = [torch.linalg.cross(*pair, dim=0) for pair in ((b, c), (c, a), (a, b))]
    rows = torch.stack(rows) / (a * rows[0]).sum(0)                               # (3, 3, M)
    return torch.cat([rows, -linear(rows, shift)[:, None]], 1)


def intersect(kind, o, d):
    """Where rays o + t d (3, M) enter and leave a unit primitive: (M,), (M,); a miss unless near <
    far. It is flat along its last axes and round along its first `n`; all three are convex."""
    n = {BOX: 0, CYLINDER: 2, SPHERE: 3}[kind]
    d = torch.where(d.abs() < 1e-9, 1e-9, d)
    a, b = (-1 - o[n:]) / d[n:], (1 - o[n:]) / d[n:]
    near, far = torch.minimum(a, b), torch.maximum(a, b)                          # (3 - n, M)
    if n:
        dd = (d[:n] * d[:n]).sum(0)
        middle = -(o[:n] * d[:n]).sum(0) / dd
        q = o[:n] + middle * d[:n]                      # the ray's closest point to centre or axis
        half = ((1 - (q * q).sum(0)) / dd).sqrt()       # NaN for a miss: it compares as false
        near = torch.cat([near, (middle - half)[None]])
        far = torch.cat([far, (middle + half)[None]])
    return near.amax(0), far.amin(0)


def trace_chunk(scenes, scene, poses, focal, side, shaded):
    """Traces side x side rays an image, for images (B,) of the scenes numbered `scene` (B,) ->
    colours (3, B, side, side) in [-1, 1] where `shaded`, else the depth (B, side, side)."""
    image, slot = torch.where(scenes.kind[scene] != EMPTY)                        # (M,) primitives
    kind, to_world, tint, shine = (field[scene[image], slot] for field in (
        scenes.kind, scenes.to_world, scenes.color, scenes.shine))
    to_world = to_world.permute(1, 2, 0)                                          # (3, 4, M)
    to_object = inverse(to_world)
    signs = torch.cartesian_prod(*[poses.new_tensor([-1, 1])] * 3).T              # (3, 8)
    corners = linear(to_world[..., None, :], signs[..., None]) + to_world[:, 3:]  # (3, 8, M)

    def crossings(corners, start, direction):
        """Kind by kind, primitives and the world rays (in 0..B*R-1) that may cross them, and where.
        What passes well beside the image of a primitive's `corners` (3, 8 or 16, M) is left out."""
        relative = corners - poses[image, :3, 3].T[:, None]
        x, y, z = ((poses[image, :3, i].T[:, None] * relative).sum(0) for i in range(3))  # (8, M)
        pixels = ((torch.stack([x, y]) / z * focal + 0.5) * side).clamp(-1, side + 1)
        first, last = pixels.amin(1).floor() - 1, pixels.amax(1).ceil()           # (2, M)
        behind = (z < 1e-3).any(0)[:, None]         # partly behind the camera: every pixel
        at = torch.arange(side, device=poses.device)
        column, row = behind | (at >= first[..., None]) & (at <= last[..., None])         # (M, S)
        for k in (SPHERE, BOX, CYLINDER):
            chosen = (kind == k).nonzero()[:, 0]
            some, pixel = torch.where((row[chosen, :, None] & column[chosen, None]).flatten(1))
            one = take(chosen, some)
            ray = take(image, one) * side ** 2 + pixel
            matrix = take(to_object, one)
            yield one, ray, *intersect(k, linear(matrix, take(start, ray)) + matrix[:, 3],
                                       linear(matrix, take(direction, ray)))

    # The first hit: the ground, or a primitive that is nearer
    center, direction = (x.permute(2, 0, 1).flatten(1) for x in camera_rays(poses, focal, side))
    depth = (scenes.ground - center[2]) / direction[2]                            # (B*R,)
    depth, hits = torch.where(depth > 0, depth, math.inf), []
    for one, ray, near, far in crossings(corners, center, direction):
        hit = ((near < far) & (near > 0) & (near < take(depth, ray))).nonzero()[:, 0]
        hits.append((near[hit], one[hit], ray[hit]))
    near, one, ray = (torch.cat(column) for column in zip(*hits))
    depth = depth.scatter_reduce(0, ray, near, "amin")
    first = near == take(depth, ray)
    owner = torch.full_like(depth, -1, dtype=torch.long)            # which primitive a ray hits
    owner = owner.scatter_reduce(0, ray[first], one[first], "amax")         # settles ties
    if not shaded:
        return depth.view(-1, side, side)

    # Shadows: all that a primitive keeps the light from is between it and its shadow on the ground
    light = F.normalize(poses.new_tensor(scenes.light), dim=0)[:, None]           # (3, 1)
    drop = (corners[2] - scenes.ground) / light[2]                                # (8, M)
    swept = torch.cat([corners, corners - drop * light[..., None]], 1)            # (3, 16, M)
    point, lit = center + direction * depth, torch.ones_like(depth)               # (3, B*R)
    for one, ray, near, far in crossings(swept, point, light.expand_as(point)):
        dark = (near < far) & (far > 1e-3) & (take(owner, ray) != one)  # convex: none on itself
        lit[ray[dark]] = 0.0
    bright = torch.where((lit > 0) | depth.isinf(), 1.0, SHADOW)                  # so is the sky
    color = poses.new_tensor(scenes.background)[:, None] * bright

    # Phong shading of the H rays that hit a primitive, with the normal of the unit primitive first
    ray = (owner >= 0).nonzero()[:, 0]                                            # (H,)
    one, lit, direction = owner[ray], lit[ray], take(direction, ray)
    matrix, k = take(to_object, one), kind[one]
    p = linear(matrix, take(point, ray)) + matrix[:, 3]                           # (3, H)
    is_face = p.abs() == p.abs().amax(0)
    is_cap = p[2:].abs() > (p[:2] * p[:2]).sum(0).sqrt()
    on_cylinder = torch.cat([~is_cap, ~is_cap, is_cap])
    p = p * torch.where(k == BOX, is_face, torch.where(k == CYLINDER, on_cylinder, True))
    normal = (matrix[:, :3] * p[:, None]).sum(0)                        # by the inverse transpose
    normal = normal / (normal * normal).sum(0).sqrt()
    facing = (normal * light).sum(0)
    ambient = AMBIENT + FILL * (light[0] * normal[1] - light[1] * normal[0])
    mirrored = 2 * facing * normal - light
    glint = (-mirrored * direction).sum(0).clamp(min=0) ** EXPONENT * (facing > 0)
    diffuse = DIFFUSE * facing.clamp(min=0) * lit
    color[:, ray] = (tint[one].T * (ambient + diffuse) + shine[one] * glint * lit).clamp(0, 1)
    return color.view(3, -1, side, side) * 2 - 1


def trace(scenes, poses, focal, resolution, samples=2, depth=True):
    """Renders N scenes from poses (N, V, 4, 4): images (N, V, 3, S, S) in [-1, 1], of which a pixel
    is the mean of samples x samples rays, and their depth (N, V, S, S), along the ray through the
    pixel's centre to the first hit, inf in the sky; None without `depth`. Memory is bounded."""
    (n, v), poses = poses.shape[:2], poses.flatten(0, 1)
    scene = torch.arange(n, device=poses.device).repeat_interleave(v)
    at_once = 2 ** 16 if poses.device.type == "cpu" else 2 ** 22      # a CPU's cache, a GPU's width
    chunk = max(1, at_once // (resolution * samples) ** 2)
    images, depths, parts = [], [], math.ceil(n * v / chunk)
    for some, cameras in progress(zip(scene.split(chunk), poses.split(chunk)), parts, "tracing"):
        fine = trace_chunk(scenes, some, cameras, focal, resolution * samples, True)
        images.append(F.avg_pool2d(fine, samples).transpose(0, 1))
        if depth:
            depths.append(trace_chunk(scenes, some, cameras, focal, resolution, False))
    images = torch.cat(images).view(n, v, 3, resolution, resolution)
    return images, torch.cat(depths).view(n, v, resolution, resolution) if depth else None


# ---- Pictures from files -----------------------------------------------------------------------

@contextmanager
def named(item):
    """Errors about what is in a file, a picture or a scene get its name, in one sentence."""
    try:
        with np.errstate(all="ignore"):                     # what is not finite is refused in words
            yield
    except Exception as error:                              # PIL alone raises a dozen kinds
        if isinstance(error, (OSError, ValueError)) and str(item) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}, "
        raise ValueError(f"{item} is not as expected: {kind}{error}") from None


def open_picture(picture, turn=True):
    """A file's picture, or PIL's, in PIL's RGBA; ValueError or OSError if there is none. turn: as
    its EXIF says; pictures with poses are read as they are stored, as COLMAP does."""
    with named(picture):
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = ImageOps.exif_transpose(image) if turn else image
        if image.mode[0] in "IF":       # 16 bits, or floats from 0 to 1: PIL would cut them off
            values = np.asarray(image)
            if not np.isfinite(values).all():
                raise ValueError("it has values that are not finite")
            scale = 1 / 257 if image.mode[0] == "I" else 255 if values.max() <= 1 else 1
            opaque = np.where(values != image.info.get("transparency"), 255, 0)
            grey = np.rint(values * scale).clip(0, 255)
            image = Image.fromarray(np.uint8(np.dstack([grey, opaque])))
        return image.convert("RGBA")


def flatten(image, background):
    """An RGBA image in RGB, laid on `background` (in [-1, 1])."""
    color = tuple(round((b + 1) * 127.5) for b in background)
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")


def read_image(picture, resolution, background=(1.0, 1.0, 1.0), fit="crop", method=Image.LANCZOS):
    """A picture of any size, a file or PIL's -> (3, S, S) in [-1, 1]: cropped to its middle square,
    or padded to a square with fit="pad", resized with anti-aliasing, and its alpha composited on
    `background` (RGB in [-1, 1])."""
    fits = {"crop": ImageOps.fit, "pad": partial(ImageOps.pad, color=0)}            # 0: transparent
    image = fits[fit](open_picture(picture), (resolution, resolution), method)
    image = np.moveaxis(np.array(flatten(image, background)), 2, 0)
    return torch.from_numpy(image).float() / 127.5 - 1


def read_mask(path, resolution, size=None, fit="crop"):
    """A mask file -> (1, S, S) of 1 (known) and 0, fitted as `read_image` fits its picture. White
    and what is padded is known; of a mask with transparency what is opaque, unless that is all
    black. size: the picture's (width, height), S x S if None. ValueError where the mask has another
    size, or hides nothing, or all."""
    image, size = open_picture(path), size or (resolution, resolution)
    if image.size != size:
        raise ValueError(f"the mask {path} has {image.size} pixels, its picture {size}: not equal")
    known, alpha = np.moveaxis(np.array(image.convert("LA")), 2, 0)
    if alpha.min() < 255:
        known = alpha * known[alpha > 127].any()
    fitted = read_image(Image.fromarray(known), resolution, fit=fit, method=Image.BOX)[:1] > 0
    if fitted.all() or known.max() < 128 or not fitted.any():
        raise ValueError(f"the mask {path} hides {'nothing' if fitted.all() else 'all'}: white is "
                         "what is known, black or transparent what is to be filled")
    return fitted.float()


# ---- Data from files ---------------------------------------------------------------------------

def visible(path, *patterns):
    """Paths like a pattern in a folder, or a file that is; names that begin with a dot are none."""
    if path.is_file():
        return [path] if any(map(path.match, patterns)) else []
    return sorted(file for pattern in patterns for file in path.glob(pattern)
                  if not re.search(r"/(\.|__MACOSX)", f"/{file.relative_to(path).as_posix()}"))


def find(path, loader, split):
    """The paths, up to three folders down, by which a loader knows its scenes, of a split as `load`
    has it; and what is still to be held back: "train", "test", None, or "named" where names told:
    some are test or val, and others are not."""
    path, marks, parts = Path(path), FORMATS[loader][1:], {}
    part_of = re.compile(r"(.*?[_/])?(train|val|test)(_scenes)?(\.(json|lst|npz))?(/.*)?").fullmatch
    files = visible(path, *marks) or visible(
        path, *("*/" * down + mark for down in (1, 2, 3) for mark in marks))
    for file in files:
        # a scene's own folder may have any name; of CLEVR-567 a folder has many scenes
        folders = file.relative_to(path).parts[:-1 if loader == load_clevr567 else -2]
        name = part_of("/".join((file.name, *folders)))
        scene = file.with_stem(file.stem.removesuffix("_train"))    # a transforms_train.json goes
        parts.setdefault(name[2] if name else "train", {})[scene] = file    # before NeRF's of all
    if len(parts) < 2:
        whole = [file for part in parts.values() for file in part.values()]
        return whole, None if part_of(path.name) else split
    first, told = ("test", "named") if split == "test" else ("train", None)
    return list((parts.get(first) or parts["val"]).values()), told


def hold_back(path, items, split, what="scenes"):
    """The items of a split of a set without splits, as `load` has it. And: are these held out?"""
    n = len(items)
    if not n:
        raise FileNotFoundError(f"there are no {what} in {path}")
    if split not in ("train", "test") or n < (2 if what == "scenes" else 6):
        return items, split == "named"
    held = range(n - max(1, n // 10), n) if what == "scenes" else range(0, n, 8)
    print(f"{path} has no test split: {len(held)} of {n} {what} are held out", file=sys.stderr)
    return [x for i, x in enumerate(items) if (i in held) == (split == "test")], split == "test"


def parallel(job, items, what):
    """[job(item) for item in items], by threads."""
    def one(item):
        with named(getattr(item, "picture", item)):
            return job(item)
    with ThreadPoolExecutor() as pool:
        return list(progress(pool.map(one, items), len(items), what))


class Shot(NamedTuple):
    """A picture and the camera that took it."""
    picture: Path           # its file, or the name of `image`
    pose: object            # camera-to-world in OpenCV axes: an array, or the text file of one
    focal: np.ndarray       # (2,) in widths and in heights of the picture
    middle: np.ndarray = np.full(2, 0.5)    # (2,) the principal point, likewise
    mask: Path | None = None                # a file that takes the place of the picture's alpha
    image: np.ndarray | None = None         # the picture itself, where it has no file

    @property
    def half(self):
        """Half the side of the largest square around the principal point, at depth 1."""
        return np.min([self.middle, 1 - self.middle] / self.focal)


def cube_scale(shots):
    """World units a cube unit, for a cube at the origin that is as wide as the pictures."""
    return float(np.nanmedian([math.hypot(*s.pose[:3, 3]) * s.half for s in shots] or 0)) or 1.0


def read_shot(shot, half, scale, resolution, background):
    """A shot as models take it: its pose (4, 4) in cube units, and the square of its picture around
    the principal point, uint8 (3, S, S), whose half side at depth 1 is `half`; pixels that are not
    square become so. ValueError where a model can't be trained with it."""
    pose = shot.pose.read_text("utf-8-sig").split() if isinstance(shot.pose, Path) else shot.pose
    pose = np.array(pose, float).ravel()[:12].reshape(3, 4)
    R, center = pose[:, :3], pose[:, 3] / scale
    error, distance = abs(R.T @ R - np.eye(3)).max(), np.linalg.norm(center)
    if not (error < 1e-3 and np.linalg.det(R) > 0):
        raise ValueError(f"the pose is not a rotation and a position (by {error:.2g})")
    if not 1e-3 <= distance <= 1e3:
        raise ValueError(f"the camera is {distance:.4g} cube units from the origin, and not 0.001 "
                         "to 1000: other units?")
    in_file = shot.image is None
    image = open_picture(shot.picture if in_file else Image.fromarray(shot.image), turn=False)
    if shot.mask:
        image.putalpha(open_picture(shot.mask, turn=False).convert("L"))
    reach = half * shot.focal
    box = np.clip([shot.middle - reach, shot.middle + reach], 0, 1) * image.size
    image = flatten(image, background).resize(
        (resolution, resolution), Image.LANCZOS if in_file else Image.BOX, tuple(box.flat))
    return np.vstack([np.c_[R, center], [0, 0, 0, 1]]), np.moveaxis(np.array(image), 2, 0)


def read_views(path, all_scenes, split, shots_of, scale, background=(1.0, 1.0, 1.0), scenes=None,
               views=None, resolution=64, seed=0, device="cpu"):
    """`Views` of the first of `all_scenes`; shots_of(scene) lists the `Shot`s of one. split: what
    is held back, as `find` has it. scale: world units a cube unit. Some views of many are evenly
    spread, from a start that differs by scene: NMR's scenes share their cameras, and one view of
    each would show one side of all. The crop is the largest that all pictures have room for: a set
    has one focal. A line on stderr where z is not up, or cameras look away."""
    chosen, held_out = hold_back(path, all_scenes, split)
    shots = parallel(shots_of, chosen[:scenes], "scenes")
    if len(all_scenes) == 1:
        shots[0], held_out = hold_back(path, shots[0], split, "pictures")
    counts = [len(some) for some in shots]
    V = min(min(counts), views or math.inf)
    if not V:
        raise FileNotFoundError(f"there are no pictures in {chosen[counts.index(0)]}")
    if len(shots) < (scenes or 0) or V < (views or max(counts)):
        print(f"{path}: {len(shots)} scenes of {V} views are all there are", file=sys.stderr)
    shots = [some[(mix(mix(seed) ^ i) * (V < count) + k * count // V) % count]
             for i, (some, count) in enumerate(zip(shots, counts)) for k in range(V)]
    half = float(np.min([shot.half for shot in shots], initial=1e9))    # NaN where any is
    if not 5e-4 <= half <= 5e2:
        focal = 0.5 / (half or 1e-9)
        raise ValueError(f"{path} has a focal length of {focal:.4g} widths, not 0.001 to 1000")
    poses, images = zip(*parallel(lambda shot: read_shot(
        shot, half, scale, resolution, background), shots, "pictures"))
    images = torch.from_numpy(np.stack(images)).float().div_(127.5).sub_(1)     # in place: many
    poses = torch.from_numpy(np.stack(poses)).float()
    x, y, z = (-poses[:, :3, 3:] * poses[:, :3, :3]).sum(1).T       # the origin, from the cameras
    for right, what in (
            (torch.maximum(x.abs(), y.abs()) < half * z, "the origin is in view"),
            ((poses[:, 2, 0].abs() < 0.35) & (poses[:, 2, 1] < 0.35), "z is up"),
            ((0.3 < half * z) & (half * z < 3), "the cube fills the view")):
        if right.sum() < len(right) / 2:
            print(f"{path}: in {right.sum()} of {len(right)} pictures {what}: other axes "
                  "or units?", file=sys.stderr)
    return Views(images.unflatten(0, (-1, V)), poses.unflatten(0, (-1, V)), 0.5 / half,
                 torch.tensor(background), Path(path).name, scale, None, held_out).to(device)


# ---- The formats; `split` and `how` are as `load` has them -------------------------------------

SHAPENET_SCALE = 0.5        # how far objects reach from the origin, in the units of the files
CLEVR_SCALE = 4.2           # for CLEVR, its objects and the shadows that our tracer gives them
CLEVR_SHAPES = {"sphere": SPHERE, "cube": BOX, "cylinder": CYLINDER}
CLEVR_NAMES = ["gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"]
FLIP = np.array([1, -1, -1, 1])         # OpenGL's axes of a camera to OpenCV's


def load_srn(path, split=None, **how):
    """`Views` of ShapeNet-SRN's cars or chairs [Sitzmann et al. 2019], on white. path: a folder of
    `<id>/{intrinsics.txt, rgb/*.png, pose/*.txt}`, or of folders `*_{train,val,test}` of such."""
    def shots_of(rgb):
        numbers = (rgb.parent / "intrinsics.txt").read_text("utf-8-sig").split()[:10]
        f, cx, cy, _, _, _, _, _, h, w = map(float, numbers)
        if cx >= w:                     # an older archive states f, cx and cy for 512 pixels
            w, h = 2 * cx, 2 * cy
        size = np.array([w, h])
        return [Shot(picture, rgb.parent / f"pose/{picture.stem}.txt", f / size, (cx, cy) / size)
                for picture in visible(rgb, "*.png")]
    return read_views(path, *find(path, load_srn, split), shots_of, SHAPENET_SCALE, **how)


def load_nmr(path, split=None, **how):
    """`Views` of ShapeNet in NMR's renderings [Kato et al. 2018; Niemeyer et al. 2020], on white.
    path: a class's folder, of `softras_{train,val,test}.lst` and `<id>/{image/*.png, mask/*.png,
    cameras.npz}`, or the folder of all classes. Scenes that a list names may be missing."""
    def shots_of(scene):
        shots, y_to_z_up = [], np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
        with np.load(scene / "cameras.npz", allow_pickle=False) as file:
            for i, picture in enumerate(visible(scene, "image/*.png")):
                pose = np.linalg.inv([*file[f"world_mat_{i}"][:3], [0, 0, 0, 1]])
                K = file[f"camera_mat_{i}"][:2] / 2                     # for pixels from -1 to 1
                shots.append(Shot(picture, y_to_z_up @ pose[:3], K.diagonal(), K[:, 2] + 0.5,
                                  *visible(scene, f"mask/{picture.name}")))     # one, or none
        return shots
    files, split = find(path, load_nmr, split)
    listed = [file.parent / name for file in files if file.suffix == ".lst"
              for name in file.read_text("utf-8-sig").split()]
    folders = [scene for scene in listed or [file.parent for file in files] if scene.is_dir()]
    return read_views(path, folders, split, shots_of, SHAPENET_SCALE, **how)


def load_clevr567(path, split=None, **how):
    """`Views` of CLEVR-567 [Yu et al. 2022], a flat folder of `*sc%04d*.png` and `*_RT.txt`. Its
    square pictures are squeezed from 4:3; the middle square of what they were is read."""
    files, split = find(path, load_clevr567, split)
    shots, focal = {}, np.array([350 / 320, 350 / 240])
    for pose in files:                                          # other pictures are masks
        picture = pose.with_name(pose.name.replace("_RT.txt", ".png"))
        scene = pose.parent / re.sub(r".*(sc\d+).*", r"\1", pose.name)
        shots.setdefault(scene, []).append(Shot(picture, pose, focal))
    return read_views(path, list(shots.values()), split, list, CLEVR_SCALE, **how)


def load_folder(path, split=None, scale=None, **how):
    """`Views` of your own pictures, by NeRF's `transforms.json` or `transforms_{train,test}.json`.
    path: that file, its folder, or a folder of such folders, each a scene. Keys: `frames`, of
    `file_path` and `transform_matrix` (camera-to-world, OpenGL axes), and `camera_angle_x`
    (radians) or `fl_x` (pixels), maybe `camera_angle_y`, `fl_y`, `cx`, `cy`, `w`, `h`, `mask_path`,
    for all or by frame; null is not given. scale: world units a cube unit; None makes the cube as
    wide as the pictures of the first training scene, at the origin. how: `background`, too, in
    [-1, 1], on which alpha is laid."""
    def locate(file, name):
        """The file of this name, which may lack its extension or have Windows' backslashes."""
        name = file.parent / name.replace("\\", "/")
        kinds = Image.registered_extensions()
        names = (Path(f"{name}{kind}") for kind in ("", *kinds, *map(str.upper, kinds)))
        return next(filter(Path.is_file, names), name)

    def lens_of(frame, picture):
        model = "FISHEYE" if frame.get("is_fisheye") else frame.get("camera_model", "PINHOLE")
        if not re.fullmatch("(.*_)?(pinhole|perspective|opencv|radial)", model, re.I):
            raise ValueError(f"its camera is {model}, and no pinhole: undistort the pictures")
        stored = Image.open(picture).size
        size = (frame["w"], frame["h"]) if {"w", "h"} <= {*frame} else stored
        if abs(size[0] * stored[1] / (size[1] * stored[0]) - 1) > 0.02:
            raise ValueError(f"{picture} has {stored} pixels, and its camera {size}: another shape")
        angles, focal, middle = np.array([[frame.get(key + axis, math.nan) for axis in "xy"]
                                          for key in ("camera_angle_", "fl_", "c")])
        focal = np.where(np.isnan(focal), size / np.tan(angles / 2) / 2, focal)
        if np.isnan(focal).all() or (angles >= math.pi).any():
            raise ValueError("it has neither fl_x nor a camera_angle_x in radians, below pi")
        focal = np.where(np.isnan(focal), focal[::-1], focal)               # one stands for both
        return focal / size, np.where(np.isnan(middle), 0.5, middle / size)

    @cache
    def shots_of(file):
        capture = json.loads(file.read_text("utf-8-sig"))
        frames = [{key: value for key, value in (*capture.items(), *frame.items())
                   if value is not None} for frame in capture["frames"]]
        pictures = [locate(file, frame["file_path"]) for frame in frames]
        if missing := sum(not picture.is_file() for picture in pictures):
            print(f"{file}: {missing} of {len(frames)} pictures are missing", file=sys.stderr)
        if any(frame.get(key) for frame in frames for key in ("k1", "k2", "k3", "k4", "p1", "p2")):
            print(f"{file}: lens distortion is not corrected", file=sys.stderr)
        return [Shot(picture, np.array(frame["transform_matrix"], float) * FLIP,
                     *lens_of(frame, picture),
                     locate(file, frame["mask_path"]) if "mask_path" in frame else None)
                for frame, picture in zip(frames, pictures) if picture.is_file()]
    if scale is None:
        first = parallel(shots_of, find(path, load_folder, None)[0][:1], "scenes")
        scale = cube_scale(sum(first, []))
    return read_views(path, *find(path, load_folder, split), shots_of, scale, **how)


def load_npz(path, split=None, **how):
    """`Views` of an .npz file, or of a folder of `train.npz` and `test.npz`. Keys: `images`
    (N, V, S, S, 3) uint8, `poses` (N, V, 4, 4) in cube units, `focal` in image widths, `background`
    (3,) uint8. Or as NeRF tutorials' `tiny_nerf_data.npz`, one scene on black: images (V, H, W, 3)
    from 0 to 1, poses in OpenGL's axes, focal in pixels; the cube is as wide as its pictures.
    Pictures are made smaller by area; ValueError for a larger resolution."""
    files, split = find(path, load_npz, split)
    if len(files) != 1:
        raise ValueError(f"{path} has {len(files)} .npz files, and not one: name it")
    with named(files[0]), np.load(files[0], allow_pickle=False) as arrays:
        images, poses, focal = arrays["images"], arrays["poses"], float(arrays["focal"])
        if tiny := images.ndim == 4 and images.min() >= 0 and images.max() <= 1:
            images, poses = np.uint8(np.rint(images * 255))[None], poses[None] * FLIP
        color = np.zeros(3, np.uint8) if tiny else arrays["background"]
        shapes = (3,), (3,), (*images.shape[:2], 4, 4)
        if not (images.dtype == color.dtype == np.uint8
                and (images.shape[4:], color.shape, poses.shape) == shapes):
            raise ValueError("images have to be uint8 (N, V, S, S, 3), or one scene's in [0, 1]; "
                             "poses (N, V, 4, 4), background uint8 (3,)")
        N, V, H, W, _ = images.shape
        if how.get("resolution", 64) > min(H, W):
            raise ValueError(f"its pictures are only {W} x {H}: ask for a lower resolution")
        focal = np.array([1, W / H]) * (focal / W if tiny else focal)
        shots = [[Shot(f"{files[0]}: images[{i}, {v}]", poses[i, v], focal, image=images[i, v])
                  for v in range(V)] for i in range(N)]
    scale = cube_scale(shots[0]) if tiny else 1.0
    return read_views(path, shots, split, list, scale, (color / 127.5 - 1).tolist(), **how)


def clevr_primitive(o):
    """One of CLEVR's objects for our tracer: its kind, to_world (3, 4), color (3,) and shine."""
    x, y, z = (c / CLEVR_SCALE for c in o["3d_coords"])         # z is half the height: all stand
    c, s = z * math.cos(o["rotation"]), z * math.sin(o["rotation"])
    if not (z > 0 and all(abs(value) < 100 for value in (x, y, z, c))):
        raise ValueError("an object is below the ground, or far away")
    return (CLEVR_SHAPES[o["shape"]], [[c, -s, 0, x], [s, c, 0, y], [0, 0, z, z]],
            CLEVR_COLORS[CLEVR_NAMES.index(o["color"])], 0.35 * (o["material"] == "metal"))


def load_clevr(path, split=None, scenes=None, views=None, resolution=64, seed=0, device="cpu"):
    """`Views` of CLEVR's layouts [Johnson et al. 2017] by our tracer, from the cameras of `clevr`.
    path: the folder of `scenes/CLEVR_{train,val}_scenes.json`, such a file, or the generator's own
    `CLEVR_scenes.json`. `subsets/clevr_cameras.py` makes an .npz of the pictures."""
    files, split = find(path, load_clevr, split)
    if (Path(path) / "images").is_dir():
        print(f"{path}: pictures are not read, layouts are drawn", file=sys.stderr)
    layouts = []
    for file in files:
        with named(file):
            layouts += [scene["objects"] for scene in
                        json.loads(file.read_text("utf-8-sig"))["scenes"] if scene["objects"]]
    chosen, held_out = hold_back(path, layouts, split)
    with named(files[0]):
        rows = [list(zip(*map(clevr_primitive, objects))) for objects in chosen[:scenes]]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=EMPTY)
    columns = [pad(list(map(torch.tensor, column))) for column in zip(*rows)]
    drawn = synthetic(
        "clevr", len(columns[0]), views or 1, resolution, seed, device, held_out=held_out,
        make=lambda *_, device: Scenes(*(column.to(device) for column in columns), 0.0,
                                       SETS["clevr"].background))
    return replace(drawn, name=files[0].stem, scale=CLEVR_SCALE)


# ---- Data by its name --------------------------------------------------------------------------

FORMATS = {     # what it is called, and files or folders by which it is known
    load_folder: ("NeRF's transforms.json", "transforms.json", "transforms_train.json",
                  "transforms_val.json", "transforms_test.json"),
    load_clevr: ("CLEVR's layouts", "*_scenes.json"),
    load_nmr: ("NMR's ShapeNet", "softras_*.lst", "cameras.npz"),
    load_srn: ("ShapeNet-SRN", "rgb"),
    load_clevr567: ("CLEVR-567", "*_RT.txt"),
    load_npz: ("pictures in .npz", "*.npz"),
}


def load(spec, scenes=None, views=None, resolution=64, split=None, seed=0, device="cpu"):
    """`Views` of a built-in set (1,000 scenes of one view unless told), of a set in subsets/, each
    by its name, or of a path, whose format it recognises and prints; None = all scenes, all views.
    split: None for all there is, of a set with splits its training part; "train" or "test" (or
    else `val`). A path that is a split itself is whole. Built-in sets have other scenes for "test".
    Of a set without splits the last tenth of the scenes is "test", at least one, or of a single
    scene every eighth view where it has six or more; stderr says so."""
    if split not in (None, "train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    if any(count is not None and count < 1 for count in (scenes, views, resolution)):
        raise ValueError("scenes, views and resolution have to be at least 1")
    if spec in SETS:
        return synthetic(spec, scenes or 1000, views or 1, resolution, seed, device,
                         held_out=split == "test")
    subsets = Path(__file__).resolve().parent / "subsets"
    names = [file.parent.name for file in subsets.glob("*/train.npz")]
    path = subsets / spec if spec in names else Path(spec)
    for depth in range(4):                                  # what is quick to find comes first
        for loader, (name, *marks) in FORMATS.items():
            if visible(path, *("*/" * depth + mark for mark in marks)):
                print(f"{path}: taken for {name}", file=sys.stderr)
                return loader(path, split, scenes=scenes, views=views, resolution=resolution,
                              seed=seed, device=device)
    marks = ", ".join(mark for _, mark, *_ in FORMATS.values())
    raise ValueError(f"{spec} is neither a built-in set ({', '.join(SETS)}) nor one in subsets/ "
                     f"({', '.join(names)}) nor a path that has {marks}")


def test_views(config, scenes, views, device):
    """`Views` of `config.data` that training leaves out, or None where no scene has two of them."""
    held_out = load(config.data, scenes, max(2, views), config.resolution, "test", device=device)
    return held_out if held_out.held_out and held_out.images.shape[1] > 1 else None


AHEAD = {"cuda": 64}                # steps' scenes traced at once: tracing waits for the GPU


def training_pictures(config, device, rank=0, world=1):
    """What one of `world` processes trains on: draw(step) -> images (B, 3, S, S), poses (B, 4, 4);
    and the set's cameras, a dict of focal, background, radius and elevation (low, high). With
    `config.scenes` = 0 a built-in set has new scenes for ever, but the same by the same seed. The
    pictures of a fixed set are on `device`, and come in random order by torch's generator."""
    B, S, built_in = config.batch, config.resolution, SETS.get(config.data)
    fresh, ahead = built_in and config.scenes == 0, AHEAD.get(torch.device(device).type, 1)
    views = load(config.data, 1 if fresh else config.scenes or None, config.views, S, "train",
                 config.seed, device if built_in else "cpu")
    images, poses = views.images.flatten(0, 1), views.poses.flatten(0, 1).to(device)
    if len(images) == 1 and not fresh:
        print(f"{config.data}: trains on one picture; --views reads more", file=sys.stderr)
    if views.depth is None:         # from files, of 8 bits: kept as such they take a quarter
        images = torch.cat([((some + 1) * 127.5).round().byte() for some in images.split(1024)])
    images = images.to(device)

    @lru_cache(maxsize=1)
    def trace_ahead(i):             # the scenes of `ahead` steps, from step i * ahead on
        return synthetic(config.data, ahead * B, 1, S, config.seed, device,
                         start=(i * world + rank) * ahead * B, depth=False)

    def draw(step):
        if fresh:
            new, i = trace_ahead(step // ahead), step % ahead * B
            return new.images[i:i + B, 0], new.poses[i:i + B, 0]
        chosen = torch.randint(len(images), (B,)).to(device)
        some = images[chosen]
        return some.float() / 127.5 - 1 if views.depth is None else some, poses[chosen]

    radius = poses[:, :3, 3].norm(dim=-1)
    angles = torch.rad2deg(torch.asin((poses[:, 2, 3] / radius).clamp(-1, 1)))
    elevation = built_in.elevation if built_in else (angles.min().item(), angles.max().item())
    return draw, dict(focal=views.focal, background=tuple(views.background.tolist()),
                      radius=radius.mean().item(), elevation=elevation)


# ---- The built-in sets -------------------------------------------------------------------------

def mix(x):
    """A 32-bit integer hash of a number or an int64 tensor; its products stay below 2^63."""
    low = 0xFFFFFFFF
    x = ((x & low) + 0x9E3779B9) & low
    for _ in range(3):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & low
    return (x >> 16) ^ x


class Sketch:
    """N scenes in the making: random numbers, and the primitives that are added to all or some. A
    number is a hash of (seed, stream, scene, which number): scene i of a seed is the same whatever
    the batch, the order or the device."""

    def __init__(self, seed, scene, stream=0):
        self.key, self.count, self.parts = mix(mix(mix(seed) ^ stream) ^ mix(scene)), 0, []

    def draw(self, low=0.0, high=1.0):
        """(N,) floats in [low, high)."""
        self.count += 1
        bits = mix(self.key ^ mix(self.count)) >> 8                     # 24 bits: exact in float32
        return low + (high - low) * (bits.float() / 2 ** 24)

    def row(self, table):
        """(N, ...) rows of a table."""
        return torch.tensor(table, device=self.key.device)[(self.draw() * len(table)).long()]

    def either(self, chance, a, b):
        """(N, D) rows of a, with this chance, or else of b."""
        return torch.where(self.draw()[:, None] < chance, a, b)

    def columns(self, *values):
        """Numbers and (N,) tensors as one (N, len(values))."""
        return torch.stack([self.key * 0.0 + v for v in values], -1)

    def add(self, kind, center, half, color, present=True, shine=0.0,
            x=(1, 0, 0), y=(0, 1, 0), z=(0, 0, 1)):
        """A unit primitive, stretched by `half` along the axes x, y and z, put at `center`. Slanted
        axes shear it. All are numbers or (N,) tensors in tuples; color may be (N, 3)."""
        axes = torch.stack([self.columns(*a) for a in (x, y, z)], -1) * self.columns(*half)[:, None]
        to_world = torch.cat([axes, self.columns(*center)[..., None]], -1)              # (N, 3, 4)
        self.parts.append((torch.where((self.key >= 0) & present, kind, EMPTY), to_world,
                           color if torch.is_tensor(color) else self.columns(*color),
                           self.columns(shine)[:, 0]))

    def wing(self, root, tip, chords, thick, color, present=True, shine=0.0):
        """A slab that tapers from one chord (along x) around `root` to a smaller around `tip`, in
        three sheared boxes: no gaps up to a ratio of three. `thick` (3,) is half its thickness."""
        for shift in (-0.5, 0, 0.5):
            ends = [(end[0] + shift * (chord - chords[1]), *end[1:])
                    for end, chord in zip((root, tip), chords)]
            self.add(BOX, [(a + b) / 2 for a, b in zip(*ends)], (1, 1, 1), color, present, shine,
                     (chords[1] / 2, 0, 0), thick, [(b - a) / 2 for a, b in zip(*ends)])


CLEVR_COLORS = [[c / 255 for c in color] for color in (
    (87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20),          # grey, red, blue, green
    (129, 74, 25), (129, 38, 192), (41, 208, 208), (255, 238, 51))]     # brown purple cyan yellow


def clevr_object(s, x, y, r, ground, present=True, kinds=(SPHERE, BOX, CYLINDER)):
    """One of CLEVR's objects of size r (N,): any shape, colour, material and turn about z."""
    kind, color, metal = s.row(kinds), s.row(CLEVR_COLORS), s.row(range(2))
    turn, half = s.draw(-math.pi, math.pi), torch.where(kind == BOX, r / math.sqrt(2), r)
    s.add(kind, (x, y, ground + half), (half, half, half), color, present, 0.35 * metal,
          x=(turn.cos(), turn.sin(), 0), y=(-turn.sin(), turn.cos(), 0))


def build_clevr1(s, ground, **kinds):
    """One object in the middle."""
    clevr_object(s, 0, 0, torch.where(s.draw() < 0.5, 0.35, 0.44), ground, **kinds)


def build_clevr(s, ground):
    """One to four objects, each at the first of 24 random places that is clear of the others."""
    number, placed = s.row((1, 2, 3, 4)), []
    for i in range(4):
        r = torch.where(s.draw() < 0.5, 0.17, 0.28)
        places = torch.stack([s.columns(s.draw(-0.6, 0.5), s.draw(-0.6, 0.5)) for _ in range(24)])
        clear = (i < number).expand(24, -1)                                       # (24, N)
        for place, radius, there in placed:
            clear = clear & ~(there & ((places - place).norm(dim=-1) < r + radius + 0.04))
        place = places[clear.int().argmax(0), torch.arange(len(r), device=r.device)]      # (N, 2)
        placed.append((place, r, clear.any(0)))
        clevr_object(s, *place.unbind(1), r, ground, clear.any(0))


ALONG_X = dict(x=(0, 1, 0), y=(0, 0, 1), z=(1, 0, 0))           # where a cylinder's axis points
ALONG_Y = dict(x=(1, 0, 0), y=(0, 0, 1), z=(0, 1, 0))
WHITE, GREY, GLASS, BLACK, STEEL = [(c, c, c) for c in (0.92, 0.60, 0.07, 0.05, 0.70)]
PAINT = [WHITE, WHITE, GREY, (0.25, 0.25, 0.27), (0.75, 0.05, 0.05), (0.75, 0.05, 0.05),
         (0.05, 0.08, 0.75), (0.10, 0.55, 0.90), (0.95, 0.80, 0.05), (0.05, 0.45, 0.12),
         (0.95, 0.40, 0.05), (0.10, 0.60, 0.60)]
CARS = [    # half length, half width, wheel, belt line, roof, cabin's ends at foot and roof, extra
    (0.78, 0.33, 0.135, 0.34, 0.55, -0.62, 0.36, -0.40, 0.06, 0),       # saloon
    (0.68, 0.32, 0.135, 0.36, 0.59, -0.66, 0.36, -0.52, 0.06, 0),       # hatchback
    (0.74, 0.35, 0.165, 0.42, 0.69, -0.72, 0.36, -0.64, 0.12, 0),       # off-roader
    (0.76, 0.34, 0.135, 0.44, 0.78, -0.75, 0.56, -0.73, 0.36, 0),       # van
    (0.78, 0.35, 0.165, 0.41, 0.67, -0.16, 0.42, -0.11, 0.16, 1),       # pick-up, has a bed
    (0.78, 0.36, 0.145, 0.31, 0.47, -0.56, 0.34, -0.28, 0.04, 2)]       # sports car, a spoiler


def build_cars(s, ground):
    """A car of one of six types: body, cabin, windows, wheels, lights, in one or two colours."""
    add, draw, paint, other = s.add, s.draw, s.row(PAINT), s.row(PAINT)
    L, W, wheel, belt, roof, foot0, foot1, top0, top1, extra = s.row(CARS).unbind(1)
    L, W, top1 = L * draw(0.95, 1.0), W * draw(0.94, 1.06), top1 + draw(-0.03, 0.05)
    low, belt, roof = ground + 0.09, ground + belt, ground + roof * draw(0.96, 1.05)
    foot, top, middle = (foot0 + foot1) / 2, (top0 + top1) / 2, (belt + roof) / 2
    h, nose = (roof - belt) / 2, draw(0.02, 0.10)
    cabin, skirt = s.either(0.25, other, paint), s.either(0.5, s.row([BLACK]), paint)

    s.wing((0, 0, low), (-nose / 2, 0, belt), (2 * L, 2 * L - nose), (0, W, 0), paint, True, 0.3)
    add(BOX, (0, 0, low + 0.03), (L + 0.02, W + 0.01, 0.03), skirt)
    chords = foot1 - foot0, top1 - top0
    s.wing((foot, 0, belt), (top, 0, roof), chords, (0, 0.88 * W, 0), cabin, True, 0.3)
    chords = foot1 - foot0 - 0.16, top1 - top0 - 0.06                           # the side windows
    s.wing((foot, 0, belt + 0.2 * h), (top, 0, roof - 0.36 * h), chords, (0, 0.9 * W, 0), GLASS,
           True, 0.3)
    add(BOX, (top, 0, middle), (0.02, 0.905 * W, h), cabin)                     # between the doors
    for x, slant in ((foot0 + top0 - 0.02, top0 - foot0), (foot1 + top1 + 0.02, top1 - foot1)):
        add(BOX, (x / 2, 0, middle), (0.02, 0.76 * W, 0.8 * h), GLASS, True, 0.3,
            z=(slant / h / 2, 0, 1))                                # rear window and windscreen
    for y in (-1, 1):
        add(BOX, (L - nose - 0.02, y * (W - 0.08), belt - 0.08), (0.05, 0.06, 0.03), WHITE)
        add(BOX, (0.01 - L, y * (W - 0.07), belt - 0.08), (0.03, 0.06, 0.035), (0.75, 0.02, 0.02))
        for x in (-0.62 * L, 0.62 * L):
            at = (x, y * (W - 0.04), ground + wheel)
            add(CYLINDER, at, (wheel, wheel, 0.065), BLACK, **ALONG_Y)
            add(CYLINDER, at, (0.55 * wheel, 0.55 * wheel, 0.07), STEEL, **ALONG_Y)
    bed, spoiler = extra == 1, extra == 2
    add(BOX, ((foot0 - L) / 2, 0, belt), ((foot0 + L) / 2 - 0.05, W - 0.05, 0.004), GLASS, bed)
    add(BOX, (0.1 - L, 0, belt + 0.09), (0.06, W - 0.02, 0.015), other, spoiler)
    add(BOX, (0.1 - L, 0, belt + 0.04), (0.03, 0.5 * W, 0.05), BLACK, spoiler)
    add(BOX, (-0.05, 0, (low + belt) / 2 + 0.02), (0.3, W + 0.006, (belt - low) / 2 - 0.03), other,
        draw() < 0.2)                                               # doors in the second colour


CLOTH = [WHITE, WHITE, WHITE, GREY, (0.85, 0.74, 0.55), (0.55, 0.33, 0.16), (0.14, 0.14, 0.15),
         (0.80, 0.04, 0.05), (0.10, 0.25, 0.70), (0.10, 0.50, 0.40), (0.93, 0.75, 0.20)]


def build_chairs(s, ground):
    """A chair on legs, a foot or a block, with one of four backs, some with arms or a cushion."""
    add, draw, base, back = s.add, s.draw, s.row([0, 0, 0, 1, 2, 3]), s.row(range(4))
    frame, (legs, star, disc, block) = s.row(CLOTH), (base == i for i in range(4))
    d, w, up, high = draw(0.32, 0.42), draw(0.32, 0.44), draw(0.55, 0.72), draw(0.50, 0.75)
    cloth, tube = (s.either(0.6, frame, s.row(table)) for table in (CLOTH, [STEEL]))
    thin, splay, thick = draw(0.025, 0.05), draw(-0.02, 0.14), torch.where(block, 0.12, 0.045)
    is_round, leg = (draw() < 0.2) & ~block, torch.where(thin < 0.0375, CYLINDER, BOX)
    seat, middle, cushion = ground + up, ground + up / 2, (draw() < 0.4) & ~is_round | block

    add(torch.where(is_round, CYLINDER, BOX), (0, 0, seat), (d, w, 0.045), frame)
    add(BOX, (0.02, 0, seat + 0.06), (0.86 * d, 0.86 * w, 0.035), cloth, cushion)
    add(BOX, (0, 0, middle + 0.03), (d, w, up / 2 - 0.03), frame, block)
    for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        add(leg, (x * (d - 0.06), y * (w - 0.06), middle), (thin, thin, up / 2), tube, legs,
            z=(-x * splay, -y * splay, 1))
    add(CYLINDER, (0, 0, middle), (0.05, 0.05, up / 2), tube, star | disc, 0.3)
    add(CYLINDER, (0, 0, ground + 0.02), (0.3, 0.3, 0.02), tube, disc, 0.3)
    for c, s in ((1, 0), (0.5, 0.866), (-0.5, 0.866)):
        add(BOX, (0, 0, ground + 0.05), (0.36, 0.035, 0.03), tube, star, 0.3, (c, s, 0), (-s, c, 0))

    # Backs: a panel, an oval one, upright slats, cross slats; the last two between posts and a rail
    lean, upright, slats = draw(0, 0.25), back == 2, (back >= 2) & ~block
    slat = torch.where(upright, high / 2, 0.04), torch.where(upright, 0.04, w - 0.04)   # tall, wide

    def rest(kind, y, h, half, color, present):
        """A part of the leaning back, at a height above the seat."""
        add(kind, (thick - d - lean * h, y, seat + h), half, color, present, z=(-lean, 0, 1))
    oval = torch.where((back == 1) & ~block, SPHERE, BOX)
    rest(oval, 0, high / 2, (thick, w, high / 2), cloth, ~slats)
    rest(BOX, 0, high - 0.05, (0.04, w, 0.06), frame, slats)
    for k in (-1, 0, 1):
        h = torch.where(upright, high / 2, (0.45 + 0.25 * k) * high)
        rest(BOX, 0.45 * k * w * upright, h, (0.02, slat[1], slat[0]), frame, slats)
    arms, arm = block | (draw() < 0.35), draw(0.22, 0.32)
    arm_half = torch.where(block, 0.09, 0.045), torch.where(block, arm / 2, 0.025)      # wide, tall
    for y in (-1, 1):
        rest(BOX, y * (w - 0.04), high / 2, (0.035, 0.04, high / 2), frame, slats)
        add(BOX, (0, y * w, seat + torch.where(block, arm / 2, arm)), (d, *arm_half), frame, arms)
        add(BOX, (d - 0.08, y * w, seat + arm / 2), (0.03, 0.03, arm / 2), frame, arms & ~block)


PLANES = [  # radius, half length, wing: x of root and tip, span, chords, height; where engines are
    (0.085, 0.80, 0.06, -0.26, 0.80, 0.34, 0.12, -0.04, 0),             # airliner: below the wings
    (0.095, 0.76, 0.06, -0.20, 0.80, 0.30, 0.11, -0.05, 0),             # airliner
    (0.080, 0.74, -0.04, -0.24, 0.70, 0.30, 0.12, -0.04, 1),            # jet: aft
    (0.090, 0.60, 0.14, 0.12, 0.78, 0.28, 0.20, -0.05, 2),              # low wing: a propeller
    (0.085, 0.56, 0.14, 0.14, 0.80, 0.26, 0.22, 0.09, 2),               # high wing
    (0.085, 0.80, -0.22, -0.45, 0.52, 0.72, 0.24, -0.02, 3)]            # delta fighter: inside


def build_planes(s, ground):
    """A plane of one of six types, low over the ground: fuselage, wings, tail, engines."""
    add, draw, z, accent, fin = s.add, s.draw, ground + 0.34, s.row(PAINT), s.draw(0.20, 0.28)
    r, L, root, tip, span, root_chord, tip_chord, high, engines = s.row(PLANES).unbind(1)
    airliner, jet, propeller, fighter = (engines == i for i in range(4))
    r, span, tip = r * draw(0.9, 1.15), span * draw(0.88, 1.0), tip + draw(-0.05, 0.05)
    body = s.either(0.5, s.row([WHITE]), s.row(PAINT))
    wings, tail = s.either(0.6, body, accent), s.either(0.5, body, accent)

    add(CYLINDER, (0.1 * L, 0, z), (r, r, 0.55 * L), body, True, 0.2, **ALONG_X)
    add(SPHERE, (0.65 * L, 0, z), (0.35 * L, r, r), body, True, 0.2)
    add(SPHERE, (-0.45 * L, 0, z), (0.55 * L, r, r), body, True, 0.2, x=(1, 0, -0.06))
    window = L * torch.where(fighter, 0.4, torch.where(propeller, 0.45, 0.78))
    add(SPHERE, (window, 0, z + r * torch.where(fighter | propeller, 0.8, 0.5)),
        (torch.where(fighter, 0.18, 0.1), 0.6 * r, 0.6 * r), GLASS, True, 0.3)
    add(BOX, (0.1 * L, 0, z + 0.1 * r), (0.52 * L, 1.01 * r, 0.13 * r), accent, airliner | jet)
    level = z + torch.where(jet, r + fin - 0.02, 0.3 * r)       # a jet's stabiliser is on its fin
    for y in (-1, 1):
        end = (tip, y * span, z + high + 0.05 * ~fighter)
        s.wing((root, 0, z + high), end, (root_chord, tip_chord), (0, 0, 0.016), wings)
        foot, end = (0.1 - L, 0, level), (0.02 - L, y * 0.28, level)
        s.wing(foot, end, (0.20, 0.10), (0, 0, 0.012), tail, ~fighter)
        out = 0.12 * y * fighter                                # a fighter has two fins
        foot, end = (0.14 - L, out, z), (0.02 - L, 1.3 * out, z + r + fin)
        s.wing(foot, end, (0.28, 0.14), (0, 0.014, 0), tail, fighter | (y > 0))
        for k, some in ((0.34, airliner), (0.62, airliner & (fin > 0.25))):     # two or four
            x = root + k * (tip - root) + 0.5 * root_chord * (1 - k)
            at = (x, y * k * span, z + high - 0.06)
            add(CYLINDER, at, (0.05, 0.05, 0.09), STEEL, some, 0.2, **ALONG_X)
        at = (-0.55 * L, y * (r + 0.05), z + 0.03)
        add(CYLINDER, at, (0.05, 0.05, 0.11), STEEL, jet, 0.2, **ALONG_X)
    for half in ((0.012, 0.20, 0.022), (0.012, 0.022, 0.20)):
        add(BOX, (L, 0, z), half, BLACK, propeller)


class BuiltIn(NamedTuple):
    """A built-in set; its cameras look at the origin from all azimuths."""
    build: object               # adds the primitives of scenes: build(sketch, ground)
    ground: float               # height of the ground plane
    background: tuple           # colour of the lit ground, in [0, 1]
    elevation: tuple            # of the cameras: lowest and highest, in degrees
    radius: float               # their distance from the origin
    focal: float = 1.6          # in image widths


SETS = {
    "clevr1": BuiltIn(build_clevr1, -0.45, (0.75, 0.75, 0.75), (20, 50), 2.7),
    "cubes": BuiltIn(partial(build_clevr1, kinds=(BOX,)), -0.45, (0.75, 0.75, 0.75), (20, 50), 2.7),
    "clevr": BuiltIn(build_clevr, -0.30, (0.75, 0.75, 0.75), (20, 50), 2.9),
    "cars": BuiltIn(build_cars, -0.32, (0.82, 0.82, 0.82), (15, 45), 2.9),
    "chairs": BuiltIn(build_chairs, -0.70, (0.43, 0.17, 0.18), (15, 45), 3.1),
    "planes": BuiltIn(build_planes, -0.35, (0.43, 0.17, 0.18), (15, 50), 2.9),
}


def random_poses(name, scenes, views=1, seed=0, start=0, device="cpu"):
    """Poses (N, V, 4, 4) of a built-in set's cameras for scenes start..start+N-1."""
    set_, scene = SETS[name], torch.arange(start, start + scenes, device=device)
    draws = [Sketch(seed, scene, stream=1 + view).draw for view in range(views)]
    return torch.stack([orbit(d(0, 360), d(*set_.elevation), set_.radius) for d in draws], 1)


def random_scenes(name, scenes, seed=0, start=0, device="cpu"):
    """`Scenes` start..start+N-1 of a built-in set."""
    set_, sketch = SETS[name], Sketch(seed, torch.arange(start, start + scenes, device=device))
    set_.build(sketch, set_.ground)
    columns = (torch.stack(column, 1) for column in zip(*sketch.parts))
    return Scenes(*columns, set_.ground, set_.background)


def synthetic(name, scenes, views=1, resolution=64, seed=0, device="cpu", start=0, depth=True,
              held_out=False, make=random_scenes):
    """`Views` of scenes start..start+scenes-1 of a built-in set, from random cameras. Scene i and
    its view v are the same whatever else is asked for. Without `depth`, which takes time, it is
    None. held_out: scenes that no training sees. make: gives the `Scenes`, as `random_scenes`."""
    set_, where = SETS[name], "cpu" if torch.device(device).type == "mps" else device
    seed = -1 - seed if held_out else seed
    poses = random_poses(name, scenes, views, seed, start, where)
    images, depths = trace(make(name, scenes, seed, start, device=where), poses, set_.focal,
                           resolution, depth=depth)
    background = torch.tensor(set_.background) * 2 - 1
    return Views(images, poses, set_.focal, background, name, 1.0, depths, held_out).to(device)
