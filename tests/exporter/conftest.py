"""Settings for every test of the exporter."""

import os

# The networks here are tiny: on a busy machine a second thread is mostly waited for. Read when torch is first imported.
os.environ["OMP_NUM_THREADS"] = "1"
