"""Tests, in the order of what they test: data.py, then renderdiffusion.py from top to bottom.

    pytest              # under three minutes on two cores; needs no GPU and no network
    SLOW=1 pytest       # and the slow ones: two processes, README.md, more of the shipped weights

Everything is compared with something known: a closed form, a plain loop, a direct computation.
"""
import copy
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import renderdiffusion as rd
from data import (BOX, CLEVR_COLORS, CLEVR_NAMES, CLEVR_SCALE, CYLINDER, EMPTY, SETS, SPHERE, Draw,
                  Scenes, camera_rays, load, load_clevr, load_clevr567, load_folder, load_srn,
                  orbit, random_poses, random_scenes, read_image, read_mask, solve_clevr_camera,
                  synthetic, trace)
from renderdiffusion import (Config, NoiseSchedule, RadianceMLP, RenderDiffusion, composite,
                             evaluate, generate, inpaint, load_checkpoint, noise_levels, psnr,
                             reconstruct, repaint_schedule, sample_triplanes, save_checkpoint, ssim,
                             train)

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.M | re.S)
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="slow: set SLOW=1")


# data.py: scenes by hand ------------------------------------------------------------------------

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


# Cameras ----------------------------------------------------------------------------------------

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


# The ray tracer ---------------------------------------------------------------------------------

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


# The built-in sets ------------------------------------------------------------------------------

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


def test_cubes_are_the_cubes_of_clevr1():
    """The same scenes, but for their shape: colours, places and turns are drawn alike."""
    cubes, any_shape = (random_scenes(name, 500) for name in ("cubes", "clevr1"))
    assert (cubes.kind == BOX).all()
    same = any_shape.kind[:, 0] == BOX
    assert 100 < same.sum() < 250 and torch.equal(cubes.color, any_shape.color)
    assert torch.equal(cubes.to_world[same], any_shape.to_world[same])


@pytest.mark.parametrize("spread", [35, 65])
def test_the_steps_to_clevr_have_its_scenes_nearer_to_the_middle(spread):
    """First objects are the same but for their place; fewer others find room."""
    near, clevr = (random_scenes(name, 500) for name in (f"clevr_{spread}", "clevr"))
    place, scaled = near.to_world[:, 0, :2, 3], clevr.to_world[:, 0, :2, 3] * spread / 100
    assert torch.allclose(place, scaled, atol=1e-6)
    assert torch.equal(near.to_world[:, 0, :, :3], clevr.to_world[:, 0, :, :3])
    assert 500 < (near.kind != EMPTY).sum() < (clevr.kind != EMPTY).sum()


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


# data.py: real datasets, in files that the tests write as the originals are -----------------------

POINT = (0.25, -0.1, 0.15)              # the centre of a small red sphere, in cube units
WHITE = (1.0, 1.0, 1.0)
FLIP = np.diag([1.0, -1, -1, 1])        # OpenCV's axes to OpenGL's


def red_sphere(scenes=1):
    """A red sphere at POINT and a blue box on white ground."""
    to_world = torch.zeros(2, 3, 4)
    to_world[0, :, :3] = 0.1 * torch.eye(3)
    to_world[1, :, :3] = torch.diag(torch.tensor([0.2, 0.1, 0.15]))
    to_world[:, :, 3] = torch.tensor([POINT, (-0.3, 0.2, -0.15)])
    color = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    fields = torch.tensor([SPHERE, BOX]), to_world, color, torch.zeros(2)
    return Scenes(*(f.expand(scenes, *f.shape) for f in fields), -0.3, WHITE)


def cameras(views, scenes=1, radius=2.6):
    """Poses (N, V, 4, 4) from all sides."""
    i = torch.arange(scenes * views).view(scenes, views)
    return orbit(20 + 80.0 * i, 25 + 7.0 * (i % 4), radius + 0.05 * i)


