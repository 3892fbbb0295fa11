"""docs/results.md is what the raw files say."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accuracy
    import accuracy_report

    return accuracy_report, list(accuracy.ARMS)  # what `accuracy` puts on the path goes with the patch


def test_the_page_is_generated_from_the_raw_files(report):
    module, order = report
    assert (ROOT / "docs" / "results.md").read_text() == module.text(RESULTS, order)


def test_arms_of_a_seed_are_comparable(report):
    """Of each regime: the same network and images, and FLOPs that differ from the dense ones by what the arm is."""
    module, order = report
    results, _ = module.read(RESULTS, order)
    assert {"short", "long", "finetune", "overfit"} <= results.keys()
    for arms in results.values():
        assert {"dense", "step", "equal", "tail"} <= arms.keys()
        assert all(len(summary.runs) >= 3 for summary in arms.values())
        for summary in arms.values():
            for seed, run in summary.runs.items():
                dense = summary.dense[seed]
                for key in ("regime", "network", "seed", "torch", "ssprop_fx"):
                    assert run[key] == dense[key]
        assert arms["step"].backward == pytest.approx(0.6, abs=0.005)
        assert arms["equal"].flops == pytest.approx(arms["step"].flops, abs=0.002)
