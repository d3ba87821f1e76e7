"""Tests of data.py: cameras, the ray tracer, the built-in sets, pictures, loaders, training.

Everything is compared with something known: a closed form, a plain loop, a direct computation.
"""
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import (BOX, CLEVR_COLORS, CLEVR_NAMES, CLEVR_SCALE, CYLINDER, EMPTY, SETS, SPHERE,
                  Scenes, camera_rays, load, load_folder, load_srn, orbit,
                  random_poses, random_scenes, read_image, read_mask, synthetic, trace,
                  training_pictures)


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
    toward = torch.tensor([[2.5, 0, 0], [0, 2.5 * math.cos(math.pi / 6), 1.25]])
    assert torch.allclose(center[:2] - target, toward, atol=1e-6)
    assert orbit(10, 20, 2).shape == (4, 4)
    assert orbit(torch.zeros(3, 1), azimuth, 2).shape == (3, 4, 4, 4)
    model = SimpleNamespace(config=SimpleNamespace(elevation=(20.0, 50.0), radius=2.7),
                            background=torch.zeros(3))
    assert torch.allclose(data.turn_poses(model, 45, 4),
                          orbit(torch.tensor([45.0, 135, 225, 315]), 27.5, 2.7), atol=1e-6)


def test_rays_agree_with_a_pinhole_projection():
    pose, focal, side = orbit(35.0, 25.0, 2.7, (0.1, 0.2, -0.1)), 1.3, 10
    origin, direction = camera_rays(pose[None], focal, side)
    assert torch.allclose(direction.norm(dim=-1), torch.ones(1, side ** 2), atol=1e-6)
    points = (origin + 1.7 * direction)[0].double().numpy()
    intrinsics = np.array([[focal * side, 0, side / 2], [0, focal * side, side / 2], [0, 0, 1]])
    world_to_camera = np.linalg.inv(pose.double().numpy())
    x, y, z = intrinsics @ (world_to_camera[:3, :3] @ points.T + world_to_camera[:3, 3:])
    rows, columns = np.divmod(np.arange(side ** 2), side)
    assert (z > 0).all()
    np.testing.assert_allclose([x / z, y / z], [columns + 0.5, rows + 0.5], atol=1e-4)


# The ray tracer ---------------------------------------------------------------------------------

ROUND = orbit(torch.tensor([33.0, 251.0, 20.0]), torch.tensor([28.0, -10.0, 5.0]), 2.7)
SLANTED = np.array([[0.5, 0.1, 0.2], [0.0, 0.3, -0.1], [-0.1, 0.05, 0.4]])


def make_scene(*primitives, ground=-0.5, light=(-1.0, -1.0, 2.8284), background=(0.75,) * 3):
    """One scene of (kind, 3x3 axes in columns, center, color, shine)."""
    kind, axes, center, color, shine = (np.array([column]) for column in zip(*primitives))
    to_world = np.concatenate([axes, center[..., None]], 3)
    return Scenes(torch.tensor(kind), *(torch.tensor(x).float() for x in (to_world, color, shine)),
                  ground, background, tuple(light))


def hits(scene, poses, focal, side):
    """The colours (V, S, S, 3) in [0, 1], depth (V, S, S), and where and by which rays it is hit
    (V, S, S, 3), of one scene from poses (V, 4, 4)."""
    images, depth = trace(scene, poses[None], focal, side, samples=1)
    origin, direction = (x.view(-1, side, side, 3) for x in camera_rays(poses, focal, side))
    points = origin + direction * depth[0, ..., None]
    return (images[0].movedim(1, -1) + 1) / 2, depth[0], points, direction


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


def test_the_first_hit_agrees_with_a_loop_over_rays_and_primitives():
    """Three that overlap, each in its own colour, and the ground; the sky is at inf."""
    parts = [(kind, 0.7 * SLANTED, center, color, 0) for kind, center, color in zip(
        (SPHERE, BOX, CYLINDER), np.eye(3) * 0.3, np.eye(3))]
    poses, side = ROUND, 25
    color, depth, _, direction = hits(make_scene(*parts, ground=-9.0), poses, 1.6, side)
    ground = ((-9 - poses[:, 2, 3].view(3, 1, 1)) / direction[..., 2]).numpy()
    expected = np.array([[[*(reference_depth(kind, axes, center, pose[:3, 3], ray)
                             for kind, axes, center, *_ in parts)] for ray in rays]
                         for pose, rays in zip(poses.double().numpy(),
                                               direction.view(3, -1, 3).double().numpy())])
    first = expected.min(-1).reshape(3, side, side)
    ground = np.where(ground > 0, ground, math.inf)
    np.testing.assert_allclose(depth.numpy(), np.minimum(first, ground), rtol=2e-4)
    owner = expected.argmin(-1).reshape(3, side, side)[np.isfinite(first)]
    assert (color[np.isfinite(first)].argmax(-1).numpy() == owner).mean() > 0.99
    assert np.bincount(owner).min() > 50 and depth.isinf().any()


