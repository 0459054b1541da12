"""The trainer: one update after another. What happens around them is the session's (`session.py`)."""

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch

from qkv.checkpoints import Checkpoint
from qkv.data import Batch, Batches
from qkv.errors import ConfigError, FileError, TrainingError
from qkv.models.model import Model
from qkv.nn.sublayer import Aux, merge
from qkv.shapes import Tensor
from qkv.tasks import Task
from qkv.training.ahead import Ahead
from qkv.training.fine_tune import identity, restore_weights, starting_model, trained_weights
from qkv.training.finite import first_non_finite
from qkv.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from qkv.training.precision import fastest, products_in
from qkv.training.recipe import RecipeConfig


@final
class Trainer:
    """Model, optimiser and the number of steps done; `read` is how many tokens the last step read.

    Args:
        recipe: Resolved for the task.
        task: From its `data.prepare`.
        base: The model that `start` names; None: there is none.

    Raises:
        ConfigError: The model cannot be built, or cannot be trained as the recipe says.
    """

    def __init__(self, recipe: RecipeConfig, task: Task, base: Model | None = None) -> None:
        assert recipe.model is not None
        self.recipe, self.task = recipe, task
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(recipe.seed)
        try:
            with torch.device("meta"):
                _check_memory(recipe.model.build())
            model = recipe.model.build() if base is None else starting_model(recipe, base)
            self.model: Model = model.to(self.device)
        except RuntimeError as error:  # torch has not the memory
            raise ConfigError(f"the model cannot be built ({str(error).splitlines()[0]}); make it smaller") from None
        if self.model.head is None:
            raise ConfigError("the recipe's model has no head and so no loss; set model.head, for example LMHead")
        if recipe.compile or recipe.checkpoint_blocks:
            self._prepare_blocks()
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        self.batches, self.held_out = task.batches(recipe)
        self._ahead = Ahead(partial(_of_step, self.batches, recipe.accumulation), recipe.steps)
        torch.manual_seed(recipe.seed + 1)  # dropout: the same whatever building the model drew
        self.fingerprint = {"data": task.fingerprint} | identity(recipe, base)
        self.step = self.read = 0
        self.validation: float | None = None

    def _prepare_blocks(self) -> None:
        blocks = list(self.model.blocks)
        if not blocks:
            name = "compile" if self.recipe.compile else "checkpoint_blocks"
            raise ConfigError(f"{name} works on blocks and this model, a recurrent one, has none; leave it out")
        if self.recipe.checkpoint_blocks:
            self.model.checkpoint_blocks = True
        for block in blocks if self.recipe.compile else ():
            block.compile()

    # --- beginning -------------------------------------------------------------------------------------------------

    def choose_precision(self) -> str | None:
        """Put the faster of float32 and bfloat16 into the recipe, if it says auto; returns what to say about it."""
        if self.recipe.precision != "auto":
            return None
        random = random_state(self.device)
        batches = self._micro_batches(0)[:1]
        name, seconds = fastest(lambda precision: self._gradients(batches, precision))
        self.model.zero_grad(set_to_none=True)
        set_random_state(self.device, random)
        self.recipe = dataclasses.replace(self.recipe, precision=name)
        times = ", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in seconds.items())
        return f"precision: {name}, the faster here ({times} for a forward and backward pass)"

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
        except (RuntimeError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise FileError(
                f"{checkpoint.path}: does not fit the recipe ({reason}); resume with its own recipe"
            ) from None
        self.step = checkpoint.step

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What a checkpoint holds: tensors by file, and plain data."""
        files = trained_weights(self.recipe, self.model) | {
            "optimizer": optimizer_tensors(self.optimizer, self.model),
            "random": random_state(self.device),
        }
        return files, dict(self.fingerprint)

    # --- one step --------------------------------------------------------------------------------------------------

    def _micro_batches(self, step: int) -> list[Batch]:
        """The batches of one update: a function of the step and the seed alone."""
        return self._ahead(step)

    def _loss(self, batch: Batch, precision: str, scale: float | None) -> tuple[Tensor, Aux | None]:
        batch = batch.to(self.device)
        with products_in(precision, self.device):
            return self.model.loss(batch.inputs, batch.targets, batch.tokens, scale=scale)

    def _gradients(self, batches: list[Batch], precision: str) -> tuple[float, int, Aux | None]:
        """Add the gradients of the mean loss over all tokens of `batches`; what sublayers add is scaled like it.

        Returns the loss, how many tokens, and what the sublayers reported, summed.
        """
        count = sum(self.model.head.count(batch.targets, batch.tokens) for batch in batches)
        scale, total, report = 1 / max(1, count), torch.zeros((), dtype=torch.float64), None
        for batch in batches:
            loss, aux = self._loss(batch, precision, scale)
            extra = [] if aux is None else list(aux.losses.values())
            (loss + scale * sum(extra) if extra else loss).backward()
            total += loss.detach().cpu()
            report = merge(report, None if aux is None else aux.detach())
        return total.item(), count, report

    def update(self) -> dict[str, Any]:
        """One step; returns its line of the metrics. Raises before the weights change."""
        recipe = self.recipe
        random = random_state(self.device)
        batches = self._micro_batches(self.step)
        self.read = sum(int(batch.tokens.valid.sum()) for batch in batches)
        loss, count, report = self._gradients(batches, recipe.precision)
        limit = math.inf if recipe.clip is None else recipe.clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        lr = recipe.optimizer.lr * recipe.schedule.factor(self.step, recipe.steps)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if report is not None:
                self.model.after_step(report.loads)
        elif recipe.non_finite == "stop":
            set_random_state(self.device, random)  # the same dropout again; and the step leaves no trace
            where = first_non_finite(self.model, lambda: [self._loss(b, recipe.precision, None) for b in batches])
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}; it began in "
                f"{where}. The weights are as they were; lower optimizer.lr, or set non_finite=skip"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        entry = {"step": self.step, "loss": loss, "lr": lr, "gradient_norm": norm, "tokens": count}
        if report is not None:
            entry |= {f"aux.{name}": loss.item() / max(1, count) for name, loss in report.losses.items()}
            entry |= {f"load.{name}": load.tolist() for name, load in report.loads.items()}
        return entry if finite else entry | {"skipped": True}

    # --- how good it is ----------------------------------------------------------------------------------------------

    def evaluate(self, limit: int | None, goes_on: Callable[[int, int], bool] = lambda *_: True) -> dict[str, Any]:
        """A line of the metrics: the loss on `limit` held-out batches; with what the task measures where those are all.

        Where `goes_on` ends it early, it is worth nothing.
        """
        if self.held_out is None:
            return {"step": self.step}
        with products_in(self.recipe.precision, self.device):
            found = self.task.evaluate(self.model, self.held_out, limit=limit, goes_on=goes_on)
            some = limit is not None and limit < len(self.held_out)
            measures = () if some else self.task.measures(self.model, found)
        self.validation = found.loss
        extra = {f"validation_aux.{name}": loss / max(1, found.tokens) for name, loss in found.extra.items()}
        return {"step": self.step, "validation_loss": found.loss} | extra | {each.name: each.value for each in measures}

    def sample(self) -> str | None:
        """Something from the model as it is now; None: the recipe wants nothing."""
        settings = self.recipe.sample
        return None if settings is None else self.task.sample(self.model, self.recipe, settings)


def _of_step(batches: Batches, n: int, step: int) -> list[Batch]:
    """The `n` batches of a step."""
    numbers = (divmod(step * n + i, len(batches)) for i in range(n))
    return [batches.batch(epoch, index) for epoch, index in numbers]


def _check_memory(model: Model) -> None:
    """Raise `RuntimeError` where weights, gradients and moments would not fit this machine."""
    bytes_needed = 16 * sum(p.numel() for p in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if not torch.cuda.is_available() and bytes_needed > there:
        raise RuntimeError(f"to train it takes {bytes_needed / 1e9:,.0f} GB and there are {there / 1e9:,.0f}")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where the random numbers of this process stand."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Go back to what `random_state` returned."""
    torch.set_rng_state(state["cpu"].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone())
