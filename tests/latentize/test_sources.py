"""Opening a model: model.py, a Hugging Face directory, a .pt2, and everything that is refused with one line."""

import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from latentize.errors import LatentizeError
from latentize.source_file import open_file
from latentize.source_pt2 import check_archive, copy_graph, load_module
from latentize.sources import as_inputs, check_finite, describe_inputs, open_model, split_model

GOOD = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
    def forward(self, x):
        return self.linear(x)
def build_model(): return Net().eval()
def build_wide(): return Net(6).eval()
def example_inputs(): return (torch.ones(2, 4),)
"""


def write(folder: Path, text: str, name: str = "model.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def fails(path: Path | str, *words: str) -> str:
    with pytest.raises(LatentizeError) as caught:
        open_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert caught.value.exit_code == 2
    return message


def test_model_py_gives_the_model_its_inputs_and_where_it_came_from(tmp_path):
    source = open_model(str(write(tmp_path, GOOD)))
    assert source.form == "file"
    assert source.model(*source.args).shape == (2, 4)
    assert not source.kwargs
    assert source.calibration is None
    assert source.evaluate is None
    assert source.text == str(tmp_path / "model.py")


def test_a_factory_is_named_after_a_colon(tmp_path):
    path = write(tmp_path, GOOD.replace("torch.ones(2, 4)", "torch.ones(2, 6)"))
    source = open_model(f"{path}:build_wide")
    assert source.model.linear.in_features == 6
    assert source.text == f"{path}:build_wide"


def test_dict_inputs_become_keyword_arguments(tmp_path):
    source = open_model(str(write(tmp_path, GOOD.replace("(torch.ones(2, 4),)", "{'x': torch.ones(2, 4)}"))))
    assert source.args == ()
    assert list(source.kwargs) == ["x"]


def test_calibration_data_and_evaluate_are_found_and_guarded(tmp_path):
    text = GOOD + (
        "def calibration_data():\n    yield (torch.ones(1, 4),)\n    raise ValueError('disk of mine failed')\n"
        "def evaluate(model): return {'loss': torch.tensor(0.5)}\n"
    )
    source = open_model(str(write(tmp_path, text)))
    assert source.evaluate(source.model) == {"loss": 0.5}
    batches = iter(source.calibration())
    assert next(batches)[0].shape == (1, 4)
    with pytest.raises(
        LatentizeError, match=r"model\.py:14: ValueError: disk of mine failed \(in calibration_data\(\)\)"
    ):
        next(batches)


def test_evaluate_must_return_numbers_by_name(tmp_path):
    source = open_model(str(write(tmp_path, GOOD + "def evaluate(model): return 0.5\n")))
    with pytest.raises(LatentizeError, match="return a dict of numbers"):
        source.evaluate(source.model)


def test_a_model_in_training_mode_is_switched_and_that_is_said(tmp_path):
    source = open_model(str(write(tmp_path, GOOD.replace("Net().eval()", "Net()"))))
    assert not source.model.training
    assert "training mode" in source.notes[0]


def test_a_compiled_model_is_opened_as_what_it_was_made_from(tmp_path):
    text = GOOD.replace("return Net().eval()", "return torch.compile(Net().eval())")
    source = open_model(str(write(tmp_path, text)))
    assert type(source.model).__name__ == "Net"
    assert not any(name.startswith("_orig_mod") for name in source.model.state_dict())
    assert source.notes == ["build_model() returned a compiled model: the module that it was made from was taken"]
    assert open_model(str(write(tmp_path, GOOD))).notes == []


def test_dataclasses_and_neighbouring_modules_work_in_model_py(tmp_path):
    write(tmp_path, "WIDTH = 4\n", "neighbour_of_model.py")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_model import WIDTH\n"
    )
    text += "@dataclass\nclass Config:\n    width: int = WIDTH\n" + GOOD.replace(
        "Net().eval()", "Net(Config().width).eval()"
    )
    assert open_model(str(write(tmp_path, text))).model.linear.in_features == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build_model(:\n", ("model.py:1", "syntax error")),
        ("x = 1\n", ("no build_model() found", "define")),
        ("import torch\ndef build_model(): return torch.nn.Linear(2, 2)\n", ("no example_inputs() found",)),
        ("\nraise RuntimeError('boom')\n", ("model.py:2: RuntimeError: boom", "importing it")),
        ("def build_model():\n    raise RuntimeError('boom')\n", ("model.py:2: RuntimeError: boom", "build_model()")),
        ("def build_model():\n    raise SystemExit(0)\n", ("model.py:2: SystemExit",)),
        ("def build_model(): return 3\n", ("returned int", "torch.nn.Module")),
        ("build_model = 3\n", ("build_model is a int",)),
        (GOOD.replace("torch.ones(2, 4)", "torch.ones(2, 5)"), ("example inputs", "rejects", "float32 [2, 5]", "2x5")),
        (GOOD.replace("(torch.ones(2, 4),)", "torch.ones(2, 4)"), ("example_inputs()", "a tensor [2, 4]")),
        (
            GOOD.replace("def build_model", "def make_net").replace("def build_wide", "def _wide"),
            ("model.py:make_net",),
        ),
        (
            GOOD.replace("def build_model", "def make_net"),
            ("several candidates", "model.py:make_net", "model.py:build_wide"),
        ),
        ("import does_not_exist_anywhere\n", ("model.py:1: ModuleNotFoundError",)),
    ],
)
def test_a_fault_in_model_py_is_one_line_with_its_place(tmp_path, text, words):
    fails(write(tmp_path, text), *words)


def test_a_missing_factory_is_named(tmp_path):
    fails(f"{write(tmp_path, GOOD)}:build_tiny", "no build_tiny()", "build_model", "build_wide")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.py", ("no such file",)),
        ("weights.bin", ("pickle", "safetensors")),
        ("weights.pt", ("pickle",)),
        ("notes.txt", ("not a model that latentize opens",)),
        ("broken.pt2", ("not a readable .pt2",)),
        ("folder", ("no config.json",)),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path, name, words):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name != "absent.py":
        (tmp_path / name).write_bytes(b"nothing of use")
    fails(tmp_path / name, *words)


def test_only_python_files_have_factories(tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"")
    fails(f"{tmp_path / 'a.pt2'}:build", "only a model.py has factories")


def test_non_finite_weights_are_named_with_their_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    with torch.no_grad():
        model[1][0].weight[0, 0] = float("nan")
        model[1][0].weight[1, 1] = float("inf")
    with pytest.raises(LatentizeError, match=r"block '1\.0': weight 'weight' \[3, 2\] holds 1 NaN and 1 Inf"):
        check_finite(model)


def test_a_copy_of_model_py_finds_its_data_where_the_original_was(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "copy").mkdir()
    (tmp_path / "here" / "width.txt").write_text("4")
    text = "from pathlib import Path\nWIDTH = int((Path(__file__).parent / 'width.txt').read_text())\n"
    original = write(tmp_path / "here", text + GOOD.replace("Net().eval()", "Net(WIDTH).eval()"))
    copied = write(tmp_path / "copy", original.read_text())
    assert open_file(copied, origin=original).model.linear.in_features == 4
    with pytest.raises(LatentizeError, match="width"):
        open_file(copied)


def test_inputs_are_described_in_words():
    assert (
        describe_inputs((torch.ones(2, 3),), {"flag": True, "other": object()})
        == "float32 [2, 3], flag=True, other=object"
    )
    assert as_inputs([1], "x") == ((1,), {})
    assert split_model.__doc__


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x):
        return self.linear(x) * 2 + self.offset


@pytest.fixture
def pt2(tmp_path):
    torch.manual_seed(0)
    model = Doubler().eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(3, 4),), strict=False), path)
    return model, path


def rewrite_archive(path: Path, target: Path, change) -> Path:
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            content = change(name, archive.read(name))
            if content is not None:
                copy.writestr(name, content)
    return target


def test_a_pt2_opens_with_the_inputs_it_was_exported_with(pt2):
    model, path = pt2
    source = open_model(str(path))
    assert source.form == "pt2"
    torch.testing.assert_close(source.model(*source.args), model(*source.args), rtol=0, atol=0)


def test_the_graph_of_a_pt2_is_kept_without_its_weights(pt2, tmp_path):
    model, path = pt2
    copy_graph(path, tmp_path / "graph.pt2")
    check_archive(tmp_path / "graph.pt2")
    module, (args, _) = load_module(tmp_path / "graph.pt2")
    assert not module.linear.weight.any()
    module.load_state_dict(model.state_dict())
    torch.testing.assert_close(module(*args), model(*args), rtol=0, atol=0)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pt2_whose_example_inputs_are_a_pickle_is_refused_and_never_opened(pt2, tmp_path):
    marker = tmp_path / "it ran"
    buffer = io.BytesIO()
    torch.save(((Bomb(marker),), {}), buffer)
    path = rewrite_archive(pt2[1], tmp_path / "bad.pt2", lambda n, c: buffer.getvalue() if "sample_inputs/" in n else c)
    fails(path, "holds a pickle", "sample_inputs")
    assert not marker.exists()


def test_a_pt2_with_pickled_weights_is_refused_and_never_opened(pt2, tmp_path):
    marker = tmp_path / "it ran"

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            config = json.loads(content)
            for payload in config["config"].values():
                payload["use_pickle"] = True
            return json.dumps(config).encode()
        return pickle.dumps(Bomb(marker)) if "weights/weight_" in name else content

    fails(rewrite_archive(pt2[1], tmp_path / "bad.pt2", change), "holds a pickle", "weights")
    assert not marker.exists()


@pytest.mark.parametrize(
    "extra", ["data/constants/opaque_obj_0", "data/weights/model.pt", "data/constants/custom_obj_1"]
)
def test_a_pt2_with_a_pickled_record_is_refused(pt2, tmp_path, extra):
    path = rewrite_archive(pt2[1], tmp_path / "bad.pt2", lambda n, c: c)
    root = zipfile.ZipFile(path).namelist()[0].partition("/")[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{root}/{extra}", b"")
    fails(path, "holds a pickle", extra)


def test_a_pt2_with_compiled_code_is_refused(pt2, tmp_path):
    path = rewrite_archive(pt2[1], tmp_path / "bad.pt2", lambda n, c: c)
    root = zipfile.ZipFile(path).namelist()[0].partition("/")[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{root}/data/aotinductor/model/code.so", b"")
    fails(path, "compiled code")


@pytest.mark.parametrize("target", ["torch.load", "torch.ops.load_library", "_operator.__call__", "torch.hub.load"])
def test_a_pt2_whose_graph_reaches_beyond_operators_is_refused(pt2, tmp_path, target):
    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.mul.Tensor", target.encode()) if "models/" in name else content

    fails(rewrite_archive(pt2[1], tmp_path / "bad.pt2", change), target, "not a tensor operator")


@pytest.mark.parametrize("size", ["exec(chr(49))", "().__class__", "open('x')", "s0.real"])
def test_a_pt2_whose_sizes_are_code_is_refused(tmp_path, size):
    program = torch.export.export(
        Doubler(), (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},), strict=False
    )
    torch.export.save(program, tmp_path / "model.pt2")
    assert open_model(str(tmp_path / "model.pt2")).model(torch.ones(5, 4)).shape == (5, 4)

    def change(name: str, content: bytes) -> bytes:
        if "models/" not in name:
            return content
        graph, replaced = re.subn(rb'"expr_str": "[^"]*"', b'"expr_str": "' + size.encode() + b'"', content)
        assert replaced
        return graph

    fails(rewrite_archive(tmp_path / "model.pt2", tmp_path / "bad.pt2", change), "not arithmetic")


def test_a_pt2_with_two_records_of_one_name_is_refused(pt2, tmp_path):
    path = rewrite_archive(pt2[1], tmp_path / "bad.pt2", lambda n, c: c)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(n for n in archive.namelist() if "sample_inputs" in n)
        archive.writestr(name.upper(), b"")
    fails(path, "repeat")


transformers = pytest.importorskip("transformers")


@pytest.fixture
def checkpoint(tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path / "checkpoint"
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_directory_opens_with_token_ids_of_its_vocabulary(checkpoint):
    source = open_model(str(checkpoint))
    assert source.form == "hf"
    assert type(source.model).__name__ == "Qwen3MoeForCausalLM"
    ids = source.kwargs["input_ids"]
    assert ids.shape == (2, 32)
    assert int(ids.max()) < 50
    assert not source.model.training


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_directory_with_only_pickles_is_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    fails(checkpoint, "pickles", "pytorch_model.bin", "safetensors")


def test_a_directory_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    fails(checkpoint, "no .safetensors file")


def test_code_in_a_directory_is_not_run(checkpoint):
    change_config(checkpoint, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    fails(checkpoint, "'mine'", "auto_map", "not run")


def test_weights_that_do_not_belong_to_the_config_are_refused(checkpoint):
    change_config(checkpoint, num_hidden_layers=2)
    fails(checkpoint, "missing keys", "belong together")


def test_quantised_checkpoints_are_refused(checkpoint):
    change_config(checkpoint, quantization_config={"quant_method": "fp8"})
    fails(checkpoint, "quantised (fp8)")
