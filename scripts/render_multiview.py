"""Renders a folder of meshes into the training data of mvdiffusion: several views in RGB and normals of every object.

    python scripts/render_multiview.py meshes views --jobs 8
    python scripts/render_multiview.py meshes views --jobs 8 --random_pose --suffix webp

Needs no screen and no GPU, but pyvista and trimesh: pip install -e '.[render]'. Reads .glb .gltf .obj .ply .stl .off
in the folder and the folders in it; an object's uid is its file's name without the suffix. Writes

    views/objects.json                    uids of the finished objects, sorted
    views/report.json                     meshes that could not be rendered, with the reasons
    views/render.json                     the settings
    views/ab/abc/rgb_000_front.png        RGBA, object abc; alpha is its coverage of a pixel
    views/ab/abc/normals_000_front.png    RGBA, (normal + 1) / 2 in the view's camera frame; towards the camera
    views/ab/abc/000_front_RT.txt         world -> camera, 3 x 4: x right, y up, z towards the viewer
    views/ab/abc/scale_offset_matrix.txt  scale, offset x, y, z, ortho_scale: world = scale * mesh + offset, z up
    views/ab/abc/mask_000_front.png       only with --masks: 255 where alpha is not 0

The folder of an object appears whole or not at all, so the same command goes on where it was stopped: finished objects
are skipped, failed ones are tried again. Child processes do the work, so an object that crashes or hangs the renderer
is reported like any other. Exit status: 0 if all objects are there, 1 if some are not, 2 for wrong usage, 130 after
Ctrl-C.
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from common.doctor import Item, Result, scan
from common.video import find_files

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
Y_UP_SUFFIXES = (".glb", ".gltf", ".obj")  # by specification, and by what most programs write
# From the object to the camera, in the world: z up, the front looks along -y.
VIEWS: dict[str, tuple[float, float, float]] = {
    "front": (0, -1, 0),
    "back": (0, 1, 0),
    "right": (1, 0, 0),
    "left": (-1, 0, 0),
    "front_right": (1, -1, 0),
    "front_left": (-1, -1, 0),
    "back_right": (1, 1, 0),
    "back_left": (-1, 1, 0),
    "top": (0, 0, 1),
    "front_right_top": (1, -1, 1),
    "front_left_top": (-1, -1, 1),
    "back_right_top": (1, 1, 1),
    "back_left_top": (-1, 1, 1),
}
SET = "000"  # the layout has room for several sets of views of one object; there is one
CAMERA_DISTANCE = 2.0  # the object's bounding box has a diagonal of 1
YAW_DEG, PITCH_DEG = (-60.0, 60.0), (-15.0, 30.0)  # of --random_pose
# Even light without shadows: the share of grey surroundings, and of lights (from where, share) that turn with the rig.
AMBIENT = 0.4
LIGHTS = (((0.4, -0.8, 0.5), 0.4), ((-0.9, -0.3, 0.3), 0.25), ((0.6, 0.7, 0.3), 0.25), ((-0.5, 0.8, 0.4), 0.25))
PLAIN = (180, 180, 180)  # a mesh without any colour
ALPHA_CUTOFF = 0.5  # glTF's default; translucent surfaces are cut out or opaque
NO_LIBRARY = "rendering needs {name}: pip install -e '.[render]'"
NO_RENDERER = (
    "VTK cannot draw here ({reason}): without a screen it needs EGL or OSMesa, with or without a GPU, "
    "as in `apt-get install libegl1 libgl1-mesa-dri`"
)


@dataclass(frozen=True)
class Settings:
    """What decides the pixels.

    Attributes:
        ortho_scale: width and height of the images in world units; the object's bounding box has a diagonal of 1.
        up_axis: of the meshes: `y`, `z`, or `auto`, which is y for .glb, .gltf and .obj and z for the others.
        random_pose: turn all cameras of an object together, by an angle that follows from (seed, uid).
        smooth_angle_deg: edges between faces at a smaller angle are shaded smoothly; 0 = none, 180 = all.
        supersampling: rendered pixels per pixel and axis.
    """

    views: tuple[str, ...] = tuple(VIEWS)
    resolution_px: int = 512
    ortho_scale: float = 1.35
    up_axis: str = "auto"
    random_pose: bool = False
    seed: int = 0
    suffix: str = "png"
    masks: bool = False
    smooth_angle_deg: float = 35.0
    supersampling: int = 2

    def __post_init__(self) -> None:
        unknown = [view for view in self.views if view not in VIEWS]
        if unknown or not self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"views is {', '.join(self.views)}; choose each at most once from {', '.join(VIEWS)}")
        limits = {"resolution_px": (8, 4096), "ortho_scale": (0.1, 100), "smooth_angle_deg": (0, 180)}
        for name, (least, most) in (limits | {"supersampling": (1, 8)}).items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be from {least} to {most}")
        for name, allowed in {"up_axis": ("auto", "y", "z"), "suffix": ("png", "webp")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; choose from {', '.join(allowed)}")


# ----------------------------------------------------------------------------------------------------------------------
# Cameras


def rig_rotation(uid: str, settings: Settings) -> np.ndarray:
    """How the cameras of an object are turned together, (3, 3): yaw about z, then pitch about the world's x axis."""
    if not settings.random_pose:
        return np.eye(3)
    digest = hashlib.sha256(f"{settings.seed}/{uid}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return turned(rng.uniform(*YAW_DEG), rng.uniform(*PITCH_DEG))


def turned(yaw_deg: float, pitch_deg: float) -> np.ndarray:
    """(3, 3); a positive pitch lifts the front camera."""
    (cos_yaw, cos_pitch), (sin_yaw, sin_pitch) = (f(np.radians([yaw_deg, pitch_deg])) for f in (np.cos, np.sin))
    yaw = np.array([[cos_yaw, -sin_yaw, 0], [sin_yaw, cos_yaw, 0], [0, 0, 1]])
    pitch = np.array([[1, 0, 0], [0, cos_pitch, sin_pitch], [0, -sin_pitch, cos_pitch]])
    return pitch @ yaw


def world_to_camera(view: str, rig: np.ndarray) -> np.ndarray:
    """[R|t], (3, 4), of a camera at CAMERA_DISTANCE that looks at the origin: x right, y up, z towards the viewer."""
    z = np.array(VIEWS[view], dtype=np.float64)
    z /= np.linalg.norm(z)
    up = np.array([0.0, 1, 0]) if view == "top" else np.array([0.0, 0, 1])
    x = np.cross(up, z)
    x /= np.linalg.norm(x)
    rotation = np.stack([x, np.cross(z, x), z]) @ rig.T  # (3, 3)
    return np.concatenate([rotation, [[0], [0], [-CAMERA_DISTANCE]]], axis=1)


# ----------------------------------------------------------------------------------------------------------------------
# Meshes


@dataclass
class Surface:
    """Triangles that share a texture.

    Attributes:
        corners: (T, 3, 3), the corners of each triangle.
        colours: (T, 3, 3) uint8 RGB of the corners; the texture is multiplied by them.
        texture: (H, W, 4) uint8, upper row first; alpha is 0 or 255. None: plain.
        uv: (T, 3, 2), v upwards.
    """

    corners: np.ndarray
    colours: np.ndarray
    texture: np.ndarray | None = None
    uv: np.ndarray | None = None


def load_surfaces(path: Path, up_axis: str) -> list[Surface]:
    """The triangles of all meshes of a file in one frame, z up; one surface per texture. ValueError if there are none.

    Vertex colours, face colours, plain materials and base colour textures are read; other textures (normals, roughness,
    emission) are not.
    """
    import trimesh

    try:
        scene = trimesh.load_scene(path, process=False)
    except Exception as error:  # readers raise almost anything
        raise ValueError(f"{path}: cannot be read as a mesh ({type(error).__name__}: {error})") from error
    is_gltf = path.suffix.lower() in (".glb", ".gltf")
    found: dict[Any, list[Surface]] = defaultdict(list)
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        mesh = scene.geometry[name]
        if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
            corners = trimesh.transform_points(mesh.vertices, transform)[mesh.faces]  # (T, 3, 3)
            key, surface = _coloured(mesh, corners, is_gltf)
            found[key].append(surface)
    if not found:
        raise ValueError(f"{path}: holds no triangles")
    surfaces = [_joined(parts) for parts in found.values()]
    if up_axis == "y" or (up_axis == "auto" and path.suffix.lower() in Y_UP_SUFFIXES):
        for surface in surfaces:
            x, y, z = np.moveaxis(surface.corners, -1, 0)
            surface.corners = np.stack([x, -z, y], axis=-1)
    if not all(np.isfinite(surface.corners).all() for surface in surfaces):
        raise ValueError(f"{path}: some coordinates are not finite")
    return surfaces


def _joined(parts: Sequence[Surface]) -> Surface:
    corners = np.concatenate([part.corners for part in parts])
    colours = np.concatenate([part.colours for part in parts])
    uv = None if parts[0].uv is None else np.concatenate([part.uv for part in parts])
    return Surface(corners, colours, parts[0].texture, uv)


def _coloured(mesh: Any, corners: np.ndarray, is_gltf: bool) -> tuple[Any, Surface]:
    """The surface of one mesh, and what it must have in common with others to be joined to them."""
    visual, shape = mesh.visual, corners.shape
    if visual.kind != "texture":
        if visual.kind is None:
            return None, Surface(corners, np.full(shape, PLAIN, np.uint8))
        is_per_face = visual.kind == "face"
        colours = visual.face_colors[:, None].repeat(3, axis=1) if is_per_face else visual.vertex_colors[mesh.faces]
        colours = colours[..., :3]  # (T, 3, 3)
        return None, Surface(corners, _to_srgb(colours / 255) if is_gltf else colours)

    material = visual.material
    image = getattr(material, "baseColorTexture", getattr(material, "image", None))
    has_uv = visual.uv is not None and len(visual.uv) == len(mesh.vertices)
    if is_gltf:
        factors = np.ones(shape) if material.baseColorFactor is None else material.baseColorFactor[:3] / 255
        colours = np.full(shape, _to_srgb(factors * _vertex_factors(mesh)))
    elif image is None:
        colours = np.full(shape, material.main_color[:3], np.uint8)
    else:
        colours = np.full(shape, 255, np.uint8)
    if image is None or not has_uv:
        return None, Surface(corners, colours)
    is_cut_out = getattr(material, "alphaMode", None) in ("MASK", "BLEND") or not is_gltf
    cutoff = getattr(material, "alphaCutoff", None) or ALPHA_CUTOFF
    texture = np.array(image.convert("RGBA"))  # (H, W, 4)
    texture[..., 3] = np.where(texture[..., 3] < 255 * cutoff, 0, 255) if is_cut_out else 255
    return (id(image), is_cut_out, cutoff), Surface(corners, colours, texture, visual.uv[mesh.faces])


def _vertex_factors(mesh: Any) -> np.ndarray:
    """glTF's linear vertex colours beside a texture, at the corners: (T, 3, 3) in [0, 1]; or 1."""
    colours = mesh.visual.vertex_attributes.get("color")
    if colours is None or len(colours) != len(mesh.vertices):
        return np.ones(1)
    full = np.iinfo(colours.dtype).max if np.issubdtype(colours.dtype, np.integer) else 1
    return (colours[mesh.faces][..., :3] / full).clip(0, 1)


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    """glTF's colours in [0, 1] to sRGB uint8."""
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().astype(np.uint8)


def normalise(surfaces: Sequence[Surface]) -> tuple[float, np.ndarray]:
    """Scales and moves the surfaces, in place, so that their bounding box has a diagonal of 1 and the origin as centre.

    Returns scale and offset, (3,), in new = scale * old + offset. Raises ValueError for a mesh without extent.
    """
    lower = np.min([surface.corners.min((0, 1)) for surface in surfaces], axis=0)
    upper = np.max([surface.corners.max((0, 1)) for surface in surfaces], axis=0)
    diagonal = float(np.linalg.norm(upper - lower))
    if not 1e-12 < diagonal < 1e12:
        raise ValueError(f"the diagonal of its bounding box is {diagonal:g}; it must be from 1e-12 to 1e12")
    scale, offset = 1 / diagonal, -(lower + upper) / 2 / diagonal
    for surface in surfaces:
        surface.corners = surface.corners * scale + offset
    return scale, offset


def normals_of(corners: np.ndarray, smooth_angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (T, 3) of the triangles (T, 3, 3) of a normalised mesh, and (T, 3, 3) of their corners.

    The latter average the faces around a corner by their angles there, but not across edges sharper than
    `smooth_angle_deg`. Files' own normals are not used: they are missing or wrong too often. A triangle without area
    has the normal 0.
    """
    import pyvista

    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # (T, 3)
    areas = np.linalg.norm(normals, axis=1, keepdims=True)
    normals /= np.maximum(areas, 1e-30)
    corner_normals = np.repeat(normals[:, None], 3, axis=1)  # (T, 3, 3)
    # Vertices are doubled where textures or surfaces meet: those at one place (2^-20 of the diagonal) are one here.
    places = np.round((corners + 1) * 2**19).astype(np.int64)  # (T, 3, 3)
    keys = (places[..., 0] << 42) | (places[..., 1] << 21) | places[..., 2]
    _, first, ids = np.unique(keys, return_index=True, return_inverse=True)
    ids = ids.reshape(keys.shape)  # (T, 3)
    solid = (ids != np.roll(ids, 1, axis=1)).all(1) & (areas[:, 0] > 0)
    if smooth_angle_deg == 0 or not solid.any():
        return normals, corner_normals
    merged = pyvista.PolyData.from_regular_faces(corners.reshape(-1, 3)[first], ids[solid])
    split = merged.compute_normals(cell_normals=False, feature_angle=smooth_angle_deg, split_vertices=True,
                                   consistent_normals=False, auto_orient_normals=False)  # fmt: skip
    ids = split.regular_faces  # (S, 3), in the same order
    weighted = _corner_angles(corners[solid])[..., None] * normals[solid][:, None]  # (S, 3, 3)
    sums = np.zeros((split.n_points, 3))
    np.add.at(sums, ids.ravel(), weighted.reshape(-1, 3))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    smooth = (sums / np.maximum(lengths, 1e-30))[ids]  # (S, 3, 3)
    corner_normals[solid] = np.where(lengths[ids] > 1e-6, smooth, corner_normals[solid])
    return normals, corner_normals


def _corner_angles(corners: np.ndarray) -> np.ndarray:
    """Angles (T, 3) of triangles (T, 3, 3) at their corners, in radians."""
    following, previous = (np.roll(corners, shift, axis=1) - corners for shift in (-1, 1))
    lengths = np.linalg.norm(following, axis=2) * np.linalg.norm(previous, axis=2)
    return np.arccos(np.clip((following * previous).sum(2) / lengths, -1, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


class Canvas:
    """An orthographic camera without light on surfaces; closes its window when the `with` block ends."""

    def __init__(self, surfaces: Sequence[Surface], ortho_scale: float, size_px: int):
        import pyvista
        from vtkmodules.vtkCommonCore import vtkLogger

        vtkLogger.SetStderrVerbosity(vtkLogger.VERBOSITY_OFF)  # it tells that there is no screen
        self.plotter = pyvista.Plotter(off_screen=True, window_size=(size_px, size_px), lighting=None)
        self.plotter.render_window.SetMultiSamples(0)
        self.meshes, self.actors, self.textures = [], [], []
        for surface in surfaces:
            self._add(surface)
        camera = self.plotter.camera
        camera.parallel_projection, camera.parallel_scale = True, ortho_scale / 2

    def _add(self, surface: Surface) -> None:
        import pyvista
        from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper

        count = 3 * len(surface.corners)
        faces = np.arange(count).reshape(-1, 3)
        mesh = pyvista.PolyData.from_regular_faces(surface.corners.reshape(count, 3).astype(np.float32), faces)
        mapper = vtkPolyDataMapper()
        mapper.SetInputData(mesh)
        mapper.SetColorModeToDirectScalars()
        actor = vtkActor()
        actor.SetMapper(mapper)
        actor.GetProperty().LightingOff()
        actor.ForceOpaqueOn()
        colour_and_shape = (None, None)
        if surface.texture is not None and surface.uv is not None:
            mesh.active_texture_coordinates = surface.uv.reshape(count, 2).astype(np.float32)
            # White, but cut out alike. Not None: a texture that an actor gets after its first rendering stays unseen.
            shape = np.dstack([np.full_like(surface.texture[..., :3], 255), surface.texture[..., 3]])
            colour_and_shape = (_texture(surface.texture), _texture(shape))
        self.plotter.add_actor(actor, reset_camera=False, render=False)
        self.meshes.append(mesh)
        self.actors.append(actor)
        self.textures.append(colour_and_shape)

    def draw(self, pose: np.ndarray, colours: Sequence[np.ndarray], *, textured: bool) -> np.ndarray:
        """RGBA uint8 (size, size, 4) from a camera [R|t], (3, 4); alpha is 0 or 255.

        Args:
            colours: per surface (T, 3, 3) uint8, of the corners, multiplied by its texture if `textured`.
        """
        for mesh, actor, textures, values in zip(self.meshes, self.actors, self.textures, colours, strict=True):
            mesh.point_data["colours"] = values.reshape(-1, 3)
            mesh.set_active_scalars("colours")
            actor.SetTexture(textures[0] if textured else textures[1])
        camera = self.plotter.camera
        camera.position, camera.focal_point = tuple(-pose[:, :3].T @ pose[:, 3]), (0, 0, 0)
        camera.up = tuple(pose[1, :3])
        camera.clipping_range = (CAMERA_DISTANCE - 1, CAMERA_DISTANCE + 1)
        self.plotter.render()
        image = np.array(self.plotter.screenshot(transparent_background=True, return_img=True))  # (size, size, 4)
        image[..., 3] = np.where(image[..., 3] < 128, 0, 255)
        return image

    def __enter__(self) -> "Canvas":
        return self

    def __exit__(self, *error: object) -> None:
        self.plotter.close()


def _texture(pixels: np.ndarray) -> Any:
    import pyvista

    texture = pyvista.Texture(pixels)
    is_cut_out = pixels[..., 3].min() < 255  # between 0 and 255 an edge would be blended with the background
    texture.SetInterpolate(not is_cut_out)
    texture.SetMipmap(not is_cut_out)
    return texture


def facing(normals: np.ndarray, corner_normals: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Normals (T, 3, 3) of corners in the frame of a camera; those of a triangle seen from behind are turned round."""
    sign = np.where(normals @ rotation[2] < 0, -1.0, 1.0)  # (T,)
    return sign[:, None, None] * (corner_normals @ rotation.T)


def shade(rgba: np.ndarray, normals: np.ndarray, light_rotation: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) in [0, 255], lit; `light_rotation` (3, 3) brings normals (H, W, 3) to where the lights are."""
    light = np.full(rgba.shape[:2], AMBIENT, np.float32)
    for towards, share in LIGHTS:
        direction = (np.array(towards) / np.linalg.norm(towards)) @ light_rotation  # (3,), in the frame of `normals`
        light += np.float32(share) * (normals @ direction.astype(np.float32)).clip(0)
    return rgba[..., :3] * light.clip(0, 1)[..., None]


def _reduced(values: np.ndarray, covered: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (h, w, 3) over the covered ones of `factor` x `factor` pixels, and their share (h, w)."""
    height, width = (side // factor for side in covered.shape)

    def blocks(array: np.ndarray) -> np.ndarray:
        return array.reshape(height, factor, width, factor, -1).mean((1, 3))

    share = blocks(covered.astype(np.float32))  # (h, w, 1)
    return blocks(values * covered[..., None]) / np.maximum(share, 1e-6), share[..., 0]


def view_images(
    canvas: Canvas,
    surfaces: Sequence[Surface],
    normals: Sequence[tuple[np.ndarray, np.ndarray]],
    pose: np.ndarray,
    rig: np.ndarray,
    factor: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Colour and normals of one view, each RGBA uint8 (H, W, 4) with straight alpha."""
    encoded = [
        np.round(facing(*pair, pose[:, :3]) * 127.5 + 127.5).astype(np.uint8) for pair in normals
    ]  # [(T, 3, 3), ...]
    drawn = canvas.draw(pose, encoded, textured=False)
    directions = drawn[..., :3].astype(np.float32) / 127.5 - 1  # (S, S, 3)
    directions /= np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-6)
    base = canvas.draw(pose, [surface.colours for surface in surfaces], textured=True)
    covered = (base[..., 3] > 0) & (drawn[..., 3] > 0)  # (S, S)
    colour, share = _reduced(shade(base, directions, rig.T @ pose[:, :3].T), covered, factor)
    direction, _ = _reduced(directions, covered, factor)
    direction /= np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-6)
    alpha = np.ceil(255 * share)  # a pixel that is touched is never 0
    rgbs = (colour, (direction * 127.5 + 127.5) * (alpha > 0)[..., None])
    colour, direction = (np.dstack([rgb.round(), alpha]).astype(np.uint8) for rgb in rgbs)
    return colour, direction


def render_object(mesh: Path, settings: Settings, output: Path) -> None:
    """Writes the folder of one object; on an error it is not there. ValueError says what is wrong with the mesh."""
    uid = mesh.stem
    surfaces = load_surfaces(mesh, settings.up_axis)
    scale, offset = normalise(surfaces)
    face_normals, corner_normals = normals_of(
        np.concatenate([surface.corners for surface in surfaces]), settings.smooth_angle_deg
    )
    ends = np.cumsum([len(surface.corners) for surface in surfaces])[:-1]
    normals = list(zip(np.split(face_normals, ends), np.split(corner_normals, ends), strict=True))
    rig = rig_rotation(uid, settings)
    staging = staging_folder(output, uid)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    np.savetxt(staging / "scale_offset_matrix.txt", [scale, *offset, settings.ortho_scale])
    with Canvas(surfaces, settings.ortho_scale, settings.resolution_px * settings.supersampling) as canvas:
        for view in settings.views:
            pose = world_to_camera(view, rig)
            colour, direction = view_images(canvas, surfaces, normals, pose, rig, settings.supersampling)
            if not colour[..., 3].any():
                raise ValueError(f"{mesh}: nothing is seen in the view {view}: the mesh is flat")
            np.savetxt(staging / f"{SET}_{view}_RT.txt", pose)
            images = {"rgb": colour, "normals": direction}
            if settings.masks:
                images["mask"] = np.where(colour[..., 3] > 0, 255, 0).astype(np.uint8)
            for kind, image in images.items():
                path = staging / f"{kind}_{SET}_{view}.{settings.suffix}"
                Image.fromarray(image).save(path, **({"lossless": True} if settings.suffix == "webp" else {}))
    os.rename(staging, object_folder(output, uid))


# ----------------------------------------------------------------------------------------------------------------------
# A folder of meshes


def object_folder(output: Path, uid: str) -> Path:
    return output / uid[:2] / uid


def staging_folder(output: Path, uid: str) -> Path:
    return output / uid[:2] / f".{uid}.unfinished"


def render_folder(
    meshes: Path, output: Path, settings: Settings, jobs: int = 1, timeout_s: float = 300.0
) -> dict[str, str]:
    """Renders every mesh of a folder that is not yet in `output`; writes what the module's head lists.

    Args:
        jobs: objects rendered at a time, each in a process.
        timeout_s: how long one object may take.

    Returns:
        Reasons of the meshes that could not be rendered, by their path within `meshes`.

    Raises:
        ModuleNotFoundError, RuntimeError: pyvista or trimesh is missing, or VTK cannot draw on this machine.
        ValueError, FileNotFoundError: wrong arguments, or `output` holds objects of other settings.
    """
    found = find_meshes(meshes)
    require_renderer()
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(output / "render.json", settings)
    bad = {
        path.relative_to(meshes).as_posix(): f"{len(paths)} meshes have the uid {uid}: rename all but one"
        for uid, paths in found.items()
        if len(paths) > 1
        for path in paths
    }
    todo = [paths[0] for uid, paths in found.items() if len(paths) == 1 and not object_folder(output, uid).is_dir()]
    items = [Item(path.relative_to(meshes).as_posix(), (path,), path) for path in todo]
    done = sum(len(paths) == 1 for paths in found.values()) - len(todo)
    tqdm.monitor_interval = 0  # no thread beside those that fork
    try:
        with tqdm(total=done + len(todo), initial=done, unit="object", desc="render") as bar:

            def note(index: int, result: Result) -> None:
                if not result.ok:
                    bad[result.name] = result.reason.replace("checking it", "rendering it")
                    shutil.rmtree(staging_folder(output, todo[index].stem), ignore_errors=True)
                bar.update()
                bar.set_postfix(bad=len(bad), refresh=False)

            scan(items, functools.partial(render_object, settings=settings, output=output), jobs, timeout_s, note)
    finally:
        bad = dict(sorted(bad.items()))
        finished = sorted(path.name for path in output.glob("*/*") if path.is_dir() and not path.name.startswith("."))
        _write_json(output / "objects.json", finished)
        _write_json(output / "report.json", bad)
    return bad


def find_meshes(folder: Path) -> dict[str, list[Path]]:
    """Meshes in a folder and the folders in it, by uid. FileNotFoundError if it is no folder, ValueError if no mesh."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_files(folder, SUFFIXES):
        found[path.stem].append(path)
    if not found:
        raise ValueError(f"{folder} holds no mesh; looked for *{', *'.join(SUFFIXES)} in it and the folders in it")
    return found


def require_renderer(timeout_s: float = 60.0) -> None:
    """Raises ModuleNotFoundError or RuntimeError, with a hint, if a triangle cannot be drawn on this machine."""
    # Here, so that the processes that are forked from this one have them. Mesa's own threads would only compete.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    for name in ("pyvista.plotting", "trimesh"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(NO_LIBRARY.format(name=error.name), name=error.name) from None
        except ImportError as error:  # of a system library
            raise RuntimeError(NO_RENDERER.format(reason=error)) from None
    (result,) = scan([Item("a triangle", (), None)], _draw_a_triangle, 1, timeout_s, lambda index, result: None)
    if not result.ok:
        raise RuntimeError(NO_RENDERER.format(reason=result.reason.replace("checking it", "a triangle")))


def _draw_a_triangle(nothing: None) -> None:
    corners = np.array([[[-2.0, 0, -2], [2, 0, -2], [0, 0, 2]]])
    colours = np.full((1, 3, 3), 255, np.uint8)
    with Canvas([Surface(corners, colours)], 1.0, 8) as canvas:
        image = canvas.draw(world_to_camera("front", np.eye(3)), [colours], textured=True)
    if image[4, 4].tolist() != [255, 255, 255, 255]:
        raise ValueError(f"a white triangle comes out as {image[4, 4].tolist()}")


def keep_settings(path: Path, settings: Settings) -> None:
    """Writes the settings, or raises ValueError if the file is there and differs from them."""
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        _write_json(path, wanted)
        return
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: delete the folder {path.parent} and render again") from None
    names = [name for name in {**kept, **wanted} if kept.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(f"{name} was {kept.get(name)!r}, is {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{path.parent} holds objects of other settings: {differing}. Name another folder")


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", type=Path, help="folder of the meshes")
    parser.add_argument("output", type=Path, help="folder of the views")
    parser.add_argument("--views", nargs="+", default=list(VIEWS), metavar="VIEW", help="default: " + ", ".join(VIEWS))
    parser.add_argument("--resolution", type=int, default=512, help="width and height of the images in pixels")
    parser.add_argument(
        "--ortho_scale", type=float, default=1.35, help="their width and height in units of the object's"
    )
    parser.add_argument("--up_axis", default="auto", help="auto (glTF and obj: y, others: z), y or z")
    parser.add_argument("--random_pose", action="store_true", help="turn all cameras of an object together")
    parser.add_argument("--seed", type=int, default=0, help="of --random_pose")
    parser.add_argument("--suffix", default="png", help="png, or webp without loss")
    parser.add_argument("--masks", action="store_true", help="write masks too; alpha tells the same")
    parser.add_argument("--smooth_angle_deg", type=float, default=35.0, help="sharper edges stay sharp; 0 = flat faces")
    parser.add_argument("--supersampling", type=int, default=2, help="rendered pixels per pixel and axis")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="objects rendered at a time")
    parser.add_argument("--timeout_s", type=float, default=300.0, help="how long one object may take")
    arguments = vars(parser.parse_args(argv))
    arguments["resolution_px"] = arguments.pop("resolution")
    arguments["views"] = tuple(arguments["views"])
    try:
        settings = Settings(**{field.name: arguments[field.name] for field in fields(Settings)})
        meshes, output = arguments["meshes"], arguments["output"]
        bad = render_folder(meshes, output, settings, arguments["jobs"], arguments["timeout_s"])
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"render_multiview: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished objects are kept: run it again to go on", file=sys.stderr)
        return 130
    for name, reason in bad.items():
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(json.loads((output / 'objects.json').read_text()))} objects: {output / 'objects.json'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
