"""Tests of colmap.py: known cameras, written as COLMAP writes them in a world of their own."""
import json
import re
import sys
from pathlib import Path

import colmap
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_folder, orbit

PINHOLE = "1 PINHOLE 40 30 50 52 20 15"
IMAGES = """# Image list with two lines of data per image:
1 1 0 0 0 0 0 4 1 a.png

2 0.5 0.5 0.5 0.5 0 0 4 1 b.png
1.0 2.0 -1 3.5 4.5 7
"""
POINTS = """# 3D point list with one line of data per point:
1 0 0 0 255 0 0 0.5 1 0
2 1 2 3 0 255 0 0.5 1 1 2 0
"""


def quaternion(rotation):
    """(w, x, y, z) of a rotation matrix: the eigenvector of Bar-Itzhack's matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    matrix = [[a + e + i, h - f, c - g, d - b], [h - f, a - e - i, b + d, c + g],
              [c - g, b + d, e - a - i, f + h], [d - b, c + g, f + h, i - a - e]]
    return np.linalg.eigh(matrix)[1][:, -1]


def write(folder, poses=None, points=None, lens=PINHOLE, pictures=None):
    """COLMAP's files of camera-to-world poses (n, 4, 4) and points (P, 3); pictures of 40 x 30."""
    images, names = IMAGES, ["a.png", "b.png"]
    if poses is not None:
        names = [f"some/picture {v}.png" for v in range(len(poses))]
        images = "# Image list\n"
        for v, pose in enumerate(poses):
            R = pose[:3, :3].T
            row = " ".join(f"{n:.12f}" for n in (*quaternion(R), *(-R @ pose[:3, 3])))
            images += f"{v + 1} {row} 1 {names[v]}\n" + ("1.0 2.0 -1\n" if v % 2 else "\n")
    rows = POINTS if points is None else "".join(
        f"{k} {x} {y} {z} 9 9 9 0.1 1 2\n" for k, (x, y, z) in enumerate(points))
    (folder / "cameras.txt").write_text(f"# Camera list\n{lens}\n")
    (folder / "images.txt").write_text(images)
    (folder / "points3D.txt").write_text(rows)
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(folder / "images" / name)


def own_world(seed=0):
    """A similarity (4, 4) of scale 7: COLMAP's world is turned, shifted and sized as it happens."""
    rng, world = np.random.default_rng(seed), np.eye(4)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    world[:3, :3], world[:3, 3] = 7 * turn * np.linalg.det(turn), rng.normal(size=3) * 9
    return world


def cameras(azimuths, elevation=30.0):
    """Poses (n, 4, 4) round the origin, whose z is up."""
    return orbit(torch.as_tensor(azimuths), elevation, 2.6).double().numpy()


def into_world(world, poses):
    """The same cameras in another world: positions are scaled, axes only turned."""
    moved = world @ poses
    moved[:, :3, :3] /= np.cbrt(np.linalg.det(world[:3, :3]))
    return moved


@pytest.mark.parametrize("lens, focal", [(PINHOLE, 52 / 30), ("3 SIMPLE_PINHOLE 40 30 50 20 15",
                                                              50 / 30)])
def test_cameras_come_back_up_to_a_turn_about_z(tmp_path, capsys, lens, focal):
    """Centred on the points' median, which outliers do not move, z up, sizes as COLMAP has them."""
    poses, world = cameras(np.linspace(0.0, 270, 7)), own_world()
    points = np.r_[np.random.default_rng(1).normal(size=(50, 3)), [[1e4, 1e5, -1e3]] * 3]
    points -= np.median(points @ world[:3, :3].T, 0) @ np.linalg.inv(world[:3, :3]).T
    write(tmp_path, into_world(world, poses), points @ world[:3, :3].T + world[:3, 3], lens)
    colmap.main([str(tmp_path)])
    views = load_folder(tmp_path, resolution=8)
    poses[:, :3, 3] *= 7 / views.scale
    found = views.poses[0].double().numpy()
    spin = found[0] @ np.linalg.inv(poses[0])
    assert np.allclose(spin[2], [0, 0, 1, 0], atol=1e-4)
    assert np.allclose(spin[:3, 3], 0, atol=1e-4)
    assert np.allclose(spin @ poses, found, atol=1e-4)
    assert views.focal == pytest.approx(focal)
    error = capsys.readouterr().err
    assert "7 cameras; the median of 53 points is the origin" in error
    assert "up is where the pictures are level (off by 0.0 degrees" in error


