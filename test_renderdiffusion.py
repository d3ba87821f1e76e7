"""Tests in the order of what they test: first data.py, then renderdiffusion.py from top to bottom.

    pytest              # about a minute on two cores; neither a GPU nor the network is needed
    SLOW=1 pytest       # and the slow ones: trained weights on many scenes, two processes, README.md

Everything is compared with something known: a closed form, a plain loop, a direct computation.
"""
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import renderdiffusion as rd
from data import (BOX, CYLINDER, EMPTY, SETS, SPHERE, Draw, Scenes, camera_rays, load, orbit,
                  random_poses, random_scenes, synthetic, trace)
from renderdiffusion import (Config, NoiseSchedule, RadianceMLP, RenderDiffusion, composite,
                             evaluate, generate, inpaint, load_checkpoint, psnr, reconstruct,
                             repaint_schedule, sample_triplanes, save_checkpoint, ssim, train)

HERE = Path(__file__).resolve().parent
SHIPPED, README = HERE / "checkpoints" / "clevr1.pt", HERE / "README.md"
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="slow: set SLOW=1")
shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="no checkpoints/clevr1.pt yet")


def make_scene(*primitives, ground=-0.5, light=(-1.0, -1.0, 2.8284)):
    """One scene of (kind, 3x3 axes in columns, center, color, shine)."""
    kind = torch.tensor([[p[0] for p in primitives]])
    to_world = torch.tensor(np.array([[np.c_[p[1], p[2]] for p in primitives]])).float()
    color = torch.tensor([[p[3] for p in primitives]]).float()
    shine = torch.tensor([[float(p[4]) for p in primitives]])
    return Scenes(kind, to_world, color, shine, ground, (0.75, 0.75, 0.75), light)


def rotation_z(angle):
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def ground_depth(poses, focal, side, ground):
    """Depth of an empty scene."""
    origin, direction = camera_rays(poses, focal, side)
    depth = (ground - origin[..., 2]) / direction[..., 2]
    return torch.where(direction[..., 2] < 0, depth, math.inf).view(-1, side, side)


# ------------------------------------------------------------------------------------------------
# Cameras
# ------------------------------------------------------------------------------------------------

