"""The work on a sweep: claim trials, train and score each, compare the settings, check the best one on test rows."""

from __future__ import annotations

import math
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from strop import api
from strop.errors import DiskError, FolderError, InputError, RunError, Stopped, StropError
from strop.evaluation.metrics import DEFAULT_METRIC, wilson_interval
from strop.evaluation.run import EvalOptions, evaluate_models
from strop.runs.events import EndTraining, Event, drop_undone_events, read_events
from strop.runs.folder import RunFolder, is_run, read_json, write_atomic, write_json
from strop.sweeping.plan import Planner
from strop.sweeping.request import Request
from strop.sweeping.select import Candidate, as_marks, conclude, find_cheapest, rank, read_marks, recommend
from strop.sweeping.space import Setting, apply_setting, as_yaml, format_setting, given_values, without_seed
from strop.sweeping.split import Split, data_options
from strop.sweeping.study import STATES, Trials
from strop.sweeping.tables import describe_final, describe_result, describe_trial

STATE_FILE = "sweep.json"
POLL_S = 2.0  # between looks at the trials of other processes
UNFINISHED = ("waiting", "running")
COMPARED_BY_HASH = ("data.train", "data.eval")  # files may have been moved
RESULT_FIELDS = ("score", "low", "high", "loss", "steps", "tokens", "train_s", "seconds", "peak_bytes")
Show = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """Functions that show what a sweep does.

    line: shows a permanent line. status: shows the current activity. event: called with the events of each run.
    """

    line: Show = lambda _: None
    status: Show = lambda _: None
    event: Callable[[Event], None] | None = None