def test_a_pixel_stays_a_pixel(tmp_path):
    """The median point by images.txt's own formula, and the origin by what is written."""
    write(tmp_path, into_world(own_world(), cameras([0.0, 50, 100])), lens=PINHOLE)
    colmap.main([str(tmp_path)])
    about = json.loads((tmp_path / "transforms.json").read_text())
    rows = (tmp_path / "images.txt").read_text().splitlines()[1::2]
    for row, frame in zip(rows, about["frames"], strict=True):
        w, x, y, z, *shift = map(float, row.split()[1:8])
        point, axis = np.array([0.5, 1, 1.5]), np.array([x, y, z])  # q p q*, and t
        turned = point + 2 * np.cross(axis, np.cross(axis, point) + w * point)
        x, y, z = turned + shift
        right, up, back = np.linalg.inv(frame["transform_matrix"])[:3, 3]
        assert np.allclose([right / -back, -up / -back, -back], [x / z, y / z, z])
        assert frame["file_path"] == "images/" + row.split(maxsplit=9)[9]
    assert {key: about[key] for key in about if key != "frames"} == {
        "w": 40, "h": 30, "fl_x": 50, "fl_y": 52, "cx": 20, "cy": 15}


@pytest.mark.parametrize("azimuths, roll, most", [
    (np.linspace(0.0, 350, 36), 3, 2), (np.linspace(0.0, 90, 20), 3, 5),
    (np.linspace(0.0, 15, 20), 1, 4), ([10.0] * 9, 0, 31)])
def test_up_of_hand_held_cameras(azimuths, roll, most):
    """In degrees. Cameras that all look one way know of up no more than their mean up."""
    poses, angles = cameras(azimuths), np.radians(np.random.default_rng(0).normal(size=36) * roll)
    for pose, angle in zip(poses, angles):
        c, s = np.cos(angle), np.sin(angle)
        pose[:3, :2] = pose[:3, :2] @ [[c, -s], [s, c]]
    assert np.degrees(np.arccos(colmap.find_up(poses)[2])) < most


def test_real_camera_of_a_phone_is_refused_by_name(tmp_path, capsys):
    write(tmp_path, lens="1 SIMPLE_RADIAL 1080 1920 1027.7879529283434 481.14437353992906 "
                         "983.22914374616869 0.1221481449008421")
    with pytest.raises(SystemExit):
        colmap.main([str(tmp_path)])
    assert re.search("cameras.txt is SIMPLE_RADIAL, .*colmap image_undistorter",
                     capsys.readouterr().err)


def on_their_side():
    """Poses round the origin, each turned by 90 degrees about its view: no up is theirs."""
    poses = cameras(np.linspace(0.0, 315, 8), 0.0)
    poses[:, :3, :2] = poses[:, :3, :2] @ [[0, -1], [1, 0]]
    return poses


@pytest.mark.parametrize("file, text, message", [
    ("cameras.txt", None, "no .*cameras.txt: export it by colmap model_converter"),
    ("cameras.txt", "", "cameras.txt has 0 cameras"),
    ("cameras.txt", f"{PINHOLE}\n2{PINHOLE[1:]}", "cameras.txt has 2 cameras.*single_camera"),
    ("cameras.txt", "1 OPENCV 40 30 50 50 20 15 0 0 0 0", "cameras.txt is OPENCV"),
    ("cameras.txt", "1 PINHOLE 40 30 50 50 20", "cameras.txt has a line .*1 PINHOLE 40"),
    ("cameras.txt", "1", "cameras.txt is none"),
    ("images.txt", None, "no .*images.txt"), ("images.txt", "# nothing", "images.txt has no pict"),
    ("images.txt", IMAGES.replace("\n\n", "\n"), "images.txt has a line .*2 0.5 0.5"),
    ("images.txt", IMAGES.replace("1 1 0", "1 nan 0"), "images.txt has a line .*1 nan"),
    ("images.txt", IMAGES.replace("1 1 0", "1 0 0"), "images.txt has a line .*1 0 0"),
    ("images.txt", IMAGES.replace(" 1 a.png", ""), "images.txt has a line"),
    ("images.txt", IMAGES.replace("a.png", "c.png"), "no picture .*c.png"),
    ("points3D.txt", None, "no .*points3D.txt"), ("points3D.txt", "", "points3D.txt has no points"),
    ("points3D.txt", "1 2 three 4 0 0 0", "points3D.txt has a line .*three"),
    ("transforms.json", "mine", "transforms.json is there already: --force")])
def test_bad_input_is_one_sentence(tmp_path, capsys, file, text, message):
    write(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        colmap.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert file != "transforms.json" or (tmp_path / file).read_text() == "mine"


def test_pictures_on_their_side_are_refused_and_force_writes_over(tmp_path, capsys):
    write(tmp_path, on_their_side())
    with pytest.raises(SystemExit):
        colmap.main([str(tmp_path)])
    assert "head down: turn pictures that lie on their side" in capsys.readouterr().err
    write(tmp_path)
    (tmp_path / "transforms.json").write_text("old")
    colmap.main([str(tmp_path), "--force"])
    assert len(json.loads((tmp_path / "transforms.json").read_text())["frames"]) == 2
    assert not list(tmp_path.glob("*.part"))