def test_orbit_looks_at_its_target():
    target = torch.tensor([0.1, -0.2, 0.3])
    azimuth = torch.tensor([0.0, 90.0, 200.0, 311.0])
    elevation = torch.tensor([0.0, 30.0, 60.0, 90.0])
    poses = orbit(azimuth, elevation, 2.5, target)
    right, down, into, center = poses[:, :3].unbind(-1)
    assert torch.allclose(center + 2.5 * into, target.expand(4, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.cross(right, down), into, atol=1e-6)         # right-handed
    assert torch.allclose(right[:, 2], torch.zeros(4)) and (down[:3, 2] < 0).all()   # level, z up
    assert torch.equal(poses[:, 3], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(4, 4))
    assert torch.allclose(center[0] - target, torch.tensor([2.5, 0.0, 0.0]), atol=1e-6)
    toward_y = torch.tensor([0.0, 2.5 * math.cos(math.pi / 6), 1.25])       # azimuth 90 is +y
    assert torch.allclose(center[1] - target, toward_y, atol=1e-6)
    assert orbit(10, 20, 2).shape == (4, 4)
    assert orbit(torch.zeros(3, 1), azimuth, 2).shape == (3, 4, 4, 4)


def test_rays_agree_with_a_pinhole_projection():
    pose, focal, side = orbit(35.0, 25.0, 2.7, (0.1, 0.2, -0.1)), 1.3, 10
    origin, direction = camera_rays(pose[None], focal, side)
    assert torch.allclose(direction.norm(dim=-1), torch.ones(1, side ** 2), atol=1e-6)
    points = (origin + 1.7 * direction)[0].double().numpy()
    intrinsics = np.array([[focal * side, 0, side / 2], [0, focal * side, side / 2], [0, 0, 1]])
    world_to_camera = np.linalg.inv(pose.double().numpy())
    pixels = intrinsics @ (world_to_camera[:3, :3] @ points.T + world_to_camera[:3, 3:])
    rows, columns = np.divmod(np.arange(side ** 2), side)
    assert (pixels[2] > 0).all()
    np.testing.assert_allclose(pixels[0] / pixels[2], columns + 0.5, atol=1e-4)
    np.testing.assert_allclose(pixels[1] / pixels[2], rows + 0.5, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# The ray tracer
# ------------------------------------------------------------------------------------------------

def test_sphere_agrees_with_the_closed_form():
    center, r, side, focal, ground = torch.tensor([0.2, -0.1, 0.05]), 0.4, 48, 1.6, -0.5
    scene = make_scene((SPHERE, r * np.eye(3), center, (1, 0, 0), 0), ground=ground)
    poses = orbit(torch.tensor([20.0, 140.0]), torch.tensor([25.0, 5.0]), 2.7)
    images, depth = trace(scene, poses[None], focal, side, samples=1)
    origin, direction = camera_rays(poses, focal, side)
    along = ((center - origin) * direction).sum(-1)
    miss = ((center - origin) ** 2).sum(-1) - along ** 2            # squared distance of the ray
    expected = torch.where(miss < r ** 2, along - (r ** 2 - miss).clamp(min=0).sqrt(), math.inf)
    expected = torch.minimum(expected.view(2, side, side), ground_depth(poses, focal, side, ground))
    sure = ((miss - r ** 2).abs() > 1e-4).view(2, side, side)       # not a graze
    assert depth.isinf().any() and torch.equal(depth[0].isinf() & sure, expected.isinf() & sure)
    assert torch.allclose(depth[0][sure], expected[sure], rtol=1e-4, atol=1e-4)
    red = images[0, :, 0] > images[0, :, 1] + 0.1
    assert torch.equal(red & sure, (miss < r ** 2).view(2, side, side) & sure)


def test_sphere_triangulates_to_its_center():
    center, side, focal = np.array([0.25, -0.3, 0.1]), 64, 1.6
    scene = make_scene((SPHERE, 0.25 * np.eye(3), center, (1, 0, 0), 0))
    poses = orbit(torch.tensor([10.0, 130.0, 250.0]), torch.tensor([20.0, 35.0, 50.0]), 2.7)
    _, depth = trace(scene, poses[None], focal, side)
    silhouette = depth[0] < ground_depth(poses, focal, side, -0.5) - 1e-3
    normal_matrix, right_side, middles = np.zeros((3, 3)), np.zeros(3), []
    for pose, mask in zip(poses.double().numpy(), silhouette.numpy()):
        row, column = np.argwhere(mask).mean(0) + 0.5
        ray = pose[:3, :3] @ [(column / side - 0.5) / focal, (row / side - 0.5) / focal, 1]
        across = np.eye(3) - np.outer(ray, ray) / (ray @ ray)   # takes out what is along it
        normal_matrix, right_side = normal_matrix + across, right_side + across @ pose[:3, 3]
        middles.append((column, row))
    found = np.linalg.solve(normal_matrix, right_side)
    assert np.abs(found - center).max() < 0.5 * 2.7 / (focal * side)        # half a pixel's width
    for pose, (column, row) in zip(poses.double().numpy(), middles):
        x, y, z = pose[:3, :3].T @ (center - pose[:3, 3])
        assert abs((x / z * focal + 0.5) * side - column) < 0.5
        assert abs((y / z * focal + 0.5) * side - row) < 0.5


def reference_depth(kind, matrix, center, origin, direction):
    """The first of the roots that lie on the surface, for one ray, in double precision."""
    back = np.linalg.inv(matrix)
    o, d = back @ (origin - center), back @ direction
    roots = []
    for axis in ((0, 1, 2) if kind == BOX else (2,)):
        for face in (-1, 1):
            t = (face - o[axis]) / d[axis]
            p = np.delete(o + t * d, axis)
            if (np.abs(p).max() if kind == BOX else np.hypot(*p)) < 1:
                roots.append(t)
    if kind == CYLINDER:
        for t in np.roots([d[:2] @ d[:2], 2 * o[:2] @ d[:2], o[:2] @ o[:2] - 1]):
            if np.isreal(t) and abs(o[2] + t.real * d[2]) < 1:
                roots.append(t.real)
    return min(roots, default=math.inf)


@pytest.mark.parametrize("kind", [BOX, CYLINDER])
def test_box_and_cylinder_agree_with_a_loop(kind):
    slanted = np.array([[0.5, 0.1, 0.2], [0.0, 0.3, -0.1], [-0.1, 0.05, 0.4]])
    center, side, focal = np.array([0.1, 0.05, 0.0]), 17, 1.6
    poses = orbit(torch.tensor([33.0, 251.0]), torch.tensor([28.0, -10.0]), 2.7)
    _, depth = trace(make_scene((kind, slanted, center, (1, 1, 1), 0), ground=-9.0), poses[None],
                     focal, side)
    origin, direction = (x.double().numpy() for x in camera_rays(poses, focal, side))
    expected = np.array([[reference_depth(kind, slanted, center, o, d) for o, d in zip(*rays)]
                         for rays in zip(origin, direction)])
    expected = np.minimum(expected, ground_depth(poses, focal, side, -9.0).view(2, -1).numpy())
    assert (expected < 3.5).sum() > 50
    np.testing.assert_allclose(depth[0].view(2, -1).numpy(), expected, rtol=2e-4)


def test_nearest_of_overlapping_primitives_is_seen():
    near = (BOX, np.diag([0.1, 0.6, 0.6]), (0.5, 0, 0), (1, 0, 0), 0)
    far = (SPHERE, 0.4 * np.eye(3), (-0.3, 0, 0), (0, 1, 0), 0)
    for order in ((near, far), (far, near)):
        images, depth = trace(make_scene(*order), orbit(0, 0, 2.7)[None, None], 1.6, 17)
        middle = images[0, 0, :, 8, 8]
        assert middle[0] > -0.5 and middle[1] == -1 and abs(depth[0, 0, 8, 8] - 2.1) < 1e-5


def test_scene_camera_and_light_turned_together_give_the_same_picture():
    parts = [(BOX, 0.3 * rotation_z(0.3), (0.3, 0.2, -0.2), (0.9, 0.4, 0.1), 0.3),
             (SPHERE, 0.25 * np.eye(3), (-0.3, -0.2, -0.25), (0.2, 0.5, 0.9), 0.3),
             (CYLINDER, 0.2 * np.eye(3), (-0.2, 0.4, -0.3), (0.3, 0.8, 0.2), 0.0)]
    turn, light = rotation_z(math.radians(77)), np.array([-1.0, -0.4, 2.0])
    turned = [(kind, turn @ axes, turn @ center, *look) for kind, axes, center, *look in parts]
    before = trace(make_scene(*parts, light=tuple(light)), orbit(30, 30, 2.7)[None, None], 1.6, 32)
    after = trace(make_scene(*turned, light=tuple(turn @ light)), orbit(107, 30, 2.7)[None, None],
                  1.6, 32)
    for a, b in zip(before, after):
        assert ((a - b).abs() > 1e-3).float().mean() < 0.002        # a sample on an edge may flip
        assert (a - b).abs().median() < 1e-5


def test_brightness_follows_lamberts_law_and_highlights_follow_phong():
    light = np.array([0.6, 0.0, 0.8])
    for shine in (0.0, 0.35):
        scene = make_scene((SPHERE, np.eye(3) * 0.5, (0, 0, 0), (0.4, 0.4, 0.4), shine),
                           ground=-9.0, light=tuple(light))
        poses, side = orbit(0, 0, 2.7)[None, None], 65
        images, depth = trace(scene, poses, 1.6, side, samples=1)
        origin, direction = camera_rays(poses[0], 1.6, side)
        normal = (origin + direction * depth.view(1, -1, 1)) / 0.5
        on = depth.view(-1) < 2.6
        facing = normal[0, on].double().numpy() @ light
        mirrored = 2 * facing[:, None] * normal[0, on].double().numpy() - light
        glint = np.maximum(-(mirrored * direction[0, on].numpy()).sum(1), 0) ** data.EXPONENT
        ambient = data.AMBIENT + data.FILL * 0.6 * normal[0, on, 1].numpy()
        expected = 0.4 * (ambient + data.DIFFUSE * np.maximum(facing, 0))
        expected += shine * glint * (facing > 0)
        got = (images[0, 0, 0].view(-1)[on] + 1) / 2
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("kind", [SPHERE, BOX, CYLINDER])
def test_brightness_agrees_with_the_slope_of_the_depth(kind):
    slanted = np.array([[0.5, 0.1, 0.2], [0.0, 0.3, -0.1], [-0.1, 0.05, 0.4]])
    scene = make_scene((kind, slanted, (0, 0, 0), (0.8, 0.8, 0.8), 0), ground=-9.0)
    side = 96
    poses = orbit(torch.tensor([20.0, 115.0, 230.0]), torch.tensor([35.0, 10.0, 60.0]), 2.7)
    images, depth = trace(scene, poses[None], 1.6, side, samples=1)
    origin, direction = camera_rays(poses, 1.6, side)
    points = (origin + direction * depth.view(3, -1, 1)).view(3, side, side, 3).double()
    right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normal = torch.nn.functional.normalize(torch.linalg.cross(down, right), dim=-1)
    light = np.array(scene.light) / np.linalg.norm(scene.light)
    facing = (normal @ torch.tensor(light)).clamp(min=0)
    ambient = data.AMBIENT + data.FILL * (light[0] * normal[..., 1] - light[1] * normal[..., 0])
    error = ((images[0, :, 0, 1:-1, 1:-1] + 1) / 2 - 0.8 * (ambient + data.DIFFUSE * facing)).abs()
    on = depth[0, :, 1:-1, 1:-1] < 4
    assert on.sum() > 2000 and (error[on] < 0.01).float().mean() > 0.85      # edges have no slope
    assert (error[on] < 0.05).float().mean() > 0.93


def test_shadow_falls_away_from_the_light_and_lit_ground_is_the_background():
    light = np.array([0.3, -0.8, 1.5])
    center = np.array([0.1, 0.2, 0.0])
    scene = make_scene((SPHERE, 0.2 * np.eye(3), center, (1, 0, 0), 0), light=tuple(light))
    poses = orbit(0, 50, 3)[None, None]
    images, depth = trace(scene, poses, 1.2, 64, samples=1)
    origin, direction = camera_rays(poses[0], 1.2, 64)
    ground = (depth.view(-1) - ground_depth(poses[0], 1.2, 64, -0.5).view(-1)).abs() < 1e-4
    points = (origin + direction * depth.view(1, -1, 1))[0].double().numpy()
    to_center = center - points                         # the shadow's closed form, point by point
    unit = light / np.linalg.norm(light)
    aside = np.linalg.norm(to_center - np.outer(to_center @ unit, unit), axis=1)
    brightness = images[0, 0].view(3, -1)
    background = torch.full((3,), 0.75) * 2 - 1
    lit, dark = ground.numpy() & (aside > 0.203), ground.numpy() & (aside < 0.197)
    assert torch.equal(brightness[:, lit], background[:, None].expand(3, int(lit.sum())))
    expected = torch.tensor(0.75 * data.SHADOW * 2 - 1)
    assert dark.sum() > 30 and torch.allclose(brightness[:, dark], expected)
    assert points[dark].mean(0)[1] > center[1] + 0.1    # the light is on the side of -y


def test_objects_shade_each_other():
    floor = (BOX, np.diag([0.6, 0.6, 0.1]), (0, 0, -0.3), (0.5, 0.5, 0.5), 0)
    ball = (SPHERE, 0.2 * np.eye(3), (0, 0, 0.4), (1, 0, 0), 0)
    light, pose = (0.0, 1.0, 1.0), orbit(0, 40, 2.7)[None, None]
    with_ball, _ = trace(make_scene(floor, ball, light=light), pose, 1.6, 64, samples=1)
    without, _ = trace(make_scene(floor, light=light), pose, 1.6, 64, samples=1)
    x, y, z = pose[0, 0, :3, :3].T @ (torch.tensor([0, -0.6 + 0.05, -0.2]) - pose[0, 0, :3, 3])
    column, row = (int((v / z * 1.6 + 0.5) * 64) for v in (x, y))   # behind the ball
    assert with_ball[0, 0, 0, row, column] < without[0, 0, 0, row, column] - 0.2


def test_anti_aliasing_is_the_mean_of_a_finer_picture():
    scenes, poses = random_scenes("cars", 3), random_poses("cars", 3)
    coarse, _ = trace(scenes, poses, 1.6, 16, samples=3, depth=False)
    fine, _ = trace(scenes, poses, 1.6, 48, samples=1, depth=False)
    assert torch.allclose(coarse, fine.view(3, 1, 3, 16, 3, 16, 3).mean((4, 6)), atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The built-in sets
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", list(SETS))
def test_a_batch_equals_one_by_one(name):
    batch = synthetic(name, 6, views=2, resolution=32, seed=3)
    again = synthetic(name, 6, views=2, resolution=32, seed=3)
    assert torch.equal(batch.images, again.images) and torch.equal(batch.depth, again.depth)
    assert len(batch) == 6 and batch.images.shape == (6, 2, 3, 32, 32)
    assert batch.images.min() >= -1 and batch.images.max() <= 1 and batch.images.isfinite().all()
    for i in (0, 4):
        single = synthetic(name, 1, views=1, resolution=32, seed=3, start=i)
        assert torch.allclose(single.images, batch.images[i:i + 1, :1], atol=1e-6)
        assert torch.allclose(single.depth, batch.depth[i:i + 1, :1], atol=1e-5)
        assert torch.allclose(single.poses, batch[i:i + 1].poses[:, :1], atol=1e-6)
    other = synthetic(name, 6, views=2, resolution=32, seed=4, depth=False)
    assert other.depth is None and not torch.allclose(other.images, batch.images)
    assert not torch.allclose(batch.images[0], batch.images[1])


def test_hashed_numbers_are_uniform_and_unrelated():
    scene = torch.arange(20000)
    columns = []
    for seed in (0, 1):
        for stream in (0, 1, 2):
            draw = Draw(seed, scene, stream)
            columns += [draw() for _ in range(4)]
    u = torch.stack(columns)
    assert u.min() >= 0 and u.max() < 1 and (u.mean(1) - 0.5).abs().max() < 0.01
    histogram = torch.stack([torch.histc(c, 10, 0, 1) for c in columns])
    assert (histogram / 2000 - 1).abs().max() < 0.1
    assert (torch.corrcoef(u) - torch.eye(len(u))).abs().max() < 0.04       # streams, seeds, order
    assert abs(torch.corrcoef(torch.stack([u[0, 1:], u[0, :-1]]))[0, 1]) < 0.04


def test_clevr1_fills_the_picture_but_not_the_mean():
    views = synthetic("clevr1", 600, resolution=32)
    ground = ground_depth(views.poses[:, 0], views.focal, 32, SETS["clevr1"].ground)
    cover = (views.depth[:, 0] < ground - 1e-4).float().mean((1, 2))
    assert 0.10 <= cover.min() and cover.max() <= 0.40
    images = (views.images[:, 0] + 1) / 2
    error = ((images - images.mean(0)) ** 2).mean((1, 2, 3))
    assert (-10 * error.log10()).mean() <= 20


def test_clevr_objects_stand_apart():
    scenes = random_scenes("clevr", 2000)
    there, center = scenes.kind != EMPTY, scenes.to_world[..., 3]
    radius = scenes.to_world[..., :3].norm(dim=2)[..., 0]
    radius = radius * torch.where(scenes.kind == BOX, 2 ** 0.5, 1)
    gap = (center[:, :, None, :2] - center[:, None, :, :2]).norm(dim=-1)
    gap = gap - radius[:, :, None] - radius[:, None]
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(4, dtype=torch.bool)
    assert gap[pairs].min() > 0.03
    assert (torch.bincount(there.sum(1), minlength=5)[1:] > 300).all() and there.any(1).all()
    assert (torch.bincount(scenes.kind[there]) > 1000).all()


@pytest.mark.parametrize("name", list(SETS))
def test_objects_and_shadows_are_inside_the_cube(name):
    scenes = random_scenes(name, 2000)
    turn = torch.arange(24) * (2 * math.pi / 24)
    rim = torch.stack([turn.cos(), turn.sin()], -1)
    lines = torch.linspace(-1, 1, 9)
    ball = torch.cat([torch.cat([rim * (1 - z * z).sqrt(), z.expand(24, 1)], 1) for z in lines])
    tube = torch.cat([torch.cat([rim, torch.full((24, 1), z)], 1) for z in (-1.0, 1.0)])
    box = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    light = torch.tensor(scenes.light)
    for kind, surface in ((SPHERE, ball), (BOX, box), (CYLINDER, tube)):
        matrix = scenes.to_world[scenes.kind == kind]
        points = torch.einsum("mij,pj->mpi", matrix[:, :, :3], surface) + matrix[:, None, :, 3]
        shadows = points - (points[..., 2:] - scenes.ground) / light[2] * light
        assert len(points) == 0 or max(points.abs().max(), shadows.abs().max()) < 1
        assert len(points) == 0 or points[..., 2].min() > scenes.ground - 0.02


@pytest.mark.parametrize("name", list(SETS))
def test_cameras_are_where_the_set_says(name):
    about, center = SETS[name], random_poses(name, 2000)[:, 0, :3, 3]
    elevation = torch.rad2deg(torch.asin(center[:, 2] / about.radius))
    azimuth = torch.rad2deg(torch.atan2(center[:, 1], center[:, 0]))
    assert torch.allclose(center.norm(dim=1), torch.tensor(about.radius), atol=1e-5)
    assert about.elevation[0] <= elevation.min() + 1e-3
    assert about.elevation[1] >= elevation.max() - 1e-3
    assert (torch.histc(azimuth, 8, -180, 180) > 180).all()


def test_wrong_arguments_are_answered_with_what_to_do():
    for wrong, says in ((dict(name="boats"), "one of clevr1"), (dict(scenes=0), "at least 1"),
                        (dict(views=0), "at least 1"), (dict(resolution=0), "at least 1"),
                        (dict(samples=-1), "at least 1"), (dict(scenes=2.5), "whole number"),
                        (dict(views=math.nan), "whole number")):
        with pytest.raises(ValueError, match=says):
            synthetic(**{**dict(name="clevr1", scenes=1), **wrong})
    with pytest.raises((ValueError, FileNotFoundError), match="clevr1"):
        load("no such thing")
    views = load("clevr1", scenes=2, views=3, resolution=8)
    assert views.images.shape == (2, 3, 3, 8, 8) and views.scale == 1


# ------------------------------------------------------------------------------------------------
# renderdiffusion.py: small models, and what stands in for their parts
# ------------------------------------------------------------------------------------------------

TINY = dict(resolution=16, plane_size=16, plane_channels=4, unet_channels=16, mlp_hidden=16,
            samples=8, batch=4, rays=64, steps=4, device="cpu")
PAIR = orbit(torch.tensor([10.0, 130.0]), torch.tensor([25.0, 45.0]), 2.7)         # two cameras


def tiny(**changes):
    return Config(**{**TINY, **changes})


def tiny_model(**changes):
    """An untrained model in which nothing is zero."""
    torch.manual_seed(0)
    model = RenderDiffusion(tiny(**changes)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.randn_like(weight)
    return model


class Field(torch.nn.Module):
    """Stands in for the MLP: a function of points (B, P, 3) -> density (B, P), colour (B, P, 3)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, points, features):
        return self.function(points)


def render_field(function, poses=PAIR, **changes):
    """What a field shows on a background of 0.25 -> rgb (B, 3, S, S) in [0, 1], depth, opacity."""
    model = tiny_model(background=(-0.5, -0.5, -0.5), **changes)
    model.mlp = Field(function)
    rgb, depth, opacity = model.render(torch.zeros(len(poses), 3, 4, 16, 16), poses)
    return rgb / 2 + 0.5, depth, opacity


class Greys:
    """The exact denoiser of pictures x0 = g + e: one grey g ~ N(0.1, 0.3^2) for all pixels, and
    e ~ N(0, 0.05^2) for each. Its "planes" are the picture; it notes what it is asked.
    """

    mean, spread, grain = 0.1, 0.3, 0.05

    def __init__(self, T=1000):
        self.config, self.schedule = tiny(timesteps=T), NoiseSchedule(T, "cosine")
        self.background, self.asked = torch.zeros(3), []

    def encode(self, x_t, t):
        self.asked.append((int(t), x_t))
        ab = float(self.schedule.alpha_bar[int(t)])
        pixel = ab * self.grain ** 2 + 1 - ab                       # variance of x_t given g
        gain = ab ** 0.5 * self.spread ** 2 / (ab * self.spread ** 2 + pixel / x_t[0].numel())
        g = self.mean + gain * (x_t.mean((1, 2, 3), keepdim=True) - ab ** 0.5 * self.mean)
        return g + ab ** 0.5 * self.grain ** 2 / pixel * (x_t - ab ** 0.5 * g)

    def render(self, planes, poses, focal=None, resolution=None):
        return planes, planes[:, 0], planes[:, 0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The path of a checkpoint after four steps."""
    out = tmp_path_factory.mktemp("trained")
    train(tiny(out=str(out)))
    return out / "clevr1.pt"


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------

BAD_FIELDS = [("resolution", 48), ("resolution", 8), ("resolution", 512), ("plane_size", 40),
              ("plane_channels", 0), ("unet_channels", 24), ("unet_channels", 0),
              ("mlp_hidden", 0), ("samples", 0), ("fine_samples", -1), ("timesteps", 0),
              ("schedule", "cos"), ("loss", "huber"), ("batch", 0), ("batch", 2.5),
              ("batch", "4"), ("rays", -1), ("steps", 0), ("steps", math.nan), ("minutes", -1.0),
              ("minutes", math.inf), ("lr", 0.0), ("lr", math.nan), ("ema", 1.0), ("seed", -1),
              ("scenes", -1), ("views", 0), ("clean", 1.0), ("focal", 0.0), ("resume", "yes"),
              ("background", (0.0, 0.0)), ("background", (0.0, 0.0, 2.0)), ("data", 3),
              ("elevation", (0.0, math.nan)), ("radius", -2.7)]


@pytest.mark.parametrize("name, value", BAD_FIELDS)
def test_a_bad_field_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}\b") as error:
        Config(**{name: value}).validate()
    assert "\n" not in str(error.value)


def test_defaults_are_valid():
    assert Config().validate() == Config()


# ------------------------------------------------------------------------------------------------
# Noise schedule
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("T", [1, 10, 1000])
def test_alpha_bar_goes_from_one_to_nearly_zero(kind, T):
    kept = NoiseSchedule(T, kind).alpha_bar
    assert kept.shape == (T + 1,) and kept[0] == 1 and 0 < kept[T] < 0.01
    assert (kept.diff() < 0).all()


def test_alpha_bar_has_the_papers_values():
    t = np.arange(1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(NoiseSchedule(1000, "cosine").alpha_bar[:999], (f / f[0])[:999],
                               rtol=1e-3, atol=1e-7)
    linear = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(NoiseSchedule(1000, "linear").alpha_bar[1:], linear, rtol=1e-3)


LEVELS = [(1, 0), (2, 1), (500, 499), (500, 20), (1000, 0), (1000, 999), (1000, 980), (1000, 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("t, s", LEVELS)
def test_posterior_is_bayes(kind, t, s):
    """N(x_s; a x0, 1 - ab_s) N(x_t; b x_s, 1 - b^2) as a function of x_s: a product of Gaussians."""
    schedule = NoiseSchedule(1000, kind)
    x0, x_t = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    mean, variance = schedule.posterior(x0, x_t, t, s)
    ab_t, ab_s = (float(schedule.alpha_bar[i]) for i in (t, s))
    if s == 0:
        assert torch.equal(mean, x0) and not variance.any()         # nothing is left to be drawn
        return
    precision = 1 / (1 - ab_s) + (ab_t / ab_s) / (1 - ab_t / ab_s)
    expected = ab_s ** 0.5 * x0 / (1 - ab_s) + (ab_t / ab_s) ** 0.5 * x_t / (1 - ab_t / ab_s)
    assert torch.allclose(mean.double(), expected / precision, atol=4e-3)
    assert float(variance.max()) == pytest.approx(1 / precision, rel=4e-3)
    assert float(variance.min()) == pytest.approx(1 / precision, rel=4e-3)


def coefficients(schedule, t, s, eta=1.0):
    """The posterior's mean is a x0 + b x_t -> a, b, variance."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    (a, variance), (b, _) = (schedule.posterior(*pair, t, s, eta) for pair in ((one, zero),
                                                                              (zero, one)))
    return float(a), float(b), float(variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_of_any_length_keep_the_marginal(eta):
    schedule = NoiseSchedule(1000)
    for t, s in LEVELS:
        ab_t, ab_s = (float(schedule.alpha_bar[i]) for i in (t, s))
        a, b, variance = coefficients(schedule, t, s, eta)
        assert a + b * ab_t ** 0.5 == pytest.approx(ab_s ** 0.5, abs=1e-4)
        assert b * b * (1 - ab_t) + variance == pytest.approx(1 - ab_s, abs=1e-5, rel=1e-3)


def test_two_steps_compose_to_one():
    schedule = NoiseSchedule(1000)
    for t, u, s in ((1000, 700, 300), (600, 599, 2), (40, 20, 0)):
        a1, b1, v1 = coefficients(schedule, t, u)
        a2, b2, v2 = coefficients(schedule, u, s)
        one_step = coefficients(schedule, t, s)
        assert (a2 + b2 * a1, b2 * b1, v2 + b2 * b2 * v1) == pytest.approx(one_step, abs=1e-4)


def test_eta_zero_is_ddim():
    schedule = NoiseSchedule(1000)
    x0, eps = torch.randn(2, 4, 3, 8, 8)
    for t, s in LEVELS:
        x_t = schedule.add_noise(x0, t, eps)
        mean, variance = schedule.posterior(x0, x_t, t, s, eta=0.0)
        assert not variance.any()
        assert torch.allclose(mean, schedule.add_noise(x0, s, eps), atol=2e-3)


def test_levels_may_differ_within_a_batch():
    schedule, t, s = NoiseSchedule(1000), torch.tensor([1000, 7, 300]), torch.tensor([3, 0, 299])
    x0, x_t = torch.randn(2, 3, 3, 8, 8)
    mean, variance = schedule.posterior(x0, x_t, t, s)
    noisy = schedule.add_noise(x0, t, x_t)
    for i in range(3):
        one = x0[i:i + 1], x_t[i:i + 1]
        single = schedule.posterior(*one, int(t[i]), int(s[i]))
        assert torch.equal(single[0][0], mean[i])
        assert torch.equal(single[1].expand(1, 3, 8, 8)[0], variance.expand(3, 3, 8, 8)[i])
        assert torch.equal(schedule.add_noise(one[0], int(t[i]), one[1])[0], noisy[i])


def test_noise_has_the_stated_mean_and_variance():
    schedule, generator = NoiseSchedule(1000), torch.Generator().manual_seed(0)
    x0 = torch.full((1, 1, 400, 400), 0.7)
    noise = torch.randn(x0.shape, generator=generator)
    assert torch.equal(schedule.add_noise(x0, 0, noise), x0)
    for t in (1, 100, 500, 900, 1000):
        kept, x_t = float(schedule.alpha_bar[t]), schedule.add_noise(x0, t, noise)
        assert x_t.mean().item() == pytest.approx(0.7 * kept ** 0.5, abs=0.01)
        assert x_t.var().item() == pytest.approx(1 - kept, rel=0.02)


# ------------------------------------------------------------------------------------------------
# U-Net encoder
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("S, N", [(16, 16), (16, 128), (32, 64), (64, 16), (128, 32), (256, 128)])
def test_every_size_has_planes_that_depend_on_the_picture_and_on_t(S, N):
    model = tiny_model(resolution=S, plane_size=N)
    x_t = torch.randn(1, 3, S, S)
    planes = model.encode(x_t, 5)
    assert planes.shape == (1, 3, 4, N, N) and planes.isfinite().all()
    assert not torch.allclose(planes, model.encode(x_t, 900), atol=1e-4)
    assert not torch.allclose(planes, model.encode(x_t.flip(-1), 5), atol=1e-4)


@pytest.mark.parametrize("S, N", [(16, 16), (16, 64), (64, 32)])
def test_gradients_reach_every_parameter(S, N):
    torch.manual_seed(0)
    model = RenderDiffusion(tiny(resolution=S, plane_size=N))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x_t, target, pixels = torch.randn(2, 3, S, S), torch.randn(2, 50, 3), torch.randint(S * S, (2, 50))
    for _ in range(4):              # some weights start at zero and hide others in the first step
        optimizer.zero_grad()
        (model(x_t, torch.tensor([10, 800]), PAIR, pixels) - target).square().mean().backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_a_batch_equals_one_by_one_through_the_whole_model():
    model, x_t, t = tiny_model(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    planes = model.encode(x_t, t)
    pictures = model.render(planes, PAIR)
    whole = model(x_t, t, PAIR)
    assert torch.equal(whole, pictures[0])
    for i in range(2):
        single = model.encode(x_t[i:i + 1], int(t[i]))
        assert torch.allclose(single, planes[i:i + 1], atol=1e-5)
        for one, many in zip(model.render(single, PAIR[i:i + 1]), pictures):
            assert torch.allclose(one, many[i:i + 1], atol=1e-5)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="16"):
        tiny_model().encode(torch.zeros(1, 3, 32, 32), 0)


# ------------------------------------------------------------------------------------------------
# Triplanes and MLP
# ------------------------------------------------------------------------------------------------

def test_triplanes_agree_with_a_loop():
    planes = torch.randn(2, 3, 5, 8, 8, dtype=torch.float64)
    points = torch.rand(2, 40, 3, dtype=torch.float64) * 2 - 1
    points[0, 0], points[0, 1] = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([-1.0, 1.0, -1.0])
    expected = torch.zeros(2, 40, 5, dtype=torch.float64)
    for b, p, (plane, axes) in itertools.product(range(2), range(40),
                                                 enumerate(((0, 1), (0, 2), (1, 2)))):
        x, y = ((float(points[b, p, axis]) + 1) / 2 * 7 for axis in axes)   # column, row
        for i, j in itertools.product((0, 1), (0, 1)):
            column, row = min(int(x), 6) + i, min(int(y), 6) + j
            weight = (1 - abs(x - column)) * (1 - abs(y - row))
            expected[b, p] += weight * planes[b, plane, :, row, column]
    assert torch.allclose(sample_triplanes(planes, points), expected)


def test_each_plane_sees_its_two_axes_alone():
    """Ramps, one a channel: along xy's columns and rows, then xz's, then yz's."""
    planes, ramp = torch.zeros(1, 3, 6, 9, 9), torch.linspace(-1, 1, 9)
    for plane in range(3):
        planes[0, plane, 2 * plane], planes[0, plane, 2 * plane + 1] = ramp, ramp[:, None]
    points = torch.rand(1, 50, 3) * 2 - 1
    expected = points[..., [0, 1, 0, 2, 1, 2]]
    assert torch.allclose(sample_triplanes(planes, points), expected, atol=1e-5)


def test_mlp_starts_nearly_transparent_and_never_dies():
    torch.manual_seed(0)
    mlp = RadianceMLP(16, 64)
    points, features = torch.rand(4, 500, 3) * 2 - 1, torch.randn(4, 500, 16, requires_grad=True)
    density, color = mlp(points, features)
    assert density.min() > 0 and density.mean() < 2 and color.min() > 0 and color.max() < 1
    density.sum().backward()
    assert (features.grad.abs().sum(-1) > 0).float().mean() > 0.99
    assert not torch.allclose(density, mlp(-points, features)[0])               # it reads p, too
    far, _ = mlp(points, 1000 * features)
    assert far.isfinite().all() and far.min() >= 0


# ------------------------------------------------------------------------------------------------
# Ray marching
# ------------------------------------------------------------------------------------------------

def test_ray_interval_agrees_with_a_search():
    torch.manual_seed(1)
    origins, directions = torch.rand(600, 3) * 5 - 2.5, torch.randn(600, 3)
    directions[:60] = torch.eye(3).repeat(20, 1) * torch.tensor([1.0, -1.0]).repeat(30)[:, None]
    directions[60:120, 1] = 0                           # parallel to one face, and to two
    directions = directions / directions.norm(dim=-1, keepdim=True)
    near, far = (x[0].double() for x in rd.ray_interval(origins[None], directions[None]))
    t = torch.arange(0, 9, 0.004, dtype=torch.float64)
    at = (origins[:, None] + t[:, None] * directions[:, None]).abs().amax(-1)         # (600, t)
    inside = at <= 1
    hit, miss = inside.any(1), at.amin(1) > 1.01
    first, last = t[inside.int().argmax(1)], t[len(t) - 1 - inside.flip(1).int().argmax(1)]
    starts_inside = origins.abs().amax(-1) <= 1
    assert hit.sum() > 100 and miss.sum() > 100 and starts_inside.sum() > 20
    assert torch.allclose(near[hit], first[hit], atol=0.005)
    assert torch.allclose(far[hit], last[hit], atol=0.005)
    assert not near[starts_inside].any() and torch.equal(near[miss], far[miss])
    assert near.min() >= 0 and near.isfinite().all() and far.isfinite().all()


def test_a_ray_along_a_face_is_finite():
    origins = torch.tensor([[[-3.0, 1.0, 0.0], [1.0, 1.0, 1.0], [-3.0, 0.0, 0.0]]])
    directions = torch.tensor([[[1.0, 0.0, 0.0]]]).expand(1, 3, 3)
    near, far = rd.ray_interval(origins, directions)
    assert near.isfinite().all() and far.isfinite().all() and (far >= near).all()
    assert near[0, 2] == 2 and far[0, 2] == 4


def test_composite_of_a_uniform_slab():
    deltas = torch.rand(3, 7, 20)
    color, background = torch.tensor([0.9, 0.2, 0.4]), torch.tensor([0.1, 0.5, 0.0])
    rgb, weights = composite(torch.full_like(deltas, 0.3), color.expand(3, 7, 20, 3), deltas,
                             background)
    opacity = 1 - torch.exp(-0.3 * deltas.sum(-1, keepdim=True))
    assert torch.allclose(rgb, opacity * color + (1 - opacity) * background, atol=1e-6)
    assert torch.allclose(weights.sum(-1, keepdim=True), opacity, atol=1e-6)


def test_composite_agrees_with_a_loop():
    density, deltas = torch.rand(2, 5, 9) * 8, torch.rand(2, 5, 9) * 0.4
    color, background = torch.rand(2, 5, 9, 3), torch.rand(3)
    rgb, weights = composite(density, color, deltas, background)
    left, expected = torch.ones(2, 5), torch.zeros(2, 5, 3)
    for k in range(9):
        alpha = 1 - torch.exp(-density[..., k] * deltas[..., k])
        assert torch.allclose(weights[..., k], left * alpha, atol=1e-6)
        expected += (left * alpha)[..., None] * color[..., k, :]
        left = left * (1 - alpha)
    assert torch.allclose(weights.sum(-1) + left, torch.ones(2, 5), atol=1e-6)
    assert torch.allclose(rgb, expected + left[..., None] * background, atol=1e-6)


def test_composite_of_nothing_and_of_a_wall():
    color, deltas, background = torch.rand(1, 2, 4, 3), torch.full((1, 2, 4), 0.5), torch.rand(3)
    rgb, weights = composite(torch.zeros(1, 2, 4), color, deltas, background)
    assert torch.equal(rgb, background.expand(1, 2, 3)) and not weights.any()
    wall = torch.tensor([1e9, 3.0, 0.0, 1e9]).expand(1, 2, 4)
    rgb, weights = composite(wall, color, deltas, background)
    assert torch.allclose(rgb, color[:, :, 0]) and torch.equal(weights[..., 0], torch.ones(1, 2))


def test_a_uniform_cube_agrees_with_the_closed_form():
    color = torch.tensor([0.8, 0.3, 0.6])
    origins, directions = camera_rays(PAIR, 1.6, 16)
    d, o = directions.double(), origins.double()
    a, b = (-1 - o) / d, (1 - o) / d
    near, far = torch.minimum(a, b).amax(-1).view(2, 16, 16), torch.maximum(a, b).amin(-1)
    length = (far.view(2, 16, 16) - near).clamp(min=0)
    for fine in (0, 64):
        rgb, depth, opacity = render_field(
            lambda p: (torch.full_like(p[..., 0], 1.5), color.expand_as(p)), samples=200,
            fine_samples=fine)
        expected = 1 - torch.exp(-1.5 * length)
        assert torch.allclose(opacity.double(), expected, atol=1e-5)
        shown = expected[:, None] * color.view(3, 1, 1) + (1 - expected[:, None]) * 0.25
        assert torch.allclose(rgb.double(), shown, atol=1e-5)
        hit = length > 0            # the mean of where a ray ends, exit included
        assert torch.allclose(depth.double()[hit], (near + expected / 1.5)[hit], atol=2e-3)


def test_a_soft_sphere_converges_to_the_closed_form():
    """Density 20 (1 - |p|^2 / r^2): along a chord of half length h its integral is 80 h^3 / 3r^2."""
    def field(p):
        density = 20 * (1 - p.square().sum(-1) / 0.64).clamp(min=0)
        return density, torch.ones_like(p)
    origins, directions = camera_rays(PAIR, 1.6, 16)
    aside = torch.linalg.cross(origins, directions).square().sum(-1).view(2, 16, 16)
    expected = 1 - torch.exp(-80 / 3 * (0.64 - aside).clamp(min=0) ** 1.5 / 0.64)
    errors = [(render_field(field, samples=K)[2] - expected).abs().max() for K in (8, 32, 128)]
    assert errors[2] < 1e-3 and errors[2] < errors[1] / 4 < errors[0] / 16


def test_empty_space_shows_the_background_and_its_exit():
    empty = render_field(lambda p: (torch.zeros_like(p[..., 0]), torch.ones_like(p)))
    rays = camera_rays(PAIR, 1.6, 16)
    assert torch.allclose(empty[0], torch.tensor(0.25)) and not empty[2].any()
    far = rd.ray_interval(*rays)[1].view(2, 16, 16)
    assert torch.allclose(empty[1], far, atol=1e-6)


def test_an_opaque_wall_has_its_depth_and_hides_what_is_behind():
    def field(p):                   # the half space x < 0.3, seen from +x; its inside is green
        face = (p[..., 0] > 0.2)[..., None]
        color = torch.where(face, torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
        return 1e4 * (p[..., 0] < 0.3), color
    rgb, depth, _ = render_field(field, orbit(0, 0, 2.7)[None], samples=256)
    z = camera_rays(orbit(0, 0, 2.7)[None], 1.6, 16)[1][0, :, 0].abs().view(16, 16)
    assert (depth[0] * z - 2.4)[4:12, 4:12].abs().max() < 0.01
    assert torch.allclose(rgb[0, :, 8, 8], torch.tensor([1.0, 0.0, 0.0]), atol=1e-4)


def test_importance_samples_follow_the_coarse_weights():
    edges = torch.tensor([0.5, 0.7, 1.3, 1.4, 2.0, 2.1, 2.6, 3.0])
    weights = torch.tensor([0.0, 0.05, 0.5, 0.3, 0.0, 0.0, 0.1])
    u = torch.rand(1, 1, 40000, generator=torch.Generator().manual_seed(0))
    found = rd.importance_samples(edges[None, None], weights[None, None], u)[0, 0]
    assert found.min() >= 0.5 and found.max() <= 3.0
    w = np.pad(weights.numpy(), 1, mode="edge")         # Barron et al. 2021, eq. 18, as written
    pdf = [(max(w[i - 1], w[i]) + max(w[i], w[i + 1])) / 2 + 0.01 for i in range(1, 8)]
    share = np.histogram(found.numpy(), edges.numpy())[0] / 40000
    np.testing.assert_allclose(share, pdf / np.sum(pdf), atol=0.01)
    inside = found[(found > 0.7) & (found < 1.3)]       # evenly within an interval
    assert inside.mean().item() == pytest.approx(1.0, abs=0.01)
    alone = rd.importance_samples(edges[None, None], 0 * weights[None, None], u)
    assert alone.isfinite().all()


def test_importance_samples_sharpen_a_thin_shell():
    def field(p):
        shell = torch.exp(-((p.norm(dim=-1) - 0.6) / 0.02) ** 2)
        return 40 * shell, p.sign() / 2 + 0.5
    truth = render_field(field, samples=2000)[0]
    error = [(render_field(field, samples=samples, fine_samples=fine)[0] - truth).square().mean()
             for samples, fine in ((24, 0), (24, 24), (48, 0))]
    assert error[1] < error[2] / 2 and error[2] < error[0]


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fine", [0, 8])
def test_rendering_is_deterministic_and_chunks_equal_the_whole(monkeypatch, fine):
    model, planes = tiny_model(fine_samples=fine), torch.randn(2, 3, 4, 16, 16)
    whole, again = model.render(planes, PAIR), model.render(planes, PAIR)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    monkeypatch.setattr(RenderDiffusion, "points_at_once", 600)
    calls, march = [], model.march
    monkeypatch.setattr(model, "march", lambda *a, **k: calls.append(0) or march(*a, **k))
    parts = model.render(planes, PAIR)
    assert len(calls) > 4 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts))


def test_pixels_alone_equal_the_whole_picture():
    model, x_t = tiny_model(fine_samples=8), torch.randn(2, 3, 16, 16)
    pixels = torch.stack([torch.randperm(256)[:40] for _ in range(2)])
    whole = model(x_t, 300, PAIR).flatten(2).mT                                # (B, R, 3)
    picked = model(x_t, 300, PAIR, pixels)
    assert picked.shape == (2, 40, 3)
    assert torch.allclose(picked, whole[torch.arange(2)[:, None], pixels], atol=1e-5)


def test_another_resolution_and_focal_show_the_same_scene():
    model, planes = tiny_model(), torch.randn(2, 3, 4, 16, 16)
    small = model.render(planes, PAIR)
    finer = model.render(planes, PAIR, resolution=48)           # the middle of each three by three
    double = model.render(planes, PAIR, resolution=32)
    zoomed = model.render(planes, PAIR, focal=3.2)              # the middle of twice the picture
    for a, b, c, d in zip(small, finer, zoomed, double):
        assert torch.allclose(a, b[..., 1::3, 1::3], atol=1e-4)
        assert torch.allclose(c, d[..., 8:24, 8:24], atol=1e-4)


def turn(planes):
    """The planes of the same volume after a quarter turn about z: (x, y, z) -> (-y, x, z)."""
    xy, xz, yz = planes.unbind(1)
    return torch.stack([xy.flip(-2).mT, yz.flip(-1), xz], dim=1)


@pytest.mark.parametrize("fine", [0, 8])
def test_camera_and_volume_turned_together_give_the_same_picture(fine):
    model, planes = tiny_model(fine_samples=fine), torch.randn(1, 3, 4, 16, 16)
    model.mlp.layers[0].weight[:, :3] = 0                       # the field, without p itself
    before = model.render(planes, orbit(25.0, 30.0, 2.7)[None])
    assert before[0].std() > 0.05
    for quarter in (1, 2, 3):
        planes = turn(planes)
        after = model.render(planes, orbit(25.0 + 90 * quarter, 30.0, 2.7)[None])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after))


def test_rendering_is_differentiable():
    model, planes = tiny_model(fine_samples=4), torch.randn(1, 3, 4, 16, 16, requires_grad=True)
    sum(x.sum() for x in model.render(planes, PAIR[:1])).backward()
    assert planes.grad.isfinite().all() and (planes.grad != 0).any(-1).any(-1).all()


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

def watch_loss(ema, x0, poses, progress=0.0):
    """One loss of a model that answers with the truth -> loss, and the x_t and t it was asked."""
    asked = []

    def model(x_t, t, given, pixels, *_, **__):
        assert torch.equal(given, poses)
        asked.append((x_t, t))
        return x0.flatten(2).mT[torch.arange(len(x0))[:, None], pixels]
    return rd.denoising_loss(model, ema, x0, poses, progress), *asked[0]


def test_every_noise_level_is_trained_from_clean_to_pure_noise():
    ema, poses = tiny_model(timesteps=20), orbit(torch.arange(10) * 36.0, 30, 2.7)
    x0, levels, noisiest = torch.rand(10, 3, 16, 16) * 2 - 1, [], []
    for _ in range(400):
        loss, x_t, t = watch_loss(ema, x0, poses)
        assert loss == 0                                # the target is x0 at the pixels asked for
        assert torch.equal(x_t[t == 0], x0[t == 0])
        levels.append(t)
        noisiest.append(x_t[t == 20])
    share = torch.bincount(torch.cat(levels), minlength=21) / 4000
    assert len(share) == 21 and share[0].item() == pytest.approx(ema.config.clean, abs=0.02)
    assert (share[1:] - (1 - ema.config.clean) / 20).abs().max() < 0.02
    assert torch.cat(noisiest).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_other_sides_are_encoded_late_and_in_their_share(share):
    ema = tiny_model(clean=0.99, other_side=share, other_side_from=0.4)
    x0, poses = torch.rand(8, 3, 16, 16) * 2 - 1, orbit(torch.arange(8) * 45.0, 30, 2.7)
    _, x_t, t = watch_loss(ema, x0, poses, progress=0.3)
    assert torch.equal(x_t[t == 0], x0[t == 0])
    planes, replaced, clean = ema.encode(x0, 0), 0, 0
    shown = torch.stack([ema.render(planes, pose.expand(8, 4, 4))[0] for pose in poses])
    for _ in range(8):
        loss, x_t, t = watch_loss(ema, x0, poses, progress=0.5)
        assert loss == 0                                # the target is the real picture all the same
        for i in (t == 0).nonzero()[:, 0].tolist():
            error = (shown[:, i] - x_t[i]).abs().amax((1, 2, 3))
            other = not torch.equal(x_t[i], x0[i])
            assert not other or (error.min() < 1e-4 and error.argmin() != i)
            replaced, clean = replaced + other, clean + 1
    assert replaced / clean == pytest.approx(share, abs=0.1)


def run_quietly(monkeypatch, config, **kwargs):
    """`train`, without what it shows at the end."""
    monkeypatch.setattr(rd, "health", lambda *_: "")
    return train(config, **kwargs)


def test_one_picture_is_learnt_and_generated(monkeypatch, tmp_path):
    """Over 8 seeds: 28.8 to 37.0 dB, and the mean colour 12.0 to 16.2 dB."""
    config = tiny(plane_channels=8, mlp_hidden=32, samples=16, rays=128, steps=100, scenes=1,
                  lr=1e-2, loss="l2", other_side=0.0, out=str(tmp_path))
    model, truth = run_quietly(monkeypatch, config), synthetic("clevr1", 1, 1, 16)
    image, pose = truth.images[0] / 2 + 0.5, truth.poses[0]
    colour = image.mean((2, 3), keepdim=True).expand_as(image)
    for shown in (model.render(reconstruct(model, truth.images[0]), pose)[0],
                  generate(model, pose, steps=10)[0]):          # there is but one picture to draw
        assert psnr(shown / 2 + 0.5, image) > 25 > psnr(colour, image) + 8


def test_every_step_has_new_scenes_and_none_is_held_out(monkeypatch, tmp_path):
    pictures = []

    def loss(model, ema, x0, poses, *rest):
        pictures.append(x0)
        return rd.denoising_loss(model, ema, x0, poses, *rest)
    model = run_quietly(monkeypatch, tiny(data="cars", out=str(tmp_path)), loss=loss)
    expected = synthetic("cars", 16, 1, 16, seed=0).images[:, 0]
    assert torch.equal(torch.cat(pictures), expected)
    held_out = synthetic("cars", 16, 1, 16, seed=rd.HELD_OUT).images[:, 0]
    assert not any(torch.equal(a, b) for a in held_out for b in expected)
    assert model.config.background == pytest.approx((0.64, 0.64, 0.64))
    pictures.clear()
    run_quietly(monkeypatch, tiny(data="cars", scenes=3, views=2, out=str(tmp_path)), loss=loss)
    fixed = synthetic("cars", 3, 2, 16, seed=0).images.flatten(0, 1)
    assert all(any(torch.equal(a, b) for b in fixed) for a in torch.cat(pictures))


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(monkeypatch, tmp_path, capsys):
    def interrupted(model, ema, x0, *rest):
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)                  # what Ctrl-C does
        steps.append(0)
        return rd.denoising_loss(model, ema, x0, *rest)
    config, steps = tiny(steps=6, lr=1e-2, out=str(tmp_path / "a")), []
    run_quietly(monkeypatch, config)
    config.out = str(tmp_path / "b")
    run_quietly(monkeypatch, config, loss=interrupted)
    assert len(steps) == 3 and "--resume" in capsys.readouterr().out
    half = torch.load(tmp_path / "b" / "clevr1.pt", weights_only=True)
    config.resume = True
    run_quietly(monkeypatch, config)
    whole, resumed = (torch.load(tmp_path / name / "clevr1.pt", weights_only=True)
                      for name in "ab")
    assert (half["step"], whole["step"], resumed["step"]) == (3, 6, 6)
    for part in ("model", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part])
        assert not all(torch.equal(half[part][k], resumed[part][k]) for k in half[part])
    states = whole["optimizer"]["state"], resumed["optimizer"]["state"]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])
    assert whole["optimizer"]["param_groups"] == resumed["optimizer"]["param_groups"]


