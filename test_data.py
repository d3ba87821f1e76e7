"""Tests of data.py: cameras, the ray tracer, the built-in sets, pictures, loaders, training.

Everything is compared with something known: a closed form, a plain loop, a direct computation.
"""
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from data import (BOX, CLEVR_COLORS, CLEVR_NAMES, CLEVR_SCALE, CYLINDER, EMPTY, SETS, SPHERE,
                  Scenes, camera_rays, load, load_clevr567, load_folder, load_srn, orbit,
                  random_poses, random_scenes, read_image, read_mask, synthetic, trace,
                  training_pictures)


# Scenes by hand ---------------------------------------------------------------------------------

def make_scene(*primitives, ground=-0.5, light=(-1.0, -1.0, 2.8284), background=(0.75,) * 3):
    """One scene of (kind, 3x3 axes in columns, center, color, shine)."""
    kind = torch.tensor([[p[0] for p in primitives]])
    to_world = torch.tensor(np.array([[np.c_[p[1], p[2]] for p in primitives]])).float()
    color = torch.tensor([[p[3] for p in primitives]]).float()
    shine = torch.tensor([[float(p[4]) for p in primitives]])
    return Scenes(kind, to_world, color, shine, ground, background, light)


def rotation_z(angle):
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def ground_depth(poses, focal, side, ground):
    """Depth of an empty scene."""
    origin, direction = camera_rays(poses, focal, side)
    depth = (ground - origin[..., 2]) / direction[..., 2]
    return torch.where(direction[..., 2] < 0, depth, math.inf).view(-1, side, side)


SLANTED = np.array([[0.5, 0.1, 0.2], [0.0, 0.3, -0.1], [-0.1, 0.05, 0.4]])


# Cameras ----------------------------------------------------------------------------------------

