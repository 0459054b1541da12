"""Plants faults in the library, one at a time, and sees that the tests find each: `make mutants`.

A mutant that survives is a hole in the suite. Each names the tests that ought to kill it; they run on a copy of the
tree, so that nothing here is changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAWS, ATTEND, PARITY = "tests/laws/test_model_laws.py", "tests/laws/test_attend_laws.py", "tests/parity"
INIT = "tests/unit/models/test_init.py"
PARTS, ROTARY, LOSS = "tests/unit/nn/test_parts.py", "tests/unit/ops/test_rotary.py", "tests/unit/ops/test_loss.py"
MORE, TILES, CACHES, KINDS, HARNESS = (
    f"tests/laws/test_{name}.py" for name in ("attend_more", "tiles", "cache_laws", "mechanisms", "harness")
)
ENCODERS = "tests/parity/test_encoders.py::test_in_and_out"
ENCODER_PARTS = "tests/unit/nn/test_encoder_parts.py"
VISION = "tests/parity/test_vision.py::test_in_and_out"
PATCHES, GRID_ROPE = "tests/unit/nn/test_patches.py", "tests/unit/nn/test_grid_rope.py"
FAMILIES = f"{PARITY}/test_families.py::test_in_and_out"
FAMILY, FOLDERS = (f"tests/unit/checkpoints/test_{name}.py" for name in ("families", "huggingface"))
QUANTISED, CONVERT = "tests/unit/nn/test_quantised.py", "tests/unit/test_convert.py"
SAVED = "tests/unit/loading/test_saved.py"
RESUME, SIGNALS, DISK = (f"tests/reliability/test_{name}.py" for name in ("resume", "signals", "disk"))
GGUF, GGUF_FILES, GGUF_WORDS, GGUF_MEMORY = (
    "tests/parity/test_gguf.py",
    "tests/reliability/test_gguf.py",
    "tests/parity/test_gguf_vocabulary.py",
    "tests/unit/checkpoints/test_gguf_memory.py",
)
SEQ2SEQ, ENCODER_DECODER, STATEFUL = (
    f"tests/laws/test_{name}_laws.py" for name in ("seq2seq", "encoder_decoder", "stateful")
)
TRANSLATE = "tests/cli/test_translate.py"
BEAM, LOOKING = "tests/unit/generation/test_beam.py", "tests/unit/ops/test_attentive_gru.py"
FLIPS = "tests/reliability/test_flips.py"
TRAINER, TRAINING, RECIPE, DISPLAY = (
    f"tests/unit/training/test_{name}.py" for name in ("trainer", "parts_of_training", "recipe", "display")
)
TARGETS, WORDS, CLASSES = (f"tests/unit/training/test_{name}.py" for name in ("targets", "labelled_words", "classes"))
ADAPTERS, FINE_TUNE = "tests/unit/nn/test_adapters.py", "tests/unit/training/test_fine_tune.py"
CONVERSATIONS, PEFT = "tests/unit/data/test_conversations.py", "tests/parity/test_peft.py"
CHAT, TOKENIZERS, MASKED = (f"tests/unit/data/test_{name}.py" for name in ("chat", "tokenizers", "masked"))
CONVERSATION, PAIR_START = "tests/unit/test_conversation.py", "tests/unit/training/test_start_of_pairs.py"


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` becomes `new` in `src/qkv/<file>`, and `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


ZOO = "tests/reliability/test_zoo.py"

MUTANTS = [
    # Attention
    Mutant("scores are not scaled", "ops/attend.py", "1 / math.sqrt(q.shape[-1])", "1.0", ATTEND),
    Mutant("scale is 1/K", "nn/mixer.py", "1 / math.sqrt(heads.head_dim)", "1 / heads.head_dim", PARITY),
    Mutant("kv heads in turn", "ops/reference.py",
           "k = p.k.repeat_interleave(p.q.shape[1] // p.k.shape[1], dim=1)", "k = p.k.repeat(1, p.q.shape[1] // p.k.shape[1], 1, 1)", ATTEND),
    Mutant("a row that sees nothing sees all", "ops/reference.py", "weights * allowed", "weights", ATTEND),
    Mutant("-inf instead of the lowest number", "ops/reference.py", "torch.finfo(scores.dtype).min", "float('-inf')", ATTEND),
    Mutant("padding reaches the kernel", "ops/sdpa.py", "    p = p.without_padding()\n", "", ATTEND),
    Mutant("documents are not causal", "ops/documents.py",
           "run.of(v), 0.0, causal, scale=scale)", "run.of(v), 0.0, False, scale=scale)", ATTEND),
    Mutant("neighbours of unequal length are one batch", "ops/documents.py",
           "last.n * last.length, last.length) == (row, start, length)", "last.n * last.length) == (row, start)", ATTEND),
    Mutant("documents run on into the next row", "documents.py",
           "F.pad(edge, (1, 0), value=True)", "F.pad(edge, (1, 0), value=False)", ATTEND),
    Mutant("dropout lives in evaluation", "nn/attention.py",
           "self.weight_dropout if training else 0.0", "self.weight_dropout", LAWS),
    Mutant("no norm of keys", "nn/attention.py", "q, k = self.q_norm(q), self.k_norm(k)", "q = self.q_norm(q)", PARTS),
    Mutant("a narrow gradient of the bias", "ops/backend.py", "torch.promote_types(self.bias.dtype, torch.float32)", "self.bias.dtype", MORE),
    Mutant("a mask of another length", "ops/attend.py", "if mask.size != (q.shape[2], k.shape[2]):", "if False:", MORE),
    Mutant("the last position for -1", "nn/positions/tables.py", "F.embedding(index, table).to(dtype)", "table[index].to(dtype)", PARTS),
    # Tiles
    Mutant("tiles forget what came before", "ops/tiled.py", "total = total.mul_(shrink)", "total = total", MORE),
    Mutant("the sum is not shrunk", "ops/tiled.py", "_add_product(summed.mul_(shrink)", "_add_product(summed", MORE),
    Mutant("mixed tiles are taken for full", "ops/tiled.py", "        if run.full:\n", "        if not run.full:\n", MORE),
    Mutant("the soft-cap has no slope", "ops/tiled.py", "into.mul_(slope)", "pass", MORE),
    Mutant("sinks take no weight", "ops/tiled.py", "torch.ones_like(top)", "torch.zeros_like(top)", MORE),
    Mutant("keys' gradient is not scaled", "ops/tiled.py", "into.mT, queries, tiles.scale)", "into.mT, queries)", MORE),
    Mutant("the bias of the next distance", "ops/backend.py", "clamp(-reach, reach) + reach", "clamp(-reach, reach - 1) + reach + 1", MORE),
    Mutant("a window's tiles one too few", "masks.py", "return nearest < self.size,", "return nearest < self.size - 1,", TILES),
    Mutant("causal tiles by their first query", "masks.py", "return k.order.low <= q.order.high,", "return k.order.low <= q.order.low,", TILES),
    Mutant("documents meet in tiles", "tiles.py", " & (a.low == a.high)", "", TILES),
    Mutant("a block of tiles is full if one is", "tiles.py", "torch.where(low == high, low, MIXED)", "high", TILES),
    Mutant("lowered masks keep nothing", "lowered.py", "if name not in self._kept:", "if True:", "tests/unit/test_lowered.py"),
    Mutant("not is not turned round", "masks.py", "return ~a_all, ~a_some", "return ~a_some, ~a_all", TILES),
    # Kinds of attention
    Mutant("slopes of ALiBi from 1", "nn/positions/score_bias.py", "2 ** (-8 * i / n)", "2 ** (-8 * (i - 1) / n)", KINDS),
    Mutant("T5 looks ahead", "nn/positions/score_bias.py", "(-distance).clamp(min=0)", "distance.abs()", KINDS),
    Mutant("values are absorbed as keys", "nn/latent.py", "keys, values = self.kv_proj", "values, keys = self.kv_proj", KINDS),
    Mutant("cross-attention shares its keys", "nn/cross.py", "k, v = self._keys(memory)", "k = v = self._keys(memory)[0]", KINDS),
    Mutant("a decoding query stands first", "ops/attend.py", "start=max(0, before)", "start=0", MORE),
    # Masks
    Mutant("a token does not see itself", "masks.py", "return k.order <= q.order", "return k.order < q.order", ATTEND),
    Mutant("a window one token wider", "masks.py", "(q.index - k.index).abs() < self.size", "(q.index - k.index).abs() <= self.size", ATTEND),
    Mutant("documents see each other", "masks.py", "Place(k_index, k_order)) & (a == b) & (b > 0)", "Place(k_index, k_order)) & (b > 0)", LAWS),
    Mutant("and is or", "masks.py", "self.a.allow(q, k) & self.b.allow(q, k)", "self.a.allow(q, k) | self.b.allow(q, k)", ATTEND),
    Mutant("packed is taken for full", "lowered.py",
           "        if q.layout is Layout.RAGGED:\n            return Form.DOCUMENTS\n", "", LAWS),
    # Positions
    Mutant("exponent of the next pair", "ops/rotary.py",
           "torch.arange(0, width, 2, dtype=torch.float64, device=device) / width",
           "torch.arange(2, width + 2, 2, dtype=torch.float64, device=device) / width", PARITY),
    Mutant("the loss passes by what hooks calls", "models/model.py",
           "self(inputs, tokens, targets=targets, scale=scale)", "self.forward(inputs, tokens, targets=targets, scale=scale)", "tests/unit/test_fsdp.py"),
    Mutant("rotation backwards", "ops/rotary.py",
           "+ partner * by.sin.view(shape)", "- partner * by.sin.view(shape)", ROTARY),
    Mutant("angles in float32", "ops/rotary.py",
           "position[..., None].to(frequencies.dtype) * frequencies", "position[..., None].float() * frequencies.float()", ROTARY),
    Mutant("the first of several coordinates", "nn/positions/rotary.py", "coords.shape[-1]) != 1", "coords.shape[-1]) < 1", PARTS),
    Mutant("registers before the class token", "checkpoints/families/dinov3.py", "torch.cat(theirs[:2], 1)", "torch.cat(theirs[1::-1], 1)",
           f"{PARITY}/test_dinov3.py::test_in_and_out"),
    Mutant("a bias that the config denies is read", "checkpoints/families/dinov3.py", "and n != there * n_layers", "and n < there * n_layers",
           f"{PARITY}/test_dinov3.py"),
    Mutant("a class token turns", "nn/positions/rotary.py", ".masked_fill(none[..., None], 0)", "", GRID_ROPE),
    Mutant("corners of patches, not middles", "nn/positions/rotary.py", "(2 * tokens.coords + 1)", "(2 * tokens.coords)", GRID_ROPE),
    Mutant("rows and columns of another picture", "tokens.py", 'ends, "amax").gather(1, segment)', 'ends, "amax").amax(1, keepdim=True)', GRID_ROPE),
    Mutant("learned positions of the slot, not the document", "nn/embedders/embedder.py",
           "self.position(tokens, x.dtype)", "self.position(Tokens.full(*tokens.shape, device=x.device), x.dtype)", LAWS),
    Mutant("YaRN without its temperature", "nn/positions/rope_scaling.py", "0.1 * math.log(self.factor) + 1 if", "1.0 if", PARITY),
    # Norms, FFN, blocks
    Mutant("ε outside the root", "nn/norms.py",
           "F.rms_norm(x, x.shape[-1:], weight + self.offset if self.offset else weight, self.eps)", "x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * weight", PARTS),
    Mutant("an older checkpoint is read as a new one", "checkpoints/formats.py", "if number == FORMAT:", "if True:", "tests/unit/checkpoints/test_formats.py"),
    Mutant("adapters forget an older base", "checkpoints/formats.py", "_apart(tensor) if _is_glu(name, tensor) else tensor)", "tensor)", "tests/unit/checkpoints/test_formats.py"),
    Mutant("up is the gate", "nn/ffn.py", "gate, up = self.gate_up_proj(x)", "up, gate = self.gate_up_proj(x)", PARITY),
    Mutant("pre-norm without the norm", "nn/blocks.py", "return x + f(norm(x))", "return x + f(x)", PARTS),
    # Loss
    Mutant("ignored targets count", "ops/loss.py", "(loss[:, 0] * counted).sum()", "loss.sum()", LOSS),
    Mutant("the scale is lost in the gradient", "ops/loss.py", "counted.to(wide)[:, None] * scale", "counted.to(wide)[:, None]", LOSS),
    Mutant("what comes down is ignored", "ops/loss.py", "or grad.item() != 1.0", "and grad.item() != 1.0", LOSS),
    Mutant("softmax in bfloat16", "ops/loss.py", "wide = torch.promote_types(logits.dtype, torch.float32)", "wide = logits.dtype", LOSS),
    # Caches
    Mutant("decoding forgets the last token", "caches.py", "self.bound += self._new.shape[1]", "self.bound += self._new.shape[1] - 1", LAWS),
    Mutant("padding is kept in the cache", "caches.py",
           "torch.where(new.valid, length[:, None] + _rank(new), self.places)", "length[:, None] + torch.arange(n)", LAWS),
    Mutant("ragged rows start at the longest", "models/transformer.py",
           "start=cache.bound if cache.even else cache.length", "start=cache.bound", LAWS),
    Mutant("a ring one place too small", "caches.py", "return Ring(batch, reach + self._rollback, device)", "return Ring(batch, reach + self._rollback - 1, device)", CACHES),
    Mutant("a ring keeps the first tokens", "caches.py", "rank >= count[:, None] - self.places", "rank < self.places", CACHES),
    Mutant("a ring is read after it was written", "caches.py", "before = None if bound == 0 else self._tokens(length)", "before = None if bound == 0 else self._tokens(length + count)", CACHES),
    Mutant("rollback keeps the length", "caches.py", "self.length, self.bound = self.length - n, self.bound - n", "self.bound = self.bound - n", CACHES),
    Mutant("beams keep the old values", "caches.py", "self._held[slot] = tuple(x[rows] for x in held)", "pass", CACHES),
    Mutant("a memory is computed each time", "caches.py", "if slot not in self._held:", "if True:", CACHES),
    # The harness
    Mutant("a NaN is within bounds", "laws/check.py", "if not difference <= worst.difference:", "if difference > worst.difference:", HARNESS),
    Mutant("no other order is tried", "laws/subject.py", "self._outputs(inputs[:, order], tokens.reordered(order))", "self._outputs(inputs, tokens)[:, order]", HARNESS),
    Mutant("reordered tokens are a full row", "tokens.py", "layout=Layout.GENERAL)\n\n    def join", "layout=self.layout)\n\n    def join", HARNESS),
    Mutant("types of examples are one", "nn/embedders/embedder.py", "tokens.with_types(tokens.index % len(self.types))", "tokens", HARNESS),
    Mutant("a pool is asked of whole rows", "laws/laws.py", "lengths, x = _ragged(n), subject.draw(3, n, seed=14)", "lengths, x = [n] * 3, subject.draw(3, n, seed=14)", HARNESS),
    Mutant("the neighbour is not changed", "laws/laws.py", "changed = other.clone()", "changed = x.clone()", HARNESS),
    # Models
    Mutant("a shared block has one slot", "models/stack.py", "slot += self._slots[i]", "slot += 0", LAWS),
    Mutant("biases survive initialisation", "models/init.py", "p.zero_()", "pass", PARTS),
    Mutant("weights depend on those before them", "models/init.py", "p.copy_(_empty(p).normal_(0, std, generator=_generator(seed, prefix + name)))", "p.copy_(_empty(p).normal_(0, std))", INIT),
    Mutant("an expert counts the others' rows", "models/init.py", "else weight.shape[-1]", "else weight[0].numel()", INIT),
    # Training
    Mutant('random numbers are not restored', "training/trainer.py",
           '    torch.set_rng_state(state["cpu"].clone())\n', '    pass\n', f"{RESUME}::test_stopped_by_signals"),
    Mutant("the optimiser's second moment is lost", "training/optimizer.py",
           'moment: tensors[f"{moment}.{name}"].to(p.device, copy=True)', 'moment: tensors[f"{moment}.{name}"].to(p.device, copy=True) * (moment != "exp_avg_sq")', f"{RESUME}::test_stopped_by_signals"),
    Mutant("the optimiser's step is lost", "training/optimizer.py",
           'moment: tensors[f"{moment}.{name}"].to(p.device, copy=True)', 'moment: tensors[f"{moment}.{name}"].to(p.device, copy=True) * (moment != "step")', f"{RESUME}::test_stopped_by_signals"),
    Mutant("the mean of the micro-batches' means", "training/trainer.py",
           'self._loss(batch, precision, scale)', 'self._loss(batch, precision, None)', f"{TRAINER}::test_micro_batches_equal_one_batch"),
    Mutant('an extra loss is a mean of batches', "training/trainer.py",
           'loss + scale * sum(extra)', 'loss + sum(extra) / len(batches)', "tests/unit/training/test_reports.py"),
    Mutant('nobody balances the loads', "training/trainer.py",
           'self.model.after_step(report.loads)', 'pass', "tests/unit/training/test_reports.py"),
    Mutant('metrics are not forgotten', "training/start.py",
           '    run.forget_after(trainer.step)\n', '', f"{RESUME}::test_killed"),
    Mutant('measuring the peak draws random numbers', "training/precision.py",
           'device=device, generator=numbers)', 'device=device)', f"{RESUME}::test_measuring_the_machine_draws_no_random_numbers"),
    Mutant('choosing the precision draws random numbers', "training/trainer.py",
           '        self.model.zero_grad(set_to_none=True)\n        set_random_state(self.device, random)\n', '        self.model.zero_grad(set_to_none=True)\n', f"{TRAINER}::test_choosing_the_precision_changes_no_number"),
    Mutant('choosing the precision leaves its gradients', "training/trainer.py",
           '        self.model.zero_grad(set_to_none=True)\n        set_random_state(self.device, random)\n', '        set_random_state(self.device, random)\n', f"{TRAINER}::test_choosing_the_precision_changes_no_number"),
    Mutant('an evaluation or a sample leaves dropout off', "models/model.py",
           '        model.train(was_training)', '        pass', f"{RESUME}::test_what_may_change_on_the_way_changes_no_number"),
    Mutant('evaluation with dropout', "models/model.py",
           '    model.eval()\n', '', f"{TRAINING}::test_evaluation_is_without_dropout"),
    Mutant('gradients add up over the steps', "training/trainer.py",
           '        self.optimizer.zero_grad(set_to_none=True)\n', '', f"{TRAINER}::test_accumulation_gives_the_run_of_one_large_batch {RESUME}::test_stopped_by_signals"),
    Mutant('a bad loss is not noticed', "training/trainer.py",
           'finite = math.isfinite(loss) and math.isfinite(norm)', 'finite = True', f"{TRAINER}::test_a_loss_that_is_not_finite_stops_and_leaves_no_trace"),
    Mutant('a bad gradient is not noticed', "training/trainer.py",
           'finite = math.isfinite(loss) and math.isfinite(norm)', 'finite = math.isfinite(loss)', f"{TRAINER}::test_a_learning_rate_that_ruins_the_weights"),
    Mutant('a bad step leaves its random numbers', "training/trainer.py",
           '            set_random_state(self.device, random)  # the same', '            # the same', f"{TRAINER}::test_a_loss_that_is_not_finite_stops_and_leaves_no_trace"),
    Mutant('nothing is saved after a bad step', "training/session.py",
           '                self._save()\n                raise\n', '                raise\n', f"{TRAINER}::test_a_loss_that_is_not_finite_stops_and_leaves_no_trace"),
    Mutant('norms decay', "training/optimizer.py",
           '"weight_decay": 0.0', '"weight_decay": config.weight_decay', f"{TRAINING}::test_weights_decay_and_norms_and_biases_do_not"),
    Mutant('the schedule is a step late', "training/trainer.py",
           'recipe.schedule.factor(self.step, recipe.steps)', 'recipe.schedule.factor(self.step - 1, recipe.steps)', f"{TRAINER}::test_the_schedule_sets_the_learning_rate"),
    Mutant('half the cosine', "training/schedule.py",
           'math.cos(math.pi * min(1.0, done))', 'math.cos(math.pi * min(1.0, done) / 2)', f"{RECIPE}::test_warmup_then_cosine"),
    Mutant('no clipping', "training/trainer.py",
           'limit = math.inf if recipe.clip is None else recipe.clip', 'limit = math.inf', f"{TRAINER}::test_the_gradient_is_clipped"),
    Mutant('a full disk ends the run', "training/session.py",
           '        except OSError as error:\n            failure', '        except ZeroDivisionError as error:\n            failure', f"{DISK}::test_other_files_that_cannot_be_written"),
    Mutant('a full disk is forgotten', "training/session.py",
           '(1 if self.failures else 0)', '0', f"{DISK}::test_a_checkpoint_that_cannot_be_saved"),
    Mutant('another corpus is not noticed', "training/trainer.py",
           'if checkpoint.state.get("data") != self.fingerprint["data"]:', 'if False:', f"{RESUME}::test_another_corpus_is_refused"),
    Mutant('another recipe is not noticed', "training/start.py",
           'if key not in RESUMABLE and (found', 'if False and (found', f"{RESUME}::test_another_recipe_is_refused"),
    Mutant('paths stay relative', "tasks/task.py",
           'str(place.absolute()) if place', 'path if place', f"{RESUME}::test_a_runs_own_recipe_repeats_it_from_anywhere"),
    Mutant('the second signal waits', "training/signals.py",
           'os._exit(128 + number)', 'pass', f"{SIGNALS}::test_a_second_signal_leaves_at_once"),
    Mutant('the handlers stay', "training/signals.py",
           '            signal.signal(number, handler)', '            pass', f"{TRAINER}::test_a_run_hands_the_signals_back"),
    Mutant('nothing is saved at the end', "training/session.py",
           '        if self.saved_step != trainer.step:  # the last step, or a signal\n            self._save()\n', '', f"{SIGNALS}::test_the_step_is_finished_and_saved"),
    Mutant('bits per token', "tasks/text.py",
           'found.total / math.log(2) / n_bytes', 'found.loss / math.log(2)', f"{TRAINING}::test_bits_per_byte_by_hand"),
    Mutant("the mean of the batches' means", "tasks/evaluation.py",
           'scale=1.0)', 'scale=0.5)', f"{TRAINING}::test_evaluation_is_the_mean_over_all_targets"),
    Mutant('a warning of passed-over checkpoints is kept back', "training/start.py",
           'checkpoint.warnings if checkpoint else ()', '()', f"{RESUME}::test_a_damaged_checkpoint_is_passed_over"),
    Mutant('the data begin again after a resume', "training/trainer.py",
           'divmod(step * n + i, len(batches))', 'divmod(i, len(batches))', f"{RESUME}::test_stopped_by_signals"),
    Mutant("the longer run's recipe is not written", "training/start.py",
           '    run.save_recipe(config)\n', '', f"{RESUME}::test_a_finished_run_can_be_made_longer"),
    Mutant('a taken folder is overwritten', "training/run.py",
           'if path.exists() and (not path.is_dir() or any(path.iterdir())):', 'if False:', f"{TRAINER}::test_a_folder_that_is_taken"),
    Mutant('the sparkline counts what is not finite', "training/display.py",
           '[mean for mean in means if math.isfinite(mean)]', 'means', f"{DISPLAY}::test_sparkline"),
    # Families
    Mutant("Gemma's norm without the 1", "nn/norms.py", "weight + self.offset if self.offset else weight", "weight", f"{FAMILIES}[gemma2]"),
    Mutant("Gemma's embeddings are not scaled", "nn/embedders/token.py", "math.sqrt(self.width) if", "1.0 if", f"{FAMILIES}[gemma2]"),
    Mutant("the scale is not rounded", "nn/embedders/token.py", "torch.tensor(self.scale, dtype=x.dtype)", "self.scale", PARTS),
    # Encoders
    Mutant("ModernBERT's windows one short", "checkpoints/families/modernbert.py", "size=reach + 1", "size=reach", ENCODERS),
    Mutant("RoBERTa's positions from 0", "nn/positions/tables.py", "self.weight[self.unused :]", "self.weight", ENCODERS),
    Mutant("types are forgotten", "nn/embedders/embedder.py", "return x + (self.types[0]", "return x + 0 * (self.types[0]", ENCODERS),
    Mutant("a packed row is dropped as a whole", "nn/blocks.py", "kept.gather(1, tokens.segment)", "kept[:, :1]", PARTS),
    Mutant("updates keep their scale", "nn/blocks.py", "out * self.factors[name]", "out", PARTS),
    Mutant("DINOv2's offset is dropped", "nn/positions/tables.py", "        if offset:\n", "        if False:\n", PATCHES),
    Mutant("the map of patches is drawn as a table", "models/init.py", " and not isinstance(owner, nn.Linear)", "", INIT),
    Mutant("DeiT's classifiers are added", "checkpoints/families/vision.py", "torch.cat([a, b], 1) / 2", "torch.cat([a, b], 1)", VISION),
    Mutant("DINOv2's mean has its registers", "checkpoints/families/vision.py", "MeanPoolConfig(skip=prefix)", "MeanPoolConfig(skip=1)", VISION),
    Mutant("a class token loses its position", "checkpoints/families/vision.py", "+= table[0, : self.placed]", "+= 0", VISION),
    Mutant("registers are resized as without", "checkpoints/families/vision.py", "GridResizeConfig(antialias=True)", "_BICUBIC", VISION),
    Mutant("a class token has a position", "nn/embedders/patch.py", "torch.where((tokens.types > 0)[..., None], trained, x)", "x + trained", PATCHES),
    Mutant("the mean counts what is behind the end", "nn/pooling.py", "(documents.lengths - self.skip).clamp(min=1)", "torch.full_like(documents.lengths, x.shape[1])", ENCODER_PARTS),
    Mutant("several classes are summed", "nn/heads/objectives.py", 'reduction="none").mean(-1).sum()', 'reduction="none").sum()', ENCODER_PARTS),
    Mutant("numbers stay standardised", "loading/encoder.py", "self._classified(inputs)[1] * std + mean", "self._classified(inputs)[1] * std", TARGETS),
    Mutant("a set is found by its likeliest class", "tasks/targets.py", "self.objective.probabilities(outputs) >= 0.5", "self.objective.probabilities(outputs) >= outputs.sigmoid().amax(-1, keepdim=True)", TARGETS),
    Mutant("numbers are written without their mean", "loading/encoder.py", "proj.bias.detach() * std + mean", "proj.bias.detach() * std", TARGETS),
    Mutant("the last token carries a word's class", "data/tokenizer.py", "made.offsets[at][1] <= begin", "made.offsets[at][1] < begin + len(word)", WORDS),
    Mutant("a head beside adapters is lost", "loading/run.py", 'body | checkpoint.tensors("head")', 'body | {k: p * 0 for k, p in checkpoint.tensors("head").items()}', CLASSES),
    Mutant("hidden folders are classes", "data/labelled.py", 'if not each.name.startswith(".")]', "if each]", "tests/unit/training/test_labelled_vectors.py"),
    Mutant("classes of padding count", "nn/heads/pooled.py", "torch.where(tokens.valid, targets, IGNORE)", "targets", ENCODER_PARTS),
    Mutant("the logits' soft-cap is dropped", "nn/heads/lm.py", "return logits if self.softcap is None", "return logits if True", f"{FAMILIES}[gemma2]"),
    Mutant("the loss forgets the soft-cap", "nn/heads/lm.py", "softcap=self.softcap,", "softcap=None,", PARTS),
    Mutant("the logits' soft-cap has no slope", "ops/loss.py", "numbers *= slope", "pass", LOSS),
    Mutant("Gemma's scores are scaled by the head's width", "checkpoints/families/decoder.py", "None if scalar == attention[\"head_dim\"] else scalar**-0.5", "None", f"{FAMILIES}[gemma2]"),
    Mutant("Gemma's norms change places", "checkpoints/families/decoder.py",
           '    "post_attention_layernorm": "out_norms.attention",\n    "pre_feedforward_layernorm": "norms.ffn",',
           '    "post_attention_layernorm": "norms.ffn",\n    "pre_feedforward_layernorm": "out_norms.attention",', f"{FAMILIES}[gemma2]"),
    Mutant("Gemma 3 turns all layers alike", "checkpoints/families/decoder.py", '"position": ropes[kind]', '"position": ropes[FULL]', f"{FAMILIES}[gemma3]"),
    Mutant("Mistral's window is lost", "checkpoints/families/decoder.py", "[FULL if size is None else SLIDING] * n, size", "[FULL] * n, size", f"{FAMILIES}[mistral]"),
    Mutant("Qwen's early layers have the windows", "checkpoints/families/decoder.py", "size is None or i < late", "size is None or i >= late", f"{PARITY}/test_families.py::test_which_layers_have_windows_where_no_list_says_so"),
    Mutant("Phi-3's rows are taken for ours", "checkpoints/families/decoder.py", "ours, Split(rows), fuse)", "ours)", f"{FAMILIES}[phi3]"),
    Mutant("LongRoPE's factors change places", "nn/positions/rope_scaling.py", "] <= self.original_length, short", "] > self.original_length, short", f"{FAMILIES}[phi3-part-of-a-head-long]"),
    Mutant("all heads' norm is that of each", "nn/attention.py", "self.q_norm(q.flatten(2)).view_as(q)", "self.q_norm(q.flatten(2)).view_as(q) * 0 + q", f"{FAMILIES}[olmo2]"),
    Mutant("parallel sublayers see each other", "nn/blocks.py", "[f(norm(x)) for f", "[f(norm(x + f(norm(x)))) for f", f"{FAMILIES}[gpt_neox]"),
    Mutant("a family drops what it cannot say", "checkpoints/families/family.py", 'raise ConfigError(f"{self.name} cannot express this model: {difference}")', "pass", FAMILY),
    Mutant("only the first misfit is told", "checkpoints/maps.py", "faults[:_TOLD]", "faults[:1]", FOLDERS),
    Mutant("what was fused stays in memory", "checkpoints/maps.py", "give_back(tensor for", "list(tensor for", FOLDERS),
    Mutant("a page that a neighbour shares is given back", "checkpoints/files.py", "first, end = -(-begin // mmap.PAGESIZE)", "first, end = begin // mmap.PAGESIZE", FOLDERS),
    Mutant("half a folder is there", "disk.py", "        with suppress(FileNotFoundError):\n            folder.replace(Path(place, \"before\"))\n", "        folder.mkdir(exist_ok=True)\n", "tests/unit/loading/test_saved.py"),
    # Fine-tuning
    Mutant('slices in the order of their names', "nn/adapters.py",
           'torch.block_diag(*(self.lora_b[name] for name in self.names))', 'torch.block_diag(*(self.lora_b[name] for name in sorted(self.names)))', ADAPTERS),
    Mutant('adapters are twice as strong', "nn/adapters.py", 'self._a()) * self.scale', 'self._a()) * 2 * self.scale', ADAPTERS),
    Mutant('merging forgets the strength', "nn/adapters.py", 'return self.scale * (self._b() @ self._a())', 'return self._b() @ self._a()', ADAPTERS),
    Mutant('weights are not frozen', "nn/adapters.py", '    model.requires_grad_(False)\n', '', ADAPTERS),
    Mutant('adapters drop in evaluation', "nn/adapters.py", '        self.train(base.training)\n', '', ADAPTERS),
    Mutant('B does not begin at zero', "nn/adapters.py", 'torch.zeros(len(r), config.rank, **like)', 'torch.ones(len(r), config.rank, **like)', ADAPTERS),
    Mutant('keys and values in turn', "nn/attention.py", 'k=self.head_dim, v=self.value_dim)', 'v=self.value_dim, k=self.head_dim)', ADAPTERS),
    Mutant('a base that changed is taken', "loading/run.py",
           'if checkpoint.state.get("base") != digest_of_base(base.model.state_dict()):', 'if False:', f"{FINE_TUNE}::test_a_base_that_changed_or_moved"),
    Mutant('loading adapters draws', "loading/foreign.py", 'with torch.random.fork_rng(devices=[]):', 'if True:', f"{FINE_TUNE}::test_loading_draws_no_random_numbers"),
    Mutant('the root of the rank is passed over', "checkpoints/peft.py",
           '(math.sqrt(rank) if self.by_root else rank)', 'rank', PEFT),
    Mutant('smaller ranks keep the strength of the largest', "checkpoints/peft.py",
           'self.strength(module.theirs) / self.strength()', '1.0', PEFT),
    Mutant('what the user says counts', "data/conversations.py",
           'np.array(encoded.inside(spans), dtype=np.bool_)', 'np.ones(len(encoded.ids), dtype=np.bool_)', CONVERSATIONS),
    Mutant("special tokens are guessed", "data/masked.py", "(own != IGNORE) & self._ordinary[inputs]", "own != IGNORE", MASKED),
    Mutant("special tokens are put in", "data/masked.py", "random.choice(np.flatnonzero(self._ordinary), other.sum())", "random.integers(len(self._ordinary), size=other.sum())", MASKED),
    Mutant("what is held out is masked by the seed", "data/masked.py", "[self.seed if self.shuffle else 0, epoch, first]", "[self.seed, epoch, first]", MASKED),
    Mutant("every epoch masks the same", "data/masked.py", "else 0, epoch, first]", "else 0, 0, first]", MASKED),
    Mutant("all targets are hidden", "data/masked.py", "hidden = fate < self._masking.hidden", "hidden = fate < 1", MASKED),
    Mutant("pieces leave no room for their frame", "data/batches.py", "_cut(begins, lengths, offsets, context - around)", "_cut(begins, lengths, offsets, context)", MASKED),
    Mutant("a mask leaves its space", "data/tokenizer_configs.py", "lstrip=spaced", "lstrip=False", MASKED),
    Mutant("accents stay", "data/tokenizer_files.py", '"strip_accents": settings.get("strip_accents")', '"strip_accents": False', TOKENIZERS),
    Mutant("cased words are made lower case", "data/tokenizer_files.py", 'settings.get("do_lower_case", True)', "True", TOKENIZERS),
    Mutant("RoBERTa's mask leaves its space", "data/tokenizer_files.py", "strip = {mask} if files == _TWO_FILES else set[str]()", "strip = set[str]()", TOKENIZERS),
    Mutant('the mask is one token late', "data/batches.py", '[~counted[wanted]] = IGNORE', '[~counted[begin : begin + length]] = IGNORE', CONVERSATIONS),
    # Chat
    Mutant("repetitions are free", "data/sandbox.py", "_spend(_ITEM * len(left) * right)", "pass", CHAT),
    Mutant("time is free", "data/sandbox.py", " or time.thread_time() > limits.until", "", CHAT),
    Mutant("literals are free", "data/sandbox.py", "return _filter(cast(nodes.Expr, self.generic_visit(node)), _MADE)", "return self.generic_visit(node)", CHAT),
    Mutant("methods of Python", "data/sandbox.py", "        if isinstance(obj, str | int | float):\n", "        if False:\n", CHAT),
    Mutant("autoescape is allowed", "data/sandbox.py", "def visit_ScopedEvalContextModifier(", "def visit_Nothing(", CHAT),
    Mutant("a split loses the source", "data/rendered.py", "found.append(text[at : at + len(part)])", "found.append(part)", CHAT),
    Mutant("a cut keeps the places", "data/rendered.py", "(max(a, start) - start, min(b, stop) - start, s)", "(a, b, s)", CHAT),
    Mutant("a pickle imports", "checkpoints/transly.py", "        return _Inert\n", "        return super().find_class(module, name)\n", "tests/parity/test_transly.py"),
    Mutant("the answer's end is not in the span", "data/chat.py", "last + len(closing.rstrip())", "last", CHAT),
    Mutant("special tokens in messages", "data/tokenizer.py", "wanted = self._special.find(text.own())", "wanted = self._special.find(text)", TOKENIZERS),
    Mutant("special tokens in messages, unseen", "data/tokenizer.py", "if self._special.holds(whole, wanted):", "if True:", TOKENIZERS),
    Mutant("the chat template is not kept", "data/tokenizer.py", "if self.chat_template is not None:", "if False:", TOKENIZERS),
    Mutant("a kept cache is not rolled back", "generation/generate.py", "decoding.cache.rollback(len(held) - same)", "decoding.cache.rollback(0)", CONVERSATION),
    Mutant("a broken step leaves its cache", "caches.py", "if self._new is not None:", "if False:", CONVERSATION),
    Mutant("every turn is read anew", "generation/generate.py", "if decoding is None or not held or decoding.cache.capacity < capacity:", "if True:", CONVERSATION),
    Mutant("the system's message is dropped", "loading/conversation.py", "[*messages[: questions[0]], *messages[questions[1] :]]", "messages[questions[1] :]", CONVERSATION),
    Mutant("the end of a turn is not known", "loading/loaded.py", "(*self.facts.stop_ids, *special)", "self.facts.stop_ids", CONVERSATION),
    Mutant("a score is of the token before", "generation/scoring.py", "ids[:, 1:][scored]", "ids[:, :-1][scored]", "tests/unit/test_scoring.py"),
    Mutant("a search has no room after its longest row", "models/decoding.py", "        self.cache.tighten()\n", "", "tests/unit/test_searched.py"),
    Mutant("equal prompts are the best and the second", "loading/loaded.py", "ranks=streams)", "ranks=range(len(ids)))", "tests/unit/test_searched.py"),
    Mutant("what the makers say of sampling is not heard", "loading/loaded.py", "self.facts.sampling or USUAL", "USUAL", "tests/unit/test_searched.py"),
    Mutant("a forecast does not read what it forecasts", "generation/forecasting.py", "model(found[-1], cache=cache)", "model(values[:, -1:], cache=cache)", "tests/unit/test_vectors.py"),
    Mutant("rows of a batch draw from other streams", "loading/loaded.py", "[0] * len(ids) if streams is None", "range(len(ids)) if streams is None", "tests/cli/test_generate.py"),
    Mutant("adapters sit on folders only", "loading/run.py", "base = options.open(find(start), options)", "base = options.open(expand_home(start), options)", FINE_TUNE),
    Mutant("eval counts what the user says", "data/dataset.py", "np.concatenate(counted) if counted else None", "None", FINE_TUNE),
    Mutant("pairs begin with fresh weights", "training/trainer.py", "recipe.model.build() if base is None else", "recipe.model.build() if recipe.adapter is None else", PAIR_START),
    Mutant("the tokenizers of a start are exchanged", "tasks/pairs.py", "return PairTokenizer.of(base.source, base.target)", "return PairTokenizer.of(base.target, base.source)", PAIR_START),
    Mutant("one tokenizer becomes two", "data/pairs.py", "PairTokenizer(source, source if source.identity() == target.identity() else target)", "PairTokenizer(source, target)", PAIR_START),
    Mutant("the decoder keeps its dropout", "models/seq2seq.py", "decoder=self.decoder.replace(dropout=p)", "decoder=self.decoder", PAIR_START),
    Mutant("Ctrl-C ends the program", "cli/chat.py", "    except KeyboardInterrupt:\n        print(\" (stopped)\")", "    except ZeroDivisionError:\n        print(\" (stopped)\")", "tests/cli/test_chat.py"),
    # GGUF
    Mutant("q and k stay interleaved", "checkpoints/gguf/architectures.py", "        operations=_interleave,\n", "", f"{GGUF}::test_transformers_reads_what_we_write"),
    Mutant("Gemma's norms keep llama.cpp's one", "checkpoints/gguf/architectures.py", "(Shift(-1.0),)", "(Shift(0.0),)", f"{GGUF}::test_transformers_reads_what_we_write"),
    Mutant("GPT-NeoX keeps llama.cpp's rows", "checkpoints/gguf/architectures.py", "        operations=_neox_rows,\n", "", f"{GGUF}::test_gpt_neox_rows_by_hand"),
    Mutant("factors of frequencies are passed over", "checkpoints/gguf/metadata.py", "    if ROPE_TENSORS[0] in factors:\n        made |= _llama3_of", "    if False:\n        made |= _llama3_of", f"{GGUF}::test_our_model_is_the_one_that_was_written"),
    Mutant("the last of equals becomes code 0", "checkpoints/gguf/blocks.py", "torch.arange(32), 32)\n    scale = x.gather(-1, places.amin(", "torch.arange(32), -1)\n    scale = x.gather(-1, places.amax(", f"{GGUF}::test_quantising_is_that_of_gguf_bit_for_bit"),
    Mutant("halves are rounded to even", "checkpoints/gguf/blocks.py", "(size + (2 * (scaled.abs() - size)).floor())", "scaled.abs().round()", f"{GGUF}::test_quantising_is_that_of_gguf_bit_for_bit"),
    Mutant("scales of Q4_K lack their upper bits", "checkpoints/gguf/blocks.py", "(high & 15) | (low >> 2 & 48)", "(high & 15)", f"{GGUF}::test_expanding_is_that_of_gguf_bit_for_bit"),
    Mutant("offsets may wrap", "checkpoints/gguf/reader.py", "        if end > size:\n", "        if end % 2**64 > size:\n", GGUF_FILES),
    Mutant("tensors may overlap", "checkpoints/gguf/reader.py", "        if offset < end:\n", "        if False:\n", GGUF_FILES),
    Mutant("lengths of lists are believed", "checkpoints/gguf/reader.py", "if count > at_most or count * at_least > self._end - self.at:", "if False:", GGUF_FILES),
    Mutant("merges by scores, the worst first", "data/gguf_vocabulary.py", "(-scores[item[1]], item[1])", "(scores[item[1]], item[1])", f"{GGUF_WORDS}::test_a_vocabulary_with_scores_merges_the_best_first"),
    Mutant("special tokens are words", "data/gguf_vocabulary.py", "inner.add_special_tokens([token for token in special if token.content])", "inner.add_tokens([AddedToken(token.content, normalized=False) for token in special])", f"{GGUF_WORDS}::test_a_tokenizer_of_ours_goes_out_and_back"),
    # Pairs: recurrent translators, beam search, encoder-decoders
    Mutant('pairs: a GRU keeps what it should forget', "nn/recurrent.py",
           'torch.lerp(n, h, z.to(h.dtype))', 'torch.lerp(h, n, z.to(h.dtype))', f"{SEQ2SEQ}::test_a_step_is_that_of_the_fused_layers"),
    Mutant('pairs: the query is the first state for ever', "models/decoders.py",
           'self.score(hidden[-1][0][:, None], state.keys), valid)', 'self.score(state.hidden[-1][0][:, None], state.keys), valid)',
           SEQ2SEQ),
    Mutant('pairs: attention to padding', "models/decoders.py",
           'normalised(self.score(top, state.keys), valid)', 'normalised(self.score(top, state.keys))',
           f"{SEQ2SEQ}::test_the_weights_of_a_token_sum_to_one_and_padding_has_none"),
    Mutant('pairs: nothing is fed back', "models/decoders.py",
           'self.net.step(gates + feed @ to_gates, hidden)', 'self.net.step(gates, hidden)', f"{SEQ2SEQ}::test_luong_is_its_equations"),
    Mutant('pairs: rows of a search keep the keys of others', "models/decoders.py",
           'tree_map(lambda x: x if x is None else x[rows], self)', 'tree_map(lambda x: x if x is None else x[rows], self)._replace(keys=self.keys)', f"{SEQ2SEQ}::test_reordered_rows_go_on_as_they_were"),
    Mutant("pairs: a row takes another row's source mask along", "models/decoding.py",
           'self._memory.tokens.take(rows)', 'self._memory.tokens.take(torch.zeros_like(rows))',
           f"{ENCODER_DECODER}::test_beam_search_over_ragged_sources_with_a_cache_and_without"),
    Mutant('pairs: the encoder sees padding', "models/encoder_decoder.py",
           'embed(torch.where(tokens.valid, source, 0), tokens), tokens)', 'embed(torch.where(tokens.valid, source, 0), tokens), None)',
           f"{ENCODER_DECODER}::test_it_is_that_of_pytorch"),
    Mutant('pairs: smoothing in evaluation', "nn/heads/lm.py",
           'self.smoothing if self.training else 0.0', 'self.smoothing', f"{ENCODER_DECODER}::test_the_loss_is_cross_entropy_with_smoothing_in_training_alone"),
    Mutant('pairs: the target has no share of what is spread', "ops/loss.py",
           'share * (smoothing / logits.shape[1])', 'share * (smoothing / (logits.shape[1] - 1))', f"{LOSS}::test_smoothing_and_bias_with_padding_are_those_of_torch"),
    Mutant('pairs: the end is not counted as a token', "generation/beam.py",
           'return log_probability / n**self.length_penalty', 'return log_probability / max(1, n - 1) ** self.length_penalty',
           f"{BEAM}::test_it_is_that_of_transformers"),
    Mutant('pairs: an end counts however unlikely', "generation/beam.py",
           'if rank < self._search.beams:', 'if True:', f"{BEAM}::test_it_is_that_of_transformers {BEAM}::test_one_beam_takes_the_likeliest_token"),
    Mutant('pairs: the search stops too early', "generation/beam.py",
           'if len(self.done) < self._search.beams:', 'if not self.done:', f"{BEAM}::test_as_many_texts_as_beams_however_good_the_first_is"),
    Mutant('pairs: the search forgets that longer may be better', "generation/beam.py",
           'return max(self.score(log_probability, n), self.score(log_probability, self.max_new_tokens))', 'return self.score(log_probability, n)',
           f"{BEAM}::test_a_longer_text_may_still_win"),
    Mutant('pairs: sources are read with their end', "data/pairs.py",
           'self._ids(self._split.source, i)[1:-1]', 'self._ids(self._split.source, i)[1:]', "tests/unit/data/test_pairs.py::test_a_batch_is_what_the_pairs_say"),
    Mutant('pairs: a convolution sees the future', "nn/convolution.py",
           'torch.cat([before.to(x.dtype), x], dim=1)', 'torch.cat([x, before.to(x.dtype)], dim=1)', STATEFUL),
    Mutant("pairs: states stay where they were", "caches.py",
           "self._held[slot] = tuple(x[rows] for x in held)", "self._held[slot] = tuple(x[: len(rows)] for x in held)",
           f"{STATEFUL}::test_ragged_prompts_go_on_with_a_cache"),
    Mutant("YAML of any size", "yaml_files.py", "        _check_size(data)\n", "", ZOO),
    Mutant("a text may double forty times", "data/tokenizer_files.py", "> _MAX_GROWTH:", "> math.inf:", ZOO),
    Mutant("panics are heard", "data/tokenizer_files.py", "os.dup2(nowhere.fileno(), 2)", "pass", ZOO),
    Mutant("a certificate is believed", "loading/certificate.py", "if not _is_certificate(made):", "if not isinstance(made, dict):", ZOO),
    Mutant("integers as weights", "checkpoints/maps.py", "elif needed.is_floating_point() and not tensors[key].is_floating_point():", "elif False:", ZOO),
    Mutant("NaN in a file's config", "checkpoints/families/config_reader.py", "if not abs(value) <= sys.float_info.max:", "if False:", ZOO),
    Mutant("messages of any length", "cli/__init__.py", "if len(message) > _LONGEST:", "if False:", ZOO),
    # Packed weights and conversion
    Mutant("packed: the middle of a group is lost", "ops/int4.py", "zero + 8 * scale", "zero", QUANTISED),
    Mutant("packed: expanded rows in another order", "ops/int4.py", "wide[:, :, 0] = codes & 15\n    wide[:, :, 1] = codes >> 4", "wide[:, :, 1] = codes & 15\n    wide[:, :, 0] = codes >> 4", QUANTISED),
    Mutant("w8a8: one scale for all vectors", "nn/quantised.py", "vectors.abs().amax(1, keepdim=True)", "vectors.abs().amax()", QUANTISED),
    Mutant("packed: float16 overflows", "nn/quantised.py", "F.linear((x / size).to(torch.float16), self.weight) * size", "F.linear(x.to(torch.float16), self.weight)", QUANTISED),
    Mutant("packed: a group's lowest is its highest", "nn/quantised.py", "to(torch.uint8), scale, low)", "to(torch.uint8), scale, high)", QUANTISED),
    Mutant("save: the facts are lost", "loading/saved.py", "facts = {} if ready.facts is None else ready.facts.to_dict()", "facts: dict[str, Any] = {}", SAVED),
    Mutant("save: a foreign folder is replaced", "loading/saved.py", "and names <= _OURS | set(SIDES)", "", SAVED),
    Mutant("save: any weights will do", "loading/saved.py", "check_fit(state, model.config.build().state_dict(), source=\"the model\")", "pass", SAVED),
    Mutant("the context passes the table", "models/transformer.py", "(self.context, self.longest) if n", "(self.context or self.longest,) if n", SAVED),
    Mutant("packed: a certificate of ourselves", "loading/certificate.py", "(our_logits - their_logits)", "(our_logits - our_logits)", CONVERT),
    Mutant("packed: a text begins without its token", "loading/loaded.py", "if self.facts.begins and begin is not None:", "if False:", CONVERT),
    # The loop of Bahdanau's decoder as one operation
    Mutant("looking back: attention to padding", "ops/attentive_gru.py", "normalised(scores[:, None], p.valid)", "normalised(scores[:, None])", LOOKING),
    Mutant("looking back: the recurrent bias of n has no gate", "ops/attentive_gru.py", "grad_recurrent[t, :, cut:] *= r", "pass", LOOKING),
    Mutant("looking back: nothing comes back through the queries", "ops/attentive_gru.py", "grad_h.addmm_(grad_queries[t], p.query_weight)", "pass", LOOKING),
    Mutant("looking back: the weights have no gradient", "ops/attentive_gru.py", ".add_(grad_looks[t])", "", LOOKING),
    Mutant("looking back: gradients that came in are overwritten", "ops/attentive_gru.py", "grads[1].clone(memory_format=torch.contiguous_format)", "grads[1]", LOOKING),
    Mutant("looking back: in bfloat16 too", "models/decoders.py", "if not one_type or", "if False and", SEQ2SEQ),
    # Memory of a load
    Mutant("gguf: all rows are packed at once", "ops/int4.py", "step = _BLOCK * max(1, _PACKED // (_BLOCK * columns))", "step = -n // _BLOCK * -_BLOCK", GGUF_MEMORY),
    Mutant("gguf: the pages that were read stay", "checkpoints/gguf/load.py", "give_back((rows[part],))", "pass", GGUF_MEMORY),
    Mutant("gguf: raw rows are joined before what is kept has a place", "ops/int4.py", "for codes, scale, zero in parts:", "for codes, scale, zero in list(parts):", GGUF_MEMORY),
    Mutant("adapters: merged in sixteen bits", "nn/adapters.py", "self.update().to(wide)", "self.update().half().to(wide)", "tests/unit/nn/test_adapters.py::test_merging_costs_one_rounding_of_each_weight"),
    Mutant("certificate: of weights in sixteen bits", "loading/convert.py", "certificate(found, ready.model.float())", "certificate(found, ready.model)", f"{CONVERT}::test_the_certificate_is_of_float32"),
    Mutant("files: any number of layers of pairs", "checkpoints/maps.py", "if depth > max(n_tensors, _MAX_SHARED):", "if False:", FLIPS),
    Mutant("a part that nobody imports", "nn/__init__.py", "cross, ffn, latent, recurrent\n", "cross, ffn, recurrent\n", "tests/architecture/test_public_names.py"),
    Mutant("dates: the alignment is shifted", "loading/translator.py", "self.model.align(inputs)[0].cpu()", "self.model.align(inputs)[0].cpu().roll(1, -2)", "tests/laws/test_alignment_of_dates.py"),
    Mutant("pairs: one beam looks aside", "generation/beam.py", "if self._search.beams == 1:", "if False:", BEAM),
    Mutant("pairs: a text with two ends is found twice", "generation/beam.py", "if any(ended and other.ended", "if any(False and other.ended", BEAM),
    Mutant("pairs: every token of a search stands first", "models/seq2seq.py", "start=self._length", "start=0", SEQ2SEQ),
    Mutant("pairs: the alignment begins at the left", "models/seq2seq.py", ".place[:, :1] % width", ".place[:, :1] * 0", SEQ2SEQ),
    Mutant("pairs: a row reads its neighbour's source", "models/pairs.py", "if tokens.shape != ids.shape:", "if False:", SEQ2SEQ),
    Mutant("pairs: latent attention looks ahead", "nn/latent.py", "    def stream_mask(self)", "    def another_mask(self)", ENCODER_DECODER),
    Mutant("pairs: what a longer one holds is forgotten", "caches.py", "wide.narrow(dim, 0, held).copy_(x.narrow(dim, 0, held))", "pass", CACHES),
    Mutant("pairs: those that were left out are measured", "data/pairs.py", "[pairs[i] for i in np.flatnonzero(fits)]", "pairs", TRANSLATE),
    Mutant("pairs: another corpus is measured", "tasks/task.py", "if asked.fingerprint != task.fingerprint:", "if False:", TRANSLATE),
    Mutant("pairs: nothing is saved where nothing is shown", "training/session.py", "except (QkvError, OSError):", "except QkvError:", TRANSLATE),
    Mutant("a hangup is not heard", "training/signals.py", "watched.append(_HANGUP)", "pass", SIGNALS),
    Mutant("nohup is not obeyed", "training/signals.py", " and signal.getsignal(_HANGUP) is not signal.SIG_IGN", "", SIGNALS),
    Mutant("a run goes back", "training/start.py", "if trainer.step > config.steps:", "if False:", RESUME),
    Mutant("pairs: a preset under the old one", "training/recipe_files.py", 'if key == "model.preset":', 'if key == "model.presets":', TRANSLATE),
    Mutant("pairs: a run asks for its start again", "training/start.py", "checkpoint is not None and config.data.keeps_start", "checkpoint is None and config.data.keeps_start", PAIR_START),
]  # fmt: skip


def run(tests: str, work: Path) -> bool:
    """Whether the tests pass on the copy."""
    environment = os.environ | {"PYTHONPATH": f"{work / 'src'}:{work / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode > 1:  # not a verdict of the tests; below 0 the fault took the interpreter down
        sys.exit(f"{tests}: could not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def survives(mutant: Mutant, work: Path) -> bool:
    """Whether the tests pass although the fault is there."""
    path = work / "src" / "qkv" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) < 1:
        sys.exit(f"{mutant.name}: {mutant.file} has no {mutant.old!r} any more; fix tests/mutants.py")
    header = "import torch\n" if "torch.arange(x.shape" in mutant.new else ""
    changed = text.replace(mutant.old, mutant.new, 1)
    if header:
        changed = changed.replace("import torch.nn.functional as F", "import torch\nimport torch.nn.functional as F", 1)
    path.write_text(changed, encoding="utf-8")
    try:
        return run(mutant.tests, work)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Try every mutant, or those whose name contains the words given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose name contains one of these")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    left = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", work)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if not run(tests, work):
                sys.exit(f"{tests} fails without any fault; fix that first")
        for mutant in chosen:
            alive = survives(mutant, work)
            left += [mutant.name] if alive else []
            sys.stdout.write(f"{'SURVIVED' if alive else 'killed  '}  {mutant.name}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - len(left)} of {len(chosen)} killed\n")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
