"""A model that learns from labels before they are known is caught; ours passes."""

import pytest

from qlib_ext.audit import Settings, audit
from qlib_ext.models import IncrementalModel

SETTINGS = Settings(data="embedded", stocks=24, years=2, refit=False, days=0)
WINDOW = {"fit_start_time": "2012-01-01", "fit_end_time": "2016-12-14"}
NETWORK = {
    "class": "MultiFactorRNN",
    "module_path": "qlib_ext.models",
    "kwargs": {
        "n_factors": 1,
        "hidden_size": 8,
        "num_layers": 1,
        "step_len": 5,
        "n_epochs": 1,
        "seed": 0,
        "GPU": -1,
    },
}


class Impatient(IncrementalModel):
    """Takes a label for known on the day after its own, as if it had no horizon."""

    def _known_reach(self, handler):
        return 1


class Silent(Impatient):
    """As impatient, and does not say which labels it used: the scores must show it."""

    @property
    def last_labels(self):
        raise AttributeError("last_labels")


def workflow(cls, adapt):
    return {
        "qlib_init": {"provider_uri": "/nowhere", "region": "cn"},
        "task": {
            "model": {
                "class": cls.__name__,
                "module_path": cls.__module__,
                "kwargs": {
                    "adapt": adapt,
                    "interval": 2,
                    "delay": True,
                    "step_lr": 0.01,
                    "model": NETWORK,
                },
            },
            "dataset": {
                "class": "PanelDataset",
                "module_path": "qlib_ext.dataset",
                "kwargs": {
                    "handler": {
                        "class": "DayHandler",
                        "module_path": "data_handlers.day",
                        "kwargs": {
                            "instruments": "all",
                            "start_time": "2012-01-01",
                            "end_time": "2020-12-31",
                            "styles": [],
                            "neutralize": [],
                            **WINDOW,
                        },
                    },
                    "segments": {
                        "train": ["2012-01-01", "2016-12-14"],
                        "valid": ["2017-01-01", "2017-12-14"],
                        "test": ["2018-01-01", "2020-12-31"],
                    },
                },
            },
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "adapt", "status", "words"),
    [
        (Impatient, "naive", "fail", "learnt from labels that were not known"),
        (Silent, "naive", "fail", "scores"),
        (IncrementalModel, "naive", "pass", ""),
        (Silent, "double_adapt", "fail", "scores"),
        (IncrementalModel, "double_adapt", "pass", ""),
    ],
)
def test_a_leak_of_the_horizon_is_caught(cls, adapt, status, words):
    result = audit(workflow(cls, adapt), checks=["perturbation"], settings=SETTINGS)
    verdict = result.verdicts["perturbation"]
    print(cls.__name__, adapt, verdict.status, verdict.summary)
    assert verdict.status == status and words in verdict.summary, verdict.summary
