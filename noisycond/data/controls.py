"""Control images (Canny edges, masks, whatever a dataset has) beside the images they belong to.

Letters: B examples, R the resolution.
"""

import numpy as np
from PIL import Image


CANNY_LOW, CANNY_HIGH = 100, 200  # the thresholds of Diffusers' ControlNet examples, of gradients of uint8 images


def canny_edges(image: Image.Image, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Image.Image:
    """The edges of an image (Canny, 1986), white on black, RGB, of the image's size.

    Args:
        image: RGB. low, high: thresholds of the hysteresis, of the L1 norm of Sobel gradients of grey values 0 to 255.
    """
    import cv2

    grey = np.array(image.convert("L"))
    return Image.fromarray(cv2.Canny(grey, low, high)).convert("RGB")


def threshold_mask(image: Image.Image) -> Image.Image:
    """What is brighter than the threshold of Otsu (1979), white on black, RGB, of the image's size."""
    import cv2

    grey = np.array(image.convert("L"))
    _, mask = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return Image.fromarray(mask).convert("RGB")


# What a control column of this name is made by, where it is made of the image alone.
CONTROL_ANNOTATORS = ("canny", "mask", "sam")