@pytest.mark.parametrize("then", ["ends", "is interrupted"])
def test_a_loss_that_is_not_finite_stops_and_spoils_nothing(monkeypatch, tmp_path, then):
    def loss(model, ema, *rest):
        steps.append(0)
        if len(steps) == 5 and then == "is interrupted":
            raise KeyboardInterrupt
        return rd.denoising_loss(model, ema, *rest) * (math.nan if len(steps) == 4 else 1)
    config, steps = tiny(steps=6, out=str(tmp_path)), []
    run_quietly(monkeypatch, config)
    before = (tmp_path / "clevr1.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="step 3"):
        run_quietly(monkeypatch, config, loss=loss)
    assert before in [path.read_bytes() for path in tmp_path.glob("clevr1*.pt")]
    for path in tmp_path.glob("clevr1*.pt"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path).parameters())


@slow
def test_two_processes_train_the_same_model_as_one(tmp_path):
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**TINY, "steps": 3, "lr": 1e-3}.items()]
    command = [HERE / "renderdiffusion.py", "train", *options]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    one = [sys.executable, *command, "--batch=4", f"--out={tmp_path / 'one'}"]
    two = [*launch, *command, "--batch=2", f"--out={tmp_path / 'two'}"]
    for line in (one, two):
        subprocess.run(line, check=True, capture_output=True, timeout=300)
    one, two = (load_checkpoint(tmp_path / name / "clevr1.pt") for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.allclose(a, b, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_have_the_distribution_of_the_data(eta):
    model = Greys()
    images, _ = generate(model, PAIR[:1].expand(500, 4, 4), steps=50, eta=eta)
    grey = images.mean((1, 2, 3))
    assert grey.mean().item() == pytest.approx(Greys.mean, abs=0.05)
    assert grey.std().item() == pytest.approx(Greys.spread, rel=0.15)
    assert (images - grey.view(-1, 1, 1, 1)).std().item() == pytest.approx(Greys.grain, rel=0.2)
    levels = [t for t, _ in model.asked]
    assert len(levels) == 50 and levels[0] == 1000 and sorted(set(levels), reverse=True) == levels


def test_the_last_step_adds_no_noise():
    model = tiny_model()
    for eta in (0.0, 1.0):
        images, planes = generate(model, PAIR, steps=3, eta=eta)
        assert torch.allclose(images, model.render(planes, PAIR)[0].clamp(-1, 1), atol=1e-6)


def test_a_seed_is_a_picture():
    model = tiny_model()
    first, again, other = (generate(model, PAIR, steps=3, seed=seed)[0] for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)
    assert not torch.allclose(first, generate(model, PAIR, steps=3, eta=0.0, seed=4)[0], atol=1e-3)
    assert generate(model, PAIR, steps=model.config.timesteps // 100)[0].abs().max() <= 1


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        generate(Greys(), PAIR, steps=steps)


# ------------------------------------------------------------------------------------------------
# Reconstruction
# ------------------------------------------------------------------------------------------------

def test_reconstruction_without_noise_is_the_encoder_alone():
    model, images = tiny_model(), torch.rand(2, 3, 16, 16) * 2 - 1
    planes = model.encode(images, 0)
    assert torch.equal(reconstruct(model, images), planes)
    assert torch.equal(reconstruct(model, images, PAIR, t_r=0, seed=7), planes)


def test_reconstruction_keeps_the_less_the_more_noise():
    kept = []
    for t_r, steps, calls in ((40, None, 2), (300, None, 15), (300, 7, 7), (1000, 50, 50)):
        model, greys = Greys(), torch.linspace(-0.8, 0.8, 100).view(-1, 1, 1, 1)
        planes = reconstruct(model, greys.expand(100, 3, 16, 16), PAIR[:1].expand(100, 4, 4), t_r,
                             steps)
        levels = [t for t, _ in model.asked]
        assert len(levels) == calls and levels[0] == t_r
        assert sorted(set(levels), reverse=True) == levels
        pair = torch.stack([planes.mean((1, 2, 3)), greys.flatten()])
        kept.append(torch.corrcoef(pair)[0, 1].item())
    assert kept[0] > 0.99 and kept[0] > kept[1] > kept[3] and abs(kept[3]) < 0.4


@pytest.mark.parametrize("wrong", [dict(t_r=-1), dict(t_r=1001), dict(t_r=math.nan),
                                   dict(t_r=500, steps=501), dict(t_r=500, steps=0)])
def test_reconstruction_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="steps" if "steps" in wrong else "t_r"):
        reconstruct(Greys(), torch.zeros(2, 3, 16, 16), PAIR, **wrong)


def test_the_camera_is_found_where_the_planes_are_right():
    def field(p):                                       # three balls, no two alike
        balls = torch.tensor([[0.4, 0.1, -0.2], [-0.3, 0.4, 0.0], [-0.1, -0.5, 0.3]])
        inside = (p[..., None, :] - balls).norm(dim=-1) < 0.3                  # (B, P, 3)
        return 30.0 * inside.any(-1), inside.float()
    model = tiny_model(samples=24)
    model.mlp = Field(field)
    azimuth, elevation = torch.tensor([-170.0, 3.0, 77.0, 200.0]), torch.tensor([20.0, 33.0, 48.0, 40])
    poses = orbit(azimuth, elevation, model.config.radius)
    images, _, _ = model.render(torch.zeros(4, 3, 4, 16, 16), poses)
    masks = torch.ones(4, 1, 16, 16)
    masks[:, :, 6:10, 6:10] = 0
    for found in (rd.find_poses(model, images), rd.find_poses(model, images * masks, masks)):
        cosine = (found[:, :3, 2] * poses[:, :3, 2]).sum(-1)
        assert torch.rad2deg(cosine.clamp(max=1).acos()).max() < 3


# ------------------------------------------------------------------------------------------------
# Inpainting
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, length, down, up", [
    ((250, 10, 10), 4571, 2410, 2160), ((250, 10, 1), 251, 250, 0), ((100, 10, 10), 1721, 910, 810),
    ((50, 5, 5), 411, 230, 180), ((20, 5, 2), 51, 35, 15), ((3, 10, 10), 4, 3, 0), ((1, 1, 1), 2, 1, 0)])