@pytest.mark.parametrize("kind", [SPHERE, BOX, CYLINDER])
def test_brightness_agrees_with_the_slope_of_the_depth(kind):
    scene = make_scene((kind, SLANTED, (0.1, 0.05, 0.0), (0.8, 0.8, 0.8), 0), ground=-9.0)
    color, depth, points, _ = hits(scene, ROUND, 1.6, 96)
    points = points.double()
    right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normal = F.normalize(torch.linalg.cross(down, right), dim=-1)
    light = F.normalize(torch.tensor(scene.light).double(), dim=0)
    ambient = data.AMBIENT + data.FILL * (light[0] * normal[..., 1] - light[1] * normal[..., 0])
    expected = 0.8 * (ambient + data.DIFFUSE * (normal @ light).clamp(min=0))
    error = (color[:, 1:-1, 1:-1, 0] - expected).abs()[depth[:, 1:-1, 1:-1] < 4]
    assert len(error) > 2000 and (error < 0.01).float().mean() > 0.85        # edges have no slope
    assert (error < 0.05).float().mean() > 0.93


def rotation_z(angle):
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_scene_camera_and_light_turned_together_give_the_same_picture():
    parts = [(BOX, 0.3 * rotation_z(0.3), (0.3, 0.2, -0.2), (0.9, 0.4, 0.1), 0.3),
             (SPHERE, 0.25 * np.eye(3), (-0.3, -0.2, -0.25), (0.2, 0.5, 0.9), 0.3),
             (CYLINDER, 0.2 * np.eye(3), (-0.2, 0.4, -0.3), (0.3, 0.8, 0.2), 0.0)]
    turn, light = rotation_z(math.radians(77)), np.array([-1.0, -0.4, 2.0])
    turned = [(kind, turn @ axes, turn @ center, *look) for kind, axes, center, *look in parts]
    before = trace(make_scene(*parts, light=light), orbit(30, 30, 2.7)[None, None], 1.6, 32)
    after = trace(make_scene(*turned, light=turn @ light), orbit(107, 30, 2.7)[None, None], 1.6, 32)
    for a, b in zip(before, after):
        assert ((a - b).abs() > 1e-3).float().mean() < 0.002        # a sample on an edge may flip
        assert (a - b).abs().median() < 1e-5


def test_highlights_follow_phong():
    light = np.array([0.6, 0.0, 0.8])
    scene = make_scene((SPHERE, np.eye(3) * 0.5, (0, 0, 0), (0.4, 0.4, 0.4), 0.35), ground=-9.0,
                       light=light)
    color, depth, points, direction = hits(scene, orbit(0, 0, 2.7)[None], 1.6, 65)
    normal, seen = (x[depth < 2.6].double().numpy() for x in (points / 0.5, direction))
    facing = normal @ light
    mirrored = 2 * facing[:, None] * normal - light
    glint = np.maximum(-(mirrored * seen).sum(1), 0) ** data.EXPONENT * (facing > 0)
    expected = 0.4 * (data.AMBIENT + data.FILL * 0.6 * normal[:, 1]
                      + data.DIFFUSE * np.maximum(facing, 0)) + 0.35 * glint
    np.testing.assert_allclose(color[depth < 2.6][:, 0], expected, atol=2e-4)


