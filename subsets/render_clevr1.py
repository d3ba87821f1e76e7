"""CLEVR1 by Blender: one CLEVR object in the middle of each scene, from cameras all round.

    pip install -r requirements.txt bpy==4.2.0          # Blender as a module, for Python 3.11
    git clone https://github.com/facebookresearch/clevr-dataset-gen
    python subsets/render_clevr1.py clevr-dataset-gen/image_generation/data more.npz --count 100

CLEVR's own shapes, materials and lamps [Johnson et al. 2017], rendered by Cycles, on a ground of
one grey with soft shadows. Scene i of a seed is the same whatever the other options. OUT.npz is
what `data.load_npz` reads; it is saved every two minutes, and the same command takes up where it
stopped. `clevr1_blender/train.npz` is seed 1 (`--count 4000`), `test.npz` seed 2 (`--count 128
--views 5`): a copy of one of them grows by a larger `--count` with its seed.
"""
import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import orbit

UNIT = 1.6                                      # CLEVR's units a cube unit
GROUND, RADIUS, FOCAL = -0.45, 2.7, 1.6         # in cube units, as in the built-in set clevr1
GREY = 191                                      # the ground, where no shadow falls
SHAPES = ("cube", "cylinder", "sphere")
MATERIALS = ("metal", "rubber")
COLORS = ("blue", "brown", "cyan", "gray", "green", "purple", "red", "yellow")
SIZES = (0.7, 0.35)                             # radius in CLEVR's units


# ---- What is in a scene ------------------------------------------------------------------------

def draw_scene(number, views, seed):
    """Scene `number` of a seed: what the object is (a dict), and the cameras' poses (V, 4, 4).

    Fewer views are the first of more. The order of the draws must not change: files go by it.
    """
    rng = random.Random(seed * 1000003 + number)
    thing = {"shape": rng.choice(SHAPES), "material": rng.choice(MATERIALS),
             "color": rng.choice(COLORS), "size": rng.choice(SIZES),
             "rotation": rng.uniform(0, 2 * math.pi)}
    angles = [(rng.uniform(0, 360), rng.uniform(20, 50)) for _ in range(views)]
    return thing, orbit(*torch.tensor(angles).T, RADIUS).numpy()


def describe(thing):
    """An object in words, as the file's `objects` have it: "cube rubber red 0.7 2.8982"."""
    return "{shape} {material} {color} {size} {rotation:.4f}".format(**thing)


def blender_camera(pose):
    """Our pose (4, 4) as Blender has it: y up, z backwards, CLEVR's units, the ground at z = 0."""
    matrix = np.array(pose, dtype=float)
    matrix[:3, 1:3] *= -1
    matrix[:3, 3] = (matrix[:3, 3] - [0, 0, GROUND]) * UNIT
    return matrix


# ---- Blender -----------------------------------------------------------------------------------

def open_blender(assets, size, samples):
    """Opens CLEVR's scene in Blender; gives a function (thing, pose) -> RGB picture (S, S, 3).

    assets: the folder image_generation/data of clevr-dataset-gen. samples: rays a pixel.
    """
    files = [f"materials/{name}.blend" for name in ("Rubber", "MyMetal")]
    files += [f"shapes/{name}.blend" for name in ("SmoothCube_v2", "SmoothCylinder", "Sphere")]
    for name in ("base_scene.blend", "properties.json", *files):
        if not (assets / name).is_file():
            raise FileNotFoundError(f"there is no {assets / name}: ASSETS is the folder "
                                    "image_generation/data of clevr-dataset-gen")
    try:
        import bpy
        from mathutils import Matrix
    except ImportError:
        raise ValueError("there is no bpy: pip install bpy==4.2.0, with Python 3.11") from None
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # Blender prints 40 lines a picture

    bpy.ops.wm.open_mainfile(filepath=str(assets / "base_scene.blend"))
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.device, scene.cycles.samples = "CYCLES", "CPU", samples
    scene.cycles.use_denoising, scene.cycles.denoiser = True, "OPENIMAGEDENOISE"
    scene.cycles.sample_clamp_indirect, scene.cycles.blur_glossy = 2.0, 2.0     # no fireflies
    scene.cycles.max_bounces = 4
    scene.render.use_persistent_data = True             # much faster from the second picture on
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"

    # The ground shows nothing but shadows, so that it has one grey from every side
    scene.render.film_transparent = True
    bpy.data.objects.remove(scene.objects["Ground"])
    bpy.ops.mesh.primitive_plane_add(size=200)
    bpy.context.object.is_shadow_catcher = True

    camera = scene.camera
    for constraint in list(camera.constraints):         # CLEVR's camera follows an empty
        camera.constraints.remove(constraint)
    camera.data.sensor_fit, camera.data.lens = "HORIZONTAL", FOCAL * camera.data.sensor_width

    def append(kind, file):
        with bpy.data.libraries.load(str(assets / file)) as (_, loaded):
            setattr(loaded, kind, [Path(file).stem])
        return getattr(loaded, kind)[0]

    properties = json.loads((assets / "properties.json").read_text())
    shapes, materials, tints = {}, {}, {}
    for name, file in properties["shapes"].items():
        shapes[name] = append("objects", f"shapes/{file}.blend")
        scene.collection.objects.link(shapes[name])
        shapes[name].hide_render = True
    for name, file in properties["materials"].items():
        materials[name] = bpy.data.materials.new(name)
        materials[name].use_nodes = True
        tree = materials[name].node_tree
        group = tree.nodes.new("ShaderNodeGroup")
        group.node_tree = append("node_groups", f"materials/{file}.blend")
        output = next(n for n in tree.nodes if n.bl_idname == "ShaderNodeOutputMaterial")
        tree.links.new(group.outputs["Shader"], output.inputs["Surface"])
        tints[name] = group.inputs["Color"]

    def picture(thing, pose):
        shape, radius = shapes[thing["shape"]], thing["size"]
        if thing["shape"] == "cube":
            radius /= math.sqrt(2)
        shape.scale, shape.location = (radius, radius, radius), (0, 0, radius)
        shape.rotation_euler = (0, 0, thing["rotation"])
        color = properties["colors"][thing["color"]]
        tints[thing["material"]].default_value = [c / 255 for c in color] + [1]
        shape.data.materials.clear()
        shape.data.materials.append(materials[thing["material"]])
        camera.matrix_world = Matrix(blender_camera(pose))
        shape.hide_render = False
        with tempfile.TemporaryDirectory() as folder:
            scene.render.filepath = str(Path(folder) / "picture.png")
            bpy.ops.render.render(write_still=True)
            with Image.open(scene.render.filepath) as image:
                shown = image.convert("RGBA")
        shape.hide_render = True
        ground = Image.new("RGBA", shown.size, (GREY, GREY, GREY, 255))
        return np.asarray(Image.alpha_composite(ground, shown).convert("RGB"))
    return picture


