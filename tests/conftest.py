"""Settings of the whole suite."""

from hypothesis import settings

# No deadline: a loaded machine is no fault. Derandomized: the same examples each time, so that a failure is repeatable.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
