"""The page and its figures: self-contained, escaped, honest about what was not measured, and right in its sentences."""

import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from latentize import plots, report_html
from latentize.bench import Latency, Timing
from latentize.blocks import Probe
from latentize.compare import Evaluation, Gate, OutputAgreement
from latentize.comparison import Comparison
from latentize.errors import MissingExtraError
from latentize.load_balance import ExpertLoad
from latentize.report import (
    BlockRecord,
    Calibration,
    Environment,
    Errors,
    File,
    Model,
    OnnxAgreement,
    Plan,
    Report,
    Sizes,
    Stage,
)

VOID = {"meta", "br", "wbr", "path", "use", "img", "link", "input", "hr"}


def block(index, latent=64, spectrum=True):
    values = tuple(30 * math.exp(-i / 20) + 0.1 for i in range(128)) if spectrum else None
    plan = Plan(128, latent, 16, 16, 4, 4, 400_000, 230_000, 4096, 2048, 1_600_000, 850_000, 200_000, 130_000,
                0.2, values, 65_536)  # fmt: skip
    return BlockRecord(
        f"model.layers.{index}.mlp", "moe", "", "softmax → top-4; N 16 experts 128→64→128, silu GLU",
        Sizes(128, 64, 16, 4, 128), 2e-7, (Probe("one token", 1, 1e-7, 2e-7),), plan, Errors(0.2, 0.15, 0.1),
        ExpertLoad.of([9, 4, 3, 8], 6), ExpertLoad.of([9, 0, 7, 8], 6),
    )  # fmt: skip


def timing(median):
    return Timing(median, 0.9 * median, 1.2 * median, 30)


def full_report(**changes):
    refused = BlockRecord("model.attn", "refused", "every token reaches <all> experts & none is left out")
    latency = [
        Latency.of(backend, tokens, {"original": timing(speed * tokens), "rewritten": timing(0.5 * speed * tokens)})
        for backend, speed in (("torch", 2.0), ("onnxruntime", 0.5))
        for tokens in (1, 16)
    ]
    values = {
        "tool_version": "0.1.0",
        "model": Model("model.py", "samples/net.py", "Net", 1000, 900, 4000, 3600),
        "environment": Environment("3.11", "2.13", "Linux", "a CPU", 2, "2026-01-01T00:00:00+00:00"),
        "recipe": {"compression": 2.0, "variant": "fixed", "latent_dim": None, "include": ["*"], "exclude": []},
        "blocks": (block(0), block(1), refused),
        "calibration": Calibration(10, 20_000, 600),
        "evaluation": Evaluation({"bits per byte": 1.8351}, {"bits per byte": 1.8424}, {"bits per byte": 1.87}),
        "outputs": OutputAgreement(100, 1.0, 0.07, 0.99, 0.01, 0.1, 0.5, 0.95),
        "latency": tuple(latency),
        "onnx": (OnnxAgreement("rewritten", 1, 2e-7, 1e-5, passed=True),),
        "gates": (Gate.of("relative rise of bits per byte", 0.004, 0.01),),
        "stages": (Stage("load", 1.5, 10**9), Stage("heal", 181.0, None)),
        "warnings": ("2 experts saw no token",),
        "files": (File("model.onnx", "the graph", 8_000_000),),
    }
    return Report(**(values | changes))


def bare_report():
    """What is known without data, evaluation, export or timing."""
    blocks = tuple(
        replace(b, errors=None, load_before=None, load_after=None) for b in (block(0, spectrum=False), block(1))
    )
    return full_report(
        blocks=blocks, calibration=None, evaluation=None, outputs=None, latency=None, onnx=None, gates=(),
        stages=(), warnings=(), files=(),
    )  # fmt: skip