# ---- The file ----------------------------------------------------------------------------------

def save_npz(path, **arrays):
    """Writes an .npz in one go: what was there before stays until the new file is whole."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(partial, path)


def read_pictures(path, scenes, size):
    """The pictures (V, S, S, 3) of the first scenes that a file has already, as a list.

    scenes: what `draw_scene` gave. ValueError if the file holds anything else than these.
    """
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as file:
            images, poses, objects = (file[key] for key in ("images", "poses", "objects"))
        expected = scenes[:len(images)]
        same = (images.dtype == np.uint8
                and images.shape[1:] == (len(scenes[0][1]), size, size, 3)
                and objects.tolist() == [describe(thing) for thing, _ in expected]
                and np.allclose(poses, [pose for _, pose in expected], atol=1e-5))
    except Exception as error:                  # zip, numpy and the keys raise a dozen kinds
        raise ValueError(f"{path} is no file of this script: {error}") from None
    if not same:
        raise ValueError(f"{path} holds other scenes, or more, than --first, --count, --views, "
                         "--size and --seed say: name another file")
    return list(images)


def add_pictures(path, scenes, images, picture):
    """Renders what `images` (a list of (V, S, S, 3)) lacks of the scenes, into the file `path`.

    picture: a function (thing, pose) -> (S, S, 3) uint8. Whatever ends it, the scenes that are
    whole are in the file; Ctrl-C ends it after the scene at hand, with KeyboardInterrupt.
    """
    def save():
        drawn = scenes[:len(images)]
        save_npz(path, images=np.stack(images), poses=np.stack([poses for _, poses in drawn]),
                 focal=np.float32(FOCAL), background=np.full(3, GREY, np.uint8),
                 objects=np.array([describe(thing) for thing, _ in drawn]))
    there, start = len(images), time.monotonic()
    said, saved, whole = start, start, there
    stop = []       # Blender would swallow a KeyboardInterrupt and go on with half a picture
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        for thing, poses in scenes[there:]:
            images.append(np.stack([picture(thing, pose) for pose in poses]))
            if stop:
                raise KeyboardInterrupt
            now = time.monotonic()
            each = (now - start) / (len(images) - there)
            if now > said + 5:
                said = now
                print(f"scene {len(images):,} of {len(scenes):,}, {each / len(poses):.2f} s a "
                      f"picture, {each * (len(scenes) - len(images)) / 60:.1f} min left",
                      file=sys.stderr, flush=True)
            if now > saved + 120:
                save()
                saved, whole = time.monotonic(), len(images)
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(images) > whole:
            save()


# ---- Command line ------------------------------------------------------------------------------

def main(argv=None):
    """The command of this file's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="image_generation/data of clevr-dataset-gen")
    parser.add_argument("out", type=Path, help="the file, OUT.npz")
    for name, default, text in (("first", 0, "number of the first scene"),
                                ("count", 100, "how many scenes the file is to hold"),
                                ("views", 1, "pictures a scene"),
                                ("size", 64, "side of a picture in pixels"),
                                ("samples", 32, "rays a pixel"),
                                ("seed", 0, "which scenes")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    args = parser.parse_args(argv)
    try:
        for name in ("count", "views", "size", "samples"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if args.first < 0 or args.seed < 0:
            raise ValueError("--first and --seed must be at least 0")
        if args.out.suffix != ".npz" or not args.out.parent.is_dir():
            raise ValueError(f"{args.out} must end in .npz, in a folder that is there")
        scenes = [draw_scene(args.first + i, args.views, args.seed) for i in range(args.count)]
        images = read_pictures(args.out, scenes, args.size)
        if len(images) < len(scenes):
            picture = open_blender(args.assets, args.size, args.samples)
            add_pictures(args.out, scenes, images, picture)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(1, "stopped; the same command goes on\n")
    print(f"{args.out} holds {len(images):,} scenes", file=sys.stderr)


if __name__ == "__main__":
    main()
