"""Augmentation: a function of the row's seed, the right partner, boxes that stay on their objects."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from orchestrator.data.stream import Encoding, lengths, partners
from orchestrator.dropout import RowDropPath, row_keyed, row_keys
from orchestrator.tasks import augmentation, create
from orchestrator.tasks.augmentation import Augment, RandAugment
from orchestrator.tasks.base import PARTNER
from orchestrator.tasks.boxes import BoxAugment
from tests.fixtures.tiny_images import picture, uri


class Processor:
    """Gives pixels of one size, 20 x 16."""

    image_mean = (0.5, 0.5, 0.5)
    _valid_kwargs_names = ()

    def __call__(self, image: Any) -> dict[str, Any]:
        return {"pixel_values": [np.moveaxis(np.asarray(image.resize((20, 16))), -1, 0)]}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(rng().integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("place", range(len(augmentation._OPERATIONS)))
def test_every_operation_changes_or_keeps_a_picture_of_its_size(place: int, mode: str) -> None:
    image = photo().convert(mode)
    for strength in (0.0, 1.0):
        changed = augmentation._operate(image, place, strength, rng())
        assert (changed.size, changed.mode) == (image.size, mode)
    if place and (place, mode) != (7, "L"):  # Grey has no saturation.
        assert changed.tobytes() != image.tobytes()


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    augment = Augment(flip=True, crop=0.3, color=0.4, randaugment=RandAugment())
    made = [[augment.apply(photo(), rng(seed)).tobytes() for seed in range(20)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) == 20


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    assert not Augment()
    assert not BoxAugment()
    assert Augment().apply(photo(), rng()).tobytes() == photo().tobytes()
    assert not create("image-classification").augments
    assert create({"name": "image-classification", "augment": {"mixup": 0.2}}).mixes


def test_a_crop_keeps_its_share_and_stays_inside() -> None:
    for seed in range(200):
        left, top, right, bottom = augmentation.resized_crop((40, 24), 0.3, rng(seed))
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 24
        assert (right - left) * (bottom - top) >= 0.2 * 40 * 24
    assert augmentation.resized_crop((1, 1), 0.1, rng()) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_share_of_a_mixture_is_what_is_seen_of_each(kind: str) -> None:
    one, other = np.full((3, 20, 30), 200, np.uint8), np.zeros((3, 20, 30), np.uint8)
    shares = []
    for seed in range(100):
        mixed, share = Augment.parse({kind: 1.0}).mix(one, other, rng(seed))
        assert mixed.dtype == np.uint8
        assert mixed.mean() / 200 == pytest.approx(share, abs=0.005)
        shares.append(share)
    assert 0.3 < np.mean(shares) < 0.8
    assert (one == 200).all()


# ---- in the task ---------------------------------------------------------------------------------------------
def rows(count: int = 12) -> list[dict[str, Any]]:
    colours = [(200, 20, 20), (20, 200, 20), (20, 20, 200)]
    return [{"image": uri(picture(colours[n % 3])), "label": "abc"[n % 3], "row_id": f"r:{n}"} for n in range(count)]


def fitted(**fields: Any) -> Any:
    task = create({"name": "image-classification", **fields})
    return task.fit({"train": task.observe(rows())})


def test_a_row_is_mixed_with_its_partner_and_so_is_its_label() -> None:
    task = fitted(augment={"mixup": 1.0})
    red, green, *_ = rows()
    [[mixed]], [[same]] = (task.encode_to_train([{**red, PARTNER: green}], Processor(), [5]) for _ in range(2))
    assert mixed == same
    share = mixed["labels"][0]
    assert mixed["labels"] == pytest.approx([share, 1 - share, 0])
    pixel = np.frombuffer(mixed["pixels"], np.uint8).reshape(mixed["shape"])[:, 0, 0]
    assert pixel == pytest.approx([share * 200 + (1 - share) * 20, share * 20 + (1 - share) * 200, 20], abs=1)
    [[alone]] = task.encode_to_train([red], Processor(), [5])
    assert alone["labels"] == [1.0, 0.0, 0.0]
    assert task.encode([red], Processor())[0][0]["labels"] == 0


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 3.0)])
def test_shares_of_labels_cost_what_the_labels_cost(weights: Any) -> None:
    class Model:
        def __call__(self, pixel_values: torch.Tensor) -> Any:
            return type("Output", (), {"logits": torch.tensor([[1.0, 2.0, -1.0], [0.3, 0.1, 0.7]])})

    task = fitted().model_copy(update={"weights": weights})
    for smoothing in (0.0, 0.1):
        hard = task.loss(Model(), {"pixel_values": torch.zeros(2), "labels": torch.tensor([0, 2])}, label_smoothing=smoothing)
        soft = task.loss(Model(), {"pixel_values": torch.zeros(2), "labels": torch.eye(3)[[0, 2]]}, label_smoothing=smoothing)
        assert float(hard[0]) == pytest.approx(float(soft[0]), rel=1e-5)
        assert hard[1] == pytest.approx(soft[1])


def test_partners_are_others_and_each_is_one() -> None:
    for count in (2, 3, 50):
        found = partners(count, [1, 2, 3])
        assert sorted(found) == list(range(count))
        assert (found != np.arange(count)).all()
    assert partners(1, [0, 0, 0]).tolist() == [0]
    assert partners(0, [0, 0, 0]).tolist() == []
    assert partners(50, [1, 2, 3]).tolist() != partners(50, [1, 3, 3]).tolist()


def encodings(folder: Path, task: Any, world: int) -> dict[str, Any]:
    """Row -> its examples in the first epoch, read by so many workers."""
    table = pa.Table.from_pylist(rows()).append_column("_row", pa.array(range(12)))
    pq.write_table(table, folder / "part.parquet")
    import pickle

    found = {}
    for rank in range(world):
        order = {"seed": 3, "global_batch": 4, "group_by_length": True}
        encoding = Encoding(str(folder), ("part.parquet",), (12,), task, pickle.dumps(Processor()), rank, world, **order)
        table = encoding.encode(encoding.read(0, 0, 0, 12), with_rows=False)
        found |= dict(zip(table["row_id"].to_pylist(), table["examples"].to_pylist(), strict=True))
    return found


def test_partners_and_draws_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    task = fitted(augment={"flip": True, "crop": 0.5, "mixup": 0.4, "cutmix": 1.0})
    one, three = encodings(tmp_path, task, 1), encodings(tmp_path, task, 3)
    assert len(one) == 12
    assert one == three


def test_images_have_no_lengths_by_which_a_class_would_stand_together() -> None:
    assert (lengths(pa.Table.from_pylist(rows()), fitted()) == 0).all()


# ---- boxes ---------------------------------------------------------------------------------------------------
def test_boxes_move_with_what_is_in_them() -> None:
    augment = BoxAugment(flip=True, crop=0.4, scale=0.6)
    kinds = set()
    for seed in range(200):
        array = np.zeros((60, 80, 3), np.uint8)
        array[10:30, 8:40], array[40:55, 50:75] = (255, 0, 0), (0, 255, 0)
        boxes = np.array([[8, 10, 40, 30], [50, 40, 75, 55]], dtype=float)
        image, moved, kept = augment.apply(Image.fromarray(array), boxes, rng(seed))
        assert len(kept) >= 1
        kinds.add((image.size, len(kept)))
        pixels = np.asarray(image).astype(int)
        for (left, top, right, bottom), place in zip(moved, kept, strict=True):
            assert 0 <= left < right <= image.width
            assert 0 <= top < bottom <= image.height
            inside = pixels[int(top) + 1 : int(bottom) - 1, int(left) + 1 : int(right) - 1]
            if inside.size:
                assert (inside.argmax(axis=-1) == place).mean() > 0.9
    assert len(kinds) > 20
    assert boxes.tolist() == [[8, 10, 40, 30], [50, 40, 75, 55]]


def test_an_image_without_boxes_is_changed_as_well() -> None:
    image, boxes, kept = BoxAugment(crop=0.2, flip=True, scale=0.5, color=0.5).apply(photo(), np.zeros((0, 4)), rng(1))
    assert image.size != photo().size
    assert boxes.shape == (0, 4)
    assert len(kept) == 0


# ---- stochastic depth ----------------------------------------------------------------------------------------
def test_stochastic_depth_drops_a_row_as_a_whole_whatever_is_in_the_batch() -> None:
    from transformers.models.convnext.modeling_convnext import ConvNextDropPath

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ConvNextDropPath(0.5))
    with row_keyed(model, 1) as keys:
        assert isinstance(model[1], RowDropPath)
        model.train()
        wanted = row_keys(1, 1, [f"r:{n}" for n in range(64)])
        keys.set(wanted, torch.device("cpu"))
        whole = model[1](torch.ones(64, 3, 2, 2))
        keys.set(wanted[10:12], torch.device("cpu"))
        assert torch.equal(model[1](torch.ones(2, 3, 2, 2)), whole[10:12])
        assert set(whole.amax(dim=(1, 2, 3)).tolist()) == {0.0, 2.0}
        assert torch.equal(whole.amax(dim=(1, 2, 3)), whole.amin(dim=(1, 2, 3)))
        model.eval()
        assert torch.equal(model[1](torch.ones(64, 3)), torch.ones(64, 3))
    assert isinstance(model[1], ConvNextDropPath)
