"""A session: from where a trainer stands to the last step, with all that is shown and written on the way."""

import dataclasses
import shlex
import signal
import statistics
import time
from collections.abc import Callable
from typing import final

from qkv.cost import training_flops_per_token
from qkv.errors import FileError, QkvError
from qkv.training.display import Display, Progress, clock
from qkv.training.precision import matmul_peak
from qkv.training.run import PLOT, RECIPE, Run
from qkv.training.signals import Interrupts
from qkv.training.trainer import Trainer


@final
class Session:
    """A trainer with the run folder that it writes to, and the display that shows how far it is."""

    def __init__(self, trainer: Trainer, run: Run, display: Display) -> None:
        self.trainer, self.run, self.display = trainer, run, display
        self.saved_step = trainer.step
        self.skipped = 0
        self.failures: list[str] = []

    def run_to_end(self) -> int:
        """All steps that are left; returns the exit code (see `train`)."""
        began = time.monotonic()
        for note in self.trainer.task.notes(self.trainer.recipe):
            self.display.say(note)
        recipe = self.trainer.recipe
        if (warmup := recipe.schedule.warmup) >= recipe.steps:
            self.display.say(
                f"warning: schedule.warmup={warmup} and the run has {recipe.steps} steps: the learning rate never gets "
                "to optimizer.lr; lower the warm-up"
            )
        with Interrupts(self.display.note) as interrupts:
            try:
                self._loop(interrupts)
            except (QkvError, OSError):  # OSError: nobody reads what is shown, or its disk is full
                self._save()
                raise
            finally:
                self.display.close()
        self._farewell(interrupts, time.monotonic() - began)
        return interrupts.exit_code or (1 if self.failures else 0)

    def _loop(self, interrupts: Interrupts) -> None:
        trainer, recipe = self.trainer, self.trainer.recipe
        peak = matmul_peak(recipe.precision, trainer.device)
        flops = training_flops_per_token(trainer.model.config, recipe.context, frozen=recipe.adapter is not None)
        started, history, speeds = (time.monotonic(), trainer.step), [], []
        measured = {entry["step"] for entry in self.run.metrics() if "validation_loss" in entry}
        if trainer.step and trainer.held_out is not None and trainer.step not in measured:
            self._evaluate(interrupts)  # it was stopped before, or while it did
        while trainer.step < recipe.steps and interrupts.received is None:
            before = time.perf_counter()
            entry = trainer.update()
            seconds = time.perf_counter() - before
            self.skipped += "skipped" in entry
            self._write(lambda entry=entry: self.run.log(entry))
            history.append(entry["loss"])
            speeds = [*speeds[-19:], trainer.read / seconds]
            speed = statistics.median(speeds)
            share, loss = speed * flops / peak, entry["loss"]
            shown = Progress(trainer.step, recipe.steps, loss, trainer.validation, speed, share, history, started)
            self.display.progress = shown
            if trainer.step == recipe.steps or trainer.step % recipe.save_every == 0:
                self._save()  # first: an evaluation may take long
            self._evaluate(interrupts)
            self.display.update(dataclasses.replace(shown, validation=trainer.validation))
        if self.saved_step != trainer.step:  # the last step, or a signal
            self._save()

    def _evaluate(self, interrupts: Interrupts) -> None:
        """Where it is due: measure, write a sample and draw. A signal ends it."""
        recipe, step = self.trainer.recipe, self.trainer.step
        last = step == recipe.steps
        if not last and step % recipe.evaluate_every:
            return

        def goes_on(done: int, of: int) -> bool:
            self.display.doing("evaluating", done, of)
            return interrupts.received is None

        before = self.trainer.validation
        entry = self.trainer.evaluate(None if last else recipe.evaluate_batches, goes_on)
        if interrupts.received is not None:
            self.trainer.validation = before
            return
        if self.trainer.held_out is not None:
            self._write(lambda: self.run.log(entry))
        if (text := self.trainer.sample()) is not None:
            self._write(lambda: self.run.add_sample(self.trainer.step, text))
        self._write(self.run.plot)
        if last:
            self._write(lambda: self.trainer.task.pictures(self.run.path))

    def _save(self) -> None:
        if self._write(lambda: self.run.store.save(self.trainer.step, *self.trainer.state())):
            self.saved_step = self.trainer.step

    def _write(self, write: Callable[[], object]) -> bool:
        """Write to the run folder; returns whether that worked. A full disk is a warning, and training goes on."""
        try:
            write()
            return True
        except OSError as error:
            failure = f"{self.run.path}: not everything is written ({error.strerror}); free some space"
        except FileError as error:
            failure = str(error)
        if failure not in self.failures:
            self.failures.append(failure)
            self.display.say(f"warning: {failure}")
        return False

    def _farewell(self, interrupts: Interrupts, seconds: float) -> None:
        trainer, say, path = self.trainer, self.display.say, self.run.path
        if interrupts.received is not None:
            name = signal.Signals(interrupts.received).name
            say(f"stopped by {name} after step {trainer.step}; saved up to step {self.saved_step} in {path}")
            say(f"continue with: qkv train {shlex.quote(str(path / RECIPE))} --resume")
            return
        if self.failures:
            say(f"warning: not all was written; the first reason: {self.failures[0]}")
        if self.skipped:
            say(f"warning: skipped {self.skipped} of the steps, where the loss or the gradient was not finite")
        held_out = "" if trainer.validation is None else f", held-out loss {trainer.validation:.4f}"
        say(f"trained {trainer.step} steps in {clock(seconds)}{held_out}")
        if (text := trainer.sample()) is not None:
            say(f"\n{text}\n")
        say(f"{path} holds {', '.join(sorted(file.name for file in path.iterdir()))}")
        if not (self.failures or (path / PLOT).exists()):
            say('no loss.png: matplotlib is not installed; pip install "qkv[plot]"')
        if verbs := trainer.task.next_steps(shlex.quote(str(path))):
            say(f"next: {verbs}")
