"""`qkv pull`."""


def pull(name: str, /) -> None:
    """Download pretrained weights, verify them, and print where they lie.

    Args:
        name: smollm2 (SmolLM2-135M-Instruct in four bits, Apache-2.0), minilm (all-MiniLM-L6-v2, an encoder of
            sentences, Apache-2.0), or dinov2-small (DINOv2 ViT-S/14, an encoder of pictures that was trained
            on for saliency, MIT).
    """
    from qkv.checkpoints.named import NAMED
    from qkv.checkpoints.named import pull as run

    path = run(name)
    print(path)
    print(f"licence {NAMED[name].licence}   ·   next: {NAMED[name].verbs}")
