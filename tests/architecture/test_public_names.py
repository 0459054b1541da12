"""What `import qkv` offers, and what holds for every config."""

import ast
import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qkv
from qkv.config import Config
from qkv.yaml_files import dump_yaml, parse_yaml

for module in pkgutil.walk_packages(qkv.__path__, "qkv."):
    importlib.import_module(module.name)

STUB = ast.parse(Path(qkv.__file__).with_suffix(".pyi").read_text())
NAMES = [alias.name for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def subclasses(cls):
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


CONFIGS = {cls for cls in subclasses(Config) if cls.__module__.startswith("qkv.")}  # tests may define some of their own
CONCRETE = sorted((cls for cls in CONFIGS if not cls.is_abstract()), key=lambda cls: cls.__name__)


def test_every_name_is_there():
    assert len(NAMES) == len(set(NAMES))
    for name in NAMES:
        assert getattr(qkv, name).__name__.removeprefix("qkv.") == name
    assert qkv.__version__
    assert set(NAMES) <= set(dir(qkv))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qkv' has no attribute 'atend'"):
        _ = qkv.atend


def test_import_does_not_import_torch():
    code = "import sys, qkv, qkv.errors; assert 'torch' not in sys.modules; qkv.attend; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_is_public_needs_no_import_of_its_own():
    subprocess.run([sys.executable, "-c", "import qkv; qkv.laws.check"], check=True)


def test_every_config_is_a_public_name():
    missing = [cls.__name__ for cls in CONCRETE if cls.__name__ not in NAMES]
    assert not missing, f"add to src/qkv/__init__.pyi: {missing}"
    assert all(getattr(qkv, cls.__name__) is cls for cls in CONCRETE)


def test_no_two_configs_have_one_name():
    assert len({cls.tag() for cls in CONFIGS}) == len(CONFIGS) > 20


# What configs without defaults for all of their fields are made of here.
NEEDED = {
    "And": lambda: {"a": qkv.Causal(), "b": qkv.Window(size=4)},
    "Or": lambda: {"a": qkv.Causal(), "b": ~qkv.Chunked(size=3)},
    "Not": lambda: {"a": qkv.Causal()},
    "Window": lambda: {"size": 4},
    "Chunked": lambda: {"size": 4},
    "Strided": lambda: {"stride": 4},
    "CrossAttentionConfig": lambda: {"n_heads": 4, "mask": qkv.Full(), "memory_dim": 10},
    "LatentAttentionConfig": lambda: {
        "n_heads": 4, "mask": qkv.Causal(), "norm": qkv.RMSNormConfig(), "kv_rank": 8, "plain_dim": 4, "rotary_dim": 2,
        "value_dim": 4,
    },
    "AttentionConfig": lambda: {"n_heads": 4, "mask": qkv.Causal() & qkv.Window(size=8), "position": yarn()},
    "Repeat": lambda: {"n": 3, "pattern": (block(), block())},
    "TransformerConfig": lambda: {"d_model": 8, "embed": qkv.TokenEmbedderConfig(vocab_size=5), "blocks": (block(),)},
    "LearnedPositionsConfig": lambda: {"length": 16},
    "LearnedGridConfig": lambda: {"rows": 3, "columns": 5},
    "PatchEmbedderConfig": lambda: {"patch": 4},
    "ConcatPoolConfig": lambda: {"pools": (qkv.FirstTokenConfig(), qkv.MeanPoolConfig(skip=1))},
    "LinearScalingConfig": lambda: {"factor": 2.0},
    "NTKScalingConfig": lambda: {"factor": 2.0},
    "LongRoPEScalingConfig": lambda: {"original_length": 64, "short_factors": (1.0, 2.0), "long_factors": (3.0, 4.0)},
    "PackagePairsConfig": lambda: {"name": "corpus", "version": "1.0", "sha256": "0" * 64, "file": "*.csv"},
    "TSVConfig": lambda: {"path": "pairs.tsv"},
    "LabelledFilesConfig": lambda: {"path": "texts.csv"},
    "LabelledWordsConfig": lambda: {"path": "words.jsonl"},
    "LabelledVectorsConfig": lambda: {"path": "series"},
    "ClassFoldersConfig": lambda: {"path": "texts"},
    "PictureFoldersConfig": lambda: {"path": "pictures"},
    "PictureTablesConfig": lambda: {"path": "pictures.parquet"},
    "IDXFilesConfig": lambda: {"path": "train-images-idx3-ubyte"},
    "PackagePicturesConfig": lambda: {
        "name": "corpus", "version": "1.0", "sha256": "0" * 64, "file": "*.csv", "size": (8, 8),
    },
    "PatchBudgetConfig": lambda: {"patch": 4, "most": 9},
    "PicturesConfig": lambda: {"channels": 1, "mean": (0.5,), "std": (0.25,)},
    "DescribedFilesConfig": lambda: {"path": "pictures.csv"},
    "DescribedDataConfig": lambda: {"source": qkv.EmojisConfig()},
    "AttentionPoolConfig": lambda: {"n_heads": 2},
    "TwoTowersConfig": lambda: dict.fromkeys(
        ("text", "picture"), example(qkv.TransformerConfig).replace(head=qkv.EmbeddingHeadConfig())
    ),
    "ShiftConfig": lambda: {"pixels": 1},
    "RandomAffineConfig": lambda: {"degrees": 10.0},
    "ClassDataConfig": lambda: {"source": qkv.ClassFoldersConfig(path="texts")},
    "MaskedDataConfig": lambda: {
        "source": qkv.FilesConfig(path="corpus.txt"), "tokenizer": qkv.CharacterTokenizerConfig(),
    },
    "PairDataConfig": lambda: {
        "source": qkv.TSVConfig(path="pairs.tsv"), "tokenizer": qkv.CharacterTokenizerConfig(),
        "target_tokenizer": qkv.WordTokenizerConfig(),
    },
    "Seq2SeqConfig": lambda: {"d_model": 8, "decoder": qkv.LuongConfig(score=qkv.DotScoreConfig())},
    "EncoderDecoderConfig": lambda: {"d_model": 8, "encoder": block(), "decoder": reading_block()},
    "BPETokenizerConfig": lambda: {"vocab_size": 300},
    "TokenizerFileConfig": lambda: {"path": "tokenizer.json"},
    "FilesConfig": lambda: {"path": "corpus.txt"},
    "ConversationsConfig": lambda: {"path": "chat.jsonl"},
    "VectorFilesConfig": lambda: {"path": "vectors.npy"},
    "PackageConfig": lambda: {"name": "corpus", "version": "1.0", "sha256": "0" * 64, "files": "*.txt"},
    "DataConfig": lambda: {"source": qkv.FilesConfig(path="corpus.txt"), "tokenizer": qkv.CharacterTokenizerConfig()},
    "StartConfig": lambda: {"path": "runs/mine"},
    "RecipeConfig": lambda: {"model": qkv.preset("gpt2"), "data": example(qkv.DataConfig), "steps": 10},
} | {
    name: lambda: {"factor": 2.0, "original_length": 64}
    for name in ("DynamicNTKScalingConfig", "YaRNScalingConfig", "Llama3ScalingConfig")
} | {
    name: lambda: {"norm": qkv.RMSNormConfig(), "sublayers": (qkv.GLUConfig(), qkv.FFNConfig(bias=True))}
    for name in (
        "PreNormConfig", "PostNormConfig", "OutputNormConfig", "SandwichConfig", "ParallelConfig",
        "ParallelPreNormConfig",
    )
}  # fmt: skip


def yarn():
    return qkv.RoPEConfig(theta=5e5, scaling=example(qkv.YaRNScalingConfig))


def reading_block():
    read = qkv.CrossAttentionConfig(n_heads=4, mask=qkv.Full())
    return qkv.PreNormConfig(norm=qkv.RMSNormConfig(), sublayers=(read, qkv.GLUConfig()))


def block():
    return example(qkv.PreNormConfig)


def example(cls):
    return cls(**NEEDED.get(cls.__name__, dict)())


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_every_config_is_frozen_and_makes_the_round_trip(cls):
    made = example(cls)
    field = dataclasses.fields(cls)[0].name if dataclasses.fields(cls) else "anything"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, None)
    data = made.to_dict()
    assert cls.from_dict(data) == made
    assert Config.from_dict(parse_yaml(dump_yaml(data))) == made
    assert hash(made) == hash(dataclasses.replace(made))


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_a_config_describes_the_fields_that_it_inherits(cls):
    own = vars(cls).get("__annotations__", {})
    inherited = [field.name for field in dataclasses.fields(cls) if field.name not in own]
    silent = [name for name in inherited if f"\n    {name}: " not in cls.__doc__]
    assert not silent, f"{cls.__name__}: {silent}"


def test_a_config_is_read_with_its_bases():
    assert qkv.RMSNormConfig.__doc__.endswith(
        "Inherited:\n    eps: What is added to the variance or mean square, inside the root."
    )
    assert "Table of positions that is added" in qkv.TokenEmbedderConfig.__doc__
    assert qkv.AttentionConfig.__doc__.count("    dropout: ") == 1


def test_whoever_loads_a_model_knows_every_part():
    """Also in a process that has imported nothing else: a part can be named in a file if it has been imported."""
    code = "import qkv.loading.layouts; from qkv.config import Config; print(*Config._registry)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    parts = {cls.tag() for cls in CONCRETE if cls.__module__.startswith(("qkv.nn.", "qkv.models.", "qkv.masks"))}
    assert len(parts) > 30
    assert parts <= set(done.stdout.split())