def test_repaint_schedule_has_the_originals_numbers(arguments, length, down, up):
    steps, jump_length, jump_n_sample = arguments
    indices = repaint_schedule(*arguments)
    moves = np.diff(indices)
    assert (len(indices), indices[0], indices[-1]) == (length, steps - 1, -1)
    # The table counts moves between the indices of the list, the last one to -1 among them
    assert ((moves == -1).sum(), (moves == 1).sum()) == (down, up)
    assert min(indices[:-1]) == 0 and max(indices) == steps - 1
    if jump_n_sample > 1 and up:
        runs = [len(list(run)) for sign, run in itertools.groupby(moves) if sign == 1]
        assert set(runs) == {jump_length}


def test_repaint_schedule_refuses_what_makes_no_walk():
    for wrong in ((0, 5, 5), (50, 0, 5), (50, 5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            repaint_schedule(*wrong)


def test_inpainting_keeps_the_known_pixels_and_encodes_them():
    model, images = tiny_model(), torch.rand(2, 3, 16, 16) * 2 - 1
    masks = torch.ones(2, 1, 16, 16)
    masks[0, :, 5:11, 5:11], masks[1, :, :, 8:] = 0, 0
    settings = dict(steps=6, jump_length=2, jump_n_sample=2)
    filled, planes = inpaint(model, images, masks, PAIR, **settings)
    known = masks.bool().expand_as(images)
    assert torch.equal(filled[known], images[known])
    assert torch.equal(planes, model.encode(filled, 0))
    again, other = (inpaint(model, images * masks, masks, PAIR, seed=seed, **settings)[0]
                    for seed in (0, 1))
    assert torch.equal(again, filled)                   # what the mask hides has no influence
    assert not torch.allclose(other[~known], filled[~known], atol=1e-3)
    assert torch.equal(inpaint(model, images, torch.ones_like(masks), PAIR, **settings)[0], images)


def test_inpainting_continues_what_is_known_and_follows_repaint():
    model, generator = Greys(), torch.Generator().manual_seed(3)
    grey = Greys.mean + Greys.spread * torch.randn(60, 1, 1, 1, generator=generator)
    images = grey + Greys.grain * torch.randn(60, 3, 16, 16, generator=generator)
    masks = torch.ones(60, 1, 16, 16)
    masks[:, :, :, 9:] = 0
    filled, _ = inpaint(model, images, masks, PAIR[:1].expand(60, 4, 4), steps=20, jump_length=5,
                        jump_n_sample=3)
    hole = filled[..., 9:].mean((1, 2, 3))
    assert (hole - grey.flatten()).abs().mean() < 0.2 * Greys.spread
    walk = repaint_schedule(20, 5, 3)
    downs = [50 * (i + 1) for i, j in zip(walk, walk[1:]) if j < i]
    assert [t for t, _ in model.asked] == [*downs, 0]
    for t, x_t in model.asked[:-1]:         # the known pixels are theirs at the level of x_t
        kept = float(model.schedule.alpha_bar[t])
        noise = ((x_t - kept ** 0.5 * images) / (1 - kept) ** 0.5)[..., :9]
        assert noise.std().item() == pytest.approx(1, abs=0.03) and abs(noise.mean()) < 0.02


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 3, 16, 16), (2, 1, 8, 8), (1, 1, 16, 16)])
def test_a_mask_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match="mask"):
        inpaint(Greys(), torch.zeros(2, 3, 16, 16), torch.ones(shape), PAIR)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------

