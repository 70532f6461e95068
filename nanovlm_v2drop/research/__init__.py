"""Tests of the paper's statements: theory, ablations, and claims with verdicts."""
