"""How fast prefill and decode are; see run.py."""