def plain_psnr(a, b):
    return -10 * math.log10(((a.double() - b.double()) ** 2).mean().item())


def plain_ssim(a, b):
    """Wang et al. 2004, eq. 13, window by window, for one picture (3, S, S)."""
    bell = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window, (a, b) = np.outer(bell, bell) / bell.sum() ** 2, (x.double().numpy() for x in (a, b))
    values = []
    for c, i, j in np.ndindex(3, a.shape[1] - 10, a.shape[2] - 10):
        p, q = (x[c, i:i + 11, j:j + 11] for x in (a, b))
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
        both = (window * (p - mean_p) * (q - mean_q)).sum()
        values.append((2 * mean_p * mean_q + 0.01 ** 2) * (2 * both + 0.03 ** 2)
                      / (mean_p ** 2 + mean_q ** 2 + 0.01 ** 2) / (var_p + var_q + 0.03 ** 2))
    return float(np.mean(values))


def test_psnr_and_ssim_agree_with_plain_loops():
    a = synthetic("clevr1", 3, 1, 16).images[:, 0] / 2 + 0.5
    b = (a + 0.2 * torch.randn(a.shape)).clamp(0, 1)
    assert psnr(a, b).tolist() == pytest.approx([plain_psnr(x, y) for x, y in zip(a, b)], abs=1e-3)
    assert ssim(a, b).tolist() == pytest.approx([plain_ssim(x, y) for x, y in zip(a, b)], abs=1e-4)
    assert torch.allclose(ssim(a, a), torch.ones(3)) and psnr(a, a).isfinite().all()


