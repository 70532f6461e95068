"""Pictures, videos and prompts become tensors, exactly as in the official processors."""