def test_orbit_looks_at_its_target():
    """Right-handed, level, z up; azimuth goes from +x towards +y; arguments broadcast."""
    target = torch.tensor([0.1, -0.2, 0.3])
    azimuth, elevation = torch.tensor([0.0, 90, 200, 311]), torch.tensor([0.0, 30, 60, 90])
    poses = orbit(azimuth, elevation, 2.5, target)
    right, down, into, center = poses[:, :3].unbind(-1)
    assert torch.allclose(center + 2.5 * into, target.expand(4, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.cross(right, down), into, atol=1e-6)
    assert torch.allclose(right[:, 2], torch.zeros(4)) and (down[:3, 2] < 0).all()
    assert torch.equal(poses[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(4, 4))
    assert torch.allclose(center[0] - target, torch.tensor([2.5, 0, 0]), atol=1e-6)
    toward_y = torch.tensor([0, 2.5 * math.cos(math.pi / 6), 1.25])
    assert torch.allclose(center[1] - target, toward_y, atol=1e-6)
    assert orbit(10, 20, 2).shape == (4, 4)
    assert orbit(torch.zeros(3, 1), azimuth, 2).shape == (3, 4, 4, 4)
    config = SimpleNamespace(elevation=(20.0, 50.0), radius=2.7)
    turned = data.turn_poses(SimpleNamespace(config=config, background=torch.zeros(3)), 45, 4)
    assert torch.allclose(turned, orbit(torch.tensor([45.0, 135, 225, 315]), 35, 2.7), atol=1e-6)


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

def reference_depth(kind, matrix, center, origin, direction):
    """The first of the roots that lie on the surface, for one ray, in double precision."""
    back = np.linalg.inv(matrix)
    o, d = back @ (origin - center), back @ direction
    roots = []
    for axis in {BOX: (0, 1, 2), CYLINDER: (2,), SPHERE: ()}[kind]:
        for face in (-1, 1):
            t = (face - o[axis]) / d[axis]
            p = np.delete(o + t * d, axis)
            if (np.abs(p).max() if kind == BOX else np.hypot(*p)) < 1:
                roots.append(t)
    n = {BOX: 0, CYLINDER: 2, SPHERE: 3}[kind]
    for t in np.roots([d[:n] @ d[:n], 2 * o[:n] @ d[:n], o[:n] @ o[:n] - 1]) if n else ():
        if np.isreal(t) and (n == 3 or abs(o[2] + t.real * d[2]) < 1):
            roots.append(t.real)
    return min(roots, default=math.inf)


@pytest.mark.parametrize("kind", [SPHERE, BOX, CYLINDER])
def test_primitives_agree_with_a_loop_and_their_brightness_with_the_slope_of_the_depth(kind):
    center, side = np.array([0.1, 0.05, 0.0]), 17
    scene = make_scene((kind, SLANTED, center, (0.8, 0.8, 0.8), 0), ground=-9.0)
    poses = orbit(torch.tensor([33.0, 251.0, 20.0]), torch.tensor([28.0, -10.0, 5.0]), 2.7)
    depth = trace(scene, poses[None], 1.6, side)[1][0]
    rays = (x.double().numpy() for x in camera_rays(poses, 1.6, side))
    expected = np.array([[reference_depth(kind, SLANTED, center, o, d) for o, d in zip(*pair)]
                         for pair in zip(*rays)]).reshape(3, side, side)
    expected = np.minimum(expected, ground_depth(poses, 1.6, side, -9.0).numpy())
    assert (expected < 3.5).sum() > 50 and np.isinf(expected).any()
    np.testing.assert_allclose(depth.numpy(), expected, rtol=2e-4)

    images, depth = trace(scene, poses[None], 1.6, side := 96, samples=1)
    origin, direction = camera_rays(poses, 1.6, side)
    points = (origin + direction * depth.view(3, -1, 1)).view(3, side, side, 3).double()
    right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normal = F.normalize(torch.linalg.cross(down, right), dim=-1)
    light = np.array(scene.light) / np.linalg.norm(scene.light)
    facing = (normal @ torch.tensor(light)).clamp(min=0)
    ambient = data.AMBIENT + data.FILL * (light[0] * normal[..., 1] - light[1] * normal[..., 0])
    error = ((images[0, :, 0, 1:-1, 1:-1] + 1) / 2 - 0.8 * (ambient + data.DIFFUSE * facing)).abs()
    on = depth[0, :, 1:-1, 1:-1] < 4
    assert on.sum() > 2000 and (error[on] < 0.01).float().mean() > 0.85      # edges have no slope
    assert (error[on] < 0.05).float().mean() > 0.93


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


@pytest.mark.parametrize("shine", [0.0, 0.35])
def test_brightness_follows_lamberts_law_and_highlights_follow_phong(shine):
    light, side = np.array([0.6, 0.0, 0.8]), 65
    scene = make_scene((SPHERE, np.eye(3) * 0.5, (0, 0, 0), (0.4, 0.4, 0.4), shine),
                       ground=-9.0, light=tuple(light))
    images, depth = trace(scene, poses := orbit(0, 0, 2.7)[None, None], 1.6, side, samples=1)
    origin, direction = camera_rays(poses[0], 1.6, side)
    on = depth.view(-1) < 2.6
    normal = ((origin + direction * depth.view(1, -1, 1)) / 0.5)[0, on].double().numpy()
    facing = normal @ light
    mirrored = 2 * facing[:, None] * normal - light
    glint = np.maximum(-(mirrored * direction[0, on].numpy()).sum(1), 0) ** data.EXPONENT
    expected = 0.4 * (data.AMBIENT + data.FILL * 0.6 * normal[:, 1]
                      + data.DIFFUSE * np.maximum(facing, 0)) + shine * glint * (facing > 0)
    np.testing.assert_allclose((images[0, 0, 0].view(-1)[on] + 1) / 2, expected, atol=2e-4)


def test_shadow_falls_away_from_the_light_and_lit_ground_is_the_background():
    light, center = np.array([0.3, -0.8, 1.5]), np.array([0.1, 0.2, 0.0])
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
    lit, dark = ground.numpy() & (aside > 0.203), ground.numpy() & (aside < 0.197)
    assert (brightness[:, lit] == 0.5).all() and lit.sum() > 30 and dark.sum() > 30
    assert torch.allclose(brightness[:, dark], torch.tensor(0.75 * data.SHADOW * 2 - 1))
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


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    synthetic("clevr1", 8, resolution=128)                      # one picture a chunk on a CPU
    assert "tracing: 3 of 8, 10 s left\n" in capsys.readouterr().err


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


FINGERPRINTS = {    # kinds, axes and places, colours, cameras: of seed 0, of seed -1
    "clevr1": [(46.0, 71.88, 64.32, 3.51), (51.0, 66.53, 63.55, -24.15)],
    "clevr": [(137.0, 186.44, 168.35, 3.77), (123.0, 188.22, 156.75, -25.94)],
    "cars": [(1684.0, 1485.71, 1389.04, 4.2), (1686.0, 1485.53, 1416.61, -26.94)],
    "chairs": [(527.0, 510.17, 726.67, 4.49), (520.0, 527.65, 754.24, -28.79)],
    "planes": [(988.0, 1031.13, 1708.34, 3.87), (1023.0, 1046.97, 1950.65, -26.86)],
    "cubes": [(50.0, 59.03, 64.32, 3.51), (50.0, 57.77, 63.55, -24.15)]}


@pytest.mark.parametrize("name", list(SETS))
def test_scenes_are_those_that_the_weights_were_trained_on(name):
    """Any change of the order of draws shows in these sums; seed -1 has the held-out scenes."""
    for seed, expected in zip((0, -1), FINGERPRINTS[name]):
        scenes = random_scenes(name, 50, seed)
        there = scenes.kind != EMPTY
        sums = (scenes.kind[there].sum(), scenes.to_world[there].abs().sum(),
                scenes.color[there].sum(), random_poses(name, 50, 2, seed)[..., :2, 3].sum())
        assert [float(x) for x in sums] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("name", list(SETS))
def test_objects_shadows_and_cameras_are_where_the_set_says(name):
    scenes, about = random_scenes(name, 2000), SETS[name]
    there, light = scenes.kind != EMPTY, torch.tensor(scenes.light)
    kind, (axes, center) = scenes.kind[there, None], scenes.to_world[there].split((3, 1), dim=2)
    fall = torch.eye(3) - light[:, None] * torch.eye(3)[2] / light[2]       # onto z = 0, as shadows
    for onto, lift in (torch.eye(3), 0), (fall, scenes.ground * (light / light[2])):
        a, middle = onto @ axes, (onto @ center)[..., 0] + lift             # (M, 3, 3), (M, 3)
        reach = torch.where(kind == BOX, a.abs().sum(2), torch.where(
            kind == SPHERE, a.norm(dim=2), a[..., :2].norm(dim=2) + a[..., 2].abs()))
        assert (middle.abs() + reach).max() < 1
        assert (middle - reach)[:, 2].min() > scenes.ground - 0.02
    center = random_poses(name, 2000)[:, 0, :3, 3]
    elevation = torch.rad2deg(torch.asin(center[:, 2] / about.radius))
    azimuth = torch.rad2deg(torch.atan2(center[:, 1], center[:, 0]))
    assert torch.allclose(center.norm(dim=1), torch.tensor(about.radius), atol=1e-5)
    assert about.elevation[0] <= elevation.min() + 1e-3
    assert about.elevation[1] >= elevation.max() - 1e-3
    assert (torch.histc(azimuth, 8, -180, 180) > 180).all()


# Real datasets, in files that the tests write as the originals are -------------------------------

POINT = (0.25, -0.1, 0.15)              # the centre of a small red sphere, in cube units
FLIP = np.diag([1.0, -1, -1, 1])        # OpenCV's axes to OpenGL's
RED = make_scene((SPHERE, 0.1 * np.eye(3), POINT, (1, 0, 0), 0),
                 (BOX, np.diag([0.2, 0.1, 0.15]), (-0.3, 0.2, -0.15), (0, 0, 1), 0),
                 ground=-0.3, background=(1.0, 1.0, 1.0))


def cameras(views, scenes=1):
    """Poses (N, V, 4, 4) from all sides."""
    i = torch.arange(scenes * views).view(scenes, views)
    return orbit(20 + 80.0 * i, 25 + 7.0 * (i % 4), 2.6 + 0.05 * i)


def pictures(poses, focal, side):
    """8-bit pictures (N, V, side, side, 3) of the scene RED."""
    images = trace(RED, poses.flatten(0, 1)[None], focal, side, depth=False)[0]
    images = ((images + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
    return images.reshape(*poses.shape[:2], side, side, 3)


def save(path, content):
    """A text, bytes, or a picture from an array, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def check(views, poses, tolerance=0.35):
    """The loaded cameras are these, show POINT where it is, and give the pictures back."""
    side = views.images.shape[-1]
    assert torch.allclose(views.poses, poses, atol=2e-5)
    flat = views.poses.flatten(0, 1)
    again = trace(RED, flat[None], views.focal, side, 3, depth=False)[0]
    assert (again - views.images.flatten(0, 1)).abs().mean() < 0.02
    at = torch.arange(side) + 0.5
    for image, pose in zip(views.images.flatten(0, 1).double(), flat.double()):
        x, y, z = pose[:3, :3].T @ (torch.tensor(POINT) - pose[:3, 3])
        r, g, b = (image + 1) / 2
        red = ((g + b < r) & (r > 0.2)).double()        # by hue: one side of the sphere is darker
        middle = torch.stack([(red.sum(0) * at).sum(), (red.sum(1) * at).sum()]) / red.sum()
        expected = (torch.stack([x, y]) / z * views.focal + 0.5) * side
        assert (middle - expected).norm() < tolerance                   # in pixels


def write_srn(folder, scenes, views, start=0, head="131.25 64.0 64.0 0.\n0. 0. 0.\n1.\n128 128\n"):
    poses = cameras(views, start + scenes)[start:]
    for i, (some, images) in enumerate(zip(poses, pictures(poses, 131.25 / 128, 128)), start):
        scene = folder / f"{i:032x}"
        save(scene / "intrinsics.txt", head)
        for v, (pose, image) in enumerate(zip(some.double().numpy().copy(), images)):
            pose[:3, 3] *= 0.5                                  # objects are within 0.5 there
            save(scene / "rgb" / f"{v:06d}.png", np.dstack([image, np.full((128, 128), 255, "u1")]))
            save(scene / "pose" / f"{v:06d}.txt", " ".join(f"{x:.9f}" for x in pose.ravel()))
    return poses


def test_srn_its_splits_and_parts_of_it(tmp_path, capsys, monkeypatch):
    """Folders named by splits; what Macs leave; some scenes and views, read without the rest."""
    poses, held_out = write_srn(tmp_path / "cars_train", 3, 4), write_srn(tmp_path / "cars_test", 2,
                                                                          4, start=3)
    save(tmp_path / "__MACOSX" / "a" / "rgb" / "._0.png", b"?")
    save(tmp_path / "cars_train" / f"{0:032x}" / "rgb" / "._000000.png", b"?")
    views = load(str(tmp_path), resolution=128)
    assert views.focal == 131.25 / 128 and views.scale == 0.5 and not views.held_out
    assert torch.equal(views.background, torch.ones(3))
    check(views, poses)
    check(load_srn(tmp_path, "train", resolution=64), poses)        # resized: the same cameras
    test = load(tmp_path, split="test", resolution=128)
    check(test, held_out)
    assert test.held_out and "held out" not in capsys.readouterr().err
    for split in (None, "train", "test"):                           # a split itself is whole
        check(load(tmp_path / "cars_test", split=split, resolution=128), held_out)
    check(load(tmp_path / "cars_test" / f"{3:032x}", resolution=128), held_out[:1])

    opened = []
    monkeypatch.setattr(data, "open_picture", lambda path, turn, open=data.open_picture:
                        opened.append(path) or open(path, turn))
    some = load_srn(tmp_path, scenes=2, views=3, resolution=16)
    assert len(opened) == len(set(opened)) == 6
    assert {f.parent.parent.name for f in opened} == {f"{i:032x}" for i in range(2)}
    for ours, every in zip(some.poses, poses):              # distinct views of the right scene
        match = (ours[:, None] - every[None]).abs().amax((-1, -2)) < 1e-4
        assert (match.sum(1) == 1).all() and match.sum(0).max() == 1
    one = [load_srn(tmp_path, views=1, resolution=8, seed=seed).poses for seed in range(8)]
    assert len({tuple(p[:, 0, 0, 3].tolist()) for p in one}) > 3        # starts differ by scene
    again = load_srn(tmp_path, scenes=1, views=3, resolution=16)
    assert torch.equal(again.images[0], some.images[0])     # whatever the count of scenes
    assert load_srn(tmp_path, scenes=9, views=9, resolution=8).images.shape[:2] == (3, 4)
    assert "3 scenes of 4 views are all there are" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n512 512\n",
                                  "525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n128 128\n",
                                  "131.25 64.0 64.0 0.\n0. 0. 0.\n1.\n128 128\n0\n"])
def test_srn_archives_differ(tmp_path, head):
    """Its chairs are nested once more; the test part beside them is not."""
    poses = write_srn(tmp_path / "chairs_train" / "chairs_2.0_train", 1, 2, head=head)
    check(load(tmp_path, resolution=128), poses)
    held_out = write_srn(tmp_path / "chairs_test", 1, 2, start=1, head=head)
    check(load(tmp_path, split="train", resolution=128), poses)
    check(load(tmp_path, split="test", resolution=128), held_out)


@pytest.mark.parametrize("inverse", [True, False])
def test_nmr(tmp_path, inverse):
    """Its lists of scenes, y up, masks (of half of the cases), either matrix."""
    root, ids, focal = tmp_path / "02958343", ["aa", "bb", "cc"], 1.866
    poses = cameras(4, 3)
    for i, images in enumerate(pictures(poses, focal, 64)):
        arrays, scene = {}, root / ids[i]
        for v, image in enumerate(images):
            pose = poses[i, v].double().numpy().copy()
            pose[:3, 3] *= 0.5
            pose = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]) @ pose
            arrays[f"world_mat_{v}"] = np.linalg.inv(pose)[:4 if inverse else 3]
            if inverse:
                arrays[f"world_mat_inv_{v}"] = pose
                mask = np.uint8(image.min(-1) < 250) * np.uint8(255)
                save(scene / "mask" / f"{v:04d}.png", mask)
                image = image * (mask[..., None] > 0)       # black outside: the mask makes it white
            arrays[f"camera_mat_{v}"] = np.diag([2 * focal, 2 * focal, 1, 1])
            save(scene / "image" / f"{v:04d}.png", image)
        np.savez(scene / "cameras.npz", **arrays)
    save(root / "softras_train.lst", "cc\nnot_downloaded\nbb\n")
    save(root / "softras_test.lst", "aa\n")
    for path in (root, tmp_path):
        views = load(path, resolution=64)
        assert views.focal == pytest.approx(focal) and views.scale == 0.5
        check(views, poses[[2, 1]])
        check(load(path, split="test"), poses[:1])
    save(root / "softras_val.lst", "not_downloaded\n")
    with pytest.raises(FileNotFoundError, match="no scenes in"):
        load(root / "softras_val.lst")
    del arrays["camera_mat_1"]
    np.savez(root / "cc" / "cameras.npz", **arrays)
    with pytest.raises(ValueError, match="cc is not as expected: .*camera_mat_1"):
        load(tmp_path)


def test_clevr567(tmp_path):
    """Squeezed pictures, masks beside them, two scenes in one folder and one in another."""
    poses = cameras(4, 3)
    for i, images in enumerate(pictures(poses, 350 / 320, 320)):
        folder = tmp_path / ("train" if i < 2 else "test")
        folder.mkdir(exist_ok=True)
        for v, image in enumerate(images):
            pose = poses[i, v].double().numpy().copy()
            pose[:3, 3] *= CLEVR_SCALE
            name = str(folder / f"{4 * i + v:05d}_sc{i:04d}_az{v:02d}")
            squeezed = Image.fromarray(image[40:280]).resize((128, 128), Image.Resampling.BOX)
            for end in (".png", "_mask.png"):
                squeezed.save(name + end)
            np.savetxt(name + "_RT.txt", pose)
            np.savetxt(name + "_azi_rot.txt", np.eye(3))
    views = load(tmp_path, resolution=96)
    assert views.focal == pytest.approx(350 / 240)
    check(views, poses[:2])
    check(load(tmp_path, split="test", resolution=96), poses[2:], tolerance=0.5)
    assert load_clevr567(tmp_path, scenes=1, views=2, resolution=8).images.shape[:2] == (1, 2)


# Your own pictures: transforms.json ---------------------------------------------------------------

def write_folder(folder, poses, scale=1.0, focal=1.6, side=48, file="transforms.json"):
    """Pictures and their transforms.json, which is returned to be changed."""
    frames = []
    for v, (pose, image) in enumerate(zip(poses.double().numpy().copy(),
                                          pictures(poses[None], focal, side)[0])):
        pose[:3, 3] *= scale
        save(folder / "images" / f"{v}.png", image)
        frames.append({"file_path": f"images/{v}.png", "transform_matrix": (pose @ FLIP).tolist()})
    about = {"camera_angle_x": 2 * math.atan(0.5 / focal), "frames": frames}
    save(folder / file, json.dumps(about))
    return about


def picture(folder, v=0):
    return Image.open(folder / "images" / f"{v}.png").copy()


def squeeze(folder, about):
    about["camera_angle_y"] = about["camera_angle_x"]
    for v in range(3):
        picture(folder, v).resize((48, 24), Image.Resampling.BOX).save(folder / f"images/{v}.png")


def double(folder, about):
    """Frames without w and h: each has its own picture's size; a frame's fl_x goes before all."""
    about["fl_x"] = 7.0
    for v, frame in enumerate(about["frames"]):
        frame["fl_x"] = 1.6 * 48 * (1 + v)
        picture(folder, v).resize((48 * (1 + v),) * 2).save(folder / f"images/{v}.png")


def masks(folder, about):
    for v, frame in enumerate(about["frames"]):
        image = np.asarray(picture(folder, v))
        mask = np.uint8(image.min(-1) < 250) * np.uint8(255)
        save(folder / f"masks/{v}.png", mask)
        save(folder / f"images/{v}.png", image * (mask[..., None] > 0))
        frame["mask_path"] = f"masks\\{v}.png"


def turned(folder, about):
    exif = Image.Exif()
    exif[274] = 3
    picture(folder).save(folder / "images/0.png", exif=exif)


def no_extension(folder, about):
    for v, frame in enumerate(about["frames"]):
        (folder / f"images/{v}.png").rename(folder / f"images/{v}.PNG")
        save(folder / f"images/{v}.txt", "not a picture")
        frame["file_path"] = f"images/{v}"


def frame(**changes):
    return lambda folder, about: about["frames"][1].update(changes)


def top(**changes):
    return lambda folder, about: about.update(changes)


def rewrite(encoding):
    return lambda folder, about: json.dumps(about).encode(encoding)


def cut(folder, about):
    """Pictures that lack some rows and columns, larger in their intrinsics than in their files."""
    for v, frame in enumerate(about["frames"]):
        left, top = v, 2 + 2 * v
        image = picture(folder, v).crop((left, top, 46, 47))
        image.save(folder / f"images/{v}.jpg", quality=98, subsampling=0)
        frame |= {"file_path": f"images/{v}.jpg", "w": 4 * image.width, "h": 4 * image.height,
                  "fl_x": 4 * 1.6 * 48, "cx": 4 * (24 - left), "cy": 4 * (24 - top)}


FINE = [(squeeze, ""), (cut, ""), (double, ""), (masks, ""), (turned, ""), (no_extension, ""),
        (top(cx=None, cy=None, w=48, h=None), ""), (rewrite("utf-8-sig"), ""),
        (frame(file_path="images\\1.png"), ""), (frame(p2=0.1), "lens distortion is not corrected"),
        (lambda folder, about: about["frames"].append({"file_path": "images/9.png"}),
         "1 of 4 pictures are missing")]
BAD = [(frame(transform_matrix=np.eye(4).tolist()), "1.png .*: the camera is 0 cube units"),
       (frame(transform_matrix=(2 * np.eye(4)).tolist()), "1.png .*: the pose is not a rotation"),
       (frame(transform_matrix=np.diag([1, 1, -1, 1.0]).tolist()), "the pose is not a rotation"),
       (frame(transform_matrix=[[1.0, 2]]), "transforms.json is not as expected"),
       (frame(transform_matrix=np.eye(4)[:2].tolist()), "images.1.png is not as expected"),
       (frame(transform_matrix=[[1, 0, 0, math.nan], *np.eye(4)[1:].tolist()]), "1.png .*: the pose"),
       (frame(transform_matrix=[[1, 0, 0, 1e300], *np.eye(4)[1:].tolist()]), "cube units from"),
       (frame(transform_matrix=[[1, 0, 0, 10 ** 400], *np.eye(4)[1:].tolist()]), "OverflowError"),
       (frame(cx=-3), "1.png .*: no crop has the principal point in the middle"),
       (frame(w=48, h=24), "1.png .* 48 x 48 pixels do not fit its camera's 48 x 24"),
       (frame(mask_path="no.png"), "there is no picture .*no.png"),
       (frame(is_fisheye=True), "its camera is FISHEYE, and no pinhole"),
       (top(camera_model="OPENCV_FISHEYE", k1=0.0), "OPENCV_FISHEYE, and no pinhole"),
       (top(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR, and no pinhole"),
       (top(camera_angle_x=40), "camera_angle_x is 40, and has to be in radians"),
       (top(camera_angle_x=None), "transforms.json .* neither camera_angle_x nor fl_x"),
       (top(fl_x=1e9), "0.png .*: its focal length is .* widths"),
       (top(frames=[]), "no pictures of .*transforms.json"),
       (top(frames=[{"file_path": "a"}]), "no pictures of .*transforms.json, such as .*a'"),
       (top(frames=None), "transforms.json is not as expected: TypeError"),
       (rewrite("utf-16"), "transforms.json is not as expected"),
       (lambda folder, about: b"{", "transforms.json is not as expected"),
       (lambda folder, about: save(folder / "images/1.png", b"x"), "cannot identify .*1.png")]


def change(folder, how, poses):
    about = write_folder(folder, poses)
    text = how(folder, about)
    save(folder / "transforms.json", text if isinstance(text, bytes) else json.dumps(about))


@pytest.mark.parametrize("case", range(len(FINE)))
def test_what_real_transforms_have(tmp_path, capsys, case):
    """Each change leaves the cameras, and what the pictures show of them, as they were."""
    poses = cameras(3)[0]
    change(tmp_path, FINE[case][0], poses)
    views = load_folder(tmp_path, scale=1.0, resolution=36)
    assert views.focal == pytest.approx(1.6 * 48 / 36 if FINE[case][0] is cut else 1.6)
    check(views, poses[None])
    assert capsys.readouterr().err.count("\n") == bool(FINE[case][1])
    assert FINE[case][1] in (load(tmp_path), capsys.readouterr().err)[1]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_transforms_are_refused_in_one_sentence(tmp_path, case):
    change(tmp_path, BAD[case][0], cameras(3)[0])
    with pytest.raises((ValueError, OSError), match=BAD[case][1]) as caught:
        load(tmp_path, resolution=8)
    assert "\n" not in str(caught.value) and tmp_path.name in str(caught.value)


def test_the_cube_is_as_wide_as_the_pictures_of_the_training_scene(tmp_path):
    """As Blender writes it: names without .png, pictures wider than high, alpha, two files."""
    poses, focal = cameras(5)[0], 1.1
    about = write_folder(tmp_path, poses, 3.0, focal, 120)
    for v, one in enumerate(about["frames"]):
        image, one["file_path"] = np.asarray(picture(tmp_path, v)).copy(), f"./images/{v}"
        sky = image.min(-1) > 250
        image[sky] = 0                                          # seen where alpha is forgotten
        rgba = np.dstack([image, np.where(sky, 0, 255).astype(np.uint8)])
        save(tmp_path / "images" / f"{v}.png", rgba[10:-10])
    (tmp_path / "transforms.json").unlink()
    for split, some in ("train", slice(3)), ("val", slice(3, None)):
        text = json.dumps({**about, "frames": about["frames"][some]})
        save(tmp_path / f"transforms_{split}.json", text)
    views = load(tmp_path, split="train", resolution=96)
    assert views.focal == pytest.approx(focal * 120 / 100)
    assert views.scale == pytest.approx(3 * 2.65 * 0.5 / views.focal, rel=0.01)
    check(load_folder(tmp_path, scale=3.0, resolution=96), poses[None, :3])
    check(load_folder(tmp_path, "test", scale=3.0, resolution=96), poses[None, 3:])
    held_out = load(tmp_path, split="test", resolution=8)
    assert held_out.scale == views.scale and held_out.held_out
    assert load(tmp_path / "transforms_val.json", split="test").images.shape[:2] == (1, 2)


def test_what_is_held_out(tmp_path, capsys):
    """Names are matched whole; without splits a tenth of the scenes, or an eighth of the views."""
    poses = cameras(9)[0]
    for name in ("house", "oval", "test"):                      # not "val", and scenes, not splits
        write_folder(tmp_path / "scenes" / name, poses[:3], side=16)
    for split, numbers in (None, (3, 3)), ("train", (2, 3)), ("test", (1, 3)):
        views = load(tmp_path, split=split, resolution=8)       # found two folders down
        assert views.images.shape[:2] == numbers and views.held_out == (split == "test")
        assert ("1 of 3 scenes are held out" in capsys.readouterr().err) == (split is not None)
    write_folder(tmp_path / "two", poses[:3], side=16)
    write_folder(tmp_path / "two", poses[:3], side=16, file="transforms_train.json")
    assert not load(tmp_path / "two", split="test").held_out    # but a split needs its counterpart
    (tmp_path / "two" / "transforms_train.json").unlink()
    for name, some in ("test", poses[:1]), ("val", poses[:2]), ("trained", poses[:2]):
        write_folder(tmp_path / "two", some, side=16, file=f"transforms_{name}.json")
    counts = [load(tmp_path / "two", split=split).images.shape[1] for split in ("train", "test")]
    assert counts == [3, 1]
    write_folder(tmp_path / "one", poses, side=16)
    kept, held_out = (load_folder(tmp_path / "one", split, 1.0) for split in ("train", "test"))
    assert torch.allclose(held_out.poses[0], poses[[0, 8]], atol=1e-6)
    assert torch.allclose(kept.poses[0], poses[1:8], atol=1e-6)
    write_folder(tmp_path / "few", poses[:5], side=16)
    few = load(tmp_path / "few", split="test")
    assert few.images.shape[1] == 5 and not few.held_out        # too few to hold some back

    def config(path):
        return SimpleNamespace(data=str(path), resolution=8, seed=0)
    assert data.test_views(config("cars"), 3, 2, "cpu").poses.equal(
        random_poses("cars", 3, 2, seed=-1))
    assert data.test_views(config(tmp_path / "one"), 9, 9, "cpu").images.shape[:2] == (1, 2)
    for none in ("two", "few"):
        assert data.test_views(config(tmp_path / none), 9, 9, "cpu") is None
    assert torch.equal(load("cars", 3, split="test", seed=4, resolution=8).images,
                       synthetic("cars", 3, seed=-5, resolution=8).images)


def test_scenes_with_fewer_views_and_cameras_that_look_away(tmp_path, capsys):
    """A set takes the fewest views; Blender's axes look away, and are upside down; y up is told."""
    for start, views in enumerate((3, 2)):
        write_srn(tmp_path, 1, views, start=start)
    for views in (None, 50):
        assert load(tmp_path, views=views, resolution=8).images.shape[:2] == (2, 2)
        assert "2 scenes of 2 views are all there are" in capsys.readouterr().err
    y_up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    for scene, blender in zip(sorted(tmp_path.iterdir()), (True, False)):
        for file in scene.glob("pose/*"):
            pose = np.loadtxt(file).reshape(4, 4)
            np.savetxt(file, pose @ FLIP if blender else y_up @ pose)
        load(scene, resolution=8)
        said = capsys.readouterr().err
        assert ("in 0 of 3 pictures the origin is in view: other axes?" in said) == blender
        assert " pictures z is up: other axes?" in said


@pytest.mark.parametrize("file, text, words", [
    ("intrinsics.txt", None, "intrinsics.txt"), ("pose/000001.txt", None, "2 pictures and 1 poses"),
    ("intrinsics.txt", "131 64 64 0\n0 0 0\n", "intrinsics.txt is not .* size 7 into shape"),
    ("pose/000001.txt", "a pose", "000001.txt is not .*convert string to float"),
    ("pose/000001.txt", "nan " * 16, "000001.png .*: the pose is not a rotation and a position"),
    ("rgb/000001.png", b"\x89PNG\r\n", "000001.png is no picture, or is damaged"),
    ("pose/*", lambda pose: pose * [1, 1, 1, 1000], "000000.png .*: the camera is 2600 cube units"),
    ("*/*", None, "no pictures in")])
def test_damaged_scenes_are_refused_in_one_sentence(tmp_path, file, text, words):
    write_srn(tmp_path, 1, 2)
    for path in (tmp_path / f"{0:032x}").glob(file):
        if callable(text):
            np.savetxt(path, text(np.loadtxt(path).reshape(4, 4)))
        else:
            path.unlink() if text is None else save(path, text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load(tmp_path, resolution=16)
    assert "\n" not in str(caught.value)


# .npz and CLEVR's layouts -------------------------------------------------------------------------

def npz(poses, focal=1.6, side=32):
    return dict(images=pictures(poses, focal, side), poses=poses.numpy(), focal=np.float32(focal),
                background=np.full(3, 255, np.uint8))


def test_npz(tmp_path):
    """Pictures come back bit by bit, smaller ones by area; tiny_nerf_data.npz is one scene."""
    poses = cameras(3, 12)
    arrays = npz(poses)
    np.savez(tmp_path / "train.npz", **arrays, objects=["a cube"] * 12)
    views = load(tmp_path, resolution=32)
    assert torch.equal(((views.images + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2),
                       torch.from_numpy(arrays["images"]))
    assert views.focal == pytest.approx(1.6) and torch.equal(views.poses, poses)
    assert views.scale == 1 and torch.equal(views.background, torch.ones(3))
    mean = views.images.view(12, 3, 3, 16, 2, 16, 2).mean((4, 6))
    assert (load(tmp_path, resolution=16).images - mean).abs().max() < 0.012        # two roundings
    assert len(load(tmp_path / "train.npz", split="test", resolution=8)) == 12      # whole
    assert len(load(tmp_path, split="test", resolution=8)) == 1                     # held back
    np.savez(tmp_path / "test.npz", **npz(poses[:2]))
    assert len(load(tmp_path, split="test", resolution=8)) == 2
    tiny = dict(images=arrays["images"][0].astype(np.float32) / 255, focal=np.float64(1.6 * 32),
                poses=poses[0].numpy() @ FLIP.astype(np.float32))
    np.savez(tmp_path / "tiny_nerf_data.npz", **tiny)
    one = load(tmp_path / "tiny_nerf_data.npz", resolution=32)
    assert one.images.shape[:2] == (1, 3) and torch.equal(one.images[0], views.images[0])
    assert one.scale == pytest.approx(2.65 * 0.5 / 1.6) and (one.background == -1).all()
    one.poses[..., :3, 3] *= one.scale
    assert torch.allclose(one.poses, poses[:1], atol=1e-5)


@pytest.mark.parametrize("change, words", [
    *((dict([(key, None)]), f"KeyError, '{key}") for key in npz(cameras(1), side=8)),
    (dict(images=np.zeros((3, 8, 8))), "images: float64"),
    (dict(images=np.zeros((2, 3, 32, 32, 3), np.uint16)), "images: uint16"),
    (dict(images=np.zeros((2, 3, 32, 32, 4), np.uint8)), "images: uint8"),
    (dict(images=np.zeros((0, 3, 32, 32, 3), np.uint8)), "images: uint8"),
    (dict(images=np.full((3, 9, 9, 3), 2.0)), "floats from 0 to 1"),
    (dict(poses=np.zeros((2, 3, 3, 4))), "poses: float"), (dict(focal=np.ones(2)), "focal: float"),
    (dict(poses=np.zeros((2, 3, 4, 4))), "images.0, 0. .*: the pose is not a rotation"),
    (dict(poses=np.full((2, 3, 4, 4), math.nan)), "images.0, 0. .*: the pose is not a rotation"),
    (dict(focal=np.nan), "images.0, 0.* in the middle"), (dict(focal=1e9), "focal length"),
    (dict(background=np.zeros(3)), "background: float64"), (dict(poses=np.array([{}])), "pickle"),
    ("larger", "smaller than 64 x 64"), ("text", "a.npz is not as expected")])
def test_bad_npz_is_refused_in_one_sentence(tmp_path, change, words):
    arrays = npz(cameras(3, 2))
    if isinstance(change, dict):
        arrays = {k: v for k, v in {**arrays, **change}.items() if v is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    if change == "text":
        save(tmp_path / "a.npz", "no archive")
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path / "a.npz", resolution=64 if change == "larger" else 32)
    assert "\n" not in str(caught.value) and "a.npz" in str(caught.value)


def clevr_scene(rng, count):
    """A scene as CLEVR's generator writes it."""
    sizes = rng.choice([0.35, 0.7], count)
    return {"objects": [
        {"shape": ("cube", "sphere", "cylinder")[i % 3], "color": CLEVR_NAMES[i % 8],
         "material": ("rubber", "metal")[i % 2], "rotation": rng.uniform(0, 360),
         "3d_coords": [*rng.uniform(-3, 3, 2).tolist(), size / (2 ** 0.5 if i % 3 == 0 else 1)]}
        for i, size in enumerate(sizes)]}


def test_clevr_layouts(tmp_path, capsys):
    """Each object is where, and what, it should be; that pictures are not read is said."""
    rng = np.random.default_rng(2)
    scenes = [clevr_scene(rng, n) for n in (3, 9, 5)]
    file = tmp_path / "scenes" / "CLEVR_train_scenes.json"
    save(file, json.dumps({"info": {}, "scenes": scenes}))
    views = load(str(file), scenes=2, views=2)
    assert views.images.shape == (2, 2, 3, 64, 64) and views.depth.shape == (2, 2, 64, 64)
    assert "pictures" not in capsys.readouterr().err
    assert torch.equal(load(tmp_path, 2, 2).images, views.images)
    assert not torch.equal(load(file, 2, 2, seed=3).poses, views.poses)
    save(tmp_path / "own" / "CLEVR_scenes.json", file.read_text())      # as the generator's own
    save(tmp_path / "own" / "images" / "CLEVR_new_000000.jpg", b"")
    assert torch.equal(load(tmp_path / "own", 2, 2).images, views.images)
    assert "pictures are not read, layouts are drawn" in capsys.readouterr().err
    parts = [len(load(tmp_path / "own", split=part, resolution=8)) for part in ("train", "test")]
    assert parts == [2, 1]
    for n, scene in enumerate(scenes[:2]):
        kind, to_world, color, shine = data.clevr_primitives(scene["objects"])
        for k, o in enumerate(scene["objects"]):
            assert to_world[k, 2, 3] * CLEVR_SCALE == pytest.approx(o["3d_coords"][2])
            assert shine[k].item() == pytest.approx(0.35 * (o["material"] == "metal"))
            assert color[k].tolist() == pytest.approx(CLEVR_COLORS[CLEVR_NAMES.index(o["color"])])
            turn = [math.cos(o["rotation"]), math.sin(o["rotation"])]
            assert F.normalize(to_world[k, :2, 0], dim=0).tolist() == pytest.approx(turn, abs=1e-4)
        origin, direction = camera_rays(views.poses[n], views.focal, 64)
        hit = origin + direction * views.depth[n].view(2, -1, 1)
        hit = hit[(hit[..., 2] > 0.01) & hit.isfinite().all(-1)] * CLEVR_SCALE  # not the ground
        centers = torch.tensor([o["3d_coords"] for o in scene["objects"]])
        reach = centers[:, 2] * torch.tensor([{"cube": 3, "cylinder": 2, "sphere": 1}[o["shape"]]
                                              for o in scene["objects"]]).sqrt()
        assert ((hit[:, None] - centers).norm(dim=-1) < reach + 0.01).any(-1).all()
        assert len(hit) > 50
    save(tmp_path / "scenes" / "CLEVR_val_scenes.json", json.dumps({"scenes": scenes[:1]}))
    assert len(load(tmp_path, split="test", resolution=8)) == 1
    assert len(load(tmp_path, split="train", resolution=8)) == 3


@pytest.mark.parametrize("wrong, words", [
    ({"color": "pink"}, ""), ({"shape": "cone"}, "'cone'"), ({"3d_coords": [0, 0, -1]}, "ground"),
    ({"3d_coords": [math.nan, 0, 1]}, "ground"), ({"3d_coords": [1e308, 0, 1]}, "far away"),
    ({"rotation": 1e999}, ""), ({"rotation": None}, ""), ({}, "'shape'"), (3, ""),
    ('{"scenes": [{"objects": []}]}', "no objects"), ('{"scenes": []}', "no scenes in"),
    ('{"scenes": ' + "[" * 10 ** 5, ""), ('{"scenes": [', ""), ("{}", "'scenes'")])
def test_layouts_that_are_none(tmp_path, wrong, words):
    good = clevr_scene(np.random.default_rng(0), 2)
    if isinstance(wrong, dict):
        good["objects"][1] = {**good["objects"][1], **wrong} if wrong else {"rotation": 0.0,
                                                                        "3d_coords": [0, 0, 1.0]}
    text = wrong if isinstance(wrong, str) else json.dumps({"scenes": [3 if wrong == 3 else good]})
    save(tmp_path / "CLEVR_val_scenes.json", text)
    with pytest.raises(ValueError, match="CLEVR_val_scenes.json") as caught:
        load(tmp_path, resolution=8)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Pictures and masks -------------------------------------------------------------------------------

def test_a_picture_of_any_size_is_cropped_or_padded_with_its_mask(tmp_path):
    """A white disc in the middle third of a wide picture, transparent beside it."""
    y, x = np.mgrid[:60, :180] + 0.5
    disc = np.hypot(x - 90, y - 30) < 20
    save(tmp_path / "wide.png", np.uint8(255 * np.dstack([disc, disc, disc, abs(x - 90) < 60])))
    save(tmp_path / "mask.png", np.uint8(255 * ~disc))
    for fit, radius in ("crop", 20 * 32 / 60), ("pad", 20 * 32 / 180):
        image = read_image(tmp_path / "wide.png", 32, (0.5, 0.5, 0.5), fit)
        known = read_mask(tmp_path / "mask.png", 32, (180, 60), fit)
        assert known.shape == (1, 32, 32) and image[0][known[0] == 0].mean() > 0.7
        assert (known == 0).sum() == pytest.approx(math.pi * radius ** 2, rel=0.1)
        assert image[:, 16, 16].min() > 0.9 and known[0, 16, 16] == 0 and known[0, 0, 0] == 1
        assert image[0, 16, 0].item() == pytest.approx(-1 if fit == "crop" else 0.5, abs=0.01)
    with pytest.raises(ValueError, match="mask.png is 180 x 60 pixels and its picture 60 x 60"):
        read_mask(tmp_path / "mask.png", 32, (60, 60))
    save(tmp_path / "mask.png", np.uint8(0 * disc))
    with pytest.raises(ValueError, match="mask.png hides all"):     # but for what is padded
        read_mask(tmp_path / "mask.png", 32, (180, 60), "pad")
    with pytest.raises(ValueError, match="fit must be crop or pad"):
        read_image(tmp_path / "wide.png", 32, fit="stretch")


HOLE = np.ones((32, 32), bool)
HOLE[10:22, 10:22] = False                                  # 144 pixels


@pytest.mark.parametrize("mask, unknown", [
    (255 * HOLE.astype(np.uint8), 144), (65535 * HOLE.astype(np.uint16), 144),
    (HOLE.astype(np.float32), 144), (HOLE.astype(np.uint8), "hides all"),
    (127 * HOLE.astype(np.uint8), "hides all"), (HOLE.astype(np.uint16), "hides all"),
    (np.full((32, 32), 255, np.uint8), "hides nothing"),
    (np.dstack([np.full((32, 32, 3), 255), 255 * HOLE]).astype(np.uint8), 144),     # erased
    (np.dstack([np.full((32, 32, 3), 60), 255 * HOLE]).astype(np.uint8), 144),      # off a photo
    (np.dstack([np.zeros((32, 32, 3)), 255 * ~HOLE]).astype(np.uint8), "hides all")])   # strokes
def test_masks_as_people_draw_them(tmp_path, mask, unknown):
    Image.fromarray(mask).save(path := tmp_path / ("m.tif" if mask.dtype == "f4" else "m.png"))
    if isinstance(unknown, str):
        with pytest.raises(ValueError, match=f"m.* {unknown}"):
            read_mask(path, 32)
    else:
        assert torch.equal(read_mask(path, 32)[0].bool(), torch.from_numpy(HOLE))


def test_pictures_of_any_depth(tmp_path):
    """8 and 16 bits, floats, transparency of 16 bits, EXIF, what is none, and pipes."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    save(tmp_path / "8.png", grey)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "f.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "t.png", transparency=60 * 257)
    expected = torch.from_numpy(grey).float() / 127.5 - 1
    for name in ("8.png", "16.png", "f.tif"):
        assert torch.equal(read_image(tmp_path / name, 8), expected.expand(3, 8, 8))
    clear = read_image(tmp_path / "t.png", 8, (1.0, -1.0, -1.0))
    assert clear[:, grey == 60][:, 0].tolist() == [1, -1, -1]
    assert (clear[1:] == expected).sum() == 126
    exif = Image.Exif()
    exif[274] = 6                                           # turned by 90 degrees
    Image.fromarray(grey).save(tmp_path / "e.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "e.png", 8)[0], expected.rot90(-1))
    for name, junk in ("a.png", b"junk and more junk"), ("b.png", b"II*\0"):
        Image.new("RGB", (9, 9)).save(tmp_path / name, exif=b"Exif\0\0" + junk)
        with pytest.raises(ValueError, match=f"{name} is no picture"):
            read_image(tmp_path / name, 8)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match="pipe.png"):
        read_image(tmp_path / "pipe.png", 8)


# What training reads ------------------------------------------------------------------------------

def config(**changes):
    fields = dict(data="cars", scenes=0, views=1, resolution=16, batch=4, seed=0)
    return SimpleNamespace(**fields | changes)


def test_training_pictures_are_new_scenes_or_those_of_a_fixed_set(tmp_path, monkeypatch, capsys):
    draw, camera = training_pictures(config(), "cpu")
    views = synthetic("cars", 16, 1, 16)
    one = [draw(step) for step in range(6)]
    assert torch.equal(torch.cat([images for images, _ in one[:4]]), views.images[:, 0])
    assert camera["focal"] == views.focal and camera["elevation"] == (15, 45)
    assert camera["radius"] == pytest.approx(2.9)
    assert camera["background"] == pytest.approx(views.background.tolist())
    both = [training_pictures(config(), "cpu", rank, 2)[0] for rank in (0, 1)]
    poses = torch.cat([draw(step)[1] for draw in both for step in range(8)])
    assert len(poses.flatten(1).unique(dim=0)) == len(poses) == 64          # each its own
    monkeypatch.setitem(data.AHEAD, "cpu", 4)                               # as on a GPU
    ahead = training_pictures(config(), "cpu")[0]
    for step in (0, 1, 5, 4, 3, 2):                                         # also when it goes back
        assert all(map(torch.equal, ahead(step), one[step]))

    fixed = synthetic("cars", 3, 2, 16)
    draw, _ = training_pictures(config(scenes=3, views=2), "cpu")
    torch.manual_seed(5)
    images, poses = draw(0)
    torch.manual_seed(5)
    chosen = torch.randint(6, (4,))
    assert torch.equal(images, fixed.images.flatten(0, 1)[chosen])
    assert torch.equal(poses, fixed.poses.flatten(0, 1)[chosen])

    write_folder(tmp_path / "two", cameras(9)[0], side=16)
    draw, camera = training_pictures(config(data=str(tmp_path / "two"), views=9), "cpu")
    kept = load(tmp_path / "two", split="train", resolution=16)
    shown = torch.cat([draw(step)[0] for step in range(20)]).unique(dim=0)
    assert len(shown) == 7 and all(any(map(torch.equal, [a] * 7, kept.images[0])) for a in shown)
    radii = kept.poses[0, :, :3, 3].norm(dim=1)
    low, high = torch.rad2deg(torch.asin(kept.poses[0, :, 2, 3] / radii)).aminmax()
    assert camera["elevation"] == pytest.approx((low.item(), high.item()), abs=1e-4)
    assert camera["radius"] == pytest.approx(radii.mean().item())
    assert "one picture" not in capsys.readouterr().err
    training_pictures(config(data=str(tmp_path / "two")), "cpu")
    assert "trains on one picture" in capsys.readouterr().err


def test_sets_in_subsets_have_names(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    (tmp_path / "subsets" / "mine").mkdir(parents=True)
    for split, scenes in ("train", 3), ("test", 2):
        np.savez(tmp_path / "subsets" / "mine" / f"{split}.npz", **npz(cameras(2, scenes)))
    assert len(load("mine", split="train", resolution=16)) == 3
    assert data.test_views(config(data="mine"), 9, 9, "cpu").images.shape[:2] == (2, 2)
    assert training_pictures(config(data="mine"), "cpu")[0](0)[0].shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="nor one in subsets/ .mine. nor a path"):
        load("yours")


def test_wrong_arguments_are_answered_with_what_to_do(tmp_path):
    for wrong, words in ((dict(name="boats"), "one of clevr1"), (dict(scenes=0), "at least 1"),
                         (dict(views=0), "at least 1"), (dict(resolution=0), "at least 1"),
                         (dict(samples=-1), "at least 1"), (dict(scenes=2.5), "whole number"),
                         (dict(views=math.nan), "whole number")):
        with pytest.raises(ValueError, match=words):
            synthetic(**{**dict(name="clevr1", scenes=1), **wrong})
    save(tmp_path / "world_mat" / "a.txt", "nothing known")
    for spec, words in (("clevr2", "neither a built-in set .*clevr1.* nor a path"),
                        (tmp_path, "no known format; looked for .*rgb .ShapeNet-SRN"),
                        (tmp_path / "world_mat" / "a.txt", "no known format")):
        with pytest.raises(ValueError, match=words):
            load(spec)
    with pytest.raises(FileNotFoundError, match="no scenes in"):
        load_srn(tmp_path)
    with pytest.raises(ValueError, match="split must be train or test"):
        load("clevr1", split="held out")
    views = load("clevr1", scenes=2, views=3, resolution=8)
    assert views.images.shape == (2, 3, 3, 8, 8) and views.scale == 1
    assert len(load("clevr1", resolution=2)) == 1000