@pytest.mark.parametrize("on_a_box", [False, True])
def test_shadows_are_where_their_closed_form_is(on_a_box):
    """On the ground, which is the background's colour where it is lit, and on another object."""
    light, center = np.array([0.3, -0.8, 1.5]), np.array([0.1, 0.2, 0.0])
    light /= np.linalg.norm(light)
    ball = SPHERE, 0.2 * np.eye(3), center, (1, 0, 0), 0
    floor = BOX, np.diag([0.8, 0.8, 0.1]), (0, 0, -0.5), (0.5, 0.5, 0.5), 0
    scene = make_scene(ball, *[floor] * on_a_box, light=light)
    color, _, points, _ = (x[0] for x in hits(scene, orbit(0, 50, 3)[None], 1.2, 64))
    to_center = center - points.double().numpy()
    aside = np.linalg.norm(to_center - (to_center @ light)[..., None] * light, axis=-1)
    on = (points[..., 2] - (-0.4 if on_a_box else -0.5)).abs().numpy() < 1e-4
    lit, dark = color[on & (aside > 0.203)], color[on & (aside < 0.197)]
    bright = (0.5 * (data.AMBIENT + data.DIFFUSE * light[2]), 0.5 * data.AMBIENT) if on_a_box else (
        0.75, 0.75 * data.SHADOW)
    assert len(lit) > 30 and len(dark) > 30
    assert (lit - bright[0]).abs().max() < 1e-4 and (dark - bright[1]).abs().max() < 1e-4
    assert points[on & (aside < 0.197)].mean(0)[1] > center[1] + 0.1        # it comes from -y


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
        single, same = synthetic(name, 1, resolution=32, seed=3, start=i), batch[i:i + 1]
        for part in ("images", "depth", "poses"):
            assert torch.allclose(getattr(single, part), getattr(same, part)[:, :1], atol=1e-5)
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
Y_UP = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
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


def shots(poses, focal, side, scale):
    """Scene, view, pose (4, 4) in a world of this scale and picture (side, side, 3), one by one."""
    images, move = pictures(poses, focal, side), np.diag([1, 1, 1, 1.0])
    for i, v in np.ndindex(images.shape[:2]):
        pose = poses[i, v].double().numpy() @ move
        pose[:3, 3] *= scale
        yield i, v, pose, images[i, v]


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


HEAD = "131.25 64.0 64.0 0.\n0. 0. 0.\n1.\n128 128\n"


def write_srn(folder, poses, part="train", head=HEAD, nested="", first=0):
    """Its chairs are nested once more; archives state f, cx, cy for 512 pixels, or one number more;
    Macs leave files."""
    for i, v, pose, image in shots(poses, 131.25 / 128, 128, 0.5):      # objects are within 0.5
        scene = folder / f"cars_{part}" / nested / f"{first + i:032x}"
        save(scene / "intrinsics.txt", head)
        save(scene / "rgb" / f"{v:06d}.png", np.dstack([image, np.full((128, 128), 255, "u1")]))
        save(scene / "rgb" / "._000000.png", b"?")
        save(scene / "pose" / f"{v:06d}.txt", " ".join(f"{x:.9f}" for x in pose.ravel()))
    save(folder / "__MACOSX" / "a" / "rgb" / "._0.png", b"?")


def write_nmr(folder, poses, part):
    """Its lists of scenes, y up, masks (of some)."""
    arrays, root = {}, folder / "02958343"
    for i, v, pose, image in shots(poses, 1.866, 64, 0.5):
        scene, pose = root / f"{part}{9 - i}", Y_UP @ pose
        arrays[f"world_mat_{v}"] = np.linalg.inv(pose)[:3 + v % 2]
        arrays[f"camera_mat_{v}"] = np.diag([2 * 1.866, 2 * 1.866, 1, 1])
        if v < 3:
            mask = np.uint8(image.min(-1) < 250) * np.uint8(255)
            save(scene / "mask" / f"{v:04d}.png", mask)
            image = image * (mask[..., None] > 0)           # black outside: the mask makes it white
        save(scene / "image" / f"{v:04d}.png", image)
        np.savez(scene / "cameras.npz", **arrays)
    save(root / f"softras_{part}.lst", f"{part}9\nnot_downloaded\n{part}8\n")
    save(root / "softras_val.lst", "not_downloaded\n")


def write_clevr567(folder, poses, part):
    """Squeezed pictures, masks beside them, scenes in one folder."""
    for i, v, pose, image in shots(poses, 350 / 320, 320, CLEVR_SCALE):
        name = f"{folder / part}/{4 * i + v:05d}_sc{i:04d}_az{v:02d}"
        squeezed = np.asarray(Image.fromarray(image[40:280]).resize((128, 128), Image.BOX))
        save(Path(name + ".png"), squeezed)
        save(Path(name + "_mask.png"), squeezed)
        np.savetxt(name + "_RT.txt", pose)
        np.savetxt(name + "_azi_rot.txt", np.eye(3))


@pytest.mark.parametrize("write, part_of, focal, scale, side", [
    (write_srn, "cars_test", 131.25 / 128, 0.5, 128),
    (partial(write_srn, head="525. 256. 256. 0.\n0 0 0\n1.\n512 512\n", nested="chairs_2.0_train"),
     "cars_test", 131.25 / 128, 0.5, 128),
    (partial(write_srn, head="525. 256. 256. 0.\n0 0 0\n1.\n128 128\n"), "cars_test",
     131.25 / 128, 0.5, 128),
    (partial(write_srn, head=HEAD + "0\n"), "cars_test", 131.25 / 128, 0.5, 64),
    (write_nmr, "02958343/softras_test.lst", 1.866, 0.5, 64),
    (write_clevr567, "test", 350 / 240, CLEVR_SCALE, 96)])
