"""The measuring itself: order, counts, quartiles, what is said when something cannot be measured."""

import gc
import time

import pytest
import torch
from torch import nn

from latentize.bench import Latency, Timing, bench_models, bench_onnx, latency
from latentize.inputs import Inputs


def test_calls_are_interleaved_in_turning_order_and_warmup_is_not_counted():
    order = []
    timings = latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=4, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert {name: timing.repeats for name, timing in timings.items()} == {"a": 4, "b": 4}


def test_the_median_is_between_the_quartiles_and_about_what_was_slept():
    timings = latency({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, repeats=7, warmup=1)
    for timing in timings.values():
        assert timing.q25_ms <= timing.median_ms <= timing.q75_ms
    assert timings["short"].median_ms >= 1
    assert timings["long"].median_ms > 2 * timings["short"].median_ms


def test_garbage_collection_is_as_before_even_after_a_failure():
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        latency({"fails": fail}, warmup=0)
    assert gc.isenabled()


def test_a_row_has_its_ratio_only_when_both_sides_were_measured():
    fast, slow = Timing(1.0, 1.0, 1.0, 3), Timing(2.0, 2.0, 2.0, 3)
    assert Latency.of("torch", 1, {"original": slow, "rewritten": fast}).ratio == 0.5
    assert Latency.of("torch", 1, {"rewritten": fast}, "why").ratio is None


def test_models_are_timed_at_each_length_in_eval_mode_and_left_as_found():
    original, rewritten = nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    modes = []
    original.register_forward_hook(lambda *_: modes.append((original.training, torch.is_grad_enabled())))

    def make_inputs(tokens):
        return Inputs((torch.randn(1, tokens, 4),)) if tokens < 100 else "the model takes 64 tokens"

    models = {"original": original, "rewritten": rewritten}
    rows = bench_models(models, make_inputs, (1, 5, 256), repeats=3, warmup=1)
    assert [row.tokens for row in rows] == [1, 5, 256]
    assert all(row.original and row.rewritten and row.ratio for row in rows[:2])
    assert rows[2].original is None
    assert rows[2].note == "the model takes 64 tokens"
    assert set(modes) == {(False, False)}
    assert original.training
    assert rewritten[0].training


def _export(path, width=4):
    pytest.importorskip("onnxruntime")
    helper = pytest.importorskip("onnx").helper
    float32 = 1
    x = helper.make_tensor_value_info("x", float32, ["t", width])
    y = helper.make_tensor_value_info("y", float32, ["t", width])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_exported_graphs_are_timed_and_a_missing_original_is_said(tmp_path):
    path = _export(tmp_path / "model.onnx")
    rows = bench_onnx({"rewritten": path}, lambda t: Inputs((torch.randn(t, 4),)), (1, 3), repeats=3, warmup=1)
    assert [(row.backend, row.tokens, row.original) for row in rows] == [("onnxruntime", t, None) for t in (1, 3)]
    assert all(row.rewritten is not None and row.rewritten.median_ms > 0 for row in rows)
    assert "no exported graph of the original" in rows[0].note


def test_a_graph_that_does_not_run_is_noted_and_the_other_is_timed(tmp_path):
    good, bad = _export(tmp_path / "good.onnx"), _export(tmp_path / "bad.onnx", width=5)
    paths = {"original": good, "rewritten": bad}
    row = bench_onnx(paths, lambda t: Inputs((torch.randn(t, 4),)), (3,), repeats=2, warmup=0)[0]
    assert row.original is not None
    assert row.rewritten is None
    assert row.ratio is None
    assert row.note.startswith("the rewritten graph does not run: ")
    assert "Expected: 5" in row.note
    both = bench_onnx({"original": bad, "rewritten": bad}, lambda t: Inputs((torch.randn(t, 4),)), (3,))[0]
    assert both.original is both.rewritten is None


def test_inputs_that_do_not_fit_the_graph_are_noted_by_name(tmp_path):
    path = _export(tmp_path / "model.onnx")
    two = Inputs((torch.randn(1, 4), torch.randn(1, 4)))
    row = bench_onnx({"rewritten": path}, lambda t: two, (1,), repeats=1, warmup=0)[0]
    assert row.rewritten is None
    assert "1 tensors (x) and the inputs hold 2" in row.note