class SweepFolder:
    """The folder of a sweep, on which one or more processes work.

    sweep.json  recipe.yaml  journal.log  data/{train,selection,test}.jsonl  trials/000/  final/default-1/  winner.yaml
    """

    def __init__(self, path: Path, request: Request, memory: int | str | None, progress: Progress) -> None:
        self.path, self.request, self._memory, self._progress = path, request, memory, progress
        self.state = read_json(path / STATE_FILE)
        self.split = Split.from_json(self.state["split"], path / "data")
        self.trials = Trials(path, request.space, sampler=request.sampler, seed=request.resolved.recipe.seed)
        self._planner = Planner(apply_setting(request.resolved, self._data_options), memory)
        points: list[Setting | None] = list(request.points) if request.sampler == "grid" else []
        self.trials.create(points or [None] * (request.trials - 1), request.default)

    @property
    def _data_options(self) -> dict[str, Any]:
        return data_options(self.split, self.request.resolved.recipe.data)

    def check_same(self, request: Request) -> None:
        """Raise InputError if the recipe, the data files or an option differ from those of the sweep."""
        now, before = request.as_json(), self.state["request"]
        changed = [name for name in now if name != "recipe" and now[name] != before[name]]
        old, new = before["recipe"], now["recipe"]
        fields = dict.fromkeys([*old, *new])
        changed += [x for x in fields if old.get(x) != new.get(x) and x not in COMPARED_BY_HASH]
        if changed:
            what = f"{self.path}: {', '.join(changed)} changed since the sweep was started"
            raise InputError(what, fix="restore it, or start a new sweep with another --out")

    @cached_property
    def _keep(self) -> dict[str, Any]:
        """The plan's choice of train.keep for the default, for all trials: some may be too short for it."""
        varied = {dimension.field for dimension in self.request.space} & {"train.objective", "train.teacher"}
        if varied or "train.keep" in given_values(self.request.resolved):
            return {}
        chosen = self._planner.plan({}).resolved.recipe.train.keep
        return {} if chosen == "auto" else {"train.keep": chosen}

    # --- trials -------------------------------------------------------------------------------------

    def work(self) -> dict[str, Any]:
        """Work on trials until all are finished, by this and other processes; then compare, check and recommend.

        Returns the contents of sweep.json.
        """
        self.write_state()
        try:
            while self.state["result"] is None:
                if not self.step():
                    self._progress.status("waiting for other processes, which have all that is left")
                    time.sleep(POLL_S)
                    self.write_state()
        except Stopped as stopped:
            fix = f"continue with `strop sweep --resume {shlex.quote(str(self.path))}`"
            raise Stopped(f"{self.path}: {stopped.what}", fix=fix) from None
        return self.state

    def step(self) -> bool:
        """Run one trial or one run of the final check, or conclude; return False if others have all that is left."""
        with self.trials.claim_next() as trial:
            if trial is not None:
                self._run_trial(trial)
                return True
        self.write_state()
        if not self.select():
            return False
        unfinished = [run for run in self.final_runs() if not read_json(self._final_file(run[0]))]
        for name, setting, seed in unfinished:
            with self.trials.claim(f"final-{name}") as claimed:
                if claimed and not read_json(self._final_file(name)):
                    self._run_final(name, setting, seed)
                    return True
        if not unfinished:
            self._conclude()
        return not unfinished

    def _all_failed(self) -> RunError:
        errors = [row["error"]["message"] for row in self.state["trials"] if row.get("error")]
        error = RunError(f"all {len(errors)} trials failed; the first one: {errors[0]}", fix="see `strop sweep --help`")
        error.partial_result = {"sweep": str(self.path), **self.state}
        return error

    def _run_trial(self, trial: Any) -> None:
        number, setting = trial.number, dict(trial.user_attrs["setting"])
        self.write_state()
        if (twin := self._find_twin(number, setting)) is not None:
            result = {**twin.user_attrs["result"], "same_as": twin.number}
            self.trials.record(number, result=result)
            self._finish_trial(number, result["score"])
            return
        folder = self.trial_folder(number)
        label = f"trial {number:03d} ({format_setting(setting) if number else 'the default'})"
        folder.parent.mkdir(exist_ok=True)
        try:
            result, _ = self._train_and_score(
                folder, setting if number else {}, "selection", label, listener=self._pruner(number)
            )
        except (Stopped, DiskError, FolderError):
            raise
        except StropError as error:
            if number == 0 and isinstance(error, InputError):
                raise  # it concerns all trials
            self.trials.record(number, error=error.as_json())
            self._finish_trial(number)
            return
        pruned = result.pop("pruned")
        self.trials.record(number, result=result)
        self._finish_trial(number, result.get("score"), pruned=pruned)

    def trial_folder(self, number: int) -> Path:
        return self.path / "trials" / f"{number:03d}"

    def _find_twin(self, number: int, setting: Setting) -> Any:
        """Return a finished trial of the same run: a sampler repeated a setting, or it has the values of the default.

        The plan, or another field, may choose the values of the default.
        """
        earlier = [x for x in self.trials.all() if x.number < number and x.state.name == "COMPLETE"]
        if twin := next((x for x in earlier if x.user_attrs["setting"] == setting), None):
            return twin
        if not earlier or earlier[0].number != 0:
            return None
        try:
            own, default = (self._planner.plan(values).resolved.recipe for values in (setting, {}))
        except StropError:  # the trial fails with it
            return None
        return earlier[0] if own == default else None

    def _pruner(self, number: int) -> Callable[[Event], None]:
        """Return a listener that ends a trial when Optuna's pruner decides so. The default is never pruned.

        A trial whose process was killed after that decision, and after its checkpoint, ends when it is resumed.
        """
        evaluations = 0

        def listen(event: Event) -> None:
            nonlocal evaluations
            if event["event"] == "resume":
                events = RunFolder(self.trial_folder(number)).events
                evaluations = _count_evaluations(events, event["step"])
                if self.trials.was_pruned(number, evaluations):
                    raise EndTraining("pruned")
            if event["event"] != "eval" or not self.request.options.prune or number == 0:
                return
            evaluations += 1
            loss = math.inf if event["loss"] is None else event["loss"]
            if self.trials.should_prune(number, evaluations, loss):
                raise EndTraining("pruned")

        return listen

    def _train_and_score(
        self, folder: Path, setting: Setting, part: str, label: str, listener: Callable[[Event], None] | None = None
    ) -> tuple[dict[str, Any], list[bool]]:
        """Train with a setting, unless the run is finished, and score its model on the rows of a part.

        Returns the result of the trial and the hits.
        """
        run, started = RunFolder(folder), time.monotonic()
        is_resumed = is_run(folder)
        show, event = self._progress.status, self._progress.event

        def listen(happened: Event) -> None:
            if happened["event"] == "step":
                show(f"{label}: step {happened['step']} of {happened['steps']}")
            if event is not None:
                event(happened)
            if listener is not None:
                listener(happened)

        report = run.read_report()
        if report.get("exit") != 0:
            show(f"{label}: {'resuming' if is_resumed else 'starting'}")
            values = (
                given_values(self.request.resolved) | {"train.samples": 0} | self._keep | self._data_options | setting
            )
            if "train.samples" in given_values(self.request.resolved):
                values["train.samples"] = self.request.resolved.recipe.train.samples
            values["out"] = str(folder)
            train = partial(
                api.train, callback=listen, progress=False, memory=self._memory, resume_existing=True, **values
            )
            try:
                report = train().report
            except InputError:
                if not is_resumed:
                    raise
                shutil.rmtree(folder)  # begun where the sweep or its data had another path
                report = train().report
        result: dict[str, Any] = {
            "loss": report["eval_loss"], "steps": report["steps"], "tokens": report["tokens"],
            "train_s": report["seconds"], "peak_bytes": report["memory"]["measured_peak_bytes"],
            "pruned": report["ended"] == "pruned",
            "values": {x["field"]: x["value"] for x in report["recipe"] if x["field"] in self.state["default"]},
        }  # fmt: skip
        hits: list[bool] = []
        if not result["pruned"]:
            show(f"{label}: scoring on the {part} rows")
            evaluation = self._evaluate(str(folder), part)
            hits = [bool(row["tuned_hit"]) for row in evaluation["samples"]]
            low, high = wilson_interval(sum(hits), len(hits))
            result |= {"score": sum(hits) / len(hits), "low": low, "high": high, "metric": evaluation["metric"]}
            result["hits"] = as_marks(hits)  # not read from the run, which the user may evaluate on other rows
        result["seconds"] = time.monotonic() - started
        return result, hits

    def _evaluate(self, name: str, part: str) -> dict[str, Any]:
        from strop.machine.torch_state import isolated_torch_state

        options = self.request.options
        metric = None if options.metric == DEFAULT_METRIC else options.metric  # the default depends on the model
        request = EvalOptions(metric=metric, max_new_tokens=options.max_new_tokens, base=False)
        with isolated_torch_state():
            [result] = evaluate_models([name], self.split.files[part], request)
        if "interrupted" in result:
            raise Stopped(f"stopped while scoring {name}")
        return result

    def _finish_trial(self, number: int, score: float | None = None, *, pruned: bool = False) -> None:
        self.trials.finish(number, score, pruned=pruned)
        self.write_state()
        self._progress.line(describe_trial(self.state, number))

    # --- comparison and final check -----------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Return the settings with finished trials. Trials that differ only by their seed are one setting.

        A setting of which a seed was pruned is left out, because the mean of those that were not is too high, except
        the default, or if no other is left.
        """
        groups: dict[str, list[Any]] = {}
        pruned = set()
        for trial in self.trials.all():
            if trial.state.name == "PRUNED":
                pruned.add(repr(without_seed(trial.user_attrs["setting"])))
            if trial.state.name == "COMPLETE" and "same_as" not in trial.user_attrs["result"]:
                setting = trial.user_attrs["setting"]
                groups.setdefault(repr(without_seed(setting)), []).append(trial)
        whole = {key: group for key, group in groups.items() if key not in pruned or group[0].number == 0}
        candidates = []
        for group in (whole or groups).values():
            setting = without_seed(group[0].user_attrs["setting"])
            hits = [read_marks(trial.user_attrs["result"]["hits"]) for trial in group]
            losses = [trial.user_attrs["result"]["loss"] for trial in group]
            loss = statistics.fmean(math.inf if x is None else x for x in losses)
            numbers = tuple(trial.number for trial in group)
            is_default = 0 in numbers
            cost = self._planner.cost({} if is_default else setting)
            candidates.append(Candidate(setting, numbers, np.mean(hits, axis=0, dtype=np.float64), loss, cost))
        return candidates

    def select(self) -> bool:
        """Compare the settings on the selection rows, once, and return whether all trials are finished.

        Raises RunError if all trials failed.
        """
        if any(row["state"] in UNFINISHED for row in self.state["trials"]):
            return False
        if not any(row["state"] == "finished" for row in self.state["trials"]):
            raise self._all_failed()
        self._select()
        return True

    def _select(self) -> None:
        with self.trials.locked():
            self.state = read_json(self.path / STATE_FILE)
            if self.state["selection"] is not None:
                return
            self._progress.status("comparing the settings")
            candidates = self.candidates()
            ranking = rank(candidates)
            default = next((x for x in candidates if 0 in x.numbers), None)
            chosen = recommend(ranking, default)
            seeds = [self.request.resolved.recipe.seed]
            seeds += [
                int(trial.user_attrs["setting"]["seed"])
                for trial in self.trials.all()
                if "seed" in trial.user_attrs["setting"]
            ]
            self.state["selection"] = {
                "ranking": [
                    {
                        "setting": entry.candidate.setting, "trials": list(entry.candidate.numbers),
                        "score": entry.candidate.score, "loss": _finite(entry.candidate.loss),
                        "parameters": int(entry.candidate.cost[0]), "predicted_s": entry.candidate.cost[1],
                        "predicted_peak_bytes": int(entry.candidate.cost[2]), "standing": entry.standing,
                        "difference": None if entry.difference is None else asdict(entry.difference),
                    }
                    for entry in ranking
                ],
                "chosen": list(chosen.numbers), "is_default": 0 in chosen.numbers, "setting": chosen.setting,
                "cheaper": default is not None and default not in find_cheapest([chosen, default]),
                "has_default": default is not None,
                "first_seed": max(seeds) + 1,
            }  # fmt: skip
            self._write(self.state)

    def final_runs(self) -> list[tuple[str, Setting, int | None]]:
        """Return name, setting and seed of each run of the final check.

        Their seeds are new: the seed of the best trial may have been lucky. If the default is recommended, there is
        nothing to compare, and the model of its trial is scored.
        """
        selection, seeds = self.state["selection"], self.request.options.seeds
        if selection["is_default"]:
            return [("default-0", {}, None)]
        names = (["default"] if selection["has_default"] else []) + ["chosen"]
        settings = {"default": {}, "chosen": selection["setting"]}
        first = selection["first_seed"]
        return [(f"{name}-{k + 1}", settings[name], first + k) for k in range(seeds) for name in names]

    def _final_file(self, name: str) -> Path:
        return self.path / "final" / f"{name}.json"

    def _run_final(self, name: str, setting: Setting, seed: int | None) -> None:
        file = self._final_file(name)
        file.parent.mkdir(exist_ok=True)
        write_json(file, self._check_on_test(name, setting, seed))
        self.write_state()
        self._progress.line(describe_final(self.state, name))

    def _check_on_test(self, name: str, setting: Setting, seed: int | None) -> dict[str, Any]:
        """Train a run of the final check and score it on the test rows, which happens once for each."""
        entry: dict[str, Any] = {"name": name, "setting": setting, "seed": seed, "state": "finished"}
        try:
            if seed is None:  # the trial's own report keeps its selection score
                self._progress.status("scoring the default on the test rows")
                samples = self._evaluate(str(RunFolder(self.trial_folder(0)).saved), "test")["samples"]
                hits, result = [bool(row["tuned_hit"]) for row in samples], dict[str, Any]()
            else:
                label = f"final check, {name} (seed {seed})"
                folder = self.path / "final" / name
                result, hits = self._train_and_score(folder, setting | {"seed": seed}, "test", label)
        except (Stopped, DiskError, FolderError):
            raise
        except StropError as error:
            return {**entry, "state": "failed", "error": error.as_json()}
        low, high = wilson_interval(sum(hits), len(hits))
        scores = {"score": sum(hits) / len(hits), "low": low, "high": high, "rows": len(hits)}
        times: dict[str, Any] = {key: result[key] for key in ("train_s", "seconds") if key in result}
        return {**entry, **scores, **times, "hits": as_marks(hits)}

    def _conclude(self) -> None:
        """Compare the default and the chosen setting on the test rows, and write the result and winner.yaml."""
        with self.trials.locked():
            self.state = read_json(self.path / STATE_FILE)
            if self.state["result"] is not None:
                return
            selection, runs = self.state["selection"], self._read_final()
            result = conclude(selection, runs)
            setting = selection["setting"] if result["recommended"] == "chosen" else {}
            given = {name: value for name, value in given_values(self.request.resolved).items() if name != "out"}
            write_atomic(self.path / "winner.yaml", as_yaml(given | self._keep | setting))
            result |= {"setting": setting, "trials": selection["chosen"] if setting else [0]}
            result["sentence"] = describe_result(self.state, result)
            self._write(self.state | {"result": result, "final": [_without_hits(run) for run in runs]})

    def _read_final(self) -> list[dict[str, Any]]:
        names = [name for name, _, _ in self.final_runs()]
        return [run for name in names if (run := read_json(self._final_file(name)))]

    # --- sweep.json ---------------------------------------------------------------------------------

    def write_state(self) -> None:
        """Write the state of all trials, which Optuna's journal has, to sweep.json."""
        with self.trials.locked():
            self._write(read_json(self.path / STATE_FILE))

    def _write(self, state: dict[str, Any]) -> None:
        trials = self.trials.all()
        state["trials"] = [self._describe(trial) for trial in trials]
        known = (trial.user_attrs.get("result", {}).get("metric") for trial in trials)
        state["metric"] = next(filter(None, known), state["metric"])
        self.state = state
        if state["selection"] is not None and state["result"] is None:
            state["final"] = [_without_hits(run) for run in self._read_final()]
        write_json(self.path / STATE_FILE, state)

    def _describe(self, trial: Any) -> dict[str, Any]:
        attributes = trial.user_attrs
        result = attributes.get("result", {})
        setting = result.get(
            "values", attributes.get("setting")
        )  # the plan chooses values that the default leaves open
        row = {"number": trial.number, "state": STATES[trial.state.name], "setting": setting}
        row |= {name: result.get(name) for name in RESULT_FIELDS} | {"same_as": result.get("same_as")}
        return row | {"run": f"trials/{trial.number:03d}", "error": attributes.get("error")}


def _without_hits(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "hits"}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count_evaluations(events: Path, step: int) -> int:
    """Return how many evaluations a run has at or before a step, from which it is resumed."""
    remaining = drop_undone_events(read_events(events))
    return len({event["step"] for event in remaining if event["event"] == "eval" and event["step"] <= step})
