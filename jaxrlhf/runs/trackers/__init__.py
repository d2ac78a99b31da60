"""Trackers: where the settings, metrics and samples of a run are shown, beside the files of its folder."""

from jaxrlhf.runs.trackers.base import TrackedRun, Tracker
from jaxrlhf.runs.trackers.registry import TRACKERS, Trackers, TrackingConfig

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "Trackers", "TrackingConfig"]
