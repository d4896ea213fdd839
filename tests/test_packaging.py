"""Imports point one way, importing is cheap, and the wheel holds exactly what it should."""

import ast
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "hooks": {"hooks"},
    "sae": {"hooks", "sae"},
    "autointerp": {"hooks", "sae", "autointerp"},
    "steering": {"hooks", "sae", "steering"},
    "phantom": {"hooks", "sae", "phantom"},
    "maira_sae": {"hooks", "sae", "autointerp", "steering", "phantom", "maira_sae"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = set(imports_of(path)) & set(MAY_IMPORT)
        assert ours <= MAY_IMPORT[package], f"{path} imports {ours - MAY_IMPORT[package]}"


def python(*args, executable=sys.executable, **kwargs):
    return subprocess.run(
        [executable, *args], capture_output=True, text=True, check=True, **kwargs
    ).stdout


def test_heavy_libraries_load_only_where_used():
    heavy = "{'transformers', 'openai', 'transformer_lens', 'nnsight', 'datasets', 'plotly'}"
    ours = "hooks, sae, autointerp, steering, phantom"
    code = f"import sys, {ours}; print(sorted({heavy} & set(sys.modules)))"
    assert python("-c", code, cwd=ROOT).strip() == "[]"


def test_importing_sae_adds_under_a_second_to_torch():
    code = "import time, torch; t = time.perf_counter(); import sae; print(time.perf_counter() - t)"
    assert min(float(python("-c", code, cwd=ROOT)) for _ in range(3)) < 1.0


@pytest.mark.parametrize("package", ["hooks", "sae", "autointerp", "steering", "phantom"])
def test_public_names_exist(package):
    module = __import__(package)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_wheel_in_a_fresh_environment(tmp_path):
    """Built from the source tree, installed elsewhere, and imported from there."""
    python(
        *("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
        *("-w", str(tmp_path), str(ROOT)),
    )
    (wheel,) = tmp_path.glob("maira_sae-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(MAY_IMPORT)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]

    venv.create(tmp_path / "env", with_pip=False)
    binaries = tmp_path / "env" / "bin"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    # The dependencies of this environment, without its own editable install of the project.
    here = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({here!r})\n"
        "import hooks, sae, autointerp, steering, phantom, maira_sae, maira_sae.cli\n"
        "from hooks import Maira2ForConditionalGeneration\n"
        "print(*{m.__file__ for m in (hooks, sae, autointerp, steering, phantom, maira_sae)})\n"
    )
    found = python("-I", "-c", code, executable=str(binaries / "python"), cwd=tmp_path)
    assert all(str(site) in path for path in found.split())
