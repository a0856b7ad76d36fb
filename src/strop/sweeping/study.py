"""The trials of a sweep: Optuna's storage, samplers and pruner, and the claims of processes on trials."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from strop.data.store import digest
from strop.errors import FolderError, InputError
from strop.runs.folder import RunFolder
from strop.sweeping.space import Dimension, Setting, round_number

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

SAMPLERS = ("auto", "grid", "random", "tpe")
STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
STARTUP_TRIALS = 4  # trials before TPE uses the scores; Optuna's default, 10, would leave two of twelve
PRUNING_FACTOR = 3  # of the trials that reach a rung, one in this many goes on; a rung is this many times longer


def check_optuna() -> None:
    """Raise InputError if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("sweep: the package optuna is not installed", fix="pip install optuna")


class Trials:
    """The trials of a sweep folder, which several processes may share.

    A process claims a trial while it works on it, with the lock of a run folder. The claim of a killed process is
    void, so that another one, or the same command started again, resumes its trial.
    """

    def __init__(self, folder: Path, space: Sequence[Dimension], *, sampler: str, seed: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder, self._space = folder, space
        path = str((folder / "journal.log").absolute())
        with self.locked():
            storage = JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
            self.study: Study = optuna.create_study(
                storage=storage, sampler=_make_sampler(sampler, seed, self._distributions()), study_name="sweep",
                direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=PRUNING_FACTOR),
            )  # fmt: skip

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the sweep folder, for changes that take milliseconds."""
        with FileLock(self._folder / ".sweep.lock"):
            yield

    def create(self, settings: Sequence[Setting | None], default: Setting) -> None:
        """Create the trials that do not exist yet: the default, and one for each setting; None is left to the sampler.

        A setting and the default are given to Optuna as a trial's parameters if they are in the search space.
        """
        with self.locked():
            for setting in [default, *settings][len(self.study.get_trials(deepcopy=False)) :]:
                known = setting is not None and all(
                    dimension.contains(setting.get(dimension.field)) for dimension in self._space
                )
                parameters = {x.field: _encode(x, (setting or {})[x.field]) for x in self._space} if known else {}
                attributes = {} if setting is None else {"setting": setting, "sampled": known}
                self.study.enqueue_trial(parameters, user_attrs=attributes)

    def all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @contextmanager
    def claim_next(self) -> Iterator[FrozenTrial | None]:
        """Claim an unfinished trial: one of a process that was killed, else the next; None if others have them all."""
        with ExitStack() as stack:
            trial = None
            with self.locked():
                names = {t.number: t.state.name for t in self.all()}
                for number in (number for number, state in names.items() if state == "RUNNING"):
                    if self._try_claim(stack, f"{number:03d}"):
                        trial = self._suggest(number)
                        break
                if trial is None and "WAITING" in names.values():
                    number = self.study.ask().number  # the waiting trial with the lowest number
                    assert self._try_claim(stack, f"{number:03d}"), "a waiting trial is claimed"
                    trial = self._suggest(number)
            yield trial

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claim a run of the final check; False if another process has it."""
        with ExitStack() as stack:
            yield self._try_claim(stack, name)

    def _try_claim(self, stack: ExitStack, name: str) -> bool:
        path = self._folder / "claims" / name
        path.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(RunFolder(path).claim())
        except FolderError:
            return False
        return True

    def is_claimed(self, name: str) -> bool:
        """Return whether a running process has claimed a trial."""
        with ExitStack() as stack:
            return not self._try_claim(stack, name)

    def _suggest(self, number: int) -> FrozenTrial:
        """Choose the setting of a trial, or complete one whose process was killed before it did."""
        from optuna.trial import Trial

        frozen = self.all()[number]
        if "setting" in frozen.user_attrs and not frozen.user_attrs.get("sampled", True):
            return frozen  # outside of the search space
        trial = Trial(self.study, frozen._trial_id)  # Optuna has no public function for a trial that is running
        values = {dimension.field: _suggest_value(trial, dimension) for dimension in self._space}
        if "setting" not in frozen.user_attrs:
            trial.set_user_attr("setting", values)
        return self.all()[number]

    def record(self, number: int, **attributes: Any) -> None:
        """Store values with a trial, such as its result."""
        trial_id = self.all()[number]._trial_id
        for name, value in attributes.items():
            self.study._storage.set_trial_user_attr(trial_id, name, value)

    def finish(self, number: int, score: float | None = None, *, pruned: bool = False) -> None:
        """End a trial with its score, or as pruned or failed."""
        from optuna.trial import TrialState

        state = TrialState.COMPLETE if score is not None else TrialState.PRUNED if pruned else TrialState.FAIL
        self.study.tell(number, score, state=state)

    def should_prune(self, number: int, evaluation: int, loss: float) -> bool:
        """Report the loss of an evaluation, counted from 1, and return whether Optuna's pruner ends the trial.

        A decision is stored, because the pruner counts a trial that asks again, after a kill, as two.
        """
        from optuna.trial import Trial

        with self.locked():
            frozen, name = self.all()[number], f"prune_{evaluation}"
            if name not in frozen.user_attrs:
                trial = Trial(self.study, frozen._trial_id)
                if evaluation not in frozen.intermediate_values:
                    trial.report(-loss, evaluation)  # the study maximizes
                trial.set_user_attr(name, bool(trial.should_prune()))
            return bool(self.all()[number].user_attrs[name])

    def was_pruned(self, number: int, evaluation: int) -> bool:
        """Return whether `should_prune` has ended a trial at an evaluation."""
        return bool(self.all()[number].user_attrs.get(f"prune_{evaluation}"))

    def _distributions(self) -> dict[str, Any]:
        return {dimension.field: _distribution(dimension) for dimension in self._space}


def _distribution(dimension: Dimension) -> Any:
    """Return Optuna's distribution of a field. A choice is its index, because Optuna has no lists as choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not dimension.is_range:
        return CategoricalDistribution(tuple(range(len(dimension.choices))))
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _encode(dimension: Dimension, value: Any) -> Any:
    return value if dimension.is_range else dimension.choices.index(value)


def _suggest_value(trial: Trial, dimension: Dimension) -> Any:
    name, low, high = dimension.field, dimension.low, dimension.high
    if not dimension.is_range:
        return dimension.choices[trial.suggest_categorical(name, range(len(dimension.choices)))]
    if dimension.integer:
        return trial.suggest_int(name, int(low), int(high), log=dimension.log)
    return min(max(round_number(trial.suggest_float(name, low, high, log=dimension.log)), low), high)


def _make_sampler(name: str, seed: int, space: Mapping[str, Any]) -> BaseSampler:
    """Return a sampler whose suggestion depends on the seed, the trial's number and the finished trials only.

    With one process, a sweep that was killed and resumed therefore tries the same settings.
    """
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler

    def seeded(*key: Any) -> BaseSampler:
        number = digest(repr((seed, *key)).encode()) % 2**32
        if name == "tpe":
            return TPESampler(seed=number, n_startup_trials=STARTUP_TRIALS)
        return RandomSampler(seed=number)

    class SeededSampler(BaseSampler):
        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
            return {key: dist for key, dist in space.items() if not dist.single()}

        def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
            return seeded(trial.number).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, distribution: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about independent sampling before the first scores
                return seeded(trial.number, param_name).sample_independent(study, trial, param_name, distribution)

    return SeededSampler()