def test_evaluation_is_what_its_keys_say():
    model, views = tiny_model(), synthetic("clevr1", 18, 3, 16, seed=rd.HELD_OUT)   # two batches
    unit, expected = (views.images + 1) / 2, {}
    mean = unit.mean((0, 1))
    for i, v in np.ndindex(18, 3):
        planes = model.encode(views.images[i, :1], 0)
        shown = model.render(planes, views.poses[i, v][None])[0][0] / 2 + 0.5
        pairs = {"input": shown} if v == 0 else {
            "novel": shown, "baseline_mean_image": mean, "baseline_input_copied": unit[i, 0]}
        for key, guess in pairs.items():
            both = plain_psnr(guess, unit[i, v]), plain_ssim(guess, unit[i, v])
            expected.setdefault(key, []).append(both)
    scores = evaluate(model, views)
    assert scores.keys() == expected.keys()
    for key, values in expected.items():
        pair = scores[key]["psnr"], scores[key]["ssim"]
        assert pair == pytest.approx(tuple(np.mean(values, axis=0)), abs=2e-3)
    assert json.loads(json.dumps(scores)) == scores
    with pytest.raises(ValueError, match="2 views"):
        evaluate(model, synthetic("clevr1", 2, 1, 16))


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------

def test_save_load_sample_gives_the_same_picture(tmp_path):
    model = train(tiny(steps=2, out=str(tmp_path)))
    images, _ = generate(model, PAIR, steps=3)
    loaded = load_checkpoint(tmp_path / "clevr1.pt")
    assert torch.equal(generate(loaded, PAIR, steps=3)[0], images)
    assert loaded.config == model.config and not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    save_checkpoint(tmp_path / "small.pt", model)               # half precision, to share
    small = load_checkpoint(tmp_path / "small.pt")
    for (name, half), weight in zip(small.named_parameters(), model.parameters()):
        assert half.dtype == torch.float32 and torch.equal(half, weight.half().float()), name
    assert psnr(generate(small, PAIR, steps=3)[0] / 2 + 0.5, images / 2 + 0.5).min() > 40
    sizes = [(tmp_path / name).stat().st_size for name in ("small.pt", "clevr1.pt")]
    assert sizes[0] < sizes[1] / 4


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spoil(trained, folder):
    """Paths of files that are no checkpoints, each in its own way."""
    state, whole = torch.load(trained, weights_only=True), trained.read_bytes()
    def changed(**parts):
        return {**state, **parts}
    contents = {
        "empty": b"", "text": b"not a checkpoint\n" * 99, "start": whole[:200],
        "half": whole[:len(whole) // 2], "nearly": whole[:-30],
        "picture": (np.arange(9999) % 251).astype(np.uint8).tobytes(),
        "pickle": pickle.dumps({"version": 1, "config": Hostile(folder / "ran")}),
        "hostile": changed(config=Hostile(folder / "ran")), "list": [1, 2, 3],
        "weights": state["ema"], "version": changed(version=99), "no_weights": changed(ema={}),
        "no_config": {k: v for k, v in state.items() if k != "config"},
        "unknown_field": changed(config={**state["config"], "colour": 1}),
        "bad_field": changed(config={**state["config"], "resolution": 33}),
        "nan_field": changed(config={**state["config"], "focal": math.nan}),
        "other_size": changed(config={**state["config"], "unet_channels": 32}),
        "config_list": changed(config=[1, 2]), "weights_list": changed(ema=[3])}
    for name, content in contents.items():
        path = folder / f"{name}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        yield path


def test_spoilt_foreign_and_hostile_checkpoints_are_refused(trained, tmp_path):
    for path in spoil(trained, tmp_path):
        with pytest.raises(ValueError, match=path.name) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value), path.name
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_earlier_file(monkeypatch, trained, tmp_path):
    path, model = tmp_path / "model.pt", load_checkpoint(trained)
    save_checkpoint(path, model)
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError("no space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(path, model)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

OPTIONS = {k: v for k, v in TINY.items() if k != "steps"}
TRAIN = shlex.split(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in OPTIONS.items()))


