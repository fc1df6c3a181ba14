"""Heavy imports have one owner, and packages import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("teacher_cache", "student_train", "services")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

OWNERS = {
    "ray": ["teacher_cache/precompute.py"],
    "fastapi": ["services/"],
    "starlette": ["services/"],
    "uvicorn": ["services/"],
    "httpx": ["services/"],
    "prometheus_client": ["services/metrics"],
    "zarr": ["teacher_cache/storage/zarr_"],
    "pyarrow": ["teacher_cache/storage/parquet_", "teacher_cache/sources/parquet"],
    "fsspec": ["teacher_cache/storage/remote_"],
    "s3fs": ["teacher_cache/storage/remote_"],
    "botocore": ["teacher_cache/storage/remote_"],
    "sklearn": ["teacher_cache/sources/digits"],
    "timm": ["teacher_cache/imports.py"],
    "torchvision": [
        "teacher_cache/views/pixels.py",
        "teacher_cache/views/seeded_global.py",
        "teacher_cache/manifest.py",
        "teacher_cache/imports.py",
        "teacher_cache/sources/torchvision_dataset.py",
    ],
}
"""Which files, by the beginning of their path, may import a heavy package, at the top or inside a function."""

LEVELS = [
    {"errors", "imports", "fingerprint", "signed", "spec", "service_spec"},
    {"sources", "views", "teachers", "encodings", "storage"},
    {"addition", "manifest", "builder", "lease", "tables"},
    {"receipts", "poison", "extents", "index"},
    {"samples", "gather", "loader", "calibrate", "choice", "probe"},
    {"plan", "begin", "shard_job", "left", "claims", "seal", "proof", "cached_views", "reader", "paid"},
    {"precompute", "build", "abandon", "build_report", "agreement", "problem", "verify", "repair", "cost", "report"},
    {"cli", "console", "__init__"},
]
"""The layers of `teacher_cache`, lowest first: a module imports its own layer and those below."""


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            module = node.module or ""
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_packages_have_their_owners(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    tops = {module.split(".")[0] for module in imported(path)}
    for package in tops & set(OWNERS):
        assert any(name.startswith(owner) for owner in OWNERS[package]), f"{name} imports {package}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_packages_import_one_way(path: Path) -> None:
    """`teacher_cache` knows neither of the others, and they do not know each other."""
    own = path.relative_to(ROOT).parts[0]
    tops = {module.split(".")[0] for module in imported(path)}
    allowed = {"teacher_cache": set(), "student_train": {"teacher_cache"}, "services": {"teacher_cache"}}
    assert tops & set(PACKAGES) - {own} <= allowed[own]


def level_of(name: str) -> int:
    family = name.split("_")[0] if name.startswith(("report_", "verify_")) else name
    return next((number for number, names in enumerate(LEVELS) if family in names), -1)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.parts[len(ROOT.parts)] == "teacher_cache"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_layers_import_downwards(path: Path) -> None:
    """`errors, spec ← sources, views, … ← manifest ← plan, shard_job, reader ← precompute, … ← cli`."""
    own = path.relative_to(ROOT / "teacher_cache").with_suffix("").parts[0]
    if level_of(own) < 0:
        pytest.skip("a module that no layer names")
    for module in imported(path):
        parts = module.split(".")
        if parts[0] == "teacher_cache" and len(parts) > 1 and level_of(parts[1]) >= 0:
            assert level_of(parts[1]) <= level_of(own), f"{own} imports {module}"


def test_every_module_has_a_layer() -> None:
    """A new module is placed in the picture."""
    names = {path.stem for path in (ROOT / "teacher_cache").glob("*.py")}
    names |= {path.parent.name for path in (ROOT / "teacher_cache").glob("*/__init__.py")}
    assert {name for name in names if level_of(name) < 0 and name != "__main__"} == set()


def test_importing_the_package_is_cheap() -> None:
    """`import teacher_cache` brings neither Ray nor a web framework nor a compiler, and reading a Zarr cache needs no
    pyarrow sources; nothing heavy is done at import."""
    program = (
        "import sys, teacher_cache, teacher_cache.spec\n"
        "heavy = {'ray', 'fastapi', 'torchvision', 'torch._dynamo', 'zarr', 'sklearn', 'timm'}\n"
        "heavy |= {'student_train', 'services'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"
