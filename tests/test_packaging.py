"""What gets installed: the package list against the tree, the two mapped folders, extras, version, start-up."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import latentize

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
NOT_INSTALLED = {"tests", "samples", "benchmarks", "docs"}


def sources() -> Iterator[Path]:
    """Every Python file of the package, each once: the symlinks are not followed."""
    for folder in SETUPTOOLS["package-dir"].values():
        yield from sorted((ROOT / folder).glob("*.py"))


def distributions(requirements: list[str]) -> dict[str, SpecifierSet]:
    """Distribution name -> version range, with references to our own extras followed."""
    found: dict[str, SpecifierSet] = {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name == "latentize":
            for extra in requirement.extras:
                found |= distributions(EXTRAS[extra])
        else:
            found[requirement.name.lower()] = requirement.specifier
    return found


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)


def test_package_list_names_every_folder_that_holds_code() -> None:
    holding = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and (path / "__init__.py").exists()
    }
    assert set(SETUPTOOLS["package-dir"].values()) == holding - NOT_INSTALLED
    assert set(SETUPTOOLS["package-dir"]) == set(SETUPTOOLS["packages"])


def test_packages_hold_no_package_that_the_list_lacks() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        nested = [p for p in (ROOT / folder).glob("*/__init__.py") if not p.parent.is_symlink()]
        assert nested == [], f"sub-packages are not installed unless pyproject.toml lists them: {nested}"


@pytest.mark.parametrize("name", ["passes", "exporters"])
def test_mapped_folder_is_linked_for_type_checkers(name: str) -> None:
    link = ROOT / "latentize" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", ["passes", "exporters"])
def test_mapped_folder_is_imported_under_our_name_only(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util as u, latentize.{name} as m; print(u.find_spec('{name}')); print(m.__name__)"
    assert python(code, tmp_path).stdout.split() == ["None", f"latentize.{name}"]


def test_no_module_imports_a_mapped_folder_by_its_bare_name() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"passes", "exporters"}, path


#: Modules that others import inside functions only, where the package that they need was found.
GUARDED = {f"kernels_triton_{name}": "triton" for name in ("math", "decode", "grouped", "route", "sort")}


def test_modules_import_at_their_top_only_what_is_always_installed() -> None:
    modules = {"pyyaml": "yaml"}
    always = {modules.get(name, name) for name in distributions(PROJECT["project"]["dependencies"])} | {"latentize"}
    for path in sources():
        allowed = always | {GUARDED[path.stem]} if path.stem in GUARDED else always
        for node in _import_time_nodes(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            foreign = {n.split(".")[0] for n in names} - sys.stdlib_module_names - allowed
            assert not foreign, f"{path.relative_to(ROOT)}:{node.lineno} imports {foreign} when it is loaded"
            if path.stem not in GUARDED:
                mentioned = {part for n in [*names, *(a.name for a in node.names)] for part in n.split(".")}
                assert not mentioned & set(GUARDED), f"{path.relative_to(ROOT)}:{node.lineno} needs an extra"


def _import_time_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _import_time_nodes(node)


def test_extra_all_is_every_extra_that_needs_no_gpu() -> None:
    parts = [f"latentize[{name}]" for name in EXTRAS if name not in {"all", "gpu", "dev"}]
    assert distributions(EXTRAS["all"]) == distributions(parts)
    assert {"onnxruntime-gpu", "tensorrt"} == set(distributions(EXTRAS["gpu"]))
    assert not set(distributions(EXTRAS["gpu"])) & set(distributions(EXTRAS["all"]))


def test_missing_extra_errors_name_an_extra_that_holds_the_package() -> None:
    raised = [
        (path, node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtraError"
    ]
    for path, call in raised:
        literals = [a.value for a in call.args[:2] if isinstance(a, ast.Constant)]
        if len(literals) == 2:
            package, extra = literals
            assert str(package).lower().replace("_", "-") in distributions(EXTRAS[str(extra)]), (path, call.lineno)
    assert raised


def test_constraints_pin_every_distribution_we_name_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    named = distributions([*PROJECT["project"]["dependencies"], "latentize[all,dev]"])
    assert set(named) <= set(pins)
    assert [name for name, allowed in named.items() if pins[name] not in allowed] == []


def test_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "latentize.__version__"}
    assert re.search(rf"^## {re.escape(latentize.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_help_imports_neither_torch_nor_an_extra(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom latentize.cli import main\nsys.argv = ['latentize', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    assert python(code, tmp_path).stdout.splitlines()[-1] == "[]"


def test_help_starts_fast(tmp_path: Path) -> None:
    """Processor time, the best of three: other tests run beside this one."""
    command = [str(Path(sys.executable).with_name("latentize")), "--help"]
    assert min(_processor_seconds(command, tmp_path) for _ in range(3)) < 0.4


def _processor_seconds(command: list[str], cwd: Path) -> float:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run(command, cwd=cwd, capture_output=True, check=True)
    return used() - before


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from the sdist of a copy of the tree."""
    copy = tmp_path_factory.mktemp("tree") / "latentize"
    ignored = [".*", "__pycache__", "*.egg-info", "build", "dist", "out", "samples", "benchmarks", "tests"]
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*ignored))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_wheel_holds_our_three_packages_and_no_generic_name(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"latentize"}
    packages = {str(Path(name).parent).replace("/", ".") for name in names if name.endswith(".py")}
    assert packages == set(SETUPTOOLS["packages"])


def test_wheel_holds_every_file_of_the_package_once(wheel: zipfile.ZipFile) -> None:
    """Sources, type marker, templates and kernels: whatever lies in the three folders must be declared in pyproject."""
    expected = []
    for package, folder in SETUPTOOLS["package-dir"].items():
        for parent, _, names in os.walk(ROOT / folder):
            inside = Path(package.replace(".", "/")) / Path(parent).relative_to(ROOT / folder)
            expected += [str(inside / name) for name in names if "__pycache__" not in parent]
    assert sorted(n for n in wheel.namelist() if ".dist-info/" not in n) == sorted(expected)


def test_wheel_says_its_version_licence_and_command(wheel: zipfile.ZipFile) -> None:
    info = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(info["METADATA"]).decode()
    assert f"\nVersion: {latentize.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "latentize = latentize.cli:main" in wheel.read(info["entry_points.txt"]).decode()
    assert "LICENSE" in info


def test_every_lazy_name_of_the_package_can_be_reached() -> None:
    for name in latentize.__all__:
        assert getattr(latentize, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        latentize.nothing  # noqa: B018
    assert importlib.util.find_spec("latentize") is not None
