"""Synthetic scenes and clips with questions, and the training of weights/demo and weights/demo-video."""
