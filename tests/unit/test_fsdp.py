"""FSDP2 and DDP: two processes, each with half of the rows (and of the weights), train like one."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from qkv.errors import ConfigError
from qkv.masks import Causal, Full
from qkv.models.encoder_decoder import EncoderDecoderConfig
from qkv.models.pairs import Pair
from qkv.nn import attention
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.cross import CrossAttentionConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.tokens import Tokens
from tiny import NORM, tiny_model, token_ids
from tolerances import FLOAT64

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo for two processes", allow_module_level=True)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

LENGTHS = [[5, 2], [7], [3, 3], [4]]
TARGETS = 20  # tokens that have one, over all rows


def language_model():
    return tiny_model().train()


def translator():
    heads = {"n_heads": 2}
    read = PreNormConfig(norm=NORM, sublayers=(AttentionConfig(mask=Full(), **heads),))
    cross = CrossAttentionConfig(n_heads=2, mask=Full())
    write = PreNormConfig(norm=NORM, sublayers=(AttentionConfig(mask=Causal(), **heads), cross))
    embed = TokenEmbedderConfig(vocab_size=41)
    return tiny_model(
        config=EncoderDecoderConfig(d_model=16, source=None, target=embed, encoder=read, decoder=write)
    ).train()


def batch_of(model, rows):
    """Inputs, targets, and where they stand."""
    ids, tokens = token_ids(4, 7)[rows], Tokens.packed(LENGTHS[rows], 7)
    return Pair(ids.roll(2, 1), tokens, ids) if hasattr(model, "decoder") else ids, ids.roll(-1, 1), tokens


def loss_of(model, rows):
    """The summed loss of some rows, over the number of targets in all of them."""
    return model.loss(*batch_of(model, rows), scale=1 / TARGETS)[0]


def sharded(model, **settings):
    for part in (*model.blocks, model):
        fully_shard(part, **settings).set_gradient_divide_factor(1.0)  # the loss is scaled already
    return model


def train_like_one(rank):
    for make in (language_model, translator):
        one = make()
        loss = loss_of(one, slice(0, 4))
        loss.backward()
        for checkpointed in (False, True):
            model = sharded(make())
            model.checkpoint_blocks = checkpointed
            mine = loss_of(model, slice(2 * rank, 2 * rank + 2))
            mine.backward()
            total = mine.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, loss.detach(), rtol=0, atol=FLOAT64)
            for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=0, atol=FLOAT64, msg=name)


def average_like_one(rank):
    """DDP takes the mean over its processes, so each scales by how many there are; `loss` would take none."""
    for make in (language_model, translator):
        one, rows = make(), slice(2 * rank, 2 * rank + 2)
        loss_of(one, slice(0, 4)).backward()
        ddp = DistributedDataParallel(make())
        inputs, targets, tokens = batch_of(ddp.module, rows)
        with pytest.raises(ConfigError, match=r"is inside DistributedDataParallel, .* call ddp\(inputs, tokens, "):
            ddp.module.loss(inputs, targets, tokens)
        with torch.no_grad():
            alone = ddp.module.loss(inputs, targets, tokens, scale=2 / TARGETS)[0]
        loss = ddp(inputs, tokens, targets=targets, scale=2 / TARGETS)[0]
        torch.testing.assert_close(loss.detach(), alone, rtol=0, atol=FLOAT64)
        loss.backward()
        for (name, p), q in zip(ddp.module.named_parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=FLOAT64, msg=name)


def read_like_one():
    model, one = sharded(language_model()), language_model()
    ids = token_ids(2, 7)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model.encode(ids)[0], one.encode(ids)[0], rtol=0, atol=FLOAT64)
            torch.testing.assert_close(model(ids), one(ids), rtol=0, atol=FLOAT64)


def keep_the_phases():
    model = sharded(tiny_model(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen, rotate = [], attention.rotate
    attention.rotate = lambda x, by: seen.append((x.dtype, by.cos.dtype)) or rotate(x, by)
    model(token_ids(1, 7))
    assert seen == [(torch.bfloat16, torch.float32)] * 2


def _process(rank, meeting):
    torch.set_num_threads(1)
    where = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **where)
    try:
        train_like_one(rank)
        average_like_one(rank)
        read_like_one()
        keep_the_phases()
    finally:
        dist.destroy_process_group()


def test_two_processes_are_like_one(tmp_path):
    """Loss, gradients and stream; and rotary phases stay float32 when the weights are rounded."""
    torch.multiprocessing.spawn(_process, (tmp_path / "meeting",), nprocs=2)
