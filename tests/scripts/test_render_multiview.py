"""Renders of shapes whose views are known: numbers, frames, files; and meshes that cannot be rendered."""

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import render_multiview
from PIL import Image
from render_multiview import CAMERA_DISTANCE, VIEWS, Settings

pytest.importorskip("pyvista", reason="views are rendered with pyvista")
trimesh = pytest.importorskip("trimesh", reason="meshes are read with trimesh")

SCRIPT = Path(render_multiview.__file__)
RESOLUTION_PX = 64
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))
MARKS = np.array([(1, 0, 0), (-1, 0.2, 0), (0, 1, 0.3), (0, -1, 0), (0.3, 0, 1), (0, 0.4, -1)], float)
PLAIN = Settings(views=("front", "right"), resolution_px=16, supersampling=1)


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    try:
        render_multiview.require_renderer()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another look whether a triangle can be drawn."""
    monkeypatch.setattr(render_multiview, "require_renderer", lambda: None)


def textured(corners: list, image: Image.Image, **material: object):
    """A rectangle: lower left, lower right, upper right, upper left."""
    look = trimesh.visual.material.PBRMaterial(baseColorTexture=image, **material)
    visual = trimesh.visual.TextureVisuals([[0, 0], [1, 0], [1, 1], [0, 1]], look)
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def square(half: float, x: float = 0, y: float = 0, z: float = 0) -> list:
    """Faces +z: the front of a glTF."""
    return [[x - half, y - half, z], [x + half, y - half, z], [x + half, y + half, z], [x - half, y + half, z]]


def make_meshes(folder: Path) -> None:
    trimesh.creation.icosphere(4).export(folder / "sphere.ply")
    box = trimesh.creation.box((1, 1, 1))
    box.export(folder / "box.ply")
    inverted = trimesh.Trimesh(box.vertices, box.faces[:, ::-1], process=False)
    inverted.export(folder / "inverted.ply")
    trimesh.creation.cylinder(0.5, 1, sections=32).export(folder / "cylinder.ply")
    marks = [trimesh.creation.icosphere(3, 0.15).apply_translation(place) for place in MARKS]
    for mark, colour in zip(marks, COLOURS, strict=True):
        mark.visual.vertex_colors = np.tile((*colour, 255), (len(mark.vertices), 1)).astype(np.uint8)
    trimesh.util.concatenate(marks).export(folder / "marks.ply")

    quadrants = np.array([[COLOURS[0], COLOURS[1]], [COLOURS[2], COLOURS[3]]], np.uint8).repeat(8, 0).repeat(8, 1)
    holes = np.full((16, 16, 4), 255, np.uint8)
    holes[:8, :8, 3] = 0  # upper left
    scene = trimesh.Scene()
    scene.add_geometry(textured(square(0.5), Image.fromarray(quadrants)))
    pane = textured(square(0.5), Image.fromarray(holes), alphaMode="MASK")
    scene.add_geometry(pane, transform=trimesh.transformations.translation_matrix((2, 0, 0)))
    scene.add_geometry(textured(square(0.5, x=2, z=-0.3), Image.new("RGB", (4, 4), COLOURS[4])))
    plain = trimesh.creation.box((1, 1, 0.2))
    look = trimesh.visual.material.PBRMaterial(baseColorFactor=[55, 0, 255, 255])  # 55 is linear: 128 in sRGB
    plain.visual = trimesh.visual.TextureVisuals(material=look)
    scene.add_geometry(plain, transform=trimesh.transformations.translation_matrix((0, 2, 0)))
    scene.export(folder / "scene.glb")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    meshes, output = tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("out") / "views"
    make_meshes(meshes)
    settings = Settings(resolution_px=RESOLUTION_PX, supersampling=4)
    assert render_multiview.render_folder(meshes, output, settings, jobs=2) == {}
    return output


def rgba(output: Path, uid: str, view: str, kind: str = "rgb", suffix: str = "png") -> np.ndarray:
    image = Image.open(output / uid[:2] / uid / f"{kind}_000_{view}.{suffix}")
    assert image.mode == "RGBA"
    return np.asarray(image).astype(int)  # (H, W, 4)


def pose_of(output: Path, uid: str, view: str) -> np.ndarray:
    return np.loadtxt(output / uid[:2] / uid / f"000_{view}_RT.txt")


def pixel_centres(ortho_scale: float = 1.35) -> tuple[np.ndarray, np.ndarray]:
    """x to the right and y upwards of each pixel in the camera's frame, (H, W) each."""
    steps = (np.arange(RESOLUTION_PX) + 0.5) / RESOLUTION_PX - 0.5
    return np.meshgrid(steps * ortho_scale, -steps * ortho_scale)


