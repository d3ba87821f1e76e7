"""Tests of clevr_cameras.py: scenes as CLEVR's generator writes them, from known cameras."""
import json
import re

import clevr_cameras as clevr
import numpy as np
import pytest
from PIL import Image

from data import orbit      # whose folder clevr_cameras has put on the path

# A scene of the generator by other hands (Piyush Bagad's, MIT), 320 x 240: what its objects state
REAL = [([0.1783720701932907, 0.7540301084518433, 0.3499999940395355],
         [180, 106, 11.943315505981445]),
        ([-0.35769981145858765, 2.281416893005371, 0.3499999940395355],
         [201, 89, 13.15228271484375]),
        ([1.5105977058410645, 1.4147624969482422, 0.3499999940395355],
         [223, 115, 11.41500473022461]),
        ([1.8301969766616821, -1.8868159055709839, 0.699999988079071],
         [149, 145, 9.194456100463867]),
        ([1.3658498525619507, 2.9907994270324707, 0.699999988079071],
         [251, 91, 12.216690063476562]),
        ([-0.3781699240207672, -2.485077381134033, 0.3499999940395355],
         [88, 131, 10.517651557922363]),
        ([-2.3470849990844727, 1.1043587923049927, 0.3499999940395355],
         [144, 81, 13.835407257080078])]


def simulated_scene(rng, count, size=(480, 320), index=0):
    """A scene of the generator as its JSON has it, its camera's centre, and its picture.

    The picture is grey with a red dot, 5 x 5 pixels, where the first object is.
    """
    center, (w, h) = np.array(clevr.MEAN_CENTER) + rng.uniform(-0.5, 0.5, 3), size
    into = -center / np.linalg.norm(center)
    right = np.cross(into, [0, 0, 1]) / np.linalg.norm(np.cross(into, [0, 0, 1]))
    points = np.c_[rng.uniform(-3, 3, (count, 2)), rng.choice([0.35, 0.7], count)]
    points[0, :2] /= 4                                          # inside the middle square
    x, y, z = np.stack([right, np.cross(into, right), into]) @ np.float32(points - center).T
    x, y = 35 / 32 * w * x / z + w / 2, 35 / 32 * w * y / z + h / 2
    picture = np.full((h, w, 3), 120, np.uint8)
    picture[int(y[0]) - 2:int(y[0]) + 3, int(x[0]) - 2:int(x[0]) + 3] = [255, 0, 0]
    objects = [{"shape": "cube", "size": "large", "color": "red", "material": "metal",
                "rotation": 0.0, "3d_coords": point.tolist(), "pixel_coords": pixel}
               for point, pixel in zip(points, zip(np.rint(x), np.rint(y), map(float, z)))]
    return {"image_index": index, "image_filename": f"CLEVR_val_{index:06d}.png",
            "objects": objects, "directions": {"right": [0.65, 0.75, -0.0]},
            "relationships": {"left": [[] for _ in objects]}}, center, picture


