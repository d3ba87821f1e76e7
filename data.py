"""Posed images for RenderDiffusion: cameras, ray-traced scenes that need no download, and loaders.

    views = synthetic("clevr1", scenes=8, views=4)      # images, poses, focal, background, depth
    origins, directions = camera_rays(views.poses[:, 0], views.focal, 32)

world   right-handed, z up; a scene and its shadows are inside the cube [-1, 1]^3
pose    camera-to-world 4x4, OpenCV axes: x right, y down, z into the scene
focal   in image widths; principal point in the middle, pixel centres at +0.5
images  float32 in [-1, 1]
depth   distance along the unit ray through the pixel's centre to the first hit, inf in the sky
shapes  B images, N scenes, V views, S image side, R = S^2 rays, P primitives, M, H some of them
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


# ------------------------------------------------------------------------------------------------
# Cameras and posed images
# ------------------------------------------------------------------------------------------------

def orbit(azimuth, elevation, radius, target=(0.0, 0.0, 0.0)):
    """Poses (..., 4, 4) of cameras on a sphere around `target`, looking at it with z up.

    Azimuth (from +x towards +y) and elevation (from the ground up) are in degrees; all arguments
    are numbers or tensors that broadcast, `target` with a last dimension of three.
    """
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

    def __len__(self):
        return len(self.images)

    def __getitem__(self, scenes):
        """The scenes of a slice, a list or an index tensor; one scene is `views[i:i + 1]`."""
        return replace(self, images=self.images[scenes], poses=self.poses[scenes],
                       depth=None if self.depth is None else self.depth[scenes])


# ------------------------------------------------------------------------------------------------
# The ray tracer
# ------------------------------------------------------------------------------------------------

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
    return x.reshape(-1, x.shape[-1]).index_select(1, index).view(*x.shape[:-1], -1)


def linear(matrix, vectors):
    """The linear part of affine matrices (3, 4, M) applied to vectors (3, M) or (3, 1)."""
    return matrix[:, 0] * vectors[0] + matrix[:, 1] * vectors[1] + matrix[:, 2] * vectors[2]


def inverse(matrix):
    """The inverse of affine matrices (3, 4, M): its rows are cross products of their columns."""
    a, b, c, shift = matrix.unbind(1)                                             # (3, M) each
    rows = [torch.linalg.cross(*pair, dim=0) for pair in ((b, c), (c, a), (a, b))]
    rows = torch.stack(rows) / (a * rows[0]).sum(0)                               # (3, 3, M)
    return torch.cat([rows, -linear(rows, shift)[:, None]], 1)


def intersect(kind, o, d):
    """Where rays o + t d (3, M) enter and leave a unit primitive: (M,), (M,); a miss if near > far.

    All three are convex, so a hit is one interval, and a cylinder's is a tube's cut with a slab's.
    """
    if kind != SPHERE:
        d = torch.where(d.abs() < 1e-9, 1e-9, d)
        a, b = (-1 - o) / d, (1 - o) / d
        near, far = torch.minimum(a, b), torch.maximum(a, b)                      # (3, M)
        if kind == BOX:
            return near.amax(0), far.amin(0)
    n = 3 if kind == SPHERE else 2
    dd = (d[:n] * d[:n]).sum(0)
    middle = -(o[:n] * d[:n]).sum(0) / dd
    q = o[:n] + middle * d[:n]                          # the ray's closest point to centre or axis
    half = ((1 - (q * q).sum(0)) / dd).sqrt()           # NaN for a miss: it compares as false
    if kind == SPHERE:
        return middle - half, middle + half
    return torch.maximum(middle - half, near[2]), torch.minimum(middle + half, far[2])


def nearby_pixels(corners, poses, focal, side):
    """The pixels inside the box around the image of `corners` (3, 8 or 16, M), for M primitives.

    Returns pairs of a primitive (0..M-1) and a pixel (0..side^2-1), so that rays that pass well
    beside a primitive are never tested. poses (M, 4, 4) are the cameras.
    """
    relative = corners - poses[:, :3, 3].T[:, None]
    x, y, z = ((poses[:, :3, i].T[:, None] * relative).sum(0) for i in range(3))  # (8, M) each
    behind = (z < 1e-3).any(0)                          # partly behind the camera: every pixel
    edges = []
    for along in (x, y):
        pixel = ((along / z * focal + 0.5) * side).clamp(-1, side + 1)
        edges.append(torch.where(behind, 0, pixel.amin(0).floor().long() - 1).clamp(0, side))
        edges.append(torch.where(behind, side, pixel.amax(0).ceil().long() + 1).clamp(0, side))
    left, right, top, bottom = edges                                              # (M,) each
    width, count = right - left, (right - left) * (bottom - top)
    one = torch.repeat_interleave(count)
    index = torch.arange(len(one), device=one.device) - take(count.cumsum(0) - count, one)
    row = torch.div(index, take(width, one), rounding_mode="floor")
    return one, take(top * side + left, one) + index + row * take(side - width, one)


def trace_chunk(scenes, scene, poses, focal, side, shaded):
    """Traces side x side rays an image, for images (B,) of the scenes numbered `scene` (B,).

    Returns colours (3, B, side, side) in [-1, 1] where `shaded`, else the depth (B, side, side).
    """
    image, slot = (scenes.kind[scene] != EMPTY).nonzero(as_tuple=True)            # (M,) primitives
    kind, to_world, tint, shine = (field[scene[image], slot] for field in (
        scenes.kind, scenes.to_world, scenes.color, scenes.shine))
    to_world = to_world.permute(1, 2, 0)                                          # (3, 4, M)
    to_object = inverse(to_world)
    signs = torch.cartesian_prod(*[poses.new_tensor([-1, 1])] * 3)
    corners = torch.stack([linear(to_world, s[:, None]) for s in signs], 1) + to_world[:, 3:]

    def candidates(corners):
        """Kind by kind, pairs of a primitive and a ray (in 0..B*R-1) that may meet."""
        for k in (SPHERE, BOX, CYLINDER):
            chosen = (kind == k).nonzero()[:, 0]
            if len(chosen):
                one, pixel = nearby_pixels(corners[..., chosen], poses[image[chosen]], focal, side)
                one = take(chosen, one)
                yield k, one, take(image, one) * side ** 2 + pixel

    # The first hit: the ground, or a primitive that is nearer
    center = poses[:, :3, 3].T                                                    # (3, B)
    direction = camera_rays(poses, focal, side)[1].permute(2, 0, 1)               # (3, B, R)
    depth = (scenes.ground - center[2, :, None]) / direction[2]
    depth, direction = torch.where(depth > 0, depth, math.inf).view(-1), direction.reshape(3, -1)
    from_camera = linear(to_object, take(center, image)) + to_object[:, 3]        # (3, M)
    owner = torch.full_like(depth, -1, dtype=torch.long)            # which primitive a ray hits
    found = []
    for k, one, ray in candidates(corners):
        along = linear(take(to_object[:, :3], one), take(direction, ray))
        near, far = intersect(k, take(from_camera, one), along)
        hit = ((near < far) & (near > 0) & (near < take(depth, ray))).nonzero()[:, 0]
        found.append((near[hit], one[hit], ray[hit]))
    if found:
        near, one, ray = (torch.cat(column) for column in zip(*found))
        depth = depth.scatter_reduce(0, ray, near, "amin")
        first = near == take(depth, ray)
        owner = owner.scatter_reduce(0, ray[first], one[first], "amax")     # settles ties
    if not shaded:
        return depth.view(-1, side, side)

    # Shadows: all that a primitive keeps the light from is between it and its shadow on the ground
    light = poses.new_tensor(scenes.light)[:, None]
    light = light / (light * light).sum().sqrt()                                  # (3, 1)
    drop = (corners[2] - scenes.ground) / light[2]                                # (8, M)
    swept = torch.cat([corners, corners - drop * light[..., None]], 1)            # (3, 16, M)
    point = center.repeat_interleave(side ** 2, 1) + direction * depth            # (3, B*R)
    to_light, lit = linear(to_object, light), torch.ones_like(depth)
    for k, one, ray in candidates(swept):
        other = (take(owner, ray) != one) & take(depth, ray).isfinite()     # convex: none on itself
        one, ray = one[other], ray[other]
        matrix = take(to_object, one)
        start = linear(matrix, take(point, ray)) + matrix[:, 3]
        near, far = intersect(k, start, take(to_light, one))
        lit[ray[(near < far) & (far > 1e-3)]] = 0.0
    color = poses.new_tensor(scenes.background)[:, None] * torch.where(lit > 0, 1.0, SHADOW)

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
    diffuse = DIFFUSE * facing.clamp(min=0)
    shaded = tint[one].T * (ambient + diffuse * lit) + shine[one] * glint * lit
    color[:, ray] = shaded.clamp(0, 1)
    return color.view(3, -1, side, side) * 2 - 1


def trace(scenes, poses, focal, resolution, samples=2, depth=True):
    """Renders N scenes from poses (N, V, 4, 4): images (N, V, 3, S, S) in [-1, 1] and their depth.

    samples: a pixel is the mean of samples x samples rays. Depth (N, V, S, S) is along the ray
    through the pixel's centre to the first hit, inf in the sky; None without `depth`. Memory is
    bounded, beyond what is returned.
    """
    n, v = poses.shape[:2]
    poses = poses.reshape(-1, 4, 4)
    scene = torch.arange(n, device=poses.device).repeat_interleave(v)
    at_once = 2 ** 16 if poses.device.type == "cpu" else 2 ** 22      # a CPU's cache, a GPU's width
    chunk = max(1, at_once // (resolution * samples) ** 2)
    images, depths = [], []
    for some, cameras in zip(scene.split(chunk), poses.split(chunk)):
        fine = trace_chunk(scenes, some, cameras, focal, resolution * samples, True)
        images.append(F.avg_pool2d(fine, samples).transpose(0, 1))
        if depth:
            depths.append(trace_chunk(scenes, some, cameras, focal, resolution, False))
    images = torch.cat(images).view(n, v, 3, resolution, resolution)
    return images, torch.cat(depths).view(n, v, resolution, resolution) if depth else None


# ------------------------------------------------------------------------------------------------
# The built-in sets: what is in a scene
# ------------------------------------------------------------------------------------------------

MASK = 0xFFFFFFFF


def mix(x):
    """A 32-bit integer hash of a number or an int64 tensor; its products stay below 2^63."""
    x = ((x & MASK) + 0x9E3779B9) & MASK
    for _ in range(3):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & MASK
    return (x >> 16) ^ x


class Draw:
    """Random numbers for scenes (N,): a hash of (seed, stream, scene, which number).

    So scene i of a seed is the same whatever the batch, the order or the device.
    """

    def __init__(self, seed, scene, stream=0):
        self.key, self.count = mix(mix(mix(seed) ^ stream) ^ mix(scene)), 0

    def __call__(self, low=0.0, high=1.0):
        """(N,) floats in [low, high)."""
        self.count += 1
        bits = mix(self.key ^ mix(self.count)) >> 8                     # 24 bits: exact in float32
        return low + (high - low) * (bits.float() / 2 ** 24)

    def pick(self, options):
        """(N,) integers in 0..options-1."""
        return (self() * options).long()

    def row(self, table):
        """(N, ...) rows of a table."""
        return torch.tensor(table, device=self.key.device)[self.pick(len(table))]

    def either(self, chance, a, b):
        """(N, D) rows of a, with this chance, or else of b."""
        return torch.where(self()[:, None] < chance, a, b)


class Parts:
    """Collects the primitives of N scenes; each that is added goes into all of them, or some."""

    def __init__(self, like):
        self.like, self.rows = like, []                                 # like: any tensor (N,)

    def columns(self, *values):
        """Numbers and (N,) tensors as one (N, len(values))."""
        return torch.stack([torch.zeros_like(self.like) + v for v in values], -1)

    def add(self, kind, center, half, color, present=True, shine=0.0,
            x=(1, 0, 0), y=(0, 1, 0), z=(0, 0, 1)):
        """A unit primitive, stretched by `half` along the axes x, y and z, put at `center`.

        Slanted axes shear it. All are numbers or (N,) tensors in tuples; color may be (N, 3).
        """
        axes = torch.stack([self.columns(*a) for a in (x, y, z)], -1) * self.columns(*half)[:, None]
        color = color if torch.is_tensor(color) else self.columns(*color)
        present = torch.ones_like(self.like, dtype=torch.bool) & present
        to_world = torch.cat([axes, self.columns(*center)[..., None]], -1)              # (N, 3, 4)
        self.rows.append((torch.where(present, kind, EMPTY), to_world, color,
                          self.columns(shine)[:, 0]))

    def wing(self, root, tip, chords, thick, color, present=True, shine=0.0):
        """A slab that tapers from one chord (along x) around `root` to a smaller around `tip`.

        It is the union of three sheared boxes, without gaps where the chords' ratio is at most
        three; `thick` is half its thickness, as a vector.
        """
        for shift in (-0.5, 0, 0.5):
            ends = [(end[0] + shift * (chord - chords[1]), *end[1:])
                    for end, chord in zip((root, tip), chords)]
            self.add(BOX, [(a + b) / 2 for a, b in zip(*ends)], (1, 1, 1), color, present, shine,
                     (chords[1] / 2, 0, 0), thick, [(b - a) / 2 for a, b in zip(*ends)])

    def scenes(self, ground, background):
        return Scenes(*(torch.stack(column, 1) for column in zip(*self.rows)), ground, background)


CLEVR_COLORS = [[c / 255 for c in color] for color in (
    (87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20),          # grey, red, blue, green
    (129, 74, 25), (129, 38, 192), (41, 208, 208), (255, 238, 51))]     # brown purple cyan yellow


def clevr_object(parts, draw, x, y, r, ground, present=True):
    """One of CLEVR's objects of size r (N,): any shape, colour, material and turn about z."""
    kind, color, metal, turn = draw.pick(3), draw.row(CLEVR_COLORS), draw.pick(2), draw(0, 6.2832)
    half = torch.where(kind == BOX, r / math.sqrt(2), r)
    parts.add(kind, (x, y, ground + half), (half, half, half), color, present, 0.35 * metal,
              x=(turn.cos(), turn.sin(), 0), y=(-turn.sin(), turn.cos(), 0))


