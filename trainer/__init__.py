"""From text to a pretrained model: data, training with ZeRO, checkpoints, export, metrics, generation."""
