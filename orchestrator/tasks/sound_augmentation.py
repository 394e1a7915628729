"""Sounds changed at random while training, so that a model learns what stays: for every task that hears.

What is drawn for a row depends on its seed alone. The model's own masking (SpecAugment in wav2vec 2.0 and Whisper) draws
from the process's generator, so it is turned off (`sound_models.steady`); `time_masks` and `frequency_masks` take its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from orchestrator.schema import Schema

if TYPE_CHECKING:
    import numpy as np

Amount = Annotated[float, Field(ge=0)]


class SoundAugment(Schema):
    """How far a sound may be changed; nothing by default."""

    speed: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Faster or slower by up to this share, the pitch with it (Ko et al. 2015); 0.1 is usual."""
    shift_s: Amount = 0.0
    """Earlier or later by up to so many seconds; silence takes the place, what is moved out is lost."""
    gain_db: Amount = 0.0
    """Louder or softer by up to so many decibels."""
    noise_snr_db: tuple[float, float] | None = None
    """White noise at a signal-to-noise ratio in decibels between these two, such as [10, 40]."""
    time_masks: Annotated[int, Field(ge=0)] = 0
    """Stretches of silence (SpecAugment, Park et al. 2019, arXiv 1904.08779)."""
    time_mask_s: Annotated[float, Field(gt=0)] = 0.1
    """Longest of them, in seconds; together they take at most half of a sound."""
    frequency_masks: Annotated[int, Field(ge=0)] = 0
    """Bands that are blanked out, for models that read spectrograms."""
    frequency_mask_share: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Widest of them, as a share of the spectrogram."""

    @model_validator(mode="after")
    def _ordered(self) -> SoundAugment:
        if self.noise_snr_db is not None and self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError("noise_snr_db is [least, most]; the first must not be above the second")
        return self

    def __bool__(self) -> bool:
        return self != type(self)()

    def of_samples(self, samples: np.ndarray, rate: int, rng: np.random.Generator, *, most: int | None = None) -> np.ndarray:
        """The changed sound, float32; no longer than `most` samples, where it was not before (a slower speed is left out then)."""
        import numpy as np

        if self.speed:
            import soxr

            factor = rng.uniform(1 - self.speed, 1 + self.speed)
            if most is None or len(samples) / factor <= most:
                samples = np.asarray(soxr.resample(samples, rate * factor, rate), dtype=np.float32)
        samples = samples.copy()
        if self.shift_s:
            by = round(rng.uniform(-self.shift_s, self.shift_s) * rate)
            by = max(-len(samples) // 2, min(len(samples) // 2, by))
            samples = np.roll(samples, by)
            samples[slice(0, by) if by > 0 else slice(len(samples) + by, len(samples))] = 0.0
        if self.noise_snr_db is not None:
            ratio = rng.uniform(*self.noise_snr_db)
            power = float(np.mean(np.square(samples, dtype=np.float64)))
            samples = samples + rng.standard_normal(len(samples), dtype=np.float32) * np.float32((power / 10 ** (ratio / 10)) ** 0.5)
        if self.gain_db:
            samples = samples * np.float32(10 ** (rng.uniform(-self.gain_db, self.gain_db) / 20))
        longest = min(self.time_mask_s * rate, len(samples) / (2 * max(1, self.time_masks)))
        for _ in range(self.time_masks):
            width = int(rng.uniform(0, longest))
            start = int(rng.integers(0, len(samples) - width + 1))
            samples[start : start + width] = 0.0
        return samples

    def of_spectrogram(self, spectrogram: np.ndarray, rng: np.random.Generator, *, axis: int) -> np.ndarray:
        """With bands along `axis` set to the mean."""
        for _ in range(self.frequency_masks):
            bins = spectrogram.shape[axis]
            width = int(rng.uniform(0, self.frequency_mask_share * bins + 1))
            start = int(rng.integers(0, bins - width + 1))
            band: list[slice] = [slice(None)] * spectrogram.ndim
            band[axis] = slice(start, start + width)
            spectrogram = spectrogram.copy()
            spectrogram[tuple(band)] = spectrogram.mean()
        return spectrogram
