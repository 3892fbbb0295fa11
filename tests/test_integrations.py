"""Trainers that own the loop: the network trains, the clock follows the optimizer, and checkpoints hold it."""

import json

import pytest
import torch
from test_resume import same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ssprop_fx
from ssprop_fx import Policy, SSPropError
from ssprop_fx.demo import ResNet


def data(count=24):
    torch.manual_seed(1)
    labels = torch.arange(count) % 10
    return torch.randn(count, 1, 8, 8) + labels.view(-1, 1, 1, 1), labels


def policy(**schedule):
    return Policy(schedule={"kind": "linear", "period": 8, "warmup": 1} | schedule)


def network():
    torch.manual_seed(0)
    return ResNet((8, 16))


def moved(before, model):
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


# --- Lightning


def lightning_parts(used=None):
    lightning = pytest.importorskip("lightning.pytorch")
    from ssprop_fx.integrations.lightning import PolicyCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network() if used is None else ssprop_fx.transform(network(), used)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    def trainer(folder, epochs, **more):
        return lightning.Trainer(
            default_root_dir=folder, max_epochs=epochs, callbacks=[PolicyCallback()], accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, **more
        )  # fmt: skip

    return Module, trainer


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=8)


def test_lightning_trains_and_resumes(tmp_path):
    used = policy()
    Module, trainer = lightning_parts(used)
    whole, before = Module(), network().state_dict()
    first = trainer(tmp_path, 4)
    first.fit(whole, loader())
    assert used.steps == 12
    assert set(moved(before, whole.net)) == set(before)

    used = policy()
    Module, trainer = lightning_parts(used)
    half = trainer(tmp_path, 2)
    half.fit(Module(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    used = policy()
    Module, trainer = lightning_parts(used)
    resumed = Module()
    trainer(tmp_path, 4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert used.steps == 12
    assert same(resumed.state_dict(), whole.state_dict())
    Plain, _ = lightning_parts()
    Plain().load_state_dict(torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"])  # no key is renamed


def test_lightning_counts_optimizer_steps(tmp_path):
    used = policy()
    Module, trainer = lightning_parts(used)
    trainer(tmp_path, 2, accumulate_grad_batches=3).fit(Module(), loader())
    assert used.steps == 2
    automatic = policy(clock="optimizer")
    Module, trainer = lightning_parts(automatic)
    trainer(tmp_path, 2).fit(Module(), loader())
    assert automatic.steps == 6


def test_lightning_without_a_transformed_network_is_an_error(tmp_path):
    Module, trainer = lightning_parts()
    with pytest.raises(SSPropError, match="transform the network where the model is built"):
        trainer(tmp_path, 1).fit(Module(), loader())


# --- Hugging Face


def hugging_face(folder, used, steps, **more):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ssprop_fx.integrations.huggingface import PolicyCallback

    images, labels = data()
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = transformers.ResNetForImageClassification(config)
    options = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_strategy="no", **more
    )  # fmt: skip
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    transformed = model if used is None else ssprop_fx.transform(model, used)
    return transformers.Trainer(transformed, options, train_dataset=rows, callbacks=[PolicyCallback()])


@pytest.mark.parametrize("restore", [False, True])
def test_hugging_face_trains_and_resumes(restore, tmp_path):
    used = policy()
    whole = hugging_face(str(tmp_path), used, 6, lr_scheduler_type="constant", restore_callback_states_from_checkpoint=restore)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    assert used.steps == 6
    assert len(moved(before, whole.model)) > len(before) // 2
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["PolicyCallback"]["attributes"]["states"][0]["steps"] == 3

    used = policy()
    again = hugging_face(str(tmp_path), used, 6, lr_scheduler_type="constant", restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert used.steps == 6
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_hugging_face_without_a_transformed_network_is_an_error(tmp_path):
    with pytest.raises(SSPropError, match="ResNetForImageClassification holds no network"):
        hugging_face(str(tmp_path), None, 1).train()


# --- loops of one's own


def test_accelerate_trains_and_resumes(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def parts():
        used = policy()
        accelerator = accelerate.Accelerator(cpu=True)
        model = ssprop_fx.transform(network(), used)
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-3))
        accelerator.register_for_checkpointing(used)
        return accelerator, model, optimizer, used

    def train(accelerator, model, optimizer, used, steps):
        images, labels = data()
        for _ in range(steps):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
                used.step()

    whole = parts()
    train(*whole, 4)
    first = parts()
    train(*first, 2)
    first[0].save_state(str(tmp_path))
    second = parts()
    second[0].load_state(str(tmp_path))
    assert second[3].steps == 2
    train(*second, 2)
    assert same(second[1].state_dict(), whole[1].state_dict())


def test_timm_trains():
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    torch.manual_seed(0)
    used = Policy()  # its clock hears of timm's optimizer steps
    model = ssprop_fx.transform(timm.create_model("resnet10t", num_classes=10, in_chans=1), used)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=4)
    images, labels = data()
    images = nn.functional.interpolate(images, (32, 32))
    for step in range(4):
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(step + 1)
    assert used.steps == 4
    assert any("conv" in name for name in moved(before, model))


def test_the_core_does_not_import_the_integrations():
    import subprocess
    import sys

    code = "import sys, ssprop_fx; assert not {'lightning', 'transformers', 'accelerate', 'ssprop_fx.integrations'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