def pictures(poses, focal, side):
    """8-bit pictures (N, V, side, side, 3) of `red_sphere`."""
    images = trace(red_sphere(len(poses)), poses, focal, side, depth=False)[0]
    return ((images + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def opaque(image):
    """With an alpha of 255, as both ShapeNet-SRN and CLEVR have it."""
    return np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def project(point, pose, focal, side):
    """The pixel (column, row) that shows a point: where its ray among `camera_rays` would be."""
    origin, direction = (x[0].double() for x in camera_rays(pose[None], focal, side))
    along = torch.as_tensor(point) - origin
    angle = torch.linalg.cross(along, direction).norm(dim=-1) / along.norm(dim=-1)
    near = angle.argsort()[:9]                  # sub-pixel: a plane through the nearest directions
    pixels = torch.stack([near % side + 0.5, near // side + 0.5, torch.ones(9)], 1).double()
    into = pose[:3, 2].double()
    ray = direction[near] / (direction[near] @ into)[:, None]
    slope = torch.linalg.lstsq(torch.cat([ray @ pose[:3, :2].double(), torch.ones(9, 1)], 1),
                               pixels[:, :2]).solution
    target = along[0] / (along[0] @ into)
    return torch.cat([target @ pose[:3, :2].double(), torch.ones(1)]) @ slope


def red_pixels(image):
    """The centroid (column, row) of what is red in an image (3, S, S)."""
    r, g, b = (image.double() + 1) / 2
    red = ((g + b < r) & (r > 0.2)).double()            # by hue: one side of the sphere is darker
    at = torch.arange(image.shape[-1]) + 0.5
    return torch.stack([(red.sum(0) * at).sum(), (red.sum(1) * at).sum()]) / red.sum()


def check(views, poses, tolerance=0.35):
    """The loaded cameras are these, show POINT where it is, and give the pictures back."""
    side = views.images.shape[-1]
    assert torch.allclose(views.poses, poses, atol=2e-5)
    again = trace(red_sphere(len(views)), views.poses, views.focal, side, 3, depth=False)[0]
    assert (again - views.images).abs().mean() < 0.02
    for image, pose in zip(views.images.flatten(0, 1), views.poses.flatten(0, 1)):
        expected = project(POINT, pose, views.focal, side)
        assert (red_pixels(image) - expected).norm() < tolerance        # in pixels


# ---- ShapeNet-SRN ------------------------------------------------------------------------------

def write_srn(folder, scenes, views, start=0, head="131.25 64.0 64.0 0.\n0. 0. 0.\n1.\n128 128\n"):
    poses = cameras(views, start + scenes)[start:]
    for i, (some, images) in enumerate(zip(poses, pictures(poses, 131.25 / 128, 128))):
        scene = folder / f"{start + i:032x}"
        write(scene / "intrinsics.txt", head)
        for v, (pose, image) in enumerate(zip(some.double().numpy(), images)):
            pose = pose.copy()
            pose[:3, 3] *= 0.5                                  # objects are within 0.5 there
            save(scene / "rgb" / f"{v:06d}.png", opaque(image))
            write(scene / "pose" / f"{v:06d}.txt", " ".join(f"{x:.9f}" for x in pose.ravel()))
    return poses


@pytest.fixture(scope="module")
def srn(tmp_path_factory):
    root = tmp_path_factory.mktemp("srn")
    poses = write_srn(root / "cars_train", 3, 4)
    held_out = write_srn(root / "cars_test", 2, 4, start=3)
    return root, poses, held_out


def test_srn(srn):
    root, poses, held_out = srn
    views = load(str(root), resolution=128)
    assert views.images.shape == (3, 4, 3, 128, 128) and views.name == "cars_train"
    assert views.focal == 131.25 / 128 and views.scale == 0.5
    assert torch.equal(views.background, torch.ones(3))
    check(views, poses)
    check(load_srn(root, resolution=64), poses)                     # resized: the same cameras
    check(load_srn(root, seed=-1, resolution=128), held_out)        # held out: the test split
    check(load_srn(root / "cars_test", resolution=128), held_out)   # a single split is that split
    check(load(root / "cars_test" / f"{3:032x}", resolution=128), held_out[:1])


@pytest.mark.parametrize("head", ["525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n512 512\n",
                                  "525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n128 128\n",
                                  "131.25 64.0 64.0 0.\n0. 0. 0.\n1.\n128 128\n0\n"])
def test_srn_archives_differ(tmp_path, head):
    poses = write_srn(tmp_path / "chairs_train" / "chairs_2.0_train", 1, 2, head=head)
    views = load(tmp_path, resolution=128)
    assert views.focal == 131.25 / 128
    check(views, poses)


def test_subsets(srn, monkeypatch):
    """Some scenes and views are read without the rest; a start differs from scene to scene."""
    root, poses, _ = srn
    opened, text = [], data.Path.read_text
    monkeypatch.setattr(data, "open_picture", lambda path, open=data.open_picture:
                        opened.append(path) or open(path))
    monkeypatch.setattr(data.Path, "read_text", lambda path: opened.append(path) or text(path))
    views = load_srn(root, scenes=2, views=3, resolution=16)
    assert views.images.shape == (2, 3, 3, 16, 16)
    pngs = [f for f in opened if f.suffix == ".png"]
    assert len(pngs) == len(set(pngs)) == 6
    assert len([f for f in opened if f.parent.name == "pose"]) == 6
    assert len({f.parent.parent for f in opened} - {f.parent for f in pngs}) <= 4
    assert {f.parent.parent.name for f in pngs} == {f"{i:032x}" for i in range(2)}
    for some, every in zip(views.poses, poses):             # distinct views of the right scene
        match = (some[:, None] - every[None]).abs().amax((-1, -2)) < 1e-4
        assert (match.sum(1) == 1).all() and match.sum(0).max() == 1
    one = [load_srn(root, views=1, resolution=8, seed=seed).poses for seed in range(8)]
    assert len({tuple(p[:, 0, 0, 3].tolist()) for p in one}) > 3
    again = load_srn(root, scenes=1, views=3, resolution=16)
    assert torch.equal(again.images[0], views.images[0])    # whatever the count of scenes


def test_more_than_there_is(srn, capsys):
    views = load_srn(srn[0], scenes=9, views=9, resolution=8)
    assert views.images.shape[:2] == (3, 4)
    assert "3 scenes of 4 views are all there are" in capsys.readouterr().err


# ---- NMR ---------------------------------------------------------------------------------------

def write_nmr(root, ids, views=4, inverse=True, masks=True):
    poses, focal = cameras(views, len(ids)), 1.866
    z_to_y_up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    for i, images in zip(ids, pictures(poses, focal, 64)):
        arrays = {}
        for v, image in enumerate(images):
            pose = poses[ids.index(i), v].double().numpy().copy()
            pose[:3, 3] *= 0.5
            pose = z_to_y_up @ pose
            arrays[f"world_mat_{v}"] = np.linalg.inv(pose)[:4 if inverse else 3]
            if inverse:
                arrays[f"world_mat_inv_{v}"] = pose
            arrays[f"camera_mat_{v}"] = np.diag([2 * focal, 2 * focal, 1, 1])
            mask = (image.min(-1) < 250).astype(np.uint8) * 255
            if masks:
                image = image * (mask[..., None] > 0)       # black outside: the mask makes it white
                save(root / i / "mask" / f"{v:04d}.png", mask)
            save(root / i / "image" / f"{v:04d}.png", image)
        np.savez(root / i / "cameras.npz", **arrays)
    return poses


@pytest.mark.parametrize("inverse, masks", [(True, True), (False, False)])
def test_nmr(tmp_path, inverse, masks):
    root, ids = tmp_path / "02958343", ["aa", "bb", "cc"]
    poses = write_nmr(root, ids, inverse=inverse, masks=masks)
    write(root / "softras_train.lst", "cc\nnot_downloaded\nbb\n")
    write(root / "softras_test.lst", "aa\n")
    for path in (root, tmp_path):
        views = load(path, resolution=64)
        assert views.focal == pytest.approx(1.866) and views.scale == 0.5
        check(views, poses[[2, 1]])
        check(load(path, seed=-1), poses[:1])


# ---- CLEVR-567 ---------------------------------------------------------------------------------

def test_clevr567(tmp_path):
    poses = cameras(4, 2)
    for i, images in enumerate(pictures(poses, 350 / 320, 320)):
        for v, image in enumerate(images):
            pose = poses[i, v].double().numpy().copy()
            pose[:3, 3] *= CLEVR_SCALE
            name = f"{4 * i + v:05d}_sc{i:04d}_az{v:02d}"
            squeezed = Image.fromarray(image[40:280]).resize((128, 128), Image.Resampling.BOX)
            save(tmp_path / f"{name}.png", np.array(squeezed))
            save(tmp_path / f"{name}_mask.png", np.array(squeezed))
            np.savetxt(tmp_path / f"{name}_RT.txt", pose)
            np.savetxt(tmp_path / f"{name}_azi_rot.txt", np.eye(3))
    views = load(tmp_path, resolution=96)
    assert views.focal == pytest.approx(350 / 240)
    check(views, poses)
    assert load_clevr567(tmp_path, scenes=1, views=2, resolution=8).images.shape[:2] == (1, 2)


# ---- Your own pictures -------------------------------------------------------------------------

def frames(poses, scale, name="./pictures/r_{}"):
    """Frames of a transforms.json, in OpenGL's axes."""
    made = []
    for v, pose in enumerate(poses.double().numpy().copy()):
        pose[:3, 3] *= scale
        made.append({"file_path": name.format(v), "transform_matrix": (pose @ FLIP).tolist()})
    return made


def test_folder_as_blender_writes_it(tmp_path):
    """Names without .png, the angle alone, pictures wider than high, alpha."""
    poses, focal, side = cameras(5), 1.1, 120
    for v, image in enumerate(pictures(poses, focal, side)[0]):
        sky = image.min(-1) > 250
        image[sky] = 0                                          # seen where alpha is forgotten
        rgba = np.dstack([image, np.where(sky, 0, 255).astype(np.uint8)])
        save(tmp_path / "pictures" / f"r_{v}.png", rgba[10:-10])
    about = {"camera_angle_x": 2 * math.atan(0.5 / focal), "frames": frames(poses[0], 3.0)}
    write(tmp_path / "transforms_train.json", json.dumps({**about, "frames": about["frames"][:3]}))
    write(tmp_path / "transforms_test.json", json.dumps({**about, "frames": about["frames"][3:]}))
    views = load_folder(tmp_path, resolution=96, scale=3.0)
    assert views.focal == pytest.approx(focal * 120 / 100)
    check(views, poses[:, :3])
    check(load_folder(tmp_path, seed=-1, resolution=96, scale=3.0), poses[:, 3:])
    views = load(tmp_path, resolution=96)
    assert views.scale == pytest.approx(3 * 2.65 * 0.5 / views.focal, rel=0.01)
    assert load(tmp_path, seed=-1, resolution=96).scale == views.scale
    assert torch.allclose(views.poses[..., :3, 3] * views.scale, poses[:, :3, :3, 3] * 3, atol=1e-4)
    assert load(tmp_path / "transforms_test.json", resolution=8).images.shape[:2] == (1, 2)


def test_folder_with_a_principal_point_off_the_middle(tmp_path):
    """Several scenes, frames with their own intrinsics, JPEG, pictures smaller than stated."""
    poses, focal, side = cameras(3, 2), 1.2, 160
    for i, images in enumerate(pictures(poses, focal, side)):
        scene = tmp_path / "train" / f"scene_{i}"
        made = frames(poses[i], 2.0, "images/{}.jpg")
        for v, image in enumerate(images):
            left, top = 4 * v, 10 + 6 * v                       # what the picture lacks
            picture = Image.fromarray(image[top:-4, left:-8])
            made[v] |= {"w": 4 * picture.width, "h": 4 * picture.height, "fl_x": 4 * focal * side,
                        "cx": 4 * (side / 2 - left), "cy": 4 * (side / 2 - top)}
            (scene / "images").mkdir(parents=True, exist_ok=True)
            picture.save(scene / "images" / f"{v}.jpg", quality=98)
        write(scene / "transforms.json", json.dumps({"frames": made}))
    views = load_folder(tmp_path, resolution=116, scale=2.0)
    assert views.focal == pytest.approx(focal * side / (side - 2 * 22))     # top = 22 is the worst
    check(views, poses)
    made[1]["cx"] = -3
    write(scene / "transforms.json", json.dumps({"frames": made}))
    with pytest.raises(ValueError, match="1.jpg: no crop has the principal point in the middle"):
        load(tmp_path)


# ---- CLEVR -------------------------------------------------------------------------------------

def simulated_scene(rng, count, split="val", index=0):
    """A scene of CLEVR's generator as its json has it, and the camera's centre."""
    center = np.array([7.48113, -6.50764, 5.34367]) + rng.uniform(-0.5, 0.5, 3)
    into = -center / np.linalg.norm(center)
    right = np.cross(into, [0, 0, 1]) / np.linalg.norm(np.cross(into, [0, 0, 1]))
    down, objects = np.cross(into, right), []
    while len(objects) < count:
        size = rng.choice([0.35, 0.7])
        shape, name = rng.choice(["cube", "sphere", "cylinder"]), CLEVR_NAMES[len(objects) % 8]
        half = size / math.sqrt(2) if shape == "cube" else size
        at = np.float32([*rng.uniform(-3, 3, 2), half])
        if any(np.hypot(*(at[:2] - o["3d_coords"][:2])) < half + o["3d_coords"][2] + 0.25
               for o in objects):
            continue
        x, y, z = np.stack([right, down, into]) @ (at.astype(float) - center)
        pixel = [round(240 + 525 * x / z), round(160 + 525 * y / z), float(np.float32(z))]
        objects.append({"shape": str(shape), "size": "large" if size == 0.7 else "small",
                        "color": name, "material": str(rng.choice(["rubber", "metal"])),
                        "3d_coords": at.tolist(), "pixel_coords": pixel,
                        "rotation": rng.uniform(0, 360)})
    return {"image_index": index, "image_filename": f"CLEVR_{split}_{index:06d}.png",
            "split": split, "objects": objects, "directions": {"right": [0.65, 0.75, -0.0]},
            "relationships": {"left": [[] for _ in objects]}}, center


def write_clevr(root, scenes, split="val"):
    info = {"split": split, "license": "CC BY 4.0", "version": "1.0", "date": "2/14/2017"}
    write(root / "scenes" / f"CLEVR_{split}_scenes.json",
          json.dumps({"info": info, "scenes": scenes}))


@pytest.mark.parametrize("count", [3, 4, 6, 10])
def test_clevr_camera(count):
    rng, errors = np.random.default_rng(count), []
    for _ in range(40):
        scene, center = simulated_scene(rng, count)
        pose, error = solve_clevr_camera(scene["objects"])
        errors.append(np.linalg.norm(pose[:3, 3] - center))
        assert error < 0.5 and np.allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3))
    assert np.median(errors) < 5e-4


@pytest.mark.parametrize("corrupt", [
    lambda o, rng: o["pixel_coords"].__setitem__(0, o["pixel_coords"][0] + 30),
    lambda o, rng: o["pixel_coords"].__setitem__(2, o["pixel_coords"][2] + 0.5),
    lambda o, rng: o["3d_coords"].__setitem__(slice(0, 2), rng.uniform(-3, 3, 2))])
def test_clevr_camera_despite_a_bad_object(corrupt):
    rng, errors = np.random.default_rng(0), []
    for i in range(30):
        scene, center = simulated_scene(rng, 4 + i % 7)
        corrupt(scene["objects"][i % 4], rng)
        pose, _ = solve_clevr_camera(scene["objects"])
        errors.append(np.linalg.norm(pose[:3, 3] - center))
    assert np.median(errors) < 5e-4 and max(errors) < 0.05


def test_clevr(tmp_path, capsys):
    """Pictures of the red sphere from where the generator's camera was; one scene does not fit."""
    rng = np.random.default_rng(1)
    scenes, centers = zip(*(simulated_scene(rng, 5, index=i) for i in range(5)))
    for o in scenes[1]["objects"][:3]:
        o["pixel_coords"][0] += int(rng.integers(20, 60))
    poses = torch.stack([torch.from_numpy(data.looking_at_origin(c)) for c in centers]).float()
    poses[:, :3, 3] /= CLEVR_SCALE
    for scene, picture in zip(scenes[:4], pictures(poses[:4, None], 525 / 480, 480)[:, 0]):
        save(tmp_path / "images" / "val" / scene["image_filename"], opaque(picture[80:400]))
    write_clevr(tmp_path, scenes)                               # the last has no picture
    views = load(tmp_path, resolution=128)
    assert "skipped 1 scenes" in capsys.readouterr().err
    assert views.focal == pytest.approx(525 / 320) and views.scale == CLEVR_SCALE
    assert (views.background > 0.98).all()                      # the ground, here white
    assert torch.allclose(views.poses[:, 0], poses[[0, 2, 3]], atol=2e-3)
    check(views, views.poses)
    assert len(load_clevr(tmp_path, scenes=2, resolution=8)) == 2


def test_clevr_layouts(tmp_path):
    """A scene's file alone is enough for pictures: each object is where, and what, it should be."""
    rng = np.random.default_rng(2)
    scenes = [simulated_scene(rng, n, index=n)[0] for n in (3, 9, 5)]
    write_clevr(tmp_path, scenes)
    file = tmp_path / "scenes" / "CLEVR_val_scenes.json"
    views = load(str(file), scenes=2, views=2, resolution=64)
    assert views.images.shape == (2, 2, 3, 64, 64) and views.depth.shape == (2, 2, 64, 64)
    assert torch.equal(load(tmp_path, 2, 2).images, views.images)           # without images/
    assert not torch.equal(load(file, 2, 2, seed=3).poses, views.poses)
    (tmp_path / "my_scenes.json").write_text(file.read_text())
    assert torch.equal(load(tmp_path / "my_scenes.json", 2, 2).images, views.images)
    for n, scene in enumerate(scenes[:2]):
        kind, to_world, color, shine = data.clevr_primitives(scene["objects"])
        for k, o in enumerate(scene["objects"]):
            assert to_world[k, 2, 3] * CLEVR_SCALE == pytest.approx(o["3d_coords"][2])
            assert shine[k].item() == pytest.approx(0.35 * (o["material"] == "metal"))
            assert color[k].tolist() == pytest.approx(CLEVR_COLORS[CLEVR_NAMES.index(o["color"])])
            x_axis = to_world[k, :2, 0] / to_world[k, :2, 0].norm()
            turn = [math.cos(o["rotation"]), math.sin(o["rotation"])]
            assert x_axis.tolist() == pytest.approx(turn, abs=1e-4)
        origin, direction = camera_rays(views.poses[n], views.focal, 64)
        hit = origin + direction * views.depth[n].view(2, -1, 1)
        hit = hit[(hit[..., 2] > 0.01) & hit.isfinite().all(-1)] * CLEVR_SCALE  # not the ground
        centers = torch.tensor([o["3d_coords"] for o in scene["objects"]])
        reach = centers[:, 2] * torch.tensor([{"cube": 3, "cylinder": 2, "sphere": 1}[o["shape"]]
                                              for o in scene["objects"]]).sqrt()
        assert ((hit[:, None] - centers).norm(dim=-1) < reach + 0.01).any(-1).all()
        assert len(hit) > 50


def test_clevr_files_are_read_in_part(tmp_path):
    scenes = [simulated_scene(np.random.default_rng(i), 8, index=i)[0] for i in range(40)]
    write_clevr(tmp_path, scenes)
    file = tmp_path / "scenes" / "CLEVR_val_scenes.json"
    assert list(data.json_items(file, "scenes")) == scenes
    file.write_text(file.read_text()[:-300] + "damaged")
    assert len(load(file, scenes=4, resolution=8)) == 4         # the end is not looked at
    with pytest.raises(ValueError, match="CLEVR_val_scenes.json has no list 'scenes', or is cut"):
        load(file, resolution=8)


# ---- Bad input: one sentence that names the file -----------------------------------------------

def damage(kind, scene):
    """Damages an SRN scene; what the message says of it."""
    picture, pose = scene / "rgb" / "000001.png", scene / "pose" / "000001.txt"
    if kind == "no intrinsics":
        (scene / "intrinsics.txt").unlink()
        return FileNotFoundError, "intrinsics.txt"
    if kind == "short intrinsics":
        (scene / "intrinsics.txt").write_text("131 64 64 0\n0 0 0\n")
        return ValueError, "intrinsics.txt should hold 10 numbers"
    if kind == "no rotation":
        pose.write_text(pose.read_text().replace("0.000000000", "0.5", 1))
        return ValueError, "pose of .*000001.png is not a rotation and a position"
    if kind == "mirror":
        rows = pose.read_text().split()
        pose.write_text(" ".join(str(-float(x)) if i % 4 == 0 else x for i, x in enumerate(rows)))
        return ValueError, "pose of .*000001.png is not a rotation and a position"
    if kind == "not finite":
        pose.write_text(" ".join(["nan"] * 16))
        return ValueError, "pose of .*000001.png is not a rotation"
    if kind == "words":
        pose.write_text("a pose")
        return ValueError, "000001.txt should hold 16 numbers"
    if kind == "a pose less":
        pose.unlink()
        return ValueError, f"{scene.name} .*2 pictures and 1 poses do not match"
    if kind == "truncated":
        picture.write_bytes(picture.read_bytes()[:900])
        return ValueError, "000001.png is no picture, or is damaged"
    if kind == "mixed sizes":
        Image.open(picture).resize((100, 60)).save(picture)
        return ValueError, "000001.png is 100 x 60 pixels, which does not fit"
    for f in (*scene.glob("rgb/*"), *scene.glob("pose/*")):
        f.unlink()
    return FileNotFoundError, f"no pictures in .*{scene.name}"


@pytest.mark.parametrize("kind", ["no intrinsics", "short intrinsics", "no rotation", "mirror",
                                  "not finite", "words", "a pose less", "truncated",
                                  "mixed sizes", "empty"])
def test_damaged_scene(tmp_path, kind):
    write_srn(tmp_path, 1, 2)
    error, message = damage(kind, tmp_path / f"{0:032x}")
    with pytest.raises(error, match=message) as caught:
        load(tmp_path, resolution=16)
    assert "\n" not in str(caught.value)


def test_scenes_with_fewer_views(tmp_path):
    write_srn(tmp_path, 1, 3)
    write_srn(tmp_path, 1, 2, start=1)
    with pytest.raises(ValueError, match=f"{1:032x} has 2 views, and other scenes 3"):
        load(tmp_path, resolution=16)
    assert load(tmp_path, views=2, resolution=16).images.shape[:2] == (2, 2)


def test_sizes_and_depths_of_pictures(tmp_path):
    """Larger pictures of the same shape, 16 bits and grey are no error."""
    write_srn(tmp_path, 1, 3)
    before = load(tmp_path, resolution=32).images
    rgb = tmp_path / f"{0:032x}" / "rgb"
    large = Image.open(rgb / "000000.png").resize((256, 256), Image.Resampling.BICUBIC)
    large.save(rgb / "000000.png")
    grey = Image.open(rgb / "000001.png").convert("L")
    grey.save(rgb / "000001.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(rgb / "000002.png")
    views = load(tmp_path, resolution=32)
    assert (views.images[0, 0] - before[0, 0]).abs().mean() < 0.02
    assert torch.equal(views.images[0, 1], views.images[0, 2])
    assert torch.equal(views.images[0, 1, 0], views.images[0, 1, 1])


def test_a_picture_of_any_size_is_cropped_or_padded_with_its_mask(tmp_path):
    """A white disc in the middle third of a wide picture, transparent beside it."""
    y, x = np.mgrid[:60, :180] + 0.5
    disc = np.hypot(x - 90, y - 30) < 20
    rgba = np.dstack([disc, disc, disc, abs(x - 90) < 60])
    save(tmp_path / "wide.png", np.uint8(255 * rgba))
    save(tmp_path / "mask.png", np.uint8(255 * ~disc))
    for fit, radius in ("crop", 20 * 32 / 60), ("pad", 20 * 32 / 180):
        image = read_image(tmp_path / "wide.png", 32, (0.5, 0.5, 0.5), fit)
        known = read_mask(tmp_path / "mask.png", 32, (180, 60), fit)
        area = math.pi * radius ** 2
        assert image[0][known[0] == 0].mean() > 0.7
        assert (known == 0).sum() == pytest.approx(area, rel=0.1)
        assert image[:, 16, 16].min() > 0.9 and known[0, 16, 16] == 0 and known[0, 0, 0] == 1
        assert image[0, 16, 0].item() == pytest.approx(-1 if fit == "crop" else 0.5, abs=0.01)


def test_nmr_without_a_camera(tmp_path):
    write_nmr(tmp_path, ["aa"], views=2)
    np.savez(tmp_path / "aa" / "cameras.npz", world_mat_0=np.eye(4), camera_mat_0=np.eye(4))
    with pytest.raises(ValueError, match="aa .*world_mat_1"):
        load(tmp_path)
    (tmp_path / "aa" / "cameras.npz").write_text("no archive")
    with pytest.raises(ValueError, match="aa "):
        load(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("{", "transforms.json is not as expected"),
    ('{"camera_angle_x": 1}', "transforms.json .*frames"),
    ('{"frames": [{"file_path": "a.png", "transform_matrix": []}], "w": 4, "h": 4}',
     "transforms.json .*camera_angle_x"),
    ('{"frames": []}', "no pictures in .*transforms.json"),
    ('{"frames": [{"file_path": "a"}], "camera_angle_x": 1}', "there is no picture .*a")])
def test_bad_transforms(tmp_path, text, message):
    write(tmp_path / "transforms.json", text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path)


def test_bad_clevr(tmp_path):
    scene, _ = simulated_scene(np.random.default_rng(0), 3)
    file = tmp_path / "scenes" / "CLEVR_val_scenes.json"
    for key, value in (("color", "pink"), ("shape", "cone"), ("3d_coords", [0, 0, -1])):
        write_clevr(tmp_path, [{**scene, "objects": [{**scene["objects"][0], key: value}]}])
        with pytest.raises(ValueError, match="CLEVR_val_scenes.json is not as expected"):
            load(file)
    del scene["objects"][1]["rotation"]
    write_clevr(tmp_path, [scene])
    with pytest.raises(ValueError, match="CLEVR_val_scenes.json is not as expected.*rotation"):
        load(file)
    write_clevr(tmp_path, [])
    with pytest.raises(ValueError, match="no scenes in .*CLEVR_val_scenes.json"):
        load(file)


def test_unknown_paths(tmp_path):
    with pytest.raises(ValueError, match="neither a built-in set .*clevr1.* nor a path"):
        load("clevr2")
    with pytest.raises(ValueError, match="no known format; looked for .*rgb .ShapeNet-SRN"):
        load(tmp_path)
    (tmp_path / "cars_train").mkdir()
    (tmp_path / "chairs_train").mkdir()
    with pytest.raises(ValueError, match="has cars_train and chairs_train: name one"):
        load_srn(tmp_path)
    with pytest.raises(FileNotFoundError, match="no scenes in"):
        load_srn(tmp_path / "cars_train")
    with pytest.raises(FileNotFoundError, match="CLEVR_train_scenes.json"):
        load_clevr(tmp_path)
    assert len(load("clevr1", 2, resolution=8)) == 2


@pytest.mark.parametrize("position", [0, 1e300, 10 ** 400, math.nan, "far"])
def test_cameras_that_are_nowhere(tmp_path, position):
    """At the origin, too far for float32 or for any float: never a pose that is not finite."""
    shots = frames(cameras(2)[0], 0.0 if position == 0 else 2.0)
    for v, image in enumerate(pictures(cameras(2), 1.0, 16)[0]):
        save(tmp_path / "pictures" / f"r_{v}.png", image)
    shots[1]["transform_matrix"][0][3] = position
    write(tmp_path / "transforms.json", json.dumps({"camera_angle_x": 1.0, "frames": shots}))
    with pytest.raises(ValueError, match=tmp_path.name):
        load(tmp_path, resolution=8)


@pytest.mark.parametrize("change", [
    {"objects": []}, {"3d_coords": [math.nan, 0, 1]}, {"3d_coords": [1e308, 0, 1]},
    {"rotation": 1e999}, 3, "nested"])
def test_clevr_layouts_that_are_none(tmp_path, change):
    scene, _ = simulated_scene(np.random.default_rng(0), 2)
    if isinstance(change, dict) and "objects" not in change:
        scene["objects"][1] |= change
    write_clevr(tmp_path, [{**scene, **change} if isinstance(change, dict) else change])
    file = tmp_path / "scenes" / "CLEVR_val_scenes.json"
    if change == "nested":
        file.write_text('{"scenes": ' + "[" * 10 ** 5)
    with pytest.raises(ValueError, match="CLEVR_val_scenes.json"):
        load(file, resolution=8)
    if change == 3:
        save(tmp_path / "images" / "val" / "a.png", np.zeros((32, 48, 3), np.uint8))
        with pytest.raises(ValueError, match="CLEVR_val_scenes.json"):
            load(tmp_path, resolution=8)


@pytest.mark.parametrize("exif", [b"junk and more junk", b"II*\0"])
def test_pictures_with_spoilt_exif_and_pipes_are_refused(tmp_path, exif):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    with pytest.raises(ValueError, match="a.png is no picture"):
        read_image(tmp_path / "a.png", 8)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match="pipe.png"):
        read_image(tmp_path / "pipe.png", 8)


# ---- README.md's recipes -----------------------------------------------------------------------

def recipe(word):
    """The one Python block of README.md that has this word."""
    block, = (code for language, code in BLOCKS if language == "python" and word in code)
    return block


def test_colmap_recipe(tmp_path, monkeypatch):
    """COLMAP's text files, in a world of their own, become cameras round the origin, z up."""
    poses, focal, side = cameras(8, radius=2.6), 1.2, 100
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    lines = ["# Image list with two lines of data per image:"]
    for v, pose in enumerate(poses[0].double().numpy()):
        save(tmp_path / "images" / f"{v}.png", pictures(poses[:, v:v + 1], focal, side)[0, 0])
        R = (turn @ pose[:3, :3]).T                             # world to camera
        t = -R @ (turn @ pose[:3, 3] * 7 + [3, -2, 9])
        a = math.sqrt(max(0, 1 + np.trace(R))) / 2
        x, y, z = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / (4 * a)
        numbers = " ".join(f"{n:.12f}" for n in (a, x, y, z, *t))
        lines += [f"{v + 1} {numbers} 1 {v}.png", "1.0 2.0 -1 3.0 4.0 7" if v % 2 else ""]
    write(tmp_path / "images.txt", "\n".join(lines) + "\n")
    write(tmp_path / "cameras.txt", f"# Camera list\n1 PINHOLE {side} {side} {focal * side} "
          f"{focal * side} {side / 2} {side / 2}\n")
    monkeypatch.chdir(tmp_path)
    exec(recipe("images.txt"), {})
    views = load_folder(tmp_path, resolution=side, scale=7.0)
    spin = views.poses[0, 0] @ poses[0, 0].inverse()            # about z, which no picture tells
    assert torch.allclose(spin[2], torch.tensor([0, 0, 1.0, 0]), atol=1e-4)
    assert torch.allclose(spin @ poses[0], views.poses[0], atol=1e-4)
    assert torch.allclose(spin[:3, 3], torch.zeros(3), atol=1e-4)


def test_blender_recipe(tmp_path, monkeypatch):
    """In a stand-in for Blender, whose cameras have OpenGL's axes: x right, y up, z backwards."""
    poses, focal = cameras(3), 1.2
    camera = SimpleNamespace(data=SimpleNamespace(angle_x=2 * math.atan(0.5 / focal)))
    scene = SimpleNamespace(frame_start=1, frame_end=3, render=SimpleNamespace(), camera=camera)

    def frame_set(frame):
        scene.frame, camera.matrix_world = frame - 1, poses[0, frame - 1].double().numpy() @ FLIP

    def render(write_still):
        some = poses[:, scene.frame:scene.frame + 1]
        save(Path(scene.render.filepath), pictures(some, focal, 100)[0, 0])
    scene.frame_set = frame_set
    monkeypatch.setitem(sys.modules, "bpy", SimpleNamespace(
        context=SimpleNamespace(scene=scene),
        path=SimpleNamespace(abspath=lambda path: path.replace("/", str(tmp_path), 1)),
        ops=SimpleNamespace(render=SimpleNamespace(render=render))))
    exec(recipe("bpy"), {})
    check(load_folder(tmp_path / "capture", resolution=100, scale=1.0), poses)


@pytest.mark.parametrize("top", ["srn_cars/", ""])
def test_subset_recipe(srn, tmp_path, monkeypatch, top):
    """The first objects of an archive, whether or not it has a top folder, and nothing else."""
    root, poses, held_out = srn
    with ZipFile(tmp_path / "srn_cars.zip", "w") as archive:
        for path in root.rglob("*"):                            # folders have entries of their own
            archive.write(path, top + str(path.relative_to(root)))
    monkeypatch.chdir(tmp_path)
    exec(recipe("srn_cars.zip").replace("200", "2").replace("50", "1"), {})
    check(load_srn(tmp_path / "data" / top, resolution=128), poses[:2])
    check(load_srn(tmp_path / "data" / top, seed=-1, resolution=128), held_out[:1])


# renderdiffusion.py: small models, and what stands in for their parts ---------------------------

TINY = dict(resolution=16, plane_size=16, plane_channels=4, unet_channels=16, mlp_hidden=16,
            samples=8, batch=4, rays=64, steps=4, other_side=0.0, device="cpu")
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


def render_field(field, poses=PAIR, **changes):
    """What a function of points -> density, colour shows on a background of 0.25 -> rgb in [0, 1],
    depth, opacity; it stands in for planes and MLP."""
    model = tiny_model(background=(-0.5, -0.5, -0.5), **changes)
    model.mlp.forward = lambda points, features: field(points)
    rgb, depth, opacity = model.render(torch.zeros(len(poses), 3, 4, 16, 16), poses)
    return rgb / 2 + 0.5, depth, opacity


class Greys:
    """The exact denoiser of pictures x0 = g + e: one grey g ~ N(mean, spread^2) for all pixels,
    e ~ N(0, grain^2) for each. Its "planes" are the picture; it notes what it is asked.
    """
    mean, spread, grain = 0.1, 0.2, 0.1

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

    def render(self, planes, poses, focal=None, resolution=None, fine=True):
        return planes, planes[:, 0], planes[:, 0]

    def levels(self):
        """The noise levels it was asked at, which must fall."""
        levels = [t for t, _ in self.asked]
        assert levels == sorted(set(levels), reverse=True)
        return levels


def train_quietly(monkeypatch, config, **kwargs):
    """`train`, without what it evaluates and draws at the end."""
    monkeypatch.setattr(rd, "health", lambda *_: "")
    return train(config, **kwargs)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The path of a checkpoint after four steps."""
    out = tmp_path_factory.mktemp("trained")
    train(tiny(out=str(out)))
    return out / "clevr1.pt"


# Configuration ----------------------------------------------------------------------------------

BAD_FIELDS = dict(
    data=(3,), resolution=(8, 48, 512), focal=(0.0,), radius=(-2.7,), plane_size=(8, 40),
    background=((0.0, 0.0), (0.0, 0.0, 2.0)), elevation=((0.0, math.nan),), unet_channels=(0, 24),
    plane_channels=(0,), mlp_hidden=(0,), samples=(0,), fine_samples=(-1,), timesteps=(0,),
    schedule=("cos",), loss=("huber",), clean=(1.0,), batch=(0, 2.5, "4"), rays=(-1,), seed=(-1,),
    steps=(0, math.nan), minutes=(-1.0, math.inf), lr=(0.0, -1.0, math.nan), ema=(1.0,),
    scenes=(-1,), views=(0,), resume=("yes",))


def test_a_bad_field_is_named_in_one_line():
    assert Config().validate() == Config()
    for name, value in ((name, value) for name, bad in BAD_FIELDS.items() for value in bad):
        with pytest.raises(ValueError, match=rf"\A.*\b{name}\b.*\Z"):
            Config(**{name: value}).validate()


# Noise schedule ---------------------------------------------------------------------------------

LEVELS = [(1, 0), (2, 1), (500, 499), (500, 20), (1000, 0), (1000, 999), (1000, 980), (1000, 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_alpha_bar_goes_from_one_to_nearly_zero_by_the_papers_values(kind):
    for T in (1, 2, 10, 1000):
        kept = NoiseSchedule(T, kind).alpha_bar
        assert kept.shape == (T + 1,) and kept[0] == 1 and 0 < kept[T] < 0.01
        assert (kept.diff() < 0).all()
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    linear = np.cumprod(1 - np.append(0, np.linspace(1e-4, 0.02, 1000)))
    expected = cosine / cosine[0] if kind == "cosine" else linear
    np.testing.assert_allclose(kept[:999], expected[:999], rtol=1e-3, atol=1e-7)


def coefficients(schedule, t, s, eta):
    """The posterior's mean is a x0 + b x_t -> a, b, variance."""
    x0, x_t = torch.eye(2, dtype=torch.float64)[:, :, None]
    mean, variance = schedule.posterior(x0, x_t, t, s, eta)
    return *mean.flatten().tolist(), float(variance.max())


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_posterior_is_bayes_and_ddim(kind):
    """N(x_s; sqrt(ab_s) x0, 1 - ab_s) N(x_t; sqrt(r) x_s, 1 - r), a product of Gaussians in x_s."""
    schedule = NoiseSchedule(1000, kind)
    for t, s in LEVELS:
        ab_t, ab_s = (float(schedule.alpha_bar[i]) for i in (t, s))
        if s == 0:                                          # nothing is left to be drawn
            assert all(coefficients(schedule, t, s, eta) == (1, 0, 0) for eta in (0.0, 1.0))
            continue
        r = ab_t / ab_s
        precision = 1 / (1 - ab_s) + r / (1 - r)
        bayes = ab_s ** 0.5 / (1 - ab_s) / precision, r ** 0.5 / (1 - r) / precision, 1 / precision
        assert coefficients(schedule, t, s, 1.0) == pytest.approx(bayes, rel=2e-3, abs=1e-6)
        b = ((1 - ab_s) / (1 - ab_t)) ** 0.5                # x_t's own noise, at the level of s
        ddim = ab_s ** 0.5 - b * ab_t ** 0.5, b, 0.0
        assert coefficients(schedule, t, s, 0.0) == pytest.approx(ddim, abs=2e-3)
        a, b, variance = coefficients(schedule, t, s, 0.5)  # q(x_s | x0) comes out, whatever eta
        assert a + b * ab_t ** 0.5 == pytest.approx(ab_s ** 0.5, abs=1e-4)
        assert b * b * (1 - ab_t) + variance == pytest.approx(1 - ab_s, abs=1e-5, rel=1e-3)
        assert variance == pytest.approx(bayes[2] / 4, rel=2e-3)
    for t, u, s in ((1000, 700, 300), (600, 599, 2), (40, 20, 0)):      # two steps make one
        (a1, b1, v1), (a2, b2, v2) = (coefficients(schedule, *i, 1.0) for i in ((t, u), (u, s)))
        both = a2 + b2 * a1, b2 * b1, v2 + b2 * b2 * v1
        assert both == pytest.approx(coefficients(schedule, t, s, 1.0), abs=1e-4)


def test_levels_may_differ_within_a_batch():
    schedule, t, s = NoiseSchedule(1000), torch.tensor([1000, 7, 300]), torch.tensor([3, 0, 299])
    x0, x_t = torch.randn(2, 3, 3, 8, 8)
    for i, mean in enumerate(schedule.posterior(x0, x_t, t, s)[0]):
        alone = schedule.posterior(x0[i:i + 1], x_t[i:i + 1], int(t[i]), int(s[i]))[0]
        assert torch.equal(alone[0], mean)


def test_noise_has_the_stated_mean_and_variance():
    schedule, generator = NoiseSchedule(1000), torch.Generator().manual_seed(0)
    x0 = torch.full((1, 1, 400, 400), 0.7)
    noise = torch.randn(x0.shape, generator=generator)
    assert torch.equal(schedule.add_noise(x0, 0, noise), x0)
    for t in (1, 100, 500, 900, 1000):
        kept, x_t = float(schedule.alpha_bar[t]), schedule.add_noise(x0, t, noise)
        assert x_t.mean().item() == pytest.approx(0.7 * kept ** 0.5, abs=0.01)
        assert x_t.var().item() == pytest.approx(1 - kept, rel=0.02)


# U-Net encoder ----------------------------------------------------------------------------------

@pytest.mark.parametrize("S, N", [(16, 16), (16, 128), (32, 64), (64, 16), (128, 32), (256, 128)])
def test_every_size_has_planes_that_depend_on_the_picture_and_on_t(S, N):
    model, x_t = tiny_model(resolution=S, plane_size=N), torch.randn(1, 3, S, S)
    planes = model.encode(x_t, 5)
    assert planes.shape == (1, 3, 4, N, N) and planes.isfinite().all()
    for other in (model.encode(x_t, 900), model.encode(x_t.flip(-1), 5)):
        assert not torch.allclose(planes, other, atol=1e-4)


@pytest.mark.parametrize("S, N", [(16, 16), (16, 64), (64, 32)])
def test_gradients_reach_every_parameter(S, N):
    torch.manual_seed(0)
    model = RenderDiffusion(tiny(resolution=S, plane_size=N))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x_t, target = torch.randn(2, 3, S, S), torch.randn(2, 50, 3)
    for _ in range(4):              # some weights start at zero and hide others in the first step
        optimizer.zero_grad()
        x0_hat = model(x_t, torch.tensor([10, 800]), PAIR, torch.randint(S * S, (2, 50)))
        compass = model.unet.facing.square().mean()         # it has a loss of its own
        ((x0_hat - target).square().mean() + compass).backward()
        optimizer.step()
    assert not [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# Triplanes and MLP ------------------------------------------------------------------------------

def test_triplanes_agree_with_a_loop():
    """In the order xy, xz, yz; the first axis along a plane's columns."""
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


def test_mlp_starts_nearly_transparent_and_never_dies():
    torch.manual_seed(0)
    mlp, points = RadianceMLP(16, 64), torch.rand(4, 500, 3) * 2 - 1
    features = torch.randn(4, 500, 16, requires_grad=True)
    density, color = mlp(points, features)
    assert density.min() > 0 and density.mean() < 2 and color.min() > 0 and color.max() < 1
    density.sum().backward()
    assert (features.grad.abs().sum(-1) > 0).float().mean() > 0.99
    assert not torch.allclose(density, mlp(-points, features)[0])               # it reads p, too


# Ray marching -----------------------------------------------------------------------------------

def test_ray_interval_agrees_with_a_search():
    torch.manual_seed(0)
    origins, directions = torch.rand(800, 3) * 4 - 2, torch.randn(800, 3)
    directions[:60] = torch.eye(3).repeat(20, 1) * torch.tensor([1.0, -1.0]).repeat(30)[:, None]
    directions[60:120, 1] = 0                           # parallel to two faces or to four
    directions = directions / directions.norm(dim=-1, keepdim=True)
    near, far = (x[0].double() for x in rd.ray_interval(origins[None], directions[None]))
    t = torch.arange(0, 8, 0.004, dtype=torch.float64)
    at = (origins[:, None] + t[:, None] * directions[:, None]).abs().amax(-1)         # (800, t)
    inside, starts_inside = at <= 1, origins.abs().amax(-1) <= 1
    hit, miss = inside.any(1), at.amin(1) > 1.01
    first, last = t[inside.int().argmax(1)], t[len(t) - 1 - inside.flip(1).int().argmax(1)]
    assert min(x.sum() for x in (hit[:120], hit & ~starts_inside, miss, starts_inside)) > 20
    assert torch.allclose(near[hit], first[hit], atol=0.005)
    assert torch.allclose(far[hit], last[hit], atol=0.005)
    assert not near[starts_inside].any() and torch.equal(near[miss], far[miss])
    origins, directions = torch.tensor([[[-3.0, 1, 0], [1, 1, 1]]]), torch.eye(3)[None, [0, 0]]
    near, far = rd.ray_interval(origins, directions)            # along a face, from a corner
    assert (far >= near).all() and near.min() >= 0 and far.isfinite().all()


def test_composite_agrees_with_a_loop_and_a_slab():
    density, deltas = torch.rand(2, 5, 9) * 8, torch.rand(2, 5, 9) * 0.4
    density[0, 0, 3], density[0, 1], density[1] = 1e9, 0, 0.3   # a wall, nothing, uniform slabs
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
    assert torch.allclose(rgb[0, 1], background) and not weights[0, 0, 4:].any()
    assert torch.allclose(weights[1].sum(-1), 1 - torch.exp(-0.3 * deltas[1].sum(-1)), atol=1e-6)
    first = composite(density[..., 3:], color[..., 3:, :], deltas[..., 3:], background)[0][0, 0]
    assert torch.allclose(first, color[0, 0, 3])                # an opaque first sample is all


@pytest.mark.parametrize("fine", [0, 64])
@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_a_uniform_cube_agrees_with_the_closed_form(sigma, fine):
    color = torch.tensor([0.8, 0.3, 0.6])
    rgb, depth, opacity = render_field(
        lambda p: (torch.full_like(p[..., 0], sigma), color.expand_as(p)), samples=200,
        fine_samples=fine, focal=0.7)
    o, d = (x.double() for x in camera_rays(PAIR, 0.7, 16))
    a, b = (-1 - o) / d, (1 - o) / d
    near, far = torch.minimum(a, b).amax(-1).view(2, 16, 16), torch.maximum(a, b).amin(-1)
    length = (far.view(2, 16, 16) - near).clamp(min=0)
    filled, hit = 1 - torch.exp(-sigma * length), length > 0
    assert torch.allclose(opacity.double(), filled, atol=1e-5)
    shown = filled[:, None] * color.view(3, 1, 1) + (1 - filled[:, None]) * 0.25
    assert torch.allclose(rgb.double(), shown, atol=1e-5)
    ends = near + (filled / sigma if sigma else length)         # what is left ends at the exit
    assert torch.allclose(depth.double()[hit], ends[hit], atol=2e-3) and depth.isfinite().all()
    assert hit.any() and not hit.all()


def test_a_soft_sphere_converges_to_the_closed_form():
    """Density 20 (1 - |p|^2 / r^2): a chord of half length h integrates to 80 h^3 / 3r^2."""
    def field(p):
        return 20 * (1 - p.square().sum(-1) / 0.64).clamp(min=0), torch.ones_like(p)
    aside = torch.linalg.cross(*camera_rays(PAIR, 1.6, 16)).square().sum(-1).view(2, 16, 16)
    expected = 1 - torch.exp(-80 / 3 * (0.64 - aside).clamp(min=0) ** 1.5 / 0.64)
    errors = [(render_field(field, samples=K, fine_samples=0)[2] - expected).abs().max()
              for K in (8, 32, 128)]
    assert errors[2] < 1e-3 and errors[2] < errors[1] / 4 < errors[0] / 16


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
    assert rd.importance_samples(edges[None, None], 0 * weights[None, None], u).isfinite().all()


def test_importance_samples_sharpen_a_thin_shell():
    def field(p):
        return 60 * torch.exp(-((p.norm(dim=-1) - 0.6) / 0.04) ** 2), p.sign() / 2 + 0.5
    truth = render_field(field, samples=2000)[0]
    coarse, more, fine = (
        (render_field(field, samples=K, fine_samples=F)[0] - truth).square().mean()
        for K, F in ((48, 0), (96, 0), (48, 48)))
    assert fine < more / 2 and more < coarse


def rays(count, seed=0):
    """Rays (1, R, 3) in float64 from outside towards the middle of the cube."""
    generator = torch.Generator().manual_seed(seed)
    origins = 4 * torch.nn.functional.normalize(
        torch.randn(1, count, 3, generator=generator).double(), dim=-1)
    aim = torch.rand(1, count, 3, generator=generator).double() - 0.5
    return origins, torch.nn.functional.normalize(aim - origins, dim=-1)


@pytest.mark.parametrize("fine", [0, 5])
def test_gradients_of_marching_agree_with_finite_differences(fine):
    """With importance samples of the colour alone: where those lie is held fixed on purpose."""
    def show(density, color):
        def field(points):
            waves = torch.sin(points @ torch.tensor([[3.0, 1, 2], [1, -2, 1]]).double().T)
            return (torch.nn.functional.softplus(waves @ density[:2] + density[2]),
                    torch.sigmoid(waves @ color[:2] + color[2]))
        jitter = torch.linspace(0.1, 0.9, 3 * (6 + fine)).double().view(1, 3, -1)
        return rd.march(field, *rays(3), 6, fine, torch.tensor([0.2, 0.5, 0.9]).double(), jitter)
    torch.manual_seed(0)
    density, color = torch.randn(3).double(), torch.randn(3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(show, (density.requires_grad_(not fine), color))


def test_gradients_of_planes_and_mlp_agree_with_finite_differences():
    torch.manual_seed(0)
    mlp = RadianceMLP(2, 4).double()
    planes = (4 * torch.randn(1, 3, 2, 4, 4)).double().requires_grad_()

    def show(planes, *weights):
        for weight, value in zip(mlp.layers[::2], weights):
            weight.bias.data.copy_(value)
        return rd.march(lambda p: mlp(p, sample_triplanes(planes, p)), *rays(4), 7, 0,
                        torch.zeros(3).double())
    assert torch.autograd.gradcheck(show, (planes,))
    rgb, depth, opacity = show(planes)
    weight = mlp.layers[4].weight
    (rgb.sum() + depth.sum() + opacity.sum()).backward()
    for i, j in ((0, 0), (0, 3), (2, 1)):
        with torch.no_grad():
            sums = []
            for step in (1e-6, -2e-6):
                weight[i, j] += step
                sums.append(sum(x.sum() for x in show(planes)))
            weight[i, j] += 1e-6
        assert weight.grad[i, j] == pytest.approx((sums[0] - sums[1]).item() / 2e-6, rel=1e-5)


@pytest.mark.parametrize("fine", [False, True])
def test_more_samples_converge(fine):
    """Planes are bilinear, so twice the samples err at least a third less; 512 are exact."""
    torch.manual_seed(0)
    planes, counts = 6 * torch.randn(2, 3, 4, 16, 16), (16, 32, 64, 128, 256, 512, 4096)
    shown = [tiny_model(samples=K, fine_samples=fine * K).render(planes, PAIR)[0] for K in counts]
    errors = [(some - shown[-1]).square().mean().sqrt().item() for some in shown[:-1]]
    assert all(b < a / 1.5 for a, b in zip(errors, errors[1:])) and errors[-1] < 2e-3 < errors[0]


EDGES = [       # origin, direction: rays that a formula for a cube gets wrong first
    ((-3, 1, 0), (1, 0, 0)), ((-3, 1, 1), (1, 0, 0)), ((1, 1, 1), (1, 0, 0)),   # face, edge, corner
    ((1, 1, 1), (-1, -1, -1)), ((0, 0, 0), (0, 0, 1)), ((1, 0, 0), (-1, 0, 0)),     # from inside
    ((1, 0, 0), (0, 1, 0)), ((-1, -1, -1), (0, 0, 1)), ((0.5, 0.5, 1), (0, 1, 0)),  # from a face
    ((3, 3, 0), (-1, 1, 0)), ((5, 0, 0), (1, 0, 0)), ((9, 9, 9), (0, 0, -1)),       # missing it
    ((0, 0, 3), (1e-12, 0, -1)), ((2, 0, 0), (-1, 1e-7, 0)), ((1e3, 0, 0), (-1, 0, 0)),
    ((-2, -1, 0), (1, 1, 0)), ((1 + 1e-7, 0, 5), (0, 0, -1)), ((1 - 1e-7, 0, 5), (0, 0, -1))]


@pytest.mark.parametrize("fine", [0, 8])
@pytest.mark.parametrize("sigma", [0.0, 1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e10, 1e30, 3e38])
def test_any_density_on_any_ray_gives_finite_values_and_gradients(sigma, fine):
    torch.manual_seed(0)
    origins, directions = torch.tensor(EDGES).float().transpose(0, 1)[:, None]
    directions = torch.nn.functional.normalize(directions, dim=-1)
    for spread in (0.0, 1.0):                           # everywhere the same, or here and there
        density = torch.where(torch.rand(1, len(EDGES) * 24) < spread / 2, 0, sigma)
        density.requires_grad_()
        color = torch.rand(1, len(EDGES) * 24, 3, requires_grad=True)
        rgb, depth, opacity = rd.march(
            lambda p: (density[:, :p.shape[1]], color[:, :p.shape[1]]), origins, directions, 16,
            fine, torch.tensor([0.2, 0.5, 0.9]))
        gradients = torch.autograd.grad((rgb.sum() + depth.sum() + opacity.sum()), (density, color))
        assert all(x.isfinite().all() for x in (rgb, depth, opacity, *gradients))
        assert rgb.min() >= 0 and rgb.max() <= 1.0001 and depth.min() >= 0
        assert opacity.min() >= 0 and opacity.max() <= 1.0001
        if sigma >= 1e4 and not spread:                 # solid: opaque where the cube is hit at all
            inside = [i for i, (o, d) in enumerate(EDGES) if i in (3, 4, 5, 12, 13, 14, 15)]
            assert (opacity[0, inside] > 0.99).all() and not opacity[0, 9:12].any()


def test_one_picture_one_ray_and_one_sample_are_enough():
    model, image = tiny_model(samples=1, fine_samples=0), torch.rand(1, 3, 16, 16) * 2 - 1
    planes = model.encode(image, 3)
    origins, directions = camera_rays(PAIR[:1], 1.6, 16)
    for fine in (0, 1):
        model.config.fine_samples = fine
        whole = model.render(planes, PAIR[:1])[0].flatten(2).mT / 2 + 0.5
        one = model.march(planes, origins[:, 77:78], directions[:, 77:78])
        assert one[0].shape == (1, 1, 3) and torch.allclose(one[0][0, 0], whole[0, 77], atol=1e-5)
        assert all(x.isfinite().all() for x in one)
    with torch.no_grad():                       # one sample is the middle of the ray's interval
        near, far = rd.ray_interval(origins, directions)
        points = origins + (near + far)[..., None] / 2 * directions
        density, color = model.mlp(points, sample_triplanes(planes, points))
        alpha = (1 - torch.exp(-density * (far - near)))[..., None]
        model.config.fine_samples = 0
        assert torch.allclose(model.render(planes, PAIR[:1])[0].flatten(2).mT / 2 + 0.5,
                              alpha * color + (1 - alpha) * model.background, atol=1e-5)


# The model --------------------------------------------------------------------------------------

@pytest.mark.parametrize("fine", [0, 8])
def test_chunks_pixels_batches_and_repetitions_equal_the_whole(monkeypatch, fine):
    model, x_t = tiny_model(fine_samples=fine), torch.randn(2, 3, 16, 16)
    t, pixels = torch.tensor([3, 700]), torch.stack([torch.randperm(256)[:40] for _ in range(2)])
    planes = model.encode(x_t, t)
    whole = model.render(planes, PAIR)
    assert all(torch.equal(a, b) for a, b in zip(whole, model.render(planes, PAIR)))
    assert torch.equal(whole[0], model(x_t, t, PAIR))
    picked = whole[0].flatten(2).mT[torch.arange(2)[:, None], pixels]          # (B, n, 3)
    assert torch.allclose(model(x_t, t, PAIR, pixels), picked, atol=1e-5)
    for i in range(2):
        single = model.encode(x_t[i:i + 1], int(t[i]))
        assert torch.allclose(single, planes[i:i + 1], atol=1e-5)
        for one, many in zip(model.render(single, PAIR[i:i + 1]), whole):
            assert torch.allclose(one, many[i:i + 1], atol=1e-5)
    monkeypatch.setattr(RenderDiffusion, "points_at_once", 600)
    calls, march = [], model.march
    monkeypatch.setattr(model, "march", lambda *a, **k: calls.append(0) or march(*a, **k))
    parts = model.render(planes, PAIR)
    assert len(calls) > 4 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts))


def test_another_resolution_and_focal_show_the_same_scene():
    model, planes = tiny_model(), torch.randn(2, 3, 4, 16, 16)
    small, double, finer = (model.render(planes, PAIR, resolution=S) for S in (16, 32, 48))
    zoomed = model.render(planes, PAIR, focal=2 * model.config.focal)
    for a, b, c, d in zip(small, finer, zoomed, double):
        assert torch.allclose(a, b[..., 1::3, 1::3], atol=1e-4)     # the middle of three by three
        assert torch.allclose(c, d[..., 8:24, 8:24], atol=1e-4)     # and of twice the picture


@pytest.mark.parametrize("fine", [0, 8])
def test_camera_and_volume_turned_together_give_the_same_picture(fine):
    model, planes = tiny_model(fine_samples=fine), 4 * torch.randn(1, 3, 4, 16, 16)
    model.mlp.layers[0].weight[:, :3] = 0                       # the field, without p itself
    before = model.render(planes, orbit(25.0, 30.0, 2.7)[None])
    assert before[0].std() > 0.05
    for quarter in (1, 2, 3):       # (x, y, z) -> (-y, x, z): xz becomes yz, yz a mirrored xz
        xy, xz, yz = planes.unbind(1)
        planes = torch.stack([xy.flip(-2).mT, yz.flip(-1), xz], dim=1)
        after = model.render(planes, orbit(25.0 + 90 * quarter, 30.0, 2.7)[None])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after))


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_angles_are_multiplied(count):
    angle, length = torch.linspace(-3, 3, 13), torch.linspace(0.5, 1, 13)
    z = length[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    times = torch.stack([(count * angle).cos(), (count * angle).sin()], dim=1)
    assert torch.allclose(rd.multiply_angle(z, count), length[:, None] ** count * times, atol=1e-5)


def test_planes_know_of_the_camera_fold_times_its_azimuth_alone():
    """What is drawn cannot depend on which of four sides the compass takes for its own."""
    model, x_t = tiny_model(fold=4), torch.randn(1, 3, 16, 16)

    def planes(azimuth):
        angle = math.radians(azimuth)
        model.unet.compass.forward = lambda x: torch.tensor([[math.cos(angle), math.sin(angle)]])
        return model.encode(x_t, 100)
    assert all(torch.allclose(planes(20), planes(20 + turn), atol=1e-4) for turn in (90, 180, 270))
    assert (planes(20) - planes(65)).abs().max() > 1e-2
    assert tiny_model(fold=0).unet.compass is None
    model = tiny_model(fold=4).requires_grad_(True)         # no picture's error teaches the compass
    model(x_t, 100, PAIR[:1]).square().mean().backward()
    assert all(weight.grad is None for weight in model.unet.compass.parameters())
    assert model.unet.turn.weight.grad.abs().max() > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_compass_is_taught_the_camera_of_the_picture_that_is_encoded(share):
    ema = tiny_model(other_side=share, other_side_from=0.0, shift=0.3)
    x0, azimuth = torch.rand(8, 3, 16, 16) * 2 - 1, torch.arange(8) * 45.0
    seen = azimuth.roll(1).deg2rad() if share else azimuth.deg2rad()
    for shift in (0.0, 0.3):
        facing = torch.stack([seen.cos() + shift, seen.sin()], dim=1)

        def model(x_t, t, poses, pixels, jitter):
            return x0.flatten(2).mT[torch.arange(8)[:, None], pixels]
        model.unet = SimpleNamespace(facing=facing)
        poses = orbit(azimuth, 30, 5.0)
        loss = rd.denoising_loss(model, ema, x0, poses, 0.5)
        assert loss.item() == pytest.approx(0.1 * shift ** 2 / 2, abs=1e-6)
        elevation = torch.full((8, 1), math.sin(math.radians(30)) - shift)
        model.unet.facing = torch.cat([facing, elevation], dim=1)       # if features are laid down
        loss = rd.denoising_loss(model, ema, x0, poses, 0.5)
        assert loss.item() == pytest.approx(0.1 * (1 + 25) * shift ** 2 / 3, abs=1e-6)


@pytest.mark.parametrize("focal, radius", [(1.6, 2.9), (1.2, 4.0)])
def test_features_are_laid_where_the_camera_sees_the_ground(focal, radius):
    """A picture whose pixels hold their own place, against a pinhole projection of the ground."""
    azimuth, elevation = torch.tensor([0.0, 70.0, 200.0, 315.0]), torch.tensor([20.0, 35, 50, 80])
    poses, a, e = orbit(azimuth, elevation, radius), azimuth.deg2rad(), elevation.deg2rad()
    facing = torch.stack([a.cos(), a.sin(), e.sin()], dim=1)
    middles = (torch.arange(16) + 0.5) / 16
    place = torch.stack(torch.meshgrid(middles, middles, indexing="xy")).expand(4, 2, 16, 16)
    laid = rd.lay_down(place, facing, focal, radius)                            # (4, 2, y, x)
    x, y = torch.meshgrid(2 * middles - 1, 2 * middles - 1, indexing="xy")
    ground = torch.stack([x, y, 0 * x], dim=-1).view(-1, 3)
    seen = (ground - poses[:, None, :3, 3]) @ poses[:, :3, :3]                  # (4, 256, 3)
    expected = focal * seen[..., :2] / seen[..., 2:] + 0.5
    inside = ((expected > 1 / 32) & (expected < 31 / 32)).all(-1)
    assert inside.float().mean() > 0.4
    assert torch.allclose(laid.flatten(2).mT[inside], expected[inside], atol=1e-5)


@pytest.mark.parametrize("fold", [0, 4])
def test_a_model_that_lays_features_down(monkeypatch, fold):
    """Its planes depend on the estimated camera, and no picture's error teaches the compass."""
    model = tiny_model(lay_down=True, fold=fold).requires_grad_(True)
    x_t = torch.randn(1, 3, 16, 16)
    model(x_t, 100, PAIR[:1]).square().mean().backward()
    assert all(weight.grad is None for weight in model.unet.compass.parameters())
    assert model.unet.facing.shape == (1, 3)
    sides, lay = [], rd.lay_down
    monkeypatch.setattr(rd, "lay_down", lambda h, *camera: sides.append(len(h[0, 0])) or lay(
        h, *camera))
    model.encode(x_t, 100)
    assert sides == [4, 8, 4]                                   # the middle, and every skip

    def planes(azimuth, sine):
        facing = torch.tensor([[math.cos(azimuth), math.sin(azimuth), sine]])
        model.unet.compass.forward = lambda x: facing
        return model.encode(x_t, 100)
    for other in ((math.pi / 2, 0.5), (0.0, 0.7)):              # `fold` alone sees no quarter turn
        assert (planes(0.0, 0.5) - planes(*other)).abs().max() > 1e-2


def test_the_compass_finds_the_camera_by_light_and_shadow():
    """Chance is 0.5. Over 3 seeds: 0.05 to 0.12."""
    torch.manual_seed(0)
    compass, errors = rd.Compass(16, 2, 1), []
    adam = torch.optim.Adam(compass.parameters(), 3e-3)
    for step in range(150):
        views = synthetic("clevr1", 32, 1, 16, start=32 * step, depth=False)
        truth = torch.nn.functional.normalize(views.poses[:, 0, :2, 3], dim=1)
        loss = (compass(views.images[:, 0]) - truth).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        errors.append(loss.item())
    assert np.mean(errors[-20:]) < 0.25


def test_bfloat16_agrees_with_float32():
    """Stated tolerance: planes within 3 % of their spread, pictures within 40 dB."""
    torch.manual_seed(0)
    model, x_t = tiny_model(unet_channels=32), torch.randn(4, 3, 16, 16)
    t, poses = torch.tensor([0, 100, 500, 1000]), PAIR.repeat(2, 1, 1)
    exact = model.encode(x_t, t)
    picture = model.render(exact, poses)[0]
    model.bf16 = True
    close = model.encode(x_t, t)
    assert close.dtype == torch.float32 and not torch.equal(close, exact)
    assert (close - exact).square().mean().sqrt() < 0.03 * exact.std()
    assert psnr(model.render(close, poses)[0] / 2 + 0.5, picture / 2 + 0.5).min() > 40
    model.requires_grad_(True)
    gradients = []
    for model.bf16 in (False, True):
        model.zero_grad()
        error = model(x_t, t, poses, torch.arange(64).expand(4, -1)).square().mean()
        (error + model.unet.facing.square().mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# Training ---------------------------------------------------------------------------------------

def watch_loss(ema, x0, poses, progress=0.0):
    """One loss of a model that answers with the truth, so it is 0 -> the x_t and t it was asked."""
    asked = []

    def model(x_t, t, given, pixels, *_, **__):
        assert torch.equal(given, poses)
        asked.append((x_t, t))
        return x0.flatten(2).mT[torch.arange(len(x0))[:, None], pixels]
    assert rd.denoising_loss(model, ema, x0, poses, progress) == 0
    return asked[0]


def test_every_noise_level_is_trained_from_clean_to_pure_noise():
    ema, poses = tiny_model(timesteps=20, fold=0), orbit(torch.arange(10) * 36.0, 30, 2.7)
    x0, levels, noisiest = torch.rand(10, 3, 16, 16) * 2 - 1, [], []
    for _ in range(400):
        x_t, t = watch_loss(ema, x0, poses)
        assert torch.equal(x_t[t == 0], x0[t == 0])
        levels.append(t)
        noisiest.append(x_t[t == 20])
    share, clean = torch.bincount(torch.cat(levels), minlength=21) / 4000, ema.config.clean
    assert len(share) == 21 and abs(share[0] - clean) < 0.02
    assert (share[1:] - (1 - clean) / 20).abs().max() < 0.02
    assert torch.cat(noisiest).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("chance", [1.0, 0.25])
def test_rays_go_where_something_is_seen(chance):
    ema, counts = tiny_model(empty_rays=chance, rays=8, fold=0), torch.zeros(2, 256)
    x0 = (ema.background * 2 - 1).view(1, 3, 1, 1).repeat(2, 1, 16, 16)
    x0[0, 1, 4:7, 9] += 0.1                         # three pixels and those that touch them: 15
    poses = PAIR

    def model(x_t, t, poses, pixels, jitter):
        assert pixels.shape == (2, 8) and all(len(row.unique()) == 8 for row in pixels)
        assert jitter.shape == (2, 8, ema.config.samples + ema.config.fine_samples)
        counts.scatter_add_(1, pixels, torch.ones(2, 8))
        return x0.flatten(2).mT[torch.arange(2)[:, None], pixels]
    for _ in range(4000):
        rd.denoising_loss(model, ema, x0, poses, 0.0)
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[3:8, 8:11] = True
    first, second = counts.view(2, 16, 16) / 4000
    assert (second - 8 / 256).abs().max() < 0.015           # nothing to see: all alike
    ratio = (first[~near].mean() / first[near].mean()).item()
    assert ratio == pytest.approx(chance, rel=0.15)         # without replacement: nearly
    assert first[near].std() < 0.15 * first[near].mean()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_other_sides_are_encoded_late_and_in_their_share(share):
    ema = tiny_model(clean=0.99, other_side=share, other_side_from=0.4, fold=0)
    x0, poses = torch.rand(8, 3, 16, 16) * 2 - 1, orbit(torch.arange(8) * 45.0, 30, 2.7)
    x_t, t = watch_loss(ema, x0, poses, progress=0.3)
    assert torch.equal(x_t[t == 0], x0[t == 0])
    planes, replaced = ema.encode(x0, 0), []
    shown = torch.stack([ema.render(planes, pose.expand(8, 4, 4))[0] for pose in poses])
    for _ in range(8):
        x_t, t = watch_loss(ema, x0, poses, progress=0.5)
        for i in (t == 0).nonzero()[:, 0].tolist():
            replaced.append(not torch.equal(x_t[i], x0[i]))
            error = (shown[:, i] - x_t[i]).abs().amax((1, 2, 3))
            assert not replaced[-1] or (error.min() < 1e-4 and error.argmin() != i)
    assert np.mean(replaced) == pytest.approx(share, abs=0.1)


def test_other_sides_show_scenes_that_are_moved_along_the_ground():
    """The encoder gets a moved scene from a camera that stays; the target's camera moves along."""
    ema, asked = tiny_model(clean=0.99, other_side=0.5, other_side_from=0.0, shift=0.3, fold=0), []
    x0, poses = torch.rand(8, 3, 16, 16) * 2 - 1, orbit(torch.arange(8) * 45.0, 30, 2.7)

    def model(x_t, t, given, pixels, *_):
        asked.append((x_t, t, given))
        return x0.flatten(2).mT[torch.arange(8)[:, None], pixels]
    assert rd.denoising_loss(model, ema, x0, poses, 0.5) == 0
    (x_t, t, given), = asked
    moved = given - poses
    assert moved[4:].abs().max() == 0 and 0.1 < moved[:4].abs().max() < 0.3
    assert (moved[:4, :2, 3] != 0).all() and (moved.flatten(1) != 0).sum() == 8     # x and y alone
    planes = ema.encode(x0, 0)
    for i in (t == 0).nonzero()[:, 0].tolist():
        # a scene moved by d, sampled at p, is the scene at p - d: rays that start at -d
        shown = x0[i:i + 1] if i >= 4 else ema.render(planes[i:i + 1], poses[i - 1] - moved[i])[0]
        assert torch.allclose(x_t[i:i + 1], shown, atol=1e-4)


def test_one_picture_is_learnt_and_generated(monkeypatch, tmp_path):
    """Over 8 seeds: 28.8 to 37.0 dB, where the mean colour has 12.0 to 16.2."""
    config = tiny(plane_channels=8, mlp_hidden=32, samples=16, rays=128, steps=100, scenes=1,
                  lr=1e-2, loss="l2", other_side=0.0, out=str(tmp_path))
    model, truth = train_quietly(monkeypatch, config), synthetic("clevr1", 1, 1, 16)
    image, pose = truth.images[0] / 2 + 0.5, truth.poses[0]
    colour = image.mean((2, 3), keepdim=True).expand_as(image)
    for shown in (model.render(reconstruct(model, truth.images[0]), pose)[0],
                  generate(model, pose, steps=10)[0]):          # there is but one picture to draw
        assert psnr(shown / 2 + 0.5, image) > 25 > psnr(colour, image) + 8


def test_a_training_begins_with_the_weights_that_it_is_given(monkeypatch, trained, tmp_path):
    start, seen = load_checkpoint(trained), []

    def loss(model, ema, *rest):
        seen.append([copy.deepcopy(m.state_dict()) for m in (model, ema)])
        return rd.denoising_loss(model, ema, *rest)
    train_quietly(monkeypatch, tiny(init=str(trained), out=str(tmp_path), steps=1), loss=loss)
    for state in seen[0]:
        assert all(torch.equal(state[key], value) for key, value in start.state_dict().items())
    with pytest.raises(ValueError, match="another model"):
        train(tiny(init=str(trained), out=str(tmp_path), mlp_hidden=32))
    with pytest.raises(ValueError, match="give one of them"):
        train(tiny(init=str(trained), out=str(tmp_path), resume=True))
    weights = tmp_path / "shared.pt"
    save_checkpoint(weights, load_checkpoint(tmp_path / "clevr1.pt"))
    assert str(trained).encode() not in weights.read_bytes()       # nobody's folders


def test_the_learning_rate_and_the_average_follow_their_formulas(monkeypatch, tmp_path):
    rates, seen, step = [], [], torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    def loss(model, ema, *_):
        seen.append([next(m.parameters()).detach().clone() for m in (model, ema)])
        return sum(weight.square().sum() for weight in model.parameters())
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    train_quietly(monkeypatch, tiny(steps=200, lr=1e-3, ema=0.9, scenes=4, out=str(tmp_path)),
                  loss=loss)
    assert rates == pytest.approx([1e-3 * min(1, (k + 1) / 100, max(0.02, (1 - k / 200) / 0.3))
                                   for k in range(200)])
    for k, ((_, before), (weight, after)) in enumerate(zip(seen, seen[1:])):
        kept = min(0.9, (1 + k) / (10 + k))
        assert torch.allclose(after, kept * before + (1 - kept) * weight, atol=1e-6)


def test_every_step_has_new_scenes_and_none_is_held_out(monkeypatch, tmp_path):
    pictures, config = [], tiny(data="cars", out=str(tmp_path))

    def loss(model, ema, x0, *rest):
        pictures.append(x0)
        return rd.denoising_loss(model, ema, x0, *rest)
    model, views = train_quietly(monkeypatch, config, loss=loss), synthetic("cars", 16, 1, 16)
    assert torch.equal(torch.cat(pictures), views.images[:, 0])         # of 4 steps of 4
    unseen = synthetic("cars", 16, 1, 16, seed=rd.HELD_OUT).images
    assert not any(torch.equal(a, b) for a in unseen for b in views.images)
    assert model.config.focal == views.focal
    assert model.config.background == pytest.approx(views.background.tolist())
    earlier = (tmp_path / "cars.pt").read_bytes()
    pictures, config.scenes, config.views = [], 3, 2
    train_quietly(monkeypatch, config, loss=loss)
    assert (tmp_path / "cars.old.pt").read_bytes() == earlier
    fixed = synthetic("cars", 3, 2, 16).images.flatten(0, 1)
    assert all(any(torch.equal(a, b) for b in fixed) for a in torch.cat(pictures))


def test_scenes_traced_ahead_are_the_same(monkeypatch):
    """As on a GPU: several steps' scenes at once, each process its own."""
    device, config = torch.device("cpu"), tiny()
    one = [rd.training_pictures(config, device, 0, 1)[0](step) for step in range(6)]
    monkeypatch.setitem(rd.AHEAD, "cpu", 4)
    draw = rd.training_pictures(config, device, 0, 1)[0]
    assert all(map(torch.equal, sum(one, ()), sum((draw(step) for step in range(6)), ())))
    both = [rd.training_pictures(config, device, rank, 2)[0] for rank in (0, 1)]
    poses = torch.cat([draw(step)[1] for draw in both for step in range(8)])
    assert len(poses.flatten(1).unique(dim=0)) == len(poses) == 64
    assert torch.equal(both[1](5)[0], both[1](5)[0])            # also when it goes back


def test_a_compiled_training_is_the_same(monkeypatch, tmp_path):
    """By the backend that needs no C compiler and no minutes."""
    monkeypatch.setattr(rd.UNet, "compile", lambda self: torch.nn.Module.compile(
        self, backend="aot_eager"))
    one, two = (train_quietly(monkeypatch, tiny(compile=how, out=str(tmp_path / str(how))))
                for how in (False, True))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.parameters(), two.parameters()))


