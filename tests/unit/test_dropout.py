import torch

from orchestrator.dropout import Keys, RowDropout, row_keyed, row_keys
from tests.unit import tiny


def layer(rate: float = 0.25, layers: int = 2, place: int = 0) -> tuple[RowDropout, Keys]:
    keys = Keys(seed=1)
    keys.layers = layers
    return RowDropout(rate, place, keys), keys


def drop(module: RowDropout, keys: Keys, ids: list[int], width: int, features: int = 33) -> torch.Tensor:
    keys.set(ids, torch.device("cpu"))
    return module(torch.ones(len(ids), width, features))


def test_a_row_loses_the_same_whatever_stands_beside_it_and_however_it_is_padded() -> None:
    module, keys = layer()
    together = drop(module, keys, [7, -3, 11], 9)
    assert torch.equal(drop(module, keys, [11], 9)[0], together[2])
    assert torch.equal(drop(module, keys, [-3, 7], 4), together[[1, 0], :4])
    assert torch.equal(drop(module, keys, [7], 20)[:, :9], together[:1])


def test_rows_layers_and_steps_lose_different_elements() -> None:
    module, keys = layer()
    other = RowDropout(0.25, 1, keys)
    made = drop(module, keys, [7, 8], 50)
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(other(torch.ones(2, 50, 33)), made)
    assert row_keys(1, 5, ["a", "b"]) != row_keys(1, 6, ["a", "b"])
    assert row_keys(2, 5, ["a"]) != row_keys(1, 5, ["a"])
    first, second = row_keys(1, 5, ["a", "a"])
    assert first != second


def test_the_share_dropped_is_the_rate_and_the_mean_stays() -> None:
    module, keys = layer(0.1)
    made = drop(module, keys, list(range(64)), 64, 128)
    assert abs(float((made == 0).float().mean()) - 0.1) < 0.002
    assert abs(float(made.mean()) - 1) < 0.002
    kept = (made != 0).double() - 0.9
    for one, other in ((kept[:, :, :-1], kept[:, :, 1:]), (kept[:-1], kept[1:]), (kept[:, :-1], kept[:, 1:])):
        assert abs(float((one * other).mean())) / 0.09 < 0.01  # Neighbours are not correlated.


def test_other_shapes_fall_back_to_torch_and_evaluation_drops_nothing() -> None:
    module, keys = layer(0.5)
    keys.set([1, 2], torch.device("cpu"))
    torch.manual_seed(0)
    flat = module(torch.ones(6, 4))
    torch.manual_seed(0)
    assert torch.equal(flat, torch.nn.functional.dropout(torch.ones(6, 4), 0.5))
    assert torch.equal(module.eval()(torch.ones(2, 4)), torch.ones(2, 4))


def test_the_model_is_put_back() -> None:
    model = tiny.bert(dropout=0.3)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with row_keyed(model, 1) as keys:
        assert keys.layers > 5
        assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Dropout and module.p > 0]
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert model.bert.embeddings.dropout.p == 0.3
