"""The report as data: round trips, the committed schema and its document, writing whole or not at all."""

import dataclasses
import errno
import json
import math
import os
import re
import typing
from pathlib import Path

import pytest
import torch

from latentize import report
from latentize.blocks import Block, Probe
from latentize.errors import LatentizeError, ResourceError
from latentize.load_balance import ExpertLoad
from latentize.report import BlockRecord, Environment, Errors, Model, Report, Stage
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

DOCS = Path(__file__).resolve().parents[2] / "docs"


def small_report(**changes):
    spec = MoESpec(RouterSpec(torch.zeros(4, 6), 2), ExpertsSpec(torch.zeros(4, 5, 6), torch.zeros(4, 6, 5)))
    block = Block("layers.0", "moe", spec=spec, max_error=1e-7, evidence=(Probe("one token", 1, 1e-7, 2e-7),))
    record = BlockRecord.of(block, errors=Errors(0.2, 0.1), load_before=ExpertLoad.of([3, 1, 0, 4], 4))
    refused = BlockRecord.of(Block("layers.1", "refused", "every token reaches every expert"))
    values = {
        "tool_version": "0.1.0",
        "model": Model("python", "net", "Net", 10, 12, 40, 48),
        "environment": Environment.here(),
        "recipe": {"compression": 2.0, "include": ["*"], "latent_dim": None},
        "blocks": (record, refused),
    }
    return Report(**(values | changes))


def dataclasses_of(cls, found=None):
    """Every dataclass that a report is made of, by name."""
    found = {} if found is None else found
    found[cls.__name__] = cls
    todo = list(typing.get_type_hints(cls).values())
    while todo:
        hint = todo.pop()
        todo.extend(typing.get_args(hint))
        if dataclasses.is_dataclass(hint) and hint.__name__ not in found:
            dataclasses_of(hint, found)
    return found


def test_a_report_comes_back_from_json_as_it_was():
    made = small_report(stages=(Stage("load", 0.5, 1000),), warnings=("one — two",))
    assert report.from_json(report.to_json(made)) == made


def test_the_record_of_a_block_says_what_it_computes_and_its_sizes():
    record = small_report().blocks[0]
    assert record.computes == "softmax → top-2; N 4 experts 6→5→6, silu"
    assert dataclasses.astuple(record.sizes) == (6, 5, 4, 2, 6)
    assert small_report().rewritten == ()


def test_what_is_not_finite_is_written_as_a_word_and_read_back():
    text = report.to_json(small_report(stages=(Stage("a", math.inf), Stage("b", -math.inf), Stage("c", math.nan))))
    assert [stage["seconds"] for stage in json.loads(text)["stages"]] == ["Infinity", "-Infinity", "NaN"]
    assert [stage.seconds for stage in report.from_json(text).stages[:2]] == [math.inf, -math.inf]
    assert math.isnan(report.from_json(text).stages[2].seconds)


def test_what_was_not_measured_stays_none():
    raw = json.loads(report.to_json(small_report()))
    assert all(raw[name] is None for name in ("calibration", "evaluation", "outputs", "latency", "onnx"))
    assert raw["blocks"][1]["max_error"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.pop("model"), "field model"),
        (lambda raw: raw["blocks"][0].update(max_error="small"), r"field blocks\.0\.max_error"),
        (lambda raw: raw.update(schema_version=2), "schema version 2, expected 1"),
        (lambda raw: raw.pop("schema_version"), "schema version None"),
    ],
)
def test_a_report_that_is_damaged_or_of_another_version_is_refused_by_field(change, message):
    raw = json.loads(report.to_json(small_report()))
    change(raw)
    with pytest.raises(LatentizeError, match=message):
        report.from_json(json.dumps(raw))


def test_fields_of_a_later_release_are_ignored():
    raw = json.loads(report.to_json(small_report())) | {"colour": "blue"}
    assert report.from_json(json.dumps(raw)) == small_report(environment=report.from_json(json.dumps(raw)).environment)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_text_that_is_no_report_is_refused(text):
    with pytest.raises(LatentizeError, match=r"report\.json"):
        report.from_json(text)


def test_the_committed_json_schema_is_that_of_the_dataclasses():
    committed = json.loads((DOCS / "report-schema.json").read_text())
    assert committed == report.json_schema(), "write docs/report-schema.json anew from latentize.report.json_schema()"


def test_the_json_schema_has_every_field_that_is_written():
    definitions = report.json_schema()
    for name, cls in dataclasses_of(Report).items():
        described = definitions if name == "Report" else definitions["$defs"][name]
        assert set(described["properties"]) == {f.name for f in dataclasses.fields(cls)}, name
    written = json.loads(report.to_json(small_report()))
    assert set(written) == set(definitions["properties"])
    assert next(iter(written)) == "schema_version"


def test_the_document_describes_every_field_with_its_type():
    text = (DOCS / "report-schema.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    expected = dataclasses_of(Report)
    assert set(sections) == set(expected)
    for name, cls in expected.items():
        rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", sections[name], flags=re.MULTILINE)
        found = [(field, kind.replace(r"\|", "|")) for field, kind, meaning in rows if meaning.strip()]
        assert found == [(f.name, f.type) for f in dataclasses.fields(cls)], name
    assert f"version **{report.SCHEMA_VERSION}**" in text


def test_both_files_are_written_and_read_back(tmp_path):
    pytest.importorskip("jinja2")
    made = small_report()
    paths = report.write(made, tmp_path / "new")
    assert [path.name for path in paths] == ["report.json", "report.html"]
    assert report.read(tmp_path / "new") == made
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_a_full_disk_leaves_the_old_report_whole_and_nothing_else(tmp_path, monkeypatch):
    report.write(small_report(), tmp_path)
    before = (tmp_path / "report.json").read_text()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match=r"report\.json and report\.html: the disk is full") as raised:
        report.write(small_report(tool_version="9"), tmp_path)
    assert raised.value.exit_code == 5
    assert (tmp_path / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_disk_with_room_for_one_of_both_files_keeps_both_as_they_were(tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    report.write(small_report(), tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    written, sync = [], os.fsync

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match=r"report\.html: the disk is full; what was there"):
        report.write(small_report(tool_version="9"), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_folder_without_a_report_is_said(tmp_path):
    with pytest.raises(LatentizeError, match=r"cannot be read \(No such file"):
        report.read(tmp_path)