class Page(HTMLParser):
    """Checks that every element is closed, and collects the words, ids and references."""

    def __init__(self, html):
        super().__init__()
        self.open, self.words, self.ids, self.references = [], [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def html():
    return report_html.render(full_report())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_is_one_file_without_scripts_or_anything_fetched(html, page):
    assert "<script" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    assert {ref for ref in page.references if not ref.startswith("#")} == {"model.onnx"}


def test_every_id_is_unique_and_every_reference_within_the_page_is_met(html, page):
    assert len(page.ids) == len(set(page.ids))
    inner = {ref[1:] for ref in page.references if ref.startswith("#")}
    inner |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert inner <= set(page.ids)


def test_every_section_and_figure_is_there(html, page):
    for section in ("found", "plan", "errors", "accuracy", "load", "latency", "onnx", "limits", "run"):
        assert section in page.ids
    figures = re.findall(r'role="img" aria-label="([^"]*)"', html)
    kinds = ("singular spectrum", "relative error", "bits per byte against", "expert load", "latency in")
    assert [sum(kind in figure for figure in figures) for kind in kinds] == [2, 1, 1, 2, 2]


def test_figures_take_their_colours_from_the_page_and_so_follow_light_and_dark(html):
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    for svg in svgs:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r'(href="#|url\(#)[^")]*', "", svg))
        assert "var(--" in svg
    css = html[html.index("<style>") : html.index("</style>")]
    dark = css[css.index("prefers-color-scheme: dark") :]
    for name in set(re.findall(r"var\(--([a-z]+)\)", "".join(svgs))):
        assert f"--{name}:" in css[: css.index("prefers-color-scheme: dark")]
        assert f"--{name}:" in dark


def test_what_a_model_says_is_escaped(page):
    assert "every token reaches <all> experts & none is left out" in page.text
    model = replace(full_report().model, name="<b>x</b>.py")
    html = report_html.render(replace(bare_report(), warnings=("<img src=x onerror=alert(1)>",), model=model))
    assert "<img" not in html
    assert "<b>x</b>" not in html


def test_what_was_not_measured_is_said_and_no_number_is_made_up():
    html = report_html.render(bare_report())
    page = Page(html)
    unmeasured = re.findall(r"([A-Z][^.<>]*): not measured\.", page.text)
    assert len(unmeasured) == 7
    assert "bits per byte" not in page.text
    assert " ms" not in page.text
    for limit in ("No calibration data", "Accuracy was not measured", "Latency was not measured", "No ONNX graph"):
        assert limit in page.text


def test_the_headline_states_cost_and_gain():
    assert report_html.headline(full_report()) == (
        "Bits per byte rose by 0.4 %, 1.8351 → 1.8424; routed weights read for one token fell from 800\u00a0kB to "
        "460\u00a0kB (÷\u00a01.74); one token 2.00\u00a0× faster (onnxruntime)."
    )


def test_the_headline_compares_the_fastest_backend_of_each_model():
    rows = (
        Latency.of("torch", 1, {"original": timing(1.0), "rewritten": timing(4.0)}),
        Latency.of("onnxruntime", 1, {"original": timing(9.0), "rewritten": timing(3.0)}),
    )
    assert "one token 3.00\u00a0× slower (onnxruntime against torch)" in report_html.headline(full_report(latency=rows))


@pytest.mark.parametrize(
    "after, words", [(1.8, "fell by 1.9 %"), (1.8351, "stayed, "), (math.nan, "of the rewritten model is not finite")]
)
def test_the_headline_follows_the_evaluation(after, words):
    evaluation = Evaluation({"bits per byte": 1.8351}, {"bits per byte": after})
    assert words in report_html.headline(full_report(evaluation=evaluation))
    Page(report_html.render(replace(bare_report(), evaluation=evaluation)))


def test_a_difference_within_the_spread_of_the_runs_is_called_none():
    rows = (Latency.of("torch", 1, {"original": timing(1.0), "rewritten": timing(1.1)}),)
    assert "one token takes as long as before (torch, within the spread" in report_html.headline(
        full_report(latency=rows)
    )
    assert report_html.told_apart(timing(1.0), timing(2.0))
    assert not report_html.told_apart(timing(1.0), None)


def test_nothing_rewritten_is_a_page_too():
    only_refused = full_report(blocks=full_report().blocks[2:], evaluation=None, latency=None, onnx=None)
    assert report_html.headline(only_refused).startswith("Nothing was rewritten")
    page = Page(report_html.render(only_refused))
    assert "model. attn" in page.text
    assert "plan" not in page.ids
    Page(report_html.render(full_report(blocks=())))


