"""Pictures through ViT-S/16 and ViT-B/16: qkv beside other libraries, and packed beside padded.

    python benchmarks/vision.py                                # inference and training at 224 x 224, float32
    python benchmarks/vision.py --dtype bfloat16
    python benchmarks/vision.py --mix --n 16                   # pictures of mixed aspect, packed and padded

qkv reads the weights of transformers' model, and what it puts out is compared. All models are drawn at random and take
their turns in one process. Every contestant is given the same pixels, normalised; cutting them into patches counts.
Training is forward, backward and a fused AdamW step, in bfloat16 under autocast. vit-pytorch is loaded from its file,
since its package asks for torchvision; timm does so as well, and is left out where that does not load.
"""

import argparse
import importlib.util
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import qkv
from qkv.cost import training_flops_per_token
from qkv.data.reads import Read, without_padding
from qkv.loading.encoder import pixels_of
from qkv.shapes import Tensor
from qkv.tokens import Tokens

SIZES = {"ti16": (192, 12, 3), "s16": (384, 12, 6), "b16": (768, 12, 12)}
PATCH, SIDE, CLASSES = 16, 224, 1000


def transformers_vit(size: str) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    width, layers, heads = SIZES[size]
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def vit_pytorch(size: str) -> nn.Module:
    package = importlib.util.find_spec("vit_pytorch")
    if package is None or package.origin is None:
        raise ImportError("vit-pytorch is not installed")
    spec = importlib.util.spec_from_file_location("vit_of_vit_pytorch", Path(package.origin).with_name("vit.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    width, layers, heads = SIZES[size]
    sizes = {"dim": width, "depth": layers, "heads": heads, "mlp_dim": 4 * width, "dim_head": width // heads}
    return module.ViT(image_size=SIDE, patch_size=PATCH, num_classes=CLASSES, **sizes)


def timm_vit(size: str) -> nn.Module:
    import timm

    name = {"ti": "tiny", "s": "small", "b": "base"}[size.removesuffix("16")]
    return timm.create_model(f"vit_{name}_patch16_{SIDE}")


def onnx_session(model: nn.Module, pixels: Tensor, folder: Path) -> Any:
    """transformers' model before onnxruntime, for batches of this size."""
    import onnxruntime

    path = folder / "model.onnx"
    torch.onnx.export(model, (pixels,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options)


def read(model: nn.Module, pictures: Sequence[Tensor]) -> tuple[Tensor, Tokens]:
    """Pictures as a model of ours reads them."""
    inputs, tokens = without_padding([pixels_of(each, model.config.embed) for each in pictures])
    return inputs.to(pictures[0].dtype), tokens


def logits_of(found: Any) -> Tensor:
    return found.logits if hasattr(found, "logits") else found


def trainer(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """One step at each call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, once each is warm."""
    for work in contestants.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            before = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - before)
    return seconds


def table(title: str, pictures: int, seconds: dict[str, list[float]], flops: float = 0.0) -> None:
    print(f"\n**{title}**\n\n| contestant | pictures/s | spread | ratio of qkv | TFLOPS |\n|---|---:|---:|---:|---:|")
    mine = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        middle, spread = statistics.median(times), (max(times) - min(times)) / statistics.median(times)
        reached = f"{flops * pictures / middle / 1e12:.2f}" if flops else ""
        print(f"| {name} | {pictures / middle:.2f} | {spread:.0%} | {middle / mine:.2f} | {reached} |")


def at_one_size(size: str, n: int, rounds: int, dtype: torch.dtype, *, train: bool) -> None:
    """Every library at 224 x 224."""
    theirs = transformers_vit(size)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = qkv.load(folder).model
        pixels = torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(n) % CLASSES
        peers: dict[str, nn.Module] = {"transformers": theirs}
        for name, make in {"vit-pytorch": vit_pytorch, "timm": timm_vit}.items():
            try:
                peers[name] = make(size)
            except (ImportError, RuntimeError) as error:
                print(f"{name} is left out: {str(error).splitlines()[0]}")
        parameters = sum(p.numel() for p in ours.parameters())
        tokens = (SIDE // PATCH) ** 2 + 1
        flops = training_flops_per_token(ours.config, tokens) * tokens / 3  # of a forward pass
        said = f"ViT-{size}, {parameters / 1e6:.1f} M parameters, {n} pictures of {SIDE} x {SIDE}"

        contestants: dict[str, Callable[[], Any]]
        if train:
            for model in (ours, *peers.values()):
                model.train()

            def our_loss() -> Tensor:
                inputs, tokens = read(ours, pixels)
                return ours.loss(inputs, labels, tokens, scale=1 / n)[0]

            contestants = {"qkv": trainer(ours, our_loss, dtype)} | {
                name: trainer(model, lambda model=model: F.cross_entropy(logits_of(model(pixels)), labels), dtype)
                for name, model in peers.items()
            }
            table(f"training: {said}, {dtype}", n, measure(contestants, rounds), 3 * flops)
            return

        given = pixels.to(dtype)
        for model in (ours, *peers.values()):
            model.eval().to(dtype)
        contestants = {"qkv": lambda: ours(*read(ours, given))}
        contestants |= {name: lambda model=model: logits_of(model(given)) for name, model in peers.items()}
        if dtype == torch.float32:
            try:
                session = onnx_session(theirs, given, Path(folder))
            except ImportError as error:
                print(f"onnxruntime is left out: {error}")
            else:
                name, values = session.get_inputs()[0].name, given.numpy()
                contestants["onnxruntime"] = lambda: torch.from_numpy(session.run(None, {name: values})[0])
        else:
            print("onnxruntime is left out: its CPU products have no bfloat16")
        with torch.inference_mode():
            found = {name: contestants[name]().float() for name in ("qkv", "transformers")}
            apart = (found["qkv"] - found["transformers"]).abs().max().item()
            table(f"inference: {said}, {dtype}", n, measure(contestants, rounds), flops)
        print(f"\nqkv and transformers differ by {apart:.1e} at most (the largest: {found['qkv'].abs().max():.2f})")


# --- mixed aspect -----------------------------------------------------------------------------------------------------


def mixed(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Pictures of about 224 x 224 pixels, their width 0.5 to 2 times their height, in whole patches."""
    choose, made = random.Random(0), []
    for _ in range(n):
        ratio = 2 ** choose.uniform(-1, 1)
        h, w = (max(1, round(SIDE * x / PATCH)) * PATCH for x in (1 / math.sqrt(ratio), math.sqrt(ratio)))
        made.append(torch.randn(3, h, w).to(dtype))
    return made


def on_canvas(model: nn.Module, pictures: Sequence[Tensor]) -> tuple[Tensor, Tokens]:
    """As `read`, but each picture padded to the largest height and width of its batch."""
    height, width = (max(each.shape[axis] for each in pictures) for axis in (1, 2))
    reads: list[Read] = [pixels_of(each, model.config.embed) for each in pictures]
    length = (height // PATCH) * (width // PATCH) + reads[0].prefix
    grids = [[each.grid] for each in reads if each.grid is not None]
    tokens = Tokens.pictures(grids, length, prefix=reads[0].prefix)
    inputs = torch.stack([F.pad(each.values, (0, 0, 0, length - len(each.values))) for each in reads])
    return inputs.to(pictures[0].dtype), tokens


def at_mixed_aspect(size: str, n: int, batch: int, rounds: int, dtype: torch.dtype, *, train: bool) -> None:
    """One model of ours, given the same pictures packed and padded; and transformers' on the padded ones."""
    theirs = transformers_vit(size)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = qkv.load(folder).model
    pictures = mixed(n, torch.float32 if train else dtype)
    parts = [pictures[at : at + batch] for at in range(0, n, batch)]
    steps: dict[str, Callable[[], Any]] = {}
    for name, way in {"qkv, packed": read, "qkv, padded": on_canvas}.items():
        if train:

            def loss(part: Sequence[Tensor], way: Callable[..., Any] = way) -> Tensor:
                inputs, tokens = way(ours, part)
                return ours.loss(inputs, torch.arange(len(part)), tokens, scale=1 / len(part))[0]

            done = [trainer(ours.train(), lambda part=part, loss=loss: loss(part), dtype) for part in parts]
            steps[name] = lambda done=done: [step() for step in done]
        else:
            ours.eval().to(dtype)
            steps[name] = lambda way=way: torch.cat([ours(*way(ours, part)) for part in parts])

    def canvases() -> Tensor:
        found = []
        for part in parts:
            height, width = (max(each.shape[axis] for each in part) for axis in (1, 2))
            padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in part]
            found.append(theirs(torch.stack(padded), interpolate_pos_encoding=True).logits)
        return torch.cat(found)

    useful = sum(each.shape[1] * each.shape[2] for each in pictures)
    canvas = sum(len(part) * max(x.shape[1] for x in part) * max(x.shape[2] for x in part) for part in parts)
    what = f"ViT-{size}, {n} pictures of mixed aspect, {batch} in a batch, {dtype}; padding {1 - useful / canvas:.0%}"
    if train:
        table(f"training: {what}", n, measure(steps, rounds))
        return
    theirs.eval().to(dtype)
    with torch.inference_mode():
        packed, padded = (steps[name]() for name in steps)
        seconds = measure(steps | {"transformers, padded": canvases}, rounds)
    table(f"inference: {what}", n, seconds)
    print(f"\npacked and padded differ by {(packed - padded).abs().max():.1e} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=["s16", "b16"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--n", type=int, default=8, help="pictures at once, and in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["inference", "training"])
    parser.add_argument("--mix", action="store_true", help="mixed aspect, four batches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    for size in options.models:
        for train in (False, True):
            if options.only == ("inference", "training")[not train]:
                continue
            if options.mix:
                at_mixed_aspect(size, 4 * options.n, options.n, options.rounds, dtype, train=train)
            else:
                at_one_size(size, options.n, options.rounds, dtype, train=train)


if __name__ == "__main__":
    main()
