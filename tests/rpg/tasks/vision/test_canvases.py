import torch
from torchvision.ops import box_iou, masks_to_boxes

from rpg.labs.vision.detection_data import make_canvases


def test_boxes_are_the_bounds_of_masks_that_never_overlap():
    for canvas in make_canvases("train", 40, size=64):
        assert canvas.image.shape == (3, 64, 64)
        assert canvas.image.min() >= 0
        assert canvas.image.max() <= 1
        assert 1 <= len(canvas.boxes) == len(canvas.labels) == len(canvas.masks) <= 3
        assert canvas.masks.sum(0).max() == 1
        bounds = masks_to_boxes(canvas.masks)
        bounds[:, 2:] += 1  # the last pixel is part of the digit
        assert torch.equal(canvas.boxes, bounds)
        assert box_iou(canvas.boxes, canvas.boxes).fill_diagonal_(0).max() == 0
        assert set(canvas.label_map().unique().tolist()) == {0, *(canvas.labels + 1).tolist()}
        inside, outside = canvas.image[:, canvas.masks.any(0)].mean(), canvas.image[:, ~canvas.masks.any(0)].mean()
        assert inside > outside + 0.2


def test_a_canvas_depends_on_seed_split_and_place_alone():
    few, many, other = make_canvases("test", 2), make_canvases("test", 5), make_canvases("test", 2, seed=1)
    assert all(torch.equal(a.image, b.image) for a, b in zip(few, many, strict=False))
    assert not torch.equal(few[0].image, other[0].image)
    assert not torch.equal(few[0].image, make_canvases("validation", 1)[0].image)


def test_every_digit_occurs():
    labels = torch.cat([canvas.labels for canvas in make_canvases("validation", 60)])
    assert torch.bincount(labels, minlength=10).min() > 0
