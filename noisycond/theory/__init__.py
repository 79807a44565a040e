"""Slight corruption in a Gaussian mixture with a linear denoiser, in closed form; docs/theory.md derives it.

Needs NumPy and SciPy; the simulation needs the rest of noisycond.
"""