def write(file, folder, scenes, pictures):
    """A file of scenes, and the pictures (as many as there are) in a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"info": {"version": "1.0"}, "scenes": scenes}))
    for scene, picture in zip(scenes, pictures):
        Image.fromarray(picture).save(folder / scene["image_filename"])


# ---- The solver --------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [3, 4, 6, 10])
def test_the_camera_comes_back(count):
    rng, errors = np.random.default_rng(count), []
    for i in range(40):
        size = (480, 320) if i % 2 else (320, 240)
        scene, center, _ = simulated_scene(rng, count, size)
        pose, error = clevr.solve_camera(*clevr.read_objects(scene), *size)
        errors.append(np.linalg.norm(pose[:3, 3] - center))
        assert error < 0.5 and np.allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3))
    assert np.median(errors) < 5e-4


@pytest.mark.parametrize("corrupt", [
    lambda o, rng: o.update(pixel_coords=o["pixel_coords"] + np.array([30, 0, 0])),
    lambda o, rng: o.update(pixel_coords=o["pixel_coords"] + np.array([0, 0, 0.5])),
    lambda o, rng: o["3d_coords"].__setitem__(slice(0, 2), rng.uniform(-3, 3, 2))])
def test_one_bad_object_is_left_out(corrupt):
    rng, errors = np.random.default_rng(0), []
    for i in range(30):
        scene, center, _ = simulated_scene(rng, 4 + i % 7)
        corrupt(scene["objects"][i % 4], rng)
        pose, _ = clevr.solve_camera(*clevr.read_objects(scene), 480, 320)
        errors.append(np.linalg.norm(pose[:3, 3] - center))
    assert np.median(errors) < 5e-4 and max(errors) < 0.05


def test_a_real_scene_fits_to_a_third_of_a_pixel():
    points, seen = map(np.array, zip(*REAL))
    pose, error = clevr.solve_camera(points, seen, 320, 240)
    assert error < 0.35
    assert np.abs(pose[:3, 3] - clevr.MEAN_CENTER).max() < 0.5  # the generator's jitter
    assert clevr.solve_camera(points, seen, 480, 320)[0] is None     # that is another camera
    assert clevr.solve_camera(points[:1], seen[:1], 320, 240)[0] is None


def test_a_camera_that_looks_at_the_origin_is_an_orbit():
    pose = clevr.look_at_origin(np.array(clevr.MEAN_CENTER))
    x, y, z = clevr.MEAN_CENTER
    radius = np.linalg.norm(clevr.MEAN_CENTER)
    angles = np.degrees([np.arctan2(y, x), np.arcsin(z / radius)])
    assert np.allclose(pose, orbit(*angles, radius), atol=1e-5)


# ---- The files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("size, scenes_file, folder", [
    ((480, 320), "scenes/CLEVR_val_scenes.json", "images/val"),
    ((320, 240), "CLEVR_scenes.json", "images")])
def test_pictures_and_cameras_of_both_layouts(tmp_path, capsys, size, scenes_file, folder):
    """The second scene fits no camera, the last has no picture; the dot is where it should be."""
    rng = np.random.default_rng(1)
    scenes, centers, pictures = zip(*(simulated_scene(rng, 5, size, i) for i in range(5)))
    for thing in scenes[1]["objects"][:3]:
        thing["pixel_coords"] = np.add(thing["pixel_coords"], [rng.uniform(20, 60), 0, 0]).tolist()
    write(tmp_path / scenes_file, tmp_path / folder, scenes, pictures[:4])
    clevr.main([str(tmp_path), str(tmp_path / "o.npz")])
    said = capsys.readouterr().err
    assert re.search(r"3 pictures, whose cameras fit to 0\.[1-4]\d pixels in the median; skipped 1 "
                     "scenes that no camera fits, and 1 without a picture", said)
    with np.load(tmp_path / "o.npz", allow_pickle=False) as file:
        images, poses, focal, ground = (file[key] for key in ("images", "poses", "focal",
                                                              "background"))
    assert images.shape == (3, 1, 64, 64, 3) and images.dtype == ground.dtype == np.uint8
    assert poses.shape == (3, 1, 4, 4) and poses.dtype == np.float32
    assert focal == pytest.approx(35 / 32 * size[0] / size[1]) and ground.tolist() == [120] * 3
    for image, pose, k in zip(images[:, 0], poses[:, 0].astype(float), (0, 2, 3), strict=True):
        assert np.abs(pose[:3, 3] * clevr.CLEVR_SCALE - centers[k]).max() < 0.01
        point = np.array(scenes[k]["objects"][0]["3d_coords"]) / clevr.CLEVR_SCALE
        x, y, z = pose[:3, :3].T @ (point - pose[:3, 3])
        redness = np.clip(image[..., 0] - 120.0, 0, None)
        place = [(redness.sum(axis) @ (np.arange(64) + 0.5)) / redness.sum() for axis in (0, 1)]
        assert np.allclose(place, [64 * (focal * c / z + 0.5) for c in (x, y)], atol=0.2)


def test_the_first_scenes_of_a_split(tmp_path):
    """Train comes before val where both are there; a split without pictures is not there."""
    rng = np.random.default_rng(2)
    for split in ("val", "train"):
        made = [simulated_scene(rng, 4, (48, 32), i) for i in range(3)]
        scenes, _, pictures = zip(*made)
        write(tmp_path / "scenes" / f"CLEVR_{split}_scenes.json", tmp_path / "images" / split,
              scenes, pictures)
    train, val = ((tmp_path / "scenes" / f"CLEVR_{split}_scenes.json",
                   tmp_path / "images" / split) for split in ("train", "val"))
    assert clevr.find_files(tmp_path) == train and clevr.find_files(tmp_path, "val") == val
    some = clevr.convert(*train, 2, 8)[0]
    every = clevr.convert(*train, None, 8)[0]
    assert len(some["images"]) == 2 and len(every["images"]) == 3
    assert np.array_equal(some["poses"], every["poses"][:2])
    train[1].rename(tmp_path / "elsewhere")
    assert clevr.find_files(tmp_path) == val


def damaged(key, value):
    """What makes one value of the first scene's second object another."""
    return lambda scenes: scenes[0]["objects"][1].update({key: value})


