"""The trainer: one update after another, with everything that has to happen around them."""

import dataclasses
import hashlib
import math
import shlex
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch

from qkv.checkpoints import Checkpoint
from qkv.cost import training_flops_per_token
from qkv.data import Batch, Batches, ConversationsConfig, Dataset, PairBatch, PairBatches, PairDataset, PairSplit, Split
from qkv.errors import ConfigError, FileError, QkvError, TrainingError
from qkv.generation import BeamConfig
from qkv.loaded import Loaded
from qkv.models.pairs import PairModel
from qkv.models.transformer import Transformer
from qkv.shapes import Tensor
from qkv.training.display import Display, Progress, clock, make_display
from qkv.training.evaluate import Evaluation, count_of, evaluate, loss_of
from qkv.training.fine_tune import identity, restore_weights, starting_model, trained_weights
from qkv.training.finite import first_non_finite
from qkv.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from qkv.training.precision import fastest, matmul_peak, products_in
from qkv.training.recipe import RecipeConfig, SampleConfig
from qkv.training.run import PLOT, RECIPE, Run
from qkv.training.signals import Interrupts
from qkv.translator import Translator


@final
class Trainer:
    """A run in progress: model, optimiser and the number of steps done. Everything else follows from the recipe."""

    def __init__(
        self, recipe: RecipeConfig, dataset: Dataset | PairDataset, base: Loaded | Translator | None = None
    ) -> None:
        assert recipe.model is not None
        self.recipe, self.dataset, self.base = recipe, dataset, base
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(recipe.seed)
        try:
            model = recipe.model.build() if base is None else starting_model(recipe, base)
            self.model: Transformer | PairModel = model.to(self.device)
        except RuntimeError as error:  # torch has not the memory
            raise ConfigError(f"the model cannot be built ({str(error).splitlines()[0]}); make it smaller") from None
        if self.model.head is None:
            raise ConfigError("the recipe's model has no head and so no loss; set model.head, for example LMHead")
        if isinstance(self.model, Transformer):
            self.model.checkpoint_blocks = recipe.checkpoint_blocks
        if recipe.compile:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        sizes = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        self.batches = _batches(dataset.train, shuffle=True, **sizes)
        self.held_out = _batches(dataset.validation, shuffle=False, **sizes)
        torch.manual_seed(recipe.seed + 1)  # dropout: the same whatever building the model drew
        self.fingerprint = {"data": fingerprint(dataset.train)} | identity(recipe, base)
        self.step = 0
        self.validation: float | None = None
        self.saved_step = 0
        self.skipped = 0
        self.failures: list[str] = []
        self.precision_note = ""

    @property
    def _counted(self) -> bool:
        """Whether only some tokens are targets: the data are conversations."""
        return isinstance(self.dataset, Dataset) and self.dataset.train.counted is not None

    # --- beginning -------------------------------------------------------------------------------------------------

    def choose_precision(self) -> None:
        """Put the faster of float32 and bfloat16 into the recipe, if it says auto."""
        if self.recipe.precision != "auto":
            return
        random = random_state(self.device)
        batches = self._micro_batches(0)[:1]
        name, seconds = fastest(lambda precision: self._gradients(batches, precision))
        self.model.zero_grad(set_to_none=True)
        set_random_state(self.device, random)
        self.recipe = dataclasses.replace(self.recipe, precision=name)
        times = ", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in seconds.items())
        self.precision_note = f"precision: {name}, the faster here ({times} for a forward and backward pass)"

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint: weights, optimiser, random numbers, place in the data."""
        if checkpoint.state.get("data") != self.fingerprint["data"]:
            raise FileError(
                f"{checkpoint.path}: was trained on other data than the recipe's source gives now; put the corpus back "
                "as it was, or begin a new run"
            )
        try:
            restore_weights(self.recipe, self.model, checkpoint, self.fingerprint)
            load_optimizer(self.optimizer, self.model, checkpoint.tensors("optimizer"))
            set_random_state(self.device, checkpoint.tensors("random"))
            self.validation = checkpoint.state["validation"]
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise FileError(
                f"{checkpoint.path}: does not fit the recipe ({reason}); resume with its own recipe"
            ) from None
        self.step = self.saved_step = checkpoint.step

    def open(self, run: Run) -> None:
        """Take a run folder to write to, and begin to show what happens."""
        self.run = run
        self.display: Display = make_display(str(run.path))

    # --- one step --------------------------------------------------------------------------------------------------

    def _micro_batches(self, step: int) -> list[Batch | PairBatch]:
        """The batches of one update: a function of the step and the seed alone."""
        first = step * self.recipe.accumulation
        numbers = (divmod(first + i, len(self.batches)) for i in range(self.recipe.accumulation))
        return [self.batches.batch(epoch, index) for epoch, index in numbers]

    def _gradients(self, batches: list[Batch | PairBatch], precision: str) -> tuple[float, int]:
        """Add the gradients of the mean loss over all tokens of `batches`; returns the loss and how many tokens."""
        count = sum(count_of(self.model, batch) for batch in batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            with products_in(precision, self.device):
                loss, aux = loss_of(self.model, batch, self.device, 1 / max(1, count))
            extra = sum(aux.losses.values()) / len(batches) if aux is not None and aux.losses else 0.0
            (loss + extra).backward()
            total += loss.detach().cpu()
        return total.item(), count

    def update(self) -> dict[str, Any]:
        """One step; returns its line of the metrics. Raises before the weights change."""
        recipe = self.recipe
        random = random_state(self.device)
        batches = self._micro_batches(self.step)
        loss, count = self._gradients(batches, recipe.precision)
        limit = math.inf if recipe.clip is None else recipe.clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        lr = recipe.optimizer.lr * recipe.schedule.factor(self.step, recipe.steps)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        elif recipe.non_finite == "stop":
            set_random_state(self.device, random)  # the same dropout again; and the step leaves no trace
            where = first_non_finite(self.model, lambda: self._losses(batches))
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}; it began in "
                f"{where}. The weights are as they were; lower optimizer.lr, or set non_finite=skip"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += not finite
        entry = {"step": self.step, "loss": loss, "lr": lr, "gradient_norm": norm, "tokens": count}
        return entry if finite else entry | {"skipped": True}

    def _losses(self, batches: list[Batch | PairBatch]) -> None:
        for batch in batches:
            with products_in(self.recipe.precision, self.device):
                loss_of(self.model, batch, self.device, None)

    # --- the run ---------------------------------------------------------------------------------------------------

    def run_to_end(self) -> int:
        """All steps that are left; returns the exit code (see `train`)."""
        began = time.monotonic()
        if self.precision_note:
            self.display.say(self.precision_note)
        if isinstance(self.batches, Batches) and self._counted and self.batches.n_cut:
            self.display.say(
                f"warning: {self.batches.n_cut} of {self.dataset.train.n_documents} conversations are longer than "
                f"context={self.recipe.context} and are cut into pieces that do not see one another; the longest takes "
                f"context={self.batches.longest}"
            )
        if isinstance(self.dataset, PairDataset):
            sizes = self.dataset.train.n_documents, self.dataset.validation.n_documents
            self.display.say(
                f"{sizes[0]:,} pairs to train on, {sizes[1]:,} held out; of each source the first pair counts"
            )
        with Interrupts() as interrupts:
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
        recipe = self.recipe
        peak = matmul_peak(recipe.precision, self.device)
        flops = training_flops_per_token(self.model.config, recipe.context, frozen=recipe.adapter is not None)
        started, history, speeds = (time.monotonic(), self.step), [], []
        while self.step < recipe.steps and interrupts.received is None:
            before = time.perf_counter()
            entry = self.update()
            seconds = time.perf_counter() - before
            self._write(lambda entry=entry: self.run.log(entry))
            history.append(entry["loss"])
            speeds = [*speeds[-19:], entry["tokens"] / seconds]
            speed = statistics.median(speeds)
            last = self.step == recipe.steps
            if last or self.step % recipe.evaluate_every == 0:
                self._evaluate(None if last else recipe.evaluate_batches)
            if self.step % recipe.save_every == 0:
                self._save()
            share = speed * flops / peak
            self.display.update(
                Progress(self.step, recipe.steps, entry["loss"], self.validation, speed, share, history, started)
            )
        if self.saved_step != self.step:  # the last step, or a signal
            self._save()

    def _evaluate(self, limit: int | None) -> None:
        result: Evaluation = evaluate(self.model, self.held_out, precision=self.recipe.precision, limit=limit)
        self.validation = result.loss
        entry: dict[str, float] = {"step": self.step, "validation_loss": result.loss}
        if limit is None and isinstance(self.dataset, Dataset) and self.dataset.validation.n_bytes:
            entry["bits_per_byte"] = result.total / math.log(2) / self.dataset.validation.n_bytes
        self._write(lambda: self.run.log(entry))
        if self.recipe.sample is not None:
            text = self.sample()
            self._write(lambda: self.run.add_sample(self.step, text))
        self._write(self.run.plot)

    def sample(self) -> str:
        """A text from the model as it is now."""
        settings = self.recipe.sample
        assert settings is not None
        if isinstance(self.dataset, PairDataset):
            return self._translation(settings)
        tokenizer = self.dataset.tokenizer
        assert tokenizer is not None
        assert isinstance(self.model, Transformer)
        stop = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
        loaded = Loaded(model=self.model, tokenizer=tokenizer, config=self.model.config, stop_ids=stop)
        if isinstance(self.base, Loaded):
            loaded = dataclasses.replace(self.base, model=self.model)
        sampling = settings.sampling(self.recipe.seed)
        if isinstance(self.recipe.data.source, ConversationsConfig):
            question = {"role": "user", "content": settings.prompt}
            answer = loaded.chat([question], max_new_tokens=settings.tokens, sampling=sampling)
            return f"{settings.prompt}\n{answer}"
        text = loaded.generate(settings.prompt, max_new_tokens=settings.tokens, sampling=sampling)
        return settings.prompt + str(text)

    def _translation(self, settings: SampleConfig) -> str:
        """What the model makes of the sample's prompt, or of the first pairs that were held out."""
        assert isinstance(self.dataset, PairDataset)
        assert isinstance(self.model, PairModel)
        tokenizer = self.dataset.tokenizer
        end = tokenizer.target.end_of_text
        assert end is not None
        translator = Translator(self.model, tokenizer.source, tokenizer.target, end, end, self.recipe.context)
        texts = [settings.prompt] if settings.prompt else [source for source, _ in self.dataset.held_out[:3]]
        training = self.model.training
        self.model.eval()
        try:
            found = translator.translations(texts, search=BeamConfig(max_new_tokens=settings.tokens))
        finally:
            self.model.train(training)
        return "\n".join(f"{text} → {best[0].text}" for text, best in zip(texts, found, strict=True))

    def _save(self) -> None:
        files = trained_weights(self.recipe, self.model) | {
            "optimizer": optimizer_tensors(self.optimizer, self.model),
            "random": random_state(self.device),
        }
        state = {"validation": self.validation} | self.fingerprint
        if self._write(lambda: self.run.store.save(self.step, files, state)):
            self.saved_step = self.step

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
        say, path, recipe = self.display.say, self.run.path, self.recipe
        if interrupts.received is not None:
            name = signal.Signals(interrupts.received).name
            say(f"stopped by {name} after step {self.step}; saved up to step {self.saved_step} in {path}")
            say(f"go on with: qkv train {shlex.quote(str(path / RECIPE))} --resume")
            return
        if self.failures:
            say(f"warning: not all was written; the first reason: {self.failures[0]}")
        if self.skipped:
            say(f"warning: skipped {self.skipped} of the steps, where the loss or the gradient was not finite")
        held_out = "" if self.validation is None else f", held-out loss {self.validation:.4f}"
        say(f"trained {self.step} steps in {clock(seconds)}{held_out}")
        if recipe.sample is not None:
            say(f"\n{self.sample()}\n")
        say(f"{path} holds {', '.join(sorted(file.name for file in path.iterdir()))}")
        if not (self.failures or (path / PLOT).exists()):
            say('no loss.png: matplotlib is not installed; pip install "qkv[plot]"')
        folder = shlex.quote(str(path))
        if isinstance(self.dataset, PairDataset):
            say(f"next: qkv translate {folder} TEXT   ·   qkv eval {folder}   ·   qkv inspect {folder} TEXT")
        elif self.dataset.tokenizer is not None:
            write = f'qkv generate {folder} "Once"' if not self._counted else f"qkv chat {folder}"
            say(f"next: {write}   ·   qkv eval {folder} FILE   ·   qkv show {folder}")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where the random numbers of this process stand."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Go back to what `random_state` returned."""
    torch.set_rng_state(state["cpu"].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone())


def _batches(
    split: Split | PairSplit, *, context: int, batch_size: int, seed: int, shuffle: bool
) -> Batches | PairBatches:
    if isinstance(split, PairSplit):
        return PairBatches(split, context=context, batch_size=batch_size, seed=seed, shuffle=shuffle)
    return Batches(split, context=context, batch_size=batch_size, seed=seed, shuffle=shuffle)


def fingerprint(split: Split | PairSplit) -> str:
    """A hash of the tokens and where documents begin: the order of the data means nothing for another corpus."""
    if isinstance(split, PairSplit):
        return fingerprint(split.source) + fingerprint(split.target)
    digest = hashlib.sha256(split.offsets.tobytes())
    digest.update(np.ascontiguousarray(split.values).data)
    if split.counted is not None:
        digest.update(np.ascontiguousarray(split.counted).data)
    return digest.hexdigest()
