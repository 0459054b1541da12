"""The parts of a Transformer, each a config that builds a `torch.nn.Module`."""