# Normals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_a_sphere_has_its_own_normals_in_every_camera_frame(views: Path, view: str) -> None:
    image = rgba(views, "sphere", view, "normals")
    x, y = pixel_centres()
    radius = 0.5 / np.sqrt(3)  # the bounding box has a diagonal of 1
    squared = (x**2 + y**2) / radius**2
    inside = squared < 0.9
    expected = np.stack([x, y, np.sqrt(np.maximum(radius**2 - x**2 - y**2, 0))], axis=-1) / radius  # (H, W, 3)
    normals = image[..., :3] / 255 * 2 - 1
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    errors_deg = np.degrees(np.arccos(np.clip((normals * expected).sum(-1), -1, 1)))[inside]
    assert errors_deg.max() < 2.5 and errors_deg.mean() < 0.7
    assert (image[inside, 3] == 255).all() and (image[squared > 1.3, 3] == 0).all()
    area = image[..., 3].sum() / 255 * (1.35 / RESOLUTION_PX) ** 2
    assert area == pytest.approx(np.pi * radius**2, rel=0.01)


@pytest.mark.parametrize("uid", ["box", "inverted"])
def test_a_cube_has_two_normals_in_a_diagonal_view_whichever_way_its_faces_wind(views: Path, uid: str) -> None:
    front = rgba(views, uid, "front", "normals")
    assert np.unique(front[front[..., 3] > 0][:, :3], axis=0).tolist() == [[128, 128, 255]]
    diagonal = rgba(views, uid, "front_right", "normals")
    covered = diagonal[..., 3] == 255
    x, _ = pixel_centres()
    left, right = covered & (x < -0.02), covered & (x > 0.02)
    assert np.abs(diagonal[left, :3] - (37, 128, 218)).max() <= 1  # (-1, 0, 1) / sqrt(2)
    assert np.abs(diagonal[right, :3] - (218, 128, 218)).max() <= 1
    assert left.sum() == pytest.approx(right.sum(), rel=0.05) and left.sum() > 300


def test_round_edges_are_smooth_and_sharp_ones_are_not(views: Path) -> None:
    corners = trimesh.creation.cylinder(0.5, 1, sections=16).triangles
    towards = np.where(np.abs(np.abs(corners[..., 2:]) - 0.5) < 1e-9, corners * (1, 1, 0) * 2, 0)  # (T, 3, 3)
    faces, smooth = render_multiview.normals_of(corners, smooth_angle_deg=35)
    caps = np.abs(faces[:, 2]) > 0.99
    assert 0 < caps.sum() < len(caps)
    assert np.allclose(smooth[caps], faces[caps][:, None], atol=1e-6)
    assert np.allclose(smooth[~caps], towards[~caps], atol=1e-4)
    _, flat = render_multiview.normals_of(corners, smooth_angle_deg=0)
    assert np.allclose(flat, faces[:, None])
    above = rgba(views, "cylinder", "top", "normals")
    assert np.unique(above[above[..., 3] == 255][:, :3], axis=0).tolist() == [[128, 128, 255]]


def test_triangles_without_area_do_no_harm() -> None:
    corners = np.array([[[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0]], [[0, 0, 0], [0.2, 0, 0], [0.4, 0, 0]]], float)
    corners = np.concatenate([corners, np.zeros((1, 3, 3))])
    faces, smooth = render_multiview.normals_of(corners, 35)
    assert faces[0].tolist() == [0, 0, 1] and not faces[1:].any()
    assert np.allclose(smooth[0], [0, 0, 1]) and np.isfinite(smooth).all()


