"""Accelerate's settings are shared by a process: `conftest.own_process` resets them before each test and after it.

A test of several trainings does so between them.
"""

from accelerate.state import AcceleratorState, GradientState


def reset_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
