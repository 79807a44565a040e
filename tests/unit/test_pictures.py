"""Pictures beside the numbers."""

import numpy as np
import pytest
from PIL import Image

from noisycond.pictures import control_grid


def colour(value: int, side: int = 4) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


@pytest.mark.parametrize("targets", [[20, 21, 22], None])
def test_a_row_per_control_with_its_target_and_its_results(targets):
    given = None if targets is None else [colour(value, 8) for value in targets]
    results = [[colour(30 + row), colour(40 + row)] for row in range(3)]
    grid = np.array(control_grid([colour(10 + row) for row in range(3)], given, results, scale=2))
    columns = 4 if targets else 3
    assert grid.shape == (3 * 10 + 2, columns * 10 + 2, 3)
    centres = grid[6::10, 6::10, 0]
    expected = [[10 + row, *([20 + row] if targets else []), 30 + row, 40 + row] for row in range(3)]
    assert centres.tolist() == expected