def test_formats(tmp_path, capsys, write, part_of, focal, scale, side):
    """Cameras and pictures come back, of either split; what is a split itself is whole."""
    poses = cameras(4, 3)
    write(tmp_path, poses[:2], "train")
    write(tmp_path, poses[2:], "test")
    for split in (None, "train"):
        views = load(str(tmp_path), resolution=side, split=split)
        assert views.focal == pytest.approx(focal) and views.scale == scale and not views.held_out
        assert torch.equal(views.background, torch.ones(3))
        check(views, poses[:2])
    test = load(tmp_path, split="test", resolution=side)
    check(test, poses[2:], tolerance=0.5)
    assert test.held_out and "held out" not in capsys.readouterr().err
    for split in (None, "train", "test"):
        assert torch.equal(load(tmp_path / part_of, split=split, resolution=8).poses, test.poses)
    assert load(tmp_path, scenes=1, views=2, resolution=8).images.shape[:2] == (1, 2)


def test_some_scenes_and_views_are_read_without_the_rest(tmp_path, capsys, monkeypatch):
    poses, opened = cameras(4, 3), []
    write_srn(tmp_path, poses)
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
    assert load(tmp_path / "cars_train" / f"{1:032x}", resolution=8).images.shape[:2] == (1, 4)


# Your own pictures: transforms.json ---------------------------------------------------------------

def write_folder(folder, poses, scale=1.0, focal=1.6, side=48, file="transforms.json"):
    """Pictures and their transforms.json, which is returned to be changed."""
    about = {"camera_angle_x": 2 * math.atan(0.5 / focal), "frames": []}
    for _, v, pose, image in shots(poses[None], focal, side, scale):
        save(folder / "images" / f"{v}.png", image)
        about["frames"].append({"file_path": f"images/{v}.png",
                                "transform_matrix": (pose @ FLIP).tolist()})
    save(folder / file, json.dumps(about))
    return about


def on_pictures(change):
    """What changes the frames and pictures of a folder, one by one; a dict changes the frame."""
    def apply(folder, about):
        for v, frame in enumerate(about["frames"]):
            path = folder / f"images/{v}.png"
            frame |= change(v, Image.open(path).copy(), path) or {}
    return apply


def squeeze(v, image, path):
    image.resize((48, 24), Image.BOX).save(path)
    return {"camera_angle_y": 2 * math.atan(0.5 / 1.6)}


def double(v, image, path):
    """Frames without w and h: each has its own picture's size; fl_x goes before the angle."""
    image.resize((48 * (1 + v),) * 2).save(path)
    return {"fl_x": 1.6 * 48 * (1 + v), "camera_angle_x": 0.1}


def masked(v, image, path):
    image, mask = np.asarray(image), np.uint8(np.asarray(image).min(-1) < 250) * np.uint8(255)
    save(path, image * (mask[..., None] > 0))
    save(path.parent.parent / f"masks/{v}.png", mask)
    return {"mask_path": f"masks\\{v}.png"}


def turned(v, image, path):
    exif = Image.Exif()
    exif[274] = 3
    image.save(path, exif=exif)


def no_extension(v, image, path):
    path.rename(path.with_suffix(".PNG"))
    save(path.with_suffix(".txt"), "not a picture")
    return {"file_path": f"images/{v}"}


def cut(v, image, path, box=lambda v: (v, 2 + 2 * v, 46, 47)):
    """Pictures that lack some rows and columns, larger in their intrinsics than in their files."""
    left, top, right, bottom = box(v)
    image.crop(box(v)).save(path.with_suffix(".jpg"), quality=98, subsampling=0)
    return {"file_path": f"images/{v}.jpg", "w": 4 * (right - left), "h": 4 * (bottom - top),
            "fl_x": 4 * 1.6 * 48, "cx": 4 * (24 - left), "cy": 4 * (24 - top)}


def cut_below(*picture):
    return cut(*picture, lambda v: (1, 1, 46 - v, 46 - 2 * v))


def frame(**changes):
    return lambda folder, about: about["frames"][1].update(changes)


def top(**changes):
    return lambda folder, about: about.update(changes)


def changed(folder, change, poses):
    """A folder whose pictures, frames or text are changed."""
    about = write_folder(folder, poses)
    text = change(folder, about)
    save(folder / "transforms.json", text if isinstance(text, bytes) else json.dumps(about))


