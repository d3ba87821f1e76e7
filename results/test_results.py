"""Tests of results/: experiments change what they say, judges judge, figures are made."""
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import ablations
import benchmark
import data
import figures
import judge
import renderdiffusion as rd
from data import CLEVR_COLORS, EMPTY, orbit, random_scenes, synthetic, trace

slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="slow: set SLOW=1")
SMALL = dict(resolution=16, plane_size=16, plane_channels=4, unet_channels=16, mlp_hidden=8, fold=0,
             samples=4, fine_samples=2, batch=4, rays=16, steps=2, device="cpu")


def small_model(**fields):
    """An untrained model, whose pictures are not empty."""
    torch.manual_seed(0)
    model = rd.RenderDiffusion(rd.Config(**{**SMALL, "radius": 2.7, "elevation": (20.0, 50.0),
                                            **fields}))
    torch.nn.init.constant_(model.mlp.layers[-1].bias, 2.0)
    return model.eval().requires_grad_(False)


@pytest.fixture
def checkpoint(tmp_path):
    """A small model's file."""
    path = tmp_path / "mine.pt"
    rd.save_checkpoint(path, small_model())
    return str(path)


# ---- ablations.py ------------------------------------------------------------------------------

def test_each_run_changes_what_it_says(monkeypatch, tmp_path):
    """Two steps of every run: networks, constants, tracer and cameras are what the table says, and
    afterwards the modules are as they were."""
    seen, plain = {}, synthetic("clevr1", 2, 3, 16, -1).poses
    draw_pixels, random_pixels = rd.draw_pixels, {}

    def evaluate(model, views):
        seen[name] = model, views.poses
        return {key: {"psnr": 7.0} for key in ("input", "novel")}

    def draw(*args):
        random_pixels[name] = rd.EMPTY_RAYS
        return draw_pixels(*args)
    monkeypatch.setattr(rd, "evaluate", evaluate)
    monkeypatch.setattr(rd, "draw_pixels", draw)
    for name in ablations.RUNS:
        row = ablations.run(name, rd.Config(**SMALL, other_side=0.0, out=str(tmp_path)), scenes=2)
        assert row.endswith("| 2 | 7.00 | 7.00 |")
    assert not list(tmp_path.iterdir()) and rd.Block is ablations.Block and data.trace is trace
    assert random_pixels.pop("uniform") == 1 and set(random_pixels.values()) == {rd.EMPTY_RAYS}
    attention = {name: {block.attention for block in model.modules() if isinstance(block, rd.Block)}
                 for name, (model, _) in seen.items()}
    assert attention["attention"] == {True} and attention["no_attention"] == {False}
    assert all(torch.equal(poses, plain) for name, (_, poses) in seen.items()
               if name != "billboard")
    model, poses = seen["billboard"]                # all from the front, the others relative to it
    assert torch.allclose(poses[:, 0], ablations.front(model.config).expand(2, 4, 4), atol=1e-6)
    moves = [torch.linalg.inv(x[:, :1]) @ x for x in (plain, poses)]
    assert torch.allclose(*moves, atol=1e-5)
    assert [name for name, (model, _) in seen.items() if model.unet.compass] == [
        "fold", "default", "relief", "varied", "nothing", "mixed"]


def test_mixed_pictures_are_half_real_and_half_traced(tmp_path):
    """The first half is what the set gives alone, the other what the ray tracer does."""
    config = rd.Config(data="clevr1_blender", resolution=16, batch=6)
    halves = [rd.training_pictures(replace(config, data=name, batch=3), "cpu")[0]
              for name in ("clevr1_blender", "clevr1")]
    draw, camera = ablations.mixed_pictures(config, "cpu")
    torch.manual_seed(3)
    images, poses = draw(5)
    torch.manual_seed(3)
    for i, half in enumerate(halves):
        assert torch.equal(images[3 * i:3 * i + 3], (alone := half(5))[0])
        assert torch.equal(poses[3 * i:3 * i + 3], alone[1])
    assert camera == rd.training_pictures(config, "cpu")[1]
    np.savez(tmp_path / "wide.npz", images=np.zeros((2, 2, 16, 16, 3), np.uint8), focal=1.0,
             poses=orbit(torch.arange(4.0) * 90, 30, 2.7).view(2, 2, 4, 4).numpy(),
             background=np.uint8([9, 9, 9]))
    with pytest.raises(ValueError, match="another lens"):
        ablations.mixed_pictures(replace(config, data=str(tmp_path / "wide.npz")), "cpu")


