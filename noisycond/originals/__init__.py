"""Weights under the names of the papers' own code, to models of diffusers."""