@pytest.mark.parametrize("change, said", [
    *((on_pictures(change), "") for change in (
        squeeze, cut, cut_below, double, masked, turned, no_extension)),
    (top(cx=None, cy=None, w=48, h=None), ""), (frame(file_path="images\\1.png"), ""),
    (lambda folder, about: json.dumps(about).encode("utf-8-sig"), ""),
    (frame(p2=0.1), "lens distortion is not corrected"),
    (lambda folder, about: about["frames"].append({"file_path": "images/9.png"}),
     "1 of 4 pictures are missing")])
def test_what_real_transforms_have(tmp_path, capsys, change, said):
    """Each change leaves the cameras, and what the pictures show of them, as they were."""
    poses = cameras(3)[0]
    changed(tmp_path, change, poses)
    views = load_folder(tmp_path, scale=1.0, resolution=36)
    is_cut = (tmp_path / "images/0.jpg").exists()
    assert views.focal == pytest.approx(1.6 * 48 / 36 if is_cut else 1.6)
    check(views, poses[None])
    assert capsys.readouterr().err.count("\n") == bool(said)
    assert said in (load(tmp_path), capsys.readouterr().err)[1]


def test_the_cube_is_as_wide_as_the_pictures_of_the_training_scene(tmp_path):
    """As Blender writes it: names without .png, pictures wider than high, alpha, two files."""
    poses, focal = cameras(5)[0], 1.1
    about = write_folder(tmp_path, poses, 3.0, focal, 120)

    def as_blender(v, image, path):
        image = np.array(image)
        sky = image.min(-1) > 250
        image[sky] = 0                                          # seen where alpha is forgotten
        save(path, np.dstack([image, np.where(sky, 0, 255).astype(np.uint8)])[10:-10])
        return {"file_path": f"./images/{v}"}
    on_pictures(as_blender)(tmp_path, about)
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
    two, few, one = (tmp_path / name for name in ("two", "few", "one"))
    write_folder(two, poses[:3], side=16)
    write_folder(two, poses[:3], side=16, file="transforms_train.json")
    assert not load(two, split="test").held_out                 # but a split needs its counterpart
    (two / "transforms_train.json").unlink()
    for name, some in ("test", poses[:1]), ("val", poses[:2]), ("trained", poses[:2]):
        write_folder(two, some, side=16, file=f"transforms_{name}.json")
    assert [load(two, split=split).images.shape[1] for split in ("train", "test")] == [3, 1]
    write_folder(one, poses, side=16)
    kept, held_out = (load_folder(one, split, 1.0) for split in ("train", "test"))
    assert torch.allclose(held_out.poses[0], poses[[0, 8]], atol=1e-6)
    assert torch.allclose(kept.poses[0], poses[1:8], atol=1e-6)
    write_folder(few, poses[:5], side=16)
    views = load(few, split="test")
    assert views.images.shape[1] == 5 and not views.held_out    # too few to hold some back

    assert data.test_views(config(), 3, 2, "cpu").poses.equal(random_poses("cars", 3, 2, seed=-1))
    assert data.test_views(config(data=str(one)), 9, 9, "cpu").images.shape[:2] == (1, 2)
    for none in (two, few):
        assert data.test_views(config(data=str(none)), 9, 9, "cpu") is None
    assert torch.equal(load("cars", 3, split="test", seed=4, resolution=8).images,
                       synthetic("cars", 3, seed=-5, resolution=8).images)


def test_scenes_with_fewer_views_and_cameras_that_look_away(tmp_path, capsys):
    """A set takes the fewest views; Blender's axes look away, and are upside down; y up is told."""
    for first, views in enumerate((3, 2)):
        write_srn(tmp_path, cameras(views, first + 1)[first:], first=first)
    for views in (None, 50):
        assert load(tmp_path, views=views, resolution=8).images.shape[:2] == (2, 2)
        assert "2 scenes of 2 views are all there are" in capsys.readouterr().err
    for scene, blender in zip(sorted(tmp_path.glob("cars_train/*")), (True, False)):
        for file in scene.glob("pose/*"):
            pose = np.loadtxt(file).reshape(4, 4)
            np.savetxt(file, pose @ FLIP if blender else Y_UP @ pose)
        load(scene, resolution=8)
        said = capsys.readouterr().err
        assert ("in 0 of 3 pictures the origin is in view: other axes or units?" in said) == blender
        assert " pictures z is up: other axes or units?" in said


