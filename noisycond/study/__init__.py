"""Studies: a grid of runs described in one file, run by the project's own scripts, and what comes out of it."""