def same(a, b):
    """Whether two checkpoints' parts are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(monkeypatch, tmp_path):
    def interrupted(model, ema, *rest):
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)                  # what Ctrl-C does
        steps.append(0)
        return rd.denoising_loss(model, ema, *rest)
    config, steps = tiny(steps=6, lr=1e-2, out=str(tmp_path / "a")), []
    train_quietly(monkeypatch, config)
    config.out = str(tmp_path / "b")
    train_quietly(monkeypatch, config, loss=interrupted)
    half = torch.load(tmp_path / "b" / "clevr1.pt", weights_only=True)
    config.resume = True
    train_quietly(monkeypatch, config)
    whole, resumed = (torch.load(tmp_path / x / "clevr1.pt", weights_only=True) for x in "ab")
    assert (half["step"], whole["step"], resumed["step"]) == (4, 6, 6)

    assert all(same(whole[part], resumed[part]) for part in ("model", "ema", "optimizer"))
    assert not torch.equal(half["ema"]["unet.stem.weight"], whole["ema"]["unet.stem.weight"])


@pytest.mark.parametrize("then", ["ends", "is interrupted"])
def test_a_loss_that_is_not_finite_stops_and_spoils_nothing(monkeypatch, tmp_path, then):
    def loss(model, ema, *rest):
        steps.append(0)
        if len(steps) == 5 and then == "is interrupted":
            signal.raise_signal(signal.SIGINT)
        return rd.denoising_loss(model, ema, *rest) * (math.nan if len(steps) == 4 else 1)
    config, steps = tiny(steps=6, out=str(tmp_path)), []
    train_quietly(monkeypatch, config)
    before = (tmp_path / "clevr1.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="step 3"):
        train_quietly(monkeypatch, config, loss=loss)
    assert before in [path.read_bytes() for path in tmp_path.glob("clevr1*.pt")]
    for path in tmp_path.glob("clevr1*.pt"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path).parameters())


@slow
def test_two_processes_train_the_same_model_as_one(tmp_path):
    for batch, launch in ((4, ""), (2, "-m torch.distributed.run --nproc_per_node=2")):
        options = f"--steps 3 --batch {batch} --out {tmp_path / str(batch)}".split()
        subprocess.run([sys.executable, *launch.split(), HERE / "renderdiffusion.py", "train",
                        *TRAIN, *options], check=True, capture_output=True, timeout=300)
    one, two = (load_checkpoint(tmp_path / name / "clevr1.pt").parameters() for name in "42")
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, two))


@slow
def test_ctrl_c_in_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    """In the third of six. Both end with the same model, though each encodes other sides."""
    (tmp_path / "run.py").write_text(f"""import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import torch