def build_clevr1(parts, draw, ground):
    """One object in the middle."""
    clevr_object(parts, draw, 0, 0, torch.where(draw() < 0.5, 0.35, 0.44), ground)


def build_clevr(parts, draw, ground):
    """One to four objects, each at the first of 24 random places that is clear of the others."""
    number, placed = 1 + draw.pick(4), []
    for i in range(4):
        r = torch.where(draw() < 0.5, 0.17, 0.28)
        places = torch.stack([parts.columns(draw(-0.6, 0.5), draw(-0.6, 0.5)) for _ in range(24)])
        clear = (i < number).expand(24, -1)                                       # (24, N)
        for place, radius, there in placed:
            clear = clear & ~(there & ((places - place).norm(dim=-1) < r + radius + 0.04))
        place = places[clear.int().argmax(0), torch.arange(len(r), device=r.device)]      # (N, 2)
        placed.append((place, r, clear.any(0)))
        clevr_object(parts, draw, *place.unbind(1), r, ground, clear.any(0))


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


def build_cars(parts, draw, ground):
    """A car of one of six types: body, cabin, windows, wheels, lights, in one or two colours."""
    add, paint, other = parts.add, draw.row(PAINT), draw.row(PAINT)
    L, W, wheel, belt, roof, foot0, foot1, top0, top1, extra = draw.row(CARS).unbind(1)
    L, W, top1 = L * draw(0.95, 1.0), W * draw(0.94, 1.06), top1 + draw(-0.03, 0.05)
    low, belt, roof = ground + 0.09, ground + belt, ground + roof * draw(0.96, 1.05)
    foot, top, middle = (foot0 + foot1) / 2, (top0 + top1) / 2, (belt + roof) / 2
    h, nose = (roof - belt) / 2, draw(0.02, 0.10)
    cabin, skirt = draw.either(0.25, other, paint), draw.either(0.5, draw.row([BLACK]), paint)

    chords = 2 * L, 2 * L - nose
    parts.wing((0, 0, low), (-nose / 2, 0, belt), chords, (0, W, 0), paint, True, 0.3)
    add(BOX, (0, 0, low + 0.03), (L + 0.02, W + 0.01, 0.03), skirt)
    chords = foot1 - foot0, top1 - top0
    parts.wing((foot, 0, belt), (top, 0, roof), chords, (0, 0.88 * W, 0), cabin, True, 0.3)
    chords = foot1 - foot0 - 0.16, top1 - top0 - 0.06                           # the side windows
    parts.wing((foot, 0, belt + 0.2 * h), (top, 0, roof - 0.36 * h), chords, (0, 0.9 * W, 0), GLASS,
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


def build_chairs(parts, draw, ground):
    """A chair on legs, a foot or a block, with one of four backs, some with arms or a cushion."""
    add, base, back, frame = parts.add, draw.row([0, 0, 0, 1, 2, 3]), draw.pick(4), draw.row(CLOTH)
    legs, star, disc, block = (base == i for i in range(4))
    d, w, up, high = draw(0.32, 0.42), draw(0.32, 0.44), draw(0.55, 0.72), draw(0.50, 0.75)
    cloth, metal = (draw.either(0.6, frame, draw.row(table)) for table in (CLOTH, [STEEL]))
    thin, splay, thick = draw(0.025, 0.05), draw(-0.02, 0.14), torch.where(block, 0.12, 0.045)
    is_round, leg = (draw() < 0.2) & ~block, torch.where(thin < 0.0375, CYLINDER, BOX)
    seat, middle, cushion = ground + up, ground + up / 2, (draw() < 0.4) & ~is_round | block

    add(torch.where(is_round, CYLINDER, BOX), (0, 0, seat), (d, w, 0.045), frame)
    add(BOX, (0.02, 0, seat + 0.06), (0.86 * d, 0.86 * w, 0.035), cloth, cushion)
    add(BOX, (0, 0, middle + 0.03), (d, w, up / 2 - 0.03), frame, block)
    for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        add(leg, (x * (d - 0.06), y * (w - 0.06), middle), (thin, thin, up / 2), metal, legs,
            z=(-x * splay, -y * splay, 1))
    add(CYLINDER, (0, 0, middle), (0.05, 0.05, up / 2), metal, star | disc, 0.3)
    add(CYLINDER, (0, 0, ground + 0.02), (0.3, 0.3, 0.02), metal, disc, 0.3)
    for c, s in ((1, 0), (0.5, 0.866), (-0.5, 0.866)):
        add(BOX, (0, 0, ground + 0.05), (0.36, 0.035, 0.03), metal, star, 0.3, (c, s, 0),
            (-s, c, 0))

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


def build_planes(parts, draw, ground):
    """A plane of one of six types, low over the ground: fuselage, wings, tail, engines."""
    add, z, accent, fin = parts.add, ground + 0.34, draw.row(PAINT), draw(0.20, 0.28)
    r, L, root, tip, span, root_chord, tip_chord, high, engines = draw.row(PLANES).unbind(1)
    airliner, jet, propeller, fighter = (engines == i for i in range(4))
    r, span, tip = r * draw(0.9, 1.15), span * draw(0.88, 1.0), tip + draw(-0.05, 0.05)
    body = draw.either(0.5, draw.row([WHITE]), draw.row(PAINT))
    wings, tail = draw.either(0.6, body, accent), draw.either(0.5, body, accent)

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
        parts.wing((root, 0, z + high), end, (root_chord, tip_chord), (0, 0, 0.016), wings)
        foot, end = (0.1 - L, 0, level), (0.02 - L, y * 0.28, level)
        parts.wing(foot, end, (0.20, 0.10), (0, 0, 0.012), tail, ~fighter)
        out = 0.12 * y * fighter                                # a fighter has two fins
        foot, end = (0.14 - L, out, z), (0.02 - L, 1.3 * out, z + r + fin)
        parts.wing(foot, end, (0.28, 0.14), (0, 0.014, 0), tail, fighter | (y > 0))
        for k, some in ((0.34, airliner), (0.62, airliner & (fin > 0.25))):     # two or four
            x = root + k * (tip - root) + 0.5 * root_chord * (1 - k)
            at = (x, y * k * span, z + high - 0.06)
            add(CYLINDER, at, (0.05, 0.05, 0.09), STEEL, some, 0.2, **ALONG_X)
        at = (-0.55 * L, y * (r + 0.05), z + 0.03)
        add(CYLINDER, at, (0.05, 0.05, 0.11), STEEL, jet, 0.2, **ALONG_X)
    for half in ((0.012, 0.20, 0.022), (0.012, 0.022, 0.20)):
        add(BOX, (L, 0, z), half, BLACK, propeller)


# ------------------------------------------------------------------------------------------------
# The built-in sets: how they are seen
# ------------------------------------------------------------------------------------------------

@dataclass
class BuiltIn:
    """A built-in set; its cameras look at the origin from all azimuths."""
    build: Callable             # adds the primitives of scenes: build(parts, draw, ground)
    ground: float               # height of the ground plane
    background: tuple           # colour of the lit ground, in [0, 1]
    elevation: tuple            # of the cameras: lowest and highest, in degrees
    radius: float               # their distance from the origin
    focal: float = 1.6          # in image widths


SETS = {
    "clevr1": BuiltIn(build_clevr1, -0.45, (0.75, 0.75, 0.75), (20, 50), 2.7),
    "clevr": BuiltIn(build_clevr, -0.30, (0.75, 0.75, 0.75), (20, 50), 2.9),
    "cars": BuiltIn(build_cars, -0.32, (0.82, 0.82, 0.82), (15, 45), 2.9),
    "chairs": BuiltIn(build_chairs, -0.70, (0.43, 0.17, 0.18), (15, 45), 3.1),
    "planes": BuiltIn(build_planes, -0.35, (0.43, 0.17, 0.18), (15, 50), 2.9),
}


def built_in(name):
    """The set of this name; a ValueError lists the names there are."""
    if name not in SETS:
        raise ValueError(f"there is no built-in set {name!r}: choose one of {', '.join(SETS)}")
    return SETS[name]


def random_poses(name, scenes, views=1, seed=0, start=0, device="cpu"):
    """Poses (N, V, 4, 4) of a built-in set's cameras for scenes start..start+N-1."""
    about, scene = built_in(name), torch.arange(start, start + scenes, device=device)
    draws = [Draw(seed, scene, stream=1 + view) for view in range(views)]
    return torch.stack([orbit(d(0, 360), d(*about.elevation), about.radius) for d in draws], 1)


def random_scenes(name, scenes, seed=0, start=0, device="cpu"):
    """`Scenes` start..start+N-1 of a built-in set."""
    about = built_in(name)
    draw = Draw(seed, torch.arange(start, start + scenes, device=device))
    parts = Parts(draw.key.float())
    about.build(parts, draw, about.ground)
    return parts.scenes(about.ground, about.background)


def synthetic(name, scenes, views=1, resolution=64, seed=0, device="cpu", start=0, samples=2,
              depth=True):
    """`Views` of scenes start..start+scenes-1 of a built-in set, from random cameras.

    Scene i and its view v are the same whatever else is asked for. samples: anti-aliasing by
    samples x samples rays a pixel. Without `depth`, which takes time, `Views.depth` is None.
    """
    about = built_in(name)
    counts = dict(scenes=scenes, views=views, resolution=resolution, samples=samples)
    for what, value in counts.items():
        if not (value >= 1 and value % 1 == 0):                         # NaN and inf too
            raise ValueError(f"{what} must be a whole number, at least 1, and not {value}")
    poses = random_poses(name, scenes, views, seed, start, device)
    images, depths = trace(random_scenes(name, scenes, seed, start, device), poses, about.focal,
                           resolution, samples, depth)
    background = torch.tensor(about.background, device=device) * 2 - 1
    return Views(images, poses, about.focal, background, name, depth=depths)


# ------------------------------------------------------------------------------------------------
# Pictures from files
# ------------------------------------------------------------------------------------------------

def open_picture(path):
    """The picture in a file as a PIL image, turned as its EXIF says; ValueError if there is none."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {path}") from None
    except Exception as error:                      # PIL raises a dozen kinds
        raise ValueError(f"{path} is no picture, or is damaged: {error}") from None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                  # 16 bits, which PIL would cut off at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image


def read_image(path, resolution, background=(1.0, 1.0, 1.0), fit="crop"):
    """A picture file of any size -> (3, S, S) in [-1, 1].

    Alpha is composited on `background` (RGB in [-1, 1]); the picture is cropped to its middle
    square, or padded to a square with fit="pad", and resized with anti-aliasing.
    """
    image = open_picture(path).convert("RGBA")
    color = tuple(round((b + 1) * 127.5) for b in background)
    canvas = Image.new("RGBA", image.size, color + (255,))
    canvas.alpha_composite(image)
    method = ImageOps.pad if fit == "pad" else ImageOps.fit
    square = method(canvas.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS,
                    **({"color": color} if fit == "pad" else {}))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def read_mask(path, resolution, size=None, fit="crop"):
    """A mask file, white = known, -> (1, S, S) of 0 and 1, fitted as `read_image` fits its picture.

    size: the picture's (width, height), S x S if None; ValueError where the mask's is another.
    """
    image, size = open_picture(path).convert("L"), size or (resolution, resolution)
    if image.size != size:
        raise ValueError(f"the mask {path} is {image.size[0]} x {image.size[1]} pixels and its "
                         f"picture {size[0]} x {size[1]}: make them equal")
    method = ImageOps.pad if fit == "pad" else ImageOps.fit
    square = method(image, (resolution, resolution), Image.Resampling.BOX)
    return (torch.from_numpy(np.array(square))[None] > 127).float()


# ------------------------------------------------------------------------------------------------
# Real data
# ------------------------------------------------------------------------------------------------

def load(spec, scenes=None, views=None, resolution=64, seed=0, device="cpu"):
    """`Views` of a built-in set by its name (1,000 scenes of one view unless told)."""
    if spec in SETS:
        return synthetic(spec, 1000 if scenes is None else scenes, 1 if views is None else views,
                         resolution, seed, device)
    raise ValueError(f"{spec!r} is not a built-in set: choose one of {', '.join(SETS)}")
