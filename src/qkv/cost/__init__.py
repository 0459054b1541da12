"""What a model costs before it is built: parameters, bytes and FLOPs."""

from qkv.cost.cost import Cost, PartCost, mean_keys, parameters, summary, training_flops_per_token

__all__ = ["Cost", "PartCost", "mean_keys", "parameters", "summary", "training_flops_per_token"]
