"""Beginning with trained weights: all of them trained on, or adapters beside them."""

import torch

from qkv.checkpoints import Checkpoint, check_fit
from qkv.checkpoints.formats import digest_of_base
from qkv.errors import FileError
from qkv.models.model import Model
from qkv.nn.adapters import adapter_state, add_adapters, load_adapters
from qkv.nn.heads import ClassHead
from qkv.shapes import Tensor
from qkv.training.recipe import RecipeConfig


def starting_model(recipe: RecipeConfig, base: Model) -> Model:
    """The recipe's model with a checkpoint's weights, in float32; with adapters, where the recipe has some.

    A head that is not the checkpoint's is drawn. With adapters, such a one and one of classes are trained whole: what
    they say is new. Weights that stay frozen remain memory-mapped, if they were. Others are copied: a step would write
    into them.
    """
    assert recipe.model is not None
    state = {
        name: p.to(torch.float32, copy=recipe.adapter is None or name.startswith("head."))
        for name, p in base.state_dict().items()
    }
    heads = [config.with_dropout(0.0).to_dict().get("head") for config in (recipe.model, base.config)]
    if heads[0] != heads[1]:
        fresh = recipe.model.build().state_dict()
        drawn = {name: fresh[name] for name in fresh if name.startswith("head.")}
        state = {name: p for name, p in state.items() if not name.startswith("head.")} | drawn
    with torch.device("meta"):
        model = recipe.model.build()
    model.load_state_dict(state, assign=True)
    model.requires_grad_()
    if recipe.adapter is not None:
        add_adapters(model, recipe.adapter)
        if model.head is not None and (heads[0] != heads[1] or isinstance(model.head, ClassHead)):
            model.head.requires_grad_()
    return model


def identity(recipe: RecipeConfig, base: Model | None) -> dict[str, str]:
    """What a checkpoint says about the weights that it does not hold: the hash of those under its adapters."""
    if recipe.adapter is None:
        return {}
    assert base is not None
    return {"base": digest_of_base(base.state_dict())}


def trained_weights(recipe: RecipeConfig, model: Model) -> dict[str, dict[str, Tensor]]:
    """The files of a checkpoint that hold what was trained: the model, or the adapters and what else was not frozen."""
    if recipe.adapter is None:
        return {"model": model.state_dict()}
    head = _trained_head(model)
    return {"adapter": adapter_state(model)} | ({"head": {k: p.detach() for k, p in head.items()}} if head else {})


def _trained_head(model: Model) -> dict[str, Tensor]:
    """The weights of a head that is trained beside adapters."""
    return {name: p for name, p in model.named_parameters() if name.startswith("head.") and p.requires_grad}


def restore_weights(recipe: RecipeConfig, model: Model, checkpoint: Checkpoint, expected: dict[str, str]) -> None:
    """Put a checkpoint's weights into the model; `expected` is the `identity` of what the run would go on from.

    Raises:
        FileError: The weights do not fit the model, or the adapters belong to another one.
    """
    if recipe.adapter is None:
        model.load_state_dict(checkpoint.tensors("model"))
        return
    assert recipe.start is not None
    if checkpoint.state.get("base") != expected["base"]:
        raise FileError(
            f"{checkpoint.path}: its adapters belong to the weights that {recipe.start.path} had when the run began, "
            "and those are others now; put them back, or begin a new run"
        )
    state = checkpoint.tensors("adapter")
    check_fit(state, adapter_state(model), source=str(checkpoint.path))
    load_adapters(model, state)
    if head := _trained_head(model):
        found = checkpoint.tensors("head")
        check_fit(found, head, source=str(checkpoint.path))
        with torch.no_grad():
            for name, p in head.items():
                p.copy_(found[name])
