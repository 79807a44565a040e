"""Opening datasets, the digits default, batches in a global order, and the latent cache."""