import renderdiffusion as rd

def loss(model, ema, x0, poses, progress, rank, world):
    if rank == 1 and progress >= 2 / 6:
        signal.raise_signal(signal.SIGINT)
    return rd.denoising_loss(model, ema, x0, poses, progress, rank, world)
config = rd.{tiny(steps=6, other_side=0.5, other_side_from=0.0)}
torch.save(rd.train(config, loss).state_dict(), os.environ["RANK"] + ".pt")
""")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "run.py"],
                   check=True, capture_output=True, timeout=120, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.load(tmp_path / "out" / "clevr1.pt")["step"] == 3


@pytest.mark.parametrize("least", ["batch", "rays", "samples", "timesteps", "plane_channels"])
def test_training_with_one_of_each(monkeypatch, tmp_path, least):
    one = dict(fine_samples=1, mlp_hidden=1, other_side=1.0, other_side_from=0.0)
    model = train(tiny(**{**one, least: 1}, steps=2, out=str(tmp_path)))
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert model.render(model.encode(torch.zeros(1, 3, 16, 16), 1), PAIR[:1])[0].isfinite().all()


def test_a_training_by_the_clock_keeps_the_time_it_had_used(monkeypatch, tmp_path):
    """Six steps of a second, stopped after three for a day; the learning rate goes on too."""
    def loss(*arguments):
        if now[0] == stop_at:
            signal.raise_signal(signal.SIGINT)
        now[0] += 1
        return rd.denoising_loss(*arguments)
    now, stop_at, config = [0.0], None, tiny(minutes=0.1, lr=1e-2)
    monkeypatch.setattr(rd, "time", SimpleNamespace(time=lambda: now[0]))
    for out, resume, stop_at in (("a", False, None), ("b", False, 9.0), ("b", True, None)):
        config = replace(config, out=str(tmp_path / out), resume=resume)
        train_quietly(monkeypatch, config, loss=loss)
        now[0] += 86400 if stop_at else 0
    whole, resumed = (torch.load(tmp_path / x / "clevr1.pt", weights_only=True) for x in "ab")
    assert (whole["step"], whole["seconds"]) == (6, 6.0)
    assert all(same(whole[part], resumed[part])
               for part in ("model", "ema", "optimizer", "step", "seconds"))


@pytest.mark.parametrize("moment", ["step", "zero_grad"])
def test_ctrl_c_in_the_middle_of_a_step_loses_and_repeats_nothing(monkeypatch, tmp_path, moment):
    """It comes between the weights' update and their average's; the step is finished first."""
    def interrupting(self, *arguments, **options):
        calls.append(0)
        given = call(self, *arguments, **options)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return given
    config = tiny(steps=6, lr=1e-2, out=str(tmp_path / "a"))
    call = getattr(torch.optim.Adam, moment)
    train_quietly(monkeypatch, config)
    calls, config.out = [], str(tmp_path / "b")
    monkeypatch.setattr(torch.optim.Adam, moment, interrupting)
    train_quietly(monkeypatch, config)
    assert len(calls) == 3
    config.resume = True
    train_quietly(monkeypatch, config)
    whole, resumed = (torch.load(tmp_path / x / "clevr1.pt", weights_only=True) for x in "ab")
    assert all(same(whole[part], resumed[part]) for part in ("model", "ema", "optimizer", "step"))


KILLING = """
import itertools, os, random, signal, sys, time
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
import renderdiffusion as rd
from test_renderdiffusion import tiny
clock = itertools.count(0, 121)                     # two minutes a look: it saves after each step
rd.time = SimpleNamespace(time=lambda: next(clock))
rd.health = lambda *_: ""
out, last, moment = sys.argv[1], 0, random.Random(0)
path = out + "/clevr1.pt"
for k in range(20):
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        rd.train(tiny(steps=10 ** 6, out=out, resume=k > 0))
        os._exit(1)
    limit = time.monotonic() + 60
    while os.stat(path).st_mtime_ns == saved if k else not os.path.exists(path):
        time.sleep(0.01)                            # it has saved once; then at any moment
        assert time.monotonic() < limit, "it saves nothing"
    time.sleep(moment.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
    rd.load_checkpoint(path)
    step, saved = torch.load(path, weights_only=True)["step"], os.stat(path).st_mtime_ns
    assert step >= last, (step, last)
    last = step
print(last)
"""


@slow
def test_a_training_killed_at_twenty_random_moments_leaves_a_whole_checkpoint(tmp_path):
    """Each goes on from where the one before was killed; forks of one process, to be quick."""
    done = subprocess.run([sys.executable, "-c", KILLING, str(tmp_path)], capture_output=True,
                          text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0 and int(done.stdout) > 2, done.stderr


@slow
@pytest.mark.parametrize("seed", range(10))
def test_training_starts_well_from_every_seed(monkeypatch, tmp_path, seed):
    """After 120 steps held-out objects show, and the ground round them less."""
    config = tiny(seed=seed, scenes=100, steps=120, lr=3e-3, samples=12, out=str(tmp_path))
    model, views = train_quietly(monkeypatch, config), synthetic("clevr1", 16, 2, 16, rd.HELD_OUT)
    opacity = model.render(model.encode(views.images[:, 0], 0), views.poses[:, 1])[2]
    is_object = (views.images[:, 1] - 0.5).abs().amax(1) > 0.1
    assert opacity[is_object].mean() > 0.3 and opacity[~is_object].mean() < 0.5
    assert opacity[is_object].mean() > 1.5 * opacity[~is_object].mean()


# Sampling ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_have_the_distribution_of_the_data(eta):
    model = Greys()
    images, _ = generate(model, PAIR[:1].expand(400, 4, 4), steps=200, eta=eta)
    grey = images.mean((1, 2, 3))
    assert grey.mean().item() == pytest.approx(Greys.mean, abs=0.03)
    assert grey.std().item() == pytest.approx(Greys.spread, rel=0.1)
    assert (images - grey.view(-1, 1, 1, 1)).std().item() == pytest.approx(Greys.grain, rel=0.1)
    assert len(model.levels()) == 200 and model.levels()[0] == 1000


def test_levels_rise_and_share_log_snr_evenly():
    for T, kind, top in ((1000, "cosine", None), (1000, "linear", 300), (50, "cosine", 40),
                         (7, "cosine", 1)):
        schedule, end = NoiseSchedule(T, kind), top or T
        for steps in range(1, end + 1):
            levels = noise_levels(schedule, steps, top)
            assert len(levels) == steps + 1 and levels[0] == 0 and levels[-1] == end
            assert levels == sorted(set(levels))
        for steps in (0, end + 1):
            with pytest.raises(ValueError, match=f"from 1 to {end}, not {steps}"):
                noise_levels(schedule, steps, top)
    schedule = NoiseSchedule(100_000)
    gaps = schedule.alpha_bar[noise_levels(schedule, 20)[1:-1]].logit().diff()
    assert gaps.mean() < -0.5 and gaps.std() < 0.05 * gaps.mean().abs()


def test_without_fresh_noise_sampling_follows_the_flow():
    """A Gaussian's flow from x_T to x_0 keeps every quantile (Song et al. 2021, Score-based
    generative modeling, eq. 13): here the grey of pictures of one grey."""
    class Grey(Greys):
        grain = 1e-4

    def error(steps, first_order=False):
        model = Grey()
        levels = noise_levels(model.schedule, steps)
        x = x_T = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        if first_order:                                             # DDIM
            for t, s in zip(levels[:0:-1], levels[-2::-1]):
                x, _ = model.schedule.posterior(model.encode(x, t), x, t, s, eta=0)
        else:
            x, _ = generate(model, PAIR[:1].expand(50, 4, 4), steps, eta=0)
            assert torch.equal(model.asked[0][1], x_T) and model.levels() == levels[:0:-1]
        ab = float(model.schedule.alpha_bar[-1])
        spread = (ab * Grey.spread ** 2 + (1 - ab) / x[0].numel()) ** 0.5      # of x_T's grey
        exact = Grey.mean * (1 - ab ** 0.5 * Grey.spread / spread)
        exact = exact + Grey.spread / spread * x_T.mean((1, 2, 3))
        return (x.mean((1, 2, 3)) - exact).square().mean().sqrt().item()
    errors = [error(steps) for steps in (10, 20, 160)]
    assert errors[0] < 0.01 and errors[1] < 0.001 and errors[2] < 1e-4
    assert error(20, first_order=True) > 10 * errors[1]


def test_sampling_can_be_watched():
    model, frames = tiny_model(), []
    x_T, levels = torch.randn(2, 3, 16, 16), noise_levels(tiny_model().schedule, 4)
    images, _ = rd.denoise(model, x_T, PAIR, levels, 0, torch.Generator(),
                           watch=lambda *frame: frames.append(frame))
    times, x_t, x0_hat, depth = zip(*frames)
    assert list(times) == levels[:0:-1] and torch.equal(x_t[0], x_T)
    assert torch.equal(x0_hat[-1], images) and all(d.shape == (2, 16, 16) for d in depth)
    for t, x, guess in zip(times[:-1], x_t, x0_hat):
        shown = model.render(model.encode(x, t), PAIR, fine=False)[0].clamp(-1, 1)
        assert torch.allclose(shown, guess, atol=1e-6)


def test_a_seed_is_a_picture_and_the_last_step_adds_no_noise():
    model = tiny_model()
    (first, planes), (again, _), (other, _), (ddim, _) = (
        generate(model, PAIR, 3, eta, seed) for eta, seed in ((1, 4), (1, 4), (1, 5), (0, 4)))
    assert torch.equal(first, again)
    assert not any(torch.allclose(first, x, atol=1e-3) for x in (other, ddim))
    assert torch.allclose(first, model.render(planes, PAIR)[0].clamp(-1, 1), atol=1e-6)


# Reconstruction ---------------------------------------------------------------------------------

def test_reconstruction_keeps_the_less_the_more_noise():
    model, images = tiny_model(), torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(reconstruct(model, images), model.encode(images, 0))
    assert torch.equal(reconstruct(model, images, PAIR, t_r=0, seed=7), model.encode(images, 0))
    kept, greys = [], torch.linspace(-0.8, 0.8, 100).view(-1, 1, 1, 1)
    for t_r, steps, calls in ((40, None, 2), (300, None, 15), (900, 45, 45), (1000, 50, 50)):
        model = Greys()
        planes = reconstruct(model, greys.expand(100, 3, 16, 16), PAIR[:1].expand(100, 4, 4), t_r,
                             steps)
        assert len(model.levels()) == calls and model.levels()[0] == t_r
        pair = torch.stack([planes.mean((1, 2, 3)), greys.flatten()])
        kept.append(torch.corrcoef(pair)[0, 1].item())
    assert kept[0] > 0.999 > kept[2] > kept[3] and abs(kept[3]) < 0.3


def test_the_camera_is_found_where_the_planes_are_right():
    def field(p, features):                             # three balls, no two alike
        balls = torch.tensor([[0.4, 0.1, -0.2], [-0.3, 0.4, 0.0], [-0.1, -0.5, 0.3]])
        inside = (p[..., None, :] - balls).norm(dim=-1) < 0.3                  # (B, P, 3)
        return 30.0 * inside.any(-1), inside.float()
    model = tiny_model(samples=24)
    model.mlp.forward = field
    azimuth, elevation = torch.tensor([-170.0, 3, 77, 250]), torch.tensor([20.0, 33, 48, 40])
    poses, masks = orbit(azimuth, elevation, model.config.radius), torch.ones(4, 1, 16, 16)
    images, masks[..., 10:] = model.render(torch.zeros(4, 3, 4, 16, 16), poses)[0], 0
    spoilt = torch.where(masks > 0, images, images.flip(-1))
    found, hidden = rd.find_poses(model, images), rd.find_poses(model, spoilt, masks)
    for found in (found, hidden):
        cosine = (found[:, :3, 2] * poses[:, :3, 2]).sum(-1)
        assert torch.rad2deg(cosine.clamp(max=1).acos()).max() < 5
    masks[..., 9:] = 0                  # from an odd pixel on: what is hidden counts for nothing
    assert torch.equal(*(rd.find_poses(model, some, masks) for some in (
        images, torch.where(masks > 0, images, 1.0))))


# Inpainting -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, length, down, up", [
    ((250, 10, 10), 4571, 2410, 2160), ((250, 10, 1), 251, 250, 0), ((20, 5, 2), 51, 35, 15),
    ((100, 10, 10), 1721, 910, 810), ((50, 5, 5), 411, 230, 180), ((3, 10, 10), 4, 3, 0)])
def test_repaint_schedule_has_the_originals_numbers(arguments, length, down, up):
    steps, jump_length, _ = arguments
    indices = repaint_schedule(*arguments)
    moves = np.diff(indices)
    assert (len(indices), (moves == -1).sum(), (moves == 1).sum()) == (length, down, up)
    assert indices[0] == max(indices) == steps - 1 and indices[-1] == -1 and min(indices[:-1]) == 0
    runs = {len(list(run)) for move, run in itertools.groupby(moves) if move == 1}
    assert runs == ({jump_length} if up else set())


def test_inpainting_keeps_the_known_pixels_and_encodes_them():
    images, masks, model = torch.rand(2, 3, 16, 16) * 2 - 1, torch.ones(2, 1, 16, 16), tiny_model()
    masks[0, :, 5:11, 5:11], masks[1, :, :, 8:] = 0, 0
    known, settings = masks.bool().expand_as(images), dict(steps=6, jump_length=2, jump_n_sample=2)
    filled, planes = inpaint(model, images, masks, PAIR, **settings)
    assert torch.equal(filled[known], images[known])
    assert torch.equal(planes, model.encode(filled, 0))
    again, other = (inpaint(model, images * masks, masks, PAIR, seed=seed, **settings)[0]
                    for seed in (0, 1))
    assert torch.equal(again, filled)                   # what the mask hides has no influence
    assert not torch.allclose(other[~known], filled[~known], atol=1e-3)
    assert torch.equal(inpaint(model, images, torch.ones_like(masks), PAIR, **settings)[0], images)


def test_inpainting_continues_what_is_known_and_follows_repaint():
    generator = torch.Generator().manual_seed(3)
    grey = Greys.mean + Greys.spread * torch.randn(60, 1, 1, 1, generator=generator)
    images = grey + Greys.grain * torch.randn(60, 3, 16, 16, generator=generator)
    masks = torch.ones(60, 1, 16, 16)
    masks[:, :, :, 9:] = 0
    errors = []
    for options in ({}, dict(guidance=0.0)):            # the second is RePaint as it was
        model = Greys()
        filled, _ = inpaint(model, images, masks, PAIR[:1].expand(60, 4, 4), 20, 5, 3, **options)
        errors.append((filled[..., 9:].mean((1, 2, 3)) - grey.flatten()).abs().mean())
    assert errors[0] < errors[1] < 0.2 * Greys.spread
    walk, levels = repaint_schedule(20, 5, 3), noise_levels(model.schedule, 20)
    downs = [levels[i + 1] for i, j in zip(walk, walk[1:]) if j < i]
    assert [t for t, _ in model.asked] == [*downs, 0]
    for t, x_t in model.asked[:-1]:         # the known pixels are theirs at the level of x_t
        kept = float(model.schedule.alpha_bar[t])
        noise = ((x_t - kept ** 0.5 * images) / (1 - kept) ** 0.5)[..., :9]
        assert noise.std().item() == pytest.approx(1, abs=0.03) and abs(noise.mean()) < 0.02
        power = kept * (Greys.mean ** 2 + Greys.spread ** 2 + Greys.grain ** 2) + 1 - kept
        assert x_t[..., 9:].square().mean().item() == pytest.approx(power, abs=0.03)


BLACK = torch.zeros(2, 3, 16, 16)
REFUSED = [     # a call, and the word that its sentence must have
    *((lambda s=s: generate(Greys(), PAIR, steps=s), "steps") for s in (0, -1, 1001)),
    *((lambda t=t: reconstruct(Greys(), BLACK, PAIR, t_r=t), "t_r") for t in (-1, 1001, math.nan)),
    *((lambda s=s: reconstruct(Greys(), BLACK, PAIR, 500, s), "steps") for s in (0, -1, 501)),
    *((lambda s=s: inpaint(Greys(), BLACK, torch.ones(s), PAIR), "mask") for s in (
        (1, 16, 16), (2, 3, 16, 16), (2, 1, 8, 8), (1, 1, 16, 16))),
    *((lambda s=s: repaint_schedule(*s), "at least 1") for s in ((0, 5, 5), (9, 0, 5), (9, 5, 0))),
    (lambda: tiny_model().encode(torch.zeros(1, 3, 32, 32), 0), "16"),
    (lambda: NoiseSchedule(0), "timesteps"), (lambda: NoiseSchedule(10, "square"), "schedule"),
    (lambda: evaluate(tiny_model(), synthetic("clevr1", 2, 1, 16)), "2 views")]


@pytest.mark.parametrize("call, word", REFUSED)
def test_what_cannot_be_done_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# Evaluation -------------------------------------------------------------------------------------

def plain_psnr(a, b):
    return -10 * math.log10(((a.double() - b.double()) ** 2).mean().item())


def plain_ssim(a, b):
    """Wang et al. 2004, eq. 13, window by window, for one picture (3, S, S)."""
    bell = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window, (a, b), values = np.outer(bell, bell) / bell.sum() ** 2, (a.numpy(), b.numpy()), []
    for c, i, j in np.ndindex(3, a.shape[1] - 10, a.shape[2] - 10):
        p, q = (x[c, i:i + 11, j:j + 11].astype(float) for x in (a, b))
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
    for i, v in np.ndindex(18, 3):
        planes = model.encode(views.images[i, :1], 0)
        shown = model.render(planes, views.poses[i, v][None])[0][0] / 2 + 0.5
        guesses = {"input": shown} if v == 0 else {
            "novel": shown, "baseline_mean_image": unit.mean((0, 1)),
            "baseline_input_copied": unit[i, 0]}
        for key, guess in guesses.items():
            both = plain_psnr(guess, unit[i, v]), plain_ssim(guess, unit[i, v])
            expected.setdefault(key, []).append(both)
    scores = evaluate(model, views)
    assert scores.keys() == expected.keys() and json.loads(json.dumps(scores)) == scores
    for key, values in expected.items():
        pair = scores[key]["psnr"], scores[key]["ssim"]
        assert pair == pytest.approx(tuple(np.mean(values, axis=0)), abs=2e-3)


# Checkpoints ------------------------------------------------------------------------------------

def test_save_load_sample_gives_the_same_picture(monkeypatch, tmp_path):
    model = train_quietly(monkeypatch, tiny(steps=2, out=str(tmp_path)))
    save_checkpoint(tmp_path / "small.pt", model)               # half precision, to share
    full, small = (load_checkpoint(tmp_path / name) for name in ("clevr1.pt", "small.pt"))
    (images, _), (same, _), (close, _) = (generate(m, PAIR, steps=3) for m in (model, full, small))
    assert torch.equal(images, same) and psnr(close / 2 + 0.5, images / 2 + 0.5).min() > 40
    assert full.config == model.config and not full.training
    assert small.config == replace(model.config, device="auto", out="out")     # not this machine's
    for half, weight in zip(small.parameters(), full.parameters()):
        assert not weight.requires_grad and torch.equal(half, weight.half().float())
    sizes = [(tmp_path / name).stat().st_size for name in ("small.pt", "clevr1.pt")]
    assert sizes[0] < sizes[1] / 4


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):                               # unpickled, it makes a folder
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_spoilt_foreign_and_hostile_checkpoints_are_refused(trained, tmp_path):
    state, whole = torch.load(trained, weights_only=True), trained.read_bytes()
    config, evil = state["config"], {**state, "config": Hostile(tmp_path / "ran")}
    files = {
        "empty": b"", "text": b"not a checkpoint\n" * 99, "start": whole[:200],
        "half": whole[:len(whole) // 2], "nearly": whole[:-30], "pickle": pickle.dumps(evil),
        "hostile": evil, "list": [1, 2, 3], "weights": state["ema"],
        "version": {**state, "version": 99}, "no_weights": {**state, "ema": {}},
        "no_config": {k: v for k, v in state.items() if k != "config"},
        "field": {**state, "config": {**config, "colour": 1}},
        "bad_field": {**state, "config": {**config, "resolution": 33}},
        "nan_field": {**state, "config": {**config, "focal": math.nan}},
        "other_size": {**state, "config": {**config, "unet_channels": 32}},
        "config_list": {**state, "config": [1, 2]}, "weights_list": {**state, "ema": [3]}}
    for name, content in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=rf"\A.*\b{name}\.pt.*\Z"):        # one line
            load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_earlier_file(monkeypatch, trained, tmp_path):
    def save(state, file):
        file.write(b"half of it")
        raise OSError("no space left on device")
    path = tmp_path / "model.pt"
    path.write_text("earlier")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(path, load_checkpoint(trained))
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk(most=3000):
    """No file grows beyond so many bytes: the kernel refuses to write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(arguments, capsys):
    """The one sentence that a command ends with, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        rd.main(arguments)
    said = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


@pytest.mark.parametrize("line", [
    "train", "train --resume --steps 6", "generate --count 1 --steps 1", "inpaint --steps 1"])
def test_a_full_disk_costs_no_earlier_file(line, desk, capsys):
    before, (command, *rest) = contents(desk), line.split()
    with full_disk():
        said = refused([command, *(TRAIN if command == "train" else ["--checkpoint", "tiny.pt"]),
                        *rest], capsys)
    assert "large" in said or "space" in said
    after = contents(desk)
    assert sorted(before.values()) == sorted(after.values())
    moved = {desk / "out" / "clevr1.old.pt"} if line == "train" else set()
    assert after.keys() - before.keys() == moved


@pytest.mark.parametrize("line", [f"{c} --out {out}" for c in ("train", "generate --steps 1")
                                  for out in ("/proc/none", "photo.png/in", "loop.png")])
def test_a_folder_that_cannot_be_written_is_named(line, desk, capsys):
    (desk / "loop.png").symlink_to("loop.png")
    before, (command, *rest) = contents(desk), line.split()
    said = refused([command, *(TRAIN if command == "train" else ["--checkpoint", "tiny.pt"]),
                    *rest], capsys)
    assert line.split()[-1].split("/")[-1] in said and contents(desk) == before


GONE = object()
UNFIT = {       # a part of the checkpoint that a training would go on from, and what it is instead
    "version": 99, "optimizer": [3], "optimizer.state": {0: True}, "optimizer.param_groups": [[]],
    "step": GONE, "seconds": math.nan, "model": {}, "ema": GONE, "config": GONE,
    "config.data": GONE, "config.focal": GONE, "config.colour": 3, "config.elevation": (None, None),
    "config.unet_channels": 1024, "config.background": ("a", "b", "c"),
    "ema.unet.stem.weight": torch.full((16, 3, 4, 4), math.nan),
    "model.mlp.layers.0.weight": torch.zeros(1).expand(2 ** 20, 2 ** 20)}


@pytest.mark.parametrize("where", UNFIT)
def test_a_training_does_not_go_on_from_what_does_not_fit(where, desk, capsys):
    path = desk / "out" / "clevr1.pt"
    state = part = torch.load(path, weights_only=True)
    top, _, key = where.partition(".")
    part, key = (state[top], key) if key else (state, top)
    part[key] = UNFIT[where]
    if UNFIT[where] is GONE:
        del part[key]
    torch.save(state, path)
    before = contents(desk)
    assert "clevr1.pt" in refused(["train", *TRAIN, "--resume", "--steps", "6"], capsys)
    assert contents(desk) == before


@pytest.mark.parametrize("spoil", [lambda x: x.to_sparse(), lambda x: x[..., None], lambda x: 3])
def test_a_spoilt_optimizer_is_not_gone_on_with(spoil, desk, capsys):
    path = desk / "out" / "clevr1.pt"
    state = torch.load(path, weights_only=True)
    kept = state["optimizer"]["state"][0]
    kept["exp_avg"] = spoil(kept["exp_avg"])
    torch.save(state, path)
    before = contents(desk)
    assert "clevr1.pt" in refused(["train", *TRAIN, "--resume", "--steps", "6"], capsys)
    assert contents(desk) == before


def test_a_flipped_bit_in_the_weights_is_noticed(trained, tmp_path):
    """torch.load does not look at the archive's check sums."""
    whole = trained.read_bytes()
    with ZipFile(trained) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    flipped = bytearray(whole)
    flipped[largest.header_offset + 64 + largest.file_size // 2] ^= 64
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(ValueError, match="flipped.pt"):
        load_checkpoint(tmp_path / "flipped.pt")


# Pictures ---------------------------------------------------------------------------------------

def test_exported_points_lie_on_the_surface_and_come_back_from_the_file(tmp_path):
    def ball(points, features):
        distance = points.norm(dim=-1)
        return 2000 * torch.sigmoid(1000 * (0.5 - distance)), points / 2 + 0.5
    model = SimpleNamespace(mlp=ball, config=Config())
    poses = orbit(torch.arange(4) * 90.0, 20.0, 2.7)
    points, normals, colors = rd.surface_points(model, torch.zeros(1, 3, 1, 2, 2), poses, 16)
    outward = points / points.norm(dim=-1, keepdim=True)
    assert (points.norm(dim=-1) - 0.5).abs().max() < 0.03 and (points @ poses[0, :3, 3]).max() > 1
    assert (normals * outward).sum(-1).min() > 0.999
    sphere = torch.eye(3, 4)[None, None] / 2                    # the same, by the tracer's depth
    traced = Scenes(torch.tensor([[SPHERE]]), sphere, sphere[..., 0], torch.zeros(1, 1), -9, WHITE)
    depth = trace(traced, poses[None], 1.6, 16)[1].view(4, -1)
    origins, directions = camera_rays(poses, 1.6, 16)
    seen = origins + depth.clamp(max=9)[..., None] * directions
    seen = seen[-(seen * directions).sum(-1) > 0.2]             # but where a ray only grazes it
    assert len(seen) > 200 and torch.cdist(seen, points).amin(1).max() < 0.03
    rd.save_ply(tmp_path / "ball.ply", points, normals, colors)
    header, body = (tmp_path / "ball.ply").read_bytes().split(b"end_header\n", 1)
    fields = [(n, "<f4") for n in ("x", "y", "z", "nx", "ny", "nz")] + [(n, "u1") for n in "rgb"]
    table = np.frombuffer(body, dtype=fields)
    assert f"element vertex {len(points)}".encode() in header and len(table) == len(points)
    assert np.allclose(np.stack([table[n] for n in "xyz"], 1), points, atol=1e-6)
    assert np.abs(np.stack([table[n] for n in "rgb"], 1) / 255 - colors.numpy()).max() < 0.003


# Command line -----------------------------------------------------------------------------------

TRAIN = shlex.split(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in TINY.items()))
COMMANDS = {        # small ones
    "demo": "", "train": " ".join(TRAIN), "generate": "--count 2 --steps 3",
    "reconstruct": "--steps 3", "inpaint": "--steps 3", "evaluate": "--scenes 3 --views 2 --json",
    "export": "--count 1"}


