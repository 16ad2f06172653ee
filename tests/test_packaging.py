"""What is declared is what is there: packages, dependencies, pinned versions, make targets."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]

# Modules that come with a declared dependency: its own requirement, and part of what it is, or its other name.
COMES_WITH = {"PIL": "pillow", "pyarrow": "datasets", "yaml": "datasets", "sklearn": "scikit_learn"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"megatron_ds"}
    for parent, _, files in os.walk(ROOT / "megatron_ds", followlinks=True):
        if any(file.endswith(".py") for file in files):
            found.add(".".join(Path(parent).relative_to(ROOT).parts))
    # A linked folder is listed from the start, so that its first file is not forgotten.
    linked = {f"megatron_ds.{name}" for name in ("data", "kernels", "models")}
    assert set(listed) | linked == found | linked
    assert linked <= set(listed) and len(listed) == len(set(listed))


def test_a_users_type_checker_sees_the_annotations() -> None:
    """PEP 561: the marker is installed, and what a package offers is named (``mypy --strict`` asks for it)."""
    assert (ROOT / "megatron_ds" / "py.typed").exists()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-data"] == {"megatron_ds": ["py.typed"]}
    for name in ("", "checkpoint", "config", "engine", "inference", "integrations/deepspeed/pipe"):
        tree = ast.parse((ROOT / "megatron_ds" / name / "__init__.py").read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
        offered = {alias.name for node in imports if node.module != "typing" for alias in node.names} - {"engine"}
        (named,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and _assigns(node, "__all__"))
        assert offered and set(ast.literal_eval(named)) == offered, name


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def test_constraints_pin_exactly_and_resolve_anywhere() -> None:
    for pin in PINS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin), f"{pin!r}: a name and an exact public version"
    assert "torch==2.13.0" in PINS
    # PyPI's torch 2.13.0 requires this triton and no other; the CPU build requires none and would not notice.
    assert "triton==3.7.1" in PINS
    names = [canonicalize_name(pin.split("==")[0]) for pin in PINS]
    assert len(names) == len(set(names))


def test_every_dependency_is_pinned_to_a_version_that_pyproject_admits() -> None:
    pinned = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in PINS)}
    wanted = [*REQUIRED, *EXTRAS["dev"], *EXTRAS["hf"]]
    assert len(wanted) > 15
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt lacks {requirement.name}: make constraints"
        assert requirement.specifier.contains(version), f"{requirement} does not admit the pinned {version}"
    torch = next(requirement for requirement in REQUIRED if requirement.name == "torch")
    assert torch.specifier.contains("2.11.0") and not torch.specifier.contains("2.10.0")


def test_lint_says_where_a_newer_torch_is_out() -> None:
    code = runpy.run_path(str(ROOT / "tools" / "newest_releases.py"))
    out = {"torch": "2.14.1", "triton": "3.7.1"}
    pins = "# torch==9\ntorch==2.13.0\ntriton==3.7.1\n"
    (line,) = code["report"](pins, out.get)
    assert line.startswith("torch 2.13.0 is pinned, 2.14.1 is out")
    assert code["report"](pins, {"torch": "2.9.1", "triton": "3.7.1"}.get) == [], "2.9 is older than 2.13"
    unknown = code["report"](pins, lambda package: None)
    assert len(unknown) == 2 and "triton 3.7.1 is pinned; its newest release is not known" in unknown[1]
    assert "tools/newest_releases.py" in make("-n", "lint")


def test_every_import_is_declared() -> None:
    extras = [requirement.name for requirements in EXTRAS.values() for requirement in requirements]
    declared = {name.replace("-", "_") for name in [*(r.name for r in REQUIRED), *extras]}
    local = {path.stem for path in python_files("tools", "examples")}  # scripts beside one another
    undeclared = set()
    for path in python_files("megatron_ds", "models", "kernels", "data", "examples", "tools"):
        if path.relative_to(ROOT).parts[:2] == ("tools", "benchmark"):
            continue  # measures peers, which nothing else needs
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for root in {module.split(".")[0] for module in modules}:
                known = root in sys.stdlib_module_names | declared | local | {"megatron_ds", "triton"}
                if not known and COMES_WITH.get(root) not in declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {root}")
    assert not undeclared, "\n".join(sorted(undeclared))


def test_nothing_stands_at_the_top_but_what_belongs_there() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a clone")
    folders = {"megatron_ds", "models", "kernels", "data", "examples", "tests", "tools", ".ci"}
    files = {"Makefile", "pyproject.toml", "README.md", "constraints.txt", ".gitignore"}
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == folders | files


# A make of its own: the tests themselves are started by one.
OUTSIDE = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def make(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=OUTSIDE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    targets = phony.group(1).split()
    assert {"install", "train", "test", "lint", "format", "bench", "bench-gpu", "clean"} <= set(targets)
    helped = re.findall(r"^  make (\S+) +\S.{10}", make("help"), re.MULTILINE)
    assert sorted(helped) == sorted(targets)
    assert make() == make("help")


@pytest.mark.parametrize("target", ["train", "test", "lint", "format", "bench", "bench-gpu"])
def test_a_target_installs_first_when_it_is_the_first_command(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    plan = make("-n", target, cwd=tmp_path)
    torch, rest = plan.index("grep '^torch=='"), plan.index("-c constraints.txt -e '.[dev,hf,serve]'")
    assert torch < rest < plan.rindex(".venv/bin/python")


@pytest.mark.parametrize(
    ("version", "found"),
    [((3, 10, 4), "error: Python 3.11 or newer is needed, old-python is 3.10.4"), ((2, 7, 18), "old-python is 2.7.18")],
    ids=str,
)
def test_an_old_python_is_named(tmp_path: Path, version: tuple[int, ...], found: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    dotted = ".".join(map(str, version))
    old = tmp_path / "old-python"
    old.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "
        f"'import sys; code = sys.argv[2]; sys.version_info = {version}; "
        f'sys.version = "{dotted} (then)"; exec(code)\' "$@"\n'
    )
    old.chmod(0o755)
    environment = {**OUTSIDE, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "PYTHON=old-python", "test"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0 and found in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_lints_and_tests_and_asks_nothing() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert re.search(r"^exec make .*lint test </dev/null$", text, re.MULTILINE) and "set -euo pipefail" in text


@pytest.mark.parametrize("name", ["make fails", "make passes"])
def test_ci_gives_makes_exit_code(name: str, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text(
        f"lint:\n\t@{'false' if name == 'make fails' else 'true'}\ntest:\n\t@cat; echo 3 passed in 0.1s\n"
    )
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, cwd="/", timeout=20, env=OUTSIDE)
    assert (done.returncode != 0) == (name == "make fails")
    assert "3 passed" in done.stdout, "the tests run and show their closing line even where lint fails"
