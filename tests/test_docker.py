"""The container files, checked as far as that goes without an engine: paths, targets and commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from student_train.recipes import CompareSpec, FitSpec
from teacher_cache.spec import BuildSpec, parse, read_yaml

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def test_what_is_copied_is_there_and_is_every_package() -> None:
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.split(".")[0] for name in packages} <= set(copied)


def test_entry_points_are_console_scripts_and_nobody_is_root() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE)) == set(scripts)
    assert "USER runner" in DOCKERFILE


def test_compose_names_targets_and_configurations_that_exist() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    kinds = {"fit": FitSpec, "compare": CompareSpec, "build": BuildSpec}
    for service in COMPOSE["services"].values():
        assert service["build"]["target"] in targets
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        verb, *rest = service["command"]
        path = rest[0] if verb in kinds else verb
        parse(kinds.get(verb, BuildSpec), read_yaml(ROOT / path), path)