def test_a_focal_length_in_pixels_and_a_scene_in_other_units_are_told(tmp_path, capsys):
    """The cube is much smaller than the view, or much larger."""
    poses, far = cameras(2, 2), cameras(2, 2)
    far[..., :3, 3] *= 10
    for arrays, told in ((npz(poses), False), (npz(poses, 51.2), True), (npz(far), True)):
        np.savez(tmp_path / "a.npz", **arrays)
        load(tmp_path / "a.npz", resolution=8)
        said = capsys.readouterr().err
        assert ("0 of 4 pictures the cube fills the view: other axes or units?" in said) == told


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


def clevr_scene(rng, count):
    """A scene as CLEVR's generator writes it."""
    return {"objects": [
        {"shape": ("cube", "sphere", "cylinder")[i % 3], "color": CLEVR_NAMES[i % 8],
         "material": ("rubber", "metal")[i % 2], "rotation": rng.uniform(0, 360),
         "3d_coords": [*rng.uniform(-3, 3, 2).tolist(), size / (2 ** 0.5 if i % 3 == 0 else 1)]}
        for i, size in enumerate(rng.choice([0.35, 0.7], count))]}


def test_clevr_layouts(tmp_path, capsys):
    """Each object is where, and what, it should be; that pictures are not read is said."""
    rng = np.random.default_rng(2)
    scenes = [clevr_scene(rng, n) for n in (3, 9, 5)]
    root = tmp_path / "CLEVR_v1.0"
    file = root / "scenes" / "CLEVR_train_scenes.json"
    save(file, json.dumps({"info": {}, "scenes": scenes}))
    views = load(str(file), scenes=2, views=2)
    assert views.images.shape == (2, 2, 3, 64, 64) and views.depth.shape == (2, 2, 64, 64)
    assert "pictures" not in capsys.readouterr().err
    assert torch.equal(load(root, 2, 2).images, views.images)
    assert not torch.equal(load(file, 2, 2, seed=3).poses, views.poses)
    save(tmp_path / "own" / "CLEVR_scenes.json", file.read_text())      # as the generator's own
    save(tmp_path / "own" / "images" / "CLEVR_new_000000.jpg", b"")
    assert torch.equal(load(tmp_path / "own", 2, 2).images, views.images)
    assert "pictures are not read, layouts are drawn" in capsys.readouterr().err
    parts = [len(load(tmp_path / "own", split=part, resolution=8)) for part in ("train", "test")]
    assert parts == [2, 1]
    for n, scene in enumerate(scenes[:2]):
        centers = torch.tensor([o["3d_coords"] for o in scene["objects"]])
        turn = torch.tensor([o["rotation"] for o in scene["objects"]]).double()
        kind, to_world, color, shine = map(torch.tensor, zip(*map(
            data.clevr_primitive, scene["objects"])))
        assert torch.allclose(to_world[:, 2, 3] * CLEVR_SCALE, centers[:, 2])
        assert torch.allclose(F.normalize(to_world[:, :2, 0]).double(),
                              torch.stack([turn.cos(), turn.sin()], 1), atol=1e-4)
        assert shine.tolist() == pytest.approx([0.35 * (o["material"] == "metal")
                                                for o in scene["objects"]])
        assert torch.equal(color, torch.tensor([CLEVR_COLORS[CLEVR_NAMES.index(o["color"])]
                                                for o in scene["objects"]]))
        origin, direction = camera_rays(views.poses[n], views.focal, 64)
        hit = origin + direction * views.depth[n].view(2, -1, 1)
        hit = hit[(hit[..., 2] > 0.01) & hit.isfinite().all(-1)] * CLEVR_SCALE  # not the ground
        reach = centers[:, 2] * torch.tensor([{"cube": 3, "cylinder": 2, "sphere": 1}[o["shape"]]
                                              for o in scene["objects"]]).sqrt()
        assert ((hit[:, None] - centers).norm(dim=-1) < reach + 0.01).any(-1).all()
        assert len(hit) > 50
    save(root / "scenes" / "CLEVR_val_scenes.json", json.dumps({"scenes": scenes[:1]}))
    assert [len(load(root, split=s, resolution=8)) for s in ("test", "train")] == [1, 3]


# Bad input is refused in one sentence -------------------------------------------------------------

def transforms(change):
    return lambda folder: changed(folder, change, cameras(3)[0])


def srn(pattern, content, scenes=1):
    """Files of the first scene that are written anew, or (None) taken away."""
    def write(folder):
        write_srn(folder, cameras(2, scenes))
        for path in (folder / "cars_train" / f"{0:032x}").glob(pattern):
            path.unlink() if content is None else save(path, content)
    return write


