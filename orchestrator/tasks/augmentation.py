"""Augmentation of images on Pillow and numpy: what is drawn for a row depends on its generator alone.

Random resized crops (Szegedy et al. 2015, arXiv 1409.4842), colour jitter, RandAugment (Cubuk et al. 2019, arXiv 1909.13719,
with the operations and ranges of torchvision), mixup (Zhang et al. 2018, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from orchestrator.schema import Schema

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GREY = 124
"""What stands where a turned or shifted picture leaves a gap: near the mean of photographs."""


class RandAugment(Schema):
    """Some operations, drawn anew for each image, all of one strength."""

    n: Annotated[int, Field(ge=1, le=14)] = 2
    """Operations an image."""
    m: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength, from 0 to 30."""


class Augment(Schema):
    """What is done to training images at random, in this order; nothing by default."""

    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random resized crop: the smallest share of the image's area that is kept; 0.08 is usual for ImageNet, 0.5 is mild."""
    flip: bool = False
    """Mirror every other image."""
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Colour jitter: brightness, contrast and saturation change by up to this share."""
    randaugment: RandAugment | None = None
    """`{n: 2, m: 9}`: so many operations of such strength; `{}` takes these defaults."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Each image is a mixture with another of the training rows; alpha of the Beta distribution of the shares, 0.2 is usual. 0: off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """A rectangle of each image is that of another of the training rows; alpha of the Beta distribution of the shares, 1 is usual. 0: off."""

    @property
    def mixes(self) -> bool:
        """Whether a row needs another one."""
        return self.mixup > 0 or self.cutmix > 0

    def __bool__(self) -> bool:
        return self != type(self)()

    def apply(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image, changed; mixing comes later, when images have one size."""
        from PIL import Image as images

        if self.crop is not None:
            image = image.crop(resized_crop(image.size, self.crop, rng))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(images.Transpose.FLIP_LEFT_RIGHT)
        if self.color:
            image = jitter(image, self.color, rng)
        if self.randaugment is not None:
            for _ in range(self.randaugment.n):
                image = _operate(image, int(rng.integers(len(_OPERATIONS))), self.randaugment.m / 30, rng)
        return image

    def mix(self, one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """Two images of one shape (channels, height, width) as one, uint8, and the share that is the first one's."""
        import numpy as np

        cut = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(rng.beta(alpha, alpha))
        if not cut:
            mixed = np.round(share * one.astype(np.float32) + (1 - share) * other.astype(np.float32))
            return mixed.astype(np.uint8), share
        _, height, width = one.shape
        side = math.sqrt(1 - share)
        y, x = rng.integers(height), rng.integers(width)
        top, bottom = max(0, y - int(height * side) // 2), min(height, y + int(height * side) // 2)
        left, right = max(0, x - int(width * side) // 2), min(width, x + int(width * side) // 2)
        mixed = one.copy()
        mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def jitter(image: Image.Image, most: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each times a number from 1 - most to 1 + most, in random order."""
    from PIL import ImageEnhance

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in rng.permutation(len(enhancers)):
        image = enhancers[place](image).enhance(float(rng.uniform(1 - most, 1 + most)))
    return image


def resized_crop(size: tuple[int, int], smallest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: a share of the area from `smallest` to 1, sides in a ratio from 3:4 to 4:3 of the image's own."""
    width, height = size
    area = rng.uniform(smallest, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide = max(1, min(width, round(width * math.sqrt(area * ratio))))
    high = max(1, min(height, round(height * math.sqrt(area / ratio))))
    left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
    return left, top, left + wide, top + high


# ---- RandAugment ---------------------------------------------------------------------------------------------
def _enhance(name: str) -> Callable[[Image.Image, float], Image.Image]:
    def operation(image: Image.Image, strength: float) -> Image.Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * strength)

    return operation


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[[Image.Image, float], Image.Image]:
    def operation(image: Image.Image, strength: float) -> Image.Image:
        from PIL import Image as images

        return image.transform(image.size, images.Transform.AFFINE, matrix(strength, *image.size), fillcolor=_grey(image))

    return operation


def _grey(image: Image.Image) -> Any:
    return GREY if image.mode == "L" else (GREY,) * 3


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(30 * strength, fillcolor=_grey(image))


def _image_ops(name: str, *arguments: Callable[[float], int]) -> Callable[[Image.Image, float], Image.Image]:
    def operation(image: Image.Image, strength: float) -> Image.Image:
        from PIL import ImageOps

        return getattr(ImageOps, name)(image, *(argument(strength) for argument in arguments))

    return operation


_OPERATIONS: tuple[tuple[bool, Callable[[Image.Image, float], Image.Image]], ...] = (
    (False, lambda image, _: image),
    (True, _affine(lambda strength, width, height: (1, 0.3 * strength, 0, 0, 1, 0))),
    (True, _affine(lambda strength, width, height: (1, 0, 0, 0.3 * strength, 1, 0))),
    (True, _affine(lambda strength, width, height: (1, 0, 150 / 331 * strength * width, 0, 1, 0))),
    (True, _affine(lambda strength, width, height: (1, 0, 0, 0, 1, 150 / 331 * strength * height))),
    (True, _rotate),
    (True, _enhance("Brightness")),
    (True, _enhance("Color")),
    (True, _enhance("Contrast")),
    (True, _enhance("Sharpness")),
    (False, _image_ops("posterize", lambda strength: 8 - round(4 * strength))),
    (False, _image_ops("solarize", lambda strength: round(255 * (1 - strength)))),
    (False, _image_ops("autocontrast")),
    (False, _image_ops("equalize")),
)
"""Identity, shear and shift in x and y, rotation, brightness, saturation, contrast, sharpness, posterize, solarize, autocontrast,
equalize; True: in either direction."""


def _operate(image: Image.Image, place: int, strength: float, rng: np.random.Generator) -> Image.Image:
    either, operation = _OPERATIONS[place]
    sign = -1.0 if either and rng.random() < 0.5 else 1.0
    return operation(image, sign * strength)
