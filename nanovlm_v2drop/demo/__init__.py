"""The demo model's world: synthetic scenes with questions, and the training that made weights/demo."""
