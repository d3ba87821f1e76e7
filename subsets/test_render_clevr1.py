"""Tests of render_clevr1.py, all but Blender itself, and of the sets that it made."""
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import render_clevr1 as clevr1

SHIPPED = Path(__file__).parent / "clevr1_blender"


def shipped(split):
    """The arrays of a shipped file by their names."""
    with np.load(SHIPPED / f"{split}.npz", allow_pickle=False) as file:
        return dict(file)


def fake_picture(thing, pose, size=8):
    """What stands in for Blender: a picture that tells which thing was seen from where."""
    noise = np.random.default_rng([*clevr1.describe(thing).encode(), *np.float32(pose).tobytes()])
    return noise.integers(0, 256, (size, size, 3), dtype=np.uint8)


def made(path, count, picture=fake_picture, first=0, views=2, seed=3):
    """The arrays of a file that ends up with `count` scenes."""
    scenes = [clevr1.draw_scene(first + i, views, seed) for i in range(count)]
    clevr1.add_pictures(path, scenes, clevr1.read_pictures(path, scenes, 8), picture)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def equal(a, b):
    """Whether two files' arrays are the same."""
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# ---- Scenes and cameras ------------------------------------------------------------------------

@pytest.mark.parametrize("split, seed, views", [("train", 1, 1), ("test", 2, 5)])
def test_the_shipped_files_are_what_their_seeds_draw(split, seed, views):
    file = shipped(split)
    things, poses = zip(*(clevr1.draw_scene(i, views, seed) for i in range(len(file["images"]))))
    assert file["objects"].tolist() == [clevr1.describe(thing) for thing in things]
    assert np.abs(file["poses"] - poses).max() < 1e-6
    assert file["images"].shape == (len(things), views, 64, 64, 3)
    assert file["images"].dtype == file["background"].dtype == np.uint8
    assert file["focal"] == np.float32(clevr1.FOCAL) and (file["background"] == clevr1.GREY).all()


def test_shipped_pictures_show_the_object_where_the_poses_have_it():
    """The pixel of a matte object's centre has the object's colour; a corner is the grey ground."""
    file, colors = shipped("train"), {"red": [173, 35, 35], "blue": [42, 75, 215]}
    for i, text in enumerate(file["objects"]):
        shape, material, color, size, _ = text.split()
        if material == "rubber" and color in colors:
            radius = float(size) / clevr1.UNIT / (2 ** 0.5 if shape == "cube" else 1)
            pose = file["poses"][i, 0]
            x, y, z = pose[:3, :3].T @ ([0, 0, clevr1.GROUND + radius] - pose[:3, 3])
            column, row = (int(64 * (clevr1.FOCAL * c / z + 0.5)) for c in (x, y))
            pixel = file["images"][i, 0, row, column].astype(float)
            assert np.corrcoef(pixel, colors[color])[0, 1] > 0.95
    assert np.abs(file["images"][:, 0, 0, 0] - 191.0).max() < 8


def test_fewer_views_are_the_first_of_more():
    few, many = clevr1.draw_scene(7, 1, 5), clevr1.draw_scene(7, 4, 5)
    assert few[0] == many[0] and np.array_equal(few[1], many[1][:1])
    assert clevr1.draw_scene(7, 1, 6)[0] != few[0]


def test_blender_sees_a_point_at_the_same_pixel():
    """By Blender's axes (y up, z backwards) and CLEVR's units, whose ground is at z = 0."""
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3))
    for pose in clevr1.draw_scene(0, 5, 0)[1].astype(float):
        x, y, z = pose[:3, :3].T @ (points - pose[:3, 3]).T
        in_clevr = np.c_[points * clevr1.UNIT + [0, 0, 0.45 * 1.6], np.ones(20)]
        right, up, back, one = np.linalg.inv(clevr1.blender_camera(pose)) @ in_clevr.T
        assert np.allclose([right / -back, -up / -back, one], [x / z, y / z, one / one], atol=1e-6)


# ---- The file ----------------------------------------------------------------------------------

def test_a_stopped_run_goes_on_to_the_same_file(tmp_path):
    """By an error in the middle of a scene, by Ctrl-C after one: whole scenes stay."""
    whole = made(tmp_path / "whole.npz", 5)
    assert whole["images"].shape == (5, 2, 8, 8, 3) and whole["poses"].shape == (5, 2, 4, 4)
    thing, poses = clevr1.draw_scene(4, 2, 3)
    assert np.array_equal(whole["images"][4, 1], fake_picture(thing, poses[1]))
    path, seen = tmp_path / "stopped.npz", []

    def breaks(thing, pose):
        seen.append(pose)
        if len(seen) == 4:
            raise OSError("the disk is full")
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return fake_picture(thing, pose)
    for error, scenes in ((OSError, 1), (KeyboardInterrupt, 2)):
        with pytest.raises(error):
            made(path, 5, breaks)
        assert len(np.load(path)["images"]) == scenes
    assert equal(made(path, 5, breaks), whole) and len(seen) == 12
    assert equal(made(path, 5, None), whole)                # complete: Blender is not asked
    longer = made(path, 6)                                  # a larger --count makes it grow
    assert len(longer["images"]) == 6
    assert all(np.array_equal(longer[key][:5], whole[key]) for key in ("images", "poses"))
    part = made(tmp_path / "part.npz", 2, first=4)
    assert np.array_equal(part["images"], longer["images"][4:])


@pytest.mark.parametrize("changed", [dict(seed=4), dict(first=1), dict(views=1), dict(count=2)])
def test_a_file_of_other_scenes_stays_as_it_is(tmp_path, changed):
    path = tmp_path / "a.npz"
    made(path, 3)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a.npz holds other scenes"):
        made(path, **{"count": 4, **changed})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- Command line ------------------------------------------------------------------------------

def assets(folder):
    """Empty files of the names that CLEVR's assets have."""
    for name in ("base_scene.blend", "properties.json", "materials/Rubber.blend",
                 "materials/MyMetal.blend", "shapes/SmoothCube_v2.blend",
                 "shapes/SmoothCylinder.blend", "shapes/Sphere.blend"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_the_command_makes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clevr1, "open_blender", lambda assets, size, samples: (
        lambda thing, pose: fake_picture(thing, pose, size)))
    out = tmp_path / "o.npz"
    clevr1.main(["assets", str(out), "--count", "3", "--views", "2", "--size", "8", "--seed", "3"])
    assert equal(dict(np.load(out)), made(tmp_path / "a.npz", 3))
    assert "holds 3 scenes" in capsys.readouterr().err


@pytest.mark.parametrize("line, message", [
    ("none o.npz", "no .*base_scene.blend: ASSETS is the folder image_generation/data"),
    ("assets o.npz", "pip install bpy==4.2.0"), ("assets o.png", "o.png must end in .npz"),
    ("assets none/o.npz", "none/o.npz must .* in a folder that is there"),
    ("assets bad.npz", "bad.npz is no file of this script"),
    ("assets keys.npz", "keys.npz is no file of this script.*poses"),
    ("assets o.npz --count 0", "--count must be at least 1"),
    ("assets o.npz --seed -1", "--seed must be at least 0")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "bpy", None)           # as where it is not installed
    assets(tmp_path / "assets")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "keys.npz", images=np.zeros(3))
    with pytest.raises(SystemExit) as stopped:
        clevr1.main(line.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "o.npz").exists() and (tmp_path / "bad.npz").read_bytes() == b"no zip"
