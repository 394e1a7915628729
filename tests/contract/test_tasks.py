"""What the rest of the product takes for granted of every task."""

import json
import math
import pickle
import subprocess
import sys

import jsonschema
import pytest
import torch

from orchestrator import bundle, predictor, tasks
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks.base import RowError
from tests.fixtures import oracles


@pytest.mark.parametrize("name", tasks.TASKS)
def test_importing_a_task_imports_neither_torch_nor_transformers_nor_ray(name):
    code = f"import sys; from orchestrator.tasks import create; create({name!r}); print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_survives_json_and_pickle(case):
    for task in (tasks.create(case.given), case.task):
        assert tasks.create(json.loads(json.dumps(task.to_json()))) == task
        assert pickle.loads(pickle.dumps(task)) == task


def test_fit_of_a_completed_task_changes_nothing(case):
    assert case.task.fit({"train": case.task.observe(case.clean)}) == case.task


def test_cleaning_is_idempotent_and_gives_roles_with_json_values(case):
    for row in case.clean:
        again = case.task.clean(row)
        assert again == {role: value for role, value in row.items() if role != "row_id"}
        assert again.keys() <= case.task.columns().keys()
        assert json.loads(json.dumps(again)) == again


def test_bad_rows_name_the_column_and_what_was_expected(case):
    for row in case.bad_rows:
        with pytest.raises(RowError) as raised:
            case.task.clean(row)
        assert raised.value.column in case.task.columns()
        assert raised.value.expected
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_observations_of_parts_add_up_to_that_of_the_whole(case):
    def merged(one, other):
        if isinstance(one, dict) or isinstance(other, dict):
            one, other = one or {}, other or {}
            return {key: merged(one.get(key, 0), other.get(key, 0)) for key in one.keys() | other.keys()}
        return one + other

    task = tasks.create(case.given)
    assert merged(task.observe(case.clean[:2]), task.observe(case.clean[2:])) == task.observe(case.clean)
    assert merged(task.observe([]), task.observe(case.clean)) == task.observe(case.clean)


def test_encoding_without_targets_is_encoding_minus_targets(case, processor):
    with_targets = case.task.encode(case.clean, processor)
    without = case.task.encode(case.unlabelled, processor)
    assert len(with_targets) == len(without) == len(case.clean)
    for full, plain in zip(with_targets, without, strict=True):
        assert [{key: one[key] for key in other} for one, other in zip(full, plain, strict=True)] == plain
        assert all(case.task.length(example) > 0 for example in full)


def test_encoding_rows_together_is_encoding_them_one_by_one(case, processor):
    assert case.task.encode(case.clean, processor) == [case.task.encode([row], processor)[0] for row in case.clean]
    assert case.task.encode([], processor) == []


def test_the_loss_is_a_sum_over_items_and_falls(case, model, processor):
    examples = [example for examples in case.task.encode(case.clean, processor) for example in examples]
    with torch.no_grad():
        total, items = case.task.loss(model, case.task.collate(examples, processor))
        parts = [case.task.loss(model, case.task.collate([example], processor)) for example in examples]
    assert float(total) == pytest.approx(sum(float(part) for part, _ in parts), rel=1e-4)
    assert items == pytest.approx(sum(count for _, count in parts))

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        loss, items = case.task.loss(model, case.task.collate(examples, processor))
        optimizer.zero_grad()
        (loss / items).backward()
        optimizer.step()
    assert loss.dtype == torch.float32
    assert loss.item() < 0.8 * total.item()


def test_a_row_alone_and_in_a_batch_get_the_same_output(case, model, processor):
    examples = [example for examples in case.task.encode(case.unlabelled, processor) for example in examples]

    def outputs(group, tokens):
        return predictor.forward(case.task, model, processor, group, tokens=tokens, precision="fp32")

    together = outputs(examples, 10_000)
    for example, expected, small in zip(examples, together, outputs(examples, 1), strict=True):
        [alone] = outputs([example], 10_000)
        assert oracles.differ(alone, expected) < 1e-5
        assert oracles.differ(small, expected) < 1e-5