def program(*arguments, cwd):
    """Run the command line in a process of its own."""
    return subprocess.run([sys.executable, str(HERE / "renderdiffusion.py"), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def desk(trained, tmp_path, monkeypatch):
    """A working folder with a checkpoint, pictures, masks and earlier results in it."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    for name, side in (("mask", 40), ("wide", 50)):
        Image.fromarray(np.tile(np.arange(side) * 255 // side, (side, 1)).astype(np.uint8)
                        ).save(tmp_path / f"{name}.png")
    (tmp_path / "tiny.pt").write_bytes(trained.read_bytes())
    (tmp_path / "half.pt").write_bytes(trained.read_bytes()[:9999])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "out").mkdir()
    for name in ("clevr1.pt", "cars.pt", "generate.png", "generate.gif", "reconstruct.png",
                 "reconstruct.gif", "inpaint.png", "inpaint.gif"):
        (tmp_path / "out" / name).write_text("an earlier result")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = {"demo": "", "generate": "--count 2 --steps 3", "reconstruct": "--t-r 0 --steps 3",
            "inpaint": "--steps 3", "evaluate": "--scenes 3 --views 2 --json"}


@pytest.mark.parametrize("command", ["train", *COMMANDS])
def test_each_command_runs_and_names_what_it_wrote(command, desk):
    options = [*TRAIN, "--steps", 2] if command == "train" else [
        "--checkpoint", "tiny.pt", *COMMANDS[command].split()]
    done = program(command, *options, "--out", "new/folder", cwd=desk)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    written = [path for path in contents(desk) if "new" in path.parts]
    if command == "evaluate":
        views = synthetic("clevr1", 3, 2, 16, seed=rd.HELD_OUT)
        expected, scores = evaluate(load_checkpoint("tiny.pt"), views), json.loads(done.stdout)
        for key in expected:
            assert scores[key] == pytest.approx(expected[key], abs=1e-3)
        return
    assert written and all(str(path.relative_to(desk)) in done.stdout for path in written)
    for path in written:
        assert path.suffix == ".pt" or Image.open(path).size[0] >= 32
        assert path.suffix != ".gif" or Image.open(path).n_frames > 8
    kinds = {path.suffix for path in written}
    assert kinds >= ({".pt"} if command == "train" else {".png", ".gif"})
    if command == "train":
        assert load_checkpoint(desk / "new/folder/clevr1.pt").config.resolution == 16


@pytest.mark.parametrize("line", [
    "reconstruct --image photo.png --t-r 40",
    "reconstruct --image photo.png --t-r 200 --steps 3 --azimuth 30 --elevation 20",
    "inpaint --image photo.png --mask mask.png --steps 3",
    "inpaint --image photo.png --mask mask.png --steps 3 --azimuth -400 --elevation 30"])
def test_picture_files_are_taken(line, desk, capsys):
    rd.main([*shlex.split(line), "--checkpoint", "tiny.pt", "--out", "new"])
    command = line.split()[0]
    assert {path.name for path in (desk / "new").iterdir()} == {f"{command}.png", f"{command}.gif"}
    assert "wrote" in capsys.readouterr().out


def test_a_seed_is_a_file(desk):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        rd.main(["generate", "--checkpoint", "tiny.pt", "--count", "1", "--steps", "2", "--seed",
                 str(seed), "--out", folder])
    a, b, c = (Path(folder, "generate.png").read_bytes() for folder in "abc")
    assert a == b != c


BAD_LINES = [       # each with a word that its sentence must have
    ("", "COMMAND"), ("paint", "paint"), ("generate --colour red", "colour"),
    ("generate --checkpoint nowhere.pt", "nowhere.pt"),
    ("generate --checkpoint half.pt", "half.pt"), ("generate --checkpoint photo.png", "photo.png"),
    ("generate --checkpoint out", "out"), ("generate --count 0", "count"),
    ("generate --count -3", "count"), ("generate --count nan", "count"),
    ("generate --steps 0", "steps"), ("generate --steps 1001", "steps"),
    ("generate --eta nan", "eta"), ("generate --eta -1", "eta"), ("generate --eta 2", "eta"),
    ("generate --seed 99999999999999999999999", "seed"), ("generate --device abacus", "abacus"),
    ("generate --count 1 --steps 1 --out photo.png", "photo.png"),
    ("reconstruct --image nowhere.png", "nowhere.png"),
    ("reconstruct --image text.png", "text.png"), ("reconstruct --image empty.png", "empty.png"),
    ("reconstruct --image out", "out"), ("reconstruct --t-r 1001", "t_r"),
    ("reconstruct --t-r -1", "t_r"), ("reconstruct --t-r nan", "t-r"),
    ("reconstruct --image photo.png --azimuth 10", "elevation"),
    ("reconstruct --image photo.png --azimuth nan --elevation 10", "azimuth"),
    ("reconstruct --image photo.png --azimuth 10 --elevation inf", "elevation"),
    ("inpaint --image photo.png --mask wide.png", "wide.png"), ("inpaint --steps 0", "steps"),
    ("inpaint --image photo.png --mask text.png", "text.png"),
    ("inpaint --image photo.png --mask nowhere.png", "nowhere.png"),
    ("inpaint --fillings 0", "fillings"), ("evaluate --data boats", "boats"),
    ("evaluate --scenes 0", "scenes"), ("evaluate --views 1", "views"),
    ("evaluate --t-r -1", "t_r"), ("train --data boats", "boats"), ("train --lr nan", "lr"),
    ("train --resolution 48", "resolution"), ("train --batch 0", "batch"),
    ("train --steps 0", "steps"), ("train --minutes nan", "minutes"), ("train --seed -1", "seed"),
    ("train --out photo.png", "photo.png"), ("train --resume --out empty", "empty"),
    ("train --resume", "clevr1.pt"), ("train --resume --out tiny --unet-channels 32", "clevr1.pt")]


@pytest.mark.parametrize("line, word", BAD_LINES)
def test_bad_input_gets_one_sentence_and_costs_nothing(line, word, desk, capsys, monkeypatch):
    (desk / "tiny").mkdir()
    (desk / "tiny" / "clevr1.pt").write_bytes((desk / "tiny.pt").read_bytes())
    monkeypatch.setattr(rd, "denoising_loss", None)             # nothing is trained before it fails
    before, arguments = contents(desk), shlex.split(line)
    if line.startswith("train"):
        arguments = ["train", *TRAIN, *arguments[1:]]
    elif len(arguments) > 1 and "--checkpoint" not in line:
        arguments += ["--checkpoint", "tiny.pt"]
    with pytest.raises(SystemExit) as stop:
        rd.main(arguments)
    said = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and word in said[-1]
    assert said[-1].startswith("error: ") and len(said) == 1 or (
        said[0].startswith("usage: ") and ": error: " in said[-1])
    assert contents(desk) == before


def test_bad_input_in_a_process_of_its_own(desk):
    done = program("generate", "--checkpoint", "half.pt", cwd=desk)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: half.pt")


def test_help_shows_examples(capsys):
    for arguments in ([], ["train"], *([command] for command in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            rd.main([*arguments, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert " ".join(["python renderdiffusion.py", *arguments]) in shown
    assert all(f"python renderdiffusion.py {command}" in rd.__doc__ for command in COMMANDS)


# ------------------------------------------------------------------------------------------------
# README.md: everything that it shows runs
# ------------------------------------------------------------------------------------------------

SKIPPED = ("pip", "pytest", "git", "torchrun", "jupyter", "SLOW=1", "cd")       # first words
SMALL_OPTIONS = {           # go behind what README.md says, so that they count
    "train": " ".join([*TRAIN, "--steps 2 --minutes 0"]), "demo": "--checkpoint tiny.pt",
    "generate": "--checkpoint tiny.pt --count 2 --steps 2",
    "reconstruct": "--checkpoint tiny.pt --steps 2", "inpaint": "--checkpoint tiny.pt --steps 2",
    "evaluate": "--checkpoint tiny.pt --scenes 2 --views 2"}
SMALL_CODE = [              # replaced in its Python: pattern, replacement
    (r'load_checkpoint\("clevr1"', 'load_checkpoint("tiny.pt"'), (r"\bsteps=\d+", "steps=2"),
    (r"\bscenes=\d+", "scenes=2"), (r"\bminutes=[\d.]+", "minutes=0.0"),
    (r"\bresolution=(32|64|128)", "resolution=16"), (r'(synthetic|load)\((".*?"), \d+', r"\1(\2, 2"),
    (r"Config\(", "Config(plane_size=16, unet_channels=16, samples=4, batch=2, rays=8, ")]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.M | re.S) \
    if README.exists() else []


@slow
@pytest.mark.skipif(not BLOCKS, reason="no README.md yet")
def test_everything_in_the_readme_runs(desk):
    for path in (desk / "out").iterdir():
        path.unlink()
    names, ran = {}, 0
    for language, block in BLOCKS:
        if language == "python":
            for pattern, small in SMALL_CODE:
                block = re.sub(pattern, small, block)
            exec(compile(block, "README.md", "exec"), names)
            ran += 1
            continue
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if not words or words[0] in SKIPPED:
                continue
            assert words[:2] == ["python", "renderdiffusion.py"], f"README.md: how to test {line!r}?"
            done = program(*words[2:], *shlex.split(SMALL_OPTIONS[words[2]]), cwd=desk)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            ran += 1
    assert ran


# ------------------------------------------------------------------------------------------------
# The shipped weights
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def clevr1():
    return load_checkpoint("clevr1")


@shipped
def test_shipped_weights_show_novel_views_of_unseen_scenes(clevr1):
    views = synthetic("clevr1", 32, 5, clevr1.config.resolution, seed=rd.HELD_OUT)
    scores = {key: score["psnr"] for key, score in evaluate(clevr1, views).items()}
    assert scores["novel"] >= 27 and scores["input"] >= scores["novel"]
    assert scores["novel"] > scores["baseline_input_copied"] + 5


@shipped
def test_shipped_weights_generate_scenes_of_many_kinds(clevr1):
    poses = orbit(torch.arange(8) * 45.0, 35, clevr1.config.radius)
    images, planes = generate(clevr1, poses, steps=20)
    truth = synthetic("clevr1", 64, 1, clevr1.config.resolution).images[:, 0]
    assert images.std(0).mean() > 0.6 * truth.std(0).mean()             # not one mean picture
    assert images.flatten(2).std(-1).mean() > 0.6 * truth.flatten(2).std(-1).mean()
    back = clevr1.render(planes, orbit(torch.arange(8) * 45.0 + 180, 35, clevr1.config.radius))[0]
    assert back.std(0).mean() > 0.6 * truth.std(0).mean()


@slow
@shipped
def test_shipped_weights_find_the_camera(clevr1):
    views = synthetic("clevr1", 24, 1, clevr1.config.resolution, seed=rd.HELD_OUT)
    images, truth = views.images[:, 0], views.poses[:, 0]
    planes = reconstruct(clevr1, images)
    given, found = (psnr(rd.to_unit(clevr1.render(planes, poses)[0]), rd.to_unit(images)).mean()
                    for poses in (truth, rd.find_poses(clevr1, images)))
    assert found > given - 1


@slow
@shipped
def test_shipped_weights_fill_a_hole_in_two_ways(clevr1):
    views, S = synthetic("clevr1", 8, 1, clevr1.config.resolution, seed=rd.HELD_OUT), 32
    images, poses, S = views.images[:, 0], views.poses[:, 0], clevr1.config.resolution
    masks = torch.ones(8, 1, S, S)
    masks[:, :, S // 3:, S // 4:3 * S // 4] = 0
    hole = (masks == 0).expand_as(images)

    def known_psnr(planes):
        error = (clevr1.render(planes, poses)[0] - images).square() / 4 * masks
        return -10 * (error.sum((1, 2, 3)) / 3 / masks.sum((1, 2, 3))).log10()
    fillings = [inpaint(clevr1, images, masks, poses, steps=20, seed=seed) for seed in (0, 1)]
    reference = known_psnr(reconstruct(clevr1, images)).mean()
    for filled, planes in fillings:
        assert torch.equal(filled[~hole], images[~hole])
        assert known_psnr(planes).mean() > reference - 3
    assert (fillings[0][0] - fillings[1][0])[hole].square().mean().sqrt() > 0.05
