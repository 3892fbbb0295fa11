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


def test_every_arm_of_the_diffusion_model_has_three_seeds_and_a_grid(report):
    module, _ = report
    found = module.diffusion(RESULTS)
    assert {"dense", "step", "equal"} <= found.keys()
    for arm, runs in found.items():
        assert runs.keys() >= {0, 1, 2}
        assert (RESULTS / "ddpm" / f"{arm}.png").stat().st_size > 1000
        for seed, run in runs.items():
            assert all(run[key] == found["dense"][seed][key] for key in ("data", "width", "batch", "torch"))
    for seed, run in found["step"].items():
        dense = found["dense"][seed]
        assert run["conv_backward_flops"] == pytest.approx(0.6 * dense["conv_backward_flops"], rel=0.01)
        assert found["equal"][seed]["all_flops"] == pytest.approx(run["all_flops"], rel=0.02)