def test_a_reloaded_bundle_predicts_the_same(case, model, processor, tmp_path):
    examples = [example for examples in case.task.encode(case.unlabelled, processor) for example in examples]
    before = predictor.forward(case.task, model, processor, examples, tokens=4096, precision="fp32")
    folder = Folder(str(tmp_path / "bundle"))
    bundle.write(folder, model=model, processor=processor, task=case.task, job={"name": "contract"}, lineage={}, metrics={})

    loaded = predictor.Predictor(bundle.load(folder.uri), precision="fp32")
    assert loaded.task == case.task
    after = loaded.infer([example for examples in loaded.encode(case.clean) for example in examples])
    assert max(oracles.differ(one, other) for one, other in zip(before, after, strict=True)) < 1e-6

    predictions = loaded(case.clean)
    bundle.complete(
        folder,
        metrics={"test": {}},
        golden=[{"row": row, "prediction": one} for row, one in zip(case.unlabelled, predictions, strict=True)],
    )
    assert predictor.check_golden(predictor.Predictor(bundle.load(folder.uri), precision="fp32"), 1e-5) < 1e-5


def test_predictions_are_json_and_agree_with_themselves_only(case, model, processor):
    found = _predictions(case, model, processor)
    for prediction in found:
        assert json.loads(json.dumps(prediction, allow_nan=False)) == prediction
        assert case.task.agree(prediction, prediction, 1e-9)
        assert case.task.difference(prediction, prediction) == 0
    one, other = found[0], found[1]
    assert not case.task.agree(one, other, case.task.difference(one, other) / 2)


def test_perfect_answers_score_one(case, model, processor):
    perfect = [_perfect(case.task, row) for row in case.clean]
    scores = case.task.score(perfect, case.clean)
    by_loss = {"loss", *case.task.of_loss(1.0)}
    assert case.task.objective in {*scores, *by_loss}
    assert set(scores) <= set(case.task.metrics())
    for name, value in scores.items():
        assert value == pytest.approx(1.0 if case.task.higher_is_better(name) or name == "perplexity" else 0.0), name
    worse = case.task.score(_predictions(case, model, processor), case.clean)
    assert all(math.isfinite(value) for value in worse.values())
    if case.task.objective in scores:
        lost = scores[case.task.objective] - worse[case.task.objective]
        assert lost > 0 if case.task.higher_is_better(case.task.objective) else lost < 0


def test_asking_for_a_metric_gives_that_metric(case):
    perfect = [_perfect(case.task, row) for row in case.clean]
    for name in case.task.metrics():
        assert case.task.score(perfect, case.clean, [name]).keys() <= {name}
    found = case.task.score(perfect, case.clean, [case.task.objective]).keys()
    assert found == {case.task.objective} or (not found and case.task.objective in {"loss", *case.task.of_loss(1.0)})


def test_tables_are_flat(case):
    for lines in case.task.tables([_perfect(case.task, row) for row in case.clean], case.clean).values():
        assert lines
        assert all(isinstance(value, (str, int, float)) for line in lines for value in line.values())
        assert len({tuple(line) for line in lines}) == 1


def test_responses_fit_their_schema(case, model, processor):
    inputs_schema, answer_schema = case.task.inputs_schema(), case.task.answer_schema()
    for schema in (inputs_schema, answer_schema):
        jsonschema.Draft202012Validator.check_schema(schema)
    for inputs in [*case.inputs, case.task.inputs_example()]:
        jsonschema.validate(inputs, inputs_schema)
        rows = case.task.rows_from(inputs)
        answer = case.task.answer(_predictions(case, model, processor, rows), case.task.parameters(), single=not isinstance(inputs, list))
        jsonschema.validate(json.loads(json.dumps(answer, allow_nan=False)), answer_schema)


def test_a_row_asked_for_over_http_is_that_row(case):
    for row in case.unlabelled:
        wanted = {role: value for role, value in row.items() if role != "row_id"}
        assert case.task.rows_from(json.loads(json.dumps(case.task.inputs_from(row)))) == [wanted]


def test_answers_differ_by_what_predictions_differ(case, model, processor):
    answers = [case.task.answer([one], case.task.parameters(), single=True) for one in _predictions(case, model, processor)[:2]]
    assert case.task.answer_difference(answers[0], answers[0]) == 0
    assert case.task.answer_difference(*answers) > 0


def test_inputs_that_do_not_fit_are_refused_with_a_sentence(case):
    for inputs in case.bad_inputs:
        with pytest.raises(InputError, match="inputs"):
            case.task.rows_from(inputs)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(inputs, case.task.inputs_schema())


def _predictions(case, model, processor, rows=None):
    rows = case.unlabelled if rows is None else rows
    encoded = case.task.encode(rows, processor)
    outputs = iter(
        predictor.forward(case.task, model, processor, [example for group in encoded for example in group], tokens=4096, precision="fp32")
    )
    return [case.task.decode(row, [next(outputs) for _ in group]) for row, group in zip(rows, encoded, strict=True)]


def _perfect(task, row):
    """The prediction of a model that knows: by decoding an output that says the right thing as loudly as it can."""
    return task.decode(row, oracles.outputs(task, row))