def arrays(**changes):
    return lambda folder: np.savez(folder / "a.npz", **{
        key: value for key, value in {**npz(cameras(3, 2), side=16), **changes}.items()
        if value is not None})


def layouts(content, **changes):
    """A text, or a scene whose second object is changed, or stands there instead."""
    scene = clevr_scene(np.random.default_rng(0), 2)
    scene["objects"][1] = content if content is not None else scene["objects"][1] | changes
    text = content if isinstance(content, str) else json.dumps({"scenes": [scene]})
    return lambda folder: save(folder / "CLEVR_val_scenes.json", text)


def nmr_without_a_camera(folder):
    write_nmr(folder, cameras(2), "train")
    file = folder / "02958343/train9/cameras.npz"
    np.savez(file, **{k: v for k, v in dict(np.load(file)).items() if k != "camera_mat_1"})


BAD = [
    (transforms(frame(transform_matrix=matrix)), words) for matrix, words in (
        (np.eye(4).tolist(), "1.png .*: the camera is 0 cube units"),
        ((2 * np.eye(4)).tolist(), "1.png .* pose is not a rotation"),
        (np.diag([1, 1, -1, 1.0]).tolist(), "pose is not a rotation"),
        ([[1.0, 2]], "transforms.json is not as expected"),
        (np.eye(4)[:2].tolist(), "images.1.png is not as expected"),
        ([[1, 0, 0, math.nan], *np.eye(4)[1:].tolist()], "1.png .*: the camera is nan"),
        ([[1, 0, 0, 1e300], *np.eye(4)[1:].tolist()], "cube units from"),
        ([[1, 0, 0, 1000.0], *np.eye(4)[1:].tolist()], "1.png .*: the camera is 1.* cube units"),
        ([[1, 0, 0, 10 ** 400], *np.eye(4)[1:].tolist()], "OverflowError"))
] + [(transforms(change), words) for change, words in (
    (frame(cx=-3), "has a focal length of -"),
    (frame(w=48, h=24), "1.png has .48, 48. pixels, and its camera .48, 24."),
    (frame(mask_path="no.png"), "No such file .*no.png"),
    (frame(is_fisheye=True), "its camera is FISHEYE, and no pinhole"),
    (top(camera_model="OPENCV_FISHEYE", k1=0.0), "OPENCV_FISHEYE, and no pinhole"),
    (top(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR, and no pinhole"),
    (top(camera_angle_x=40), "transforms.json .* camera_angle_x in radians, below pi"),
    (top(camera_angle_x=None), "transforms.json .* neither fl_x nor a camera_angle_x"),
    (top(fl_x=1e9), "has a focal length of .* widths"),
    (top(frames=[]), "no pictures in"), (top(frames=[{"file_path": "a"}]), "no pictures in"),
    (top(frames=None), "transforms.json is not as expected: TypeError"),
    (lambda folder, about: json.dumps(about).encode("utf-16"), "transforms.json is not as exp"),
    (lambda folder, about: b"{", "transforms.json is not as expected"),
    (lambda folder, about: save(folder / "images/1.png", b"x"), "cannot identify .*1.png"))
] + [
    (srn("intrinsics.txt", None), "intrinsics.txt"),
    (srn("pose/000001.txt", None), "000001.png .*No such file.*000001.txt"),
    (srn("intrinsics.txt", "131 64 64 0\n0 0 0\n"), "rgb is not as expected: .*expected 10"),
    (srn("pose/000001.txt", "a pose"), "000001.png is not as expected: .*float"),
    (srn("rgb/000001.png", b"\x89PNG\r\n"), "cannot identify .*000001.png"),
    *((srn("*/*", None, scenes), "no pictures in") for scenes in (1, 2)),
    *((arrays(**{key: None}), f"a.npz is not as expected: KeyError, '{key}")
      for key in ("images", "poses", "focal", "background")),
    (arrays(images=np.zeros((3, 8, 8))), "a.npz is .* have to be uint8"),
    (arrays(images=np.zeros((2, 3, 32, 32, 3), np.uint16)), "a.npz is .* have to be uint8"),
    (arrays(images=np.linspace(-1, 1, 729).reshape(3, 9, 9, 3), poses=np.stack([np.eye(4)] * 3)),
     "one scene's in .0, 1"),
    (arrays(images=np.zeros((0, 3, 32, 32, 3), np.uint8)), ".N, V, 4, 4"),
    (arrays(images=np.full((3, 9, 9, 3), 2.0)), "one scene's in .0, 1"),
    (arrays(images=np.zeros((2, 3, 32, 32, 2, 2), np.uint8)), "N, V, S, S, 3"),
    *((arrays(images=np.zeros((2, 3, 32, 32, C), np.uint8)), "S, S, 3") for C in (1, 4)),
    *((arrays(poses=np.zeros(s)), ".N, V, 4, 4") for s in ((2, 2, 4, 4), (2, 4, 4, 4))),
    *((arrays(background=np.zeros(s, np.uint8)), "background uint8 .3") for s in ((), 4)),
    (arrays(focal=np.ones(2)), "a.npz is not as expected: TypeError"),
    (arrays(poses=np.zeros((2, 3, 4, 4))), "images.0, 0. .* pose is not a rotation"),
    (nmr_without_a_camera, "train9 is not as expected: .*camera_mat_1"),
    (lambda folder: save(folder / "softras_val.lst", "not_downloaded\n"), "no scenes in"),
    (arrays(focal=np.nan), "a focal length of nan widths"), (arrays(focal=1e9), "focal length"),
    (arrays(focal=np.inf), "a focal length of inf widths|a focal length of 5e.08 widths"),
    (arrays(background=np.zeros(3)), "background uint8"),
    (arrays(poses=np.array([{}])), "pickle"),
    (arrays(images=np.zeros((2, 3, 8, 8, 3), np.uint8)), "a.npz is .* only 8 x 8"),
    (lambda folder: save(folder / "a.npz", "no archive"), "a.npz is not as expected"),
] + [(layouts(scene, **changes), "CLEVR_val_scenes.json.*" + words) for scene, changes, words in (
    (None, {"color": "pink"}, ""), (None, {"shape": "cone"}, "'cone'"),
    (None, {"3d_coords": [0, 0, -1]}, "ground"), (None, {"3d_coords": [math.nan, 0, 1]}, "ground"),
    (None, {"3d_coords": [1e308, 0, 1]}, "far away"), (None, {"rotation": 1e999}, ""),
    (None, {"rotation": None}, ""),
    ({"rotation": 0.0, "3d_coords": [0, 0, 1.0]}, {}, "'shape'"), (3, {}, ""),
    ('{"scenes": ' + "[" * 10 ** 5, {}, ""), ('{"scenes": [', {}, ""), ("{}", {}, "'scenes'"))
] + [(layouts('{"scenes": [%s]}' % scenes), "no scenes in") for scenes in ("", '{"objects": []}')]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_files_are_refused_in_one_sentence(tmp_path, case):
    write, words = BAD[case]
    write(tmp_path)
    with pytest.raises((ValueError, OSError), match=words) as caught:
        load(tmp_path, resolution=16)
    assert "\n" not in str(caught.value) and tmp_path.name in str(caught.value)


def test_wrong_arguments_are_answered_with_what_to_do(tmp_path):
    save(tmp_path / "world_mat" / "a.txt", "nothing known")
    for call, words in (
            (partial(load, "clevr1", resolution=0), "at least 1"),
            (partial(load, "clevr2"), "neither a built-in set .*clevr1.* nor a path"),
            (partial(load, tmp_path), "nor a path that has .*rgb, .*npz"),
            (partial(load, tmp_path / "world_mat" / "a.txt"), "nor a path that has"),
            *((partial(load, tmp_path, *n), "at least 1") for n in ((0,), (-1,), (1, 0))),
            (partial(load_srn, tmp_path), "no scenes in"),
            (partial(load, "clevr1", split="held out"), "split must be train or test")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            call()
    views = load("clevr1", scenes=2, views=3, resolution=8)
    assert views.images.shape == (2, 3, 3, 8, 8) and views.scale == 1
    assert len(load("clevr1", resolution=2)) == 1000


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
    with pytest.raises(ValueError, match=r"mask.png has .180, 60. pixels, its picture .60, 60."):
        read_mask(tmp_path / "mask.png", 32, (60, 60))
    save(tmp_path / "mask.png", np.uint8(0 * disc))
    with pytest.raises(ValueError, match="mask.png hides all"):     # but for what is padded
        read_mask(tmp_path / "mask.png", 32, (180, 60), "pad")
    with pytest.raises(KeyError, match="stretch"):
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
    """8 and 16 bits, floats, transparency of 16 bits, EXIF, and what is none."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    save(tmp_path / "8.png", grey)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "f.tif")
    save(tmp_path / "nan.tif", np.where(grey > 60, grey, math.nan).astype(np.float32))
    with pytest.raises(ValueError, match="nan.tif is .* not finite"):
        read_image(tmp_path / "nan.tif", 8)
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
        with pytest.raises(ValueError, match=f"{name} is not as expected"):
            read_image(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match="no.png"):
        read_image(tmp_path / "no.png", 8)


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
