"""The examples run, in their short form, log, save and resume."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_resume import same

import ssprop_fx

EXAMPLES = Path(__file__).parents[1] / "examples"
FIGURES = {
    "train_classifier": {"loss", "factor", "accuracy"},
    "train_ddpm": {"loss", "factor"},
    "train_gan": {"generator_loss", "discriminator_loss"},
    "segment_volume": {"loss", "factor", "dice"},
}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    torch._dynamo.reset()


def train(name: str, folder: Path, *arguments: str) -> list[dict]:
    """Run an example; its log."""
    __import__(name)
    sys.modules[name].main([*arguments, "--out", str(folder)])
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", FIGURES)
def test_the_short_form_trains_and_logs(name, tmp_path):
    log = train(name, tmp_path, "--short", "--amp")
    assert [line["epoch"] for line in log] == [1, 2]
    for line in log:
        assert set(line) == {"epoch", "step"} | FIGURES[name]
        assert all(map(torch.isfinite, map(torch.tensor, line.values())))
    # every other step is sparse, but none of the last quarter, which is half of the second epoch, or all of two steps
    assert [line.get("factor") for line in log] in ([0.5, 0.25], [0.5, 0], [None, None])
    grids = sorted(path.name for path in tmp_path.glob("*.png"))
    assert grids == (["samples-001.png", "samples-002.png"] if name in ("train_ddpm", "train_gan") else [])


@pytest.mark.parametrize("name", ["train_ddpm", "train_gan", "segment_volume"])
def test_an_epoch_and_another_one_equal_two(name, tmp_path):
    (tmp_path / "policy.yaml").write_text("schedule: {kind: bar}\n")  # which does not depend on the length of the run
    policy = ["--policy", str(tmp_path / "policy.yaml")]
    whole = train(name, tmp_path / "whole", "--short", *policy)
    train(name, tmp_path / "parts", "--short", "--epochs", "1", *policy)
    assert train(name, tmp_path / "parts", "--short", "--resume", *policy) == whole
    states = [torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "parts")]
    assert same(*states)


def test_the_default_of_a_longer_run_is_another_schedule(tmp_path):
    train("segment_volume", tmp_path, "--short", "--epochs", "1")
    with pytest.raises(ssprop_fx.PolicyError, match="schedule"):
        train("segment_volume", tmp_path, "--short", "--resume")


@pytest.mark.parametrize("name", FIGURES)
def test_each_example_has_a_folder_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    __import__(name)
    sys.modules[name].main(["--short", "--epochs", "1"])
    assert (tmp_path / "runs" / name / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["train_gan", "segment_volume"])
def test_a_checkpoint_of_another_example_is_refused(name, tmp_path):
    train("train_classifier", tmp_path, "--short", "--epochs", "1")
    (log,) = tmp_path.glob("log.jsonl")
    before = log.read_text()
    with pytest.raises(
        SystemExit, match=r"checkpoint\.pt is of another example, or of other options.*another folder with --out"
    ):
        train(name, tmp_path, "--short", "--resume")
    assert log.read_text() == before


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("policy", ["default", "dense"])
def test_a_batch_that_cannot_be_filled_is_refused(name, policy, tmp_path):
    with pytest.raises(SystemExit, match=r"--batch 5000: no step can be made of \d+ images; expected .* from 1 to"):
        train(name, tmp_path, "--short", "--batch", "5000", "--policy", policy)


def test_dense_and_a_policy_file(tmp_path):
    (tmp_path / "policy.yaml").write_text("drop_rate: 0.5\nschedule: {kind: constant}\n")
    dense = train("train_classifier", tmp_path / "dense", "--short", "--policy", "dense")
    sparse = train("train_classifier", tmp_path / "sparse", "--short", "--policy", str(tmp_path / "policy.yaml"))
    assert "factor" not in dense[0]
    assert sparse[0]["factor"] == 1
    assert dense[0]["loss"] != sparse[0]["loss"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_and_tensorboard(tmp_path):
    eager = train("train_classifier", tmp_path / "eager", "--short", "--epochs", "1")
    compiled = train("train_classifier", tmp_path / "compiled", "--short", "--epochs", "1", "--compile", "--tensorboard")
    assert compiled[0]["loss"] == pytest.approx(eager[0]["loss"], abs=1e-3)
    assert list((tmp_path / "compiled").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("model", ["torchvision:mobilenet_v3_small", "timm:resnet10t"])
def test_models_of_libraries(model, tmp_path):
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    log = train("train_classifier", tmp_path, "--short", "--epochs", "1", "--batch", "128", "--model", model)
    assert len(log) == 1


def _write_idx(path, values):
    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.dim()]) + shape + bytes(values.flatten().tolist()))


@pytest.mark.parametrize("zipped", [False, True])
def test_images_from_idx_files(zipped, tmp_path):
    from images import Images

    torch.manual_seed(0)
    for part, count in (("train", 6), ("t10k", 4)):
        for what, values in (
            ("images-idx3", torch.randint(0, 256, (count, 5, 7))),
            ("labels-idx1", torch.arange(count) % 3),
        ):
            path = tmp_path / f"{part}-{what}-ubyte"
            _write_idx(path, values)
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
            if (part, what) == ("t10k", "images-idx3"):
                pictures = values
    data = Images.load(str(tmp_path))
    assert (data.train.shape, data.test.shape, data.classes) == ((6, 1, 5, 7), (4, 1, 5, 7), 3)
    assert data.test_labels.tolist() == [0, 1, 2, 0]
    assert abs(data.train.mean().item()) < 1e-5
    assert data.train.std().item() == pytest.approx(1)
    flat = data.test.flatten()
    scale = (flat[1] - flat[0]) / (pictures.flatten()[1] - pictures.flatten()[0])
    torch.testing.assert_close(flat - flat[0], scale * (pictures.flatten() - pictures.flatten()[0]))


def test_images_from_folders(tmp_path):
    from images import Images
    from torchvision.io import write_png

    for part in ("train", "val"):
        for i, name in enumerate(("cats", "dogs")):
            (tmp_path / part / name).mkdir(parents=True)
            write_png(torch.full((3, 12, 20), 50 + 100 * i, dtype=torch.uint8), str(tmp_path / part / name / "0.png"))
    data = Images.load(str(tmp_path), size=8)
    assert data.train.shape == data.test.shape == (2, 3, 8, 8)
    assert data.train_labels.tolist() == [0, 1]
    with pytest.raises(SystemExit, match="expected digits, fashion-mnist"):
        Images.load(str(tmp_path / "nowhere"))


@pytest.mark.slow
def test_mixed_precision_is_as_accurate_within_noise(tmp_path):
    """At full length, three seeds each: the means differ by less than three standard errors of counting 517 test images."""
    found = {}
    for options in ((), ("--amp",)):
        runs = [train("train_classifier", tmp_path / f"{seed}{options}", "--seed", str(seed), *options) for seed in range(3)]
        found[options] = sum(log[-1]["accuracy"] for log in runs) / 3
    share = sum(found.values()) / 2
    error = (2 * share * (1 - share) / (3 * 517)) ** 0.5
    print(found, error)
    assert share > 0.9
    assert abs(found[()] - found[("--amp",)]) < 3 * error