def test_gates_of_one_kind_that_held_are_one_sentence_with_the_closest_call():
    gates = (Gate.of("ONNX, T = 1", 1e-7, 1e-5), Gate.of("ONNX, T = 16", 1.6e-6, 1e-5), Gate.of("rise", 0.1, 0.01))
    sentences = list(report_html.passed_gates(replace(bare_report(), gates=gates)))
    assert sentences == ["Gate passed: ONNX (2 comparisons, the worst) is 1.6 · 10⁻⁶, allowed 1.0 · 10⁻⁵."]


def test_a_failed_gate_is_called_failed():
    page = Page(report_html.render(replace(bare_report(), gates=(Gate.of("rise", math.nan, 0.01),))))
    assert "Gate failed: rise is NaN, allowed 0.0100" in page.text


def test_a_failed_gate_of_a_comparison_is_called_failed_and_what_was_not_made_has_no_number():
    gates = (Gate.of_agreement("onnxruntime", 2e-5, 1e-5), Gate.unmade("TensorRT engine"), Gate.of("rise", 0.0, 0.1))
    made = Comparison("2026-01-02T03:04:05", ("torch",), None, (), (), {}, (), (), (), {}, gates)
    page = Page(report_html.render(replace(bare_report(), comparison=made)))
    assert "Gate failed: onnxruntime is 2.0 · 10⁻⁵, allowed 1.0 · 10⁻⁵." in page.text
    assert "Gate failed: TensorRT engine: none could be made." in page.text
    assert page.text.count("Gate failed") == 2


def test_sixty_blocks_share_one_spectrum_and_a_dozen_loads():
    html = report_html.render(full_report(blocks=tuple(block(i) for i in range(60)), latency=None))
    figures = re.findall(r'role="img" aria-label="([^"]*)"', html)
    assert sum("spectr" in figure for figure in figures) == 1
    assert sum("expert load" in figure for figure in figures) == report_html.MANY_BLOCKS
    assert "the 12 least even of 60 blocks" in html
    assert len(html) < 1_500_000


def test_drawing_is_deterministic_and_leaves_matplotlibs_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    assert plots.spectrum(block(0)) == plots.spectrum(block(0))
    assert dict(mpl.rcParams) == before


def test_kept_energy_is_the_share_of_squares():
    assert plots.kept_energy((3.0, 4.0, 0.0), 1) == 9 / 25
    assert plots.kept_energy((), 1) == 1.0


@pytest.mark.parametrize(
    "names, short, pattern",
    [
        (["model.layers.0.mlp", "model.layers.1.mlp"], ["0", "1"], "model.layers.*.mlp"),
        (["a.moe", "b.c.moe"], ["a", "b.c"], "*.moe"),
        (["moe"], ["moe"], ""),
        (["a.b", "a"], ["a.b", "a"], ""),
        ([], [], ""),
    ],
)
def test_names_are_shortened_to_what_tells_them_apart(names, short, pattern):
    assert plots.short_names(names) == (short, pattern)


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (1.83512, 4, "1.8351"), (0.9975, 4, "0.9975"), (42.123, 3, "42.1"), (2.4e-7, 2, "2.4 · 10⁻⁷"),
        (0.0, 3, "0.00"), (-0.5, 2, "−0.50"), (1234.6, 3, "1235"), (3e9, 3, "3.0 · 10⁹"), (None, 3, "–"),
        (math.inf, 3, "∞"), (math.nan, 3, "NaN"),
    ],
)  # fmt: skip
def test_numbers_read_well(value, digits, text):
    assert report_html.number(value, digits) == text


def test_sizes_and_counts_read_well():
    assert report_html.size(1_570_000) == "1.57\u00a0MB"
    assert report_html.size(512) == "512\u00a0B"
    assert report_html.size(None) == "–"
    assert report_html.count(786_432) == "786\u00a0k"
    assert report_html.percent_change(2.0, 1.0) == "−50 %"
    assert report_html.percent_change(2.0, 2.0) == "unchanged"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'latentize\[report\]'"):
        report_html.render(bare_report())
