"""Each of torch's own modules on its first sample: `make check-modules` takes all samples, and in more ways."""

from __future__ import annotations

import warnings

from survey.found import kinds_differ, values_differ
from survey.trial import Trial, alone, together


def test_every_module_equals_its_lone_run() -> None:
    from survey.samples import LISTS, entries, samples  # seconds of import, in the one worker that runs this

    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for infos in LISTS.values():
            for info, training in entries(infos):
                if training or info.train_and_eval_differ:
                    sample = next(samples(info, training))
                    what = _difference(Trial(sample.make, sample.inputs, False, "gradients"))
                    wrong += [f"{info.name} ({'train' if training else 'eval'}): {what}"] if what else []
    assert wrong == []


def _difference(trial: Trial) -> str:
    lone, drew = alone(trial)
    ours, _ = together(trial)
    return kinds_differ(ours, lone) or values_differ(ours, lone, lambda: None if drew else alone(trial.wide())[0])
