"""The paper's statements put to the test: theory, claims, ablations."""
