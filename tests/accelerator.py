"""Accelerate's settings are shared by a process; each test of a training is a process of its own in that respect."""

from accelerate.state import AcceleratorState, GradientState


def reset_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
