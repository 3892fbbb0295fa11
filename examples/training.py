"""What the examples share: options, and a training run that can be killed at any moment and resumed, bit for bit.

A run's folder, ``--out``, holds ``log.jsonl`` (a line per epoch), ``checkpoint.pt`` (replaced in one operation, so that it
is whole whenever the run is killed) and, with ``--tensorboard``, event files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import ssprop_fx
from ssprop_fx import Policy


def options(description: str, script: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of the options that all examples have.

    Args:
        script: the example's ``__file__``, whose name its runs' folder has.
        defaults: ``epochs``, ``batch`` and ``rate``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs", Path(script).stem), help="folder of the run; default: %(default)s"
    )
    parser.add_argument(
        "--policy", default="default", help="a policy file; `default`: 0.8 at every other step, then a dense quarter; `dense`"
    )
    parser.add_argument("--epochs", type=int, default=defaults.get("epochs", 10))
    parser.add_argument("--batch", type=int, default=defaults.get("batch", 64))
    parser.add_argument("--rate", type=float, default=defaults.get("rate", 3e-3), help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="through torch.compile; needs a C++ compiler")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints; default: an epoch's")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events, too")
    parser.add_argument("--short", action="store_true", help="a run of seconds, to see that it works")
    return parser


def load_policy(name: str, steps: int) -> Policy | None:
    """The policy that ``--policy`` names, for a run of so many steps; None is dense training.

    The length of a run is known here, so the default is the library's with the setting that did best for runs of a known
    length: its last quarter is dense (docs/results.md).
    """
    if name == "dense":
        return None
    if name == "default":
        return Policy(schedule={"kind": "bar", "period": 2, "total": steps, "cooldown": steps // 4})
    return Policy.load(name)


def prepare(model: nn.Module, policy: Policy | None, compiled: bool) -> Callable[..., Any]:
    """What a training step calls in the model's place; the model's own ``state_dict`` is what to save."""
    if compiled:
        if policy is None:
            return torch.compile(model)
        return torch.compile(model, backend="ssprop", options={"policy": policy})  # type: ignore[dict-item]
    return model if policy is None else ssprop_fx.transform(model, policy)


def autocast(chosen: argparse.Namespace) -> contextlib.AbstractContextManager:
    """bfloat16 autocast with ``--amp``, else nothing."""
    return torch.autocast(torch.device(chosen.device).type, torch.bfloat16, enabled=chosen.amp)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def steps_of_an_epoch(images: int, batch: int) -> int:
    """Whole batches of so many images.

    Raises:
        SystemExit: there is not one.
    """
    if not 0 < batch <= images:
        raise SystemExit(f"--batch {batch}: no step can be made of {images} images; expected a whole number from 1 to {images}")
    return images // batch


def batches(images: int, batch: int, step: int, seed: int) -> Tensor:
    """Indices of the step's images: each epoch has an order of its own, which depends on seed and epoch alone."""
    epoch, place = divmod(step, images // batch)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[place * batch : (place + 1) * batch]


class Run:
    """The steps of a training run: iterate over it, and it shows progress, saves checkpoints and writes the log.

    Args:
        chosen: the options.
        per_epoch: steps in an epoch.
        parts: what the checkpoint holds, by name: anything with ``state_dict`` and ``load_state_dict``, or None. Make
            them before the run, which loads their states when it resumes.

    Every source of random numbers that a step draws from is saved, too. What :meth:`add` was given is averaged over the
    epoch for the log.
    """

    def __init__(self, chosen: argparse.Namespace, per_epoch: int, parts: Mapping[str, Any]) -> None:
        self.folder, self.per_epoch, self.epochs = chosen.out, per_epoch, chosen.epochs
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.save_every = chosen.save_every or per_epoch
        self.step, self.sums, self.history = 0, {}, []  # type: ignore[var-annotated]
        self.folder.mkdir(parents=True, exist_ok=True)
        if chosen.resume and (self.folder / "checkpoint.pt").exists():
            self._load()
        self._write_log()
        self.writer = None
        if chosen.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=len(self.history))

    def __iter__(self) -> Iterator[int]:
        total = self.epochs * self.per_epoch
        columns = TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, TextColumn("{task.fields[line]}")) as progress:
            task = progress.add_task("", total=total, completed=self.step, epoch=len(self.history) + 1, line="")
            while self.step < total:
                yield self.step
                self.step += 1
                line = ", ".join(f"{k} {v:.4g}" for k, v in (self.history[-1] if self.history else {}).items() if k != "epoch")
                progress.update(task, completed=self.step, epoch=min(len(self.history) + 1, self.epochs), line=line)
                if self.step % self.save_every == 0 or self.step == total:
                    self._save()
        if self.writer:
            self.writer.close()

    @property
    def ends_epoch(self) -> bool:
        """Whether the step that runs now is the last of its epoch."""
        return (self.step + 1) % self.per_epoch == 0

    @property
    def epoch(self) -> int:
        """The epoch that the step belongs to, counted from 1."""
        return self.step // self.per_epoch + 1

    def add(self, **values: Tensor | float) -> None:
        """Figures of this step, for the mean over the epoch."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(value), count + 1)

    def log(self, **values: Any) -> None:
        """End the epoch: a line of JSON with the means of what was added, and with ``values``."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.history.append({"epoch": self.epoch, "step": self.step + 1, **means, **values})
        self.sums = {}
        self._write_log()
        if self.writer:
            for name, value in self.history[-1].items():
                self.writer.add_scalar(name, value, len(self.history))

    def _write_log(self) -> None:
        (self.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.history))

    def _save(self) -> None:
        state = {
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "random": random_state(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        part = self.folder / "checkpoint.part"
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / "checkpoint.pt")

    def _load(self) -> None:
        file = self.folder / "checkpoint.pt"
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except ssprop_fx.PolicyError:  # which says what differs
                raise
            except (KeyError, RuntimeError, ValueError) as problem:  # what is not there, modules, optimizers
                why = "it has none" if name not in state else str(problem).partition("\n")[0].rstrip(":")
                raise SystemExit(
                    f"--resume: {file} is of another example, or of other options, and does not fit the {name} of this run "
                    f"({why}); name another folder with --out, or leave out --resume to begin anew"
                ) from None
        self.step, self.sums, self.history = state["step"], state["sums"], state["history"]
        set_random_state(state["random"])


def random_state() -> dict[str, Any]:
    """The states of the random number generators of torch, numpy and Python, as tensors and plain values."""
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    random.setstate(state["python"])