@pytest.fixture
def desk(trained, tmp_path, monkeypatch):
    """A working folder with a checkpoint, pictures, masks and earlier results in it."""
    pixels, weights = np.random.default_rng(0).integers(0, 255, (40, 40, 3)), trained.read_bytes()
    for name, content in (("photo", pixels), ("mask", pixels[..., 0]), ("wide", pixels[:30])):
        Image.fromarray(content.astype(np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "out").mkdir()
    for name, content in {
            "tiny.pt": weights, "half.pt": weights[:9999], "text.png": b"words", "empty.png": b"",
            "out/clevr1.pt": weights, "out/generate.png": b"old", "out/generate.gif": b"old",
            "out/reconstruct.png": b"old", "out/inpaint.png": b"old"}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(*arguments):
    """Run the command line in a process of its own."""
    return subprocess.run([sys.executable, str(HERE / "renderdiffusion.py"), *arguments],
                          capture_output=True, text=True, timeout=600)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs_and_names_what_it_wrote(command, desk):
    checkpoint = [] if command == "train" else ["--checkpoint", "tiny.pt"]
    done = program(command, *checkpoint, *COMMANDS[command].split(), "--out", "new/folder")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    if command == "evaluate":
        scores, views = json.loads(done.stdout), synthetic("clevr1", 3, 2, 16, seed=rd.HELD_OUT)
        for key, expected in evaluate(load_checkpoint("tiny.pt"), views).items():
            assert scores[key] == pytest.approx(expected, abs=1e-3)
        return
    written = [path.relative_to(desk) for path in contents(desk) if "new" in path.parts]
    kinds = {path.suffix: path for path in written}
    assert written and all(str(path) in done.stdout for path in written)
    if command == "train":
        assert load_checkpoint(kinds[".pt"]).config.resolution == 16
    elif command != "export":
        assert Image.open(kinds[".png"]).size[0] >= 32 and Image.open(kinds[".gif"]).n_frames > 8


@pytest.mark.parametrize("line", [
    "reconstruct --image photo.png --t-r 40",
    "reconstruct --image wide.png --fit pad --t-r 200 --steps 3 --azimuth 30 --elevation 20",
    "inpaint --image photo.png --mask mask.png --steps 3",
    "inpaint --image photo.png --mask mask.png --steps 3 --azimuth -40 --elevation 30"])
def test_picture_files_are_taken(line, desk, capsys):
    rd.main([*shlex.split(line), "--checkpoint", "tiny.pt", "--out", "new"])
    command = line.split()[0]
    assert {path.name for path in Path("new").iterdir()} == {f"{command}.png", f"{command}.gif"}
    assert "new/" in capsys.readouterr().out.splitlines()[-1]


BAD_LINES = """
    : COMMAND | paint: paint | generate --colour red: colour | generate --count nan: count
    generate --checkpoint nowhere.pt: nowhere.pt | generate --checkpoint half.pt: half.pt
    generate --checkpoint photo.png: photo.png | generate --checkpoint out: out
    generate --count 0: count | generate --count -3: count | generate --steps 0: steps
    generate --steps 1001: steps | generate --eta nan: eta | generate --eta -1: eta
    generate --eta 2: eta | generate --seed 99999999999999999999999: seed
    generate --device abacus: abacus | generate --count 1 --steps 1 --out photo.png: photo.png
    reconstruct --image nowhere.png: nowhere.png | reconstruct --image text.png: text.png
    reconstruct --image empty.png: empty.png | reconstruct --image out: out
    reconstruct --t-r 1001: t_r | reconstruct --t-r -1: t_r | reconstruct --t-r nan: t-r
    reconstruct --t-r 9 --steps 0: steps | reconstruct --image photo.png --azimuth 10: elevation
    reconstruct --image photo.png --azimuth nan --elevation 10: azimuth
    reconstruct --image photo.png --azimuth 10 --elevation inf: elevation
    inpaint --image photo.png --mask wide.png: wide.png | inpaint --fillings 0: fillings
    reconstruct --image photo.png --fit squeeze: fit
    inpaint --image photo.png --mask text.png: text.png | inpaint --steps 0: steps
    inpaint --image photo.png --mask nowhere.png: nowhere.png | evaluate --data boats: boats
    evaluate --scenes 0: scenes | evaluate --views 1: views | evaluate --t-r -1: t_r
    train --data boats: boats | train --lr nan: lr | train --resolution 48: resolution
    train --batch 0: batch | train --steps 0: steps | train --minutes nan: minutes
    train --seed -1: seed | train --out photo.png: photo.png | train --resume --out empty: empty
    train --resume --unet-channels 32: clevr1.pt | train --resume --fold 1: fold
    train --resume --lay-down: lay_down"""
BAD_LINES = [pair.strip() for pair in re.split(r"\||\n", BAD_LINES) if pair.strip()]


@pytest.mark.parametrize("pair", BAD_LINES)
def test_bad_input_gets_one_sentence_and_costs_nothing(pair, desk, capsys):
    line, word = re.fullmatch(r"(.*?): ?(\S+)", pair).groups()
    before, arguments = contents(desk), line.split()
    if line.startswith("train"):
        arguments = ["train", *TRAIN, *arguments[1:]]
    elif len(arguments) > 1 and "--checkpoint" not in line:
        arguments += ["--checkpoint", "tiny.pt"]
    with pytest.raises(SystemExit) as stop:
        rd.main(arguments)
    out, err = capsys.readouterr()
    said = err.strip().split("\n")
    assert stop.value.code == 2 and word in said[-1] and "loss" not in out     # before any work
    assert said[-1].startswith("error: ") and len(said) == 1 or (
        said[0].startswith("usage: ") and ": error: " in said[-1])
    assert contents(desk) == before


def test_bad_input_in_a_process_of_its_own_and_help(desk, capsys):
    done = program("generate", "--checkpoint", "half.pt")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: half.pt")
    for arguments in ([], *([command] for command in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            rd.main([*arguments, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert arguments or all(f"python renderdiffusion.py {name}" in shown for name in COMMANDS)


# README.md: everything that it shows runs -------------------------------------------------------

SKIPPED = ("pip", "pytest", "git", "torchrun", "jupyter", "SLOW=1", "cd")       # first words
RECIPES = "images.txt", "bpy", "srn_cars.zip"                       # files that are not here
SMALL_OPTIONS = {           # put behind what README.md says, so that they count
    "train": COMMANDS["train"] + " --minutes 0", "demo": "--checkpoint tiny.pt",
    "generate": "--checkpoint tiny.pt --count 2 --steps 2", "reconstruct": "--checkpoint tiny.pt",
    "inpaint": "--checkpoint tiny.pt --steps 2", "export": "--checkpoint tiny.pt",
    "evaluate": "--checkpoint tiny.pt --scenes 2 --views 2"}
SMALL_CODE = [              # replaced in its Python: pattern, replacement
    (r'load_checkpoint\("clevr1"', 'load_checkpoint("tiny.pt"'), (r"\bsteps=\d+", "steps=2"),
    (r"\bscenes=\d+", "scenes=2"), (r"\bminutes=[\d.]+", "minutes=0.0"),
    (r"\bresolution=\d+", "resolution=16"), (r'(synthetic|load)\((".*?"), \d+', r"\1(\2, 2"),
    (r"Config\(", "Config(plane_size=16, unet_channels=16, samples=4, batch=2, rays=8, ")]


@slow
def test_everything_in_the_readme_runs(desk):
    names = {}
    assert BLOCKS
    for language, block in BLOCKS:
        if any(word in block for word in RECIPES):                  # they have their own tests
            continue
        if language == "python":
            for pattern, small in SMALL_CODE:
                block = re.sub(pattern, small, block)
            exec(compile(block, "README.md", "exec"), names)
            continue
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if words and words[0] not in SKIPPED:
                assert words[:2] == ["python", "renderdiffusion.py"], f"how to test {line!r}?"
                done = program(*words[2:], *SMALL_OPTIONS[words[2]].split())
                assert done.returncode == 0, f"{line}\n{done.stderr}"


# results/ -----------------------------------------------------------------------------------------

def script(monkeypatch, name):
    """A module of results/."""
    monkeypatch.syspath_prepend(HERE / "results")
    return importlib.import_module(name)


@slow
def test_benchmark_runs(monkeypatch, capsys):
    """Each part once: its shares of the hardware's rates are not looked at."""
    def once(*runs, least=0):
        starts = [time.perf_counter()]
        for run in runs:
            run()
            starts.append(time.perf_counter())
        return np.diff(starts).tolist()
    benchmark = script(monkeypatch, "benchmark")
    monkeypatch.setattr(benchmark, "medians", once)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--json"])
    benchmark.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["speed"]) > 12 and all(row["rate"] > 0 for row in found["speed"])
    assert all(0 < row["megabytes"] < 1000 for row in found["memory"])


@slow
def test_figures_are_made(monkeypatch, tmp_path, capsys):
    figures = script(monkeypatch, "figures")
    small = dict(samples=dict(count=8, frames=2), shapes=dict(count=24),
                 steps=dict(count=2, calls=(1, 2)),
                 t_r=dict(count=2, levels=(0, 20)), inpainting=dict(count=2, fillings=2),
                 generation=dict(count=64, readable=256),
                 training=dict(count=2, minutes=0.1, marks=(0.05,)))
    monkeypatch.setattr(figures, "FIGURES", {
        name: partial(make, **small.get(name, dict(count=2)))
        for name, make in figures.FIGURES.items()})
    figures.main(["--checkpoints", "clevr1", "--out", str(tmp_path)])
    figures.main(["together", "--checkpoints", "clevr1", "clevr", "--out", str(tmp_path)])
    made = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert set(made) == {"clevr1_samples.gif", "steps.png", "t_r.png", "t_r_pictures.png",
                         "clevr1_inpainting.png", "loss.png", "training.png", "together.png"}
    assert made["clevr1_samples.gif"] == (512, 64)
    assert capsys.readouterr().out.count("|---") > 20


def test_turns_of_cubes_are_told_from_discs(monkeypatch):
    figures = script(monkeypatch, "figures")
    scenes = random_scenes("clevr1", 400, 5)
    chosen = scenes.kind[:, 0] == BOX
    scenes = replace(scenes, to_world=scenes.to_world[chosen])
    inverse = torch.linalg.inv(torch.cat([scenes.to_world[:, 0], torch.tensor(
        [[[0, 0, 0, 1.0]]]).expand(int(chosen.sum()), 1, 4)], 1))              # (N, 4, 4)

    def correlation(turn, is_disc=False):
        """Of cubes that stand turned by `turn` degrees too far, or of cylinders."""
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))

        def mlp(points, features):
            local = points @ inverse[:, :3, :3].mT + inverse[:, None, :3, 3]
            local = local[..., :2] @ torch.tensor([[c, -s], [s, c]])
            size = local.norm(dim=-1) if is_disc else local.abs().amax(-1)
            return 1e3 * (size < 1), None
        return figures.turn_correlation(SimpleNamespace(mlp=mlp), torch.zeros(len(inverse), 3, 4,
                                                                              16, 16), scenes)
    assert correlation(0) > 0.99 and correlation(90) > 0.99
    assert abs(correlation(0, is_disc=True)) < 0.01 and correlation(45) < -0.3


def test_judges_of_generated_scenes(monkeypatch):
    """Coverage on a line, and what is said of scenes against how they are made."""
    judge = script(monkeypatch, "judge")
    line = torch.arange(20.0)[:, None]
    assert judge.coverage(line, line, k=2) == 1
    assert judge.coverage(line[:1] - 1.5, line, k=2) == pytest.approx(1 / 20)   # near point 0 alone
    scenes, values = random_scenes("clevr1", 64, 5), judge.parameters("clevr1", 64, 5)
    assert torch.equal(values[:, :3].argmax(1), scenes.kind[:, 0])
    assert torch.equal(values[:, 3:6], scenes.color[:, 0])
    assert torch.allclose(values[:, 9], -0.45 + values[:, 12], atol=1e-6)       # they stand on it
    shape, color = judge.clevr_kinds(values)
    assert torch.equal(shape, scenes.kind[:, 0])
    assert torch.equal(torch.tensor(CLEVR_COLORS)[color], scenes.color[:, 0])
    assert judge.shares(torch.tensor([0, 0, 2]), 3) == ["67", "0", "33"]
    several = judge.parameters("clevr", 64, 5).view(64, 4, 13)
    there = several[..., :3].any(-1)
    assert (there[:, :-1] >= there[:, 1:]).all() and not there.all()        # empty ones last
    assert (several[:, 1:, 7] >= several[:, :-1, 7])[there[:, 1:]].all()        # the others by x
    with pytest.raises(ValueError, match="64 scenes"):
        judge.judge({}, 63)


@slow
def test_pictures_are_read_and_told_apart(monkeypatch):
    """Of pictures not seen before most shapes and colours are read rightly, and changed ones told
    from traced ones, but not traced ones from others."""
    judge = script(monkeypatch, "judge")
    describe, read = judge.train_reader("clevr1", 16, 3072)
    traced, others = (synthetic("clevr1", 96, 2, 16, -seed, depth=False).images.flatten(0, 1)
                      for seed in (1, 2))
    true, found = (judge.clevr_kinds(values) for values in (
        judge.parameters("clevr1", 96, -1).repeat_interleave(2, 0), read(traced)))
    for a, b, chance in zip(true, found, (1 / 3, 1 / 8)):
        assert (a == b).float().mean() > 2 * chance
    features = describe(traced)
    assert features.shape == (192, 32) and 0.5 < features.var(0).mean() < 2
    assert judge.told_apart(others * 0.8, traced) > 0.9             # darker: easily told
    assert 0.3 < judge.told_apart(others, traced) < 0.7             # alike: a coin's chance


def test_depth_is_compared_where_objects_are(monkeypatch):
    """A model that shows the true depth, plus 0.1 on objects and anything elsewhere."""
    figures, views = script(monkeypatch, "figures"), synthetic("clevr1", 8, 2, 32, -1)
    scenes = random_scenes("clevr1", 8, -1)
    _, bare = trace(replace(scenes, kind=torch.full_like(scenes.kind, EMPTY)), views.poses[:, 1:],
                    views.focal, 32)
    is_object = views.depth[:, 1] < bare[:, 0] - 0.01
    model = tiny_model(resolution=32)
    model.render = lambda *_: (None, views.depth[:, 1] + torch.where(is_object, 0.1, 5.0), None)
    error, alone = figures.depth_error(model, views)
    assert error == pytest.approx(0.1, abs=1e-4) and 0.2 < alone < 2


def test_ablations_change_what_they_say(monkeypatch, tmp_path):
    ablations = script(monkeypatch, "ablations")
    seen, plain = {}, synthetic("clevr1", 2, 3, 16, rd.HELD_OUT).poses

    def evaluate(model, views):
        seen[name] = model, views.poses
        return {key: {"psnr": 7.0} for key in ("input", "novel")}
    monkeypatch.setattr(rd, "evaluate", evaluate)
    for name in ablations.RUNS:
        row = ablations.run(name, tiny(steps=2, fold=0, out=str(tmp_path)), 2)
        assert row.endswith("| 2 | 7.00 | 7.00 |")
    attention = {name: {block.attention for block in model.modules() if isinstance(block, rd.Block)}
                 for name, (model, _) in seen.items()}
    assert attention["attention"] == {True} and attention["no_attention"] == {False}
    assert all(torch.equal(poses, plain) for name, (_, poses) in seen.items()
               if name != "billboard")
    model, poses = seen["billboard"]                # all from the front, the others relative to it
    assert torch.allclose(poses[:, 0], ablations.front(model.config).expand(2, 4, 4), atol=1e-6)
    moves = [torch.linalg.inv(x[:, :1]) @ x for x in (plain, poses)]
    assert torch.allclose(*moves, atol=1e-5)

    x0, ema = torch.rand(4, 3, 16, 16), tiny_model(fold=0, other_side=0.0)
    poses = orbit(torch.arange(4) * 90.0, 30, 2.7)
    centers, n = poses[:, None, :3, 3], ema.config.rays

    def march(planes, origins, directions, jitter):             # flat grey, from two cameras
        assert torch.allclose(origins[:, :n], centers.expand(4, n, 3))
        assert torch.allclose(origins[:, n:], centers.roll(2, 0).expand(4, 256, 3))
        return [torch.full_like(origins, 0.25)]
    torch.manual_seed(0)
    extra = ablations.extent(SimpleNamespace(unet=None, encode=lambda *_: None, march=march), ema,
                             x0, poses, 0)
    torch.manual_seed(0)                # the same, as if nothing else were looked at
    extra -= rd.denoising_loss(lambda x_t, t, poses, pixels, jitter: torch.full_like(
        pixels[..., None].expand(-1, -1, 3), -0.5, dtype=torch.float), ema, x0, poses, 0)
    background = (ema.background * 2 - 1).view(3, 1, 1)
    away = (x0 - background).abs(), (torch.tensor(-0.5) - background).abs()
    expected = sum(((away[0] ** k).mean((1, 2, 3)) - (away[1] ** k).mean()).abs().mean()
                   for k in (1, 2))
    assert extra.item() == pytest.approx(expected.item(), abs=1e-5)

    model, x0 = tiny_model(fold=0).requires_grad_(True), torch.rand(4, 3, 16, 16) * 2 - 1
    poses, gradients, asked = PAIR.repeat(2, 1, 1), [], []

    def spy(x_t, t, *more):
        asked.append((x_t[t == 0], more[0]))
        return model(x_t, t, *more)
    ema = tiny_model(clean=0.99, fold=0)
    torch.manual_seed(0)
    ablations.two_views(spy, ema, x0, poses, 0)
    torch.manual_seed(0)
    start = torch.randint(2 ** 30, ()).item()       # the scenes that it drew
    views = synthetic("clevr1", 4, 2, 16, 1, start=start)
    (x_t, rendered), = asked
    assert all(any(torch.equal(x, image) for image in views.images[:, 0]) for x in x_t)
    sides = [[torch.equal(pose, other) for other in both] for pose, both in
             zip(rendered, views.poses)]
    assert sorted(sides) == [[False, True]] * 2 + [[True, False]] * 2

    def weigh(x_t, t, *more):           # the same by a weight of the loss itself, summed up by hand
        alpha_bar = model.schedule.alpha_bar[t]
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5)
        x0_hat = model(x_t, t, *more)
        target = x0.flatten(2).mT.gather(1, more[1][..., None].expand(-1, -1, 3))
        mean = (x0_hat - target).abs().mean((1, 2))
        (mean * weight / weight.mean()).mean().backward()
        return x0_hat
    for loss in (lambda: rd.denoising_loss(weigh, model, x0, poses, 0),
                 lambda: ablations.min_snr(model, model, x0, poses, 0).backward()):
        torch.manual_seed(0)
        loss()
        gradients.append(model.mlp.layers[0].weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)

    told = ablations.Told(tiny(fold=0))
    images = [told(x0, 0, some) for some in (poses, poses.flip(0))]
    told.poses = poses
    one = told.encode(x0, 0)
    told.poses = poses.flip(0)
    assert not torch.allclose(one, told.encode(x0, 0), atol=1e-4) and images[0].shape == x0.shape


def test_scenes_are_put_together_from_what_a_teacher_makes_of_single_views(monkeypatch):
    """A teacher that sees a red ball in every picture: balls are where they were moved to."""
    ablations, traced = script(monkeypatch, "ablations"), []
    config = tiny(data="clevr", elevation=(20.0, 50.0), radius=2.9, resolution=32, samples=64,
                  fine_samples=0)
    ball = SimpleNamespace(radius=0.15, density=50.0)
    teacher = SimpleNamespace(
        config=config, background=torch.zeros(3),
        encode=lambda x, t: torch.zeros(len(x), 3, 1, 2, 2),
        mlp=lambda p, _: (torch.where(p.norm(dim=-1) < ball.radius, ball.density,
                                      50.0 * (p.abs() > 1).any(-1)),    # and walls outside its cube
                          torch.tensor([1.0, 0, 0]).expand_as(p)))
    monkeypatch.setattr(ablations, "synthetic", lambda name, n, *rest, **options: traced.append(n)
                        or SimpleNamespace(images=torch.zeros(n, 1, 3, 32, 32)))

    def seeded(*arguments):
        torch.manual_seed(0)
        return ablations.put_together(teacher, config, "clevr1", *arguments)
    pixel = torch.arange(32) + 0.5
    for reach, scale in ((0.0, 1.0), (0.5, 1.0), (0.5, 0.6)):
        torch.manual_seed(0)
        torch.randint(1, 2, (6,))
        places = reach * (2 * torch.rand(6, 1, 2) - 1)
        for shown, poses in seeded(6, 1, reach, 0.4, [scale]):
            red = (shown[:, 0] / 2 + 0.5).clamp(0, 1)
            assert (shown[:, 1:] == -1).all() and red.amax((1, 2)).min() > 0.9
            # from clevr1's ground at -0.45, which is scaled, too, to clevr's at -0.30
            center = torch.cat([places[:, 0], torch.full((6, 1), -0.30 + 0.45 * scale)], dim=1)
            seen = ((center - poses[:, :3, 3])[:, None] @ poses[:, :3, :3])[:, 0]
            size = ball.radius * scale * 32 * config.focal / seen[:, 2]             # in pixels
            seen = 32 * (config.focal * seen[:, :2] / seen[:, 2:] + 0.5)
            mass = red.sum((1, 2))
            found = torch.stack([(red.sum(1) * pixel).sum(1), (red.sum(2) * pixel).sum(1)], dim=1)
            assert (found / mass[:, None] - seen).abs().max() < 0.6
            assert ((mass / math.pi).sqrt() - size).abs().max() < 0.3
    assert traced == [6, 6, 6]

    ball.radius, ball.density = 0.4, 3.0        # a small one is as opaque as a large one
    for scale in (1.0, 0.5):
        for shown, _ in seeded(6, 1, 0.0, 0.4, [scale]):
            brightest = shown[:, 0].amax((1, 2)) / 2 + 0.5
            assert (brightest - (1 - math.exp(-3 * 0.8))).abs().max() < 0.05

    torch.manual_seed(0)
    number = torch.randint(1, 4, (6,))
    seeded(6, 3, 0.5, 0.4, [1.0])               # tries until each has its place
    assert traced.pop() == number.sum()
    torch.manual_seed(0)
    number, _, small = torch.randint(1, 3, (40,)), torch.rand(40, 2, 2), torch.randint(2, (40, 2))
    seeded(40, 2, 0.1, 0.5, [1.0, 0.2])         # where there is one: here for two small ones alone
    assert traced.pop() == 40 + ((number == 2) & small.all(1)).sum()

    asked = []
    monkeypatch.setattr(rd, "denoising_loss", lambda *a, **k: asked.append((a, k)) or 0)
    x0, poses = torch.rand(2, 3, 32, 32), PAIR
    ablations.composed(teacher, count=3)(None, SimpleNamespace(config=config), x0, poses, 0.5)
    ((_, _, target, target_from, *_), more), = asked
    source, source_from = more["seen"]
    assert torch.equal(target[:2], x0) and torch.equal(source[:2], x0) and len(target) == 8
    assert torch.equal(target[2:5], source[5:]) and torch.equal(target[5:], source[2:5])
    assert torch.equal(target_from[2:5], source_from[5:])
    assert not torch.equal(target_from[2:], source_from[2:])


# The notebook -----------------------------------------------------------------------------------

TUTORIAL = HERE / "tutorial.ipynb"


def tutorial_cells():
    """The sources of tutorial.ipynb's code cells."""
    cells = json.loads(TUTORIAL.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_tutorial_is_small_and_was_run():
    assert TUTORIAL.stat().st_size < 3e6
    for source in tutorial_cells():
        assert len(source.splitlines()) <= 25, source
        assert max(map(len, source.splitlines())) <= 100, source
    code = [c for c in json.loads(TUTORIAL.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["execution_count"] == i for i, cell in enumerate(code, 1))      # in one go
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) > 20
    assert not any(output["output_type"] == "error" for output in outputs)


@slow
def test_tutorial_runs(tmp_path):
    """All code cells in one namespace; where there is no IPython, a stub shows nothing."""
    stub = ("import sys, types\n"
            "try:\n    import IPython.display\n"
            "except ImportError:\n"
            "    display = types.ModuleType('IPython.display')\n"
            "    display.HTML = display.Markdown = str\n"
            "    display.display = lambda *things: None\n"
            "    sys.modules['IPython'] = types.ModuleType('IPython')\n"
            "    python = sys.modules['IPython']                # which matplotlib asks, too\n"
            "    python.get_ipython, python.version_info = lambda: None, (9, 0)\n"
            "    sys.modules['IPython.display'] = display\n")
    (tmp_path / "tutorial.py").write_text("\n\n".join([stub, *tutorial_cells()]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tutorial.py"], cwd=tmp_path, capture_output=True,
        text=True,
        env={**os.environ, "SMOKE": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(HERE),
             "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert used < 90                    # seconds of one core: other work does not count
    assert "cameras differ by at most" in done.stdout               # it came to section 12
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "tutorial.py"]


# The shipped weights ----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def clevr1():
    return load_checkpoint("clevr1")


def test_shipped_weights_show_novel_views_of_unseen_scenes(clevr1):
    scores = evaluate(clevr1, synthetic("clevr1", 32, 5, 32, seed=rd.HELD_OUT))
    assert scores["novel"]["psnr"] >= 32
    assert scores["novel"]["psnr"] > scores["baseline_input_copied"]["psnr"] + 5


@slow
@pytest.mark.parametrize("name, least", dict(cars=24.5, chairs=26.6, planes=26.4, clevr=20.8).items())
def test_the_other_shipped_weights_show_novel_views_of_unseen_scenes(name, least):
    """At most a decibel less than they did when they were shipped."""
    scores = evaluate(load_checkpoint(name), synthetic(name, 32, 3, 32, seed=rd.HELD_OUT))
    assert scores["novel"]["psnr"] >= least


def test_shipped_weights_generate_scenes_of_many_kinds(clevr1):
    poses = orbit(torch.arange(8) * 45.0, 35, clevr1.config.radius)
    images, planes = generate(clevr1, poses, steps=20)
    truth = synthetic("clevr1", 64, 1, 32, seed=rd.HELD_OUT).images[:, 0]
    for shown in (images, clevr1.render(planes, poses.roll(4, dims=0))[0]):     # and from behind
        assert shown.std(0).mean() > 0.6 * truth.std(0).mean()      # not the same picture each time
        assert shown.flatten(2).std(-1).mean() > 0.6 * truth.flatten(2).std(-1).mean()  # nor flat


@slow
def test_shipped_weights_find_the_camera(clevr1):
    views = synthetic("clevr1", 24, 1, 32, seed=rd.HELD_OUT)
    images, poses = views.images[:, 0], views.poses[:, 0]
    planes = reconstruct(clevr1, images)
    given, found = (psnr(rd.to_unit(clevr1.render(planes, pose)[0]), rd.to_unit(images)).mean()
                    for pose in (poses, rd.find_poses(clevr1, images)))
    assert found > given - 1


def test_inpainting_ends_with_what_was_rendered():
    """A step down the gradient is for what is asked again: with one step, there is none."""
    model, images = tiny_model(), torch.rand(2, 3, 16, 16) * 2 - 1
    masks = torch.ones(2, 1, 16, 16)
    masks[:, :, 4:12, 4:12] = 0
    plain, guided = (inpaint(model, images, masks, PAIR, 1, guidance=g)[0] for g in (0.0, 1e3))
    assert torch.equal(plain, guided)
    plain, guided = (inpaint(model, images, masks, PAIR, 2, guidance=g)[0] for g in (0.0, 1e3))
    assert not torch.equal(plain, guided)
    # and where nothing is known, it is exactly what `render` shows, importance samples and all
    x_T = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    rendered, _, _ = model.render(model.encode(x_T, model.schedule.T), PAIR)
    filled, _ = inpaint(model, images, torch.zeros_like(masks), PAIR, 1)
    assert torch.allclose(filled, rendered, atol=1e-6)


@slow
def test_shipped_weights_fill_a_hole_in_two_ways(clevr1):
    views = synthetic("clevr1", 8, 1, 32, seed=rd.HELD_OUT)
    images, poses, masks = views.images[:, 0], views.poses[:, 0], torch.ones(8, 1, 32, 32)
    masks[:, :, 10:, 10:22] = 0

    def known_psnr(planes):
        error = (clevr1.render(planes, poses)[0] - images).square() / 4 * masks
        return -10 * (error.mean((1, 2, 3)) / masks.mean((1, 2, 3))).log10().mean()
    (a, planes), (b, others) = (inpaint(clevr1, images, masks, poses, 20, seed=s) for s in (0, 1))
    limit = known_psnr(reconstruct(clevr1, images)) - 3
    assert known_psnr(planes) > limit and known_psnr(others) > limit
    assert torch.equal(a * masks, images * masks)
    assert (a - b)[(masks == 0).expand_as(a)].square().mean().sqrt() > 0.05


# Bad input of every kind -------------------------------------------------------------------------

HOSTILE = [None, True, -1, 0, 3, 0.5, 1e-320, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf,
           10 ** 400, "", "nan", "../../x", "é ü\u202e 新", "\0", "/dev/zero", "x" * 5000, [], {},
           [[]], [None], {"a": 1}, [[1] * 4] * 4, [["a"] * 4] * 4, [1, [2]], [1e308, math.nan, 3]]
WORDS = ["nan", "inf", "-inf", "-1", "0", "1e99", "1e308", "-1e308", "1e-320", "9" * 20, "9" * 400,
         "", "é 新", "a b", "1.5", "0x10", "None", "[1]", "--", "-", "%s", "1_0", "$HOME", "*", "1"]


class Hang(BaseException):
    """Raised by the timer; no handler of errors takes it for one."""


def nodes(tree, path=()):
    """The paths of all that is in nested dicts and lists."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(
        tree, list) else ()
    return [path] * bool(path) + [p for key, value in inside for p in nodes(value, (*path, key))]


def replaced(tree, path, value):
    """A nested dict or list in which the node at a path is another, or is gone where `nodes`."""
    if not path:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) == 1 and value is nodes:
        del tree[path[0]]
    else:
        tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def odd_tensor(weight, rng):
    """A tensor that is not what it should be, or claims to be much more than is stored."""
    return rng.choice([
        weight * math.nan, weight * math.inf, weight.double(), weight.to(torch.complex64),
        weight.to(torch.int8), weight.flatten()[:-1], weight[None], torch.zeros(0), weight > 0,
        weight.to_sparse(), torch.zeros(1).expand(2 ** 20, 2 ** 20), weight * 1e38])


def odd_picture(path, rng):
    """A picture file of another kind, with a false size, or with bad EXIF."""
    image = Image.open(path).convert("RGB").resize((24, 24))
    how, file = rng.choice(["BMP", "GIF", "TIFF", "EXIF", "size", "size", "L", "P", "1x1", "F", "I",
                            "LA", "CMYK", "wide"]), BytesIO()
    if how in ("BMP", "GIF", "TIFF"):
        image.save(file, how)
    elif how == "EXIF":
        tags = rng.choice([b"Exif\0\0II*\0", b"Exif\0\0junk and more junk", rng.randbytes(60),
                           b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\0\0\0"])
        image.save(file, rng.choice(["PNG", "JPEG"]), exif=tags)
    elif how == "size":                     # stated in the header, with the right checksum
        image.save(file, "PNG")
        head = bytearray(file.getvalue())
        for at in (16, 20):
            head[at:at + 4] = rng.choice([0, 1, 9000, 2 ** 20, 2 ** 31 - 1]).to_bytes(4, "big")
        head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
        file = BytesIO(head)
    elif how in ("1x1", "wide"):
        image.resize((1, 1) if how == "1x1" else (3000, 1)).save(file, "PNG")
    elif how in ("F", "I", "CMYK"):
        image.convert(how).save(file, "TIFF")
    else:
        image.convert("L").convert(how).save(file, "PNG")
    path.write_bytes(file.getvalue())


def odd_archive(path, rng):
    """An .npz with an array of another kind or shape, or a header that claims too much."""
    with np.load(path) as file:
        arrays = dict(file)
    key = rng.choice(list(arrays))
    old = arrays[key]
    arrays[key] = rng.choice([
        old * math.nan, old * 1e308, old * 0, old[0], old[None], old.astype("U8"), old + 1j,
        old.astype(object), np.zeros((0, 4)), np.float64(3), old.astype("M8[s]"), old > 0,
        np.zeros((4, 4), [("a", "f4")]), np.zeros((4, 4, 3)), old.astype("m8[s]"), b"bytes"])
    if rng.random() < 0.2:
        del arrays[key]
    np.savez(path, **arrays)
    if rng.random() < 0.2:
        with ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            text = "{'descr': '<f8', 'fortran_order': False, 'shape': (%d, 4), }" % rng.choice(
                [2 ** 24, 2 ** 40, 2 ** 62])
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\0\x76\0" + text.ljust(117).encode() +
                             b"\n" + bytes(99))


def odd_checkpoint(path, rng):
    """A checkpoint in which one thing, of its config more often than not, is another."""
    state = torch.load(path, weights_only=True)
    top = rng.choice([["config"], ["config"], ["ema"], ["model"], ["optimizer"], list(state)])
    where = rng.choice([p for p in nodes(state) if p[0] in top])
    old = state
    for key in where:
        old = old[key]
    value = (odd_tensor(old, rng) if torch.is_tensor(old) else rng.choice([
        *HOSTILE, nodes, 16, 64, 512, 1024, 4096, (None, None), ("a", "b"), (0.0, math.nan, 0.0)]))
    torch.save(replaced(state, where, value), path)


def odd_numbers(path, rng):
    words = path.read_text().split(" ")
    words[rng.randrange(len(words))] = rng.choice(WORDS)
    path.write_text(" ".join(words))


def odd_json(path, rng):
    about = json.loads(path.read_text())
    if rng.random() < 0.1:
        return path.write_text(rng.choice(["[", '{"frames":', '{"scenes": [']) * 100000)
    where = rng.choice(nodes(about))
    path.write_text(json.dumps(replaced(about, where, rng.choice([*HOSTILE, nodes]))))


ODD = {".png": odd_picture, ".npz": odd_archive, ".pt": odd_checkpoint, ".json": odd_json,
       ".txt": odd_numbers}


def spoil(path, rng):
    """Damage a file in one of many ways; half of the time in a way of its own kind."""
    whole, how = path.read_bytes(), rng.choice(
        ["own"] * 9 + ["bits", "bits", "cut", "junk", "empty", "gone", "folder", "loop", "pipe"])
    if how == "own" and path.suffix in ODD:
        ODD[path.suffix](path, rng)
    elif how == "bits":
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
    elif how in ("cut", "junk", "empty"):
        path.write_bytes({"cut": whole[:rng.randrange(len(whole))], "empty": b"",
                          "junk": rng.randbytes(300)}.get(how))
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "pipe" and path.suffix == ".png":
            os.mkfifo(path)
    return f"{how} {path.name}"


def write_all_formats(root):
    """A small set in each format of data.py, as their own tests write them."""
    write_srn(root / "srn é 新", 2, 2)
    write_nmr(root / "nmr", ["aa", "b b"], views=2)
    write(root / "nmr" / "softras_train.lst", "aa\nb b\n")
    poses, rng = cameras(2, 2), np.random.default_rng(0)
    small = pictures(poses, 1.0, 32)
    for v in range(4):
        save(root / "567" / f"{v}_sc{v // 2:04d}.png", small[v // 2, v % 2])
        np.savetxt(root / "567" / f"{v}_sc{v // 2:04d}_RT.txt", poses[v // 2, v % 2])
        save(root / "own" / "pictures" / f"r_{v}.png", small[v // 2, v % 2])
    shots = {"camera_angle_x": 1.0, "w": 32, "h": 32, "fl_y": 30.0, "cx": 16,
             "frames": frames(poses.flatten(0, 1), 2.0)}
    write(root / "own" / "transforms_train.json", json.dumps(shots))
    scenes = [simulated_scene(rng, 3, "train", i)[0] for i in range(2)]
    for scene in scenes:
        save(root / "clevr" / "images" / "train" / scene["image_filename"],
             np.zeros((32, 48, 3), np.uint8))
    for name in ("clevr", "layouts"):
        write_clevr(root / name, scenes, "train")
    return sorted(path for path in root.iterdir())


@contextmanager
def limits(seconds, memory):
    """Hang after so many seconds; no more than so many bytes beyond what is taken already."""
    def hang(*_):
        raise Hang
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.setitimer(signal.ITIMER_REAL, 0)


def options(command, rng):
    """A short run of a command, in which one to three options are what they should not be."""
    files = ["photo.png", "é ü.png", "text.png", "loop.png", "pipe.png", "out", "no.png", "x" * 300,
             "half.pt", "tiny.pt", ".", "", "/dev/null", "photo.png/x", "../photo.png", "odd.png"]
    given = {"generate": "--count 1 --steps 1", "reconstruct": "--steps 1 --t-r 9",
             "inpaint": "--steps 1", "evaluate": "--scenes 1 --views 2", "export": "--count 1",
             "train": " ".join(TRAIN) + " --steps 1", "demo": ""}[command].split()
    given = dict(zip(given[::2], given[1::2])) | {"--out": "written é"}
    own = {"generate": ["count", "steps", "eta"], "evaluate": ["data", "scenes", "views", "t-r"],
           "reconstruct": ["image", "fit", "t-r", "steps", "azimuth", "elevation"],
           "inpaint": ["image", "mask", "fit", "steps", "azimuth", "elevation", "fillings"],
           "export": ["image", "count", "fit"], "demo": [],
           "train": [f.replace("_", "-") for f in Config.__dataclass_fields__]}[command]
    if command != "train":
        given["--checkpoint"] = "tiny.pt"
        own = own * 2 + ["checkpoint"]
    bad = rng.sample(sorted({*own, "out", "seed", "device"}), rng.choice([1, 1, 2]))
    for name in bad:
        pool = files if name in ("image", "mask", "checkpoint", "data", "out") else WORDS
        given["--" + name] = rng.choice(pool)
    if given["--out"] in ("out", ".", "", "../photo.png", "no.png", "odd.png") or command == "demo":
        given["--device"] = "abacus"                            # refused before it writes there
    return [command, *(word for pair in given.items() for word in pair)]


@slow
@pytest.mark.filterwarnings("ignore")
def test_bad_input_of_every_kind_ends_in_success_or_one_sentence(
        desk, tmp_path_factory, capsys, monkeypatch):
    """1,000 cases: 500 sets of pictures, 150 checkpoints, 150 pictures, 200 command lines."""
    rng = random.Random(7)
    for name, quick in (("surface_points", dict(resolution=4, samples=8)),
                        ("save_turntable", dict(frames=2))):
        monkeypatch.setattr(rd, name, partial(getattr(rd, name), **quick))
    monkeypatch.setattr(rd, "health", lambda *_: "")
    originals = write_all_formats(tmp_path_factory.mktemp("formats"))
    shutil.copy("photo.png", "é ü.png")
    Path("loop.png").symlink_to("loop.png")
    os.mkfifo("pipe.png")
    loaders = dict(zip(["567", "clevr", "layouts", "nmr", "own", "srn é 新"], [
        load_clevr567, load_clevr, load_clevr, data.load_nmr, load_folder, load_srn]))

    def case(k):
        """Sets up one case -> what was done, and the call to make."""
        shutil.rmtree("written é", ignore_errors=True)
        if k < 500:
            source = originals[k % len(originals)]
            shutil.rmtree("set ä", ignore_errors=True)
            shutil.copytree(source, "set ä")
            files = sorted(f for f in Path("set ä").rglob("*") if f.is_file())
            files = [f for f in files if f.suffix != ".png"] * 2 + files
            chosen = dict.fromkeys(rng.choices(files, k=rng.choice([1, 1, 2])))
            done = [spoil(f, rng) for f in chosen]
            way, loader = rng.random(), rng.choice([load, loaders[source.name]])
            if way < 0.8:
                asked = rng.choice([(), (1,), (2, 2), (None, 1), (10 ** 6, 3)])
                seed = rng.choice([0, -1, 5])
                return (source.name, *done, loader.__name__, asked), lambda: loader(
                    Path("set ä"), *asked, resolution=16, seed=seed)
            line = ["evaluate", "--checkpoint", "tiny.pt", "--scenes", "1", "--views", "2"]
            line = line if way < 0.9 else ["train", *TRAIN, "--steps", "1", "--scenes", "1"]
            line += ["--data", "set ä", "--out", "written é"]
            return (source.name, *done, line[0]), lambda: rd.main(line)
        if k < 650:
            line = rng.choice([["evaluate", "--scenes", "1", "--views", "2"]] * 2 + [
                ["train", *TRAIN, "--resume", "--steps", "6"], ["generate", "--count", "1"]])
            path = Path("written é/clevr1.pt" if line[0] == "train" else "odd.pt")
            path.parent.mkdir(exist_ok=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.copy("tiny.pt", path)
            line += ["--out", "written é"]
            line += ["--steps", "1"] if line[0] == "generate" else []
            line += [] if line[0] == "train" else ["--checkpoint", "odd.pt"]
            return (spoil(path, rng), line[0]), lambda: rd.main(line)
        if k < 800:
            for path in (Path("odd.png"), Path("odd_mask.png")):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                shutil.copy("photo.png", path)
            done = spoil(Path(rng.choice(["odd.png", "odd_mask.png"])), rng)
            fit = rng.choice(["crop", "pad"])
            if rng.random() < 0.8:
                return (done, fit), lambda: (
                    read_image("odd.png", 16, (0.5, 0.0, -1.0), fit), read_mask(
                        "odd_mask.png", 16, data.open_picture("odd.png").size, fit))
            line = "inpaint --image odd.png --mask odd_mask.png --checkpoint tiny.pt --steps 1 "
            line += f"--azimuth 3 --elevation 3 --fit {fit} --out"
            return (done, "inpaint"), lambda: rd.main([*line.split(), "written é"])
        line = options(rng.choice(list(COMMANDS)), rng)
        return line, lambda: rd.main(line)

    def listing():
        found = {p: p.lstat().st_mtime_ns for p in Path().rglob("*") if not p.is_dir()}
        return {p: m for p, m in found.items() if p.parts[0] != "written é"}

    wrong, ends, longest = [], Counter(), (0, None)
    for k in range(1000):
        what, call = case(k)
        before, start, found = listing(), time.monotonic(), None
        capsys.readouterr()
        try:
            with limits(20, 3 * 2 ** 30):
                found = call()
            end = "success"
        except SystemExit as stop:
            said = capsys.readouterr().err.strip().split("\n")
            end = "exit"
            if stop.code != 2 or "error: " not in said[-1] or len(said[-1]) > 800:
                wrong.append((k, what, stop.code, said))
        except (ValueError, OSError) as error:
            end = "exception"
            if not str(error).strip():
                wrong.append((k, what, error))
        except (Exception, Hang) as error:
            end = "wrong"
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append((k, what, repr(error)[:200], place.filename, place.lineno))
        if isinstance(found, data.Views) and not (all(
                x.isfinite().all() for x in (found.images, found.poses, found.background)) and
                0 < found.focal < math.inf and 0 < found.scale < math.inf
                and found.images.abs().max() <= 1):
            wrong.append((k, what, "not finite"))
        if "nan" in capsys.readouterr().out:
            wrong.append((k, what, "shows NaN"))
        if listing() != before:
            wrong.append((k, what, "wrote", {*listing().items()} ^ {*before.items()}))
        ends[end] += 1
        longest = max(longest, (time.monotonic() - start, str(what)))
    assert not wrong, "\n".join(map(str, wrong))
    print(*ends.items(), "longest:", *longest)
    assert min(ends["success"], ends["exit"], ends["exception"]) > 50
