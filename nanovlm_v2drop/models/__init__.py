"""The networks, from pixel values to logits. They know nothing of dropping."""