def test_two_views_are_of_one_scene_and_one_is_encoded():
    """At t = 0 the encoder sees first views; half of the examples are compared with second ones."""
    model, asked = small_model(clean_share=0.99), []

    def spy(x_t, t, poses, pixels):
        asked.append((x_t[t == 0], poses))
        return model(x_t, t, poses, pixels)
    spy.module = model
    torch.manual_seed(0)
    ablations.two_views(spy, torch.zeros(4, 3, 16, 16), None)
    torch.manual_seed(0)
    start = torch.randint(2 ** 30, ()).item()       # the scenes that it drew
    views = synthetic("clevr1", 4, 2, 16, 1, start=start)
    (x_t, rendered), = asked
    assert len(x_t) and all(any(torch.equal(x, image) for image in views.images[:, 0]) for x in x_t)
    is_side = [[torch.equal(pose, other) for other in both]
               for pose, both in zip(rendered, views.poses)]
    assert sorted(is_side) == [[False, True]] * 2 + [[True, False]] * 2


def test_min_snr_weighs_the_gradient():
    """The same by a weight of the loss itself, summed up by hand."""
    model, x0 = small_model().requires_grad_(True), torch.rand(4, 3, 16, 16) * 2 - 1
    poses, gradients = orbit(torch.arange(4) * 90.0, 30, 2.7), []

    def weigh(x_t, t, *more):
        alpha_bar = model.schedule.alpha_bar[t]
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=5)
        x0_hat = model(x_t, t, *more)
        target = x0.flatten(2).mT.gather(1, more[1][..., None].expand(-1, -1, 3))
        mean = (x0_hat - target).abs().mean((1, 2))
        (mean * weight / weight.mean()).mean().backward()
        return x0_hat
    weigh.module = model
    for loss in (lambda: rd.denoising_loss(weigh, x0, poses),
                 lambda: ablations.min_snr(model, x0, poses, x0).backward()):
        torch.manual_seed(0)
        loss()
        gradients.append(model.mlp.layers[0].weight.grad.clone())
        model.zero_grad()
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_told_is_told_the_camera():
    told, x0 = ablations.Told(rd.Config(**SMALL)), torch.rand(2, 3, 16, 16)
    poses = orbit(torch.tensor([0.0, 90.0]), 30, 2.7)
    planes = []
    for some in (poses, poses.flip(0)):
        assert told(x0, 0, some).shape == x0.shape
        planes.append(told.encode(x0, 0))
    assert not torch.allclose(*planes, atol=1e-4)


def test_varied_scenes_stand_on_the_ground_in_lights_of_their_own():
    """Two sides of a scene share all that is drawn, two scenes nothing; shapes keep their turn and
    their place on the ground; the tracer's constants are as before."""
    scenes, constants = random_scenes("clevr1", 6, 5), (data.AMBIENT, data.SHADOW, data.EXPONENT)
    before, shown, seen = scenes.to_world.clone(), [], []
    poses = data.random_poses("clevr1", 6, 2, 5)

    def spy(own, *rest):
        seen.append((own, own.light, data.SHADOW))
        return trace(own, *rest)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        shown.append(ablations.varied_trace(scenes, poses, 1.6, 16)[0])
    assert torch.equal(shown[0], shown[1]) and not torch.allclose(shown[0], shown[2], atol=0.05)
    assert shown[0].shape == (6, 2, 3, 16, 16) and shown[0].abs().max() <= 1
    assert torch.equal(before, scenes.to_world)
    assert constants == (data.AMBIENT, data.SHADOW, data.EXPONENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "trace", spy)
        ablations.varied_trace(scenes, poses, 1.6, 16, lamps=3)
    assert len(seen) == 18 and len({light for _, light, _ in seen}) == 18
    assert len({shadow for *_, shadow in seen}) == len({own.background for own, *_ in seen}) == 6
    for i, (own, *_) in enumerate(seen[::3]):
        size = own.to_world[0, 0, :, 0].norm() / before[i, 0, :, 0].norm()
        assert torch.allclose(own.to_world[0, 0, :, :3], size * before[i, 0, :, :3], atol=1e-6)
        assert own.to_world[0, 0, 2, 3] - own.to_world[0, 0, 2, 2] == pytest.approx(-0.45, abs=1e-5)


