"""Methods side by side: plans, answers on disk, scores with intervals."""
