"""Tests of blender.py in a stand-in for Blender, whose cameras have OpenGL's axes."""
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_folder, orbit

SCRIPT = Path(__file__).with_name("blender.py")
POSES = orbit(torch.tensor([0.0, 40, 200]), torch.tensor([10.0, 30, 50]), 3.0)
FOCAL, SHIFT = 1.2, (0.1, -0.05)        # in picture widths; the frame moves right and down


def stand_in(folder, monkeypatch, **changes):
    """A bpy whose open file has frames 5, 7 and 9 of 60 x 40 pixels, from POSES."""
    def view_frame(scene):
        """Corners of what the camera sees, at some depth, as Blender gives them."""
        x, y, z = 0.5, 0.5 * 40 / 60, -FOCAL
        corners = [(x, y), (x, -y), (-x, -y), (-x, y)]
        return [np.array([a + SHIFT[0], b + SHIFT[1], z]) * 1.7 for a, b in corners]

    def frame_set(number):
        matrix = POSES[(number - 5) // 2].double().numpy() * [1, -1, -1, 1]
        camera.matrix_world = matrix * [2, 2, 2, 1]             # scaled, which Blender ignores

    def render(write_still):
        assert write_still and scene.render.image_settings.file_format == "PNG"
        if changes.get("writes", True):
            Image.new("RGBA", (60, 40), (9, 9, 9, 255)).save(scene.render.filepath)
    camera = SimpleNamespace(data=SimpleNamespace(type=changes.get("type", "PERSP"),
                                                  view_frame=view_frame))
    scene = SimpleNamespace(
        camera=changes.get("camera", camera), frame_set=frame_set,
        frame_start=5, frame_end=10, frame_step=2,
        render=SimpleNamespace(resolution_x=120, resolution_y=80, resolution_percentage=50,
                               image_settings=SimpleNamespace(file_format="FFMPEG")))
    monkeypatch.setitem(sys.modules, "bpy", SimpleNamespace(
        context=SimpleNamespace(scene=scene),
        data=SimpleNamespace(filepath=changes.get("file", str(folder / "my.blend"))),
        ops=SimpleNamespace(render=SimpleNamespace(render=render))))


def test_cameras_come_back(tmp_path, monkeypatch, capsys):
    (tmp_path / "capture.part").mkdir()                         # left by one that was stopped
    (tmp_path / "capture.part" / "0001.png").touch()
    stand_in(tmp_path, monkeypatch)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    folder = tmp_path / "capture"
    assert sorted(file.name for file in folder.iterdir()) == [
        "0005.png", "0007.png", "0009.png", "transforms.json"]
    assert list(tmp_path.iterdir()) == [folder]
    assert re.search(r"picture 3 of 3, .*left\n.*capture has 3 pictures", capsys.readouterr().err)
    views = load_folder(folder, resolution=8)
    expected = POSES.clone()
    expected[:, :3, 3] /= views.scale
    assert torch.allclose(views.poses[0], expected, atol=1e-5)
    frame = json.loads((folder / "transforms.json").read_text())["frames"][2]
    assert [frame[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy")] == pytest.approx(
        [60, 40, FOCAL * 60, FOCAL * 60, 30 - 0.1 * 60, 20 - 0.05 * 60])
    assert views.focal == pytest.approx(FOCAL * 60 / (2 * 17))      # 17 rows are above the middle


@pytest.mark.parametrize("changes, message", [
    ({"file": ""}, "no file is open"), ({"camera": None}, "no perspective camera in frame 5"),
    ({"type": "ORTHO"}, "my.blend has no perspective camera"),
    ({"writes": False}, "did not write .*0005.png"), ({"there": True}, "capture is there already")])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, changes, message):
    if "there" in changes:
        (tmp_path / "capture").mkdir()
        (tmp_path / "capture" / "mine.png").touch()
    stand_in(tmp_path, monkeypatch, **changes)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "capture" / "transforms.json").exists()
    assert (tmp_path / "capture" / "mine.png").exists() == ("there" in changes)
