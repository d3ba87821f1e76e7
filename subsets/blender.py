"""Your Blender scene: renders each frame of its camera, and writes capture/ beside the file.

    blender my.blend -b -P subsets/blender.py
    python renderdiffusion.py train --data capture

capture/ holds the pictures and NeRF's `transforms.json`. Let the camera move round what the scene
shows, which should stand at the origin: one picture a frame, by the file's own engine, size and
frame range. A camera may zoom, be shifted, or change at markers. The file itself is not changed.
"""
import json
import math
import shutil
import sys
import time
from pathlib import Path

import bpy


def lens(scene):
    """The scene's present camera as transforms.json has it: focal and middle in pixels."""
    percent = scene.render.resolution_percentage / 100
    w, h = int(scene.render.resolution_x * percent), int(scene.render.resolution_y * percent)
    corners = scene.camera.data.view_frame(scene=scene)         # with fit, shift and pixel aspect
    x, y, z = zip(*corners)
    across, up, distance = max(x) - min(x), max(y) - min(y), -z[0]
    return {"w": w, "h": h, "fl_x": w * distance / across, "fl_y": h * distance / up,
            "cx": -w * min(x) / across, "cy": h * max(y) / up}


def pose(camera):
    """The camera's matrix in the world without its scale, which Blender ignores: rows of four."""
    rows = [list(row) for row in camera.matrix_world]
    sizes = [math.sqrt(sum(row[i] ** 2 for row in rows[:3])) for i in range(3)] + [1]
    return [[x / size for x, size in zip(row, sizes)] for row in rows]


def capture():
    """Renders every frame; gives the folder and how many pictures it has. ValueError, OSError."""
    scene = bpy.context.scene
    if not bpy.data.filepath:
        raise ValueError("no file is open: blender my.blend -b -P subsets/blender.py")
    folder = Path(bpy.data.filepath).parent / "capture"
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: move it away")
    partial = folder.with_name("capture.part")          # what is named capture is whole
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    scene.render.image_settings.file_format = "PNG"
    frames, start = [], time.monotonic()
    numbers = range(scene.frame_start, scene.frame_end + 1, scene.frame_step)
    for number in numbers:
        scene.frame_set(number)
        if scene.camera is None or scene.camera.data.type != "PERSP":
            raise ValueError(f"{bpy.data.filepath} has no perspective camera in frame {number}")
        scene.render.filepath = str(partial / f"{number:04}.png")
        bpy.ops.render.render(write_still=True)
        if not Path(scene.render.filepath).is_file():
            raise OSError(f"Blender did not write {scene.render.filepath}")
        frames.append({"file_path": f"{number:04}.png", "transform_matrix": pose(scene.camera),
                       **lens(scene)})
        each = (time.monotonic() - start) / len(frames)
        print(f"picture {len(frames)} of {len(numbers)}, "
              f"{each * (len(numbers) - len(frames)) / 60:.1f} min left", file=sys.stderr)
    (partial / "transforms.json").write_text(json.dumps({"frames": frames}, indent=1))
    partial.rename(folder)
    return folder, len(frames)


if __name__ == "__main__":
    try:
        print("{} has {} pictures and their cameras".format(*capture()), file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