# Cameras --------------------------------------------------------------------------------------------------------------


def found_marks(output: Path, uid: str, view: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(projected, seen) centres, (x, y) in pixels, of the marks that no other one hides."""
    scale, *offset, ortho_scale = np.loadtxt(output / uid[:2] / uid / "scale_offset_matrix.txt")
    pose, image = pose_of(output, uid, view), rgba(output, uid, view)
    in_camera = (MARKS * scale + offset) @ pose[:, :3].T + pose[:, 3]  # (6, 3)
    projected = (in_camera[:, :2] * (1, -1) / ortho_scale + 0.5) * len(image)
    radius_px = 0.15 * scale / ortho_scale * len(image)
    rows, columns = np.indices(image.shape[:2]) + 0.5
    pairs = []
    for colour, centre in zip(COLOURS, projected, strict=True):
        if np.sort(np.linalg.norm(projected - centre, axis=1))[1] > 2.2 * radius_px:
            is_near = np.hypot(columns - centre[0], rows - centre[1]) < 2 * radius_px
            is_coloured = ((image[..., :3] > 40) == (np.array(colour) > 0)).all(-1)
            mark = is_near & is_coloured & (image[..., 3] > 127)
            pairs.append((centre, np.array([columns[mark].mean(), rows[mark].mean()])))
    return pairs


def test_poses_project_known_points_to_where_they_are_seen(views: Path) -> None:
    pairs = [pair for view in VIEWS for pair in found_marks(views, "marks", view)]
    assert len(pairs) > 45
    assert max(np.abs(projected - seen).max() for projected, seen in pairs) < 0.5


def test_a_random_pose_turns_the_whole_rig(quick: None, views: Path, tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    make_meshes(tmp_path / "meshes")
    for path in (tmp_path / "meshes").iterdir():
        if path.stem not in ("marks", "box"):
            path.unlink()
    settings = Settings(resolution_px=RESOLUTION_PX, random_pose=True, seed=3, views=("front", "right", "top"))
    assert render_multiview.render_folder(tmp_path / "meshes", tmp_path / "out", settings) == {}
    turns = []
    for uid in ("marks", "box"):
        poses = {view: pose_of(tmp_path / "out", uid, view) for view in settings.views}
        upright = {view: pose_of(views, uid, view) for view in settings.views}
        turns.append(upright["front"][:, :3].T @ poses["front"][:, :3])
        for view in settings.views:
            relative, expected = (p[view][:, :3] @ p["front"][:, :3].T for p in (poses, upright))
            assert np.allclose(relative, expected) and np.allclose(poses[view][:, 3], (0, 0, -CAMERA_DISTANCE))
    assert not np.allclose(*turns, atol=0.05)
    pairs = [pair for view in settings.views for pair in found_marks(tmp_path / "out", "marks", view)]
    assert len(pairs) > 8
    assert max(np.abs(projected - seen).max() for projected, seen in pairs) < 0.5


def test_cameras_stand_where_their_names_say() -> None:
    for view, direction in VIEWS.items():
        pose = render_multiview.world_to_camera(view, np.eye(3))
        rotation = pose[:, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) == pytest.approx(1)
        centre = -rotation.T @ pose[:, 3]
        assert np.allclose(centre, CAMERA_DISTANCE * np.array(direction) / np.linalg.norm(direction)), view
    front, right, top = (render_multiview.world_to_camera(view, np.eye(3))[:, :3] for view in ("front", "right", "top"))
    assert front.round(9).tolist() == [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    assert right.round(9).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert top.round(9).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_yaw_comes_before_pitch_which_lifts_the_front_camera() -> None:
    turned = render_multiview.turned(-60, 30)
    front = turned @ (0, -1, 0)
    yaw, pitch = np.radians(-60), np.radians(30)
    assert np.allclose(front, (np.sin(yaw), -np.cos(yaw) * np.cos(pitch), np.cos(yaw) * np.sin(pitch)))
    settings = Settings(random_pose=True)
    rotations = [render_multiview.rig_rotation(f"uid {index}", settings) for index in range(200)]
    pitches = np.degrees([np.arctan2(rotation[1, 2], rotation[2, 2]) for rotation in rotations])
    assert -15 <= pitches.min() < -12 and 27 < pitches.max() <= 30
    assert np.array_equal(render_multiview.rig_rotation("uid 7", settings), rotations[7])
    assert np.array_equal(render_multiview.rig_rotation("uid 7", Settings()), np.eye(3))


# Colours --------------------------------------------------------------------------------------------------------------


def hue(colour: np.ndarray) -> list[int]:
    """Without the brightness."""
    return (colour[:3] / colour[:3].max() * 255).round().astype(int).tolist()


def test_scenes_show_textures_upright_plain_materials_and_cut_outs(views: Path) -> None:
    scale, *offset, ortho_scale = np.loadtxt(views / "sc" / "scene" / "scale_offset_matrix.txt")

    def seen(x: float, y: float, kind: str = "rgb", view: str = "front") -> np.ndarray:
        """At a place of the glTF, whose y axis is the world's z axis."""
        image, pose = rgba(views, "scene", view, kind), pose_of(views, "scene", view)
        place = pose[:, :3] @ (np.array([x, 0, y]) * scale + offset)
        column, row = ((place[:2] * (1, -1) / ortho_scale + 0.5) * len(image)).astype(int)
        return image[row, column]

    for (x, y), colour in zip([(-1, 1), (1, 1), (-1, -1), (1, -1)], COLOURS, strict=False):
        assert hue(seen(0.25 * x, 0.25 * y)) == hue(seen(0.25 * x, 0.25 * y, view="back")) == list(colour)
    assert hue(seen(1.75, 0.25)) == list(COLOURS[4])  # through the hole
    assert hue(seen(2.25, 0.25)) == [255, 255, 255]
    assert hue(seen(2.25, 0.25, view="back")) == list(COLOURS[4])
    assert np.abs(np.array(hue(seen(0, 2))) - (128, 0, 255)).max() <= 1
    assert seen(1, 1)[3] == 0
    shades = [seen(x, y)[:3].max() for x, y in [(0.25, 0.25), (1.75, 0.25), (2.25, 0.25), (0, 2)]]
    assert max(shades) - min(shades) <= 1 and 150 < min(shades) < 255  # one light for all that face the same way
    assert seen(1.75, 0.25, "normals").tolist() == seen(0, 2, "normals").tolist() == [128, 128, 255, 255]


def test_every_side_is_lit(views: Path) -> None:
    for view in VIEWS:
        image = rgba(views, "sphere", view)
        lit = image[image[..., 3] == 255][:, :3] / render_multiview.PLAIN
        assert 0.39 < lit.min() and lit.max() <= 1.001 and 0.6 < lit.mean() < 0.95, view


@pytest.mark.parametrize(("up_axis", "suffix", "up"), [("auto", "ply", 2), ("auto", "obj", 1), ("y", "ply", 1)])
def test_the_up_axis_of_a_file(tmp_path: Path, up_axis: str, suffix: str, up: int) -> None:
    box = trimesh.creation.box((1, 2, 3))
    box.export(tmp_path / f"box.{suffix}")
    (surface,) = render_multiview.load_surfaces(tmp_path / f"box.{suffix}", up_axis)
    assert np.ptp(surface.corners, axis=(0, 1)).round(6).tolist() == ([1, 2, 3] if up == 2 else [1, 3, 2])


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    folder = tmp_path / "meshes"
    (folder / "more").mkdir(parents=True)
    for name in ("aa.ply", "ab.glb", "more/b.obj"):
        trimesh.creation.box((1, 1, 1)).export(folder / name)
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_layout_of_the_output(quick: None, meshes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = Settings(views=("front", "top"), resolution_px=16, suffix="webp", masks=True)
    assert render_multiview.render_folder(meshes, output, settings) == {}
    names = ["000_front_RT.txt", "000_top_RT.txt", "scale_offset_matrix.txt"]
    names += [f"{kind}_000_{view}.webp" for kind in ("mask", "normals", "rgb") for view in ("front", "top")]
    folders = ("aa/aa", "ab/ab", "b/b")
    expected = [f"{folder}/{name}" for folder in folders for name in names]
    assert files_in(output) == sorted([*expected, "objects.json", "render.json", "report.json"])
    assert json.loads((output / "objects.json").read_text()) == ["aa", "ab", "b"]
    assert json.loads((output / "report.json").read_text()) == {}
    image = rgba(output, "aa", "front", suffix="webp")
    mask = np.asarray(Image.open(output / "aa" / "aa" / "mask_000_front.webp").convert("L"))
    assert np.array_equal(mask, np.where(image[..., 3] > 0, 255, 0))  # without loss: whatever is not 0 is object
    assert np.loadtxt(output / "aa" / "aa" / "scale_offset_matrix.txt") == pytest.approx([3**-0.5, 0, 0, 0, 1.35])


def test_bad_meshes_are_reported_and_the_others_rendered(quick: None, meshes: Path, tmp_path: Path) -> None:
    (meshes / "nonsense.glb").write_bytes(b"nonsense")
    trimesh.PointCloud(np.random.default_rng(0).normal(size=(9, 3))).export(meshes / "points.ply")
    trimesh.Trimesh(np.zeros((3, 3)), [[0, 1, 2]], process=False).export(meshes / "nothing.ply")
    trimesh.Trimesh([[0, 0, 0], [np.nan, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False).export(meshes / "nan.ply")
    trimesh.Trimesh(square(1), [[0, 1, 2], [0, 2, 3]], process=False).export(meshes / "flat.ply")
    (meshes / "more" / "aa.stl").write_bytes((meshes / "aa.ply").read_bytes())
    output = tmp_path / "out"
    bad = render_multiview.render_folder(meshes, output, PLAIN, jobs=2)
    assert bad == json.loads((output / "report.json").read_text())
    assert list(bad) == ["aa.ply", "flat.ply", "more/aa.stl", "nan.ply", "nonsense.glb", "nothing.ply", "points.ply"]
    assert bad["aa.ply"] == bad["more/aa.stl"] == "2 meshes have the uid aa: rename all but one"
    assert bad["flat.ply"].endswith("flat.ply: nothing is seen in the view front: the mesh is flat")
    assert bad["points.ply"].endswith("points.ply: holds no triangles")
    assert "nonsense.glb: cannot be read as a mesh (" in bad["nonsense.glb"]
    assert bad["nan.ply"].endswith("nan.ply: some coordinates are not finite")
    assert bad["nothing.ply"] == "the diagonal of its bounding box is 0; it must be from 1e-12 to 1e12"
    assert json.loads((output / "objects.json").read_text()) == ["ab", "b"]
    assert not list(output.rglob(".*"))  # nothing half done


def test_a_crash_and_a_hang_cost_one_object_each(
    quick: None, meshes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world_to_camera = render_multiview.world_to_camera
    current = []

    def load(path: Path, up_axis: str) -> list:
        current[:] = [path.stem]
        return load_surfaces(path, up_axis)

    def fail(view: str, rig: np.ndarray) -> np.ndarray:
        if view == "right" and current == ["aa"]:
            faulthandler.disable()  # pytest's, which would be long
            os.kill(os.getpid(), signal.SIGSEGV)
        if view == "right" and current == ["b"]:
            time.sleep(60)
        return world_to_camera(view, rig)

    load_surfaces = render_multiview.load_surfaces
    monkeypatch.setattr(render_multiview, "load_surfaces", load)
    monkeypatch.setattr(render_multiview, "world_to_camera", fail)
    bad = render_multiview.render_folder(meshes, tmp_path / "out", PLAIN, timeout_s=4)
    assert bad == {
        "aa.ply": "rendering it ends the process with SIGSEGV",
        "more/b.obj": "rendering it takes more than 4 s",
    }
    assert json.loads((tmp_path / "out" / "objects.json").read_text()) == ["ab"]
    assert not list((tmp_path / "out").rglob(".*"))

    monkeypatch.undo()
    monkeypatch.setattr(render_multiview, "require_renderer", lambda: None)
    kept = (tmp_path / "out" / "ab" / "ab" / "rgb_000_front.png").stat().st_mtime_ns
    (tmp_path / "out" / "aa" / ".aa.unfinished").mkdir()  # as a power cut leaves it
    assert render_multiview.render_folder(meshes, tmp_path / "out", PLAIN) == {}
    assert json.loads((tmp_path / "out" / "objects.json").read_text()) == ["aa", "ab", "b"]
    assert (tmp_path / "out" / "ab" / "ab" / "rgb_000_front.png").stat().st_mtime_ns == kept
    assert not list((tmp_path / "out").rglob(".*"))


def test_other_settings_are_refused(quick: None, tmp_path: Path) -> None:
    path = tmp_path / "render.json"
    render_multiview.keep_settings(path, PLAIN)
    render_multiview.keep_settings(path, PLAIN)
    with pytest.raises(ValueError) as caught:
        render_multiview.keep_settings(path, Settings(views=("front",), resolution_px=16, supersampling=1, seed=2))
    expected = (
        f"{tmp_path} holds objects of other settings: views was ['front', 'right'], is ['front']; seed was 0, is 2"
    )
    assert str(caught.value) == f"{expected}. Name another folder"
    path.write_text("{")
    with pytest.raises(
        ValueError, match=re.escape(f"{path} is damaged: delete the folder {tmp_path} and render again")
    ):
        render_multiview.keep_settings(path, PLAIN)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"views": ("front", "bottom")}, "views is front, bottom; choose each at most once from front, back, right"),
        ({"views": ("top", "top")}, "views is top, top; choose each at most once"),
        ({"views": ()}, "views is ; choose each at most once"),
        ({"resolution_px": 4}, "resolution_px is 4, but must be from 8 to 4096"),
        ({"ortho_scale": 0.0}, "ortho_scale is 0.0, but must be from 0.1 to 100"),
        ({"up_axis": "x"}, "up_axis is x; choose from auto, y, z"),
        ({"suffix": "jpg"}, "suffix is jpg; choose from png, webp"),
        ({"smooth_angle_deg": -1.0}, "smooth_angle_deg is -1.0, but must be from 0 to 180"),
        ({"supersampling": 9}, "supersampling is 9, but must be from 1 to 8"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**wrong)


def test_command_line_without_a_screen(meshes: Path, tmp_path: Path) -> None:
    (meshes / "nonsense.glb").write_bytes(b"nonsense")
    command = [sys.executable, str(SCRIPT), str(meshes), str(tmp_path / "out"), "--resolution", "16", "--jobs", "1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    done = subprocess.run([*command, "--views", "front"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == f"3 objects: {tmp_path / 'out' / 'objects.json'}\n"
    assert done.stderr.splitlines()[-1].startswith("nonsense.glb: ")
    assert "WARN" not in done.stderr and "4/4" in done.stderr


def test_command_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def error_of(*arguments: object) -> str:
        assert render_multiview.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "none", tmp_path / "out").endswith("is not a folder\n")
    expected = (
        f"render_multiview: {tmp_path / 'empty'} holds no mesh; looked for *.glb, *.gltf, *.obj, *.ply, *.stl, *.off"
    )
    assert error_of(tmp_path / "empty", tmp_path / "out").startswith(expected)
    assert "suffix is gif" in error_of(tmp_path, tmp_path / "out", "--suffix", "gif")

    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.ply")
    assert "processes is 0, but must be at least 1" in error_of(tmp_path, tmp_path / "out", "--jobs", 0)
    monkeypatch.setattr(render_multiview, "_draw_a_triangle", lambda nothing: os._exit(3))
    expected = (
        "render_multiview: VTK cannot draw here (a triangle ends the process with status 3): without a screen it "
    )
    assert error_of(tmp_path, tmp_path / "out").startswith(expected + "needs EGL or OSMesa")
    monkeypatch.setitem(sys.modules, "trimesh", None)
    hint = "render_multiview: rendering needs trimesh: pip install -e '.[render]'\n"
    assert error_of(tmp_path, tmp_path / "out") == hint
