"""Solid shapes: signed distances of primitives and meshes, their fields, meshes and views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh

from rpg.labs.fields.config import FieldsConfig
from rpg.labs.fields.data import load_data
from rpg.labs.fields.shapes import CLASSES, EDGE, ball, box, cylinder, mesh_distances, random_shape, torus, write_mesh
from rpg.labs.fields.siren import grid_points
from rpg.labs.fields.task import REACH, FieldsTask, views
from rpg.tasks import build_task
from tokenization.errors import InputError

POINTS = grid_points(9, 9, 9)

PRIMITIVES = {
    "box": (trimesh.creation.box((1.6, 1.2, 0.8)), lambda points: box(points, 0.8, 0.6, 0.4)),
    "ball": (trimesh.creation.icosphere(4, EDGE), lambda points: ball(points, EDGE)),
    "cylinder": (trimesh.creation.cylinder(EDGE, 1.0, sections=256), lambda points: cylinder(points, EDGE, 0.5)),
    "torus": (trimesh.creation.torus(0.55, 0.25, 64, 32), lambda points: torus(points, 0.55, 0.25)),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_distances_of_a_mesh_are_those_of_its_formula(name, tmp_path):
    mesh, formula = PRIMITIVES[name]
    mesh.apply_transform(trimesh.transformations.scale_and_translate(3.0, (5, 6, 7)))  # which is undone
    mesh.export(tmp_path / "mesh.ply")
    assert torch.allclose(mesh_distances(tmp_path / "mesh.ply", POINTS), formula(POINTS), atol=0.005)


def test_a_hole_in_a_mesh_does_not_turn_it_inside_out(tmp_path):
    mesh = trimesh.creation.icosphere(3, EDGE)
    mesh.update_faces(np.arange(len(mesh.faces)) > 5)
    mesh.export(tmp_path / "mesh.stl")
    assert torch.equal(mesh_distances(tmp_path / "mesh.stl", POINTS) < 0, ball(POINTS, EDGE) < 0)


@pytest.mark.parametrize("name", CLASSES)
def test_shapes_of_a_class_differ_and_lie_within_the_frame(name):
    points, rng = grid_points(16, 16, 16), torch.Generator().manual_seed(0)
    first, second = (random_shape(name, rng)(points) < 0 for _ in range(2))
    border = points.abs().amax(-1) > 0.93
    for inside in (first, second):
        assert 0.02 < inside.float().mean() < 0.4 and not inside[border].any()
    assert (first ^ second).sum() > 0.1 * first.sum()


def test_fields_show_their_shapes_and_a_mesh_is_their_surface(tmp_path):
    config = FieldsConfig(
        dimensions=3, data="shapes", image_size=12, num_shapes=48, hidden=32, first_frequency=10, output_scale=100,
        damping=1, altered=1, seed=2,
    )  # fmt: skip
    task = build_task(config)
    assert isinstance(task, FieldsTask)
    zoo = task.collect(tmp_path / "zoo")
    splits = task.data.splits
    assert (
        len(zoo) == 48 + sum(split != "unseen" for split in splits) and task.data.labels.bincount().tolist() == [8] * 6
    )
    field = zoo.state_dict(1)  # a dumbbell
    assert {entry.run for entry in zoo.entries} == set(range(48)) and field["first.weight"].shape == (32, 3)
    # One function at two resolutions: every third point of the fine grid, from the second on, is one of the coarse.
    coarse, fine = task.sample([field], 8)[0, 0], task.sample([field], 24)[0, 0]
    assert torch.allclose(fine[1::3, 1::3, 1::3], coarse, atol=1e-4)
    inside, wanted = task.sample([field], 12)[0, 0] > 0, task.data.values[1, 0] > 0
    assert (inside & wanted).sum() / (inside | wanted).sum() > 0.8
    write_mesh(fine, tmp_path / "field.ply")
    mesh = trimesh.load_mesh(tmp_path / "field.ply")
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(8 * float((fine > 0).float().mean()), rel=0.15)


def test_a_view_of_a_ball():
    drawn = views(lambda points: -ball(points, 0.5)[None], 64)[0, 0]
    radius = (grid_points(64, 64) * REACH).norm(dim=-1).view(64, 64)
    assert (drawn[radius < 0.48] > 0).all() and (drawn[radius > 0.52] == 0).all()
    assert drawn[26, 28] < drawn[38, 36]  # light comes from above


def test_the_surface_that_is_written_is_where_values_change_sign(tmp_path):
    write_mesh(-ball(grid_points(24, 24, 24), 0.6).view(24, 24, 24), tmp_path / "ball.ply")
    mesh = trimesh.load_mesh(tmp_path / "ball.ply")
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.6).max() < 0.01
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)
    with pytest.raises(InputError, match="shows no surface"):
        write_mesh(-torch.ones(4, 4, 4), tmp_path / "none.ply")


def meshes(folder, num=6):
    for name, make in (("ball", trimesh.creation.icosphere), ("box", trimesh.creation.box)):
        (folder / name).mkdir(parents=True)
        for number in range(num):
            make().export(folder / name / f"{number}.{('ply', 'obj', 'stl')[number % 3]}")
    return FieldsConfig(dimensions=3, data=str(folder), image_size=6)


def test_a_folder_of_meshes(tmp_path):
    data = load_data(meshes(tmp_path / "meshes"))
    assert data.values.shape == (12, 1, 6, 6, 6) and data.class_names == ("ball", "box")
    assert data.labels.tolist() == [0] * 6 + [1] * 6 and set(data.splits) == {"train", "validation", "unseen"}
    assert (data.values[:6] > 0).flatten(1).sum(1).unique().numel() == 1  # whatever the format


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "cannot be read as a mesh|holds no triangles"),
        (b"", "cannot be read as a mesh|holds no triangles"),
        (trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]]).export(file_type="ply"), "encloses nothing"),
    ],
)
def test_a_bad_mesh_is_a_mistake(tmp_path, content, message):
    config = meshes(tmp_path / "meshes", 2)
    (tmp_path / "meshes" / "box" / "bad.ply").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_data(config)
    assert "bad.ply" in str(caught.value) and "\n" not in str(caught.value)


def test_data_and_dimensions_must_agree():
    for wrong in ({"data": "shapes"}, {"data": "digits", "dimensions": 3}):
        with pytest.raises(ValueError, match="needs dimensions"):
            FieldsConfig(**wrong)
