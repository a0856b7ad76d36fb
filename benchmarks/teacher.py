"""Measure what a small labelled set gains from a teacher's answers to unlabelled prompts, on SNIPS.

    python benchmarks/teacher.py --snips FOLDER [--seeds 0] [--labelled 100] [--out FILE]

The teacher is SmolLM2, fine-tuned on all 700 rows. Students: `labelled`, fine-tuned on the first rows alone; `answers`,
on these rows and the prompts of all others with the teacher's answers (train.teacher_weight 0); `teacher`, on the same
with the teacher's probabilities (0.5). All train for 4 epochs, `labelled` for as many steps as the others as `longer`.
Exact JSON on 210 held-out rows. Prints a Markdown table. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import run_jobs

STUDENTS = ("labelled", "longer", "answers", "teacher")
EPOCHS = 4


def run(args: argparse.Namespace, student: str, seed: int) -> dict[str, Any]:
    import strop

    lines = (args.snips / "train_700.jsonl").read_text(encoding="utf-8").splitlines()
    teacher = train_teacher(args, seed)
    with tempfile.TemporaryDirectory() as folder:
        labelled, prompts = Path(folder, "labelled.jsonl"), Path(folder, "prompts.jsonl")
        labelled.write_text("\n".join(lines[: args.labelled]) + "\n", encoding="utf-8")
        questions = [json.loads(line)["messages"][:-1] for line in lines[args.labelled :]]
        prompts.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in questions), encoding="utf-8")
        options: dict[str, Any] = {"seed": seed, "train.epochs": EPOCHS, "data": [str(labelled)]}
        if student in ("answers", "teacher"):
            options["data"] += [str(prompts)]
            options |= {"train.teacher": str(teacher), "train.teacher_weight": 0.5 if student == "teacher" else 0}
        elif student == "longer":
            options["train.epochs"] = EPOCHS * len(lines) / args.labelled
        done = strop.train(model="demo", out=f"{folder}/run", **options)
        result = strop.evaluate(done.folder, str(args.snips / "test_210.jsonl"), metric="exact_json")
    return {
        "student": student, "seed": seed, "rows": done.report["data"]["used"], "steps": done.report["steps"],
        "tokens": done.report["tokens"], "seconds": done.report["seconds"], "exact_json": result["tuned"]["exact_json"],
        "interval": result["intervals"]["tuned"], "hits": [row["tuned_hit"] for row in result["samples"]],
    }  # fmt: skip


def train_teacher(args: argparse.Namespace, seed: int) -> Path:
    """Return the folder of the teacher, which is trained if it is not there."""
    import strop

    folder = Path(args.work, f"teacher-{seed}")
    if not (folder / "report.json").is_file():
        data = str(args.snips / "train_700.jsonl")
        options: dict[str, Any] = {"seed": seed, "train.epochs": EPOCHS}
        strop.train(model="demo", data=data, out=folder, resume_existing=folder.exists(), **options)
        strop.evaluate(folder, str(args.snips / "test_210.jsonl"), metric="exact_json")
    return folder


def row(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    exact = f"{100 * one['exact_json']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"| {one['student']} | {one['seed']} | {one['rows']} | {one['steps']} | {exact} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build", "teacher"), help="the folder of the teachers")
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--labelled", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args, args.one[0], int(args.one[1]))))
        return
    results: list[dict[str, Any]] = []
    if args.out and args.out.is_file():
        results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
    finished = {(one["student"], one["seed"]) for one in results}
    left = [(name, seed) for seed in args.seeds for name in args.students if (name, seed) not in finished]
    command = [sys.executable, __file__, "--snips", str(args.snips), "--work", str(args.work)]
    run_jobs([*command, "--labelled", str(args.labelled)], left, results, row, args.out)
    print("\n".join(["| student | seed | rows | steps | exact JSON |", "|---|---|---|---|---|", *map(row, results)]))


if __name__ == "__main__":
    main()