@pytest.mark.parametrize("change, line, message", [
    (None, "none o.npz", "neither none/scenes/CLEVR_train_scenes.json with .* nor none/CLEVR_scen"),
    (None, "CLEVR o.npz --split train", "neither CLEVR/scenes/CLEVR_train_scenes.json with"),
    (None, "CLEVR o.png", "o.png must end in .npz"),
    (None, "CLEVR there.npz", "there.npz is there already"),
    (None, "CLEVR o.npz --scenes 0", "--scenes and --resolution must be at least 1"),
    (None, "CLEVR o.npz --resolution 65", "000000.png is 96 x 64 .* at least 65 high"),
    (lambda scenes: scenes[1].update(image_filename="big.png"), "CLEVR o.npz", "big.png is 120"),
    (lambda scenes: scenes[1].update(image_filename="bad.png"), "CLEVR o.npz", "bad.png is no"),
    (lambda scenes: scenes.clear(), "CLEVR o.npz", "val_scenes.json has no scene to"),
    (lambda scenes: scenes.append("{"), "CLEVR o.npz", "scene 2 of .*scenes.json is not"),
    (lambda scenes: scenes[0].pop("objects"), "CLEVR o.npz", "scene 0 of .* KeyError"),
    (damaged("3d_coords", None), "CLEVR o.npz", "scene 0 of .*CLEVR_val_scenes.json is not as"),
    (damaged("pixel_coords", [1, np.nan, 2]), "CLEVR o.npz", "scene 0 of"),
    (damaged("pixel_coords", [1, 2]), "CLEVR o.npz", "scene 0 of")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, change, line, message):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    scenes, _, pictures = zip(*(simulated_scene(rng, 4, (96, 64), i) for i in range(2)))
    scenes, folder = list(scenes), tmp_path / "CLEVR"
    write(folder / "scenes" / "CLEVR_val_scenes.json", folder / "images" / "val", scenes, pictures)
    Image.new("RGB", (120, 80)).save(folder / "images" / "val" / "big.png")
    (folder / "images" / "val" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "there.npz").write_bytes(b"mine")
    if change:
        change(scenes)
        write(folder / "scenes" / "CLEVR_val_scenes.json", folder / "images" / "val", scenes, [])
    with pytest.raises(SystemExit) as stopped:
        clevr.main(line.split())
    said = capsys.readouterr().err.replace("reading CLEVR/scenes/CLEVR_val_scenes.json\n", "")
    assert stopped.value.code == 2 and re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "o.npz").exists() and (tmp_path / "there.npz").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["", '{"scenes": [{"objects": []', "[]", '{"scenes": 3}',
                                  '{"info": {}}', '{"scenes": ' + "[" * 10 ** 5])
def test_damaged_files_of_scenes_are_named(tmp_path, text):
    (tmp_path / "CLEVR_scenes.json").write_text(text)
    with pytest.raises(ValueError, match="CLEVR_scenes.json is no file of CLEVR's scenes"):
        clevr.read_scenes(tmp_path / "CLEVR_scenes.json")
