"""Official safetensors checkpoints become models, strictly; the models by name."""