def test_ablations_refuse_what_does_not_fit(checkpoint, capsys):
    for arguments, words in ((["--only", "told", "--init", checkpoint], "another network"),
                             (["--only", "default", "--init", checkpoint], "another network"),
                             (["--init", "nowhere.pt", "--only", "plain"], "no checkpoint"),
                             (["--lr", "nan", "--only", "plain"], "lr must be")):
        with pytest.raises(SystemExit) as end:
            ablations.main(arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err


# ---- judge.py ----------------------------------------------------------------------------------

def test_what_is_in_scenes_is_said_alike_for_traced_and_rendered_ones():
    scenes, values = random_scenes("clevr1", 64, -1), judge.parameters("clevr1", 64)
    assert torch.equal(values[:, :3].argmax(1), scenes.kind[:, 0])
    assert torch.equal(values[:, 3:6], scenes.color[:, 0])
    assert torch.allclose(values[:, 12], -0.45 + values[:, 9], atol=1e-6)       # they stand on it
    shape, color = judge.clevr_kinds(values)
    assert torch.equal(shape, scenes.kind[:, 0])
    assert torch.equal(torch.tensor(CLEVR_COLORS)[color], scenes.color[:, 0])
    assert judge.shares(torch.tensor([0, 0, 2]), 3) == ["67", "0", "33"]

    values = judge.parameters("clevr1_blender", 3)      # cylinder yellow, sphere blue, cylinder red
    shape, color = judge.clevr_kinds(values)
    assert shape.tolist() == [2, 0, 2] and color.tolist() == [7, 2, 1]
    assert values[:, 6:].tolist() == [[0, pytest.approx(0.7)], [0, pytest.approx(0.35)],
                                      [0, pytest.approx(0.7)]]
    assert len(judge.parameters("clevr1_blender", split="train")) == 4000
    kinds = figures.kinds_of(data.load("clevr1_blender", 3, 2, 16, "test"))
    assert {kind: some.tolist() for kind, some in kinds.items()} == {
        "sphere": [1], "cylinder": [0, 2], "rubber": [0, 1, 2]}


def test_sets_without_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not say what is in its scenes"):
        judge.parameters(str(tmp_path))
    for words in (["sphere rubber blue 0.7"], ["ball rubber blue 0.7 1.0"]):
        np.savez(tmp_path / "test.npz", objects=np.array(words))
        with pytest.raises(ValueError, match="does not say what is in its scenes"):
            judge.parameters(str(tmp_path))
    with pytest.raises(ValueError, match="64 scenes"):
        judge.judge("mine", small_model(), 63)


def test_frechet_and_coverage_agree_with_closed_forms():
    """Of axis-aligned Gaussians: squared distance of means and of deviations; on a line."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).mT)
    found = judge.frechet(white * torch.tensor([1.0, 2, 3]), white + torch.tensor([0.0, 1, 2]))
    assert found == pytest.approx(5 + 1 + 4, abs=1e-6)
    line = torch.arange(20.0)[:, None]
    assert judge.coverage(line, line, k=2) == 1
    assert judge.coverage(line[:1] - 1.5, line, k=2) == pytest.approx(1 / 20)   # near point 0 alone


def test_ghosts_are_told_from_solid_objects_and_shadows_do_not_count():
    """Balls of known density in a faint haze over a ground of black fog, and that ground alone."""
    model, density = small_model(resolution=32, samples=32, fine_samples=32), 0.0

    class World(torch.nn.Module):
        def forward(self, points, features):
            inside = points.norm(dim=-1) < 0.4
            fog = (points[..., 2] < -0.44) & (points[..., 2] > -0.46)
            haze = 0.02 * (density > 0)
            return density * inside + 1e3 * fog + haze, torch.zeros_like(points)
    model.mlp, found = World(), {}
    planes, poses = torch.zeros(1, 3, 4, 16, 16), orbit(0.0, 30.0, 2.7)[None]
    for density in (0.5, 1e3, 0.0):
        found[density], = judge.solidness(model, planes, poses, -0.45).tolist()
    assert model.render(planes, poses)[2].max() > 0.99          # afterwards the fog is there again
    # a chord of the ball seen from afar, in which c = 2 sqrt(0.16 - r^2): opacity 1 - exp(-d c)
    r = torch.linspace(0, 0.4, 4001)
    opacity = 1 - torch.exp(-0.5 * 2 * (0.16 - r * r).clamp(min=0).sqrt())
    here = r * (opacity > opacity.max() / 2)
    ghost = ((here * opacity).sum() / here.sum()).item()
    assert found[0.0] == 0 and found[1e3] > 0.97 and found[0.5] == pytest.approx(ghost, abs=0.02)


def test_scenes_to_judge_are_never_those_that_teach(monkeypatch):
    """Seeds of built-in sets differ; of a set from files real pictures are other views."""
    drawn = []
    monkeypatch.setattr(judge, "synthetic", lambda name, n, views, resolution, seed, *a, **k:
                        drawn.append(seed) or synthetic(name, n, views, 16, seed))
    views, real = judge.scenes_to_judge(small_model(), 4)
    assert views.images.shape == (4, 3, 3, 16, 16) and real.shape == (4, 2, 3, 16, 16)
    assert set(drawn) == {judge.JUDGED, judge.REAL} and len({*drawn, judge.READ, 0}) == 4
    views, real = judge.scenes_to_judge(small_model(data="clevr1_blender"), 4)
    assert real.shape == (4, 2, 3, 16, 16) and not any(
        torch.equal(real[:, k], views.images[:, v]) for k in (0, 1) for v in (0, 1, 2))


def test_generated_scenes_are_judged_as_the_command_makes_them(monkeypatch):
    """Denoised from all round, a quarter up the cameras' range, and shown from two sides of the
    scenes that they are compared with."""
    generate, denoised, rendered, model = rd.generate, [], [], small_model()
    render = model.render

    def noted(model, poses, seed):
        images, planes = generate(model, poses, 2, seed=seed)
        denoised.append((poses, planes))
        return images, planes
    monkeypatch.setattr(rd, "generate", noted)
    model.render = lambda planes, poses: rendered.append((planes, poses)) or render(planes, poses)
    views = synthetic("clevr1", 20, 3, 16, judge.JUDGED)
    shown, solid = judge.pictures_of(model, views)
    assert {kind: len(some) for kind, some in shown.items()} == dict.fromkeys(
        ("real", "reconstructed", "generated"), 40)
    assert {kind: len(some) for kind, some in solid.items()} == dict(reconstructed=20, generated=20)
    x, y, z = torch.cat([poses for poses, _ in denoised])[:, :3, 3].T / 2.7
    assert torch.allclose(z.asin().rad2deg(), torch.tensor(27.5), atol=1e-3)
    assert torch.allclose(torch.atan2(y, x).rad2deg()[16:] % 360, torch.arange(4) * 90.0, atol=1e-3)
    for i, (_, planes) in zip((0, 16), denoised):
        seen_from = [poses for some, poses in rendered if some is planes]
        assert all(any(torch.equal(views.poses[i:i + 16, v], poses) for poses in seen_from)
                   for v in (0, 1))


@slow
@pytest.mark.parametrize("name", ["clevr1", "clevr1_blender"])
def test_pictures_are_read_and_told_apart(name):
    """Of pictures not seen before most shapes and colours are read rightly, and changed ones told
    from real ones, but not real ones from others."""
    describe, read = judge.train_reader(name, 16, 3072, steps=600)
    views = data.load(name, 96, 4, 16, "test")
    real, others = (views.images[:, v].flatten(0, 1) for v in ([0, 1], [2, 3]))
    true, found = (judge.clevr_kinds(values) for values in (
        judge.parameters(name, 96).repeat_interleave(2, 0), read(real)))
    for a, b, chance in zip(true, found, (1 / 3, 1 / 8)):
        assert (a == b).float().mean() > 2 * chance
    features = describe(real)
    assert features.shape == (192, 32) and 0.4 < features.var(0).mean() < 2
    assert judge.told_apart(others * 0.8, real, 150) > 0.9              # darker: easily told
    assert 0.3 < judge.told_apart(others, real, 150) < 0.7              # alike: a coin's chance


# ---- figures.py --------------------------------------------------------------------------------

def test_depth_is_compared_where_objects_are():
    """A model that shows the true depth, plus 0.1 on objects and anything elsewhere."""
    views, scenes = synthetic("clevr1", 8, 2, 32, -1), random_scenes("clevr1", 8, -1)
    _, bare = trace(replace(scenes, kind=torch.full_like(scenes.kind, EMPTY)), views.poses[:, 1:],
                    views.focal, 32)
    is_object = views.depth[:, 1] < bare[:, 0] - 0.01
    model = small_model(resolution=32)
    model.render = lambda *_: (None, views.depth[:, 1] + torch.where(is_object, 0.1, 5.0), None)
    error, alone = figures.depth_error(model, views)
    assert error == pytest.approx(0.1, abs=1e-4) and 0.2 < alone < 2


def test_pictures_are_changed_in_the_scene_or_in_the_input_alone():
    for name, kinds in (("clevr1", 7), ("clevr1_blender", 4)):
        views = data.load(name, 3, 2, 16, "test")
        changed = figures.unlike(views)
        assert len(changed) == kinds and changed.pop("as it is") is views
        for what, some in changed.items():
            same = [torch.equal(some.images[:, v], views.images[:, v]) for v in (0, 1)]
            assert same == [False, what in ("noise", "stripes", "blur")]


def test_scores_say_how_much_better_training_pictures_are(monkeypatch, capsys):
    """A model that knows training pictures by heart and draws others darker by 0.05 of 1."""
    model, views = small_model(data="clevr1_blender"), {}

    def load(name, scenes, count, resolution, split, *rest, **more):
        views[split] = data.load(name, 4, count, resolution, split, *rest, **more)
        return views[split]

    def render(planes, poses, focal=None):
        for some, darker in zip(views.values(), (0.1, 0.0)):                   # test, then train
            for v in range(some.poses.shape[1]):
                if torch.equal(some.poses[:len(poses), v], poses):
                    return [some.images[:, v] - darker]
    monkeypatch.setattr(figures, "load", load)
    monkeypatch.setattr(figures, "kinds_of", lambda views: {"ball": torch.arange(4)})
    model.render = render
    figures.scores({"mine": model}, SimpleNamespace(data=None))
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("| mine")]
    assert rows[0][:2] == ["mine", "4"] and rows[0][6:] == ["100.00", "", ""]
    shown = [float(cell.split("/")[0]) for cell in rows[0][2:4] + rows[1][3:]]
    assert shown == pytest.approx([26.02] * 4, abs=0.2)         # -20 log10(0.05), but at black


@slow
def test_figures_are_made(monkeypatch, tmp_path, capsys, checkpoint):
    """All figures of a small model by its file, one of clevr1_blender's, and t_r on other data."""
    other = tmp_path / "other.pt"
    rd.save_checkpoint(other, small_model(data="clevr1_blender"))
    monkeypatch.setattr(judge, "told_apart", partial(judge.told_apart, steps=2))
    few = dict(turn=dict(frames=3), generation=dict(readable=256, steps=20),
               t_r=dict(levels=(0, 20)), inpainting=dict(fillings=2),
               steps=dict(calls=(1, 2), readable=256, steps=20))
    monkeypatch.setattr(figures, "FIGURES", {name: partial(make, **few.get(name, {}))
                                             for name, make in figures.FIGURES.items()})
    out, both = tmp_path / "out", ["--out", str(tmp_path / "out"), "--checkpoint", checkpoint,
                                   str(other)]
    figures.main(["scores", "turn", "pictures", "t_r", "inpainting", "--scenes", "2", *both])
    figures.main(["generation", "steps", "--scenes", "64", *both])
    made = {path.name: Image.open(path).size for path in out.iterdir()}
    assert set(made) == {f"{name}_{what}" for name in ("mine", "other") for what in (
        "turn.gif", "reconstruct.png", "inpaint.png", "t_r.png", "t_r_pictures.png", "holes.png",
        "steps.png")}
    assert made["mine_turn.gif"] == (256, 128)
    text = capsys.readouterr().out
    assert text.count("|---") > 40 and "read rightly, real" in text and "| metal |" in text
    figures.main(["t_r", "--scenes", "2", "--data", "clevr1_blender", "--checkpoint", checkpoint])
    text = capsys.readouterr().out
    assert "| mine, t_r | 0 | 20 | mean image | input copied |" in text
    assert len(text.splitlines()[-2].split("|")) == 7


def test_a_turning_gif_has_one_palette(monkeypatch, tmp_path, checkpoint):
    """Frames of colours of their own, of which 16 are left in all."""
    def save_turntable(path, model, planes, frames):
        assert len(planes) == 2
        noise = np.random.default_rng(0).integers(0, 256, (frames, 8, 8, 3), np.uint8)
        shown = [Image.fromarray(frame) for frame in noise]
        shown[0].save(path, save_all=True, append_images=shown[1:])
    monkeypatch.setattr(rd, "save_turntable", save_turntable)
    models, args = {"mine": small_model()}, SimpleNamespace(out=tmp_path, seed=0)
    figures.turn(models, args, 2, frames=3, colors=16)
    with Image.open(tmp_path / "mine_turn.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        seen = set()
        for i in range(3):
            gif.seek(i)
            seen |= set(gif.convert("RGB").get_flattened_data() if hasattr(
                gif, "get_flattened_data") else gif.convert("RGB").getdata())
        assert 4 < len(seen) <= 16


def test_figures_refuse_in_one_sentence(checkpoint, tmp_path, capsys):
    for arguments, words in ((["nothing"], "there is no nothing"),
                             (["scores", "--checkpoint", "nowhere.pt"], "no checkpoint"),
                             (["generation", "--scenes", "63"], "at least 64"),
                             (["scores", "--scenes", "0"], "at least 1"),
                             (["t_r", "--data", "nowhere"], "neither a built-in set")):
        with pytest.raises(SystemExit) as end:
            figures.main([*arguments, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")]
                         if "--checkpoint" not in arguments else arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err


# ---- benchmark.py ------------------------------------------------------------------------------

def test_work_is_counted():
    """A product and a convolution, by hand; and a step of training, which ends after its steps."""
    a, x, w = torch.rand(8, 16), torch.rand(2, 3, 10, 10), torch.rand(5, 3, 3, 3)
    found = benchmark.count(lambda: (a @ a.T, torch.nn.functional.conv2d(x, w)))
    assert found.tolist() == [2 * 2 * 5 * 3 * 9 * 64, 2 * 8 * 8 * 16]
    assert len(benchmark.train_steps(rd.Config(**SMALL), torch.device("cpu"), 3)) == 3


@slow
def test_benchmark_runs(monkeypatch, capsys):
    """Each part once, with shipped weights: rates are positive."""
    def once(run, least=0):
        start = benchmark.now()
        run()
        return benchmark.now() - start
    monkeypatch.setattr(benchmark, "median", once)
    benchmark.main(["--checkpoint", "cars"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rates = {row[0]: float(row[1].replace(",", "")) for row in rows if row[1][0].isdigit()}
    assert len(rates) > 15 and all(rate >= 0 for rate in rates.values())
    assert 0 < rates["training, 64 x 64, 16 at once"] and 5 < rates["demo, from its start"] < 600
