"""The trials of a sweep in Optuna's journal, a file that all processes of the sweep share: which trial is next, what it
tries, and how it ended. The only module that knows Optuna."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState
from optuna.trial import Trial as OptunaTrial

from fairlead.data.splits import keyed_hash
from fairlead.sweep.plan import Plan, alone, hold
from fairlead.sweep.space import Parameter, Space

STATES = {
    TrialState.RUNNING: "unfinished",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
ENDINGS = {name: state for state, name in STATES.items()}


@dataclass(slots=True)
class Taken:
    """A trial that this process works on, and no other."""

    number: int
    parameters: dict[str, Any]
    trial: OptunaTrial
    claim: IO[str]
    """Held until it is closed; where the process dies, another one takes the trial up."""
    reported: set[int]
    """Steps whose value the pruner knows."""
    is_hopeless: bool
    """Whether the pruner had given it up when its process died."""


class Study:
    def __init__(self, plan: Plan) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._plan = plan
        path = plan.folder / "journal.log"
        self._study = optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(str(path), _Lock(path))),
            sampler=_Keyed(plan.space),
            pruner=MedianPruner() if plan.space.pruner == "median" else NopPruner(),
            direction="maximize" if plan.space.goal == "max" else "minimize",
            load_if_exists=True,
        )

    def take(self) -> Taken | None:
        """The first trial whose process has died, else a new one; none where there is neither."""
        with alone(self._plan.folder):
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and (claim := self._claim(trial.number)):
                    return self._taken(OptunaTrial(self._study, trial._trial_id), claim)
            if len(trials) >= self._plan.num_trials:
                return None
            claim = self._claim(len(trials))
            assert claim is not None, "numbers follow each other"
            return self._taken(self._study.ask(), claim)

    def tell(self, taken: Taken, state: str, value: float | None, seconds: float, message: str) -> None:
        taken.trial.set_user_attr("seconds", seconds)
        taken.trial.set_user_attr("message", message)
        self._study.tell(taken.number, value if state == "finished" else None, ENDINGS[state])

    def is_hopeless(self, taken: Taken, readings: Iterable[tuple[int, float]]) -> bool:
        """Report what a trial has logged, step by step; whether the pruner gives it up."""
        for step, value in readings:
            if step not in taken.reported:
                taken.trial.report(value, step)
                taken.reported.add(step)
                if taken.trial.should_prune():
                    return True
        return False

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended, also those of other processes."""
        trials = self._study.get_trials(deepcopy=False)
        return len(trials) >= self._plan.num_trials and all(trial.state.is_finished() for trial in trials)

    def rows(self) -> list[dict[str, Any]]:
        """What sweep.json says of each trial."""
        return [
            {
                "number": trial.number,
                "state": STATES[trial.state],
                "value": trial.value,
                "parameters": _decoded(self._plan.space, trial),
                "seconds": trial.user_attrs.get("seconds"),
                "run": str(self._plan.run(trial.number).path.relative_to(self._plan.folder)),
                "message": trial.user_attrs.get("message", ""),
            }
            for trial in self._study.get_trials(deepcopy=False)
        ]

    def _claim(self, number: int) -> IO[str] | None:
        return hold(self._plan.folder / "trials" / f".{number:03d}.lock")

    def _taken(self, trial: OptunaTrial, claim: IO[str]) -> Taken:
        values = {key: _suggested(trial, key, parameter) for key, parameter in self._plan.space.space.items()}
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        return Taken(trial.number, values, trial, claim, set(known), trial.should_prune())


def _suggested(trial: OptunaTrial, key: str, parameter: Parameter) -> Any:
    """The value that was suggested before, or a new one. A choice is known by its JSON: Optuna takes no lists."""
    if parameter.choice is not None:
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in parameter.choice]))
    low, high = parameter.bounds
    if parameter.int:
        return trial.suggest_int(key, int(low), int(high), step=int(parameter.step or 1), log=parameter.log)
    return trial.suggest_float(key, low, high, step=parameter.step, log=parameter.loguniform is not None)


def _decoded(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    return {
        key: json.loads(trial.params[key]) if parameter.choice is not None else trial.params[key]
        for key, parameter in space.space.items()
        if key in trial.params
    }


class _Keyed(BaseSampler):
    """Draws for each trial from a generator of its own, so that what is drawn depends on the trials that have ended and
    on no process."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if self._space.sampler == "grid":
            value = self._space.combination(trial.number)[param_name]
            return json.dumps(value) if self._space.space[param_name].choice is not None else value
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _of(self, trial: FrozenTrial, *key: str) -> BaseSampler:
        seed = keyed_hash(self._space.seed, "sweep", trial.number, *key) % 2**32
        return TPESampler(seed=seed) if self._space.sampler == "tpe" else RandomSampler(seed=seed)


class _Lock(JournalFileOpenLock):
    """Of the journal; Optuna's own stays where a process was killed. A line that a full disk has cut is taken away."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal
        self._held: IO[str] | None = None

    def acquire(self) -> bool:
        self._held = hold(self._journal.with_name(".journal.lock"), wait=True)
        with self._journal.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
