"""Examples from folders, files and arrays, and what is said of those that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rpg.generation.examples import read_examples
from rpg.generation.request import requested_conditions
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec

SPEC = ConditionSpec("examples", 4 + 2 + 1, ("cat", "7"))  # images of 2 x 2


def test_folders_of_classes_are_images_in_0_to_1_with_their_classes(tmp_path):
    for name, grey in (("7", 255), ("cat", 51)):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4), grey).save(tmp_path / name / "one.png")
    rows = read_examples(tmp_path, SPEC).tolist()
    assert rows[0] == [1, 1, 1, 1, 0, 1, 1]
    assert rows[1] == pytest.approx([0.2, 0.2, 0.2, 0.2, 1, 0, 1])


def test_images_that_lie_in_the_folder_itself_have_no_class(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert read_examples(tmp_path, SPEC).tolist() == read_examples(tmp_path / "a.png", SPEC).tolist() == [[0] * 6 + [1]]


def test_arrays_and_tables_mean_the_same(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.arange(8).reshape(2, 2, 2), y=np.array([7, 7]))
    (tmp_path / "a.csv").write_text("a,b,label,c,d\n0,1,7,2,3\n4,5,7,6,7\n")
    rows = read_examples(tmp_path / "a.npz", SPEC)
    assert rows.tolist() == read_examples(tmp_path / "a.csv", SPEC).tolist()
    assert rows[1].tolist() == [4, 5, 6, 7, 0, 1, 1]
    assert requested_conditions(rows, 3, SPEC, None).shape == (3, 2 * 7)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "a,b,c,d\n", "no examples"),
        ("a.csv", "a,b,c\n1,2,3\n", "3 values; this generator takes 4"),
        ("a.csv", "a,b,c,d\n1,2,3,x\n", "write numbers"),
        ("a.csv", "a,b,c,d\n1,2,3\n", "other lengths"),
        ("a.csv", "a,b,c,d,class\n1,2,3,4,dog\n", "knows cat, 7"),
        ("a.txt", "", "unknown format"),
        ("a.png", "no image", "not an image that can be read"),
        ("a.npz", "no archive", "save it again"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        read_examples(tmp_path / name, SPEC)


def test_requests_without_examples_or_of_another_size_are_refused():
    for wrong in (None, "a text", [[1.0] * 6], [[float("nan")] * 7]):
        with pytest.raises(InputError, match="examples"):
            requested_conditions(wrong, 1, SPEC, None)
    with pytest.raises(InputError, match="takes examples"):
        read_examples("x.npz", ConditionSpec("vector", 2))
