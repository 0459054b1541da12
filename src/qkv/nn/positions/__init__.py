"""Positions: tables that are added to the embeddings, and in attention a bias of the scores or a rotation."""

from qkv.nn.positions.rope_scaling import (
    DynamicNTKScalingConfig,
    LinearScalingConfig,
    Llama3ScalingConfig,
    LongRoPEScalingConfig,
    NTKScalingConfig,
    RoPEScalingConfig,
    YaRNScalingConfig,
)
from qkv.nn.positions.rotary import AxialRoPEConfig, CentredRoPEConfig, GridRoPEConfig, RoPEConfig, RotaryConfig
from qkv.nn.positions.score_bias import ALiBiConfig, ScoreBias, ScoreBiasConfig, T5BiasConfig
from qkv.nn.positions.tables import (
    GridResizeConfig,
    LearnedGridConfig,
    LearnedPositionsConfig,
    PositionTable,
    PositionTableConfig,
    SinusoidalGridConfig,
    SinusoidalPositionsConfig,
)

AttentionPositionConfig = RoPEConfig | RotaryConfig | ScoreBiasConfig
"""What tells attention where tokens stand: a rotation of queries and keys, or a bias of the scores."""
