"""Text to tokens to a pretrained model: data, ZeRO training, checkpoints, export, evaluation, generation."""
