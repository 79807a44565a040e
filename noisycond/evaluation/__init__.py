"""Metrics of generated images: features once, then fidelity, diversity, memorization and agreement with labels."""
