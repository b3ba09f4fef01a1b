"""Measuring: warm-up, timed steps, peaks, and the devices they are read from."""

from src.measure.steps import Measurement, PhasePeaks, measure, measure_phases

__all__ = ["Measurement", "PhasePeaks", "measure", "measure_phases"]
